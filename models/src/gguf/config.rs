//! `config.json` from a GGUF file's metadata.

use serde_json::{Value as Json, json};

use super::ImportError;
use super::header::Header;
use super::tokenizer::SpecialTokens;
use super::weights::WeightDtype;

/// The tensor in which Llama 3.1 and later keep the divisor of each rotation frequency.
pub(super) const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// Architectures that are imported. Mistral is stored as `llama`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
}

impl Architecture {
    const SUPPORTED: &str = "llama (also Mistral and SmolLM), qwen2, qwen3";

    fn from_name(name: &str) -> Option<Self> {
        [Self::Llama, Self::Qwen2, Self::Qwen3].into_iter().find(|known| known.name() == name)
    }

    /// The name in `general.architecture`, also the prefix of the model's keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// Sizes and constants of the model, as its keys and tensors give them.
#[derive(Debug, Clone)]
pub(super) struct ModelConfig {
    pub architecture: Architecture,
    pub hidden_size: u64,
    pub num_layers: u64,
    pub num_heads: u64,
    pub num_kv_heads: u64,
    pub head_dim: u64,
    pub intermediate_size: u64,
    pub context_length: u64,
    pub vocab_size: u64,
    pub tied_embeddings: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    rms_norm_eps: f64,
    rope_theta: f64,
    rope_scaling: Json,
    sliding_window: Option<u64>,
}

impl ModelConfig {
    /// `rope_divisors` are the values of the tensor [`ROPE_DIVISORS`], if the file has it.
    ///
    /// # Errors
    /// An architecture that is not supported, a key that is missing, of another type or out of range.
    pub fn from_header(header: &Header, rope_divisors: Option<&[f32]>) -> Result<Self, ImportError> {
        refuse_parts(header)?;
        let architecture = architecture(header)?;
        let keys = Keys { header, prefix: architecture.name() };
        let hidden_size = keys.positive("embedding_length")?;
        let num_heads = keys.positive("attention.head_count")?;
        let num_kv_heads = keys.count("attention.head_count_kv")?.unwrap_or(num_heads);
        if num_kv_heads == 0 || num_heads % num_kv_heads != 0 {
            let expected = format!("a divisor of the {num_heads} heads");
            return Err(header.key_error(&keys.name("attention.head_count_kv"), &expected, num_kv_heads.to_string()));
        }
        let head_dim = head_dim(&keys, hidden_size, num_heads)?;
        let rope_theta = keys.positive_float("rope.freq_base", Some(10000.0))?;
        let rope_scaling = match rope_divisors {
            Some(divisors) => llama3_scaling(header, divisors, rope_theta, head_dim)?,
            None => rope_scaling(&keys)?,
        };
        Ok(Self {
            architecture,
            hidden_size,
            num_layers: keys.positive("block_count")?,
            num_heads,
            num_kv_heads,
            head_dim,
            intermediate_size: keys.positive("feed_forward_length")?,
            context_length: keys.positive("context_length")?,
            vocab_size: vocab_size(header)?,
            tied_embeddings: header.tensor("output.weight").is_none(),
            attention_bias: header.tensor("blk.0.attn_q.bias").is_some(),
            mlp_bias: header.tensor("blk.0.ffn_gate.bias").is_some(),
            rms_norm_eps: keys.positive_float("attention.layer_norm_rms_epsilon", None)?,
            rope_theta,
            rope_scaling,
            sliding_window: keys.count("attention.sliding_window")?.filter(|window| *window > 0),
        })
    }

    /// `config.json`, in the form that transformers 4 and 5 both read.
    pub fn to_json(&self, special: &SpecialTokens, dtype: WeightDtype) -> Json {
        let mut config = json!({
            "architectures": [self.class_name()],
            "model_type": self.model_type(),
            "attention_dropout": 0.0,
            "bos_token_id": special.bos_id(),
            "eos_token_id": special.eos_json(),
            "pad_token_id": special.pad_id(),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.context_length,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": self.rope_scaling,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied_embeddings,
            "torch_dtype": dtype.torch_name(),
            "use_cache": true,
            "vocab_size": self.vocab_size,
        });
        match self.model_type() {
            "llama" => {
                config["attention_bias"] = json!(self.attention_bias);
                config["mlp_bias"] = json!(self.mlp_bias);
            }
            "mistral" => config["sliding_window"] = json!(self.sliding_window),
            _ => config["use_sliding_window"] = json!(false),
        }
        if self.architecture == Architecture::Qwen3 {
            config["attention_bias"] = json!(self.attention_bias);
        }
        config
    }

    /// A llama with a sliding window is a Mistral.
    fn model_type(&self) -> &'static str {
        match self.architecture {
            Architecture::Llama if self.sliding_window.is_some() => "mistral",
            architecture => architecture.name(),
        }
    }

    fn class_name(&self) -> &'static str {
        match self.model_type() {
            "llama" => "LlamaForCausalLM",
            "mistral" => "MistralForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            _ => "Qwen3ForCausalLM",
        }
    }
}

fn architecture(header: &Header) -> Result<Architecture, ImportError> {
    let key = "general.architecture";
    let name = header.text(key)?.ok_or_else(|| header.missing(key, "the name of an architecture"))?;
    let unsupported = || ImportError::unsupported(&header.file, "architecture", name, Architecture::SUPPORTED);
    Architecture::from_name(name).ok_or_else(unsupported)
}

/// A file that is one of several lacks most tensors: say so instead of naming the first that is missing.
fn refuse_parts(header: &Header) -> Result<(), ImportError> {
    match header.count("split.count")? {
        Some(parts) if parts > 1 => {
            let supported = "one file (llama-gguf-split --merge joins the parts)";
            let (what, found) = ("a model split into several files,", format!("{parts} parts,"));
            Err(ImportError::unsupported(&header.file, what, &found, supported))
        }
        _ => Ok(()),
    }
}

fn vocab_size(header: &Header) -> Result<u64, ImportError> {
    const EMBEDDING: &str = "token_embd.weight";
    let missing = || header.tensor_error(EMBEDDING, "the token embedding".to_owned(), "no such tensor".to_owned());
    header.tensor(EMBEDDING).map(|entry| entry.shape[0]).ok_or_else(missing)
}

/// Keys of one architecture.
struct Keys<'a> {
    header: &'a Header,
    prefix: &'static str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn count(&self, key: &str) -> Result<Option<u64>, ImportError> {
        self.header.count(&self.name(key))
    }

    fn positive(&self, key: &str) -> Result<u64, ImportError> {
        let expected = "a positive integer";
        match self.count(key)? {
            Some(0) => Err(self.header.key_error(&self.name(key), expected, "0".to_owned())),
            Some(count) => Ok(count),
            None => Err(self.header.missing(&self.name(key), expected)),
        }
    }

    fn positive_float(&self, key: &str, default: Option<f64>) -> Result<f64, ImportError> {
        let expected = "a positive number";
        match self.header.float(&self.name(key))?.or(default) {
            Some(number) if number > 0.0 => Ok(number),
            Some(number) => Err(self.header.key_error(&self.name(key), expected, number.to_string())),
            None => Err(self.header.missing(&self.name(key), expected)),
        }
    }
}

fn head_dim(keys: &Keys, hidden_size: u64, num_heads: u64) -> Result<u64, ImportError> {
    let head_dim = keys.count("attention.key_length")?.unwrap_or(hidden_size / num_heads);
    let even = "a positive even number";
    if head_dim == 0 || head_dim % 2 != 0 {
        return Err(keys.header.key_error(&keys.name("attention.key_length"), even, head_dim.to_string()));
    }
    // A rotation of part of the head, or values of another width, are other architectures.
    for key in ["rope.dimension_count", "attention.value_length"] {
        match keys.count(key)? {
            Some(other) if other != head_dim => {
                let expected = format!("{head_dim}, the size of a head");
                return Err(keys.header.key_error(&keys.name(key), &expected, other.to_string()));
            }
            _ => {}
        }
    }
    Ok(head_dim)
}

/// `rope_scaling` of `config.json` from the keys, when there are no [`ROPE_DIVISORS`].
fn rope_scaling(keys: &Keys) -> Result<Json, ImportError> {
    match keys.header.text(&keys.name("rope.scaling.type"))? {
        None | Some("none") => Ok(Json::Null),
        Some("linear") => {
            Ok(json!({"rope_type": "linear", "factor": keys.positive_float("rope.scaling.factor", None)?}))
        }
        Some(other) => Err(ImportError::unsupported(&keys.header.file, "rope scaling", other, "none, linear, llama3")),
    }
}

/// The trained context of Llama 3, from which Llama 3.1 and later were stretched.
const LLAMA3_CONTEXT: f64 = 8192.0;
const LLAMA3_LOW_FREQ_FACTOR: f64 = 1.0;
const LLAMA3_HIGH_FREQ_FACTOR: f64 = 4.0;

/// Llama 3.1 and later divide low frequencies by a factor. GGUF keeps only the divisor of each frequency: the one of
/// the lowest is the factor, the other constants are the same in every published Llama. They are checked by computing
/// all divisors from them.
fn llama3_scaling(header: &Header, divisors: &[f32], rope_theta: f64, head_dim: u64) -> Result<Json, ImportError> {
    let factor = divisors.last().copied().map_or(1.0, f64::from);
    let expected = llama3_divisors(factor, rope_theta, head_dim);
    let close = |(a, b): (&f64, &f32)| (a - f64::from(*b)).abs() <= 1e-3 * a.abs();
    if divisors.len() != expected.len() || !expected.iter().zip(divisors).all(close) {
        let expected = format!("Llama 3's {} frequency divisors {expected:.4?}", expected.len());
        return Err(header.tensor_error(ROPE_DIVISORS, expected, format!("{divisors:.4?}")));
    }
    Ok(json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": LLAMA3_HIGH_FREQ_FACTOR, "original_max_position_embeddings": LLAMA3_CONTEXT as u64,
    }))
}

fn llama3_divisors(factor: f64, rope_theta: f64, head_dim: u64) -> Vec<f64> {
    let divisor = |pair: u64| {
        let frequency = rope_theta.powf(-2.0 * pair as f64 / head_dim as f64);
        let turns = LLAMA3_CONTEXT * frequency / std::f64::consts::TAU;
        let smooth = (turns - LLAMA3_LOW_FREQ_FACTOR) / (LLAMA3_HIGH_FREQ_FACTOR - LLAMA3_LOW_FREQ_FACTOR);
        let smooth = smooth.clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    (0..head_dim / 2).map(divisor).collect()
}
