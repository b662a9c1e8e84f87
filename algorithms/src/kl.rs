//! How far the policy has moved from the reference: Schulman's estimators and the coefficient's controller.
//!
//! With r = log π(token) − log π_ref(token) on a token that π sampled, the three estimates of KL(π ‖ π_ref)
//! are k1 = r (unbiased), k2 = r²/2 (low variance), k3 = e^(−r) − 1 + r (unbiased, never negative).
//! Each is clamped to ±10 as in OpenRLHF, so that one improbable token cannot drown a response's score.

use echelon_schema::choice;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::masked::masked;

/// Bound of one token's estimate, in nats.
const MAX_KL: f64 = 10.0;

/// Bound of the log-ratio that enters an estimator. Beyond it every estimator is past [`MAX_KL`], so this
/// changes neither value nor gradient; it keeps exp from overflowing, whose gradient would be 0 · ∞ = NaN.
const MAX_LOG_RATIO: f64 = 20.0;

choice! {
    /// Estimator of the KL divergence per token, with r = log pi - log pi_ref.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum KlEstimator {
        /// r: unbiased, right for a penalty inside the reward.
        K1 = "k1",
        /// r^2 / 2.
        K2 = "k2",
        /// exp(-r) - 1 + r: never negative, right for a penalty inside the loss.
        K3 = "k3",
    }
}

/// Per-token KL estimate `[B, T]`, clamped to ±10 nats, zero outside the mask.
///
/// Differentiable with respect to `logprobs` (zero gradient where clamped), so the same function serves the
/// penalty in the reward and [`kl_loss`](crate::losses::kl_loss). All inputs `[B, T]`, dtype kept.
pub fn kl_estimate(logprobs: &Tensor, ref_logprobs: &Tensor, mask: &Tensor, estimator: KlEstimator) -> Tensor {
    let log_ratio = masked(&(logprobs - ref_logprobs), mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
    let kl = match estimator {
        KlEstimator::K1 => log_ratio,
        KlEstimator::K2 => log_ratio.square() / 2.0,
        KlEstimator::K3 => (-&log_ratio).exp() - 1.0 + log_ratio,
    };
    kl.clamp(-MAX_KL, MAX_KL)
}

/// The KL coefficient and, if adaptive, the rule that moves it (Ziegler et al. 2019, section 2.2).
///
/// Plain data: it is saved in the checkpoint as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KlController {
    coef: f64,
    adaptation: Option<Adaptation>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Adaptation {
    target: f64,
    horizon: f64,
}

impl KlController {
    /// A coefficient that never changes.
    pub fn fixed(coef: f64) -> Self {
        Self { coef, adaptation: None }
    }

    /// A coefficient that steers the mean KL per token towards `target` nats (above zero), at a pace of at
    /// most 20 % per `horizon` responses (above zero).
    pub fn adaptive(coef: f64, target: f64, horizon: f64) -> Self {
        Self { coef, adaptation: Some(Adaptation { target, horizon }) }
    }

    /// The coefficient to use now.
    pub fn coef(&self) -> f64 {
        self.coef
    }

    /// Learns the mean KL per token of a rollout of `num_responses`; a NaN teaches nothing.
    ///
    /// coef ← coef · (1 + clip(kl / target − 1, ±0.2) · num_responses / horizon)
    pub fn update(&mut self, kl: f64, num_responses: usize) {
        let Some(Adaptation { target, horizon }) = self.adaptation else {
            return;
        };
        if !kl.is_nan() {
            let error = (kl / target - 1.0).clamp(-0.2, 0.2);
            self.coef *= 1.0 + error * num_responses as f64 / horizon;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    /// The estimator of one token, from its definition.
    fn scalar(r: f64, estimator: KlEstimator) -> f64 {
        let kl = match estimator {
            KlEstimator::K1 => r,
            KlEstimator::K2 => r * r / 2.0,
            KlEstimator::K3 => (-r).exp() - 1.0 + r,
        };
        kl.clamp(-10.0, 10.0)
    }

    #[test]
    fn overflow_is_clamped_and_has_no_gradient() {
        let log_ratios = [-1e4, -900.0, -21.0, -0.5, 0.0, 0.5, 21.0, 900.0];
        for estimator in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
            let logprobs = Tensor::from_slice2(&[log_ratios]).set_requires_grad(true);
            let kl =
                kl_estimate(&logprobs, &logprobs.zeros_like(), &logprobs.ones_like().to_kind(Kind::Bool), estimator);
            kl.sum(Kind::Double).backward();
            let (kl, grad) = (Vec::<f64>::try_from(kl.view(-1)), Vec::<f64>::try_from(logprobs.grad().view(-1)));
            for ((kl, grad), r) in kl.unwrap().into_iter().zip(grad.unwrap()).zip(log_ratios) {
                assert!((kl - scalar(r, estimator)).abs() < 1e-12, "{estimator:?} at {r}: {kl}");
                assert!(grad.is_finite(), "{estimator:?} at {r}: gradient {grad}");
                assert!(r.abs() < 20.0 || grad == 0.0, "{estimator:?} at {r}: gradient {grad}");
            }
        }
    }

    #[test]
    fn an_adaptive_coefficient_follows_the_target() {
        let mut controller = KlController::adaptive(0.1, 6.0, 10_000.0);
        controller.update(12.0, 1000); // error 1 clipped to 0.2
        assert!((controller.coef() - 0.1 * 1.02).abs() < 1e-15);
        controller.update(5.4, 1000); // error -0.1
        assert!((controller.coef() - 0.1 * 1.02 * 0.99).abs() < 1e-15);
        controller.update(f64::NAN, 1000);
        assert!((controller.coef() - 0.1 * 1.02 * 0.99).abs() < 1e-15);
    }

    #[test]
    fn a_fixed_coefficient_stays() {
        let mut controller = KlController::fixed(0.1);
        controller.update(100.0, 1000);
        assert_eq!(controller.coef(), 0.1);
    }

    #[test]
    fn estimators_have_their_recipe_names() {
        let names = ["\"k1\"", "\"k2\"", "\"k3\""].map(|name| serde_json::from_str::<KlEstimator>(name).unwrap());
        assert_eq!(names, [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3]);
    }
}
