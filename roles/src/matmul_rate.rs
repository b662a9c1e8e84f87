//! How fast a device multiplies: what the model FLOPs utilisation of a run is a part of.

use std::time::{Duration, Instant};

use echelon_core::shim;
use tch::{Device, Kind, Tensor};

/// Sides of the square matrices: a CPU is full with the first, a GPU with the last at most.
const SIDES: [i64; 4] = [1024, 2048, 4096, 8192];

/// A device that takes so long for one product is full.
const LONG: Duration = Duration::from_millis(2);

/// After so long for one side no more tries.
const ENOUGH: Duration = Duration::from_millis(200);

/// Of a GPU's free memory, what the matrices may take.
const SHARE: usize = 16;

/// Floating-point operations per second of the best of some products of square matrices; 0 where there is no room for any. On a
/// GPU it is measured before there is anything else, and its memory is given back: the ledger knows nothing of it.
pub fn matmul_rate(kind: Kind, device: Device) -> f64 {
    let rate = best_rate(kind, device).unwrap_or(0.0);
    if device != Device::Cpu {
        shim::give_back_kept(device);
    }
    rate
}

fn best_rate(kind: Kind, device: Device) -> Result<f64, tch::TchError> {
    let room = shim::free_and_total_bytes(device).map(|(free, _)| free / SHARE);
    let fits = |side: &i64| room.is_none_or(|room| 2 * side.pow(2) as usize * kind.elt_size_in_bytes() <= room);
    let mut best: f64 = 0.0;
    for side in SIDES.into_iter().filter(fits) {
        let fastest = fastest_product(side, (kind, device))?;
        best = best.max(2.0 * (side as f64).powi(3) / fastest.as_secs_f64());
        if fastest > LONG {
            break;
        }
    }
    Ok(best)
}

fn fastest_product(side: i64, place: (Kind, Device)) -> Result<Duration, tch::TchError> {
    let matrix = Tensor::f_ones([side, side], place)?;
    let product = Tensor::f_empty([side, side], place)?;
    let (mut fastest, started) = (Duration::MAX, Instant::now());
    for tries in 0..5 {
        if tries > 0 && started.elapsed() > ENOUGH {
            break;
        }
        let begun = Instant::now();
        let _ = matrix.f_matmul_out(&product, &matrix)?;
        let _ = product.f_double_value(&[0, 0])?; // waits for the device
        fastest = fastest.min(begun.elapsed());
    }
    Ok(fastest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_of_an_order_that_processors_have() {
        let rate = matmul_rate(Kind::Float, Device::Cpu);
        assert!((1e8..1e15).contains(&rate), "{rate:e}");
    }
}
