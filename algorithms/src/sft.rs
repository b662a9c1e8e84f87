//! Supervised fine-tuning: the negative log-likelihood of the wanted tokens, averaged over the batch's wanted tokens.
//!
//! `cargo run --bin sft -- RECIPE` runs it.

use echelon_core::Result;
use echelon_core::rollout::Tokens;
use echelon_core::verb::LearnReport;
use echelon_core::zero::{Backbone, Head, PolicyOutput, Trainable};

use crate::masked::masked_sum;

/// One optimizer step on this rank's rows; the mask says which tokens are learned (the completion's), `num_tokens` how many
/// the whole batch has, over all ranks.
pub fn step<B: Backbone, H: Head<Output: PolicyOutput>>(
    model: &mut Trainable<B, H>,
    rows: &Tokens,
    num_tokens: f64,
    lr: f64,
) -> Result<LearnReport> {
    let mut report = LearnReport { lr, ..LearnReport::default() };
    for micro_batch in model.micro_batches(&rows.lengths)? {
        let batch = rows.select(&micro_batch).to_device(model.pass.device);
        let loss =
            model.forward_backward(&batch, |output| Ok(-masked_sum(output.logprobs(), &batch.mask) / num_tokens))?;
        report.loss += loss;
        report.num_tokens += batch.lengths.iter().sum::<i64>();
    }
    report.grad_norm = model.optimizer_step(lr)?.grad_norm;
    Ok(report)
}
