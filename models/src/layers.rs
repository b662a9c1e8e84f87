//! The layers that every architecture is made of. Inputs are packed tokens `[N, …]` without padding.

use echelon_core::shim;
use echelon_core::weight_layout::{PackedLinear, WeightLayout};
use tch::{Kind, TchError, Tensor};

use crate::config::{Rope, RopeScaling};

/// `x Wᵀ + b`.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    packed: Option<PackedLinear>,
}

impl Linear {
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Linear {
        Linear { weight, bias, packed: None }
    }

    /// The same layer with its weight in `layout` for inputs of `rows` rows, where libtorch has it; without gradients.
    pub fn packed(&self, rows: i64, layout: WeightLayout) -> Result<Linear, TchError> {
        let (weight, bias) = (self.weight.detach(), self.bias.as_ref().map(Tensor::detach));
        let packed = PackedLinear::new(&weight, bias.as_ref(), rows, layout)?;
        Ok(Linear { weight, bias, packed })
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        match &self.packed {
            Some(packed) if packed.rows() == x.size()[0] => packed.forward(x).expect("a packed layer's own shapes"),
            _ => x.linear(&self.weight, self.bias.as_ref()),
        }
    }
}

/// Root-mean-square norm over the last dimension, computed in f32 (f64 stays f64).
#[derive(Debug)]
pub struct RmsNorm {
    pub weight: Tensor,
    pub eps: f64,
}

impl RmsNorm {
    /// Another handle of the same layer.
    pub fn shallow_clone(&self) -> RmsNorm {
        RmsNorm { weight: self.weight.shallow_clone(), eps: self.eps }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        if shim::fuses(x) && shim::fuses(&self.weight) {
            return shim::rms_norm(x, &self.weight, self.eps).expect("a norm's own shapes");
        }
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
        if shim::fuses(x) && shim::fuses(&self.cos) {
            return shim::rotate(x, &self.cos, &self.sin).expect("a table of the same rows");
        }
        let halves = x.chunk(2, -1);
        let (left, right) = (&halves[0], &halves[1]);
        Tensor::cat(&[left * &self.cos - right * &self.sin, right * &self.cos + left * &self.sin], -1)
    }
}

/// `silu(gate) * up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    if shim::fuses(gate) && shim::fuses(up) {
        return shim::swiglu(gate, up).expect("gate and up of one shape");
    }
    gate.silu() * up
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

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn numbers(size: &[i64], seed: f64) -> Tensor {
        let count: i64 = size.iter().product();
        ((Tensor::arange(count, tch::kind::DOUBLE_CPU) + seed) * 12.9898).sin().view(size) * 3.0
    }

    /// Output and gradients of `layer` on f32 copies of `inputs` against the same in f64, where every step is libtorch's.
    fn agrees_with_f64(inputs: &[Tensor], layer: impl Fn(&[Tensor]) -> Tensor) {
        let run = |kind: Kind| {
            let inputs: Vec<Tensor> = inputs.iter().map(|x| x.to_kind(kind).set_requires_grad(true)).collect();
            let output = layer(&inputs);
            let weights = numbers(&output.size(), 0.9).to_kind(kind);
            (&output * weights).sum(kind).backward();
            let grads = inputs.iter().map(Tensor::grad).filter(Tensor::defined).map(|g| g.to_kind(Kind::Double));
            let output = output.detach().to_kind(Kind::Double);
            let unrecorded = tch::no_grad(|| layer(&inputs)).to_kind(Kind::Double);
            assert_eq!(output, unrecorded, "with and without a graph");
            std::iter::once(output).chain(grads).collect::<Vec<Tensor>>()
        };
        let (single, double) = (run(Kind::Float), run(Kind::Double));
        assert_eq!(single.len(), double.len());
        for (index, (single, double)) in single.iter().zip(&double).enumerate() {
            let scale = double.abs().max().double_value(&[]);
            let difference = (single - double).abs().max().double_value(&[]) / scale;
            assert!(difference < 2e-6, "output or gradient {index} differs by {difference}");
        }
    }

    /// Widths that fill no vector register, and enough rows for several threads.
    #[test]
    fn a_fused_norm_is_the_norm() {
        for size in [[1, 5], [3, 16], [700, 64], [90, 577]] {
            agrees_with_f64(&[numbers(&size, 0.1), numbers(&size[1..], 0.5)], |x| {
                RmsNorm { weight: x[1].shallow_clone(), eps: 1e-5 }.forward(&x[0])
            });
        }
    }

    #[test]
    fn a_fused_rotation_is_the_rotation() {
        let frequencies = Tensor::from_slice(&[1.0f32, 0.5, 0.03]);
        for rows in [1i64, 900] {
            let positions = Tensor::arange(rows, (Kind::Int64, Device::Cpu)).remainder(50);
            agrees_with_f64(&[numbers(&[rows, 5, 6], 0.2)], |x| {
                RotaryTable::new(&frequencies, &positions, x[0].kind()).rotate(&x[0])
            });
        }
    }

    #[test]
    fn a_fused_gate_is_the_gate() {
        agrees_with_f64(&[numbers(&[900, 33], 0.2) * 8.0, numbers(&[900, 33], 0.7)], |x| swiglu(&x[0], &x[1]));
        let far = Tensor::from_slice(&[-200f32, -90.0, 90.0, 200.0, f32::NAN]);
        let gated = Vec::<f32>::try_from(swiglu(&far, &far.ones_like())).unwrap();
        assert!(gated[..2].iter().all(|x| x.abs() < 1e-30) && gated[2..4] == [90.0, 200.0] && gated[4].is_nan());
    }

    #[test]
    fn a_packed_layer_is_the_layer() {
        let (weight, bias) = (numbers(&[48, 40], 0.3), numbers(&[48], 0.8));
        let kinds = [Kind::Float, Kind::BFloat16, Kind::Double];
        for (kind, layout) in kinds.into_iter().flat_map(|kind| WeightLayout::ALL.map(|layout| (kind, layout))) {
            let [weight, bias, x] = [&weight, &bias, &numbers(&[6, 40], 0.6)].map(|x| x.to_kind(kind));
            for bias in [None, Some(bias)] {
                let layer = Linear::new(weight.shallow_clone(), bias);
                // bf16 in oneDNN's layout needs instructions that not every processor has.
                let Ok(packed) = layer.packed(6, layout) else {
                    assert_eq!((kind, layout), (Kind::BFloat16, WeightLayout::OneDnn));
                    continue;
                };
                for x in [x.shallow_clone(), x.narrow(0, 0, 2)] {
                    let [plain, packed] = [&layer, &packed].map(|l| l.forward(&x).to_kind(Kind::Double));
                    let difference = (&plain - packed).abs().max().double_value(&[]);
                    let allowed = if kind == Kind::BFloat16 { 1e-2 } else { 1e-5 };
                    assert!(
                        difference <= allowed * plain.abs().max().double_value(&[]),
                        "{kind:?} {layout}: {difference}"
                    );
                }
            }
        }
    }
}
