//! The head of a GGUF file: typed metadata and the list of tensors.
//!
//! Layout: magic `GGUF`, version (u32), number of tensors and of keys (u64 each), the keys, the tensors, padding to
//! the alignment, data. Strings are a length (u64) and bytes; every number is little-endian. Each length is compared
//! with the bytes that are left and with a cap before anything of that size is allocated.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::ImportError;
use super::blocks::{BlockType, SUPPORTED};

const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 20;
const MAX_STRING_BYTES: u64 = 1 << 26;
/// The largest arrays are vocabularies and merges, below a million entries today.
const MAX_ARRAY_ELEMENTS: u64 = 1 << 24;
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

/// Metadata and tensor list of one file; offsets and sizes already lie inside it.
pub(super) struct Header {
    /// The file's name in messages.
    pub file: String,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorEntry>,
}

/// Where and how a tensor is stored.
#[derive(Debug, Clone)]
pub(super) struct TensorEntry {
    /// Row-major shape, the slowest dimension first.
    pub shape: Vec<u64>,
    pub block: BlockType,
    /// Position of the first byte in the file.
    pub start: u64,
    /// Bytes of the tensor.
    pub bytes: u64,
}

/// A metadata value; numbers are widened, arrays typed.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    Texts(Vec<String>),
}

impl Header {
    /// Reads the head of the GGUF file at `path`; `file` is its name in messages.
    pub fn read(path: &Path, file: String) -> Result<Self, ImportError> {
        let input = File::open(path).map_err(|cause| ImportError::io(path, cause))?;
        let length = input.metadata().map_err(|cause| ImportError::io(path, cause))?.len();
        let mut reader =
            HeaderReader { input: BufReader::new(input), position: 0, length, place: "head".to_owned(), file };
        reader.magic_and_version()?;
        let num_tensors = reader.count("number of tensors", MAX_TENSORS)?;
        let num_keys = reader.count("number of keys", MAX_KEYS)?;
        let metadata = reader.metadata(num_keys)?;
        let alignment = match metadata.get("general.alignment") {
            Some(Value::Integer(bytes)) if u64::try_from(*bytes).is_ok_and(u64::is_power_of_two) => *bytes as u64,
            Some(other) => return Err(reader.key("general.alignment", "a power of two", other)),
            None => DEFAULT_ALIGNMENT,
        };
        let tensors = reader.tensors(num_tensors, alignment)?;
        Ok(Self { file: reader.file, metadata, tensors })
    }

    /// The tensor `name`, if the file has it.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.get(name)
    }

    /// Names of all tensors.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Each block type found, with its number of tensors.
    pub fn block_types(&self) -> Vec<(String, usize)> {
        let mut counts = BTreeMap::new();
        for entry in self.tensors.values() {
            *counts.entry(entry.block.name.to_owned()).or_insert(0) += 1;
        }
        counts.into_iter().collect()
    }

    /// Keys that start with `prefix`.
    pub fn keys<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.metadata.keys().map(String::as_str).filter(move |key| key.starts_with(prefix))
    }

    /// A count or id: an integer in `0..2^32`.
    pub fn count(&self, key: &str) -> Result<Option<u64>, ImportError> {
        self.get(key, "an integer in 0..2^32", |value| match value {
            Value::Integer(number) => u32::try_from(*number).ok().map(u64::from),
            _ => None,
        })
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>, ImportError> {
        self.get(key, "a finite number", |value| match value {
            Value::Float(number) => Some(*number).filter(|number| number.is_finite()),
            _ => None,
        })
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, ImportError> {
        self.get(key, "a bool", |value| if let Value::Bool(flag) = value { Some(*flag) } else { None })
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>, ImportError> {
        self.get(key, "a string", |value| if let Value::Text(text) = value { Some(text.as_str()) } else { None })
    }

    pub fn texts(&self, key: &str) -> Result<Option<&[String]>, ImportError> {
        self.get(
            key,
            "an array of strings",
            |value| if let Value::Texts(list) = value { Some(&list[..]) } else { None },
        )
    }

    pub fn integers(&self, key: &str) -> Result<Option<&[i64]>, ImportError> {
        self.get(
            key,
            "an array of integers",
            |value| if let Value::Integers(list) = value { Some(&list[..]) } else { None },
        )
    }

    pub fn floats(&self, key: &str) -> Result<Option<&[f32]>, ImportError> {
        self.get(
            key,
            "an array of floats",
            |value| if let Value::Floats(list) = value { Some(&list[..]) } else { None },
        )
    }

    fn get<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ImportError> {
        let wrong = |value: &Value| self.key_error(key, expected, value.describe());
        self.metadata.get(key).map(|value| read(value).ok_or_else(|| wrong(value))).transpose()
    }

    /// The error for a key that must be there.
    pub fn missing(&self, key: &str, expected: &str) -> ImportError {
        self.key_error(key, expected, "no such key".to_owned())
    }

    pub fn key_error(&self, key: &str, expected: &str, found: String) -> ImportError {
        ImportError::Key { file: self.file.clone(), key: key.to_owned(), expected: expected.to_owned(), found }
    }

    /// The error for a tensor that is not as it must be.
    pub fn tensor_error(&self, tensor: &str, expected: String, found: String) -> ImportError {
        ImportError::Tensor { file: self.file.clone(), tensor: tensor.to_owned(), expected, found }
    }
}

impl Value {
    fn describe(&self) -> String {
        match self {
            Self::Integer(number) => number.to_string(),
            Self::Float(number) => number.to_string(),
            Self::Bool(flag) => flag.to_string(),
            Self::Text(text) => format!("{:?}", text.chars().take(60).collect::<String>()),
            Self::Integers(list) => format!("an array of {} integers", list.len()),
            Self::Floats(list) => format!("an array of {} floats", list.len()),
            Self::Texts(list) => format!("an array of {} strings", list.len()),
        }
    }
}

/// GGUF's type numbers of metadata values.
mod kind {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}

/// Reads forward through the head and never past the file's end.
struct HeaderReader {
    input: BufReader<File>,
    position: u64,
    length: u64,
    /// What is being read, for messages.
    place: String,
    file: String,
}

impl HeaderReader {
    fn magic_and_version(&mut self) -> Result<(), ImportError> {
        let magic: [u8; 4] = self.array()?;
        if &magic != b"GGUF" {
            return Err(self.damaged("the magic bytes GGUF", magic.escape_ascii().to_string()));
        }
        match self.u32()? {
            2 | 3 => Ok(()),
            found => {
                Err(ImportError::unsupported(&self.file, "GGUF version", &found.to_string(), "2, 3 (little-endian)"))
            }
        }
    }

    fn metadata(&mut self, num_keys: u64) -> Result<HashMap<String, Value>, ImportError> {
        let mut metadata = HashMap::new();
        for index in 0..num_keys {
            self.place = format!("key {} of {num_keys}", index + 1);
            let key = self.string()?;
            self.place = format!("key {key}");
            let kind = self.u32()?;
            if let Some(value) = self.value(kind)? {
                metadata.insert(key, value);
            }
        }
        Ok(metadata)
    }

    /// A value of type `kind`; `None` for an array of a type that no key we read has, which is skipped.
    fn value(&mut self, kind: u32) -> Result<Option<Value>, ImportError> {
        Ok(Some(match kind {
            kind::F32 | kind::F64 => Value::Float(self.float(kind)?),
            kind::BOOL => Value::Bool(self.array::<1>()?[0] != 0),
            kind::STRING => Value::Text(self.string()?),
            kind::ARRAY => return self.array_value(),
            _ => Value::Integer(self.integer(kind)?),
        }))
    }

    fn array_value(&mut self) -> Result<Option<Value>, ImportError> {
        let kind = self.u32()?;
        let length = self.count("array length", MAX_ARRAY_ELEMENTS)?;
        let smallest = match kind {
            kind::U8 | kind::I8 | kind::BOOL => 1,
            kind::U16 | kind::I16 => 2,
            kind::U32 | kind::I32 | kind::F32 => 4,
            kind::U64 | kind::I64 | kind::F64 | kind::STRING => 8,
            kind::ARRAY => {
                return Err(self.damaged("an array of numbers, flags or strings", "an array of arrays".into()));
            }
            other => return Err(self.damaged("a value type of 0 to 12", other.to_string())),
        };
        self.require(length * smallest)?;
        Ok(Some(match kind {
            kind::STRING => Value::Texts((0..length).map(|_| self.string()).collect::<Result<_, _>>()?),
            kind::F32 | kind::F64 => {
                Value::Floats((0..length).map(|_| Ok(self.float(kind)? as f32)).collect::<Result<_, ImportError>>()?)
            }
            kind::BOOL => {
                self.skip(length)?;
                return Ok(None);
            }
            _ => Value::Integers((0..length).map(|_| self.integer(kind)).collect::<Result<_, _>>()?),
        }))
    }

    fn integer(&mut self, kind: u32) -> Result<i64, ImportError> {
        Ok(match kind {
            kind::U8 => self.array::<1>()?[0].into(),
            kind::I8 => i8::from_le_bytes(self.array()?).into(),
            kind::U16 => u16::from_le_bytes(self.array()?).into(),
            kind::I16 => i16::from_le_bytes(self.array()?).into(),
            kind::U32 => self.u32()?.into(),
            kind::I32 => i32::from_le_bytes(self.array()?).into(),
            kind::I64 => i64::from_le_bytes(self.array()?),
            kind::U64 => {
                let number = self.u64()?;
                i64::try_from(number).map_err(|_| self.damaged("a number below 2^63", number.to_string()))?
            }
            other => return Err(self.damaged("a value type of 0 to 12", other.to_string())),
        })
    }

    /// An f32 is read as the shortest decimal that stands for it: 1e-5, not 9.999999747378752e-6.
    fn float(&mut self, kind: u32) -> Result<f64, ImportError> {
        if kind == kind::F64 {
            return Ok(f64::from_le_bytes(self.array()?));
        }
        let number = f32::from_le_bytes(self.array()?);
        Ok(number.to_string().parse().unwrap_or(f64::from(number)))
    }

    fn tensors(&mut self, num_tensors: u64, alignment: u64) -> Result<HashMap<String, TensorEntry>, ImportError> {
        let mut tensors = HashMap::new();
        for index in 0..num_tensors {
            self.place = format!("tensor {} of {num_tensors}", index + 1);
            let name = self.string()?;
            self.place = format!("tensor {name}");
            let entry = self.tensor(&name)?;
            if tensors.insert(name, entry).is_some() {
                return Err(self.damaged("one tensor of this name", "two".to_owned()));
            }
        }
        let data_start = self.position.next_multiple_of(alignment);
        for (name, entry) in &mut tensors {
            let end = data_start.checked_add(entry.start).and_then(|start| start.checked_add(entry.bytes));
            if end.is_none_or(|end| end > self.length) {
                self.place = format!("tensor {name}");
                let expected = format!("{} bytes at offset {} of the data", entry.bytes, entry.start);
                return Err(
                    self.damaged(&expected, format!("{} bytes of data", self.length.saturating_sub(data_start)))
                );
            }
            entry.start += data_start;
        }
        Ok(tensors)
    }

    /// Shape, block type and offset; `start` still counts from the start of the data.
    fn tensor(&mut self, name: &str) -> Result<TensorEntry, ImportError> {
        let dims = self.u32()?;
        if dims == 0 || dims > MAX_DIMS {
            return Err(self.damaged("1 to 4 dimensions", dims.to_string()));
        }
        let mut shape: Vec<u64> = (0..dims).map(|_| self.u64()).collect::<Result<_, _>>()?;
        let id = self.u32()?;
        let what = format!("tensor {name}: block type");
        let block =
            BlockType::from_id(id).map_err(|found| ImportError::unsupported(&self.file, &what, &found, SUPPORTED))?;
        let start = self.u64()?;
        // GGUF lists the fastest dimension first; its length must be whole blocks.
        if !shape[0].is_multiple_of(block.elements()) {
            let expected = format!("rows of a multiple of {} elements for {}", block.elements(), block.name);
            return Err(self.damaged(&expected, shape[0].to_string()));
        }
        let elements = shape.iter().try_fold(1_u64, |product, dim| product.checked_mul(*dim));
        let bytes = elements.and_then(|count| (count / block.elements()).checked_mul(block.bytes()));
        let bytes = bytes.ok_or_else(|| self.damaged("a size below 2^64 bytes", format!("shape {shape:?}")))?;
        shape.reverse();
        Ok(TensorEntry { shape, block, start, bytes })
    }

    fn string(&mut self) -> Result<String, ImportError> {
        let length = self.count("string length", MAX_STRING_BYTES)?;
        self.require(length)?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|cause| self.damaged("UTF-8 text", cause.to_string()))
    }

    /// A length or number of things, at most `cap`.
    fn count(&mut self, what: &str, cap: u64) -> Result<u64, ImportError> {
        let count = self.u64()?;
        if count > cap {
            return Err(self.damaged(&format!("a {what} of at most {cap}"), count.to_string()));
        }
        Ok(count)
    }

    fn u32(&mut self) -> Result<u32, ImportError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, ImportError> {
        self.array().map(u64::from_le_bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ImportError> {
        let mut bytes = [0; N];
        self.require(N as u64)?;
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), ImportError> {
        let mut skipped = vec![0; bytes as usize];
        self.fill(&mut skipped)
    }

    fn require(&self, bytes: u64) -> Result<(), ImportError> {
        let left = self.length.saturating_sub(self.position);
        if bytes > left {
            return Err(self.damaged(&format!("{bytes} more bytes"), format!("{left} until the end of the file")));
        }
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), ImportError> {
        self.input
            .read_exact(bytes)
            .map_err(|cause| self.damaged(&format!("{} bytes", bytes.len()), cause.to_string()))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn damaged(&self, expected: &str, found: String) -> ImportError {
        ImportError::Damaged {
            file: self.file.clone(),
            place: self.place.clone(),
            expected: expected.to_owned(),
            found,
        }
    }

    fn key(&self, key: &str, expected: &str, found: &Value) -> ImportError {
        ImportError::Key {
            file: self.file.clone(),
            key: key.to_owned(),
            expected: expected.to_owned(),
            found: found.describe(),
        }
    }
}
