//! Which layout of weights a model decodes fastest in on this processor, and at what price in memory: measured, because
//! libraries, dtypes, shapes and processors combine in ways that no list foretells.

use std::time::{Duration, Instant};

use echelon_core::shape::ModelShape;
use echelon_core::shim;
use echelon_core::weight_layout::{PackedLinear, WeightLayout};
use tch::{Device, Kind, Tensor};

/// Rows of the products: sequences that are decoded together.
const ROWS: i64 = 16;

/// Bytes of weights that are measured at most, as many layers as that has: they lie in memory then, not in a cache, as
/// those of a large model do.
const MOST_BYTES: usize = 64 << 20;

/// Parameters of a matrix that is measured; of a larger one, as many rows.
const MOST_PARAMS: i64 = 16 << 20;

/// Rounds of all layouts in turns: the fastest counts, for other programs only ever take time.
const ROUNDS: usize = 9;
const FEWEST_ROUNDS: usize = 3;
const LONG_ENOUGH: Duration = Duration::from_millis(300);

/// A second copy of the weights must save at least a tenth of the time.
const WORTH_A_COPY: f64 = 0.9;

/// Bytes that a layout may touch for each of the weights'. The memory ledger counts one; libraries fill up small matrices.
const MOST_MEMORY: f64 = 1.05;

/// Seconds that a pass over the matrices took in a layout.
pub type Measured = (WeightLayout, f64);

/// The matrices that stand for a model's while it decodes, `[out, in]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrices {
    layer: Vec<[i64; 2]>,
    num_layers: usize,
}

impl Matrices {
    pub fn of(shape: &ModelShape) -> Matrices {
        let params = shape.units.get(1).map_or(&[][..], |layer| &layer.params);
        let matrix = |shape: &Vec<i64>| <[i64; 2]>::try_from(shape.as_slice()).ok();
        let part = |[rows, columns]: [i64; 2]| [rows.min((MOST_PARAMS / columns.max(1)).max(1)), columns];
        let layer = params.iter().filter_map(|param| matrix(&param.shape)).map(part).collect();
        Matrices { layer, num_layers: shape.num_layers }
    }

    /// What two models have in common that are measured alike.
    pub fn describe(&self) -> String {
        let matrices = self.layer.iter().map(|[rows, columns]| format!("{rows}x{columns}"));
        format!("{} layers of {}", self.num_layers, matrices.collect::<Vec<_>>().join("+"))
    }

    fn weights(&self, kind: Kind) -> Vec<Tensor> {
        let params: i64 = self.layer.iter().map(|[rows, columns]| rows * columns).sum();
        let bytes = (params as usize * kind.elt_size_in_bytes()).max(1);
        let layers = (MOST_BYTES / bytes).clamp(1, self.num_layers.max(1));
        (0..layers).flat_map(|_| self.layer.iter().map(|shape| ramp(shape, kind))).collect()
    }
}

/// The weights of some layers in a layout.
struct Contender {
    layout: WeightLayout,
    packed: Vec<Option<PackedLinear>>,
    seconds: f64,
}

impl Contender {
    /// None where this processor or this build of libtorch does not have the layout, or it takes more memory than the
    /// ledger counts.
    fn new(layout: WeightLayout, weights: &[Tensor]) -> Option<Contender> {
        let bytes: usize = weights.iter().map(|weight| weight.numel() * weight.kind().elt_size_in_bytes()).sum();
        if !works(layout, weights.first()?.kind()) {
            return None;
        }
        let before = shim::live_bytes(Device::Cpu);
        let packed = weights.iter().map(|weight| PackedLinear::new(weight, None, ROWS, layout));
        let packed = packed.collect::<Result<Vec<_>, _>>().ok()?;
        let taken = shim::live_bytes(Device::Cpu).saturating_sub(before);
        let fits = taken as f64 <= MOST_MEMORY * bytes as f64;
        fits.then_some(Contender { layout, packed, seconds: f64::INFINITY })
    }

    fn run(&mut self, weights: &[Tensor], inputs: &[Tensor]) {
        let begun = Instant::now();
        for ((weight, packed), x) in weights.iter().zip(&self.packed).zip(inputs) {
            match packed {
                Some(packed) => drop(packed.forward(x)),
                None => drop(x.linear(weight, None::<&Tensor>)),
            }
        }
        self.seconds = self.seconds.min(begun.elapsed().as_secs_f64());
    }
}

/// Whether this processor and this build of libtorch multiply weights of `kind` in `layout`.
pub fn works(layout: WeightLayout, kind: Kind) -> bool {
    let _guard = tch::no_grad_guard();
    let (weight, x) = (Tensor::ones([64, 64], (kind, Device::Cpu)), Tensor::ones([2, 64], (kind, Device::Cpu)));
    layout == WeightLayout::Plain
        || PackedLinear::new(&weight, None, 2, layout)
            .is_ok_and(|packed| packed.is_some_and(|packed| packed.forward(&x).is_ok()))
}

/// The layouts that work for a model of these matrices, and take the memory that the ledger counts.
pub fn usable(kind: Kind, matrices: &Matrices) -> Vec<WeightLayout> {
    let _guard = tch::no_grad_guard();
    let weights = matrices.weights(kind);
    WeightLayout::ALL.into_iter().filter(|&layout| Contender::new(layout, &weights).is_some()).collect()
}

/// The fastest of the usable layouts, and what was measured. Takes some tenths of a second.
pub fn fastest(kind: Kind, matrices: &Matrices) -> (WeightLayout, Vec<Measured>) {
    let measured = measure(kind, matrices);
    shim::give_back_kept(Device::Cpu);
    (choose(&measured), measured)
}

fn measure(kind: Kind, matrices: &Matrices) -> Vec<Measured> {
    let _guard = tch::no_grad_guard();
    let weights = matrices.weights(kind);
    let inputs: Vec<Tensor> = weights.iter().map(|weight| ramp(&[ROWS, weight.size()[1]], kind)).collect();
    let contenders = WeightLayout::ALL.into_iter().filter_map(|layout| Contender::new(layout, &weights));
    let mut contenders: Vec<Contender> = contenders.collect();
    let begun = Instant::now();
    for round in 0..ROUNDS {
        if contenders.len() < 2 || (round >= FEWEST_ROUNDS && begun.elapsed() > LONG_ENOUGH) {
            break;
        }
        contenders.iter_mut().for_each(|contender| contender.run(&weights, &inputs));
    }
    contenders.iter().map(|contender| (contender.layout, contender.seconds)).collect()
}

fn choose(measured: &[Measured]) -> WeightLayout {
    let plain = measured.iter().find(|(layout, _)| *layout == WeightLayout::Plain).map_or(f64::INFINITY, |(_, s)| *s);
    let packed = measured.iter().filter(|(layout, _)| *layout != WeightLayout::Plain);
    match packed.min_by(|a, b| a.1.total_cmp(&b.1)) {
        Some((layout, seconds)) if *seconds <= WORTH_A_COPY * plain => *layout,
        _ => WeightLayout::Plain,
    }
}

/// Numbers of a usual size; denormal ones or zeros would be multiplied at another speed.
fn ramp(shape: &[i64], kind: Kind) -> Tensor {
    let numbers: i64 = shape.iter().product();
    (Tensor::arange(numbers, (Kind::Float, Device::Cpu)).remainder(251.0) / 251.0 - 0.5).view(shape).to_kind(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_wins_unless_a_copy_is_not_worth_it() {
        use WeightLayout::{Mkl, OneDnn, Plain};
        assert_eq!(choose(&[(Plain, 1.0), (Mkl, 0.8), (OneDnn, 0.5)]), OneDnn);
        assert_eq!(choose(&[(Plain, 1.0), (Mkl, 0.4), (OneDnn, 0.5)]), Mkl);
        assert_eq!(choose(&[(Plain, 1.0), (Mkl, 0.95), (OneDnn, 1.2)]), Plain);
        assert_eq!(choose(&[(Plain, 1.0)]), Plain);
    }

    #[test]
    fn what_is_chosen_is_usable_and_was_measured() {
        shim::install_cpu_allocator();
        let matrices = Matrices { layer: vec![[576, 576], [192, 576], [1536, 576], [576, 1536]], num_layers: 6 };
        for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
            let (layout, measured) = fastest(kind, &matrices);
            let usable = usable(kind, &matrices);
            println!("{kind:?}: {layout} of {usable:?}, {measured:?}");
            assert!(usable.contains(&layout) && usable.contains(&WeightLayout::Plain));
            assert!(kind != Kind::Double || usable == [WeightLayout::Plain]);
            assert!(measured.len() < 2 || measured.iter().all(|(_, seconds)| *seconds > 0.0 && seconds.is_finite()));
        }
    }
}
