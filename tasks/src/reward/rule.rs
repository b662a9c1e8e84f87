//! A rule as a value, to be built where responses are scored.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{FormatRule, LengthRule, Lexicon, MathRule, RegexRule, RewardError, RewardSource, SentimentRule};

/// A built-in rule and its settings, not yet built.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum RuleConfig {
    /// See [`MathRule`].
    Math { tolerance: f64 },
    /// See [`RegexRule`].
    Regex { pattern: String },
    /// See [`FormatRule`].
    Format { structure: String },
    /// See [`LengthRule`]; in tokens.
    Length { min: usize, max: Option<usize> },
    /// See [`SentimentRule`].
    Sentiment { lexicon: PathBuf },
}

impl RuleConfig {
    /// Builds the rule.
    ///
    /// # Errors
    /// A setting that means nothing, or a lexicon that cannot be read.
    pub fn build(&self) -> Result<Box<dyn RewardSource>, RewardError> {
        Ok(match self {
            Self::Math { tolerance } => Box::new(MathRule { tolerance: *tolerance }),
            Self::Regex { pattern } => Box::new(RegexRule::new(pattern)?),
            Self::Format { structure } => Box::new(FormatRule::new(structure)?),
            Self::Length { min, max } => Box::new(LengthRule::between(*min, *max)?),
            Self::Sentiment { lexicon } => Box::new(SentimentRule::new(Lexicon::read(lexicon)?)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_that_is_none_is_refused() {
        let broken = RuleConfig::Regex { pattern: "(".into() }.build().err().unwrap().to_string();
        assert!(broken.starts_with("rule \"regex\": pattern \"(\": regex parse error"), "{broken}");
    }
}
