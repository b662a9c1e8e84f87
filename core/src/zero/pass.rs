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
    fn embed(&self, batch: &PackedRows) -> Result<Tensor>;
    /// `[N, H]` to `[N, H]`.
    fn layer(&self, index: usize, hidden: &Tensor, batch: &PackedRows, context: &Self::Context) -> Result<Tensor>;
    /// The final norm, on whichever rows are wanted: `[R, H]` to `[R, H]`.
    fn norm(&self, hidden: &Tensor) -> Tensor;
    /// Whether any of the ranks that share each layer wants to stop; `stop` is this one's wish. They stop together.
    fn any_stops(&self, stop: bool) -> Result<bool> {
        Ok(stop)
    }
}

/// What reads the last hidden states, with a backward pass of its own (so that it can go in chunks).
pub trait Head {
    /// Leaves that a loss is computed from.
    type Output;

    /// Which of the N tokens' hidden states are read: `[R]` indices.
    fn rows(&self, batch: &PackedRows) -> Tensor;
    /// From `[R, H]`; with `leaves`, the outputs are leaves that require a gradient.
    fn forward(&self, hidden: &Tensor, batch: &PackedRows, leaves: bool) -> Result<Self::Output>;
    /// Adds the gradients of the head's trained weights to their accumulators and returns the gradient of `hidden`.
    fn backward(&self, hidden: &Tensor, batch: &PackedRows, output: &Self::Output) -> Result<Tensor>;
}

/// What a pass does to the units it goes through: nothing where they are whole, which is what the defaults do, collectives
/// where they are divided. Unit 0 is the embedding, unit i + 1 layer i, the last the final norm with the head.
pub trait Units {
    /// The units that norm and head read.
    fn head_units(&self) -> &[usize] {
        &[]
    }
    /// Begins to bring a unit's weights.
    fn prefetch(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
    /// A unit's weights are here when this returns.
    fn gather(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
    fn release(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
    /// Room for a unit's gradients is here when this returns.
    fn open_grads(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
    /// All gradients of a unit are there.
    fn reduce(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
    /// How many passes all ranks make when this one has `passes` (AR-21).
    fn agree(&self, passes: usize) -> Result<usize> {
        Ok(passes)
    }
    /// Whether any rank wants to stop before the next pass; `stop` is this one's wish. They stop together.
    fn any_stops(&self, stop: bool) -> Result<bool> {
        Ok(stop)
    }
    /// A pass over this micro-batch begins, numbered from 1; 0 when the last one is over. Those who wait are told.
    fn at_micro_batch(&self, _number: usize) {}
    /// Moves what is kept between passes from the device to host memory: there is no pass until it was brought back.
    fn set_aside(&mut self) -> Result<()> {
        Ok(())
    }
    /// Ends [`Units::set_aside`], if there was one.
    fn bring_back(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A model that is whole on this rank and does not learn.
#[derive(Debug)]
pub struct WholeModel;

impl Units for WholeModel {}

/// The head's output without a graph, of a model that is whole on this rank.
pub fn forward<B: Backbone, H: Head>(model: &B, head: &H, batch: &PackedRows) -> Result<H::Output> {
    forward_units(&mut WholeModel, (model, head), batch)
}

/// The head's output without a graph.
pub fn forward_units<B: Backbone, H: Head>(
    units: &mut dyn Units,
    (model, head): (&B, &H),
    batch: &PackedRows,
) -> Result<H::Output> {
    let _guard = tch::no_grad_guard();
    let layers = model.num_layers();
    let context = model.context(batch);
    let mut hidden = through(units, 0, 1, |_| model.embed(batch))?;
    for index in 0..layers {
        hidden = through(units, index + 1, index + 2, |_| model.layer(index, &hidden, batch, &context))?;
    }
    gather_head(units)?;
    let wanted = model.norm(&hidden.index_select(0, &head.rows(batch)));
    let output = head.forward(&wanted, batch, false);
    release_head(units)?;
    output
}

/// Runs `loss` on the head's output and adds the gradients of every unit to its accumulators; returns the loss.
///
/// With `recompute` (activation checkpointing) a layer keeps only its input and runs again in the backward pass.
pub fn forward_backward<B: Backbone, H: Head>(
    units: &mut dyn Units,
    (model, head): (&B, &H),
    batch: &PackedRows,
    recompute: bool,
    loss: impl FnOnce(&H::Output) -> Result<Tensor>,
) -> Result<f64> {
    let layers = model.num_layers();
    let context = model.context(batch);
    let embedded = through(units, 0, 1, |_| model.embed(batch))?;
    let mut hidden = embedded.detach();
    let mut saved: Vec<(Tensor, Option<Tensor>)> = Vec::with_capacity(layers);
    for index in 0..layers {
        let input = hidden.detach().set_requires_grad(true);
        let run = |_: &mut dyn Units| model.layer(index, &input, batch, &context);
        let run = |units: &mut dyn Units| if recompute { tch::no_grad(|| run(units)) } else { run(units) };
        let output = through(units, index + 1, index + 2, run)?;
        hidden = output.detach();
        saved.push((input, (!recompute).then_some(output)));
    }

    let (value, mut gradient) = through_head(units, (model, head), batch, &hidden, loss)?;
    units.reduce(layers + 1)?;
    while let Some((input, output)) = saved.pop() {
        let index = saved.len();
        units.gather(index + 1)?;
        if index > 0 {
            units.prefetch(index)?;
        }
        units.open_grads(index + 1)?;
        let output = output.map_or_else(|| model.layer(index, &input, batch, &context), Ok)?;
        shim::backward_from(&output, &gradient)?;
        drop(output);
        gradient = input.grad();
        units.release(index + 1)?;
        units.reduce(index + 1)?;
    }
    units.open_grads(0)?;
    if embedded.requires_grad() {
        shim::backward_from(&embedded, &gradient)?; // a frozen embedding does not
    }
    units.reduce(0)?;
    Ok(value)
}

/// The loss on the head's output, and the gradient of what went into the final norm; the head's units have theirs added.
fn through_head<B: Backbone, H: Head>(
    units: &mut dyn Units,
    (model, head): (&B, &H),
    batch: &PackedRows,
    hidden: &Tensor,
    loss: impl FnOnce(&H::Output) -> Result<Tensor>,
) -> Result<(f64, Tensor)> {
    let last = hidden.detach().set_requires_grad(true);
    gather_head(units)?;
    for &unit in &units.head_units().to_vec() {
        units.open_grads(unit)?;
    }
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
    release_head(units)?;
    Ok((value, last.grad()))
}

/// The collectives of a pass without its work: for a rank that has no micro-batch left while others have.
pub fn idle_pass(units: &mut dyn Units, layers: usize, learn: bool) -> Result<()> {
    for unit in 0..=layers {
        through(units, unit, unit + 1, |_| Ok(()))?;
    }
    gather_head(units)?;
    let head_units = units.head_units().to_vec();
    release_head(units)?;
    if !learn {
        return Ok(());
    }
    for unit in head_units {
        units.open_grads(unit)?;
    }
    units.reduce(layers + 1)?;
    for unit in (1..=layers).rev() {
        units.gather(unit)?;
        if unit > 1 {
            units.prefetch(unit - 1)?;
        }
        units.open_grads(unit)?;
        units.release(unit)?;
        units.reduce(unit)?;
    }
    units.open_grads(0)?;
    units.reduce(0)
}

/// Runs one unit with its weights here, and the next one's on their way.
fn through<T>(
    units: &mut dyn Units,
    unit: usize,
    next: usize,
    run: impl FnOnce(&mut dyn Units) -> Result<T>,
) -> Result<T> {
    units.gather(unit)?;
    units.prefetch(next)?;
    let output = run(units)?;
    units.release(unit)?;
    Ok(output)
}

fn gather_head(units: &mut dyn Units) -> Result<()> {
    units.head_units().to_vec().into_iter().try_for_each(|unit| units.gather(unit))
}

fn release_head(units: &mut dyn Units) -> Result<()> {
    units.head_units().to_vec().into_iter().try_for_each(|unit| units.release(unit))
}
