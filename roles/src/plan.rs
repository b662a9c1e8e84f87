//! What a rank's roles are built from.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use echelon_core::memory::Meter;
use echelon_core::process_group::nccl_version;
use echelon_core::progress::{Interrupt, Progress};
use echelon_core::role::Role;
use echelon_core::store::Store;
use echelon_core::{Error, Result, determinism, shim};
use echelon_generation::{Engine, EngineConfig};
use echelon_models::config::DecoderConfig;
use echelon_models::tokenizer::Tokenizer;

use crate::deferred::Deferred;
use crate::device_roles::{DeviceRoles, Frozen};
use crate::generator::{self, Generator, Sender};
use crate::matmul_rate::matmul_rate;
use crate::membership::Membership;
use crate::models::{Held, frozen_policy, frozen_scorer};
use crate::trained::{Trained, TrainedPlan};

/// What a rank's roles are built from; crosses to its device thread.
#[derive(Clone)]
pub struct RankPlan {
    pub held: Held,
    pub trained: Vec<TrainedPlan>,
    pub reference: Option<PathBuf>,
    pub reward: Option<PathBuf>,
    /// At which log-probs are made.
    pub temperature: f64,
    pub engine: EngineConfig,
    pub run_folder: PathBuf,
    /// The object store of this host, where there is one: what several ranks convert is converted once.
    pub store: Option<Store>,
}

impl RankPlan {
    #[must_use]
    pub fn sharing(self, store: Option<Store>) -> RankPlan {
        RankPlan { store, ..self }
    }

    pub fn on_gpu(&self) -> bool {
        self.held.pass.device.is_cuda()
    }

    /// Runs on the device thread: the roles of `membership`'s worker. Only the actor is loaded now: the first rollout needs no other
    /// role.
    pub fn build(
        self,
        membership: Membership,
        tokenizer: Arc<Tokenizer>,
        interrupt: Interrupt,
        progress: Arc<dyn Progress>,
    ) -> Result<DeviceRoles> {
        let Held { kind, pass, deterministic, .. } = self.held;
        if deterministic {
            determinism::enforce(pass.device)?;
        }
        shim::set_current_device(pass.device)?;
        if pass.device.is_cuda() && membership.layout.num_workers > 1 {
            nccl_version()?; // what is missing is noticed here, not in the first optimizer step
        }
        let matmul_rate = pass.device.is_cuda().then(|| matmul_rate(kind, pass.device));
        let frozen = self.frozen(&membership, &tokenizer);
        let published = self.trained.iter().find(|plan| plan.role == Role::Actor).map(|plan| plan.folder.clone());
        let (trained, sender) = trained(self.trained, &membership, self.held)?;
        let generator = match published {
            Some(folder) => Generator::of(&membership, &folder, self.held)?,
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
            membership,
            policy_version: 0,
            interrupt,
            progress,
            run_folder: self.run_folder,
            meter: Meter::new(pass.device),
            matmul_rate,
        })
    }

    fn frozen(&self, membership: &Membership, tokenizer: &Arc<Tokenizer>) -> BTreeMap<Role, Deferred<Frozen>> {
        let (held, temperature, device) = (self.held, self.temperature, self.held.pass.device);
        let mut frozen = BTreeMap::new();
        let here = |role, folder: &Option<PathBuf>| {
            let group = membership.layout.of_worker(membership.worker, role)?;
            let store = self.store.clone().filter(|_| group.workers.len() > 1);
            Some((membership.sharding(group), store, folder.clone()?))
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

type Learners = BTreeMap<Role, Deferred<Trained>>;

/// The models that learn here, and what sends the actor's weights to generators.
fn trained(plans: Vec<TrainedPlan>, membership: &Membership, held: Held) -> Result<(Learners, Option<Sender>)> {
    let (mut trained, mut sender) = (BTreeMap::new(), None);
    let samples = membership.layout.has(Role::Generator);
    for plan in plans {
        let (role, folder, device) = (plan.role, plan.folder.clone(), held.pass.device);
        if membership.layout.of_worker(membership.worker, role).is_none() {
            continue;
        }
        if role != Role::Actor && samples {
            let membership = membership.clone();
            trained.insert(role, Deferred::new(device, move || plan.build(&membership, held)));
            continue;
        }
        let mut model = plan.build(membership, held).map_err(|error| match samples {
            true => Error::other(format!("loading the {role}"), error),
            false => error,
        })?;
        if samples {
            let shape = DecoderConfig::read(&folder)?.shape();
            sender = generator::sender(membership, model.state(), &shape, held.kind)?;
        }
        trained.insert(role, Deferred::loaded_before(device, model));
    }
    Ok((trained, sender))
}
