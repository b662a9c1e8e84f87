//! The engine against the trainer's forward pass, the obvious loop and exact probabilities.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use echelon_core::Error;
use echelon_core::data::{ROLLOUT_LOGPROBS, Rows};
use echelon_core::pack::PackedRows;
use echelon_core::progress::{Interrupt, Progress, Unwatched};
use echelon_core::random::{Domain, normal, uniform};
use echelon_core::rollout::{FinishReason, GenerationReport, Prompt, Prompts, SamplingConfig, Sequence, rows_of};
use echelon_core::weight_layout::WeightLayout;
use echelon_core::zero::{Backbone, forward};
use echelon_generation::weight_layout::works;
use echelon_generation::{Engine, EngineConfig, Policy};
use echelon_models::checkpoint::Checkpoint;
use echelon_models::config::{DecoderConfig, HeadKind, Rope, RopeScaling};
use echelon_models::decoder::Decoder;
use echelon_models::head::LogprobHead;
use echelon_models::tokenizer::Tokenizer;
use tch::{Device, Kind, Tensor};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/golden");

struct Model {
    decoder: Decoder,
    head: Tensor,
}

impl Model {
    fn policy<'a>(&'a self, tokenizer: Option<&'a Tokenizer>) -> Policy<'a> {
        Policy { model: &self.decoder, head: &self.head, tokenizer }
    }

    /// `[V]` log-probs of the token after `prefix`, by a pass over all of it.
    fn next_logprobs(&self, prefix: &[i64], temperature: f64) -> Tensor {
        let _guard = tch::no_grad_guard();
        let (row, mask) = (prefix.to_vec(), vec![false; prefix.len()]);
        let batch = PackedRows::new(&Rows::of_tokens(&[(row, mask)]), Device::Cpu);
        let context = self.decoder.context(&batch);
        let mut hidden = self.decoder.embed(&batch).unwrap();
        for layer in 0..self.decoder.num_layers() {
            hidden = self.decoder.layer(layer, &hidden, &batch, &context).unwrap();
        }
        let last = self.decoder.norm(&hidden.index_select(0, &batch.last_tokens));
        (last.matmul(&self.head.tr()) / temperature).log_softmax(-1, None::<Kind>).squeeze_dim(0)
    }

    fn generate(
        &self,
        engine: EngineConfig,
        prompts: &Prompts,
        sampling: &SamplingConfig,
    ) -> (Vec<Sequence>, GenerationReport) {
        self.generate_text(None, engine, prompts, sampling)
    }

    fn generate_text(
        &self,
        tokenizer: Option<&Tokenizer>,
        engine: EngineConfig,
        prompts: &Prompts,
        sampling: &SamplingConfig,
    ) -> (Vec<Sequence>, GenerationReport) {
        let engine = Engine::new(engine);
        engine.generate(self.policy(tokenizer), prompts, sampling, &Unwatched, &Interrupt::default()).unwrap()
    }
}

/// Every golden checkpoint of a language model, by name.
fn golden_models(kind: Kind) -> Vec<(String, Model)> {
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(Path::new(GOLDEN).join("checkpoints")).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    let mut models = Vec::new();
    for folder in folders {
        let config = DecoderConfig::read(&folder).unwrap();
        if config.head == HeadKind::Logits {
            let checkpoint = Checkpoint::open(&folder).unwrap();
            let mut load = checkpoint.loader(&config, kind, Device::Cpu);
            let decoder = Decoder::new(&config, &mut load).unwrap();
            let head = if config.tied_embeddings {
                decoder.embedding().shallow_clone()
            } else {
                load("lm_head.weight").unwrap()
            };
            models.push((folder.file_name().unwrap().display().to_string(), Model { decoder, head }));
        }
    }
    assert!(models.len() >= 8, "golden checkpoints are there");
    models
}

/// A tied model with random weights; `spread` is that of the embedding, and so of the logits.
fn random_model(vocab_size: i64, spread: f64) -> Model {
    let config = DecoderConfig {
        hidden_size: 24,
        intermediate_size: 40,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 6,
        vocab_size,
        max_positions: 1024,
        norm_eps: 1e-5,
        rope: Rope { theta: 10000.0, scaling: RopeScaling::None },
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: false,
        windows: vec![None, Some(7)],
        tied_embeddings: true,
        head: HeadKind::Logits,
        dtype: None,
        initializer_range: 0.02,
    };
    let params: Vec<_> = config.shape().units.into_iter().flat_map(|unit| unit.params).collect();
    let decoder = Decoder::new(&config, &mut |name| {
        let index = params.iter().position(|param| param.name == name).expect("a parameter of the shape");
        let scale = if name.contains("embed") { spread } else { 0.4 };
        let shift = if name.contains("norm") { 1.0 } else { 0.0 };
        let count = params[index].shape.iter().product::<i64>() as u64;
        let values: Vec<f64> =
            (0..count).map(|i| shift + scale * normal(9, Domain::Weights, i, index as u32, 0)).collect();
        Ok(Tensor::from_slice(&values).view(params[index].shape.as_slice()))
    })
    .unwrap();
    let head = decoder.embedding().shallow_clone();
    Model { decoder, head }
}

/// The 512-token tokenizer of the golden files with end-of-sequence ids of our choice.
fn tokenizer(eos_ids: &[i64]) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(Path::new(GOLDEN).join("tokenizer/stories").join(file), folder.path().join(file)).unwrap();
    }
    let generation = serde_json::json!({ "eos_token_id": eos_ids }).to_string();
    std::fs::write(folder.path().join("generation_config.json"), generation).unwrap();
    Tokenizer::load(folder.path()).unwrap()
}

/// `lengths.len()` prompts of random tokens.
fn prompts(lengths: &[usize], samples_per_prompt: usize, vocab_size: i64) -> Prompts {
    let row = |(id, &length): (usize, &usize)| {
        let token = |at| (3.0 + uniform(5, Domain::Data, id as u64, at as u32, 0) * (vocab_size - 3) as f64) as i64;
        Prompt { id: id as u64 + 100, token_ids: (0..length).map(token).collect(), text: String::new(), label: None }
    };
    Prompts { rows: lengths.iter().enumerate().map(row).collect(), samples_per_prompt, seed: 7, evaluation: false }
}

fn sampling(temperature: f64, max_new_tokens: usize) -> SamplingConfig {
    SamplingConfig { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, max_new_tokens, stop: vec![], ignore_eos: false }
}

fn slots(max_sequences: usize) -> EngineConfig {
    EngineConfig { max_sequences, ..EngineConfig::default() }
}

/// The layouts of weights that work here.
fn layouts(kind: Kind) -> impl Iterator<Item = WeightLayout> {
    WeightLayout::ALL.into_iter().filter(move |&layout| works(layout, kind))
}

fn tokens(sequences: &[Sequence]) -> Vec<Vec<i64>> {
    sequences.iter().map(|sequence| sequence.response_token_ids.clone()).collect()
}

/// Engine minus trainer, over all response tokens.
fn worst_logprob_difference(model: &Model, temperature: f64, weight_layout: WeightLayout) -> f64 {
    let prompts = prompts(&[3, 11, 1, 20], 2, 112);
    let (sequences, _) =
        model.generate(EngineConfig { weight_layout, ..slots(3) }, &prompts, &sampling(temperature, 24));
    let rollout = rows_of(&prompts, &sequences, 0).unwrap();
    let batch = PackedRows::new(&rollout, Device::Cpu);
    let head = LogprobHead::frozen(model.head.shallow_clone(), temperature);
    let ours = forward(&model.decoder, &head, &batch).unwrap().logprobs;
    assert_eq!(batch.targets.size()[0], 4 * 2 * 24);
    (ours - &rollout[ROLLOUT_LOGPROBS]).abs().max().double_value(&[])
}

#[test]
fn logprobs_equal_the_trainers_for_every_architecture() {
    for (kind, bound) in [(Kind::Float, 1e-4), (Kind::Double, 1e-6)] {
        for (name, model) in golden_models(kind) {
            for layout in layouts(kind) {
                let worst = worst_logprob_difference(&model, 0.7, layout);
                println!("{name} {kind:?} {layout}: max abs difference {worst:.2e}");
                assert!(worst <= bound, "{name} {kind:?} {layout}: {worst:e}");
            }
        }
    }
}

#[test]
fn bf16_logprobs_are_near_the_trainers() {
    for (name, model) in golden_models(Kind::BFloat16) {
        for layout in layouts(Kind::BFloat16) {
            let worst = worst_logprob_difference(&model, 1.0, layout);
            println!("{name} {layout}: max abs difference {worst:.2e}");
            assert!(worst <= 1.0, "{name} {layout}: {worst:e}");
        }
    }
}

/// Slots that empty one after the other: weights packed for many slots, then for fewer, and rows for nothing between.
#[test]
fn logprobs_stay_the_trainers_while_slots_empty() {
    let (_, model) = golden_models(Kind::Float).into_iter().next().unwrap();
    let ends = tokenizer(&(100..112).collect::<Vec<i64>>());
    let prompts = prompts(&[7; 70], 1, 112);
    for weight_layout in layouts(Kind::Float) {
        let engine = EngineConfig { weight_layout, ..slots(64) };
        logprobs_are_the_trainers(
            &model,
            model.generate_text(Some(&ends), engine, &prompts, &sampling(1.0, 60)),
            &prompts,
        );
    }
}

fn logprobs_are_the_trainers(model: &Model, (sequences, _): (Vec<Sequence>, GenerationReport), prompts: &Prompts) {
    let mut lengths: Vec<usize> = sequences.iter().map(|s| s.response_token_ids.len()).collect();
    lengths.sort_unstable();
    assert!(lengths[35] < 20 && lengths[69] > 35, "most end early, some late: {lengths:?}");
    let rollout = rows_of(prompts, &sequences, 0).unwrap();
    let batch = PackedRows::new(&rollout, Device::Cpu);
    let head = LogprobHead::frozen(model.head.shallow_clone(), 1.0);
    let ours = forward(&model.decoder, &head, &batch).unwrap().logprobs;
    let worst = (ours - &rollout[ROLLOUT_LOGPROBS]).abs().max().double_value(&[]);
    assert!(worst <= 1e-4, "{worst:e}");
}

#[test]
fn greedy_tokens_equal_a_loop_without_a_cache() {
    for (name, model) in golden_models(Kind::Float) {
        let prompts = prompts(&[4, 9, 17], 1, 112);
        let greedy = |weight_layout| {
            let engine = EngineConfig { weight_layout, ..slots(2) };
            model.generate(engine, &prompts, &sampling(0.0, 20)).0
        };
        let by_layout: Vec<Vec<Sequence>> = layouts(Kind::Float).map(greedy).collect();
        let answers = by_layout.iter().flat_map(|sequences| prompts.rows.iter().zip(sequences));
        for (prompt, sequence) in answers {
            let mut prefix = prompt.token_ids.clone();
            for (token, logprob) in sequence.response_token_ids.iter().zip(&sequence.rollout_logprobs) {
                let logprobs = model.next_logprobs(&prefix, 1.0);
                let best = logprobs.argmax(-1, false).int64_value(&[]);
                assert_eq!(*token, best, "{name}, after {} tokens", prefix.len());
                assert!((f64::from(*logprob) - logprobs.double_value(&[best])).abs() < 1e-4);
                prefix.push(best);
            }
            assert_eq!(sequence.finish_reason, FinishReason::Length);
        }
    }
}

#[test]
fn a_sequence_does_not_depend_on_its_neighbours_nor_on_the_slots() {
    let model = random_model(40, 0.5);
    let prompts = prompts(&[5, 2, 30, 9, 14, 1], 3, 40);
    let sampling = SamplingConfig { top_k: 20, top_p: 0.9, ..sampling(1.0, 90) };
    let (wide, _) = model.generate(slots(18), &prompts, &sampling);
    for engine in [slots(1), slots(4), EngineConfig { max_batched_tokens: 8, ..slots(7) }] {
        let (narrow, _) = model.generate(engine.clone(), &prompts, &sampling);
        assert_eq!(tokens(&narrow), tokens(&wide), "{engine:?}");
    }
    let alone = Prompts { rows: vec![prompts.rows[2].clone()], ..prompts.clone() };
    assert_eq!(tokens(&model.generate(slots(2), &alone, &sampling).0), tokens(&wide)[6..9]);
    let places: Vec<_> = wide.iter().map(|sequence| (sequence.prompt_index, sequence.sample)).collect();
    assert_eq!(places, (0..18).map(|row| (row / 3, row % 3)).collect::<Vec<_>>());
    assert_ne!(wide[0].response_token_ids, wide[1].response_token_ids);
}

#[test]
fn samples_follow_the_exact_probabilities() {
    let model = random_model(6, 0.2);
    let prompts = prompts(&[4], 6000, 6);
    let temperature = 1.3;
    let (sequences, _) = model.generate(slots(500), &prompts, &sampling(temperature, 2));
    let first: Vec<f64> = Vec::try_from(model.next_logprobs(&prompts.rows[0].token_ids, temperature).exp()).unwrap();
    let mut statistic = 0.0;
    for (a, p) in first.iter().enumerate() {
        let mut prefix = prompts.rows[0].token_ids.clone();
        prefix.push(a as i64);
        let second: Vec<f64> = Vec::try_from(model.next_logprobs(&prefix, temperature).exp()).unwrap();
        for (b, q) in second.iter().enumerate() {
            let expected = p * q * sequences.len() as f64;
            let seen = sequences.iter().filter(|s| s.response_token_ids == [a as i64, b as i64]).count() as f64;
            assert!(expected > 5.0, "enough of each pair for the statistic: {expected}");
            statistic += (seen - expected).powi(2) / expected;
        }
    }
    // 36 pairs, 35 degrees of freedom: 66.6 is exceeded once in a thousand times.
    assert!(statistic > 10.0 && statistic < 66.6, "chi-square {statistic}");
}

#[test]
fn cut_tokens_never_appear() {
    let model = random_model(40, 0.5);
    let prompts = prompts(&[6], 200, 40);
    let sampling = SamplingConfig { top_k: 3, ..sampling(1.0, 1) };
    let (sequences, _) = model.generate(slots(64), &prompts, &sampling);
    let logprobs = model.next_logprobs(&prompts.rows[0].token_ids, 1.0);
    let best: Vec<i64> = Vec::try_from(logprobs.topk(3, -1, true, true).1).unwrap();
    for sequence in &sequences {
        let token = sequence.response_token_ids[0];
        assert!(best.contains(&token), "{token} is none of {best:?}");
        let full = logprobs.double_value(&[token]);
        assert!((f64::from(sequence.rollout_logprobs[0]) - full).abs() < 1e-5, "over the full vocabulary");
    }
    assert!(best.iter().all(|token| sequences.iter().any(|sequence| sequence.response_token_ids[0] == *token)));
}

#[test]
fn a_free_slot_is_refilled_and_distinct_prompts_are_read_once() {
    let model = random_model(512, 0.05);
    let ends: Vec<i64> = (100..108).collect(); // a response ends after some 64 tokens
    let tokenizer = tokenizer(&ends);
    let mut prompts = prompts(&[10, 3, 25, 7, 3], 12, 512);
    prompts.rows[4].token_ids = prompts.rows[1].token_ids.clone();
    for num_slots in [1, 8, 13, 60] {
        let (sequences, report) =
            model.generate_text(Some(&tokenizer), slots(num_slots), &prompts, &sampling(1.0, 256));
        let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.response_token_ids.len()).collect();
        let (sum, longest) = (lengths.iter().sum::<usize>(), lengths.iter().max().unwrap());
        assert!(report.decode_steps <= sum / num_slots + longest, "{report:?} for {sum} tokens, longest {longest}");
        assert_eq!(report.prefill_tokens, 10 + 3 + 25 + 7);
        assert_eq!(report.generated_tokens, sum);
        assert!(lengths.iter().min() < lengths.iter().max());
        assert_ne!(sequences[12].response_token_ids, sequences[48].response_token_ids, "equal tokens, another id");
    }
}

#[test]
fn every_eos_id_ends_a_response_unless_ignored() {
    let model = random_model(512, 0.05);
    let ends: Vec<i64> = (100..140).collect();
    let tokenizer = tokenizer(&ends);
    let prompts = prompts(&[5], 50, 512);
    let (sequences, _) = model.generate_text(Some(&tokenizer), slots(16), &prompts, &sampling(1.0, 40));
    let mut seen = std::collections::BTreeSet::new();
    for sequence in &sequences {
        let (last, before) = sequence.response_token_ids.split_last().unwrap();
        assert!(before.iter().all(|token| !tokenizer.eos_ids().contains(token)));
        let stopped = tokenizer.eos_ids().contains(last);
        assert_eq!(sequence.finish_reason, if stopped { FinishReason::Stop } else { FinishReason::Length });
        assert!(stopped || sequence.response_token_ids.len() == 40);
        assert_eq!(sequence.rollout_logprobs.len(), sequence.response_token_ids.len());
        assert_eq!(sequence.response, tokenizer.decode(&sequence.response_token_ids, true).unwrap());
        seen.insert(*last);
    }
    assert!(seen.len() > 10, "several ids ended one: {seen:?}");
    let ignoring = SamplingConfig { ignore_eos: true, ..sampling(1.0, 40) };
    let (endless, _) = model.generate_text(Some(&tokenizer), slots(16), &prompts, &ignoring);
    for (endless, ended) in endless.iter().zip(&sequences) {
        assert_eq!((endless.response_token_ids.len(), endless.finish_reason), (40, FinishReason::Length));
        assert_eq!(endless.response_token_ids[..ended.response_token_ids.len()], ended.response_token_ids);
    }
}

#[test]
fn a_stop_text_is_found_across_tokens() {
    let model = random_model(512, 0.05);
    let tokenizer = tokenizer(&[2]);
    let prompts = prompts(&[5, 8], 8, 512);
    let free = SamplingConfig { ignore_eos: true, ..sampling(1.0, 60) };
    let (unstopped, _) = model.generate_text(Some(&tokenizer), slots(5), &prompts, &free);
    let (mut across, mut checked) = (0, 0);
    for (row, sequence) in unstopped.iter().enumerate() {
        let text: Vec<char> = sequence.response.chars().collect();
        // Three characters in the middle: with tokens of a few characters they often lie in two of them.
        let stop: String = text[text.len() / 2..text.len() / 2 + 3].iter().collect();
        if stop.contains(char::REPLACEMENT_CHARACTER) {
            continue;
        }
        let stopping = SamplingConfig { stop: vec!["never to be seen".into(), stop.clone()], ..free.clone() };
        let (stopped, _) = model.generate_text(Some(&tokenizer), slots(5), &prompts, &stopping);
        let stopped = &stopped[row];
        let count = stopped.response_token_ids.len();
        assert_eq!(stopped.response_token_ids, sequence.response_token_ids[..count], "the same sequence, cut");
        assert_eq!(stopped.finish_reason, FinishReason::Stop);
        assert!(stopped.response.contains(&stop), "{stop:?} stays in {:?}", stopped.response);
        let before = tokenizer.decode(&stopped.response_token_ids[..count - 1], true).unwrap();
        assert!(!before.contains(&stop), "{stop:?} was complete in {before:?}");
        let last = tokenizer.decode(&stopped.response_token_ids[count - 1..], true).unwrap();
        across += usize::from(!last.contains(&stop));
        checked += 1;
    }
    assert!(checked >= 8 && across >= 3, "{across} of {checked} stop texts lay in several tokens");
}

#[test]
fn progress_counts_responses_and_an_interrupt_ends_the_call() {
    struct Watch(Mutex<Vec<usize>>, Interrupt, usize);
    impl Progress for Watch {
        fn advance(&self, phase: &str, done: usize, total: usize) {
            assert_eq!((phase, total), ("generate", 6));
            self.0.lock().unwrap().push(done);
            if done == self.2 {
                self.1.raise();
            }
        }
    }
    let model = random_model(40, 0.5);
    let prompts = prompts(&[5, 2], 3, 40);
    let run = |raise_at| {
        let watch = Watch(Mutex::default(), Interrupt::default(), raise_at);
        let interrupt = watch.1.clone();
        let result =
            Engine::new(slots(2)).generate(model.policy(None), &prompts, &sampling(1.0, 5), &watch, &interrupt);
        (result, watch.0.into_inner().unwrap())
    };
    let (result, seen) = run(usize::MAX);
    assert_eq!((result.unwrap().0.len(), seen), (6, vec![1, 2, 3, 4, 5, 6]));
    let (result, seen) = run(3);
    assert!(matches!(result, Err(Error::Interrupted)));
    assert!(seen.len() < 6, "{seen:?}");
}

#[test]
fn a_byte_budget_bounds_the_slots_or_is_refused() {
    let model = random_model(40, 0.5);
    let prompts = prompts(&[20, 12], 2, 40);
    let bytes_per_token = 2 * 2 * 2 * 6 * 8; // keys and values, layers, kv heads, D, f64
    let budget = |tokens: usize| EngineConfig { kv_cache_bytes: Some(tokens * bytes_per_token), ..slots(4) };
    let (wide, all) = model.generate(slots(4), &prompts, &sampling(1.0, 11));
    assert_eq!(all.decode_steps, 10);
    let (two, report) = model.generate(budget(2 * 30 + 20), &prompts, &sampling(1.0, 11));
    assert_eq!((report.decode_steps, tokens(&two)), (20, tokens(&wide)));
    let engine = Engine::new(budget(49));
    let error = engine.generate(model.policy(None), &prompts, &sampling(1.0, 11), &Unwatched, &Interrupt::default());
    let message = error.unwrap_err().to_string();
    assert!(message.contains(&format!("kv_cache_bytes is {}", 49 * bytes_per_token)), "{message}");
    assert!(message.contains(&format!("needs {}", 50 * bytes_per_token)), "{message}");
}

#[test]
fn bad_input_is_refused_with_its_place() {
    let model = random_model(40, 0.5);
    let good = prompts(&[3, 3], 1, 40);
    let with = |token_ids: Vec<i64>| {
        let mut prompts = good.clone();
        prompts.rows[1].token_ids = token_ids;
        prompts
    };
    let stopping = SamplingConfig { stop: vec!["x".into()], ..sampling(1.0, 4) };
    for (prompts, sampling, engine, expected) in [
        (with(vec![]), sampling(1.0, 4), slots(2), "prompt 1 has no tokens"),
        (with(vec![1, 40]), sampling(1.0, 4), slots(2), "prompt 1 has token id 40"),
        (with(vec![-1]), sampling(1.0, 4), slots(2), "prompt 1 has token id -1"),
        (good.clone(), sampling(1.0, 0), slots(2), "max_new_tokens is 0"),
        (good.clone(), sampling(-1.0, 4), slots(2), "temperature is -1"),
        (good.clone(), stopping, slots(2), "stop texts need a tokenizer"),
        (good.clone(), sampling(1.0, 4), slots(0), "max_sequences is 0"),
    ] {
        let result =
            Engine::new(engine).generate(model.policy(None), &prompts, &sampling, &Unwatched, &Interrupt::default());
        let message = result.unwrap_err().to_string();
        assert!(message.starts_with(expected), "{message}");
    }
    let none = Prompts { rows: vec![], ..good.clone() };
    let (sequences, report) = model.generate(slots(2), &none, &sampling(1.0, 4));
    assert_eq!((sequences.len(), report), (0, GenerationReport::default()));
}
