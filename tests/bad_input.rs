//! What the programs say about bad input, as snapshots in `snapshots/programs/`: exit code and standard error, with the
//! places of this machine replaced. `ECHELON_BLESS=1 cargo test --test bad_input` rewrites them; read the difference.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use common::{SMALL, Workplace, assert_same, copy_folder, quickstart, said};

/// Compares with the snapshot of that name.
fn assert_snapshot(name: &str, workplace: &Workplace, output: &Output) {
    let code = output.status.code().map_or("none".to_owned(), |code| code.to_string());
    let stderr = String::from_utf8_lossy(&output.stderr);
    let said = stderr
        .replace(workplace.path("").to_str().unwrap(), "WORKPLACE/")
        .replace(quickstart().to_str().unwrap(), "QUICKSTART");
    let found = format!("exit code {code}\n{said}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/programs").join(format!("{name}.txt"));
    if std::env::var_os("ECHELON_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &found).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(found, expected, "{name}");
}

/// The program refuses the input: exit code 2, the snapshot's message, and no run folder.
fn assert_refused(name: &str, workplace: &Workplace, arguments: &[&str]) {
    let output = workplace.ppo("run", arguments).current_dir(workplace.path("")).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{name}: {}", said(&output));
    assert_snapshot(name, workplace, &output);
    assert!(!workplace.path("run").exists(), "{name} made a run folder");
}

/// A copy of one of the quickstart's models.
fn copied_model(workplace: &Workplace, name: &str) -> PathBuf {
    let folder = workplace.path(name);
    copy_folder(&quickstart().join(name), &folder);
    folder
}

#[test]
fn settings_that_cannot_be() {
    let workplace = Workplace::new();
    for (name, setting) in [
        ("misspelt-key", "rollout.batchsize=4"),
        ("wrong-type", "train.steps=six"),
        ("out-of-range", "ppo.gamma=1.5"),
        ("batches-do-not-divide", "ppo.mini_batch_size=3"),
    ] {
        assert_refused(name, &workplace, &["--set", setting]);
    }
    workplace.write("small.toml", &SMALL.replace("epochs = 2", "epoch = 2"));
    assert_refused("misspelt-key-in-file", &workplace, &[]);
}

#[test]
fn data_that_cannot_be_used() {
    let workplace = Workplace::new();
    workplace.write("empty.jsonl", "");
    workplace.write("broken.jsonl", "{\"prompt\": \"fine\"}\n{\"prompt\": \n");
    workplace.write("other-key.jsonl", "{\"question\": \"fine\"}\n");
    for (name, setting) in [
        ("missing-data", "data.prompts=nowhere.jsonl"),
        ("empty-data", "data.prompts=empty.jsonl"),
        ("broken-line", "data.prompts=broken.jsonl"),
        ("missing-prompt-key", "data.prompts=other-key.jsonl"),
        ("all-prompts-too-long", "data.max_prompt_tokens=1"),
    ] {
        assert_refused(name, &workplace, &["--set", setting]);
    }
}

#[test]
fn models_that_cannot_be_used() {
    let workplace = Workplace::new();
    let file = copied_model(&workplace, "language-model").join("model.safetensors");
    fs::File::options().write(true).open(file).unwrap().set_len(1_000_000).unwrap();
    let (language_model, reward_model) = (quickstart().join("language-model"), quickstart().join("reward-model"));
    for (name, setting) in [
        ("missing-model", "actor.model=./nowhere".to_owned()),
        ("truncated-weights", "actor.model=./language-model".to_owned()),
        ("reward-model-as-actor", format!("actor.model={}", reward_model.display())),
        ("language-model-as-reward", format!("reward.model={}", language_model.display())),
    ] {
        assert_refused(name, &workplace, &["--set", &setting]);
    }
    let two = "[[reward.mix]]\nmodel = \"QUICKSTART/reward-model\"\n".repeat(2);
    workplace.write("small.toml", &SMALL.replace("model = \"QUICKSTART/reward-model\"\nnormalize = true\n", &two));
    assert_refused("two-reward-models", &workplace, &[]);
}

#[test]
fn arguments_that_cannot_be() {
    let workplace = Workplace::new();
    assert_refused("unknown-option", &workplace, &["--steps=5"]);
    assert_refused("option-without-value", &workplace, &["--set"]);
    assert_refused("two-recipes", &workplace, &["other.toml"]);
    fs::remove_file(workplace.path("small.toml")).unwrap();
    assert_refused("missing-recipe", &workplace, &[]);
    let nothing = Command::new(env!("CARGO_BIN_EXE_ppo")).output().unwrap();
    assert_eq!(nothing.status.code(), Some(2));
    assert_snapshot("no-recipe", &workplace, &nothing);
}

#[test]
fn limits_that_models_and_devices_have() {
    let workplace = Workplace::new();
    for (name, setting) in [
        ("beyond-the-context", "rollout.max_new_tokens=225"),
        ("tensor-parallel-on-one-device", "generation.tensor_parallel_size=2"),
        ("cache-below-one-sequence", "generation.kv_cache_bytes=1000"),
    ] {
        assert_refused(name, &workplace, &["--set", setting]);
    }
    let recipe = workplace.write("long.toml", LONG_ROWS);
    for program in [env!("CARGO_BIN_EXE_sft"), env!("CARGO_BIN_EXE_reward")] {
        let run = workplace.path("run");
        let output = Command::new(program).arg(&recipe).arg("--output-dir").arg(&run).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert_snapshot("rows-beyond-the-context", &workplace, &output);
        assert!(!run.exists());
    }
}

/// Rows may be longer than the 256 positions of the quickstart's models.
const LONG_ROWS: &str = r#"
[model]
model = "QUICKSTART/language-model"
[data]
train = "QUICKSTART/prompts-train.jsonl"
[train]
max_tokens = 257
[placement]
device = "cpu"
"#;

#[test]
fn scores_that_cannot_be_normalised() {
    let workplace = Workplace::new();
    let config = copied_model(&workplace, "reward-model").join("config.json");
    let whole: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    let setting = format!("reward.model={}", workplace.path("reward-model").display());
    for (name, key, value) in [("no-spread-of-scores", "std", Some(0.0)), ("no-mean-of-scores", "mean", None)] {
        let mut changed = whole.clone();
        changed[key] = value.map_or(Value::Null, Value::from);
        fs::write(&config, changed.to_string()).unwrap();
        assert_refused(name, &workplace, &["--set", &setting]);
    }
}

#[test]
fn run_folders_that_cannot_be_used() {
    let workplace = Workplace::new();
    workplace.write("run/notes.txt", "mine");
    let refuse = |name: &str, arguments: &[&str]| {
        let output = workplace.ppo("run", arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{name}: {}", said(&output));
        assert_snapshot(name, &workplace, &output);
    };
    refuse("occupied-run-folder", &[]);
    workplace.write("run/checkpoints/step-4/manifest.json", "{");
    workplace.write("run/checkpoints/step-2/actor.safetensors", "");
    refuse("no-whole-checkpoint", &["--resume"]);
    assert_eq!(fs::read_dir(workplace.path("run")).unwrap().count(), 2, "nothing was added");
    fs::remove_dir_all(workplace.path("run")).unwrap();
    workplace.write("run", "a file");
    refuse("run-folder-is-a-file", &[]);
}

/// A file-size limit stands for a full disk: the write fails in the middle of a checkpoint.
#[test]
fn a_full_disk_spares_the_checkpoint_before() {
    let workplace = Workplace::new();
    workplace.finish("whole", &[]);
    copy_folder(&workplace.path("whole"), &workplace.path("run"));
    for step in [4, 6] {
        fs::remove_dir_all(workplace.path(&format!("run/checkpoints/step-{step}"))).unwrap();
    }
    let ppo = workplace.ppo("run", &["--resume"]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -f 2048; exec \"$@\"", "sh"]).arg(ppo.get_program()).args(ppo.get_args());
    let output = limited.env("OMP_NUM_THREADS", "1").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert_snapshot("disk-full", &workplace, &output);
    let left: Vec<_> =
        fs::read_dir(workplace.path("run/checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["step-2"], "the unfinished checkpoint is gone, the one before it is not");
    workplace.finish("run", &["--resume"]);
    assert_same(&workplace.path("run"), &workplace.path("whole"), "resumed with room on the disk");
}

#[test]
fn scores_too_large_to_learn_from() {
    let workplace = Workplace::new();
    let command = r#"command = "while read -r line; do echo '{\"reward\": 1e308}'; done""#;
    let recipe = SMALL.replace("normalize = true\n", "clip_range = \"off\"\n");
    workplace.write("small.toml", &recipe.replace("model = \"QUICKSTART/reward-model\"", command));
    let output = workplace.ppo("run", &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert_snapshot("non-finite-loss", &workplace, &output);
    let batch = fs::read(workplace.path("run/non-finite-actor-1.safetensors")).expect("the batch for inspection");
    let header = String::from_utf8_lossy(&batch[8..900]).into_owned();
    for tensor in
        ["token_ids", "lengths", "response_mask", "old_logprobs", "ref_logprobs", "advantages", "returns", "values"]
    {
        assert!(header.contains(tensor), "{tensor} is not in {header}");
    }
    assert!(!workplace.path("run/checkpoints").exists());
}

/// Puts NaN into the first weights of a copied model.
fn poison(workplace: &Workplace, name: &str) {
    let file = copied_model(workplace, name).join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let nan = f32::NAN.to_le_bytes();
    bytes[data..].chunks_exact_mut(4).for_each(|number| number.copy_from_slice(&nan));
    fs::write(&file, bytes).unwrap();
}

#[test]
fn weights_that_are_not_numbers() {
    for (name, setting) in [("language-model", "actor.model"), ("reward-model", "reward.model")] {
        let workplace = Workplace::new();
        poison(&workplace, name);
        let setting = format!("{setting}={}", workplace.path(name).display());
        let output = workplace.ppo("run", &["--set", &setting, "--set", "train.steps=1"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert_snapshot(&format!("nan-in-{name}"), &workplace, &output);
    }
}
