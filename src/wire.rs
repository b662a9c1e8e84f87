//! Puts a run together: the one place that names models, algorithm and placement at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use echelon_algorithms::losses::PolicyClip;
use echelon_algorithms::ppo::PpoConfig;
use echelon_algorithms::reward_shaping::ScoreShaping;
use echelon_algorithms::schedule::LrSchedule;
use echelon_algorithms::update::{ActorConfig, CriticConfig};
use echelon_core::compute::{Compute, ComputeDtype};
use echelon_core::device;
use echelon_core::progress::{Interrupt, Progress};
use echelon_core::role::{ActorRank, CriticRank, Endpoint, GeneratorRank, Role, Roles};
use echelon_core::rollout::SamplingConfig;
use echelon_core::verb::{Logprobs, Scores};
use echelon_core::weight_layout::WeightLayout;
use echelon_core::zero::PassConfig;
use echelon_generation::{EngineConfig, check_budget};
use echelon_models::config::{DecoderConfig, HeadKind};
use echelon_models::hub::resolve_model;
use echelon_models::tokenizer::Tokenizer;
use echelon_placement::devices::Devices;
use echelon_placement::launch::Place;
use echelon_placement::planner::Plan;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::assignment::{Assignment, HostPlan, Job};
use crate::crew::{Crew, Joining, check_credentials};
use crate::layout::Layout;
use crate::models::{Held, check_folder, score_statistics};
use crate::node;
use crate::plan;
use crate::program::Failure;
use crate::prompts::PromptFormat;
use crate::recipe::{ModelSource, ResolvedRecipe, ScoreSource};
use crate::replay::replaying;
use crate::reward::{Source, WeightedSources, distinct_names, task_source};
use crate::run::memory::shapes;
use crate::worker::absolute;

/// A run's parts, ready to step.
pub struct Wired {
    pub roles: Roles,
    pub ppo: PpoConfig,
    pub crew: Crew,
}

/// Folders of the models that a run needs, fetched where the recipe names a hub id.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelFolders {
    pub actor: PathBuf,
    pub critic: PathBuf,
    pub reference: Option<PathBuf>,
    pub reward: Option<PathBuf>,
}

impl ModelFolders {
    fn absolute(&self) -> ModelFolders {
        ModelFolders {
            actor: absolute(&self.actor),
            critic: absolute(&self.critic),
            reference: self.reference.as_deref().map(absolute),
            reward: self.reward.as_deref().map(absolute),
        }
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
    let mut chosen = device::choose(devices.device).map_err(Failure::input)?;
    if let (Device::Cuda(_), Some(place)) = (chosen.device, place) {
        let visible = tch::Cuda::device_count() as u32;
        chosen.device = Device::Cuda(place.device_index(visible).map_err(Failure::input)? as usize);
    }
    let on_cpu = chosen.device == Device::Cpu;
    let dtype = if on_cpu { ComputeDtype::Float32 } else { ComputeDtype::Bfloat16 };
    let kind = compute.dtype.fixed().unwrap_or(dtype).kind();
    let pass = PassConfig {
        device: chosen.device,
        tokens_per_micro_batch: compute.tokens_per_micro_batch as i64,
        activation_checkpointing: compute.activation_checkpointing,
    };
    let deterministic = on_cpu || compute.deterministic.fixed().unwrap_or(false);
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

/// Starts the run's workers, and makes the handles of their roles.
///
/// # Errors
/// A model that cannot be loaded, a reward source that cannot be started, a worker that does not come.
pub async fn wire(
    recipe: &ResolvedRecipe,
    inputs: RunInputs,
    (interrupt, progress): (Interrupt, Arc<dyn Progress>),
    say: Arc<dyn Fn(&str) + Send + Sync>,
) -> Result<Wired, Failure> {
    let RunInputs { folders, held, tokenizer, layout, run_folder } = inputs;
    let statistics = match folders.reward.as_deref().filter(|_| recipe.reward.normalize) {
        Some(folder) => Some(score_statistics(folder).map_err(Failure::input)?),
        None => None,
    };
    // A lone model's scores are reported as they are and normalised for learning; in a sum they must be normalised first.
    let is_lone = matches!(&recipe.reward.sources[..], [only] if only.weight == 1.0);
    let (alone, in_sum) = if is_lone { (statistics, None) } else { (None, statistics) };
    let tasks =
        recipe.reward.sources.iter().map(|source| task_source(&source.source)).collect::<Result<Vec<_>, _>>()?;
    let names: Vec<String> =
        tasks.iter().map(|task| task.as_ref().map_or("model".to_owned(), |(name, _)| name.clone())).collect();
    let has_reference = folders.reference.is_some();
    let job = Job::Ppo { recipe: recipe.to_toml(), folders: folders.absolute(), weight_layout: held.weight_layout };
    let plan = HostPlan::of(recipe, folders, held, run_folder.clone());
    let work = Work { job, plan, layout: layout.clone(), tokenizer, run_folder };
    let crew = start_crew(work, &recipe.placement.devices, (interrupt.clone(), progress), say).await?;
    let sources = tasks.into_iter().map(|task| match task {
        Some((_, task)) => Source::Task(task),
        None => {
            let group = crew.group::<dyn Endpoint<Scores>>(&layout, Role::Reward, |w| Arc::new(w), |w| Arc::new(w));
            Source::Model { group, normalization: in_sum }
        }
    });
    let weights = recipe.reward.sources.iter().map(|source| source.weight);
    let sources = distinct_names(&names).into_iter().zip(weights).zip(sources);
    let sources = sources.map(|((name, weight), source)| (name, weight, source)).collect();
    let reference = has_reference
        .then(|| crew.group::<dyn Endpoint<Logprobs>>(&layout, Role::Reference, |w| Arc::new(w), |w| Arc::new(w)));
    let actor = crew.group::<dyn ActorRank>(&layout, Role::Actor, |w| Arc::new(w), |w| Arc::new(w));
    let critic = crew.group::<dyn CriticRank>(&layout, Role::Critic, |w| Arc::new(w), |w| Arc::new(w));
    let generator = crew.group::<dyn GeneratorRank>(&layout, Role::Generator, |w| Arc::new(w), |w| Arc::new(w));
    let apart = layout.group(Role::Generator).workers != layout.group(Role::Actor).workers;
    let generator = if apart { generator.apart_from_actor() } else { generator };
    let generator = match &recipe.rollout.replay {
        Some(folder) => replaying(folder, generator, apart),
        None => generator,
    };
    let reward = Box::new(WeightedSources { sources, interrupt: interrupt.clone() });
    let roles = Roles { actor, critic, reference, reward, generator };
    Ok(Wired { roles, ppo: ppo_config(recipe, alone), crew })
}

/// What the workers of a run do, here or in processes of their own.
pub struct Work {
    pub job: Job,
    pub plan: HostPlan,
    pub layout: Layout,
    pub tokenizer: Arc<Tokenizer>,
    pub run_folder: PathBuf,
}

/// Starts a run's workers: a thread of this process, or processes.
///
/// # Errors
/// A model that cannot be loaded, a worker that does not come.
pub async fn start_crew(
    Work { job, plan, layout, tokenizer, run_folder }: Work,
    devices: &Devices,
    (interrupt, progress): (Interrupt, Arc<dyn Progress>),
    say: Arc<dyn Fn(&str) + Send + Sync>,
) -> Result<Crew, Failure> {
    if layout.num_workers == 1 && devices.listen.is_none() {
        return Crew::here(plan, layout, tokenizer, interrupt, progress).await.map_err(Failure::input);
    }
    let run_folder = absolute(&run_folder);
    let assignment = Assignment { job, layout, worker: 0, on_its_host: 1, meeting_port: None, store: None, run_folder };
    let patience = Duration::from_secs_f64(devices.join_timeout_s);
    let credentials = devices.credentials.as_ref().map(|file| file.0.clone());
    let joining = Joining { listen: devices.listen, credentials, patience, say };
    Crew::of_processes(assignment, &joining, (interrupt, progress)).await
}

/// What a run reads and decides before its workers start.
pub struct RunInputs {
    pub folders: ModelFolders,
    pub held: Held,
    pub tokenizer: Arc<Tokenizer>,
    pub layout: Layout,
    pub run_folder: PathBuf,
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

fn ppo_config(recipe: &ResolvedRecipe, normalization: Option<(f64, f64)>) -> PpoConfig {
    PpoConfig {
        sampling: sampling(recipe, recipe.rollout.temperature),
        epochs: recipe.ppo.epochs,
        mini_batch_size: recipe.ppo.mini_batch_size,
        gamma: recipe.ppo.gamma,
        gae_lambda: recipe.ppo.gae_lambda,
        kl_estimator: recipe.ppo.kl_estimator,
        kl_placement: recipe.ppo.kl_placement,
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

pub fn actor_config(recipe: &ResolvedRecipe) -> ActorConfig {
    ActorConfig {
        clip: PolicyClip {
            low: recipe.ppo.policy_clip,
            high: recipe.ppo.policy_clip_high.unwrap_or(recipe.ppo.policy_clip),
            dual: recipe.ppo.dual_clip,
        },
        entropy_coef: recipe.ppo.entropy_coef,
        kl_estimator: recipe.ppo.kl_estimator,
        lr: recipe.actor.optimizer.lr,
        schedule: LrSchedule::of(&recipe.actor.optimizer, recipe.batch.actor_optimizer_steps),
    }
}

pub fn critic_config(recipe: &ResolvedRecipe) -> CriticConfig {
    CriticConfig {
        value_clip: recipe.ppo.value_clip,
        lr: recipe.critic_optimizer.lr,
        schedule: LrSchedule::of(&recipe.critic_optimizer, recipe.batch.critic_optimizer_steps),
    }
}

/// The shape of a folder's model, for arithmetic.
pub fn shape(folder: &Path) -> Result<DecoderConfig, Failure> {
    DecoderConfig::read(folder).map_err(Failure::input)
}
