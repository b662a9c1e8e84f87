//! Every role and phase of PPO on one model, metered as a run meters it, beside the memory ledger.

use std::path::Path;

use echelon_algorithms::columns::{ADVANTAGES, OLD_LOGPROBS, RETURNS, VALUES};
use echelon_algorithms::kl::KlEstimator;
use echelon_algorithms::losses::PolicyClip;
use echelon_algorithms::ppo::{PolicyLoss, ValueLoss};
use echelon_core::compute::ComputeDtype;
use echelon_core::data::Rows;
use echelon_core::loss::{Numbers, Totals};
use echelon_core::memory::{Load, MemoryUse, Meter, PassLoad, StateBytes};
use echelon_core::progress::{Interrupt, Unwatched};
use echelon_core::role::Role;
use echelon_core::rollout::{Prompt, Prompts, SamplingConfig};
use echelon_core::shim;
use echelon_core::verb::{Generate, Learn, Logprobs, Scores, Values, Verb};
use echelon_core::weight_layout::WeightLayout;
use echelon_core::workload::{Gives, RoleModel, Sampling, Training, Workload, passes_with_sampling};
use echelon_core::zero::{OptimizerConfig, PassConfig, Sharding, ZeroStage, forward_rows};
use echelon_generation::{Engine, EngineConfig, Policy};
use echelon_models::config::{DecoderConfig, HeadKind};
use echelon_models::head::ScalarRows;
use echelon_placement::ledger::compare::Comparison;
use echelon_placement::ledger::{ModelSizes, RoleJob};
use echelon_roles::models::{Held, export, frozen_policy, frozen_scorer, trainable_policy, trainable_scorer};
use tch::{Device, Kind, Tensor};

/// A model and a batch.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub kind: Kind,
    pub activation_checkpointing: bool,
    pub entropy: bool,
    pub rows: usize,
    pub prompt_tokens: usize,
    pub response_tokens: usize,
    pub tokens_per_micro_batch: usize,
    pub max_sequences: usize,
    pub weight_layout: WeightLayout,
}

/// A folder with random models of a causal language model's `config`: `policy`, and `scorer` with a score head.
pub fn random_models(folder: &Path, config: &serde_json::Value) {
    for (name, architecture) in [("policy", "LlamaForCausalLM"), ("scorer", "LlamaForSequenceClassification")] {
        let mut config = config.clone();
        config["architectures"] = serde_json::json!([architecture]);
        config["num_labels"] = serde_json::json!(1);
        let like = folder.join(format!("{name}.config"));
        std::fs::create_dir_all(&like).unwrap();
        std::fs::write(like.join("config.json"), config.to_string()).unwrap();
        let held = held(&Setting::plain(Kind::Float));
        let training = (OPTIMIZER, &Sharding::whole());
        let (state, head) = if name == "policy" {
            (trainable_policy(Role::Actor, &like, Some(1), held, training, 1.0).unwrap().state, HeadKind::Logits)
        } else {
            let reads = ScalarRows::LastTokens;
            let model = trainable_scorer(Role::Reward, &like, Some(2), 3, held, training, reads).unwrap();
            (model.state, HeadKind::Score)
        };
        export(&state, head, &like, &folder.join(name), &[]).unwrap();
    }
}

const OPTIMIZER: OptimizerConfig =
    OptimizerConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.0, max_grad_norm: 1.0 };

impl Setting {
    /// 16 rows of 48 tokens, in micro-batches of a quarter.
    pub fn plain(kind: Kind) -> Setting {
        Setting {
            kind,
            activation_checkpointing: false,
            entropy: false,
            rows: 16,
            prompt_tokens: 16,
            response_tokens: 32,
            tokens_per_micro_batch: 192,
            max_sequences: 64,
            weight_layout: WeightLayout::Plain,
        }
    }
}

fn held(setting: &Setting) -> Held {
    let pass = PassConfig {
        device: Device::Cpu,
        tokens_per_micro_batch: setting.tokens_per_micro_batch as i64,
        activation_checkpointing: setting.activation_checkpointing,
    };
    Held { kind: setting.kind, pass, weight_layout: setting.weight_layout, deterministic: true }
}

fn experience(setting: &Setting, vocab: i64) -> Rows {
    let length = setting.prompt_tokens + setting.response_tokens;
    let row = |row: usize| {
        // Lengths differ a little, as responses do.
        let length = length - row % 3;
        let ids = (0..length).map(|t| ((t * 31 + row * 7) as i64) % vocab).collect();
        (ids, (0..length).map(|t| t >= setting.prompt_tokens).collect())
    };
    let tokens = Rows::of_tokens(&(0..setting.rows).map(row).collect::<Vec<_>>());
    let kind = if setting.kind == Kind::Double { Kind::Double } else { Kind::Float };
    let numbers = |value: f64| Tensor::full(tokens.token_ids.size(), value, (kind, Device::Cpu));
    let [old_logprobs, values, advantages, returns] = [-6.0, 0.1, 0.5, 0.3].map(numbers);
    tokens
        .with(OLD_LOGPROBS, old_logprobs)
        .and_then(|rows| rows.with(VALUES, values))
        .and_then(|rows| rows.with(ADVANTAGES, advantages))
        .and_then(|rows| rows.with(RETURNS, returns))
        .unwrap()
}

/// The actor's and the critic's passes on one rank of `sharding`; `random` weights, or those of the folders.
pub fn meter_learners(
    setting: &Setting,
    (policy, scorer): (&Path, &Path),
    random: Option<u64>,
    sharding: &Sharding,
) -> Vec<MemoryUse> {
    let held = held(setting);
    let mut meter = Meter::new(Device::Cpu);
    let vocab = DecoderConfig::read(policy).unwrap().vocab_size;
    let rows = experience(setting, vocab);
    let totals = Totals::of(&rows, 1);
    let load = Load::Pass(PassLoad::of(&rows, 1, held.pass.tokens_per_micro_batch, false));
    let training = (OPTIMIZER, sharding);

    let mut actor = trainable_policy(Role::Actor, policy, random, held, training, 1.0).unwrap();
    let loss = PolicyLoss {
        clip: PolicyClip { low: 0.2, high: 0.2, dual: None },
        entropy_coef: if setting.entropy { 0.01 } else { 0.0 },
        kl_estimator: KlEstimator::K1,
    };
    let metering = meter.begin(Role::Actor, Logprobs::NAME);
    actor.forward_rows(&rows, &Interrupt::default(), |_, _| ()).unwrap();
    meter.end(metering, actor.state.bytes_by_part(), load);
    let metering = meter.begin(Role::Actor, Learn::NAME);
    actor.learn(&loss, &rows, (&totals, &Numbers::of(&[("kl_coef", 0.0)])), 1e-6).unwrap();
    meter.end(metering, actor.state.bytes_by_part(), load);

    let reads = ScalarRows::Predecessors;
    let mut critic = trainable_scorer(Role::Critic, scorer, random, 1, held, training, reads).unwrap();
    let loss = ValueLoss { value_clip: Some(0.2) };
    let metering = meter.begin(Role::Critic, Values::NAME);
    critic.forward_rows(&rows, &Interrupt::default(), |_, _| ()).unwrap();
    meter.end(metering, critic.state.bytes_by_part(), load);
    let metering = meter.begin(Role::Critic, Learn::NAME);
    critic.learn(&loss, &rows, (&totals, &Numbers::default()), 1e-6).unwrap();
    meter.end(metering, critic.state.bytes_by_part(), load);

    if sharding.group.size() == 1 {
        meter_generation(setting, &actor, vocab, &mut meter);
    }
    meter.report().uses
}

/// The engine on the actor's own weights.
fn meter_generation(setting: &Setting, actor: &echelon_roles::models::Policy, vocab: i64, meter: &mut Meter) {
    let prompt = |id: usize| Prompt {
        id: id as u64,
        token_ids: (0..setting.prompt_tokens).map(|t| ((t * 31 + id * 7) as i64) % vocab).collect(),
        text: String::new(),
        label: None,
    };
    let prompts =
        Prompts { rows: (0..setting.rows).map(prompt).collect(), samples_per_prompt: 1, seed: 1, evaluation: false };
    let sampling = SamplingConfig {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        max_new_tokens: setting.response_tokens,
        stop: Vec::new(),
        ignore_eos: true,
    };
    let engine = Engine::new(EngineConfig {
        max_sequences: setting.max_sequences,
        weight_layout: setting.weight_layout,
        ..EngineConfig::default()
    });
    let metering = meter.begin(Role::Generator, Generate::NAME);
    let model = Policy { model: &actor.model, head: actor.head.weight(), tokenizer: None };
    let (made, _) = engine.generate(model, &prompts, &sampling, &Unwatched, &Interrupt::default()).unwrap();
    let load = engine.load(&actor.model, &prompts, &sampling, &made);
    meter.end(metering, StateBytes::default(), Load::Decode(load));
}

/// The reference's and the reward model's passes, on mapped files or, in another dtype, on copies.
pub fn meter_frozen(setting: &Setting, (policy, scorer): (&Path, &Path)) -> Vec<MemoryUse> {
    let held = held(setting);
    let mut meter = Meter::new(Device::Cpu);
    let rows = experience(setting, DecoderConfig::read(policy).unwrap().vocab_size);
    let load = Load::Pass(PassLoad::of(&rows, 1, held.pass.tokens_per_micro_batch, false));
    let bytes = || (shim::live_bytes(Device::Cpu) + shim::mapped_bytes()) as u64;

    let before = bytes();
    let reference = frozen_policy(policy, held, 1.0, (&Sharding::whole(), None)).unwrap();
    let resident = StateBytes { weights: bytes() - before, ..StateBytes::default() };
    let metering = meter.begin(Role::Reference, Logprobs::NAME);
    let model = (&reference.model, &reference.head);
    forward_rows(model, &held.pass, &rows, &Interrupt::default(), |_, _| ()).unwrap();
    meter.end(metering, resident, load);

    let before = bytes();
    let reward = frozen_scorer(scorer, held, (&Sharding::whole(), None)).unwrap();
    let resident = StateBytes { weights: bytes() - before, ..StateBytes::default() };
    let metering = meter.begin(Role::Reward, Scores::NAME);
    let model = (&reward.model, &reward.head);
    forward_rows(model, &held.pass, &rows, &Interrupt::default(), |_, _| ()).unwrap();
    meter.end(metering, resident, load);
    meter.report().uses
}

/// The ledger beside what was metered on one of `ranks` ranks at a ZeRO stage.
pub fn compare(
    setting: &Setting,
    (policy, scorer): (&Path, &Path),
    (ranks, stage): (usize, ZeroStage),
    uses: &[MemoryUse],
) -> Vec<Comparison> {
    let workload = workload(setting, (policy, scorer));
    let comparison = |measured: &MemoryUse| {
        let trained = matches!(measured.role, Role::Actor | Role::Critic);
        let model = ModelSizes::of(&workload.model(measured.role).unwrap().shape);
        let job = RoleJob {
            role: measured.role,
            model: &model,
            workload: &workload,
            ranks,
            zero_stage: if trained { stage as u8 } else { 0 },
            adam_offload: false,
            tensor_parallel: 1,
            slots: setting.rows.min(setting.max_sequences),
            shares_weights: true,
            moves_to_host: false,
            on_cpu: true,
        };
        Comparison::new(&job, measured)
    };
    uses.iter().map(comparison).collect()
}

fn workload(setting: &Setting, (policy, scorer): (&Path, &Path)) -> Workload {
    let shape = |folder: &Path, head| DecoderConfig { head, ..DecoderConfig::read(folder).unwrap() }.shape();
    let (logprobs, scalars) = (shape(policy, HeadKind::Logits), shape(scorer, HeadKind::Score));
    let model = |role, training| {
        let (shape, gives) = match role {
            Role::Actor | Role::Reference => (logprobs.clone(), Gives::Logprobs),
            _ => (scalars.clone(), Gives::Scalars),
        };
        RoleModel { role, shape, gives, training, offload: false }
    };
    let models = vec![
        model(Role::Actor, Some(Training { entropy_in_loss: setting.entropy })),
        model(Role::Critic, Some(Training::default())),
        model(Role::Reference, None),
        model(Role::Reward, None),
    ];
    Workload {
        passes: passes_with_sampling(&models, setting.rows, setting.rows, 1),
        models,
        sampling: Some(Sampling {
            published: Role::Actor,
            prompts: setting.rows,
            samples_per_prompt: 1,
            max_sequences: setting.max_sequences,
            max_batched_tokens: 8192,
            kv_cache_bytes: None,
        }),
        rows: setting.rows,
        rows_per_unit: 1,
        max_prompt_tokens: setting.prompt_tokens,
        max_response_tokens: setting.response_tokens,
        mean_prompt_tokens: setting.prompt_tokens as f64,
        mean_response_tokens: setting.response_tokens as f64,
        tokens_per_micro_batch: setting.tokens_per_micro_batch,
        dtype: match setting.kind {
            Kind::BFloat16 => ComputeDtype::Bfloat16,
            Kind::Double => ComputeDtype::Float64,
            _ => ComputeDtype::Float32,
        },
        activation_checkpointing: setting.activation_checkpointing,
    }
}
