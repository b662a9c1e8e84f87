//! Models that do not learn, divided over ranks: one process's numbers, a rank's bytes, a pass's peak, what is read. Ranks
//! are threads here, each with its own sockets: to c10d they are processes.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use echelon_core::data::Rows;
use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::progress::Interrupt;
use echelon_core::random::{Domain, uniform};
use echelon_core::shape::UnitShape;
use echelon_core::shim;
use echelon_core::zero::{FrozenState, Head, PassConfig, Units, forward_rows, forward_rows_through, stack_rows};
use echelon_models::checkpoint::Checkpoint;
use echelon_models::config::{DecoderConfig, HeadKind};
use echelon_models::decoder::Decoder;
use echelon_models::head::{LogprobHead, ScalarHead, ScalarRows};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/checkpoints");

/// The allocator's count is the process's: tests of this file take turns.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    tch::set_num_threads(1);
    shim::install_cpu_allocator();
    turn
}

/// Runs `each` on the threads of `size` ranks of one group, and gives what each returns, in order.
fn ranks<T: Send>(size: usize, each: impl Fn(ProcessGroup) -> T + Sync) -> Vec<T> {
    let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
    let port = point.port();
    let run = |rank| {
        tch::set_num_threads(1);
        let patience = Patience::default();
        let point = MeetingPoint::join("127.0.0.1", port, patience).unwrap();
        each(ProcessGroup::join(&point, "frozen", (rank, size), "127.0.0.1", patience).unwrap())
    };
    std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn pass(tokens_per_micro_batch: i64) -> PassConfig {
    PassConfig { device: Device::Cpu, tokens_per_micro_batch, activation_checkpointing: false }
}

fn rows(count: usize) -> Vec<(Vec<i64>, Vec<bool>)> {
    let row = |index: usize| {
        let number = |at: u32| uniform(7, Domain::Data, index as u64, at, 0);
        let length = 3 + (number(0) * 9.0) as usize;
        let ids = (0..length).map(|at| (3.0 + number(at as u32 + 1) * 100.0) as i64).collect();
        (ids, (0..length).map(|at| at > 1).collect())
    };
    (0..count).map(row).collect()
}

fn head_name(config: &DecoderConfig) -> &'static str {
    match config.head {
        HeadKind::Score => "score.weight",
        HeadKind::Logits if config.tied_embeddings => "model.embed_tokens.weight",
        HeadKind::Logits => "lm_head.weight",
    }
}

/// A folder's model, divided.
fn divided(folder: &Path, kind: Kind, group: &ProcessGroup) -> (FrozenState, Decoder, Tensor) {
    let config = DecoderConfig::read(folder).unwrap();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let shape = config.shape();
    let load = &mut |name: &str| {
        let param = shape.units.iter().flat_map(|unit| &unit.params).find(|param| param.name == name).unwrap();
        Ok(checkpoint.tensor(name, &param.shape)?)
    };
    let state = FrozenState::new(&shape, (kind, Device::Cpu), group, load).unwrap();
    let params = state.params();
    let model = Decoder::new(&config, &mut |name| Ok(params[name].shallow_clone())).unwrap();
    (state, model, params[head_name(&config)].shallow_clone())
}

/// The same whole, as one process wraps it.
fn whole(folder: &Path, kind: Kind) -> (Decoder, Tensor) {
    let config = DecoderConfig::read(folder).unwrap();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut load = checkpoint.loader(&config, kind, Device::Cpu);
    let model = Decoder::new(&config, &mut load).unwrap();
    (model, load(head_name(&config)).unwrap())
}

/// What a head makes of rows: log-probs per token, or one score per row.
fn outputs<H: Head>(
    units: Option<&mut dyn Units>,
    model: (&Decoder, &H),
    rows: &Rows,
    pass: &PassConfig,
    read: impl Fn(&H::Output) -> Tensor,
) -> Tensor {
    let mut parts = Vec::new();
    let each = |_: &[i64], output: H::Output| parts.push(read(&output));
    match units {
        Some(units) => forward_rows_through(units, model, pass, rows, &Interrupt::default(), each).unwrap(),
        None => forward_rows(model, pass, rows, &Interrupt::default(), each).unwrap(),
    }
    match parts.first().map(|part| part.dim()) {
        Some(1) => Tensor::cat(&parts, 0),
        _ => stack_rows(&parts, [rows.num_rows() as i64, rows.token_ids.size()[1]]),
    }
}

fn of_folder(
    folder: &Path,
    model: (&Decoder, Tensor),
    units: Option<&mut dyn Units>,
    rows: &Rows,
    budget: i64,
) -> Tensor {
    let (model, weight) = model;
    match DecoderConfig::read(folder).unwrap().head {
        HeadKind::Score => {
            let head = ScalarHead::frozen(weight, ScalarRows::LastTokens);
            outputs(units, (model, &head), rows, &pass(budget), |output| output.values.shallow_clone())
        }
        HeadKind::Logits => {
            let head = LogprobHead::frozen(weight, 0.7);
            outputs(units, (model, &head), rows, &pass(budget), |output| output.logprobs.shallow_clone())
        }
    }
}

/// FZ-3: log-probs and scores are one process's, on ranks with as many rows or fewer and with none, in passes of unequal
/// number.
#[test]
fn divided_models_give_one_processs_numbers() {
    let _turn = alone();
    for name in ["llama_tied_f32", "llama_biases", "llama_score"] {
        let folder = Path::new(GOLDEN).join(name);
        let all = rows(7);
        let (model, weight) = whole(&folder, Kind::Double);
        let expected = of_folder(&folder, (&model, weight), None, &Rows::of_tokens(&all), 1000);
        for size in [2, 4] {
            // Rank r takes the rows from bounds[r] on: of four ranks the last has none.
            let bounds = if size == 2 { vec![0, 5, 7] } else { vec![0, 4, 6, 7, 7] };
            for budget in [1000, 12] {
                let found = ranks(size, |group| {
                    let rank = group.rank();
                    let (mut state, model, weight) = divided(&folder, Kind::Double, &group);
                    let mine = Rows::of_tokens(&all[bounds[rank]..bounds[rank + 1]]);
                    of_folder(&folder, (&model, weight), Some(&mut state), &mine, budget)
                });
                for (rank, found) in found.iter().enumerate() {
                    let (begin, count) = (bounds[rank] as i64, (bounds[rank + 1] - bounds[rank]) as i64);
                    assert_eq!(found.size()[0], count);
                    if count > 0 {
                        let mut expected = expected.narrow(0, begin, count);
                        if found.dim() == 2 {
                            expected = expected.narrow(1, 0, found.size()[1]);
                        }
                        let difference = (found - expected).abs().max().double_value(&[]);
                        assert!(difference < 1e-10, "{name}, rank {rank} of {size}: {difference:e}");
                    }
                }
            }
        }
    }
}

/// 24 layers: 17 million parameters, 67 MB in f32; a layer is 2.6 MB and the embedding 4.2 MB.
const CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
  "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 4096,
  "max_position_embeddings": 512, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": true,
  "torch_dtype": "float32"
}"#;

/// Writes a folder of random weights, and drops its pages from memory's cache.
fn write_model(folder: &Path) -> DecoderConfig {
    std::fs::write(folder.join("config.json"), CONFIG).unwrap();
    let config = DecoderConfig::read(folder).unwrap();
    let mut header = Map::new();
    let mut end = 0;
    for param in config.shape().units.iter().flat_map(|unit| &unit.params) {
        let begin = end;
        end += param.numel() * 4;
        header.insert(param.name.clone(), json!({"dtype": "F32", "shape": param.shape, "data_offsets": [begin, end]}));
    }
    let header = Value::from(header).to_string();
    let header = format!("{header:<width$}", width = header.len().next_multiple_of(64));
    let mut file = BufWriter::new(File::create(folder.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let mut state = 1u32;
    for _ in 0..end / 4 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        file.write_all(&((state as f32 / u32::MAX as f32 - 0.5) * 0.1).to_le_bytes()).unwrap();
    }
    file.flush().unwrap();
    config
}

/// FZ-1: what stays on a rank, and the most that lives in a pass.
#[test]
fn a_rank_keeps_its_shard_and_a_pass_two_units_more() {
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let config = write_model(folder);
    let shape = config.shape();
    let tokens = || Rows::of_tokens(&rows(2));
    for kind in [Kind::Float, Kind::BFloat16] {
        let size = kind.elt_size_in_bytes();
        let psi = shape.num_params() as usize * size;
        let mut units: Vec<usize> = shape.units.iter().map(|unit: &UnitShape| unit.numel() as usize * size).collect();
        units.sort_unstable();
        let two_largest: usize = units.iter().rev().take(2).sum();

        // What a pass makes beside weights, by a model that is whole.
        let (model, weight) = whole(folder, kind);
        let before = shim::live_bytes(Device::Cpu);
        shim::reset_peak_bytes(Device::Cpu);
        let expected = of_folder(folder, (&model, weight), None, &tokens(), 1000);
        let activations = shim::peak_bytes(Device::Cpu) - before;
        drop(model);

        for ranks_of_case in [2usize, 4] {
            let before = shim::live_bytes(Device::Cpu);
            let passed = std::sync::Barrier::new(ranks_of_case);
            let found = ranks(ranks_of_case, |group| {
                let (mut state, model, weight) = divided(folder, kind, &group);
                let ratio = state.bytes() as f64 / (psi as f64 / ranks_of_case as f64);
                assert!((ratio - 1.0).abs() < 0.05, "{kind:?}: {ratio} of its share on a rank of {ranks_of_case}");
                if passed.wait().is_leader() {
                    let kept = (shim::live_bytes(Device::Cpu) - before) as f64 / psi as f64;
                    assert!(
                        (0.95..1.15).contains(&kept),
                        "{kind:?}: {kept} of the model live on {ranks_of_case} ranks"
                    );
                    shim::reset_peak_bytes(Device::Cpu);
                }
                passed.wait();
                let output = of_folder(folder, (&model, weight), Some(&mut state), &tokens(), 1000);
                passed.wait();
                (output, shim::peak_bytes(Device::Cpu) - before)
            });
            // The ranks share a process: the bound on a rank's peak, as often as there are ranks; units are rounded up.
            let bound = psi + ranks_of_case * (two_largest + activations);
            for (output, peak) in found {
                assert!(peak as f64 <= 1.02 * bound as f64, "{kind:?}, {ranks_of_case} ranks: {peak} of {bound}");
                let difference = (output - &expected).abs().max().double_value(&[]);
                assert!(difference < 1e-5, "{kind:?}: {difference:e}");
            }
            assert!(bound < ranks_of_case * psi, "a bound that whole models would keep says nothing");
        }
    }
}

/// Bytes of the folder's files in this process's memory.
fn resident(folder: &Path) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let lines = smaps.lines().skip_while(|line| !line.contains(folder.to_str().unwrap()));
    let rss = lines.take(10).find_map(|line| line.strip_prefix("Rss:")).expect("the map is listed");
    1024 * rss.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
}

/// FZ-2: of the mapped file a rank touches its slices, and what the kernel maps around a touched page.
#[test]
fn loading_reads_a_ranks_slices() {
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let shape = write_model(folder).shape();
    let read = ranks(4, |group| {
        group.barrier("all have joined").unwrap();
        if group.rank() != 2 {
            return None; // loading takes no other rank
        }
        let checkpoint = Checkpoint::open(folder).unwrap();
        let before = resident(folder);
        let mut touched = Vec::new();
        let load = &mut |name: &str| {
            touched.push(name.to_string());
            let param = shape.units.iter().flat_map(|unit| &unit.params).find(|param| param.name == name).unwrap();
            Ok(checkpoint.tensor(name, &param.shape)?)
        };
        let state = FrozenState::new(&shape, (Kind::BFloat16, Device::Cpu), &group, load).unwrap();
        Some((resident(folder) - before, touched.len() as u64, state.bytes() as u64 * 2))
    });
    let (read, slices, own) = read.into_iter().flatten().next().unwrap();
    let around = slices * 2 * (64 << 10);
    assert!(read >= own / 2 && read <= own + around, "{read} bytes read for {own} (and {around} around)");
    assert!(own + around < shape.num_params() as u64 * 4 / 2, "a bound below the file");
}
