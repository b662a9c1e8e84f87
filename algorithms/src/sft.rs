//! Supervised fine-tuning: the negative log-likelihood of the wanted tokens, averaged over the batch's wanted tokens.
//!
//! `cargo run --bin sft -- RECIPE` runs it.

use echelon_core::Result;
use echelon_core::rollout::Tokens;
use echelon_core::zero::{Backbone, Head, PolicyOutput, Trainable};
use tch::Kind;

use crate::masked::masked_sum;

/// What one optimizer step saw.
#[derive(Clone, Copy, Debug, Default)]
pub struct SftReport {
    /// Mean negative log-likelihood per wanted token, in nats.
    pub loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
    pub num_tokens: i64,
}

/// One optimizer step on `rows`; the mask says which tokens are learned (the completion's).
pub fn step<B: Backbone, H: Head<Output: PolicyOutput>>(
    model: &mut Trainable<B, H>,
    rows: &Tokens,
    lr: f64,
) -> Result<SftReport> {
    let num_tokens = rows.mask.sum(Kind::Double).double_value(&[]).max(1.0);
    let mut report = SftReport { lr, ..SftReport::default() };
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
