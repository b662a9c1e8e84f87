//! What goes to a worker and comes back: several calls of one function, as protobuf.

use bytes::Bytes;
use prost::{Message, Oneof};

/// The verb under which the control plane carries tasks.
pub const VERB: &str = "tasks";

#[derive(Clone, PartialEq, Message)]
pub struct Batch {
    #[prost(string, tag = "1")]
    pub function: String,
    /// Of each call.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub arguments: Vec<Bytes>,
    /// GPUs that they were granted, by their number on the node.
    #[prost(uint32, repeated, tag = "3")]
    pub gpus: Vec<u32>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Outcomes {
    /// In the order of the calls.
    #[prost(message, repeated, tag = "1")]
    pub outcomes: Vec<Outcome>,
    /// What they took, ns.
    #[prost(uint64, tag = "2")]
    pub ran_ns: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Outcome {
    #[prost(oneof = "Ending", tags = "1, 2, 3")]
    pub ending: Option<Ending>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum Ending {
    #[prost(bytes = "bytes", tag = "1")]
    Value(Bytes),
    #[prost(string, tag = "2")]
    Error(String),
    #[prost(string, tag = "3")]
    Panic(String),
}
