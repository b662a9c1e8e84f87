//! A sequence while it is being generated, and what ends it.

use echelon_core::rollout::{FinishReason, Prompt, SamplingConfig, Sequence};
use echelon_core::{Error, Result};
use echelon_models::tokenizer::{DecodeStream, Tokenizer};

use crate::sampler::Drawn;

/// Which response of the call a sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub prompt_index: usize,
    pub sample: usize,
}

/// A sequence in a slot.
#[derive(Debug)]
pub struct Running {
    member: Member,
    prompt_length: usize,
    response_token_ids: Vec<i64>,
    rollout_logprobs: Vec<f32>,
    text: Option<RecentText>,
}

impl Running {
    /// A sequence of which only the prompt is known.
    pub fn new(member: Member, prompt_length: usize, ends: &EndConditions) -> Running {
        let (response_token_ids, rollout_logprobs) = (Vec::new(), Vec::new());
        Running { member, prompt_length, response_token_ids, rollout_logprobs, text: ends.recent_text() }
    }

    pub fn member(&self) -> Member {
        self.member
    }

    pub fn num_generated(&self) -> usize {
        self.response_token_ids.len()
    }

    /// The token that the next step reads.
    ///
    /// # Panics
    /// Before the first token: the prompt's pass draws it.
    pub fn last_token(&self) -> i64 {
        *self.response_token_ids.last().expect("a started sequence has a token")
    }

    /// Tokens whose keys and values are in the cache, and so the last token's position: all but the last.
    pub fn cached_tokens(&self) -> usize {
        self.prompt_length + self.num_generated() - 1
    }

    /// Takes the next token; tells why the sequence ends with it, if it does.
    pub fn push(&mut self, drawn: Drawn, ends: &EndConditions) -> Result<Option<FinishReason>> {
        self.response_token_ids.push(drawn.token);
        self.rollout_logprobs.push(drawn.logprob);
        let stop_text = match &mut self.text {
            Some(text) => text.push(drawn.token, ends.stop)?,
            None => false,
        };
        if stop_text || ends.eos_ids.contains(&drawn.token) {
            return Ok(Some(FinishReason::Stop));
        }
        Ok((self.num_generated() >= ends.max_new_tokens).then_some(FinishReason::Length))
    }

    /// The result, with its text.
    pub fn finish(
        self,
        prompt: &Prompt,
        finish_reason: FinishReason,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Sequence> {
        let text = tokenizer.map(|tokenizer| tokenizer.decode(&self.response_token_ids, true)).transpose();
        Ok(Sequence {
            prompt_index: self.member.prompt_index,
            sample: self.member.sample,
            prompt_token_ids: prompt.token_ids.clone(),
            response: text.map_err(|error| Error::other("the text of a response", error))?.unwrap_or_default(),
            response_token_ids: self.response_token_ids,
            rollout_logprobs: self.rollout_logprobs,
            finish_reason,
        })
    }
}

/// What ends a sequence: an end-of-sequence token, a stop text, enough tokens.
#[derive(Debug)]
pub struct EndConditions<'a> {
    eos_ids: &'a [i64],
    stop: &'a [String],
    tokenizer: Option<&'a Tokenizer>,
    max_new_tokens: usize,
}

impl<'a> EndConditions<'a> {
    /// # Errors
    /// No token is asked for, an empty stop text, stop texts without a tokenizer.
    pub fn new(sampling: &'a SamplingConfig, tokenizer: Option<&'a Tokenizer>) -> Result<EndConditions<'a>> {
        if sampling.max_new_tokens == 0 {
            return Err(Error::Refused("max_new_tokens is 0: ask for at least one token".into()));
        }
        if sampling.stop.iter().any(String::is_empty) {
            return Err(Error::Refused("a stop text is empty: it would end every response at once".into()));
        }
        if !sampling.stop.is_empty() && tokenizer.is_none() {
            return Err(Error::Refused("stop texts need a tokenizer: the model folder has none".into()));
        }
        let eos_ids = tokenizer.filter(|_| !sampling.ignore_eos).map_or(&[][..], Tokenizer::eos_ids);
        Ok(EndConditions { eos_ids, stop: &sampling.stop, tokenizer, max_new_tokens: sampling.max_new_tokens })
    }

    fn recent_text(&self) -> Option<RecentText> {
        let tokenizer = self.tokenizer.filter(|_| !self.stop.is_empty())?;
        let longest = self.stop.iter().map(String::len).max()?;
        Some(RecentText { stream: tokenizer.decode_stream(true), text: String::new(), kept: longest - 1 })
    }
}

/// The end of a response's text: as much of it as a stop text may have begun in.
#[derive(Debug)]
struct RecentText {
    stream: DecodeStream,
    text: String,
    /// Bytes: one less than the longest stop text.
    kept: usize,
}

impl RecentText {
    /// Takes the next token; tells whether a stop text is complete with it.
    fn push(&mut self, token: i64, stop: &[String]) -> Result<bool> {
        let piece = self.stream.push(token).map_err(|error| Error::other("the text of a response", error))?;
        let Some(piece) = piece else { return Ok(false) };
        self.text.push_str(&piece);
        if stop.iter().any(|stop| self.text.contains(stop)) {
            return Ok(true);
        }
        let mut cut = self.text.len().saturating_sub(self.kept);
        while !self.text.is_char_boundary(cut) {
            cut -= 1;
        }
        self.text.drain(..cut);
        Ok(false)
    }
}
