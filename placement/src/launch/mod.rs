//! How workers come to be: the rank that a scheduler gave this process, and processes that the driver starts itself.

pub mod environment;
pub mod spawn;

pub use environment::{Launcher, Place, Unit, place};
pub use spawn::{LocalWorkers, SpawnConfig, SpawnError};
