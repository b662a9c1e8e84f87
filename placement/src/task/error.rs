//! What keeps a task from giving its value, with the task's name.

use std::time::Duration;

use super::demand::Demand;
use crate::control::seconds;

/// Why there is no value.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// A number that means nothing.
    #[error("{task}: {problem}")]
    Demand { task: String, problem: String },
    /// It would wait for ever.
    #[error("{task} demands {demand}, which no node can ever give: {nodes}; {advice}")]
    Impossible { task: String, demand: Demand, nodes: String, advice: &'static str },
    /// A role finds its devices taken.
    #[error(
        "{role} demands {demand}, which is not free on {place}: {nodes}; end what holds them, or place {role} elsewhere"
    )]
    Taken { role: String, demand: Demand, place: String, nodes: String },
    /// Too much waits already.
    #[error("task {task}: refused: {waiting}; await some of them first")]
    Busy { task: &'static str, waiting: String },
    /// Arguments beyond the limit.
    #[error(
        "task {task}: its arguments of {bytes} bytes are over the limit of {limit}; divide them among several tasks"
    )]
    TooLarge { task: &'static str, bytes: usize, limit: usize },
    /// Arguments that cannot be written, or a value that cannot be read.
    #[error("task {task}: {what}: {cause}")]
    Format { task: &'static str, what: &'static str, cause: String },
    /// A function that was not registered.
    #[error(
        "task {task}: this process knows no function of that name; it knows {known}: register it with Functions::with"
    )]
    Unknown { task: &'static str, known: String },
    /// The task's own error.
    #[error("task {task} on node {node}: {cause}")]
    Failed {
        task: &'static str,
        node: String,
        #[source]
        cause: echelon_core::Error,
    },
    /// A bug in the task.
    #[error("task {task} on node {node} panicked: {message}")]
    Panicked { task: &'static str, node: String, message: String },
    /// Its nodes went, one after the other.
    #[error("task {task} on node {node}: lost after {attempts} attempts: {cause}")]
    Lost { task: &'static str, node: String, attempts: u32, cause: String },
    /// No value in time.
    #[error("task {task}: no value within {} s; it {state}", seconds(.waited))]
    Deadline { task: &'static str, waited: Duration, state: &'static str },
    /// A task waits for a task.
    #[error("task {task}: a task may not wait for another: return first, and let the caller submit what follows")]
    Nested { task: &'static str },
    /// The scheduler has ended.
    #[error("task {task}: the scheduler has stopped")]
    Stopped { task: &'static str },
    /// The node of this process cannot be set up.
    #[error("starting tasks on node {node}: {cause}")]
    Start { node: String, cause: String },
}

impl TaskError {
    /// The task's own error where it had one: on the caller's node its name and place say nothing new.
    pub fn into_cause(self) -> echelon_core::Error {
        match self {
            TaskError::Failed { cause, .. } => cause,
            error => error.into(),
        }
    }
}

impl From<TaskError> for echelon_core::Error {
    fn from(error: TaskError) -> echelon_core::Error {
        let context = match &error {
            TaskError::Start { .. } => "tasks",
            _ => "a task",
        };
        echelon_core::Error::other(context, error)
    }
}
