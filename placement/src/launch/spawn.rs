//! Worker processes on this host, started by the driver.
//!
//! Each has a thread of its own here that starts it, keeps its last stderr lines and sees it end. The thread is the parent
//! that PR_SET_PDEATHSIG watches, so the kernel kills the worker when the driver dies, even by kill -9; a worker leads its
//! own process group, so that an interrupt at the terminal reaches the driver alone, and killing it takes its children along.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::environment::names_a_place;
use crate::control::{ControlError, Credentials, LocalOutput};

/// Lines of stderr that are kept of each worker.
const LINES: usize = 20;
/// Bytes of a line that are kept.
const LINE_BYTES: usize = 1000;

/// What to start, once per rank.
pub struct SpawnConfig {
    pub program: PathBuf,
    /// Without secrets: everybody can read them.
    pub args: Vec<OsString>,
    /// Beyond those that tell a worker its rank and its threads.
    pub variables: Vec<(OsString, OsString)>,
    pub num_workers: u32,
    /// Each one's device on this host, its number among the visible ones; its rank where none is named.
    pub devices: Vec<usize>,
    /// CPU threads for all of them; see [`available_threads`].
    pub threads: usize,
    /// Told every line that a worker writes to stderr.
    pub on_line: Arc<OnLine>,
}

/// Takes a rank and a line.
pub type OnLine = dyn Fn(u32, &str) + Send + Sync;

/// A worker that could not be started.
#[derive(Debug, thiserror::Error)]
#[error("starting worker rank {rank}: {program}: {cause}", program = program.display())]
pub struct SpawnError {
    pub rank: u32,
    pub program: PathBuf,
    pub cause: io::Error,
}

/// Worker processes of this host. Dropping it kills them and waits until they are gone.
pub struct LocalWorkers {
    workers: Vec<Arc<LocalWorker>>,
}

struct LocalWorker {
    rank: u32,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pid: u32,
    tail: Tail,
    /// How it ended, in words.
    ending: Option<String>,
    /// Its end was asked for, or is none of anybody's business.
    expected: bool,
}

/// The last lines of a process, and the head of its last panic, which a long backtrace would push out.
#[derive(Default)]
struct Tail {
    last: VecDeque<String>,
    panic: Vec<String>,
}

impl Tail {
    fn push(&mut self, line: &str) {
        const HEAD: usize = 3;
        if line.contains(" panicked at ") {
            self.panic = vec![line.into()];
        } else if (1..HEAD).contains(&self.panic.len()) {
            self.panic.push(line.into());
        }
        if self.last.len() == LINES {
            self.last.pop_front();
        }
        self.last.push_back(line.into());
    }

    fn lines(&self) -> Vec<String> {
        let pushed_out = self.panic.first().is_some_and(|head| !self.last.contains(head));
        let panic = self.panic.iter().filter(|_| pushed_out);
        panic.chain(&self.last).cloned().collect()
    }
}

/// CPUs that this process may use.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// CPU threads of each of `num_workers`: the same for all, for results depend on it, and at least one.
pub fn threads_per_worker(threads: usize, num_workers: u32) -> usize {
    (threads / num_workers.max(1) as usize).max(1)
}

impl LocalWorkers {
    /// Starts them all and gives each its credentials over stdin, which then closes.
    ///
    /// # Errors
    /// The first that cannot be started; those before it are killed.
    pub fn start(
        config: &SpawnConfig,
        mut credentials: impl FnMut(u32) -> Result<Credentials, ControlError>,
    ) -> Result<LocalWorkers, SpawnError> {
        let mut started = LocalWorkers { workers: Vec::new() };
        for rank in 0..config.num_workers {
            let failed = |cause: io::Error| SpawnError { rank, program: config.program.clone(), cause };
            let secret = credentials(rank).map_err(|error| failed(io::Error::other(error)))?;
            started.workers.push(start(config, rank, &secret).map_err(failed)?);
        }
        Ok(started)
    }

    /// Process of a rank.
    pub fn pid(&self, rank: u32) -> Option<u32> {
        self.find(rank).map(|worker| worker.lock().pid)
    }

    /// For the control plane's messages, while these workers live.
    pub fn output(&self) -> Arc<dyn LocalOutput> {
        Arc::new(Output(self.workers.clone()))
    }

    /// Waits until all have ended by themselves, at most `patience`; whether they have.
    pub fn wait(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        for worker in &self.workers {
            worker.lock().expected = true;
        }
        self.workers.iter().all(|worker| worker.wait_until(until))
    }

    /// Kills the worker of a rank, with its children.
    pub fn kill(&self, rank: u32) {
        if let Some(worker) = self.find(rank) {
            worker.kill();
        }
    }

    fn find(&self, rank: u32) -> Option<&Arc<LocalWorker>> {
        self.workers.iter().find(|worker| worker.rank == rank)
    }
}

impl Drop for LocalWorkers {
    fn drop(&mut self) {
        for worker in &self.workers {
            worker.lock().expected = true;
            worker.kill();
        }
        let until = Instant::now() + Duration::from_secs(5);
        for worker in &self.workers {
            worker.wait_until(until);
        }
    }
}

impl LocalWorker {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("never held over a panic")
    }

    /// Not after its end was seen: the number may be another's then.
    fn kill(&self) {
        let state = self.lock();
        if state.ending.is_none()
            && let Ok(pid @ 1..) = i32::try_from(state.pid)
        {
            // SAFETY: a signal to the process group that this worker leads; its process is not reaped while we hold the lock.
            unsafe { libc::kill(-pid, libc::SIGKILL) };
        }
    }

    fn wait_until(&self, until: Instant) -> bool {
        let patience = until.saturating_duration_since(Instant::now());
        let waiting = self.changed.wait_timeout_while(self.lock(), patience, |state| state.ending.is_none());
        waiting.expect("never held over a panic").0.ending.is_some()
    }
}

/// Starts one worker on a thread that stays with it.
fn start(config: &SpawnConfig, rank: u32, secret: &Credentials) -> io::Result<Arc<LocalWorker>> {
    let mut command = command(config, rank);
    let worker = Arc::new(LocalWorker { rank, state: Mutex::default(), changed: Condvar::new() });
    let (watched, on_line, secret) = (worker.clone(), config.on_line.clone(), secret.text());
    let (ready, started) = std::sync::mpsc::sync_channel(1);
    let body = move || match command.spawn() {
        Err(error) => drop(ready.send(Err(error))),
        Ok(mut child) => {
            watched.lock().pid = child.id();
            // A worker that ends before it reads says so itself.
            let _ = child.stdin.take().map(|mut stdin| stdin.write_all(secret.as_bytes()));
            let _ = ready.send(Ok(()));
            attend(child, &watched, &*on_line);
        }
    };
    std::thread::Builder::new().name(format!("worker-{rank}")).stack_size(256 << 10).spawn(body)?;
    started.recv().unwrap_or_else(|_| Err(io::Error::other("its thread ended")))?;
    Ok(worker)
}

fn command(config: &SpawnConfig, rank: u32) -> Command {
    let threads = threads_per_worker(config.threads, config.num_workers).to_string();
    let mut command = Command::new(&config.program);
    for (variable, _) in std::env::vars_os() {
        if variable.to_str().is_some_and(names_a_place) {
            command.env_remove(variable);
        }
    }
    command
        .args(&config.args)
        .env("RANK", rank.to_string())
        .env("LOCAL_RANK", config.devices.get(rank as usize).map_or(rank.to_string(), ToString::to_string))
        .env("WORLD_SIZE", config.num_workers.to_string())
        .env("LOCAL_WORLD_SIZE", config.num_workers.to_string())
        .env("OMP_NUM_THREADS", &threads)
        .env("MKL_NUM_THREADS", &threads)
        .envs(config.variables.iter().cloned())
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let driver = std::process::id();
    // SAFETY: between fork and exec only system calls are made.
    unsafe { command.pre_exec(move || die_with(driver)) };
    command
}

/// Has the kernel kill this process when the thread that started it ends.
fn die_with(parent: u32) -> io::Result<()> {
    // SAFETY: system calls with plain numbers.
    unsafe {
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have died before the call above.
        if u32::try_from(libc::getppid()) != Ok(parent) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
    }
    Ok(())
}

/// Keeps a worker's lines until it has ended, then says how.
fn attend(mut child: Child, worker: &LocalWorker, on_line: &OnLine) {
    let mut lines = Lines::default();
    let mut take = |bytes: &[u8]| {
        lines.split(bytes, |line| {
            on_line(worker.rank, line);
            worker.lock().tail.push(line);
        });
    };
    if let Some(stderr) = child.stderr.take() {
        read_until_end(stderr, child.id(), &mut take);
    }
    take(b"\n");
    // Its children may live on and hold the pipe: the end that counts is its own. Under the lock nobody signals the number.
    let exited = exited(child.id());
    let mut state = worker.lock();
    state.ending = Some(match exited.and_then(|()| child.wait()) {
        Ok(status) => in_words(status),
        Err(error) => format!("its end could not be seen: {error}"),
    });
    // What it left behind in its group ends with it.
    if let Ok(pid @ 1..) = i32::try_from(child.id()) {
        // SAFETY: a signal to a process group; the group keeps its number as long as a member lives.
        unsafe { libc::kill(-pid, libc::SIGKILL) };
    }
    drop(state);
    worker.changed.notify_all();
}

/// Waits until a child has ended, without taking its status: its number stays its own.
fn exited(pid: u32) -> io::Result<()> {
    // SAFETY: waitid writes the struct given.
    let result = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        libc::waitid(libc::P_PID, pid, &mut info, libc::WEXITED | libc::WNOWAIT)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads stderr until its end, or until the process has ended and nothing more is there.
fn read_until_end(mut stderr: ChildStderr, pid: u32, take: &mut dyn FnMut(&[u8])) {
    // SAFETY: the kernel gives a new descriptor that is ours, or -1.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let process = i32::try_from(descriptor).ok().filter(|fd| *fd >= 0);
    // SAFETY: as above; nobody else owns it.
    let process = process.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let mut buffer = [0; 4096];
    loop {
        let mut polled = [readable(stderr.as_raw_fd()), readable(process.as_ref().map_or(-1, AsRawFd::as_raw_fd))];
        // SAFETY: two entries, as said.
        if unsafe { libc::poll(polled.as_mut_ptr(), 2, -1) } < 0 {
            continue; // interrupted
        }
        if polled[0].revents != 0 {
            match stderr.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => take(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        } else if polled[1].revents != 0 {
            return;
        }
    }
}

fn readable(fd: i32) -> libc::pollfd {
    libc::pollfd { fd, events: libc::POLLIN, revents: 0 }
}

/// Cuts a stream of bytes into lines of bounded length.
#[derive(Default)]
struct Lines {
    open: Vec<u8>,
}

impl Lines {
    fn split(&mut self, bytes: &[u8], mut line: impl FnMut(&str)) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let text = piece.strip_suffix(b"\n").unwrap_or(piece);
            let room = LINE_BYTES.saturating_sub(self.open.len());
            self.open.extend_from_slice(&text[..text.len().min(room)]);
            if text.len() < piece.len() {
                let whole = String::from_utf8_lossy(&self.open);
                if !whole.trim().is_empty() {
                    line(whole.trim_end());
                }
                self.open.clear();
            }
        }
    }
}

fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("its process ended with exit code {code}"),
        (_, Some(libc::SIGKILL)) => "its process was killed by signal 9 (out of memory, or by hand)".into(),
        (_, Some(signal)) => format!("its process was killed by signal {signal}"),
        _ => "its process ended".into(),
    }
}

struct Output(Vec<Arc<LocalWorker>>);

impl LocalOutput for Output {
    fn report(&self, rank: u32, pid: u32) -> Option<(Vec<String>, Option<String>)> {
        let worker = self.0.iter().find(|worker| worker.rank == rank)?;
        let state = worker.lock();
        (state.pid == pid).then(|| (state.tail.lines(), state.ending.clone()))
    }

    fn ended(&self) -> Option<ControlError> {
        self.0.iter().find_map(|worker| {
            let state = worker.lock();
            let ending = state.ending.clone().filter(|_| !state.expected)?;
            Some(ControlError::EndedEarly { rank: worker.rank, pid: state.pid, ending, stderr: state.tail.lines() })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::RunAuthority;

    fn shell(script: &str, num_workers: u32) -> LocalWorkers {
        let config = SpawnConfig {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            variables: Vec::new(),
            num_workers,
            devices: vec![0, 5],
            threads: 8,
            on_line: Arc::new(|_, _| {}),
        };
        let authority = RunAuthority::new().unwrap();
        LocalWorkers::start(&config, |rank| authority.worker(Some(rank))).unwrap()
    }

    fn report(workers: &LocalWorkers, rank: u32) -> (Vec<String>, Option<String>) {
        workers.output().report(rank, workers.pid(rank).unwrap()).unwrap()
    }

    #[test]
    fn a_worker_knows_its_place_and_gets_its_secret_over_stdin() {
        // The pattern does not match itself, which stands in the arguments.
        let script = "read first; echo \"$RANK/$WORLD_SIZE $LOCAL_RANK $OMP_NUM_THREADS $first\" >&2; \
                      cat /proc/$$/cmdline /proc/$$/environ | grep -ac '[B]EGIN' >&2; exit 3";
        let workers = shell(script, 3);
        assert!(workers.wait(Duration::from_secs(5)));
        let (lines, ending) = report(&workers, 1);
        assert_eq!(lines, ["1/3 5 2 -----BEGIN CERTIFICATE-----", "0"], "no secret in arguments or environment");
        let first = |rank| report(&workers, rank).0[0].clone();
        assert!(first(0).starts_with("0/3 0 ") && first(2).starts_with("2/3 2 "), "its rank where no device is named");
        assert_eq!(ending.unwrap(), "its process ended with exit code 3");
        assert!(workers.output().report(1, 1).is_none(), "another process of that rank is not ours");
    }

    #[test]
    fn the_last_lines_are_kept_and_long_ones_cut() {
        let workers =
            shell("for i in $(seq 30); do echo line $i >&2; done; head -c 100000 /dev/zero | tr '\\0' x >&2", 1);
        assert!(workers.wait(Duration::from_secs(5)));
        let (lines, _) = report(&workers, 0);
        assert_eq!((lines.len(), lines[0].as_str(), lines[LINES - 1].len()), (LINES, "line 12", LINE_BYTES));
    }

    #[test]
    fn a_long_backtrace_does_not_push_its_panic_out() {
        let mut tail = Tail::default();
        tail.push("thread 'cpu-0' panicked at src/lib.rs:1:1:");
        tail.push("index out of bounds");
        for frame in 0..60 {
            tail.push(&format!("{frame}: a::b::c"));
        }
        let lines = tail.lines();
        assert_eq!((lines[1].as_str(), lines.last().unwrap().as_str()), ("index out of bounds", "59: a::b::c"));
        assert_eq!(lines.len(), LINES + 3);
    }

    #[test]
    fn an_early_end_is_noticed_although_a_child_holds_the_pipe() {
        let workers = shell("sleep 100 & echo gone >&2; kill -9 $$", 1);
        let begun = Instant::now();
        let error = loop {
            if let Some(error) = workers.output().ended() {
                break error.to_string();
            }
            assert!(begun.elapsed() < Duration::from_secs(5));
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(error.contains("rank 0") && error.contains("signal 9") && error.ends_with("gone"), "{error}");
    }

    #[test]
    fn dropping_them_kills_their_children_too() {
        let workers = shell("sleep 100 & echo $! >&2; wait", 1);
        while report(&workers, 0).0.is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let grandchild: i32 = report(&workers, 0).0[0].parse().unwrap();
        drop(workers);
        let begun = Instant::now();
        // SAFETY: signal 0 only asks whether the process is there.
        while unsafe { libc::kill(grandchild, 0) } == 0 && !is_zombie(grandchild) {
            assert!(begun.elapsed() < Duration::from_secs(5), "{grandchild} lives");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ended, but nobody has taken its status: where nothing reaps orphans.
    fn is_zombie(pid: i32) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        status.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let config = SpawnConfig {
            program: "/nowhere/worker".into(),
            args: Vec::new(),
            variables: Vec::new(),
            num_workers: 1,
            devices: Vec::new(),
            threads: 1,
            on_line: Arc::new(|_, _| {}),
        };
        let authority = RunAuthority::new().unwrap();
        let error = LocalWorkers::start(&config, |rank| authority.worker(Some(rank))).err().unwrap().to_string();
        assert!(error.contains("rank 0: /nowhere/worker") && error.contains("No such file"), "{error}");
    }

    #[test]
    fn threads_are_divided_evenly() {
        assert_eq!([(8, 3), (2, 4), (8, 1)].map(|(threads, workers)| threads_per_worker(threads, workers)), [2, 1, 8]);
    }
}
