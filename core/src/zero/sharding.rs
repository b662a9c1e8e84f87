//! How training state is divided over the ranks of a group.

use std::ops::Range;

use crate::process_group::ProcessGroup;

/// What ZeRO divides: each stage also what those before it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ZeroStage {
    /// Nothing: every rank keeps everything.
    Zero,
    /// Master weights and moments.
    One,
    /// Gradients.
    Two,
    /// Parameters.
    Three,
}

impl ZeroStage {
    /// Of 0 to 3.
    pub fn from_number(stage: u8) -> Option<ZeroStage> {
        [ZeroStage::Zero, ZeroStage::One, ZeroStage::Two, ZeroStage::Three].get(stage as usize).copied()
    }
}

/// A model's ranks, and what each of them keeps.
#[derive(Clone)]
pub struct Sharding {
    pub group: ProcessGroup,
    pub stage: ZeroStage,
    /// Master weights and moments in host memory, where the device is another.
    pub offload: bool,
}

impl Sharding {
    /// Everything on the one rank.
    pub fn whole() -> Sharding {
        Sharding { group: ProcessGroup::solo(), stage: ZeroStage::Zero, offload: false }
    }

    /// Every rank its part of the parameters.
    pub(super) fn of_parameters(group: &ProcessGroup) -> Sharding {
        Sharding { group: group.clone(), stage: ZeroStage::Three, offload: false }
    }

    pub(super) fn optimizer(&self) -> bool {
        self.divides(ZeroStage::One)
    }

    pub(super) fn gradients(&self) -> bool {
        self.divides(ZeroStage::Two)
    }

    pub fn parameters(&self) -> bool {
        self.divides(ZeroStage::Three)
    }

    fn divides(&self, from: ZeroStage) -> bool {
        self.group.size() > 1 && self.stage >= from
    }

    /// The elements of a flat buffer of `length` that this rank's optimizer owns.
    pub(super) fn part_of(&self, length: i64) -> Range<i64> {
        if !self.optimizer() {
            return 0..length;
        }
        let part = length / self.group.size() as i64;
        let begin = part * self.group.rank() as i64;
        begin..begin + part
    }
}
