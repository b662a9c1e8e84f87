use serde::{Deserialize, Serialize};

use crate::role::Role;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between the driver and a device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A device has no room for a tensor.
    #[error("{0}")]
    OutOfMemory(Box<OutOfMemory>),
    /// libtorch refused an operation (a shape that does not fit).
    #[error("{operation}: {source}")]
    Torch { operation: &'static str, source: tch::TchError },
    /// A tensor does not have the shape its neighbours promise.
    #[error("{what}: expected shape {expected:?}, found {found:?}")]
    Shape { what: String, expected: Vec<i64>, found: Vec<i64> },
    /// A loss or gradient norm is NaN or infinite; the optimizer has not moved.
    #[error("{role}: {what} is {value} at optimizer step {optimizer_step}; the optimizer has not moved")]
    NonFinite { role: Role, what: &'static str, value: f64, optimizer_step: u64 },
    /// The person at the terminal, or a signal, asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A worker answered with an error, panicked, or is gone; its cause as it was there (AR-19).
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

    /// What libtorch says in a message, or in a panic's with it in its midst, that is no fault of ours.
    pub fn of_torch(message: &str) -> Option<Error> {
        let undetermined = |operator: String| {
            Error::Refused(format!(
                "train.deterministic = true: libtorch has no deterministic form of {operator}: set it to false, or leave out \
                 what needs this operator"
            ))
        };
        let undetermined = || refused_operator(message).map(undetermined);
        let failed = || failed_device(message).map(Error::WorkerGone);
        OutOfMemory::read(message)
            .map(|found| Error::OutOfMemory(Box::new(found)))
            .or_else(undetermined)
            .or_else(failed)
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
        Error::of_torch(&source.to_string()).unwrap_or_else(|| {
            let source = match source {
                // What follows is a backtrace.
                tch::TchError::Torch(text) => tch::TchError::Torch(text.lines().next().unwrap_or_default().into()),
                source => source,
            };
            Error::Torch { operation: "libtorch", source }
        })
    }
}

/// The operator of which libtorch says that it has no deterministic form, in its words.
fn refused_operator(message: &str) -> Option<String> {
    let (before, _) = message.split_once(" does not have a deterministic implementation")?;
    before.split(['"', ':']).next_back().map(|name| name.trim().to_owned())
}

/// A GPU on which calls fail is of no use to this process any more.
fn failed_device(message: &str) -> Option<String> {
    let (_, said) = message.split_once("CUDA error: ")?;
    let said = said.split(['\n', '"']).next()?.split("\\n").next()?.trim();
    Some(format!("its GPU does not work any more: CUDA error: {said}; nvidia-smi says which GPUs are left"))
}

/// What libtorch says of a device without room, in its units.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutOfMemory {
    /// Such as `GPU 0`.
    pub device: String,
    pub wanted: String,
    pub free: String,
    pub capacity: String,
}

impl OutOfMemory {
    /// Reads libtorch's message, or a panic's with it in its midst.
    pub fn read(message: &str) -> Option<OutOfMemory> {
        let after = |from: &'static str| Some(message.split_once(from)?.1);
        let until = |text: &str, end: &str| Some(text.split_once(end)?.0.trim().to_owned());
        after("CUDA out of memory.")?;
        let wanted = until(after("Tried to allocate ")?, ". ")?;
        let (device, rest) = after("Tried to allocate ")?.split_once(" has a total capacity of ")?;
        let device = device.rsplit(". ").next()?.trim().to_owned();
        let (capacity, rest) = rest.split_once(" of which ")?;
        Some(OutOfMemory { device, wanted, free: until(rest, " is free")?, capacity: capacity.to_owned() })
    }
}

impl std::fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let OutOfMemory { device, wanted, free, capacity } = self;
        write!(f, "out of memory on {device}: {wanted} wanted, {free} of {capacity} free")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As libtorch 2.11 writes it.
    const MESSAGE: &str = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 1 has a total capacity of 139.81 GiB of which \
        3.69 MiB is free. Including non-PyTorch memory, this process has 139.80 GiB memory in use. Of the allocated memory 138.99 \
        GiB is allocated by PyTorch, and 1.10 MiB is reserved by PyTorch but unallocated.\nException raised from malloc at x.cpp:1";

    #[test]
    fn a_gpu_that_fails_is_told_in_a_line() {
        let message = "CUDA error: unspecified launch failure\\nCUDA kernel errors might be asynchronously reported";
        let Some(Error::WorkerGone(told)) = Error::of_torch(message) else { panic!("{message}") };
        assert!(told.contains("CUDA error: unspecified launch failure; nvidia-smi"), "{told}");
    }

    #[test]
    fn a_device_without_room_says_how_much_is_wanted_and_free() {
        let error = Error::from(tch::TchError::Torch(MESSAGE.into()));
        assert_eq!(error.to_string(), "out of memory on GPU 1: 20.00 MiB wanted, 3.69 MiB of 139.81 GiB free");
        let panic = format!("called `Result::unwrap()` on an `Err` value: Torch({MESSAGE:?})");
        assert_eq!(OutOfMemory::read(&panic).unwrap().wanted, "20.00 MiB");
        for other in ["CUDA error: an illegal memory access", "CUDA out of memory. Tried to", ""] {
            assert_eq!(OutOfMemory::read(other), None, "{other}");
        }
    }

    #[test]
    fn the_operator_without_a_deterministic_form_is_named() {
        let message = "kthvalue CUDA does not have a deterministic implementation, but you set \
                       'torch.use_deterministic_algorithms(True)'. You can turn off …";
        assert_eq!(refused_operator(message).as_deref(), Some("kthvalue CUDA"));
        let panic = format!("called `Result::unwrap()` on an `Err` value: Torch({message:?})");
        assert_eq!(refused_operator(&panic).as_deref(), Some("kthvalue CUDA"));
        assert_eq!(refused_operator("shapes differ"), None);
    }
}
