//! The architectures that a `config.json` may name.

use std::path::Path;

use crate::config::{ConfigFile, DecoderConfig};
use crate::error::{ModelError, Result};
use crate::{llama, mistral, qwen2, qwen3};

impl DecoderConfig {
    /// Reads `folder/config.json`.
    ///
    /// # Errors
    /// A missing file or key, a value of the wrong type, an architecture or feature that is not supported: each names
    /// the file, the key, what was expected and what was found.
    pub fn read(folder: &Path) -> Result<DecoderConfig> {
        let file = ConfigFile::read(&folder.join("config.json"))?;
        match file.text("model_type")?.as_str() {
            "llama" => llama::config(&file),
            "mistral" => mistral::config(&file),
            "qwen2" => qwen2::config(&file),
            "qwen3" => qwen3::config(&file),
            other => Err(ModelError::Architecture {
                path: file.path,
                found: other.into(),
                supported: "llama, mistral, qwen2, qwen3".into(),
            }),
        }
    }
}
