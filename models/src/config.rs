//! `config.json` of a Hugging Face folder, in the form that transformers 4 or 5 writes, as a [`DecoderConfig`].

use std::path::{Path, PathBuf};

use echelon_core::shape::{ModelShape, ParamShape, TensorParallelAxis, UnitShape};
use serde_json::Value;
use tch::Kind;

use crate::error::{ModelError, Result};

/// Everything that tells one decoder from another.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_layers: usize,
    pub num_heads: i64,
    pub num_kv_heads: i64,
    pub head_dim: i64,
    pub vocab_size: i64,
    pub max_positions: i64,
    pub norm_eps: f64,
    pub rope: Rope,
    /// Biases of the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub output_bias: bool,
    pub mlp_bias: bool,
    /// RMS norms on each head's q and k.
    pub qk_norm: bool,
    /// Per layer: how many of the latest positions a token sees; None is all.
    pub windows: Vec<Option<i64>>,
    pub tied_embeddings: bool,
    /// What reads the last hidden state.
    pub head: HeadKind,
    /// Dtype that the file says its weights have.
    pub dtype: Option<Kind>,
    pub initializer_range: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadKind {
    /// Vocabulary logits, `lm_head.weight` or the embedding.
    Logits,
    /// One number, `score.weight` `[1, H]`.
    Score,
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions divided by the factor.
    Linear {
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_positions: f64,
    },
}

impl DecoderConfig {
    /// Layer units and parameters, by Hugging Face names.
    pub fn shape(&self) -> ModelShape {
        use TensorParallelAxis::{Columns, KeyValueRows, Replicated, Rows};
        let param = |name: String, shape: &[i64], axis| ParamShape { name, shape: shape.into(), axis, trainable: true };
        let (h, f, v) = (self.hidden_size, self.intermediate_size, self.vocab_size);
        let mut units = vec![UnitShape {
            name: "embedding".into(),
            params: vec![param("model.embed_tokens.weight".into(), &[v, h], Rows)],
        }];
        for layer in 0..self.num_layers {
            let mut params = Vec::new();
            let mut add = |name: &str, shape: &[i64], axis| {
                params.push(param(format!("model.layers.{layer}.{name}"), shape, axis))
            };
            let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
            add("input_layernorm.weight", &[h], Replicated);
            for (name, rows, axis) in [("q", q, Rows), ("k", kv, KeyValueRows), ("v", kv, KeyValueRows)] {
                add(&format!("self_attn.{name}_proj.weight"), &[rows, h], axis);
                if self.qkv_bias {
                    add(&format!("self_attn.{name}_proj.bias"), &[rows], axis);
                }
            }
            add("self_attn.o_proj.weight", &[h, q], Columns);
            if self.output_bias {
                add("self_attn.o_proj.bias", &[h], Replicated);
            }
            if self.qk_norm {
                add("self_attn.q_norm.weight", &[self.head_dim], Replicated);
                add("self_attn.k_norm.weight", &[self.head_dim], Replicated);
            }
            add("post_attention_layernorm.weight", &[h], Replicated);
            for (name, shape, axis) in [("gate", [f, h], Rows), ("up", [f, h], Rows), ("down", [h, f], Columns)] {
                add(&format!("mlp.{name}_proj.weight"), &shape, axis);
                if self.mlp_bias {
                    add(&format!("mlp.{name}_proj.bias"), &shape[..1], if axis == Rows { Rows } else { Replicated });
                }
            }
            units.push(UnitShape { name: format!("layer {layer}"), params });
        }
        let mut last = vec![param("model.norm.weight".into(), &[h], Replicated)];
        match self.head {
            HeadKind::Score => last.push(param("score.weight".into(), &[1, h], Replicated)),
            HeadKind::Logits if !self.tied_embeddings => last.push(param("lm_head.weight".into(), &[v, h], Rows)),
            HeadKind::Logits => {}
        }
        units.push(UnitShape { name: "head".into(), params: last });
        ModelShape {
            units,
            hidden_size: h,
            num_layers: self.num_layers,
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            intermediate_size: f,
            vocab_size: v,
        }
    }
}

/// A parsed `config.json` whose getters name the file and key in their errors.
pub struct ConfigFile {
    pub path: PathBuf,
    value: Value,
}

impl ConfigFile {
    pub fn read(path: &Path) -> Result<ConfigFile> {
        Ok(ConfigFile { path: path.into(), value: read_json(path)? })
    }

    /// The value at `key`; null counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    pub fn wrong(&self, key: &str, expected: &str, found: &str) -> ModelError {
        ModelError::Config { path: self.path.clone(), key: key.into(), expected: expected.into(), found: found.into() }
    }

    fn required<T>(&self, key: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<T> {
        self.optional(key, expected, read)?.ok_or_else(|| self.wrong(key, expected, "no such key"))
    }

    fn optional<T>(&self, key: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.wrong(key, expected, &value.to_string())),
        }
    }

    pub fn size(&self, key: &str) -> Result<i64> {
        self.required(key, "a positive whole number", positive)
    }

    pub fn size_or(&self, key: &str, default: i64) -> Result<i64> {
        Ok(self.optional(key, "a positive whole number", positive)?.unwrap_or(default))
    }

    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.optional(key, "a number", Value::as_f64)?.unwrap_or(default))
    }

    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.optional(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    pub fn text(&self, key: &str) -> Result<String> {
        self.required(key, "a string", |value| value.as_str().map(String::from))
    }

    /// What all supported architectures say in the same words. Biases, norms and windows are left off.
    pub fn decoder(&self) -> Result<DecoderConfig> {
        let hidden_size = self.size("hidden_size")?;
        let num_heads = self.size("num_attention_heads")?;
        let num_kv_heads = self.size_or("num_key_value_heads", num_heads)?;
        if num_heads % num_kv_heads != 0 {
            let expected = format!("a divisor of num_attention_heads = {num_heads}");
            return Err(self.wrong("num_key_value_heads", &expected, &num_kv_heads.to_string()));
        }
        let activation = self.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
        if activation != "silu" {
            return Err(self.wrong("hidden_act", "\"silu\"", activation));
        }
        let num_layers = self.size("num_hidden_layers")? as usize;
        Ok(DecoderConfig {
            hidden_size,
            intermediate_size: self.size("intermediate_size")?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim: self.size_or("head_dim", hidden_size / num_heads)?,
            vocab_size: self.size("vocab_size")?,
            max_positions: self.size_or("max_position_embeddings", 2048)?,
            norm_eps: self.number_or("rms_norm_eps", 1e-6)?,
            rope: self.rope()?,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: vec![None; num_layers],
            tied_embeddings: self.flag_or("tie_word_embeddings", false)?,
            head: self.head()?,
            dtype: self.dtype()?,
            initializer_range: self.number_or("initializer_range", 0.02)?,
        })
    }

    fn head(&self) -> Result<HeadKind> {
        let names: Vec<&str> = self
            .get("architectures")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        if !names.iter().any(|name| name.ends_with("ForSequenceClassification")) {
            return Ok(HeadKind::Logits);
        }
        let labels = self.get("num_labels").and_then(Value::as_i64);
        let labels =
            labels.or_else(|| self.get("id2label").and_then(Value::as_object).map(|map| map.len() as i64)).unwrap_or(1);
        if labels != 1 {
            return Err(self.wrong("num_labels", "1 (a scalar score head)", &labels.to_string()));
        }
        Ok(HeadKind::Score)
    }

    fn dtype(&self) -> Result<Option<Kind>> {
        let Some(value) = self.get("dtype").or_else(|| self.get("torch_dtype")) else { return Ok(None) };
        match value.as_str().map(|name| name.trim_start_matches("torch.")) {
            Some("float32") => Ok(Some(Kind::Float)),
            Some("float16") => Ok(Some(Kind::Half)),
            Some("bfloat16") => Ok(Some(Kind::BFloat16)),
            Some("float64") => Ok(Some(Kind::Double)),
            _ => Err(self.wrong("dtype", "float32, float16 or bfloat16", &value.to_string())),
        }
    }

    /// `rope_parameters` (transformers 5), else `rope_theta` and `rope_scaling` (transformers 4).
    fn rope(&self) -> Result<Rope> {
        let v5 = self.get("rope_parameters");
        let (table, key) = match v5 {
            Some(table) => (Some(table), "rope_parameters"),
            None => (self.get("rope_scaling"), "rope_scaling"),
        };
        let number = |name: &str| table.and_then(|table| table.get(name)).and_then(Value::as_f64);
        let theta = match number("rope_theta") {
            Some(theta) => theta,
            None => self.number_or("rope_theta", 10_000.0)?,
        };
        let kind = table
            .and_then(|t| t.get("rope_type").or_else(|| t.get("type")))
            .and_then(Value::as_str)
            .unwrap_or("default");
        let need =
            |name: &str| number(name).ok_or_else(|| self.wrong(&format!("{key}.{name}"), "a number", "no such key"));
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: need("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_positions: need("original_max_position_embeddings")?,
            },
            other => return Err(self.wrong(&format!("{key}.rope_type"), "default, linear or llama3", other)),
        };
        Ok(Rope { theta, scaling })
    }

    /// The sliding window of each layer: `layer_types` where the file has it, else `window` on layers from `first`.
    pub fn windows(&self, num_layers: usize, window: Option<i64>, first: usize) -> Result<Vec<Option<i64>>> {
        let Some(types) = self.get("layer_types").and_then(Value::as_array) else {
            return Ok((0..num_layers).map(|layer| window.filter(|_| layer >= first)).collect());
        };
        if types.len() != num_layers {
            return Err(self.wrong("layer_types", &format!("{num_layers} entries"), &types.len().to_string()));
        }
        types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => Ok(window),
                _ => Err(self.wrong("layer_types", "full_attention or sliding_attention", &kind.to_string())),
            })
            .collect()
    }
}

pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|source| ModelError::Io { path: path.into(), source })?;
    serde_json::from_str(&text).map_err(|source| ModelError::Json { path: path.into(), source })
}

fn positive(value: &Value) -> Option<i64> {
    value.as_i64().filter(|&n| n > 0)
}
