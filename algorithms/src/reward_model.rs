//! Reward-model training: Bradley–Terry on pairs, −log σ(score of chosen − score of rejected), averaged over pairs.
//!
//! `cargo run --bin reward -- RECIPE` runs it.

use echelon_core::Result;
use echelon_core::data::{Report, Rows};
use echelon_core::loss::{Gives, Loss, Numbers, Output, Per, Term};
use echelon_core::role::Role;
use echelon_core::verb::Roles;
use tch::Kind;

use crate::bradley_terry::bradley_terry;
use crate::{Algorithm, Lead, Moment, Outcome, ReportLeads};

/// A model with a score head that learns which of two responses is the better.
#[derive(Clone, Copy, Debug, Default)]
pub struct RewardModel;

impl Algorithm for RewardModel {
    const NAME: &'static str = "reward";
    const LEADS: &'static [Lead] = &[
        Lead::new("loss", "train/loss", 4),
        Lead::new("accuracy", "train/accuracy", 4),
        Lead::new("eval/accuracy", "eval/accuracy", 4),
        Lead::new("eval/loss", "eval/loss", 4),
    ];
    const REPORT: ReportLeads = ReportLeads {
        tiles: &[],
        charts: &[
            ("Held-out loss", &["eval/loss"]),
            ("Held-out accuracy", &["eval/accuracy"]),
            ("Loss", &["train/loss"]),
            ("Accuracy", &["train/accuracy"]),
            ("Gradient norm", &["train/grad_norm"]),
            ("Learning rate", &["train/lr"]),
        ],
    };
    const LEARNERS: &'static [(Role, &'static str)] = &[(Role::Reward, "model")];
    const EXPORTS: (Role, &'static str) = (Role::Reward, "model");

    async fn learn(&mut self, roles: &Roles, rows: Rows, _now: Moment<'_>) -> Result<Outcome> {
        let report = roles.group(Role::Reward).learn(&PairwiseRanking, rows.shallow_clone(), []).await?;
        Ok(Outcome { report, rows })
    }

    async fn evaluate(&self, roles: &Roles, rows: Rows) -> Result<Outcome> {
        let scores = roles.group(Role::Reward).scores(&rows).await?.to_kind(Kind::Double);
        let pairs = scores.view([-1, 2]);
        let margin = pairs.select(1, 0) - pairs.select(1, 1);
        let mut report = Report::default();
        report.stats.last("eval/accuracy", margin.gt(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]));
        report.stats.last("eval/loss", -margin.log_sigmoid().mean(Kind::Double).double_value(&[]));
        report.stats.last("eval/score_mean", scores.mean(Kind::Double).double_value(&[]));
        report.stats.last("eval/score_std", scores.std(false).double_value(&[]));
        Ok(Outcome { report, rows })
    }
}

/// Of pairs: rows 2i and 2i + 1 are pair i's chosen and rejected sequences.
pub struct PairwiseRanking;

impl Loss for PairwiseRanking {
    fn name(&self) -> &'static str {
        "pairwise_ranking"
    }

    fn gives(&self) -> Gives {
        Gives::Scalars
    }

    fn columns(&self) -> &'static [&'static str] {
        &[]
    }

    fn unit(&self) -> usize {
        2
    }

    fn terms(&self, output: Output, rows: &Rows, _numbers: &Numbers, report: &mut Report) -> Result<Vec<Term>> {
        let scores = output.scalars().view([-1, 2]);
        let compared = bradley_terry(&scores.select(1, 0), &scores.select(1, 1));
        let pairs = (rows.num_rows() / 2) as f64;
        report.stats.mean("train/loss", compared.sum.detach(), pairs);
        report.stats.mean("train/accuracy", compared.num_correct, pairs);
        Ok(vec![Term { sum: compared.sum, per: Per::Unit }])
    }
}
