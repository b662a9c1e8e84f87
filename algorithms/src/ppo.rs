//! Proximal Policy Optimization for language models.
//!
//! Departures from the paper (Schulman et al., 2017), all usual for language models:
//! 1. The KL to a frozen reference is part of each token's reward (or of the loss), the score comes at the last token.
//! 2. Actor and critic are two models with an optimizer each; the value loss is clipped too.
//! 3. Advantages are whitened over the whole rollout, after the returns were formed.
//! 4. A loss is a sum over response tokens divided by their number in the mini-batch.
//!
//! `cargo run --bin ppo -- recipes/quickstart.toml` runs it. Shapes: B responses per step, T tokens per row.

mod table;

use std::time::Instant;

use echelon_core::experience::Experience;
use echelon_core::progress::Interrupt;
use echelon_core::random::{Domain, permutation};
use echelon_core::role::Roles;
use echelon_core::rollout::{FinishReason, Prompts, Rollout, SamplingConfig};
use echelon_core::verb::{ActorReport, CriticReport};
use echelon_core::{Error, Result};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::gae::{explained_variance, gae};
use crate::kl::{KlEstimator, kl_estimate};
use crate::masked::{masked_mean, masked_row_mean};
use crate::reward_shaping::{ScoreShaping, token_rewards};
use crate::whiten::whiten;

pub use table::{KlPlacement, Ppo};

/// What the driver's half of a step decides by.
#[derive(Clone, Debug)]
pub struct PpoConfig {
    pub sampling: SamplingConfig,
    pub epochs: usize,
    /// Responses per optimizer step.
    pub mini_batch_size: usize,
    pub gamma: f64,
    pub gae_lambda: f64,
    pub kl_estimator: KlEstimator,
    pub kl_placement: KlPlacement,
    pub score_shaping: ScoreShaping,
    /// Steps at the start in which only the critic learns.
    pub critic_warmup_steps: u64,
    pub seed: u64,
}

/// Which step this is, and what changes from step to step.
#[derive(Clone, Copy)]
pub struct Moment<'a> {
    /// From 1.
    pub step: u64,
    pub kl_coef: f64,
    /// Looked at until the first optimizer step; after that the step is finished.
    pub interrupt: &'a Interrupt,
}

/// Samples responses to `prompts`, learns from them, and publishes the new weights.
///
/// Runs on the driver. Every `.await` is one call on a worker group: the group splits the rows over its data-parallel
/// ranks, runs the call on all of them, and gathers the results in row order.
///
/// # Errors
/// Returns the first worker failure, with its role, rank and cause. Nothing is published then, and the weights on the
/// ranks are unspecified unless it is [`Error::Interrupted`]: resume from the last checkpoint.
// ANCHOR: step
pub async fn step(ppo: &PpoConfig, roles: &Roles, prompts: Prompts, now: Moment<'_>) -> Result<StepReport> {
    // Rollout: the generators sample `samples_per_prompt` responses to every prompt.
    let mut clock = Clock::start();
    let rollout = roles.generator.generate(prompts, &ppo.sampling).await?;
    let generation_s = clock.lap();

    // Score: forward passes over the same tokens. Groups on different devices run at once.
    let (old_logprobs, ref_logprobs, values, scored) = tokio::try_join!(
        roles.actor.logprobs(&rollout),      // [B, T] log pi_old(token | prefix), before this step
        reference_logprobs(roles, &rollout), // [B, T] log pi_ref(token | prefix), frozen
        roles.critic.values(&rollout),       // [B, T] V(prefix)
        roles.reward.scores(&rollout),       // [B]    one score per response
    )?;

    // Advantages: plain tensor maths on the driver, where the whole batch is visible.
    let mask = &rollout.response_mask; // [B, T] true on the tokens the policy sampled
    let kl = kl_to_reference(ppo, &old_logprobs, ref_logprobs.as_ref(), mask); // [B, T]
    let scores = ppo.score_shaping.apply(&scored.scores, &truncated(&rollout)); // [B]
    let rewards = token_rewards(&kl, &scores, mask, ppo.reward_kl_coef(now.kl_coef)); // [B, T]
    let (advantages, returns) = gae(&rewards, &values.to_kind(Kind::Double), mask, ppo.gamma, ppo.gae_lambda);
    let advantages = whiten(&advantages, mask);
    let experience_s = clock.lap();

    let mut report = StepReport::new(&rollout, &scored.scores, &scores, &kl, &rewards, &old_logprobs);
    report.sources = scored.source_means;
    report.explained_variance = explained_variance(&values.to_kind(Kind::Double), &returns, mask);
    report.return_mean = masked_mean(&returns, mask);
    report.values_mean = masked_mean(&values, mask);
    let kind = old_logprobs.kind();
    let (advantages, returns) = (advantages.to_kind(kind), returns.to_kind(kind));
    let experience = Experience::new(&rollout, old_logprobs, ref_logprobs, values, advantages, returns)?;

    // Update: one optimizer step per mini-batch, on the policy and on the critic.
    now.interrupt.check()?;
    for epoch in 0..ppo.epochs {
        for rows in ppo.mini_batches(experience.num_rows(), now.step, epoch) {
            let critic = roles.critic.update(experience.select(&rows));
            if now.step <= ppo.critic_warmup_steps {
                report.critic.push(critic.await?);
                continue;
            }
            let actor = roles.actor.update(experience.select(&rows), ppo.loss_kl_coef(now.kl_coef));
            let (actor, critic) = tokio::try_join!(actor, critic)?;
            report.actor.push(actor);
            report.critic.push(critic);
        }
    }
    let train_s = clock.lap();

    // Publish: when this returns every generator holds the new version, so the next rollout is on-policy.
    report.policy_version = rollout.policy_version + 1;
    roles.actor.publish_weights(&roles.generator, report.policy_version).await?;
    report.timing = Timing { generation_s, experience_s, train_s, publish_s: clock.lap() };
    report.rollout = Some(rollout);
    Ok(report)
}
// ANCHOR_END: step

impl PpoConfig {
    /// Rows of each mini-batch of an epoch: a seeded order, cut into equal parts.
    fn mini_batches(&self, rows: usize, step: u64, epoch: usize) -> Vec<Vec<i64>> {
        let order = permutation(rows, self.seed, Domain::MiniBatches, step, epoch as u32);
        order.chunks(self.mini_batch_size).map(|rows| rows.iter().map(|&row| row as i64).collect()).collect()
    }

    fn reward_kl_coef(&self, kl_coef: f64) -> f64 {
        if self.kl_placement == KlPlacement::Reward { kl_coef } else { 0.0 }
    }

    fn loss_kl_coef(&self, kl_coef: f64) -> f64 {
        if self.kl_placement == KlPlacement::Loss { kl_coef } else { 0.0 }
    }
}

async fn reference_logprobs(roles: &Roles, rollout: &Rollout) -> Result<Option<Tensor>> {
    match &roles.reference {
        Some(reference) => Ok(Some(reference.logprobs(rollout).await?)),
        None => Ok(None),
    }
}

/// `[B, T]` f64; zeros without a reference.
fn kl_to_reference(ppo: &PpoConfig, logprobs: &Tensor, reference: Option<&Tensor>, mask: &Tensor) -> Tensor {
    let logprobs = logprobs.to_kind(Kind::Double);
    match reference {
        Some(reference) => kl_estimate(&logprobs, &reference.to_kind(Kind::Double), mask, ppo.kl_estimator),
        None => logprobs.zeros_like(),
    }
}

/// `[B]` bool: responses that hit the length limit.
fn truncated(rollout: &Rollout) -> Tensor {
    let cut: Vec<bool> = rollout.finish_reasons.iter().map(|&reason| reason == FinishReason::Length).collect();
    Tensor::from_slice(&cut)
}

/// Seconds of a step's phases.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timing {
    pub generation_s: f64,
    /// Scoring by all roles, and the advantages.
    pub experience_s: f64,
    pub train_s: f64,
    pub publish_s: f64,
}

struct Clock(Instant);

impl Clock {
    fn start() -> Clock {
        Clock(Instant::now())
    }

    fn lap(&mut self) -> f64 {
        let seconds = self.0.elapsed().as_secs_f64();
        self.0 = Instant::now();
        seconds
    }
}

/// What a step saw and did.
#[derive(Debug, Default)]
pub struct StepReport {
    /// `[B]` scores as their source gave them.
    pub scores: Vec<f64>,
    /// `[B]` after normalisation, penalty and clipping: what the policy learns from.
    pub shaped_scores: Vec<f64>,
    /// `[B]` sum of token rewards, KL included.
    pub total_rewards: Vec<f64>,
    /// `[B]` mean KL per response token.
    pub row_kl: Vec<f64>,
    /// `[B]` response tokens.
    pub response_lengths: Vec<f64>,
    /// Mean KL to the reference per response token.
    pub kl: f64,
    pub truncated_rate: f64,
    /// Largest |engine's log-prob − trainer's| over response tokens.
    pub logprob_diff_max: f64,
    pub logprob_diff_mean: f64,
    pub explained_variance: f64,
    pub return_mean: f64,
    pub values_mean: f64,
    /// Mean score by source, where there are several.
    pub sources: Vec<(String, f64)>,
    /// One per optimizer step.
    pub actor: Vec<ActorReport>,
    pub critic: Vec<CriticReport>,
    pub policy_version: u64,
    pub timing: Timing,
    pub rollout: Option<Rollout>,
}

impl StepReport {
    fn new(
        rollout: &Rollout,
        scores: &Tensor,
        shaped: &Tensor,
        kl: &Tensor,
        rewards: &Tensor,
        old_logprobs: &Tensor,
    ) -> StepReport {
        let mask = &rollout.response_mask;
        let difference = (old_logprobs.to_kind(Kind::Double) - rollout.rollout_logprobs.to_kind(Kind::Double)).abs();
        StepReport {
            scores: to_vec(scores),
            shaped_scores: to_vec(shaped),
            total_rewards: to_vec(&rewards.sum_dim_intlist(1, false, Kind::Double)),
            row_kl: to_vec(&masked_row_mean(kl, mask)),
            response_lengths: to_vec(&rollout.response_lengths()),
            kl: masked_mean(kl, mask),
            truncated_rate: truncated(rollout).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]),
            logprob_diff_max: (&difference * mask.to_kind(Kind::Double)).max().double_value(&[]),
            logprob_diff_mean: masked_mean(&difference, mask),
            ..StepReport::default()
        }
    }
}

fn to_vec(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double)).expect("a vector of numbers")
}

/// Refuses a rollout that nothing can be learned from.
pub fn check_batch(rows: usize, mini_batch_size: usize) -> Result<()> {
    if rows == 0 || !rows.is_multiple_of(mini_batch_size) {
        return Err(Error::Refused(format!("{rows} responses do not divide into mini-batches of {mini_batch_size}")));
    }
    Ok(())
}
