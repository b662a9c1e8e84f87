//! The groups that roles are in: by tier, changed by what the recipe places by hand.

use echelon_core::role::Role;

use super::search::Group;
use super::{ByHand, PlanError};
use crate::tier::{RoleSet, Tier};

/// Devices named by hand, and the roles on them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct HandGroup {
    pub devices: Vec<usize>,
    pub roles: RoleSet,
}

/// Hand placement, checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Hand {
    pub groups: Vec<HandGroup>,
    /// Roles that join another role, wherever that is.
    follows: Vec<(Role, Role)>,
}

impl Hand {
    /// Checks what the recipe places by hand, for roles that exist, on `num_devices` devices.
    pub fn new(by_hand: &[ByHand], roles: &[Role], num_devices: usize) -> Result<Hand, PlanError> {
        let mut hand = Hand::default();
        for placed in by_hand.iter().filter(|placed| roles.contains(&placed.role)) {
            if let Some(devices) = &placed.devices {
                hand.add(placed.role, devices, num_devices)?;
            }
            if let Some(other) = placed.colocate_with {
                if other == placed.role || !roles.contains(&other) {
                    return Err(PlanError::ColocatedWithNobody { role: placed.role, other });
                }
                hand.follows.push((placed.role, other));
            }
        }
        Ok(hand)
    }

    fn add(&mut self, role: Role, devices: &[usize], num_devices: usize) -> Result<(), PlanError> {
        let mut devices = devices.to_vec();
        devices.sort_unstable();
        devices.dedup();
        if devices.is_empty() {
            return Err(PlanError::NoDevices { role });
        }
        if let Some(&device) = devices.iter().find(|device| **device >= num_devices) {
            return Err(PlanError::NoSuchDevice { role, device, num_devices });
        }
        for other in &mut self.groups {
            if other.devices == devices {
                other.roles = other.roles.or(RoleSet::of(&[role]));
                return Ok(());
            }
            if let Some(&device) = devices.iter().find(|device| other.devices.contains(device)) {
                let other = other.roles.iter().next().expect("a group by hand has a role");
                return Err(PlanError::Overlap { role, other, device });
            }
        }
        self.groups.push(HandGroup { devices, roles: RoleSet::of(&[role]) });
        Ok(())
    }

    /// All devices that are named.
    pub fn devices(&self) -> Vec<usize> {
        self.groups.iter().flat_map(|group| group.devices.iter().copied()).collect()
    }

    /// The partitions of a tier with this placement. A role placed by hand leaves the tier's group. What is left of that
    /// group gets devices of its own or joins the role; in the small and the medium tier generator and actor stay
    /// together unless both are placed by hand.
    pub fn partitions(&self, tier: Tier, roles: &[Role]) -> Vec<Vec<Group>> {
        let mut partitions: Vec<Vec<Group>> = Vec::new();
        for base in tier.partitions(roles) {
            for partition in self.variants(tier, &base) {
                let partition = self.follow(partition);
                if !partitions.contains(&partition) {
                    partitions.push(partition);
                }
            }
        }
        partitions
    }

    fn variants(&self, tier: Tier, base: &[RoleSet]) -> Vec<Vec<Group>> {
        let by_hand = self.groups.iter().fold(RoleSet::default(), |all, group| all.or(group.roles));
        let fixed = |group: &HandGroup| Group { roles: group.roles, hand: Some(group.devices.clone()) };
        let mut variants: Vec<Vec<Group>> = vec![self.groups.iter().map(fixed).collect()];
        let pair = RoleSet::of(&[Role::Actor, Role::Generator]);
        for block in base {
            let mut left = block.without(by_hand);
            let together = tier < Tier::Large && block.and(pair) == pair;
            let following = left.and(pair);
            if together && following.iter().count() == 1 {
                let other = pair.without(following);
                for group in variants.iter_mut().flatten().filter(|group| !group.roles.and(other).is_empty()) {
                    group.roles = group.roles.or(following);
                }
                left = left.without(following);
            }
            if !left.is_empty() {
                variants = variants.into_iter().flat_map(|groups| grown(groups, *block, left)).collect();
            }
        }
        variants
    }

    fn follow(&self, mut partition: Vec<Group>) -> Vec<Group> {
        for (role, other) in &self.follows {
            let role = RoleSet::of(&[*role]);
            partition.iter_mut().for_each(|group| group.roles = group.roles.without(role));
            for group in partition.iter_mut().filter(|group| group.roles.contains(*other)) {
                group.roles = group.roles.or(role);
            }
        }
        partition.retain(|group| !group.roles.is_empty());
        partition
    }
}

/// The partitions in which `left`, what hand placement left of `block`, has a group of its own or joins a role of the
/// block that is placed by hand.
fn grown(groups: Vec<Group>, block: RoleSet, left: RoleSet) -> Vec<Vec<Group>> {
    let mut all = Vec::new();
    for index in 0..groups.len() {
        if groups[index].hand.is_some() && !groups[index].roles.and(block).is_empty() {
            let mut joined = groups.clone();
            joined[index].roles = joined[index].roles.or(left);
            all.push(joined);
        }
    }
    let mut own = groups;
    own.push(Group { roles: left, hand: None });
    all.insert(0, own);
    all
}
