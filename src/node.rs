//! The node that this process runs on: one set of CPUs, so one set of books for all that runs as tasks.

use std::sync::LazyLock;

use echelon_core::{Error, Result};
use echelon_placement::task::{NodeConfig, TaskError, Tasks, TasksConfig};

/// Where stateless work of this process is submitted.
///
/// # Errors
/// The system grants no thread.
pub fn tasks() -> Result<&'static Tasks> {
    static TASKS: LazyLock<Result<Tasks, TaskError>> =
        LazyLock::new(|| Tasks::start(TasksConfig::new(NodeConfig::of_this_host(0))));
    TASKS.as_ref().map_err(|error| Error::Refused(error.to_string()))
}
