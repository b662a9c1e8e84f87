//! Values before the own tokens.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{Verb, WorkerGroup};
use crate::data::Rows;
use crate::error::Result;

/// `[B, T]` V(prefix) of the own tokens, 0 elsewhere.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Values;

impl Verb for Values {
    const NAME: &'static str = "values";
    type Reply = Tensor;
}

impl WorkerGroup {
    /// `[B, T]` V(prefix), 0 off the own tokens.
    pub async fn values(&self, rows: &Rows) -> Result<Tensor> {
        self.call(Values, rows.tokens()).await
    }
}
