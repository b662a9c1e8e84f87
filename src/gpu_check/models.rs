//! Models with random weights in the shapes of real ones, made on the device itself: speed does not depend on what weights
//! mean, and a bare node has none.

use echelon_core::zero::{OptimizerConfig, Sharding};
use echelon_models::ModelError;
use echelon_models::config::{DecoderConfig, HeadKind, Rope, RopeScaling};
use echelon_models::decoder::Decoder;
use echelon_models::head::LogprobHead;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::program::Failure;
use echelon_roles::models::{Held, Policy, made_policy};

/// A model's shape by its name on the page.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub name: &'static str,
    pub hidden: i64,
    pub intermediate: i64,
    pub layers: usize,
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
    pub vocabulary: i64,
}

/// Qwen2.5-0.5B's.
pub const HALF_BILLION: Shape = Shape {
    name: "0.5b",
    hidden: 896,
    intermediate: 4864,
    layers: 24,
    heads: 14,
    kv_heads: 2,
    head_dim: 64,
    vocabulary: 151_936,
};

/// Qwen2.5-1.5B's.
pub const ONE_AND_A_HALF_BILLION: Shape = Shape {
    name: "1.5b",
    hidden: 1536,
    intermediate: 8960,
    layers: 28,
    heads: 12,
    kv_heads: 2,
    head_dim: 128,
    vocabulary: 151_936,
};

/// What a stand-in computes in seconds.
pub const TINY: Shape = Shape {
    name: "tiny",
    hidden: 64,
    intermediate: 160,
    layers: 2,
    heads: 4,
    kv_heads: 2,
    head_dim: 16,
    vocabulary: 1024,
};

impl Shape {
    pub fn config(&self) -> DecoderConfig {
        DecoderConfig {
            hidden_size: self.hidden,
            intermediate_size: self.intermediate,
            num_layers: self.layers,
            num_heads: self.heads,
            num_kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            vocab_size: self.vocabulary,
            max_positions: 32_768,
            norm_eps: 1e-6,
            rope: Rope { theta: 1e6, scaling: RopeScaling::None },
            qkv_bias: true,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: vec![None; self.layers],
            tied_embeddings: true,
            head: HeadKind::Logits,
            dtype: Some(Kind::BFloat16),
            initializer_range: DEVIATION,
        }
    }

    /// `config.json` of the same.
    pub fn config_json(&self) -> Value {
        json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocabulary, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "initializer_range": DEVIATION, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
            "use_sliding_window": false, "bos_token_id": 0, "eos_token_id": 0,
        })
    }

    /// Numbers that a key-value cache keeps for a token.
    pub fn cached_numbers(&self) -> f64 {
        (2 * self.layers as i64 * self.kv_heads * self.head_dim) as f64
    }

    pub fn num_params(&self) -> f64 {
        self.config().shape().num_params() as f64
    }
}

/// Of random weights, as models begin.
const DEVIATION: f64 = 0.02;

/// A parameter of a random model; the same each time.
pub fn random(name: &str, shape: &[i64], (kind, device): (Kind, Device)) -> Tensor {
    if name.ends_with("norm.weight") {
        return Tensor::ones(shape, (kind, device));
    }
    if name.ends_with(".bias") {
        return Tensor::zeros(shape, (kind, device));
    }
    let seed = name.bytes().fold(1i64, |seed, byte| (seed * 31 + i64::from(byte)) % 1_000_003);
    tch::manual_seed(seed);
    Tensor::randn(shape, (Kind::Float, device)).multiply_scalar(DEVIATION).to_kind(kind)
}

/// One that does not learn, made on `origin` and moved to `device`: the same numbers on all devices come from one.
pub fn frozen(
    config: &DecoderConfig,
    (kind, device): (Kind, Device),
    origin: Device,
) -> Result<(Decoder, LogprobHead), Failure> {
    let shape = config.shape();
    let mut load = |name: &str| -> Result<Tensor, ModelError> {
        let param = shape.units.iter().flat_map(|unit| &unit.params).find(|param| param.name == name);
        let param = param.expect("a parameter of this architecture");
        Ok(random(name, &param.shape, (Kind::Float, origin)).to_kind(kind).to_device(device))
    };
    let model = Decoder::new(config, &mut load).map_err(Failure::other)?;
    let head = LogprobHead::frozen(model.embedding().shallow_clone(), 1.0);
    Ok((model, head))
}

/// One that learns, made on its device.
pub fn learning(config: &DecoderConfig, held: Held) -> Result<Policy, Failure> {
    let place = (Kind::Float, held.pass.device);
    let made =
        made_policy(config, held, (OPTIMIZER, &Sharding::whole()), &mut |name, shape| Ok(random(name, shape, place)));
    Ok(made?)
}

pub const OPTIMIZER: OptimizerConfig =
    OptimizerConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.0, max_grad_norm: 1.0 };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_what_they_are_called_and_read_as_they_are_written() {
        for (shape, params) in [(HALF_BILLION, 494e6), (ONE_AND_A_HALF_BILLION, 1544e6)] {
            assert!((shape.num_params() / params - 1.0).abs() < 0.005, "{}: {}", shape.name, shape.num_params());
        }
        for shape in [HALF_BILLION, ONE_AND_A_HALF_BILLION, TINY] {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("config.json"), shape.config_json().to_string()).unwrap();
            assert_eq!(DecoderConfig::read(folder.path()).unwrap(), shape.config());
        }
    }
}
