//! What a worker in another process is told, and what it says when it has done it.

use echelon_core::message::{Body, Message};
use echelon_core::store::StoreAddress;
use serde::{Deserialize, Serialize};

use crate::run_spec::RunSpec;

/// What a worker in another process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Assignment {
    pub spec: RunSpec,
    pub worker: usize,
    /// Workers of its host, which share the CPUs there.
    pub on_its_host: u32,
    /// Where the workers meet: on the driver's host, at this port. None where there is one.
    pub meeting_port: Option<u16>,
    /// The object store of the driver's host, for those who are on it.
    pub store: Option<StoreAddress>,
}

impl Message for Assignment {
    const KIND: &'static str = "build";
    fn to_body(&self) -> Body {
        Body::of(self)
    }
    fn from_body(body: &mut Body) -> echelon_core::Result<Assignment> {
        body.fields()
    }
}

/// What a worker says when its roles are built.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Built {
    /// It reaches the store of the driver's host: batches may lie there.
    pub shares_memory: bool,
    /// What its node has, for tasks.
    pub num_cpus: usize,
    pub num_gpus: usize,
    /// Its roles compute on one of these GPUs.
    pub holds_gpu: bool,
}

impl Message for Built {
    const KIND: &'static str = "built";
    fn to_body(&self) -> Body {
        Body::of(self)
    }
    fn from_body(body: &mut Body) -> echelon_core::Result<Built> {
        body.fields()
    }
}

/// Asks a worker's device to stop what it is at, where it can be stopped.
pub const INTERRUPT: &str = "interrupt";
