//! From a trainer's flat shards to the generators' bytes.

use std::ops::Range;

use echelon_core::zero::TrainingState;
use echelon_core::{Error, Result};
use tch::{Device, Kind, Tensor};

use super::plan::{Segment, SyncPlan};

/// A segment of a trainer's weights in the generators' dtype, in host memory.
pub(super) struct Source {
    weights: Tensor,
    /// Where it begins in its unit's flat buffer.
    start: i64,
}

impl Source {
    /// Converts the segment where trainer and generators differ in dtype; else it is the trainer's own memory.
    pub fn new(plan: &SyncPlan, state: &TrainingState, segment: &Segment) -> Result<Source> {
        let kind = plan.config().kind;
        let rank = state.sharding().group.rank();
        let Range { start, end } = segment.range;
        let part = state.weights_part(segment.unit, kind).f_narrow(0, start, end - start)?.detach();
        let weights = part.f_to_kind(kind)?.f_to_device(Device::Cpu)?.f_contiguous()?;
        Ok(Source { weights, start: plan.part_start(segment.unit, rank) + start })
    }

    /// The memory of `length` elements from `from` of the unit's flat buffer on.
    pub fn memory(&self, from: i64, length: i64) -> Tensor {
        self.weights.narrow(0, from - self.start, length)
    }

    /// The bytes of `length` elements from `from` of the unit's flat buffer on.
    pub fn bytes(&self, from: i64, length: i64) -> &[u8] {
        let size = self.weights.kind().elt_size_in_bytes();
        let begin = (from - self.start) as usize * size;
        &bytes_of(&self.weights)[begin..begin + length as usize * size]
    }
}

/// A tensor's memory.
///
/// # Panics
/// It is no contiguous tensor on the CPU.
pub(super) fn bytes_of(tensor: &Tensor) -> &[u8] {
    assert!(tensor.device() == Device::Cpu && tensor.is_contiguous(), "bytes of a contiguous tensor on the CPU");
    let length = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if length == 0 {
        return &[];
    }
    // SAFETY: a contiguous CPU tensor has this many bytes from its data pointer on, and lives as long as the slice.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), length) }
}

/// A tensor's memory, to be written.
///
/// # Panics
/// It is no contiguous tensor on the CPU.
pub(super) fn bytes_of_mut(tensor: &mut Tensor) -> &mut [u8] {
    let bytes = bytes_of(tensor);
    let (address, length) = (bytes.as_ptr().cast_mut(), bytes.len());
    if length == 0 {
        return &mut [];
    }
    // SAFETY: the same memory; the exclusive borrow is of the only handle that this module writes through.
    unsafe { std::slice::from_raw_parts_mut(address, length) }
}

/// # Errors
/// The state is another one than the plan is for.
pub(super) fn check_state(plan: &SyncPlan, state: &TrainingState) -> Result<()> {
    let size = state.sharding().group.size();
    if size != plan.config().trainers {
        let planned = plan.config().trainers;
        return Err(Error::Refused(format!(
            "weight sync is planned for {planned} trainers, and this is one of {size}"
        )));
    }
    let lengths = |unit: usize| (state.weights_part(unit, Kind::Float).size()[0], plan.part_length(unit));
    if state.num_regions() != plan.shape().units.len()
        || (0..state.num_regions()).map(lengths).any(|(found, planned)| found != planned)
    {
        return Err(Error::Refused("weight sync is planned for a model of another shape than the trainer's".into()));
    }
    Ok(())
}
