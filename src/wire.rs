//! Puts a run together: the one place that names models, algorithm and placement at once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use echelon_algorithms::kl::{self, KlController};
use echelon_algorithms::losses::PolicyClip;
use echelon_algorithms::ppo::{KlPlacement, PolicyLoss, Ppo, ValueLoss};
use echelon_algorithms::reward_shaping::ScoreShaping;
use echelon_algorithms::schedule::{Decay, LrSchedule};
use echelon_core::device::{self, DeviceChoice};
use echelon_core::progress::{Interrupt, Progress};
use echelon_core::role::Role;
use echelon_core::rollout::SamplingConfig;
use echelon_core::verb::{Calls, Reward, Roles, WorkerGroup};
use echelon_core::weight_layout::WeightLayout;
use echelon_core::zero::{OptimizerConfig, PassConfig};
use echelon_generation::{EngineConfig, check_budget};
use echelon_models::config::{DecoderConfig, HeadKind};
use echelon_models::hub::resolve_model;
use echelon_models::tokenizer::Tokenizer;
use echelon_placement::launch::Place;
use echelon_placement::planner::Plan;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::assignment::Assignment;
use crate::crew::{Crew, Joining, check_credentials};
use crate::layout::Layout;
use crate::models::{Held, check_folder, score_statistics};
use crate::node;
use crate::plan;
use crate::program::{Failure, absolute};
use crate::prompts::PromptFormat;
use crate::recipe::{
    self, Compute, Devices, Dtype, KlEstimator, ModelSource, Optimizer, ResolvedRecipe, Schedule, ScoreSource,
};
use crate::reward::{NamedTask, Source, WeightedSources, distinct_names, task_source};
use crate::run::memory::shapes;
use crate::run_spec::RunSpec;

/// Folders of the models that a run needs, fetched where the recipe names a hub id.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelFolders {
    pub actor: PathBuf,
    pub critic: PathBuf,
    pub reference: Option<PathBuf>,
    pub reward: Option<PathBuf>,
}

impl ModelFolders {
    /// Where other processes find them.
    pub fn by_role(&self) -> BTreeMap<Role, PathBuf> {
        let frozen = [(Role::Reference, &self.reference), (Role::Reward, &self.reward)];
        let frozen = frozen.into_iter().filter_map(|(role, folder)| Some((role, absolute(folder.as_ref()?))));
        [(Role::Actor, absolute(&self.actor)), (Role::Critic, absolute(&self.critic))]
            .into_iter()
            .chain(frozen)
            .collect()
    }
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

/// The device and dtype that a recipe asks for, and a warning where the device is not what the hardware suggests. A worker
/// among several of its host has its `place`, which names its device. Weights lie plainly: the driver decides otherwise, and
/// tells its workers.
pub fn held(compute: &Compute, devices: &Devices, place: Option<&Place>) -> Result<(Held, Option<String>), Failure> {
    let choice = match devices.device {
        recipe::Device::Auto => DeviceChoice::Auto,
        recipe::Device::Cpu => DeviceChoice::Cpu,
        recipe::Device::Cuda => DeviceChoice::Cuda,
    };
    let mut chosen = device::choose(choice).map_err(Failure::input)?;
    if let (Device::Cuda(_), Some(place)) = (chosen.device, place) {
        let visible = tch::Cuda::device_count() as u32;
        chosen.device = Device::Cuda(place.device_index(visible).map_err(Failure::input)? as usize);
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
    let deterministic = chosen.device == Device::Cpu || compute.deterministic.fixed().unwrap_or(false);
    Ok((Held { kind, pass, weight_layout: WeightLayout::Plain, deterministic }, chosen.warning))
}

/// Device, dtype and threads, for a run's first lines; of a GPU also whether its results can be had again.
pub fn device_line(held: Held) -> String {
    let line = format!("{}, {:?}, {} threads", device_name(held.pass.device), held.kind, tch::get_num_threads());
    match (held.pass.device, held.deterministic) {
        (Device::Cpu, _) => line,
        (_, true) => format!("{line}, deterministic"),
        (_, false) => format!("{line}, not deterministic"),
    }
}

/// A device as a person knows it: of a GPU its model.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cpu => "Cpu".into(),
        gpu => node::gpus().map_or_else(|| format!("{gpu:?}"), |here| format!("{gpu:?} ({})", here.kinds[0].name)),
    }
}

/// Refuses what the models and the device cannot do, before anything starts.
///
/// # Errors
/// [`Failure::Input`]: sequences beyond a model's context, an engine over more devices than there are, or a key-value cache
/// that does not hold one sequence.
pub fn check_limits(recipe: &ResolvedRecipe, folders: &ModelFolders, held: Held) -> Result<(), Failure> {
    let tensor_parallel_size = recipe.generation.tensor_parallel_size;
    if tensor_parallel_size > 1 && recipe.placement.devices.count().unwrap_or(1) == 1 {
        return Err(Failure::Input(format!(
            "generation.tensor_parallel_size = {tensor_parallel_size}, but this run has one device: delete the key, or set \
             placement.workers"
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
    check_budget(
        &engine_config(recipe, held),
        (&shape(&folders.actor)?, held.kind, tensor_parallel_size),
        prompt,
        response,
    )
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

pub fn engine_config(recipe: &ResolvedRecipe, held: Held) -> EngineConfig {
    EngineConfig {
        max_sequences: recipe.generation.max_sequences,
        max_batched_tokens: recipe.generation.max_batched_tokens,
        kv_cache_bytes: recipe.generation.kv_cache_bytes.fixed(),
        weight_layout: held.weight_layout,
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

/// What scores responses, started but for models.
pub struct Rewards {
    tasks: Vec<Option<NamedTask>>,
    weights: Vec<f64>,
    /// Mean and standard deviation by which a lone model's scores are normalised for learning; they are reported as they are.
    pub alone: Option<(f64, f64)>,
    /// By which those of a model in a sum are: before they are added.
    in_sum: Option<(f64, f64)>,
}

impl Rewards {
    /// # Errors
    /// A source that cannot be started; a model without statistics where they are asked for.
    pub fn start(recipe: &ResolvedRecipe, folders: &ModelFolders) -> Result<Rewards, Failure> {
        let statistics = match folders.reward.as_deref().filter(|_| recipe.reward.normalize) {
            Some(folder) => Some(score_statistics(folder).map_err(Failure::input)?),
            None => None,
        };
        let sources = &recipe.reward.sources;
        let is_lone = matches!(&sources[..], [only] if only.weight == 1.0);
        let (alone, in_sum) = if is_lone { (statistics, None) } else { (None, statistics) };
        Ok(Rewards {
            tasks: sources.iter().map(|source| task_source(&source.source)).collect::<Result<_, _>>()?,
            weights: sources.iter().map(|source| source.weight).collect(),
            alone,
            in_sum,
        })
    }

    fn wired(self, model: impl Fn() -> WorkerGroup, interrupt: Interrupt) -> WeightedSources {
        let names: Vec<String> =
            self.tasks.iter().map(|task| task.as_ref().map_or("model".to_owned(), |(name, _)| name.clone())).collect();
        let sources = self.tasks.into_iter().map(|task| match task {
            Some((_, task)) => Source::Task(task),
            None => Source::Model { group: model(), normalization: self.in_sum },
        });
        let sources = distinct_names(&names).into_iter().zip(self.weights).zip(sources);
        let sources = sources.map(|((name, weight), source)| (name, weight, source)).collect();
        WeightedSources { sources, interrupt }
    }
}

/// Starts a run's workers, and makes the handles of their roles.
///
/// # Errors
/// A model that cannot be loaded, a worker that does not come.
pub async fn connect(
    (spec, tokenizer): (RunSpec, Arc<Tokenizer>),
    devices: &Devices,
    rewards: Option<Rewards>,
    (interrupt, progress): (Interrupt, Arc<dyn Progress>),
    say: Arc<dyn Fn(&str) + Send + Sync>,
) -> Result<(Roles, Crew), Failure> {
    let (layout, with_models) = (spec.layout.clone(), spec.roles());
    let crew = start_crew(spec, tokenizer, devices, (interrupt.clone(), progress), say).await?;
    let calls = Calls::default();
    let group = |role| crew.group(&layout, role, &calls);
    let mut groups: BTreeMap<Role, WorkerGroup> = with_models.iter().map(|&role| (role, group(role))).collect();
    if let Some(generator) = groups.remove(&Role::Generator) {
        let apart = layout.group(Role::Generator).workers != layout.group(Role::Actor).workers;
        groups.insert(Role::Generator, if apart { generator.apart_from_actor() } else { generator });
    }
    let reward = rewards.map(|rewards| Box::new(rewards.wired(|| group(Role::Reward), interrupt)) as Box<dyn Reward>);
    Ok((Roles { groups, reward, calls }, crew))
}

/// Starts a run's workers: a thread of this process, or processes.
///
/// # Errors
/// A model that cannot be loaded, a worker that does not come.
async fn start_crew(
    spec: RunSpec,
    tokenizer: Arc<Tokenizer>,
    devices: &Devices,
    (interrupt, progress): (Interrupt, Arc<dyn Progress>),
    say: Arc<dyn Fn(&str) + Send + Sync>,
) -> Result<Crew, Failure> {
    if spec.layout.num_workers == 1 && devices.listen.is_none() {
        let (plan, _told) = spec.host_plan(None)?;
        return Crew::here(plan, spec.layout, tokenizer, interrupt, progress).await.map_err(Failure::input);
    }
    let assignment = Assignment { spec, worker: 0, on_its_host: 1, meeting_port: None, store: None };
    let patience = Duration::from_secs_f64(devices.join_timeout_s);
    let credentials = devices.credentials.as_ref().map(|file| file.0.clone());
    let joining = Joining { listen: devices.listen, credentials, patience, say };
    Crew::of_processes(assignment, &joining, (interrupt, progress)).await
}

/// Where a run's roles go: on one worker, or as the planner says, with its plan.
///
/// # Errors
/// [`Failure::Input`]: a plan that does not fit, with the numbers; hardware that is not here.
pub fn layout(recipe: &ResolvedRecipe, folders: &ModelFolders, held: Held) -> Result<(Layout, Option<Plan>), Failure> {
    let workers = num_workers(&recipe.placement.devices, held)?;
    if workers == 1 {
        return Ok((Layout::together(1, 0, recipe.train.compute.adam_offload), None));
    }
    let plan = plan::of_run(recipe, shapes(folders)?)?;
    Ok((Layout::of(&plan), Some(plan)))
}

/// How many workers a run has, with what else must be so before any is started.
///
/// # Errors
/// [`Failure::Input`]: hardware that is not here, a place to join or for credentials that cannot be used.
pub fn num_workers(devices: &Devices, held: Held) -> Result<usize, Failure> {
    let on_cpu = held.pass.device == Device::Cpu;
    let workers = if on_cpu { devices.workers.fixed() } else { devices.count() }.unwrap_or(1);
    let gpus = devices.count().filter(|_| devices.workers.fixed().is_none()).unwrap_or(0);
    if on_cpu && gpus > 0 {
        let key = if devices.node_pool.is_empty() { "placement.gpus_per_node" } else { "[[placement.node_pool]]" };
        return Err(Failure::Input(format!(
            "{key}: the recipe is for {gpus} GPUs, and this machine has none that work: --plan resolves it, \
             and placement.workers = N with device = \"cpu\" runs it on N worker processes"
        )));
    }
    let visible = device::num_visible();
    if !on_cpu && devices.listen.is_none() && devices.num_nodes() == 1 && workers > visible {
        let key = if devices.workers.fixed().is_some() { "placement.workers" } else { "placement.gpus_per_node" };
        let list = std::env::var("CUDA_VISIBLE_DEVICES").map(|list| format!(" (CUDA_VISIBLE_DEVICES is `{list}`)"));
        return Err(Failure::Input(format!(
            "{key}: {workers} workers need a GPU each, and CUDA shows {visible}{}: set {key} = {visible}, or show more",
            list.unwrap_or_default()
        )));
    }
    if devices.num_nodes() > 1 && devices.listen.is_none() {
        return Err(Failure::Input(format!(
            "[placement] has {} nodes: workers of other machines are started there: say where they join, such as \
             placement.listen = \"0.0.0.0:7401\"",
            devices.num_nodes()
        )));
    }
    if let Some(file) = &devices.credentials {
        check_credentials(&file.0)?;
    }
    if let Some(address) = devices.listen {
        // Before anything is started: the address is this machine's, and free.
        std::net::TcpListener::bind(address).map_err(|error| {
            Failure::Input(format!(
                "placement.listen: cannot listen at {address}: {error}; give an address of this machine and a free port \
                 (port 0 finds one)"
            ))
        })?;
    }
    Ok(workers)
}

pub fn ppo(recipe: &ResolvedRecipe, normalization: Option<(f64, f64)>) -> Ppo {
    Ppo {
        epochs: recipe.ppo.epochs,
        mini_batch_size: recipe.ppo.mini_batch_size,
        gamma: recipe.ppo.gamma,
        gae_lambda: recipe.ppo.gae_lambda,
        kl_estimator: kl_estimator(recipe.ppo.kl_estimator),
        kl_placement: match recipe.ppo.kl_placement {
            recipe::KlPlacement::Reward => KlPlacement::Reward,
            recipe::KlPlacement::Loss => KlPlacement::Loss,
        },
        kl: match recipe.ppo.kl_target {
            Some(target) => KlController::adaptive(recipe.ppo.kl_coef, target, recipe.ppo.kl_horizon),
            None => KlController::fixed(recipe.ppo.kl_coef),
        },
        score_shaping: ScoreShaping {
            normalization,
            missing_eos_penalty: recipe.reward.missing_eos_penalty,
            clip_range: recipe.reward.clip_range.map(|[low, high]| (low, high)),
        },
        critic_warmup_steps: recipe.ppo.critic_warmup_steps as u64,
        policy_loss: policy_loss(recipe),
        value_loss: value_loss(recipe),
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

pub fn policy_loss(recipe: &ResolvedRecipe) -> PolicyLoss {
    PolicyLoss {
        clip: PolicyClip {
            low: recipe.ppo.policy_clip,
            high: recipe.ppo.policy_clip_high.unwrap_or(recipe.ppo.policy_clip),
            dual: recipe.ppo.dual_clip,
        },
        entropy_coef: recipe.ppo.entropy_coef,
        kl_estimator: kl_estimator(recipe.ppo.kl_estimator),
    }
}

pub fn value_loss(recipe: &ResolvedRecipe) -> ValueLoss {
    ValueLoss { value_clip: recipe.ppo.value_clip }
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
