//! The worker's end: runs calls on threads of their own, beside the device thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use bytes::Bytes;
use echelon_core::{Error, Result};
use prost::Message;

use super::demand::{Demand, NodeConfig};
use super::error::TaskError;
use super::function::Functions;
use super::tasks::{Tasks, TasksConfig};
use super::wire::{Batch, Ending, Outcome, Outcomes, VERB};
use crate::control::{Beside, Call, Limits};
use crate::device_thread::panic_message;

/// Serves the driver's tasks in a worker's process. The driver keeps the node's books: what it sends has room there.
#[derive(Clone)]
pub struct TaskServer {
    tasks: Tasks,
    functions: Functions,
}

impl TaskServer {
    /// With the functions that all processes of the run know.
    ///
    /// # Errors
    /// The system grants no thread.
    pub fn start(functions: Functions) -> Result<TaskServer, TaskError> {
        let most = Limits::default().calls;
        let node = NodeConfig { slots: most, ..NodeConfig::new("worker", 1.0, 0) };
        let tasks = Tasks::start(TasksConfig { waiting: most, ..TasksConfig::new(node) })?;
        Ok(TaskServer { tasks, functions })
    }
}

impl Beside for TaskServer {
    fn offer(&self, call: Call) -> Option<Call> {
        if call.verb != VERB {
            return Some(call);
        }
        let Call { body, reply, .. } = call;
        let functions = self.functions.clone();
        let work = move || {
            reply.send(run_batch(&functions, body));
            Ok(())
        };
        // Refused, it drops the reply, which says so.
        if let Ok(handle) = self.tasks.try_run("batch", Demand::NONE, work) {
            handle.detach();
        }
        None
    }
}

/// Runs the calls of one message, one after the other.
fn run_batch(functions: &Functions, body: Bytes) -> Result<Bytes, String> {
    let Batch { function, arguments, gpus } =
        Batch::decode(body).map_err(|error| format!("no batch of tasks: {error}"))?;
    let unknown = || format!("this worker knows no function {function}; it knows {}", functions.names());
    let run = functions.find(&function).ok_or_else(unknown)?;
    super::handle::enter_task(Some(gpus.into_iter().map(|gpu| gpu as usize).collect()));
    tracing::debug!(function, calls = arguments.len(), "tasks of another node");
    let begun = Instant::now();
    let outcome = |arguments: &Bytes| {
        let ending = match catch_unwind(AssertUnwindSafe(|| run(arguments))) {
            Ok(Ok(value)) => Ending::Value(value),
            Ok(Err(error)) => Ending::Error(error.to_string()),
            Err(panic) => Ending::Panic(panic_message(panic.as_ref())),
        };
        Outcome { ending: Some(ending) }
    };
    let outcomes = arguments.iter().map(outcome).collect();
    let ran_ns = begun.elapsed().as_nanos() as u64;
    Ok(Outcomes { outcomes, ran_ns }.encode_to_vec().into())
}

/// What the driver makes of one outcome.
pub(super) fn read(outcome: Outcome, task: &'static str, node: &str) -> Result<Bytes, TaskError> {
    let node = node.to_owned();
    match outcome.ending {
        Some(Ending::Value(value)) => Ok(value),
        Some(Ending::Error(cause)) => Err(TaskError::Failed { task, node, cause: Error::Refused(cause) }),
        Some(Ending::Panic(message)) => Err(TaskError::Panicked { task, node, message }),
        None => Err(TaskError::Format { task, what: "reading its value", cause: "the worker sent no outcome".into() }),
    }
}
