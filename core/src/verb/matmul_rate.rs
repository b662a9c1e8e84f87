//! How fast a device multiplies matrices.

use serde::{Deserialize, Serialize};

use super::{Reply, Verb};
use crate::data::Shares;
use crate::error::Result;

/// Say how many floating-point operations per second a large matrix product reaches on the worker's device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MatmulRate;

impl Verb for MatmulRate {
    const NAME: &'static str = "matmul_rate";
    type Reply = f64;
}

/// Together.
impl Reply for f64 {
    fn unite(replies: Vec<f64>, _shares: &Shares) -> Result<f64> {
        Ok(replies.into_iter().sum())
    }
}
