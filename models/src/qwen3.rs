//! Qwen3: RMS norms on each head's q and k instead of Qwen2's biases.

use crate::config::{ConfigFile, DecoderConfig};
use crate::error::Result;
use crate::qwen2;

pub fn config(file: &ConfigFile) -> Result<DecoderConfig> {
    let attention_bias = file.flag_or("attention_bias", false)?;
    let decoder = file.decoder()?;
    Ok(DecoderConfig {
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        qk_norm: true,
        head_dim: file.size_or("head_dim", 128)?,
        windows: qwen2::windows(file, decoder.num_layers)?,
        ..decoder
    })
}
