//! What a worker is at, told in every heartbeat, and who of a group is behind.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::protocol::Beat;

/// What a worker is at; clones share it. The device thread writes it, heartbeats carry it.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Mutex<Position>>);

#[derive(Clone, Debug, Default)]
struct Position {
    operation: String,
    sequence: u64,
    micro_batch: u64,
    phase: String,
    done: u64,
    total: u64,
}

impl Progress {
    /// Operation in progress, its sequence number in its group, and the micro-batch it belongs to.
    pub fn set(&self, operation: &str, sequence: u64, micro_batch: u64) {
        let mut position = self.0.lock().expect("never held over a panic");
        if position.operation != operation {
            position.operation = operation.into();
        }
        (position.sequence, position.micro_batch) = (sequence, micro_batch);
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
        let position = self.0.lock().expect("never held over a panic").clone();
        let Position { operation, sequence, micro_batch, phase, done, total } = position;
        Beat { operation, sequence, micro_batch, phase, done, total }
    }
}

/// The last heartbeat of a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Empty between operations.
    pub operation: String,
    pub sequence: u64,
    pub micro_batch: u64,
    /// Of the work in progress, with `done` of `total` units; empty before the first.
    pub phase: String,
    pub done: u64,
    pub total: u64,
    /// When this position was first seen: how long the worker has made no progress.
    pub since: Instant,
}

impl Heartbeat {
    pub(super) fn new(beat: Beat, now: Instant) -> Heartbeat {
        let Beat { operation, sequence, micro_batch, phase, done, total } = beat;
        Heartbeat { operation, sequence, micro_batch, phase, done, total, since: now }
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

/// Ranks that hold up their group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    pub ranks: Vec<u32>,
    /// What they are at.
    pub operation: String,
    pub sequence: u64,
    /// What their peers wait in.
    pub awaited: u64,
}

/// Who of a group has stood still for `limit` while a peer is further on; none when all move, or all stand at one place.
pub fn stalled<'a>(
    group: impl IntoIterator<Item = (u32, &'a Heartbeat)>,
    limit: Duration,
    now: Instant,
) -> Option<Stall> {
    let group: Vec<_> = group.into_iter().collect();
    let awaited = group.iter().map(|(_, beat)| beat.sequence).max()?;
    let last = group.iter().map(|(_, beat)| beat.sequence).min()?;
    let behind: Vec<_> = group
        .iter()
        .filter(|(_, beat)| beat.sequence == last && last < awaited && now.duration_since(beat.since) >= limit)
        .collect();
    let operation = behind.first()?.1.operation.clone();
    Some(Stall { ranks: behind.iter().map(|(rank, _)| *rank).collect(), operation, sequence: last, awaited })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(sequence: u64, since: Instant) -> Heartbeat {
        let beat = Beat { operation: "all_gather layer 3".into(), sequence, ..Beat::default() };
        Heartbeat::new(beat, since)
    }

    #[test]
    fn who_is_behind_is_named_after_the_limit() {
        let (start, limit) = (Instant::now(), Duration::from_secs(30));
        let group = [(0, at(18, start)), (1, at(17, start)), (2, at(18, start))];
        let group = || group.iter().map(|(rank, beat)| (*rank, beat));
        assert_eq!(stalled(group(), limit, start + Duration::from_secs(29)), None);
        let stall = stalled(group(), limit, start + limit).unwrap();
        assert_eq!((stall.ranks, stall.sequence, stall.awaited), (vec![1], 17, 18));
        let together = [at(5, start), at(5, start)];
        assert_eq!(stalled(together.iter().map(|beat| (0, beat)), limit, start + 2 * limit), None);
    }

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
