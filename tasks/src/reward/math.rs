//! Whether a response's final number is the label's.
//!
//! Both texts are read alike: the last `####` or `\boxed{…}` marks the answer, and without either the last number
//! is the answer. After `####` the first number of that line counts; a box counts when it holds exactly one
//! number, so that `\boxed{2x+3}` is not 3. A marked answer without a number is no answer: there is no second guess.

use super::error::RequestExcerpt;
use super::number::{Number, numbers};
use super::{RewardError, RewardRequest, RewardSource};

/// 1 for the label's number, else 0.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MathRule {
    /// Largest difference that passes, as a part of the label's size. At 0, the default, numbers compare as exact
    /// fractions: `0.5`, `1/2` and `\frac{2}{4}` are equal, `0.333` and `1/3` are not.
    pub tolerance: f64,
}

impl RewardSource for MathRule {
    fn name(&self) -> String {
        "math".to_owned()
    }

    fn is_per_request(&self) -> bool {
        true
    }

    fn score(&self, requests: &[RewardRequest]) -> Result<Vec<f64>, RewardError> {
        (0..requests.len()).map(|index| self.score_one(requests, index)).collect()
    }
}

impl MathRule {
    fn score_one(&self, requests: &[RewardRequest], index: usize) -> Result<f64, RewardError> {
        let request = || RequestExcerpt::new(requests, index);
        let Some(label) = &requests[index].label else {
            return Err(RewardError::NoLabel { rule: "math", request: request() });
        };
        let Some(expected) = answer(label) else {
            let (label, problem) = (label.clone(), "no number");
            return Err(RewardError::Label { rule: "math", request: request(), label, problem });
        };
        let found = answer(&requests[index].response);
        Ok(f64::from(found.is_some_and(|found| found.equals(&expected, self.tolerance))))
    }
}

/// The number a text gives as its answer.
fn answer(text: &str) -> Option<Number> {
    let hashes = text.rfind("####");
    let boxed = text.rfind("\\boxed");
    match (hashes, boxed) {
        (None, None) => numbers(text).pop(),
        (Some(at), boxed) if boxed.is_none_or(|boxed| boxed < at) => {
            let line = text[at + "####".len()..].trim_start().lines().next()?;
            numbers(line).first().copied()
        }
        (_, boxed) => match numbers(box_content(&text[boxed? + "\\boxed".len()..])?)[..] {
            [number] => Some(number),
            _ => None,
        },
    }
}

/// What stands in the braces at the start of `text`, nested ones included; without braces, the first word.
fn box_content(text: &str) -> Option<&str> {
    let text = text.trim_start();
    let Some(inner) = text.strip_prefix('{') else {
        return text.split_whitespace().next();
    };
    let mut depth = 1;
    let end = inner.find(|character| {
        depth += match character {
            '{' => 1,
            '}' => -1,
            _ => 0,
        };
        depth == 0
    })?;
    Some(&inner[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(response: &str, label: &str) -> f64 {
        MathRule::default().score(&[request(response, Some(label))]).unwrap()[0]
    }

    fn request(response: &str, label: Option<&str>) -> RewardRequest {
        RewardRequest {
            prompt: "how many?".to_owned(),
            response: response.to_owned(),
            label: label.map(str::to_owned),
            num_response_tokens: 1,
            finished: true,
        }
    }

    #[test]
    fn right_answers() {
        for (response, label) in [
            ("so 6 * 12 = 72\n#### 72", "72"),
            ("#### 72 apples", "he has 24*3 = 72.\n#### 72"),
            ("####\n72", "72"),
            ("the answer is 72.", "72"),
            ("the answer is **72**!", "72"),
            ("It is $1,234,567.50", "1234567.5"),
            ("It is -$5", "-5"),
            ("It is $-5", "-5"),
            ("x = −5", "-5"),
            ("10-5", "5"),
            ("so 10 - 5 = 5.0", "5"),
            (r"\boxed{72}", "72"),
            (r"\boxed{\text{about }72}", "72"),
            (r"$\boxed{\frac{3}{4}}$", "0.75"),
            (r"\boxed{-\dfrac{3}{4}}", "-3/4"),
            (r"\boxed{\frac34}", "3/4"),
            (r"\boxed{\frac{-3}{4}}", "-0.75"),
            (r"\boxed 7", "7"),
            (r"first \boxed{1}, no: \boxed{2}", "2"),
            (r"#### 3 then \boxed{4}", "4"),
            (r"\boxed{4} then #### 3", "3"),
            (r"\boxed{1{,}234}", "1234"),
            (r"\boxed{1\,234}", "1,234"),
            ("3/4", "0.75"),
            ("1 3/4 cups", "1.75"),
            (r"\boxed{1\frac{3}{4}}", "7/4"),
            ("50%", "50"),
            ("50%", "0.5"),
            (r"50\%", "50%"),
            ("0.5", "50%"),
            (".5", "0.5"),
            ("1e3", "1000"),
            ("2.5E-1", "0.25"),
            ("007", "7"),
            ("€ 12", "12"),
            ("-0", "0"),
            ("+4", "4"),
            ("We get 1, 2, and 3", "3"),
            ("123456789012345678901234567890", "123456789012345678901234567890"),
        ] {
            assert_eq!(score(response, label), 1.0, "{response:?} against {label:?}");
        }
    }

    #[test]
    fn wrong_answers() {
        for (response, label) in [
            ("", "72"),
            ("no idea", "72"),
            ("72 or 73", "72"),
            ("#### I think seventy-two\n72", "72"),
            (r"\boxed{2x+3}", "3"),
            (r"\boxed{72", "72"),
            (r"72, so \boxed{}", "72"),
            ("0.333", "1/3"),
            ("1/0", "0"),
            ("5%", "50"),
            ("50%", "5"),
            ("-5", "5"),
            ("1,23", "123"),
            ("123456789012345678901234567890", "123456789012345678901234567891"),
            ("9999999999999999999999999999999999999999", "1"),
        ] {
            assert_eq!(score(response, label), 0.0, "{response:?} against {label:?}");
        }
    }

    #[test]
    fn tolerance_is_relative_to_the_label() {
        let rule = MathRule { tolerance: 1e-2 };
        let scores =
            rule.score(&[request("0.333", Some("1/3")), request("0.32", Some("1/3")), request("99.5", Some("100"))]);
        assert_eq!(scores.unwrap(), [1.0, 0.0, 1.0]);
    }

    #[test]
    fn labels_that_cannot_be_compared_are_errors() {
        let missing =
            MathRule::default().score(&[request("1", Some("1")), request("1", None)]).unwrap_err().to_string();
        assert_eq!(
            missing,
            "rule \"math\": request 2 of 2 (prompt \"how many?\") has no label to compare with; \
             set label_key to the data's column of answers"
        );
        let wordy = MathRule::default().score(&[request("1", Some("one"))]).unwrap_err().to_string();
        assert_eq!(wordy, "rule \"math\": request 1 of 1 (prompt \"how many?\"): its label \"one\" holds no number");
    }

    /// Any fraction, written in any of the forms, equals itself and not its neighbour.
    #[test]
    fn forms_of_a_fraction_agree() {
        for numerator in -40_i64..40 {
            for denominator in [1_i64, 2, 4, 5, 8, 20, 25] {
                let decimal = format!("{}", numerator as f64 / denominator as f64);
                let forms = [
                    format!("{numerator}/{denominator}"),
                    format!(r"\boxed{{\frac{{{numerator}}}{{{denominator}}}}}"),
                    format!("#### {}/{}", numerator * 3, denominator * 3),
                    format!("it is {decimal}."),
                ];
                for form in &forms {
                    assert_eq!(score(form, &decimal), 1.0, "{form} against {decimal}");
                    let neighbour = format!("{}/{denominator}", numerator + 1);
                    assert_eq!(score(form, &neighbour), 0.0, "{form} against {neighbour}");
                }
            }
        }
    }

    #[test]
    fn any_text_is_answered() {
        let pieces = [
            "\\frac",
            "{",
            "}",
            "1",
            ",",
            ".",
            "/",
            "-",
            "%",
            "e",
            "####",
            "\\boxed",
            "$",
            " ",
            "é",
            "\\,",
            "99999999999999999999999999999999",
        ];
        let mut state = 1_u64;
        for _ in 0..20_000 {
            let mut text = String::new();
            for _ in 0..12 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                text.push_str(pieces[(state >> 33) as usize % pieces.len()]);
            }
            assert!([0.0, 1.0].contains(&score(&text, "1")), "{text}");
        }
    }
}
