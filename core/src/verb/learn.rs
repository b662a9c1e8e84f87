//! One optimizer step of any model that is trained.

use serde::{Deserialize, Serialize};

use super::{Verb, WorkerGroup};
use crate::data::{Report, Rows};
use crate::error::Result;
use crate::loss::{Loss, Numbers, Totals, check_columns};

/// One optimizer step on a mini-batch; the reply says what it saw, by the names of metrics.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Learn {
    /// Name of the loss.
    pub loss: String,
    /// What of it changes from call to call.
    pub numbers: Numbers,
    /// Of the whole mini-batch, over all ranks.
    pub totals: Totals,
    /// Neighbouring rows that stay together.
    pub unit: usize,
}

impl Verb for Learn {
    const NAME: &'static str = "learn";
    type Reply = Report;

    fn unit(&self) -> usize {
        self.unit
    }
}

impl WorkerGroup {
    /// One optimizer step on the mini-batch `rows`.
    pub async fn learn<const N: usize>(
        &self,
        loss: &dyn Loss,
        rows: Rows,
        numbers: [(&str, f64); N],
    ) -> Result<Report> {
        check_columns(loss, &rows)?;
        let rows = rows.only(&[loss.columns(), loss.may_read()].concat());
        let (unit, numbers) = (loss.unit(), Numbers::of(&numbers));
        let request = Learn { loss: loss.name().into(), numbers, totals: Totals::of(&rows, unit), unit };
        self.call(request, rows).await
    }
}
