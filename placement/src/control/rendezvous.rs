//! Waiting until every worker of the run has joined.

use std::time::{Duration, Instant};

use super::error::{ControlError, ranks, seconds};
use super::proxy::RemoteWorker;
use super::server::ControlServer;

/// How long to wait for workers, and how often to say who is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rendezvous {
    pub timeout: Duration,
    pub remind: Duration,
}

/// How soon the end of a process that has not joined is noticed.
const LOOK: Duration = Duration::from_millis(50);

impl Rendezvous {
    /// For workers that this process starts: nothing has to be fetched or scheduled.
    pub const STARTED_HERE: Rendezvous =
        Rendezvous { timeout: Duration::from_secs(30), remind: Duration::from_secs(30) };

    /// For workers that a scheduler or a person starts: `placement.join_timeout_s`.
    pub fn by_scheduler(join_timeout: Duration) -> Rendezvous {
        Rendezvous { timeout: join_timeout, remind: Duration::from_secs(30) }
    }
}

/// Waits until all ranks have joined; gives them in order. `missing` is told a line now and then.
///
/// # Errors
/// [`ControlError::Missing`] names who did not come; [`ControlError::Misconfigured`] and [`ControlError::EndedEarly`] as
/// soon as waiting cannot help.
pub async fn rendezvous(
    server: &ControlServer,
    rules: Rendezvous,
    missing: impl FnMut(&str),
) -> Result<Vec<RemoteWorker>, ControlError> {
    let outcome = meet(server, rules, missing).await;
    server.met();
    outcome
}

async fn meet(
    server: &ControlServer,
    rules: Rendezvous,
    mut missing: impl FnMut(&str),
) -> Result<Vec<RemoteWorker>, ControlError> {
    let mut changes = server.roster();
    let begun = Instant::now();
    let mut reminded = begun;
    loop {
        let absent = {
            let roster = changes.borrow_and_update();
            if let Some(error) = &roster.misconfigured {
                return Err(error.clone());
            }
            let absent: Vec<u32> =
                (0..server.num_workers()).filter(|rank| !roster.workers.contains_key(rank)).collect();
            if absent.is_empty() {
                return Ok(roster.workers.values().cloned().collect());
            }
            absent
        };
        if let Some(error) = server.output().and_then(|output| output.ended()) {
            return Err(error);
        }
        let (waited, expected) = (begun.elapsed(), server.num_workers());
        if waited >= rules.timeout {
            let address = server.address().to_string();
            return Err(ControlError::Missing { address, expected, missing: absent, waited: rules.timeout });
        }
        if reminded.elapsed() >= rules.remind {
            reminded = Instant::now();
            let (joined, limit) = (expected as usize - absent.len(), seconds(&rules.timeout));
            let waited = waited.as_secs();
            missing(&format!(
                "{joined} of {expected} workers have joined {} after {waited} s of at most {limit} s; missing {}",
                server.address(),
                ranks(&absent)
            ));
        }
        let next = (rules.timeout - waited).min(rules.remind.saturating_sub(reminded.elapsed()));
        let pause = if server.output().is_some() { next.min(LOOK) } else { next };
        let _ = tokio::time::timeout(pause, changes.changed()).await;
    }
}
