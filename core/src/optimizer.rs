//! The recipe's table of an optimizer.

use echelon_schema::{above_to, between, choice, from_below, table};

use crate::compute::Compute;
use crate::zero::OptimizerConfig;

table! {
    /// AdamW and its learning-rate schedule.
    pub struct Optimizer {
        /// Peak learning rate.
        pub lr: f64 = 1e-6, in between(0.0, 1.0);
        /// Decay rates of the two moments.
        pub betas: [f64; 2] = [0.9, 0.95], in from_below(0.0, 1.0);
        /// Added to the root of the second moment.
        pub eps: f64 = 1e-8, in above_to(0.0, 1.0);
        /// Decoupled weight decay.
        pub weight_decay: f64 = 0.0, in between(0.0, 1.0);
        /// Shape of the learning rate after warm-up.
        pub schedule: Decay = Decay::Cosine;
        /// Part of all optimizer steps over which the learning rate rises linearly from 0; rounded up to whole steps.
        pub warmup_ratio: f64 = 0.03, in between(0.0, 1.0);
        /// Where `cosine` ends, as a part of `lr`.
        pub min_lr_ratio: f64 = 0.1, in between(0.0, 1.0);
    }
}

choice! {
    /// Shape of the learning rate after warm-up.
    pub enum Decay {
        /// Stays at `lr`.
        Constant = "constant",
        /// Falls in a straight line to 0.
        Linear = "linear",
        /// Falls along half a cosine to `min_lr_ratio * lr`.
        Cosine = "cosine",
    }
}

impl Optimizer {
    /// Optimizer steps of warm-up among `total`, a part of a step rounded up as OpenRLHF does.
    pub fn warmup_steps(&self, total: usize) -> usize {
        (total as f64 * self.warmup_ratio).ceil() as usize
    }

    /// AdamW's settings, with `compute`'s bound of the gradients.
    pub fn config(&self, compute: &Compute) -> OptimizerConfig {
        OptimizerConfig {
            betas: (self.betas[0], self.betas[1]),
            eps: self.eps,
            weight_decay: self.weight_decay,
            max_grad_norm: compute.max_grad_norm.unwrap_or(0.0),
        }
    }
}
