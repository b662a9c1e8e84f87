//! The five roles of reinforcement learning from a reward.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Who is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Actor,
    Critic,
    Reference,
    Reward,
    Generator,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Actor => "actor",
            Role::Critic => "critic",
            Role::Reference => "reference",
            Role::Reward => "reward",
            Role::Generator => "generator",
        })
    }
}
