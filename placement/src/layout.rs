//! Which workers hold which roles, and how: the plan, as far as running needs it.

use std::collections::BTreeSet;
use std::fmt;

use echelon_core::role::Role;

use serde::{Deserialize, Serialize};

use crate::planner::{ByHand, DeviceRange, Plan};
use crate::tier::ROLES;

/// The places of a run's roles. Workers are numbered from 0, one per device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    pub num_workers: usize,
    /// The device of each worker, counted through all nodes.
    pub devices: Vec<usize>,
    pub groups: Vec<RoleGroup>,
}

/// The workers of one role, in the order of its ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleGroup {
    pub role: Role,
    pub workers: Vec<usize>,
    /// What a trained role divides over its ranks; frozen ones divide their parameters at 3.
    pub zero_stage: u8,
    pub adam_offload: bool,
    /// What it holds leaves the devices while the generator works there.
    pub moves_to_host: bool,
    /// Neighbouring ranks of the generator that share one copy of its weights.
    pub tensor_parallel: usize,
}

impl Layout {
    /// Every role on every one of `num_workers`.
    pub fn together(num_workers: usize, zero_stage: u8, adam_offload: bool) -> Layout {
        let workers: Vec<usize> = (0..num_workers).collect();
        let group = |role| RoleGroup {
            role,
            workers: workers.clone(),
            zero_stage,
            adam_offload,
            moves_to_host: false,
            tensor_parallel: 1,
        };
        Layout { num_workers, devices: workers.clone(), groups: ROLES.map(group).to_vec() }
    }

    /// One role alone, on every one of `num_workers`.
    pub fn alone(role: Role, num_workers: usize, (zero_stage, adam_offload): (u8, bool)) -> Layout {
        let mut layout = Layout::together(num_workers, zero_stage, adam_offload);
        layout.groups.retain(|group| group.role == role);
        layout
    }

    /// As planned. Devices without a role have no worker.
    pub fn of(plan: &Plan) -> Layout {
        let used: BTreeSet<usize> = plan.groups.iter().flat_map(|group| group.device_numbers()).collect();
        let number = |device: usize| used.iter().position(|&used| used == device).expect("a device of a group");
        let mut groups = Vec::new();
        for group in &plan.groups {
            let workers: Vec<usize> = group.device_numbers().map(number).collect();
            groups.extend(group.roles.iter().map(|held| RoleGroup {
                role: held.role,
                workers: workers.clone(),
                zero_stage: held.zero_stage,
                adam_offload: held.adam_offload,
                moves_to_host: group.moves_to_host && held.role != Role::Generator,
                tensor_parallel: held.tensor_parallel,
            }));
        }
        Layout { num_workers: used.len(), devices: used.into_iter().collect(), groups }
    }

    /// # Panics
    /// Nobody holds the role: ask only for roles of this run.
    pub fn group(&self, role: Role) -> &RoleGroup {
        self.find(role).unwrap_or_else(|| panic!("no worker holds the {role}"))
    }

    pub fn has(&self, role: Role) -> bool {
        self.find(role).is_some()
    }

    fn find(&self, role: Role) -> Option<&RoleGroup> {
        self.groups.iter().find(|group| group.role == role)
    }

    /// The group of a role, if this worker is in it.
    pub fn of_worker(&self, worker: usize, role: Role) -> Option<&RoleGroup> {
        self.groups.iter().find(|group| group.role == role && group.workers.contains(&worker))
    }

    /// The roles of a worker, such as `actor, generator`.
    pub fn roles_of(&self, worker: usize) -> String {
        let groups = self.groups.iter().filter(|group| group.workers.contains(&worker));
        groups.map(|group| group.role.to_string()).collect::<Vec<_>>().join(", ")
    }

    /// Which device each worker has, where that is more than its number: devices without a role have no worker.
    pub fn chosen_devices(&self) -> Option<String> {
        let is_plain = self.devices.iter().enumerate().all(|(worker, device)| worker == *device);
        (!is_plain).then(|| ranges(&self.devices))
    }

    /// Roles that share workers, and the same tensor-parallel size.
    pub fn by_place(&self) -> Vec<(&Vec<usize>, Vec<&RoleGroup>)> {
        let mut places: Vec<(&Vec<usize>, Vec<&RoleGroup>)> = Vec::new();
        for group in &self.groups {
            let same = |(workers, groups): &&mut (&Vec<usize>, Vec<&RoleGroup>)| {
                *workers == &group.workers && groups[0].tensor_parallel == group.tensor_parallel
            };
            match places.iter_mut().find(same) {
                Some((_, groups)) => groups.push(group),
                None => places.push((&group.workers, vec![group])),
            }
        }
        places
    }

    /// The places of the roles as a recipe would give them by hand, device by worker.
    pub fn by_hand(&self) -> Vec<ByHand> {
        let place =
            |group: &RoleGroup| ByHand { role: group.role, devices: Some(group.workers.clone()), colocate_with: None };
        self.groups.iter().map(place).collect()
    }

    /// Whether the generator computes on the actor's own tensors.
    pub fn shares_weights(&self) -> bool {
        let both = self.find(Role::Generator).zip(self.find(Role::Actor));
        both.is_some_and(|(generator, actor)| generator.workers == actor.workers && generator.tensor_parallel == 1)
    }

    /// The lists of workers that run collectives together, in the order in which every worker joins them.
    pub fn companies(&self) -> BTreeSet<Vec<usize>> {
        let mut companies: BTreeSet<Vec<usize>> = self.groups.iter().map(|group| group.workers.clone()).collect();
        if let Some(generator) = self.find(Role::Generator) {
            companies.extend(generator.workers.chunks(generator.tensor_parallel).map(<[usize]>::to_vec));
            companies.insert(self.publishers());
        }
        companies.retain(|workers| workers.len() > 1);
        companies
    }

    /// Who takes part in a publication: the actor's ranks, then the generator's that are not among them. Nobody, where there
    /// is no generator.
    pub fn publishers(&self) -> Vec<usize> {
        let Some((actor, generator)) = self.find(Role::Actor).zip(self.find(Role::Generator)) else {
            return Vec::new();
        };
        let generators = generator.workers.iter().filter(|worker| !actor.workers.contains(worker));
        actor.workers.iter().chain(generators).copied().collect()
    }
}

impl fmt::Display for Layout {
    /// Such as `2 processes: actor, generator on 0; critic (ZeRO 3) on 1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places = self.by_place().into_iter().map(|(workers, groups)| {
            let names: Vec<String> = groups.iter().map(ToString::to_string).collect();
            format!("{} on {}", names.join(", "), ranges(workers))
        });
        write!(f, "{}: {}", self.num_workers, places.collect::<Vec<_>>().join("; "))
    }
}

impl fmt::Display for RoleGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.role)?;
        if self.tensor_parallel > 1 {
            write!(f, " (tensor-parallel {})", self.tensor_parallel)?;
        }
        let divides = match self.role {
            Role::Actor | Role::Critic => true,
            Role::Reference | Role::Reward => self.zero_stage == 3,
            Role::Generator => false,
        };
        if divides && self.workers.len() > 1 {
            write!(f, " (ZeRO {})", self.zero_stage)?;
        }
        Ok(())
    }
}

/// Numbers as `0-3, 6`.
fn ranges(numbers: &[usize]) -> String {
    DeviceRange::of(numbers).iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apart() -> Layout {
        let group = |role, workers: &[usize], tensor_parallel| RoleGroup {
            role,
            workers: workers.to_vec(),
            zero_stage: 3,
            adam_offload: false,
            moves_to_host: false,
            tensor_parallel,
        };
        let groups = vec![
            group(Role::Actor, &[0, 1], 1),
            group(Role::Critic, &[2, 3], 1),
            group(Role::Generator, &[4, 5, 6, 7], 2),
        ];
        Layout { num_workers: 8, devices: (0..8).collect(), groups }
    }

    #[test]
    fn companies_are_the_groups_of_several_workers() {
        assert!(Layout::together(1, 0, false).companies().is_empty());
        assert_eq!(Layout::together(2, 0, false).companies(), BTreeSet::from([vec![0, 1]]));
        let alone = Layout::alone(Role::Reward, 2, (3, false));
        assert_eq!((alone.companies(), alone.groups.len()), (BTreeSet::from([vec![0, 1]]), 1));
        assert!(!alone.shares_weights() && alone.publishers().is_empty());
        let expected: [&[usize]; 6] = [&[0, 1], &[0, 1, 4, 5, 6, 7], &[2, 3], &[4, 5], &[4, 5, 6, 7], &[6, 7]];
        assert_eq!(apart().companies(), expected.map(<[usize]>::to_vec).into());
    }

    #[test]
    fn a_layout_is_said_in_one_line() {
        assert_eq!(
            apart().to_string(),
            "8: actor (ZeRO 3) on 0-1; critic (ZeRO 3) on 2-3; generator (tensor-parallel 2) on 4-7"
        );
        assert_eq!(ranges(&[0, 2, 3, 7]), "0, 2-3, 7");
    }

    #[test]
    fn idle_devices_are_known() {
        assert_eq!(apart().chosen_devices(), None);
        let some = Layout { num_workers: 2, devices: vec![0, 4], ..apart() };
        assert_eq!(some.chosen_devices().as_deref(), Some("0, 4"));
    }

    #[test]
    fn who_holds_what_is_found_by_worker() {
        let layout = apart();
        assert!(layout.of_worker(1, Role::Actor).is_some() && layout.of_worker(2, Role::Actor).is_none());
        assert!(!layout.shares_weights() && Layout::together(4, 3, false).shares_weights());
    }
}
