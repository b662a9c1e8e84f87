//! The memory ledger against the allocator's own figures, after every step of a run.

use std::collections::HashSet;

use echelon_core::Error;
use echelon_core::memory::{MemoryReport, MemoryUse, Phase};
use echelon_core::role::Role;
use echelon_core::workload::Workload;
use echelon_placement::ledger::compare::Comparison;
use echelon_placement::ledger::{ModelSizes, RoleJob};
use echelon_placement::tier::ROLES;
use tch::Device;

use crate::run::out_of_memory;
use echelon_monitor::Metrics;
use echelon_placement::layout::Layout;
use echelon_roles::models::Held;

/// How far the ledger may be off before a person is told.
const TOLERANCE: f64 = 0.10;

/// Differences below this are told nobody: a batch's own tensors, and what the driver keeps of it.
const WORTH_TELLING: u64 = 16 << 20;

/// The ledger of this run, as its roles are held.
pub struct MemoryLedger {
    workload: Workload,
    /// By role.
    models: [Option<ModelSizes>; 5],
    layout: Layout,
    on_cpu: bool,
    told: HashSet<(Role, Phase)>,
}

impl MemoryLedger {
    pub fn new(workload: Workload, held: Held, layout: &Layout) -> MemoryLedger {
        MemoryLedger {
            models: ROLES.map(|role| workload.model(role).map(|model| ModelSizes::of(&model.shape))),
            layout: layout.clone(),
            on_cpu: held.pass.device == Device::Cpu,
            workload,
            told: HashSet::new(),
        }
    }

    /// How a role is held on each rank; None for one without a model.
    fn job(&self, role: Role) -> Option<RoleJob<'_>> {
        let model = self.models[role as usize].as_ref()?;
        let group = self.layout.group(role);
        let ranks = group.workers.len();
        Some(RoleJob {
            role,
            model,
            workload: &self.workload,
            ranks,
            zero_stage: group.zero_stage,
            adam_offload: group.adam_offload && !self.on_cpu,
            tensor_parallel: group.tensor_parallel,
            slots: self.workload.slots_wanted(ranks / group.tensor_parallel, 0).unwrap_or(0),
            shares_weights: self.layout.shares_weights(),
            moves_to_host: group.moves_to_host,
            on_cpu: self.on_cpu,
        })
    }

    /// An error that says that a device has no room, with what holds its memory and what to change; any other as it is.
    pub fn explained(&self, error: Error) -> Error {
        let held = self.layout.groups.iter().filter_map(|group| self.job(group.role));
        out_of_memory::explained(error, &held.collect::<Vec<_>>())
    }

    /// The ledger beside what a rank was metered at, for what it worked on.
    pub fn compare(&self, uses: &[MemoryUse]) -> Vec<Comparison> {
        let of = |measured: &MemoryUse| Some(Comparison::new(&self.job(measured.role)?, measured));
        uses.iter().filter_map(of).collect()
    }

    /// Sets `perf/memory_*`; of several ranks the largest. What a person should know comes back, each thing once in a run.
    pub fn record(&mut self, metrics: &mut Metrics, reports: &[MemoryReport]) -> Vec<String> {
        let most = |of: fn(&MemoryReport) -> u64| reports.iter().map(of).max().unwrap_or(0) as f64;
        metrics
            .set("perf/memory_peak_bytes", most(|report| report.peak))
            .set("perf/memory_mapped_bytes", most(|report| report.mapped))
            .set("perf/memory_live_bytes", most(|report| report.live))
            .set("perf/memory_kept_bytes", most(|report| report.kept))
            .set("perf/memory_runtime_bytes", most(|report| report.runtime))
            .set("perf/memory_pinned_bytes", most(|report| report.pinned));
        let comparisons: Vec<Comparison> = reports.iter().flat_map(|report| self.compare(&report.uses)).collect();
        let mut worst: f64 = 0.0;
        for found in &comparisons {
            let name = format!("perf/memory_{}_{}_bytes", found.role, found.phase.short_name());
            let before = metrics.get(&name).unwrap_or(0.0);
            metrics.set(name, before.max(found.measured() as f64));
            worst = worst.max(found.error().abs());
        }
        metrics.set("perf/memory_ledger_error_max", worst);
        let off = comparisons.iter().filter(|found| is_worth_telling(found));
        off.filter(|found| self.told.insert((found.role, found.phase))).map(warning).collect()
    }
}

fn is_worth_telling(found: &Comparison) -> bool {
    found.error().abs() > TOLERANCE && found.difference() > WORTH_TELLING
}

fn warning(found: &Comparison) -> String {
    let mib = |bytes: u64| format!("{:.0} MiB", bytes as f64 / (1 << 20) as f64);
    let suspect = found
        .suspect()
        .map_or(String::new(), |entry| format!(", with {} for {} ({})", mib(entry.bytes), entry.name, entry.formula));
    format!(
        "memory: the {} took {} in phase `{}`, where {} were planned{suspect}: off by {:+.0} %; the run goes on: allow for it in plans \
         of this model, and please report this line",
        found.role,
        mib(found.measured()),
        found.phase.name(),
        mib(found.ledger()),
        100.0 * found.error(),
    )
}

#[cfg(test)]
mod tests {
    use echelon_core::memory::{Load, PassLoad, StateBytes};
    use echelon_placement::ledger::{Entry, Place};

    use super::*;

    #[test]
    fn a_person_is_told_what_is_off_and_by_how_much() {
        let entry = |name: &'static str, mib: u64, transient| Entry {
            role: Role::Critic,
            name: name.into(),
            bytes: mib << 20,
            formula: "a formula".into(),
            place: Place::Device,
            transient,
            phases: vec![Phase::SCORE],
        };
        let measured = MemoryUse {
            role: Role::Critic,
            phase: Phase::SCORE,
            resident: StateBytes { weights: 100 << 20, ..StateBytes::default() },
            before: 300 << 20,
            peak: 400 << 20,
            after: 300 << 20,
            load: Load::Pass(PassLoad::default()),
        };
        let found = |activations| {
            Comparison::of_entries(
                vec![entry("weights", 100, false), entry("activations", activations, true)],
                &measured,
            )
        };
        assert!(!is_worth_telling(&found(115)));
        assert!(is_worth_telling(&found(125)));
        let told = warning(&found(150));
        let expected = "memory: the critic took 200 MiB in phase `score`, where 250 MiB were planned, with 150 MiB for activations \
                        (a formula): off by +25 %; the run goes on";
        assert!(told.starts_with(expected), "{told}");
    }
}
