//! The generator of a worker: on the actor's own tensors, or on a copy or slices of its own that every publication fills.

use std::collections::HashMap;
use std::path::Path;

use echelon_core::Result;
use echelon_core::process_group::Patience;
use echelon_core::role::Role;
use echelon_core::shape::{ModelShape, TensorParallelPart};
use echelon_core::zero::{TrainingState, Units};
use echelon_models::checkpoint::Checkpoint;
use echelon_models::config::DecoderConfig;
use echelon_models::decoder::Decoder;
use echelon_models::tensor_parallel::TensorParallel;
use echelon_placement::weight_sync::broadcast::{BroadcastReceiver, BroadcastSender, SyncPlace, join_lanes};
use echelon_placement::weight_sync::shared::{SharedReceiver, SharedSender, find_segments};
use echelon_placement::weight_sync::{SyncConfig, SyncPlan, SyncReport};
use tch::{Device, Kind, Tensor};

use crate::membership::Membership;
use crate::models::Held;

/// What a worker samples with.
pub enum Generator {
    /// The actor's own tensors: publishing copies nothing.
    OnActor,
    /// Slices beside the actor, on the same workers.
    Beside(Box<OwnWeights>),
    /// On workers of its own; the actor's ranks send.
    Apart(Box<Apart>),
}

/// What receives the weights that it holds.
pub struct Apart {
    pub weights: OwnWeights,
    receiver: Receiver,
    /// Whether weights were ever sent here: until then they are those that the actor began with.
    attempted: bool,
}

/// The actor's end of a publication to generators on other workers.
pub enum Sender {
    Shared(SharedSender),
    Broadcast(BroadcastSender),
}

/// A generator's end.
enum Receiver {
    Shared(SharedReceiver),
    Broadcast(BroadcastReceiver),
}

impl Sender {
    /// # Errors
    /// A generator that is gone.
    pub fn publish(&mut self, state: &TrainingState, version: u64) -> Result<SyncReport> {
        match self {
            Sender::Shared(sender) => sender.publish(state, version),
            Sender::Broadcast(sender) => sender.publish(state, version),
        }
    }
}

impl Receiver {
    fn receive(&mut self, version: u64) -> Result<SyncReport> {
        match self {
            Receiver::Shared(receiver) => receiver.receive(version),
            Receiver::Broadcast(receiver) => receiver.receive(version),
        }
    }

    fn check(&self, version: u64) -> Result<()> {
        match self {
            Receiver::Shared(receiver) => receiver.check(version),
            Receiver::Broadcast(receiver) => receiver.check(version),
        }
    }
}

/// A generator's own weights, its slice of every parameter.
pub struct OwnWeights {
    pub model: Decoder,
    /// `[V, H]`, or this rank's rows of it.
    pub head: Tensor,
    tensors: HashMap<String, Tensor>,
    shape: ModelShape,
    part: TensorParallelPart,
}

impl Generator {
    /// The generator of `membership`'s worker, if it has one, as the actor begins: read from the folder that the actor starts from.
    pub fn of(membership: &Membership, folder: &Path, held: Held) -> Result<Option<Generator>> {
        let layout = &membership.layout;
        let Some(group) = layout.of_worker(membership.worker, Role::Generator) else { return Ok(None) };
        if layout.shares_weights() {
            return Ok(Some(Generator::OnActor));
        }
        let rank = membership.rank_in(group).expect("a worker of the group");
        let size = group.tensor_parallel;
        let replica = rank / size;
        let together = &group.workers[replica * size..(replica + 1) * size];
        let parallel = TensorParallel::new(membership.group(together));
        if layout.of_worker(membership.worker, Role::Actor).is_some() {
            return Ok(Some(Generator::Beside(Box::new(OwnWeights::load(folder, held, &parallel)?))));
        }
        let shape = DecoderConfig::read(folder)?.shape();
        let plan = sync_plan(membership, &shape, held.kind)?;
        let place = (replica, rank % size);
        let apart = match membership.shares_memory() {
            true => Apart::by_shared_memory(membership, plan, place, (folder, held, &parallel))?,
            false => Apart::by_broadcast(membership, plan, place, (folder, held, &parallel))?,
        };
        Ok(Some(Generator::Apart(Box::new(apart))))
    }

    /// Takes up the actor's weights as they are now; the actor's ranks publish at the same time.
    ///
    /// # Errors
    /// A rank that is gone, or weights that did not arrive as they were sent.
    pub fn take_up(&mut self, actor: Option<&mut TrainingState>, version: u64) -> Result<()> {
        match self {
            Generator::OnActor => Ok(()),
            Generator::Beside(weights) => weights.fill(actor.expect("beside an actor")),
            Generator::Apart(apart) => {
                apart.attempted = true;
                apart.receiver.receive(version).map(|_| ())
            }
        }
    }

    /// Bytes of weights of its own.
    pub fn bytes(&self) -> usize {
        let own = match self {
            Generator::OnActor => return 0,
            Generator::Beside(weights) => weights,
            Generator::Apart(apart) => &apart.weights,
        };
        own.tensors.values().map(|tensor| tensor.numel() * tensor.kind().elt_size_in_bytes()).sum()
    }

    /// # Errors
    /// The weights of `version` are not here, or not all of them.
    pub fn check(&self, version: u64) -> Result<()> {
        match self {
            Generator::Apart(apart) if apart.attempted => apart.receiver.check(version),
            _ => Ok(()), // as loaded, or on this worker: there is no way to be behind
        }
    }
}

type Load<'a> = (&'a Path, Held, &'a TensorParallel);

impl Apart {
    /// Where the actor's ranks write, generators of the same host compute: what they begin with is there too.
    fn by_shared_memory(
        membership: &Membership,
        plan: SyncPlan,
        (_, tp_rank): (usize, usize),
        load: Load,
    ) -> Result<Apart> {
        let (folder, held, parallel) = load;
        let trainers = plan.config().trainers;
        let segments = membership.join_at(|point, _, patience| find_segments(point, SYNC, trainers, patience))?;
        let patience = Patience::default().progress;
        let (weights, receiver) = if held.pass.device == Device::Cpu {
            let mut receiver = SharedReceiver::new(plan, tp_rank, segments, patience)?;
            receiver.receive(AT_THE_START)?;
            (OwnWeights::over(folder, receiver.tensors(), parallel)?, receiver)
        } else {
            let weights = OwnWeights::load(folder, held, parallel)?;
            let receiver = SharedReceiver::copying(plan, tp_rank, segments, &weights.tensors, patience)?;
            (weights, receiver)
        };
        Ok(Apart { weights, receiver: Receiver::Shared(receiver), attempted: false })
    }

    fn by_broadcast(
        membership: &Membership,
        plan: SyncPlan,
        (replica, tp_rank): (usize, usize),
        load: Load,
    ) -> Result<Apart> {
        let (folder, held, parallel) = load;
        let lanes = membership.join_at(|point, address, patience| {
            join_lanes(point, SYNC, &plan, SyncPlace::Generator { replica, tp_rank }, address, patience)
        })?;
        let receiver = BroadcastReceiver::new(plan, tp_rank, lanes, held.pass.device)?;
        let weights = OwnWeights::over(folder, receiver.tensors(), parallel)?;
        weights.read(folder, held)?;
        Ok(Apart { weights, receiver: Receiver::Broadcast(receiver), attempted: false })
    }
}

/// What the ranks meet for.
const SYNC: &str = "weights";

/// The version of the weights that a run begins with, where they are published.
const AT_THE_START: u64 = 0;

/// The actor's end of a publication to generators on other workers; none where they are on its own.
pub fn sender(
    membership: &Membership,
    state: &TrainingState,
    shape: &ModelShape,
    kind: Kind,
) -> Result<Option<Sender>> {
    let layout = &membership.layout;
    let (actor, generator) = (layout.group(Role::Actor), layout.group(Role::Generator));
    let Some(trainer) = membership.rank_in(actor).filter(|_| actor.workers != generator.workers) else {
        return Ok(None);
    };
    let plan = sync_plan(membership, shape, kind)?;
    if membership.shares_memory() {
        let mut sender = SharedSender::new(plan, trainer)?;
        sender.publish(state, AT_THE_START)?;
        membership.join_at(|point, _, _| sender.offer(point, SYNC))?;
        return Ok(Some(Sender::Shared(sender)));
    }
    let lanes = membership.join_at(|point, address, patience| {
        join_lanes(point, SYNC, &plan, SyncPlace::Trainer(trainer), address, patience)
    })?;
    Ok(Some(Sender::Broadcast(BroadcastSender::new(plan, lanes)?)))
}

fn sync_plan(membership: &Membership, shape: &ModelShape, kind: Kind) -> Result<SyncPlan> {
    let (actor, generator) = (membership.layout.group(Role::Actor), membership.layout.group(Role::Generator));
    let replicas = generator.workers.len() / generator.tensor_parallel;
    SyncPlan::new(shape, SyncConfig::new(actor.workers.len(), replicas, generator.tensor_parallel, kind))
}

impl OwnWeights {
    fn load(folder: &Path, held: Held, tensor_parallel: &TensorParallel) -> Result<OwnWeights> {
        let config = DecoderConfig::read(folder)?;
        let part = tensor_parallel.part();
        let checkpoint = Checkpoint::open(folder)?;
        let mut mapped = checkpoint.slice_loader(&config, held.kind, held.pass.device, part)?;
        let mut tensors = HashMap::new();
        // Copies: a map of the file cannot be written to.
        let mut own = |name: &str| -> std::result::Result<Tensor, echelon_models::ModelError> {
            let tensor = mapped(name)?.copy();
            tensors.insert(name.to_string(), tensor.shallow_clone());
            Ok(tensor)
        };
        let model = Decoder::sliced(&config, tensor_parallel, &mut own)?;
        let head = if config.tied_embeddings { model.embedding().shallow_clone() } else { own("lm_head.weight")? };
        Ok(OwnWeights { model, head, tensors, shape: config.shape(), part })
    }

    /// Over tensors that others fill.
    fn over(folder: &Path, tensors: &HashMap<String, Tensor>, tensor_parallel: &TensorParallel) -> Result<OwnWeights> {
        let config = DecoderConfig::read(folder)?;
        let given = |name: &str| tensors[name].shallow_clone();
        let model = Decoder::sliced(&config, tensor_parallel, &mut |name| Ok(given(name)))?;
        let head = if config.tied_embeddings { model.embedding().shallow_clone() } else { given("lm_head.weight") };
        let tensors = tensors.keys().map(|name| (name.clone(), given(name))).collect();
        Ok(OwnWeights { model, head, tensors, shape: config.shape(), part: tensor_parallel.part() })
    }

    /// Fills them from the folder's files.
    fn read(&self, folder: &Path, held: Held) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let config = DecoderConfig::read(folder)?;
        let checkpoint = Checkpoint::open(folder)?;
        let mut mapped = checkpoint.slice_loader(&config, held.kind, held.pass.device, self.part)?;
        for (name, tensor) in &self.tensors {
            tensor.shallow_clone().f_copy_(&mapped(name)?)?;
        }
        Ok(())
    }

    /// Copies this rank's slices out of the actor's units, one gathered unit at a time.
    fn fill(&mut self, actor: &mut TrainingState) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let params = actor.params();
        for (unit, shape) in self.shape.units.iter().enumerate() {
            actor.gather(unit)?;
            for param in &shape.params {
                let slice = self.shape.slice(param, self.part);
                let source = params[&param.name].weight.f_narrow(slice.dim as i64, slice.start, slice.length)?;
                if let Some(tensor) = self.tensors.get(&param.name) {
                    tensor.shallow_clone().f_copy_(&source)?;
                }
            }
            actor.release(unit)?;
        }
        Ok(())
    }
}
