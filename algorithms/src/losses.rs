//! The losses of a PPO update.
//!
//! Each is a **sum** over the response tokens it is given. The caller divides by the number of response
//! tokens of the whole mini-batch on all ranks before the backward pass, so that the gradient depends neither
//! on the micro-batch size nor on the number of ranks. Statistics are sums and counts for the same reason, and
//! stay on the device: they become means at the very end.
//!
//! All tensors are `[B, T]`, column `t` belongs to token `t`; what lies outside the mask is never read.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::kl::{KlEstimator, kl_estimate};
use crate::masked::{masked, masked_sum};

/// Bound of log π − log π_old before exp, as in OpenRLHF and verl: e^20 · advantage is still a finite f32.
const MAX_LOG_RATIO: f64 = 20.0;

/// How far one rollout may move the policy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyClip {
    /// The ratio's lower bound is 1 − `low`.
    pub low: f64,
    /// The ratio's upper bound is 1 + `high`.
    pub high: f64,
    /// Dual clip c > 1 (Ye et al. 2020): where the advantage is negative, the objective is at least
    /// c · advantage, so that one huge ratio cannot dominate the step.
    pub dual: Option<f64>,
}

/// The clipped surrogate loss and what it saw.
pub struct PolicyLoss {
    /// Scalar with gradient: the loss summed over response tokens.
    pub sum: Tensor,
    /// π / π_old per token `[B, T]`, detached; 1 outside the mask.
    pub ratio: Tensor,
    pub sums: PolicySums,
}

/// PPO's clipped surrogate loss (Schulman et al. 2017), summed over response tokens.
///
/// ```text
/// ρ = exp(logprobs − old_logprobs)      L = − Σ min(ρ A, clip(ρ, 1 − low, 1 + high) A)
/// dual clip, where A < 0:               L = − Σ max(min(…), c A)
/// ```
///
/// Only `logprobs` gets a gradient.
pub fn policy_loss(
    logprobs: &Tensor,
    old_logprobs: &Tensor,
    advantages: &Tensor,
    mask: &Tensor,
    clip: PolicyClip,
) -> PolicyLoss {
    let log_ratio = masked(&(logprobs - old_logprobs.detach()), mask); // masked first: padding cannot overflow exp
    let advantages = masked(&advantages.detach(), mask);
    let ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp();
    let unclipped = &ratio * &advantages;
    let clipped = ratio.clamp(1.0 - clip.low, 1.0 + clip.high) * &advantages;
    let mut objective = unclipped.minimum(&clipped);
    if let Some(dual) = clip.dual {
        let bounded = objective.maximum(&(&advantages * dual));
        objective = bounded.where_self(&advantages.lt(0.0), &objective);
    }
    let is_clipped = clipped.lt_tensor(&unclipped); // never outside the mask: both are zero there
    PolicyLoss {
        sum: -objective.sum(objective.kind()),
        sums: PolicySums::new(&log_ratio.detach(), &ratio.detach(), &is_clipped, mask),
        ratio: ratio.detach(),
    }
}

/// Sums over response tokens that describe a policy update, f64 scalars on the device of the loss.
#[derive(Debug)]
pub struct PolicySums {
    /// Response tokens.
    pub num_tokens: Tensor,
    /// Tokens whose clipped objective is below the unclipped one.
    pub num_clipped: Tensor,
    /// Σ (old_logprobs − logprobs): the k1 estimate of KL(π_old ‖ π), OpenRLHF's `ppo_kl`.
    pub ppo_kl: Tensor,
    /// Σ (ρ − 1 − log ρ): the k3 estimate of the same, never negative.
    pub approx_kl: Tensor,
    /// Σ ρ.
    pub ratio: Tensor,
    /// Largest ρ; −∞ if there is no token.
    pub ratio_max: Tensor,
}

impl PolicySums {
    fn new(log_ratio: &Tensor, ratio: &Tensor, is_clipped: &Tensor, mask: &Tensor) -> PolicySums {
        let approx_kl = ratio - 1.0 - log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
        let lowest = Tensor::full([1], f64::NEG_INFINITY, (ratio.kind(), ratio.device()));
        let largest = Tensor::cat(&[ratio.masked_fill(&mask.logical_not(), f64::NEG_INFINITY).view(-1), lowest], 0);
        PolicySums {
            num_tokens: mask.sum(Kind::Double),
            num_clipped: is_clipped.sum(Kind::Double),
            ppo_kl: 0.0 - log_ratio.sum(Kind::Double), // not -0.0 for an unmoved policy
            approx_kl: approx_kl.sum(Kind::Double),
            ratio: masked(ratio, mask).sum(Kind::Double),
            ratio_max: largest.max(),
        }
    }
}

/// The clipped value loss and what it saw.
pub struct ValueLoss {
    /// Scalar with gradient: the loss summed over response tokens.
    pub sum: Tensor,
    /// Tokens whose clipped error is the larger one, a scalar on the device of the loss.
    pub num_clipped: Tensor,
}

/// The critic's squared error, summed over response tokens.
///
/// ```text
/// L = ½ Σ max((V − return)², (V_clip − return)²)      V_clip = clip(V, V_old ± value_clip)
/// ```
///
/// Without `value_clip` it is ½ Σ (V − return)². Only `values` gets a gradient.
pub fn value_loss(
    values: &Tensor,
    old_values: &Tensor,
    returns: &Tensor,
    mask: &Tensor,
    value_clip: Option<f64>,
) -> ValueLoss {
    let values = masked(values, mask);
    let returns = masked(&returns.detach(), mask);
    let unclipped = (&values - &returns).square();
    let (squared_error, num_clipped) = match value_clip {
        None => (unclipped, Tensor::zeros([], (Kind::Double, values.device()))),
        Some(range) => {
            let old_values = masked(&old_values.detach(), mask);
            // Not V_old + clip(V − V_old): its rounding would count values inside the range as clipped.
            let (lowest, highest) = (&old_values - range, &old_values + range);
            let clipped = (values.clamp_tensor(Some(lowest), Some(highest)) - &returns).square();
            let num_clipped = clipped.gt_tensor(&unclipped).sum(Kind::Double);
            (unclipped.maximum(&clipped), num_clipped)
        }
    };
    ValueLoss { sum: squared_error.sum(squared_error.kind()) * 0.5, num_clipped }
}

/// The entropy bonus as a loss term: −`entropy_coef` · Σ entropy over response tokens, a scalar with gradient.
///
/// `entropy` `[B, T]` is that of the distribution token `t` was drawn from, in nats.
pub fn entropy_loss(entropy: &Tensor, mask: &Tensor, entropy_coef: f64) -> Tensor {
    masked_sum(entropy, mask) * -entropy_coef
}

/// The KL penalty as a loss term: `kl_coef` · Σ KL estimate over response tokens, a scalar with gradient.
///
/// For recipes that place the penalty in the loss instead of the reward. Use k2 or k3: the expected gradient
/// of k1 is zero.
pub fn kl_loss(
    logprobs: &Tensor,
    ref_logprobs: &Tensor,
    mask: &Tensor,
    estimator: KlEstimator,
    kl_coef: f64,
) -> Tensor {
    let kl = kl_estimate(logprobs, &ref_logprobs.detach(), mask, estimator);
    kl.sum(kl.kind()) * kl_coef
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn all_true(like: &Tensor) -> Tensor {
        like.ones_like().to_kind(Kind::Bool)
    }

    const CLIP: PolicyClip = PolicyClip { low: 0.2, high: 0.2, dual: None };
    const NOTHING: [f64; 6] = [0.0, 0.0, 0.0, 0.0, 0.0, f64::NEG_INFINITY];

    fn numbers(sums: &PolicySums) -> [f64; 6] {
        let PolicySums { num_tokens, num_clipped, ppo_kl, approx_kl, ratio, ratio_max } = sums;
        [num_tokens, num_clipped, ppo_kl, approx_kl, ratio, ratio_max].map(|sum| sum.double_value(&[]))
    }

    /// The surrogate loss of one token, from its definition.
    fn surrogate(log_ratio: f64, advantage: f64, clip: PolicyClip) -> f64 {
        let ratio = log_ratio.clamp(-20.0, 20.0).exp();
        let objective = f64::min(ratio * advantage, ratio.clamp(1.0 - clip.low, 1.0 + clip.high) * advantage);
        match clip.dual {
            Some(c) if advantage < 0.0 => -f64::max(objective, c * advantage),
            _ => -objective,
        }
    }

    #[test]
    fn policy_loss_is_the_sum_of_its_tokens() {
        for dual in [None, Some(3.0)] {
            let clip = PolicyClip { low: 0.2, high: 0.28, dual };
            for log_ratio in [-30.0, -1.5, -0.1, 0.0, 0.1, 1.5, 30.0] {
                for advantage in [-2.0, 0.0, 0.7] {
                    let logprobs = Tensor::from_slice2(&[[log_ratio - 1.0]]);
                    let old_logprobs = Tensor::from_slice2(&[[-1.0]]);
                    let advantages = Tensor::from_slice2(&[[advantage]]);
                    let loss = policy_loss(&logprobs, &old_logprobs, &advantages, &all_true(&logprobs), clip);
                    let expected = surrogate(log_ratio, advantage, clip);
                    let error = (loss.sum.double_value(&[]) - expected).abs();
                    assert!(error <= 1e-12 * expected.abs().max(1.0), "{log_ratio}, {advantage}: {error}");
                }
            }
        }
    }

    #[test]
    fn an_unmoved_policy_has_ratio_one_and_no_kl() {
        let logprobs = Tensor::randn([3, 5], (Kind::Float, Device::Cpu));
        let advantages = Tensor::randn([3, 5], (Kind::Float, Device::Cpu));
        let loss = policy_loss(&logprobs, &logprobs, &advantages, &all_true(&logprobs), CLIP);
        assert_eq!(numbers(&loss.sums), [15.0, 0.0, 0.0, 0.0, 15.0, 1.0]);
    }

    #[test]
    fn statistics_of_a_moved_policy() {
        let logprobs = Tensor::from_slice2(&[[2f64.ln(), -(2f64.ln()), f64::NAN]]);
        let old_logprobs = Tensor::from_slice2(&[[0.0, 0.0, 0.0]]);
        let advantages = Tensor::from_slice2(&[[1.0, 1.0, 1.0]]);
        let mask = Tensor::from_slice2(&[[true, true, false]]);
        let loss = policy_loss(&logprobs, &old_logprobs, &advantages, &mask, CLIP);
        let [num_tokens, num_clipped, ppo_kl, approx_kl, ratio, ratio_max] = numbers(&loss.sums);
        assert_eq!((num_tokens, num_clipped), (2.0, 1.0)); // only the ratio 2 is held back
        assert!((ratio - 2.5).abs() < 1e-12 && (ratio_max - 2.0).abs() < 1e-12 && ppo_kl.abs() < 1e-12);
        assert!((approx_kl - 0.5).abs() < 1e-12); // (2 - 1 - ln 2) + (0.5 - 1 + ln 2)
    }

    #[test]
    fn a_batch_without_response_tokens_costs_nothing_and_keeps_the_graph() {
        let logprobs = Tensor::full([2, 3], f64::NAN, (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let mask = Tensor::zeros([2, 3], (Kind::Bool, Device::Cpu));
        let loss = policy_loss(&logprobs, &logprobs, &logprobs, &mask, CLIP);
        loss.sum.backward();
        assert_eq!(loss.sum.double_value(&[]), 0.0);
        assert_eq!(numbers(&loss.sums), NOTHING);
        assert_eq!(logprobs.grad(), Tensor::zeros([2, 3], (Kind::Double, Device::Cpu)));

        let empty = Tensor::zeros([0, 3], (Kind::Double, Device::Cpu));
        let loss = policy_loss(&empty, &empty, &empty, &all_true(&empty), CLIP);
        assert_eq!((loss.sum.double_value(&[]), numbers(&loss.sums)), (0.0, NOTHING));
        let loss = value_loss(&empty, &empty, &empty, &all_true(&empty), Some(0.5));
        assert_eq!((loss.sum.double_value(&[]), loss.num_clipped.double_value(&[])), (0.0, 0.0));
    }

    #[test]
    fn value_clip_takes_the_worse_of_both_errors() {
        let values = Tensor::from_slice2(&[[2.0, 2.0, 0.1]]).set_requires_grad(true);
        let old_values = Tensor::from_slice2(&[[0.0, 0.0, 0.0]]);
        let returns = Tensor::from_slice2(&[[3.0, 0.0, 1.0]]);
        let loss = value_loss(&values, &old_values, &returns, &all_true(&values), Some(0.5));
        loss.sum.backward();
        // token 0: clipped to 0.5, error 2.5 instead of 1; token 1: unclipped 2 instead of 0.5; token 2: inside.
        let expected = 0.5 * (2.5 * 2.5 + 2.0 * 2.0 + 0.9 * 0.9);
        assert!((loss.sum.double_value(&[]) - expected).abs() < 1e-12);
        assert!(values.grad().allclose(&Tensor::from_slice2(&[[0.0, 2.0, -0.9]]), 0.0, 1e-12, false));
        assert_eq!(loss.num_clipped.double_value(&[]), 1.0);
    }

    #[test]
    fn bonus_terms_are_signed_sums() {
        let entropy = Tensor::from_slice2(&[[1.0, 2.0, f64::NAN]]);
        let mask = Tensor::from_slice2(&[[true, true, false]]);
        assert_eq!(entropy_loss(&entropy, &mask, 0.5).double_value(&[]), -1.5);
        let kl = kl_loss(&entropy, &entropy.zeros_like(), &mask, KlEstimator::K2, 0.1);
        assert!((kl.double_value(&[]) - 0.25).abs() < 1e-12);
    }
}
