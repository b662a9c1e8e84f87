//! Ranks that share a model sample what one process samples, decide alike and end together. Ranks are threads here, each
//! with its own sockets: to c10d they are processes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::progress::{Interrupt, Progress, Unwatched};
use echelon_core::random::{Domain, uniform};
use echelon_core::rollout::{FinishReason, GenerationReport, Prompt, Prompts, SamplingConfig, Sequence};
use echelon_core::weight_layout::WeightLayout;
use echelon_core::{Error, Result};
use echelon_generation::weight_layout::works;
use echelon_generation::{Engine, EngineConfig, Policy};
use echelon_models::checkpoint::Checkpoint;
use echelon_models::config::{DecoderConfig, HeadKind};
use echelon_models::decoder::Decoder;
use echelon_models::tensor_parallel::TensorParallel;
use echelon_models::tokenizer::Tokenizer;
use float32::{nudged, promise};
use tch::{Device, Kind, Tensor};

#[path = "../../models/tests/common/float32.rs"]
mod float32;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/golden");

/// Runs `each` on the threads of `size` ranks of one group and gives what each returns, in order.
fn ranks<T: Send>(size: usize, patience: Patience, each: impl Fn(&TensorParallel) -> T + Sync) -> Vec<T> {
    let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
    let port = point.port();
    std::thread::scope(|scope| {
        let run = |rank| {
            let each = &each;
            scope.spawn(move || {
                tch::set_num_threads(1);
                let point = MeetingPoint::join("127.0.0.1", port, patience).unwrap();
                let group = ProcessGroup::join(&point, "test", (rank, size), "127.0.0.1", patience).unwrap();
                each(&TensorParallel::new(group))
            })
        };
        let threads: Vec<_> = (0..size).map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

struct Model {
    decoder: Decoder,
    head: Tensor,
}

impl Model {
    fn open(folder: &Path, kind: Kind, tensor_parallel: &TensorParallel) -> Model {
        Model::nudged(folder, kind, tensor_parallel, None)
    }

    fn nudged(folder: &Path, kind: Kind, tensor_parallel: &TensorParallel, nudge: Option<u64>) -> Model {
        let config = DecoderConfig::read(folder).unwrap();
        let checkpoint = Checkpoint::open(folder).unwrap();
        let mut as_stored = checkpoint.slice_loader(&config, kind, Device::Cpu, tensor_parallel.part()).unwrap();
        let mut load = |name: &str| {
            let weight = as_stored(name)?;
            Ok(nudge.map_or(weight.shallow_clone(), |draw| nudged(name, &weight, draw)))
        };
        let decoder = Decoder::sliced(&config, tensor_parallel, &mut load).unwrap();
        let head = match config.tied_embeddings {
            true => decoder.embedding().shallow_clone(),
            false => load("lm_head.weight").unwrap(),
        };
        Model { decoder, head }
    }

    fn policy<'a>(&'a self, tokenizer: Option<&'a Tokenizer>) -> Policy<'a> {
        Policy { model: &self.decoder, head: &self.head, tokenizer }
    }

    fn generate(
        &self,
        engine: EngineConfig,
        prompts: &Prompts,
        sampling: &SamplingConfig,
    ) -> Result<(Vec<Sequence>, GenerationReport)> {
        Engine::new(engine).generate(self.policy(None), prompts, sampling, &Unwatched, &Interrupt::default())
    }
}

fn folders() -> Vec<PathBuf> {
    let root = Path::new(GOLDEN).join("checkpoints");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.retain(|folder| DecoderConfig::read(folder).unwrap().head == HeadKind::Logits);
    folders.sort();
    assert!(folders.len() >= 8, "golden checkpoints are there");
    folders
}

fn folder(name: &str) -> PathBuf {
    Path::new(GOLDEN).join("checkpoints").join(name)
}

fn prompts(lengths: &[usize], samples_per_prompt: usize) -> Prompts {
    let row = |(id, &length): (usize, &usize)| {
        let token = |at| (3.0 + uniform(5, Domain::Data, id as u64, at as u32, 0) * 109.0) as i64;
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

/// [`slots`] with each layout of weights that works here.
fn engines(kind: Kind, max_sequences: usize) -> impl Iterator<Item = EngineConfig> {
    let usable = WeightLayout::ALL.into_iter().filter(move |&layout| works(layout, kind));
    usable.map(move |weight_layout| EngineConfig { weight_layout, ..slots(max_sequences) })
}

fn tokens(sequences: &[Sequence]) -> Vec<&[i64]> {
    sequences.iter().map(|sequence| sequence.response_token_ids.as_slice()).collect()
}

fn worst_logprob(found: &[Sequence], expected: &[Sequence]) -> f64 {
    let logprobs = |sequences: &[Sequence]| -> Vec<f64> {
        sequences.iter().flat_map(|sequence| &sequence.rollout_logprobs).map(|&logprob| f64::from(logprob)).collect()
    };
    let (found, expected) = (logprobs(found), logprobs(expected));
    assert_eq!(found.len(), expected.len());
    found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// How far log-probs in f32 may lie from each other: by f64 with nudged weights, of responses that stay the same tokens.
fn promised_of_f32(folder: &Path, prompts: &Prompts, sampling: &SamplingConfig) -> f64 {
    let of = |nudge| {
        let model = Model::nudged(folder, Kind::Double, &TensorParallel::solo(), nudge);
        model.generate(slots(2), prompts, sampling).unwrap().0
    };
    let exact = of(None);
    promise(|draw| {
        let pairs = of(Some(draw)).into_iter().zip(exact.iter().cloned());
        let same = |(a, b): &(Sequence, Sequence)| a.response_token_ids == b.response_token_ids;
        let (nudged, exact): (Vec<_>, Vec<_>) = pairs.filter(same).unzip();
        assert!(exact.len() >= prompts.rows.len(), "{}: most responses stay", folder.display());
        worst_logprob(&nudged, &exact)
    })
}

/// Two slots for six sequences: prompts are kept for later samples, slots are refilled, moved, and packed anew.
fn agrees(folder: &Path, kind: Kind, size: usize, sampling: &SamplingConfig) {
    let prompts = prompts(&[3, 11, 1], 2);
    // A sequence's log-probs are f32, also where the model computes in f64.
    let bound = if kind == Kind::Double { 5e-7 } else { promised_of_f32(folder, &prompts, sampling) };
    engines(kind, 2).for_each(|engine| agrees_with(&engine, (folder, kind, size), (&prompts, sampling), bound));
}

fn agrees_with(
    engine: &EngineConfig,
    (folder, kind, size): (&Path, Kind, usize),
    (prompts, sampling): (&Prompts, &SamplingConfig),
    bound: f64,
) {
    let (expected, report) =
        Model::open(folder, kind, &TensorParallel::solo()).generate(engine.clone(), prompts, sampling).unwrap();
    let found = ranks(size, Patience::default(), |tensor_parallel| {
        Model::open(folder, kind, tensor_parallel).generate(engine.clone(), prompts, sampling).unwrap()
    });
    for (sequences, of_rank) in &found {
        let what = || format!("{} {kind:?} over {size}, {sampling:?}, {engine:?}", folder.display());
        assert_eq!(tokens(sequences), tokens(&expected), "{}", what());
        let worst = worst_logprob(sequences, &expected);
        assert!(worst <= bound, "{}: {worst:e}, promised {bound:e}", what());
        assert_eq!(of_rank.decode_steps, report.decode_steps);
        assert_eq!(worst_logprob(sequences, &found[0].0), 0.0, "{}: ranks disagree", what());
    }
}

#[test]
fn ranks_sample_what_one_process_samples() {
    for folder in folders() {
        for kind in [Kind::Double, Kind::Float] {
            agrees(&folder, kind, 2, &sampling(0.7, 13));
        }
    }
    for name in ["llama_biases", "qwen3_head_dim"] {
        agrees(&folder(name), Kind::Double, 4, &sampling(0.7, 13));
    }
}

#[test]
fn cuts_and_greedy_choices_go_over_all_parts_of_the_vocabulary() {
    let folder = folder("llama_tied_f32");
    let cuts = [(0.0, 0, 1.0, 0.0), (1.5, 40, 1.0, 0.0), (1.5, 0, 0.8, 0.0), (1.5, 0, 1.0, 0.2), (1.5, 60, 0.9, 0.02)];
    for (temperature, top_k, top_p, min_p) in cuts {
        for size in [2, 4] {
            let sampling = SamplingConfig { top_k, top_p, min_p, ..sampling(temperature, 6) };
            agrees(&folder, Kind::Double, size, &sampling);
        }
    }
}

/// The 512-token tokenizer of the golden files, whose first 112 tokens the models know.
fn tokenizer() -> Tokenizer {
    Tokenizer::load(&Path::new(GOLDEN).join("tokenizer/stories")).unwrap()
}

#[test]
fn stop_texts_end_a_response_on_every_rank() {
    let folder = folder("llama_tied_f32");
    let prompts = prompts(&[5, 8], 6);
    let tokenizer = tokenizer();
    let run = |tensor_parallel: &TensorParallel, sampling: &SamplingConfig| {
        let model = Model::open(&folder, Kind::Double, tensor_parallel);
        let engine = Engine::new(slots(4));
        engine
            .generate(model.policy(Some(&tokenizer)), &prompts, sampling, &Unwatched, &Interrupt::default())
            .unwrap()
            .0
    };
    let free = SamplingConfig { ignore_eos: true, ..sampling(1.0, 30) };
    let text = run(&TensorParallel::solo(), &free)[0].response.clone();
    let stop: String = text.chars().skip(text.chars().count() / 2).take(2).collect();
    let stopping = SamplingConfig { stop: vec![stop], ..free };
    let expected = run(&TensorParallel::solo(), &stopping);
    assert!(expected.iter().any(|sequence| sequence.finish_reason == FinishReason::Stop));
    for found in ranks(2, Patience::default(), |tensor_parallel| run(tensor_parallel, &stopping)) {
        assert_eq!(tokens(&found), tokens(&expected));
        let ends = |sequences: &[Sequence]| sequences.iter().map(|s| s.finish_reason).collect::<Vec<_>>();
        assert_eq!(ends(&found), ends(&expected));
    }
}

/// TP-4: raised on one rank, an interrupt ends the call on all, and the next call works.
#[test]
fn an_interrupt_on_one_rank_ends_all() {
    struct Raising<'a>(&'a Interrupt, bool);
    impl Progress for Raising<'_> {
        fn advance(&self, _phase: &str, done: usize, _total: usize) {
            if self.1 && done == 2 {
                self.0.raise();
            }
        }
    }
    let folder = folder("llama_tied_f32");
    let prompts = prompts(&[5, 2], 3);
    let lengths = ranks(2, Patience::default(), |tensor_parallel| {
        let model = Model::open(&folder, Kind::Float, tensor_parallel);
        let interrupt = Interrupt::default();
        let raising = Raising(&interrupt, tensor_parallel.rank() == 1);
        let engine = Engine::new(slots(2));
        let ended = engine.generate(model.policy(None), &prompts, &sampling(1.0, 5), &raising, &interrupt);
        assert!(matches!(ended, Err(Error::Interrupted)));
        model.generate(slots(2), &prompts, &sampling(1.0, 5)).unwrap().0.len()
    });
    assert_eq!(lengths, [6, 6]);
}

#[test]
fn calls_that_differ_or_that_one_rank_refuses_end_on_all() {
    let folder = folder("llama_tied_f32");
    let tokenizer = tokenizer();
    let messages = ranks(2, Patience::default(), |tensor_parallel| {
        let model = Model::open(&folder, Kind::Float, tensor_parallel);
        let rank = tensor_parallel.rank();
        let mut other = prompts(&[5, 2], 1);
        other.rows[1].token_ids[0] += rank as i64;
        let differing = model.generate(slots(2), &other, &sampling(1.0, 5)).unwrap_err().to_string();
        let stopping = SamplingConfig { stop: vec!["x".into()], ..sampling(1.0, 5) };
        let policy = model.policy((rank == 0).then_some(&tokenizer));
        let engine = Engine::new(slots(2));
        let refused = engine.generate(policy, &prompts(&[5], 1), &stopping, &Unwatched, &Interrupt::default());
        let refused = refused.unwrap_err().to_string();
        let after = model.generate(slots(2), &prompts(&[5, 2], 1), &sampling(1.0, 5)).unwrap().0.len();
        assert_eq!(after, 2, "the group goes on");
        [differing, refused]
    });
    assert!(messages[0][0].starts_with("begin to generate: ranks 0 and 1 were called"), "{}", messages[0][0]);
    assert!(messages[1][0].starts_with("begin to generate: ranks 1 and 0 were called"), "{}", messages[1][0]);
    assert_eq!(messages[1][1], "stop texts need a tokenizer: the model folder has none");
    assert_eq!(messages[0][1], format!("begin to generate: rank 1 of 2 refused: {}", messages[1][1]));
}

/// Weights that are damaged on one rank only: every rank refuses, none waits for another.
#[test]
fn logits_that_are_not_finite_on_one_rank_end_all() {
    let folder = folder("llama2_untied_mha");
    for temperature in [0.0, 1.0] {
        for message in ranks(2, Patience::default(), |tensor_parallel| {
            let mut model = Model::open(&folder, Kind::Double, tensor_parallel);
            if tensor_parallel.rank() == 1 {
                model.head *= f64::NAN;
            }
            model.generate(slots(2), &prompts(&[5], 1), &sampling(temperature, 5)).unwrap_err().to_string()
        }) {
            assert!(message.contains("logits are not finite"), "{message}");
        }
    }
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let folder = folder("llama_tied_f32");
    let patience = Patience { progress: Duration::from_secs(1), ..Patience::default() };
    let messages = ranks(2, patience, |tensor_parallel| {
        let model = Model::open(&folder, Kind::Float, tensor_parallel);
        if tensor_parallel.rank() == 1 {
            std::thread::sleep(Duration::from_secs(3));
            return String::new();
        }
        model.generate(slots(2), &prompts(&[5], 1), &sampling(1.0, 5)).unwrap_err().to_string()
    });
    assert!(messages[0].contains("begin to generate"), "{}", messages[0]);
    assert!(messages[0].ends_with("rank 1 has begun nothing"), "{}", messages[0]);
}

/// TP-2: a budget is a rank's, which holds the keys and values of its own heads.
#[test]
fn a_byte_budget_holds_more_sequences_of_fewer_heads() {
    let folder = folder("llama_tied_f32");
    let bytes_per_token = 2 * 2 * 2 * 12 * 8; // keys and values, layers, kv heads, D, f64
    let budget = EngineConfig { kv_cache_bytes: Some(2 * 30 * bytes_per_token), ..slots(4) };
    let prompts = prompts(&[20, 12, 9, 7], 1);
    let whole = Model::open(&folder, Kind::Double, &TensorParallel::solo());
    let (expected, narrow) = whole.generate(budget.clone(), &prompts, &sampling(1.0, 11)).unwrap();
    assert_eq!(narrow.decode_steps, 20, "two slots");
    for (found, wide) in ranks(2, Patience::default(), |tensor_parallel| {
        Model::open(&folder, Kind::Double, tensor_parallel)
            .generate(budget.clone(), &prompts, &sampling(1.0, 11))
            .unwrap()
    }) {
        assert_eq!((wide.decode_steps, tokens(&found)), (10, tokens(&expected)), "four slots");
    }
}
