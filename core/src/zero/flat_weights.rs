//! One layer unit's weights as a flat buffer, whole on every rank or a part on each.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::sharding::Sharding;
use crate::collective::{allocate_storage, free_storage, unversioned};
use crate::error::Result;
use crate::process_group::Pending;
use crate::shape::{ParamShape, UnitShape};

/// Tensors begin on 64-byte boundaries of f32; the same element grid serves every dtype.
const ALIGNMENT: i64 = 16;

/// The flat weights of one unit. While a sharded unit is released its whole buffer has no memory; its views stay valid.
pub struct FlatWeights {
    pub shape: UnitShape,
    /// All of the unit; without memory while a sharded unit is released.
    pub whole: Tensor,
    /// This rank's part: a view of `whole` unless parameters are sharded.
    pub shard: Tensor,
    sharding: Sharding,
    layout: FlatLayout,
    resident: bool,
    gathering: Option<Pending>,
    /// The memory is another's, who counts it and moves it.
    borrowed: bool,
}

impl FlatWeights {
    /// Lays a unit out, filled with zeros; a sharded one is released.
    pub fn new(shape: &UnitShape, sharding: &Sharding, (kind, device): (Kind, Device)) -> Result<FlatWeights> {
        let layout = FlatLayout::new(shape, sharding.group.size());
        let whole = Tensor::f_empty([layout.length], (kind, device))?;
        let part = sharding.part_of(layout.length);
        let shard = if sharding.parameters() {
            Tensor::f_zeros([part.end - part.start], (kind, device))?
        } else {
            tch::no_grad(|| whole.shallow_clone().f_zero_())?.narrow(0, part.start, part.end - part.start)
        };
        let resident = !sharding.parameters();
        Ok(FlatWeights {
            shape: shape.clone(),
            whole,
            shard,
            sharding: sharding.clone(),
            layout,
            resident,
            gathering: None,
            borrowed: false,
        })
    }

    /// The same weights in the same memory, for another model that does not change them either.
    ///
    /// # Panics
    /// They are divided: a pass of one model would release what the other reads.
    pub fn borrowed(&self) -> FlatWeights {
        assert!(!self.sharding.parameters(), "only weights that are whole have two readers");
        FlatWeights {
            shape: self.shape.clone(),
            whole: self.whole.shallow_clone(),
            shard: self.shard.shallow_clone(),
            sharding: self.sharding.clone(),
            layout: self.layout.clone(),
            resident: true,
            gathering: None,
            borrowed: true,
        }
    }

    pub fn is_borrowed(&self) -> bool {
        self.borrowed
    }

    /// Every parameter as a view of the whole buffer. Make them before [`FlatWeights::load`].
    pub fn views(&self) -> Vec<Tensor> {
        (0..self.shape.params.len()).map(|index| self.view_of(&self.whole, index)).collect()
    }

    /// Fills what this rank keeps: `load` gives each parameter by name, in any dtype, on any device. Only what is kept is
    /// read.
    pub fn load(&mut self, load: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<()> {
        if self.sharding.parameters() {
            free_storage(&self.whole)?;
        }
        self.fill(self.kept(), load)
    }

    /// Copies the parameters into `flat`, which holds all of the unit or this rank's part.
    pub fn fill(&self, flat: &Tensor, load: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let part = if flat.size()[0] == self.length() { 0..self.length() } else { self.part() };
        for (param, &offset) in self.shape.params.iter().zip(&self.layout.offsets) {
            let (begin, end) = (offset.max(part.start), (offset + param.numel()).min(part.end));
            if begin < end {
                let source = load(&param.name)?.f_reshape([-1])?.f_narrow(0, begin - offset, end - begin)?;
                flat.narrow(0, begin - part.start, end - begin).f_copy_(&source)?;
            }
        }
        Ok(())
    }

    /// The elements of the unit that this rank's optimizer owns.
    pub fn part(&self) -> Range<i64> {
        self.sharding.part_of(self.length())
    }

    pub fn length(&self) -> i64 {
        self.layout.length
    }

    /// How many of the first elements of [`FlatWeights::part`] weight decay applies to.
    pub fn decayed_in_part(&self) -> i64 {
        let part = self.part();
        (self.layout.decayed - part.start).clamp(0, part.end - part.start)
    }

    /// Begins to bring the whole weights here.
    pub fn prefetch(&mut self) -> Result<()> {
        if self.resident || self.gathering.is_some() {
            return Ok(());
        }
        allocate_storage(&self.whole)?;
        let operation = format!("gather {}", self.shape.name);
        let whole = unversioned(&self.whole)?;
        self.gathering = Some(self.sharding.group.start_all_gather_in_place(&operation, &whole, &self.shard)?);
        Ok(())
    }

    /// The whole weights are here when this returns.
    pub fn gather(&mut self) -> Result<()> {
        self.prefetch()?;
        if let Some(gathering) = self.gathering.take() {
            gathering.wait()?;
            self.resident = true;
        }
        Ok(())
    }

    /// Gives the whole weights' memory back.
    pub fn release(&mut self) -> Result<()> {
        if self.sharding.parameters() && self.resident {
            free_storage(&self.whole)?;
            self.resident = false;
        }
        Ok(())
    }

    /// The buffer that stays between passes.
    pub fn kept(&self) -> &Tensor {
        if self.sharding.parameters() { &self.shard } else { &self.whole }
    }

    /// After this rank's part of the weights has changed: brings the others' parts, where weights are whole.
    pub fn spread(&mut self) -> Result<()> {
        if self.sharding.optimizer() && !self.sharding.parameters() {
            let operation = format!("spread {}", self.shape.name);
            let whole = unversioned(&self.whole)?;
            self.sharding.group.start_all_gather_in_place(&operation, &whole, &self.shard)?.wait()?;
        }
        Ok(())
    }

    /// All of a flat buffer laid out like this unit of which each rank has its part; every rank calls this.
    pub fn collect(&self, shard: &Tensor) -> Result<Tensor> {
        if shard.size()[0] == self.length() {
            return Ok(shard.shallow_clone());
        }
        let whole = Tensor::f_empty([self.length()], (shard.kind(), shard.device()))?;
        let operation = format!("collect {}", self.shape.name);
        self.sharding.group.start_all_gather_in_place(&operation, &whole, &shard.contiguous())?.wait()?;
        Ok(whole)
    }

    /// The part of a flat buffer laid out like this unit that belongs to parameter `index`, in its shape.
    pub fn view_of(&self, flat: &Tensor, index: usize) -> Tensor {
        let param = &self.shape.params[index];
        flat.narrow(0, self.layout.offsets[index], param.numel()).view(param.shape.as_slice())
    }

    /// Bytes that stay between passes; none of memory that is another's.
    pub fn bytes(&self) -> usize {
        let kept = self.kept();
        if self.borrowed { 0 } else { kept.numel() * kept.kind().elt_size_in_bytes() }
    }
}

/// Where a unit's parameters stand in its flat buffer: matrices first (weight decay spares vectors), each on an
/// alignment boundary. A function of the shape and the number of ranks that the buffer is divided over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatLayout {
    /// Of each parameter, in elements.
    pub offsets: Vec<i64>,
    /// Elements that weight decay applies to; they stand first.
    pub decayed: i64,
    /// Elements, a multiple of the number of ranks.
    pub length: i64,
}

impl FlatLayout {
    pub fn new(shape: &UnitShape, ranks: usize) -> FlatLayout {
        let aligned = |length: i64, to: i64| (length + to - 1) / to * to;
        let mut offsets = vec![0; shape.params.len()];
        let mut end = 0;
        let mut decayed = 0;
        for matrices in [true, false] {
            let is_wanted = |param: &ParamShape| (param.shape.len() > 1) == matrices;
            for (offset, param) in offsets.iter_mut().zip(&shape.params).filter(|(_, param)| is_wanted(param)) {
                *offset = end;
                end += aligned(param.numel(), ALIGNMENT);
            }
            if matrices {
                decayed = end;
            }
        }
        FlatLayout { offsets, decayed, length: aligned(end, ALIGNMENT * ranks as i64) }
    }
}
