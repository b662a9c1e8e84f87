//! Responses to prompts.

use serde::{Deserialize, Serialize};

use super::{Reply, Request, Verb, WorkerGroup};
use crate::data::{POLICY_VERSION, Report, Rows, Shares, deal};
use crate::error::{Error, Result};
use crate::message::{Body, Message};
use crate::rollout::{Prompts, SamplingConfig};

/// `samples_per_prompt` responses to every prompt.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Generate {
    pub prompts: Prompts,
    pub sampling: SamplingConfig,
}

/// Responses, ordered by prompt, then by sample, and the work of making them ([`crate::rollout::GenerationReport`]).
#[derive(Debug)]
pub struct Generated {
    pub rows: Rows,
    pub report: Report,
}

impl Verb for Generate {
    const NAME: &'static str = "generate";
    type Reply = Generated;

    /// By prompt: a prompt's samples share its pass.
    fn divide(request: Request<Generate>, ranks: usize) -> (Vec<Request<Generate>>, Shares) {
        let Generate { prompts, sampling } = &request.verb;
        let lengths: Vec<i64> = prompts.rows.iter().map(|prompt| prompt.token_ids.len() as i64).collect();
        let shares = deal(&lengths, 1, ranks);
        let of_rank = |share: &Vec<i64>| {
            let rows = share.iter().map(|&row| prompts.rows[row as usize].clone()).collect();
            let prompts = Prompts { rows, ..*prompts };
            Request {
                role: request.role,
                verb: Generate { prompts, sampling: sampling.clone() },
                rows: Rows::default(),
            }
        };
        let samples = |share: &Vec<i64>| crate::data::rows_of(share, prompts.samples_per_prompt);
        (shares.iter().map(of_rank).collect(), shares.iter().map(samples).collect())
    }
}

impl Reply for Generated {
    fn unite(replies: Vec<Generated>, shares: &Shares) -> Result<Generated> {
        let (rows, reports): (Vec<Rows>, Vec<Report>) =
            replies.into_iter().map(|part| (part.rows, part.report)).unzip();
        let rows = Rows::unite(&rows, shares)?;
        let versions = rows.get(POLICY_VERSION).map(Vec::<i64>::try_from).transpose()?.unwrap_or_default();
        match versions.iter().find(|&version| *version != versions[0]) {
            Some(other) => {
                Err(Error::Refused(format!("generators sample with policy versions {:?}", (versions[0], other))))
            }
            None => Ok(Generated { rows, report: Report::unite(reports, shares) }),
        }
    }
}

impl Message for Generated {
    const KIND: &'static str = "rollout";
    fn to_body(&self) -> Body {
        self.rows.add_to(self.report.to_body())
    }
    fn from_body(body: &mut Body) -> Result<Generated> {
        let rows = Rows::take_from(body)?;
        Ok(Generated { rows, report: Report::from_body(body)? })
    }
}

impl WorkerGroup {
    /// Samples `samples_per_prompt` responses to every prompt.
    pub async fn generate(&self, prompts: Prompts, sampling: &SamplingConfig) -> Result<Generated> {
        self.call(Generate { prompts, sampling: sampling.clone() }, Rows::default()).await
    }
}
