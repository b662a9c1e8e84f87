//! PPO and its parts: the step, the ranks' half of it, and the maths, each file one formula of the paper.

pub mod ppo;

pub mod update;

pub mod reward_model;
pub mod sft;

pub mod masked;

pub mod bradley_terry;
pub mod gae;
pub mod kl;
pub mod losses;
pub mod reward_shaping;
pub mod schedule;
pub mod whiten;
