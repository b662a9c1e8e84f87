//! AdamW on flat buffers, with clipping by the global gradient norm.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::aside::{Aside, in_host_memory};
use super::flat::{FlatUnit, ParamWithGrad};
use super::flat_weights::FlatWeights;
use super::pass::Units;
use super::sharding::Sharding;
use crate::error::{Error, Result};
use crate::memory::StateBytes;
use crate::role::Role;
use crate::shape::ModelShape;
use crate::shim::{self, AdamWStep};

/// AdamW's settings; the learning rate comes with each step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerConfig {
    pub betas: (f64, f64),
    pub eps: f64,
    pub weight_decay: f64,
    /// Gradients are scaled down to this global L2 norm; 0 leaves them.
    pub max_grad_norm: f64,
}

/// Weights, gradients and AdamW state of one role on one rank: all of it, or this rank's part.
pub struct TrainingState {
    role: Role,
    units: Vec<FlatUnit>,
    moments: Vec<Moments>,
    /// Optimizer steps taken.
    pub steps: u64,
    config: OptimizerConfig,
    sharding: Sharding,
    /// The unit whose gradients are on their way to their ranks.
    reducing: Option<usize>,
    head_units: Vec<usize>,
    /// Weights in host memory; with them are all moments, and gradients have no room.
    aside: Option<Aside>,
    /// Whether learning has the memory that it writes.
    pages_taken: bool,
}

/// What the optimizer keeps of its part of a unit.
struct Moments {
    /// Full-precision weights where the compute dtype is lower or they live in host memory; else the weights themselves.
    master: Option<Tensor>,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

/// The tensors of a training state by what they are; each has the shape of its parameter. Frozen parameters have weights
/// alone, in the compute dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatePart {
    Weights,
    ExpAvg,
    ExpAvgSq,
}

impl StatePart {
    /// All, in the order of a checkpoint.
    pub const ALL: [StatePart; 3] = [StatePart::Weights, StatePart::ExpAvg, StatePart::ExpAvgSq];

    fn name(self) -> &'static str {
        match self {
            StatePart::Weights => "weights",
            StatePart::ExpAvg => "exp_avg",
            StatePart::ExpAvgSq => "exp_avg_sq",
        }
    }
}

impl TrainingState {
    /// Lays the model out unit by unit; `load` gives each parameter by name.
    pub fn new(
        role: Role,
        shape: &ModelShape,
        config: OptimizerConfig,
        place: (Kind, Device),
        sharding: &Sharding,
        load: &mut dyn FnMut(&str) -> Result<Tensor>,
    ) -> Result<TrainingState> {
        TrainingState::laid_out(role, shape, config, place, (sharding, &[]), load)
    }

    /// A state whose frozen parameters are those of `base`, in the same memory and where that is; `base` counts it, moves it
    /// when it is set aside, and restores it. `load` gives the trained parameters by name.
    ///
    /// # Errors
    /// [`Error::Refused`]: parameters are divided over ranks (ZeRO stage 3), or `base` has other frozen parameters.
    pub fn with_base(
        base: &TrainingState,
        role: Role,
        shape: &ModelShape,
        config: OptimizerConfig,
        sharding: &Sharding,
        load: &mut dyn FnMut(&str) -> Result<Tensor>,
    ) -> Result<TrainingState> {
        let refused = |why: &str| Err(Error::Refused(format!("{role} and {} share frozen weights: {why}", base.role)));
        if sharding.parameters() || base.sharding.parameters() {
            return refused("they must be whole on every rank, and ZeRO stage 3 divides them: take stage 2 or less");
        }
        let frozen = |unit: &FlatUnit| unit.frozen.as_ref().map_or(Vec::new(), |frozen| frozen.shape.params.clone());
        let wanted = shape.units.iter().map(|unit| unit.split()[1].params.clone());
        if !wanted.eq(base.units.iter().map(frozen)) {
            return refused("they must freeze the same parameters of the same model");
        }
        let device = base.units[0].weights.whole.device();
        TrainingState::laid_out(role, shape, config, (base.compute_kind(), device), (sharding, &base.units), load)
    }

    fn laid_out(
        role: Role,
        shape: &ModelShape,
        config: OptimizerConfig,
        place: (Kind, Device),
        (sharding, base): (&Sharding, &[FlatUnit]),
        load: &mut dyn FnMut(&str) -> Result<Tensor>,
    ) -> Result<TrainingState> {
        let mut units = Vec::new();
        let mut moments = Vec::new();
        for (index, unit) in shape.units.iter().enumerate() {
            let flat = FlatUnit::new(unit, sharding, place, base.get(index), load)?;
            moments.push(Moments::new(&flat, sharding.offload, load)?);
            units.push(flat);
        }
        let head_units = shape.head_units();
        let sharding = sharding.clone();
        Ok(TrainingState {
            role,
            units,
            moments,
            steps: 0,
            config,
            sharding,
            reducing: None,
            head_units,
            aside: None,
            pages_taken: false,
        })
    }

    /// Every parameter by name: what the model is built from.
    pub fn params(&self) -> HashMap<String, ParamWithGrad> {
        self.units.iter().flat_map(FlatUnit::params).collect()
    }

    /// The dtype of what the optimizer keeps: f32, or f64 when computing in f64.
    pub fn kind(&self) -> Kind {
        self.units.first().map_or(Kind::Float, FlatUnit::accumulate_kind)
    }

    /// The dtype the passes compute in.
    pub fn compute_kind(&self) -> Kind {
        self.units.first().map_or(Kind::Float, FlatUnit::compute_kind)
    }

    pub fn sharding(&self) -> &Sharding {
        &self.sharding
    }

    /// # Errors
    /// What an operation in flight failed with.
    pub fn zero_grads(&mut self) -> Result<()> {
        self.reducing = None;
        self.units.iter_mut().try_for_each(FlatUnit::zero_grads)
    }

    /// Sums the gradients over ranks, clips them by their global norm, takes one AdamW step at `lr`, and clears them; gives
    /// the norm before clipping. Every rank calls this.
    ///
    /// # Errors
    /// [`Error::NonFinite`] when the norm is not finite; nothing has moved then, and the gradients are cleared (AR-11).
    pub fn step(&mut self, lr: f64) -> Result<f64> {
        let _guard = tch::no_grad_guard();
        self.finish_reduce()?;
        let grads: Vec<Tensor> = self.units.iter_mut().map(FlatUnit::summed_grads).collect::<Result<_>>()?;
        let grad_norm = self.norm_of(&grads)?;
        if !grad_norm.is_finite() {
            return Err(self.refuse("the gradient norm", grad_norm));
        }
        let limit = self.config.max_grad_norm;
        let scale = if limit > 0.0 { (limit / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
        self.steps += 1;
        for ((unit, moments), grads) in self.units.iter_mut().zip(&self.moments).zip(grads) {
            if scale < 1.0 {
                let _ = grads.shallow_clone().f_mul_scalar_(scale)?;
            }
            adamw(unit, moments, &grads, (self.steps, lr), &self.config)?;
            if let Some(master) = &moments.master {
                unit.weights.shard.f_copy_(master)?;
            }
            unit.weights.spread()?;
            unit.zero_grads()?;
        }
        Ok(grad_norm)
    }

    /// Refuses an optimizer step: what was accumulated is cleared.
    pub fn refuse(&mut self, what: &'static str, value: f64) -> Error {
        match self.zero_grads() {
            Ok(()) => Error::NonFinite { role: self.role, what, value, optimizer_step: self.steps + 1 },
            Err(error) => error,
        }
    }

    /// L2 norm over all ranks' parts.
    fn norm_of(&self, grads: &[Tensor]) -> Result<f64> {
        let mine: f64 = grads.iter().map(sum_of_squares).sum();
        let total = if self.sharding.optimizer() { self.sharding.group.sum("gradient norm", mine)? } else { mine };
        Ok(total.sqrt())
    }

    /// Learning begins: takes the memory that it will write, all at once, before it reads a zero of it.
    fn take_pages(&mut self) -> Result<()> {
        if self.pages_taken {
            return Ok(());
        }
        for (unit, moments) in self.units.iter().zip(&mut self.moments) {
            unit.take_pages()?;
            moments.tensors().try_for_each(|tensor| shim::take_pages(tensor))?;
        }
        self.pages_taken = true;
        Ok(())
    }

    fn finish_reduce(&mut self) -> Result<()> {
        self.reducing.take().map_or(Ok(()), |unit| self.units[unit].finish_reduce())
    }

    /// Names and shapes of the tensors that [`TrainingState::visit`] gives, in its order.
    pub fn names(&self, parts: &[StatePart]) -> Vec<(String, Vec<i64>)> {
        let mut names = Vec::new();
        for (unit, moments) in self.units.iter().zip(&self.moments) {
            for &part in parts {
                let params = moments.buffers(part, unit).flat_map(|(weights, _)| &weights.shape.params);
                names.extend(params.map(|param| (format!("{}.{}", part.name(), param.name), param.shape.clone())));
            }
        }
        names
    }

    /// Gives every tensor of the state, `<part>.<parameter>`, a unit at a time: whole, whoever keeps its parts. Every rank
    /// calls this, and gets the same.
    pub fn visit(&self, parts: &[StatePart], each: &mut dyn FnMut(&str, &Tensor) -> Result<()>) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for (unit, moments) in self.units.iter().zip(&self.moments) {
            for &part in parts {
                for (weights, kept) in moments.buffers(part, unit) {
                    let whole = weights.collect(kept)?;
                    for (index, param) in weights.shape.params.iter().enumerate() {
                        each(&format!("{}.{}", part.name(), param.name), &weights.view_of(&whole, index))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Of the model's [regions](ModelShape::by_region) the flat weights, and what this rank keeps of them in full precision.
    fn regions(&self) -> impl Iterator<Item = (&FlatWeights, &Tensor)> {
        let units = self.units.iter().zip(&self.moments);
        let buffers = units.flat_map(|(unit, moments)| moments.buffers(StatePart::Weights, unit));
        buffers.filter(|(weights, _)| weights.length() > 0)
    }

    pub fn num_regions(&self) -> usize {
        self.regions().count()
    }

    /// The weights that this rank hands on to others: of a region's flat buffer the `rank`-th of as many equal parts as there
    /// are ranks, whatever the stage. A view of the compute-dtype weights where those are of `kind`, else of those in full
    /// precision, where there are such.
    ///
    /// # Panics
    /// No such region.
    pub fn weights_part(&self, region: usize, kind: Kind) -> Tensor {
        let (weights, kept) = self.regions().nth(region).expect("a region of the model");
        let kept = if weights.whole.kind() == kind { &weights.shard } else { kept };
        let group = &self.sharding.group;
        let length = weights.length() / group.size() as i64;
        if kept.size()[0] == length {
            return kept.shallow_clone();
        }
        kept.narrow(0, group.rank() as i64 * length, length)
    }

    /// Every tensor of the state at once: views where this rank keeps them whole.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::new();
        self.visit(&StatePart::ALL, &mut |name, tensor| {
            tensors.push((name.to_string(), tensor.shallow_clone()));
            Ok(())
        })?;
        Ok(tensors)
    }

    /// Takes up the state that [`TrainingState::visit`] named; `load` gives each tensor by that name. Each rank reads its
    /// part alone.
    pub fn restore(&mut self, steps: u64, load: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for (unit, moments) in self.units.iter_mut().zip(&self.moments) {
            for part in StatePart::ALL {
                let mut named = |name: &str| load(&format!("{}.{name}", part.name()));
                let mut own = moments.buffers(part, unit).filter(|(weights, _)| !weights.is_borrowed());
                own.try_for_each(|(weights, kept)| weights.fill(kept, &mut named))?;
            }
            if let Some(master) = &moments.master {
                unit.weights.shard.f_copy_(master)?;
            }
            unit.weights.spread()?;
        }
        self.steps = steps;
        Ok(())
    }

    /// Brings every unit's whole weights here, for a use that is no pass; every rank calls this.
    pub fn gather_all(&mut self) -> Result<()> {
        for unit in 0..self.units.len() {
            if unit + 1 < self.units.len() {
                self.units[unit + 1].each_buffer(FlatWeights::prefetch)?;
            }
            self.units[unit].each_buffer(FlatWeights::gather)?;
        }
        Ok(())
    }

    /// Ends [`TrainingState::gather_all`].
    pub fn release_all(&mut self) -> Result<()> {
        self.units.iter_mut().try_for_each(|unit| unit.each_buffer(FlatWeights::release))
    }

    /// Moves what learning keeps to host memory, where a generator needs the device: moments, master weights and, with
    /// `weights`, those that passes compute with. Gradients hold nothing between steps: they have no room until then.
    pub fn set_aside(&mut self, weights: bool) -> Result<()> {
        if self.aside.is_some() {
            return Ok(());
        }
        let mut aside = Aside::default();
        for (unit, moments) in self.units.iter_mut().zip(&mut self.moments) {
            unit.drop_grads()?;
            if !self.sharding.offload {
                moments.tensors().try_for_each(|tensor| in_host_memory(tensor).map(|host| *tensor = host))?;
            }
            if weights {
                let mut own = unit.buffers().filter(|weights| !weights.is_borrowed());
                own.try_for_each(|weights| aside.take(weights.kept()))?;
            }
        }
        self.aside = Some(aside);
        Ok(())
    }

    /// Ends [`TrainingState::set_aside`], if there was one.
    pub fn bring_back(&mut self) -> Result<()> {
        let Some(mut aside) = self.aside.take() else { return Ok(()) };
        aside.bring_back()?;
        for (unit, moments) in self.units.iter_mut().zip(&mut self.moments) {
            if !self.sharding.offload {
                let device = unit.weights.whole.device();
                moments.tensors().try_for_each(|tensor| tensor.f_to_device(device).map(|back| *tensor = back))?;
            }
            unit.take_grads_up()?;
        }
        self.pages_taken = false;
        Ok(())
    }

    /// Bytes of weights, gradients, master copy and moments that this rank keeps between passes.
    pub fn bytes(&self) -> usize {
        self.bytes_by_part().total() as usize
    }

    /// [`TrainingState::bytes`], each part for itself.
    pub fn bytes_by_part(&self) -> StateBytes {
        self.bytes_where(&|_| true)
    }

    /// The same of what is on the device that the model computes on: what is offloaded is not.
    pub fn device_bytes_by_part(&self) -> StateBytes {
        let device = self.units.first().map(|unit| unit.weights.whole.device());
        self.bytes_where(&|tensor| Some(tensor.device()) == device)
    }

    fn bytes_where(&self, counts: &dyn Fn(&Tensor) -> bool) -> StateBytes {
        let of = |tensor: &Tensor| if counts(tensor) { bytes_of(tensor) as u64 } else { 0 };
        let mut bytes = StateBytes::default();
        for (unit, moments) in self.units.iter().zip(&self.moments) {
            let (weights, gradients) = unit.bytes();
            bytes.weights += weights as u64;
            bytes.gradients += gradients as u64;
            bytes.master += moments.master.as_ref().map_or(0, of);
            bytes.moments += of(&moments.exp_avg) + of(&moments.exp_avg_sq);
        }
        bytes
    }
}

impl Units for TrainingState {
    fn head_units(&self) -> &[usize] {
        &self.head_units
    }

    fn prefetch(&mut self, unit: usize) -> Result<()> {
        self.units[unit].each_buffer(FlatWeights::prefetch)
    }

    fn gather(&mut self, unit: usize) -> Result<()> {
        self.sharding.group.made_progress();
        self.units[unit].each_buffer(FlatWeights::gather)
    }

    fn release(&mut self, unit: usize) -> Result<()> {
        self.units[unit].each_buffer(FlatWeights::release)
    }

    fn open_grads(&mut self, unit: usize) -> Result<()> {
        self.take_pages()?;
        if self.reducing == Some(unit) {
            self.finish_reduce()?; // of the micro-batch before
        }
        self.units[unit].open_grads()
    }

    fn reduce(&mut self, unit: usize) -> Result<()> {
        self.finish_reduce()?;
        self.units[unit].reduce()?;
        self.reducing = Some(unit);
        Ok(())
    }

    fn agree(&self, passes: usize) -> Result<usize> {
        let together = self.sharding.gradients();
        Ok(if together { self.sharding.group.max("micro-batches", passes as i64)? as usize } else { passes })
    }

    fn any_stops(&self, stop: bool) -> Result<bool> {
        if self.sharding.gradients() { self.sharding.group.any("stop", stop) } else { Ok(stop) }
    }

    fn set_aside(&mut self) -> Result<()> {
        TrainingState::set_aside(self, true)
    }

    fn bring_back(&mut self) -> Result<()> {
        TrainingState::bring_back(self)
    }

    fn at_micro_batch(&self, number: usize) {
        self.sharding.group.at_micro_batch(number as u64);
    }
}

impl Moments {
    fn new(unit: &FlatUnit, offload: bool, load: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<Moments> {
        let (part, kind, device) = (unit.weights.part(), unit.accumulate_kind(), unit.weights.whole.device());
        let on_host = offload && device != Device::Cpu;
        let length = part.end - part.start;
        let zeros = || -> Result<Tensor> {
            match on_host {
                true => Ok(shim::pinned_zeros(&[length], kind)?),
                false => Ok(shim::zeros_on_demand(length, kind, device)?),
            }
        };
        let master = if on_host || unit.weights.whole.kind() != kind {
            let master = zeros()?;
            unit.weights.fill(&master, load)?;
            Some(master)
        } else {
            None
        };
        Ok(Moments { master, exp_avg: zeros()?, exp_avg_sq: zeros()? })
    }

    fn tensors(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.master.iter_mut().chain([&mut self.exp_avg, &mut self.exp_avg_sq])
    }

    /// The buffers of a unit that have a part of the state, and what this rank keeps of it.
    fn buffers<'a>(
        &'a self,
        part: StatePart,
        unit: &'a FlatUnit,
    ) -> impl Iterator<Item = (&'a FlatWeights, &'a Tensor)> {
        let frozen = unit.frozen.iter().filter(move |_| part == StatePart::Weights);
        std::iter::once((&unit.weights, self.part(part, unit))).chain(frozen.map(|frozen| (frozen, frozen.kept())))
    }

    fn part<'a>(&'a self, part: StatePart, unit: &'a FlatUnit) -> &'a Tensor {
        match part {
            StatePart::Weights => self.master.as_ref().unwrap_or(&unit.weights.shard),
            StatePart::ExpAvg => &self.exp_avg,
            StatePart::ExpAvgSq => &self.exp_avg_sq,
        }
    }
}

fn bytes_of(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// Of a flat tensor, in f64 over the norms of short pieces: one f32 sum over an embedding's 28 million squares is off by
/// parts in ten thousand.
fn sum_of_squares(flat: &Tensor) -> f64 {
    const PIECE: i64 = 1 << 9;
    let whole = flat.size()[0] / PIECE * PIECE;
    let pieces = flat.narrow(0, 0, whole).view([-1, PIECE]).norm_scalaropt_dim(2.0, [1i64].as_slice(), false);
    let rest = flat.narrow(0, whole, flat.size()[0] - whole).norm();
    let squares = pieces.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
    squares + rest.double_value(&[]).powi(2)
}

/// Where the moments live; two calls at most: weight decay spares vectors, which stand after the matrices.
fn adamw(
    unit: &FlatUnit,
    moments: &Moments,
    grads: &Tensor,
    (step, lr): (u64, f64),
    config: &OptimizerConfig,
) -> Result<()> {
    let weights = moments.part(StatePart::Weights, unit);
    let device = weights.device();
    let (grads, step) = (grads.f_to_device(device)?, Tensor::from(step as f32).f_to_device(device)?);
    let length = grads.size()[0];
    let split = if config.weight_decay == 0.0 { 0 } else { unit.weights.decayed_in_part() };
    for (start, end, weight_decay) in [(0, split, config.weight_decay), (split, length, 0.0)] {
        if end > start {
            let part = |flat: &Tensor| flat.narrow(0, start, end - start);
            let with = AdamWStep { lr, betas: config.betas, eps: config.eps, weight_decay };
            let (exp_avg, exp_avg_sq) = (part(&moments.exp_avg), part(&moments.exp_avg_sq));
            shim::fused_adamw(&part(weights), &part(&grads), &exp_avg, &exp_avg_sq, &step, with)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_of_many_numbers_is_as_exact_as_of_few() {
        for length in [5, 1 << 9, 3_000_001] {
            let flat = Tensor::full([length], 0.1, tch::kind::FLOAT_CPU);
            let exact = length as f64 * f64::from(0.1f32).powi(2);
            let relative = (sum_of_squares(&flat) - exact).abs() / exact;
            assert!(relative < 2e-6, "{length}: {relative:e}");
        }
    }
}
