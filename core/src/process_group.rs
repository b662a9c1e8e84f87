//! Ranks that run collectives together.

use tch::Tensor;

use crate::error::Result;

/// Collectives over the ranks of one group. Every rank calls the same operations in the same order.
pub trait ProcessGroup: Send {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    /// Replaces `tensor` by the sum over ranks.
    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<()>;
    /// This rank's `1/size` of the sum over ranks of the flat `full`.
    fn reduce_scatter_sum(&self, full: &Tensor) -> Result<Tensor>;
    /// The concatenation over ranks of the flat `shard`s.
    fn all_gather(&self, shard: &Tensor) -> Result<Tensor>;
    /// Replaces `tensor` by the one of `root`.
    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()>;
    fn barrier(&self) -> Result<()>;
}

/// A group of one rank: every collective is the identity, and there is no network.
#[derive(Debug, Default)]
pub struct SoloGroup;

impl ProcessGroup for SoloGroup {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn all_reduce_sum(&self, _tensor: &mut Tensor) -> Result<()> {
        Ok(())
    }
    fn reduce_scatter_sum(&self, full: &Tensor) -> Result<Tensor> {
        Ok(full.shallow_clone())
    }
    fn all_gather(&self, shard: &Tensor) -> Result<Tensor> {
        Ok(shard.shallow_clone())
    }
    fn broadcast(&self, _tensor: &mut Tensor, _root: usize) -> Result<()> {
        Ok(())
    }
    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}
