//! One layer unit that learns: flat weights, and gradients whole on every rank or a part on each. Parameters that training
//! leaves are in a buffer of their own, which has no gradients.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::flat_weights::FlatWeights;
use super::sharding::Sharding;
use crate::collective::{allocate_storage, free_storage, unversioned};
use crate::error::Result;
use crate::process_group::Parts;
use crate::shape::{ParamShape, UnitShape};
use crate::shim;

/// A parameter and where its gradient is accumulated.
#[derive(Debug)]
pub struct ParamWithGrad {
    /// In the compute dtype; a leaf that requires a gradient where it is trained.
    pub weight: Tensor,
    /// Same shape, in the accumulation dtype; a frozen parameter has none.
    pub grad: Option<Tensor>,
}

impl ParamWithGrad {
    pub fn shallow_clone(&self) -> ParamWithGrad {
        ParamWithGrad { weight: self.weight.shallow_clone(), grad: self.grad.as_ref().map(Tensor::shallow_clone) }
    }
}

/// The flat weights and gradients of one unit, with the views that a model computes on.
///
/// A buffer that is not whole on every rank all the time has memory only while it is needed; its views stay valid.
pub struct FlatUnit {
    /// The trained parameters, in the compute dtype; there may be none.
    pub weights: FlatWeights,
    /// The others, where there are any, in the compute dtype.
    pub frozen: Option<FlatWeights>,
    /// Accumulation dtype (f32, or f64 when computing in f64), all of the unit; without memory between backward passes
    /// when gradients are sharded.
    grads: Tensor,
    /// Accumulation dtype, this rank's part, when gradients are sharded.
    grads_shard: Option<Tensor>,
    sharding: Sharding,
    views: Views,
    grads_open: bool,
    reducing: Option<Parts>,
}

impl FlatUnit {
    /// Lays a unit out and fills it: `load` gives each parameter by name, in any dtype, on any device. Only what this
    /// rank keeps is read. The frozen parameters may be those of `base`, in its memory.
    pub fn new(
        shape: &UnitShape,
        sharding: &Sharding,
        (kind, device): (Kind, Device),
        base: Option<&FlatUnit>,
        load: &mut dyn FnMut(&str) -> Result<Tensor>,
    ) -> Result<FlatUnit> {
        let [shape, frozen] = shape.split();
        let (frozen, frozen_views) = frozen_weights(&frozen, sharding, (kind, device), base, load)?;
        // Where nothing is trained there is nothing to divide, and no collective.
        let sharding = if shape.params.is_empty() { Sharding::whole() } else { sharding.clone() };
        let mut weights = FlatWeights::new(&shape, &sharding, (kind, device))?;
        let (length, part) = (weights.length(), weights.part());
        let accumulate = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let (grads, grads_shard) = if sharding.gradients() {
            let grads = Tensor::f_empty([length], (accumulate, device))?;
            (grads, Some(shim::zeros_on_demand(part.end - part.start, accumulate, device)?))
        } else {
            (shim::zeros_on_demand(length, accumulate, device)?, None)
        };
        let mut views = views_of(&weights, &grads)?;
        views.extend(frozen_views);
        if sharding.gradients() {
            free_storage(&grads)?;
        }
        weights.load(load)?;
        Ok(FlatUnit {
            weights,
            frozen,
            grads,
            grads_shard,
            grads_open: !sharding.gradients(),
            sharding,
            views,
            reducing: None,
        })
    }

    /// Every parameter by name.
    pub fn params(&self) -> HashMap<String, ParamWithGrad> {
        self.views.iter().map(|(name, view)| (name.clone(), view.shallow_clone())).collect()
    }

    /// Trained and frozen weights.
    pub fn buffers(&self) -> impl Iterator<Item = &FlatWeights> {
        std::iter::once(&self.weights).chain(&self.frozen)
    }

    /// Does the same to trained and frozen weights.
    pub fn each_buffer(&mut self, act: impl FnMut(&mut FlatWeights) -> Result<()>) -> Result<()> {
        std::iter::once(&mut self.weights).chain(&mut self.frozen).try_for_each(act)
    }

    pub fn compute_kind(&self) -> Kind {
        self.weights.whole.kind()
    }

    pub fn accumulate_kind(&self) -> Kind {
        self.grads.kind()
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

    /// Takes the memory of gradients that stay between passes.
    pub fn take_pages(&self) -> Result<()> {
        match (&self.grads_shard, self.grads_open) {
            (Some(shard), _) => Ok(shim::take_pages(shard)?),
            (None, true) => Ok(shim::take_pages(&self.grads)?),
            (None, false) => Ok(()),
        }
    }

    /// The unit's backward pass is over: begins to hand every rank its part of the gradients, where they are sharded.
    pub fn reduce(&mut self) -> Result<()> {
        self.absorb()?;
        if self.sharding.gradients() {
            let operation = format!("reduce {}", self.weights.shape.name);
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
        if self.weights.whole.kind() == self.grads.kind() {
            return Ok(()); // the backward pass already added in place
        }
        let _guard = tch::no_grad_guard();
        for (_, ParamWithGrad { weight, grad }) in &mut self.views {
            let found = weight.grad();
            if let (Some(grad), true) = (grad, found.defined()) {
                let _ = grad.f_add_(&found.f_to_kind(grad.kind())?)?;
                shim::clear_grad(weight)?;
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
        let operation = format!("reduce {}", self.weights.shape.name);
        if self.sharding.optimizer() {
            let sum = group.start_reduce_scatter(&operation, &self.grads)?.sum()?;
            // Where this rank's own part stood: the sum is a view of all that was received, which can go now.
            let part = self.weights.part();
            let mut own = self.grads.narrow(0, part.start, part.end - part.start);
            tch::no_grad(|| own.f_copy_(&sum))?;
            return Ok(own);
        }
        group.all_reduce_sum(&operation, &self.grads)?;
        Ok(self.grads.shallow_clone())
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

    /// Gives the gradients' memory back between steps, when they hold nothing. On a CPU gradients that are whole keep it.
    pub fn drop_grads(&mut self) -> Result<()> {
        match &mut self.grads_shard {
            Some(shard) => *shard = Tensor::f_empty([0], (shard.kind(), shard.device()))?,
            None if self.grads.device() != Device::Cpu => free_storage(&self.grads)?,
            None => {}
        }
        Ok(())
    }

    /// Room for them again.
    pub fn take_grads_up(&mut self) -> Result<()> {
        let (kind, device, part) = (self.grads.kind(), self.grads.device(), self.weights.part());
        match &mut self.grads_shard {
            Some(shard) => *shard = shim::zeros_on_demand(part.end - part.start, kind, device)?,
            None if device != Device::Cpu => {
                allocate_storage(&self.grads)?;
                let _ = unversioned(&self.grads)?.f_zero_()?;
            }
            None => {}
        }
        Ok(())
    }

    /// Bytes of weights and of gradients that stay between passes.
    pub fn bytes(&self) -> (usize, usize) {
        let grads = self.grads_shard.as_ref().unwrap_or(&self.grads);
        (self.buffers().map(FlatWeights::bytes).sum(), grads.numel() * grads.kind().elt_size_in_bytes())
    }
}

type Views = Vec<(String, ParamWithGrad)>;

/// A unit's frozen weights, loaded or those of `base`, and every parameter as a tensor without a gradient.
fn frozen_weights(
    shape: &UnitShape,
    sharding: &Sharding,
    place: (Kind, Device),
    base: Option<&FlatUnit>,
    load: &mut dyn FnMut(&str) -> Result<Tensor>,
) -> Result<(Option<FlatWeights>, Views)> {
    if shape.params.is_empty() {
        return Ok((None, Vec::new()));
    }
    let mut weights = match base.and_then(|base| base.frozen.as_ref()) {
        Some(frozen) => frozen.borrowed(),
        None => FlatWeights::new(shape, sharding, place)?,
    };
    let named = |(param, view): (&ParamShape, Tensor)| {
        (param.name.clone(), ParamWithGrad { weight: view.detach(), grad: None })
    };
    let views = shape.params.iter().zip(weights.views()).map(named).collect();
    if !weights.is_borrowed() {
        weights.load(load)?;
    }
    Ok((Some(weights), views))
}

/// Every parameter as a leaf over the flat weights, with its place in the flat gradients.
fn views_of(weights: &FlatWeights, grads: &Tensor) -> Result<Views> {
    let leaf = |(index, weight): (usize, Tensor)| {
        let weight = weight.detach().set_requires_grad(true);
        let grad = weights.view_of(grads, index);
        if grads.kind() == weight.kind() {
            shim::set_grad(&weight, &grad)?;
        }
        Ok((weights.shape.params[index].name.clone(), ParamWithGrad { weight, grad: Some(grad) }))
    };
    weights.views().into_iter().enumerate().map(leaf).collect()
}
