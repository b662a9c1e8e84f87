//! A workload that does not fit: by how much, and the nearest single change after which it would.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::estimate::{GroupConfig, Held, Problem, Slice, can_move};
use super::explain::{describe_choice, kept_of_each_gpu};
use super::inventory::Inventory;
use super::search::Group;
use super::{Answer, Constraints, PlanError, Question, Reject, render};
use crate::cluster::Cluster;
use crate::ledger::{Entry, Phase, Place, Workload};
use crate::tier::Tier;

/// How many times the cluster is doubled in search of one that suffices.
const DOUBLINGS: u32 = 7;
/// As many as a recipe may have.
const MOST_NODES: usize = 100_000;

/// Nothing fits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    /// The hardware, in words.
    pub cluster: String,
    /// The last tier tried; None where one model is trained alone.
    pub tier: Option<Tier>,
    pub shortfall: Shortfall,
    /// What is kept of each GPU for what is no tensor, in words; none without GPUs.
    pub kept: Option<String>,
    /// The nearest change that would fit; None when neither settings nor 128 times the nodes do.
    pub change: Option<Change>,
}

/// What is missing at least.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Shortfall {
    /// Even the leanest choice needs more memory than there is.
    Memory {
        /// The choice that lacks least.
        choice: String,
        phase: Phase,
        place: Place,
        needed_bytes: u64,
        usable_bytes: u64,
        lacking_bytes: u64,
        /// What needs it, largest first.
        entries: Vec<Entry>,
    },
    /// Each group fits by itself, but not all together.
    Devices { needed: usize, available: usize, groups: Vec<String> },
    /// No way to split the rows or the model over the devices.
    Split { reason: String },
}

/// What to change, and what a step then takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// Such as "train.zero_stage = 3": one key, unless several have to be left to the planner.
    pub change: String,
    pub seconds: f64,
}

/// Explains an answer that found nothing.
pub(super) fn refuse(question: &Question, answer: &Answer) -> Result<Refusal, PlanError> {
    Ok(Refusal {
        cluster: question.cluster.describe(),
        tier: Some(answer.tier),
        shortfall: shortfall(question, answer),
        kept: kept_of_each_gpu(question.cluster, question.constraints.memory_fraction),
        change: nearest_change(question, answer)?,
    })
}

/// How close one group comes to fitting anywhere.
enum Closest {
    /// With so few devices it fits.
    Fits {
        devices: usize,
        choice: String,
    },
    Lacks {
        lacking: u64,
        shortfall: Shortfall,
    },
    Split {
        reason: String,
    },
}

fn shortfall(question: &Question, answer: &Answer) -> Shortfall {
    let roles = question.workload.roles();
    let sizes = question.tensor_parallel_sizes(answer.tier, &answer.problem, &answer.inventory);
    let mut least: Option<(u64, Shortfall)> = None;
    for groups in answer.hand.partitions(answer.tier, &roles) {
        let closest = groups.iter().map(|group| closest(&answer.problem, &answer.inventory, group, &sizes)).collect();
        let (lacking, shortfall) = of_partition(closest, answer.inventory.free_devices());
        if least.as_ref().is_none_or(|(best, _)| lacking < *best) {
            least = Some((lacking, shortfall));
        }
    }
    least.map_or_else(|| Shortfall::Split { reason: "there is no role to place".into() }, |(_, shortfall)| shortfall)
}

/// The worst group of a partition; where each fits by itself, too few devices.
fn of_partition(closest: Vec<Closest>, available: usize) -> (u64, Shortfall) {
    let (mut needed, mut groups, mut worst) = (0, Vec::new(), None);
    for group in closest {
        match group {
            Closest::Fits { devices, choice } => {
                needed += devices;
                groups.push(choice);
            }
            Closest::Lacks { lacking, shortfall } => {
                if worst.as_ref().is_none_or(|(most, _)| lacking > *most) {
                    worst = Some((lacking, shortfall));
                }
            }
            Closest::Split { reason } => return (u64::MAX, Shortfall::Split { reason }),
        }
    }
    worst.unwrap_or((0, Shortfall::Devices { needed, available, groups }))
}

fn closest(problem: &Problem, inventory: &Inventory, group: &Group, sizes: &[usize]) -> Closest {
    let slices: Vec<Slice> = match &group.hand {
        Some(devices) => vec![inventory.hand_slice(devices)],
        None => inventory.picks.iter().map(|(_, slice)| *slice).collect(),
    };
    let taken = |slice: &Slice| if group.hand.is_some() { 0 } else { slice.devices };
    let mut fits: Option<(usize, String)> = None;
    let mut lacks: Option<(u64, Slice, GroupConfig, Reject)> = None;
    let mut split = format!("there is no device left for {}", group.roles);
    for config in GroupConfig::all(problem, group.roles, sizes) {
        for slice in &slices {
            match problem.cost(group.roles, slice, &config) {
                Ok(_) => {
                    if fits.as_ref().is_none_or(|(devices, _)| taken(slice) < *devices) {
                        fits = Some((taken(slice), describe_choice(group.roles, slice.devices, &config)));
                    }
                }
                Err(reject @ Reject::Memory { needed, usable, .. }) => {
                    if lacks.as_ref().is_none_or(|(lacking, ..)| needed - usable < *lacking) {
                        lacks = Some((needed - usable, *slice, config, reject));
                    }
                }
                Err(Reject::Redundant) => {}
                Err(reject) => split = format!("{}: {reject}", group.roles),
            }
        }
    }
    match (fits, lacks) {
        (Some((devices, choice)), _) => Closest::Fits { devices, choice },
        (None, Some((lacking, slice, config, reject))) => {
            Closest::Lacks { lacking, shortfall: memory(problem, group, &slice, &config, reject) }
        }
        (None, None) => Closest::Split { reason: split },
    }
}

fn memory(problem: &Problem, group: &Group, slice: &Slice, config: &GroupConfig, reject: Reject) -> Shortfall {
    // As `Problem::cost` tried last: with the training state moved away where a generator shares the device.
    let held = Held { moves_to_host: can_move(group.roles, slice), slots: 1 };
    let jobs = group.roles.iter().map(|role| problem.job(role, group.roles, slice, config, held));
    let choice = describe_choice(group.roles, slice.devices, config);
    memory_shortfall(choice, jobs.flat_map(|job| job.entries()).collect(), slice, reject)
}

/// What is missing for a choice whose ledger is `entries`.
pub(super) fn memory_shortfall(choice: String, mut entries: Vec<Entry>, slice: &Slice, reject: Reject) -> Shortfall {
    let Reject::Memory { phase, place, needed, usable } = reject else {
        return Shortfall::Split { reason: reject.to_string() };
    };
    entries.retain(|entry| entry.phases.contains(&phase) && (entry.place == place || slice.shares_host_memory));
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.bytes));
    Shortfall::Memory {
        choice,
        phase,
        place,
        needed_bytes: needed,
        usable_bytes: usable,
        lacking_bytes: needed - usable,
        entries,
    }
}

/// The fastest of the settings that would fit; where no single one helps, all of them left to the planner; where that does
/// not help either, the least more hardware that does.
fn nearest_change(question: &Question, answer: &Answer) -> Result<Option<Change>, PlanError> {
    let mut nearest: Option<Change> = None;
    for (change, workload, constraints) in settings(question, answer) {
        let changed = Question { workload: &workload, constraints: &constraints, ..*question };
        if let Some(best) = changed.solve()?.outcome.best {
            let seconds = best.seconds + question.rates.step_s;
            if nearest.as_ref().is_none_or(|nearest| seconds < nearest.seconds) {
                nearest = Some(Change { change, seconds });
            }
        }
    }
    if nearest.is_some() {
        return Ok(nearest);
    }
    if let Some((change, constraints)) = left_to_the_planner(question.constraints) {
        let changed = Question { constraints: &constraints, ..*question };
        if let Some(best) = changed.solve()?.outcome.best {
            return Ok(Some(Change { change, seconds: best.seconds + question.rates.step_s }));
        }
    }
    for (change, cluster) in hardware(question) {
        let changed = Question { cluster: &cluster, ..*question };
        if let Some(best) = changed.solve()?.outcome.best {
            return Ok(Some(Change { change, seconds: best.seconds + question.rates.step_s }));
        }
    }
    Ok(None)
}

/// The constraints without the keys that the recipe fixes, when there are several.
fn left_to_the_planner(limits: &Constraints) -> Option<(String, Constraints)> {
    let keys = [
        ("train.zero_stage", limits.zero_stage.is_some()),
        ("train.adam_offload", limits.adam_offload.is_some()),
        ("generation.tensor_parallel_size", limits.tensor_parallel.is_some()),
        ("placement.tier", limits.tier.is_some()),
    ];
    let fixed: Vec<&str> = keys.iter().filter(|(_, fixed)| *fixed).map(|(key, _)| *key).collect();
    let free =
        Constraints { zero_stage: None, adam_offload: None, tensor_parallel: None, tier: None, ..limits.clone() };
    (fixed.len() > 1).then(|| (format!("leave {} to the planner", fixed.join(", ")), free))
}

type Setting = (String, Workload, Constraints);

/// Every change of one key that could help.
fn settings(question: &Question, answer: &Answer) -> Vec<Setting> {
    let (work, limits) = (question.workload, question.constraints);
    let mut settings: Vec<Setting> = Vec::new();
    let fixed_stage = limits.zero_stage.map_or(4, |stage| stage + 1);
    for stage in fixed_stage..=3 {
        let constraints = Constraints { zero_stage: Some(stage), ..limits.clone() };
        settings.push((format!("train.zero_stage = {stage}"), work.clone(), constraints));
    }
    if limits.adam_offload == Some(true) {
        let constraints = Constraints { adam_offload: None, ..limits.clone() };
        settings.push(("train.adam_offload = false".into(), work.clone(), constraints));
    }
    if limits.adam_offload == Some(false) {
        let constraints = Constraints { adam_offload: Some(true), ..limits.clone() };
        settings.push(("train.adam_offload = true".into(), work.clone(), constraints));
    }
    let longest = answer.inventory.largest_node();
    for size in (1..=longest).filter(|size| limits.tensor_parallel != Some(*size)) {
        let constraints = Constraints { tensor_parallel: Some(size), ..limits.clone() };
        settings.push((format!("generation.tensor_parallel_size = {size}"), work.clone(), constraints));
    }
    for tier in
        [Tier::Small, Tier::Medium, Tier::Large].into_iter().filter(|tier| limits.tier.is_some_and(|t| t != *tier))
    {
        let constraints = Constraints { tier: Some(tier), ..limits.clone() };
        settings.push((format!("placement.tier = \"{tier}\""), work.clone(), constraints));
    }
    if !limits.by_hand.is_empty() {
        let constraints = Constraints { by_hand: Vec::new(), ..limits.clone() };
        settings.push(("no [placement.ROLE] tables".into(), work.clone(), constraints));
    }
    if limits.use_all_devices {
        let constraints = Constraints { use_all_devices: false, ..limits.clone() };
        settings.push(("fewer placement.workers".into(), work.clone(), constraints));
    }
    settings.extend(smaller_passes(question));
    settings.extend(more_rows(question));
    settings
}

/// As many rows as there are devices, so that each has one.
fn more_rows(question: &Question) -> Option<Setting> {
    let (work, devices) = (question.workload, question.cluster.num_devices());
    if devices <= work.prompts.min(work.mini_batch) {
        return None;
    }
    let prompts = work.prompts.max(devices);
    let responses = prompts * work.samples_per_prompt;
    let mini_batch = (devices.max(work.mini_batch)..=responses).find(|rows| responses.is_multiple_of(*rows))?;
    let keys = [("rollout.batch_size", work.prompts, prompts), ("ppo.mini_batch_size", work.mini_batch, mini_batch)];
    let changed = keys.iter().filter(|(_, before, after)| before != after);
    let change = changed.map(|(key, _, after)| format!("{key} = {after}")).collect::<Vec<_>>().join(" and ");
    let work = Workload { prompts, mini_batch, ..work.clone() };
    (!change.is_empty()).then(|| (change, work, question.constraints.clone()))
}

/// Settings that make a pass need less.
fn smaller_passes(question: &Question) -> Vec<Setting> {
    let (work, limits) = (question.workload, question.constraints);
    let mut settings: Vec<Setting> = Vec::new();
    if !work.activation_checkpointing {
        let changed = Workload { activation_checkpointing: true, ..work.clone() };
        settings.push(("train.activation_checkpointing = true".into(), changed, limits.clone()));
    }
    if work.reference.is_some() && !work.reference_offload {
        let changed = Workload { reference_offload: true, ..work.clone() };
        settings.push(("reference.offload = true".into(), changed, limits.clone()));
    }
    let mut tokens = work.tokens_per_micro_batch;
    while tokens > work.max_tokens() {
        tokens = (tokens / 2).max(work.max_tokens());
        let changed = Workload { tokens_per_micro_batch: tokens, ..work.clone() };
        settings.push((format!("train.tokens_per_micro_batch = {tokens}"), changed, limits.clone()));
    }
    settings
}

/// More of the same hardware: a fuller node first, then more nodes.
pub(super) fn hardware(question: &Question) -> Vec<(String, Cluster)> {
    let (cluster, pools) = (question.cluster, question.constraints.pools);
    let mut larger = Vec::new();
    let (Some(first), count) = (cluster.nodes.first(), cluster.nodes.len()) else { return larger };
    let uniform = cluster.nodes.iter().all(|node| node == first);
    let is_host = !cluster.has_accelerators();
    if uniform && count == 1 && !is_host && !pools {
        let mut devices = first.devices.len() * 2;
        while devices <= 8 {
            let mut fuller = cluster.clone();
            fuller.nodes[0].devices = vec![first.devices[0]; devices];
            larger.push((format!("placement.gpus_per_node = {devices}"), fuller));
            devices *= 2;
        }
    }
    let mut doubled = cluster.clone();
    for _ in 0..DOUBLINGS {
        if 2 * doubled.nodes.len() > MOST_NODES {
            break;
        }
        doubled.nodes.extend(doubled.nodes.clone());
        let change = match pools {
            true => format!("{} times the nodes of every [[placement.node_pool]]", doubled.nodes.len() / count),
            false => format!("placement.nodes = {}", doubled.nodes.len()),
        };
        larger.push((change, doubled.clone()));
    }
    larger
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tier = self.tier.map(|tier| format!(" (tier {tier})")).unwrap_or_default();
        write!(f, "no plan fits {}{tier}: ", self.cluster)?;
        self.shortfall.write(f, self.tier.is_none())?;
        writeln!(f)?;
        if let (Shortfall::Memory { .. }, Some(kept)) = (&self.shortfall, &self.kept) {
            writeln!(f, "kept of each GPU: {kept}")?;
        }
        match &self.change {
            Some(change) => {
                write!(f, "nearest change that fits: {} ({} a step)", change.change, render::seconds(change.seconds))
            }
            None => f.write_str("no change of the settings would fit, nor 128 times the nodes (100,000 at most)"),
        }
    }
}

impl Shortfall {
    /// Where a model is trained alone, phases have no role's name.
    fn write(&self, f: &mut fmt::Formatter<'_>, alone: bool) -> fmt::Result {
        match self {
            Shortfall::Memory { choice, phase, place, needed_bytes, usable_bytes, lacking_bytes, entries } => {
                let [needed, usable, lacking] = [*needed_bytes, *usable_bytes, *lacking_bytes].map(render::bytes);
                let place = if *place == Place::Device { "device" } else { "device's share of host memory" };
                write!(f, "the leanest choice, {choice}, needs {needed} of a {place} with {usable} usable: ")?;
                let phase = match phase {
                    Phase::Score if alone => "evaluate",
                    _ if alone => "train",
                    phase => phase.name(),
                };
                write!(f, "{lacking} too much (phase: {phase})")?;
                for entry in entries.iter().take(5) {
                    let role = if alone { String::new() } else { format!("{} ", entry.role) };
                    write!(f, "\n  {:>10}  {role}{}: {}", render::bytes(entry.bytes), entry.name, entry.formula)?;
                }
                Ok(())
            }
            Shortfall::Devices { needed, available, groups } => {
                let groups = groups.join("; ");
                write!(
                    f,
                    "each group fits by itself ({groups}), together they take at least {needed} devices in whole nodes or parts of one, and there are {available}"
                )
            }
            Shortfall::Split { reason } => f.write_str(reason),
        }
    }
}

impl fmt::Display for Reject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reject::Memory { needed, usable, .. } => {
                write!(f, "needs {} of {}", render::bytes(*needed), render::bytes(*usable))
            }
            Reject::Ranks { devices, rows } => write!(f, "{devices} ranks share {rows} rows: every rank needs one"),
            Reject::TensorParallel { size, divided: [heads, kv_heads, width, devices] } => {
                write!(
                    f,
                    "a tensor-parallel size of {size} must divide heads ({heads}), key-value heads ({kv_heads}), the gated width ({width}) and the devices of every node ({devices})"
                )
            }
            Reject::KvCache { needed } => {
                write!(f, "generation.kv_cache_bytes must hold one sequence: at least {needed}")
            }
            Reject::Redundant => f.write_str("a plainer choice is the same"),
        }
    }
}
