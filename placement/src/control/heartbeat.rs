//! What a worker is at, told in every heartbeat.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::protocol::Beat;

/// What a worker is at; clones share it. The device thread writes it, heartbeats carry it.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Mutex<Beat>>);

impl Progress {
    /// Operation in progress, its sequence number in its group, the micro-batch it belongs to, and a count of what is
    /// finished between operations.
    pub fn set(&self, operation: &str, sequence: u64, micro_batch: u64, work: u64) {
        let mut position = self.0.lock().expect("never held over a panic");
        if position.operation != operation {
            position.operation = operation.into();
        }
        (position.sequence, position.micro_batch, position.work) = (sequence, micro_batch, work);
    }

    /// Phase in progress, with `done` of its `total` units.
    pub fn phase(&self, phase: &str, done: u64, total: u64) {
        let mut position = self.0.lock().expect("never held over a panic");
        if position.phase != phase {
            position.phase = phase.into();
        }
        (position.done, position.total) = (done, total);
    }

    pub(super) fn beat(&self) -> Beat {
        self.0.lock().expect("never held over a panic").clone()
    }
}

/// The last heartbeat of a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Empty between operations.
    pub operation: String,
    pub sequence: u64,
    pub micro_batch: u64,
    /// Counts what is finished between operations.
    pub work: u64,
    /// Of the phase in progress, with `done` of `total` units; empty before the first.
    pub phase: String,
    pub done: u64,
    pub total: u64,
    /// When this position was first seen: how long the worker has made no progress.
    pub since: Instant,
}

impl Heartbeat {
    pub(super) fn new(beat: Beat, now: Instant) -> Heartbeat {
        let Beat { operation, sequence, micro_batch, work, phase, done, total } = beat;
        Heartbeat { operation, sequence, micro_batch, work, phase, done, total, since: now }
    }

    /// Takes up a newer heartbeat; the clock runs on where nothing has changed.
    pub(super) fn update(&mut self, beat: Beat, now: Instant) {
        let next = Heartbeat::new(beat, now);
        if (Heartbeat { since: self.since, ..next.clone() }) != *self {
            *self = next;
        }
    }
}

impl fmt::Display for Heartbeat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operation = if self.operation.is_empty() { "no operation" } else { &self.operation };
        let seconds = self.since.elapsed().as_secs_f64();
        write!(f, "{operation} {} (micro-batch {}) for {seconds:.1} s", self.sequence, self.micro_batch)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_clock_runs_on_without_progress() {
        let start = Instant::now();
        let beat = |micro_batch| Beat { operation: "forward".into(), sequence: 1, micro_batch, ..Beat::default() };
        let mut heartbeat = Heartbeat::new(beat(0), start);
        heartbeat.update(beat(0), start + Duration::from_secs(1));
        assert_eq!(heartbeat.since, start);
        heartbeat.update(beat(1), start + Duration::from_secs(2));
        assert_eq!(heartbeat.since, start + Duration::from_secs(2));
    }
}
