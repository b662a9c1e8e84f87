//! Prompts and decoding steps through the model: the same layers as in training, attending to the KV cache.

use echelon_core::Result;
use echelon_core::weight_layout::{STEPS_THAT_PAY, WeightLayout};
use echelon_core::zero::Backbone;
use echelon_models::decoder::Decoder;
use echelon_models::head::tempered;
use echelon_models::layers::{Linear, packed_attention};
use echelon_models::tokenizer::Tokenizer;
use tch::{Device, Kind, Tensor};

use crate::kv_cache::KvCache;
use crate::scheduler::Admission;

/// What responses are sampled from. Borrowed: no weight is copied.
#[derive(Clone, Copy, Debug)]
pub struct Policy<'a> {
    pub model: &'a Decoder,
    /// `[V, H]`, the embedding where the two are tied; this rank's rows of it where ranks share the model.
    pub head: &'a Tensor,
    /// Gives the end-of-sequence ids and the texts; without it sequences end at `max_new_tokens` and have no text.
    pub tokenizer: Option<&'a Tokenizer>,
}

/// A model with the cache of one call.
#[derive(Debug)]
pub struct ModelRunner<'a> {
    model: &'a Decoder,
    head: Linear,
    temperature: f64,
    cache: KvCache,
    kept: Option<KeptPrompt>,
    weight_layout: WeightLayout,
    packed: Option<PackedModel>,
}

/// The model with weights laid out for decoding a fixed number of slots; the rows beyond the live ones are computed for
/// nothing, which costs less than laying the weights out anew.
#[derive(Debug)]
struct PackedModel {
    model: Decoder,
    head: Linear,
    slots: i64,
}

/// Whether `model` is laid out anew for `steps` decoding steps.
pub(crate) fn packs(model: &Decoder, layout: WeightLayout, steps: usize) -> bool {
    let has_layout = model.embedding().device() == Device::Cpu && model.kind() != Kind::Double;
    has_layout && layout != WeightLayout::Plain && steps >= STEPS_THAT_PAY
}

/// Slots up to which a product with fewer rows takes about as long.
const SLOTS_AT_ONE_PRICE: i64 = 32;

/// A prompt that went through the model, for samples that wait for a slot.
#[derive(Debug)]
struct KeptPrompt {
    /// Per layer, `[P, kv_heads, D]` each.
    layers: Vec<(Tensor, Tensor)>,
    /// `[1, V]` at its last token: of this rank's part of the vocabulary.
    logits: Tensor,
}

/// A prompt's place in a packed pass, and its sequences' slots.
struct Span<'a> {
    start: i64,
    length: i64,
    admission: &'a Admission,
}

impl<'a> ModelRunner<'a> {
    /// Logits are divided by `temperature`. Where ranks share the model, they have the columns of this rank's part of the
    /// vocabulary.
    pub fn new(
        policy: Policy<'a>,
        (temperature, weight_layout): (f64, WeightLayout),
        cache: KvCache,
    ) -> ModelRunner<'a> {
        let head = Linear::new(policy.head.detach(), None);
        ModelRunner { model: policy.model, head, temperature, cache, kept: None, weight_layout, packed: None }
    }

    /// Brings prompts into the slots of their sequences; `[S, V]` logits of the first tokens, one row per slot given out.
    pub fn start(&mut self, admissions: &[Admission]) -> Result<Tensor> {
        // Only the first admission can go on with a prompt of before; it leaves or keeps it.
        let resumed = self.kept.take();
        let mut logits = Vec::new();
        if let (Some(kept), Some(admission)) = (resumed, admissions.first().filter(|a| a.prefill.is_none())) {
            self.resume(&kept, admission);
            logits.push(kept.logits.shallow_clone());
            self.kept = Some(kept).filter(|_| admission.others_wait);
        }
        let fresh: Vec<&Admission> = admissions.iter().filter(|a| a.prefill.is_some()).collect();
        if !fresh.is_empty() {
            logits.push(self.prefill(&fresh)?);
        }
        let rows = admissions.iter().enumerate().flat_map(|(row, a)| std::iter::repeat_n(row as i64, a.slots.len()));
        let rows: Vec<i64> = rows.collect();
        Ok(Tensor::cat(&logits, 0).index_select(0, &self.tensor(&rows)))
    }

    fn resume(&mut self, kept: &KeptPrompt, admission: &Admission) {
        for (layer, (keys, values)) in kept.layers.iter().enumerate() {
            for &slot in &admission.slots {
                self.cache.write_prompt(layer, slot, keys, values);
            }
        }
    }

    /// One packed pass over the prompts: `[prompts, V]` logits at their last tokens.
    fn prefill(&mut self, admissions: &[&Admission]) -> Result<Tensor> {
        let (mut token_ids, mut positions, mut spans) = (Vec::new(), Vec::new(), Vec::new());
        for &admission in admissions {
            let prompt = admission.prefill.as_deref().unwrap_or_default();
            spans.push(Span { start: token_ids.len() as i64, length: prompt.len() as i64, admission });
            token_ids.extend_from_slice(prompt);
            positions.extend(0..prompt.len() as i64);
        }
        let lengths: Vec<i64> = spans.iter().map(|span| span.length).collect();
        self.cache.reserve(lengths.iter().copied().max().unwrap_or(0) as usize)?;

        let rotary = self.model.rotary(&self.tensor(&positions));
        let mut hidden = self.model.embed_tokens(&self.tensor(&token_ids))?;
        let mut kept_layers = Vec::new();
        for layer in 0..self.model.num_layers() {
            let cache = &mut self.cache;
            hidden = self.model.layer_with(layer, &hidden, &rotary, &mut |q, k, v, window| {
                kept_layers.extend(fill_slots(cache, layer, &spans, k, v));
                packed_attention(q, k, v, &lengths, window)
            })?;
        }
        let last: Vec<i64> = spans.iter().map(|span| span.start + span.length - 1).collect();
        let last = self.model.norm(&hidden.index_select(0, &self.tensor(&last)));
        let logits = tempered(self.head.forward(&last), self.temperature);
        if !kept_layers.is_empty() {
            let logits = logits.narrow(0, spans.len() as i64 - 1, 1).copy();
            self.kept = Some(KeptPrompt { layers: kept_layers, logits });
        }
        Ok(logits)
    }

    /// One token more: the live slots' last `tokens` at their `positions`, slot by slot; `[S, V]` logits. At most
    /// `steps_left` such steps will follow.
    pub fn decode(&mut self, tokens: &[i64], positions: &[i64], steps_left: usize) -> Result<Tensor> {
        let live = tokens.len() as i64;
        let longest = positions.iter().copied().max().unwrap_or(0) + 1;
        self.cache.reserve(longest as usize)?;
        self.pack(live, steps_left)?;
        let (model, head, slots) = match &self.packed {
            Some(packed) => (&packed.model, &packed.head, packed.slots),
            None => (self.model, &self.head, live),
        };
        let padded = |values: &[i64]| {
            let nothing = std::iter::repeat_n(0, (slots - live) as usize);
            values.iter().copied().chain(nothing).collect::<Vec<i64>>()
        };
        let (tokens, positions) = (padded(tokens), padded(positions));
        let rows = self.cache.step_rows(&positions, self.device());
        let positions = self.tensor(&positions);
        let rotary = model.rotary(&positions);
        let mut masks = StepMasks::new(positions, longest, model.kind());
        let mut hidden = model.embed_tokens(&self.tensor(&tokens))?;
        for layer in 0..model.num_layers() {
            let cache = &mut self.cache;
            hidden = model.layer_with(layer, &hidden, &rotary, &mut |q, k, v, window| {
                cache.write_step(layer, &rows, k, v);
                let (keys, values) = cache.read(layer, slots, longest);
                step_attention(q, &keys, &values, masks.of(window))
            })?;
        }
        Ok(tempered(head.forward(&model.norm(&hidden)), self.temperature).narrow(0, 0, live))
    }

    /// Packs the weights for the `live` slots, where the steps left pay for it: at first, and again when most slots that
    /// they are packed for are empty.
    fn pack(&mut self, live: i64, steps_left: usize) -> Result<()> {
        let fits = |packed: &PackedModel| live * 2 > packed.slots || packed.slots <= SLOTS_AT_ONE_PRICE;
        let layout = self.weight_layout;
        if !packs(self.model, layout, steps_left) || self.packed.as_ref().is_some_and(fits) {
            return Ok(());
        }
        self.packed = None; // one packed copy at a time
        let (model, head) = (self.model.packed(live, layout)?, self.head.packed(live, layout)?);
        self.packed = Some(PackedModel { model, head, slots: live });
        Ok(())
    }

    /// Moves what a slot remembers: `length` tokens.
    pub fn move_slot(&mut self, from: usize, to: usize, length: usize) {
        self.cache.move_slot(from, to, length);
    }

    fn tensor(&self, values: &[i64]) -> Tensor {
        Tensor::from_slice(values).to_device(self.device())
    }

    fn device(&self) -> Device {
        self.model.embedding().device()
    }
}

/// Writes each prompt's part of `[N, kv_heads, D]` keys and values into its slots; a copy of the part of the one prompt
/// (the last) that others wait for.
fn fill_slots(cache: &mut KvCache, layer: usize, spans: &[Span], k: &Tensor, v: &Tensor) -> Option<(Tensor, Tensor)> {
    let mut kept = None;
    for span in spans {
        let part = |x: &Tensor| x.narrow(0, span.start, span.length);
        for &slot in &span.admission.slots {
            cache.write_prompt(layer, slot, &part(k), &part(v));
        }
        if span.admission.others_wait {
            kept = Some((part(k).copy(), part(v).copy()));
        }
    }
    kept
}

/// One token's attention per slot: q `[S, heads, D]`, keys and values `[S, kv_heads, L, D]` to `[S, heads, D]`.
///
/// The query heads that share a kv head stand where a sequence's queries would, so that no key is repeated.
fn step_attention(q: &Tensor, keys: &Tensor, values: &Tensor, mask: &Tensor) -> Tensor {
    let (slots, heads, head_dim) = q.size3().expect("[S, heads, D]");
    let q = q.view([slots, keys.size()[1], -1, head_dim]);
    Tensor::scaled_dot_product_attention(&q, keys, values, Some(mask), 0.0, false, None, false)
        .reshape([slots, heads, head_dim])
}

/// What each slot's token sees, as `[S, 1, 1, L]` added to the scores: one mask per kind of layer and step.
struct StepMasks {
    positions: Tensor,
    columns: Tensor,
    kind: Kind,
    made: Vec<(Option<i64>, Tensor)>,
}

impl StepMasks {
    fn new(positions: Tensor, length: i64, kind: Kind) -> StepMasks {
        let columns = Tensor::arange(length, (Kind::Int64, positions.device()));
        StepMasks { positions: positions.unsqueeze(1), columns, kind, made: Vec::new() }
    }

    fn of(&mut self, window: Option<i64>) -> &Tensor {
        let index = match self.made.iter().position(|(made, _)| *made == window) {
            Some(index) => index,
            None => {
                self.made.push((window, self.make(window)));
                self.made.len() - 1
            }
        };
        &self.made[index].1
    }

    fn make(&self, window: Option<i64>) -> Tensor {
        let mut hidden = self.columns.gt_tensor(&self.positions);
        if let Some(window) = window {
            hidden = hidden.logical_or(&self.columns.le_tensor(&(&self.positions - window)));
        }
        let size = [hidden.size()[0], 1, 1, hidden.size()[1]];
        let mask = Tensor::zeros(hidden.size(), (self.kind, hidden.device()));
        mask.masked_fill(&hidden, f64::NEG_INFINITY).view(size)
    }
}
