//! The planner: which role goes on which devices, with which ZeRO stage, offload and tensor-parallel size.
//!
//! It goes through every partition of the roles that the tier allows, every ZeRO stage and offload of the trained roles,
//! whole or sharded frozen roles and every tensor-parallel size of the generator; drops what the memory ledger says does not fit;
//! estimates the seconds of a step; and takes the fastest. A workload that does not fit is refused with the numbers and the
//! nearest single change that would fit.

mod alone;
mod estimate;
mod explain;
mod inventory;
mod partition;
mod refusal;
mod render;
mod search;

use std::collections::BTreeMap;
use std::fmt;

use echelon_core::memory::Phase;
use echelon_core::role::Role;
use echelon_core::workload::Workload;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use alone::{Alone, Choice};
pub use refusal::{Change, Refusal, Shortfall};

use crate::cluster::Cluster;
use crate::ledger::{Entry, ModelSizes, Place};
use crate::rates::Rates;
use crate::tier::{ROLES, Tier};
use estimate::Problem;
use inventory::{EVERY_SLICE, Inventory};
use partition::Hand;
use search::Outcome;

/// What the recipe decides; everything else is the planner's choice.
#[derive(Clone, Debug, PartialEq)]
pub struct Constraints {
    /// None goes by the actor's size and is raised when nothing fits.
    pub tier: Option<Tier>,
    pub zero_stage: Option<u8>,
    pub adam_offload: Option<bool>,
    pub tensor_parallel: Option<usize>,
    pub by_hand: Vec<ByHand>,
    /// Every device gets a role, also where fewer would be faster.
    pub use_all_devices: bool,
    /// The nodes are declared in pools, so that no key says how many there are.
    pub pools: bool,
    /// Part of a device's memory that is planned for; the rest covers fragmentation.
    pub memory_fraction: f64,
}

impl Default for Constraints {
    fn default() -> Constraints {
        Constraints {
            tier: None,
            zero_stage: None,
            adam_offload: None,
            tensor_parallel: None,
            by_hand: Vec::new(),
            use_all_devices: false,
            pools: false,
            memory_fraction: 0.92,
        }
    }
}

/// `[placement.ROLE]` of a recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct ByHand {
    pub role: Role,
    /// Numbers through all nodes.
    pub devices: Option<Vec<usize>>,
    pub colocate_with: Option<Role>,
}

/// Why there is no plan.
#[derive(Debug, Error)]
pub enum PlanError {
    #[error("{0}")]
    Refused(Box<Refusal>),
    #[error("[placement.{role}] names no device: name some, or leave the choice to the planner")]
    NoDevices { role: Role },
    #[error("[placement.{role}] names device {device}: there are {num_devices}, counted from 0 through all nodes")]
    NoSuchDevice { role: Role, device: usize, num_devices: usize },
    #[error(
        "[placement.{role}] and [placement.{other}] share device {device} but not all: name equal or separate devices"
    )]
    Overlap { role: Role, other: Role, device: usize },
    #[error("[placement.{role}] is colocated with {other}, which has no place of its own: name another role")]
    ColocatedWithNobody { role: Role, other: Role },
    #[error("a ZeRO stage is 0 to 3, found {found}")]
    ZeroStage { found: u8 },
    #[error("{what} is 0: a step needs at least 1")]
    Nothing { what: &'static str },
}

/// Where everything goes, what it needs there, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The hardware, in words.
    pub cluster: String,
    /// Of a node, in words; what was assumed is said.
    pub host_memory: String,
    /// What is kept of each GPU for what is no tensor, in words; none without GPUs.
    pub kept: Option<String>,
    /// Most host memory of a node that GPUs read and write, in words; no other process gets it.
    pub page_locked: Option<String>,
    pub tier: Tier,
    /// Why this tier.
    pub tier_reason: String,
    pub actor_params: u64,
    pub groups: Vec<GroupPlan>,
    pub seconds: StepSeconds,
    /// One sentence with numbers.
    pub why: String,
    pub runner_up: Option<Alternative>,
    /// Devices without a role, and why they have none.
    pub idle_devices: usize,
    pub idle_reason: String,
    /// Combinations of partition, stages, offload and tensor-parallel size, and those that fit.
    pub considered: usize,
    pub fitting: usize,
    /// Of one model alone: every choice of stage and offload, plainest first; [`Alone`] shows them.
    #[serde(skip)]
    pub choices: Vec<Choice>,
}

/// Roles on common devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupPlan {
    pub roles: Vec<RolePlan>,
    /// Numbers through all nodes, in rank order.
    pub devices: Vec<DeviceRange>,
    pub num_devices: usize,
    /// Such as "8 x H100-80GB".
    pub device_kinds: String,
    pub num_nodes: usize,
    /// Training state leaves the devices while the generator works.
    pub moves_to_host: bool,
    /// The device's memory is a share of host memory.
    pub shares_host_memory: bool,
    /// What tensors may take of each device, and of its share of host memory.
    pub usable_bytes: u64,
    pub usable_host_bytes: u64,
    /// What each role holds on each device.
    pub ledger: Vec<Entry>,
    /// Bytes at the height of every phase.
    pub peaks: Vec<PhaseBytes>,
    pub seconds: GroupSeconds,
}

/// Devices `first..=last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRange {
    pub first: usize,
    pub last: usize,
}

/// How a role is held on its group's devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RolePlan {
    pub role: Role,
    /// Frozen roles are sharded at 3 and whole below.
    pub zero_stage: u8,
    pub adam_offload: bool,
    /// Devices per engine of the generator, else 1.
    pub tensor_parallel: usize,
    /// Sequences that each engine of the generator decodes at once; its KV cache is in the ledger.
    pub slots: usize,
    /// The generator computes on the published weights themselves.
    pub shares_weights: bool,
}

/// Bytes of one device in a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseBytes {
    pub phase: Phase,
    pub device_bytes: u64,
    pub host_bytes: u64,
}

/// A group's own seconds per step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupSeconds {
    #[serde(flatten)]
    pub phases: BTreeMap<Phase, f64>,
    pub switch: f64,
}

/// Seconds of a step by phase: groups score and train at once, so the slowest counts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepSeconds {
    pub generate: f64,
    pub score: f64,
    pub train: f64,
    pub sync: f64,
    /// Training state to host memory and back.
    pub switch: f64,
    /// Calls, gathering of rows, logging.
    pub overhead: f64,
    pub step: f64,
}

/// The second-best combination.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    pub description: String,
    /// Of a step.
    pub seconds: f64,
}

impl DeviceRange {
    /// Rising numbers as ranges.
    pub fn of(numbers: &[usize]) -> Vec<DeviceRange> {
        let mut ranges: Vec<DeviceRange> = Vec::new();
        for &number in numbers {
            match ranges.last_mut() {
                Some(range) if range.last + 1 == number => range.last = number,
                _ => ranges.push(DeviceRange { first: number, last: number }),
            }
        }
        ranges
    }
}

impl fmt::Display for DeviceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{}", self.first),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

impl Plan {
    /// How a role is held.
    pub fn role(&self, role: Role) -> Option<&RolePlan> {
        self.groups.iter().flat_map(|group| &group.roles).find(|plan| plan.role == role)
    }
}

impl GroupPlan {
    /// Every device of the group, in rank order.
    pub fn device_numbers(&self) -> impl Iterator<Item = usize> + '_ {
        self.devices.iter().flat_map(|range| range.first..=range.last)
    }

    /// Whether a role learns: it then has gradients.
    fn learns(&self, role: Role) -> bool {
        self.ledger.iter().any(|entry| entry.role == role && entry.name == "gradients")
    }

    /// The ledger's bytes of one role in a phase: device, host.
    pub fn role_bytes(&self, role: Role, phase: Phase) -> (u64, u64) {
        let of = |place: Place| {
            let entries = self.ledger.iter().filter(|entry| entry.role == role && entry.place == place);
            entries.filter(|entry| entry.phases.contains(&phase)).map(|entry| entry.bytes).sum()
        };
        (of(Place::Device), of(Place::Host))
    }
}

/// The fastest plan that fits.
///
/// # Errors
/// [`PlanError::Refused`] with the numbers when nothing fits; the others when the constraints name what is not there.
pub fn plan(
    cluster: &Cluster,
    workload: &Workload,
    constraints: &Constraints,
    rates: &Rates,
) -> Result<Plan, PlanError> {
    let question = Question { cluster, workload, constraints, rates, every_slice: EVERY_SLICE };
    let answer = question.solve()?;
    if answer.outcome.best.is_some() {
        let faster = question.faster_below(&answer)?;
        return Ok(explain::plan(&question, &answer, faster));
    }
    Err(PlanError::Refused(Box::new(refusal::refuse(&question, &answer)?)))
}

/// Everything a plan follows from.
#[derive(Clone, Copy)]
struct Question<'a> {
    cluster: &'a Cluster,
    workload: &'a Workload,
    constraints: &'a Constraints,
    rates: &'a Rates,
    /// See [`inventory::EVERY_SLICE`].
    every_slice: usize,
}

/// What the search found, in the tier in which it was found (or the last one tried).
struct Answer<'a> {
    tier: Tier,
    tier_reason: String,
    problem: Problem<'a>,
    inventory: Inventory<'a>,
    hand: Hand,
    outcome: Outcome,
}

/// Why a group cannot be on a slice.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Reject {
    Memory {
        phase: Phase,
        place: Place,
        needed: u64,
        usable: u64,
    },
    /// More ranks than rows, or than pairs of rows.
    Ranks {
        devices: usize,
        units: usize,
        pairs: bool,
    },
    /// Engines of this size do not fill the nodes, or do not divide the model.
    TensorParallel {
        size: usize,
        /// Heads, key-value heads, gated width, devices of a node.
        divided: [u64; 4],
    },
    /// The cache's limit does not hold one sequence.
    KvCache {
        needed: u64,
    },
    /// The same as a plainer choice: one device shares no state, a share of a host has no other host memory.
    Redundant,
}

impl<'a> Question<'a> {
    /// Searches the tier, and the tiers above it when `auto` finds nothing; the answer is then about the first.
    fn solve(&self) -> Result<Answer<'a>, PlanError> {
        self.check()?;
        let roles = self.workload.roles();
        let hand = Hand::new(&self.constraints.by_hand, &roles, self.cluster.num_devices())?;
        let (fraction, alone) = (self.constraints.memory_fraction, self.workload.alone().is_some());
        let inventory = match alone {
            true => Inventory::whole(self.cluster, fraction),
            false => Inventory::new(self.cluster, &hand.devices(), fraction, self.every_slice),
        };
        let problem = self.problem();
        let params = problem.main_params();
        let (mut tier, mut tier_reason) = match self.constraints.tier {
            Some(tier) => (tier, "as the recipe says".to_string()),
            None if !self.constraints.by_hand.is_empty() => {
                (Tier::of_params(params), "by the actor's size, with roles placed by hand".to_string())
            }
            None => (Tier::of_params(params), "by the actor's size".to_string()),
        };
        let mut first = None;
        loop {
            let partitions = hand.partitions(tier, &roles);
            let sizes = self.tensor_parallel_sizes(tier, &problem, &inventory);
            let use_all = self.constraints.use_all_devices;
            let outcome = search::search(&problem, &inventory, &partitions, &sizes, use_all);
            let higher = if self.constraints.tier.is_none() && !alone { tier.raised() } else { None };
            match higher {
                Some(higher) if outcome.best.is_none() => {
                    first.get_or_insert((tier, tier_reason, outcome));
                    tier_reason = format!("nothing fits in tier {tier}");
                    tier = higher;
                }
                _ => {
                    // Where no tier fits, it is about the one that was meant.
                    let meant = first.filter(|_| outcome.best.is_none());
                    let (tier, tier_reason, outcome) = meant.unwrap_or((tier, tier_reason, outcome));
                    return Ok(Answer { tier, tier_reason, problem, inventory, hand, outcome });
                }
            }
        }
    }

    /// A smaller tier than `auto` goes to by the actor's size, with its seconds, where a step is faster in it.
    fn faster_below(&self, answer: &Answer) -> Result<Option<(Tier, f64)>, PlanError> {
        let free = self.constraints.tier.is_none() && self.workload.alone().is_none();
        let Some(best) = answer.outcome.best.as_ref().filter(|_| free) else { return Ok(None) };
        let mut faster = None;
        for tier in [Tier::Small, Tier::Medium].into_iter().filter(|tier| *tier < answer.tier) {
            let constraints = Constraints { tier: Some(tier), ..self.constraints.clone() };
            let other = Question { constraints: &constraints, ..*self }.solve()?.outcome.best;
            let seconds = other.map_or(f64::INFINITY, |found| found.seconds);
            if seconds < faster.map_or(best.seconds, |(_, seconds)| seconds) {
                faster = Some((tier, seconds));
            }
        }
        Ok(faster)
    }

    fn check(&self) -> Result<(), PlanError> {
        if let Some(found) = self.constraints.zero_stage.filter(|stage| *stage > 3) {
            return Err(PlanError::ZeroStage { found });
        }
        let work = self.workload;
        let sampled = work.sampling.iter().flat_map(|sampling| {
            [
                ("the number of prompts", sampling.prompts),
                ("the number of samples per prompt", sampling.samples_per_prompt),
                ("the longest prompt", work.max_prompt_tokens),
                ("the engine's number of sequences", sampling.max_sequences),
            ]
        });
        let passes = work.passes.iter().filter(|pass| work.training(pass.role).is_some());
        let learned = passes.map(|pass| ("the mini-batch", work.units(pass.rows)));
        let counts = [
            ("the number of rows", work.units(work.rows)),
            ("the longest response", work.max_response_tokens),
            ("the number of tokens per micro-batch", work.tokens_per_micro_batch),
            ("the tensor-parallel size", self.constraints.tensor_parallel.unwrap_or(1)),
            ("the number of devices", self.cluster.num_devices()),
        ];
        sampled
            .chain(learned)
            .chain(counts)
            .find(|(_, count)| *count == 0)
            .map_or(Ok(()), |(what, _)| Err(PlanError::Nothing { what }))
    }

    fn problem(&self) -> Problem<'a> {
        let nodes = &self.cluster.nodes;
        let within = nodes.iter().map(|node| node.within).reduce(|a, b| a.slower(b));
        let sync_link = within.filter(|_| nodes.len() == 1).unwrap_or(self.cluster.between_nodes);
        Problem {
            workload: self.workload,
            phases: self.workload.phases(),
            rates: self.rates,
            models: ROLES.map(|role| self.workload.model(role).map(|model| ModelSizes::of(&model.shape))),
            sync_link,
            stages: self.constraints.zero_stage.map_or_else(|| (0..=3).collect(), |stage| vec![stage]),
            offloads: self.constraints.adam_offload.map_or_else(|| vec![false, true], |offload| vec![offload]),
        }
    }

    /// Seconds of a step beside its work; none where the step is one call.
    fn overhead_s(&self) -> f64 {
        if self.workload.alone().is_some() { 0.0 } else { self.rates.step_s }
    }

    /// In the large tier every size above 1 that divides the model and fits a node, elsewhere 1; the recipe's before all.
    fn tensor_parallel_sizes(&self, tier: Tier, problem: &Problem, inventory: &Inventory) -> Vec<usize> {
        if let Some(size) = self.constraints.tensor_parallel {
            return vec![size];
        }
        let model = problem.models[Role::Generator as usize];
        let divides = |size: &usize| model.is_some_and(|model| model.splits_into(*size));
        let sizes: Vec<usize> = (2..=inventory.largest_node()).filter(divides).collect();
        if tier.splits_generator() && !sizes.is_empty() { sizes } else { vec![1] }
    }
}

impl Problem<'_> {
    /// Parameters of the role whose size stands for the run's.
    fn main_params(&self) -> u64 {
        let model = self.workload.main_role().and_then(|role| self.models[role as usize]);
        model.map_or(0, |model| model.params)
    }
}

#[cfg(test)]
mod tests;
