//! The control plane: how the driver asks workers in other processes, and learns what became of them.
//!
//! Every worker dials in and holds one mutually-TLS gRPC stream; on the driver a proxy (a ractor actor) stands for it, so
//! that its death is an ordinary supervision event. Bodies are opaque bytes here: roles and tensors are other people's.
//!
//! What holds:
//! * **CP-1** No certificate of this run, no service: such a connection costs a few KiB and ends within
//!   [`Limits::handshake`].
//! * **CP-2** No queue grows without bound: over the limit, a call is refused at once ([`ControlError::Busy`]).
//! * **CP-3** Every call ends: with an answer, at its deadline, or when its worker is lost.
//! * **CP-4** One worker per rank: the newest incarnation, once the older one is silent; two living ones are an error.
//! * **CP-5** Calls to one worker run in the order in which they were made; heartbeats overtake bodies.
//! * **CP-6** Lost means unknown, not undone: a call that ends in [`ControlError::Lost`] may have run.
//!
//! Reading order: [`protocol`] (what is said), [`framing`] (in pieces), [`identity`] (who may speak), [`door`] (who is let
//! in), [`server`] and [`supervisor`] and [`proxy`] (the driver's end), [`client`] (the worker's end), [`rendezvous`]
//! (waiting for all), [`heartbeat`] (who is behind), `awake` (why a call is quick).

pub(crate) mod awake;
pub mod client;
pub mod door;
mod error;
pub mod framing;
pub mod heartbeat;
pub mod identity;
pub mod protocol;
pub mod proxy;
pub mod rendezvous;
pub mod server;
pub mod supervisor;

use std::time::Duration;

pub use client::{Beside, Call, Session, join};
pub(crate) use error::seconds;
pub use error::{ControlError, Peer, RefusalKind};
pub use heartbeat::{Heartbeat, Progress};
pub use identity::{Credentials, RunAuthority};
pub use protocol::{Hello, build_of_this_program};
pub use proxy::RemoteWorker;
pub use rendezvous::{Rendezvous, rendezvous};
pub use server::{ControlConfig, ControlServer, LocalOutput};
pub use supervisor::Roster;

/// A runtime for the control plane alone: work that blocks a thread elsewhere cannot delay heartbeats, and one thread
/// answers faster than several, which would wake each other for every message.
///
/// # Errors
/// The system grants no thread.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(1).thread_name("control").enable_all().build()?;
    runtime.spawn(awake::keep_awake());
    Ok(runtime)
}

/// Sizes and times of the control plane. Driver and workers may differ in them: each guards itself.
#[derive(Clone, Debug)]
pub struct Limits {
    /// From a connection's first byte to its Hello; then it is closed.
    pub handshake: Duration,
    /// Connections that have not proved who they are; over it the oldest goes.
    pub strangers: usize,
    /// Between two heartbeats of a worker.
    pub heartbeat: Duration,
    /// A worker that says nothing for so long is lost.
    pub silence: Duration,
    /// A driver that says nothing for so long is lost. Longer, for a person may stop it in a debugger.
    pub driver_silence: Duration,
    /// How long the holder of a rank has to answer when another claims it.
    pub probe: Duration,
    /// Calls of one worker that wait or run; one more is refused.
    pub calls: usize,
    /// Bytes of one worker's calls that are not sent yet; a call beyond is refused.
    pub queued_bytes: usize,
    /// Bytes of one body.
    pub body_bytes: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            handshake: Duration::from_secs(4),
            strangers: 1024,
            heartbeat: Duration::from_secs(1),
            silence: Duration::from_secs(10),
            driver_silence: Duration::from_secs(60),
            probe: Duration::from_millis(500),
            calls: 256,
            queued_bytes: 1 << 30,
            body_bytes: 1 << 30,
        }
    }
}
