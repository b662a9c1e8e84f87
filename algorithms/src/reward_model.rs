//! Reward-model training: Bradley–Terry on pairs, −log σ(score of chosen − score of rejected), averaged over pairs.
//!
//! `cargo run --bin reward -- RECIPE` runs it.

use echelon_core::Result;
use echelon_core::rollout::{Tokens, micro_batches};
use echelon_core::verb::LearnReport;
use echelon_core::zero::{Backbone, Head, ScalarValues, Trainable};

use crate::bradley_terry::bradley_terry;

/// One optimizer step on this rank's pairs: rows 2i and 2i + 1 are pair i's chosen and rejected sequences. `num_pairs` is
/// their number in the whole batch, over all ranks.
pub fn step<B: Backbone, H: Head<Output: ScalarValues>>(
    model: &mut Trainable<B, H>,
    rows: &Tokens,
    num_pairs: f64,
    lr: f64,
) -> Result<LearnReport> {
    let mut report = LearnReport { lr, ..LearnReport::default() };
    for pairs in model.agree_on(pair_batches(rows, model.pass.tokens_per_micro_batch))? {
        let batch = rows.select(&pairs).to_device(model.pass.device);
        let mut correct = 0.0;
        let loss = model.forward_backward(&batch, |output| {
            let scores = output.values().view([-1, 2]);
            let compared = bradley_terry(&scores.select(1, 0), &scores.select(1, 1));
            correct = compared.num_correct;
            Ok(compared.sum / num_pairs)
        })?;
        report.loss += loss;
        report.accuracy += correct / num_pairs;
        report.num_tokens += batch.lengths.iter().sum::<i64>();
    }
    report.grad_norm = model.optimizer_step(lr)?.grad_norm;
    Ok(report)
}

/// Micro-batches that never part a pair.
pub fn pair_batches(rows: &Tokens, budget: i64) -> Vec<Vec<i64>> {
    let lengths: Vec<i64> = rows.lengths.chunks(2).map(|pair| pair.iter().sum()).collect();
    micro_batches(&lengths, budget)
        .into_iter()
        .map(|pairs| pairs.into_iter().flat_map(|pair| [2 * pair, 2 * pair + 1]).collect())
        .collect()
}
