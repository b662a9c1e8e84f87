//! The memory ledger against the allocator, for every role and phase of a model of middle size: within 10 %, in total and
//! of the pass alone. A program of its own, because it reads the process-wide counters of the CPU allocator.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use common::{Workplace, metrics};
use echelon_core::memory::{MemoryUse, Phase};
use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::role::Role;
use echelon_core::shim;
use echelon_core::weight_layout::WeightLayout;
use echelon_core::zero::{Sharding, ZeroStage};
use echelon_generation::weight_layout::{Matrices, usable};
use echelon_models::config::DecoderConfig;
use echelon_placement::ledger::compare::{Comparison, relative};
use ledger::{Setting, compare, meter_frozen, meter_learners, random_models};
use serde_json::{Value, json};
use tch::Kind;
use tempfile::TempDir;

mod common;
#[path = "common/ledger.rs"]
mod ledger;

const TOLERANCE: f64 = 0.10;

/// The counters are the process's: one measurement at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// 12 layers, hidden 256, fewer key-value heads than query heads.
fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1024, "hidden_size": 256,
        "intermediate_size": 688, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "initializer_range": 0.02,
        "tie_word_embeddings": true, "torch_dtype": "float32"
    })
}

/// The policy's folder and the scorer's.
fn models(vocab_size: i64) -> (TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    config["vocab_size"] = json!(vocab_size);
    random_models(folder.path(), &config);
    let (policy, scorer) = (folder.path().join("policy"), folder.path().join("scorer"));
    (folder, policy, scorer)
}

/// [`models`], when nothing is measured in this process.
fn models_undisturbing(vocab_size: i64) -> (TempDir, PathBuf, PathBuf) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    models(vocab_size)
}

/// What is off, in a line; nothing where the ledger is right.
fn off(found: &Comparison) -> Option<String> {
    off_by_more(found, 0)
}

/// [`off`], where the pass alone may also be off by `in_flight` bytes.
fn off_by_more(found: &Comparison, in_flight: u64) -> Option<String> {
    let is_off = |error: f64| error.abs() > TOLERANCE;
    let pass_error = relative(found.ledger_transient, found.measured_transient);
    let pass_is_off = is_off(pass_error) && found.ledger_transient.abs_diff(found.measured_transient) > in_flight;
    let resident_is_off = is_off(relative(found.ledger_resident, found.measured_resident));
    (is_off(found.error()) || resident_is_off || pass_is_off).then(|| {
        format!(
            "{} in {}: resident {} for {}, pass {} for {} ({:+.1} %, together {:+.1} %); {:?}",
            found.role,
            found.phase.name(),
            found.ledger_resident,
            found.measured_resident,
            found.ledger_transient,
            found.measured_transient,
            100.0 * pass_error,
            100.0 * found.error(),
            found.entries.iter().filter(|e| e.transient).map(|e| (&e.name, e.bytes)).collect::<Vec<_>>(),
        )
    })
}

fn everything_off(what: &str, comparisons: &[Comparison], in_flight: u64) -> Vec<String> {
    comparisons.iter().filter_map(|found| off_by_more(found, in_flight)).map(|line| format!("{what}: {line}")).collect()
}

fn settings() -> Vec<(&'static str, i64, Setting)> {
    let plain = Setting::plain(Kind::Float);
    let bf16 = Setting::plain(Kind::BFloat16);
    vec![
        ("f32", 1024, plain),
        ("f32, checkpointing", 1024, Setting { activation_checkpointing: true, ..plain }),
        ("f32, a large vocabulary", 16384, Setting { entropy: true, ..plain }),
        ("f32, few slots", 16384, Setting { max_sequences: 5, response_tokens: 8, ..plain }),
        ("bf16", 1024, bf16),
        ("bf16, checkpointing", 16384, Setting { activation_checkpointing: true, ..bf16 }),
        ("f64", 1024, Setting::plain(Kind::Double)),
    ]
}

/// The settings with each layout of weights that a run may choose here for the model of `folder`.
fn with_layouts((name, vocab, setting): (&'static str, i64, Setting), folder: &Path) -> Vec<(String, i64, Setting)> {
    let matrices = Matrices::of(&DecoderConfig::read(folder).unwrap().shape());
    let usable = usable(setting.kind, &matrices);
    // Processors without bf16 units take ten times as long for each row: few. On those with them oneDNN's products take
    // scratch by the sizes of their caches, 40 to 150 kB at 95 to 1,600 tokens (AMD Zen 5): enough rows that it does not count.
    let (rows, tokens_per_micro_batch) = match setting.kind {
        Kind::BFloat16 if usable.contains(&WeightLayout::OneDnn) => (24, 400),
        Kind::BFloat16 => (6, 96),
        _ => (setting.rows, setting.tokens_per_micro_batch),
    };
    let setting = Setting { rows, tokens_per_micro_batch, ..setting };
    usable
        .into_iter()
        .map(|weight_layout| (format!("{name}, {weight_layout}"), vocab, Setting { weight_layout, ..setting }))
        .collect()
}

#[test]
fn every_role_and_phase_takes_what_the_ledger_says() {
    let _alone = ONE_AT_A_TIME.lock().unwrap();
    shim::install_cpu_allocator();
    let mut wrong = Vec::new();
    for setting in settings() {
        let (_folder, policy, scorer) = models(setting.1);
        let folders = (policy.as_path(), scorer.as_path());
        for (name, _, setting) in with_layouts(setting, &policy) {
            let begun = Instant::now();
            let mut uses = meter_frozen(&setting, folders);
            uses.extend(meter_learners(&setting, folders, None, &Sharding::whole()));
            let comparisons = compare(&setting, folders, (1, ZeroStage::Zero), &uses);
            assert_eq!(comparisons.len(), 7, "two roles in two phases, two in one, and the generator");
            wrong.extend(everything_off(&name, &comparisons, 0));
            println!("{name}: {:.1} s", begun.elapsed().as_secs_f64());
            if name == "f32, onednn" {
                falsified_entries_are_found(&comparisons, &uses);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// An entry that is counted twice, or not at all, turns the check red, whichever it is, where it is a part that counts.
fn falsified_entries_are_found(comparisons: &[Comparison], uses: &[MemoryUse]) {
    let mut falsified = std::collections::BTreeSet::new();
    for (found, measured) in comparisons.iter().zip(uses) {
        for (index, entry) in found.entries.iter().enumerate() {
            let part = if entry.transient { found.measured_transient } else { found.measured_resident };
            if entry.bytes * 4 < part {
                continue;
            }
            for times in [0, 2] {
                let mut entries = found.entries.clone();
                entries[index].bytes *= times;
                let red = off(&Comparison::of_entries(entries, measured));
                assert!(red.is_some(), "{} counted {times} times of {found:?}", entry.name);
            }
            falsified.insert(entry.name.clone());
        }
    }
    for name in ["weights", "gradients", "moments", "activations", "packed weights"] {
        assert!(falsified.contains(name), "{name} counts nowhere: {falsified:?}");
    }
}

const RANKS: usize = 2;

/// Gradients of a layer of [`config`], in f32. When a collective's threads let go of what they sent depends on how they are
/// scheduled: a layer's may still be there, or not, when the pass is at its height.
const ONE_LAYER: u64 = 4 * (3 * 256 * 688 + 2 * 256 * 256 + 2 * 128 * 256 + 2 * 256);

/// What each of the ranks, which are processes with counters of their own, was metered at.
fn ranks_of(stage: ZeroStage, dtype: &str, checkpointing: bool, folders: (&Path, &Path)) -> Vec<Vec<MemoryUse>> {
    let outputs = tempfile::tempdir().unwrap();
    let meeting = MeetingPoint::serve("127.0.0.1", 0).unwrap();
    let output = |rank: usize| outputs.path().join(format!("{rank}.json"));
    let rank = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "one_rank", "--ignored", "--nocapture"]);
        let settings = json!({"rank": rank, "port": meeting.port(), "stage": stage as u8, "dtype": dtype,
                              "checkpointing": checkpointing, "policy": folders.0, "scorer": folders.1,
                              "output": output(rank)});
        command.env("LEDGER_RANK", settings.to_string()).env("OMP_NUM_THREADS", "1");
        command.stdout(Stdio::null()).spawn().unwrap()
    };
    let ranks: Vec<_> = (0..RANKS).map(rank).collect();
    ranks.into_iter().for_each(|mut rank| assert!(rank.wait().unwrap().success()));
    (0..RANKS).map(|rank| serde_json::from_slice(&std::fs::read(output(rank)).unwrap()).unwrap()).collect()
}

#[test]
fn ranks_take_what_the_ledger_says_at_every_stage() {
    let (_folder, policy, scorer) = models_undisturbing(4096);
    let mut wrong = Vec::new();
    for stage in [ZeroStage::Zero, ZeroStage::One, ZeroStage::Two, ZeroStage::Three] {
        for (dtype, checkpointing) in [("f32", false), ("bf16", true)] {
            for (rank, uses) in ranks_of(stage, dtype, checkpointing, (&policy, &scorer)).iter().enumerate() {
                assert_eq!(uses.len(), 4);
                let setting = of_ranks(dtype, checkpointing);
                let comparisons = compare(&setting, (&policy, &scorer), (RANKS, stage), uses);
                let name = format!("stage {} in {dtype}, rank {rank}", stage as u8);
                wrong.extend(everything_off(&name, &comparisons, ONE_LAYER));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// At stage 3 a rank's pass takes its activations, two gathered units, and gradients of one unit that is open and of one on
/// its way, as sent and as received: as much for 24 layers as for 12.
#[test]
fn a_pass_at_stage_three_holds_a_few_units_whatever_the_depth() {
    let of_actor = |uses: &[MemoryUse], phase: Phase| {
        let found = uses.iter().find(|measured| (measured.role, measured.phase) == (Role::Actor, phase));
        *found.expect("the actor scores and trains")
    };
    for layers in [12, 24] {
        let setting = of_ranks("f32", false);
        let (folder, whole) = {
            let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
            shim::install_cpu_allocator();
            let folder = tempfile::tempdir().unwrap();
            random_models(folder.path(), &of_depth(layers));
            let folders = (folder.path().join("policy"), folder.path().join("scorer"));
            let whole = meter_learners(&setting, (&folders.0, &folders.1), None, &Sharding::whole());
            (folder, whole)
        };
        let folders = (folder.path().join("policy"), folder.path().join("scorer"));
        let ranks = ranks_of(ZeroStage::Three, "f32", false, (&folders.0, &folders.1));
        for uses in &ranks {
            for (phase, units) in [(Phase::SCORE, 2), (Phase::learn(Role::Actor), 2 + 3)] {
                let (activations, divided) = (of_actor(&whole, phase).transient(), of_actor(uses, phase));
                let shard = of_actor(&whole, phase).resident.total() / RANKS as u64;
                let resident = divided.resident.total() as f64 / shard as f64;
                assert!((resident - 1.0).abs() < 0.05, "{layers} layers: {resident} of its share");
                let bound = activations + units * ONE_LAYER;
                println!("{layers} layers, {}: {} of {bound} bytes", phase.name(), divided.transient());
                assert!(
                    divided.transient() as f64 <= 1.02 * bound as f64,
                    "{layers} layers, {}: {} bytes, activations {activations} and {units} units of {ONE_LAYER}",
                    phase.name(),
                    divided.transient(),
                );
            }
        }
    }
}

/// [`config`] with units of one size, as far as can be: few words, which are not tied to the head.
fn of_depth(layers: usize) -> Value {
    let mut config = config();
    config["num_hidden_layers"] = json!(layers);
    config["vocab_size"] = json!(512);
    config["tie_word_embeddings"] = json!(false);
    config
}

fn of_ranks(dtype: &str, checkpointing: bool) -> Setting {
    let kind = if dtype == "bf16" { Kind::BFloat16 } else { Kind::Float };
    let rows = if dtype == "bf16" { 6 } else { 16 }; // see `with_layouts`
    Setting { activation_checkpointing: checkpointing, rows, ..Setting::plain(kind) }
}

#[test]
#[ignore = "one process of the test above"]
fn one_rank() {
    shim::install_cpu_allocator();
    tch::set_num_threads(1);
    let settings: Value = serde_json::from_str(&std::env::var("LEDGER_RANK").unwrap()).unwrap();
    let number = |key: &str| settings[key].as_u64().unwrap();
    let text = |key: &str| settings[key].as_str().unwrap();
    let patience = Patience::default();
    let meeting = MeetingPoint::join("127.0.0.1", number("port") as u16, patience).unwrap();
    let place = (number("rank") as usize, RANKS);
    let group = ProcessGroup::join(&meeting, "ledger", place, "127.0.0.1", patience).unwrap();
    let stage = ZeroStage::from_number(number("stage") as u8).unwrap();
    let setting = of_ranks(text("dtype"), settings["checkpointing"].as_bool().unwrap());
    let folders = (Path::new(text("policy")), Path::new(text("scorer")));
    let uses = meter_learners(&setting, folders, None, &Sharding { group, stage, offload: false });
    std::fs::write(text("output"), serde_json::to_vec(&uses).unwrap()).unwrap();
}

/// The real program says so itself, step by step.
#[test]
fn a_run_says_how_far_the_ledger_is_off() {
    let (folder, policy, scorer) = models_undisturbing(1024);
    let workplace = Workplace::new();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        for model in [&policy, &scorer] {
            std::fs::copy(common::quickstart().join("language-model").join(file), model.join(file)).unwrap();
        }
    }
    let set = |key: &str, value: String| ["--set".to_string(), format!("{key}={value}")];
    let model = |path: &Path| path.display().to_string();
    let settings: Vec<String> = [
        set("actor.model", model(&policy)),
        set("reward.model", model(&scorer)),
        set("reward.normalize", "false".into()),
        set("rollout.batch_size", "8".into()),
        set("rollout.max_new_tokens", "24".into()),
        set("ppo.mini_batch_size", "8".into()),
        set("train.steps", "2".into()),
        set("train.calibrate", "true".into()),
        set("train.tokens_per_micro_batch", "256".into()),
        set("checkpoint.every_steps", "off".into()),
        set("eval.every_steps", "off".into()),
    ]
    .concat();
    let said = workplace.finish("run", &settings.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(!said.contains("were planned"), "{said}");
    let steps = metrics(&workplace.path("run"));
    assert_eq!(steps.len(), 2);
    for step in &steps {
        let number = |name: &str| step[name].as_f64().unwrap_or_else(|| panic!("no {name} in {step:?}"));
        assert!(number("perf/memory_ledger_error_max") <= TOLERANCE, "{step:?}");
        let (train, score) = (number("perf/memory_actor_train_bytes"), number("perf/memory_reference_score_bytes"));
        assert!(train > score && score > 4.0 * 9e6, "{train} and {score}: at least the weights");
        assert!(number("perf/memory_peak_bytes") >= train);
        for phase in ["generation", "make_experience", "ppo_train", "step"] {
            assert!(number(&format!("perf/planned_{phase}_s")) > 0.0);
        }
    }
    drop(folder);
}
