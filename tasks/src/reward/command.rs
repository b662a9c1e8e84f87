//! Scores from a program that is started once and answers a line of JSON with a line of JSON.
//!
//! It reads `{"prompt": …, "response": …, "label": …}` lines from standard input and writes a `{"reward": x}` line for
//! each, in order, flushing after each line or at least whenever it waits for input. What it writes to standard
//! error is kept for the error messages.
//!
//! * CM-1: an answer belongs to the request of its place. A line nobody asked for is an error, because every
//!   answer after it would belong to another request.
//! * CM-2: after a failure the program is killed and every further call repeats the cause: a program that lost its
//!   place cannot be trusted again.
//! * CM-3: when the source is dropped the program, and whatever it started in its process group, is gone and reaped.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::error::{RequestExcerpt, excerpt};
use super::{RewardError, RewardRequest, RewardSource};

/// The program and how long it may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandConfig {
    /// Run by `sh -c`.
    pub command: String,
    /// Where it runs; by default where this process does.
    pub directory: Option<PathBuf>,
    /// Longest wait for the next answer.
    pub timeout: Duration,
}

impl CommandConfig {
    /// `command` with 180 s for each answer.
    pub fn new(command: impl Into<String>) -> Self {
        Self { command: command.into(), directory: None, timeout: Duration::from_secs(180) }
    }
}

/// A running reward program.
pub struct CommandReward {
    config: CommandConfig,
    state: Mutex<State>,
}

enum State {
    Running(Program),
    /// After a failure; holds its cause.
    Stopped(String),
}

impl CommandReward {
    /// Starts the program. It is killed when the thread that calls this ends: start it from the main thread.
    ///
    /// # Errors
    /// The shell could not be started. A command that the shell cannot find shows at the first [`Self::score`].
    pub fn start(config: CommandConfig) -> Result<Self, RewardError> {
        let started = Program::start(&config);
        let program = started.map_err(|source| RewardError::Start { command: config.command.clone(), source })?;
        Ok(Self { config, state: Mutex::new(State::Running(program)) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl RewardSource for CommandReward {
    fn name(&self) -> String {
        "command".to_owned()
    }

    fn score(&self, requests: &[RewardRequest]) -> Result<Vec<f64>, RewardError> {
        let mut state = self.state();
        let command = || self.config.command.clone();
        match &mut *state {
            State::Stopped(cause) => Err(RewardError::Stopped { command: command(), cause: cause.clone() }),
            State::Running(program) => {
                let (index, problem) = match program.answer_all(requests, self.config.timeout) {
                    Ok(rewards) => return Ok(rewards),
                    Err(failed) => failed,
                };
                let (problem, stderr) = program.stop_for(problem);
                *state = State::Stopped(problem.clone());
                let request = RequestExcerpt::new(requests, index);
                Err(RewardError::Program { command: command(), request, problem, stderr })
            }
        }
    }
}

/// Longest line of an answer, in bytes.
const MAX_ANSWER_BYTES: u64 = 1 << 20;
/// Lines of standard error kept, and the length of each, in bytes.
const NUM_STDERR_LINES: usize = 20;
const MAX_STDERR_LINE_BYTES: u64 = 2_000;
/// How long a program may take to end by itself once its input is closed, or its pipes to empty once it has ended.
const GRACE: Duration = Duration::from_millis(500);

#[derive(Serialize)]
struct Line<'a> {
    prompt: &'a str,
    response: &'a str,
    label: Option<&'a str>,
}

struct Program {
    child: Child,
    /// Once reaped, its number may be another process's.
    reaped: bool,
    /// To the thread that writes standard input: a program that answers while it reads must not block both sides.
    input: Option<Sender<Vec<u8>>>,
    /// Lines of standard output, ended by the end of it.
    answers: Receiver<Result<Vec<u8>, Problem>>,
    stderr: Arc<Mutex<VecDeque<String>>>,
    stderr_thread: thread::JoinHandle<()>,
}

enum Problem {
    /// The end of standard output.
    End,
    Other(String),
}

impl Program {
    fn start(config: &CommandConfig) -> io::Result<Self> {
        let mut command = Command::new("sh");
        command.arg("-c").arg(&config.command).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(directory) = &config.directory {
            command.current_dir(directory);
        }
        // However the starting thread ends (kill -9 runs no destructor), the program ends with it.
        // SAFETY: prctl is async-signal-safe and touches no memory of the parent.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let mut child = command.spawn()?;
        let missing = || io::Error::other("a pipe to the program is missing");
        let stdin = child.stdin.take().ok_or_else(missing)?;
        let stdout = child.stdout.take().ok_or_else(missing)?;
        let stderr_pipe = child.stderr.take().ok_or_else(missing)?;
        let (input, to_write) = channel();
        let (to_read, answers) = sync_channel(64);
        let stderr = Arc::new(Mutex::new(VecDeque::new()));
        let lines = Arc::clone(&stderr);
        thread::spawn(move || write_input(stdin, &to_write));
        thread::spawn(move || read_answers(BufReader::new(stdout), &to_read));
        let stderr_thread = thread::spawn(move || keep_last_lines(BufReader::new(stderr_pipe), &lines));
        Ok(Self { child, reaped: false, input: Some(input), answers, stderr, stderr_thread })
    }

    /// The rewards of all requests, or the index of the request that failed and why.
    fn answer_all(&mut self, requests: &[RewardRequest], timeout: Duration) -> Result<Vec<f64>, (usize, Problem)> {
        match self.answers.try_recv() {
            Ok(Ok(line)) => {
                return Err((0, Problem::Other(format!("it wrote {} before it was asked", shown(&line)))));
            }
            Ok(Err(problem)) => return Err((0, problem)),
            Err(_) => {}
        }
        let mut lines = Vec::new();
        for RewardRequest { prompt, response, label, .. } in requests {
            let line = Line { prompt, response, label: label.as_deref() };
            serde_json::to_writer(&mut lines, &line).map_err(|error| (0, Problem::Other(error.to_string())))?;
            lines.push(b'\n');
        }
        if let Some(input) = &self.input {
            let _gone = input.send(lines); // a writer that is gone shows as the end of the answers, with its cause
        }
        (0..requests.len()).map(|index| self.next_answer(timeout).map_err(|problem| (index, problem))).collect()
    }

    fn next_answer(&mut self, timeout: Duration) -> Result<f64, Problem> {
        match self.answers.recv_timeout(timeout) {
            Ok(line) => parse_answer(&line?).map_err(Problem::Other),
            Err(RecvTimeoutError::Timeout) => Err(Problem::Other(format!("no answer within {timeout:?}"))),
            Err(RecvTimeoutError::Disconnected) => Err(Problem::End),
        }
    }

    /// Ends the program; returns the problem in words, with how it ended, and its last lines on standard error.
    fn stop_for(&mut self, problem: Problem) -> (String, Vec<String>) {
        let problem = match problem {
            Problem::Other(problem) => problem,
            Problem::End if self.has_ended_within(GRACE) => "it ended before it answered".to_owned(),
            Problem::End => "it closed its standard output before it answered".to_owned(),
        };
        let ended = self.has_ended_within(Duration::ZERO);
        let status = self.kill();
        wait_until(GRACE, || self.stderr_thread.is_finished());
        let problem = match status {
            Ok(status) if ended => format!("{problem} ({status})"),
            _ => problem,
        };
        let stderr = self.stderr.lock().unwrap_or_else(|poison| poison.into_inner());
        (problem, stderr.iter().cloned().collect())
    }

    /// Whether the program has ended; it is not reaped, so that its process group keeps its number.
    fn has_ended_within(&self, limit: Duration) -> bool {
        wait_until(limit, || {
            // SAFETY: a zeroed siginfo_t is valid, and waitid writes to nothing else.
            let (result, info) = unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
                (libc::waitid(libc::P_PID, self.child.id(), &mut info, options), info)
            };
            // SAFETY: waitid filled the field, or left it 0 while the child runs.
            result != 0 || unsafe { info.si_pid() } != 0
        })
    }

    fn kill(&mut self) -> io::Result<std::process::ExitStatus> {
        if !self.reaped {
            // SAFETY: the group is the child's own, and the child is not reaped yet, so the number is still its.
            unsafe { libc::kill(-(self.child.id() as libc::pid_t), libc::SIGKILL) };
            self.reaped = true;
        }
        self.child.wait()
    }
}

impl Drop for Program {
    /// Closes the program's input, waits a moment for it to end by itself, then kills its process group and reaps it.
    fn drop(&mut self) {
        self.input = None;
        if !self.reaped {
            self.has_ended_within(GRACE);
        }
        let _ended = self.kill();
    }
}

fn wait_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn write_input(mut stdin: ChildStdin, batches: &Receiver<Vec<u8>>) {
    for batch in batches {
        if stdin.write_all(&batch).and_then(|()| stdin.flush()).is_err() {
            return; // the program is gone or reads no more: the end of its answers tells
        }
    }
}

fn read_answers(mut stdout: impl BufRead, answers: &SyncSender<Result<Vec<u8>, Problem>>) {
    loop {
        let mut line = Vec::new();
        let answer = match stdout.by_ref().take(MAX_ANSWER_BYTES).read_until(b'\n', &mut line) {
            Ok(0) => Err(Problem::End),
            Ok(_) if line.len() as u64 == MAX_ANSWER_BYTES => {
                Err(Problem::Other(format!("its answer is longer than {MAX_ANSWER_BYTES} bytes")))
            }
            Ok(_) => Ok(line),
            Err(error) => Err(Problem::Other(format!("cannot read its answer: {error}"))),
        };
        let is_last = answer.is_err();
        if answers.send(answer).is_err() || is_last {
            return;
        }
    }
}

fn keep_last_lines(mut stderr: impl BufRead, kept: &Mutex<VecDeque<String>>) {
    let mut line = Vec::new();
    while let Ok(1..) = stderr.by_ref().take(MAX_STDERR_LINE_BYTES).read_until(b'\n', &mut line) {
        let mut kept = kept.lock().unwrap_or_else(|poison| poison.into_inner());
        if kept.len() == NUM_STDERR_LINES {
            kept.pop_front();
        }
        kept.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
        line.clear();
    }
}

fn parse_answer(line: &[u8]) -> Result<f64, String> {
    let answer: Value = serde_json::from_slice(line).map_err(|_| format!("its answer is not JSON: {}", shown(line)))?;
    let reward = answer.get("reward").ok_or_else(|| format!("its answer has no \"reward\": {}", shown(line)))?;
    let reward = reward.as_f64().filter(|reward| reward.is_finite());
    reward.ok_or_else(|| format!("its reward is not a finite number: {}", shown(line)))
}

fn shown(line: &[u8]) -> String {
    format!("{:?}", excerpt(String::from_utf8_lossy(line).trim_end(), 200))
}
