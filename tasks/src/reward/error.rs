//! What can keep a response from being scored, said with the request.

use std::fmt;
use std::path::PathBuf;

use super::RewardRequest;

/// One request of a batch, as messages show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestExcerpt {
    /// From 1, in the batch.
    pub number: usize,
    /// Requests in the batch.
    pub count: usize,
    /// Start of the prompt.
    pub prompt: String,
}

impl RequestExcerpt {
    /// Request `index` (from 0) of `requests`.
    pub fn new(requests: &[RewardRequest], index: usize) -> Self {
        let prompt = requests.get(index).map_or_else(String::new, |request| excerpt(&request.prompt, 80));
        Self { number: index + 1, count: requests.len(), prompt }
    }
}

impl fmt::Display for RequestExcerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {} of {} (prompt {:?})", self.number, self.count, self.prompt)
    }
}

/// The first `max_chars` characters of `text`, with a mark where it was cut.
pub(super) fn excerpt(text: &str, max_chars: usize) -> String {
    match text.char_indices().nth(max_chars) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

/// Why responses could not be scored.
#[derive(Debug, thiserror::Error)]
pub enum RewardError {
    #[error("rule \"{rule}\": {message}")]
    Setting { rule: String, message: String },

    #[error("rule \"{rule}\": {request} has no label to compare with; set label_key to the data's column of answers")]
    NoLabel { rule: &'static str, request: RequestExcerpt },

    #[error("rule \"{rule}\": {request}: its label {label:?} holds {problem}")]
    Label { rule: &'static str, request: RequestExcerpt, label: String, problem: &'static str },

    #[error("cannot read lexicon {}: {source}", path.display())]
    ReadLexicon { path: PathBuf, source: std::io::Error },

    #[error("{}:{line}: {message}", path.display())]
    Lexicon { path: PathBuf, line: usize, message: String },

    #[error(
        "reward server {url}: attempt {attempt} of {attempts}, {count} requests, the first with prompt {prompt:?}: {problem}"
    )]
    Server { url: String, attempt: usize, attempts: usize, count: usize, prompt: String, problem: String },

    #[error("cannot start reward program `{command}`: {source}")]
    Start { command: String, source: std::io::Error },

    #[error("reward program `{command}`: {request}: {problem}{}", stderr_part(stderr))]
    Program { command: String, request: RequestExcerpt, problem: String, stderr: Vec<String> },

    #[error("reward program `{command}`: stopped after an earlier failure: {cause}")]
    Stopped { command: String, cause: String },

    #[error("reward \"{source_name}\": {expected} requests, {found} scores")]
    Count { source_name: String, expected: usize, found: usize },

    #[error("reward \"{source_name}\": {request}: its score is {score}, not a finite number")]
    NonFinite { source_name: String, request: RequestExcerpt, score: f64 },
}

impl RewardError {
    /// The error of a part of a batch that begins at request `first` (from 0) of `count`, as one of the whole.
    #[must_use]
    pub fn in_batch(mut self, first: usize, count: usize) -> Self {
        if let Self::NoLabel { request, .. }
        | Self::Label { request, .. }
        | Self::Program { request, .. }
        | Self::NonFinite { request, .. } = &mut self
        {
            request.number += first;
            request.count = count;
        }
        self
    }
}

fn stderr_part(lines: &[String]) -> String {
    if lines.is_empty() {
        return "; it wrote nothing to stderr".to_owned();
    }
    format!("; its last lines on stderr:\n  {}", lines.join("\n  "))
}
