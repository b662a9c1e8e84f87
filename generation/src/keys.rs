//! The recipe's table of the engine.

use echelon_core::weight_layout::WeightLayout;
use echelon_schema::{Auto, MOST, at_least, between, choice, table};

use crate::config::EngineConfig;

table! {
    /// The engine that samples.
    pub struct Generation {
        /// Which engine.
        pub engine: Engine = Engine::Embedded;
        /// Devices that share one copy of the engine's weights.
        pub tensor_parallel_size: usize = 1, in between(1.0, MOST);
        /// Sequences decoded at once.
        pub max_sequences: usize = 64, in between(1.0, MOST);
        /// Tokens of one engine pass.
        pub max_batched_tokens: usize = 8192, in between(1.0, MOST);
        /// Memory of the key-value cache; `auto` is what `max_sequences` of full length need.
        pub kv_cache_bytes: Auto<usize> = Auto::Auto, in at_least(1.0);
    }
}

choice! {
    /// Which engine samples.
    pub enum Engine {
        /// The built-in engine, on the trainer's own weights.
        Embedded = "embedded",
    }
}

impl Generation {
    /// How the embedded engine works; its weights lie in `weight_layout`.
    pub fn engine_config(&self, weight_layout: WeightLayout) -> EngineConfig {
        EngineConfig {
            max_sequences: self.max_sequences,
            max_batched_tokens: self.max_batched_tokens,
            kv_cache_bytes: self.kv_cache_bytes.fixed(),
            weight_layout,
        }
    }
}
