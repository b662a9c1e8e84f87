//! What f32 can promise of a number that f64 gives, whatever the processor, its library and the number of ranks.
//!
//! A sum of n products that is made in f32 by eight lanes or more is off by about sqrt(n / 8) unit roundoffs (2^-24) of its
//! terms' size, as it would be if every weight were off by that much. So f64 is asked how far its own result moves when
//! weights are moved so: what this finds includes all that comes after, such as optimizer steps, which divide small
//! gradients by their own size. No number here was fitted to a machine.

use echelon_core::random::{Domain, normal};
use tch::{Kind, Tensor};

/// Terms of the longest sums of these small models (width, gated width, vocabulary), and lanes of the narrowest unit
/// that multiplies in f32.
const LONGEST_SUM: f64 = 112.0;
const LANES: f64 = 8.0;

/// Draws of nudges, and how far what may come can lie beyond the worst of so few: where these show two standard
/// deviations, twice is four.
pub const DRAWS: u64 = 4;
const BEYOND: f64 = 2.0;

/// A weight as off as sums of f32 are.
pub fn nudged(name: &str, weight: &Tensor, draw: u64) -> Tensor {
    let size = (LONGEST_SUM / LANES).sqrt() * f64::powi(2.0, -24);
    let salt = name.bytes().fold(7u32, |salt, byte| salt.wrapping_mul(31).wrapping_add(u32::from(byte)));
    let count = weight.numel() as u64;
    let factors: Vec<f64> =
        (0..count).map(|index| 1.0 + size * normal(draw, Domain::Weights, index, salt, 0)).collect();
    weight.to_kind(Kind::Double) * Tensor::from_slice(&factors).view_as(weight)
}

/// How far two results in f32, each off by itself, may lie from each other: `off` gives how far nudged weights of a draw
/// move the result.
pub fn promise(off: impl Fn(u64) -> f64) -> f64 {
    f64::sqrt(2.0) * BEYOND * (1..=DRAWS).map(off).fold(0.0, f64::max)
}
