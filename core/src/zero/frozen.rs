//! A model that does not learn, divided over ranks: each keeps its shard of every unit, and a unit is whole while a pass
//! is in it.
//!
//! * **FZ-1** Between passes a rank keeps its shard and nothing else; in a pass two gathered units at most are here
//!   beside it. Test: `models/tests/frozen.rs`.
//! * **FZ-2** Loading reads the rank's own slices. Test: `models/tests/frozen.rs`.
//! * **FZ-3** Ranks run the same number of passes, whatever their rows. Test: `models/tests/frozen.rs`.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::aside::Aside;
use super::flat_weights::FlatWeights;
use super::pass::Units;
use super::sharding::Sharding;
use crate::error::Result;
use crate::process_group::ProcessGroup;
use crate::shape::ModelShape;

/// The weights of a model that does not learn on one rank: its shard, and the units that a pass has gathered.
pub struct FrozenState {
    units: Vec<FlatWeights>,
    /// By unit and parameter.
    views: Vec<Vec<Tensor>>,
    group: ProcessGroup,
    head_units: Vec<usize>,
    aside: Aside,
}

/// The weights of a model that does not learn, whole on this rank's device.
pub struct FrozenWhole {
    weights: Vec<Tensor>,
    aside: Aside,
}

impl FrozenWhole {
    /// `weights` own their memory, and are all of the model's.
    pub fn new(weights: Vec<Tensor>) -> FrozenWhole {
        FrozenWhole { weights, aside: Aside::default() }
    }
}

impl Units for FrozenWhole {
    fn set_aside(&mut self) -> Result<()> {
        self.aside.take_all(&self.weights)
    }

    fn bring_back(&mut self) -> Result<()> {
        self.aside.bring_back()
    }
}

impl FrozenState {
    /// Lays the model out unit by unit; `load` gives each parameter by name, in any dtype, and this rank's slice of it is
    /// read.
    pub fn new(
        shape: &ModelShape,
        (kind, device): (Kind, Device),
        group: &ProcessGroup,
        load: &mut dyn FnMut(&str) -> Result<Tensor>,
    ) -> Result<FrozenState> {
        let sharding = Sharding::of_parameters(group);
        let unit = |unit| {
            let mut weights = FlatWeights::new(unit, &sharding, (kind, device))?;
            let views = weights.views();
            weights.load(load)?;
            Ok((weights, views))
        };
        let (units, views) = shape.units.iter().map(unit).collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let (group, head_units) = (group.clone(), shape.head_units());
        Ok(FrozenState { units, views, group, head_units, aside: Aside::default() })
    }

    /// Every parameter by name: what the model is built from. They have memory while their unit is gathered.
    pub fn params(&self) -> HashMap<String, Tensor> {
        let params = self.units.iter().flat_map(|unit| &unit.shape.params);
        params.zip(self.views.iter().flatten()).map(|(p, view)| (p.name.clone(), view.shallow_clone())).collect()
    }

    /// Bytes that this rank keeps between passes.
    pub fn bytes(&self) -> usize {
        self.units.iter().map(FlatWeights::bytes).sum()
    }
}

impl Units for FrozenState {
    fn head_units(&self) -> &[usize] {
        &self.head_units
    }

    fn prefetch(&mut self, unit: usize) -> Result<()> {
        self.units[unit].prefetch()
    }

    fn gather(&mut self, unit: usize) -> Result<()> {
        self.group.made_progress();
        self.units[unit].gather()
    }

    fn release(&mut self, unit: usize) -> Result<()> {
        self.units[unit].release()
    }

    /// # Panics
    /// Always: a frozen model has no gradients.
    fn open_grads(&mut self, _unit: usize) -> Result<()> {
        panic!("a backward pass through a frozen model")
    }

    /// # Panics
    /// Always: a frozen model has no gradients.
    fn reduce(&mut self, _unit: usize) -> Result<()> {
        panic!("a backward pass through a frozen model")
    }

    fn at_micro_batch(&self, number: usize) {
        self.group.at_micro_batch(number as u64);
    }

    fn agree(&self, passes: usize) -> Result<usize> {
        Ok(self.group.max("micro-batches", passes as i64)? as usize)
    }

    fn any_stops(&self, stop: bool) -> Result<bool> {
        self.group.any("stop", stop)
    }

    fn set_aside(&mut self) -> Result<()> {
        self.aside.take_all(self.units.iter().map(FlatWeights::kept))
    }

    fn bring_back(&mut self) -> Result<()> {
        self.aside.bring_back()
    }
}
