//! The generator of a worker: on the actor's own tensors, or on a copy or slices of its own that every publication fills.

use std::collections::HashMap;
use std::path::Path;

use echelon_core::Result;
use echelon_core::role::Role;
use echelon_core::shape::{ModelShape, TensorParallelPart};
use echelon_core::zero::{TrainingState, Units};
use echelon_models::checkpoint::Checkpoint;
use echelon_models::config::DecoderConfig;
use echelon_models::decoder::Decoder;
use echelon_models::tensor_parallel::TensorParallel;
use echelon_placement::weight_sync::broadcast::{BroadcastReceiver, BroadcastSender, SyncPlace, join_lanes};
use echelon_placement::weight_sync::{SyncConfig, SyncPlan};
use tch::{Kind, Tensor};

use crate::models::Held;
use crate::seat::Seat;

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
    receiver: BroadcastReceiver,
    /// Whether weights were ever sent here: until then they are those that the actor began with.
    attempted: bool,
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
    /// The generator of `seat`'s worker, if it has one, as the actor begins: read from the folder that the actor starts from.
    pub fn of(seat: &Seat, folder: &Path, held: Held) -> Result<Option<Generator>> {
        let layout = &seat.layout;
        let Some(group) = layout.of_worker(seat.worker, Role::Generator) else { return Ok(None) };
        if layout.shares_weights() {
            return Ok(Some(Generator::OnActor));
        }
        let rank = seat.rank_in(group).expect("a worker of the group");
        let size = group.tensor_parallel;
        let replica = rank / size;
        let together = &group.workers[replica * size..(replica + 1) * size];
        let weights = OwnWeights::load(folder, held, &TensorParallel::new(seat.group(together)))?;
        if layout.of_worker(seat.worker, Role::Actor).is_some() {
            return Ok(Some(Generator::Beside(Box::new(weights))));
        }
        let plan = sync_plan(seat, &weights.shape, held.kind)?;
        let tp_rank = rank % size;
        let lanes = seat.join_at(|point, address, patience| {
            join_lanes(point, "weights", &plan, SyncPlace::Generator { replica, tp_rank }, address, patience)
        })?;
        let receiver = BroadcastReceiver::new(plan, tp_rank, lanes, &weights.tensors)?;
        Ok(Some(Generator::Apart(Box::new(Apart { weights, receiver, attempted: false }))))
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

/// The actor's end of a publication to generators on other workers; none where they are on its own.
pub fn sender(seat: &Seat, shape: &ModelShape, kind: Kind) -> Result<Option<BroadcastSender>> {
    let layout = &seat.layout;
    let (actor, generator) = (layout.group(Role::Actor), layout.group(Role::Generator));
    let Some(trainer) = seat.rank_in(actor).filter(|_| actor.workers != generator.workers) else { return Ok(None) };
    let plan = sync_plan(seat, shape, kind)?;
    let lanes = seat.join_at(|point, address, patience| {
        join_lanes(point, "weights", &plan, SyncPlace::Trainer(trainer), address, patience)
    })?;
    BroadcastSender::new(plan, lanes).map(Some)
}

fn sync_plan(seat: &Seat, shape: &ModelShape, kind: Kind) -> Result<SyncPlan> {
    let (actor, generator) = (seat.layout.group(Role::Actor), seat.layout.group(Role::Generator));
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
