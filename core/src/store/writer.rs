//! Objects on their way into the store: written once, where they stay.

use std::collections::HashMap;
use std::time::Duration;

use safetensors::tensor::{Metadata, TensorInfo};
use tch::{Kind, Tensor};

use super::client::{Claim, Store};
use super::error::StoreError;
use super::id::ObjectId;
use super::object::Object;
use super::segment::SegmentWriter;
use crate::dtype::dtype_of;
use crate::shim;

/// Where an object's first tensor begins, as a multiple.
const ALIGNMENT: usize = 64;

/// An object's memory, seen by this process alone until [`ObjectWriter::finish`]. Dropped before, it was never there.
#[derive(Debug)]
pub struct ObjectWriter {
    id: ObjectId,
    segment: SegmentWriter,
    claim: Claim,
}

impl ObjectWriter {
    pub(super) fn new(id: ObjectId, len: usize, claim: Claim) -> Result<ObjectWriter, StoreError> {
        match SegmentWriter::create(&id.to_string(), len) {
            Ok(segment) => Ok(ObjectWriter { id, segment, claim }),
            Err(source) => Err(StoreError::Segment { id, source }),
        }
    }

    /// All bytes of the object, which are to be a whole safetensors file.
    pub fn bytes(&mut self) -> &mut [u8] {
        self.segment.bytes()
    }

    /// Seals the object and puts it into the store. It is held by what this returns.
    ///
    /// # Errors
    /// The bytes are no whole safetensors: then the store never had them.
    pub fn finish(self) -> Result<Object, StoreError> {
        let ObjectWriter { id, segment, claim } = self;
        let failed = |source| StoreError::Segment { id: id.clone(), source };
        let segment = segment.seal().map_err(failed)?;
        let map = segment.map().map_err(failed)?;
        Object::check(&id, &map)?;
        let reference = claim.commit(&segment)?;
        Object::new(id.clone(), map, reference)
    }

    /// Seals the object and puts it into the store for its reader, who takes it with [`Store::take`]: nobody holds it until
    /// then, and it is not evicted.
    ///
    /// # Errors
    /// The store does not take it.
    pub fn hand_over(self) -> Result<(), StoreError> {
        let ObjectWriter { id, segment, claim } = self;
        let segment = segment.seal().map_err(|source| StoreError::Segment { id, source })?;
        claim.hand_over(&segment)
    }
}

impl Store {
    /// Puts tensors into the store under one id, copied once (from whatever device) into the memory that readers map.
    ///
    /// # Errors
    /// The id is used, a dtype has no name in safetensors, or the store is full of what others hold.
    pub fn put(
        &self,
        id: &ObjectId,
        tensors: &[(&str, &Tensor)],
        metadata: &[(&str, &str)],
    ) -> Result<Object, StoreError> {
        self.write(id, tensors, metadata)?.finish()
    }

    /// The same, to be finished or handed over.
    ///
    /// # Errors
    /// As [`Store::put`].
    pub fn write(
        &self,
        id: &ObjectId,
        tensors: &[(&str, &Tensor)],
        metadata: &[(&str, &str)],
    ) -> Result<ObjectWriter, StoreError> {
        let layout = Layout::new(id, tensors, metadata, None)?;
        let mut writer = self.create(id, layout.len)?;
        layout.fill(&mut writer)?;
        Ok(writer)
    }

    /// Tensors as an object in `kind`, converted once per host, by whoever asks first: `tensors` gives them, and they are
    /// converted as they are written.
    ///
    /// # Errors
    /// `tensors` fails, or the object was not there after `timeout`.
    pub fn put_converted(
        &self,
        id: &ObjectId,
        kind: Kind,
        timeout: Duration,
        tensors: impl FnOnce() -> Result<Vec<(String, Tensor)>, Box<dyn std::error::Error + Send + Sync>>,
    ) -> Result<Object, StoreError> {
        self.get_or_fetch(id, timeout, |claim| {
            let tensors = tensors()?;
            let named: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
            let layout = Layout::new(id, &named, &[], Some(kind))?;
            let mut writer = claim.allocate(layout.len)?;
            layout.fill(&mut writer)?;
            Ok(writer)
        })
    }
}

/// Where tensors go in an object.
struct Layout<'a> {
    header: Vec<u8>,
    places: Vec<Place<'a>>,
    len: usize,
}

/// Where a tensor goes, in which dtype.
struct Place<'a> {
    tensor: &'a Tensor,
    kind: Kind,
    begin: usize,
    end: usize,
}

impl<'a> Layout<'a> {
    /// In the tensors' own dtypes, or all in `kind`.
    fn new(
        id: &ObjectId,
        tensors: &[(&str, &'a Tensor)],
        metadata: &[(&str, &str)],
        kind: Option<Kind>,
    ) -> Result<Layout<'a>, StoreError> {
        let mut order: Vec<(&str, &Tensor)> = tensors.to_vec();
        let kind_of = |tensor: &Tensor| kind.unwrap_or_else(|| tensor.kind());
        // Wide elements first: each tensor then begins at a multiple of its element's size.
        order.sort_by_key(|(name, tensor)| (std::cmp::Reverse(kind_of(tensor).elt_size_in_bytes()), *name));
        let (mut infos, mut places, mut end) = (Vec::new(), Vec::new(), 0);
        for (name, tensor) in order {
            let wrong = |reason: &str| StoreError::Tensor { id: id.clone(), name: name.into(), reason: reason.into() };
            let kind = kind_of(tensor);
            let dtype = dtype_of(kind).ok_or_else(|| wrong(&format!("dtype {kind:?} cannot be stored")))?;
            if places.last().is_some() && infos.iter().any(|(other, _): &(String, TensorInfo)| other == name) {
                return Err(wrong("two tensors have this name"));
            }
            let begin = end;
            end += tensor.numel() * kind.elt_size_in_bytes();
            let shape = tensor.size().iter().map(|dim| *dim as usize).collect();
            infos.push((name.to_string(), TensorInfo { dtype, shape, data_offsets: (begin, end) }));
            places.push(Place { tensor, kind, begin, end });
        }
        let damaged = |reason: String| StoreError::Damaged { id: id.clone(), reason };
        let metadata: HashMap<String, String> =
            metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        let metadata = Metadata::new((!metadata.is_empty()).then_some(metadata), infos)
            .map_err(|error| damaged(error.to_string()))?;
        let mut json = serde_json::to_vec(&metadata).map_err(|error| damaged(error.to_string()))?;
        json.resize((8 + json.len()).next_multiple_of(ALIGNMENT) - 8, b' ');
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.extend(json);
        let data = header.len();
        for place in &mut places {
            place.begin += data;
            place.end += data;
        }
        Ok(Layout { header, places, len: data + end })
    }

    /// Copies the tensors to their places, each once.
    fn fill(&self, writer: &mut ObjectWriter) -> Result<(), StoreError> {
        writer.bytes()[..self.header.len()].copy_from_slice(&self.header);
        for Place { tensor, kind, begin, end } in &self.places {
            let place = &mut writer.segment.bytes()[*begin..*end];
            if place.is_empty() {
                continue;
            }
            let torch = |source| StoreError::Torch { id: writer.id.clone(), source };
            // SAFETY: the memory is this writer's, of the tensor's size and aligned; the wrapper is gone before it is sealed.
            let mut to = unsafe {
                shim::from_mapping(place.as_mut_ptr() as usize, &tensor.size(), *kind, Box::new(())).map_err(torch)?
            };
            tch::no_grad(|| to.f_copy_(tensor)).map_err(torch)?;
        }
        Ok(())
    }
}
