//! Log-probs of the own tokens.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{Verb, WorkerGroup};
use crate::data::Rows;
use crate::error::Result;

/// `[B, T]` log π(token | prefix) of the own tokens, 0 elsewhere.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Logprobs;

impl Verb for Logprobs {
    const NAME: &'static str = "logprobs";
    type Reply = Tensor;
}

impl WorkerGroup {
    /// `[B, T]` log π(token | prefix) by this role's model as it is now, 0 off the own tokens.
    pub async fn logprobs(&self, rows: &Rows) -> Result<Tensor> {
        self.call(Logprobs, rows.tokens()).await
    }
}
