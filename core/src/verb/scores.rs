//! A score for every row.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{Verb, WorkerGroup};
use crate::data::{PROMPTS, RESPONSES, Rows};
use crate::error::Result;

/// `[B]`, raw. A model with another tokenizer reads the rows' texts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Scores;

impl Verb for Scores {
    const NAME: &'static str = "scores";
    type Reply = Tensor;
}

impl WorkerGroup {
    /// `[B]` scores of this role's model, raw.
    pub async fn scores(&self, rows: &Rows) -> Result<Tensor> {
        self.call(Scores, rows.only(&[PROMPTS.name, RESPONSES.name])).await
    }
}
