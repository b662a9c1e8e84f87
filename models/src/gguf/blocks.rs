//! GGML's block types: which are read, how large they are, and their values as f32.

use std::borrow::Cow;

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use half::{bf16, f16};

/// Every block type that is read, for messages.
pub(super) const SUPPORTED: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K";

/// A block type that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockType {
    ggml: GgmlDType,
    pub name: &'static str,
}

impl BlockType {
    /// The block type of GGML's number `id`, or the name of one that is not read.
    pub fn from_id(id: u32) -> Result<Self, String> {
        let (ggml, name) = match id {
            0 => (GgmlDType::F32, "F32"),
            1 => (GgmlDType::F16, "F16"),
            2 => (GgmlDType::Q4_0, "Q4_0"),
            3 => (GgmlDType::Q4_1, "Q4_1"),
            6 => (GgmlDType::Q5_0, "Q5_0"),
            7 => (GgmlDType::Q5_1, "Q5_1"),
            8 => (GgmlDType::Q8_0, "Q8_0"),
            10 => (GgmlDType::Q2K, "Q2_K"),
            11 => (GgmlDType::Q3K, "Q3_K"),
            12 => (GgmlDType::Q4K, "Q4_K"),
            13 => (GgmlDType::Q5K, "Q5_K"),
            14 => (GgmlDType::Q6K, "Q6_K"),
            30 => (GgmlDType::BF16, "BF16"),
            _ => return Err(format!("{} (number {id})", unread_name(id))),
        };
        Ok(Self { ggml, name })
    }

    /// Elements in one block.
    pub fn elements(self) -> u64 {
        self.ggml.block_size() as u64
    }

    /// Bytes of one block.
    pub fn bytes(self) -> u64 {
        self.ggml.type_size() as u64
    }

    /// The values of `data`, whole blocks of this type in file order.
    ///
    /// # Errors
    /// What the block decoder says; a length that is no whole number of blocks is a bug of the caller.
    pub fn dequantize(self, data: &[u8]) -> Result<Vec<f32>, String> {
        assert!((data.len() as u64).is_multiple_of(self.bytes()), "callers pass whole blocks");
        match self.ggml {
            GgmlDType::F32 => Ok(data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()),
            GgmlDType::F16 => Ok(data.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect()),
            GgmlDType::BF16 => {
                Ok(data.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect())
            }
            ggml => {
                let count = data.len() / ggml.type_size() * ggml.block_size();
                match ggml.from_data(Cow::Borrowed(data)).dequantize(count) {
                    Ok(CpuStorage::F32(values)) => Ok(values),
                    Ok(_) => Err(format!("{} blocks did not decode to f32", self.name)),
                    Err(cause) => Err(cause.to_string()),
                }
            }
        }
    }
}

fn unread_name(id: u32) -> &'static str {
    match id {
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => "unknown",
    }
}
