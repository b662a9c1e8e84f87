//! Ranks that share a model give the whole model's numbers. Ranks are threads here, each with its own sockets: to c10d they
//! are processes.

use std::path::{Path, PathBuf};

use echelon_core::Error;
use echelon_core::data::Rows;
use echelon_core::pack::PackedRows;
use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::progress::Interrupt;
use echelon_core::random::{Domain, uniform};
use echelon_core::shape::TensorParallelPart;
use echelon_core::zero::{Backbone, Head, PassConfig, forward, forward_rows};
use echelon_models::checkpoint::{Checkpoint, random_parameter};
use echelon_models::config::{DecoderConfig, HeadKind};
use echelon_models::decoder::Decoder;
use echelon_models::head::{LogprobHead, ScalarHead, ScalarRows};
use echelon_models::tensor_parallel::TensorParallel;
use float32::{nudged, promise};
use tch::{Device, Kind, Tensor};

#[path = "common/float32.rs"]
mod float32;

/// Runs `each` on the threads of `size` ranks of one group and gives what each returns, in order.
fn ranks<T: Send>(size: usize, each: impl Fn(&TensorParallel) -> T + Sync) -> Vec<T> {
    let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
    let port = point.port();
    std::thread::scope(|scope| {
        let run = |rank| {
            let each = &each;
            scope.spawn(move || {
                tch::set_num_threads(1);
                let patience = Patience::default();
                let point = MeetingPoint::join("127.0.0.1", port, patience).unwrap();
                let group = ProcessGroup::join(&point, "test", (rank, size), "127.0.0.1", patience).unwrap();
                each(&TensorParallel::new(group))
            })
        };
        let threads: Vec<_> = (0..size).map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 10, "golden checkpoints are there");
    folders
}

fn rows() -> Rows {
    let row = |length: usize| {
        let id = |at: usize| (uniform(3, Domain::Data, length as u64, at as u32, 0) * 100.0) as i64;
        ((0..length).map(id).collect(), (0..length).map(|at| at > 1).collect())
    };
    Rows::of_tokens(&[row(14), row(3), row(9)])
}

/// Log-probs `[b, T]`, or a reward model's scores `[b]`, as flat numbers.
fn read(config: &DecoderConfig, model: &Decoder, head: Tensor) -> Vec<f64> {
    let batch = PackedRows::new(&rows(), Device::Cpu);
    let numbers = match config.head {
        HeadKind::Score => forward(model, &ScalarHead::frozen(head, ScalarRows::LastTokens), &batch).unwrap().values,
        HeadKind::Logits => {
            forward(model, &LogprobHead::sliced(head, 0.8, model.vocabulary()), &batch).unwrap().logprobs
        }
    };
    Vec::try_from(numbers.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

/// The head's matrix by `load`, or the embedding's handle.
fn head(
    config: &DecoderConfig,
    model: &Decoder,
    load: &mut dyn FnMut(&str) -> echelon_models::Result<Tensor>,
) -> Tensor {
    match config.head {
        HeadKind::Score => load("score.weight").unwrap(),
        HeadKind::Logits if config.tied_embeddings => model.embedding().shallow_clone(),
        HeadKind::Logits => load("lm_head.weight").unwrap(),
    }
}

fn of_folder(folder: &Path, kind: Kind, tensor_parallel: &TensorParallel) -> Vec<f64> {
    let config = DecoderConfig::read(folder).unwrap();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut load = checkpoint.slice_loader(&config, kind, Device::Cpu, tensor_parallel.part()).unwrap();
    let model = Decoder::sliced(&config, tensor_parallel, &mut load).unwrap();
    let head = head(&config, &model, &mut load);
    read(&config, &model, head)
}

fn worst(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// By a model on one rank, its weights nudged where a draw is given.
fn whole_model(folder: &Path, kind: Kind, nudge: Option<u64>) -> Vec<f64> {
    let config = DecoderConfig::read(folder).unwrap();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut as_stored = checkpoint.loader(&config, kind, Device::Cpu);
    let mut load = |name: &str| {
        let weight = as_stored(name)?;
        Ok(nudge.map_or(weight.shallow_clone(), |draw| nudged(name, &weight, draw)))
    };
    let model = Decoder::new(&config, &mut load).unwrap();
    let head = head(&config, &model, &mut load);
    read(&config, &model, head)
}

/// TP-3, for every architecture, tied or not, with biases and head norms, with key-value heads divided and repeated.
#[test]
fn shared_models_give_the_whole_models_numbers() {
    for folder in folders() {
        let name = folder.file_name().unwrap().display().to_string();
        let shape = DecoderConfig::read(&folder).unwrap().shape();
        let exact = whole_model(&folder, Kind::Double, None);
        let promised = promise(|draw| worst(&whole_model(&folder, Kind::Double, Some(draw)), &exact));
        println!("{name}: f32 promises {promised:e}");
        for (kind, bound) in [(Kind::Double, 1e-10), (Kind::Float, promised)] {
            let expected = whole_model(&folder, kind, None);
            assert!(expected.iter().any(|number| number.abs() > 1e-3));
            for size in [1, 2, 4] {
                assert!(shape.splits_into(size), "{name} over {size}");
                let found = ranks(size, |tensor_parallel| of_folder(&folder, kind, tensor_parallel));
                for ranks in &found {
                    let difference = worst(ranks, &expected);
                    assert!(difference <= bound, "{name} {kind:?} over {size}: {difference:e}");
                    assert_eq!(*ranks, found[0], "{name} {kind:?} over {size}: ranks disagree");
                }
            }
        }
    }
}

fn config(vocab_size: i64, tied_embeddings: bool) -> DecoderConfig {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints/llama_biases");
    DecoderConfig { vocab_size, tied_embeddings, ..DecoderConfig::read(&folder).unwrap() }
}

fn whole_parameter(name: &str, shape: &[i64]) -> Tensor {
    random_parameter(name, shape, 0.3, 5).to_kind(Kind::Double) + if name.ends_with(".bias") { 0.1 } else { 0.0 }
}

/// A model from tensors that someone else cut, over a vocabulary that does not divide: the last rank's part is shorter.
#[test]
fn owned_slices_and_an_uneven_vocabulary_give_the_whole_models_numbers() {
    for (vocab_size, tied, size) in [(101, true, 2), (101, false, 4), (103, true, 4)] {
        let config = config(vocab_size, tied);
        let shape = config.shape();
        let numbers = |tensor_parallel: &TensorParallel| {
            let mut load = |name: &str| {
                let param = shape.units.iter().flat_map(|unit| &unit.params).find(|p| p.name == name).unwrap();
                let slice = shape.slice(param, tensor_parallel.part());
                let whole = whole_parameter(name, &param.shape);
                Ok(whole.narrow(slice.dim as i64, slice.start, slice.length).copy())
            };
            let model = Decoder::sliced(&config, tensor_parallel, &mut load).unwrap();
            let head = head(&config, &model, &mut load);
            (read(&config, &model, head), model.embedding().size()[0])
        };
        let (expected, _) = numbers(&TensorParallel::solo());
        let found = ranks(size, numbers);
        let lengths: Vec<i64> = found.iter().map(|(_, length)| *length).collect();
        assert_eq!(lengths.iter().sum::<i64>(), vocab_size, "{lengths:?}");
        assert!(lengths[size - 1] < lengths[0], "{lengths:?}");
        for (found, _) in &found {
            assert!(worst(found, &expected) < 1e-10, "{vocab_size} over {size}");
        }
    }
}

/// TP-3: Gloo's sums, of every length and dtype, are one rank's that all take.
#[test]
fn sums_are_the_same_bits_on_every_rank() {
    for size in [2, 3, 4] {
        let sums = ranks(size, |tensor_parallel| {
            let rank = tensor_parallel.rank() as f64;
            let mut sums = Vec::new();
            for numel in [1, 2, 7, 64, 1000, 70_001] {
                for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
                    let part =
                        ((Tensor::arange(numel, tch::kind::DOUBLE_CPU) + rank * 0.37) * 12.9898).sin().to_kind(kind);
                    let sum = tensor_parallel.sum(format_args!("sum"), part).unwrap();
                    sums.push(Vec::<f64>::try_from(sum.to_kind(Kind::Double)).unwrap());
                }
            }
            sums
        });
        assert!(sums.iter().all(|of_rank| *of_rank == sums[0]), "{size} ranks");
    }
}

#[test]
fn a_model_that_does_not_divide_is_refused_by_name_with_what_works() {
    let folder = &folders()[0];
    let config = DecoderConfig::read(folder).unwrap();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let part = TensorParallelPart { rank: 1, size: 3 };
    let refused = checkpoint.slice_loader(&config, Kind::Float, Device::Cpu, part).err().unwrap().to_string();
    let expected = ": 3 ranks cannot share 4 heads, 4 key-value heads, a gated width of 80 and a vocabulary of 112: tensor \
                    parallelism over 1, 2 or 4 ranks can";
    assert!(refused.starts_with(&format!("{}{expected}", folder.display())), "{refused}");
    for refused in ranks(3, |tensor_parallel| {
        Decoder::sliced(&config, tensor_parallel, &mut |_| unreachable!()).unwrap_err().to_string()
    }) {
        assert!(refused.starts_with(&format!("a decoder of 2 layers, 48 wide{expected}")), "{refused}");
    }
}

/// TP-4: an interrupt that one rank sees ends the pass of all, and the group stays usable.
#[test]
fn ranks_stop_together() {
    let folder = &folders()[0];
    let config = DecoderConfig::read(folder).unwrap();
    let done = ranks(2, |tensor_parallel| {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let mut load = checkpoint.slice_loader(&config, Kind::Float, Device::Cpu, tensor_parallel.part()).unwrap();
        let model = Decoder::sliced(&config, tensor_parallel, &mut load).unwrap();
        let head = LogprobHead::sliced(head(&config, &model, &mut load), 1.0, model.vocabulary());
        let pass = PassConfig { device: Device::Cpu, tokens_per_micro_batch: 1, activation_checkpointing: false };
        let interrupt = Interrupt::default();
        let mut seen = 0;
        let result = forward_rows((&model, &head), &pass, &rows(), &interrupt, |_, _| {
            seen += 1;
            if tensor_parallel.rank() == 1 && seen == 2 {
                interrupt.raise();
            }
        });
        assert!(matches!(result, Err(Error::Interrupted)));
        forward_rows((&model, &head), &pass, &rows(), &Interrupt::default(), |_, _| seen += 1).unwrap();
        seen
    });
    assert_eq!(done, [2 + 3, 2 + 3]);
}

#[test]
fn what_would_learn_is_refused() {
    let config = config(112, true);
    for messages in ranks(2, |tensor_parallel| {
        let shape = config.shape().sliced(tensor_parallel.part()).unwrap();
        let model = Decoder::sliced(&config, tensor_parallel, &mut |name| {
            let param = shape.units.iter().flat_map(|unit| &unit.params).find(|p| p.name == name).unwrap();
            Ok(Tensor::ones(&param.shape, tch::kind::FLOAT_CPU))
        })
        .unwrap();
        let batch = PackedRows::new(&rows(), Device::Cpu);
        let hidden = Tensor::ones([26, 48], tch::kind::FLOAT_CPU).set_requires_grad(true);
        let layer = model.layer(0, &hidden, &batch, &model.context(&batch)).unwrap_err().to_string();
        let head = LogprobHead::sliced(model.embedding().shallow_clone(), 1.0, model.vocabulary());
        let wanted = hidden.detach().index_select(0, &head.rows(&batch));
        (layer, head.forward(&wanted, &batch, true).unwrap_err().to_string())
    }) {
        assert!(messages.0.starts_with("attention of layer 0: there is no backward pass"), "{}", messages.0);
        assert!(messages.1.ends_with("does not learn"), "{}", messages.1);
    }
}
