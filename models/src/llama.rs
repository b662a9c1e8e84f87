//! Llama 1, 2 and 3.x, SmolLM2, and what else calls itself `llama`.

use crate::config::{ConfigFile, DecoderConfig};
use crate::error::Result;

/// Biases only where the config asks for them.
pub fn config(file: &ConfigFile) -> Result<DecoderConfig> {
    let attention_bias = file.flag_or("attention_bias", false)?;
    Ok(DecoderConfig {
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        mlp_bias: file.flag_or("mlp_bias", false)?,
        ..file.decoder()?
    })
}
