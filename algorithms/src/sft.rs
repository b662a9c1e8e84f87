//! Supervised fine-tuning: the negative log-likelihood of the wanted tokens, averaged over the batch's wanted tokens.
//!
//! `cargo run --bin sft -- RECIPE` runs it.

use echelon_core::Result;
use echelon_core::data::{Report, Rows};
use echelon_core::loss::{Gives, Loss, Numbers, Output, Per, Term};
use echelon_core::role::Role;
use echelon_core::verb::Roles;
use tch::Kind;

use crate::masked::masked_sum;
use crate::{Algorithm, Lead, Moment, Outcome, ReportLeads};

/// A causal language model that learns completions.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sft;

impl Algorithm for Sft {
    const NAME: &'static str = "sft";
    const LEADS: &'static [Lead] = &[
        Lead::new("loss", "train/loss", 4),
        Lead::new("eval/loss", "eval/loss", 4),
        Lead::new("grad_norm", "train/grad_norm", 4),
    ];
    const REPORT: ReportLeads = ReportLeads {
        tiles: &[],
        charts: &[
            ("Held-out loss", &["eval/loss"]),
            ("Loss", &["train/loss"]),
            ("Gradient norm", &["train/grad_norm"]),
            ("Learning rate", &["train/lr"]),
        ],
    };
    const LEARNERS: &'static [(Role, &'static str)] = &[(Role::Actor, "model")];
    const EXPORTS: (Role, &'static str) = (Role::Actor, "model");

    async fn learn(&mut self, roles: &Roles, rows: Rows, _now: Moment<'_>) -> Result<Outcome> {
        let report = roles.actor().learn(&NegativeLogLikelihood, rows.shallow_clone(), []).await?;
        Ok(Outcome { report, rows })
    }

    async fn evaluate(&self, roles: &Roles, rows: Rows) -> Result<Outcome> {
        let logprobs = roles.actor().logprobs(&rows).await?; // 0 where nothing is learned
        let loss = -logprobs.sum(Kind::Double).double_value(&[]) / rows.num_own_tokens();
        let mut report = Report::default();
        report.stats.last("eval/loss", loss);
        report.stats.last("eval/perplexity", loss.exp());
        Ok(Outcome { report, rows })
    }
}

/// −log π(token | prefix) of the own tokens, which are the completion's.
pub struct NegativeLogLikelihood;

impl Loss for NegativeLogLikelihood {
    fn name(&self) -> &'static str {
        "negative_log_likelihood"
    }

    fn gives(&self) -> Gives {
        Gives::Logprobs
    }

    fn columns(&self) -> &'static [&'static str] {
        &[]
    }

    fn terms(&self, output: Output, rows: &Rows, _numbers: &Numbers, report: &mut Report) -> Result<Vec<Term>> {
        let sum = -masked_sum(output.logprobs(), &rows.own);
        report.stats.mean("train/loss", sum.detach(), rows.own.sum(Kind::Double));
        Ok(vec![Term { sum, per: Per::Token }])
    }
}
