//! What a model looks like from outside: its layer units and their parameters. Planner, sharding, checkpoints and
//! weight sync work from this and need no architecture.

use serde::{Deserialize, Serialize};

/// The axis along which tensor parallelism splits a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TensorParallelAxis {
    /// Rows (output features, vocabulary): column-parallel linears, embeddings and heads.
    Rows,
    /// Columns (input features): row-parallel linears.
    Columns,
    /// Every rank holds it whole (norms, score heads).
    Replicated,
}

/// One parameter, by its Hugging Face name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamShape {
    pub name: String,
    pub shape: Vec<i64>,
    pub axis: TensorParallelAxis,
}

impl ParamShape {
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }
}

/// What ZeRO gathers and releases at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitShape {
    pub name: String,
    pub params: Vec<ParamShape>,
}

impl UnitShape {
    pub fn numel(&self) -> i64 {
        self.params.iter().map(ParamShape::numel).sum()
    }
}

/// A model's sizes. Units are in the order of a forward pass: embedding, layers, final norm and head
/// (with tied embeddings the head's matrix is in the embedding's unit).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShape {
    pub units: Vec<UnitShape>,
    pub hidden_size: i64,
    pub num_layers: usize,
    pub num_heads: i64,
    pub num_kv_heads: i64,
    pub head_dim: i64,
    pub intermediate_size: i64,
    pub vocab_size: i64,
}

impl ModelShape {
    /// Parameters of the whole model.
    pub fn num_params(&self) -> i64 {
        self.units.iter().map(UnitShape::numel).sum()
    }
}
