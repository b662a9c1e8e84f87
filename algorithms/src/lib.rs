//! PPO and its parts: the maths first, each file one formula of the paper.

pub mod masked;

pub mod bradley_terry;
pub mod gae;
pub mod kl;
pub mod losses;
pub mod reward_shaping;
pub mod schedule;
pub mod whiten;
