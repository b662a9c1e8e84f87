//! Prompts in, rollouts out: what the generator is asked for and what it gives back.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

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

/// Prompts with sampled responses. B rows, T columns; a row is prompt, response, padding.
///
/// Column `t` of a per-token tensor belongs to token `t`. Rows are ordered by prompt, then by sample.
#[derive(Debug)]
pub struct Rollout {
    /// `[B, T]` int64; padding is 0 and never read.
    pub token_ids: Tensor,
    /// `[B]` tokens of prompt and response.
    pub lengths: Vec<i64>,
    /// `[B, T]` bool, true on the tokens the policy sampled.
    pub response_mask: Tensor,
    /// `[B, T]` f32, log π by the engine that sampled; 0 off the mask.
    pub rollout_logprobs: Tensor,
    /// `[B]`.
    pub finish_reasons: Vec<FinishReason>,
    /// `[B]` prompt texts.
    pub prompts: Vec<String>,
    /// `[B]` response texts.
    pub responses: Vec<String>,
    /// `[B]`.
    pub labels: Vec<Option<String>>,
    pub policy_version: u64,
    pub generation: GenerationReport,
}

impl Rollout {
    /// Lays sequences out in rows, in their order.
    pub fn from_sequences(
        prompts: &Prompts,
        sequences: &[Sequence],
        policy_version: u64,
        generation: GenerationReport,
    ) -> Rollout {
        let lengths: Vec<i64> =
            sequences.iter().map(|s| (s.prompt_token_ids.len() + s.response_token_ids.len()) as i64).collect();
        let width = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut token_ids = vec![0i64; sequences.len() * width];
        let mut mask = vec![false; sequences.len() * width];
        let mut logprobs = vec![0f32; sequences.len() * width];
        for (row, sequence) in sequences.iter().enumerate() {
            let start = row * width;
            let response = start + sequence.prompt_token_ids.len();
            let end = response + sequence.response_token_ids.len();
            token_ids[start..response].copy_from_slice(&sequence.prompt_token_ids);
            token_ids[response..end].copy_from_slice(&sequence.response_token_ids);
            mask[response..end].fill(true);
            logprobs[response..end].copy_from_slice(&sequence.rollout_logprobs);
        }
        let size = [sequences.len() as i64, width as i64];
        Rollout {
            token_ids: Tensor::from_slice(&token_ids).view(size),
            lengths,
            response_mask: Tensor::from_slice(&mask).view(size),
            rollout_logprobs: Tensor::from_slice(&logprobs).view(size),
            finish_reasons: sequences.iter().map(|s| s.finish_reason).collect(),
            prompts: sequences.iter().map(|s| prompts.rows[s.prompt_index].text.clone()).collect(),
            responses: sequences.iter().map(|s| s.response.clone()).collect(),
            labels: sequences.iter().map(|s| prompts.rows[s.prompt_index].label.clone()).collect(),
            policy_version,
            generation,
        }
    }

    /// B, the number of responses.
    pub fn num_rows(&self) -> usize {
        self.lengths.len()
    }

    /// The token ids that the models see, for a forward pass.
    pub fn tokens(&self) -> Tokens {
        Tokens {
            token_ids: self.token_ids.shallow_clone(),
            lengths: self.lengths.clone(),
            mask: self.response_mask.shallow_clone(),
        }
    }

    /// `[B]` response lengths in tokens, as f64.
    pub fn response_lengths(&self) -> Tensor {
        self.response_mask.to_kind(Kind::Double).sum_dim_intlist(1, false, Kind::Double)
    }
}

/// Token rows and which of their columns matter: all that a forward pass needs.
#[derive(Debug)]
pub struct Tokens {
    /// `[B, T]` int64.
    pub token_ids: Tensor,
    /// `[B]` tokens of each row; the rest is padding.
    pub lengths: Vec<i64>,
    /// `[B, T]` bool: the columns whose log-prob or value is wanted.
    pub mask: Tensor,
}

impl Tokens {
    /// # Errors
    /// [`Error::Shape`] when the three do not fit each other.
    pub fn new(token_ids: Tensor, lengths: Vec<i64>, mask: Tensor) -> Result<Tokens> {
        let (rows, width) = (lengths.len() as i64, token_ids.size().get(1).copied().unwrap_or(0));
        for (what, tensor) in [("token_ids", &token_ids), ("mask", &mask)] {
            if tensor.size() != [rows, width] {
                return Err(Error::Shape { what, expected: vec![rows, width], found: tensor.size() });
            }
        }
        Ok(Tokens { token_ids, lengths, mask })
    }

    /// Lays out rows of token ids with a mask each; `mask[i][t]` belongs to token `t`.
    pub fn from_rows(rows: &[(Vec<i64>, Vec<bool>)]) -> Tokens {
        let width = rows.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0);
        let mut token_ids = vec![0i64; rows.len() * width];
        let mut mask = vec![false; rows.len() * width];
        for (row, (ids, wanted)) in rows.iter().enumerate() {
            token_ids[row * width..row * width + ids.len()].copy_from_slice(ids);
            mask[row * width..row * width + ids.len()].copy_from_slice(wanted);
        }
        let size = [rows.len() as i64, width as i64];
        Tokens {
            token_ids: Tensor::from_slice(&token_ids).view(size),
            lengths: rows.iter().map(|(ids, _)| ids.len() as i64).collect(),
            mask: Tensor::from_slice(&mask).view(size),
        }
    }

    pub fn num_rows(&self) -> usize {
        self.lengths.len()
    }

    /// Another handle of the same rows.
    pub fn shallow_clone(&self) -> Tokens {
        Tokens {
            token_ids: self.token_ids.shallow_clone(),
            lengths: self.lengths.clone(),
            mask: self.mask.shallow_clone(),
        }
    }

    pub fn to_device(&self, device: tch::Device) -> Tokens {
        Tokens {
            token_ids: self.token_ids.to_device(device),
            lengths: self.lengths.clone(),
            mask: self.mask.to_device(device),
        }
    }

    /// The rows at `indices`, cut to the longest of them.
    pub fn select(&self, indices: &[i64]) -> Tokens {
        let lengths: Vec<i64> = indices.iter().map(|&row| self.lengths[row as usize]).collect();
        let width = lengths.iter().copied().max().unwrap_or(0);
        let rows = Tensor::from_slice(indices);
        let pick = |tensor: &Tensor| tensor.index_select(0, &rows).narrow(1, 0, width);
        Tokens { token_ids: pick(&self.token_ids), mask: pick(&self.mask), lengths }
    }
}

/// Splits rows, in order, into micro-batches of at most `budget` tokens each (a longer row is alone).
pub fn micro_batches(lengths: &[i64], budget: i64) -> Vec<Vec<i64>> {
    let mut batches: Vec<Vec<i64>> = Vec::new();
    let mut used = 0;
    for (row, &length) in lengths.iter().enumerate() {
        if batches.is_empty() || used + length > budget {
            batches.push(Vec::new());
            used = 0;
        }
        used += length;
        batches.last_mut().expect("just pushed").push(row as i64);
    }
    batches
}
