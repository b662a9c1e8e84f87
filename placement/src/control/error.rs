//! What goes wrong between driver and workers, in words a person can act on.

use std::error::Error as StdError;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Who an error is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub rank: u32,
    /// Where it dialled in from.
    pub address: String,
    pub host: String,
    pub pid: u32,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "worker rank {} at {} (host {}, pid {})", self.rank, self.address, self.host, self.pid)
    }
}

/// Why a worker was not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// Another living worker has this rank.
    RankTaken,
    /// Made of other sources.
    OtherBuild,
    /// Its rank is not one of the run's.
    RankOutOfRange,
    /// It was told another number of workers.
    OtherWorldSize,
    /// Its certificate is another rank's.
    OtherCertificate,
    /// A newer incarnation has the rank.
    Stale,
    /// The run is over already.
    Over,
}

impl RefusalKind {
    /// Whether waiting cannot help: the run was started wrongly.
    pub fn is_fatal(self) -> bool {
        !matches!(self, RefusalKind::Stale | RefusalKind::Over)
    }
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum ControlError {
    /// The worker is gone, frozen, cut off or replaced. The call may have run.
    #[error("{peer}: {operation}: lost: {cause}{}", last_lines(.stderr))]
    Lost { peer: Arc<Peer>, operation: String, cause: String, stderr: Vec<String> },
    /// No answer in time. The call may still be running.
    #[error("{peer}: {operation}: no answer within {} s; it is at {progress}{}", seconds(.deadline), last_lines(.stderr))]
    Deadline { peer: Arc<Peer>, operation: String, deadline: Duration, progress: String, stderr: Vec<String> },
    /// Too much waits for this worker already.
    #[error("{peer}: {operation}: refused: {waiting}; wait for answers before asking more")]
    Busy { peer: Arc<Peer>, operation: String, waiting: String },
    /// A body beyond the limit.
    #[error("{peer}: {operation}: a body of {bytes} bytes is over the limit of {limit}; send it in parts")]
    TooLarge { peer: Arc<Peer>, operation: String, bytes: usize, limit: usize },
    /// The worker's own error.
    #[error("{peer}: {operation}: {cause}")]
    Worker { peer: Arc<Peer>, operation: String, cause: String },
    /// The driver did not let this worker in.
    #[error("the driver at {driver} refused this worker: {reason}")]
    Refused { driver: String, reason: String },
    /// The driver at this address is of another run than the credentials.
    #[error(
        "the driver at {driver} is not of the run that these credentials are of ({cause}): use what it wrote itself"
    )]
    OtherRun { driver: String, cause: String },
    /// The run ended badly while this worker was in it.
    #[error("the driver at {driver} let this worker go: {reason}")]
    LetGo { driver: String, reason: String },
    /// No driver there, for as long as was allowed.
    #[error(
        "no driver at {driver} after {} s of trying: {cause}; check the address, and that the driver still waits",
        seconds(.tried)
    )]
    Unreachable { driver: String, tried: Duration, cause: String },
    /// The stream to the driver ended.
    #[error("the driver at {driver} is lost: {cause}")]
    DriverLost { driver: String, cause: String },
    /// The driver cannot listen there.
    #[error("cannot listen on {address}: {cause}; {advice}")]
    Listen { address: String, cause: String, advice: &'static str },
    /// Not all workers came.
    #[error(
        "{} of {expected} workers did not join {address} within {} s: missing {}; look at their logs, or raise \
         placement.join_timeout_s", missing.len(), seconds(.waited), ranks(.missing)
    )]
    Missing { address: String, expected: u32, missing: Vec<u32>, waited: Duration },
    /// A worker that can never join this run tried to.
    #[error("{reason}")]
    Misconfigured { kind: RefusalKind, reason: String },
    /// A worker of ours ended before it joined.
    #[error("worker rank {rank} (pid {pid}) ended before it joined: {ending}{}", last_lines(.stderr))]
    EndedEarly { rank: u32, pid: u32, ending: String, stderr: Vec<String> },
    /// Credentials that cannot be used.
    #[error("{path}: {cause}", path = path.display())]
    Credentials { path: PathBuf, cause: String },
    /// Making keys or certificates failed.
    #[error("making the run's certificates: {0}")]
    Certificates(String),
    /// The driver itself is shutting down.
    #[error("the control plane has stopped")]
    Stopped,
}

impl ControlError {
    /// The loss of a worker in the words of an error that names the call itself.
    pub fn without_operation(&self) -> String {
        match self {
            ControlError::Lost { peer, cause, stderr, .. } => format!("{peer}: {cause}{}", last_lines(stderr)),
            error => error.to_string(),
        }
    }
}

fn last_lines(lines: &[String]) -> String {
    if lines.is_empty() { String::new() } else { format!("; its last lines:\n    {}", lines.join("\n    ")) }
}

/// How a cause begins that says no more than that.
pub(crate) const STREAM_BROKE: &str = "its stream broke";

/// Why a stream broke, down to the operating system's word.
pub(crate) fn stream_broke(status: &tonic::Status) -> String {
    let text = with_causes(format!("{STREAM_BROKE}: {}", status.message()), status);
    text.split(": https://").next().unwrap_or_default().into() // rustls refers to its manual
}

/// What is said of an error, and what it came from, as far as that is not said yet.
pub(super) fn with_causes(said: String, error: &(dyn StdError + 'static)) -> String {
    std::iter::successors(error.source(), |&error| error.source()).fold(said, |said, error| {
        let cause = error.to_string();
        if said.contains(&cause) { said } else { format!("{said}: {cause}") }
    })
}

/// Whole seconds as `30`, others as `0.25`.
pub(crate) fn seconds(duration: &Duration) -> String {
    format!("{:.3}", duration.as_secs_f64()).trim_end_matches('0').trim_end_matches('.').to_string()
}

/// `0-3, 7, 9-10`: a thousand missing ranks fit on a line.
pub(crate) fn ranks(ranks: &[u32]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(rank) => *last = rank,
            _ => runs.push((rank, rank)),
        }
    }
    let text = |(first, last): (u32, u32)| match last - first {
        0 => format!("{first}"),
        1 => format!("{first}, {last}"),
        _ => format!("{first}-{last}"),
    };
    let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
    format!("{noun} {}", runs.into_iter().map(text).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_written_as_runs() {
        assert_eq!(ranks(&[0, 1, 2, 3, 7, 9, 10]), "ranks 0-3, 7, 9, 10");
        assert_eq!(ranks(&[5]), "rank 5");
        assert_eq!(seconds(&Duration::from_millis(250)), "0.25");
        assert_eq!(seconds(&Duration::from_secs(600)), "600");
    }

    #[test]
    fn an_error_names_rank_address_operation_cause_and_last_lines() {
        let peer = Peer { rank: 3, address: "10.0.0.7:41234".into(), host: "gpu07".into(), pid: 12 };
        let error = ControlError::Lost {
            peer: Arc::new(peer),
            operation: "update actor".into(),
            cause: "killed by signal 9".into(),
            stderr: vec!["thread 'cpu-3' panicked".into()],
        };
        assert_eq!(
            error.to_string(),
            "worker rank 3 at 10.0.0.7:41234 (host gpu07, pid 12): update actor: lost: killed by signal 9; its last \
             lines:\n    thread 'cpu-3' panicked"
        );
    }
}
