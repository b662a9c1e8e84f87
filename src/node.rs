//! The node that this process runs on: one set of CPUs, so one set of books for all that runs as tasks.

use std::sync::LazyLock;

use echelon_core::{Error, Result};
use echelon_placement::cluster::{Cluster, Discovery};
use echelon_placement::control::protocol::host_name;
use echelon_placement::task::{Demand, Functions, NodeConfig, Reservation, TaskError, Tasks, TasksConfig};

use crate::reward::SCORE_BY_RULE;

/// What any process of a run may be asked to compute.
pub fn functions() -> Functions {
    Functions::default().with(&SCORE_BY_RULE)
}

/// Where stateless work of this process is submitted.
///
/// # Errors
/// The system grants no thread.
pub fn tasks() -> Result<&'static Tasks> {
    static TASKS: LazyLock<Result<Tasks, TaskError>> = LazyLock::new(|| {
        let config = TasksConfig::new(NodeConfig::of_this_host(num_gpus()));
        Tasks::start(TasksConfig { functions: functions(), ..config })
    });
    TASKS.as_ref().map_err(|error| Error::Refused(error.to_string()))
}

/// What the roles of one device take from the books of its node, so that no task gets it. Of CPUs nothing: tasks run while
/// a step waits for them, between the phases of the roles.
///
/// # Errors
/// The node has no GPU left: several workers were given one device.
pub fn reserve(roles: &str, host: Option<&str>, holds_gpu: bool) -> Result<Reservation> {
    let demand = if holds_gpu { Demand::gpus(1.0) } else { Demand::NONE };
    let own = host_name();
    Ok(tasks()?.reserve(roles, Some(host.unwrap_or(&own)), demand)?)
}

/// Devices of this node, by the driver's management library: nothing is started on them.
pub fn num_gpus() -> usize {
    match Cluster::discover() {
        Ok(Discovery::Found { cluster, .. }) => cluster.num_devices(),
        Ok(Discovery::NoDevice { .. }) => 0,
        Err(error) => {
            tracing::warn!("{error}");
            0
        }
    }
}
