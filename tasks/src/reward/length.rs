//! How near a response's length is to what was asked for.

use super::{RewardError, RewardRequest, RewardSource};

/// 1 for `min` to `max` tokens; below it falls in a straight line to 0 at no token, above it to 0 at twice `max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LengthRule {
    min_tokens: usize,
    max_tokens: usize,
}

impl LengthRule {
    /// A range of lengths, in tokens; without `max_tokens` no response is too long.
    ///
    /// # Errors
    /// `max_tokens` of 0, or below `min_tokens`.
    pub fn between(min_tokens: usize, max_tokens: Option<usize>) -> Result<Self, RewardError> {
        let max_tokens = max_tokens.unwrap_or(usize::MAX);
        if max_tokens == 0 || max_tokens < min_tokens {
            let message = format!("max = {max_tokens} must be above 0 and not below min = {min_tokens}");
            return Err(RewardError::Setting { rule: "length".to_owned(), message });
        }
        Ok(Self { min_tokens, max_tokens })
    }

    fn score_length(&self, num_tokens: usize) -> f64 {
        if num_tokens < self.min_tokens {
            num_tokens as f64 / self.min_tokens as f64
        } else if num_tokens > self.max_tokens {
            (2.0 - num_tokens as f64 / self.max_tokens as f64).max(0.0)
        } else {
            1.0
        }
    }
}

impl RewardSource for LengthRule {
    fn name(&self) -> String {
        "length".to_owned()
    }

    fn is_per_request(&self) -> bool {
        true
    }

    fn score(&self, requests: &[RewardRequest]) -> Result<Vec<f64>, RewardError> {
        Ok(requests.iter().map(|request| self.score_length(request.num_response_tokens)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn falls_on_both_sides_of_the_range() {
        let target = LengthRule::between(10, Some(10)).unwrap();
        assert_eq!([0, 5, 10, 15, 20, 40].map(|length| target.score_length(length)), [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]);
        let range = LengthRule::between(4, Some(8)).unwrap();
        assert_eq!([2, 4, 8, 12].map(|length| range.score_length(length)), [0.5, 1.0, 1.0, 0.5]);
        let open = LengthRule::between(4, None).unwrap();
        assert_eq!([1, 1_000_000].map(|length| open.score_length(length)), [0.25, 1.0]);
        assert_eq!(LengthRule::between(0, Some(8)).unwrap().score_length(0), 1.0);
    }

    #[test]
    fn impossible_ranges_are_refused() {
        let message = LengthRule::between(9, Some(8)).unwrap_err().to_string();
        assert_eq!(message, "rule \"length\": max = 8 must be above 0 and not below min = 9");
        assert!(LengthRule::between(0, Some(0)).is_err());
    }
}
