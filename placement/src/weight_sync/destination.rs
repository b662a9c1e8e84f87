//! A generator's slices, filled stretch by stretch.

use std::collections::HashMap;
use std::ops::Range;

use echelon_core::{Error, Result};
use tch::{Device, Kind, Tensor};

use super::pack::bytes_of_mut;
use super::plan::SyncPlan;

/// The memory of what a generator computes on, in pieces: slices of parameters, or all slices of a unit. Pieces on a device
/// are filled through host memory, one at a time.
pub(super) struct Destination {
    /// By unit.
    pieces: Vec<Vec<Piece>>,
    /// Pieces on a device that have arrived in part: host memory, and elements still to come.
    arriving: HashMap<(usize, usize), (Tensor, i64)>,
}

struct Piece {
    tensor: Tensor,
    /// That a sync brings: without those between slices.
    elements: i64,
}

impl Destination {
    /// A piece per unit, of memory of its own, and the slices in them by parameter name.
    pub fn by_unit(plan: &SyncPlan, tp_rank: usize, device: Device) -> Result<(Destination, HashMap<String, Tensor>)> {
        let shapes = plan.slice_shapes(tp_rank);
        let (mut pieces, mut tensors) = (Vec::new(), HashMap::new());
        for (unit, shape) in plan.shape().units.iter().enumerate() {
            let layout = plan.slice_layout(tp_rank, unit);
            let tensor = Tensor::f_zeros([layout.length], (plan.config().kind, device))?;
            let mut elements = 0;
            for (param, &offset) in shape.params.iter().zip(&layout.offsets) {
                let shape = &shapes[&param.name];
                let length = shape.iter().product();
                elements += length;
                tensors.insert(param.name.clone(), tensor.f_narrow(0, offset, length)?.f_view(shape.as_slice())?);
            }
            pieces.push(vec![Piece { tensor, elements }]);
        }
        Ok((Destination { pieces, arriving: HashMap::new() }, tensors))
    }

    /// A piece per parameter.
    ///
    /// # Errors
    /// A tensor is missing, or has another shape or dtype than the plan's slice.
    pub fn by_param(plan: &SyncPlan, tp_rank: usize, tensors: &HashMap<String, Tensor>) -> Result<Destination> {
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
            Ok(Piece { tensor: tensor.detach(), elements: tensor.numel() as i64 })
        };
        let units = plan.shape().units.iter();
        let pieces = units.map(|unit| unit.params.iter().map(|param| take(&param.name)).collect());
        Ok(Destination { pieces: pieces.collect::<Result<_>>()?, arriving: HashMap::new() })
    }

    /// Drops what has arrived in part: a sync begins anew.
    pub fn begin(&mut self) {
        self.arriving.clear();
    }

    /// The memory that a stretch of a piece is to be written into.
    pub fn memory(&mut self, place: &Place) -> Result<Tensor> {
        let tensor = &self.pieces[place.unit][place.piece].tensor;
        let host = if tensor.device() == Device::Cpu { tensor } else { &self.arriving(place).0 };
        let (begin, length) = (place.bytes.start as i64, place.bytes.len() as i64);
        Ok(host.f_detach()?.f_view([-1])?.f_view_dtype(Kind::Uint8)?.f_narrow(0, begin, length)?)
    }

    /// Lets `take` write or read a stretch of a piece, which is there then.
    pub fn take(&mut self, place: &Place, take: impl FnOnce(&mut [u8])) -> Result<()> {
        let tensor = &mut self.pieces[place.unit][place.piece].tensor;
        if tensor.device() == Device::Cpu {
            take(&mut bytes_of_mut(tensor)[place.bytes.clone()]);
            return Ok(());
        }
        let size = tensor.kind().elt_size_in_bytes();
        let (host, to_come) = self.arriving(place);
        take(&mut bytes_of_mut(host)[place.bytes.clone()]);
        *to_come -= (place.bytes.len() / size) as i64;
        if *to_come == 0 {
            let (host, _) = self.arriving.remove(&(place.unit, place.piece)).expect("just written to");
            tch::no_grad(|| self.pieces[place.unit][place.piece].tensor.f_copy_(&host))?;
        }
        Ok(())
    }

    /// Host memory of a piece on a device, and the elements of it still to come.
    fn arriving(&mut self, place: &Place) -> &mut (Tensor, i64) {
        let Piece { tensor, elements } = &self.pieces[place.unit][place.piece];
        let blank = || (Tensor::empty(tensor.size(), (tensor.kind(), Device::Cpu)), *elements);
        self.arriving.entry((place.unit, place.piece)).or_insert_with(blank)
    }
}

/// A stretch of a piece.
pub(super) struct Place {
    pub unit: usize,
    pub piece: usize,
    pub bytes: Range<usize>,
}
