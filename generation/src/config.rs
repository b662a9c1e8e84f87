//! How much the engine does at once.

use echelon_core::weight_layout::WeightLayout;

/// How much the engine does at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Slots: sequences decoded together, at most.
    pub max_sequences: usize,
    /// Tokens of prompts that go through the model in one pass, at most; a longer prompt goes alone.
    pub max_batched_tokens: usize,
    /// Bytes of the KV cache, at most. None bounds it by the slots alone.
    pub kv_cache_bytes: Option<usize>,
    /// How weights lie while a CPU decodes.
    pub weight_layout: WeightLayout,
}

impl Default for EngineConfig {
    fn default() -> EngineConfig {
        EngineConfig {
            max_sequences: 64,
            max_batched_tokens: 8192,
            kv_cache_bytes: None,
            weight_layout: WeightLayout::default(),
        }
    }
}
