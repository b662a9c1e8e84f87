//! `sft` and `reward` over several workers: the same numbers as on one, whatever is divided, and the same manners.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use common::{
    SUPERVISED, Workplace, children, deterministic_lines, examples, exists, metrics, num_lines, said, send, signal,
    wait_for, worst,
};

mod common;

const PROGRAMS: [(&str, &str); 2] = [("sft", env!("CARGO_BIN_EXE_sft")), ("reward", env!("CARGO_BIN_EXE_reward"))];

/// A program with its recipe and rows in a place of its own.
struct Learning {
    workplace: Workplace,
    binary: &'static str,
}

impl Learning {
    fn new(binary: &'static str) -> Learning {
        let workplace = Workplace::new();
        workplace.write("supervised.toml", SUPERVISED);
        workplace.write("train.jsonl", &examples(binary));
        Learning { workplace, binary }
    }

    fn start(&self, run: &str, keys: &[&str], more: &[&str]) -> Child {
        let mut command = Command::new(self.binary);
        command.arg(self.workplace.path("supervised.toml")).arg("--output-dir").arg(self.workplace.path(run));
        keys.iter().for_each(|key| {
            command.args(["--set", key]);
        });
        command.args(more).env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn end(&self, run: &str, keys: &[&str], more: &[&str]) -> Output {
        self.start(run, keys, more).wait_with_output().unwrap()
    }

    fn finish(&self, run: &str, keys: &[&str], more: &[&str]) -> String {
        let output = self.end(run, keys, more);
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        said(&output)
    }
}

#[test]
fn metrics_do_not_depend_on_the_ranks_nor_on_what_is_divided() {
    let always =
        ["train.dtype=float64", "train.epochs=1", "train.tokens_per_micro_batch=32", "checkpoint.every_steps=off"];
    for (name, binary) in PROGRAMS {
        let learning = Learning::new(binary);
        let one = learning.workplace.path("one");
        learning.finish("one", &always, &[]);
        assert_eq!(metrics(&one).len(), 10);
        for keys in [
            &["placement.workers=2", "train.zero_stage=0"][..],
            &["placement.workers=2", "train.zero_stage=1", "train.activation_checkpointing=true"],
            &["placement.workers=2", "train.zero_stage=2", "train.adam_offload=true"],
            &["placement.workers=2", "train.zero_stage=3"],
            &["placement.workers=4", "train.zero_stage=3", "train.activation_checkpointing=true"],
            &["placement.workers=3"],
        ] {
            let run = keys.join(" ");
            let text = learning.finish(&run, &[&always[..], keys].concat(), &[]);
            assert!(text.contains(" processes, ZeRO "), "{text}");
            let run = learning.workplace.path(&run);
            let plan = fs::read_to_string(run.join("plan.txt")).unwrap();
            assert!(plan.contains("\n* ZeRO "), "{plan}");
            let (difference, place) = worst(&run, &one);
            assert!(difference <= 1e-9, "{name}, {keys:?}: {place}");
            let config = |run: &Path| fs::read_to_string(run.join("model/config.json")).unwrap();
            assert_eq!(config(&run).matches("\"std\"").count(), usize::from(name == "reward"), "scores' statistics");
        }
    }
}

#[test]
fn an_interrupted_run_goes_on_with_as_many_workers_or_others() {
    for (name, binary) in PROGRAMS {
        let learning = Learning::new(binary);
        let two = ["placement.workers=2"];
        learning.finish("whole", &two, &[]);
        let whole = learning.workplace.path("whole");
        for (run, keys) in [("two", &two[..]), ("three", &["placement.workers=3", "train.zero_stage=3"]), ("one", &[])]
        {
            let mut child = learning.start(run, &two, &[]);
            let run_folder = learning.workplace.path(run);
            assert!(wait_for(&mut child, || num_lines(&run_folder.join("metrics.jsonl")) >= 4), "{name} ended");
            send(&child, libc::SIGINT);
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(130), "{}", said(&output));
            // How many workers there are may change: it changes no result but by rounding.
            let text = learning.finish(run, keys, &["--resume"]);
            assert!(text.contains("resumed after step"), "{text}");
            if run == "two" {
                assert_eq!(deterministic_lines(&run_folder), deterministic_lines(&whole), "{name}");
            }
            assert_eq!(run_folder.join("plan.txt").exists(), run != "one", "the plan of what runs");
            let (difference, place) = worst(&run_folder, &whole);
            assert!(difference <= 1e-4, "{name}, {run}: {place}");
        }
    }
}

#[test]
fn a_killed_worker_ends_the_run_with_its_name() {
    let learning = Learning::new(PROGRAMS[0].1);
    let mut driver = learning.start("run", &["placement.workers=2", "train.epochs=500"], &[]);
    let log = learning.workplace.path("run").join("metrics.jsonl");
    assert!(wait_for(&mut driver, || num_lines(&log) > 3), "the run ended early");
    let workers = children(driver.id());
    signal(workers[1], libc::SIGKILL);
    let output = driver.wait_with_output().unwrap();
    let text = said(&output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("killed by signal 9") && text.contains(&format!("pid {}", workers[1])), "{text}");
    assert!(
        text.trim_end().lines().next_back().unwrap().contains("--resume goes on from the checkpoint of step"),
        "{text}"
    );
    assert!(!workers.iter().any(|&worker| exists(worker)), "nothing is left running");
}

#[test]
fn what_cannot_be_is_refused_before_anything_starts() {
    for (_, binary) in PROGRAMS {
        let learning = Learning::new(binary);
        for (key, wanted) in [
            ("placement.workers=5", "nearest change that fits: train.batch_size = 5"),
            ("placement.gpus_per_node=2", "the recipe is for 2 GPUs, and this machine has none"),
            ("placement.nodes=2", "placement.listen"),
        ] {
            let device = if key.contains("gpus") { "placement.device=auto" } else { "placement.device=cpu" };
            let output = learning.end("run", &[key, device], &[]);
            assert_eq!(output.status.code(), Some(2), "{}", said(&output));
            assert!(said(&output).contains(wanted), "{}", said(&output));
            assert!(!learning.workplace.path("run").exists());
        }
    }
}

#[test]
fn a_run_says_how_far_the_ledger_is_off() {
    for (name, binary) in PROGRAMS {
        let learning = Learning::new(binary);
        for keys in
            [&[][..], &["placement.workers=2", "train.zero_stage=3"], &["placement.workers=2", "train.zero_stage=1"]]
        {
            let run = format!("run {}", keys.join(" "));
            let always = ["train.batch_size=40", "train.epochs=1", "checkpoint.every_steps=off"];
            let text = learning.finish(&run, &[&always[..], keys].concat(), &[]);
            assert!(!text.contains("memory: the ledger says"), "{text}");
            let step = metrics(&learning.workplace.path(&run)).remove(0);
            let error = step["perf/memory_ledger_error_max"].as_f64().unwrap();
            assert!(error > 0.0 && error < 0.1, "{name}, {keys:?}: {error}");
            let role = if name == "sft" { "actor" } else { "reward" };
            assert!(
                step[&format!("perf/memory_{role}_train_bytes")].as_f64().is_some_and(|bytes| bytes > 10e6),
                "{step:?}"
            );
        }
    }
}

/// With no device present and nothing started.
#[test]
fn a_plan_says_what_each_stage_needs() {
    for (name, binary) in PROGRAMS {
        let learning = Learning::new(binary);
        let model = |name: &str| format!("model.model={}/recipes/shapes/{name}", env!("CARGO_MANIFEST_DIR"));
        let gpus = |count: usize| format!("placement.gpus_per_node={count}");
        let of = |name: &str, keys: &[&str], more: &str| {
            let model = model(name);
            let keys =
                [&[&model[..], "placement.device=cuda", "placement.gpu=H100-80GB", "train.batch_size=128"], keys]
                    .concat();
            learning.end("run", &keys, &[more])
        };
        let output = of("llama-2-7b", &[&gpus(8)], "--plan");
        let text = said(&output);
        assert_eq!(output.status.code(), Some(0), "{text}");
        assert!(text.contains("1 node of 8 x H100-80GB") && text.contains("does not fit"), "{text}");
        let output = of("llama-2-7b", &[&gpus(8)], "--plan=json");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let choices = json["plan"]["choices"].as_array().unwrap();
        let fitting: Vec<&serde_json::Value> = choices.iter().filter(|choice| choice["seconds"].is_f64()).collect();
        assert!(!fitting.is_empty() && fitting.len() < choices.len(), "{choices:?}");
        let fastest = fitting.iter().map(|choice| choice["seconds"].as_f64().unwrap()).fold(f64::INFINITY, f64::min);
        assert_eq!(json["plan"]["seconds"].as_f64(), Some(fastest));
        // Whole gradients of 13 billion parameters fit no device: the refusal says what would.
        let output = of("llama-2-13b", &[&gpus(8), "train.zero_stage=0"], "--plan");
        assert_eq!(output.status.code(), Some(2), "{name}");
        assert!(said(&output).contains("nearest change that fits: train.zero_stage = "), "{}", said(&output));
        assert!(!learning.workplace.path("run").exists(), "nothing was started");
    }
}
