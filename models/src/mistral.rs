//! Mistral: Llama with a sliding attention window.

use crate::config::{ConfigFile, DecoderConfig};
use crate::error::Result;

/// A token sees itself and the `sliding_window` − 1 positions before it; null is no window.
pub fn config(file: &ConfigFile) -> Result<DecoderConfig> {
    let decoder = file.decoder()?;
    let window = file.get("sliding_window").is_some().then(|| file.size("sliding_window")).transpose()?;
    Ok(DecoderConfig { windows: file.windows(decoder.num_layers, window, 0)?, ..decoder })
}
