//! Tensors in a safetensors file, written straight from their memory and read back by name.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: not a whole safetensors file: {reason}", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("{}: no tensor `{name}`", path.display())]
    Missing { path: PathBuf, name: String },
    #[error("{}: tensor `{name}`: dtype {dtype} cannot be read here", path.display())]
    Dtype { path: PathBuf, name: String, dtype: String },
}

/// Writes tensors in their order with string metadata, and syncs the file to disk. Device tensors come over one by one.
pub fn write_tensors(
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: &[(&str, String)],
) -> Result<(), StateFileError> {
    write_tensors_as(path, tensors, None, metadata)
}

/// [`write_tensors`] with every tensor converted to `kind` as it is written: one converted tensor in memory at a time.
pub fn write_tensors_as(
    path: &Path,
    tensors: &[(String, Tensor)],
    kind: Option<Kind>,
    metadata: &[(&str, String)],
) -> Result<(), StateFileError> {
    let io = |source| StateFileError::Io { path: path.into(), source };
    let mut header = Map::new();
    header.insert(
        "__metadata__".into(),
        metadata.iter().map(|(k, v)| (k.to_string(), Value::from(v.as_str()))).collect(),
    );
    let mut end = 0;
    for (name, tensor) in tensors {
        let kind = kind.unwrap_or(tensor.kind());
        let bytes = tensor.numel() * kind.elt_size_in_bytes();
        let dtype = dtype_name(kind);
        header
            .insert(name.clone(), json!({"dtype": dtype, "shape": tensor.size(), "data_offsets": [end, end + bytes]}));
        end += bytes;
    }
    let mut header = serde_json::to_vec(&Value::Object(header)).expect("a JSON map serialises");
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    file.write_all(&header).map_err(io)?;
    for (_, tensor) in tensors {
        let tensor = tensor.detach().to_kind(kind.unwrap_or(tensor.kind())).to_device(Device::Cpu).contiguous();
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        // SAFETY: a contiguous CPU tensor owns `bytes` bytes from its data pointer, and lives through the write.
        file.write_all(unsafe { std::slice::from_raw_parts(tensor.data_ptr() as *const u8, bytes) }).map_err(io)?;
    }
    let file = file.into_inner().map_err(|error| io(error.into_error()))?;
    file.sync_all().map_err(io)
}

/// A safetensors file in memory map, read by name.
pub struct TensorFile {
    path: PathBuf,
    map: memmap2::Mmap,
}

impl TensorFile {
    pub fn open(path: &Path) -> Result<TensorFile, StateFileError> {
        let io = |source| StateFileError::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: checkpoints are written beside and renamed, never changed in place.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        let file = TensorFile { path: path.into(), map };
        file.parsed()?;
        Ok(file)
    }

    fn parsed(&self) -> Result<SafeTensors<'_>, StateFileError> {
        SafeTensors::deserialize(&self.map)
            .map_err(|error| StateFileError::Damaged { path: self.path.clone(), reason: error.to_string() })
    }

    /// String metadata, empty when there is none.
    pub fn metadata(&self) -> Result<std::collections::HashMap<String, String>, StateFileError> {
        let (_, header) = SafeTensors::read_metadata(&self.map)
            .map_err(|error| StateFileError::Damaged { path: self.path.clone(), reason: error.to_string() })?;
        Ok(header.metadata().clone().unwrap_or_default())
    }

    /// A copy of the named tensor.
    pub fn tensor(&self, name: &str) -> Result<Tensor, StateFileError> {
        let parsed = self.parsed()?;
        let view =
            parsed.tensor(name).map_err(|_| StateFileError::Missing { path: self.path.clone(), name: name.into() })?;
        let kind = match view.dtype() {
            safetensors::Dtype::F32 => Kind::Float,
            safetensors::Dtype::F64 => Kind::Double,
            safetensors::Dtype::BF16 => Kind::BFloat16,
            safetensors::Dtype::F16 => Kind::Half,
            safetensors::Dtype::I64 => Kind::Int64,
            other => {
                return Err(StateFileError::Dtype {
                    path: self.path.clone(),
                    name: name.into(),
                    dtype: format!("{other:?}"),
                });
            }
        };
        let shape: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
        Ok(Tensor::from_data_size(view.data(), &shape, kind))
    }
}

fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "F32",
        Kind::Double => "F64",
        Kind::BFloat16 => "BF16",
        Kind::Half => "F16",
        Kind::Int64 => "I64",
        Kind::Bool => "BOOL",
        other => panic!("tensors of {other:?} are not part of any state"),
    }
}
