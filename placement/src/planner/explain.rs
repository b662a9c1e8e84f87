//! From what the search found to a plan: device numbers, the ledger line by line, and why.

use std::collections::BTreeMap;

use echelon_core::memory::{Phase, Work};
use echelon_core::role::Role;
use echelon_core::workload::Workload;

use super::estimate::{Cost, GroupConfig, Problem, Slice};
use super::inventory::{Inventory, Pick};
use super::search::{Found, Group, Seat};
use super::{
    Alternative, Answer, DeviceRange, GroupPlan, GroupSeconds, PhaseBytes, Plan, Question, Reject, RolePlan,
    StepSeconds,
};
use crate::cluster::{ASSUMED_HOST_BYTES, Cluster};
use crate::ledger::RUNTIME;
use crate::tier::{RoleSet, Tier};

/// The plan of an answer that has a best structure, and the smaller tier in which a step would be faster.
pub(super) fn plan(question: &Question, answer: &Answer, faster: Option<(Tier, f64)>) -> Plan {
    let best = answer.outcome.best.as_ref().expect("an answer with a best structure");
    let groups: Vec<Placed> = placed(&answer.problem, &answer.inventory, best);
    let used: usize = groups.iter().map(|group| group.slice.devices).sum();
    let seconds = step_seconds(question, &groups);
    let overhead = seconds.overhead;
    let group_plans: Vec<GroupPlan> = groups.iter().map(|group| group.plan(question, answer)).collect();
    let choices = question.workload.alone().map_or(Vec::new(), |role| super::alone::choices(answer, role));
    Plan {
        page_locked: page_locked(question.cluster, &answer.problem.phases, &group_plans),
        cluster: question.cluster.describe(),
        host_memory: host_memory(question.cluster),
        kept: kept_of_each_gpu(question.cluster, question.constraints.memory_fraction),
        tier: answer.tier,
        tier_reason: answer.tier_reason.clone(),
        actor_params: answer.problem.main_params(),
        why: if choices.is_empty() { why(answer, &groups, &seconds, faster) } else { super::alone::why(&choices) },
        groups: group_plans,
        seconds,
        runner_up: answer.outcome.runner_up.as_ref().map(|found| Alternative {
            description: describe(&answer.problem, &placed(&answer.problem, &answer.inventory, found)),
            seconds: found.seconds + overhead,
        }),
        idle_devices: question.cluster.num_devices() - used,
        idle_reason: match groups.iter().any(|group| group.group.hand.is_some()) {
            true => "roles are placed by hand".into(),
            false => "with them a step would not be faster".into(),
        },
        considered: answer.outcome.considered,
        fitting: answer.outcome.fitting,
        choices,
    }
}

/// Such as "1.82 TiB, as assumed (placement.host_memory_gib tells)".
pub(super) fn host_memory(cluster: &Cluster) -> String {
    let mut amounts: Vec<u64> = cluster.nodes.iter().map(|node| node.host_memory_bytes).collect();
    amounts.sort_unstable();
    amounts.dedup();
    let shown = |&bytes: &u64| match bytes {
        ASSUMED_HOST_BYTES => format!("{}, as assumed (placement.host_memory_gib tells)", super::render::bytes(bytes)),
        bytes => super::render::bytes(bytes),
    };
    amounts.iter().map(shown).collect::<Vec<_>>().join("; ")
}

/// Of the node and phase with most of it; None where there is none.
fn page_locked(cluster: &Cluster, phases: &[Phase], groups: &[GroupPlan]) -> Option<String> {
    let of_device = |group: &GroupPlan, phase: Phase| {
        let there = group.peaks.iter().find(|peak| peak.phase == phase && !group.shares_host_memory);
        there.map_or(0, |peak| peak.host_bytes)
    };
    let on_node = |node: usize, phase: Phase| -> u64 {
        let here = |device: &usize| cluster.locate(*device).is_some_and(|(its, _)| its == node);
        let devices = |group: &GroupPlan| group.device_numbers().filter(here).count() as u64;
        groups.iter().map(|group| devices(group) * of_device(group, phase)).sum()
    };
    let all = phases.iter().flat_map(|&phase| (0..cluster.nodes.len()).map(move |node| (on_node(node, phase), phase)));
    let (most, phase) = all.max_by_key(|(bytes, _)| *bytes)?;
    (most > 0).then(|| format!("{} at most (phase: {})", super::render::bytes(most), phase.name()))
}

/// What is kept of each GPU for what is no tensor. None without GPUs.
pub(super) fn kept_of_each_gpu(cluster: &Cluster, fraction: f64) -> Option<String> {
    cluster.has_accelerators().then(|| {
        let part = |(name, bytes): (&str, u64)| format!("{name} {}", super::render::bytes(bytes));
        let parts: Vec<String> = RUNTIME.into_iter().map(part).collect();
        format!("{:.0} % for the allocator's reserve, and {}", 100.0 * (1.0 - fraction), parts.join(", "))
    })
}

/// A group of the chosen structure with its devices.
struct Placed {
    group: Group,
    config: GroupConfig,
    slice: Slice,
    cost: Cost,
    devices: Vec<usize>,
}

fn placed(problem: &Problem, inventory: &Inventory, found: &Found) -> Vec<Placed> {
    let devices = device_numbers(inventory, found);
    let choices = found.structure.groups.iter().zip(&found.structure.configs);
    let groups = choices.zip(&found.places).zip(devices).map(|(((group, config), (pick, _)), devices)| {
        let of_pick = |pick: &Pick| inventory.picks.iter().find(|(known, _)| known == pick).map(|(_, slice)| *slice);
        let slice = match &group.hand {
            Some(devices) => inventory.hand_slice(devices),
            None => of_pick(pick).expect("a pick of the inventory"),
        };
        let cost = problem.cost(group.roles, &slice, config).expect("what was found fits");
        Placed { group: group.clone(), config: *config, slice, cost, devices }
    });
    groups.collect()
}

/// The numbers of every group's devices: nodes are given out in order.
fn device_numbers(inventory: &Inventory, found: &Found) -> Vec<Vec<usize>> {
    let hand: Vec<usize> = found.structure.groups.iter().filter_map(|group| group.hand.clone()).flatten().collect();
    let mut dealer = Dealer::new(inventory, &hand);
    let places = found.structure.groups.iter().zip(&found.places);
    places
        .map(|(group, (pick, seat))| match (pick, seat) {
            (Pick::Whole { class, nodes }, _) => dealer.whole(*class, *nodes),
            (Pick::Mixed { classes }, _) => {
                let all = classes.iter().flat_map(|&class| dealer.whole(class, inventory.classes[class].nodes.len()));
                let mut devices: Vec<usize> = all.collect();
                devices.sort_unstable();
                devices
            }
            (Pick::Spread { take }, _) => {
                let parts = take.iter().enumerate().filter(|(_, part)| part.iter().any(|count| *count > 0));
                parts.flat_map(|(class, part)| dealer.some(class, part, inventory.classes[class].nodes[0])).collect()
            }
            (Pick::Part { class, take }, Seat::Shared(node)) => dealer.part(*class, take, *node),
            _ => group.hand.clone().unwrap_or_default(),
        })
        .collect()
}

/// Gives out free devices.
struct Dealer<'a> {
    inventory: &'a Inventory<'a>,
    /// Free devices per node.
    free: Vec<Vec<usize>>,
    /// Nodes of each class that nobody uses yet.
    nodes: Vec<std::collections::VecDeque<usize>>,
    /// Nodes that several groups share, in the order in which they were broken into.
    shared: Vec<usize>,
}

impl<'a> Dealer<'a> {
    fn new(inventory: &'a Inventory, taken: &[usize]) -> Dealer<'a> {
        let mut first = 0;
        let mut free = Vec::new();
        let mut is_taken = vec![false; inventory.cluster.num_devices()];
        taken.iter().for_each(|&device| is_taken[device] = true);
        for node in &inventory.cluster.nodes {
            free.push((first..first + node.devices.len()).filter(|device| !is_taken[*device]).collect());
            first += node.devices.len();
        }
        let nodes = inventory.classes.iter().map(|class| class.nodes.iter().copied().collect()).collect();
        Dealer { inventory, free, nodes, shared: Vec::new() }
    }

    fn whole(&mut self, class: usize, count: usize) -> Vec<usize> {
        let nodes: Vec<usize> = self.nodes[class].drain(..count).collect();
        nodes.into_iter().flat_map(|node| std::mem::take(&mut self.free[node])).collect()
    }

    fn part(&mut self, class: usize, take: &[usize], seat: usize) -> Vec<usize> {
        if seat == self.shared.len() {
            self.shared.push(self.nodes[class].pop_front().expect("a node that the search found free"));
        }
        self.some(class, take, self.shared[seat])
    }

    /// So many free devices of each kind of a node.
    fn some(&mut self, class: usize, take: &[usize], node: usize) -> Vec<usize> {
        let cluster = self.inventory.cluster;
        let mut devices = Vec::new();
        for ((kind, _), count) in self.inventory.classes[class].kinds.iter().zip(take) {
            let of_kind = |device: &usize| {
                let (node, place) = cluster.locate(*device).expect("a device of the cluster");
                cluster.nodes[node].devices[place] == *kind
            };
            let chosen: Vec<usize> = self.free[node].iter().copied().filter(of_kind).take(*count).collect();
            self.free[node].retain(|device| !chosen.contains(device));
            devices.extend(chosen);
        }
        devices.sort_unstable();
        devices
    }
}

impl Placed {
    fn plan(&self, question: &Question, answer: &Answer) -> GroupPlan {
        let Placed { group, config, slice, cost, .. } = self;
        let job = |role| answer.problem.job(role, group.roles, slice, config, cost.held);
        let totals = answer.problem.totals(group.roles, slice, config, cost.held);
        let role_plan = |role: Role| {
            let job = job(role);
            RolePlan {
                role,
                zero_stage: job.zero_stage,
                adam_offload: job.adam_offload,
                tensor_parallel: if role == Role::Generator { job.tensor_parallel } else { 1 },
                slots: if role == Role::Generator { job.slots } else { 0 },
                shares_weights: role == Role::Generator && job.shares_weights,
            }
        };
        let peak = |&phase: &Phase| {
            let (device_bytes, host_bytes) = (totals.device_bytes(phase), totals.host_bytes(phase));
            PhaseBytes { phase, device_bytes, host_bytes }
        };
        let (device_kinds, num_nodes) = self.hardware(question);
        GroupPlan {
            roles: group.roles.iter().map(role_plan).collect(),
            devices: DeviceRange::of(&self.devices),
            num_devices: slice.devices,
            device_kinds,
            num_nodes,
            moves_to_host: cost.held.moves_to_host,
            shares_host_memory: slice.shares_host_memory,
            usable_bytes: slice.usable_bytes,
            usable_host_bytes: slice.usable_host_bytes,
            ledger: group.roles.iter().flat_map(|role| job(role).entries()).collect(),
            peaks: answer.problem.phases.iter().map(peak).collect(),
            seconds: seconds(cost, &answer.problem.phases),
        }
    }

    /// The kinds of the devices in words, and on how many nodes they are.
    fn hardware(&self, question: &Question) -> (String, usize) {
        let cluster = question.cluster;
        let mut counts = vec![0; cluster.kinds.len()];
        let mut nodes = Vec::new();
        let mut first = 0;
        let mut devices = self.devices.iter().copied().peekable();
        for (index, node) in cluster.nodes.iter().enumerate() {
            while let Some(device) = devices.next_if(|device| *device < first + node.devices.len()) {
                counts[node.devices[device - first]] += 1;
                nodes.push(index);
            }
            first += node.devices.len();
        }
        nodes.dedup();
        let shown = counts.iter().zip(&cluster.kinds).filter(|(count, _)| **count > 0);
        let kinds = shown.map(|(count, kind)| format!("{count} x {}", kind.name)).collect::<Vec<_>>();
        (kinds.join(" and "), nodes.len())
    }
}

fn seconds(cost: &Cost, phases: &[Phase]) -> GroupSeconds {
    let of = |phase: Phase| match phase.work {
        Work::Generate => cost.generate,
        Work::Score => cost.score,
        Work::Learn => phase.role.map_or(0.0, |role| cost.learn[role as usize]),
        Work::Publish => cost.sync,
    };
    let phases: BTreeMap<Phase, f64> = phases.iter().map(|&phase| (phase, of(phase))).collect();
    GroupSeconds { phases, switch: cost.switch }
}

/// Roles, number of devices, and what was chosen for them.
pub(super) fn describe_choice(work: &Workload, roles: RoleSet, devices: usize, config: &GroupConfig) -> String {
    let mut notes = Vec::new();
    let models = roles.iter().filter(|role| *role != Role::Generator);
    let (trained, frozen): (Vec<Role>, Vec<Role>) = models.partition(|role| work.training(*role).is_some());
    let same = trained.windows(2).all(|pair| {
        let of = |role: Role| (config.stages[role as usize], config.offloads[role as usize]);
        of(pair[0]) == of(pair[1])
    });
    for (index, role) in trained.iter().enumerate().filter(|(index, _)| !same || *index == 0) {
        let who = if same || index > trained.len() { String::new() } else { format!("{role} ") };
        let offload = if config.offloads[*role as usize] { " with Adam on the host" } else { "" };
        notes.push(format!("{who}ZeRO {}{offload}", config.stages[*role as usize]));
    }
    for role in frozen {
        if config.stages[role as usize] == 3 {
            notes.push(format!("{role} sharded"));
        }
    }
    if roles.contains(Role::Generator) && config.tensor_parallel > 1 {
        notes.push(format!("tensor parallel {}", config.tensor_parallel));
    }
    let notes = if notes.is_empty() { String::new() } else { format!(" ({})", notes.join(", ")) };
    format!("{roles} on {devices}{notes}")
}

fn describe(problem: &Problem, groups: &[Placed]) -> String {
    let of =
        |placed: &Placed| describe_choice(problem.workload, placed.group.roles, placed.slice.devices, &placed.config);
    groups.iter().map(of).collect::<Vec<_>>().join("; ")
}

fn step_seconds(question: &Question, groups: &[Placed]) -> StepSeconds {
    let sum = |of: fn(&Cost) -> f64| groups.iter().map(|group| of(&group.cost)).sum::<f64>();
    let most = |of: fn(&Cost) -> f64| groups.iter().map(|group| of(&group.cost)).fold(0.0, f64::max);
    let seconds = StepSeconds {
        generate: sum(|cost| cost.generate),
        score: most(|cost| cost.score),
        train: most(Cost::train),
        sync: sum(|cost| cost.sync),
        switch: sum(|cost| cost.switch),
        overhead: question.overhead_s(),
        step: 0.0,
    };
    let phases = [seconds.generate, seconds.score, seconds.train, seconds.sync, seconds.switch, seconds.overhead];
    StepSeconds { step: phases.iter().sum(), ..seconds }
}

/// One sentence: how many were compared, what the step is made of, how full the fullest device is, what plainer ZeRO
/// stages would need, by how much the runner-up is slower, and whether another tier would be faster.
fn why(answer: &Answer, groups: &[Placed], seconds: &StepSeconds, faster: Option<(Tier, f64)>) -> String {
    let outcome = &answer.outcome;
    let mut parts = Vec::new();
    let phases = [("generation", seconds.generate), ("scoring", seconds.score), ("training", seconds.train)];
    let (longest, most) = phases.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("three phases");
    let of = match (outcome.fitting, outcome.considered) {
        (_, 1) => "the only combination".into(),
        (fitting, all) if fitting == all => format!("fastest of {all} combinations, which all fit their devices"),
        (fitting, all) => format!("fastest of {fitting} combinations that fit their devices, {all} in all"),
    };
    parts.push(format!(
        "{of}: {} a step, {:.0} % of it {longest}",
        super::render::seconds(seconds.step),
        100.0 * most / seconds.step,
    ));
    parts.extend(fullest(answer, groups));
    parts.extend(groups.iter().filter_map(|group| plainer(answer, group)));
    if let Some(found) = &outcome.runner_up {
        let other = found.seconds + seconds.overhead;
        let slower = 100.0 * (other / seconds.step - 1.0);
        parts.push(format!("the runner-up takes {} (+{slower:.1} %)", super::render::seconds(other)));
    }
    if let Some((tier, other)) = faster {
        let other = super::render::seconds(other + seconds.overhead);
        parts.push(format!("placement.tier = \"{tier}\" fits too, and takes {other}: `auto` goes by the actor's size"));
    }
    parts.join("; ")
}

/// The fullest device and its phase.
fn fullest(answer: &Answer, groups: &[Placed]) -> Option<String> {
    let peaks = groups.iter().flat_map(|group| {
        let totals = answer.problem.totals(group.group.roles, &group.slice, &group.config, group.cost.held);
        let of = move |&phase: &Phase| (totals.device_bytes(phase), group.slice.usable_bytes, phase);
        answer.problem.phases.iter().map(of)
    });
    let (needed, usable, phase) =
        peaks.max_by(|a, b| (a.0 as f64 / a.1 as f64).total_cmp(&(b.0 as f64 / b.1 as f64)))?;
    let [needed, usable] = [needed, usable].map(super::render::bytes);
    Some(format!("the fullest device holds {needed} of {usable} (phase: {})", phase.name()))
}

/// Why the main role's ZeRO stage is not one lower.
fn plainer(answer: &Answer, placed: &Placed) -> Option<String> {
    let main = answer.problem.workload.main_role()?;
    let stage = placed.config.stages[main as usize];
    if !placed.group.roles.contains(main) || !answer.problem.stages.iter().any(|other| *other < stage) {
        return None;
    }
    let mut config = placed.config;
    config.stages[main as usize] = stage - 1;
    match answer.problem.cost(placed.group.roles, &placed.slice, &config) {
        Err(Reject::Memory { phase, needed, usable, .. }) => {
            let [needed, usable] = [needed, usable].map(super::render::bytes);
            Some(format!(
                "the {main} at ZeRO {} there would need {needed} of {usable} (phase: {})",
                stage - 1,
                phase.name()
            ))
        }
        Err(_) => None,
        Ok(cost) => {
            let sum = |cost: &Cost| cost.fixed() + cost.score + cost.train();
            let more = sum(&cost) - sum(&placed.cost);
            let differs = more > 1e-6;
            differs.then(|| format!("the {main} at ZeRO {} takes {} longer", stage - 1, super::render::seconds(more)))
        }
    }
}
