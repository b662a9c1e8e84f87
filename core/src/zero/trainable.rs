//! A model that learns on this rank: a backbone, a head, and the training state that their tensors are views of.

use tch::{Device, Tensor};

use super::optimizer::TrainingState;
use super::pass::{Backbone, Head, Units, WholeModel, forward_backward, forward_units, idle_pass};
use crate::data::{Rows, micro_batches};
use crate::error::{Error, Result};
use crate::pack::PackedRows;
use crate::progress::Interrupt;

/// How rows go through a model.
#[derive(Clone, Copy, Debug)]
pub struct PassConfig {
    pub device: Device,
    /// Never changes results, only memory and speed.
    pub tokens_per_micro_batch: i64,
    /// Recompute each layer in the backward pass instead of keeping what it made.
    pub activation_checkpointing: bool,
}

pub struct Trainable<B, H> {
    pub state: TrainingState,
    pub model: B,
    pub head: H,
    pub pass: PassConfig,
    /// Passes of this mini-batch so far.
    passes: usize,
    /// Passes that the other ranks make beyond this one's.
    idle: usize,
    /// A loss of this mini-batch that was not finite.
    bad_loss: Option<f64>,
}

impl<B: Backbone, H: Head> Trainable<B, H> {
    pub fn new(state: TrainingState, model: B, head: H, pass: PassConfig) -> Trainable<B, H> {
        Trainable { state, model, head, pass, passes: 0, idle: 0, bad_loss: None }
    }

    /// The micro-batches of this rank's rows, of which `unit` neighbours stay together, as row indices; agrees with the other
    /// ranks on their number: call [`Trainable::forward_backward`] for each, then [`Trainable::optimizer_step`].
    pub fn micro_batches(&mut self, lengths: &[i64], unit: usize) -> Result<Vec<Vec<i64>>> {
        let batches = micro_batches(lengths, unit, self.pass.tokens_per_micro_batch);
        self.idle = self.state.agree(batches.len())? - batches.len();
        Ok(batches)
    }

    /// Runs rows through the model without a graph, a micro-batch at a time, in the order of the rows.
    pub fn forward_rows(
        &mut self,
        rows: &Rows,
        interrupt: &Interrupt,
        each: impl FnMut(&[i64], H::Output),
    ) -> Result<()> {
        forward_rows_through(&mut self.state, (&self.model, &self.head), &self.pass, rows, interrupt, each)
    }

    /// Adds the gradients of `loss` on one micro-batch to the accumulated ones; returns the loss. One that is not finite
    /// makes [`Trainable::optimizer_step`] refuse.
    pub fn forward_backward(&mut self, rows: &Rows, loss: impl FnOnce(&H::Output) -> Result<Tensor>) -> Result<f64> {
        self.begin_pass();
        let packed = PackedRows::new(rows, self.pass.device);
        let (model, recompute) = ((&self.model, &self.head), self.pass.activation_checkpointing);
        let loss = forward_backward(&mut self.state, model, &packed, recompute, loss)?;
        if !loss.is_finite() {
            self.bad_loss = Some(loss);
        }
        Ok(loss)
    }

    /// Sum over ranks, clip, AdamW at `lr`, clear; gives the gradients' global norm before clipping.
    ///
    /// # Errors
    /// [`Error::NonFinite`] on every rank when a loss of any rank or the gradient norm is not finite: nothing has moved.
    pub fn optimizer_step(&mut self, lr: f64) -> Result<f64> {
        for _ in 0..std::mem::take(&mut self.idle) {
            self.begin_pass();
            idle_pass(&mut self.state, self.model.num_layers(), true)?;
        }
        self.passes = 0;
        self.state.at_micro_batch(0);
        let bad = self.bad_loss.take();
        let group = self.state.sharding().group.clone();
        if group.sum("finite losses", f64::from(u8::from(bad.is_some())))? > 0.0 {
            return Err(self.state.refuse("the loss", bad.unwrap_or(f64::NAN)));
        }
        self.state.step(lr)
    }

    fn begin_pass(&mut self) {
        self.passes += 1;
        self.state.at_micro_batch(self.passes);
    }
}

/// Runs rows through a model that is whole on this rank and does not learn, a micro-batch at a time, in the order of the
/// rows.
pub fn forward_rows<B: Backbone, H: Head>(
    model: (&B, &H),
    pass: &PassConfig,
    rows: &Rows,
    interrupt: &Interrupt,
    each: impl FnMut(&[i64], H::Output),
) -> Result<()> {
    forward_rows_through(&mut WholeModel, model, pass, rows, interrupt, each)
}

/// The same of a model that is divided over ranks as `units` know: every rank calls this, with its own rows, and those with
/// fewer micro-batches pass through the units without work.
pub fn forward_rows_through<B: Backbone, H: Head>(
    units: &mut dyn Units,
    (model, head): (&B, &H),
    pass: &PassConfig,
    rows: &Rows,
    interrupt: &Interrupt,
    mut each: impl FnMut(&[i64], H::Output),
) -> Result<()> {
    let batches = micro_batches(&rows.lengths, 1, pass.tokens_per_micro_batch);
    let passes = units.agree(batches.len())?; // before the first pass: ranks are in step
    for index in 0..passes {
        let stop = model.any_stops(interrupt.check().is_err())?;
        if units.any_stops(stop)? {
            return Err(Error::Interrupted);
        }
        units.at_micro_batch(index + 1);
        match batches.get(index) {
            Some(batch) => {
                let packed = PackedRows::new(&rows.select(batch), pass.device);
                each(batch, forward_units(units, (model, head), &packed)?);
            }
            None => idle_pass(units, model.num_layers(), false)?,
        }
    }
    units.at_micro_batch(0);
    Ok(())
}

/// Micro-batches' `[b, t]` outputs as one `[B, T]` tensor on the CPU, 0 elsewhere; rows come in order.
pub fn stack_rows(parts: &[Tensor], size: [i64; 2]) -> Tensor {
    let wide: Vec<Tensor> =
        parts.iter().map(|part| part.to_device(Device::Cpu).constant_pad_nd([0, size[1] - part.size()[1]])).collect();
    if wide.is_empty() { Tensor::zeros(size, tch::kind::FLOAT_CPU) } else { Tensor::cat(&wide, 0) }
}
