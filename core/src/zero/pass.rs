//! Forward and backward through a chain of layer units, one unit's graph at a time.

use tch::Tensor;

use crate::error::Result;
use crate::pack::PackedRows;
use crate::shim;

/// A model as a chain of layer units: embedding, layers, final norm.
pub trait Backbone {
    /// What every layer needs of a batch and is computed once (rotary tables).
    type Context;

    fn context(&self, batch: &PackedRows) -> Self::Context;
    fn num_layers(&self) -> usize;
    /// `[N, H]`.
    fn embed(&self, batch: &PackedRows) -> Tensor;
    /// `[N, H]` to `[N, H]`.
    fn layer(&self, index: usize, hidden: &Tensor, batch: &PackedRows, context: &Self::Context) -> Tensor;
    /// The final norm, on whichever rows are wanted: `[R, H]` to `[R, H]`.
    fn norm(&self, hidden: &Tensor) -> Tensor;
}

/// What reads the last hidden states, with a backward pass of its own (so that it can go in chunks).
pub trait Head {
    /// Leaves that a loss is computed from.
    type Output;

    /// Which of the N tokens' hidden states are read: `[R]` indices.
    fn rows(&self, batch: &PackedRows) -> Tensor;
    /// From `[R, H]`; with `leaves`, the outputs are leaves that require a gradient.
    fn forward(&self, hidden: &Tensor, batch: &PackedRows, leaves: bool) -> Result<Self::Output>;
    /// Adds the head's weight gradients to their accumulators and returns the gradient of `hidden`.
    fn backward(&self, hidden: &Tensor, batch: &PackedRows, output: &Self::Output) -> Result<Tensor>;
}

/// The head's output without a graph.
pub fn forward<B: Backbone, H: Head>(model: &B, head: &H, batch: &PackedRows) -> Result<H::Output> {
    let _guard = tch::no_grad_guard();
    let context = model.context(batch);
    let mut hidden = model.embed(batch);
    for index in 0..model.num_layers() {
        hidden = model.layer(index, &hidden, batch, &context);
    }
    let wanted = model.norm(&hidden.index_select(0, &head.rows(batch)));
    head.forward(&wanted, batch, false)
}

/// Runs `loss` on the head's output and adds the gradients of every unit to its accumulators; returns the loss.
///
/// With `recompute` (activation checkpointing) a layer keeps only its input and runs again in the backward pass.
pub fn forward_backward<B: Backbone, H: Head>(
    model: &B,
    head: &H,
    batch: &PackedRows,
    recompute: bool,
    loss: impl FnOnce(&H::Output) -> Result<Tensor>,
) -> Result<f64> {
    let context = model.context(batch);
    let embedded = model.embed(batch);
    let mut hidden = embedded.detach();
    let mut saved: Vec<(Tensor, Option<Tensor>)> = Vec::with_capacity(model.num_layers());
    for index in 0..model.num_layers() {
        let input = hidden.detach().set_requires_grad(true);
        let run = || model.layer(index, &input, batch, &context);
        let output = if recompute { tch::no_grad(run) } else { run() };
        hidden = output.detach();
        saved.push((input, (!recompute).then_some(output)));
    }

    let last = hidden.detach().set_requires_grad(true);
    let wanted = model.norm(&last.index_select(0, &head.rows(batch)));
    let value = {
        let leaf = wanted.detach();
        let output = head.forward(&leaf, batch, true)?;
        let loss = loss(&output)?;
        loss.f_backward()?;
        let gradient = tch::no_grad(|| head.backward(&leaf, batch, &output))?;
        shim::backward_from(&wanted, &gradient)?;
        loss.double_value(&[])
    };

    let mut gradient = last.grad();
    while let Some((input, output)) = saved.pop() {
        let output = output.unwrap_or_else(|| model.layer(saved.len(), &input, batch, &context));
        shim::backward_from(&output, &gradient)?;
        gradient = input.grad();
    }
    shim::backward_from(&embedded, &gradient)?;
    Ok(value)
}
