//! The loop: start waiting sequences in free slots, decode one token for every live one, hand out what is finished.
//!
//! Ranks that share a model run the same loop: they agree on the call before it begins, on a stop before each pass, and on
//! every token, so that all of them go on or end together (TP-4 in `echelon_models::tensor_parallel`).

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Instant;

use echelon_core::memory::DecodeLoad;
use echelon_core::progress::{Interrupt, Progress};
use echelon_core::rollout::{GenerationReport, Prompts, SamplingConfig, Sequence};
use echelon_core::zero::Backbone;
use echelon_core::{Error, Result};
use echelon_models::decoder::Decoder;
use echelon_models::tokenizer::Tokenizer;
use tch::Tensor;

use crate::config::EngineConfig;
use crate::kv_cache::{self, KvCache};
use crate::model_runner::{self, ModelRunner, Policy};
use crate::sampler::{DrawKey, Sampler};
use crate::scheduler::{Group, Scheduler};
use crate::sequence::{EndConditions, Running};

/// Samples responses. It holds nothing between calls: the KV cache lives as long as a call.
#[derive(Clone, Debug, Default)]
pub struct Engine {
    config: EngineConfig,
}

impl Engine {
    pub fn new(config: EngineConfig) -> Engine {
        Engine { config }
    }

    /// Samples `samples_per_prompt` responses to each prompt, ordered by prompt, then by sample.
    ///
    /// Log-probs are log-softmax(logits / temperature) over the full vocabulary; greedy (temperature 0) uses 1. Tells
    /// `progress` of each finished response as phase `generate`.
    ///
    /// Where ranks share the model, every rank makes the same call and gets the same sequences; an interrupt raised on one
    /// of them ends the call on all.
    ///
    /// # Errors
    /// A prompt without tokens or with an id outside the vocabulary, sampling parameters out of range, a
    /// `kv_cache_bytes` that does not hold one sequence, logits that are not finite, [`Error::Interrupted`]; ranks of one
    /// group that were called differently, or one that refused or is gone.
    pub fn generate(
        &self,
        policy: Policy,
        prompts: &Prompts,
        sampling: &SamplingConfig,
        progress: &dyn Progress,
        interrupt: &Interrupt,
    ) -> Result<(Vec<Sequence>, GenerationReport)> {
        let _guard = tch::no_grad_guard();
        let started = Instant::now();
        let over_ranks = policy.model.tensor_parallel();
        let generation = Generation::new(&self.config, policy, prompts, sampling, progress);
        let call = if over_ranks.is_solo() { 0 } else { fingerprint(&self.config, policy, prompts, sampling) };
        let Some(mut generation) = over_ranks.agree("begin to generate", call, generation)? else {
            return Ok((Vec::new(), GenerationReport::default()));
        };
        loop {
            generation.check(interrupt)?;
            generation.start_waiting(interrupt)?;
            if generation.scheduler.num_live() == 0 {
                break;
            }
            generation.decode_step()?;
        }
        generation.report.seconds = started.elapsed().as_secs_f64();
        let sequences =
            generation.finished.into_iter().map(|done| done.expect("every sequence had its turn")).collect();
        Ok((sequences, generation.report))
    }

    /// What [`Engine::generate`] did at once to make `sequences`.
    pub fn load(&self, model: &Decoder, prompts: &Prompts, sampling: &SamplingConfig, made: &[Sequence]) -> DecodeLoad {
        let groups = Group::of(prompts);
        let Ok(cache) = KvCache::plan(&self.config, model, &groups, sampling.max_new_tokens) else {
            return DecodeLoad::default();
        };
        let prompt = groups.iter().map(Group::num_tokens).max().unwrap_or(0);
        let length = |sequence: &Sequence| sequence.prompt_token_ids.len() + sequence.response_token_ids.len();
        let longest = made.iter().map(length).max().unwrap_or(0);
        let (prompt_room, room) = kv_cache::room(prompt, longest, prompt + sampling.max_new_tokens - 1);
        let slots = cache.num_slots();
        let (tokens, count) = Scheduler::new(groups, slots, self.config.max_batched_tokens).first_pass();
        DecodeLoad {
            slots: slots as u64,
            slot_tokens: room as u64,
            prompt_slot_tokens: prompt_room as u64,
            prefill_tokens: tokens as u64,
            prefill_prompts: count as u64,
            refills: slots < made.len(),
            packs: model_runner::packs(model, self.config.weight_layout, sampling.max_new_tokens.saturating_sub(1)),
        }
    }
}

/// One call in progress.
struct Generation<'a> {
    model: &'a Decoder,
    prompts: &'a Prompts,
    tokenizer: Option<&'a Tokenizer>,
    progress: &'a dyn Progress,
    scheduler: Scheduler,
    runner: ModelRunner<'a>,
    sampler: Sampler,
    ends: EndConditions<'a>,
    /// By prompt, then by sample.
    finished: Vec<Option<Sequence>>,
    num_finished: usize,
    max_new_tokens: usize,
    started: Instant,
    report: GenerationReport,
}

impl<'a> Generation<'a> {
    /// None where nothing is asked for.
    fn new(
        engine: &EngineConfig,
        policy: Policy<'a>,
        prompts: &'a Prompts,
        sampling: &'a SamplingConfig,
        progress: &'a dyn Progress,
    ) -> Result<Option<Generation<'a>>> {
        check_prompts(prompts, policy.model.config().vocab_size)?;
        if prompts.rows.is_empty() || prompts.samples_per_prompt == 0 {
            return Ok(None);
        }
        let sampler = Sampler::new(sampling, prompts.seed, prompts.evaluation)?;
        let ends = EndConditions::new(sampling, policy.tokenizer)?;
        let groups = Group::of(prompts);
        let total = prompts.rows.len() * prompts.samples_per_prompt;
        let cache = KvCache::plan(engine, policy.model, &groups, sampling.max_new_tokens)?;
        let scheduler = Scheduler::new(groups, cache.num_slots(), engine.max_batched_tokens);
        Ok(Some(Generation {
            model: policy.model,
            prompts,
            tokenizer: policy.tokenizer,
            progress,
            scheduler,
            runner: ModelRunner::new(policy, (sampler.logits_temperature(), engine.weight_layout), cache),
            sampler,
            ends,
            finished: std::iter::repeat_with(|| None).take(total).collect(),
            num_finished: 0,
            max_new_tokens: sampling.max_new_tokens,
            started: Instant::now(),
            report: GenerationReport::default(),
        }))
    }

    /// # Errors
    /// [`Error::Interrupted`] where any rank's `interrupt` asks to stop.
    fn check(&self, interrupt: &Interrupt) -> Result<()> {
        if self.model.any_stops(interrupt.check().is_err())? { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// Fills the free slots, and again where a first token already ended its sequence.
    fn start_waiting(&mut self, interrupt: &Interrupt) -> Result<()> {
        loop {
            let admissions = self.scheduler.admit();
            if admissions.is_empty() {
                break;
            }
            self.check(interrupt)?;
            let logits = self.runner.start(&admissions)?;
            self.report.prefill_tokens +=
                admissions.iter().filter_map(|a| a.prefill.as_ref()).map(Vec::len).sum::<usize>();
            let slots: Vec<usize> = admissions.iter().flat_map(|admission| admission.slots.clone()).collect();
            for (slot, member) in admissions.iter().flat_map(|a| a.slots.iter().zip(&a.members)) {
                let prompt_length = self.prompts.rows[member.prompt_index].token_ids.len();
                self.scheduler.occupy(*slot, Running::new(*member, prompt_length, &self.ends));
            }
            self.sample(&slots, &logits)?;
        }
        for (from, to) in self.scheduler.compact() {
            self.runner.move_slot(from, to, self.scheduler.sequence(to).cached_tokens());
        }
        Ok(())
    }

    /// One more token for every live sequence.
    fn decode_step(&mut self) -> Result<()> {
        let live: Vec<usize> = (0..self.scheduler.num_live()).collect();
        let (tokens, positions): (Vec<i64>, Vec<i64>) = live
            .iter()
            .map(|&slot| self.scheduler.sequence(slot))
            .map(|sequence| (sequence.last_token(), sequence.cached_tokens() as i64))
            .unzip();
        let steps_left = self.steps_left();
        let logits = self.runner.decode(&tokens, &positions, steps_left)?;
        self.report.decode_steps += 1;
        self.sample(&live, &logits)
    }

    /// Decoding steps that will follow, at most.
    fn steps_left(&self) -> usize {
        if self.scheduler.some_wait() {
            return self.max_new_tokens;
        }
        let left = |slot| self.max_new_tokens - self.scheduler.sequence(slot).num_generated();
        (0..self.scheduler.num_live()).map(left).max().unwrap_or(0)
    }

    /// Draws a token for each of `slots` from its row of `[slots, V]` logits (this rank's columns), and frees the slots whose sequence ended.
    fn sample(&mut self, slots: &[usize], logits: &Tensor) -> Result<()> {
        let keys: Vec<DrawKey> = slots
            .iter()
            .map(|&slot| self.scheduler.sequence(slot))
            .map(|sequence| DrawKey {
                prompt_id: self.prompts.rows[sequence.member().prompt_index].id,
                sample: sequence.member().sample as u32,
                position: sequence.num_generated() as u32,
            })
            .collect();
        let drawn = self.sampler.sample(self.model.vocabulary(), logits, &keys)?;
        if self.report.generated_tokens == 0 {
            self.report.first_token_s = self.started.elapsed().as_secs_f64();
        }
        self.report.generated_tokens += drawn.len();
        for (&slot, drawn) in slots.iter().zip(drawn) {
            if let Some(reason) = self.scheduler.sequence_mut(slot).push(drawn, &self.ends)? {
                let sequence = self.scheduler.release(slot);
                let member = sequence.member();
                let prompt = &self.prompts.rows[member.prompt_index];
                let row = member.prompt_index * self.prompts.samples_per_prompt + member.sample;
                self.finished[row] = Some(sequence.finish(prompt, reason, self.tokenizer)?);
                self.num_finished += 1;
                self.progress.advance("generate", self.num_finished, self.finished.len());
            }
        }
        Ok(())
    }
}

/// A number that is the same on ranks whose calls do the same.
fn fingerprint(engine: &EngineConfig, policy: Policy, prompts: &Prompts, sampling: &SamplingConfig) -> u64 {
    let mut hasher = DefaultHasher::new();
    for prompt in &prompts.rows {
        (prompt.id, &prompt.token_ids).hash(&mut hasher);
    }
    (prompts.samples_per_prompt, prompts.seed, prompts.evaluation).hash(&mut hasher);
    // The prompts' texts are not read; what else decides is small enough to be written out.
    let eos_ids = policy.tokenizer.map(Tokenizer::eos_ids);
    format!("{engine:?} {sampling:?} {eos_ids:?} {:?} {:?}", policy.model.config(), policy.model.kind())
        .hash(&mut hasher);
    hasher.finish()
}

fn check_prompts(prompts: &Prompts, vocab_size: i64) -> Result<()> {
    for (index, prompt) in prompts.rows.iter().enumerate() {
        if prompt.token_ids.is_empty() {
            return Err(Error::Refused(format!(
                "prompt {index} has no tokens: a response needs at least one to follow"
            )));
        }
        if let Some(id) = prompt.token_ids.iter().find(|&&id| !(0..vocab_size).contains(&id)) {
            return Err(Error::Refused(format!(
                "prompt {index} has token id {id}, but the model's vocabulary has {vocab_size} tokens: \
                 tokenise it with the model's own tokenizer"
            )));
        }
    }
    Ok(())
}
