//! Where roles run: workers (a mailbox in front of a device thread) and their supervision.

pub mod device_thread;
pub mod worker;

pub use worker::{Worker, start_worker};
