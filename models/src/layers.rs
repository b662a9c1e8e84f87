//! The layers that every architecture is made of. Inputs are packed tokens `[N, …]` without padding.

use tch::{Kind, Tensor};

use crate::config::{Rope, RopeScaling};

/// `x Wᵀ + b`.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Linear {
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}

/// Root-mean-square norm over the last dimension, computed in f32 (f64 stays f64).
#[derive(Debug)]
pub struct RmsNorm {
    pub weight: Tensor,
    pub eps: f64,
}

impl RmsNorm {
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let wide = if kind == Kind::Double { x.shallow_clone() } else { x.to_kind(Kind::Float) };
        let scale = (wide.square().mean_dim(-1, true, None::<Kind>) + self.eps).rsqrt();
        (wide * scale).to_kind(kind) * &self.weight
    }
}

/// Rotary tables of a batch: cos and sin `[N, 1, head_dim / 2]`.
#[derive(Debug)]
pub struct RotaryTable {
    cos: Tensor,
    sin: Tensor,
}

impl RotaryTable {
    /// For `positions` `[N]`, angles in f32 as transformers computes them, values in `kind`.
    pub fn new(inverse_frequencies: &Tensor, positions: &Tensor, kind: Kind) -> RotaryTable {
        let angles = positions.to_kind(Kind::Float).unsqueeze(1) * inverse_frequencies.unsqueeze(0);
        RotaryTable { cos: angles.cos().unsqueeze(1).to_kind(kind), sin: angles.sin().unsqueeze(1).to_kind(kind) }
    }

    /// Rotates `[N, heads, head_dim]`, halves as pairs.
    pub fn rotate(&self, x: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let (left, right) = (&halves[0], &halves[1]);
        Tensor::cat(&[left * &self.cos - right * &self.sin, right * &self.cos + left * &self.sin], -1)
    }
}

/// `[head_dim / 2]` f32 inverse frequencies, scaled as the config says.
pub fn inverse_frequencies(rope: Rope, head_dim: i64) -> Tensor {
    let frequency = |i: i64| 1.0 / (rope.theta as f32).powf(2.0 * i as f32 / head_dim as f32);
    let scaled: Vec<f32> = (0..head_dim / 2).map(|i| scale_frequency(frequency(i), rope.scaling)).collect();
    Tensor::from_slice(&scaled)
}

fn scale_frequency(frequency: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f32,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            let wavelength = std::f32::consts::TAU / frequency;
            let (low, high) = (original_max_positions / low_freq_factor, original_max_positions / high_freq_factor);
            if wavelength < high as f32 {
                return frequency;
            }
            if wavelength > low as f32 {
                return frequency / factor as f32;
            }
            let ramp = original_max_positions as f32 / wavelength - low_freq_factor as f32;
            let smooth = ramp / (high_freq_factor - low_freq_factor) as f32;
            (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
        }
    }
}

/// Causal attention within each of the packed sequences: q `[N, heads, D]`, k and v `[N, kv_heads, D]` to `[N, heads, D]`.
pub fn packed_attention(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &[i64], window: Option<i64>) -> Tensor {
    let groups = q.size()[1] / k.size()[1];
    let (k, v) = (repeat_heads(k, groups), repeat_heads(v, groups));
    let split = |x: &Tensor| x.split_with_sizes(lengths, 0);
    let outputs: Vec<Tensor> =
        split(q).iter().zip(split(&k)).zip(split(&v)).map(|((q, k), v)| causal_attention(q, &k, &v, window)).collect();
    Tensor::cat(&outputs, 0)
}

/// One sequence: `[L, heads, D]` each.
fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor, window: Option<i64>) -> Tensor {
    let length = q.size()[0];
    let heads_first = |x: &Tensor| x.transpose(0, 1).unsqueeze(0);
    let mask = window.filter(|&window| window < length).map(|window| {
        let ones = Tensor::ones([length, length], (Kind::Bool, q.device()));
        ones.tril(0).logical_and(&ones.triu(1 - window))
    });
    let causal = mask.is_none();
    let (q, k, v) = (heads_first(q), heads_first(k), heads_first(v));
    let out = Tensor::scaled_dot_product_attention(&q, &k, &v, mask.as_ref(), 0.0, causal, None, false);
    out.squeeze_dim(0).transpose(0, 1)
}

/// `[N, kv_heads, D]` to `[N, kv_heads * groups, D]`, each head `groups` times in a row.
fn repeat_heads(x: &Tensor, groups: i64) -> Tensor {
    if groups == 1 {
        return x.shallow_clone();
    }
    let (n, heads, dim) = x.size3().expect("[N, kv_heads, D]");
    x.unsqueeze(2).expand([n, heads, groups, dim], false).reshape([n, heads * groups, dim])
}
