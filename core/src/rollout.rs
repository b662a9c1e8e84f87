//! Prompts in, sequences out: what an engine is asked for, what it gives back, and the rows that these become.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::data::{GROUPS, LABELS, POLICY_VERSION, PROMPTS, RESPONSES, ROLLOUT_LOGPROBS, Report, Rows, TRUNCATED};
use crate::error::Result;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingConfig {
    /// 0 is greedy.
    pub temperature: f64,
    /// 0 or less keeps all.
    pub top_k: i64,
    pub top_p: f64,
    pub min_p: f64,
    pub max_new_tokens: usize,
    /// Texts that end a response; they stay in it.
    pub stop: Vec<String>,
    /// Go on after an end-of-sequence token (benchmarks).
    pub ignore_eos: bool,
}

impl SamplingConfig {
    /// From all tokens, until an end-of-sequence token.
    pub fn uncut(temperature: f64, max_new_tokens: usize) -> SamplingConfig {
        let (top_k, top_p, min_p, stop) = (0, 1.0, 0.0, Vec::new());
        SamplingConfig { temperature, top_k, top_p, min_p, max_new_tokens, stop, ignore_eos: false }
    }
}

/// One tokenised prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    /// Names the prompt in the random stream: equal ids draw equal numbers.
    pub id: u64,
    pub token_ids: Vec<i64>,
    /// As text, after the chat template.
    pub text: String,
    /// What a rule compares the response with.
    pub label: Option<String>,
}

/// The prompts of one step, and the random stream they are sampled with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Prompts {
    pub rows: Vec<Prompt>,
    pub samples_per_prompt: usize,
    pub seed: u64,
    /// Sampling for an evaluation draws from a stream of its own.
    pub evaluation: bool,
}

/// Why a response ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// An end-of-sequence token or a stop text.
    Stop,
    /// `max_new_tokens` were sampled.
    Length,
}

/// One prompt with one sampled response, as it leaves the engine.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub prompt_index: usize,
    pub sample: usize,
    pub prompt_token_ids: Vec<i64>,
    pub response_token_ids: Vec<i64>,
    /// log π(token | prefix) by the engine, one per response token.
    pub rollout_logprobs: Vec<f32>,
    pub finish_reason: FinishReason,
    /// The response as text, without special tokens.
    pub response: String,
}

/// Work that a generation did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GenerationReport {
    pub prefill_tokens: usize,
    pub generated_tokens: usize,
    pub decode_steps: usize,
    pub seconds: f64,
    /// Seconds until the first token was there.
    pub first_token_s: f64,
}

impl GenerationReport {
    /// As statistics: counts add up over engines, times are the slowest one's.
    pub fn told(&self) -> Report {
        let mut report = Report::default();
        report.stats.sum("prefill_tokens", self.prefill_tokens as f64);
        report.stats.sum("generated_tokens", self.generated_tokens as f64);
        report.stats.max("decode_steps", self.decode_steps as f64);
        report.stats.max("seconds", self.seconds);
        report.stats.max("first_token_s", self.first_token_s);
        report
    }
}

/// Sequences as rows, in their order (by prompt, then by sample): a row is prompt, response, padding, and the response is
/// its own tokens.
///
/// # Errors
/// None for sequences of these prompts.
pub fn rows_of(prompts: &Prompts, sequences: &[Sequence], policy_version: u64) -> Result<Rows> {
    let row = |sequence: &Sequence| {
        let ids = [&sequence.prompt_token_ids[..], &sequence.response_token_ids].concat();
        let own = (0..ids.len()).map(|at| at >= sequence.prompt_token_ids.len()).collect();
        (ids, own)
    };
    let rows = Rows::of_tokens(&sequences.iter().map(row).collect::<Vec<_>>());
    let [_, width] = rows.size();
    let mut logprobs = vec![0f32; sequences.len() * width as usize];
    for (row, sequence) in sequences.iter().enumerate() {
        let start = row * width as usize + sequence.prompt_token_ids.len();
        logprobs[start..start + sequence.rollout_logprobs.len()].copy_from_slice(&sequence.rollout_logprobs);
    }
    let of = |sequence: &Sequence| &prompts.rows[sequence.prompt_index];
    let groups: Vec<i64> = sequences.iter().map(|s| of(s).id as i64).collect();
    let truncated: Vec<bool> = sequences.iter().map(|s| s.finish_reason == FinishReason::Length).collect();
    let versions = vec![policy_version as i64; sequences.len()];
    let size = rows.size();
    rows.with(ROLLOUT_LOGPROBS, Tensor::from_slice(&logprobs).view(size))?
        .with(PROMPTS, sequences.iter().map(|s| of(s).text.as_str().into()).collect())?
        .with(RESPONSES, sequences.iter().map(|s| s.response.as_str().into()).collect())?
        .with(LABELS, sequences.iter().map(|s| of(s).label.as_deref().map(Into::into)).collect())?
        .with(GROUPS, Tensor::from_slice(&groups))?
        .with(TRUNCATED, Tensor::from_slice(&truncated))?
        .with(POLICY_VERSION, Tensor::from_slice(&versions))
}
