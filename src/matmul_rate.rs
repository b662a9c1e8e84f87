//! How fast a device multiplies: what the model FLOPs utilisation of a run is a part of.

use std::time::Instant;

use echelon_core::shim;
use tch::{Device, Kind, Tensor};

/// Sides of the square matrices: large enough to fill the device.
const CPU_SIDE: i64 = 1024;
const GPU_SIDE: i64 = 8192;
const SMALLEST_SIDE: i64 = 512;

/// Of a GPU's free memory, what the matrices may take.
const SHARE: usize = 16;

/// Floating-point operations per second of the best of some products of square matrices; 0 where there is no room for any. On a
/// GPU it is measured before there is anything else, and its memory is given back: the ledger knows nothing of it.
pub fn matmul_rate(kind: Kind, device: Device) -> f64 {
    let rate = best_rate(side(kind, device), (kind, device)).unwrap_or(0.0);
    if device != Device::Cpu {
        shim::give_back_kept(device);
    }
    rate
}

fn side(kind: Kind, device: Device) -> i64 {
    let Some((free, _)) = shim::free_and_total_bytes(device) else { return CPU_SIDE };
    let bytes = |side: i64| 2 * side.pow(2) as usize * kind.elt_size_in_bytes();
    let smaller = |side: &i64| (*side > SMALLEST_SIDE).then_some(side / 2);
    std::iter::successors(Some(GPU_SIDE), smaller)
        .find(|side| bytes(*side) <= free / SHARE)
        .unwrap_or(SMALLEST_SIDE)
}

fn best_rate(side: i64, place: (Kind, Device)) -> Result<f64, tch::TchError> {
    let matrix = Tensor::f_ones([side, side], place)?;
    let product = Tensor::f_empty([side, side], place)?;
    let mut best: f64 = 0.0;
    for _ in 0..5 {
        let begun = Instant::now();
        let _ = matrix.f_matmul_out(&product, &matrix)?;
        let _ = product.f_double_value(&[0, 0])?; // waits for the device
        best = best.max(2.0 * (side as f64).powi(3) / begun.elapsed().as_secs_f64());
    }
    Ok(best)
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
