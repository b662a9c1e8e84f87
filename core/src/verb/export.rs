//! A trained role's model as a Hugging Face folder.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Verb, WorkerGroup};
use crate::data::Rows;
use crate::error::Result;

/// Write a role's weights as a Hugging Face folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Export {
    pub folder: PathBuf,
    /// Mean and standard deviation of a reward model's scores on held-out rows, for its `config.json`.
    pub score_statistics: Option<(f64, f64)>,
}

impl Verb for Export {
    const NAME: &'static str = "export";
    type Reply = ();
}

impl WorkerGroup {
    /// Writes this role's weights as a Hugging Face folder.
    pub async fn export(&self, folder: PathBuf, score_statistics: Option<(f64, f64)>) -> Result<()> {
        self.call(Export { folder, score_statistics }, Rows::default()).await
    }
}
