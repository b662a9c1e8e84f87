//! A generator's slices, filled run by run.

use std::collections::HashMap;

use echelon_core::{Error, Result};
use tch::{Device, Tensor};

use super::pack::bytes_of_mut;
use super::plan::SyncPlan;

/// The tensors that a generator computes on. Those on a device are filled through host memory, a parameter at a time.
pub(super) struct Destination {
    /// By unit and parameter.
    slices: Vec<Vec<Tensor>>,
    /// Parameters on a device that have arrived in part: host memory, and elements still to come.
    arriving: HashMap<(usize, usize), (Tensor, i64)>,
}

impl Destination {
    /// # Errors
    /// A tensor is missing, or has another shape or dtype than the plan's slice.
    pub fn new(plan: &SyncPlan, tp_rank: usize, tensors: &HashMap<String, Tensor>) -> Result<Destination> {
        let shapes = plan.slice_shapes(tp_rank);
        let take = |name: &str| {
            let tensor = tensors
                .get(name)
                .ok_or_else(|| Error::Refused(format!("weight sync: the generator has no tensor `{name}`")))?;
            let (kind, planned) = (plan.config().kind, &shapes[name]);
            if tensor.size() != *planned || tensor.kind() != kind || !tensor.is_contiguous() {
                return Err(Error::Refused(format!(
                    "weight sync: the generator's `{name}` is {:?} {:?}, and its slice is a contiguous {kind:?} {planned:?}",
                    tensor.kind(),
                    tensor.size()
                )));
            }
            Ok(tensor.detach())
        };
        let units = plan.shape().units.iter();
        let slices = units.map(|unit| unit.params.iter().map(|param| take(&param.name)).collect());
        Ok(Destination { slices: slices.collect::<Result<_>>()?, arriving: HashMap::new() })
    }

    /// Drops what has arrived in part: a sync begins anew.
    pub fn begin(&mut self) {
        self.arriving.clear();
    }

    /// Lets `fill` write `bytes` bytes from byte `at` of a slice on.
    pub fn write(
        &mut self,
        (unit, param): (usize, usize),
        (at, bytes): (usize, usize),
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        let slice = &mut self.slices[unit][param];
        if slice.device() == Device::Cpu {
            fill(&mut bytes_of_mut(slice)[at..at + bytes]);
            return Ok(());
        }
        let size = slice.kind().elt_size_in_bytes();
        let blank = || (Tensor::empty(slice.size(), (slice.kind(), Device::Cpu)), slice.numel() as i64);
        let (host, to_come) = self.arriving.entry((unit, param)).or_insert_with(blank);
        fill(&mut bytes_of_mut(host)[at..at + bytes]);
        *to_come -= (bytes / size) as i64;
        if *to_come == 0 {
            tch::no_grad(|| slice.f_copy_(host))?;
            self.arriving.remove(&(unit, param));
        }
        Ok(())
    }
}
