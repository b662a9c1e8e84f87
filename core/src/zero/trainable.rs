//! A model that learns on this rank: a backbone, a head, and the training state that their tensors are views of.

use tch::{Device, Tensor};

use super::optimizer::{StepReport, TrainingState};
use super::pass::{Backbone, Head, forward, forward_backward};
use crate::error::Result;
use crate::pack::PackedRows;
use crate::progress::Interrupt;
use crate::rollout::{Tokens, micro_batches};

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
}

impl<B: Backbone, H: Head> Trainable<B, H> {
    /// Adds the gradients of `loss` on one micro-batch to the accumulated ones; returns the loss.
    pub fn forward_backward(&mut self, rows: &Tokens, loss: impl FnOnce(&H::Output) -> Result<Tensor>) -> Result<f64> {
        let packed = PackedRows::new(rows, self.pass.device);
        let loss = forward_backward(&self.model, &self.head, &packed, self.pass.activation_checkpointing, loss)?;
        self.state.absorb_grads()?;
        Ok(loss)
    }

    /// Clip, AdamW at `lr`, clear.
    pub fn optimizer_step(&mut self, lr: f64) -> Result<StepReport> {
        self.state.step(lr)
    }
}

/// Runs rows through a model without a graph, a micro-batch at a time, in the order of the rows.
pub fn forward_rows<B: Backbone, H: Head>(
    (model, head): (&B, &H),
    pass: &PassConfig,
    rows: &Tokens,
    interrupt: &Interrupt,
    mut each: impl FnMut(&[i64], H::Output),
) -> Result<()> {
    for batch in micro_batches(&rows.lengths, pass.tokens_per_micro_batch) {
        interrupt.check()?;
        let packed = PackedRows::new(&rows.select(&batch), pass.device);
        each(&batch, forward(model, head, &packed)?);
    }
    Ok(())
}

/// Micro-batches' `[b, t]` outputs as one `[B, T]` tensor on the CPU, 0 elsewhere; rows come in order.
pub fn stack_rows(parts: &[Tensor], size: [i64; 2]) -> Tensor {
    let wide: Vec<Tensor> =
        parts.iter().map(|part| part.to_device(Device::Cpu).constant_pad_nd([0, size[1] - part.size()[1]])).collect();
    if wide.is_empty() { Tensor::zeros(size, tch::kind::FLOAT_CPU) } else { Tensor::cat(&wide, 0) }
}

/// An output with log-probs (and, when learning, entropy) per token.
pub trait PolicyOutput {
    /// `[b, T]`.
    fn logprobs(&self) -> &Tensor;
    /// `[b, T]`.
    fn entropy(&self) -> Option<&Tensor>;
}

/// An output with one number per token `[b, T]` or per row `[b]`.
pub trait ScalarValues {
    fn values(&self) -> &Tensor;
}
