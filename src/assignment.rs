//! What a worker is told, and the roles that it builds from it on its device thread.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use echelon_algorithms::update::{ActorConfig, CriticConfig};
use echelon_core::Error;
use echelon_core::determinism;
use echelon_core::message::{Body, Message};
use echelon_core::process_group::nccl_version;
use echelon_core::progress::{Interrupt, Progress};
use echelon_core::role::Role;
use echelon_core::shim;
use echelon_core::store::{Store, StoreAddress};
use echelon_core::weight_layout::WeightLayout;
use echelon_core::zero::OptimizerConfig;
use echelon_generation::{Engine, EngineConfig};
use echelon_models::config::DecoderConfig;
use echelon_models::head::ScalarRows;
use echelon_models::tokenizer::Tokenizer;
use echelon_placement::launch::Place;
use serde::{Deserialize, Serialize};

use crate::generator::{Generator, sender};
use crate::host::{Deferred, DeviceRoles, LearningActor, LearningCritic, RewardModel};
use crate::layout::{Layout, RoleGroup};
use crate::learner::LearnerPlan;
use crate::machine;
use crate::matmul_rate::matmul_rate;
use crate::models::{Held, frozen_policy, frozen_scorer, trainable_policy, trainable_scorer};
use crate::program::Failure;
use crate::recipe::{Recipe, ResolvedRecipe, RewardRecipe, SftRecipe};
use crate::seat::Seat;
use crate::wire::{self, ModelFolders, actor_config, critic_config, engine_config};

/// What a worker in another process is told: it reads the run's own recipe.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Assignment {
    pub job: Job,
    pub layout: Layout,
    pub worker: usize,
    /// Workers of its host, which share the CPUs there.
    pub on_its_host: u32,
    /// Where the workers meet: on the driver's host, at this port. None where there is one.
    pub meeting_port: Option<u16>,
    /// The object store of the driver's host, for those who are on it.
    pub store: Option<StoreAddress>,
    pub run_folder: PathBuf,
}

/// What roles are built from: the resolved recipe of a program, as TOML, and the folders of its models.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Job {
    Ppo { recipe: String, folders: ModelFolders, weight_layout: WeightLayout },
    Sft { recipe: String, folder: PathBuf },
    Reward { recipe: String, folder: PathBuf },
}

impl Job {
    /// The folder whose tokenizer the run uses.
    pub fn tokenizer_folder(&self) -> &Path {
        match self {
            Job::Ppo { folders, .. } => &folders.actor,
            Job::Sft { folder, .. } | Job::Reward { folder, .. } => folder,
        }
    }

    /// What a worker at `place` builds, and a warning about its device.
    ///
    /// # Errors
    /// A recipe that this worker reads otherwise than the driver; a device that is not here.
    pub fn plan(self, place: &Place, run_folder: PathBuf) -> Result<(HostPlan, Option<String>), Failure> {
        Ok(match self {
            Job::Ppo { recipe, folders, weight_layout } => {
                let recipe = Recipe::read_text(&recipe)?.resolve();
                let (held, warning) = wire::held(&recipe.train.compute, &recipe.placement.devices, Some(place))?;
                let held = Held { weight_layout: machine::usable(weight_layout, held), ..held };
                (HostPlan::of(&recipe, folders, held, run_folder), warning)
            }
            Job::Sft { recipe, folder } => {
                let recipe = SftRecipe::read_text(&recipe)?;
                let (held, warning) = wire::held(&recipe.train.compute, &recipe.placement, Some(place))?;
                (HostPlan::Learner(LearnerPlan::of_sft(&recipe, &folder, held), run_folder), warning)
            }
            Job::Reward { recipe, folder } => {
                let recipe = RewardRecipe::read_text(&recipe)?;
                let (held, warning) = wire::held(&recipe.train.compute, &recipe.placement, Some(place))?;
                (HostPlan::Learner(LearnerPlan::of_reward(&recipe, &folder, held), run_folder), warning)
            }
        })
    }
}

impl Message for Assignment {
    const KIND: &'static str = "build";
    fn to_body(&self) -> Body {
        Body::of(self)
    }
    fn from_body(body: &mut Body) -> echelon_core::Result<Assignment> {
        body.fields()
    }
}

/// What a worker says when its roles are built.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Built {
    /// It reaches the store of the driver's host: batches may lie there.
    pub shares_memory: bool,
    /// What its node has, for tasks.
    pub num_cpus: usize,
    pub num_gpus: usize,
    /// Its roles compute on one of these GPUs.
    pub holds_gpu: bool,
}

impl Message for Built {
    const KIND: &'static str = "built";
    fn to_body(&self) -> Body {
        Body::of(self)
    }
    fn from_body(body: &mut Body) -> echelon_core::Result<Built> {
        body.fields()
    }
}

/// What a rank's roles are built from; crosses to its device thread.
#[derive(Clone)]
pub enum HostPlan {
    /// Roles of PPO.
    Ppo(Box<PpoPlan>),
    /// A model that learns from examples, and the folder of its run.
    Learner(LearnerPlan, PathBuf),
}

#[derive(Clone)]
pub struct PpoPlan {
    folders: ModelFolders,
    held: Held,
    seed: u64,
    temperature: f64,
    actor: ActorConfig,
    critic: CriticConfig,
    actor_optimizer: OptimizerConfig,
    critic_optimizer: OptimizerConfig,
    engine: EngineConfig,
    run_folder: PathBuf,
    /// The object store of this host, where there is one.
    store: Option<Store>,
}

impl HostPlan {
    pub fn of(recipe: &ResolvedRecipe, folders: ModelFolders, held: Held, run_folder: PathBuf) -> HostPlan {
        HostPlan::Ppo(Box::new(PpoPlan {
            held,
            seed: recipe.seed,
            temperature: recipe.rollout.temperature,
            actor: actor_config(recipe),
            critic: critic_config(recipe),
            actor_optimizer: recipe.actor.optimizer.config(&recipe.train.compute),
            critic_optimizer: recipe.critic_optimizer.config(&recipe.train.compute),
            engine: engine_config(recipe, held),
            folders,
            run_folder,
            store: None,
        }))
    }

    /// With the object store of this host: what several ranks convert is converted once.
    #[must_use]
    pub fn sharing(self, store: Option<Store>) -> HostPlan {
        match self {
            HostPlan::Ppo(plan) => HostPlan::Ppo(Box::new(PpoPlan { store, ..*plan })),
            learner => learner,
        }
    }

    fn held(&self) -> Held {
        match self {
            HostPlan::Ppo(plan) => plan.held,
            HostPlan::Learner(plan, _) => plan.held,
        }
    }

    pub fn on_gpu(&self) -> bool {
        self.held().pass.device.is_cuda()
    }

    /// Runs on the device thread: the roles of `seat`'s worker.
    pub fn build(
        self,
        seat: Seat,
        tokenizer: Arc<Tokenizer>,
        interrupt: Interrupt,
        progress: Arc<dyn Progress>,
    ) -> echelon_core::Result<DeviceRoles> {
        let Held { kind, pass, deterministic, .. } = self.held();
        if deterministic {
            determinism::enforce(pass.device)?;
        }
        shim::set_current_device(pass.device)?;
        if pass.device.is_cuda() && seat.layout.num_workers > 1 {
            nccl_version()?; // what is missing is noticed here, not in the first optimizer step
        }
        let rate = pass.device.is_cuda().then(|| matmul_rate(kind, pass.device));
        let roles = match self {
            HostPlan::Ppo(plan) => plan.build(seat, tokenizer, interrupt, progress)?,
            HostPlan::Learner(plan, run_folder) => {
                let held = plan.held;
                let learner = plan.build(&seat)?;
                let roles = DeviceRoles::none(seat, held, tokenizer, (interrupt, progress));
                DeviceRoles { learner: Some(learner), run_folder, ..roles }
            }
        };
        Ok(DeviceRoles { matmul_rate: rate, ..roles })
    }
}

impl PpoPlan {
    /// Only the actor is loaded now: the first rollout needs no other role.
    fn build(
        self,
        seat: Seat,
        tokenizer: Arc<Tokenizer>,
        interrupt: Interrupt,
        progress: Arc<dyn Progress>,
    ) -> echelon_core::Result<DeviceRoles> {
        let PpoPlan { folders, held, seed, temperature, .. } = self;
        let here = |role| seat.layout.of_worker(seat.worker, role);
        let shared_by = |group: &RoleGroup| self.store.clone().filter(|_| group.workers.len() > 1);
        let actor = match here(Role::Actor) {
            None => None,
            Some(group) => {
                let sharding = seat.sharding(group);
                let training = (self.actor_optimizer, &sharding);
                let policy = trainable_policy(Role::Actor, &folders.actor, None, held, training, temperature)
                    .map_err(|error| Error::other("loading the actor", error))?;
                Some(LearningActor { policy, config: self.actor, folder: folders.actor.clone() })
            }
        };
        let sender = match &actor {
            Some(actor) => {
                sender(&seat, &actor.policy.state, &DecoderConfig::read(&folders.actor)?.shape(), held.kind)?
            }
            None => None,
        };
        let generator = Generator::of(&seat, &folders.actor, held)?;
        let critic = here(Role::Critic).map(|group| {
            let (sharding, folder) = (seat.sharding(group), folders.critic.clone());
            Deferred::new(held.pass.device, move || {
                let reads = ScalarRows::Predecessors;
                let training = (self.critic_optimizer, &sharding);
                let model = trainable_scorer(Role::Critic, &folder, None, seed, held, training, reads)?;
                Ok(LearningCritic { model, config: self.critic, folder })
            })
        });
        let reference = here(Role::Reference).zip(folders.reference).map(|(group, folder)| {
            let sharding = seat.sharding(group);
            let store = shared_by(group);
            let load = move || frozen_policy(&folder, held, temperature, (&sharding, store.as_ref()));
            Deferred::new(held.pass.device, load)
        });
        let actor_tokenizer = tokenizer.clone();
        let reward = here(Role::Reward).zip(folders.reward).map(|(group, folder)| {
            let (sharding, store) = (seat.sharding(group), shared_by(group));
            Deferred::new(held.pass.device, move || {
                let own = Tokenizer::load(&folder).map_err(|error| Error::other("reward model", error))?;
                let same = own.fingerprint() == actor_tokenizer.fingerprint();
                let model = frozen_scorer(&folder, held, (&sharding, store.as_ref()))?;
                Ok(RewardModel { model, tokenizer: (!same).then_some(own) })
            })
        });
        let (engine, run_folder) = (Engine::new(self.engine), self.run_folder);
        let roles = DeviceRoles::none(seat, held, tokenizer, (interrupt, progress));
        Ok(DeviceRoles { actor, critic, reference, reward, generator, sender, engine, run_folder, ..roles })
    }
}
