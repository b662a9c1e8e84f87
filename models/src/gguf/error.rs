//! Why a GGUF file could not be imported.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why [`import_gguf`](super::import_gguf) refused; the message says what to do next where there is something to do.
#[derive(Debug, Error)]
pub enum ImportError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },

    #[error("{}: already exists; choose another output folder or remove it", path.display())]
    OutputExists { path: PathBuf },

    #[error("{file}: not a GGUF file, nor a wheel or zip archive that holds one (it starts with \"{found}\")")]
    NotGguf { file: String, found: String },

    #[error("{file}: expected exactly one .gguf file in the archive, found {found}")]
    ArchiveContents { file: String, found: String },

    #[error("{file}: the archive cannot be read: {detail}; fetch it again")]
    Archive { file: String, detail: String },

    #[error("{file}: {place}: expected {expected}, found {found}; the file is damaged or cut short, fetch it again")]
    Damaged { file: String, place: String, expected: String, found: String },

    #[error("{file}: {what} {found} is not supported; supported: {supported}")]
    Unsupported { file: String, what: String, found: String, supported: String },

    #[error("{file}: key {key}: expected {expected}, found {found}")]
    Key { file: String, key: String, expected: String, found: String },

    #[error("{file}: tensor {tensor}: expected {expected}, found {found}")]
    Tensor { file: String, tensor: String, expected: String, found: String },

    #[error("{file}: the tokenizer cannot be rebuilt: {detail}")]
    Tokenizer { file: String, detail: String },
}

impl ImportError {
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }

    pub(super) fn unsupported(file: &str, what: &str, found: &str, supported: &str) -> Self {
        let [file, what, found, supported] = [file, what, found, supported].map(str::to_owned);
        Self::Unsupported { file, what, found, supported }
    }
}
