//! Scores for responses, without a model: rules, a remote server, a program.
//!
//! Each is a [`RewardSource`]. Invariants:
//! * RW-1: a source answers with one finite number per request, in order, or with an error that names the request.
//!   Nothing that went wrong ever becomes a number.
//! * RW-2: scoring blocks; whoever runs an event loop calls it from a thread of its own.

mod command;
mod error;
mod format;
mod keys;
mod length;
mod math;
mod number;
mod pattern;
mod rule;
mod sentiment;
mod url;

pub use command::{CommandConfig, CommandReward};
pub use error::{RequestExcerpt, RewardError};
pub use format::FormatRule;
pub use keys::{RuleName, SourceKeys};
pub use length::LengthRule;
pub use math::MathRule;
pub use pattern::RegexRule;
pub use rule::RuleConfig;
pub use sentiment::{Lexicon, SentimentRule};
pub use url::{UrlConfig, UrlReward};

use serde::{Deserialize, Serialize};

/// One response to score.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewardRequest {
    /// The prompt as the policy saw it, decoded.
    pub prompt: String,
    /// The response, decoded.
    pub response: String,
    /// The data set's reference answer.
    pub label: Option<String>,
    /// Tokens of the response.
    pub num_response_tokens: usize,
    /// Whether the response ended by itself rather than at the token limit.
    pub finished: bool,
}

/// Scores responses.
pub trait RewardSource: Send + Sync {
    /// Short name for metrics and messages, for example `math`.
    fn name(&self) -> String;

    /// One score per request, in order. Blocks.
    ///
    /// # Errors
    /// Anything that keeps it from scoring every request; the error names the first request concerned.
    fn score(&self, requests: &[RewardRequest]) -> Result<Vec<f64>, RewardError>;

    /// Whether each score depends on its own request alone and nothing is kept between calls, so that parts of a batch may be
    /// scored at once.
    fn is_per_request(&self) -> bool {
        false
    }

    /// What there is to report about the last [`Self::score`] beside the scores, by metric name; each call
    /// hands it out once.
    fn take_metrics(&self) -> Vec<(String, f64)> {
        Vec::new()
    }
}

/// Scores `requests` and checks the answer as RW-1 says (AR-20): for sources written elsewhere.
///
/// # Errors
/// The source's own, a wrong number of scores, or a score that is not finite.
pub fn score_checked(source: &dyn RewardSource, requests: &[RewardRequest]) -> Result<Vec<f64>, RewardError> {
    if requests.is_empty() {
        return Ok(Vec::new());
    }
    let scores = source.score(requests)?;
    if scores.len() != requests.len() {
        return Err(RewardError::Count { source_name: source.name(), expected: requests.len(), found: scores.len() });
    }
    match scores.iter().position(|score| !score.is_finite()) {
        None => Ok(scores),
        Some(index) => Err(RewardError::NonFinite {
            source_name: source.name(),
            request: RequestExcerpt::new(requests, index),
            score: scores[index],
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(Vec<f64>);

    impl RewardSource for Fixed {
        fn name(&self) -> String {
            "fixed".to_owned()
        }

        fn score(&self, _: &[RewardRequest]) -> Result<Vec<f64>, RewardError> {
            Ok(self.0.clone())
        }
    }

    #[test]
    fn a_source_that_breaks_the_rules_is_named() {
        let (prompt, response, label) = ("1+1".to_owned(), "2".to_owned(), None);
        let request = RewardRequest { prompt, response, label, num_response_tokens: 1, finished: true };
        let requests = [request.clone(), request];
        let error = |scores| score_checked(&Fixed(scores), &requests).unwrap_err().to_string();
        assert_eq!(error(vec![1.0]), "reward \"fixed\": 2 requests, 1 scores");
        assert_eq!(
            error(vec![1.0, f64::NAN]),
            "reward \"fixed\": request 2 of 2 (prompt \"1+1\"): its score is NaN, not a finite number"
        );
        assert_eq!(score_checked(&Fixed(vec![]), &[]).unwrap(), Vec::<f64>::new());
    }
}
