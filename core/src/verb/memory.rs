//! What a rank's device was metered at.

use serde::{Deserialize, Serialize};

use super::{Reply, Verb};
use crate::data::Shares;
use crate::error::{Error, Result};
use crate::memory::MemoryReport;

/// Say what the worker's device was metered at since it was last asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Memory;

impl Verb for Memory {
    const NAME: &'static str = "memory";
    type Reply = MemoryReport;
}

impl Reply for MemoryReport {
    fn unite(_replies: Vec<MemoryReport>, _shares: &Shares) -> Result<MemoryReport> {
        Err(Error::Refused("`memory` is asked of each worker by itself".into()))
    }
}
