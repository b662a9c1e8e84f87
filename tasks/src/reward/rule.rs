//! A rule as one string, the way a recipe names it.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{FormatRule, LengthRule, Lexicon, MathRule, RegexRule, RewardError, RewardSource, SentimentRule};

/// A built-in rule and its settings, not yet built.
///
/// As a string: `math`, `math:tolerance=1e-6`, `regex:PATTERN`, `format:STRUCTURE`, `length:target=64`,
/// `length:min=10,max=200`, `sentiment:LEXICON_FILE`.
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
    /// Builds the rule; files are looked up in `directory`, the recipe's.
    ///
    /// # Errors
    /// A setting that means nothing, or a lexicon that cannot be read.
    pub fn build(&self, directory: &Path) -> Result<Box<dyn RewardSource>, RewardError> {
        Ok(match self {
            Self::Math { tolerance } => Box::new(MathRule { tolerance: *tolerance }),
            Self::Regex { pattern } => Box::new(RegexRule::new(pattern)?),
            Self::Format { structure } => Box::new(FormatRule::new(structure)?),
            Self::Length { min, max } => Box::new(LengthRule::between(*min, *max)?),
            Self::Sentiment { lexicon } => Box::new(SentimentRule::new(Lexicon::read(&directory.join(lexicon))?)),
        })
    }
}

impl FromStr for RuleConfig {
    type Err = RewardError;

    fn from_str(text: &str) -> Result<Self, RewardError> {
        let (name, argument) = text.split_once(':').map_or((text, None), |(name, argument)| (name, Some(argument)));
        let wrong = |message: &str| RewardError::Setting { rule: text.to_owned(), message: message.to_owned() };
        let required = |what: &str| argument.filter(|argument| !argument.trim().is_empty()).ok_or_else(|| wrong(what));
        match name.trim() {
            "math" => {
                parse_math(argument).ok_or_else(|| wrong("write math or math:tolerance=NUMBER, a number from 0 up"))
            }
            "regex" => Ok(Self::Regex { pattern: required("write regex:PATTERN")?.to_owned() }),
            "format" => Ok(Self::Format {
                structure: required("write format:STRUCTURE, for example format:<answer>…</answer>")?.to_owned(),
            }),
            "length" => {
                const FORMS: &str =
                    "write length:target=TOKENS or length:min=TOKENS,max=TOKENS (either may be left out)";
                parse_length(required(FORMS)?).ok_or_else(|| wrong(FORMS))
            }
            "sentiment" => Ok(Self::Sentiment { lexicon: required("write sentiment:LEXICON_FILE")?.trim().into() }),
            _ => Err(wrong("there is no such rule; the rules are math, regex, format, length and sentiment")),
        }
    }
}

fn parse_math(argument: Option<&str>) -> Option<RuleConfig> {
    let Some(argument) = argument else {
        return Some(RuleConfig::Math { tolerance: 0.0 });
    };
    let (key, value) = argument.split_once('=')?;
    let tolerance = value.trim().parse::<f64>().ok().filter(|tolerance| tolerance.is_finite() && *tolerance >= 0.0)?;
    (key.trim() == "tolerance").then_some(RuleConfig::Math { tolerance })
}

fn parse_length(argument: &str) -> Option<RuleConfig> {
    let (mut min, mut max) = (None, None);
    for setting in argument.split(',') {
        let (key, value) = setting.split_once('=')?;
        let value = Some(value.trim().parse::<usize>().ok()?);
        match key.trim() {
            "target" if min.is_none() && max.is_none() => (min, max) = (value, value),
            "min" if min.is_none() => min = value,
            "max" if max.is_none() => max = value,
            _ => return None,
        }
    }
    Some(RuleConfig::Length { min: min.unwrap_or(0), max })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_name_rules() {
        let length = |min, max| RuleConfig::Length { min, max };
        for (text, expected) in [
            ("math", RuleConfig::Math { tolerance: 0.0 }),
            ("math:tolerance=1e-3", RuleConfig::Math { tolerance: 1e-3 }),
            ("regex:^a:b$", RuleConfig::Regex { pattern: "^a:b$".to_owned() }),
            ("format:<a>…</a>", RuleConfig::Format { structure: "<a>…</a>".to_owned() }),
            ("length:target=64", length(64, Some(64))),
            ("length:min=10, max=200", length(10, Some(200))),
            ("length:max=200", length(0, Some(200))),
            ("sentiment:words.txt", RuleConfig::Sentiment { lexicon: "words.txt".into() }),
        ] {
            assert_eq!(text.parse::<RuleConfig>().unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn other_strings_say_what_to_write() {
        let message = |text: &str| text.parse::<RuleConfig>().unwrap_err().to_string();
        assert_eq!(
            message("maths"),
            "rule \"maths\": there is no such rule; the rules are math, regex, format, length and sentiment"
        );
        assert_eq!(message("regex"), "rule \"regex\": write regex:PATTERN");
        for text in [
            "math:x=1",
            "math:tolerance=-1",
            "math:tolerance=nan",
            "length:",
            "length:target=1,min=2",
            "length:min=a",
            "sentiment:",
            "format",
        ] {
            assert!(message(text).contains("write "), "{text}");
        }
        let broken = "regex:(".parse::<RuleConfig>().unwrap().build(Path::new(".")).err().unwrap().to_string();
        assert!(broken.starts_with("rule \"regex\": pattern \"(\": regex parse error"), "{broken}");
    }
}
