//! `gpu-check` as its user meets it where there is no GPU: one plain sentence, exit code 3, and its files all the same.
//! Deadlines are tested beside their code, in `src/gpu_check/child.rs`; its steps in the rehearsal.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use echelon::gpu_check::{PEER, STEPS};
use serde_json::Value;

/// Runs it where no driver is to be found, whatever this machine has.
fn gpu_check(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpu-check"));
    command.current_dir(folder).args(arguments).env("OMP_NUM_THREADS", "1").env("CUDA_VISIBLE_DEVICES", "");
    command.output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn without_a_device_it_says_so_and_writes_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let output = gpu_check(folder.path(), &["--out", "found"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let said = stderr(&output);
    assert!(said.starts_with("error: no device to check: no CUDA device works here: "), "{said}");
    assert_eq!(said.trim().lines().count(), 1, "{said}");

    let json = fs::read_to_string(folder.path().join("found/gpu-check.json")).unwrap();
    let report: Value = serde_json::from_str(&json).unwrap();
    let steps = report["steps"].as_array().unwrap();
    let names: Vec<&str> = steps.iter().map(|step| step["step"].as_str().unwrap()).collect();
    assert_eq!(names, STEPS.iter().map(|step| step.name).collect::<Vec<_>>());
    assert_eq!(steps[0]["verdict"], "failed");
    assert!(steps[1..].iter().all(|step| step["verdict"] == "skipped" && step["why"] == "no device"));
    let page = fs::read_to_string(folder.path().join("found/gpu-check.html")).unwrap();
    assert!(page.contains("<h1>no device</h1>"));
    assert!(!folder.path().join("found/scratch").exists(), "nothing but results stays");
}

#[test]
fn a_wrong_command_line_starts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("full")).unwrap();
    fs::write(folder.path().join("full/notes"), "mine").unwrap();
    for (arguments, complaint) in [
        (&["--only", "device,warp"][..], "--only: there is no step `warp`, but device, log-probs, "),
        (&["--out", "full"], "--out full is not empty: name another folder"),
        (&["--deadline-scale", "0"], "--deadline-scale: expected a number above 0, found `0`"),
        (&["--fast"], "unknown option `--fast`"),
    ] {
        let output = gpu_check(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).starts_with(&format!("error: {complaint}")), "{}", stderr(&output));
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn the_page_of_the_docs_lists_the_steps_with_their_deadlines() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/gpu.md")).unwrap();
    let steps = page.split("## Steps").nth(1).and_then(|rest| rest.split("## ").next()).unwrap();
    let rows = steps.lines().filter_map(|line| line.strip_prefix("| `"));
    let listed: Vec<String> = rows.map(|row| row.split(" | ").take(2).collect::<Vec<_>>().join(" ")).collect();
    let expected: Vec<String> =
        STEPS.iter().chain([&PEER]).map(|step| format!("{}` {:.0} s", step.name, step.deadline_s)).collect();
    assert_eq!(listed, expected);
}
