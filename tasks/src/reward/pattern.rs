//! Whether a response matches a regular expression.

use regex::Regex;

use super::{RewardError, RewardRequest, RewardSource};

/// 1 where the pattern matches anywhere in the response, else 0.
#[derive(Debug, Clone)]
pub struct RegexRule {
    pattern: Regex,
}

impl RegexRule {
    /// A rule for `pattern`, in the syntax of the regex crate (linear time, so no look-around; `(?s)` lets `.` match
    /// line ends, `^…$` binds the whole response).
    ///
    /// # Errors
    /// A pattern that is not a regular expression.
    pub fn new(pattern: &str) -> Result<Self, RewardError> {
        let wrong =
            |error| RewardError::Setting { rule: "regex".to_owned(), message: format!("pattern {pattern:?}: {error}") };
        Ok(Self { pattern: Regex::new(pattern).map_err(wrong)? })
    }
}

impl RewardSource for RegexRule {
    fn name(&self) -> String {
        "regex".to_owned()
    }

    fn is_per_request(&self) -> bool {
        true
    }

    fn score(&self, requests: &[RewardRequest]) -> Result<Vec<f64>, RewardError> {
        Ok(requests.iter().map(|request| f64::from(self.pattern.is_match(&request.response))).collect())
    }
}
