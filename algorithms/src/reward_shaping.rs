//! From one score per response to one reward per token.
//!
//! Two stages. [`ScoreShaping`] turns raw scores `[B]` into what the policy is paid, in OpenRLHF's order:
//! normalise, penalise a missing end-of-sequence token, clip. [`token_rewards`] then spreads the payment:
//! the KL penalty on every response token, the score on the last one.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::masked::{last_token, masked};

/// What happens to the scores `[B]` before they become rewards; a stage that is `None` is left out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreShaping {
    /// Mean and standard deviation (above zero) of the reward model's scores on its own training data.
    pub normalization: Option<(f64, f64)>,
    /// Subtracted from the score of a truncated response.
    pub missing_eos_penalty: Option<f64>,
    /// Lowest and highest score.
    pub clip_range: Option<(f64, f64)>,
}

impl ScoreShaping {
    /// Shaped scores `[B]` in the dtype of `scores`; `truncated` `[B]` is true where a response ended by its
    /// length limit, without an end-of-sequence token.
    pub fn apply(&self, scores: &Tensor, truncated: &Tensor) -> Tensor {
        let mut scores = scores.shallow_clone();
        if let Some((mean, std)) = self.normalization {
            scores = normalize_scores(&scores, mean, std);
        }
        if let Some(penalty) = self.missing_eos_penalty {
            scores = penalize_missing_eos(&scores, truncated, penalty);
        }
        match self.clip_range {
            Some(range) => clip_scores(&scores, range),
            None => scores,
        }
    }
}

/// Rewards `[B, T]`: −`kl_coef` · kl on every response token, plus the score `[B]` on the last one.
///
/// Zero outside the mask; a response without tokens gets no score. A negative `kl_coef` counts as zero, as in
/// OpenRLHF. `kl` `[B, T]` and the result share their dtype.
pub fn token_rewards(kl: &Tensor, scores: &Tensor, mask: &Tensor, kl_coef: f64) -> Tensor {
    assert_eq!(scores.size(), mask.size()[..1], "there must be one score per response");
    let score_at_end = scores.to_kind(kl.kind()).unsqueeze(1).where_self(&last_token(mask), &kl.zeros_like());
    masked(kl, mask) * -kl_coef.max(0.0) + score_at_end
}

/// (score − mean) / std, with the statistics of the reward model's training data; std above zero.
pub fn normalize_scores(scores: &Tensor, mean: f64, std: f64) -> Tensor {
    (scores - mean) / std
}

/// Subtracts `penalty` from the score of every truncated response; both tensors `[B]`.
pub fn penalize_missing_eos(scores: &Tensor, truncated: &Tensor, penalty: f64) -> Tensor {
    assert_eq!(scores.size(), truncated.size(), "there must be one truncation flag per score");
    (scores - penalty).where_self(&truncated.to_kind(Kind::Bool), scores)
}

/// Scores limited to `(lowest, highest)`. A NaN stays NaN: refusing it is the reward source's business.
pub fn clip_scores(scores: &Tensor, (lowest, highest): (f64, f64)) -> Tensor {
    scores.clamp(lowest, highest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shaping_normalizes_then_penalizes_then_clips() {
        let shaping = ScoreShaping {
            normalization: Some((1.0, 2.0)),
            missing_eos_penalty: Some(1.5),
            clip_range: Some((-2.0, 3.0)),
        };
        let scores = Tensor::from_slice(&[5.0, 5.0, 101.0, -1.0]);
        let truncated = Tensor::from_slice(&[false, true, true, true]);
        let shaped = Vec::<f64>::try_from(shaping.apply(&scores, &truncated)).unwrap();
        assert_eq!(shaped, [2.0, 0.5, 3.0, -2.0]);
    }

    #[test]
    fn without_other_stages_scores_are_only_clipped() {
        let scores = Tensor::from_slice(&[-11.0, 0.25, 11.0]);
        let truncated = Tensor::from_slice(&[true; 3]);
        let shaping = ScoreShaping { normalization: None, missing_eos_penalty: None, clip_range: Some((-10.0, 10.0)) };
        let shaped = Vec::<f64>::try_from(shaping.apply(&scores, &truncated)).unwrap();
        assert_eq!(shaped, [-10.0, 0.25, 10.0]);
    }

    #[test]
    fn the_score_lands_on_the_last_response_token() {
        let kl = Tensor::from_slice2(&[[f64::NAN, 1.0, 2.0, f64::NAN], [f64::NAN; 4]]);
        let mask = Tensor::from_slice2(&[[false, true, true, false], [false; 4]]);
        let rewards = token_rewards(&kl, &Tensor::from_slice(&[7.0, 9.0]), &mask, 0.5);
        assert_eq!(rewards, Tensor::from_slice2(&[[0.0, -0.5, 6.0, 0.0], [0.0; 4]]));
    }

    #[test]
    fn a_negative_coefficient_pays_for_nothing() {
        let kl = Tensor::from_slice2(&[[3.0, 3.0]]);
        let mask = Tensor::from_slice2(&[[true, true]]);
        let rewards = token_rewards(&kl, &Tensor::from_slice(&[1.0]), &mask, -0.5);
        assert_eq!(rewards, Tensor::from_slice2(&[[0.0, 1.0]]));
    }
}
