//! A run that trains one model on all devices (`sft`, `reward`): its ZeRO stage, and whether Adam's state goes to host
//! memory. The fastest choice that fits, by the same ledger and the same estimates as a PPO step's.

use std::fmt;

use echelon_core::role::Role;
use echelon_core::shape::ModelShape;
use serde::{Deserialize, Serialize};

use super::estimate::{GroupConfig, Held, Problem, Slice};
use super::explain::{host_memory, kept_of_each_gpu};
use super::inventory::Inventory;
use super::render::write_kept;
use super::{Change, Constraints, PlanError, Question, Refusal, Reject, Shortfall, refusal, render};
use crate::cluster::Cluster;
use crate::ledger::{ComputeDtype, Entry, Phase, Place, Workload};
use crate::rates::Rates;
use crate::tier::{RoleSet, role_name};

/// One model that learns from rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Whose model it becomes: the actor's has a language-model head, the reward's a score head.
    #[serde(with = "role_name")]
    pub role: Role,
    pub model: ModelShape,
    /// Rows of an optimizer step, over all ranks: two for each pair. Ranks share whole examples.
    pub rows: usize,
    pub rows_per_example: usize,
    /// The longest row, and the expected one.
    pub max_tokens: usize,
    pub mean_tokens: f64,
    pub tokens_per_micro_batch: usize,
    pub dtype: ComputeDtype,
    pub activation_checkpointing: bool,
}

/// How a model is trained on the devices, what it needs there, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainingPlan {
    /// The hardware, in words.
    pub cluster: String,
    /// Of a node, in words; what was assumed is said.
    pub host_memory: String,
    /// What is kept of each GPU for what is no tensor, in words; none without GPUs.
    pub kept: Option<String>,
    pub params: u64,
    pub num_devices: usize,
    pub zero_stage: u8,
    pub adam_offload: bool,
    /// What the model holds on each device.
    pub ledger: Vec<Entry>,
    /// Every choice of stage and offload, plainest first.
    pub choices: Vec<Choice>,
    /// Of an optimizer step.
    pub seconds: f64,
    pub why: String,
}

/// A ZeRO stage with or without offload, and whether it fits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    pub zero_stage: u8,
    pub adam_offload: bool,
    /// At the height of the fullest phase, on a device and in its share of host memory.
    pub device_bytes: u64,
    pub host_bytes: u64,
    pub usable_bytes: u64,
    pub usable_host_bytes: u64,
    /// Of an optimizer step; None where it does not fit.
    pub seconds: Option<f64>,
}

impl Training {
    /// The role by which ledger and estimates know a model that learns: with logits or with one number per row.
    pub fn learner(&self) -> Role {
        if self.role == Role::Actor { Role::Actor } else { Role::Critic }
    }

    fn examples(&self) -> usize {
        self.rows / self.rows_per_example
    }

    /// Tokens of the longest example, whose rows are in one micro-batch.
    fn longest(&self) -> usize {
        self.max_tokens * self.rows_per_example
    }

    /// As a PPO step that does nothing but train this model; a row of it is an example.
    pub fn workload(&self) -> Workload {
        Workload {
            actor: self.model.clone(),
            critic: Some(self.model.clone()),
            reference: None,
            reward: None,
            prompts: self.examples(),
            samples_per_prompt: 1,
            max_prompt_tokens: self.longest() - 1,
            max_response_tokens: 1,
            mean_prompt_tokens: 0.0,
            mean_response_tokens: self.mean_tokens * self.rows_per_example as f64,
            mini_batch: self.examples(),
            epochs: 1,
            tokens_per_micro_batch: self.tokens_per_micro_batch,
            dtype: self.dtype,
            activation_checkpointing: self.activation_checkpointing,
            entropy_in_loss: false,
            reference_offload: false,
            max_sequences: 1,
            max_batched_tokens: self.longest(),
            kv_cache_bytes: None,
        }
    }
}

/// The fastest way to train one model on all devices of a cluster. Of the constraints, stage, offload and the part of the
/// memory count.
///
/// # Errors
/// As [`super::plan`].
pub fn plan_training(
    cluster: &Cluster,
    training: &Training,
    constraints: &Constraints,
    rates: &Rates,
) -> Result<TrainingPlan, PlanError> {
    let workload = training.workload();
    let question = Question { cluster, workload: &workload, constraints, rates, every_slice: 0 };
    question.check()?;
    let search = Search::new(&question, training);
    if let Some(best) = search.best() {
        return Ok(search.plan(&question, training, best));
    }
    let refusal = Refusal {
        kept: kept_of_each_gpu(question.cluster, question.constraints.memory_fraction),
        cluster: cluster.describe(),
        tier: None,
        shortfall: search.shortfall(training),
        change: nearest_change(&question, training),
    };
    Err(PlanError::Refused(Box::new(refusal)))
}

/// All choices of a training run on one cluster, with what each takes.
struct Search<'a> {
    problem: Problem<'a>,
    slice: Slice,
    learner: Role,
    costs: Vec<(GroupConfig, Result<f64, Reject>)>,
}

impl<'a> Search<'a> {
    fn new(question: &Question<'a>, training: &Training) -> Search<'a> {
        let problem = question.problem();
        let slice = Inventory::whole(question.cluster, question.constraints.memory_fraction);
        let learner = training.learner();
        let roles = RoleSet::of(&[learner]);
        let cost = |config: &GroupConfig| problem.cost(roles, &slice, config).map(|cost| cost.train());
        let costs = GroupConfig::all(&problem, roles, &[1]).into_iter().map(|config| (config, cost(&config)));
        let costs = costs.filter(|(_, cost)| *cost != Err(Reject::Redundant)).collect();
        Search { slice, learner, costs, problem }
    }

    /// The fastest that fits, the plainest of equals.
    fn best(&self) -> Option<(&GroupConfig, f64)> {
        let fitting =
            self.costs.iter().filter_map(|(config, cost)| cost.as_ref().ok().map(|seconds| (config, *seconds)));
        fitting.min_by(|a, b| a.1.total_cmp(&b.1))
    }

    fn stage(&self, config: &GroupConfig) -> (u8, bool) {
        (config.stages[self.learner as usize], config.offloads[self.learner as usize])
    }

    fn entries(&self, config: &GroupConfig, role: Role) -> Vec<Entry> {
        let held = Held { moves_to_host: false, slots: 1 };
        let job = self.problem.job(self.learner, RoleSet::of(&[self.learner]), &self.slice, config, held);
        job.entries().into_iter().map(|entry| Entry { role, ..entry }).collect()
    }

    fn choice(&self, (config, cost): &(GroupConfig, Result<f64, Reject>)) -> Choice {
        let held = Held { moves_to_host: false, slots: 1 };
        let totals = self.problem.totals(RoleSet::of(&[self.learner]), &self.slice, config, held);
        let most = |of: &dyn Fn(Phase) -> u64| Phase::ALL.map(of).into_iter().max().unwrap_or(0);
        let (zero_stage, adam_offload) = self.stage(config);
        Choice {
            zero_stage,
            adam_offload,
            device_bytes: most(&|phase| totals.device_bytes(phase)),
            host_bytes: most(&|phase| totals.host_bytes(phase)),
            usable_bytes: self.slice.usable_bytes,
            usable_host_bytes: self.slice.usable_host_bytes,
            seconds: cost.as_ref().ok().copied(),
        }
    }

    fn plan(&self, question: &Question, training: &Training, (config, seconds): (&GroupConfig, f64)) -> TrainingPlan {
        let (zero_stage, adam_offload) = self.stage(config);
        let choices: Vec<Choice> = self.costs.iter().map(|choice| self.choice(choice)).collect();
        let fitting = choices.iter().filter(|choice| choice.seconds.is_some()).count();
        let why = match (fitting, choices.len()) {
            (_, 1) => "the only choice".to_string(),
            (1, all) => format!("the only one that fits of {all} choices"),
            (fitting, all) if fitting == all => format!("fastest of {all} choices, which all fit"),
            (fitting, all) => format!("fastest of the {fitting} choices that fit, {all} in all"),
        };
        TrainingPlan {
            cluster: question.cluster.describe(),
            host_memory: host_memory(question.cluster),
            kept: kept_of_each_gpu(question.cluster, question.constraints.memory_fraction),
            params: training.model.num_params() as u64,
            num_devices: self.slice.devices,
            zero_stage,
            adam_offload,
            ledger: self.entries(config, training.role),
            choices,
            seconds,
            why,
        }
    }

    /// What lacks least.
    fn shortfall(&self, training: &Training) -> Shortfall {
        let lacking = |reject: &Reject| match reject {
            Reject::Memory { needed, usable, .. } => needed - usable,
            _ => u64::MAX,
        };
        let rejected =
            self.costs.iter().filter_map(|(config, cost)| cost.as_ref().err().map(|reject| (config, *reject)));
        let Some((config, reject)) = rejected.min_by_key(|(_, reject)| lacking(reject)) else {
            return Shortfall::Split { reason: "there is no choice of a ZeRO stage".into() };
        };
        if let (Reject::Ranks { devices, rows }, 2..) = (reject, training.rows_per_example) {
            let reason = format!("{devices} ranks share {rows} pairs: every rank needs one");
            return Shortfall::Split { reason };
        }
        let (stage, offload) = self.stage(config);
        let choice = format!("{} on {}", said(stage, offload), render::count(self.slice.devices, "device"));
        refusal::memory_shortfall(choice, self.entries(config, training.role), &self.slice, reject)
    }
}

/// A change of one key: how it reads, and what it does.
type Setting = (String, Box<dyn Fn(&mut Training, &mut Constraints)>);

/// Every change of one key that could help.
fn settings(question: &Question, training: &Training) -> Vec<Setting> {
    let mut settings: Vec<Setting> = Vec::new();
    for stage in question.constraints.zero_stage.map_or(4, |stage| stage + 1)..=3 {
        let set = move |_: &mut Training, limits: &mut Constraints| limits.zero_stage = Some(stage);
        settings.push((format!("train.zero_stage = {stage}"), Box::new(set)));
    }
    if question.constraints.adam_offload == Some(true) {
        let set = |_: &mut Training, limits: &mut Constraints| limits.adam_offload = None;
        settings.push(("train.adam_offload = false".into(), Box::new(set)));
    }
    if !training.activation_checkpointing {
        let set = |training: &mut Training, _: &mut Constraints| training.activation_checkpointing = true;
        settings.push(("train.activation_checkpointing = true".into(), Box::new(set)));
    }
    let mut tokens = training.tokens_per_micro_batch;
    while tokens > training.longest() {
        tokens = (tokens / 2).max(training.longest());
        let set = move |training: &mut Training, _: &mut Constraints| training.tokens_per_micro_batch = tokens;
        settings.push((format!("train.tokens_per_micro_batch = {tokens}"), Box::new(set)));
    }
    let devices = question.cluster.num_devices();
    if devices > training.examples() {
        let set =
            move |training: &mut Training, _: &mut Constraints| training.rows = devices * training.rows_per_example;
        settings.push((format!("train.batch_size = {devices}"), Box::new(set)));
    }
    settings
}

/// The fastest change of one setting that would fit; where none does, of two; where none of those does either, the least
/// more hardware that would.
fn nearest_change(question: &Question, training: &Training) -> Option<Change> {
    let solve = |cluster: &Cluster, training: &Training, constraints: &Constraints| {
        let workload = training.workload();
        let question = Question { cluster, workload: &workload, constraints, ..*question };
        Search::new(&question, training).best().map(|(_, seconds)| seconds)
    };
    let with = |changes: &[&Setting]| {
        let (mut training, mut constraints) = (training.clone(), question.constraints.clone());
        changes.iter().for_each(|(_, set)| set(&mut training, &mut constraints));
        let change = changes.iter().map(|(change, _)| change.as_str()).collect::<Vec<_>>().join(" and ");
        solve(question.cluster, &training, &constraints).map(|seconds| Change { change, seconds })
    };
    let settings = settings(question, training);
    let fastest = |changes: &mut dyn Iterator<Item = Change>| changes.min_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let one = fastest(&mut settings.iter().filter_map(|setting| with(&[setting])));
    let pairs =
        settings.iter().enumerate().flat_map(|(at, first)| settings[at + 1..].iter().map(move |next| [first, next]));
    let two = || fastest(&mut pairs.filter_map(|pair| with(&pair)));
    fewer(question, training).or(one).or_else(two).or_else(|| {
        refusal::hardware(question).into_iter().find_map(|(change, cluster)| {
            solve(&cluster, training, question.constraints).map(|seconds| Change { change, seconds })
        })
    })
}

/// No more devices than there are examples, so that each has one: that changes nothing that is learned.
fn fewer(question: &Question, training: &Training) -> Option<Change> {
    let (nodes, examples) = (question.cluster.nodes.len(), training.examples());
    let per_node = examples / nodes;
    let cluster = question.cluster.repeated(nodes, per_node).filter(|_| question.cluster.num_devices() > examples)?;
    let (_, seconds) = Search::new(&Question { cluster: &cluster, ..*question }, training).best()?;
    let change = match question.constraints.use_all_devices {
        true => format!("placement.workers = {}", per_node * nodes),
        false => format!("placement.gpus_per_node = {per_node}"),
    };
    (!question.constraints.pools).then_some(Change { change, seconds })
}

/// Such as "ZeRO 2, Adam on the host".
fn said(stage: u8, offload: bool) -> String {
    format!("ZeRO {stage}{}", if offload { ", Adam on the host" } else { "" })
}

impl fmt::Display for TrainingPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}; the model has {} parameters", self.cluster, render::params(self.params))?;
        writeln!(f, "host memory of a node: {}", self.host_memory)?;
        write_kept(f, self.kept.as_deref())?;
        writeln!(f, "\non each of {}, at most at once:", render::count(self.num_devices, "device"))?;
        let on_host = self.choices.iter().any(|choice| choice.host_bytes > 0);
        for choice in &self.choices {
            let chosen = (choice.zero_stage, choice.adam_offload) == (self.zero_stage, self.adam_offload);
            let name = said(choice.zero_stage, choice.adam_offload);
            let device = format!("{} of {}", render::bytes(choice.device_bytes), render::bytes(choice.usable_bytes));
            write!(f, "{} {name:<24} {device:>22}", if chosen { '*' } else { ' ' })?;
            match choice.host_bytes {
                _ if !on_host => {}
                0 => write!(f, "{:27}", "")?,
                host => write!(f, "{:>12} in host memory", render::bytes(host))?,
            }
            match choice.seconds {
                Some(seconds) => writeln!(f, "   an optimizer step: {}", render::seconds(seconds))?,
                None => writeln!(f, "   does not fit")?,
            }
        }
        let trains =
            |entry: &&Entry| entry.phases.contains(&Phase::TrainActor) || entry.phases.contains(&Phase::TrainCritic);
        let on_device = self.ledger.iter().filter(|entry| entry.place == Place::Device);
        let mut entries: Vec<&Entry> = on_device.filter(trains).collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.bytes));
        writeln!(f, "\nmost of it at {}:", said(self.zero_stage, self.adam_offload))?;
        for entry in entries.iter().take(5) {
            writeln!(f, "  {:>10}  {}: {}", render::bytes(entry.bytes), entry.name, entry.formula)?;
        }
        write!(f, "\nwhy {}: {}", said(self.zero_stage, self.adam_offload), self.why)
    }
}
