//! The roles that a rank builds on its device thread.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use echelon_algorithms::reward_model::PairwiseRanking;
use echelon_algorithms::sft::NegativeLogLikelihood;
use echelon_core::loss::Loss;
use echelon_core::memory::Meter;
use echelon_core::process_group::nccl_version;
use echelon_core::progress::{Interrupt, Progress};
use echelon_core::role::Role;
use echelon_core::store::Store;
use echelon_core::{Error, determinism, shim};
use echelon_generation::{Engine, EngineConfig};
use echelon_models::config::DecoderConfig;
use echelon_models::head::ScalarRows;
use echelon_models::tokenizer::Tokenizer;

use crate::deferred::Deferred;
use crate::generator::{self, Generator};
use crate::host::{DeviceRoles, Frozen};
use crate::matmul_rate::matmul_rate;
use crate::models::{Held, frozen_policy, frozen_scorer};
use crate::recipe::{Compute, Init, Model, ResolvedRecipe, RewardRecipe, SftRecipe};
use crate::run_spec::RunSpec;
use crate::seat::Seat;
use crate::trained::{Reads, TrainedPlan};
use crate::wire::{self, engine_config};

/// What a rank's roles are built from; crosses to its device thread.
#[derive(Clone)]
pub struct HostPlan {
    held: Held,
    trained: Vec<TrainedPlan>,
    reference: Option<PathBuf>,
    reward: Option<PathBuf>,
    /// At which log-probs are made.
    temperature: f64,
    engine: EngineConfig,
    run_folder: PathBuf,
    /// The object store of this host, where there is one: what several ranks convert is converted once.
    store: Option<Store>,
}

impl HostPlan {
    /// Of a PPO run.
    pub fn of_ppo(spec: &RunSpec, recipe: &ResolvedRecipe, held: Held) -> HostPlan {
        let compute = &recipe.train.compute;
        let temperature = recipe.rollout.temperature;
        let trained = |role, reads, optimizer, loss| TrainedPlan {
            role,
            folder: spec.folder(role),
            random: false,
            seed: recipe.seed,
            reads,
            optimizer: wire::optimizer(optimizer, compute),
            lr: optimizer.lr,
            schedule: wire::schedule(optimizer, spec.optimizer_steps[&role]),
            losses: vec![loss],
        };
        let policy_loss: Arc<dyn Loss> = Arc::new(wire::policy_loss(recipe));
        let value_loss = Arc::new(wire::value_loss(recipe));
        let (logprobs, values) = (Reads::Logprobs { temperature }, Reads::Scalars(ScalarRows::Predecessors));
        let trained = vec![
            trained(Role::Actor, logprobs, &recipe.actor.optimizer, policy_loss),
            trained(Role::Critic, values, &recipe.critic_optimizer, value_loss),
        ];
        HostPlan { temperature, engine: engine_config(recipe, held), ..HostPlan::new(spec, held, trained) }
    }

    /// Of an `sft` run.
    pub fn of_sft(spec: &RunSpec, recipe: &SftRecipe, held: Held) -> HostPlan {
        let (reads, loss) = (Reads::Logprobs { temperature: 1.0 }, Arc::new(NegativeLogLikelihood));
        HostPlan::alone(spec, (Role::Actor, reads, loss), (&recipe.model, &recipe.train.compute, recipe.seed), held)
    }

    /// Of a `reward` run.
    pub fn of_reward(spec: &RunSpec, recipe: &RewardRecipe, held: Held) -> HostPlan {
        let (reads, loss) = (Reads::Scalars(ScalarRows::LastTokens), Arc::new(PairwiseRanking));
        HostPlan::alone(spec, (Role::Reward, reads, loss), (&recipe.model, &recipe.train.compute, recipe.seed), held)
    }

    /// One model that is trained alone.
    fn alone(
        spec: &RunSpec,
        (role, reads, loss): (Role, Reads, Arc<dyn Loss>),
        (model, compute, seed): (&Model, &Compute, u64),
        held: Held,
    ) -> HostPlan {
        let trained = TrainedPlan {
            role,
            folder: spec.folder(role),
            random: model.init == Init::Random,
            seed,
            reads,
            optimizer: wire::optimizer(&model.optimizer, compute),
            lr: model.optimizer.lr,
            schedule: wire::schedule(&model.optimizer, spec.optimizer_steps[&role]),
            losses: vec![loss],
        };
        HostPlan::new(spec, held, vec![trained])
    }

    fn new(spec: &RunSpec, held: Held, trained: Vec<TrainedPlan>) -> HostPlan {
        let frozen = |role| spec.folders.get(&role).filter(|_| trained.iter().all(|plan| plan.role != role)).cloned();
        HostPlan {
            held,
            reference: frozen(Role::Reference),
            reward: frozen(Role::Reward),
            trained,
            temperature: 1.0,
            engine: EngineConfig::default(),
            run_folder: spec.run_folder.clone(),
            store: None,
        }
    }

    #[must_use]
    pub fn sharing(self, store: Option<Store>) -> HostPlan {
        HostPlan { store, ..self }
    }

    pub fn on_gpu(&self) -> bool {
        self.held.pass.device.is_cuda()
    }

    /// Runs on the device thread: the roles of `seat`'s worker. Only the actor is loaded now: the first rollout needs no other
    /// role.
    pub fn build(
        self,
        seat: Seat,
        tokenizer: Arc<Tokenizer>,
        interrupt: Interrupt,
        progress: Arc<dyn Progress>,
    ) -> echelon_core::Result<DeviceRoles> {
        let Held { kind, pass, deterministic, .. } = self.held;
        if deterministic {
            determinism::enforce(pass.device)?;
        }
        shim::set_current_device(pass.device)?;
        if pass.device.is_cuda() && seat.layout.num_workers > 1 {
            nccl_version()?; // what is missing is noticed here, not in the first optimizer step
        }
        let matmul_rate = pass.device.is_cuda().then(|| matmul_rate(kind, pass.device));
        let frozen = self.frozen(&seat, &tokenizer);
        let (mut trained, mut sender) = (BTreeMap::new(), None);
        let alone = self.trained.len() == 1;
        let published =
            self.trained.iter().find(|plan| plan.role == Role::Actor && !alone).map(|plan| plan.folder.clone());
        for plan in self.trained {
            let (role, folder) = (plan.role, plan.folder.clone());
            if seat.layout.of_worker(seat.worker, role).is_none() {
                continue;
            }
            let held = self.held;
            if role == Role::Actor || alone {
                let mut model = plan.build(&seat, held).map_err(|error| match alone {
                    true => error,
                    false => Error::other(format!("loading the {role}"), error),
                })?;
                if !alone {
                    sender = generator::sender(&seat, model.state(), &DecoderConfig::read(&folder)?.shape(), kind)?;
                }
                trained.insert(role, Deferred::loaded_before(pass.device, model));
            } else {
                let seat = seat.clone();
                trained.insert(role, Deferred::new(pass.device, move || plan.build(&seat, held)));
            }
        }
        let generator = match published {
            Some(folder) => Generator::of(&seat, &folder, self.held)?,
            None => None,
        };
        Ok(DeviceRoles {
            trained,
            frozen,
            generator,
            sender,
            engine: Engine::new(self.engine),
            tokenizer,
            held: self.held,
            seat,
            policy_version: 0,
            interrupt,
            progress,
            run_folder: self.run_folder,
            meter: Meter::new(pass.device),
            matmul_rate,
        })
    }

    fn frozen(&self, seat: &Seat, tokenizer: &Arc<Tokenizer>) -> BTreeMap<Role, Deferred<Frozen>> {
        let (held, temperature, device) = (self.held, self.temperature, self.held.pass.device);
        let mut frozen = BTreeMap::new();
        let here = |role, folder: &Option<PathBuf>| {
            let group = seat.layout.of_worker(seat.worker, role)?;
            let store = self.store.clone().filter(|_| group.workers.len() > 1);
            Some((seat.sharding(group), store, folder.clone()?))
        };
        if let Some((sharding, store, folder)) = here(Role::Reference, &self.reference) {
            let load =
                move || Ok(Frozen::Policy(frozen_policy(&folder, held, temperature, (&sharding, store.as_ref()))?));
            frozen.insert(Role::Reference, Deferred::new(device, load));
        }
        if let Some((sharding, store, folder)) = here(Role::Reward, &self.reward) {
            let actors = tokenizer.clone();
            let load = move || {
                let own = Tokenizer::load(&folder).map_err(|error| Error::other("reward model", error))?;
                let same = own.fingerprint() == actors.fingerprint();
                let model = frozen_scorer(&folder, held, (&sharding, store.as_ref()))?;
                Ok(Frozen::Scorer(Box::new(model), (!same).then_some(own)))
            };
            frozen.insert(Role::Reward, Deferred::new(device, load));
        }
        frozen
    }
}
