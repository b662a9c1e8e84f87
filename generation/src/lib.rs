//! The generation engine: continuous batching over a fixed number of slots, on the weights the actor trains.
//!
//! Reading order: [`keys`] (what a recipe says of it), [`engine`] (the loop), [`sequence`] (what is being generated and what ends it), [`scheduler`] (who
//! has a slot), [`kv_cache`] (what the slots remember), [`model_runner`] (prompts and steps through the model),
//! [`sampler`] (logits to tokens), [`weight_layout`] (how weights lie while decoding). The engine knows tokens and log-probs, never rewards.

mod config;
pub mod engine;
pub mod keys;
pub mod kv_cache;
pub mod model_runner;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod weight_layout;

pub use config::EngineConfig;
pub use engine::Engine;
pub use kv_cache::check_budget;
pub use model_runner::Policy;
