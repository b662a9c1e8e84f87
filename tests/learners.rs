//! `sft` and `reward` over several workers: the same numbers as on one, whatever is divided, and the same manners.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use common::{
    SUPERVISED, Workplace, children, copy_folder, deterministic_lines, examples, exists, metrics, num_lines,
    quickstart, said, send, signal, wait_for, worst,
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

    fn command(&self, run: &str, keys: &[&str], more: &[&str]) -> Command {
        let mut command = Command::new(self.binary);
        command.arg(self.workplace.path("supervised.toml")).arg("--output-dir").arg(self.workplace.path(run));
        keys.iter().for_each(|key| {
            command.args(["--set", key]);
        });
        command.args(more).env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn start(&self, run: &str, keys: &[&str], more: &[&str]) -> Child {
        self.command(run, keys, more).spawn().unwrap()
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
            ("placement.workers=5", "nearest change that fits: placement.workers = 4"),
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
            assert!(!text.contains("were planned"), "{text}");
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

/// A model in the hub's cache is as good as a folder: it is planned, and what cannot be is refused.
#[test]
fn a_model_of_the_hub_is_planned() {
    let learning = Learning::new(PROGRAMS[0].1);
    let model = learning.workplace.path("hf/hub/models--acme--tiny");
    copy_folder(&quickstart().join("language-model"), &model.join("snapshots/abc"));
    fs::create_dir_all(model.join("refs")).unwrap();
    fs::write(model.join("refs/main"), "abc").unwrap();
    let run = |keys: &[&str]| {
        let keys = [&["model.model=acme/tiny", "train.steps=1", "train.epochs=1"], keys].concat();
        let mut command = learning.command("run", &keys, &[]);
        command.env("HF_HOME", learning.workplace.path("hf")).env("HF_HUB_OFFLINE", "1").output().unwrap()
    };
    let output = run(&["placement.workers=5"]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("5 ranks share 4 rows"), "{}", said(&output));
    let output = run(&["placement.workers=2", "train.zero_stage=2"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let plan = fs::read_to_string(learning.workplace.path("run/plan.txt")).unwrap();
    assert!(plan.contains("workers 2: actor (ZeRO 2) on 0-1") && plan.contains("* ZeRO 2"), "{plan}");
    assert!(metrics(&learning.workplace.path("run"))[0].contains_key("perf/memory_ledger_error_max"));
}

/// What a finished run has made stays when making it again fails.
#[test]
fn a_failed_export_leaves_the_model_as_it_was() {
    let learning = Learning::new(PROGRAMS[1].1);
    let keys = ["train.steps=2", "train.epochs=1"];
    learning.finish("run", &keys, &[]);
    let file = learning.workplace.path("run/model/model.safetensors");
    let before = fs::read(&file).unwrap();
    let again = learning.command("run", &keys, &["--resume"]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -f 1000; exec \"$@\"", "sh"]).arg(again.get_program()).args(again.get_args());
    let output = limited.env("OMP_NUM_THREADS", "1").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("File too large"), "{}", said(&output));
    assert!(fs::read(&file).unwrap() == before, "the model of the finished run");
}

#[test]
fn a_run_folder_is_one_runs() {
    let learning = Learning::new(PROGRAMS[0].1);
    let mut first = learning.start("run", &["train.epochs=500"], &[]);
    let log = learning.workplace.path("run/metrics.jsonl");
    assert!(wait_for(&mut first, || num_lines(&log) > 3), "the run ended early");
    let second = learning.end("run", &["train.epochs=500"], &["--resume"]);
    assert_eq!(second.status.code(), Some(2), "{}", said(&second));
    assert!(said(&second).contains("another run is at work in"), "{}", said(&second));
    send(&first, libc::SIGINT);
    let first = first.wait_with_output().unwrap();
    assert_eq!(first.status.code(), Some(130), "{}", said(&first));
}

#[test]
fn a_run_folder_that_cannot_be_made_is_known_before_anything_starts() {
    let learning = Learning::new(PROGRAMS[0].1);
    let mut command = Command::new(learning.binary);
    command.arg(learning.workplace.path("supervised.toml")).args(["--output-dir", "/proc/no/such"]);
    let output = command.args(["--set", "placement.workers=2"]).env("OMP_NUM_THREADS", "1").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("the run folder /proc/no/such cannot be made"), "{}", said(&output));
    // Looking leaves nothing, nor does a run that is refused.
    let output = learning.end("new/deep", &["placement.workers=5"], &[]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(!learning.workplace.path("new").exists());
}

#[test]
fn the_batch_of_a_loss_that_is_not_finite_is_kept() {
    let learning = Learning::new(PROGRAMS[0].1);
    for workers in ["placement.workers=1", "placement.workers=2"] {
        let model = learning.workplace.path("model");
        copy_folder(&quickstart().join("language-model"), &model);
        spoil(&model.join("model.safetensors"));
        let model = format!("model.model={}", model.display());
        let output = learning.end(workers, &[workers, &model], &[]);
        let text = said(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("is NaN at optimizer step 1; the optimizer has not moved; its batch is in"), "{text}");
        let kept = fs::read_dir(learning.workplace.path(workers)).unwrap().flatten();
        let kept = kept.filter(|entry| entry.file_name().to_string_lossy().starts_with("non-finite-actor-1")).count();
        assert!(kept > 0, "{text}");
    }
}

/// Makes the last weights of a safetensors file NaN.
fn spoil(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let end = bytes.len();
    bytes[end - 64..].fill(0xff);
    fs::write(file, bytes).unwrap();
}

#[test]
fn sizes_beyond_sense_are_refused() {
    for (_, binary) in PROGRAMS {
        let learning = Learning::new(binary);
        for key in ["train.max_tokens", "train.batch_size", "train.tokens_per_micro_batch", "placement.workers"] {
            let set = format!("{key}=9223372036854775807");
            for more in [&[][..], &["--plan"]] {
                let output = learning.end("run", &[&set], more);
                assert_eq!(output.status.code(), Some(2), "{}", said(&output));
                assert!(
                    said(&output).contains(&format!("`{key}` = 9223372036854776000 is out of range")),
                    "{}",
                    said(&output)
                );
            }
        }
    }
}
