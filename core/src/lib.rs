//! The nouns that all of Echelon shares: what a step's data looks like, what can be asked of a role, how ranks
//! talk, and how a model's training state is laid out over them.
//!
//! Reading order: [`data`] (rows and statistics), [`rollout`] (how rows are sampled), [`role`] and [`verb`] (who is asked for
//! what), [`loss`] (what is learned), [`message`] (as bytes; [`shared_message`] where they lie in memory that processes share), [`shape`] (what a model looks like from outside), [`pack`] (rows without padding), [`zero`] (training state),
//! [`store`] (memory that the processes of a host share).

pub mod data;

pub mod rollout;

pub mod role;

pub mod verb;

pub mod loss;

pub mod message;

pub mod shared_message;

pub mod shape;
pub mod workload;

pub mod pack;

pub mod zero;

pub mod memory;
pub mod store;

pub mod process_group;

pub mod progress;

pub mod random;

pub mod determinism;
pub mod device;

pub mod compute;
pub mod leads;
pub mod optimizer;

pub mod collective;
mod dtype;
mod error;
pub mod shim;
pub mod weight_layout;
pub mod whole_file;

pub use error::{Error, OutOfMemory, Result};
