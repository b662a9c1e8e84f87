use crate::role::Role;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between the driver and a device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// libtorch refused an operation (out of memory, a shape that does not fit).
    #[error("{operation}: {source}")]
    Torch { operation: &'static str, source: tch::TchError },
    /// A tensor does not have the shape its neighbours promise.
    #[error("{what}: expected shape {expected:?}, found {found:?}")]
    Shape { what: &'static str, expected: Vec<i64>, found: Vec<i64> },
    /// A loss or gradient norm is NaN or infinite; the optimizer has not moved.
    #[error("{role}: {what} is {value} at optimizer step {optimizer_step}; the optimizer has not moved")]
    NonFinite { role: Role, what: &'static str, value: f64, optimizer_step: u64 },
    /// The person at the terminal, or a signal, asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A worker answered with an error, panicked, or is gone.
    #[error("{role} rank {rank}: {verb}: {cause}")]
    Worker {
        role: Role,
        rank: usize,
        verb: &'static str,
        #[source]
        cause: Box<Error>,
    },
    /// The worker's process or device thread ended, or is cut off.
    #[error("the worker is gone: {0}")]
    WorkerGone(String),
    /// An input that this role cannot serve.
    #[error("{0}")]
    Refused(String),
    /// A failure below, with its own message (reward source, file, engine).
    #[error("{context}: {source}")]
    Other { context: String, source: Box<dyn std::error::Error + Send + Sync> },
}

impl Error {
    /// Wraps any error with what was being done.
    pub fn other(context: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        Error::Other { context: context.into(), source: source.into() }
    }

    /// The error that started it all, below the workers and contexts it climbed through.
    pub fn root(&self) -> &Error {
        match self {
            Error::Worker { cause, .. } => cause.root(),
            error => error,
        }
    }
}

impl From<tch::TchError> for Error {
    fn from(source: tch::TchError) -> Error {
        Error::Torch { operation: "libtorch", source }
    }
}
