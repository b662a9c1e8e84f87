//! Whitening: advantages with mean 0 and variance 1 over the response tokens of the whole rollout.
//!
//! It runs on the driver, after the returns are formed, where every response of the step is visible: the
//! result does not depend on how rows are later split into mini-batches or over ranks.

use tch::{Kind, Tensor};

use crate::masked::{masked, num_tokens};

/// Smallest variance divided by: a rollout whose advantages agree must not be blown up into noise.
const MIN_VARIANCE: f64 = 1e-8;

/// (advantages − mean) / √max(population variance, 1e-8) over all true tokens; zero outside the mask.
///
/// `[B, T]` in and out, dtype kept; the moments are accumulated in double precision.
pub fn whiten(advantages: &Tensor, mask: &Tensor) -> Tensor {
    let centered = whiten_mean_only(advantages, mask);
    let square_sum = centered.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
    let variance = square_sum / num_tokens(mask).max(1) as f64;
    centered * variance.max(MIN_VARIANCE).sqrt().recip()
}

/// advantages − mean over all true tokens; zero outside the mask. Keeps the scale of the rewards.
pub fn whiten_mean_only(advantages: &Tensor, mask: &Tensor) -> Tensor {
    let advantages = masked(advantages, mask);
    let mean = advantages.sum(Kind::Double).double_value(&[]) / num_tokens(mask).max(1) as f64;
    masked(&(advantages - mean), mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn moments_over_the_mask_are_zero_and_one() {
        let advantages = Tensor::randn([8, 9], (Kind::Double, Device::Cpu)) * 3.0 + 5.0;
        let mask = Tensor::rand([8, 9], (Kind::Double, Device::Cpu)).lt(0.7);
        let white = Vec::<f64>::try_from(whiten(&advantages, &mask).masked_select(&mask)).unwrap();
        let mean = white.iter().sum::<f64>() / white.len() as f64;
        let variance = white.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / white.len() as f64;
        assert!(mean.abs() < 1e-12 && (variance - 1.0).abs() < 1e-12, "mean {mean}, variance {variance}");
    }

    #[test]
    fn equal_advantages_become_zero() {
        let advantages = Tensor::from_slice2(&[[2.5, 2.5, 7.0]]);
        let mask = Tensor::from_slice2(&[[true, true, false]]);
        assert_eq!(whiten(&advantages, &mask), advantages.zeros_like());
    }

    #[test]
    fn mean_only_keeps_the_scale() {
        let advantages = Tensor::from_slice2(&[[1.0, f64::NAN, 5.0]]);
        let mask = Tensor::from_slice2(&[[true, false, true]]);
        assert_eq!(whiten_mean_only(&advantages, &mask), Tensor::from_slice2(&[[-2.0, 0.0, 2.0]]));
    }
}
