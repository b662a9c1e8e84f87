//! Worker processes of a run: started here or by others, killed, frozen, missing; nothing hangs and nothing stays behind.

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{
    SMALL, Workplace, assert_same, children, copy_folder, exists, num_lines, quickstart, said, send, signal, wait_for,
};

use serde_json::Value;

mod common;

const TWO: [&str; 2] = ["--set", "placement.workers=2"];
/// Long enough to be hit in the middle.
const LONG: [&str; 4] = ["--set", "placement.workers=2", "--set", "train.steps=200"];

/// A run of two workers that has finished a step, and its workers.
fn in_the_middle(workplace: &Workplace, run: &str) -> (Child, Vec<u32>) {
    let mut driver = workplace.ppo(run, &LONG).spawn().unwrap();
    let metrics = workplace.path(run).join("metrics.jsonl");
    assert!(wait_for(&mut driver, || num_lines(&metrics) > 0), "the run ended early");
    let workers = children(driver.id());
    assert_eq!(workers.len(), 2, "one process per worker");
    (driver, workers)
}

#[test]
fn a_killed_worker_ends_the_run_with_its_name() {
    let workplace = Workplace::new();
    let (driver, workers) = in_the_middle(&workplace, "run");
    signal(workers[1], libc::SIGKILL);
    let output = driver.wait_with_output().unwrap();
    let text = said(&output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("killed by signal 9") && text.contains(&format!("pid {}", workers[1])), "{text}");
    let mut last = text.trim_end().lines().rev();
    let (next, cause) = (last.next().unwrap(), last.next().unwrap());
    assert!(next.contains("--resume"), "what to do: {next}");
    assert_eq!(cause.matches("rank 1").count(), 2, "once of the role, once of the worker: {cause}");
    assert!(!workers.iter().any(|&worker| exists(worker)), "nothing is left running");
}

#[test]
fn a_frozen_worker_is_noticed_within_30_s() {
    let workplace = Workplace::new();
    let (driver, workers) = in_the_middle(&workplace, "run");
    signal(workers[0], libc::SIGSTOP);
    let begun = Instant::now();
    let output = driver.wait_with_output().unwrap();
    let text = said(&output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("rank 0") && text.contains("no heartbeat"), "{text}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert!(!workers.iter().any(|&worker| exists(worker)), "nothing is left running");
}

#[test]
fn workers_end_with_a_killed_driver() {
    let workplace = Workplace::new();
    let (mut driver, workers) = in_the_middle(&workplace, "run");
    send(&driver, libc::SIGKILL);
    driver.wait().unwrap();
    let begun = Instant::now();
    while workers.iter().any(|&worker| exists(worker)) {
        assert!(begun.elapsed() < Duration::from_secs(10), "a worker outlives its driver");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_interrupted_run_of_workers_goes_on_as_if_nothing_had_been() {
    let workplace = Workplace::new();
    workplace.finish("undisturbed", &TWO);
    let mut driver = workplace.ppo("run", &TWO).spawn().unwrap();
    let metrics = workplace.path("run").join("metrics.jsonl");
    assert!(wait_for(&mut driver, || num_lines(&metrics) > 0), "the run ended early");
    send(&driver, libc::SIGINT);
    let output = driver.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", said(&output));
    workplace.finish("run", &[&TWO[..], &["--resume"]].concat());
    assert_same(&workplace.path("run"), &workplace.path("undisturbed"), "resumed");
}

/// A phase that would take minutes is left when a person asks.
#[test]
fn workers_stop_in_the_middle_of_a_phase() {
    let workplace = Workplace::new();
    let long = ["--set", "rollout.samples_per_prompt=20000", "--set", "ppo.mini_batch_size=80000"];
    let mut driver = workplace.ppo("run", &[&TWO[..], &long].concat()).spawn().unwrap();
    assert!(wait_for(&mut driver, || workplace.path("run/eval_before.json").exists()));
    std::thread::sleep(Duration::from_secs(1));
    send(&driver, libc::SIGTERM);
    let asked = Instant::now();
    let output = driver.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", said(&output));
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    assert!(!said(&output).contains("step  1"), "it was in the middle of the first: {}", said(&output));
}

/// Starts a worker as a person or a scheduler would.
fn worker(rank: usize, address: &str, credentials: &str) -> Child {
    started_as(Command::new(env!("CARGO_BIN_EXE_worker")), rank, address, credentials)
}

/// Starts a worker that takes its host for another: host names are the kernel's, by namespace.
fn worker_elsewhere(rank: usize, address: &str, credentials: &str) -> Child {
    let mut command = Command::new("unshare");
    let script = format!("hostname elsewhere && exec {} \"$@\"", env!("CARGO_BIN_EXE_worker"));
    command.args(["--uts", "sh", "-c", &script, "worker"]).env("RUST_LOG", "echelon_placement=debug");
    started_as(command, rank, address, credentials)
}

fn started_as(mut command: Command, rank: usize, address: &str, credentials: &str) -> Child {
    command
        .args(["--join", address, "--credentials", credentials, "--join-timeout-s", "30"])
        .env("RANK", rank.to_string())
        .env("LOCAL_RANK", rank.to_string())
        .env("WORLD_SIZE", "2")
        .env_remove("OMP_NUM_THREADS") // shared out by the driver
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// A driver that waits for workers: its process, their address and their credentials, read from what it prints.
fn waiting(workplace: &Workplace, run: &str, more: &[&str]) -> (Child, String, String) {
    let mut arguments = TWO.to_vec();
    arguments.extend(["--set", "placement.listen=127.0.0.1:0"]);
    arguments.extend(more);
    let log = workplace.path(&format!("{run}.log"));
    let mut driver = workplace.ppo(run, &arguments).stdout(fs::File::create(&log).unwrap()).spawn().unwrap();
    assert!(wait_for(&mut driver, || fs::read_to_string(&log).unwrap().contains("--credentials")));
    let text = fs::read_to_string(&log).unwrap();
    let after = |flag: &str| text.split(flag).nth(1).unwrap().split_whitespace().next().unwrap().trim_end_matches(';');
    let (address, credentials) = (after("--join ").to_string(), after("--credentials ").to_string());
    (driver, address, credentials)
}

#[test]
fn workers_started_by_hand_do_what_those_started_here_do() {
    let workplace = Workplace::new();
    workplace.finish("here", &TWO);
    let (driver, address, credentials) = waiting(&workplace, "by-hand", &[]);
    assert!(PathBuf::from(&credentials).exists());
    let workers = [1, 0].map(|rank| worker(rank, &address, &credentials));
    let output = driver.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    for worker in workers {
        let output = worker.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    }
    assert_same(&workplace.path("by-hand"), &workplace.path("here"), "workers started by hand");
    assert!(!PathBuf::from(&credentials).exists(), "the run's secrets end with it");
}

/// As under a scheduler: workers come before the driver has written what they authenticate with. Then one of them dies.
#[test]
fn workers_of_a_failed_run_wait_for_it_and_fail_with_it() {
    let workplace = Workplace::new();
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let credentials = workplace.path("credentials").display().to_string();
    let [mut honest, mut killed] = [0, 1].map(|rank| worker(rank, &address, &credentials));
    let (mut said_first, mut told) = (String::new(), BufReader::new(honest.stderr.take().unwrap()));
    told.read_line(&mut said_first).unwrap();
    assert!(said_first.starts_with("waiting for"), "{said_first}");
    let (listen, file) = (format!("placement.listen={address}"), format!("placement.credentials={credentials}"));
    let mut driver = workplace.ppo("run", &[&LONG[..], &["--set", &listen, "--set", &file]].concat()).spawn().unwrap();
    let metrics = workplace.path("run").join("metrics.jsonl");
    assert!(wait_for(&mut driver, || num_lines(&metrics) > 0), "the run ended early");
    killed.kill().unwrap();
    killed.wait().unwrap();
    let output = driver.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    let mut text = String::new();
    told.read_to_string(&mut text).unwrap();
    assert_eq!(honest.wait().unwrap().code(), Some(3), "{text}");
    assert!(text.contains("the run failed") && !text.contains("h2"), "{text}");
    assert!(!PathBuf::from(&credentials).exists(), "the run's secrets end with it");
}

/// A killed driver leaves its credentials: workers that come before the next driver wait for its own.
#[test]
fn credentials_of_a_killed_driver_are_waited_out() {
    let workplace = Workplace::new();
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let credentials = workplace.path("credentials").display().to_string();
    let (listen, file) = (format!("placement.listen={address}"), format!("placement.credentials={credentials}"));
    let arguments = [&TWO[..], &["--set", &listen, "--set", &file, "--set", "train.steps=1"]].concat();
    let mut killed = workplace.ppo("killed", &arguments).spawn().unwrap();
    assert!(wait_for(&mut killed, || PathBuf::from(&credentials).exists()));
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(PathBuf::from(&credentials).exists(), "what a killed driver cannot remove");
    let workers = [0, 1].map(|rank| worker(rank, &address, &credentials));
    std::thread::sleep(Duration::from_millis(500));
    let output = workplace.ppo("run", &arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    for worker in workers {
        let output = worker.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    }
}

#[test]
fn a_file_that_is_not_the_runs_own_is_kept() {
    let workplace = Workplace::new();
    let file = workplace.path("key");
    fs::write(&file, "keep").unwrap();
    let nowhere = workplace.path("nowhere/key");
    for (path, why) in [(&file, "there is something else"), (&nowhere, "its folder is not there")] {
        let set = format!("placement.credentials={}", path.display());
        let sets = ["--set", "placement.listen=127.0.0.1:0", "--set", &set];
        let output = workplace.ppo("run", &[&TWO[..], &sets].concat()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        let text = said(&output);
        assert!(text.contains("placement.credentials: ") && text.contains(why), "{text}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "keep");
    assert!(!workplace.path("run").exists());
}

/// A Python with PyTorch; one that was named has to have it.
fn python_with_torchrun() -> Option<String> {
    let named = std::env::var("ECHELON_PYTHON").ok();
    let python = named.clone().unwrap_or_else(|| "python3".into());
    let imports = Command::new(&python).args(["-c", "import torch.distributed.run"]).output();
    let found = imports.is_ok_and(|output| output.status.success());
    assert!(found || named.is_none(), "ECHELON_PYTHON={python} has no PyTorch");
    found.then_some(python)
}

#[test]
fn workers_started_by_torchrun_do_what_those_started_here_do() {
    let Some(python) = python_with_torchrun() else {
        return eprintln!("not tested: no Python with PyTorch; ECHELON_PYTHON names one");
    };
    let workplace = Workplace::new();
    workplace.finish("here", &TWO);
    let (driver, address, credentials) = waiting(&workplace, "torchrun", &[]);
    let launched = Command::new(python)
        .args(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"])
        .args([env!("CARGO_BIN_EXE_worker"), "--join", &address, "--credentials", &credentials])
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(launched.status.success(), "{}", said(&launched));
    let output = driver.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert_same(&workplace.path("torchrun"), &workplace.path("here"), "workers started by torchrun");
}

/// A rule is a task, and a node that has room for tasks gets some. This one takes long to compile, so that the driver's own
/// CPUs are taken when the others are asked.
#[test]
fn rules_are_applied_on_the_nodes_of_the_workers() {
    if !Command::new("unshare").args(["--uts", "true"]).status().is_ok_and(|status| status.success()) {
        return eprintln!("not tested: this user may not name hosts");
    }
    let workplace = Workplace::new();
    let model = "model = \"QUICKSTART/reward-model\"\nnormalize = true";
    workplace.write("small.toml", &SMALL.replace(model, "rule = \"regex\"\npattern = '''a|\\w{180}'''"));
    let large = ["--set", "rollout.batch_size=256", "--set", "ppo.mini_batch_size=256", "--set", "train.steps=1"];
    workplace.finish("here", &[&TWO[..], &large].concat());
    let (driver, address, credentials) = waiting(&workplace, "elsewhere", &large);
    let workers = [0, 1].map(|rank| worker_elsewhere(rank, &address, &credentials));
    let output = driver.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let heard = workers.map(|worker| said(&worker.wait_with_output().unwrap())).concat();
    assert!(heard.contains("tasks of another node") && heard.contains("score_by_rule"), "{heard}");
    assert_same(&workplace.path("elsewhere"), &workplace.path("here"), "scored elsewhere");
}

#[test]
fn missing_and_surplus_workers_are_named() {
    let workplace = Workplace::new();
    let (driver, address, credentials) = waiting(&workplace, "run", &["--set", "placement.join_timeout_s=10"]);
    let honest = worker(0, &address, &credentials);
    std::thread::sleep(Duration::from_millis(800));
    // Another one claims the same rank, and one has a rank that is not in the run.
    for rank in [0, 1] {
        let wrong = if rank == 0 { worker(0, &address, &credentials) } else { worker(7, &address, &credentials) };
        let output = wrong.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(if rank == 0 { 3 } else { 2 }), "{}", said(&output));
        assert!(said(&output).contains("rank"), "{}", said(&output));
    }
    let output = driver.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    let text = said(&output);
    assert!(text.contains("rank 1") || text.contains("rank 0"), "{text}");
    assert!(!workplace.path("run").exists(), "nothing was begun");
    assert_eq!(honest.wait_with_output().unwrap().status.code(), Some(3));
}

#[test]
fn an_address_that_is_taken_or_another_machines_is_refused() {
    let workplace = Workplace::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let in_use = taken.local_addr().unwrap().to_string();
    for (address, cause) in [(in_use.as_str(), "in use"), ("203.0.113.7:7401", "assign requested address")] {
        let listen = format!("placement.listen={address}");
        let output = workplace.ppo("run", &["--set", "placement.workers=2", "--set", &listen]).output().unwrap();
        let text = said(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains("placement.listen") && text.contains(address) && text.contains(cause), "{text}");
        assert!(!workplace.path("run").exists());
    }
}

/// Files that a process maps.
fn mapped(pid: u32) -> Vec<PathBuf> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    maps.lines().filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..]))).collect()
}

/// Each role has a model folder of its own, and a worker of its own. The driver looks at every file's header before it
/// starts workers; with workers, it maps none.
#[test]
fn a_worker_maps_no_file_of_a_role_that_is_elsewhere() {
    let workplace = Workplace::new();
    let roles = ["actor", "critic", "reference", "reward"];
    let models = ["language-model", "reward-model", "language-model", "reward-model"];
    let mut settings: Vec<String> = Vec::new();
    for (rank, (role, model)) in roles.iter().zip(models).enumerate() {
        let folder = workplace.path(&format!("model-of-{role}"));
        copy_folder(&quickstart().join(model), &folder);
        settings.push(format!("{role}.model={}", folder.display()));
        settings.push(format!("placement.{role}.devices=[{rank}]"));
    }
    settings.extend(["placement.workers=5", "placement.generator.devices=[4]", "train.steps=200"].map(String::from));
    let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    let mut driver = workplace.ppo("run", &settings).spawn().unwrap();
    let pid = driver.id();
    let metrics = workplace.path("run").join("metrics.jsonl");
    let mut seen: Vec<HashSet<&str>> = vec![HashSet::new(); 6];
    let going = wait_for(&mut driver, || {
        let workers = children(pid);
        let driver = (!workers.is_empty()).then_some(pid);
        for process in workers.into_iter().chain(driver) {
            let files = mapped(process); // first: a process that maps a model has its environment
            let environment = fs::read_to_string(format!("/proc/{process}/environ")).unwrap_or_default();
            let rank = environment.split('\0').find_map(|entry| entry.strip_prefix("RANK=")?.parse().ok());
            let maps =
                |role: &&str| files.iter().any(|file| file.starts_with(workplace.path(&format!("model-of-{role}"))));
            seen[rank.unwrap_or(5)].extend(roles.into_iter().filter(maps));
        }
        num_lines(&metrics) > 1
    });
    assert!(going, "the run ended early");
    send(&driver, libc::SIGINT);
    let output = driver.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", said(&output));
    for (rank, role) in roles.iter().enumerate().skip(2) {
        assert!(seen[rank].contains(role), "rank {rank} computes on the mapped file of the {role}");
    }
    for (rank, seen) in seen.iter().enumerate() {
        let own = roles.get(rank).into_iter().copied().collect();
        assert!(seen.is_subset(&own), "rank {rank} maps files of {seen:?}, and has the {own:?}");
    }
}

/// What a model of a folder says to the held-out prompts, taking the likeliest tokens.
fn said_by(workplace: &Workplace, model: &Path) -> Vec<String> {
    let output = workplace.path("generated.jsonl");
    let done = Command::new(env!("CARGO_BIN_EXE_generate"))
        .arg("--model")
        .arg(model)
        .arg("--prompts")
        .arg(quickstart().join("prompts-held-out.jsonl"))
        .arg("--output")
        .arg(&output)
        .args(["--temperature", "0", "--max-new-tokens", "12"])
        .env("OMP_NUM_THREADS", "1")
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", said(&done));
    let text = fs::read_to_string(&output).unwrap();
    let row = |line: &str| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_string();
    text.lines().map(row).collect()
}

fn evaluated(path: &Path) -> Vec<String> {
    let evaluation: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let rows = evaluation["responses"].as_array().unwrap();
    rows.iter().map(|row| row["response"].as_str().unwrap().to_string()).collect()
}

/// By shared memory, and by broadcast.
#[test]
fn a_generator_elsewhere_says_what_the_freshly_loaded_checkpoint_says() {
    let workplace = Workplace::new();
    let settings = [
        "placement.actor.devices=[0]",
        "placement.critic.colocate_with=actor",
        "placement.reference.colocate_with=actor",
        "placement.reward.colocate_with=actor",
        "placement.generator.devices=[1]",
        "train.steps=2",
        "eval.temperature=0",
        "eval.max_samples=off",
        "checkpoint.every_steps=off",
    ];
    let flags: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    workplace.finish("shared", &[&TWO[..], &flags].concat());
    let (driver, address, credentials) = waiting(&workplace, "broadcast", &flags);
    let workers = [0, 1].map(|rank| worker(rank, &address, &credentials));
    let output = driver.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    workers.into_iter().for_each(|worker| assert!(worker.wait_with_output().unwrap().status.success()));

    let before = said_by(&workplace, &quickstart().join("language-model"));
    for run in ["shared", "broadcast"] {
        let folder = workplace.path(run);
        let fresh = said_by(&workplace, &folder.join("actor"));
        assert_eq!(evaluated(&folder.join("eval_before.json")), before, "{run}");
        assert_eq!(evaluated(&folder.join("eval_after.json")), fresh, "{run}");
        assert_ne!(fresh, before, "{run}: two steps change something");
    }
}
