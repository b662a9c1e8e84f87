//! A workload that does not fit: by how much, and the nearest single change after which it would.

use std::fmt;

use echelon_core::memory::{Phase, Work};
use echelon_core::role::Role;
use echelon_core::workload::Workload;
use serde::{Deserialize, Serialize};

use super::estimate::{GroupConfig, Held, Problem, Slice, can_move};
use super::explain::{describe_choice, kept_of_each_gpu};
use super::inventory::Inventory;
use super::search::Group;
use super::{Answer, Constraints, PlanError, Question, Reject, alone, render};
use crate::cluster::Cluster;
use crate::ledger::{Entry, Place};
use crate::tier::{RoleSet, Tier};

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
        tier: question.workload.alone().is_none().then_some(answer.tier),
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
                        fits = Some((taken(slice), choice_of(problem, group.roles, slice, &config)));
                    }
                }
                Err(reject @ Reject::Memory { needed, usable, .. }) => {
                    if lacks.as_ref().is_none_or(|(lacking, ..)| needed - usable < *lacking) {
                        lacks = Some((needed - usable, *slice, config, reject));
                    }
                }
                Err(Reject::Redundant) => {}
                Err(reject) if problem.workload.alone().is_some() => split = reject.to_string(),
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

fn choice_of(problem: &Problem, roles: RoleSet, slice: &Slice, config: &GroupConfig) -> String {
    let Some(role) = problem.workload.alone() else {
        return describe_choice(problem.workload, roles, slice.devices, config);
    };
    let choice = alone::said(config.stages[role as usize], config.offloads[role as usize]);
    format!("{choice} on {}", render::count(slice.devices, "device"))
}

fn memory(problem: &Problem, group: &Group, slice: &Slice, config: &GroupConfig, reject: Reject) -> Shortfall {
    let Reject::Memory { phase, place, needed, usable } = reject else {
        return Shortfall::Split { reason: reject.to_string() };
    };
    // As `Problem::cost` tried last: with the training state moved away where a generator shares the device.
    let held = Held { moves_to_host: can_move(group.roles, slice), slots: 1 };
    let jobs = group.roles.iter().map(|role| problem.job(role, group.roles, slice, config, held));
    let mut entries: Vec<Entry> = jobs.flat_map(|job| job.entries()).collect();
    entries.retain(|entry| entry.phases.contains(&phase) && (entry.place == place || slice.shares_host_memory));
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.bytes));
    let (phase, entries) = match (problem.workload.alone(), place) {
        (None, _) => (phase, entries),
        (Some(_), Place::Device) => (alone::known(phase), alone::in_json(entries)),
        // As much in every phase: the first of those that readers know.
        (Some(_), Place::Host) => (Phase::GENERATE, alone::in_json(entries)),
    };
    Shortfall::Memory {
        choice: choice_of(problem, group.roles, slice, config),
        phase,
        place,
        needed_bytes: needed,
        usable_bytes: usable,
        lacking_bytes: needed - usable,
        entries,
    }
}

/// The fastest of the settings that would fit; where no single one helps, all of them left to the planner, or two for a
/// model alone; where that does not help either, the least more hardware that does.
fn nearest_change(question: &Question, answer: &Answer) -> Result<Option<Change>, PlanError> {
    let settings = settings(question, answer);
    let is_alone = question.workload.alone().is_some();
    if is_alone && let Some(change) = fewer_devices(question)? {
        return Ok(Some(change));
    }
    if let Some(change) = fastest(settings.iter().map(|setting| with(question, &[setting])))? {
        return Ok(Some(change));
    }
    if is_alone {
        let after = |at: usize| settings[at + 1..].iter();
        let pairs = settings.iter().enumerate().flat_map(|(at, first)| after(at).map(move |next| [first, next]));
        if let Some(change) = fastest(pairs.map(|pair| with(question, &pair)))? {
            return Ok(Some(change));
        }
    } else if let Some((change, constraints)) = left_to_the_planner(question.constraints)
        && let Some(change) = changed(&Question { constraints: &constraints, ..*question }, change)?
    {
        return Ok(Some(change));
    }
    for (change, cluster) in hardware(question) {
        if let Some(change) = changed(&Question { cluster: &cluster, ..*question }, change)? {
            return Ok(Some(change));
        }
    }
    Ok(None)
}

/// A changed question as a change, if it has a plan.
fn changed(question: &Question, change: String) -> Result<Option<Change>, PlanError> {
    let best = question.solve()?.outcome.best;
    Ok(best.map(|best| Change { change, seconds: best.seconds + question.overhead_s() }))
}

fn with(question: &Question, settings: &[&Setting]) -> Result<Option<Change>, PlanError> {
    let (mut workload, mut constraints) = (question.workload.clone(), question.constraints.clone());
    settings.iter().for_each(|(_, set)| set(&mut workload, &mut constraints));
    let change = settings.iter().map(|(change, _)| change.as_str()).collect::<Vec<_>>().join(" and ");
    changed(&Question { workload: &workload, constraints: &constraints, ..*question }, change)
}

fn fastest(changes: impl Iterator<Item = Result<Option<Change>, PlanError>>) -> Result<Option<Change>, PlanError> {
    let changes = changes.filter_map(Result::transpose).collect::<Result<Vec<Change>, PlanError>>()?;
    Ok(changes.into_iter().min_by(|a, b| a.seconds.total_cmp(&b.seconds)))
}

/// No more devices than there are units of rows, so that each has one: that changes nothing that is learned.
fn fewer_devices(question: &Question) -> Result<Option<Change>, PlanError> {
    let (nodes, units) = (question.cluster.nodes.len(), question.workload.units(question.workload.rows));
    let (per_node, constraints) = (units / nodes, question.constraints);
    let fewer = question.cluster.repeated(nodes, per_node);
    let Some(cluster) = fewer.filter(|_| question.cluster.num_devices() > units && per_node > 0 && !constraints.pools)
    else {
        return Ok(None);
    };
    let change = match constraints.use_all_devices {
        true => format!("placement.workers = {}", per_node * nodes),
        false => format!("placement.gpus_per_node = {per_node}"),
    };
    changed(&Question { cluster: &cluster, ..*question }, change)
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

/// A change of one key: how it reads, and what it does.
type Setting = (String, Box<dyn Fn(&mut Workload, &mut Constraints)>);

fn setting(change: impl Into<String>, set: impl Fn(&mut Workload, &mut Constraints) + 'static) -> Setting {
    (change.into(), Box::new(set))
}

/// Every change of one key that could help.
fn settings(question: &Question, answer: &Answer) -> Vec<Setting> {
    let (work, limits) = (question.workload, question.constraints);
    let mut settings: Vec<Setting> = Vec::new();
    let fixed_stage = limits.zero_stage.map_or(4, |stage| stage + 1);
    for stage in fixed_stage..=3 {
        settings.push(setting(format!("train.zero_stage = {stage}"), move |_, limits| limits.zero_stage = Some(stage)));
    }
    match limits.adam_offload {
        Some(true) => settings.push(setting("train.adam_offload = false", |_, limits| limits.adam_offload = None)),
        Some(false) => {
            settings.push(setting("train.adam_offload = true", |_, limits| limits.adam_offload = Some(true)))
        }
        None => {}
    }
    let largest = if work.sampling.is_some() { answer.inventory.largest_node() } else { 0 };
    for size in (1..=largest).filter(|size| limits.tensor_parallel != Some(*size)) {
        let change = format!("generation.tensor_parallel_size = {size}");
        settings.push(setting(change, move |_, limits| limits.tensor_parallel = Some(size)));
    }
    for tier in
        [Tier::Small, Tier::Medium, Tier::Large].into_iter().filter(|tier| limits.tier.is_some_and(|t| t != *tier))
    {
        settings.push(setting(format!("placement.tier = \"{tier}\""), move |_, limits| limits.tier = Some(tier)));
    }
    if !limits.by_hand.is_empty() {
        settings.push(setting("no [placement.ROLE] tables", |_, limits| limits.by_hand.clear()));
    }
    if limits.use_all_devices && work.alone().is_none() {
        settings.push(setting("fewer placement.workers", |_, limits| limits.use_all_devices = false));
    }
    settings.extend(smaller_passes(work));
    settings.extend(more_rows(question));
    settings
}

/// As many rows as there are devices, so that each has one.
fn more_rows(question: &Question) -> Option<Setting> {
    let (work, devices) = (question.workload, question.cluster.num_devices());
    let learned = work.passes.iter().find(|pass| Work::of(pass.verb) == Some(Work::Learn));
    let batch = learned.map_or(work.rows, |pass| pass.rows);
    let Some(sampling) = &work.sampling else {
        let rows = devices * work.rows_per_unit;
        let change = format!("train.batch_size = {devices}");
        return (rows > batch).then(|| setting(change, move |work, _| work.resize(rows, rows)));
    };
    if devices <= sampling.prompts.min(batch) {
        return None;
    }
    let prompts = sampling.prompts.max(devices);
    let rows = prompts * sampling.samples_per_prompt;
    let mini_batch = (devices.max(batch)..=rows).find(|batch| rows.is_multiple_of(*batch))?;
    let keys = [("rollout.batch_size", sampling.prompts, prompts), ("ppo.mini_batch_size", batch, mini_batch)];
    let changed = keys.iter().filter(|(_, before, after)| before != after);
    let change = changed.map(|(key, _, after)| format!("{key} = {after}")).collect::<Vec<_>>().join(" and ");
    (!change.is_empty()).then(|| setting(change, move |work, _| work.resize(rows, mini_batch)))
}

/// Settings that make a pass need less.
fn smaller_passes(work: &Workload) -> Vec<Setting> {
    let mut settings: Vec<Setting> = Vec::new();
    if !work.activation_checkpointing {
        settings.push(setting("train.activation_checkpointing = true", |work, _| work.activation_checkpointing = true));
    }
    if work.models.iter().any(|model| model.role == Role::Reference && !model.offload) {
        settings.push(setting("reference.offload = true", |work, _| {
            let models = work.models.iter_mut().filter(|model| model.role == Role::Reference);
            models.for_each(|model| model.offload = true);
        }));
    }
    let mut tokens = work.tokens_per_micro_batch;
    while tokens > work.max_unit_tokens() {
        tokens = (tokens / 2).max(work.max_unit_tokens());
        let change = format!("train.tokens_per_micro_batch = {tokens}");
        settings.push(setting(change, move |work, _| work.tokens_per_micro_batch = tokens));
    }
    settings
}

/// More of the same hardware: a fuller node first, then more nodes.
fn hardware(question: &Question) -> Vec<(String, Cluster)> {
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
                let phase = match phase.work {
                    Work::Score if alone => "evaluate".into(),
                    _ if alone => "train".into(),
                    _ => phase.name(),
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
            Reject::Ranks { devices, units, pairs } => {
                let rows = if *pairs { "pairs" } else { "rows" };
                write!(f, "{devices} ranks share {units} {rows}: every rank needs one")
            }
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
