//! One model that learns alone on all devices (`sft`, `reward`): what is to be chosen is its ZeRO stage, and whether Adam's
//! state goes to host memory. Search, ledger and estimates are those of every plan; how it is shown is its own.

use std::fmt;

use echelon_core::memory::{Phase, Work};
use echelon_core::role::Role;
use serde::{Serialize, Serializer};

use super::estimate::{GroupConfig, Held};
use super::render::{self, write_kept};
use super::{Answer, GroupPlan, Plan, Reject, RolePlan};
use crate::ledger::{Entry, Place};
use crate::tier::RoleSet;

/// A ZeRO stage with or without offload, and whether it fits.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    pub zero_stage: u8,
    pub adam_offload: bool,
    /// At the height of the fullest phase, on a device and in its share of host memory.
    pub device_bytes: u64,
    pub host_bytes: u64,
    pub usable_bytes: u64,
    pub usable_host_bytes: u64,
    /// Of an optimizer step; None where it does not fit.
    pub seconds: Option<f64>,
}

/// Every choice that is one, plainest first.
pub(super) fn choices(answer: &Answer, role: Role) -> Vec<Choice> {
    let (problem, roles) = (&answer.problem, RoleSet::of(&[role]));
    let Some((_, slice)) = answer.inventory.picks.first() else { return Vec::new() };
    let choice = |config: GroupConfig| {
        let cost = problem.cost(roles, slice, &config);
        let totals = problem.totals(roles, slice, &config, Held { moves_to_host: false, slots: 1 });
        let most = |of: &dyn Fn(Phase) -> u64| problem.phases.iter().map(|&phase| of(phase)).max().unwrap_or(0);
        (cost != Err(Reject::Redundant)).then(|| Choice {
            zero_stage: config.stages[role as usize],
            adam_offload: config.offloads[role as usize],
            device_bytes: most(&|phase| totals.device_bytes(phase)),
            host_bytes: most(&|phase| totals.host_bytes(phase)),
            usable_bytes: slice.usable_bytes,
            usable_host_bytes: slice.usable_host_bytes,
            seconds: cost.ok().map(|cost| cost.train()),
        })
    };
    GroupConfig::all(problem, roles, &[1]).into_iter().filter_map(choice).collect()
}

/// Why the fastest was chosen.
pub(super) fn why(choices: &[Choice]) -> String {
    let fitting = choices.iter().filter(|choice| choice.seconds.is_some()).count();
    match (fitting, choices.len()) {
        (_, 1) => "the only choice".into(),
        (1, all) => format!("the only one that fits of {all} choices"),
        (fitting, all) if fitting == all => format!("fastest of {all} choices, which all fit"),
        (fitting, all) => format!("fastest of the {fitting} choices that fit, {all} in all"),
    }
}

/// Such as "ZeRO 2, Adam on the host".
pub(super) fn said(stage: u8, offload: bool) -> String {
    format!("ZeRO {stage}{}", if offload { ", Adam on the host" } else { "" })
}

/// In JSON the phases of a model alone have the names of a PPO step's, which readers know: its own work is the actor's or,
/// with scalars, the critic's, and what is there all the time is there in all five.
pub(super) fn in_json(entries: Vec<Entry>) -> Vec<Entry> {
    let with_known = |entry: Entry| match entry.transient {
        true => Entry { phases: entry.phases.into_iter().map(known).collect(), ..entry },
        false => {
            let learners = [Phase::learn(Role::Actor), Phase::learn(Role::Critic)];
            Entry {
                phases: [Phase::GENERATE, Phase::SCORE].into_iter().chain(learners).chain([Phase::SYNC]).collect(),
                ..entry
            }
        }
    };
    entries.into_iter().map(with_known).collect()
}

/// See [`in_json`].
pub(super) fn known(phase: Phase) -> Phase {
    if phase.role == Some(Role::Reward) { Phase::learn(Role::Critic) } else { phase }
}

/// The plan of one model alone, as it is shown.
pub struct Alone<'a>(pub &'a Plan);

impl Alone<'_> {
    fn group(&self) -> (&GroupPlan, &RolePlan) {
        let group = self.0.groups.first().expect("a plan has a group");
        (group, group.roles.first().expect("a group has a role"))
    }
}

#[derive(Serialize)]
struct Form<'a> {
    cluster: &'a str,
    host_memory: &'a str,
    kept: Option<&'a str>,
    params: u64,
    num_devices: usize,
    zero_stage: u8,
    adam_offload: bool,
    ledger: Vec<Entry>,
    choices: &'a [Choice],
    /// Of an optimizer step.
    seconds: f64,
    why: &'a str,
}

impl Serialize for Alone<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (Plan { cluster, host_memory, kept, why, .. }, (group, held)) = (self.0, self.group());
        let form = Form {
            cluster,
            host_memory,
            kept: kept.as_deref(),
            params: self.0.actor_params,
            num_devices: group.num_devices,
            zero_stage: held.zero_stage,
            adam_offload: held.adam_offload,
            ledger: in_json(group.ledger.clone()),
            choices: &self.0.choices,
            seconds: self.0.seconds.step,
            why,
        };
        form.serialize(serializer)
    }
}

impl fmt::Display for Alone<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (plan, (group, held)) = (self.0, self.group());
        let chosen = said(held.zero_stage, held.adam_offload);
        writeln!(f, "{}; the model has {} parameters", plan.cluster, render::params(plan.actor_params))?;
        writeln!(f, "host memory of a node: {}", plan.host_memory)?;
        write_kept(f, plan.kept.as_deref())?;
        writeln!(f, "\non each of {}, at most at once:", render::count(group.num_devices, "device"))?;
        let on_host = plan.choices.iter().any(|choice| choice.host_bytes > 0);
        for choice in &plan.choices {
            let name = said(choice.zero_stage, choice.adam_offload);
            let device = format!("{} of {}", render::bytes(choice.device_bytes), render::bytes(choice.usable_bytes));
            write!(f, "{} {name:<24} {device:>22}", if name == chosen { '*' } else { ' ' })?;
            match choice.host_bytes {
                _ if !on_host => {}
                0 => write!(f, "{:27}", "")?,
                host => write!(f, "{:>12} in host memory", render::bytes(host))?,
            }
            match choice.seconds {
                Some(seconds) => writeln!(f, "   an optimizer step: {}", render::seconds(seconds))?,
                None => writeln!(f, "   does not fit")?,
            }
        }
        let learns = |entry: &&Entry| entry.phases.iter().any(|phase| phase.work == Work::Learn);
        let on_device = group.ledger.iter().filter(|entry| entry.place == Place::Device);
        let mut entries: Vec<&Entry> = on_device.filter(learns).collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.bytes));
        writeln!(f, "\nmost of it at {chosen}:")?;
        for entry in entries.iter().take(5) {
            writeln!(f, "  {:>10}  {}: {}", render::bytes(entry.bytes), entry.name, entry.formula)?;
        }
        write!(f, "\nwhy {chosen}: {}", plan.why)
    }
}
