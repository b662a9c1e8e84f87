//! Model architectures over shared layers, their Hugging Face folders, tokenizers and chat templates.
//!
//! Reading order: [`config`] (a folder's `config.json` as a [`config::DecoderConfig`]; one file per architecture),
//! [`layers`] and [`decoder`] (the computation), [`head`] (log-probs, values, scores), [`tensor_parallel`] (a model shared
//! by ranks), [`checkpoint`] (weights on disk).

mod architecture;
pub mod config;

pub mod llama;
pub mod mistral;
pub mod qwen2;
pub mod qwen3;

pub mod decoder;
pub mod layers;

pub mod head;

pub mod tensor_parallel;

pub mod checkpoint;

pub mod chat_template;
pub mod tokenizer;

pub mod gguf;
pub mod hub;

mod error;

pub use error::{ModelError, Result};
