//! A trained role's state goes to a file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Verb, WorkerGroup};
use crate::data::Rows;
use crate::error::Result;

/// Write a trained role's whole training state to a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Save {
    pub file: PathBuf,
}

impl Verb for Save {
    const NAME: &'static str = "save";
    type Reply = ();
}

impl WorkerGroup {
    /// Writes this role's whole training state to a file.
    pub async fn save(&self, file: PathBuf) -> Result<()> {
        self.call(Save { file }, Rows::default()).await
    }
}
