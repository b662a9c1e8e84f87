//! A device without room: what holds its memory by the ledger, and the nearest change after which the work needs less.

use echelon_core::Error;
use echelon_core::memory::Phase;
use echelon_core::role::Role;
use echelon_core::workload::Workload;
use echelon_placement::ledger::{Entry, Place, RoleJob};

/// What a change must save of a phase's bytes to be worth a try.
const WORTH_IT: f64 = 0.05;

/// Entries that are named; the rest is told as one number.
const NAMED: usize = 4;

/// Adds to an error that says so what holds the device's memory, and what to change; `jobs` are the roles as they are held.
pub fn explained(error: Error, jobs: &[RoleJob]) -> Error {
    let (Error::Worker { role, verb, .. }, Error::OutOfMemory(_)) = (&error, error.root()) else { return error };
    let role = *role;
    let Some(phase) = Phase::of(role, verb) else { return error };
    let change = nearest_change(role, phase, jobs)
        .map_or("no key of this recipe makes it need less: more or larger devices would".into(), |change| {
            format!("nearest change: {change}")
        });
    Error::Refused(format!(
        "{error}; by the memory ledger phase `{}` is to hold {}; {change}",
        phase.name(),
        held(role, phase, jobs)
    ))
}

/// What is on the device in a phase: all that stays, and the pass of the role whose turn it is.
fn entries(role: Role, phase: Phase, jobs: &[RoleJob]) -> Vec<Entry> {
    let there = |entry: &Entry| {
        entry.place == Place::Device && entry.phases.contains(&phase) && (!entry.transient || entry.role == role)
    };
    jobs.iter().flat_map(RoleJob::entries).filter(there).collect()
}

fn bytes(role: Role, phase: Phase, jobs: &[RoleJob]) -> u64 {
    entries(role, phase, jobs).iter().map(|entry| entry.bytes).sum()
}

fn held(role: Role, phase: Phase, jobs: &[RoleJob]) -> String {
    let mut entries = entries(role, phase, jobs);
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.bytes));
    let named =
        entries.iter().take(NAMED).map(|entry| format!("{} of the {} {}", size(entry.bytes), entry.role, entry.name));
    let mut parts: Vec<String> = named.collect();
    let rest: u64 = entries.iter().skip(NAMED).map(|entry| entry.bytes).sum();
    if rest > 0 {
        parts.push(format!("{} of other things", size(rest)));
    }
    parts.join(", ")
}

/// A change of one key, and what the phase then holds of the ledger's bytes.
struct Change {
    words: String,
    bytes: u64,
}

/// Of the changes that save something in this phase the one that costs least: they stand in the order of what they cost.
fn nearest_change(role: Role, phase: Phase, jobs: &[RoleJob]) -> Option<String> {
    let now = bytes(role, phase, jobs);
    let work = jobs.first()?.workload;
    let most = |work: &Workload| work.sampling.as_ref().map_or(0, |sampling| sampling.max_sequences);
    let with = |words: String, change: &dyn Fn(&mut Workload), held: &dyn Fn(&mut RoleJob)| {
        let mut changed = work.clone();
        change(&mut changed);
        let jobs: Vec<RoleJob> = jobs
            .iter()
            .map(|job| {
                let mut job = RoleJob { workload: &changed, slots: job.slots.min(most(&changed)), ..*job };
                held(&mut job);
                job
            })
            .collect();
        Change { words, bytes: bytes(role, phase, &jobs) }
    };
    let as_held = |_: &mut RoleJob| {};
    let mut changes = Vec::new();
    if phase == Phase::GENERATE {
        let half = jobs.iter().filter(|job| job.role == Role::Generator).map(|job| job.slots).max().unwrap_or(2) / 2;
        if half >= 1 {
            let fewer = |w: &mut Workload| w.sampling.iter_mut().for_each(|sampling| sampling.max_sequences = half);
            changes.push(with(format!("generation.max_sequences = {half}"), &fewer, &as_held));
        }
    } else {
        let half = (work.tokens_per_micro_batch / 2).max(work.max_unit_tokens());
        let words = format!("train.tokens_per_micro_batch = {half}");
        changes.push(with(words, &|w| w.tokens_per_micro_batch = half, &as_held));
        let words = "train.activation_checkpointing = true".to_string();
        changes.push(with(words, &|w| w.activation_checkpointing = true, &as_held));
    }
    changes.push(with("train.adam_offload = true".into(), &|_| {}, &|job| job.adam_offload = true));
    if jobs.iter().any(|job| job.ranks > 1) {
        changes.push(with("train.zero_stage = 3".into(), &|_| {}, &|job| job.zero_stage = 3));
    }
    let saves = |change: &Change| (change.bytes as f64) < now as f64 * (1.0 - WORTH_IT);
    let best = changes.into_iter().find(saves)?;
    Some(format!("{} (then {} instead of {})", best.words, size(best.bytes), size(now)))
}

fn size(bytes: u64) -> String {
    let mib = bytes as f64 / (1 << 20) as f64;
    if mib < 1024.0 { format!("{mib:.0} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}
