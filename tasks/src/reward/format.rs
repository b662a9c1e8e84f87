//! Whether a response has a required structure, for example `<think>…</think><answer>…</answer>`.

use regex::Regex;

use super::{RewardError, RewardRequest, RewardSource};

/// 1 for a response of the required structure, else 0.
///
/// In the structure `…` (or `...`) stands for any text that is not blank, and everything else for itself. White
/// space is free around the whole, between tags and where the structure has any. Each tag must
/// appear as often as in the structure, so that opening `<think>` twice does not pass.
#[derive(Debug, Clone)]
pub struct FormatRule {
    whole: Regex,
    tags: Vec<(String, usize)>,
}

impl FormatRule {
    /// A rule for `structure`.
    ///
    /// # Errors
    /// A structure that is blank or has nothing but `…`.
    pub fn new(structure: &str) -> Result<Self, RewardError> {
        let setting = |message: String| RewardError::Setting { rule: "format".to_owned(), message };
        let structure = structure.trim().replace("...", "…");
        if structure.replace('…', "").trim().is_empty() {
            return Err(setting(format!(
                "structure {structure:?} asks for nothing; write for example <answer>…</answer>"
            )));
        }
        let pieces: Vec<String> = structure.split('…').map(literal_pattern).collect();
        let whole = Regex::new(&format!(r"(?s)\A\s*{}\s*\z", pieces.join(r".*?\S.*?")));
        let whole = whole.map_err(|error| setting(format!("structure {structure:?}: {error}")))?;
        Ok(Self { whole, tags: count_tags(&structure) })
    }

    fn matches(&self, response: &str) -> bool {
        self.whole.is_match(response)
            && self.tags.iter().all(|(tag, count)| response.matches(tag.as_str()).count() == *count)
    }
}

/// A pattern for literal text, with free white space between words and tags.
fn literal_pattern(text: &str) -> String {
    let spaced = text.replace("><", "> <");
    let words: Vec<String> = spaced.split_whitespace().map(regex::escape).collect();
    let edge = |is_space: bool| {
        if is_space && !words.is_empty() { r"\s*" } else { "" }
    };
    let starts = edge(text.starts_with(char::is_whitespace));
    let ends = edge(text.ends_with(char::is_whitespace));
    format!("{starts}{}{ends}", words.join(r"\s*"))
}

fn count_tags(structure: &str) -> Vec<(String, usize)> {
    let mut tags: Vec<(String, usize)> = Vec::new();
    let mut rest = structure;
    while let Some((_, after)) = rest.split_once('<') {
        let Some((name, after)) = after.split_once('>') else {
            break;
        };
        let tag = format!("<{name}>");
        match tags.iter_mut().find(|(known, _)| *known == tag) {
            Some((_, count)) => *count += 1,
            None => tags.push((tag, 1)),
        }
        rest = after;
    }
    tags
}

impl RewardSource for FormatRule {
    fn name(&self) -> String {
        "format".to_owned()
    }

    fn is_per_request(&self) -> bool {
        true
    }

    fn score(&self, requests: &[RewardRequest]) -> Result<Vec<f64>, RewardError> {
        Ok(requests.iter().map(|request| f64::from(self.matches(&request.response))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn think_and_answer() {
        for structure in ["<think>…</think><answer>…</answer>", "<think>...</think>\n<answer>...</answer>"] {
            let rule = FormatRule::new(structure).unwrap();
            for good in [
                "<think>a</think><answer>4</answer>",
                "  <think>two\nlines</think>\n\n<answer> 4 </answer>\n",
                "<think>a < b > c</think> <answer>4</answer>",
            ] {
                assert!(rule.matches(good), "{structure}: {good:?}");
            }
            for bad in [
                "",
                "4",
                "<think>a</think>",
                "<answer>4</answer><think>a</think>",
                "<think></think><answer>4</answer>",
                "<think>  \n</think><answer>4</answer>",
                "<think>a</think><answer>4</answer> and more",
                "<think>a</think> so <answer>4</answer>",
                "<think>a</think><answer>4</answer><answer>5</answer>",
                "<think><think>a</think><answer>4</answer>",
            ] {
                assert!(!rule.matches(bad), "{structure}: {bad:?}");
            }
        }
    }

    #[test]
    fn text_stands_for_itself() {
        let rule = FormatRule::new("Answer (final): …").unwrap();
        assert!(rule.matches("Answer (final): 4"));
        assert!(!rule.matches("Answer final: 4"));
        assert!(!rule.matches("Answer (final): "));
    }

    #[test]
    fn a_structure_that_asks_for_nothing_is_refused() {
        for structure in ["", " ", "…", "... …"] {
            assert!(FormatRule::new(structure).is_err(), "{structure:?}");
        }
    }
}
