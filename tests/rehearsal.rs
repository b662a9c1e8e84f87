//! Runs of the real programs on GPUs that this machine does not have: stand-ins for CUDA, NCCL and NVML take their places
//! (`tests/rehearsal/README.md`). Numbers are those of the CPU, in f32 to rounding.
//!
//! Settings are covered in pairs, not all with all: [`PAIRS`] and the tests below it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use common::{
    SUPERVISED, Workplace, assert_same, children, examples, exists, num_lines, quickstart, said, series, signal,
};
use common::{wait_for, worst};
use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use tch::{Device, Kind, Tensor};

mod common;

/// What f32 promises after a few optimizer steps, relative where a metric is above 1.
const F32: f64 = 1e-5;

/// Exit code of the script where the stand-ins cannot be built.
const CANNOT: i32 = 77;

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rehearsal/rehearse")
}

/// Builds the stand-ins, and checks them, once; false, with a sentence, where they cannot be built.
fn is_ready() -> bool {
    static READY: OnceLock<bool> = OnceLock::new();
    *READY.get_or_init(|| {
        let output = Command::new(script()).arg("check").output().unwrap();
        if output.status.code() == Some(CANNOT) {
            eprintln!("nothing is rehearsed: {}", said(&output).trim());
            assert!(
                std::env::var_os("ECHELON_MUST_REHEARSE").is_none(),
                "what CI does not rehearse nobody does: {}",
                said(&output)
            );
            return false;
        }
        assert!(output.status.success(), "the stand-ins' own checks: {}", said(&output));
        true
    })
}

/// A program on so many pretended GPUs, on one thread, output kept.
fn on_gpus(count: usize, program: &Path) -> Command {
    let mut command = Command::new(script());
    command.args(["-n", &count.to_string()]).arg(program);
    command.env("OMP_NUM_THREADS", "1").env("MKL_NUM_THREADS", "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn program(name: &str) -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_ppo")).with_file_name(name)
}

fn flags(keys: &[&str]) -> Vec<String> {
    keys.iter().flat_map(|key| ["--set".to_string(), (*key).to_string()]).collect()
}

/// Keys of every run here: two steps, no file that nobody reads.
const SHORT: [&str; 4] = ["train.steps=2", "eval.every_steps=off", "checkpoint.every_steps=off", "train.dtype=float32"];

/// `ppo small.toml` on GPUs, with keys after [`SHORT`].
fn ppo(workplace: &Workplace, run: &str, gpus: usize, keys: &[&str]) -> Command {
    let mut command = on_gpus(gpus, &program("ppo"));
    command.arg(workplace.path("small.toml")).arg("--output-dir").arg(workplace.path(run));
    command.args(flags(&[&SHORT[..], &["placement.device=cuda"], keys].concat()));
    command.env("REHEARSAL_REPORT", workplace.path(&format!("{run}.report")));
    command
}

/// The run of [`ppo`], which must end well; what it said.
fn finish(mut command: Command, context: &str) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{context}: {}", said(&output));
    said(&output)
}

/// A workplace with the CPU's run of the same keys as `cpu`.
fn beside_the_cpu(keys: &[&str]) -> Workplace {
    let workplace = Workplace::new();
    workplace.finish("cpu", &flags(&[&SHORT[..], keys].concat()).iter().map(String::as_str).collect::<Vec<_>>());
    workplace
}

fn assert_as_on_the_cpu(workplace: &Workplace, run: &str) {
    let (difference, place) = worst(&workplace.path(run), &workplace.path("cpu"));
    assert!(difference <= F32, "{run}: {place}");
}

/// What a report of the stand-in says of one process: figures by the words after them.
struct Process {
    name: String,
    lines: String,
}

impl Process {
    fn all(report: &Path) -> Vec<Process> {
        let text = fs::read_to_string(report).unwrap_or_default();
        let parts = text.split("--- stand-in for CUDA, ").skip(1).map(|part| part.split("--- ").next().unwrap());
        let read = |part: &str| {
            let (head, lines) = part.split_once('\n').unwrap_or((part, ""));
            Process { name: head.into(), lines: lines.into() }
        };
        parts.map(read).collect()
    }

    /// Of each line with these words, the number at its front.
    fn figures(&self, words: &str) -> Vec<u64> {
        let with = self.lines.lines().filter(|line| line.contains(words));
        with.filter_map(|line| line.trim().split(' ').next()?.parse().ok()).collect()
    }
}

// --- Numbers ----------------------------------------------------------------------------------------------------------

/// Runs of PPO: name, GPUs and keys. Each value of a setting meets each of the others' at least in part: GPUs 1, 2, 4; ZeRO 0
/// to 3; offload; checkpointing; tiers and places.
const PAIRS: [(&str, usize, &[&str]); 9] = [
    ("one GPU", 1, &[]),
    ("one GPU, offload, checkpointing", 1, &["train.adam_offload=true", "train.activation_checkpointing=true"]),
    ("two, ZeRO 0", 2, &["placement.workers=2", "train.zero_stage=0"]),
    ("two, ZeRO 1, offload", 2, &["placement.workers=2", "train.zero_stage=1", "train.adam_offload=true"]),
    (
        "two, ZeRO 3, checkpointing",
        2,
        &["placement.workers=2", "train.zero_stage=3", "train.activation_checkpointing=true"],
    ),
    (
        "two, a role's one worker each",
        2,
        &[
            "placement.workers=2",
            "placement.actor.devices=[0]",
            "placement.critic.devices=[1]",
            "placement.reference.colocate_with=critic",
            "placement.reward.colocate_with=critic",
            "placement.generator.colocate_with=actor",
        ],
    ),
    ("four, tier medium, ZeRO 2", 4, &["placement.workers=4", "placement.tier=medium", "train.zero_stage=2"]),
    ("four, tier large: tensor-parallel", 4, &["placement.workers=4", "placement.tier=large"]),
    (
        "four, a generator apart, ZeRO 3, offload",
        4,
        &[
            "placement.workers=4",
            "placement.actor.devices=[0, 1]",
            "placement.critic.devices=[2]",
            "placement.reference.colocate_with=critic",
            "placement.reward.colocate_with=critic",
            "placement.generator.devices=[3]",
            "train.zero_stage=3",
            "train.adam_offload=true",
        ],
    ),
];

type Check = fn(&Runs);

/// What must be so of all of [`PAIRS`], each for itself.
const CHECKS: [(&str, Check); 6] = [
    ("numbers are the CPU's", numbers_are_the_cpus),
    ("no driver of workers touches a GPU, and nothing but the roles takes much there", roles_alone_take_memory),
    ("the ledger is right on every rank", the_ledger_is_right),
    ("what lives on GPUs is told by those who compute there", live_bytes_are_the_ranks),
    ("page-locked memory is counted, where there is any", page_locked_memory_is_counted),
    ("nothing is said that nobody needs", nothing_needless_is_said),
];

/// The runs of [`PAIRS`] and what they said.
struct Runs {
    workplace: Workplace,
    said: Vec<String>,
}

#[test]
fn ppo_learns_on_gpus_what_it_learns_on_the_cpu() {
    if !is_ready() {
        return;
    }
    let workplace = beside_the_cpu(&[]);
    let said = PAIRS.map(|(name, gpus, keys)| finish(ppo(&workplace, name, gpus, keys), name)).to_vec();
    let runs = Runs { workplace, said };
    let is_red = |check: &Check| std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&runs))).is_err();
    let red: Vec<&str> = CHECKS.iter().filter(|(_, check)| is_red(check)).map(|(name, _)| *name).collect();
    assert_eq!(red, [""; 0], "see the panics above");
}

fn numbers_are_the_cpus(runs: &Runs) {
    PAIRS.iter().for_each(|(name, ..)| assert_as_on_the_cpu(&runs.workplace, name));
}

fn roles_alone_take_memory(runs: &Runs) {
    const MUCH: u64 = 100 << 20;
    for (name, gpus, _) in PAIRS {
        let processes = Process::all(&runs.workplace.path(&format!("{name}.report")));
        let peaks = |process: &Process| process.figures("bytes allocated at most");
        let most: Vec<u64> = processes.iter().map(|process| peaks(process).into_iter().sum()).collect();
        assert_eq!(most.iter().filter(|&&peak| peak > 0).count(), gpus, "{name}: {most:?}");
        assert!(most.iter().all(|&peak| peak < MUCH), "{name}: {most:?}");
        for process in &processes {
            let on = peaks(process).iter().filter(|&&peak| peak > 0).count();
            assert!(on <= 1, "{name}: {} has memory on {on} GPUs", process.name);
        }
    }
}

fn the_ledger_is_right(runs: &Runs) {
    for (name, _, keys) in PAIRS {
        // Of models as small as these whole layers are on their way at once under ZeRO 3, on a CPU too.
        let most = if keys.contains(&"train.zero_stage=3") { 1.0 } else { 0.2 };
        let off = series(&runs.workplace.path(name), "perf/memory_ledger_error_max");
        assert!(off.iter().all(|&error| error < most), "{name}: {off:?}");
    }
}

fn live_bytes_are_the_ranks(runs: &Runs) {
    for (name, ..) in PAIRS {
        let live = series(&runs.workplace.path(name), "perf/memory_live_bytes");
        assert!(live.iter().all(|&live| live > 1e6), "{name}: {live:?}");
    }
}

fn page_locked_memory_is_counted(runs: &Runs) {
    for (name, _, keys) in PAIRS {
        let counted = series(&runs.workplace.path(name), "perf/memory_pinned_bytes")[0] as u64;
        let processes = Process::all(&runs.workplace.path(&format!("{name}.report")));
        let locked =
            processes.iter().flat_map(|process| process.figures("bytes page-locked at most")).max().unwrap_or(0);
        assert_eq!(counted, locked, "{name}: as the run counts, and as the stand-in does");
        assert_eq!(locked > 0, keys.contains(&"train.adam_offload=true"), "{name}: {locked}");
    }
}

fn nothing_needless_is_said(runs: &Runs) {
    for ((name, ..), text) in PAIRS.iter().zip(&runs.said) {
        assert!(!text.contains("pin_memory") && !text.contains("Warning"), "{name}: {text}");
        assert!(text.lines().all(|line| line.trim() != "shares"), "{name}: a line without words: {text}");
    }
}

#[test]
fn bfloat16_and_the_other_programs_run_to_their_end() {
    if !is_ready() {
        return;
    }
    let workplace = Workplace::new();
    let keys = ["train.dtype=bfloat16", "placement.workers=2", "train.zero_stage=3", "train.adam_offload=true"];
    finish(ppo(&workplace, "bfloat16", 2, &keys), "bfloat16");
    assert!(series(&workplace.path("bfloat16"), "train/actor_grad_norm").iter().all(|norm| norm.is_finite()));

    for (name, keys) in [
        ("sft", ["placement.workers=2", "train.zero_stage=3"]),
        ("reward", ["placement.workers=1", "train.zero_stage=0"]),
    ] {
        let recipe = SUPERVISED.replace("epochs = 2", "epochs = 1").replace("train.jsonl", &format!("{name}.jsonl"));
        workplace.write(&format!("{name}.jsonl"), &examples(name));
        let recipe = workplace.write(&format!("{name}.toml"), &recipe);
        let run = |device: &str, command: &mut Command| {
            let folder = workplace.path(&format!("{name} {device}"));
            command.arg(&recipe).arg("--output-dir").arg(&folder).args(flags(&["train.dtype=float32"]));
            let output = command.output().unwrap();
            assert_eq!(output.status.code(), Some(0), "{name} {device}: {}", said(&output));
            folder
        };
        let cpu = run("cpu", Command::new(program(name)).env("OMP_NUM_THREADS", "1"));
        let mut command = on_gpus(2, &program(name));
        command.args(flags(&[&["placement.device=cuda"][..], &keys].concat()));
        let (difference, place) = worst(&run("cuda", &mut command), &cpu);
        assert!(difference <= F32, "{name}: {place}");
    }
}

/// Greedy tokens and log-probs.
#[test]
fn models_say_on_a_gpu_what_they_say_on_the_cpu() {
    if !is_ready() {
        return;
    }
    let workplace = Workplace::new();
    let model = quickstart().join("language-model");
    let prompts = workplace.write("prompts.jsonl", "{\"prompt\": \"the food at the\"}\n{\"prompt\": \"a film\"}\n");
    let rows = workplace.write("rows.jsonl", "{\"text\": \"the food was good.\"}\n");
    let answers = |device: &str, dtype: &str, mut command: Command, generates: bool| {
        let output = workplace.path(&format!("{device}-{dtype}-{generates}.jsonl"));
        command.arg("--model").arg(&model).arg("--output").arg(&output).args(["--device", device, "--dtype", dtype]);
        match generates {
            true => command.arg("--prompts").arg(&prompts).args(["--max-new-tokens", "12", "--temperature", "0"]),
            false => command.arg("--input").arg(&rows),
        };
        finish(command, device);
        let text = fs::read_to_string(output).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<serde_json::Value>>()
    };
    for (name, generates) in [("generate", true), ("score", false)] {
        let expected = answers("cpu", "float32", Command::new(program(name)), generates);
        let found = answers("cuda", "float32", on_gpus(1, &program(name)), generates);
        for (found, expected) in found.iter().zip(&expected) {
            assert_near(found, expected);
        }
        assert_eq!(answers("cuda", "bfloat16", on_gpus(1, &program(name)), generates).len(), expected.len());
    }
}

/// Equal, but for what f32 rounds.
fn assert_near(found: &serde_json::Value, expected: &serde_json::Value) {
    use serde_json::Value::{Array, Object};
    match (found, expected) {
        (Array(found), Array(expected)) => found.iter().zip(expected).for_each(|(a, b)| assert_near(a, b)),
        (Object(found), Object(expected)) => expected.iter().for_each(|(key, value)| assert_near(&found[key], value)),
        _ => match (found.as_f64(), expected.as_f64()) {
            (Some(a), Some(b)) => assert!((a - b).abs() <= F32 * b.abs().max(1.0), "{a} against {b}"),
            _ => assert_eq!(found, expected),
        },
    }
}

#[test]
fn a_run_on_gpus_goes_on_as_if_nothing_had_been() {
    if !is_ready() {
        return;
    }
    let workplace = beside_the_cpu(&[]);
    let keys = ["placement.workers=2", "train.zero_stage=3", "checkpoint.every_steps=1"];
    finish(ppo(&workplace, "run", 2, &keys), "all of it");
    fs::remove_dir_all(workplace.path("run/checkpoints/step-2")).unwrap();
    let mut again = ppo(&workplace, "run", 2, &keys);
    again.arg("--resume");
    let text = finish(again, "resumed");
    assert!(text.contains("resumed after step 1"), "{text}");
    assert_as_on_the_cpu(&workplace, "run");
}

/// What learns leaves the GPU while the generator works there: the plan says so where memory is short.
#[test]
fn a_gpu_too_small_for_all_at_once_is_used_in_turns() {
    if !is_ready() {
        return;
    }
    const LONG: [&str; 5] = [
        "rollout.batch_size=64",
        "rollout.max_new_tokens=200",
        "ppo.mini_batch_size=64",
        "ppo.epochs=1",
        "train.steps=1",
    ];
    let workplace = beside_the_cpu(&LONG);
    let mut command =
        ppo(&workplace, "turns", 2, &[&LONG[..], &["placement.workers=2", "train.zero_stage=0"]].concat());
    command.env("REHEARSAL_CAPACITY", TURNS_BYTES.to_string());
    let text = finish(command, "turns");
    assert!(!text.contains("pin_memory") && !text.contains("Warning"), "{text}");
    let plan = fs::read_to_string(workplace.path("turns/plan.txt")).unwrap();
    assert!(plan.contains("to host to generate"), "the plan of so small a GPU moves state: {plan}");
    assert_as_on_the_cpu(&workplace, "turns");
    let off = series(&workplace.path("turns"), "perf/memory_ledger_error_max");
    assert!(off.iter().all(|&error| error < 0.2), "{off:?}");
}

/// Context, cuBLAS's workspaces and NCCL's buffers are on the card too, and told.
#[test]
fn what_the_runtime_takes_of_a_gpu_is_told() {
    if !is_ready() {
        return;
    }
    const CONTEXT: u64 = 300 << 20;
    const NCCL: u64 = 50 << 20;
    let workplace = beside_the_cpu(&[]);
    let mut command = ppo(&workplace, "run", 2, &["placement.workers=2", "train.zero_stage=1"]);
    command.env("REHEARSAL_CONTEXT", CONTEXT.to_string()).env("REHEARSAL_NCCL_MEMORY", NCCL.to_string());
    command.env("REHEARSAL_WORKSPACE", (8u64 << 20).to_string()).env("REHEARSAL_NCCL_IN_PROGRESS", "1");
    finish(command, "run");
    assert_as_on_the_cpu(&workplace, "run");
    let told = series(&workplace.path("run"), "perf/memory_runtime_bytes");
    assert!(told.iter().all(|&bytes| bytes == (CONTEXT + NCCL) as f64), "{told:?}");
}

/// Memory in which the small run's roles do not fit all at once, beside what the planner keeps free for the runtime.
const TURNS_BYTES: u64 = 1705 << 20;

/// Workers that others start, each with one GPU that it sees as the first.
#[test]
fn workers_that_see_one_gpu_each_learn_the_same() {
    if !is_ready() {
        return;
    }
    let workplace = beside_the_cpu(&[]);
    let credentials = workplace.path("secret");
    let keys = ["placement.workers=2", "train.zero_stage=3", "placement.listen=127.0.0.1:0"];
    let mut driver = ppo(&workplace, "run", 2, &keys);
    driver.args(flags(&[&format!("placement.credentials={}", credentials.display())]));
    let mut driver = driver.spawn().unwrap();
    let address = listening_at(&mut driver);
    let worker = |rank: usize| {
        let mut worker = on_gpus(2, &program("worker"));
        worker.args(["--join", &address, "--credentials"]).arg(&credentials);
        worker.env("CUDA_VISIBLE_DEVICES", rank.to_string()).env("RANK", rank.to_string()).env("WORLD_SIZE", "2");
        worker.env("LOCAL_RANK", rank.to_string()).env("LOCAL_WORLD_SIZE", "2");
        worker.spawn().unwrap()
    };
    let workers = [0, 1].map(worker);
    let output = driver.wait_with_output().unwrap();
    for worker in workers {
        let ended = worker.wait_with_output().unwrap();
        assert!(ended.status.success(), "{}\n{}", said(&ended), said(&output));
    }
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert_as_on_the_cpu(&workplace, "run");
}

/// The address that a driver says it listens at; its later output is kept away from the pipe's end.
fn listening_at(driver: &mut Child) -> String {
    use std::io::{BufRead, BufReader};
    let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
    let line = lines.by_ref().map(Result::unwrap).find(|line| line.contains("--join ")).expect("where to join");
    std::thread::spawn(move || lines.for_each(drop));
    line.split("--join ").nth(1).unwrap().split(' ').next().unwrap().to_string()
}

// --- Failures ---------------------------------------------------------------------------------------------------------

#[test]
fn a_worker_killed_between_gpus_ends_the_run_and_leaves_nothing() {
    if !is_ready() {
        return;
    }
    let workplace = Workplace::new();
    let mut command = ppo(&workplace, "run", 2, &["placement.workers=2", "train.zero_stage=3", "train.steps=200"]);
    command.env("REHEARSAL_NCCL_SILENT", "1"); // as over NVLink: NCCL itself notices nothing
    let mut driver = command.spawn().unwrap();
    let file = workplace.path("run/metrics.jsonl");
    assert!(wait_for(&mut driver, || num_lines(&file) > 0), "the run ended early");
    let workers = workers_below(driver.id());
    assert_eq!(workers.len(), 2, "one process per worker");
    signal(workers[1], libc::SIGKILL);
    let output = driver.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said(&output).contains("killed by signal 9"), "{}", said(&output));
    assert!(!workers.iter().any(|&worker| exists(worker)), "nothing is left running");
}

/// The processes that a driver has started as its workers, by their numbers.
fn workers_below(driver: u32) -> Vec<u32> {
    let joins =
        |pid: &u32| fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("--join"));
    children(driver).into_iter().filter(joins).collect()
}

/// A failed run's line on a GPU without room, which is all that it says of it.
fn line_without_room(mut command: Command) -> String {
    let output = command.env("REHEARSAL_CAPACITY", (48u64 << 20).to_string()).output().unwrap();
    let text = said(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(!text.contains("\\n") && !text.contains("frame #") && !text.contains("panicked"), "one line: {text}");
    text.lines().find(|line| line.contains("out of memory on GPU 0")).unwrap_or_else(|| panic!("{text}")).to_string()
}

#[test]
fn a_gpu_without_room_says_who_holds_it_and_what_to_change() {
    if !is_ready() {
        return;
    }
    let workplace = Workplace::new();
    let command = ppo(
        &workplace,
        "run",
        1,
        &["train.tokens_per_micro_batch=16192", "rollout.batch_size=64", "ppo.mini_batch_size=128"],
    );
    workplace.write("rows.jsonl", &examples("sft").repeat(8));
    let recipe = SUPERVISED.replace("train.jsonl", "rows.jsonl").replace("batch_size = 4", "batch_size = 256");
    let recipe = workplace.write("sft.toml", &recipe);
    let mut alone = on_gpus(1, &program("sft"));
    alone.arg(recipe).arg("--output-dir").arg(workplace.path("alone")).args(flags(&["placement.device=cuda"]));
    for command in [command, alone] {
        let line = line_without_room(command);
        for part in ["wanted", "free; by the memory ledger", "nearest change: "] {
            assert!(line.contains(part), "{part}: {line}");
        }
    }
}

/// Where no run is that the ledger knows: while a model is loaded, and while it works.
#[test]
fn models_without_room_say_so_in_a_line() {
    if !is_ready() {
        return;
    }
    let workplace = Workplace::new();
    let model = quickstart().join("language-model");
    let rows =
        workplace.write("rows.jsonl", &"{\"text\": \"the food was good. \", \"prompt\": \"the food\"}\n".repeat(64));
    for (name, option) in [("generate", "--prompts"), ("score", "--input")] {
        for mib in [2u64, 6] {
            let mut command = on_gpus(1, &program(name));
            command.args(["--device", "cuda", "--dtype", "float32", "--model"]).arg(&model).arg(option).arg(&rows);
            command.arg("--output").arg(workplace.path("out.jsonl")).env("REHEARSAL_CAPACITY", (mib << 20).to_string());
            let text = said(&command.output().unwrap());
            let lines: Vec<&str> = text.lines().filter(|line| line.contains("out of memory on GPU 0")).collect();
            assert_eq!(lines.len(), 1, "{name} with {mib} MiB: {text}");
            assert!(!text.contains("frame #") && !text.contains("\\n"), "{name} with {mib} MiB: {text}");
        }
    }
}

/// Names and values of environment variables.
type Settings = &'static [(&'static str, &'static str)];

/// What a node may lack or be otherwise: name, settings, further keys, exit code, and words of the one line that says so.
type Node = (&'static str, Settings, &'static [&'static str], i32, &'static [&'static str]);

const NODES: [Node; 10] = [
    ("too many workers", &[], &["placement.workers=3"], 2, &["placement.workers: 3 workers", "CUDA shows 2", "= 2"]),
    (
        "a list with a stranger",
        &[("CUDA_VISIBLE_DEVICES", "0,7")],
        &["placement.workers=2"],
        2,
        &["CUDA shows 1 (CUDA_VISIBLE_DEVICES is `0,7`)"],
    ),
    ("no driver", &[("REHEARSAL_MISSING", "libcuda.so.1")], &[], 2, &["no NVIDIA driver that loads", "install one"]),
    ("old driver", &[("REHEARSAL_DRIVER", "12040")], &[], 2, &["driver serves CUDA 12.4", "needs 13.0", "update"]),
    ("no CUDA", &[("REHEARSAL_MISSING", "libtorch_cuda.so")], &[], 2, &["built without CUDA", "ECHELON_CUDA=yes"]),
    ("hidden", &[("CUDA_VISIBLE_DEVICES", "")], &[], 2, &["CUDA_VISIBLE_DEVICES is ``", "hides every GPU", "unset it"]),
    ("unknown", &[("CUDA_VISIBLE_DEVICES", "GPU-77")], &[], 2, &["is `GPU-77`", "nvidia-smi -L"]),
    (
        "no NCCL",
        &[("REHEARSAL_MISSING", "libnccl.so.2")],
        &["placement.workers=2"],
        2,
        &["need NCCL 2.14 or newer", "libnccl.so.2", "install it"],
    ),
    (
        "in use",
        &[("REHEARSAL_FOREIGN_BYTES", "2040109466")],
        &["placement.workers=2"],
        2,
        &["is in use by others: 1.9 of 2.0 GiB", "nvidia-smi names"],
    ),
    (
        "lost",
        &[("REHEARSAL_FAIL_AFTER", "4000")],
        &["train.steps=6"],
        3,
        &["its GPU does not work any more: CUDA error", "nvidia-smi"],
    ),
];

#[test]
fn a_node_that_cannot_is_told_in_a_sentence() {
    if !is_ready() {
        return;
    }
    let workplace = Workplace::new();
    for (name, settings, keys, code, words) in NODES {
        let mut command = ppo(&workplace, name, 2, keys);
        let output = command.envs(settings.iter().copied()).output().unwrap();
        let text = said(&output);
        assert_eq!(output.status.code(), Some(code), "{name}: {text}");
        let tells = |line: &str| words.iter().all(|word| line.contains(word));
        assert!(text.lines().any(tells), "{name}: {text}");
        assert!(!text.contains("panic") && !text.contains("\\n"), "{name}: {text}");
    }
}

/// One GPU by its identifier; a slice of one.
#[test]
fn a_gpu_named_by_its_identifier_and_a_slice_are_used() {
    if !is_ready() {
        return;
    }
    let workplace = beside_the_cpu(&[]);
    let by_uuid = [("CUDA_VISIBLE_DEVICES", "GPU-5a1e0000-0000-4000-8000-000000000001")];
    let (sliced, without_nvml) = ([("REHEARSAL_MIG", "1")], [("REHEARSAL_NVML", "missing")]);
    for (name, settings) in [("uuid", by_uuid), ("slice", sliced), ("no NVML", without_nvml)] {
        let mut command = ppo(&workplace, name, 2, &[]);
        command.envs(settings);
        let text = finish(command, name);
        assert_as_on_the_cpu(&workplace, name);
        assert_eq!(text.contains("MIG mode"), name == "slice", "{text}");
    }
}

/// Two runs give the same bits; what has no deterministic form is named.
#[test]
fn a_deterministic_run_says_so_and_gives_the_same_bits() {
    if !is_ready() {
        return;
    }
    let workplace = Workplace::new();
    let keys = ["placement.workers=2", "train.zero_stage=2", "train.deterministic=true", "checkpoint.every_steps=2"];
    let texts = ["once", "again"].map(|run| finish(ppo(&workplace, run, 2, &keys), run));
    assert!(texts[0].contains(", deterministic"), "{}", texts[0]);
    assert_same(&workplace.path("again"), &workplace.path("once"), "deterministic");
    let state = fs::read_to_string(workplace.path("once/checkpoints/step-2/state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    assert_eq!((&state["deterministic"], &state["device"]), (&true.into(), &"Cuda(0) (H200)".into()));
    inside("inside_what_has_no_deterministic_form_is_named");
}

#[test]
#[ignore = "runs inside a rehearsal"]
fn inside_what_has_no_deterministic_form_is_named() {
    let device = echelon_core::device::choose(echelon_core::device::DeviceChoice::Cuda).unwrap().device;
    echelon_core::determinism::enforce(device).unwrap();
    let numbers = Tensor::arange(9, (Kind::Float, device));
    let error = echelon_core::Error::from(numbers.f_median_dim(0, false).unwrap_err()).to_string();
    assert!(error.starts_with("train.deterministic = true: libtorch has no deterministic form of median"), "{error}");
}

// --- What a process does with NCCL: run inside a rehearsal by the tests of the same names ------------------------------

/// Runs one of the ignored tests below on two pretended GPUs.
fn inside(name: &str) {
    if !is_ready() {
        return;
    }
    let mut command = on_gpus(2, &std::env::current_exe().unwrap());
    let mut running = command.args(["--exact", name, "--ignored", "--nocapture"]).spawn().unwrap();
    let begun = Instant::now();
    while running.try_wait().unwrap().is_none() {
        if begun.elapsed() > Duration::from_secs(60) {
            running.kill().unwrap();
            panic!("{name} hangs");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let output = running.wait_with_output().unwrap();
    assert!(output.status.success() && said(&output).contains("1 passed"), "{}", said(&output));
}

/// Two ranks of this process, each with a GPU and a group whose peers wait two seconds for each other.
fn two_ranks(rank: impl Fn(usize, ProcessGroup) + Sync) {
    let chosen = echelon_core::device::choose(echelon_core::device::DeviceChoice::Cuda).unwrap();
    assert!(chosen.device.is_cuda());
    let patience = Patience { join: Duration::from_secs(2), ..Patience::default() };
    let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
    std::thread::scope(|scope| {
        for number in 0..2 {
            let (rank, port) = (&rank, point.port());
            scope.spawn(move || {
                echelon_core::shim::set_current_device(Device::Cuda(number)).unwrap();
                let point = MeetingPoint::join("127.0.0.1", port, patience).unwrap();
                rank(number, ProcessGroup::join(&point, "pair", (number, 2), "127.0.0.1", patience).unwrap());
            });
        }
    });
}

fn on_gpu(rank: usize, value: f64) -> Tensor {
    Tensor::full([4], value, (Kind::Float, Device::Cuda(rank)))
}

#[test]
fn what_an_abort_ends_is_an_error() {
    inside("inside_what_an_abort_ends_is_an_error");
}

#[test]
#[ignore = "runs inside a rehearsal"]
fn inside_what_an_abort_ends_is_an_error() {
    two_ranks(|rank, group| {
        group.all_reduce_sum("connect", &on_gpu(rank, 1.0)).unwrap();
        if rank == 0 {
            std::thread::sleep(Duration::from_secs(3)); // never comes to the second one
            return;
        }
        let lonely = on_gpu(rank, 1.0);
        let pending = group.start_all_reduce_sum("lonely", &lonely).unwrap();
        let _ = group.rebuild(); // gives up what is in flight; nobody rebuilds with it
        let error = pending.wait().expect_err("an operation that was ended wrote nothing").to_string();
        assert!(error.contains("lonely"), "{error}");
    });
}

#[test]
fn a_gpu_that_does_not_connect_is_named_in_time() {
    inside("inside_a_gpu_that_does_not_connect_is_named_in_time");
}

#[test]
#[ignore = "runs inside a rehearsal"]
fn inside_a_gpu_that_does_not_connect_is_named_in_time() {
    two_ranks(|rank, group| {
        if rank == 1 {
            let id = Tensor::zeros([128], (Kind::Uint8, Device::Cpu));
            group.broadcast("share NCCL's id", &id, 0).unwrap(); // and no further
            std::thread::sleep(Duration::from_secs(6));
            return;
        }
        let begun = Instant::now();
        let error = group.all_reduce_sum("sum", &on_gpu(rank, 1.0)).unwrap_err().to_string();
        assert!(error.contains("within 2 s") && error.contains("rank 1 did not begin"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    });
}

#[test]
fn memory_comes_and_goes_on_the_tensors_own_gpu() {
    inside("inside_memory_comes_and_goes_on_the_tensors_own_gpu");
}

#[test]
#[ignore = "runs inside a rehearsal"]
fn inside_memory_comes_and_goes_on_the_tensors_own_gpu() {
    use echelon_core::collective::{allocate_storage, free_storage};
    use echelon_core::shim::live_bytes;
    echelon_core::device::choose(echelon_core::device::DeviceChoice::Cuda).unwrap();
    let [first, second] = [0, 1].map(Device::Cuda);
    let tensor = Tensor::ones([1 << 20], (Kind::Float, second)); // while the thread's device is the first
    free_storage(&tensor).unwrap();
    assert_eq!((live_bytes(first), live_bytes(second)), (0, 0));
    allocate_storage(&tensor).unwrap();
    assert_eq!((live_bytes(first), live_bytes(second)), (0, 4 << 20));
    let _ = tensor.shallow_clone().fill_(2.0);
    assert_eq!(tensor.sum(Kind::Double).double_value(&[]), f64::from(1 << 21));
}

#[test]
fn gpu_check_passes_every_step_and_shows_no_speed() {
    if !is_ready() {
        return;
    }
    let workplace = Workplace::new();
    let mut command = on_gpus(1, &program("gpu-check"));
    command.args(["--tiny", "--out"]).arg(workplace.path("found"));
    let said = finish(command, "gpu-check");
    assert!(said.contains("on a stand-in: no GPU, and no speeds"), "{said}");
    let json = fs::read_to_string(workplace.path("found/gpu-check.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    let steps = report["steps"].as_array().unwrap();
    assert!(steps.iter().all(|step| step["verdict"] == "passed"), "{said}");
    let findings = steps.iter().flat_map(|step| step["found"].as_array().unwrap());
    let mut speeds = findings.filter(|finding| finding["bound"] == "measured");
    assert!(speeds.all(|speed| speed["value"].is_null()) && json.contains("\"stand_in\": true"));
}
