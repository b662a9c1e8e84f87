//! Requests and answers as bytes, for workers in other processes.
//!
//! A body is a safetensors file: its tensors are the message's tensors, the rest is JSON in its metadata. It describes
//! itself, and reading checks it: bytes of another message, or damaged ones, are an error.

use std::borrow::Cow;
use std::collections::HashMap;

use safetensors::tensor::{Dtype, View};
use safetensors::{SafeTensors, serialize};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Tensor};

use crate::dtype::{dtype_of, kind_of};
use crate::error::{Error, OutOfMemory, Result};

/// What can go to another process and come back the same.
pub trait Message: Sized {
    /// Names the type in its bytes; a verb of the same worker is found by it.
    const KIND: &'static str;
    fn to_body(&self) -> Body;
    /// # Errors
    /// A field or tensor is missing or does not fit.
    fn from_body(body: &mut Body) -> Result<Self>;
}

/// A message taken apart: its tensors by name, and the rest.
#[derive(Debug, Default)]
pub struct Body {
    fields: Map<String, Value>,
    tensors: HashMap<String, Tensor>,
}

/// Key of the metadata that holds the fields.
const FIELDS: &str = "fields";
/// Key of the metadata that names the message.
const KIND: &str = "kind";

/// The bytes of a message.
///
/// # Panics
/// A tensor has a dtype that no message has.
pub fn encode<M: Message>(message: &M) -> Vec<u8> {
    message.to_body().to_bytes(M::KIND)
}

/// The message in `bytes`.
///
/// # Errors
/// The bytes are damaged or hold another message.
pub fn decode<M: Message>(bytes: &[u8]) -> Result<M> {
    let damaged = |cause: String| Error::Refused(format!("a `{}` message cannot be read: {cause}", M::KIND));
    let metadata = metadata(bytes).map_err(damaged)?;
    let parsed = SafeTensors::deserialize(bytes).map_err(|error| damaged(error.to_string()))?;
    let mut tensors = HashMap::new();
    for (name, view) in parsed.iter() {
        let kind = kind_of(view.dtype()).ok_or_else(|| damaged(format!("{name} is {:?}", view.dtype())))?;
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        tensors.insert(name.to_string(), Tensor::f_from_data_size(view.data(), &shape, kind)?);
    }
    of_parts(|key| metadata.get(key).map(String::as_str), tensors)
}

/// The kind of the message in `bytes`, where they hold one.
pub fn kind_of_message(bytes: &[u8]) -> Option<String> {
    metadata(bytes).ok()?.remove(KIND)
}

fn metadata(bytes: &[u8]) -> std::result::Result<HashMap<String, String>, String> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    Ok(header.metadata().clone().unwrap_or_default())
}

/// The message whose metadata and tensors these are.
///
/// # Errors
/// They are another message's, or something of it is missing.
pub(crate) fn of_parts<'a, M: Message>(
    metadata: impl Fn(&str) -> Option<&'a str>,
    tensors: HashMap<String, Tensor>,
) -> Result<M> {
    let damaged = |cause: String| Error::Refused(format!("a `{}` message cannot be read: {cause}", M::KIND));
    let kind = metadata(KIND).unwrap_or("nothing");
    if kind != M::KIND {
        return Err(damaged(format!("it holds `{kind}`")));
    }
    let fields = metadata(FIELDS).ok_or_else(|| damaged("it has no fields".into()))?;
    let fields = serde_json::from_str(fields).map_err(|error| damaged(error.to_string()))?;
    M::from_body(&mut Body { fields, tensors }).map_err(|error| damaged(error.to_string()))
}

impl Body {
    pub(crate) fn to_bytes(&self, kind: &str) -> Vec<u8> {
        let metadata = self.metadata(kind).map(|(key, value)| (key.to_string(), value));
        let mut tensors: Vec<(&String, Bytes)> = self.tensors.iter().map(|(name, t)| (name, Bytes::of(t))).collect();
        tensors.sort_by_key(|(name, _)| *name);
        serialize(tensors, Some(metadata.into())).expect("tensors of their own shapes and sizes")
    }

    /// What goes with the tensors of a message of `kind`.
    pub(crate) fn metadata(&self, kind: &str) -> [(&'static str, String); 2] {
        [(KIND, kind.into()), (FIELDS, Value::Object(self.fields.clone()).to_string())]
    }

    pub(crate) fn tensors(&self) -> &HashMap<String, Tensor> {
        &self.tensors
    }

    /// A message that is `fields` alone.
    ///
    /// # Panics
    /// `fields` holds what JSON cannot: a map whose keys are no text.
    pub fn of(fields: impl Serialize) -> Body {
        Body::default().with_field(WHOLE, fields)
    }

    /// With one field more.
    ///
    /// # Panics
    /// As [`Body::of`].
    #[must_use]
    pub fn with_field(mut self, name: &str, field: impl Serialize) -> Body {
        self.fields.insert(name.into(), serde_json::to_value(field).expect("plain fields"));
        self
    }

    #[must_use]
    pub fn with(mut self, name: &str, tensor: &Tensor) -> Body {
        self.tensors.insert(name.into(), tensor.shallow_clone());
        self
    }

    /// What [`Body::of`] was given.
    ///
    /// # Errors
    /// It is missing or of another type.
    pub fn fields<T: DeserializeOwned>(&mut self) -> Result<T> {
        self.field(WHOLE)
    }

    /// # Errors
    /// The field is missing or of another type.
    pub fn field<T: DeserializeOwned>(&mut self, name: &str) -> Result<T> {
        let field = self.fields.remove(name).unwrap_or_default();
        serde_json::from_value(field).map_err(|error| Error::other(format!("field `{name}`"), error))
    }

    /// # Errors
    /// There is no such tensor.
    pub fn tensor(&mut self, name: &str) -> Result<Tensor> {
        self.tensors.remove(name).ok_or_else(|| Error::Refused(format!("tensor `{name}` is missing")))
    }

    /// Names of the tensors that nobody took yet, in their order.
    pub fn tensor_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors.keys().cloned().collect();
        names.sort_unstable();
        names
    }
}

/// The name of the one field of a message that is fields alone.
const WHOLE: &str = "";

/// The bytes of a tensor, which it keeps.
struct Bytes {
    tensor: Tensor,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Bytes {
    fn of(tensor: &Tensor) -> Bytes {
        let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
        let dtype = dtype_of(tensor.kind());
        let dtype = dtype.unwrap_or_else(|| panic!("tensors of {:?} are part of no message", tensor.kind()));
        let shape = tensor.size().iter().map(|&size| size as usize).collect();
        Bytes { tensor, dtype, shape }
    }
}

impl View for Bytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = self.data_len();
        if bytes == 0 {
            return Cow::Borrowed(&[]);
        }
        // SAFETY: a contiguous CPU tensor owns `bytes` bytes from its data pointer, and lives as long as `self`.
        Cow::Borrowed(unsafe { std::slice::from_raw_parts(self.tensor.data_ptr() as *const u8, bytes) })
    }
    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// An error on its way to another process: what the driver acts on stays a kind, the rest are words.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Told {
    Interrupted,
    Gone(String),
    OutOfMemory(OutOfMemory),
    Refused(String),
}

/// An error as text, for [`error_from_text`].
pub fn error_to_text(error: &Error) -> String {
    let told = match error.root() {
        Error::Interrupted => Told::Interrupted,
        Error::WorkerGone(cause) => Told::Gone(cause.clone()),
        Error::OutOfMemory(found) => Told::OutOfMemory((**found).clone()),
        _ => Told::Refused(error.to_string()),
    };
    serde_json::to_string(&told).expect("an enum of texts serialises")
}

/// The error that [`error_to_text`] told; any other text is its message.
pub fn error_from_text(text: &str) -> Error {
    match serde_json::from_str(text) {
        Ok(Told::Interrupted) => Error::Interrupted,
        Ok(Told::Gone(cause)) => Error::WorkerGone(cause),
        Ok(Told::OutOfMemory(found)) => Error::OutOfMemory(Box::new(found)),
        Ok(Told::Refused(message)) => Error::Refused(message),
        Err(_) => Error::Refused(text.into()),
    }
}

/// Messages that are fields alone.
#[macro_export]
macro_rules! plain_messages {
    ($($message:ty = $kind:literal;)*) => {
        $(impl $crate::message::Message for $message {
            const KIND: &'static str = $kind;
            fn to_body(&self) -> $crate::message::Body {
                $crate::message::Body::of(self)
            }
            fn from_body(body: &mut $crate::message::Body) -> $crate::Result<$message> {
                body.fields()
            }
        })*
    };
}

plain_messages! {
    () = "done";
    u64 = "number";
    f64 = "rate";
}

impl Message for Tensor {
    const KIND: &'static str = "tensor";
    fn to_body(&self) -> Body {
        Body::default().with("tensor", self)
    }
    fn from_body(body: &mut Body) -> Result<Tensor> {
        body.tensor("tensor")
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn tensors_come_back_the_same() {
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
            let tensor = Tensor::rand([3, 5], (Kind::Double, Device::Cpu)).to_kind(kind).narrow(1, 1, 3);
            let found: Tensor = decode(&encode(&tensor)).unwrap();
            assert_eq!((found.kind(), &found), (kind, &tensor));
        }
        let none = Tensor::zeros([0, 0], tch::kind::FLOAT_CPU);
        assert_eq!(decode::<Tensor>(&encode(&none)).unwrap().size(), [0, 0], "a rank without rows");
    }

    #[test]
    fn other_and_damaged_bytes_are_refused() {
        let bytes = encode(&3u64);
        assert_eq!(decode::<u64>(&bytes).unwrap(), 3);
        let error = decode::<f64>(&bytes).err().unwrap().to_string();
        assert!(error.contains("`rate`") && error.contains("`number`"), "{error}");
        for end in 0..bytes.len() {
            assert!(decode::<u64>(&bytes[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn errors_keep_what_the_driver_acts_on() {
        let told = |error: &Error| error_from_text(&error_to_text(error));
        assert!(matches!(told(&Error::Interrupted), Error::Interrupted));
        assert!(matches!(told(&Error::WorkerGone("out".into())), Error::WorkerGone(cause) if cause == "out"));
        let error = Error::Refused("no room".into());
        assert_eq!(told(&error).to_string(), "no room");
        assert_eq!(error_from_text("stack overflow").to_string(), "stack overflow");
    }
}
