//! A trained role's state comes from a file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Verb, WorkerGroup};
use crate::data::Rows;
use crate::error::Result;

/// Take up the training state that [`super::Save`] wrote.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Restore {
    pub file: PathBuf,
}

impl Verb for Restore {
    const NAME: &'static str = "restore";
    type Reply = ();
}

impl WorkerGroup {
    /// Takes up the training state that [`WorkerGroup::save`] wrote.
    pub async fn restore(&self, file: PathBuf) -> Result<()> {
        self.call(Restore { file }, Rows::default()).await
    }
}
