//! One layer unit as flat buffers.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use crate::error::Result;
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
#[derive(Debug)]
pub struct FlatUnit {
    pub shape: UnitShape,
    /// Compute dtype; the model's tensors are views of it.
    pub weights: Tensor,
    /// Accumulation dtype: f32, or f64 when computing in f64.
    pub grads: Tensor,
    /// Elements that weight decay applies to; they stand first.
    pub decayed: i64,
    offsets: Vec<i64>,
    views: Vec<ParamWithGrad>,
}

impl FlatUnit {
    /// Lays a unit out and fills it: `load` gives each parameter by name, in any dtype, on any device.
    pub fn new(
        shape: &UnitShape,
        kind: Kind,
        device: Device,
        load: &mut dyn FnMut(&str) -> Result<Tensor>,
    ) -> Result<FlatUnit> {
        let (offsets, decayed, length) = layout(shape);
        let accumulate = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let weights = Tensor::zeros([length], (kind, device));
        let grads = shim::zeros_on_demand(length, accumulate, device)?;
        let mut views = Vec::with_capacity(offsets.len());
        for (param, &offset) in shape.params.iter().zip(&offsets) {
            let view = |flat: &Tensor| flat.narrow(0, offset, param.numel()).view(param.shape.as_slice());
            tch::no_grad(|| -> Result<()> {
                view(&weights).f_copy_(&load(&param.name)?.f_reshape(param.shape.as_slice())?)?;
                Ok(())
            })?;
            let weight = view(&weights).detach().set_requires_grad(true);
            let grad = view(&grads);
            if accumulate == kind {
                shim::set_grad(&weight, &grad)?;
            }
            views.push(ParamWithGrad { weight, grad });
        }
        Ok(FlatUnit { shape: shape.clone(), weights, grads, decayed, offsets, views })
    }

    /// Every parameter by name.
    pub fn params(&self) -> HashMap<String, ParamWithGrad> {
        self.shape.params.iter().zip(&self.views).map(|(p, view)| (p.name.clone(), view.shallow_clone())).collect()
    }

    /// Adds gradients that a lower-precision backward left on the leaves to the accumulated ones.
    pub fn absorb_grads(&mut self) -> Result<()> {
        if self.weights.kind() == self.grads.kind() {
            return Ok(()); // the backward pass already added in place
        }
        tch::no_grad(|| {
            for view in &mut self.views {
                let grad = view.weight.grad();
                if grad.defined() {
                    let _ = view.grad.f_add_(&grad.f_to_kind(self.grads.kind())?)?;
                    shim::clear_grad(&view.weight)?;
                }
            }
            Ok(())
        })
    }

    /// The part of a flat buffer laid out like this unit that belongs to parameter `index`, in its shape.
    pub fn view_of(&self, flat: &Tensor, index: usize) -> Tensor {
        let param = &self.shape.params[index];
        flat.narrow(0, self.offsets[index], param.numel()).view(param.shape.as_slice())
    }
}

/// Offsets per parameter, elements of the matrices' part, and length. Matrices first: weight decay spares vectors.
fn layout(shape: &UnitShape) -> (Vec<i64>, i64, i64) {
    let mut offsets = vec![0; shape.params.len()];
    let mut end = 0;
    let mut decayed = 0;
    for matrices in [true, false] {
        for (index, param) in shape.params.iter().enumerate() {
            if (param.shape.len() > 1) == matrices {
                offsets[index] = end;
                end += (param.numel() + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
            }
        }
        if matrices {
            decayed = end;
        }
    }
    (offsets, decayed, end)
}
