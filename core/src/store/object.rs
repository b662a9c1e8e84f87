//! An object mapped into this process: safetensors bytes, checked once, and tensors over them without a copy.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use tch::{Kind, Tensor};

use super::client::Reference;
use super::error::StoreError;
use super::id::ObjectId;
use super::segment::SegmentMap;
use crate::dtype::kind_of;
use crate::shim;

/// The longest header that is read: a hundred thousand tensors have less.
const MAX_HEADER_BYTES: usize = 32 << 20;

/// A reference to an object of the store. It is not evicted as long as this, a clone, or a tensor of it lives here; once
/// mapped it stays valid also when the server is gone.
#[derive(Clone)]
pub struct Object(Arc<Held>);

/// Fields are dropped in this order: the memory is let go before the store hears of it.
struct Held {
    id: ObjectId,
    map: SegmentMap,
    header: Header,
    _reference: Reference,
}

impl Object {
    /// # Errors
    /// The bytes are no whole safetensors.
    pub(super) fn new(id: ObjectId, map: SegmentMap, reference: Reference) -> Result<Object, StoreError> {
        let header = Object::check(&id, &map)?;
        Ok(Object(Arc::new(Held { id, map, header, _reference: reference })))
    }

    /// Whether bytes are whole safetensors, and where their tensors are.
    pub(super) fn check(id: &ObjectId, bytes: &[u8]) -> Result<Header, StoreError> {
        Header::read(bytes).map_err(|reason| StoreError::Damaged { id: id.clone(), reason })
    }

    pub fn id(&self) -> &ObjectId {
        &self.0.id
    }

    /// All of it: the header and the tensors' bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0.map
    }

    /// The tensors' names, in the order of their bytes.
    pub fn names(&self) -> &[String] {
        &self.0.header.names
    }

    /// What the writer added about the object.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.0.header.metadata.get(key).map(String::as_str)
    }

    /// A tensor wrapped around the shared memory (a copy where its place is no multiple of its element size), which holds
    /// the object. Read-only: writing to it faults.
    ///
    /// # Errors
    /// No such tensor, or a dtype that libtorch lacks.
    pub fn tensor(&self, name: &str) -> Result<Tensor, StoreError> {
        let wrong = |reason: String| StoreError::Tensor { id: self.0.id.clone(), name: name.into(), reason };
        let place = self.0.header.tensors.get(name);
        let place = place.ok_or_else(|| wrong(format!("it has {:?}", self.0.header.names)))?;
        let kind = kind_of(place.dtype).ok_or_else(|| wrong(format!("its dtype is {:?}", place.dtype)))?;
        let bytes = &self.0.map[place.begin..place.end];
        if kind == Kind::Bool && bytes.iter().any(|byte| *byte > 1) {
            return Err(wrong("a boolean is neither 0 nor 1".into()));
        }
        let torch = |source| StoreError::Torch { id: self.0.id.clone(), source };
        if !(bytes.as_ptr() as usize).is_multiple_of(kind.elt_size_in_bytes()) {
            return Tensor::f_from_data_size(bytes, &place.shape, kind).map_err(torch);
        }
        // SAFETY: `Header::read` checked that the map has these bytes; they are sealed, and the tensor holds the map.
        unsafe { shim::from_mapping(bytes.as_ptr() as usize, &place.shape, kind, Box::new(self.clone())) }
            .map_err(torch)
    }

    /// Whether a tensor's memory lies inside the object.
    pub fn holds(&self, tensor: &Tensor) -> bool {
        self.0.map.as_ptr_range().contains(&tensor.data_ptr().cast_const().cast())
    }
}

impl AsRef<[u8]> for Object {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Object({}, {} bytes)", self.0.id, self.0.map.len())
    }
}

/// Where an object's tensors are.
pub(super) struct Header {
    names: Vec<String>,
    tensors: HashMap<String, Place>,
    metadata: HashMap<String, String>,
}

struct Place {
    dtype: Dtype,
    shape: Vec<i64>,
    /// Bytes of the object.
    begin: usize,
    end: usize,
}

impl Header {
    /// Reads it, and checks that the tensors fill the bytes without a hole and without overlapping.
    fn read(bytes: &[u8]) -> Result<Header, String> {
        let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
            return Err(format!("{} bytes are too few for a header", bytes.len()));
        };
        let length = u64::from_le_bytes(*length);
        let header = usize::try_from(length).ok().filter(|length| *length <= MAX_HEADER_BYTES);
        let Some(header) = header.and_then(|length| rest.get(..length)) else {
            return Err(format!("a header of {length} bytes in {} bytes", bytes.len()));
        };
        let begin = 8 + header.len();
        let parsed: Metadata = serde_json::from_slice(header).map_err(|error| format!("its header: {error}"))?;
        if parsed.data_len().checked_add(begin) != Some(bytes.len()) {
            let (promised, found) = (parsed.data_len(), bytes.len() - begin);
            return Err(format!("its header promises {promised} bytes of tensors, and {found} are there"));
        }
        let mut tensors = HashMap::new();
        for (name, info) in parsed.tensors() {
            let shape: Result<Vec<i64>, _> = info.shape.iter().map(|dim| i64::try_from(*dim)).collect();
            let shape = shape.map_err(|_| format!("tensor `{name}`: shape {:?}", info.shape))?;
            let (from, to) = info.data_offsets;
            tensors.insert(name, Place { dtype: info.dtype, shape, begin: begin + from, end: begin + to });
        }
        Ok(Header { names: parsed.offset_keys(), tensors, metadata: parsed.metadata().clone().unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    /// OS-4: every prefix, and headers that lie in each way there is.
    #[test]
    fn hostile_headers_are_errors() {
        let good = object(r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#, 24);
        assert_eq!(Header::read(&good).unwrap().tensors["a"].shape, [2, 3]);
        for len in 0..good.len() {
            assert!(Header::read(&good[..len]).is_err(), "the first {len} bytes");
        }
        let mut huge = good.clone();
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(Header::read(&huge).is_err());
        let entry = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        for header in [
            entry("F32", "[2,3]", "[0,25]"),
            entry("F32", "[2,3]", "[4,28]"),
            entry("F32", "[2,3]", "[24,0]"),
            entry("F32", "[-1]", "[0,24]"),
            entry("F32", "[4611686018427387904,4611686018427387904,0]", "[0,24]"),
            entry("X", "[24]", "[0,24]"),
            entry("U8", "[18446744073709551615]", "[0,18446744073709551615]"),
            "[]".into(),
            "null".into(),
            "[".repeat(100_000),
        ] {
            assert!(Header::read(&object(&header, 24)).is_err(), "{header:.80}");
        }
        // Sizes that pass one by one, and overflow together with the header's.
        let most = (1u64 << 61) - 1;
        let many = (0..8).map(|i| {
            format!(r#""t{i}":{{"dtype":"U8","shape":[{most}],"data_offsets":[{},{}]}}"#, i * most, (i + 1) * most)
        });
        let many = format!("{{{}}}", many.collect::<Vec<_>>().join(","));
        assert!(Header::read(&object(&many, 24)).is_err());
    }
}
