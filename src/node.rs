//! The node that this process runs on: one set of CPUs, so one set of books for all that runs as tasks.

use std::sync::LazyLock;

use echelon_core::{Error, Result, device};
use echelon_placement::cluster::{Cluster, Discovery};
use echelon_placement::control::protocol::host_name;
use echelon_placement::task::{Demand, Functions, NodeConfig, Reservation, TaskError, Tasks, TasksConfig};

use crate::rules::SCORE_BY_RULE;

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

/// The GPUs of this node that this process may use, by the driver's management library: nothing is started on them.
pub fn gpus() -> Option<&'static Cluster> {
    static GPUS: LazyLock<Option<Cluster>> = LazyLock::new(|| match Cluster::discover() {
        Ok(Discovery::Found { cluster, notes }) => {
            notes.iter().for_each(|note| tracing::warn!("{note}"));
            let visible = std::env::var("CUDA_VISIBLE_DEVICES").map_or(usize::MAX, |list| num_listed(&list));
            cluster.repeated(1, cluster.num_devices().min(visible))
        }
        Ok(Discovery::NoDevice { .. }) => None,
        Err(error) => {
            tracing::warn!("{error}");
            None
        }
    });
    GPUS.as_ref()
}

/// As CUDA counts them where this process has loaded it: it knows what the list of visible ones means, and is there where NVML
/// is not.
pub fn num_gpus() -> usize {
    match device::num_visible() {
        0 => gpus().map_or(0, Cluster::num_devices),
        visible => visible,
    }
}

/// Devices in a list such as `0,3` or of identifiers; it ends at the first that means none.
fn num_listed(list: &str) -> usize {
    list.split(',').map(str::trim).take_while(|device| !device.is_empty() && !device.starts_with('-')).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_devices_are_counted() {
        for (list, count) in [("0,3", 2), ("", 0), ("-1", 0), ("GPU-5a1e, GPU-77b0", 2), ("1,-1,2", 1)] {
            assert_eq!(num_listed(list), count, "{list:?}");
        }
    }
}
