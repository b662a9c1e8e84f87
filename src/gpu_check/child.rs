//! A process with a deadline: it leads a group of its own, which is killed as a whole when the time is up, and with this
//! process.
//!
//! A step that hangs in a driver may survive even SIGKILL for a while: it is left behind then, and the rest goes on.

use std::fs::File;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How a process ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    Code(i32),
    Signal(i32),
    Deadline,
}

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(10);

/// How long a killed process may take to go.
const GRACE: Duration = Duration::from_secs(3);

/// Runs `command` to its end, or to its deadline and not longer; what it says goes into the file `log`.
///
/// # Errors
/// The log cannot be made, or the program cannot be started.
pub fn run(mut command: Command, log: &Path, deadline: Duration) -> io::Result<End> {
    let begun = Instant::now();
    let output = File::create(log)?;
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).process_group(0);
    dies_with_us(&mut command);
    let mut child = command.spawn()?;
    while !has_ended(&child)? {
        if begun.elapsed() >= deadline {
            end_group(&child);
            wait_briefly(&mut child)?;
            return Ok(End::Deadline);
        }
        std::thread::sleep(PAUSE);
    }
    end_group(&child); // what it left behind
    Ok(end_of(child.wait()?))
}

/// Has the kernel kill what `command` starts when this thread ends: Ctrl-C reaches this process alone.
pub fn dies_with_us(command: &mut Command) {
    let parent = std::process::id();
    let watched = move || {
        // SAFETY: system calls with plain numbers, between fork and exec.
        unsafe {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the call above.
            if u32::try_from(libc::getppid()) == Ok(parent) { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
        }
    };
    // SAFETY: only system calls are made.
    unsafe { command.pre_exec(watched) };
}

/// Leaves the status where it is: the group keeps its number until it is taken.
fn has_ended(child: &Child) -> io::Result<bool> {
    // SAFETY: waitid writes the struct given, which is all zeros where nothing has ended.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOWAIT | libc::WNOHANG;
        if libc::waitid(libc::P_PID, child.id(), &mut info, flags) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(info.si_pid() != 0)
    }
}

fn end_group(child: &Child) {
    if let Ok(group @ 1..) = i32::try_from(child.id()) {
        // SAFETY: a signal to the group that this child leads; it was not reaped yet.
        unsafe { libc::kill(-group, libc::SIGKILL) };
    }
}

fn wait_briefly(child: &mut Child) -> io::Result<()> {
    let begun = Instant::now();
    while child.try_wait()?.is_none() && begun.elapsed() < GRACE {
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

fn end_of(status: ExitStatus) -> End {
    status.code().map_or_else(|| End::Signal(status.signal().unwrap_or(0)), End::Code)
}

/// One line of a log that says what went wrong: an error's, a panic's message, else the last.
pub fn cause(log: &str) -> Option<String> {
    let lines: Vec<&str> = log.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let error = lines.iter().rev().find_map(|line| line.strip_prefix("error: "));
    let panicked = lines.iter().position(|line| line.contains("panicked at"));
    let message = || panicked.and_then(|at| lines.get(at + 1)).copied();
    let line = error.or_else(message).or(lines.last().copied())?;
    // libtorch's errors carry a backtrace in the same line.
    let first = line.split("\\n").next().unwrap_or(line);
    Some(first.chars().take(LONGEST_CAUSE).collect())
}

const LONGEST_CAUSE: usize = 400;

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, deadline: Duration) -> (End, String) {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let end = run(command, &log, deadline).unwrap();
        (end, std::fs::read_to_string(log).unwrap())
    }

    #[test]
    fn ends_are_told_apart() {
        let soon = Duration::from_secs(20);
        assert_eq!(shell("echo said; exit 4", soon), (End::Code(4), "said\n".into()));
        assert_eq!(shell("kill -SEGV $$", soon).0, End::Signal(libc::SIGSEGV));
    }

    #[test]
    fn one_that_hangs_costs_its_deadline_and_takes_its_children_along() {
        let begun = Instant::now();
        // The shell's child would live for a minute, and ignores what asks politely.
        let (end, said) =
            shell("trap '' TERM; sh -c 'trap \"\" TERM; sleep 60' & echo $!; wait", Duration::from_millis(300));
        assert_eq!(end, End::Deadline);
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        let child: i32 = said.trim().parse().unwrap();
        let is_there =
            || std::fs::read_to_string(format!("/proc/{child}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
        while is_there() {
            assert!(begun.elapsed() < Duration::from_secs(10), "its child {child} lives on");
            std::thread::sleep(PAUSE);
        }
    }

    #[test]
    fn a_cause_is_one_line() {
        assert_eq!(cause("warning: x\nerror: no room: 5 of 6\n").unwrap(), "no room: 5 of 6");
        let panic = "thread 'main' panicked at src/x.rs:1:2:\nout of luck\\nException raised from\nnote: run with `RUST_BACKTRACE=1`";
        assert_eq!(cause(panic).unwrap(), "out of luck");
        assert_eq!(cause("first\n\nlast\n").unwrap(), "last");
        assert_eq!(cause(""), None);
    }
}
