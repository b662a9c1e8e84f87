//! One optimizer step on a rank's rows: the only place that sees micro-batches.

use tch::Tensor;

use super::pass::{Backbone, Head};
use super::trainable::Trainable;
use crate::data::{Report, Rows};
use crate::error::Result;
use crate::loss::{Loss, Numbers, Output, Totals};

/// A head's output as a loss reads it.
pub trait Told {
    fn told(&self) -> Output<'_>;

    /// `[b, T]` or `[b]`: what the model is asked for without learning.
    fn numbers(&self) -> &Tensor {
        match self.told() {
            Output::Logprobs { logprobs, .. } => logprobs,
            Output::Scalars(scalars) => scalars,
        }
    }
}

impl<B: Backbone, H: Head<Output: Told>> Trainable<B, H> {
    /// One optimizer step at `lr`; every rank of the group runs it together, with its own rows. `totals` are of the whole
    /// mini-batch.
    ///
    /// # Errors
    /// [`NonFinite`] when a loss or the gradient norm is not finite: the optimizer has not moved.
    ///
    /// [`NonFinite`]: crate::Error::NonFinite
    pub fn learn(
        &mut self,
        loss: &dyn Loss,
        rows: &Rows,
        (totals, numbers): (&Totals, &Numbers),
        lr: f64,
    ) -> Result<Report> {
        let mut report = Report::default();
        for micro_batch in self.micro_batches(&rows.lengths, loss.unit())? {
            let batch = rows.select(&micro_batch).to_device(self.pass.device);
            self.forward_backward(&batch, |output| {
                Ok(totals.mean(loss.terms(output.told(), &batch, numbers, &mut report)?))
            })?;
        }
        let grad_norm = self.optimizer_step(lr)?;
        report.stats.mean(format!("{}grad_norm", loss.prefix()), grad_norm, 1.0);
        report.stats.last(format!("{}lr", loss.prefix()), lr);
        Ok(report.here())
    }
}
