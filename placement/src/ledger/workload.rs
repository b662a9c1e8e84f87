//! What a step works on: the models' shapes and the batch.

pub use echelon_core::compute::ComputeDtype;
use echelon_core::role::Role;
use echelon_core::shape::{ModelShape, TensorParallelAxis, UnitShape};
use serde::{Deserialize, Serialize};

use crate::tier::ROLES;

/// One PPO step: which models there are, and how much goes through them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// Also the generator's model.
    pub actor: ModelShape,
    /// None for algorithms without one.
    pub critic: Option<ModelShape>,
    /// None when the KL coefficient is 0.
    pub reference: Option<ModelShape>,
    /// None when responses are scored without a model.
    pub reward: Option<ModelShape>,
    /// Prompts per step.
    pub prompts: usize,
    pub samples_per_prompt: usize,
    /// Longest prompt and response: what memory is reserved for.
    pub max_prompt_tokens: usize,
    pub max_response_tokens: usize,
    /// Expected prompt and response: what time is estimated for.
    pub mean_prompt_tokens: f64,
    pub mean_response_tokens: f64,
    /// Responses per optimizer step, over all ranks.
    pub mini_batch: usize,
    pub epochs: usize,
    /// Tokens per forward and backward pass on one device; a longer sequence goes alone.
    pub tokens_per_micro_batch: usize,
    pub dtype: ComputeDtype,
    pub activation_checkpointing: bool,
    /// The actor's loss has an entropy term: its backward pass needs one more copy of the logits.
    pub entropy_in_loss: bool,
    /// The reference's weights stay in host memory and come to the device for its turn.
    pub reference_offload: bool,
    /// Most sequences that one engine decodes at once; fewer where memory is short.
    pub max_sequences: usize,
    /// Tokens of one prefill pass.
    pub max_batched_tokens: usize,
    /// Limit of one device's KV cache; None is what is free, up to `max_sequences` of full length.
    pub kv_cache_bytes: Option<u64>,
}

impl Workload {
    /// The roles that have a model, in the order in which they are shown.
    pub fn roles(&self) -> Vec<Role> {
        ROLES.into_iter().filter(|role| self.shape(*role).is_some()).collect()
    }

    /// The model of a role; the generator's is the actor's.
    pub fn shape(&self, role: Role) -> Option<&ModelShape> {
        match role {
            Role::Actor | Role::Generator => Some(&self.actor),
            Role::Critic => self.critic.as_ref(),
            Role::Reference => self.reference.as_ref(),
            Role::Reward => self.reward.as_ref(),
        }
    }

    /// Responses per step.
    pub fn responses(&self) -> usize {
        self.prompts * self.samples_per_prompt
    }

    /// Optimizer steps of one role per step.
    pub fn optimizer_steps(&self) -> usize {
        self.responses().div_ceil(self.mini_batch) * self.epochs
    }

    /// Tokens of the longest sequence.
    pub fn max_tokens(&self) -> usize {
        self.max_prompt_tokens + self.max_response_tokens
    }

    /// Tokens of the expected sequence.
    pub fn mean_tokens(&self) -> f64 {
        self.mean_prompt_tokens + self.mean_response_tokens
    }

    /// Tokens in the largest micro-batch when a rank has `rows` rows: whole rows of full length up to
    /// `tokens_per_micro_batch`, at least one.
    pub fn tokens_at_once(&self, rows: usize) -> usize {
        let together = (self.tokens_per_micro_batch / self.max_tokens()).max(1);
        let packed = self.tokens_per_micro_batch.max(self.max_tokens());
        // Shorter rows fill a micro-batch to its limit, when there are enough of them.
        if rows <= together { rows * self.max_tokens() } else { packed }
    }

    /// Micro-batches that `rows` rows of expected length make on one rank.
    pub fn micro_batches(&self, rows: usize) -> usize {
        let together = (self.tokens_per_micro_batch as f64 / self.mean_tokens()).floor().max(1.0);
        (rows as f64 / together).ceil() as usize
    }

    /// Sequences that one of `engines` engines has in a step.
    pub fn sequences(&self, engines: usize) -> usize {
        self.prompts.div_ceil(engines) * self.samples_per_prompt
    }

    /// Most sequences that one of `engines` engines decodes at once: as many as there are, as `max_sequences` and
    /// `kv_cache_bytes` allow.
    pub fn slots_wanted(&self, engines: usize, kv_bytes_per_token: u64) -> usize {
        let slots = self.max_sequences.min(self.sequences(engines));
        let one = (kv_bytes_per_token * self.max_tokens() as u64).max(1);
        self.kv_cache_bytes.map_or(slots, |budget| slots.min((budget / one) as usize))
    }
}

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
