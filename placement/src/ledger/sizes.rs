//! A model in numbers.

use echelon_core::compute::ComputeDtype;
use echelon_core::shape::{ModelShape, TensorParallelAxis, UnitShape};

/// What ledger and estimates need to know of a model, read off its shape once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelSizes {
    /// Ψ.
    pub params: u64,
    pub largest_unit: u64,
    /// The first unit: the embedding.
    pub embedding_unit: u64,
    /// The largest transformer layer.
    pub layer_unit: u64,
    /// The last unit: final norm, and the head where it is not the embedding's matrix.
    pub last_unit: u64,
    /// Whether the head reads the embedding's matrix.
    pub tied: bool,
    pub num_units: u64,
    /// Parameters of all transformer layers: those that every token is multiplied with.
    pub layer_params: u64,
    pub num_layers: u64,
    pub hidden: u64,
    pub intermediate: u64,
    /// Width of all query heads.
    pub query_width: u64,
    /// Width of all key heads, and of all value heads.
    pub kv_width: u64,
    pub num_heads: u64,
    pub vocab: u64,
    pub num_kv_heads: u64,
    replicated_params: u64,
}

impl ModelSizes {
    pub fn of(shape: &ModelShape) -> ModelSizes {
        let units: Vec<u64> = shape.units.iter().map(|unit| unit.numel() as u64).collect();
        let inner = units.len().saturating_sub(1).max(1);
        let layers = units.get(1..inner).unwrap_or_default();
        let matrices = |unit: &UnitShape| unit.params.iter().any(|param| param.shape.len() > 1);
        let params = shape.units.iter().flat_map(|unit| &unit.params);
        let whole = params.filter(|param| param.axis == TensorParallelAxis::Replicated);
        ModelSizes {
            params: shape.num_params() as u64,
            largest_unit: units.iter().copied().max().unwrap_or(0),
            embedding_unit: units.first().copied().unwrap_or(0),
            layer_unit: layers.iter().copied().max().unwrap_or(0),
            last_unit: units.last().copied().unwrap_or(0),
            tied: !shape.units.last().is_some_and(matrices),
            num_units: units.len() as u64,
            layer_params: layers.iter().sum(),
            num_layers: shape.num_layers as u64,
            hidden: shape.hidden_size as u64,
            intermediate: shape.intermediate_size as u64,
            query_width: (shape.num_heads * shape.head_dim) as u64,
            kv_width: (shape.num_kv_heads * shape.head_dim) as u64,
            num_heads: shape.num_heads as u64,
            vocab: shape.vocab_size as u64,
            num_kv_heads: shape.num_kv_heads as u64,
            replicated_params: whole.map(|param| param.numel() as u64).sum(),
        }
    }

    /// Whether `size` devices can share the model: heads, key-value heads and the gated width are divided evenly.
    pub fn splits_into(&self, size: usize) -> bool {
        let size = size as u64;
        [self.num_heads, self.num_kv_heads, self.intermediate].iter().all(|width| width.is_multiple_of(size))
    }

    /// Parameters on one of `size` tensor-parallel devices: every split parameter's part and the replicated ones whole.
    pub fn tensor_parallel_params(&self, size: usize) -> u64 {
        (self.params - self.replicated_params).div_ceil(size as u64) + self.replicated_params
    }

    /// Bytes of one token's keys and values on one of `size` tensor-parallel devices.
    pub fn kv_bytes_per_token(&self, dtype: ComputeDtype, size: usize) -> u64 {
        2 * self.num_layers * self.kv_width * dtype.bytes() / size as u64
    }
}
