//! Where roles run: the cluster and its tiers, what memory a plan takes and how long a step of it does, and workers (a
//! mailbox in front of a device thread) with their supervision, and tasks: stateless work that runs where there is room.

pub mod cluster;
pub mod control;
pub mod device_thread;
pub mod devices;
pub mod launch;
pub mod layout;
pub mod ledger;
pub mod planner;
pub mod rates;
pub mod remote;
pub mod task;
pub mod tier;
pub mod weight_sync;
pub mod worker;

pub use worker::{Worker, start_worker};
