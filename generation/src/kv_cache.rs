//! Keys and values of every slot's tokens, allocated once and written in place. Where ranks share a model, of the rank's
//! own key-value heads.
//!
//! Per layer `[slots, kv_heads, length, D]`: the live slots stand first, so what a step attends to is a view. The length
//! grows in steps with the longest sequence, up to the longest that the call can make.

use echelon_core::{Error, Result};
use echelon_models::config::DecoderConfig;
use echelon_models::decoder::Decoder;
use tch::{Device, Kind, Tensor};

use crate::config::EngineConfig;
use crate::scheduler::Group;

/// Tokens by which the length grows at least.
const STEP: usize = 64;

/// The cache of one call.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Layer>,
    num_slots: usize,
    num_kv_heads: i64,
    head_dim: i64,
    /// Tokens that a slot holds now.
    length: usize,
    /// Tokens that a slot must ever hold.
    max_length: usize,
}

#[derive(Debug)]
struct Layer {
    keys: Tensor,
    values: Tensor,
}

impl KvCache {
    /// A cache of as many slots as `engine`, the sequences and the byte budget allow. Memory is taken as it is needed.
    ///
    /// # Errors
    /// No slot at all, or a budget that does not hold one sequence.
    pub fn plan(engine: &EngineConfig, model: &Decoder, groups: &[Group], max_new_tokens: usize) -> Result<KvCache> {
        if engine.max_sequences == 0 {
            return Err(Error::Refused("max_sequences is 0: the engine needs at least one slot".into()));
        }
        let longest_prompt = groups.iter().map(Group::num_tokens).max().unwrap_or(0);
        let num_sequences = groups.iter().map(Group::num_waiting).sum::<usize>();
        // The last token sampled is never read.
        let max_length = longest_prompt + max_new_tokens - 1;
        let wanted = engine.max_sequences.min(num_sequences);
        let num_slots = match engine.kv_cache_bytes {
            Some(budget) => {
                let shared = groups.iter().any(|group| group.num_waiting() > 1);
                let kept_tokens = if shared { longest_prompt } else { 0 };
                let bytes_per_token = bytes_per_token(model.config(), model.num_kv_heads(), model.kind());
                slots_within(budget, bytes_per_token, max_length, kept_tokens)?.min(wanted)
            }
            None => wanted,
        };
        KvCache::new(model, num_slots, max_length)
    }

    fn new(model: &Decoder, num_slots: usize, max_length: usize) -> Result<KvCache> {
        let config = model.config();
        let (num_kv_heads, head_dim) = (model.num_kv_heads(), config.head_dim);
        let empty = || Tensor::f_zeros([num_slots as i64, num_kv_heads, 0, head_dim], options(model));
        let layers =
            (0..config.num_layers).map(|_| Ok(Layer { keys: empty()?, values: empty()? })).collect::<Result<_>>()?;
        Ok(KvCache { layers, num_slots, num_kv_heads, head_dim, length: 0, max_length })
    }

    pub fn num_slots(&self) -> usize {
        self.num_slots
    }

    /// Makes room for `length` tokens in every slot; what is written stays.
    ///
    /// # Errors
    /// libtorch's, when memory runs out.
    pub fn reserve(&mut self, length: usize) -> Result<()> {
        if length <= self.length {
            return Ok(());
        }
        assert!(length <= self.max_length, "{length} tokens in slots planned for {}", self.max_length);
        let length = grown(self.length, length, self.max_length);
        let size = [self.num_slots as i64, self.num_kv_heads, length as i64, self.head_dim];
        for layer in &mut self.layers {
            for cached in [&mut layer.keys, &mut layer.values] {
                // Zeros: a masked score times what memory happens to hold may be NaN.
                let grown = Tensor::f_zeros(size, (cached.kind(), cached.device()))?;
                grown.narrow(2, 0, self.length as i64).f_copy_(cached)?;
                *cached = grown;
            }
        }
        self.length = length;
        Ok(())
    }

    /// Writes a prompt's keys and values, `[P, kv_heads, D]` each, into a slot of one layer.
    pub fn write_prompt(&mut self, layer: usize, slot: usize, keys: &Tensor, values: &Tensor) {
        for (cached, new) in self.layers[layer].pairs(keys, values) {
            cached.get(slot as i64).narrow(1, 0, new.size()[0]).copy_(&new.transpose(0, 1));
        }
    }

    /// Where one step writes: for [`KvCache::write_step`], of the live slots' `positions`.
    pub fn step_rows(&self, positions: &[i64], device: Device) -> Tensor {
        let rows: Vec<i64> = positions
            .iter()
            .enumerate()
            .flat_map(|(slot, position)| {
                let first = slot as i64 * self.num_kv_heads;
                (first..first + self.num_kv_heads).map(move |head| head * self.length as i64 + position)
            })
            .collect();
        Tensor::from_slice(&rows).to_device(device)
    }

    /// Writes one token's keys and values of every live slot, `[S, kv_heads, D]` each, into one layer.
    pub fn write_step(&mut self, layer: usize, rows: &Tensor, keys: &Tensor, values: &Tensor) {
        let head_dim = self.head_dim;
        for (cached, new) in self.layers[layer].pairs(keys, values) {
            let _ = cached.view([-1, head_dim]).index_copy_(0, rows, &new.reshape([-1, head_dim]));
        }
    }

    /// Keys and values of the first `live` slots and `length` tokens of a layer: views `[live, kv_heads, length, D]`.
    pub fn read(&self, layer: usize, live: i64, length: i64) -> (Tensor, Tensor) {
        let Layer { keys, values } = &self.layers[layer];
        let view = |cached: &Tensor| cached.narrow(0, 0, live).narrow(2, 0, length);
        (view(keys), view(values))
    }

    /// Copies the first `length` tokens of one slot to another.
    pub fn move_slot(&mut self, from: usize, to: usize, length: usize) {
        for layer in &mut self.layers {
            for cached in [&mut layer.keys, &mut layer.values] {
                let tokens = |slot: usize| cached.get(slot as i64).narrow(1, 0, length as i64);
                tokens(to).copy_(&tokens(from));
            }
        }
    }
}

/// Tokens with room in a slot when one that holds `length` must hold `wanted`, and `most` at the end.
fn grown(length: usize, wanted: usize, most: usize) -> usize {
    if wanted <= length { length } else { wanted.max(length * 3 / 2).next_multiple_of(STEP).min(most) }
}

/// Room per slot after prompts of up to `prompt` tokens, and when the longest sequence is there, of `longest` tokens.
pub(crate) fn room(prompt: usize, longest: usize, most: usize) -> (usize, usize) {
    let first = grown(0, prompt, most);
    // Token by token, as decoding asks for it; the last one is never read.
    (first, (prompt..longest).fold(first, |length, wanted| grown(length, wanted, most)))
}

impl Layer {
    fn pairs<'a>(&'a mut self, keys: &'a Tensor, values: &'a Tensor) -> [(&'a mut Tensor, &'a Tensor); 2] {
        [(&mut self.keys, keys), (&mut self.values, values)]
    }
}

fn options(model: &Decoder) -> (Kind, Device) {
    (model.kind(), model.embedding().device())
}

/// Bytes of one token's keys and values over all layers, in so many heads.
fn bytes_per_token(config: &DecoderConfig, num_kv_heads: i64, kind: Kind) -> usize {
    2 * config.num_layers * (num_kv_heads * config.head_dim) as usize * kind.elt_size_in_bytes()
}

/// Whether the budget of `engine` holds the longest sequence there can be, beside its prompt kept for other samples, on
/// each of the ranks that share a model.
///
/// # Errors
/// It does not; the message has both sizes.
pub fn check_budget(
    engine: &EngineConfig,
    (config, kind, tensor_parallel_size): (&DecoderConfig, Kind, usize),
    prompt_tokens: usize,
    max_new_tokens: usize,
) -> Result<()> {
    let Some(budget) = engine.kv_cache_bytes else { return Ok(()) };
    let heads = (config.num_kv_heads / tensor_parallel_size as i64).max(1); // of each rank, as its cache
    let bytes_per_token = bytes_per_token(config, heads, kind);
    slots_within(budget, bytes_per_token, prompt_tokens + max_new_tokens - 1, prompt_tokens).map(drop)
}

/// Slots of `length` tokens that fit beside the `kept_tokens` of a prompt whose other samples wait.
fn slots_within(budget: usize, bytes_per_token: usize, length: usize, kept_tokens: usize) -> Result<usize> {
    let slots = budget.saturating_sub(kept_tokens * bytes_per_token) / (length * bytes_per_token);
    if slots == 0 {
        let needed = (length + kept_tokens) * bytes_per_token;
        return Err(Error::Refused(format!(
            "kv_cache_bytes is {budget}, but one sequence needs {needed} ({length} tokens in its slot and {kept_tokens} \
             kept for the prompt's other samples, {bytes_per_token} bytes each): raise it, or lower max_new_tokens"
        )));
    }
    Ok(slots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_checked_for_the_longest_sequence_there_can_be() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/quickstart/language-model");
        let config = DecoderConfig::read(&folder).unwrap();
        let bytes = bytes_per_token(&config, config.num_kv_heads, Kind::Float);
        let engine = |tokens: usize| EngineConfig { kv_cache_bytes: Some(tokens * bytes), ..EngineConfig::default() };
        let check = |tokens| check_budget(&engine(tokens), (&config, Kind::Float, 1), 32, 12);
        check(43 + 32).unwrap();
        let refused = check(43 + 31).unwrap_err().to_string();
        assert!(refused.contains(&format!("one sequence needs {}", (43 + 32) * bytes)), "{refused}");
        // Each of several ranks keeps its heads alone.
        let ranks = config.num_kv_heads as usize;
        let of_each = EngineConfig { kv_cache_bytes: Some((43 + 32) * bytes / ranks), ..EngineConfig::default() };
        check_budget(&of_each, (&config, Kind::Float, ranks), 32, 12).unwrap();
    }

    #[test]
    fn a_budget_gives_whole_slots_or_says_what_one_needs() {
        assert_eq!(slots_within(1000, 10, 20, 0).unwrap(), 5);
        assert_eq!(slots_within(1000, 10, 20, 5).unwrap(), 4);
        assert_eq!(
            slots_within(249, 10, 20, 5).unwrap_err().to_string(),
            "kv_cache_bytes is 249, but one sequence needs 250 (20 tokens in its slot and 5 kept for the prompt's other \
             samples, 10 bytes each): raise it, or lower max_new_tokens"
        );
    }
}
