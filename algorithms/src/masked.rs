//! Reductions that see only the response tokens.
//!
//! Every per-token tensor of PPO has shape `[B, T]` (B responses, T tokens per padded prompt + response);
//! column `t` describes token `t`. `response_mask` `[B, T]` is true on the tokens the policy sampled.
//! What stands elsewhere (prompt, padding, a tool's answer) is unspecified and may even be NaN, so it is
//! replaced by zero before any arithmetic (AR-9): multiplying by a 0/1 mask would let a NaN through.

use tch::{Kind, Tensor};

/// `values` where the mask is true, zero elsewhere. The gradient is zero there too.
///
/// Shapes: both `[B, T]`; the result keeps the dtype of `values`.
///
/// # Panics
/// If the shapes differ: broadcasting would silently spread one row's numbers over another's.
pub fn masked(values: &Tensor, mask: &Tensor) -> Tensor {
    assert_eq!(values.size(), mask.size(), "a per-token tensor must have the shape of its response mask");
    values.masked_fill(&mask.logical_not(), 0.0)
}

/// Sum over the true tokens, a scalar that carries the gradient; zero if there is none.
pub fn masked_sum(values: &Tensor, mask: &Tensor) -> Tensor {
    masked(values, mask).sum(values.kind())
}

/// Mean over the true tokens, accumulated in double precision; zero if there is none.
pub fn masked_mean(values: &Tensor, mask: &Tensor) -> f64 {
    let sum = masked(values, mask).sum(Kind::Double).double_value(&[]);
    sum / num_tokens(mask).max(1) as f64
}

/// Mean over the true tokens of each row `[B]`, in the dtype of `values`; zero for a row without any.
pub fn masked_row_mean(values: &Tensor, mask: &Tensor) -> Tensor {
    let lengths = mask.sum_dim_intlist(1, false, Kind::Int64).clamp_min(1);
    masked(values, mask).sum_dim_intlist(1, false, values.kind()) / lengths.to_kind(values.kind())
}

/// How many tokens of the mask are true.
pub fn num_tokens(mask: &Tensor) -> i64 {
    mask.sum(Kind::Int64).int64_value(&[])
}

/// True at the last true token of each row `[B, T]`; a row without any stays false throughout.
pub fn last_token(mask: &Tensor) -> Tensor {
    let true_from_here = mask.flip(1).cumsum(1, Kind::Int64).flip(1);
    true_from_here.eq(1).logical_and(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask() -> Tensor {
        Tensor::from_slice2(&[[false, true, true, false], [true, false, true, false], [false; 4]])
    }

    #[test]
    fn masked_content_is_never_read() {
        let nan = f64::NAN;
        let values = Tensor::from_slice2(&[[nan, 1.0, 2.0, f64::INFINITY], [3.0, nan, 4.0, nan], [nan; 4]])
            .set_requires_grad(true);
        let sum = masked_sum(&values, &mask());
        sum.backward();
        assert_eq!(sum.double_value(&[]), 10.0);
        assert_eq!(masked_mean(&values, &mask()), 2.5);
        assert_eq!(Vec::<f64>::try_from(masked_row_mean(&values, &mask())).unwrap(), [1.5, 3.5, 0.0]);
        assert_eq!(values.grad(), mask().to_kind(Kind::Double));
    }

    #[test]
    fn last_token_of_each_row() {
        let last = last_token(&mask());
        let expected = [[false, false, true, false], [false, false, true, false], [false; 4]];
        assert_eq!(last, Tensor::from_slice2(&expected));
        assert_eq!(num_tokens(&mask()), 4);
    }

    #[test]
    fn an_empty_mask_gives_zero() {
        let mask = Tensor::zeros([2, 3], (Kind::Bool, tch::Device::Cpu));
        let values = Tensor::full([2, 3], f64::NAN, (Kind::Double, tch::Device::Cpu));
        assert_eq!(masked_sum(&values, &mask).double_value(&[]), 0.0);
        assert_eq!(masked_mean(&values, &mask), 0.0);
    }

    #[test]
    #[should_panic(expected = "shape of its response mask")]
    fn a_row_is_not_broadcast() {
        let one_row = Tensor::zeros([1, 4], (Kind::Float, tch::Device::Cpu));
        let _ = masked(&one_row, &mask());
    }
}
