//! What a worker is told, and the roles that it builds from it on its device thread.

use std::path::PathBuf;
use std::sync::Arc;

use echelon_algorithms::update::{ActorConfig, CriticConfig};
use echelon_core::Error;
use echelon_core::memory::Meter;
use echelon_core::message::{Body, Message};
use echelon_core::progress::{Interrupt, Progress};
use echelon_core::role::Role;
use echelon_core::store::{Store, StoreAddress};
use echelon_core::zero::OptimizerConfig;
use echelon_generation::{Engine, EngineConfig};
use echelon_models::config::DecoderConfig;
use echelon_models::head::ScalarRows;
use echelon_models::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

use crate::generator::{Generator, sender};
use crate::host::{Deferred, DeviceRoles, LearningActor, LearningCritic, RewardModel};
use crate::layout::{Layout, RoleGroup};
use crate::models::{Held, frozen_policy, frozen_scorer, trainable_policy, trainable_scorer};
use crate::recipe::ResolvedRecipe;
use crate::seat::Seat;
use crate::wire::{ModelFolders, actor_config, critic_config, engine_config, optimizer};

/// What a worker in another process is told: it reads the run's own recipe.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Assignment {
    /// The resolved recipe, as TOML.
    pub recipe: String,
    pub folders: ModelFolders,
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
pub struct HostPlan {
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
        HostPlan {
            held,
            seed: recipe.seed,
            temperature: recipe.rollout.temperature,
            actor: actor_config(recipe),
            critic: critic_config(recipe),
            actor_optimizer: optimizer(&recipe.actor.optimizer, &recipe.train.compute),
            critic_optimizer: optimizer(&recipe.critic_optimizer, &recipe.train.compute),
            engine: engine_config(recipe),
            folders,
            run_folder,
            store: None,
        }
    }

    /// With the object store of this host: what several ranks convert is converted once.
    #[must_use]
    pub fn sharing(self, store: Option<Store>) -> HostPlan {
        HostPlan { store, ..self }
    }

    pub fn on_gpu(&self) -> bool {
        self.held.pass.device.is_cuda()
    }

    /// Runs on the device thread: the roles of `seat`'s worker. Only the actor is loaded now: the first rollout needs no
    /// other role.
    pub fn build(
        self,
        seat: Seat,
        tokenizer: Arc<Tokenizer>,
        interrupt: Interrupt,
        progress: Arc<dyn Progress>,
    ) -> echelon_core::Result<DeviceRoles> {
        let HostPlan { folders, held, seed, temperature, .. } = self;
        let here = |role| seat.layout.of_worker(seat.worker, role);
        let shared_by = |group: &RoleGroup| self.store.clone().filter(|_| group.workers.len() > 1);
        let actor = match here(Role::Actor) {
            None => None,
            Some(group) => {
                let sharding = seat.sharding(group);
                let training = (self.actor_optimizer, &sharding);
                let policy = trainable_policy(Role::Actor, &folders.actor, None, held, training, temperature)?;
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
            Deferred::new(move || {
                let reads = ScalarRows::Predecessors;
                let training = (self.critic_optimizer, &sharding);
                let model = trainable_scorer(Role::Critic, &folder, None, seed, held, training, reads)?;
                Ok(LearningCritic { model, config: self.critic, folder })
            })
        });
        let reference = here(Role::Reference).zip(folders.reference).map(|(group, folder)| {
            let sharding = seat.sharding(group);
            let store = shared_by(group);
            Deferred::new(move || frozen_policy(&folder, held, temperature, (&sharding, store.as_ref())))
        });
        let actor_tokenizer = tokenizer.clone();
        let reward = here(Role::Reward).zip(folders.reward).map(|(group, folder)| {
            let (sharding, store) = (seat.sharding(group), shared_by(group));
            Deferred::new(move || {
                let own = Tokenizer::load(&folder).map_err(|error| Error::other("reward model", error))?;
                let same = own.fingerprint() == actor_tokenizer.fingerprint();
                let model = frozen_scorer(&folder, held, (&sharding, store.as_ref()))?;
                Ok(RewardModel { model, tokenizer: (!same).then_some(own) })
            })
        });
        Ok(DeviceRoles {
            actor,
            critic,
            reference,
            reward,
            generator,
            sender,
            engine: Engine::new(self.engine),
            tokenizer,
            held,
            seat,
            policy_version: 0,
            interrupt,
            progress,
            run_folder: self.run_folder,
            meter: Meter::new(held.pass.device),
        })
    }
}
