//! What is learned, each algorithm one file; and the maths, each file one formula of the papers.

pub mod ppo;

pub mod reward_model;
pub mod sft;

pub mod columns;
pub mod masked;

pub mod bradley_terry;
pub mod gae;
pub mod kl;
pub mod losses;
pub mod reward_shaping;
pub mod schedule;
pub mod whiten;

use std::future::Future;
use std::sync::Arc;

use echelon_core::data::{Report, Rows};
pub use echelon_core::leads::{Lead, ReportLeads};
use echelon_core::loss::Loss;
use echelon_core::progress::Interrupt;
use echelon_core::role::Role;
use echelon_core::verb::Roles;
use echelon_core::{Error, Result};
use echelon_schema::{Rules, Table};
use serde_json::Value;
use tch::Kind;

use crate::columns::SCORES;
use crate::reward_shaping::ScoreShaping;

/// What a run needs to know of an algorithm; everything else is the run's.
pub trait Algorithm {
    /// Of its program, its run folder and its checkpoints.
    const NAME: &'static str;
    /// What its line on the terminal leads with.
    const LEADS: &'static [Lead];
    /// What its report leads with.
    const REPORT: ReportLeads;
    /// Who learns, and the name of that model in checkpoints.
    const LEARNERS: &'static [(Role, &'static str)];
    /// Whose model is written at the end, and into which folder of the run.
    const EXPORTS: (Role, &'static str);

    /// Learns from rows: the paper. Sampling before it and publishing after it are the run's.
    fn learn(&mut self, roles: &Roles, rows: Rows, now: Moment<'_>) -> impl Future<Output = Result<Outcome>>;

    /// Metrics named `eval/…` of held-out rows: by default the scores of responses that were sampled for them.
    fn evaluate(&self, roles: &Roles, held_out: Rows) -> impl Future<Output = Result<Outcome>> {
        scored(roles, held_out)
    }

    /// What it carries from step to step, for a checkpoint.
    fn state(&self) -> Value {
        Value::Null
    }

    /// Takes up what [`Algorithm::state`] gave.
    ///
    /// # Errors
    /// It is none of this algorithm's.
    fn restore(&mut self, state: Value) -> Result<()> {
        match state {
            Value::Null => Ok(()),
            other => Err(Error::Refused(format!("`{}` keeps no state, and the checkpoint has {other}", Self::NAME))),
        }
    }
}

/// A recipe's table of an algorithm that learns from responses that it samples. The table has the algorithm's name.
pub trait OnPolicy: Table + Clone + std::fmt::Debug + Default + PartialEq + 'static {
    type Algorithm: Algorithm;

    /// The driver's half.
    fn algorithm(&self, score_shaping: ScoreShaping, seed: u64) -> Self::Algorithm;
    /// The ranks' half: what the learning roles minimise.
    fn losses(&self) -> Vec<(Role, Arc<dyn Loss>)>;
    /// What planner and header need to know.
    fn learning(&self) -> Learning;
    /// Decides what a recipe left open.
    fn resolve(&mut self) {}
    /// Rules between its keys, in a run of `steps`.
    fn check(&self, _steps: usize, _rules: &mut Rules) {}

    /// Whether a critic learns beside the actor.
    fn has_critic() -> bool {
        Self::Algorithm::LEARNERS.iter().any(|(role, _)| *role == Role::Critic)
    }
}

/// How a step learns from its responses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Learning {
    /// Passes over the responses.
    pub epochs: usize,
    /// Responses per optimizer step.
    pub mini_batch_size: usize,
    /// First steps in which only the critic learns.
    pub critic_warmup_steps: usize,
    /// Whether the frozen reference is read, and so loaded.
    pub reads_reference: bool,
    /// An entropy bonus takes memory in the actor's backward pass.
    pub entropy_in_loss: bool,
}

/// Scores as they are, without shaping or KL.
async fn scored(roles: &Roles, rows: Rows) -> Result<Outcome> {
    let scores = roles.scores(&rows).await?.scores;
    let mut report = Report::default();
    report.stats.last("eval/reward", scores.mean(Kind::Double).double_value(&[]));
    report.stats.last("eval/reward_std", scores.std(false).double_value(&[]));
    Ok(Outcome { report, rows: rows.with(SCORES, scores)? })
}

/// Which step this is.
#[derive(Clone, Copy)]
pub struct Moment<'a> {
    /// From 1.
    pub step: u64,
    /// Looked at until the first optimizer step; after that the step is finished.
    pub interrupt: &'a Interrupt,
}

/// What a step saw and did, by the names of metrics, and its rows with what was found out about them.
#[derive(Debug)]
pub struct Outcome {
    pub report: Report,
    pub rows: Rows,
}
