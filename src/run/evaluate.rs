//! What a policy, or a model that learns from examples, is like on held-out rows.

use std::path::Path;

use echelon_algorithms::Outcome;
use echelon_algorithms::columns::SCORES;
use echelon_core::data::{PROMPTS, RESPONSES};

use super::feed::Feed;
use super::metrics::metrics_of;
use echelon_monitor::{self as monitor, EvalResponse, Metrics, MonitorError};

pub enum Evaluation {
    /// Of a policy: its responses, with their rewards.
    Responses(monitor::Evaluation),
    Examples(Metrics),
}

impl Evaluation {
    pub fn of(found: &Outcome, feed: &Feed) -> Evaluation {
        let Outcome { report, rows } = found;
        let Some(scores) = rows.get(SCORES).filter(|_| !feed.reads_examples()) else {
            return Evaluation::Examples(metrics_of(report, None));
        };
        let rewards: Vec<f64> = Vec::try_from(scores).expect("a vector of scores");
        let texts = rows[PROMPTS].iter().zip(&rows[RESPONSES]).zip(&rewards);
        let responses = texts.map(|((prompt, response), &reward)| EvalResponse {
            prompt: prompt.to_string(),
            response: response.to_string(),
            reward,
        });
        Evaluation::Responses(monitor::Evaluation {
            mean_reward: report.stats.get("eval/reward").unwrap_or(f64::NAN),
            std_reward: report.stats.get("eval/reward_std").unwrap_or(f64::NAN),
            num_prompts: feed.num_held_out(),
            responses: responses.collect(),
        })
    }

    /// That of before a resume, where it is a policy's.
    pub fn read(path: &Path) -> Result<Option<Evaluation>, MonitorError> {
        Ok(monitor::Evaluation::read(path)?.map(Evaluation::Responses))
    }

    pub fn write(&self, path: &Path) -> Result<(), MonitorError> {
        match self {
            Evaluation::Responses(evaluation) => evaluation.write(path),
            Evaluation::Examples(metrics) => metrics.write_file(path),
        }
    }

    /// For a person, in a line.
    pub fn said(&self) -> String {
        match self {
            Evaluation::Responses(found) => {
                let reward = format!("{:.3} ±{:.3}", found.mean_reward, found.std_reward);
                format!("reward {reward} on {} held-out prompts", found.num_prompts)
            }
            Evaluation::Examples(metrics) => {
                let shown: Vec<String> =
                    metrics.scalars.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
                shown.join(", ")
            }
        }
    }

    pub fn num_prompts(&self) -> usize {
        if let Evaluation::Responses(found) = self { found.num_prompts } else { 0 }
    }

    /// Mean and standard deviation of the rewards.
    pub fn reward(&self) -> Option<(f64, f64)> {
        if let Evaluation::Responses(found) = self { Some((found.mean_reward, found.std_reward)) } else { None }
    }
}
