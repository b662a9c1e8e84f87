//! The five roles of reinforcement learning from a reward.

use std::fmt;

use echelon_schema::{Choice, scalar_value};
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

/// In the order in which the recipe's reference lists them; that of the enum is the planner's.
impl Choice for Role {
    const ALL: &'static [(Self, &'static str, &'static str)] = &[
        (Role::Actor, "actor", "The policy being trained."),
        (Role::Critic, "critic", "The value model."),
        (Role::Reward, "reward", "The reward model."),
        (Role::Reference, "reference", "The frozen policy."),
        (Role::Generator, "generator", "The sampling engine."),
    ];
}

scalar_value!(Role);

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}
