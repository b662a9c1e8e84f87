//! A plan as text.

use std::fmt::{self, Write};

use echelon_core::memory::Phase;
use echelon_core::role::Role;

use super::{DeviceRange, GroupPlan, Plan};
use crate::ledger::Place;

/// Bytes in binary units, three figures.
pub(super) fn bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ if value < 10.0 => format!("{value:.2} {}", units[unit]),
        _ if value < 100.0 => format!("{value:.1} {}", units[unit]),
        _ => format!("{value:.0} {}", units[unit]),
    }
}

/// Such as "134.5 million" or "13.02 billion".
pub(super) fn params(params: u64) -> String {
    match params {
        0..1_000_000_000 => format!("{:.1} million", params as f64 / 1e6),
        _ => format!("{:.2} billion", params as f64 / 1e9),
    }
}

/// Such as "1 device" or "2 devices".
pub(super) fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// Seconds, three figures.
pub(super) fn seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 10.0 => format!("{s:.1} s"),
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.1} ms", s * 1e3),
        s => format!("{:.0} µs", s * 1e6),
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let params = params(self.actor_params);
        let Plan { cluster, tier, tier_reason, .. } = self;
        writeln!(f, "{cluster}, tier {tier} ({tier_reason}; the actor has {params} parameters)")?;
        writeln!(f, "host memory of a node: {}", self.host_memory)?;
        write_kept(f, self.kept.as_deref())?;
        for group in &self.groups {
            writeln!(f)?;
            group.write(f)?;
        }
        if self.idle_devices > 0 {
            writeln!(f, "\n{} devices without a role: {}", self.idle_devices, self.idle_reason)?;
        }
        if let Some(most) = &self.page_locked {
            writeln!(f, "\npage-locked host memory of a node: {most}")?;
        }
        let s = &self.seconds;
        let phases = [
            ("generate", s.generate),
            ("score", s.score),
            ("train", s.train),
            ("sync", s.sync),
            ("to host and back", s.switch),
            ("overhead", s.overhead),
        ];
        let shown =
            phases.iter().filter(|(_, time)| *time > 0.0).map(|(name, time)| format!("{name} {}", seconds(*time)));
        writeln!(f, "\na step: {} = {}", shown.collect::<Vec<_>>().join(" + "), seconds(s.step))?;
        writeln!(f, "why: {}", self.why)?;
        match &self.runner_up {
            Some(other) => write!(f, "runner-up: {} in {}", other.description, seconds(other.seconds)),
            None => f.write_str("runner-up: none of another kind fits"),
        }
    }
}

/// A plan's line on what is kept of each GPU.
pub(super) fn write_kept(f: &mut fmt::Formatter<'_>, kept: Option<&str>) -> fmt::Result {
    kept.map_or(Ok(()), |kept| writeln!(f, "kept of each GPU: {kept}"))
}

impl GroupPlan {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = if self.num_nodes == 1 { "1 node".into() } else { format!("{} nodes", self.num_nodes) };
        writeln!(f, "{}: {} on {nodes}; bytes per device", devices(&self.devices), self.device_kinds)?;
        let labels: Vec<String> = self.roles.iter().map(|plan| self.role_label(plan)).collect();
        let at_most = format!("at most at once, of {} usable", bytes(self.usable_bytes));
        let in_host = format!("in host memory, of {} a device", bytes(self.usable_host_bytes));
        let width = labels.iter().chain([&at_most, &in_host]).map(|label| label.chars().count()).max().unwrap_or(0);
        write!(f, "  {:<width$}", "")?;
        self.peaks.iter().try_for_each(|peak| write!(f, "{:>13}", peak.phase.name()))?;
        writeln!(f)?;
        for (plan, label) in self.roles.iter().zip(&labels) {
            write!(f, "  {label:<width$}")?;
            self.row(f, |phase| self.role_bytes(plan.role, phase).0)?;
        }
        let at = |phase: Phase| self.peaks.iter().find(|peak| peak.phase == phase);
        write!(f, "  {at_most:<width$}")?;
        self.row(f, |phase| at(phase).map_or(0, |peak| peak.device_bytes))?;
        if self.peaks.iter().any(|peak| peak.host_bytes > 0) {
            write!(f, "  {in_host:<width$}")?;
            self.row(f, |phase| at(phase).map_or(0, |peak| peak.host_bytes))?;
        }
        self.largest(f)?;
        self.times(f)
    }

    fn row(&self, f: &mut fmt::Formatter<'_>, of: impl Fn(Phase) -> u64) -> fmt::Result {
        for peak in &self.peaks {
            let shown = of(peak.phase);
            write!(f, "{:>13}", if shown == 0 { "-".into() } else { bytes(shown) })?;
        }
        writeln!(f)
    }

    fn role_label(&self, plan: &super::RolePlan) -> String {
        let mut label = plan.role.to_string();
        match plan.role {
            role if self.learns(role) => {
                let _ = write!(label, ", ZeRO {}", plan.zero_stage);
                if plan.adam_offload {
                    label.push_str(", Adam on the host");
                }
                if self.moves_to_host {
                    label.push_str(", to host to generate");
                }
            }
            Role::Generator => {
                let own = if plan.shares_weights { "the actor's weights" } else { "own weights" };
                let engines = self.num_devices / plan.tensor_parallel;
                let _ = match plan.tensor_parallel {
                    1 => write!(label, ", {own}, {} slots", plan.slots),
                    size => write!(label, ", {engines} x {size} devices, {} slots each", plan.slots),
                };
            }
            _ if plan.zero_stage == 3 => label.push_str(", sharded"),
            _ => {}
        }
        label
    }

    /// The entries that make the fullest phase, so that a reader sees what to change.
    fn largest(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(fullest) = self.peaks.iter().max_by_key(|peak| peak.device_bytes) else { return Ok(()) };
        let here =
            |entry: &&crate::ledger::Entry| entry.place == Place::Device && entry.phases.contains(&fullest.phase);
        let mut entries: Vec<_> = self.ledger.iter().filter(here).collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.bytes));
        writeln!(f, "  most of it in phase {}:", fullest.phase.name())?;
        for entry in entries.iter().take(4) {
            writeln!(f, "  {:>10}  {} {}: {}", bytes(entry.bytes), entry.role, entry.name, entry.formula)?;
        }
        Ok(())
    }

    fn times(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phases = self.seconds.phases.iter().map(|(phase, time)| (phase.name(), *time));
        let all = phases.chain([("to host and back".into(), self.seconds.switch)]);
        let shown = all.filter(|(_, time)| *time > 0.0).map(|(name, time)| format!("{name} {}", seconds(time)));
        writeln!(f, "  busy: {}", shown.collect::<Vec<_>>().join(", "))
    }
}

/// Such as "devices 0-7, 16".
fn devices(ranges: &[DeviceRange]) -> String {
    let single = matches!(ranges, [range] if range.first == range.last);
    let list = ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    format!("{} {list}", if single { "device" } else { "devices" })
}
