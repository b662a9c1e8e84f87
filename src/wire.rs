//! Puts a run together: the one place that names models, algorithm and placement at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use echelon_algorithms::losses::PolicyClip;
use echelon_algorithms::ppo::{KlPlacement, PpoConfig};
use echelon_algorithms::reward_shaping::ScoreShaping;
use echelon_algorithms::schedule::{Decay, LrSchedule};
use echelon_algorithms::update::{ActorConfig, CriticConfig};
use echelon_algorithms::{kl, ppo};
use echelon_core::device::{self, DeviceChoice};
use echelon_core::memory::Meter;
use echelon_core::progress::{Interrupt, Progress, Unwatched};
use echelon_core::role::{ActorRank, CriticRank, Endpoint, Role, Roles, WorkerGroup};
use echelon_core::rollout::SamplingConfig;
use echelon_core::verb::{Generate, Logprobs, Scores};
use echelon_core::zero::{OptimizerConfig, PassConfig};
use echelon_generation::{Engine, EngineConfig, check_budget};
use echelon_models::config::{DecoderConfig, HeadKind};
use echelon_models::head::ScalarRows;
use echelon_models::hub::resolve_model;
use echelon_models::tokenizer::Tokenizer;
use echelon_placement::{Worker, start_worker};
use futures_util::future::try_join_all;
use tch::{Device, Kind};

use crate::host::{Deferred, DeviceRoles, LearningActor, LearningCritic, RewardModel};
use crate::models::{
    Held, check_folder, frozen_policy, frozen_scorer, score_statistics, trainable_policy, trainable_scorer,
};
use crate::program::Failure;
use crate::prompts::PromptFormat;
use crate::ranks::{Ranks, Seat};
use crate::recipe::{
    self, Compute, Devices, Dtype, KlEstimator, ModelSource, Optimizer, ResolvedRecipe, Schedule, ScoreSource,
};
use crate::reward::{Source, WeightedSources, distinct_names, task_source};

/// A run's parts, ready to step.
pub struct Wired {
    pub roles: Roles,
    pub ppo: PpoConfig,
    pub workers: Vec<Worker<DeviceRoles>>,
    pub worker_tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// Folders of the models that a run needs, fetched where the recipe names a hub id.
#[derive(Clone)]
pub struct ModelFolders {
    pub actor: PathBuf,
    pub critic: PathBuf,
    pub reference: Option<PathBuf>,
    pub reward: Option<PathBuf>,
}

/// Finds (or fetches) and checks every model folder; no weight is read yet.
///
/// # Errors
/// A model that is not there or does not fit its role: [`Failure::Input`].
pub fn model_folders(recipe: &ResolvedRecipe) -> Result<ModelFolders, Failure> {
    let mut models = recipe.reward.sources.iter().filter_map(|source| match &source.source {
        ScoreSource::Model(start) => Some(&start.model),
        _ => None,
    });
    let reward = models.next();
    if let (Some(first), Some(second)) = (reward, models.next()) {
        let message = format!("[[reward.mix]]: one source may be a `model`, found {first} and {second}");
        return Err(Failure::Input(format!("{message}; serve the other as a `command` or `url`")));
    }
    let folders = ModelFolders {
        actor: model_folder(&recipe.actor.model)?,
        critic: critic_folder(recipe, reward)?,
        reference: recipe.reference.as_ref().map(|start| model_folder(&start.model)).transpose()?,
        reward: reward.map(model_folder).transpose()?,
    };
    for (role, folder, head) in [
        (Role::Actor, Some(&folders.actor), Some(HeadKind::Logits)),
        (Role::Critic, Some(&folders.critic), None),
        (Role::Reference, folders.reference.as_ref(), Some(HeadKind::Logits)),
        (Role::Reward, folders.reward.as_ref(), Some(HeadKind::Score)),
    ] {
        if let Some(folder) = folder {
            check_folder(folder, head).map_err(|error| Failure::Input(format!("[{role}] {error}")))?;
        }
    }
    Ok(folders)
}

/// The critic reads the actor's tokens: where it would start from a reward model with another tokenizer only because
/// the recipe names no critic, it starts from the actor.
fn critic_folder(recipe: &ResolvedRecipe, reward: Option<&ModelSource>) -> Result<PathBuf, Failure> {
    let critic = model_folder(&recipe.critic.model)?;
    if reward != Some(&recipe.critic.model) {
        return Ok(critic);
    }
    let actor = model_folder(&recipe.actor.model)?;
    Ok(if fingerprint(&critic)? == fingerprint(&actor)? { critic } else { actor })
}

pub fn model_folder(source: &ModelSource) -> Result<PathBuf, Failure> {
    match source {
        ModelSource::Folder(folder) => Ok(folder.clone()),
        ModelSource::Hub(id) => resolve_model(id, Path::new("")).map_err(Failure::input),
    }
}

/// The device and dtype that a recipe asks for, and a warning where the device is not what the hardware suggests.
pub fn held(compute: &Compute, devices: &Devices) -> Result<(Held, Option<String>), Failure> {
    let choice = match devices.device {
        recipe::Device::Auto => DeviceChoice::Auto,
        recipe::Device::Cpu => DeviceChoice::Cpu,
        recipe::Device::Cuda => DeviceChoice::Cuda,
    };
    let chosen = device::choose(choice).map_err(Failure::input)?;
    let workers = devices.workers.fixed().unwrap_or(1);
    if devices.nodes > 1 || (workers > 1 && chosen.device != Device::Cpu) {
        return Err(Failure::Input(format!(
            "placement: {} nodes with {workers} workers are asked for; runs use one GPU, or several workers on one machine's \
             CPU, so far: --plan resolves larger recipes",
            devices.nodes
        )));
    }
    let kind = match compute.dtype {
        Dtype::Float32 => Kind::Float,
        Dtype::Bfloat16 => Kind::BFloat16,
        Dtype::Float64 => Kind::Double,
        Dtype::Auto if chosen.device == Device::Cpu => Kind::Float,
        Dtype::Auto => Kind::BFloat16,
    };
    let pass = PassConfig {
        device: chosen.device,
        tokens_per_micro_batch: compute.tokens_per_micro_batch as i64,
        activation_checkpointing: compute.activation_checkpointing,
    };
    Ok((Held { kind, pass }, chosen.warning))
}

/// Refuses what the models and the device cannot do, before anything starts.
///
/// # Errors
/// [`Failure::Input`]: sequences beyond a model's context, an engine over more devices than there are, or a key-value cache
/// that does not hold one sequence.
pub fn check_limits(recipe: &ResolvedRecipe, folders: &ModelFolders, held: Held) -> Result<(), Failure> {
    let tensor_parallel_size = recipe.generation.tensor_parallel_size;
    if tensor_parallel_size > 1 {
        return Err(Failure::Input(format!(
            "generation.tensor_parallel_size = {tensor_parallel_size}, but this run has one device: delete the key; --plan \
             resolves recipes for more devices"
        )));
    }
    let (prompt, response) = (recipe.data.max_prompt_tokens, recipe.rollout.max_new_tokens);
    let keys = format!("data.max_prompt_tokens = {prompt} plus rollout.max_new_tokens = {response}");
    let own = [Some(&folders.actor), Some(&folders.critic), folders.reference.as_ref()];
    for folder in own.into_iter().flatten() {
        check_context(folder, prompt + response, &keys)?;
    }
    // A reward model with a tokenizer of its own counts other tokens.
    if let Some(folder) = &folders.reward
        && let Err(error) = check_context(folder, prompt + response, &keys)
        && fingerprint(folder)? == fingerprint(&folders.actor)?
    {
        return Err(error);
    }
    check_budget(&engine_config(recipe), (&shape(&folders.actor)?, held.kind), prompt, response)
        .map_err(|error| Failure::Input(format!("generation.{error}")))
}

/// Refuses sequences of up to `tokens`, which come of `keys`, where the model in `folder` was made for shorter ones.
///
/// # Errors
/// [`Failure::Input`], with both numbers.
pub fn check_context(folder: &Path, tokens: usize, keys: &str) -> Result<(), Failure> {
    let most = shape(folder)?.max_positions;
    if tokens as i64 <= most {
        return Ok(());
    }
    Err(Failure::Input(format!(
        "{}: max_position_embeddings is {most}, but {keys} gives sequences of up to {tokens} tokens: lower the limit",
        folder.join("config.json").display()
    )))
}

fn engine_config(recipe: &ResolvedRecipe) -> EngineConfig {
    EngineConfig {
        max_sequences: recipe.generation.max_sequences,
        max_batched_tokens: recipe.generation.max_batched_tokens,
        kv_cache_bytes: recipe.generation.kv_cache_bytes.fixed(),
    }
}

fn fingerprint(folder: &Path) -> Result<String, Failure> {
    Tokenizer::load(folder).map(|tokenizer| tokenizer.fingerprint()).map_err(Failure::input)
}

/// How rows of data become prompts of this run.
pub fn prompt_format(recipe: &ResolvedRecipe, tokenizer: Arc<Tokenizer>) -> PromptFormat {
    PromptFormat {
        tokenizer,
        apply_chat_template: recipe.data.apply_chat_template,
        system_prompt: recipe.data.system_prompt.clone(),
        max_prompt_tokens: recipe.data.max_prompt_tokens,
    }
}

/// What a rank's roles are built from; crosses to its device thread.
#[derive(Clone)]
struct HostPlan {
    folders: ModelFolders,
    held: Held,
    seed: u64,
    temperature: f64,
    actor: ActorConfig,
    critic: CriticConfig,
    actor_optimizer: OptimizerConfig,
    critic_optimizer: OptimizerConfig,
    engine: EngineConfig,
}

/// Starts the worker that holds every role of a one-device run, and the handles to them.
///
/// # Errors
/// A model that cannot be loaded, a reward source that cannot be started.
pub async fn wire(
    recipe: &ResolvedRecipe,
    folders: ModelFolders,
    held: Held,
    tokenizer: Arc<Tokenizer>,
    (interrupt, progress): (Interrupt, Arc<dyn Progress>),
    run_folder: PathBuf,
) -> Result<Wired, Failure> {
    let statistics = match folders.reward.as_deref().filter(|_| recipe.reward.normalize) {
        Some(folder) => Some(score_statistics(folder).map_err(Failure::input)?),
        None => None,
    };
    // A lone model's scores are reported as they are and normalised for learning; in a sum they must be normalised first.
    let is_lone = matches!(&recipe.reward.sources[..], [only] if only.weight == 1.0);
    let (alone, in_sum) = if is_lone { (statistics, None) } else { (None, statistics) };
    let ppo = ppo_config(recipe, alone);
    let tasks =
        recipe.reward.sources.iter().map(|source| task_source(&source.source)).collect::<Result<Vec<_>, _>>()?;
    let names: Vec<String> =
        tasks.iter().map(|task| task.as_ref().map_or("model".to_owned(), |(name, _)| name.clone())).collect();
    let has_reference = folders.reference.is_some();
    let plan = HostPlan {
        held,
        seed: recipe.seed,
        temperature: recipe.rollout.temperature,
        actor: actor_config(recipe),
        critic: critic_config(recipe),
        actor_optimizer: optimizer(&recipe.actor.optimizer, &recipe.train.compute),
        critic_optimizer: optimizer(&recipe.critic_optimizer, &recipe.train.compute),
        engine: engine_config(recipe),
        folders,
    };
    let ranks = Ranks::plan(&recipe.train.compute, &recipe.placement.devices)?;
    let starts = ranks.seats().into_iter().map(|seat| {
        let (plan, tokenizer, run_folder) = (plan.clone(), tokenizer.clone(), run_folder.clone());
        // Ranks stop together, between their calls: one that stopped alone would leave the others waiting.
        let interrupt = if seat.is_alone() { interrupt.clone() } else { Interrupt::default() };
        let progress = if seat.rank == 0 { progress.clone() } else { Arc::new(Unwatched) };
        let build = move || build_host(plan, seat, tokenizer, interrupt, progress, run_folder);
        async move { start_worker(&format!("device {}", seat.rank), build).await }
    });
    let started = try_join_all(starts).await.map_err(Failure::input)?;
    let (workers, worker_tasks): (Vec<Worker<DeviceRoles>>, Vec<_>) = started.into_iter().unzip();
    let sources = tasks.into_iter().map(|task| match task {
        Some((_, task)) => Source::Task(task),
        None => {
            let group = group::<dyn Endpoint<Scores>>(Role::Reward, &workers, |worker| Arc::new(worker));
            Source::Model { group, normalization: in_sum }
        }
    });
    let weights = recipe.reward.sources.iter().map(|source| source.weight);
    let sources = distinct_names(&names).into_iter().zip(weights).zip(sources);
    let sources = sources.map(|((name, weight), source)| (name, weight, source)).collect();
    let reference =
        has_reference.then(|| group::<dyn Endpoint<Logprobs>>(Role::Reference, &workers, |worker| Arc::new(worker)));
    let actor = group::<dyn ActorRank>(Role::Actor, &workers, |worker| Arc::new(worker));
    let critic = group::<dyn CriticRank>(Role::Critic, &workers, |worker| Arc::new(worker));
    let generator = group::<dyn Endpoint<Generate>>(Role::Generator, &workers, |worker| Arc::new(worker));
    let reward = Box::new(WeightedSources { sources, interrupt: interrupt.clone() });
    Ok(Wired { roles: Roles { actor, critic, reference, reward, generator }, ppo, workers, worker_tasks })
}

/// A role on all of `workers`, one rank each.
fn group<E: ?Sized>(
    role: Role,
    workers: &[Worker<DeviceRoles>],
    rank: impl Fn(Worker<DeviceRoles>) -> Arc<E>,
) -> WorkerGroup<E> {
    WorkerGroup::new(role, workers.iter().cloned().map(rank).collect())
}

/// Runs on the device thread. Only the actor is loaded now: the first rollout needs no other role.
fn build_host(
    plan: HostPlan,
    seat: Seat,
    tokenizer: Arc<Tokenizer>,
    interrupt: Interrupt,
    progress: Arc<dyn Progress>,
    run_folder: PathBuf,
) -> echelon_core::Result<DeviceRoles> {
    let HostPlan { folders, held, seed, temperature, .. } = plan;
    let sharding = seat.take()?;
    let training = (plan.actor_optimizer, &sharding);
    let policy = trainable_policy(Role::Actor, &folders.actor, None, held, training, temperature)?;
    let critic = Deferred::new(move || {
        let reads = ScalarRows::Predecessors;
        let training = (plan.critic_optimizer, &sharding);
        let model = trainable_scorer(Role::Critic, &folders.critic, None, seed, held, training, reads)?;
        Ok(LearningCritic { model, config: plan.critic, folder: folders.critic })
    });
    let reference = folders.reference.map(|folder| Deferred::new(move || frozen_policy(&folder, held, temperature)));
    let actor_tokenizer = tokenizer.clone();
    let reward = folders.reward.map(|folder| {
        Deferred::new(move || {
            let own = Tokenizer::load(&folder).map_err(|error| echelon_core::Error::other("reward model", error))?;
            let same = own.fingerprint() == actor_tokenizer.fingerprint();
            Ok(RewardModel { model: frozen_scorer(&folder, held)?, tokenizer: (!same).then_some(own) })
        })
    });
    Ok(DeviceRoles {
        actor: Some(LearningActor { policy, config: plan.actor, folder: folders.actor }),
        critic: Some(critic),
        reference,
        reward,
        engine: Engine::new(plan.engine),
        tokenizer,
        held,
        seat,
        policy_version: 0,
        interrupt,
        progress,
        run_folder,
        meter: Meter::new(held.pass.device),
    })
}

fn ppo_config(recipe: &ResolvedRecipe, normalization: Option<(f64, f64)>) -> PpoConfig {
    PpoConfig {
        sampling: sampling(recipe, recipe.rollout.temperature),
        epochs: recipe.ppo.epochs,
        mini_batch_size: recipe.ppo.mini_batch_size,
        gamma: recipe.ppo.gamma,
        gae_lambda: recipe.ppo.gae_lambda,
        kl_estimator: kl_estimator(recipe.ppo.kl_estimator),
        kl_placement: match recipe.ppo.kl_placement {
            recipe::KlPlacement::Reward => KlPlacement::Reward,
            recipe::KlPlacement::Loss => ppo::KlPlacement::Loss,
        },
        score_shaping: ScoreShaping {
            normalization,
            missing_eos_penalty: recipe.reward.missing_eos_penalty,
            clip_range: recipe.reward.clip_range.map(|[low, high]| (low, high)),
        },
        critic_warmup_steps: recipe.ppo.critic_warmup_steps as u64,
        seed: recipe.seed,
    }
}

/// Sampling of the rollout, or of an evaluation at another temperature.
pub fn sampling(recipe: &ResolvedRecipe, temperature: f64) -> SamplingConfig {
    SamplingConfig {
        temperature,
        top_k: recipe.rollout.top_k.map_or(0, |top_k| top_k as i64),
        top_p: recipe.rollout.top_p,
        min_p: recipe.rollout.min_p,
        max_new_tokens: recipe.rollout.max_new_tokens,
        stop: recipe.rollout.stop.clone(),
        ignore_eos: false,
    }
}

fn kl_estimator(estimator: KlEstimator) -> kl::KlEstimator {
    match estimator {
        KlEstimator::K1 => kl::KlEstimator::K1,
        KlEstimator::K2 => kl::KlEstimator::K2,
        KlEstimator::K3 => kl::KlEstimator::K3,
    }
}

fn actor_config(recipe: &ResolvedRecipe) -> ActorConfig {
    ActorConfig {
        clip: PolicyClip {
            low: recipe.ppo.policy_clip,
            high: recipe.ppo.policy_clip_high.unwrap_or(recipe.ppo.policy_clip),
            dual: recipe.ppo.dual_clip,
        },
        entropy_coef: recipe.ppo.entropy_coef,
        kl_estimator: kl_estimator(recipe.ppo.kl_estimator),
        lr: recipe.actor.optimizer.lr,
        schedule: schedule(&recipe.actor.optimizer, recipe.batch.actor_optimizer_steps),
    }
}

fn critic_config(recipe: &ResolvedRecipe) -> CriticConfig {
    CriticConfig {
        value_clip: recipe.ppo.value_clip,
        lr: recipe.critic_optimizer.lr,
        schedule: schedule(&recipe.critic_optimizer, recipe.batch.critic_optimizer_steps),
    }
}

/// The learning rate's course over `total` optimizer steps.
pub fn schedule(optimizer: &Optimizer, total: usize) -> LrSchedule {
    let decay = match optimizer.schedule {
        Schedule::Constant => Decay::Constant,
        Schedule::Linear => Decay::Linear,
        Schedule::Cosine => Decay::CosineWithMinLr,
    };
    LrSchedule::new(decay, total, optimizer.warmup_ratio, optimizer.min_lr_ratio)
}

/// AdamW's settings.
pub fn optimizer(optimizer: &Optimizer, compute: &Compute) -> OptimizerConfig {
    OptimizerConfig {
        betas: (optimizer.betas[0], optimizer.betas[1]),
        eps: optimizer.eps,
        weight_decay: optimizer.weight_decay,
        max_grad_norm: compute.max_grad_norm.unwrap_or(0.0),
    }
}

/// The shape of a folder's model, for arithmetic.
pub fn shape(folder: &Path) -> Result<DecoderConfig, Failure> {
    DecoderConfig::read(folder).map_err(Failure::input)
}
