//! Speed: tokens per second, and how much of the device's peak the models' arithmetic reaches (MFU).
//!
//! Pure functions of counted tokens and measured seconds. The peak is the caller's: measured once on the device that runs,
//! so that MFU means the same on a CPU as on a GPU.

use super::Metrics;

/// What the arithmetic of one token depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelSize {
    /// Weights that multiply activations: all but the embedding table, which is counted once when it is the output head too.
    pub params: f64,
    /// Transformer layers.
    pub layers: f64,
    /// Attention width: heads x head dimension.
    pub hidden: f64,
}

/// Floating-point operations of one token's forward pass: 2 per weight, and per layer 4 x `hidden` for each of the
/// `context` positions that the token attends to (2 for the scores, 2 for the weighted sum).
///
/// `context` is the mean over tokens: half the sequence length for causal attention over whole sequences.
pub fn forward_flops_per_token(size: ModelSize, context: f64) -> f64 {
    2.0 * size.params + 4.0 * size.layers * size.hidden * context
}

/// Forward and backward: three times the forward pass, as the backward pass multiplies every matrix twice.
///
/// Activations recomputed to save memory are not counted: MFU is about useful work.
pub fn training_flops_per_token(size: ModelSize, context: f64) -> f64 {
    3.0 * forward_flops_per_token(size, context)
}

/// Tokens per second; NaN when no time was measured.
fn tokens_per_second(tokens: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { tokens as f64 / seconds } else { f64::NAN }
}

/// Share of `peak_flops_per_second` that `flops` in `seconds` reach, 0 to 1; NaN when either is not positive.
fn mfu(flops: f64, seconds: f64, peak_flops_per_second: f64) -> f64 {
    if seconds > 0.0 && peak_flops_per_second > 0.0 { flops / seconds / peak_flops_per_second } else { f64::NAN }
}

/// The work of one phase of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PhaseWork<'a> {
    /// As in `train/timing/<name>`: `generation`, `make_experience`, `ppo_train`.
    pub name: &'a str,
    /// Tokens the phase worked on.
    pub tokens: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Floating-point operations of all models in the phase.
    pub flops: f64,
}

/// Sets `train/timing/<phase>` and `train/timing/step_total`, `perf/tokens_per_second` and `perf/mfu` of the whole step,
/// and `perf/<phase>_tokens_per_second` and `perf/<phase>_mfu` of each phase.
///
/// `step_tokens` are the step's distinct tokens (prompts and responses), `step_seconds` its wall-clock time.
/// Without a measured `peak_flops_per_second` nothing is set for MFU.
pub fn record_perf(
    metrics: &mut Metrics,
    phases: &[PhaseWork],
    step_tokens: u64,
    step_seconds: f64,
    peak_flops_per_second: Option<f64>,
) {
    for phase in phases {
        let PhaseWork { name, tokens, seconds, flops } = *phase;
        metrics.set(format!("train/timing/{name}"), seconds);
        metrics.set(format!("perf/{name}_tokens_per_second"), tokens_per_second(tokens, seconds));
        if let Some(peak) = peak_flops_per_second {
            metrics.set(format!("perf/{name}_mfu"), mfu(flops, seconds, peak));
        }
    }
    metrics.set("train/timing/step_total", step_seconds);
    metrics.set("perf/tokens_per_second", tokens_per_second(step_tokens, step_seconds));
    if let Some(peak) = peak_flops_per_second {
        let flops = phases.iter().map(|phase| phase.flops).sum();
        metrics.set("perf/mfu", mfu(flops, step_seconds, peak));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiplications and additions of a plain loop over one layer's matrices, counted one by one.
    fn counted_forward_flops(hidden: u64, intermediate: u64, context: u64) -> u64 {
        let matmul = |rows: u64, columns: u64| 2 * rows * columns;
        let projections = 4 * matmul(hidden, hidden) + 3 * matmul(hidden, intermediate);
        let scores = context * 2 * hidden; // one dot product per position
        let weighted_sum = context * 2 * hidden;
        projections + scores + weighted_sum
    }

    #[test]
    fn forward_flops_equal_a_count_over_the_matrices() {
        let (hidden, intermediate, layers, context) = (64, 176, 3, 40);
        let params = layers * (4 * hidden * hidden + 3 * hidden * intermediate);
        let size = ModelSize { params: params as f64, layers: layers as f64, hidden: hidden as f64 };
        let counted = (layers * counted_forward_flops(hidden, intermediate, context)) as f64;
        assert_eq!(forward_flops_per_token(size, context as f64), counted);
        assert_eq!(training_flops_per_token(size, context as f64), 3.0 * counted);
    }

    #[test]
    fn a_step_records_each_phase_and_the_whole() {
        let mut metrics = Metrics::new();
        let phases = [
            PhaseWork { name: "generation", tokens: 100, seconds: 2.0, flops: 4e9 },
            PhaseWork { name: "ppo_train", tokens: 300, seconds: 3.0, flops: 9e9 },
        ];
        record_perf(&mut metrics, &phases, 150, 6.0, Some(1e10));
        assert_eq!(metrics.get("train/timing/generation"), Some(2.0));
        assert_eq!(metrics.get("perf/generation_tokens_per_second"), Some(50.0));
        assert_eq!(metrics.get("perf/ppo_train_mfu"), Some(0.3));
        assert_eq!(metrics.get("perf/tokens_per_second"), Some(25.0));
        assert!((metrics.get("perf/mfu").unwrap() - 13e9 / 6.0 / 1e10).abs() < 1e-12);

        let mut without_peak = Metrics::new();
        record_perf(&mut without_peak, &phases, 150, 0.0, None);
        assert_eq!(without_peak.get("perf/mfu"), None);
        assert!(without_peak.get("perf/tokens_per_second").unwrap().is_nan());
    }
}
