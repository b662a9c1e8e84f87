//! Whole tensors in a safetensors file, written straight from their memory and read back by name (AR-22).

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::dtype::{dtype_of, kind_of};

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

/// A safetensors file that is written tensor by tensor: none needs to be in memory before its turn.
pub struct TensorWriter {
    path: PathBuf,
    file: BufWriter<File>,
    kind: Kind,
    /// Names and shapes still to come, last first.
    to_come: Vec<(String, Vec<i64>)>,
}

impl TensorWriter {
    /// Announces all tensors, by name and shape in the order of writing, with string metadata; they are stored in `kind`.
    pub fn create(
        path: &Path,
        tensors: &[(String, Vec<i64>)],
        kind: Kind,
        metadata: &[(&str, String)],
    ) -> Result<TensorWriter, StateFileError> {
        let entries = tensors.iter().map(|(name, shape)| (name.as_str(), shape.clone(), kind));
        let mut file = TensorWriter::begin(path, entries, metadata)?;
        file.kind = kind;
        file.to_come = tensors.iter().rev().cloned().collect();
        Ok(file)
    }

    fn begin<'a>(
        path: &Path,
        entries: impl Iterator<Item = (&'a str, Vec<i64>, Kind)>,
        metadata: &[(&str, String)],
    ) -> Result<TensorWriter, StateFileError> {
        let mut header = Map::new();
        header.insert(
            "__metadata__".into(),
            metadata.iter().map(|(k, v)| (k.to_string(), Value::from(v.as_str()))).collect(),
        );
        let mut end = 0;
        for (name, shape, kind) in entries {
            let bytes = shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
            let dtype = dtype_of(kind).unwrap_or_else(|| panic!("tensors of {kind:?} are not part of any state"));
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [end, end + bytes]});
            header.insert(name.into(), entry);
            end += bytes;
        }
        let mut header = serde_json::to_vec(&Value::Object(header)).expect("a JSON map serialises");
        header.resize(header.len().next_multiple_of(8), b' ');
        let io = |source| StateFileError::Io { path: path.into(), source };
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
        file.write_all(&header).map_err(io)?;
        Ok(TensorWriter { path: path.into(), file, kind: Kind::Float, to_come: Vec::new() })
    }

    /// Writes the next tensor; from a device it comes over alone.
    ///
    /// # Panics
    /// It is not the one announced.
    pub fn write(&mut self, name: &str, tensor: &Tensor) -> Result<(), StateFileError> {
        let next = self.to_come.pop();
        assert_eq!(next, Some((name.to_string(), tensor.size())), "the tensor announced next");
        self.append(&tensor.detach().to_kind(self.kind))
    }

    fn append(&mut self, tensor: &Tensor) -> Result<(), StateFileError> {
        let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        // SAFETY: a contiguous CPU tensor owns `bytes` bytes from its data pointer, and lives through the write.
        let data = unsafe { std::slice::from_raw_parts(tensor.data_ptr() as *const u8, bytes) };
        self.file.write_all(data).map_err(|source| StateFileError::Io { path: self.path.clone(), source })
    }

    /// Syncs the file to disk.
    ///
    /// # Panics
    /// A tensor announced was not written.
    pub fn finish(self) -> Result<(), StateFileError> {
        assert!(self.to_come.is_empty(), "tensors announced and not written");
        let io = |source| StateFileError::Io { path: self.path.clone(), source };
        let file = self.file.into_inner().map_err(|error| io(error.into_error()))?;
        file.sync_all().map_err(io)
    }
}

/// Writes tensors in their order and dtypes with string metadata, and syncs the file to disk.
pub fn write_tensors(
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: &[(&str, String)],
) -> Result<(), StateFileError> {
    let entries = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.size(), tensor.kind()));
    let mut file = TensorWriter::begin(path, entries, metadata)?;
    tensors.iter().try_for_each(|(_, tensor)| file.append(tensor))?;
    file.finish()
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
        let kind = kind_of(view.dtype()).ok_or_else(|| StateFileError::Dtype {
            path: self.path.clone(),
            name: name.into(),
            dtype: format!("{:?}", view.dtype()),
        })?;
        let shape: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
        Ok(Tensor::from_data_size(view.data(), &shape, kind))
    }
}
