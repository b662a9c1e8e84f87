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

use std::sync::Arc;

use echelon_core::data::{ROLLOUT_LOGPROBS, Report, Rows, TRUNCATED};
use echelon_core::loss::{Gives, Loss, Numbers, Output, Per, Term};
use echelon_core::random::{Domain, permutation};
use echelon_core::role::Role;
use echelon_core::verb::Roles;
use echelon_core::{Error, Result};
use echelon_schema::Rules;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::columns::{ADVANTAGES, KL, OLD_LOGPROBS, REF_LOGPROBS, RETURNS, REWARDS, SCORES, SHAPED_SCORES, VALUES};
use crate::gae::{explained_variance, gae};
use crate::kl::{KlController, KlEstimator, kl_estimate};
use crate::losses::{PolicyClip, entropy_loss, kl_loss, policy_loss, value_loss};
use crate::masked::{masked_mean, masked_sum};
use crate::reward_shaping::{ScoreShaping, token_rewards};
use crate::whiten::whiten;
use crate::{Algorithm, Lead, Learning, Moment, OnPolicy, Outcome, ReportLeads};

pub use table::{KlPlacement, PpoKeys};

/// The driver's half: what a step decides by, and what it carries from one to the next.
#[derive(Clone, Debug)]
pub struct Ppo {
    keys: PpoKeys,
    score_shaping: ScoreShaping,
    seed: u64,
    policy_loss: PolicyLoss,
    value_loss: ValueLoss,
    kl: KlController,
}

impl Algorithm for Ppo {
    const NAME: &'static str = "ppo";
    const LEADS: &'static [Lead] = &[
        Lead::new("reward", "train/reward", 3).with(" ±", "train/reward_std", 2),
        Lead::new("kl", "train/kl", 4),
        Lead::new("len", "train/response_length", 1),
        Lead::new("clip", "train/ppo_clip_ratio", 2),
        Lead::new("loss", "train/policy_loss", 3).with("/", "train/critic_loss", 2),
    ];
    const REPORT: ReportLeads = ReportLeads {
        tiles: &[
            ("KL to the reference", "train/kl"),
            ("Explained variance", "train/explained_variance"),
            ("Response length", "train/response_length"),
        ],
        charts: &[
            ("Reward", &["train/reward"]),
            ("Held-out reward", &["eval/reward"]),
            ("KL to the reference", &["train/kl"]),
            ("Response length (tokens)", &["train/response_length"]),
            ("Policy loss", &["train/policy_loss"]),
            ("Critic loss", &["train/critic_loss"]),
            ("Explained variance", &["train/explained_variance"]),
            ("Clip ratio", &["train/ppo_clip_ratio"]),
            ("KL to the step's start", &["train/ppo_kl"]),
            ("Entropy", &["train/entropy"]),
            ("Gradient norm", &["train/actor_grad_norm", "train/critic_grad_norm"]),
            ("Learning rate", &["train/actor_lr", "train/critic_lr"]),
        ],
    };
    const LEARNERS: &'static [(Role, &'static str)] = &[(Role::Actor, "actor"), (Role::Critic, "critic")];
    const EXPORTS: (Role, &'static str) = (Role::Actor, "actor");

    /// Learns from sampled `rows`.
    ///
    /// Runs on the driver. Every `.await` is one call on a worker group: the group splits the rows over its data-parallel
    /// ranks, runs the call on all of them, and gathers the results in row order.
    ///
    /// # Errors
    /// Returns the first worker failure, with its role, rank and cause. The weights on the ranks are unspecified then, unless
    /// it is [`echelon_core::Error::Interrupted`]: resume from the last checkpoint.
    // ANCHOR: learn
    async fn learn(&mut self, roles: &Roles, rows: Rows, now: Moment<'_>) -> Result<Outcome> {
        // Score: forward passes over the same tokens. Groups on different devices run at once.
        let (old_logprobs, ref_logprobs, values, scored) = tokio::try_join!(
            roles.actor().logprobs(&rows), // [B, T] log pi_old(token | prefix), before this step
            roles.ref_logprobs(&rows),     // [B, T] log pi_ref(token | prefix), frozen
            roles.critic().values(&rows),  // [B, T] V(prefix)
            roles.scores(&rows),           // [B]    one score per response
        )?;

        // Advantages: plain tensor maths on the driver, where the whole batch is visible.
        let (own, kind) = (rows.own.shallow_clone(), old_logprobs.kind()); // [B, T] true on the tokens the policy sampled
        let kl = self.kl_to_reference(&old_logprobs, ref_logprobs.as_ref(), &own); // [B, T]
        let scores = self.score_shaping.apply(&scored.scores, &rows[TRUNCATED]); // [B]
        let rewards = token_rewards(&kl, &scores, &own, self.kl_coef(KlPlacement::Reward)); // [B, T]
        let (advantages, returns) =
            gae(&rewards, &values.to_kind(Kind::Double), &own, self.keys.gamma, self.keys.gae_lambda);
        let rows = rows.with(OLD_LOGPROBS, old_logprobs)?.with_some(REF_LOGPROBS, ref_logprobs)?.with(KL, kl)?;
        let rows = rows.with(SCORES, scored.scores)?.with(SHAPED_SCORES, scores)?.with(REWARDS, rewards)?;
        let rows = rows.with(VALUES, values)?.with(ADVANTAGES, whiten(&advantages, &own))?.with(RETURNS, returns)?;
        let (mut report, kl) = (self.seen(&rows, scored.report), masked_mean(&rows[KL], &own));
        let rows = rows.per_token_in(kind, &[ADVANTAGES, RETURNS]);

        // Update: one optimizer step per mini-batch, on the policy and on the critic.
        now.interrupt.check()?;
        for epoch in 0..self.keys.epochs {
            for mini_batch in self.mini_batches(rows.num_rows(), now.step, epoch) {
                let critic = roles.critic().learn(&self.value_loss, rows.select(&mini_batch), []);
                if now.step <= self.keys.critic_warmup_steps as u64 {
                    report.follow(critic.await?);
                    continue;
                }
                let kl_coef = self.kl_coef(KlPlacement::Loss);
                let actor = roles.actor().learn(&self.policy_loss, rows.select(&mini_batch), [("kl_coef", kl_coef)]);
                let (actor, critic) = tokio::try_join!(actor, critic)?;
                report.follow(actor);
                report.follow(critic);
            }
        }
        self.kl.update(kl, rows.num_rows());
        Ok(Outcome { report, rows })
    }
    // ANCHOR_END: learn

    /// The KL coefficient and its controller.
    fn state(&self) -> Value {
        serde_json::to_value(self.kl).expect("numbers")
    }

    fn restore(&mut self, state: Value) -> Result<()> {
        self.kl =
            serde_json::from_value(state).map_err(|error| Error::other("the KL coefficient of a checkpoint", error))?;
        Ok(())
    }
}

impl OnPolicy for PpoKeys {
    type Algorithm = Ppo;

    fn algorithm(&self, score_shaping: ScoreShaping, seed: u64) -> Ppo {
        let kl = match self.kl_target {
            Some(target) => KlController::adaptive(self.kl_coef, target, self.kl_horizon),
            None => KlController::fixed(self.kl_coef),
        };
        let (policy_loss, value_loss) = (PolicyLoss::of(self), ValueLoss::of(self));
        Ppo { keys: self.clone(), score_shaping, seed, policy_loss, value_loss, kl }
    }

    fn losses(&self) -> Vec<(Role, Arc<dyn Loss>)> {
        vec![(Role::Actor, Arc::new(PolicyLoss::of(self))), (Role::Critic, Arc::new(ValueLoss::of(self)))]
    }

    fn learning(&self) -> Learning {
        Learning {
            epochs: self.epochs,
            mini_batch_size: self.mini_batch_size,
            critic_warmup_steps: self.critic_warmup_steps,
            reads_reference: self.kl_coef > 0.0,
            entropy_in_loss: self.entropy_coef != 0.0,
        }
    }

    fn resolve(&mut self) {
        self.policy_clip_high.get_or_insert(self.policy_clip);
    }

    fn check(&self, steps: usize, rules: &mut Rules) {
        if self.kl_coef == 0.0 && rules.has("reference.model") {
            let message = "`reference.model` is never loaded, because `ppo.kl_coef` = 0";
            rules.broken(&["reference.model"], message, "delete it, or give `kl_coef` a value above 0");
        }
        if self.kl_coef == 0.0 && self.kl_target.is_some() {
            let message = "`ppo.kl_target` cannot adapt `ppo.kl_coef` = 0: it is multiplied, and stays 0";
            rules.broken(&["ppo.kl_target"], message, "start from a `kl_coef` above 0");
        }
        if let Some(high) = self.policy_clip_high.filter(|high| *high < self.policy_clip) {
            let message = format!("`ppo.policy_clip_high` = {high} is below `ppo.policy_clip` = {}", self.policy_clip);
            rules.broken(&["ppo.policy_clip_high"], message, "the upper side of the clip is the wider one");
        }
        let warmup = self.critic_warmup_steps;
        if warmup >= steps && warmup > 0 {
            let message = format!("`ppo.critic_warmup_steps` = {warmup} leaves the actor none of the {steps} steps");
            rules.broken(&["ppo.critic_warmup_steps", "train.steps"], message, "make it smaller than `train.steps`");
        }
    }
}

impl Ppo {
    /// Rows of each mini-batch of an epoch: a seeded order, cut into equal parts.
    fn mini_batches(&self, rows: usize, step: u64, epoch: usize) -> Vec<Vec<i64>> {
        let order = permutation(rows, self.seed, Domain::MiniBatches, step, epoch as u32);
        order.chunks(self.keys.mini_batch_size).map(|rows| rows.iter().map(|&row| row as i64).collect()).collect()
    }

    /// The coefficient of the KL where it counts, 0 in the other place.
    fn kl_coef(&self, place: KlPlacement) -> f64 {
        if self.keys.kl_placement == place { self.kl.coef() } else { 0.0 }
    }

    /// `[B, T]` f64; zeros without a reference.
    fn kl_to_reference(&self, logprobs: &Tensor, reference: Option<&Tensor>, own: &Tensor) -> Tensor {
        let logprobs = logprobs.to_kind(Kind::Double);
        match reference {
            Some(reference) => kl_estimate(&logprobs, &reference.to_kind(Kind::Double), own, self.keys.kl_estimator),
            None => logprobs.zeros_like(),
        }
    }

    /// What there is to tell of rows before anything is learned; names are OpenRLHF's where it has one.
    fn seen(&self, rows: &Rows, sources: Report) -> Report {
        let (own, scores) = (&rows.own, &rows[SCORES]);
        let mean = |numbers: &Tensor| numbers.mean(Kind::Double).double_value(&[]);
        let lengths = rows.own_lengths();
        let rewards = rows[REWARDS].sum_dim_intlist(1, false, Kind::Double);
        let difference =
            (rows[OLD_LOGPROBS].to_kind(Kind::Double) - rows[ROLLOUT_LOGPROBS].to_kind(Kind::Double)).abs();
        let mut report = Report::default();
        report.histograms.add("train/rewards", scores);
        report.histograms.add("train/response_lengths", &lengths);
        let numbers = [
            ("train/reward", mean(scores)),
            ("train/reward_std", scores.std(false).double_value(&[])),
            ("train/score", mean(&rows[SHAPED_SCORES])),
            ("train/return", masked_mean(&rows[RETURNS], own)),
            ("train/total_reward", mean(&rewards)),
            ("train/kl", masked_mean(&rows[KL], own)),
            ("train/kl_coef", self.kl.coef()),
            ("train/response_length", mean(&lengths)),
            ("train/truncated", mean(&rows[TRUNCATED].to_kind(Kind::Double))),
            ("train/values", masked_mean(&rows[VALUES], own)),
            ("train/explained_variance", explained_variance(&rows[VALUES].to_kind(Kind::Double), &rows[RETURNS], own)),
            ("perf/rollout_logprob_diff_max", (&difference * own.to_kind(Kind::Double)).max().double_value(&[])),
            ("perf/rollout_logprob_diff_mean", masked_mean(&difference, own)),
        ];
        numbers.into_iter().for_each(|(name, number)| report.stats.last(name, number));
        report.stats.unite(sources.stats);
        report.histograms.unite(sources.histograms);
        report
    }
}

/// The actor's loss: the clipped surrogate, an entropy bonus, and the KL to the reference where it is placed here.
#[derive(Clone, Copy, Debug)]
pub struct PolicyLoss {
    pub clip: PolicyClip,
    pub entropy_coef: f64,
    pub kl_estimator: KlEstimator,
}

impl PolicyLoss {
    /// By the recipe's `[ppo]`.
    pub fn of(keys: &PpoKeys) -> PolicyLoss {
        let high = keys.policy_clip_high.unwrap_or(keys.policy_clip);
        let clip = PolicyClip { low: keys.policy_clip, high, dual: keys.dual_clip };
        PolicyLoss { clip, entropy_coef: keys.entropy_coef, kl_estimator: keys.kl_estimator }
    }
}

impl Loss for PolicyLoss {
    fn name(&self) -> &'static str {
        "ppo_policy"
    }

    fn gives(&self) -> Gives {
        Gives::Logprobs
    }

    fn columns(&self) -> &'static [&'static str] {
        const { &[OLD_LOGPROBS.name, ADVANTAGES.name] }
    }

    fn may_read(&self) -> &'static [&'static str] {
        const { &[REF_LOGPROBS.name, VALUES.name, RETURNS.name] }
    }

    fn prefix(&self) -> &'static str {
        "train/actor_"
    }

    fn terms(&self, output: Output, rows: &Rows, numbers: &Numbers, report: &mut Report) -> Result<Vec<Term>> {
        let (logprobs, own, kl_coef) = (output.logprobs(), &rows.own, numbers.get("kl_coef")?);
        let surrogate = policy_loss(logprobs, &rows[OLD_LOGPROBS], &rows[ADVANTAGES], own, self.clip);
        let sums = surrogate.sums;
        let tokens = || sums.num_tokens.shallow_clone();
        let mut terms = vec![surrogate.sum.shallow_clone()];
        report.stats.mean("train/policy_loss", surrogate.sum, tokens());
        let kl = rows.get(REF_LOGPROBS).filter(|_| kl_coef != 0.0);
        let kl = kl.map(|reference| kl_loss(logprobs, reference, own, self.kl_estimator, kl_coef));
        report.stats.mean("train/kl_loss", kl.as_ref().map_or_else(|| tokens().zeros_like(), Tensor::detach), tokens());
        if let Some(entropy) = output.entropy() {
            report.stats.mean("train/entropy", masked_sum(&entropy.detach(), own), tokens());
            terms.extend((self.entropy_coef != 0.0).then(|| entropy_loss(entropy, own, self.entropy_coef)));
        }
        terms.extend(kl);
        report.stats.mean("train/ppo_clip_ratio", sums.num_clipped, tokens());
        report.stats.mean("train/ppo_kl", sums.ppo_kl, tokens());
        report.stats.mean("train/approx_kl", sums.approx_kl, tokens());
        report.stats.max("train/ratio_max", sums.ratio_max);
        report.histograms.add("train/ratios", &surrogate.ratio.masked_select(own).to_kind(Kind::Float));
        Ok(terms.into_iter().map(|sum| Term { sum, per: Per::Token }).collect())
    }
}

/// The critic's loss: the squared error, clipped around the values of the rollout.
#[derive(Clone, Copy, Debug)]
pub struct ValueLoss {
    pub value_clip: Option<f64>,
}

impl ValueLoss {
    /// By the recipe's `[ppo]`.
    pub fn of(keys: &PpoKeys) -> ValueLoss {
        ValueLoss { value_clip: keys.value_clip }
    }
}

impl Loss for ValueLoss {
    fn name(&self) -> &'static str {
        "ppo_value"
    }

    fn gives(&self) -> Gives {
        Gives::Scalars
    }

    fn columns(&self) -> &'static [&'static str] {
        const { &[VALUES.name, RETURNS.name] }
    }

    fn may_read(&self) -> &'static [&'static str] {
        const { &[OLD_LOGPROBS.name, REF_LOGPROBS.name, ADVANTAGES.name] }
    }

    fn prefix(&self) -> &'static str {
        "train/critic_"
    }

    fn terms(&self, output: Output, rows: &Rows, _numbers: &Numbers, report: &mut Report) -> Result<Vec<Term>> {
        let (own, tokens) = (&rows.own, rows.own.sum(Kind::Double));
        let loss = value_loss(output.scalars(), &rows[VALUES], &rows[RETURNS], own, self.value_clip);
        report.stats.mean("train/critic_loss", loss.sum.shallow_clone(), tokens.shallow_clone());
        report.stats.mean("train/critic_clip_ratio", loss.num_clipped, tokens);
        Ok(vec![Term { sum: loss.sum, per: Per::Token }])
    }
}
