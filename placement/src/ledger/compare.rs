//! The ledger against an allocator: every role and phase that a rank was metered at, for what it really worked on.

use echelon_core::memory::{Load, MemoryUse, Phase, Work};
use echelon_core::role::Role;
use serde::{Deserialize, Serialize};

use super::{Entry, Item, Loads, Place, RoleJob};

/// What the ledger says and what was measured, of one role in one phase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    pub role: Role,
    pub phase: Phase,
    /// Bytes that stay between verbs.
    pub ledger_resident: u64,
    pub measured_resident: u64,
    /// Bytes of the pass on top.
    pub ledger_transient: u64,
    pub measured_transient: u64,
    /// The ledger's entries for this load.
    pub entries: Vec<Entry>,
}

impl Comparison {
    /// Of one metered role and phase; `job` says how the role is held, the load comes from the measurement.
    pub fn new(job: &RoleJob, measured: &MemoryUse) -> Comparison {
        let mut loads = job.most();
        match (measured.load, measured.phase.work) {
            (Load::Pass(pass), Work::Score) => loads.score = pass,
            (Load::Pass(pass), _) => loads.train = pass,
            (Load::Decode(decode), _) => loads.decode = decode,
        }
        let entries = job.entries_at(&loads);
        Comparison::of_entries(entries, measured)
    }

    /// Of given ledger entries.
    pub fn of_entries(entries: Vec<Entry>, measured: &MemoryUse) -> Comparison {
        let here = |entry: &Entry| entry.place == Place::Device && entry.phases.contains(&measured.phase);
        let entries: Vec<Entry> = entries.into_iter().filter(here).collect();
        let sum = |transient: bool| {
            entries.iter().filter(|entry| entry.transient == transient).map(|entry| entry.bytes).sum::<u64>()
        };
        Comparison {
            role: measured.role,
            phase: measured.phase,
            ledger_resident: sum(false),
            measured_resident: measured.resident.total(),
            ledger_transient: sum(true),
            measured_transient: measured.transient(),
            entries,
        }
    }

    pub fn ledger(&self) -> u64 {
        self.ledger_resident + self.ledger_transient
    }

    pub fn measured(&self) -> u64 {
        self.measured_resident + self.measured_transient
    }

    /// By how much the ledger is off.
    pub fn error(&self) -> f64 {
        relative(self.ledger(), self.measured())
    }

    /// Bytes between the two.
    pub fn difference(&self) -> u64 {
        self.ledger().abs_diff(self.measured())
    }

    /// The largest entry of the part that is off: where to look first.
    pub fn suspect(&self) -> Option<&Entry> {
        let off_transient = self.ledger_transient.abs_diff(self.measured_transient)
            >= self.ledger_resident.abs_diff(self.measured_resident);
        let part = self.entries.iter().filter(|entry| entry.transient == off_transient);
        part.max_by_key(|entry| entry.bytes)
    }
}

/// By how much the ledger is off, in parts of what was measured; above 0 where it says too much.
pub fn relative(ledger: u64, measured: u64) -> f64 {
    match (ledger, measured) {
        (0, 0) => 0.0,
        (_, 0) => f64::INFINITY,
        (ledger, measured) => ledger as f64 / measured as f64 - 1.0,
    }
}

impl RoleJob<'_> {
    /// [`RoleJob::entries`] for what goes through the model at once.
    pub fn entries_at(&self, loads: &Loads) -> Vec<Entry> {
        let (phases, mut entries) = (self.workload.phases(), Vec::new());
        self.items_at(loads, &mut |item: Item| entries.push(Entry::new(self.role, item, &phases)));
        entries
    }
}
