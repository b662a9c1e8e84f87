//! One layer unit as flat buffers, whole on every rank or a part on each.

use std::collections::HashMap;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::sharding::Sharding;
use crate::collective::{allocate_storage, free_storage, unversioned};
use crate::error::Result;
use crate::process_group::{Parts, Pending};
use crate::shape::UnitShape;
use crate::shim;

/// Tensors begin on 64-byte boundaries of f32; the same element grid serves every dtype.
const ALIGNMENT: i64 = 16;

/// A parameter and where its gradient is accumulated.
#[derive(Debug)]
pub struct ParamWithGrad {
    /// In the compute dtype; a leaf that requires a gradient.
    pub weight: Tensor,
    /// Same shape, in the accumulation dtype.
    pub grad: Tensor,
}

impl ParamWithGrad {
    pub fn shallow_clone(&self) -> ParamWithGrad {
        ParamWithGrad { weight: self.weight.shallow_clone(), grad: self.grad.shallow_clone() }
    }
}

/// The flat weights and gradients of one unit, with the views that a model computes on.
///
/// A buffer that is not whole on every rank all the time has memory only while it is needed; its views stay valid.
pub struct FlatUnit {
    pub shape: UnitShape,
    /// Compute dtype, all of the unit; without memory while a sharded unit is released.
    pub weights: Tensor,
    /// Compute dtype, this rank's part: a view of `weights` unless parameters are sharded.
    pub weights_shard: Tensor,
    /// Accumulation dtype (f32, or f64 when computing in f64), all of the unit; without memory between backward passes
    /// when gradients are sharded.
    grads: Tensor,
    /// Accumulation dtype, this rank's part, when gradients are sharded.
    grads_shard: Option<Tensor>,
    sharding: Sharding,
    /// Elements that weight decay applies to; they stand first.
    decayed: i64,
    offsets: Vec<i64>,
    views: Vec<ParamWithGrad>,
    resident: bool,
    gathering: Option<Pending>,
    grads_open: bool,
    reducing: Option<Parts>,
}

impl FlatUnit {
    /// Lays a unit out and fills it: `load` gives each parameter by name, in any dtype, on any device. Only what this
    /// rank keeps is read.
    pub fn new(
        shape: &UnitShape,
        sharding: &Sharding,
        (kind, device): (Kind, Device),
        load: &mut dyn FnMut(&str) -> Result<Tensor>,
    ) -> Result<FlatUnit> {
        let (offsets, decayed, length) = layout(shape, sharding.group.size() as i64);
        let accumulate = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let weights = Tensor::f_empty([length], (kind, device))?;
        let part = sharding.part_of(length);
        let weights_shard = if sharding.parameters() {
            Tensor::f_zeros([part.end - part.start], (kind, device))?
        } else {
            tch::no_grad(|| weights.shallow_clone().f_zero_())?.narrow(0, part.start, part.end - part.start)
        };
        let (grads, grads_shard) = if sharding.gradients() {
            let grads = Tensor::f_empty([length], (accumulate, device))?;
            (grads, Some(shim::zeros_on_demand(part.end - part.start, accumulate, device)?))
        } else {
            (shim::zeros_on_demand(length, accumulate, device)?, None)
        };
        let mut unit = FlatUnit {
            shape: shape.clone(),
            weights,
            weights_shard,
            grads,
            grads_shard,
            sharding: sharding.clone(),
            decayed,
            offsets,
            views: Vec::new(),
            resident: !sharding.parameters(),
            gathering: None,
            grads_open: !sharding.gradients(),
            reducing: None,
        };
        unit.make_views()?;
        if unit.sharding.parameters() {
            free_storage(&unit.weights)?;
        }
        if unit.sharding.gradients() {
            free_storage(&unit.grads)?;
        }
        if unit.sharding.parameters() {
            unit.fill(&unit.weights_shard, &part, load)?;
        } else {
            unit.fill(&unit.weights, &(0..length), load)?;
        }
        Ok(unit)
    }

    fn make_views(&mut self) -> Result<()> {
        for (param, &offset) in self.shape.params.iter().zip(&self.offsets) {
            let view = |flat: &Tensor| flat.narrow(0, offset, param.numel()).view(param.shape.as_slice());
            let weight = view(&self.weights).detach().set_requires_grad(true);
            let grad = view(&self.grads);
            if self.grads.kind() == self.weights.kind() {
                shim::set_grad(&weight, &grad)?;
            }
            self.views.push(ParamWithGrad { weight, grad });
        }
        Ok(())
    }

    /// Copies the parameters into `flat`, which holds the elements `part` of the unit.
    pub fn fill(&self, flat: &Tensor, part: &Range<i64>, load: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for (param, &offset) in self.shape.params.iter().zip(&self.offsets) {
            let (begin, end) = (offset.max(part.start), (offset + param.numel()).min(part.end));
            if begin < end {
                let source = load(&param.name)?.f_reshape([-1])?.f_narrow(0, begin - offset, end - begin)?;
                flat.narrow(0, begin - part.start, end - begin).f_copy_(&source)?;
            }
        }
        Ok(())
    }

    /// Every parameter by name.
    pub fn params(&self) -> HashMap<String, ParamWithGrad> {
        self.shape.params.iter().zip(&self.views).map(|(p, view)| (p.name.clone(), view.shallow_clone())).collect()
    }

    /// The elements of the unit that this rank's optimizer owns.
    pub fn part(&self) -> Range<i64> {
        self.sharding.part_of(self.weights.size()[0])
    }

    pub fn length(&self) -> i64 {
        self.weights.size()[0]
    }

    pub fn accumulate_kind(&self) -> Kind {
        self.grads.kind()
    }

    /// How many of the first elements of [`FlatUnit::part`] weight decay applies to.
    pub fn decayed_in_part(&self) -> i64 {
        let part = self.part();
        (self.decayed - part.start).clamp(0, part.end - part.start)
    }

    /// Begins to bring the whole weights here.
    pub fn prefetch(&mut self) -> Result<()> {
        if self.resident || self.gathering.is_some() {
            return Ok(());
        }
        allocate_storage(&self.weights)?;
        let operation = format!("gather {}", self.shape.name);
        let whole = unversioned(&self.weights)?;
        self.gathering = Some(self.sharding.group.start_all_gather(&operation, &whole, &self.weights_shard)?);
        Ok(())
    }

    /// The whole weights are here when this returns.
    pub fn gather(&mut self) -> Result<()> {
        self.prefetch()?;
        if let Some(gathering) = self.gathering.take() {
            gathering.wait()?;
            self.resident = true;
        }
        Ok(())
    }

    /// Gives the whole weights' memory back.
    pub fn release(&mut self) -> Result<()> {
        if self.sharding.parameters() && self.resident {
            free_storage(&self.weights)?;
            self.resident = false;
        }
        Ok(())
    }

    /// Makes room for the gradients of a backward pass.
    pub fn open_grads(&mut self) -> Result<()> {
        if !self.grads_open {
            allocate_storage(&self.grads)?;
            let _ = unversioned(&self.grads)?.f_zero_()?;
            self.grads_open = true;
        }
        Ok(())
    }

    /// The unit's backward pass is over: begins to hand every rank its part of the gradients, where they are sharded.
    pub fn reduce(&mut self) -> Result<()> {
        self.absorb()?;
        if self.sharding.gradients() {
            let operation = format!("reduce {}", self.shape.name);
            self.reducing = Some(self.sharding.group.start_reduce_scatter(&operation, &self.grads)?);
        }
        Ok(())
    }

    /// Adds this rank's part of what [`FlatUnit::reduce`] began to what it has accumulated.
    pub fn finish_reduce(&mut self) -> Result<()> {
        if let (Some(parts), Some(shard)) = (self.reducing.take(), &mut self.grads_shard) {
            let part = parts.sum()?;
            let _ = tch::no_grad(|| shard.f_add_(&part))?;
            free_storage(&self.grads)?;
            self.grads_open = false;
        }
        Ok(())
    }

    /// Adds gradients that a lower-precision backward left on the leaves to the accumulated ones.
    fn absorb(&mut self) -> Result<()> {
        if self.weights.kind() == self.grads.kind() {
            return Ok(()); // the backward pass already added in place
        }
        let _guard = tch::no_grad_guard();
        for view in &mut self.views {
            let grad = view.weight.grad();
            if grad.defined() {
                let _ = view.grad.f_add_(&grad.f_to_kind(view.grad.kind())?)?;
                shim::clear_grad(&view.weight)?;
            }
        }
        Ok(())
    }

    /// This rank's part of the gradients summed over ranks; where they are whole on every rank, they are summed here.
    pub fn summed_grads(&mut self) -> Result<Tensor> {
        let group = &self.sharding.group;
        if let Some(shard) = &self.grads_shard {
            return Ok(shard.shallow_clone());
        }
        let operation = format!("reduce {}", self.shape.name);
        if self.sharding.optimizer() {
            let sum = group.start_reduce_scatter(&operation, &self.grads)?.sum()?;
            // Where this rank's own part stood: the sum is a view of all that was received, which can go now.
            let part = self.part();
            let mut own = self.grads.narrow(0, part.start, part.end - part.start);
            tch::no_grad(|| own.f_copy_(&sum))?;
            return Ok(own);
        }
        group.all_reduce_sum(&operation, &self.grads)?;
        Ok(self.grads.shallow_clone())
    }

    /// After the optimizer moved this rank's part of the weights: brings the others' parts, where weights are whole.
    pub fn spread_weights(&mut self) -> Result<()> {
        if self.sharding.optimizer() && !self.sharding.parameters() {
            let operation = format!("spread {}", self.shape.name);
            let whole = unversioned(&self.weights)?;
            self.sharding.group.start_all_gather(&operation, &whole, &self.weights_shard)?.wait()?;
        }
        Ok(())
    }

    /// Clears what was accumulated. Operations in flight are waited for.
    pub fn zero_grads(&mut self) -> Result<()> {
        self.finish_reduce()?;
        let _guard = tch::no_grad_guard();
        match &mut self.grads_shard {
            Some(shard) => drop(shard.f_zero_()?),
            None => drop(self.grads.f_zero_()?),
        }
        Ok(())
    }

    /// The part of a flat buffer laid out like this unit that belongs to parameter `index`, in its shape.
    pub fn view_of(&self, flat: &Tensor, index: usize) -> Tensor {
        let param = &self.shape.params[index];
        flat.narrow(0, self.offsets[index], param.numel()).view(param.shape.as_slice())
    }

    /// All of a flat buffer of which each rank has its part; every rank calls this.
    pub fn whole(&self, shard: &Tensor) -> Result<Tensor> {
        if shard.size()[0] == self.length() {
            return Ok(shard.shallow_clone());
        }
        let whole = Tensor::f_empty([self.length()], (shard.kind(), shard.device()))?;
        let operation = format!("collect {}", self.shape.name);
        self.sharding.group.start_all_gather(&operation, &whole, &shard.contiguous())?.wait()?;
        Ok(whole)
    }

    /// Bytes of weights and of gradients that stay between passes.
    pub fn bytes(&self) -> (usize, usize) {
        let of = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        let weights = if self.sharding.parameters() { of(&self.weights_shard) } else { of(&self.weights) };
        (weights, self.grads_shard.as_ref().map_or_else(|| of(&self.grads), of))
    }
}

/// Offsets per parameter, elements of the matrices' part, and length, a multiple of the world size. Matrices first: weight
/// decay spares vectors.
fn layout(shape: &UnitShape, world_size: i64) -> (Vec<i64>, i64, i64) {
    let aligned = |length: i64, to: i64| (length + to - 1) / to * to;
    let mut offsets = vec![0; shape.params.len()];
    let mut end = 0;
    let mut decayed = 0;
    for matrices in [true, false] {
        for (index, param) in shape.params.iter().enumerate() {
            if (param.shape.len() > 1) == matrices {
                offsets[index] = end;
                end += aligned(param.numel(), ALIGNMENT);
            }
        }
        if matrices {
            decayed = end;
        }
    }
    (offsets, decayed, aligned(end, ALIGNMENT * world_size))
}
