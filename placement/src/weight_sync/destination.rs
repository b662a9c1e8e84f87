//! A generator's slices, filled run by run.

use std::collections::HashMap;
use std::ops::Range;

use echelon_core::{Error, Result};
use tch::{Device, Kind, Tensor};

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

    /// The memory that a stretch of a slice is to be written into.
    pub fn memory(&mut self, place: &Place) -> Result<Tensor> {
        let slice = &self.slices[place.unit][place.param];
        let host = if slice.device() == Device::Cpu { slice } else { &self.arriving(place).0 };
        let (begin, length) = (place.bytes.start as i64, place.bytes.len() as i64);
        Ok(host.f_detach()?.f_view([-1])?.f_view_dtype(Kind::Uint8)?.f_narrow(0, begin, length)?)
    }

    /// Lets `take` write or read a stretch of a slice, which is there then.
    pub fn take(&mut self, place: &Place, take: impl FnOnce(&mut [u8])) -> Result<()> {
        let slice = &mut self.slices[place.unit][place.param];
        if slice.device() == Device::Cpu {
            take(&mut bytes_of_mut(slice)[place.bytes.clone()]);
            return Ok(());
        }
        let size = slice.kind().elt_size_in_bytes();
        let (host, to_come) = self.arriving(place);
        take(&mut bytes_of_mut(host)[place.bytes.clone()]);
        *to_come -= (place.bytes.len() / size) as i64;
        if *to_come == 0 {
            let (host, _) = self.arriving.remove(&(place.unit, place.param)).expect("just written to");
            tch::no_grad(|| self.slices[place.unit][place.param].f_copy_(&host))?;
        }
        Ok(())
    }

    /// Host memory of a parameter on a device, and the elements of it still to come.
    fn arriving(&mut self, place: &Place) -> &mut (Tensor, i64) {
        let slice = &self.slices[place.unit][place.param];
        let blank = || (Tensor::empty(slice.size(), (slice.kind(), Device::Cpu)), slice.numel() as i64);
        self.arriving.entry((place.unit, place.param)).or_insert_with(blank)
    }
}

/// A stretch of a parameter's slice.
pub(super) struct Place {
    pub unit: usize,
    pub param: usize,
    pub bytes: Range<usize>,
}
