//! Reward programs as real child processes.

use std::path::Path;
use std::time::{Duration, Instant};

use echelon_tasks::reward::{CommandConfig, CommandReward, RewardSource};

use crate::{Folder, requests};

fn start(script: &str) -> CommandReward {
    CommandReward::start(CommandConfig { timeout: Duration::from_secs(10), ..CommandConfig::new(script) }).unwrap()
}

/// The error that `script` gives for two requests, without the part that repeats the script.
fn failure(script: &str) -> String {
    let source = start(script);
    let message = source.score(&requests(2)).unwrap_err().to_string();
    let again = source.score(&requests(2)).unwrap_err().to_string();
    assert!(again.contains("`: stopped after an earlier failure: "), "{again}");
    message.split_once("`: ").unwrap().1.to_owned()
}

/// Answers each line with its number, counted from 1.
const COUNT: &str = "n=0; while read -r line; do n=$((n+1)); echo \"{\\\"reward\\\": $n}\"; done";

#[test]
fn one_program_answers_call_after_call() {
    let source = start(COUNT);
    assert_eq!(source.score(&requests(3)).unwrap(), [1.0, 2.0, 3.0]);
    assert_eq!(source.score(&[]).unwrap(), Vec::<f64>::new());
    assert_eq!(source.score(&requests(2)).unwrap(), [4.0, 5.0]);
}

#[test]
fn each_request_is_one_line_of_json() {
    let folder = Folder::new();
    let script =
        "while read -r line; do printf '%s\\n' \"$line\" >> seen; echo '{\"reward\": -0.5, \"note\": 1}'; done";
    let config = CommandConfig { directory: Some(folder.0.clone()), ..CommandConfig::new(script) };
    let mut requests = requests(3);
    requests[0].response = "two\nlines \"quoted\"".to_owned();
    assert_eq!(CommandReward::start(config).unwrap().score(&requests).unwrap(), [-0.5; 3]);
    let seen = std::fs::read_to_string(folder.0.join("seen")).unwrap();
    let expected = [
        r#"{"prompt":"p0","response":"two\nlines \"quoted\"","label":"0"}"#,
        r#"{"prompt":"p1","response":" r1","label":"1"}"#,
        r#"{"prompt":"p2","response":" r2","label":null}"#,
    ];
    assert_eq!(seen.lines().collect::<Vec<_>>(), expected);
}

/// More in both directions than pipes hold: neither side may wait for the other.
#[test]
fn many_long_requests_do_not_lock_up() {
    let mut many = requests(2000);
    for request in &mut many {
        request.response = "x".repeat(2000);
    }
    let rewards =
        start("sed -u 's/.*/{\"reward\": 1, \"pad\": \"&\"}/; s/\\(\"pad\": \"\\).*/\\1'$(printf %01000d 0)'\"}/'")
            .score(&many)
            .unwrap();
    assert_eq!(rewards, vec![1.0; 2000]);
}

#[test]
fn failures_name_the_request_and_show_stderr() {
    let first = "request 1 of 2 (prompt \"p0\"): ";
    let second = "request 2 of 2 (prompt \"p1\"): ";
    let silent = "; it wrote nothing to stderr";
    let good = "read -r line; echo '{\"reward\": 1}';";
    for (script, expected) in [
        (
            "cat".to_owned(),
            format!(
                "{first}its answer has no \"reward\": \"{{\\\"prompt\\\":\\\"p0\\\",\\\"response\\\":\\\" r0\\\",\\\"label\\\":\\\"0\\\"}}\"{silent}"
            ),
        ),
        ("echo hello; cat >/dev/null".to_owned(), format!("{first}its answer is not JSON: \"hello\"{silent}")),
        (
            format!("{good} echo '{{\"reward\": null}}'; cat >/dev/null"),
            format!("{second}its reward is not a finite number: \"{{\\\"reward\\\": null}}\"{silent}"),
        ),
        (
            format!("{good} echo '{{\"reward\": NaN}}'; cat >/dev/null"),
            format!("{second}its answer is not JSON: \"{{\\\"reward\\\": NaN}}\"{silent}"),
        ),
        (good.to_owned(), format!("{second}it ended before it answered (exit status: 0){silent}")),
        (
            format!("{good} echo loading >&2; echo 'no model' >&2; exit 3"),
            format!(
                "{second}it ended before it answered (exit status: 3); its last lines on stderr:\n  loading\n  no model"
            ),
        ),
        ("kill -9 $$".to_owned(), format!("{first}it ended before it answered (signal: 9 (SIGKILL)){silent}")),
        (
            format!("{good} exec >&-; sleep 100"),
            format!("{second}it closed its standard output before it answered{silent}"),
        ),
    ] {
        let found = failure(&script);
        // a program that answers before it reads may be found out before or after it is asked
        let early = found.contains("before it was asked") && script.starts_with("echo");
        assert!(found == expected || early, "{script}\n{found}\n{expected}");
    }
    let missing = failure("no_such_program_anywhere --now");
    assert!(missing.contains("exit status: 127") && missing.contains("no_such_program_anywhere"), "{missing}");
}

#[test]
fn only_the_last_lines_of_stderr_are_kept() {
    let message = failure("i=0; while [ $i -lt 500 ]; do i=$((i+1)); echo \"line $i\" >&2; done; exit 1");
    assert!(
        message.contains("line 481\n") && message.ends_with("line 500") && !message.contains("line 480"),
        "{message}"
    );
}

/// CM-1.
#[test]
fn an_answer_nobody_asked_for_is_an_error() {
    let source = start("while read -r line; do echo '{\"reward\": 1}'; echo '{\"reward\": 2}'; done");
    let mut calls = (0..100).map(|_| {
        std::thread::sleep(Duration::from_millis(20));
        source.score(&requests(1))
    });
    let error = calls.find_map(Result::err).unwrap().to_string();
    assert!(error.contains("it wrote \"{\\\"reward\\\": 2}\" before it was asked"), "{error}");
    let banner = start("echo ready; cat");
    std::thread::sleep(Duration::from_millis(300));
    let error = banner.score(&requests(1)).unwrap_err().to_string();
    assert!(error.contains("request 1 of 1 (prompt \"p0\"): it wrote \"ready\" before it was asked"), "{error}");
}

#[test]
fn a_slow_program_is_a_timeout() {
    let script = "read -r line; echo '{\"reward\": 1}'; echo thinking >&2; sleep 100";
    let config = CommandConfig { timeout: Duration::from_millis(300), ..CommandConfig::new(script) };
    let begin = Instant::now();
    let message = CommandReward::start(config).unwrap().score(&requests(2)).unwrap_err().to_string();
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    assert!(
        message
            .contains("request 2 of 2 (prompt \"p1\"): no answer within 300ms; its last lines on stderr:\n  thinking"),
        "{message}"
    );
}

#[test]
fn an_endless_line_is_an_error() {
    let message = failure("read -r line; cat /dev/zero | tr '\\0' x");
    assert!(message.contains("its answer is longer than 1048576 bytes"), "{message}");
}

/// CM-3: neither the program nor its child is left, not even as a zombie.
#[test]
fn nothing_is_left_of_a_dropped_program() {
    let folder = Folder::new();
    let script =
        "sleep 1000 & echo $! > child; echo $$ > self; while read -r line; do echo '{\"reward\": 1}'; done; sleep 1000";
    let config = CommandConfig { directory: Some(folder.0.clone()), ..CommandConfig::new(script) };
    let source = CommandReward::start(config).unwrap();
    source.score(&requests(1)).unwrap();
    let process = |name: &str| {
        let id = std::fs::read_to_string(folder.0.join(name)).unwrap();
        Path::new("/proc").join(id.trim())
    };
    let (program, child) = (process("self"), process("child"));
    assert!(program.exists() && child.exists());
    drop(source);
    assert!(!program.exists(), "the program was not reaped");
    // the child is init's to reap, which may take a moment, and some containers have no init that does
    let is_gone = || !std::fs::read_to_string(child.join("stat")).is_ok_and(|stat| !stat.contains(") Z "));
    let deadline = Instant::now() + Duration::from_secs(5);
    while !is_gone() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(is_gone(), "the program's child is still running");
}

/// A program that ends when its input ends gets the time to do so.
#[test]
fn a_dropped_program_may_finish() {
    let folder = Folder::new();
    let script = "while read -r line; do echo '{\"reward\": 1}'; done; echo done > end";
    let config = CommandConfig { directory: Some(folder.0.clone()), ..CommandConfig::new(script) };
    let source = CommandReward::start(config).unwrap();
    source.score(&requests(1)).unwrap();
    drop(source);
    assert_eq!(std::fs::read_to_string(folder.0.join("end")).unwrap(), "done\n");
}
