//! The ranks' half of a PPO step: the only place that sees micro-batches.
//!
//! A loss is a sum over response tokens divided by `num_tokens`, their number in the whole mini-batch over all ranks, so
//! the gradient does not depend on the micro-batch size or on the number of ranks.

use echelon_core::Result;
use echelon_core::experience::Experience;
use echelon_core::verb::{ActorReport, CriticReport};
use echelon_core::zero::{Backbone, Head, PolicyOutput, ScalarValues, Trainable};
use tch::{Kind, Tensor};

use crate::kl::KlEstimator;
use crate::losses::{PolicyClip, PolicyStats, ValueStats, entropy_loss, kl_loss, policy_loss, value_loss};
use crate::masked::masked_sum;
use crate::schedule::LrSchedule;

/// How the actor learns.
#[derive(Clone, Copy, Debug)]
pub struct ActorConfig {
    pub clip: PolicyClip,
    pub entropy_coef: f64,
    /// Of a KL term in the loss.
    pub kl_estimator: KlEstimator,
    pub lr: f64,
    pub schedule: LrSchedule,
}

/// How the critic learns.
#[derive(Clone, Copy, Debug)]
pub struct CriticConfig {
    pub value_clip: Option<f64>,
    pub lr: f64,
    pub schedule: LrSchedule,
}

/// One optimizer step of the actor on this rank's rows; every rank of the group runs it together.
///
/// # Errors
/// [`NonFinite`] when a loss or the gradient norm is not finite: the optimizer has not moved.
///
/// [`NonFinite`]: echelon_core::Error::NonFinite
pub fn update_actor<B: Backbone, H: Head<Output: PolicyOutput>>(
    actor: &mut Trainable<B, H>,
    rows: &Experience,
    num_tokens: f64,
    kl_coef: f64,
    config: &ActorConfig,
) -> Result<ActorReport> {
    let mut stats = PolicyStats::default();
    let mut report = ActorReport::default();
    for micro_batch in actor.micro_batches(&rows.tokens.lengths)? {
        let batch = rows.select(&micro_batch).to_device(actor.pass.device);
        actor.forward_backward(&batch.tokens, |output| {
            let mask = &batch.tokens.mask;
            let surrogate = policy_loss(output.logprobs(), &batch.old_logprobs, &batch.advantages, mask, config.clip);
            report.policy_loss += surrogate.sum.double_value(&[]) / num_tokens;
            report.ratios.extend(ratios_of(&surrogate.ratio, mask));
            stats += surrogate.stats;
            let mut total = surrogate.sum;
            if let Some(entropy) = output.entropy() {
                report.entropy += masked_sum(&entropy.detach(), mask).double_value(&[]) / num_tokens;
                if config.entropy_coef != 0.0 {
                    total += entropy_loss(entropy, mask, config.entropy_coef);
                }
            }
            if let (Some(reference), true) = (&batch.ref_logprobs, kl_coef != 0.0) {
                let kl = kl_loss(output.logprobs(), reference, mask, config.kl_estimator, kl_coef);
                report.kl_loss += kl.double_value(&[]) / num_tokens;
                total += kl;
            }
            Ok(total / num_tokens)
        })?;
        report.num_tokens += batch.tokens.lengths.iter().sum::<i64>();
        report.response_tokens += batch.tokens.mask.sum(Kind::Double).double_value(&[]);
    }
    report.lr = config.lr * config.schedule.factor(actor.state.steps as usize);
    report.grad_norm = actor.optimizer_step(report.lr)?.grad_norm;
    report.clip_fraction = stats.clip_fraction();
    report.ppo_kl = stats.ppo_kl();
    report.approx_kl = stats.approx_kl();
    report.ratio_max = stats.ratio_max;
    Ok(report)
}

/// One optimizer step of the critic on this rank's rows.
///
/// # Errors
/// As [`update_actor`].
pub fn update_critic<B: Backbone, H: Head<Output: ScalarValues>>(
    critic: &mut Trainable<B, H>,
    rows: &Experience,
    num_tokens: f64,
    config: &CriticConfig,
) -> Result<CriticReport> {
    let mut stats = ValueStats::default();
    let mut report = CriticReport::default();
    for micro_batch in critic.micro_batches(&rows.tokens.lengths)? {
        let batch = rows.select(&micro_batch).to_device(critic.pass.device);
        let loss = critic.forward_backward(&batch.tokens, |output| {
            let clip = config.value_clip;
            let loss = value_loss(output.values(), &batch.values, &batch.returns, &batch.tokens.mask, clip);
            stats += loss.stats;
            Ok(loss.sum / num_tokens)
        })?;
        report.critic_loss += loss;
        report.num_tokens += batch.tokens.lengths.iter().sum::<i64>();
        report.response_tokens += batch.tokens.mask.sum(Kind::Double).double_value(&[]);
    }
    report.lr = config.lr * config.schedule.factor(critic.state.steps as usize);
    report.grad_norm = critic.optimizer_step(report.lr)?.grad_norm;
    report.clip_fraction = stats.clip_fraction();
    report.values_mean = stats.value_mean();
    Ok(report)
}

fn ratios_of(ratio: &Tensor, mask: &Tensor) -> Vec<f32> {
    Vec::try_from(ratio.masked_select(mask).to_kind(Kind::Float)).expect("a vector of ratios")
}
