//! `samples.jsonl`: what the policy said, step by step, and the same as a text for TensorBoard.

use std::fmt::Write as _;

use serde::Serialize;

/// One sampled response of a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// The step that sampled it, from 1.
    pub step: u64,
    /// The prompt's text, as the model saw it.
    pub prompt: String,
    /// The response's text.
    pub response: String,
    /// Sum of the per-token rewards: the score less the KL penalty.
    pub reward: f64,
    /// What the reward source gave for the whole response.
    pub score: f64,
    /// Mean over response tokens of `logprobs - ref_logprobs`.
    pub kl: f64,
    /// Tokens of the response.
    pub response_length: u64,
    /// Why sampling ended: `stop` or `length`.
    pub finish_reason: String,
}

/// Samples as Markdown for TensorBoard's text tab.
///
/// Prompts and responses become indented code blocks: the one Markdown form that shows any text as it is.
pub fn samples_markdown(samples: &[Sample]) -> String {
    let mut markdown = String::new();
    for (index, sample) in samples.iter().enumerate() {
        let Sample { reward, score, kl, response_length, finish_reason, .. } = sample;
        // Writing to a String cannot fail.
        let _ = write!(
            markdown,
            "**{}.** score {score:.4}, reward {reward:.4}, kl {kl:.4}, {response_length} tokens, {finish_reason}\n\n\
             prompt\n\n{}\nresponse\n\n{}\n",
            index + 1,
            code_block(&sample.prompt),
            code_block(&sample.response),
        );
    }
    markdown
}

fn code_block(text: &str) -> String {
    if text.trim().is_empty() {
        return "    (empty)\n".into();
    }
    text.lines().map(|line| format!("    {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::JsonLines;

    fn sample(step: u64) -> Sample {
        Sample {
            step,
            prompt: "2+2=\n".into(),
            response: "</script> `4`".into(),
            reward: 0.5,
            score: 1.0,
            kl: f64::NAN,
            response_length: 3,
            finish_reason: "stop".into(),
        }
    }

    #[test]
    fn lines_carry_every_field_and_resume_cuts_whole_steps() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("samples.jsonl");
        let mut log = JsonLines::create(&path).unwrap();
        for step in 1..=3 {
            log.append(&[sample(step), sample(step)]).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text.lines().next().unwrap(),
            r#"{"step":1,"prompt":"2+2=\n","response":"</script> `4`","reward":0.5,"score":1.0,"kl":null,"response_length":3,"finish_reason":"stop"}"#
        );
        JsonLines::resume(&path, 2).unwrap();
        let cut = std::fs::read_to_string(&path).unwrap();
        assert_eq!(cut.lines().count(), 4);
        assert!(text.starts_with(&cut));
    }

    #[test]
    fn markdown_shows_text_as_code_whatever_it_contains() {
        let markdown = samples_markdown(&[sample(1), Sample { response: " ".into(), ..sample(1) }]);
        assert!(markdown.contains("\n    2+2=\n"), "{markdown}");
        assert!(markdown.contains("\n    </script> `4`\n"), "{markdown}");
        assert!(markdown.contains("\n    (empty)\n"), "{markdown}");
    }
}
