//! Size tiers: which roles share devices, by the size of the actor.
//!
//! | tier | actor | placement |
//! |---|---|---|
//! | small | below 13e9 parameters | all roles on the same devices |
//! | medium | up to 34e9 | actor, critic, reward and reference each on their own; the generator on the actor's |
//! | large | above | as medium, the generator tensor-parallel, on the actor's devices or on its own; reward and reference may share |

use std::fmt;

use echelon_core::role::Role;
use echelon_schema::{Choice, choice};
use serde::{Deserialize, Serialize};

choice! {
    /// How roles share devices.
    #[derive(PartialOrd, Ord, Hash, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Tier, auto "By the actor's parameters: small below 13e9, medium up to 34e9, large above." {
        /// All roles on the same devices.
        Small = "small",
        /// Each role on its own devices; the generator on the actor's.
        Medium = "medium",
        /// As medium, the generator tensor-parallel.
        Large = "large",
    }
}

impl Tier {
    /// The tier of an actor with so many parameters.
    pub fn of_params(params: u64) -> Tier {
        match params {
            0..13_000_000_000 => Tier::Small,
            13_000_000_000..=34_000_000_000 => Tier::Medium,
            _ => Tier::Large,
        }
    }

    /// The next tier, tried when the ledger does not fit.
    pub fn raised(self) -> Option<Tier> {
        match self {
            Tier::Small => Some(Tier::Medium),
            Tier::Medium => Some(Tier::Large),
            Tier::Large => None,
        }
    }

    /// Whether the generator is tensor-parallel where the model and the nodes allow it.
    pub fn splits_generator(self) -> bool {
        self == Tier::Large
    }

    /// The ways in which this tier partitions `roles` over device groups.
    pub fn partitions(self, roles: &[Role]) -> Vec<Vec<RoleSet>> {
        let all = RoleSet::of(roles);
        let pick = |wanted: &[Role]| all.and(RoleSet::of(wanted));
        use Role::{Actor, Critic, Generator, Reference, Reward};
        let separate = |groups: &[&[Role]]| -> Vec<RoleSet> {
            groups.iter().map(|group| pick(group)).filter(|group| !group.is_empty()).collect()
        };
        let mut partitions = match self {
            Tier::Small => vec![vec![all]],
            Tier::Medium => vec![separate(&[&[Actor, Generator], &[Critic], &[Reference], &[Reward]])],
            Tier::Large => vec![
                separate(&[&[Actor, Generator], &[Critic], &[Reference], &[Reward]]),
                separate(&[&[Actor, Generator], &[Critic], &[Reference, Reward]]),
                separate(&[&[Actor], &[Generator], &[Critic], &[Reference], &[Reward]]),
                separate(&[&[Actor], &[Generator], &[Critic], &[Reference, Reward]]),
            ],
        };
        let mut seen = Vec::new();
        partitions.retain(|partition| {
            let fresh = !seen.contains(partition);
            seen.push(partition.clone());
            fresh
        });
        partitions
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// All roles, in the order in which they are shown.
pub const ROLES: [Role; 5] = [Role::Actor, Role::Critic, Role::Reference, Role::Reward, Role::Generator];

/// A set of roles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoleSet(u8);

impl RoleSet {
    pub fn of(roles: &[Role]) -> RoleSet {
        RoleSet(roles.iter().fold(0, |bits, role| bits | 1 << (*role as u8)))
    }

    pub fn contains(self, role: Role) -> bool {
        self.0 & (1 << (role as u8)) != 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn and(self, other: RoleSet) -> RoleSet {
        RoleSet(self.0 & other.0)
    }

    pub fn or(self, other: RoleSet) -> RoleSet {
        RoleSet(self.0 | other.0)
    }

    pub fn without(self, other: RoleSet) -> RoleSet {
        RoleSet(self.0 & !other.0)
    }

    pub fn iter(self) -> impl Iterator<Item = Role> {
        ROLES.into_iter().filter(move |role| self.contains(*role))
    }
}

impl fmt::Display for RoleSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.iter().map(|role| role.to_string()).collect::<Vec<_>>().join(" + "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_by_parameters() {
        for (params, tier) in [
            (135_000_000, Tier::Small),
            (12_999_999_999, Tier::Small),
            (13_000_000_000, Tier::Medium),
            (34_000_000_000, Tier::Medium),
            (34_000_000_001, Tier::Large),
        ] {
            assert_eq!(Tier::of_params(params), tier, "{params}");
        }
    }

    #[test]
    fn every_partition_holds_every_role_once() {
        let without_models = [Role::Actor, Role::Critic, Role::Generator];
        for roles in [&ROLES[..], &without_models[..], &[Role::Actor, Role::Generator][..]] {
            for tier in [Tier::Small, Tier::Medium, Tier::Large] {
                for partition in tier.partitions(roles) {
                    let count: usize = partition.iter().map(|group| group.iter().count()).sum();
                    let union = partition.iter().fold(RoleSet::default(), |all, group| all.or(*group));
                    assert_eq!((count, union), (roles.len(), RoleSet::of(roles)), "{tier} {partition:?}");
                }
            }
        }
        let shown = |tier: Tier| tier.partitions(&ROLES).iter().map(|p| p.len()).collect::<Vec<_>>();
        assert_eq!(shown(Tier::Small), [1]);
        assert_eq!(shown(Tier::Medium), [4]);
        assert_eq!(shown(Tier::Large), [4, 3, 5, 4]);
        assert_eq!(Tier::Large.partitions(&without_models).len(), 2, "equal partitions count once");
    }
}
