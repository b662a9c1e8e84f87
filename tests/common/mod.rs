//! What the tests that drive the real programs share: a small PPO recipe of the quickstart's models, run folders in a
//! temporary place, and the parts of a run folder that must be the same every time.

#![allow(dead_code)] // every test program uses its own part

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Six steps in two seconds; QUICKSTART stands for the folder of the quickstart's models and prompts.
pub const SMALL: &str = r#"
name = "small"
seed = 7
[actor]
model = "QUICKSTART/language-model"
[actor.optimizer]
lr = 2e-4
[critic.optimizer]
lr = 1e-3
[reward]
model = "QUICKSTART/reward-model"
normalize = true
[data]
prompts = "QUICKSTART/prompts-train.jsonl"
max_prompt_tokens = 32
[rollout]
batch_size = 4
samples_per_prompt = 2
max_new_tokens = 12
[ppo]
epochs = 2
mini_batch_size = 4
kl_coef = 0.1
kl_target = 0.05
kl_horizon = 100.0
[train]
steps = 6
tokens_per_micro_batch = 64
[placement]
device = "cpu"
[checkpoint]
every_steps = 2
keep = 3
[eval]
prompts = "QUICKSTART/prompts-held-out.jsonl"
every_steps = 2
samples_per_prompt = 1
max_samples = 4
"#;

/// Two epochs over forty rows, twenty optimizer steps.
pub const SUPERVISED: &str = r#"
name = "supervised"
seed = 3
[model]
model = "QUICKSTART/language-model"
[model.optimizer]
lr = 1e-3
[data]
train = "train.jsonl"
eval = "train.jsonl"
[train]
epochs = 2
batch_size = 4
max_tokens = 256
eval_every_steps = 5
[placement]
device = "cpu"
[checkpoint]
every_steps = 3
"#;

/// The folder of the quickstart's models and prompts.
pub fn quickstart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart")
}

/// Forty rows for [`SUPERVISED`], of the kind that this program learns from.
pub fn examples(program: &str) -> String {
    let row = |index: i32| match program.ends_with("sft") {
        true => format!("{{\"prompt\": \"The lamp {index} was\", \"completion\": \" bright {index} times.\"}}\n"),
        false => format!("{{\"prompt\": \"A\", \"chosen\": \" good {index}\", \"rejected\": \" bad {index}\"}}\n"),
    };
    (0..40).map(row).collect()
}

/// A temporary folder with a recipe and the runs made of it.
pub struct Workplace(TempDir);

impl Workplace {
    /// With [`SMALL`] as `small.toml`.
    pub fn new() -> Workplace {
        let workplace = Workplace(tempfile::tempdir().unwrap());
        workplace.write("small.toml", SMALL);
        workplace
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file; QUICKSTART in it becomes the quickstart's folder.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text.replace("QUICKSTART", quickstart().to_str().unwrap())).unwrap();
        path
    }

    /// `ppo small.toml --output-dir RUN` with further arguments, on one thread, output kept.
    pub fn ppo(&self, run: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ppo"));
        command.arg(self.path("small.toml")).arg("--output-dir").arg(self.path(run)).args(arguments);
        command.env("OMP_NUM_THREADS", "1").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs [`Workplace::ppo`] to its end, which must be a good one; what it printed.
    pub fn finish(&self, run: &str, arguments: &[&str]) -> String {
        let output = self.ppo(run, arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        said(&output)
    }
}

/// Standard output and standard error.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// The metrics of a run, a map per step.
pub fn metrics(run: &Path) -> Vec<serde_json::Map<String, Value>> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
}

/// A metric of every step.
pub fn series(run: &Path, name: &str) -> Vec<f64> {
    metrics(run).iter().map(|step| step[name].as_f64().unwrap_or(f64::NAN)).collect()
}

/// The metrics outside `perf/` and `train/timing/`, as they are written, digit by digit.
pub fn deterministic_lines(run: &Path) -> String {
    let is_clock = |key: &str| key.starts_with("perf/") || key.starts_with("train/timing/");
    let line = |mut step: serde_json::Map<String, Value>| {
        step.retain(|key, _| !is_clock(key));
        Value::Object(step).to_string() + "\n"
    };
    metrics(run).into_iter().map(line).collect()
}

/// What must be the same every time: metrics but clocks, samples, evaluations and the trained weights. By file name.
pub fn deterministic(run: &Path) -> Vec<(&'static str, Vec<u8>)> {
    let files = ["samples.jsonl", "eval_before.json", "eval_after.json", "actor/model.safetensors"];
    let read = |name: &'static str| (name, fs::read(run.join(name)).unwrap_or_else(|e| panic!("{name}: {e}")));
    std::iter::once(("metrics.jsonl", deterministic_lines(run).into_bytes())).chain(files.map(read)).collect()
}

/// Panics with the first file that differs between two finished runs, and where.
pub fn assert_same(found: &Path, expected: &Path, context: &str) {
    for ((name, found), (_, expected)) in deterministic(found).into_iter().zip(deterministic(expected)) {
        let Some(at) = found.iter().zip(&expected).position(|(a, b)| a != b) else {
            assert_eq!(found.len(), expected.len(), "{context}: {name} has another length");
            continue;
        };
        let excerpt = |bytes: &[u8]| {
            String::from_utf8_lossy(&bytes[at.saturating_sub(80)..bytes.len().min(at + 40)]).into_owned()
        };
        panic!("{context}: {name} differs at byte {at}:\n{}\n{}", excerpt(&found), excerpt(&expected));
    }
}

/// Waits until `condition` holds, looking every 200 µs; false when the program ends before.
pub fn wait_for(child: &mut Child, mut condition: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    while !condition() {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "waited for two minutes");
        std::thread::sleep(Duration::from_micros(200));
    }
    true
}

/// Whole lines in a file that may not be there yet.
pub fn num_lines(path: &Path) -> usize {
    fs::read(path).map_or(0, |bytes| bytes.iter().filter(|&&byte| byte == b'\n').count())
}

/// Sends a signal to a program that this test started.
pub fn send(child: &Child, signal: i32) {
    // SAFETY: `kill` touches no memory; the child is not reaped yet, so its id is its own.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

/// Copies a folder with everything in it.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// The largest difference of any metric outside `perf/` and `train/timing/`, relative where it is above 1, and its name.
pub fn worst(found: &Path, expected: &Path) -> (f64, String) {
    let (found, expected) = (metrics(found), metrics(expected));
    assert_eq!(found.len(), expected.len());
    let mut worst = (0.0, "no metric".to_string());
    for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
        for (name, value) in expected.iter().filter(|(name, _)| !name.starts_with("perf/") && !name.contains("timing"))
        {
            let (Some(found), Some(value)) = (found[name].as_f64(), value.as_f64()) else {
                assert_eq!(&found[name], value, "{name}");
                continue;
            };
            let difference = (found - value).abs() / value.abs().max(1.0);
            if difference > worst.0 {
                worst = (difference, format!("{name} of step {}: {found} against {value}", step + 1));
            }
        }
    }
    worst
}

/// Processes whose parent is `pid`.
pub fn children(pid: u32) -> Vec<u32> {
    let is_child = |pid_of: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid_of}/stat")).unwrap_or_default();
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        after_name.split_whitespace().nth(1) == Some(&pid.to_string())
    };
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut found: Vec<u32> =
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect();
    found.sort_unstable();
    found
}

pub fn exists(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

pub fn signal(pid: u32, signal: i32) {
    // SAFETY: `kill` touches no memory; the process is a worker of this test's driver, alive until the test ends it.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}
