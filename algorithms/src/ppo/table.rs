//! The recipe's table `[ppo]`.

use echelon_schema::{MOST, above, above_to, at_least, between, choice, table};

use crate::kl::KlEstimator;

table! {
    /// How a step learns from its rollout.
    pub struct PpoKeys {
        /// Passes over each rollout.
        pub epochs: usize = 1, in between(1.0, MOST);
        /// Responses per optimizer step; divides the step's responses.
        pub mini_batch_size: usize = 128, in between(1.0, MOST);
        /// The probability ratio counts up to 1 - this and 1 + this.
        pub policy_clip: f64 = 0.2, in above_to(0.0, 1.0);
        /// Upper side of the clip, when it differs from `policy_clip`.
        pub policy_clip_high: Option<f64> = None, in above(0.0);
        /// Bounds the loss of negative advantages at this factor.
        pub dual_clip: Option<f64> = None, in above(1.0);
        /// Values may move this far from those of the rollout.
        pub value_clip: Option<f64> = Some(0.5), in above(0.0);
        /// Discount per token.
        pub gamma: f64 = 1.0, in between(0.0, 1.0);
        /// Weight of longer returns in the advantage estimate.
        pub gae_lambda: f64 = 1.0, in between(0.0, 1.0);
        /// Weight of the KL penalty; at 0 the reference model is not loaded.
        pub kl_coef: f64 = 0.01, in at_least(0.0);
        /// Estimator of the KL divergence per token.
        pub kl_estimator: KlEstimator = KlEstimator::K1;
        /// Where the penalty enters.
        pub kl_placement: KlPlacement = KlPlacement::Reward;
        /// Adapt `kl_coef` so that the KL stays near this value.
        pub kl_target: Option<f64> = None, in above(0.0);
        /// Responses over which the adaptive `kl_coef` reacts.
        pub kl_horizon: f64 = 10000.0, in above(0.0);
        /// Weight of the entropy bonus.
        pub entropy_coef: f64 = 0.0, in at_least(0.0);
        /// First steps in which only the critic learns.
        pub critic_warmup_steps: usize = 0, in at_least(0.0);
    }
}

choice! {
    /// Where the KL penalty enters.
    pub enum KlPlacement {
        /// Subtracted from each token's reward.
        Reward = "reward",
        /// Added to the policy loss.
        Loss = "loss",
    }
}
