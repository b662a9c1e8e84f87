mod brute_force;

use super::*;
use echelon_core::compute::ComputeDtype;
use echelon_core::workload::{Pass, RoleModel, Training};

use crate::ledger::tests::{GATED_7B, GATED_13B, GATED_70B, model, on_cpu, with_sampling, workload};

fn planned(cluster: &Cluster, workload: &Workload, constraints: &Constraints) -> Plan {
    plan(cluster, workload, constraints, &Rates::of(cluster)).unwrap_or_else(|error| panic!("{error}"))
}

fn refused(cluster: &Cluster, workload: &Workload, constraints: &Constraints) -> Refusal {
    match plan(cluster, workload, constraints, &Rates::of(cluster)) {
        Err(PlanError::Refused(refusal)) => *refusal,
        other => panic!("{other:?}"),
    }
}

/// Every device at most once, and only devices that exist.
fn check_devices(plan: &Plan, num_devices: usize) {
    let mut devices: Vec<usize> = plan.groups.iter().flat_map(GroupPlan::device_numbers).collect();
    let count = devices.len();
    devices.sort_unstable();
    devices.dedup();
    assert_eq!(devices.len(), count, "a device in two groups: {plan}");
    assert!(devices.last().is_none_or(|last| *last < num_devices));
    assert_eq!(count + plan.idle_devices, num_devices);
}

/// With other numbers of rows, per step and per optimizer step.
fn resized(mut work: Workload, rows: usize, batch: usize) -> Workload {
    work.resize(rows, batch);
    work
}

#[test]
fn a_7b_model_shares_eight_devices() {
    let cluster = Cluster::of(1, 8, "H100-80GB").unwrap();
    let plan = planned(&cluster, &workload(GATED_7B), &Constraints::default());
    check_devices(&plan, 8);
    assert_eq!((plan.tier, plan.groups.len(), plan.groups[0].num_devices), (Tier::Small, 1, 8));
    let text = plan.to_string();
    for wanted in
        ["devices 0-7: 8 x H100-80GB on 1 node", "actor, ZeRO", "a step: generate", "why: fastest of", "runner-up: "]
    {
        assert!(text.contains(wanted), "{wanted} in\n{text}");
    }
}

fn group_of(plan: &Plan, role: Role) -> Option<&GroupPlan> {
    plan.groups.iter().find(|group| group.roles.iter().any(|plan| plan.role == role))
}

#[test]
fn a_13b_model_gets_four_groups() {
    let cluster = Cluster::of(2, 8, "H100-80GB").unwrap();
    let plan = planned(&cluster, &workload(GATED_13B), &Constraints::default());
    check_devices(&plan, 16);
    assert_eq!((plan.tier, plan.groups.len()), (Tier::Medium, 4));
    let actor = group_of(&plan, Role::Actor).unwrap();
    assert!(actor.roles.iter().any(|role| role.role == Role::Generator), "the generator shares the actor's devices");
}

#[test]
fn a_70b_model_generates_in_tensor_parallel_within_a_node() {
    // On 4 nodes actor and critic do not fit beside frozen models: 8 devices are too few for either, with Adam on the host.
    let cluster = Cluster::of(5, 8, "H100-80GB").unwrap();
    let plan = planned(&cluster, &workload(GATED_70B), &Constraints::default());
    check_devices(&plan, 40);
    assert_eq!(plan.tier, Tier::Large);
    let size = plan.role(Role::Generator).unwrap().tensor_parallel;
    assert!(size > 1 && 8 % size == 0, "{plan}");
}

#[test]
fn workers_of_one_host_are_devices() {
    let rates = Rates::cpu();
    for workers in [1, 2, 4] {
        let cluster = Cluster::cpu(workers, 4, 64 << 30).unwrap();
        let constraints = Constraints { use_all_devices: true, ..Constraints::default() };
        let plan = plan(&cluster, &on_cpu(), &constraints, &rates).unwrap();
        check_devices(&plan, workers);
        assert_eq!(plan.idle_devices, 0);
        assert!(plan.role(Role::Reward).is_none());
        assert!(plan.role(Role::Generator).unwrap().shares_weights || plan.role(Role::Actor).unwrap().zero_stage == 3);
    }
}

/// The measured step on 2 threads (docs/performance.md: generation 4.2, scoring 5.0, training 10.3 to 11.2 s). Its
/// reward is a rule.
#[test]
fn seconds_are_near_the_measured_step() {
    let cluster = Cluster::cpu(1, 2, 16 << 30).unwrap();
    let plan = planned(&cluster, &on_cpu(), &Constraints::default());
    let s = plan.seconds;
    for (estimated, measured) in [(s.generate, 4.2), (s.score, 5.0), (s.train, 10.7), (s.step, 20.0)] {
        let ratio: f64 = estimated / measured;
        assert!((0.7..1.3).contains(&ratio), "{estimated} against {measured}: {s:?}");
    }
}

#[test]
fn a_plan_survives_json() {
    let cluster = Cluster::of(2, 8, "A100-80GB").unwrap();
    let plan = planned(&cluster, &workload(GATED_13B), &Constraints::default());
    let json = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
    assert!(json.contains(r#""role":"generator""#) && json.contains(r#""phase":"train_actor""#));
}

#[test]
fn every_phase_of_a_plan_fits_its_devices() {
    for (nodes, kind, size) in [(1, "A100-40GB", GATED_7B), (2, "A100-80GB", GATED_13B), (8, "H100-80GB", GATED_70B)] {
        let plan = planned(&Cluster::of(nodes, 8, kind).unwrap(), &workload(size), &Constraints::default());
        for group in &plan.groups {
            for peak in &group.peaks {
                assert!(
                    peak.device_bytes <= group.usable_bytes && peak.host_bytes <= group.usable_host_bytes,
                    "{plan}"
                );
                let most = group.roles.iter().map(|role| group.role_bytes(role.role, peak.phase).0).max().unwrap();
                assert!(most <= peak.device_bytes, "a role needs more than the device holds: {plan}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_numbers_and_a_change() {
    let cluster = Cluster::of(1, 8, "A100-80GB").unwrap();
    let constraints = Constraints {
        tier: Some(Tier::Small),
        zero_stage: Some(0),
        adam_offload: Some(false),
        ..Constraints::default()
    };
    let refusal = refused(&cluster, &workload(GATED_7B), &constraints);
    let Shortfall::Memory { needed_bytes, usable_bytes, lacking_bytes, entries, .. } = &refusal.shortfall else {
        panic!("{refusal}")
    };
    assert_eq!(needed_bytes - usable_bytes, *lacking_bytes);
    assert!(entries.windows(2).all(|pair| pair[0].bytes >= pair[1].bytes) && !entries.is_empty());
    let change = refusal.change.as_ref().unwrap();
    let stage: Option<u8> = change.change.strip_prefix("train.zero_stage = ").and_then(|stage| stage.parse().ok());
    let changed = Constraints { zero_stage: Some(stage.unwrap()), ..constraints.clone() };
    let seconds = planned(&cluster, &workload(GATED_7B), &changed).seconds.step;
    assert!((seconds - change.seconds).abs() < 1e-9, "the change does what it promises");
    let smaller = Cluster::of(1, 8, "A100-40GB").unwrap();
    let several = refused(&smaller, &workload(GATED_7B), &constraints).change.unwrap();
    assert_eq!(several.change, "leave train.zero_stage, train.adam_offload, placement.tier to the planner");
    let text = refusal.to_string();
    assert!(
        text.contains("GiB too much (phase: ") && text.contains("nearest change that fits: train.zero_stage"),
        "{text}"
    );
}

#[test]
fn a_model_too_large_for_any_setting_needs_more_nodes() {
    let cluster = Cluster::of(1, 8, "L40S").unwrap();
    let refusal = refused(&cluster, &workload(GATED_70B), &Constraints::default());
    let change = refusal.change.unwrap();
    let nodes: usize = change.change.strip_prefix("placement.nodes = ").expect(&change.change).parse().unwrap();
    planned(&Cluster::of(nodes, 8, "L40S").unwrap(), &workload(GATED_70B), &Constraints::default());
    let half = Cluster::of(nodes / 2, 8, "L40S").unwrap();
    assert!(
        plan(&half, &workload(GATED_70B), &Constraints::default(), &Rates::gpu()).is_err(),
        "half as many do not do"
    );
}

/// With whole gradients on every device the four models do not fit together, on their own devices they do.
#[test]
fn auto_raises_the_tier_when_nothing_fits() {
    let cluster = Cluster::of(1, 8, "A100-80GB").unwrap();
    let auto = Constraints { zero_stage: Some(1), ..Constraints::default() };
    let plan = planned(&cluster, &workload(GATED_7B), &auto);
    assert_eq!((plan.tier, plan.tier_reason.as_str()), (Tier::Medium, "nothing fits in tier small"));
    let refusal = refused(&cluster, &workload(GATED_7B), &Constraints { tier: Some(Tier::Small), ..auto });
    assert_eq!(refusal.tier, Some(Tier::Small));
    assert!(refusal.change.is_some(), "{refusal}");
}

#[test]
fn hand_placement_is_kept() {
    let cluster = Cluster::of(1, 8, "H100-80GB").unwrap();
    let by_hand = vec![
        ByHand { role: Role::Critic, devices: Some(vec![6, 7]), colocate_with: None },
        ByHand { role: Role::Reward, devices: None, colocate_with: Some(Role::Critic) },
    ];
    let plan = planned(&cluster, &workload(GATED_7B), &Constraints { by_hand, ..Constraints::default() });
    check_devices(&plan, 8);
    let critic = group_of(&plan, Role::Critic).unwrap();
    assert_eq!(critic.device_numbers().collect::<Vec<_>>(), [6, 7]);
    assert!(critic.roles.iter().any(|role| role.role == Role::Reward));
    let actor = group_of(&plan, Role::Actor).unwrap();
    assert!(actor.roles.iter().any(|role| role.role == Role::Generator));
}

#[test]
fn impossible_hand_placements_are_named() {
    let cluster = Cluster::of(1, 4, "H100-80GB").unwrap();
    let devices = |role, devices: &[usize]| ByHand { role, devices: Some(devices.into()), colocate_with: None };
    let cases = [
        (
            vec![devices(Role::Actor, &[4])],
            "[placement.actor] names device 4: there are 4, counted from 0 through all nodes",
        ),
        (
            vec![devices(Role::Actor, &[])],
            "[placement.actor] names no device: name some, or leave the choice to the planner",
        ),
        (
            vec![devices(Role::Actor, &[0, 1]), devices(Role::Critic, &[1, 2])],
            "[placement.critic] and [placement.actor] share device 1 but not all: name equal or separate devices",
        ),
        (
            vec![ByHand { role: Role::Reward, devices: None, colocate_with: Some(Role::Reward) }],
            "[placement.reward] is colocated with reward, which has no place of its own: name another role",
        ),
    ];
    for (by_hand, message) in cases {
        let constraints = Constraints { by_hand, ..Constraints::default() };
        let error = plan(&cluster, &workload(GATED_7B), &constraints, &Rates::gpu()).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn degenerate_workloads_are_errors() {
    let cluster = Cluster::of(1, 8, "H100-80GB").unwrap();
    let work = with_sampling(workload(GATED_7B), |sampling| sampling.prompts = 0);
    let error = plan(&cluster, &work, &Constraints::default(), &Rates::gpu()).unwrap_err().to_string();
    assert_eq!(error, "the number of prompts is 0: a step needs at least 1");
    let few = resized(workload(GATED_7B), 2, 2);
    let all = Constraints { use_all_devices: true, tier: Some(Tier::Small), ..Constraints::default() };
    let refusal = refused(&cluster, &few, &all);
    assert!(refusal.change.is_some(), "{refusal}");
    let odd = Constraints { tensor_parallel: Some(3), ..Constraints::default() };
    let refusal = refused(&cluster, &workload(GATED_7B), &odd);
    assert!(refusal.to_string().contains("a tensor-parallel size of 3 must divide heads (32)"), "{refusal}");
}

#[test]
fn all_devices_are_used_where_the_recipe_says_so() {
    let cluster = Cluster::of(8, 8, "H100-80GB").unwrap();
    for (tier, size) in [(Tier::Small, GATED_7B), (Tier::Medium, GATED_13B), (Tier::Large, GATED_70B)] {
        let constraints = Constraints { use_all_devices: true, tier: Some(tier), ..Constraints::default() };
        let plan = planned(&cluster, &workload(size), &constraints);
        check_devices(&plan, 64);
        assert_eq!(plan.idle_devices, 0, "{plan}");
        let freely = planned(&cluster, &workload(size), &Constraints { use_all_devices: false, ..constraints });
        assert!(freely.seconds.step <= plan.seconds.step);
    }
}

/// Sequences beyond what memory holds wait for a slot instead of making the plan fail.
#[test]
fn the_generator_gets_the_slots_that_there_is_room_for() {
    let work = workload(GATED_7B);
    let slots = |kind: &str| {
        let plan = planned(&Cluster::of(1, 8, kind).unwrap(), &work, &Constraints::default());
        plan.role(Role::Generator).unwrap().slots
    };
    assert!(slots("H100-80GB") < slots("H200") && slots("H200") <= 128);
    let of_cache = |bytes| with_sampling(work.clone(), |sampling| sampling.kv_cache_bytes = Some(bytes));
    let limited = of_cache(10 * 2048 * 512 * 1024);
    let plan = planned(&Cluster::of(1, 8, "H200").unwrap(), &limited, &Constraints::default());
    assert_eq!(plan.role(Role::Generator).unwrap().slots, 10, "2048 tokens of half a MiB each in ten slots");
    let tiny = of_cache(1);
    let refusal = refused(&Cluster::of(1, 8, "H200").unwrap(), &tiny, &Constraints::default());
    assert!(refusal.to_string().contains("generation.kv_cache_bytes must hold one sequence"), "{refusal}");
}

/// A second kind of device beside the first is used, at the pace of the slower where they share a group.
#[test]
fn unlike_devices_can_be_planned_for() {
    let fast = Cluster::of(1, 8, "H100-80GB").unwrap();
    let both = fast.clone().joined(Cluster::of(1, 8, "A100-80GB").unwrap());
    let medium = Constraints { tier: Some(Tier::Medium), ..Constraints::default() };
    let plan = planned(&both, &workload(GATED_7B), &medium);
    check_devices(&plan, 16);
    assert!(plan.seconds.step < planned(&fast, &workload(GATED_7B), &medium).seconds.step);
    assert!(plan.groups.iter().any(|group| group.device_kinds.contains("A100-80GB")), "{plan}");
}

#[test]
fn eight_devices_and_ten_thousand_have_a_plan() {
    let large = resized(workload(GATED_70B), 20480, 5120);
    for (nodes, work) in [(1, workload(GATED_7B)), (1250, large)] {
        let cluster = Cluster::of(nodes, 8, "H100-80GB").unwrap();
        let plan = planned(&cluster, &work, &Constraints::default());
        check_devices(&plan, nodes * 8);
    }
}

/// A model that learns alone; a reward model from pairs.
fn alone(role: Role, size: [i64; 6], rows: usize) -> Workload {
    let (verb, rows_per_unit) = if role == Role::Actor { ("logprobs", 1) } else { ("scores", 2) };
    Workload {
        models: vec![RoleModel { training: Some(Training::default()), ..model(role, size, false) }],
        sampling: None,
        passes: vec![Pass { role, verb: "learn", rows, times: 1 }, Pass { role, verb, rows, times: 0 }],
        rows,
        rows_per_unit,
        max_prompt_tokens: 0,
        max_response_tokens: 2048,
        mean_prompt_tokens: 0.0,
        mean_response_tokens: 1024.0,
        tokens_per_micro_batch: 16384,
        dtype: ComputeDtype::Bfloat16,
        activation_checkpointing: false,
    }
}

/// Does what a refusal says: one change, or two.
fn changed(change: &str, (kind, nodes, devices): (&str, usize, usize), mut work: Workload) -> Option<Plan> {
    let (mut nodes, mut devices, mut constraints) = (nodes, devices, Constraints::default());
    for setting in change.split(" and ") {
        let (key, value) = setting.split_once(" = ").unwrap();
        let number = || value.parse::<usize>().unwrap();
        match key {
            "train.zero_stage" => constraints.zero_stage = Some(number() as u8),
            "train.activation_checkpointing" => work.activation_checkpointing = value == "true",
            "train.tokens_per_micro_batch" => work.tokens_per_micro_batch = number(),
            "train.batch_size" => {
                let rows = number() * work.rows_per_unit;
                work.resize(rows, rows);
            }
            "placement.nodes" => nodes = number(),
            "placement.gpus_per_node" => devices = number(),
            other => panic!("{other}"),
        }
    }
    let cluster = Cluster::of(nodes, devices, kind).unwrap();
    plan(&cluster, &work, &constraints, &Rates::gpu()).ok()
}

/// However small micro-batches are to be, one holds both rows of a pair.
#[test]
fn a_plan_for_pairs_has_room_for_a_pair() {
    let cluster = Cluster::of(1, 8, "H100-80GB").unwrap();
    let most = |tokens_per_micro_batch: usize| {
        let pairs = alone(Role::Reward, GATED_7B, 64);
        let work =
            Workload { max_response_tokens: 4096, activation_checkpointing: true, tokens_per_micro_batch, ..pairs };
        let plan = planned(&cluster, &work, &Constraints::default());
        plan.choices.iter().map(|choice| choice.device_bytes).collect::<Vec<_>>()
    };
    assert_eq!(most(4096), most(8192));
    assert!(most(8192).iter().zip(most(16384)).all(|(one, two)| *one < two));
}

fn check_alone(plan: &Plan, work: &Workload) {
    let ([group], step, said) = (plan.groups.as_slice(), plan.seconds.step, Alone(plan)) else { panic!("{plan}") };
    let [role] = group.roles.as_slice() else { panic!("{plan}") };
    let seconds = plan.choices.iter().filter_map(|choice| choice.seconds);
    assert_eq!(step, seconds.fold(f64::INFINITY, f64::min), "{said}");
    let first = plan.choices.iter().find(|choice| choice.seconds == Some(step)).unwrap();
    assert_eq!((first.zero_stage, first.adam_offload), (role.zero_stage, role.adam_offload), "{said}");
    assert!(first.device_bytes <= first.usable_bytes && first.host_bytes <= first.usable_host_bytes);
    assert!(group.ledger.iter().all(|entry| Some(entry.role) == work.alone()));
}

#[test]
fn a_model_alone_is_trained_at_the_plainest_of_the_fastest_stages_that_fit() {
    let (mut refused, mut fitting) = (0, 0);
    let works = [(GATED_7B, false), (GATED_7B, true), (GATED_13B, false), (GATED_70B, true)];
    for ((shape, reward), activation_checkpointing) in works.into_iter().flat_map(|work| [(work, false), (work, true)])
    {
        for hardware in [("H100-80GB", 1, 8), ("A100-40GB", 1, 2), ("L40S", 1, 1), ("H200", 2, 8), ("H100-80GB", 32, 8)]
        {
            let whole = if reward { alone(Role::Reward, shape, 256) } else { alone(Role::Actor, shape, 128) };
            let work = Workload { activation_checkpointing, ..whole };
            let cluster = Cluster::of(hardware.1, hardware.2, hardware.0).unwrap();
            match plan(&cluster, &work, &Constraints::default(), &Rates::gpu()) {
                Ok(plan) => {
                    fitting += 1;
                    check_alone(&plan, &work);
                }
                Err(PlanError::Refused(refusal)) => {
                    refused += 1;
                    let Some(change) = refusal.change else { continue };
                    let plan = changed(&change.change, hardware, work.clone());
                    let plan = plan.unwrap_or_else(|| panic!("{hardware:?}: {} does not fit", change.change));
                    assert!((plan.seconds.step - change.seconds).abs() < 1e-9, "{}: {}", change.change, Alone(&plan));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert!(refused > 9 && fitting > 9, "{refused} refused, {fitting} fitting");
}
