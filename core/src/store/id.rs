//! What an object of the store is, which is also its name.

use std::fmt;
use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

/// The longest text in an id, in bytes.
pub(super) const MAX_TEXT_BYTES: usize = 1024;

/// Names an object. An id is used once: what it stands for never changes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ObjectId {
    /// Rows on their way to or from a rank: what they are (`rollout`, `update_actor`), and which of those.
    Batch { what: String, rank: u32, number: u64 },
    /// Weights that a role published.
    Weights { role: String, policy_version: u64 },
    /// One file of a model's weights. A file that changed has another `state`.
    ModelFile { file: String, state: String },
}

impl ObjectId {
    pub fn batch(what: &str, rank: u32, number: u64) -> ObjectId {
        ObjectId::Batch { what: what.into(), rank, number }
    }

    pub fn weights(role: crate::role::Role, policy_version: u64) -> ObjectId {
        ObjectId::Weights { role: role.to_string(), policy_version }
    }

    /// The file at `path` as it is now, by its length, its time of change and its place on the disk.
    pub fn model_file(path: &Path) -> std::io::Result<ObjectId> {
        use std::os::unix::fs::MetadataExt;
        let path = path.canonicalize()?;
        let metadata = path.metadata()?;
        let changed = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let state = format!("{} bytes, inode {}, changed {changed}", metadata.len(), metadata.ino());
        Ok(ObjectId::ModelFile { file: path.display().to_string(), state })
    }

    /// Whether its text is of a length that the store takes.
    pub(super) fn fits(&self) -> bool {
        match self {
            ObjectId::Batch { what, .. } => what.len() <= MAX_TEXT_BYTES,
            ObjectId::Weights { role, .. } => role.len() <= MAX_TEXT_BYTES,
            ObjectId::ModelFile { file, state } => file.len() + state.len() <= MAX_TEXT_BYTES,
        }
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectId::Batch { what, rank, number } => write!(f, "batch `{what}` {number} of rank {rank}"),
            ObjectId::Weights { role, policy_version } => write!(f, "weights of {role}, version {policy_version}"),
            ObjectId::ModelFile { file, .. } => write!(f, "model file {file}"),
        }
    }
}
