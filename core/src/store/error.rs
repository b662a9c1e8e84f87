use super::id::ObjectId;
use super::protocol::Refusal;
use super::segment::SegmentError;

/// What can go wrong between a process and its host's object store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("object store: {0}")]
    Refused(#[from] Refusal),
    #[error(
        "object store `{socket}`: {operation}: {source}; the process that serves it (the driver, or the first worker of this host) is gone or does not answer: look at its last lines"
    )]
    Server { socket: String, operation: &'static str, source: std::io::Error },
    #[error("object store: {id}: {source}")]
    Segment { id: ObjectId, source: SegmentError },
    #[error("object store: {id}: not a whole safetensors object: {reason}")]
    Damaged { id: ObjectId, reason: String },
    #[error("object store: {id}: tensor `{name}`: {reason}")]
    Tensor { id: ObjectId, name: String, reason: String },
    #[error("object store: {id}: {source}")]
    Torch { id: ObjectId, source: tch::TchError },
    /// Whoever was to bring the object failed.
    #[error("object store: {id}: could not be brought: {source}")]
    Fetch { id: ObjectId, source: Box<dyn std::error::Error + Send + Sync> },
}

impl From<StoreError> for crate::Error {
    fn from(error: StoreError) -> crate::Error {
        crate::Error::other("shared memory", error)
    }
}
