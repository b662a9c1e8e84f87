//! AdamW on flat buffers, with clipping by the global gradient norm.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::flat::{FlatUnit, ParamWithGrad};
use crate::error::{Error, Result};
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

/// What an optimizer step saw.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Before clipping.
    pub grad_norm: f64,
}

/// Weights, gradients and AdamW state of one role on one rank.
pub struct TrainingState {
    role: Role,
    units: Vec<FlatUnit>,
    moments: Vec<Moments>,
    /// Optimizer steps taken.
    pub steps: u64,
    config: OptimizerConfig,
}

struct Moments {
    /// Full-precision weights where the compute dtype is lower; else the weights are the master.
    master: Option<Tensor>,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

impl TrainingState {
    /// Lays the model out unit by unit; `load` gives each parameter by name.
    pub fn new(
        role: Role,
        shape: &ModelShape,
        config: OptimizerConfig,
        (kind, device): (Kind, Device),
        load: &mut dyn FnMut(&str) -> Result<Tensor>,
    ) -> Result<TrainingState> {
        let mut units = Vec::new();
        let mut moments = Vec::new();
        for unit in &shape.units {
            let flat = FlatUnit::new(unit, kind, device, load)?;
            let master = (flat.grads.kind() != kind).then(|| master_of(&flat, load)).transpose()?;
            let zeros = || shim::zeros_on_demand(flat.grads.size()[0], flat.grads.kind(), device);
            moments.push(Moments { master, exp_avg: zeros()?, exp_avg_sq: zeros()? });
            units.push(flat);
        }
        Ok(TrainingState { role, units, moments, steps: 0, config })
    }

    /// Every parameter by name: what the model is built from.
    pub fn params(&self) -> HashMap<String, ParamWithGrad> {
        self.units.iter().flat_map(FlatUnit::params).collect()
    }

    /// Adds gradients of a lower-precision backward pass to the accumulated ones.
    pub fn absorb_grads(&mut self) -> Result<()> {
        self.units.iter_mut().try_for_each(FlatUnit::absorb_grads)
    }

    pub fn zero_grads(&mut self) {
        tch::no_grad(|| self.units.iter_mut().for_each(|unit| drop(unit.grads.zero_())));
    }

    /// Clips the accumulated gradients by their global norm, takes one AdamW step at `lr`, and clears them.
    ///
    /// # Errors
    /// [`Error::NonFinite`] when the norm is not finite; nothing has moved then, and the gradients are cleared.
    pub fn step(&mut self, lr: f64) -> Result<StepReport> {
        let _guard = tch::no_grad_guard();
        let grad_norm = self.grad_norm();
        if !grad_norm.is_finite() {
            self.zero_grads();
            let what = "the gradient norm";
            return Err(Error::NonFinite { role: self.role, what, value: grad_norm, optimizer_step: self.steps + 1 });
        }
        let limit = self.config.max_grad_norm;
        let scale = if limit > 0.0 { (limit / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
        self.steps += 1;
        let device = self.units.first().map_or(Device::Cpu, |unit| unit.weights.device());
        let step = Tensor::from(self.steps as f32).to_device(device);
        for (unit, moments) in self.units.iter_mut().zip(&mut self.moments) {
            if scale < 1.0 {
                let _ = unit.grads.f_mul_scalar_(scale)?;
            }
            adamw(unit, moments, &step, lr, &self.config)?;
            if let Some(master) = &moments.master {
                unit.weights.f_copy_(master)?;
            }
            let _ = unit.grads.zero_();
        }
        Ok(StepReport { grad_norm })
    }

    /// L2 norm of all accumulated gradients.
    pub fn grad_norm(&self) -> f64 {
        self.units.iter().map(|unit| sum_of_squares(&unit.grads)).sum::<f64>().sqrt()
    }

    /// Every tensor of the state, named `<part>.<parameter>` with part `weights`, `exp_avg` or `exp_avg_sq`: views, no copy.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = Vec::new();
        for (unit, moments) in self.units.iter().zip(&self.moments) {
            let weights = moments.master.as_ref().unwrap_or(&unit.weights);
            for (part, flat) in
                [("weights", weights), ("exp_avg", &moments.exp_avg), ("exp_avg_sq", &moments.exp_avg_sq)]
            {
                for (index, param) in unit.shape.params.iter().enumerate() {
                    tensors.push((format!("{part}.{}", param.name), unit.view_of(flat, index)));
                }
            }
        }
        tensors
    }

    /// Takes up the state that [`TrainingState::tensors`] named; `load` gives each tensor by that name.
    pub fn restore(&mut self, steps: u64, load: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for (name, mut tensor) in self.tensors() {
            tensor.f_copy_(&load(&name)?)?;
        }
        for (unit, moments) in self.units.iter_mut().zip(&self.moments) {
            if let Some(master) = &moments.master {
                unit.weights.f_copy_(master)?;
            }
        }
        self.steps = steps;
        Ok(())
    }

    /// Bytes of weights, gradients, master copy and moments.
    pub fn bytes(&self) -> usize {
        let of = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        self.units
            .iter()
            .zip(&self.moments)
            .map(|(unit, m)| {
                of(&unit.weights)
                    + of(&unit.grads)
                    + of(&m.exp_avg)
                    + of(&m.exp_avg_sq)
                    + m.master.as_ref().map_or(0, of)
            })
            .sum()
    }
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

fn master_of(unit: &FlatUnit, load: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<Tensor> {
    let master = unit.grads.zeros_like();
    for (index, param) in unit.shape.params.iter().enumerate() {
        let loaded = load(&param.name)?;
        tch::no_grad(|| {
            unit.view_of(&master, index).f_copy_(&loaded.f_reshape(param.shape.as_slice())?).map_err(Error::from)
        })?;
    }
    Ok(master)
}

/// Two calls at most: weight decay spares vectors, which stand after the matrices.
fn adamw(unit: &FlatUnit, moments: &Moments, step: &Tensor, lr: f64, config: &OptimizerConfig) -> Result<()> {
    let weights = moments.master.as_ref().unwrap_or(&unit.weights);
    let length = unit.grads.size()[0];
    let split = if config.weight_decay == 0.0 { 0 } else { unit.decayed };
    for (start, end, weight_decay) in [(0, split, config.weight_decay), (split, length, 0.0)] {
        if end > start {
            let part = |flat: &Tensor| flat.narrow(0, start, end - start);
            let with = AdamWStep { lr, betas: config.betas, eps: config.eps, weight_decay };
            shim::fused_adamw(
                &part(weights),
                &part(&unit.grads),
                &part(&moments.exp_avg),
                &part(&moments.exp_avg_sq),
                step,
                with,
            )?;
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
