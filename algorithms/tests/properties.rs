//! What must hold for every rollout: padding is never read, rows do not know each other, parts add up.

use echelon_algorithms::gae::{explained_variance, gae};
use echelon_algorithms::kl::{KlEstimator, kl_estimate};
use echelon_algorithms::losses::{PolicyClip, entropy_loss, kl_loss, policy_loss, value_loss};
use echelon_algorithms::reward_shaping::token_rewards;
use echelon_algorithms::whiten::{whiten, whiten_mean_only};
use tch::{Device, Kind, Tensor};

const B: i64 = 12;
const T: i64 = 17;
const CLIP: PolicyClip = PolicyClip { low: 0.2, high: 0.28, dual: Some(1.5) };

/// A random rollout: a prompt, then a response with holes, then padding; one response is empty.
struct Rollout {
    mask: Tensor,
    scores: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    old_values: Tensor,
    entropy: Tensor,
}

impl Rollout {
    fn random() -> Self {
        let options = (Kind::Double, Device::Cpu);
        let column = Tensor::arange(T, (Kind::Int64, Device::Cpu)).unsqueeze(0);
        let start = Tensor::randint_low(1, 5, [B, 1], (Kind::Int64, Device::Cpu));
        let length = Tensor::randint_low(0, 12, [B, 1], (Kind::Int64, Device::Cpu));
        let mask = column.ge_tensor(&start).logical_and(&column.lt_tensor(&(&start + length)));
        let mask = mask.logical_and(&Tensor::rand([B, T], options).lt(0.8));
        let _ = mask.get(3).fill_(0);
        let _ = mask.get(4).narrow(0, 5, 3).fill_(1); // at least one row has tokens
        let normal = || Tensor::randn([B, T], options);
        let old_logprobs = normal() - 2.0;
        Self {
            mask,
            scores: Tensor::randn([B], options) * 3.0,
            logprobs: &old_logprobs + normal() * 0.4,
            ref_logprobs: &old_logprobs + normal() * 0.4,
            old_logprobs,
            values: normal(),
            old_values: normal(),
            entropy: normal().abs(),
        }
    }

    /// The rollout with every tensor changed: `tokens` maps the per-token ones, `rows` the scores.
    fn map(&self, tokens: impl Fn(&Tensor) -> Tensor, rows: impl Fn(&Tensor) -> Tensor) -> Self {
        Self {
            mask: tokens(&self.mask),
            scores: rows(&self.scores),
            logprobs: tokens(&self.logprobs),
            old_logprobs: tokens(&self.old_logprobs),
            ref_logprobs: tokens(&self.ref_logprobs),
            values: tokens(&self.values),
            old_values: tokens(&self.old_values),
            entropy: tokens(&self.entropy),
        }
    }

    /// The rollout with `garbage` wherever the mask is false.
    fn with_garbage(&self, garbage: f64) -> Self {
        let outside = self.mask.logical_not();
        let fill = |x: &Tensor| {
            if x.kind() == Kind::Bool { x.copy() } else { x.masked_fill(&outside, garbage) }
        };
        self.map(fill, Tensor::copy)
    }

    fn select(&self, rows: &Tensor) -> Self {
        let select = |x: &Tensor| x.index_select(0, rows);
        self.map(select, select)
    }
}

/// Everything PPO computes from a rollout.
struct Computed {
    /// `[B, T]` each: KL, rewards, advantages, returns, whitened advantages, and the gradients of the losses.
    per_token: Vec<Tensor>,
    /// Losses and statistics that are sums over tokens.
    sums: Vec<f64>,
    /// Statistics of the whole.
    overall: Vec<f64>,
}

fn compute(rollout: &Rollout) -> Computed {
    let Rollout { mask, scores, old_logprobs, ref_logprobs, old_values, .. } = rollout;
    let mut per_token = Vec::new();
    for estimator in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
        per_token.push(kl_estimate(old_logprobs, ref_logprobs, mask, estimator));
    }
    let rewards = token_rewards(&per_token[0], scores, mask, 0.05);
    let (advantages, returns) = gae(&rewards, old_values, mask, 0.99, 0.95);
    let (sums, gradients) = losses(rollout, &advantages, &returns);
    let overall = vec![explained_variance(&rollout.values, &returns, mask)];
    per_token.extend([whiten(&advantages, mask), whiten_mean_only(&advantages, mask), rewards, advantages, returns]);
    per_token.extend(gradients);
    Computed { per_token, sums, overall }
}

fn losses(rollout: &Rollout, advantages: &Tensor, returns: &Tensor) -> (Vec<f64>, Vec<Tensor>) {
    let Rollout { mask, old_logprobs, ref_logprobs, old_values, .. } = rollout;
    let leaf = |x: &Tensor| x.copy().set_requires_grad(true);
    let (logprobs, values, entropy) = (leaf(&rollout.logprobs), leaf(&rollout.values), leaf(&rollout.entropy));
    let policy = policy_loss(&logprobs, old_logprobs, advantages, mask, CLIP);
    let value = value_loss(&values, old_values, returns, mask, Some(0.5));
    let kl = kl_loss(&logprobs, ref_logprobs, mask, KlEstimator::K3, 0.1);
    let bonus = entropy_loss(&entropy, mask, 0.01);
    (&policy.sum + &value.sum + &kl + &bonus).backward();
    let seen = policy.sums;
    let stats = [seen.num_tokens, seen.num_clipped, seen.ppo_kl, seen.approx_kl, seen.ratio, value.num_clipped];
    let sums = [&policy.sum, &value.sum, &kl, &bonus].map(|sum| sum.double_value(&[]));
    let stats = stats.map(|sum| sum.double_value(&[]));
    ([sums.as_slice(), stats.as_slice()].concat(), vec![logprobs.grad(), values.grad(), entropy.grad()])
}

fn assert_close(a: &[f64], b: &[f64], what: &str) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= 1e-11 * a.abs().max(1.0), "{what}: {a} and {b}");
    }
}

#[test]
fn padding_is_never_read() {
    let rollout = Rollout::random();
    let clean = compute(&rollout.with_garbage(0.0));
    for garbage in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e30, -3.0] {
        let dirty = compute(&rollout.with_garbage(garbage));
        assert_eq!(clean.sums, dirty.sums, "garbage {garbage}");
        assert_eq!(clean.overall, dirty.overall, "garbage {garbage}");
        for (index, (clean, dirty)) in clean.per_token.iter().zip(&dirty.per_token).enumerate() {
            assert_eq!(clean, dirty, "tensor {index}, garbage {garbage}");
        }
    }
}

#[test]
fn per_token_results_are_zero_outside_the_mask() {
    let rollout = Rollout::random();
    for (index, tensor) in compute(&rollout).per_token.iter().enumerate() {
        let outside = tensor.masked_select(&rollout.mask.logical_not()).abs().max().double_value(&[]);
        assert_eq!(outside, 0.0, "tensor {index}");
        assert!(tensor.abs().max().double_value(&[]) > 0.0, "tensor {index} is zero altogether");
    }
}

#[test]
fn rows_may_come_in_any_order() {
    let rollout = Rollout::random();
    let order = Tensor::randperm(B, (Kind::Int64, Device::Cpu));
    let (plain, permuted) = (compute(&rollout), compute(&rollout.select(&order)));
    assert_close(&plain.sums, &permuted.sums, "sums");
    assert_close(&plain.overall, &permuted.overall, "overall");
    for (plain, permuted) in plain.per_token.iter().zip(&permuted.per_token) {
        assert!(plain.index_select(0, &order).allclose(permuted, 1e-11, 1e-11, false));
    }
}

#[test]
fn losses_of_micro_batches_add_up() {
    let rollout = Rollout::random();
    let advantages = Tensor::randn([B, T], (Kind::Double, Device::Cpu));
    let (whole, whole_gradients) = losses(&rollout, &advantages, &rollout.ref_logprobs);
    for rows_per_part in [1, 5, 7] {
        let mut sums = vec![0.0; whole.len()];
        let mut gradients = [const { Vec::new() }; 3];
        for rows in Tensor::arange(B, (Kind::Int64, Device::Cpu)).split(rows_per_part, 0) {
            let part = rollout.select(&rows);
            let (part_sums, part_gradients) = losses(&part, &advantages.index_select(0, &rows), &part.ref_logprobs);
            sums.iter_mut().zip(part_sums).for_each(|(sum, part)| *sum += part);
            gradients.iter_mut().zip(part_gradients).for_each(|(all, part)| all.push(part));
        }
        assert_close(&whole, &sums, "sums");
        for (whole, parts) in whole_gradients.iter().zip(gradients) {
            assert_eq!(whole, &Tensor::cat(&parts, 0));
        }
    }
}

#[test]
fn more_padding_changes_nothing() {
    let rollout = Rollout::random();
    let padded = rollout.map(
        |x| {
            if x.kind() == Kind::Bool { x.constant_pad_nd([0, 4]) } else { Tensor::cat(&[x, &x.narrow(1, 0, 4)], 1) }
        },
        Tensor::copy,
    );
    let (short, long) = (compute(&rollout), compute(&padded));
    assert_close(&short.sums, &long.sums, "sums");
    for (short, long) in short.per_token.iter().zip(&long.per_token) {
        assert!(short.allclose(&long.narrow(1, 0, T), 1e-11, 1e-11, false));
    }
}

#[test]
fn whitening_forgets_shift_and_scale() {
    let rollout = Rollout::random();
    let white = whiten(&rollout.values, &rollout.mask);
    let moved = whiten(&(&rollout.values * 40.0 - 7.0), &rollout.mask);
    assert!(white.allclose(&moved, 0.0, 1e-10, false));
}
