//! The planner against every assignment of every device, on random small clusters.
//!
//! Written without the planner's classes, picks and bounds: each device is given to a group or to none in every way,
//! every choice of every group is tried. In half of the cases the planner is held to the rule of large clusters, and
//! each group's devices are checked against it: a part of one node, whole equal nodes, or all nodes of several classes.

use std::collections::HashMap;

use echelon_core::compute::ComputeDtype;
use echelon_core::role::Role;
use echelon_core::workload::{RoleModel, Sampling, passes_with_sampling};

use super::super::estimate::{Cost, GroupConfig, Problem};
use super::super::inventory::Inventory;
use super::super::search::Group;
use super::super::*;
use crate::cluster::{DeviceKind, Link, Node};
use crate::ledger::tests::{model, workload_of};
use crate::tier::RoleSet;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, count: usize) -> usize {
        (self.next() % count as u64) as usize
    }

    fn pick<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }

    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn kind(random: &mut Random, index: usize, params: f64) -> DeviceKind {
    DeviceKind {
        name: format!("kind {index}"),
        memory_bytes: (params * random.between(4.0, 90.0)) as u64 + (2 << 20),
        reserved_bytes: 1 << 20,
        bf16_flops_per_s: random.between(1e12, 4e12),
        f32_flops_per_s: random.between(0.5e12, 1e12),
        memory_bytes_per_s: random.between(1e10, 1e11),
        host_link_bytes_per_s: random.between(1e9, 1e10),
        shares_host_memory: random.below(5) == 0,
    }
}

fn cluster(random: &mut Random, params: f64) -> Cluster {
    let kinds: Vec<DeviceKind> = (0..random.pick(&[1, 1, 2])).map(|index| kind(random, index, params)).collect();
    let total = 1 + random.below(5);
    let mut nodes = Vec::new();
    let mut left = total;
    while left > 0 {
        let count = 1 + random.below(left.min(4));
        let mixed = random.below(4) == 0;
        let first = random.below(kinds.len());
        let devices = (0..count).map(|_| if mixed { random.below(kinds.len()) } else { first }).collect();
        nodes.push(Node {
            devices,
            within: Link { bytes_per_s: random.pick(&[1e10, 1e10, 3e10]), latency_s: 1e-6 },
            host_memory_bytes: (params * random.between(10.0, 400.0)) as u64,
        });
        left -= count;
    }
    Cluster { kinds, nodes, between_nodes: Link { bytes_per_s: random.between(5e8, 5e9), latency_s: 1e-5 } }
}

fn workload(random: &mut Random) -> Workload {
    let size = random.pick(&[[64, 4, 4, 4, 256, 500], [64, 6, 6, 2, 192, 300], [128, 2, 8, 8, 512, 1000]]);
    let prompts = 1 + random.below(12);
    let (prompt, response) = (1 + random.below(60), 1 + random.below(60));
    let others = [Role::Critic, Role::Reference, Role::Reward].into_iter().filter(|_| random.below(4) > 0);
    let mut models: Vec<RoleModel> =
        std::iter::once(Role::Actor).chain(others).map(|role| model(role, size, false)).collect();
    let samples_per_prompt = random.pick(&[1, 1, 3]);
    let (rows, batch, epochs) = (prompts * samples_per_prompt, 1 + random.below(prompts), random.pick(&[1, 2]));
    let offload = random.below(4) == 0;
    models.iter_mut().for_each(|model| model.offload = offload && model.role == Role::Reference);
    Workload {
        passes: passes_with_sampling(&models, rows, batch, rows.div_ceil(batch) * epochs),
        sampling: Some(Sampling {
            published: Role::Actor,
            prompts,
            samples_per_prompt,
            max_sequences: 1 + random.below(8),
            max_batched_tokens: 1 + random.below(200),
            kv_cache_bytes: random.pick(&[None, None, Some(200_000), Some(5_000_000)]),
        }),
        rows,
        max_prompt_tokens: prompt,
        max_response_tokens: response,
        mean_prompt_tokens: prompt as f64 * 0.8,
        mean_response_tokens: response as f64 * 0.7,
        tokens_per_micro_batch: 1 + random.below(400),
        dtype: random.pick(&[ComputeDtype::Bfloat16, ComputeDtype::Float32]),
        activation_checkpointing: random.below(2) == 0,
        ..workload_of(models)
    }
}

fn constraints(random: &mut Random, num_devices: usize) -> Constraints {
    let mut by_hand = Vec::new();
    if random.below(4) == 0 {
        let role = random.pick(&[Role::Actor, Role::Critic, Role::Reference]);
        let count = 1 + random.below(num_devices);
        by_hand.push(ByHand { role, devices: Some((num_devices - count..num_devices).collect()), colocate_with: None });
    }
    Constraints {
        pools: false,
        tier: random.pick(&[None, Some(Tier::Small), Some(Tier::Medium), Some(Tier::Large)]),
        zero_stage: random.pick(&[None, None, Some(0), Some(1), Some(2), Some(3)]),
        adam_offload: random.pick(&[None, Some(false), Some(true)]),
        tensor_parallel: random.pick(&[None, None, Some(1), Some(2)]),
        by_hand,
        use_all_devices: random.below(5) == 0,
        memory_fraction: 0.9,
    }
}

/// All devices of one group obey the rule: `free[node]` are the devices that nobody placed by hand.
fn obeys(cluster: &Cluster, free: &[Vec<usize>], devices: &[usize]) -> bool {
    let on = |node: usize| free[node].iter().filter(|device| devices.contains(device)).count();
    let used: Vec<usize> = (0..free.len()).filter(|node| on(*node) > 0).collect();
    if used.len() == 1 {
        return true;
    }
    if used.iter().any(|node| on(*node) < free[*node].len()) {
        return false;
    }
    let look = |node: usize| {
        let first: usize = cluster.nodes[..node].iter().map(|node| node.devices.len()).sum();
        let this = &cluster.nodes[node];
        let mut kinds: Vec<usize> = free[node].iter().map(|device| this.devices[device - first]).collect();
        kinds.sort_unstable();
        (kinds, this.within.bytes_per_s.to_bits(), this.host_memory_bytes / this.devices.len() as u64)
    };
    let unlike = used.iter().any(|node| look(*node) != look(used[0]));
    let alike_elsewhere =
        |node: usize| (0..free.len()).any(|other| !used.contains(&other) && look(other) == look(node));
    !unlike || !used.iter().any(|node| alike_elsewhere(*node))
}

/// Roles with a stage, in the order in which [`configs`] goes through them.
const ALL: [Role; 4] = [Role::Actor, Role::Critic, Role::Reference, Role::Reward];

/// Every way to choose stages, offload and tensor-parallel size for `roles`.
fn configs(problem: &Problem, roles: RoleSet, sizes: &[usize]) -> Vec<GroupConfig> {
    let lowest = problem.stages[0];
    let mut all = Vec::new();
    let has = |role: Role| roles.contains(role);
    let trained = |role: Role| if has(role) { problem.stages.clone() } else { vec![lowest] };
    let frozen = |role: Role| match (has(role), problem.stages.as_slice()) {
        (false, stages) => vec![stages[0]],
        (true, [stage]) => vec![*stage],
        (true, _) => vec![0, 3],
    };
    let offloads = |role: Role| if has(role) { problem.offloads.clone() } else { vec![false] };
    let sizes = if has(Role::Generator) { sizes.to_vec() } else { vec![1] };
    for actor in trained(Role::Actor) {
        for critic in trained(Role::Critic) {
            for reference in frozen(Role::Reference) {
                for reward in frozen(Role::Reward) {
                    for actor_offload in offloads(Role::Actor) {
                        for critic_offload in offloads(Role::Critic) {
                            for &tensor_parallel in &sizes {
                                let mut config =
                                    GroupConfig { stages: [lowest; 5], offloads: [false; 5], tensor_parallel };
                                let stages = [actor, critic, reference, reward];
                                (0..4).for_each(|at| config.stages[ALL[at] as usize] = stages[at]);
                                config.offloads[Role::Actor as usize] = actor_offload;
                                config.offloads[Role::Critic as usize] = critic_offload;
                                all.push(config);
                            }
                        }
                    }
                }
            }
        }
    }
    all
}

/// Devices of each group for every assignment that leaves no group empty and, where the rule holds, obeys it.
fn assignments(question: &Question, groups: &[Group]) -> Vec<Vec<Vec<usize>>> {
    let cluster = question.cluster;
    let taken: Vec<usize> = groups.iter().filter_map(|group| group.hand.clone()).flatten().collect();
    let mut free = Vec::new();
    let mut first = 0;
    for node in &cluster.nodes {
        free.push((first..first + node.devices.len()).filter(|device| !taken.contains(device)).collect::<Vec<_>>());
        first += node.devices.len();
    }
    let devices: Vec<usize> = free.iter().flatten().copied().collect();
    let open: Vec<usize> = (0..groups.len()).filter(|group| groups[*group].hand.is_none()).collect();
    let ways = (open.len() + 1).pow(devices.len() as u32);
    let mut all = Vec::new();
    for mut way in 0..ways {
        let mut of_group: Vec<Vec<usize>> = groups.iter().map(|group| group.hand.clone().unwrap_or_default()).collect();
        let mut idle = 0;
        for &device in &devices {
            match open.get(way % (open.len() + 1)) {
                Some(group) => of_group[*group].push(device),
                None => idle += 1,
            }
            way /= open.len() + 1;
        }
        let any = question.every_slice > 0;
        let may = |devices: &[usize]| !devices.is_empty() && (any || obeys(cluster, &free, devices));
        let obeys = open.iter().all(|group| may(&of_group[*group]));
        if obeys && !(question.constraints.use_all_devices && idle > 0) {
            all.push(of_group);
        }
    }
    all
}

/// Seconds of the best structure of one tier, and of the best with other groups, another choice for the actor or other engines.
fn brute_force(question: &Question, problem: &Problem, tier: Tier) -> (Option<f64>, Option<f64>) {
    let cluster = question.cluster;
    let roles = question.workload.roles();
    let hand = Hand::new(&question.constraints.by_hand, &roles, cluster.num_devices()).unwrap();
    let inventory = Inventory::new(cluster, &hand.devices(), question.constraints.memory_fraction, 0);
    let sizes = question.tensor_parallel_sizes(tier, problem, &inventory);
    let mut of_kinds: HashMap<(usize, u8, bool, usize), f64> = HashMap::new();
    for (partition, groups) in hand.partitions(tier, &roles).into_iter().enumerate() {
        let mut known: HashMap<(usize, Vec<usize>, usize), Option<Cost>> = HashMap::new();
        let choices: Vec<Vec<GroupConfig>> = groups.iter().map(|group| configs(problem, group.roles, &sizes)).collect();
        let group_of = |role: Role| groups.iter().position(|group| group.roles.contains(role)).unwrap();
        let (actor, generator) = (group_of(Role::Actor), group_of(Role::Generator));
        for devices in assignments(question, &groups) {
            // Per group, the choices that fit these devices.
            let mut fitting: Vec<Vec<(usize, Cost)>> = Vec::new();
            for (index, group) in groups.iter().enumerate() {
                let slice = inventory.hand_slice(&devices[index]);
                let cost = |choice: usize| {
                    let key = (index, devices[index].clone(), choice);
                    *known.entry(key).or_insert_with(|| problem.cost(group.roles, &slice, &choices[index][choice]).ok())
                };
                let costs = (0..choices[index].len()).map(cost).collect::<Vec<_>>();
                fitting
                    .push(costs.into_iter().enumerate().filter_map(|(choice, cost)| Some((choice, cost?))).collect());
            }
            let mut chosen = vec![0; groups.len()];
            'choices: while fitting.iter().all(|choices| !choices.is_empty()) {
                let costs = || chosen.iter().zip(&fitting).map(|(at, choices)| choices[*at].1);
                let fixed: f64 = costs().map(|cost| cost.generate + cost.sync + cost.switch).sum();
                let score = costs().map(|cost| cost.score).fold(0.0, f64::max);
                let train = costs().map(|cost| cost.train()).fold(0.0, f64::max);
                let config = |group: usize| choices[group][fitting[group][chosen[group]].0];
                let key = (
                    partition,
                    config(actor).stages[Role::Actor as usize],
                    config(actor).offloads[Role::Actor as usize],
                    config(generator).tensor_parallel,
                );
                let seconds = of_kinds.entry(key).or_insert(f64::INFINITY);
                *seconds = seconds.min(fixed + score + train);
                for (at, choices) in chosen.iter_mut().zip(&fitting) {
                    *at += 1;
                    if *at < choices.len() {
                        continue 'choices;
                    }
                    *at = 0;
                }
                break;
            }
        }
    }
    let mut seconds: Vec<f64> = of_kinds.into_values().collect();
    seconds.sort_by(f64::total_cmp);
    (seconds.first().copied(), seconds.get(1).copied())
}

#[test]
fn equals_brute_force_on_a_thousand_clusters() {
    let mut random = Random(3);
    let (mut planned, mut refused, mut raised) = (0, 0, 0);
    for case in 0..1000 {
        let workload = workload(&mut random);
        let cluster = cluster(&mut random, workload.models[0].shape.num_params() as f64);
        let constraints = constraints(&mut random, cluster.num_devices());
        let rates = Rates::gpu();
        let every_slice = if case % 2 == 0 { EVERY_SLICE } else { 0 };
        let question =
            Question { cluster: &cluster, workload: &workload, constraints: &constraints, rates: &rates, every_slice };
        let answer = question.solve().unwrap();
        let mut tier = constraints.tier.unwrap_or(Tier::Small);
        let mut expected = brute_force(&question, &answer.problem, tier);
        while constraints.tier.is_none() && expected.0.is_none() && tier.raised().is_some() {
            tier = tier.raised().unwrap();
            expected = brute_force(&question, &answer.problem, tier);
        }
        if constraints.tier.is_none() && expected.0.is_none() {
            tier = Tier::Small; // a refusal is about the tier that was meant
        }
        let seconds = |found: &Option<search::Found>| found.as_ref().map(|found| found.seconds);
        let found = (seconds(&answer.outcome.best), seconds(&answer.outcome.runner_up));
        for (found, expected) in [(found.0, expected.0), (found.1, expected.1)] {
            let equal = match (found, expected) {
                (Some(a), Some(b)) => (a - b).abs() <= 1e-12 * b,
                (a, b) => a == b,
            };
            assert!(equal, "case {case}: {found:?} against {expected:?}\n{cluster:?}\n{constraints:?}\n{workload:?}");
        }
        assert_eq!(answer.tier, tier, "case {case}");
        raised += usize::from(constraints.tier.is_none() && tier > Tier::Small && found.0.is_some());
        match found.0 {
            Some(_) => {
                planned += 1;
                super::check_devices(&explain::plan(&question, &answer, None), cluster.num_devices());
            }
            None => refused += 1,
        }
    }
    assert!(planned > 300 && refused > 100 && raised > 5, "{planned} planned, {refused} refused, {raised} raised");
}
