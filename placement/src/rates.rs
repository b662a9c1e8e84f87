//! What part of a device's rated speed a phase reaches: the few numbers that time estimates rest on.
//!
//! The defaults come from runs (see each constructor); [`Rates::calibrated`] replaces them by what one measured step shows.

use serde::{Deserialize, Serialize};

use crate::cluster::Cluster;

/// Calibrated rates. Fractions are of a device's or link's rated figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Matmul rate of prefill.
    pub prefill_fraction: f64,
    /// Matmul rate of decoding, where that and not memory is the limit.
    pub decode_flops_fraction: f64,
    /// Memory bandwidth of decoding.
    pub decode_bytes_fraction: f64,
    /// Matmul rate of forward passes without a graph.
    pub score_fraction: f64,
    /// Matmul rate of forward and backward passes.
    pub train_fraction: f64,
    /// Memory bandwidth of the optimizer's step on the device.
    pub optimizer_fraction: f64,
    /// Link bandwidth of collectives.
    pub collective_fraction: f64,
    /// Bandwidth between device and host memory.
    pub host_link_fraction: f64,
    /// Bytes/s of one device's optimizer step in host memory.
    pub host_optimizer_bytes_per_s: f64,
    /// Part of the shorter of computing and communicating that runs under the longer.
    pub overlap: f64,
    /// Launches, sampling and scheduling of one decoding step.
    pub decode_step_s: f64,
    /// Launches and data of one micro-batch.
    pub micro_batch_s: f64,
    /// Calls, gathering of rows and logging of one step.
    pub step_s: f64,
}

impl Rates {
    /// Usual figures of eager libtorch on data-centre GPUs; calibrate them with a measured step.
    pub fn gpu() -> Rates {
        Rates {
            prefill_fraction: 0.45,
            decode_flops_fraction: 0.4,
            decode_bytes_fraction: 0.6,
            score_fraction: 0.45,
            train_fraction: 0.4,
            optimizer_fraction: 0.7,
            collective_fraction: 0.7,
            host_link_fraction: 0.8,
            host_optimizer_bytes_per_s: 10e9,
            overlap: 0.7,
            decode_step_s: 4e-3,
            micro_batch_s: 5e-3,
            step_s: 0.1,
        }
    }

    /// SmolLM2-135M in f32 on 2 threads: 16 x 80 tokens score in 1.7 s and train in 5.4 s per model, 16 sequences
    /// decode 238 tokens/s.
    pub fn cpu() -> Rates {
        Rates {
            prefill_fraction: 0.85,
            decode_flops_fraction: 0.6,
            decode_bytes_fraction: 0.85,
            score_fraction: 0.9,
            train_fraction: 0.85,
            optimizer_fraction: 0.9,
            collective_fraction: 0.8,
            host_link_fraction: 0.8,
            host_optimizer_bytes_per_s: 9e9,
            overlap: 0.2,
            decode_step_s: 3e-3,
            micro_batch_s: 5e-3,
            step_s: 0.05,
        }
    }

    /// The defaults for a cluster's devices.
    pub fn of(cluster: &Cluster) -> Rates {
        if cluster.has_accelerators() { Rates::gpu() } else { Rates::cpu() }
    }

    /// Rates under which the estimate of each measured phase comes out as it was measured. Phases are given as
    /// (estimated, measured) seconds; those that are not positive change nothing, and no rate moves by more than tenfold.
    pub fn calibrated(self, generate: (f64, f64), score: (f64, f64), train: (f64, f64)) -> Rates {
        let faster = |(estimated, measured): (f64, f64)| {
            let both = estimated > 0.0 && measured > 0.0;
            if both { (estimated / measured).clamp(0.1, 10.0) } else { 1.0 }
        };
        let [generating, scoring, training] = [generate, score, train].map(faster);
        Rates {
            prefill_fraction: self.prefill_fraction * generating,
            decode_flops_fraction: self.decode_flops_fraction * generating,
            decode_bytes_fraction: self.decode_bytes_fraction * generating,
            decode_step_s: self.decode_step_s / generating,
            score_fraction: self.score_fraction * scoring,
            train_fraction: self.train_fraction * training,
            optimizer_fraction: self.optimizer_fraction * training,
            host_optimizer_bytes_per_s: self.host_optimizer_bytes_per_s * training,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measured_step_moves_the_rates_of_its_phases() {
        let rates = Rates::gpu().calibrated((10.0, 20.0), (3.0, 1.5), (0.0, 4.0));
        assert_eq!(rates.decode_bytes_fraction, 0.3);
        assert_eq!(rates.decode_step_s, 8e-3);
        assert_eq!(rates.score_fraction, 0.9);
        assert_eq!(rates.train_fraction, 0.4, "nothing was estimated");
        assert_eq!(Rates::gpu().calibrated((1e9, 1.0), (1.0, 1.0), (1.0, 1.0)).prefill_fraction, 4.5);
    }
}
