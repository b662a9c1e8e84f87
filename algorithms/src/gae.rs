//! Generalized advantage estimation (Schulman et al. 2016).

use tch::{Kind, Tensor};

use crate::masked::masked;

/// Advantages and returns, both `[B, T]` and zero outside the mask.
///
/// ```text
/// δ_t = reward_t + γ V_{t+1} − V_t      A_t = δ_t + γλ A_{t+1}      return_t = A_t + V_t
/// ```
///
/// `values` `[B, T]`: column `t` is V(prefix before token t), so nothing follows the last token: V = A = 0.
/// Where the mask has holes (text that the policy did not write, between its turns) the recursion walks
/// through them with reward and value zero, as OpenRLHF's does: a hole of n tokens discounts by γⁿ.
pub fn gae(rewards: &Tensor, values: &Tensor, mask: &Tensor, gamma: f64, gae_lambda: f64) -> (Tensor, Tensor) {
    let values = masked(values, mask);
    if values.numel() == 0 {
        return (values.copy(), values);
    }
    let (reward_columns, value_columns) = (masked(rewards, mask).unbind(1), values.unbind(1));
    let nothing = value_columns[0].zeros_like();
    let (mut next_value, mut next_advantage) = (&nothing, nothing.shallow_clone());
    let mut columns = Vec::with_capacity(value_columns.len());
    for (reward, value) in reward_columns.iter().zip(&value_columns).rev() {
        let delta = reward + next_value * gamma - value;
        next_advantage = delta + next_advantage * (gamma * gae_lambda);
        next_value = value;
        columns.push(next_advantage.shallow_clone());
    }
    columns.reverse();
    let advantages = Tensor::stack(&columns, 1);
    let returns = masked(&(&advantages + &values), mask);
    (masked(&advantages, mask), returns)
}

/// How much of the returns' variance the values explain: 1 − Var(returns − values) / Var(returns).
///
/// 1 is a perfect critic, 0 one as good as a constant, below zero one that is worse; NaN if the returns do not
/// vary. All tensors `[B, T]`; computed in double precision over the response tokens.
pub fn explained_variance(values: &Tensor, returns: &Tensor, mask: &Tensor) -> f64 {
    let returns = returns.masked_select(mask).to_kind(Kind::Double);
    let errors = &returns - values.masked_select(mask).to_kind(Kind::Double);
    let variance = population_variance(&returns);
    if variance == 0.0 { f64::NAN } else { 1.0 - population_variance(&errors) / variance }
}

fn population_variance(values: &Tensor) -> f64 {
    let centered = values - values.mean(Kind::Double);
    centered.square().mean(Kind::Double).double_value(&[])
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    /// The definition as an explicit sum: A_t = Σ_k (γλ)^k δ_{t+k}.
    fn advantages_by_definition(rewards: &[f64], values: &[f64], mask: &[bool], gamma: f64, lambda: f64) -> Vec<f64> {
        let at = |series: &[f64], t: usize| {
            if t < mask.len() && mask[t] { series[t] } else { 0.0 }
        };
        let delta = |t| at(rewards, t) + gamma * at(values, t + 1) - at(values, t);
        let advantage =
            |t: usize| -> f64 { (t..mask.len()).map(|k| (gamma * lambda).powi((k - t) as i32) * delta(k)).sum() };
        (0..mask.len()).map(|t| if mask[t] { advantage(t) } else { 0.0 }).collect()
    }

    #[test]
    fn equals_the_discounted_sum_of_deltas_also_through_holes() {
        let options = (Kind::Double, Device::Cpu);
        let (rewards, values) = (Tensor::randn([16, 12], options), Tensor::randn([16, 12], options));
        let mask = Tensor::rand([16, 12], options).lt(0.6);
        for (gamma, lambda) in [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.99, 0.0)] {
            let (advantages, returns) = gae(&rewards, &values, &mask, gamma, lambda);
            for row in 0..16 {
                let row_of = |x: &Tensor| Vec::<f64>::try_from(x.get(row)).unwrap();
                let row_mask = Vec::<bool>::try_from(mask.get(row)).unwrap();
                let (r, v) = (row_of(&rewards), row_of(&values));
                let expected = advantages_by_definition(&r, &v, &row_mask, gamma, lambda);
                for (t, expected) in expected.into_iter().enumerate() {
                    let expected_return = if row_mask[t] { expected + v[t] } else { 0.0 };
                    assert!((row_of(&advantages)[t] - expected).abs() < 1e-12);
                    assert!((row_of(&returns)[t] - expected_return).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn without_discount_the_return_is_the_reward_to_go() {
        let rewards = Tensor::from_slice2(&[[0.0, 1.0, 2.0, 4.0]]);
        let values = Tensor::from_slice2(&[[9.0, 0.3, -0.2, 5.0]]);
        let mask = Tensor::from_slice2(&[[false, true, true, true]]);
        let (_, returns) = gae(&rewards, &values, &mask, 1.0, 1.0);
        let expected = Tensor::from_slice2(&[[0.0, 7.0, 6.0, 4.0]]);
        assert!(returns.allclose(&expected, 0.0, 1e-12, false));
    }

    #[test]
    fn explained_variance_ranks_critics() {
        let returns = Tensor::from_slice2(&[[1.0, 2.0, 3.0, f64::NAN]]);
        let mask = Tensor::from_slice2(&[[true, true, true, false]]);
        let constant = Tensor::from_slice2(&[[2.0, 2.0, 2.0, f64::NAN]]);
        assert_eq!(explained_variance(&returns, &returns, &mask), 1.0);
        assert_eq!(explained_variance(&constant, &returns, &mask), 0.0);
        assert_eq!(explained_variance(&(-&returns), &returns, &mask), -3.0);
        assert!(explained_variance(&returns, &constant, &mask).is_nan());
    }
}
