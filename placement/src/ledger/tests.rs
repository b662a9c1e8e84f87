use echelon_core::shape::{ModelShape, ParamShape, TensorParallelAxis, UnitShape};
use echelon_core::workload::{Gives, RoleModel, passes_with_sampling};

use super::*;

/// A model with gated layers: hidden, layers, query heads, key-value heads, gated width, vocabulary.
pub(crate) fn gated([h, layers, heads, kv_heads, f, v]: [i64; 6], tied: bool, scores: bool) -> ModelShape {
    use TensorParallelAxis::{Columns, Replicated, Rows};
    let param =
        |name: &str, shape: &[i64], axis| ParamShape { name: name.into(), shape: shape.into(), axis, trainable: true };
    let kv = h / heads * kv_heads;
    let layer = |index: i64| UnitShape {
        name: format!("layer {index}"),
        params: vec![
            param("input_layernorm", &[h], Replicated),
            param("q", &[h, h], Rows),
            param("k", &[kv, h], Rows),
            param("v", &[kv, h], Rows),
            param("o", &[h, h], Columns),
            param("post_attention_layernorm", &[h], Replicated),
            param("gate", &[f, h], Rows),
            param("up", &[f, h], Rows),
            param("down", &[h, f], Columns),
        ],
    };
    let mut units = vec![UnitShape { name: "embedding".into(), params: vec![param("embed", &[v, h], Rows)] }];
    units.extend((0..layers).map(layer));
    let mut last = vec![param("norm", &[h], Replicated)];
    match scores {
        true => last.push(param("score", &[1, h], Replicated)),
        false if !tied => last.push(param("lm_head", &[v, h], Rows)),
        false => {}
    }
    units.push(UnitShape { name: "head".into(), params: last });
    ModelShape {
        units,
        hidden_size: h,
        num_layers: layers as usize,
        num_heads: heads,
        num_kv_heads: kv_heads,
        head_dim: h / heads,
        intermediate_size: f,
        vocab_size: v,
    }
}

pub(crate) const SMOLLM2: [i64; 6] = [576, 30, 9, 3, 1536, 49152];
pub(crate) const GATED_7B: [i64; 6] = [4096, 32, 32, 32, 11008, 32000];
pub(crate) const GATED_13B: [i64; 6] = [5120, 40, 40, 40, 13824, 32000];
pub(crate) const GATED_70B: [i64; 6] = [8192, 80, 64, 8, 28672, 32000];

/// A role's model, as PPO has it.
pub(crate) fn model(role: Role, size: [i64; 6], tied: bool) -> RoleModel {
    let scores = matches!(role, Role::Critic | Role::Reward);
    RoleModel {
        role,
        shape: gated(size, tied, scores),
        gives: if scores { Gives::Scalars } else { Gives::Logprobs },
        training: matches!(role, Role::Actor | Role::Critic).then(Training::default),
        offload: false,
    }
}

/// All four models of one size, with the batch of the shipped recipes.
pub(crate) fn workload(size: [i64; 6]) -> Workload {
    let roles = [Role::Actor, Role::Critic, Role::Reference, Role::Reward];
    workload_of(roles.map(|role| model(role, size, false)).to_vec())
}

/// The same of some models.
pub(crate) fn workload_of(models: Vec<RoleModel>) -> Workload {
    Workload {
        passes: passes_with_sampling(&models, 1024, 128, 8),
        models,
        sampling: Some(Sampling {
            published: Role::Actor,
            prompts: 1024,
            samples_per_prompt: 1,
            max_sequences: 256,
            max_batched_tokens: 8192,
            kv_cache_bytes: None,
        }),
        rows: 1024,
        rows_per_unit: 1,
        max_prompt_tokens: 1024,
        max_response_tokens: 1024,
        mean_prompt_tokens: 512.0,
        mean_response_tokens: 512.0,
        tokens_per_micro_batch: 8192,
        dtype: ComputeDtype::Bfloat16,
        activation_checkpointing: true,
    }
}

/// PPO of SmolLM2 on CPU cores: 16 prompts, of which one optimizer step is made.
pub(crate) fn on_cpu() -> Workload {
    let models = [Role::Actor, Role::Critic, Role::Reference].map(|role| model(role, SMOLLM2, true));
    let mut work = Workload {
        max_prompt_tokens: 32,
        max_response_tokens: 48,
        mean_prompt_tokens: 32.0,
        mean_response_tokens: 43.0,
        tokens_per_micro_batch: 1280,
        dtype: ComputeDtype::Float32,
        activation_checkpointing: false,
        ..workload_of(models.to_vec())
    };
    work.resize(16, 16);
    with_sampling(work, |sampling| sampling.max_sequences = 16)
}

pub(crate) fn with_sampling(mut work: Workload, change: impl FnOnce(&mut Sampling)) -> Workload {
    change(work.sampling.as_mut().expect("it samples"));
    work
}

/// A role's model in numbers.
fn sizes(work: &Workload, role: Role) -> ModelSizes {
    ModelSizes::of(&work.model(role).expect("it has a model").shape)
}

fn job<'a>(role: Role, model: &'a ModelSizes, workload: &'a Workload, ranks: usize, stage: u8) -> RoleJob<'a> {
    RoleJob {
        role,
        model,
        workload,
        ranks,
        zero_stage: stage,
        adam_offload: false,
        tensor_parallel: 1,
        slots: 16,
        shares_weights: false,
        moves_to_host: false,
        on_cpu: false,
    }
}

fn entry<'a>(entries: &'a [Entry], name: &str) -> &'a Entry {
    entries.iter().find(|entry| entry.name == name).unwrap_or_else(|| panic!("no entry {name}: {entries:?}"))
}

/// Of `params` parameters over `ranks` ranks at a ZeRO stage, by the ZeRO paper: gradients in the compute dtype.
fn of_the_paper(params: u64, ranks: usize, stage: u8, dtype: ComputeDtype) -> StateBytes {
    let gradients = dtype.bytes() * if stage >= 2 { params.div_ceil(ranks as u64) } else { params };
    StateBytes { gradients, ..model_states(params, ranks, stage, dtype) }
}

/// The table of the ZeRO paper: 7.5e9 parameters, 64 ranks, bf16 with f32 Adam.
#[test]
fn the_zero_table() {
    let exact = [120_000_000_000u64, 31_406_250_000, 16_640_625_000, 1_875_000_000];
    let shown = ["120.0", "31.4", "16.6", "1.9"];
    for stage in 0..4u8 {
        let states = of_the_paper(7_500_000_000, 64, stage, ComputeDtype::Bfloat16);
        assert_eq!(states.total(), exact[stage as usize], "stage {stage}");
        assert_eq!(format!("{:.1}", states.total() as f64 / 1e9), shown[stage as usize]);
    }
    let whole = of_the_paper(7_500_000_000, 64, 0, ComputeDtype::Bfloat16);
    let psi = 7_500_000_000;
    assert_eq!((whole.weights, whole.gradients, whole.master + whole.moments), (2 * psi, 2 * psi, 12 * psi));
}

/// The same through a role's ledger, for a model of exactly 7.5e9 parameters: core accumulates gradients in f32, which is
/// 2 bytes per gradient more than the paper's, and nothing else differs.
#[test]
fn the_zero_table_through_the_ledger() {
    let mut shape = gated([1000, 2, 10, 10, 1000, 1000], true, false);
    let rest = 7_500_000_000 - shape.num_params();
    let filler =
        ParamShape { name: "filler".into(), shape: vec![rest], axis: TensorParallelAxis::Replicated, trainable: true };
    shape.units[1].params.push(filler);
    let model = ModelSizes::of(&shape);
    let work = workload(GATED_7B);
    for (stage, total) in [(0, 120_000_000_000), (1, 31_406_250_000), (2, 16_640_625_000), (3, 1_875_000_000u64)] {
        let entries = job(Role::Actor, &model, &work, 64, stage).entries();
        let states = ["weights", "gradients", "master weights", "moments"].map(|name| entry(&entries, name).bytes);
        let gradients = model.params / if stage >= 2 { 64 } else { 1 };
        assert_eq!(states.iter().sum::<u64>() - 2 * gradients, total, "stage {stage}");
        assert_eq!(states[1], 4 * gradients, "stage {stage}");
    }
}

#[test]
fn in_f32_the_parameter_is_the_master() {
    let states = model_states(1000, 4, 1, ComputeDtype::Float32);
    assert_eq!(states, StateBytes { weights: 4000, gradients: 4000, master: 0, moments: 2000 });
    assert_eq!(states, of_the_paper(1000, 4, 1, ComputeDtype::Float32));
    let states = model_states(1000, 4, 3, ComputeDtype::Float64);
    assert_eq!(states, StateBytes { weights: 2000, gradients: 2000, master: 0, moments: 4000 });
}

/// Sizes of a known model, and the ledger's parts by hand.
#[test]
fn smollm2_by_hand() {
    let shape = gated(SMOLLM2, true, false);
    let model = ModelSizes::of(&shape);
    assert_eq!(model.params, 134_515_008);
    assert_eq!(model.largest_unit, 49152 * 576);
    assert_eq!((model.embedding_unit, model.layer_unit, model.last_unit), (49152 * 576, 3_540_096, 576));
    assert!(model.tied);
    assert_eq!(model.layer_params, 30 * 3_540_096);
    let work = on_cpu();
    let actor = RoleJob { on_cpu: true, ..job(Role::Actor, &model, &work, 1, 0) };
    let entries = actor.entries();
    let of = |name: &str, phase| entries.iter().find(|e| e.name == name && e.phases == [phase]).unwrap().bytes;
    // Per token and layer: 4 x 576 + 5 x 576 + 3 x 1536 numbers, 9 log-sum-exps and two norms' scales; the embedding's output.
    assert_eq!(of("activations", Phase::learn(Role::Actor)), 1280 * 4 * (30 * (9 * 576 + 3 * 1536 + 9 + 2) + 576));
    // Chunks of 341 rows; the layers' backward takes less.
    assert_eq!(of("logits", Phase::learn(Role::Actor)), 3 * 4 * 341 * 49152);
    assert_eq!(of("logits", Phase::SCORE), 2 * 4 * 341 * 49152);
    let mut learns_entropy = work.clone();
    learns_entropy.models[0].training = Some(Training { entropy_in_loss: true });
    let actor = RoleJob { workload: &learns_entropy, ..actor };
    let entries = actor.entries();
    let logits = entries.iter().find(|e| e.name == "logits" && e.phases == [Phase::learn(Role::Actor)]).unwrap();
    assert_eq!(logits.bytes, 4 * 4 * 341 * 49152);
    assert!(!entries.iter().any(|e| e.name == "communication" || e.name == "gathered units"), "one rank sends nothing");
    let generator = RoleJob { shares_weights: true, ..job(Role::Generator, &model, &work, 1, 0) };
    let entries = generator.entries();
    assert_eq!(entry(&entries, "KV cache").bytes, 16 * 80 * 2 * 30 * 192 * 4);
    assert!(!entries.iter().any(|e| e.name == "weights"), "they are the actor's");
}

#[test]
fn stage_3_gathers_two_units_and_shards_frozen_roles() {
    let work = workload(GATED_7B);
    let model = sizes(&work, Role::Actor);
    let entries = job(Role::Reference, &model, &work, 8, 3).entries();
    assert_eq!(entry(&entries, "weights").bytes, 2 * model.params.div_ceil(8));
    assert_eq!(
        entry(&entries, "gathered units").bytes,
        2 * 2 * model.layer_unit,
        "layers are larger than the embedding"
    );
    let whole = job(Role::Reference, &model, &work, 8, 0).entries();
    assert_eq!(entry(&whole, "weights").bytes, 2 * model.params);
}

#[test]
fn offload_moves_master_and_moments_to_the_host() {
    let work = workload(GATED_7B);
    let model = sizes(&work, Role::Actor);
    let plain = job(Role::Actor, &model, &work, 8, 2);
    let (mut on_device, mut offloaded) = (Totals::default(), Totals::default());
    on_device.add(&plain);
    offloaded.add(&RoleJob { adam_offload: true, ..plain });
    let shard = model.params.div_ceil(8);
    let difference =
        on_device.device_bytes(Phase::learn(Role::Actor)) - offloaded.device_bytes(Phase::learn(Role::Actor));
    assert_eq!(difference, 12 * shard);
    assert_eq!(offloaded.host_bytes(Phase::GENERATE), (12 + 4) * shard, "with gradients on their way");
    assert_eq!(on_device.host_bytes(Phase::learn(Role::Actor)), 0);
}

#[test]
fn training_state_leaves_the_device_while_generating() {
    let work = workload(GATED_7B);
    let model = sizes(&work, Role::Actor);
    let moved = RoleJob { moves_to_host: true, ..job(Role::Actor, &model, &work, 8, 3) };
    let mut totals = Totals::default();
    totals.add(&moved);
    assert_eq!(totals.device_bytes(Phase::GENERATE), 0);
    assert_eq!(totals.host_bytes(Phase::GENERATE), (2 + 12) * model.params.div_ceil(8));
    assert_eq!(totals.device_bytes(Phase::SYNC), 2 * model.params.div_ceil(8), "sync reads the weights");
    assert_eq!(totals.host_bytes(Phase::learn(Role::Actor)), 0);
}

/// Roles take turns: the phase needs the resident bytes of all, and one role's pass.
#[test]
fn transient_bytes_of_several_roles_do_not_add_up() {
    let work = workload(GATED_7B);
    let (actor, critic) = (sizes(&work, Role::Actor), sizes(&work, Role::Critic));
    let mut both = Totals::default();
    both.add(&job(Role::Actor, &actor, &work, 1, 0));
    let alone = both.device_bytes(Phase::SCORE);
    let other = job(Role::Critic, &critic, &work, 1, 0);
    both.add(&other);
    assert_eq!(both.device_bytes(Phase::SCORE), alone + other.states().total(), "the critic's pass is the smaller one");
}

#[test]
fn tensor_parallel_splits_what_has_an_axis() {
    let model = ModelSizes::of(&gated(GATED_70B, false, false));
    assert_eq!(model.params, 68_976_648_192);
    let norms = (2 * 80 + 1) * 8192;
    assert_eq!(model.tensor_parallel_params(8), (model.params - norms) / 8 + norms);
    assert_eq!(model.kv_bytes_per_token(ComputeDtype::Bfloat16, 8), 2 * 80 * 1024 * 2 / 8);
    assert!(model.splits_into(8) && !model.splits_into(16), "eight key-value heads");
    assert!(!ModelSizes::of(&gated(SMOLLM2, true, false)).splits_into(2), "nine heads");
}

#[test]
fn every_byte_has_a_formula_and_the_totals_are_the_entries() {
    let work = workload(GATED_7B);
    let model = sizes(&work, Role::Actor);
    for role in [Role::Actor, Role::Critic, Role::Reference, Role::Reward, Role::Generator] {
        let job = RoleJob { adam_offload: true, ..job(role, &model, &work, 8, 3) };
        let entries = job.entries();
        assert!(entries.iter().all(|entry| !entry.formula.is_empty() && entry.bytes > 0));
        let mut totals = Totals::default();
        totals.add(&job);
        for phase in work.phases() {
            let of = |place: Place| {
                let here = entries.iter().filter(|e| e.place == place && e.phases.contains(&phase));
                here.map(|entry| entry.bytes).sum::<u64>()
            };
            assert_eq!((totals.device_bytes(phase), totals.host_bytes(phase)), (of(Place::Device), of(Place::Host)));
        }
    }
}
