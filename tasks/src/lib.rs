//! A task is a set of prompts and the way to score responses.
//!
//! * [`data`] reads rows from files (JSON lines, JSON, parquet) into prompts and training examples, mixes
//!   weighted sources, and draws batches in an order that depends on nothing but the seed.
//! * [`reward`] scores responses without a model: rules, a remote server, a program.
//!
//! Nothing here knows about tokens, tensors or devices: what needs a tokenizer (the length filter, the chat
//! template) is passed in by the caller.

pub mod data;
pub mod reward;
