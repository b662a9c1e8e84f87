//! Qwen2 and 2.5: Llama with biases on q, k and v, and a window on the upper layers when asked for.

use crate::config::{ConfigFile, DecoderConfig};
use crate::error::Result;

pub fn config(file: &ConfigFile) -> Result<DecoderConfig> {
    let decoder = file.decoder()?;
    Ok(DecoderConfig { qkv_bias: true, windows: windows(file, decoder.num_layers)?, ..decoder })
}

/// `use_sliding_window` switches the window on for layers from `max_window_layers`.
pub fn windows(file: &ConfigFile, num_layers: usize) -> Result<Vec<Option<i64>>> {
    if !file.flag_or("use_sliding_window", false)? {
        return Ok(vec![None; num_layers]);
    }
    let first = file.size_or("max_window_layers", 28)? as usize;
    file.windows(num_layers, Some(file.size_or("sliding_window", 4096)?), first)
}
