//! How far the ranks of a group are, told through the store every second, and who makes no progress.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::ProcessGroup;
use super::meeting::Generation;
use crate::error::{Error, Result};

/// What a rank is doing in a group, as its peers and heartbeats see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The last operation begun, and its number from 1; 0 before the first.
    pub operation: String,
    pub sequence: u64,
    /// The micro-batch in work, from 1; 0 outside of passes.
    pub micro_batch: u64,
    /// Counts what the rank finishes between operations (layers, micro-batches).
    pub work: u64,
}

impl Standing {
    fn from_line(line: &str) -> Option<(u64, Standing)> {
        let mut parts = line.splitn(5, ' ');
        let mut number = || parts.next()?.parse().ok();
        let (beat, sequence, micro_batch, work) = (number()?, number()?, number()?, number()?);
        Some((beat, Standing { operation: parts.next()?.into(), sequence, micro_batch, work }))
    }

    fn to_line(&self, beat: u64) -> String {
        let Standing { operation, sequence, micro_batch, work } = self;
        format!("{beat} {sequence} {micro_batch} {work} {operation}")
    }
}

impl std::fmt::Display for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Standing { sequence: 0, .. } => write!(f, "has begun nothing"),
            Standing { operation, sequence, micro_batch: 0, .. } => write!(f, "is at {operation} (#{sequence})"),
            Standing { operation, sequence, micro_batch, .. } => {
                write!(f, "is at {operation} (#{sequence}, micro-batch {micro_batch})")
            }
        }
    }
}

/// Where a rank writes down what it does.
#[derive(Debug, Default)]
pub(super) struct Journal {
    operation: Mutex<String>,
    sequence: AtomicU64,
    pub micro_batch: AtomicU64,
    pub work: AtomicU64,
    pub bytes_sent: AtomicU64,
    /// Operations begun whose end nobody has seen yet.
    pub in_flight: AtomicU64,
}

impl Journal {
    /// Notes that an operation begins, and numbers it.
    pub fn begin(&self, operation: &str, bytes_sent: u64) -> u64 {
        let mut last = self.operation.lock().expect("never poisoned");
        *last = operation.into();
        self.bytes_sent.fetch_add(bytes_sent, Ordering::Relaxed);
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.sequence.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub fn standing(&self) -> Standing {
        let operation = self.operation.lock().expect("never poisoned");
        Standing {
            operation: operation.clone(),
            sequence: self.sequence.load(Ordering::Relaxed),
            micro_batch: self.micro_batch.load(Ordering::Relaxed),
            work: self.work.load(Ordering::Relaxed),
        }
    }
}

/// Tells peers every second how far this rank is.
pub(super) struct Pulse {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Pulse {
    const EVERY: Duration = Duration::from_secs(1);
    const MISSED: Duration = Duration::from_secs(4);

    pub fn start(generation: Generation, rank: usize, journal: Arc<Journal>) -> Pulse {
        let stop = Arc::<AtomicBool>::default();
        let stopped = stop.clone();
        let key = generation.key(&format!("standing/{rank}"));
        let run = move || {
            for beat in 0.. {
                if stopped.load(Ordering::Relaxed)
                    || generation.store().set(&key, journal.standing().to_line(beat).as_bytes()).is_err()
                {
                    return; // the meeting point is gone: whoever waits hears it from the collective
                }
                std::thread::park_timeout(Pulse::EVERY);
            }
        };
        let thread = std::thread::Builder::new().name("pulse".into()).spawn(run).ok();
        Pulse { stop, thread }
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// What a rank's peers last heard of it.
#[derive(Clone)]
struct Sighting {
    standing: Option<Standing>,
    moved: Instant,
    beat: u64,
    heard: Instant,
}

impl Sighting {
    fn note(&mut self, seen: Option<(u64, Standing)>) {
        let now = Instant::now();
        let beat = seen.as_ref().map_or(self.beat, |(beat, _)| *beat);
        let standing = seen.map(|(_, standing)| standing);
        if standing != self.standing {
            (self.standing, self.moved) = (standing, now);
        }
        if beat != self.beat {
            (self.beat, self.heard) = (beat, now);
        }
    }

    fn describe(&self, rank: usize) -> String {
        let place = self.standing.as_ref().map_or_else(|| "has begun nothing".into(), Standing::to_string);
        let silent = self.heard.elapsed();
        // A rank that computes still beats; one that is gone, or frozen, does not.
        let silence = if self.standing.is_some() && silent > Pulse::MISSED {
            format!(" and its heartbeat stopped {} s ago", silent.as_secs())
        } else {
            String::new()
        };
        format!("rank {rank} {place}{silence}")
    }
}

/// Judges a wait by how the other ranks stand.
pub(super) struct StallWatch<'a> {
    group: &'a ProcessGroup,
    generation: &'a Generation,
    patience: Duration,
    /// Of the operation that is waited for.
    sequence: u64,
    seen: Vec<Sighting>,
}

impl<'a> StallWatch<'a> {
    pub const INTERVAL: Duration = Duration::from_millis(500);

    pub fn new(group: &'a ProcessGroup, generation: &'a Generation, patience: Duration, sequence: u64) -> Self {
        let now = Instant::now();
        let unseen = Sighting { standing: None, moved: now, beat: 0, heard: now };
        StallWatch { group, generation, patience, sequence, seen: vec![unseen; group.size()] }
    }

    /// Notes how the others stand.
    ///
    /// # Errors
    /// A rank that has not moved for too long: the one behind, else (all are here and nothing moves) every other.
    pub fn look(&mut self, operation: &str) -> Result<()> {
        let others: Vec<usize> = (0..self.group.size()).filter(|&rank| rank != self.group.rank()).collect();
        for &rank in &others {
            let seen = self.standing_of(rank);
            self.seen[rank].note(seen);
        }
        let behind = |rank: &usize| self.seen[*rank].standing.as_ref().is_none_or(|s| s.sequence < self.sequence);
        let stuck = |rank: &usize| self.seen[*rank].moved.elapsed() > self.patience;
        let mut late: Vec<usize> = others.iter().copied().filter(|rank| behind(rank) && stuck(rank)).collect();
        if late.is_empty() && others.iter().all(|rank| !behind(rank) && stuck(rank)) {
            late = others;
        }
        if late.is_empty() {
            return Ok(());
        }
        let places: Vec<String> = late.iter().map(|&rank| self.seen[rank].describe(rank)).collect();
        Err(Error::Refused(format!(
            "{} waits, and for {} s there is no progress: {}",
            self.group.place_of(operation, self.sequence),
            self.patience.as_secs(),
            places.join(", ")
        )))
    }

    /// Who has left the group or does not beat any more, a few seconds from now. Of many ranks it asks none: each of them
    /// asking all others would be too much for the store.
    pub fn find_gone(&self) -> Vec<String> {
        const ASKED: usize = 64;
        let others: Vec<usize> = (0..self.group.size()).filter(|&rank| rank != self.group.rank()).collect();
        if others.len() > ASKED {
            return Vec::new();
        }
        let before: Vec<Option<(u64, Standing)>> = others.iter().map(|&rank| self.standing_of(rank)).collect();
        std::thread::sleep(Pulse::EVERY * 2 + StallWatch::INTERVAL);
        let tell = |(&rank, before): (&usize, Option<(u64, Standing)>)| match (before, self.standing_of(rank)) {
            (Some((beat, last)), Some((again, _))) if beat == again => {
                Some(format!("rank {rank} is gone: it {}", last.to_string().replacen("is at", "was last at", 1)))
            }
            (Some(_), None) => Some(format!("rank {rank} has left the group")),
            _ => None,
        };
        others.iter().zip(before).filter_map(tell).collect()
    }

    fn standing_of(&self, rank: usize) -> Option<(u64, Standing)> {
        let key = self.generation.key(&format!("standing/{rank}"));
        let store = self.generation.store();
        let line = store.has(&key).ok()?.then(|| store.get(&key, 1000).ok())??;
        Standing::from_line(std::str::from_utf8(&line).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standing_survives_the_store() {
        let standing = Standing { operation: "gather layer 4".into(), sequence: 17, micro_batch: 2, work: 300 };
        assert_eq!(Standing::from_line(&standing.to_line(9)), Some((9, standing.clone())));
        assert_eq!(standing.to_string(), "is at gather layer 4 (#17, micro-batch 2)");
        for damaged in ["", "1 2 3", "1 2 x 4 gather", "gather"] {
            assert_eq!(Standing::from_line(damaged), None, "{damaged}");
        }
    }
}
