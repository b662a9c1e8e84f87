//! Weights in Hugging Face folders: `model.safetensors`, or shards behind `model.safetensors.index.json`.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use echelon_core::shape::{ParamSlice, TensorParallelPart};
use echelon_core::shim;
use echelon_core::store::{ObjectId, Store, StoreError};
use echelon_core::zero::TensorWriter;
use memmap2::{Mmap, MmapOptions};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::config::{DecoderConfig, HeadKind, read_json};
use crate::error::{ModelError, Result};

/// Files above this size are split into shards, as transformers does.
const SHARD_BYTES: usize = 5_000_000_000;

/// A model folder's weights in memory map. Tensors are wrapped around the map, which lives as long as any of them.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    shards: Vec<Shard>,
    index: HashMap<String, Entry>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Arc<Mmap>,
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    kind: Result<Kind, String>,
    shape: Vec<i64>,
    /// Bytes of the file.
    begin: usize,
    end: usize,
}

impl Checkpoint {
    /// Maps the folder's files privately and read-only and checks every tensor's place in them.
    pub fn open(folder: &Path) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint { folder: folder.into(), shards: Vec::new(), index: HashMap::new() };
        let single = folder.join("model.safetensors");
        if single.exists() {
            checkpoint.add_shard(single)?;
            return Ok(checkpoint);
        }
        let index = folder.join("model.safetensors.index.json");
        if !index.exists() {
            return Err(ModelError::NoWeights { folder: folder.into() });
        }
        let json = read_json(&index)?;
        let wrong = |found: &str| ModelError::Config {
            path: index.clone(),
            key: "weight_map".into(),
            expected: "a table of tensor names and file names in this folder".into(),
            found: found.into(),
        };
        let names = json.get("weight_map").and_then(Value::as_object).ok_or_else(|| wrong("no such table"))?;
        let mut files: Vec<&str> = names.values().filter_map(Value::as_str).collect();
        files.sort_unstable();
        files.dedup();
        for file in files {
            if Path::new(file).components().count() != 1 {
                return Err(wrong(file));
            }
            checkpoint.add_shard(folder.join(file))?;
        }
        if let Some((name, file)) = names.iter().find(|(name, _)| !checkpoint.index.contains_key(*name)) {
            let hint = format!(" ({} says it is here)", index.display());
            return Err(ModelError::MissingTensor {
                file: folder.join(file.as_str().unwrap_or("")),
                tensor: name.clone(),
                hint,
            });
        }
        Ok(checkpoint)
    }

    fn add_shard(&mut self, path: PathBuf) -> Result<()> {
        let map = map_file(&path)?;
        let begin = whole(&path, &map)?;
        let damaged = |found: String| ModelError::Damaged {
            file: path.clone(),
            expected: "a safetensors header whose tensors fill the file".into(),
            found,
        };
        let parsed = SafeTensors::deserialize(&map).map_err(|error| damaged(error.to_string()))?;
        for (name, view) in parsed.tensors() {
            let offset = view.data().as_ptr() as usize - map.as_ptr() as usize;
            debug_assert!(offset >= begin);
            let entry = Entry {
                shard: self.shards.len(),
                kind: kind_of(view.dtype()),
                shape: view.shape().iter().map(|&d| d as i64).collect(),
                begin: offset,
                end: offset + view.data().len(),
            };
            self.index.insert(name, entry);
        }
        drop(parsed);
        self.shards.push(Shard { path, map: Arc::new(map) });
        Ok(())
    }

    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// The named tensor, wrapped around the file's map without a copy (copied where its place is not aligned).
    /// Read-only: writing to it faults.
    ///
    /// # Errors
    /// Missing tensor, another shape than `shape`, a dtype other than F32, F16, BF16.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let (bytes, kind, map) = self.find(name, shape)?;
        wrapped(bytes, shape, kind, map)
    }

    /// A slice of the named tensor, which is `shape` in the file. A slice of rows is wrapped around its part of the file's
    /// map, as in [`Checkpoint::tensor`]; of a slice of columns a copy is made. Other ranks' bytes are not read.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub fn tensor_slice(&self, name: &str, shape: &[i64], slice: ParamSlice) -> Result<Tensor> {
        let ParamSlice { dim, start, length } = slice;
        let (bytes, kind, map) = self.find(name, shape)?;
        let element = kind.elt_size_in_bytes();
        let row_bytes = shape[1..].iter().product::<i64>() as usize * element;
        let mut shape = shape.to_vec();
        if dim == 0 {
            shape[0] = length;
            let own = &bytes[start as usize * row_bytes..][..length as usize * row_bytes];
            return wrapped(own, &shape, kind, map);
        }
        shape[dim] = length;
        let part = start as usize * element..(start + length) as usize * element;
        let mut own = Vec::with_capacity(shape[0] as usize * part.len());
        bytes.chunks_exact(row_bytes).for_each(|row| own.extend_from_slice(&row[part.clone()]));
        Ok(Tensor::f_from_data_size(&own, &shape, kind)?)
    }

    /// The named tensor's bytes in its file's map, once it is known to have this shape.
    fn find(&self, name: &str, shape: &[i64]) -> Result<(&[u8], Kind, &Arc<Mmap>)> {
        let Some(entry) = self.index.get(name) else { return Err(self.missing(name)) };
        let shard = &self.shards[entry.shard];
        if entry.shape != shape {
            return Err(ModelError::TensorShape {
                file: shard.path.clone(),
                tensor: name.into(),
                expected: shape.into(),
                found: entry.shape.clone(),
            });
        }
        let kind = entry.kind.clone().map_err(|found| ModelError::TensorDtype {
            file: shard.path.clone(),
            tensor: name.into(),
            found,
        })?;
        Ok((&shard.map[entry.begin..entry.end], kind, &shard.map))
    }

    fn missing(&self, name: &str) -> ModelError {
        let last = name.rsplit('.').take(2).collect::<Vec<_>>();
        let near = self.index.keys().find(|key| key.rsplit('.').take(2).collect::<Vec<_>>() == last);
        let hint = near.map(|key| format!("; it has `{key}`")).unwrap_or_default();
        let file = self.shards.first().map_or_else(|| self.folder.clone(), |shard| shard.path.clone());
        ModelError::MissingTensor { file, tensor: name.into(), hint }
    }

    /// A loader of a model's parameters in `kind` on `device`: mapped where both fit, else converted copies.
    pub fn loader<'a>(
        &'a self,
        config: &DecoderConfig,
        kind: Kind,
        device: Device,
    ) -> impl FnMut(&str) -> Result<Tensor> + 'a {
        let shapes: HashMap<String, Vec<i64>> = config
            .shape()
            .units
            .into_iter()
            .flat_map(|unit| unit.params)
            .map(|param| (param.name, param.shape))
            .collect();
        move |name| {
            let shape = shapes.get(name).unwrap_or_else(|| panic!("`{name}` is a parameter of this architecture"));
            let tensor = self.tensor(name, shape)?;
            Ok(tensor.f_to_device(device)?.f_to_kind(kind)?)
        }
    }

    /// A model's parameters in `kind` where the processes of this host share them: converted by the first who asks, for all.
    /// None where the files have them in `kind` already: then a map of the files is as good.
    ///
    /// # Errors
    /// What the store says; at most `timeout` is waited for whoever converts.
    pub fn shared_in(
        &self,
        config: &DecoderConfig,
        kind: Kind,
        store: &Store,
        timeout: Duration,
    ) -> Result<Option<HashMap<String, Tensor>>> {
        let mut tensors = Vec::new();
        for param in config.shape().units.into_iter().flat_map(|unit| unit.params) {
            let tensor = self.tensor(&param.name, &param.shape)?;
            tensors.push((param.name, tensor));
        }
        if tensors.iter().all(|(_, tensor)| tensor.kind() == kind) {
            return Ok(None);
        }
        let failed = |source: StoreError| ModelError::Shared { path: self.folder.clone(), source: source.into() };
        let names: Vec<String> = tensors.iter().map(|(name, _)| name.clone()).collect();
        let id = self.id_in(kind).map_err(|source| ModelError::Io { path: self.folder.clone(), source })?;
        let object = store.put_converted(&id, kind, timeout, || Ok(tensors)).map_err(failed)?;
        let wrap = |name: String| object.tensor(&name).map(|tensor| (name, tensor)).map_err(failed);
        names.into_iter().map(wrap).collect::<Result<_>>().map(Some)
    }

    /// Names the folder's parameters in `kind`, as its files are now.
    fn id_in(&self, kind: Kind) -> std::io::Result<ObjectId> {
        let mut states = DefaultHasher::new();
        for shard in &self.shards {
            ObjectId::model_file(&shard.path)?.hash(&mut states);
        }
        let file = self.folder.canonicalize()?.display().to_string();
        Ok(ObjectId::ModelFile { file, state: format!("in {kind:?}, files {:016x}", states.finish()) })
    }

    /// A loader of a rank's slices of a model's parameters, in `kind` on `device`: no other rank's bytes are read, and rows
    /// stay mapped where both fit.
    ///
    /// # Errors
    /// A model that so many ranks cannot share.
    pub fn slice_loader<'a>(
        &'a self,
        config: &DecoderConfig,
        kind: Kind,
        device: Device,
        part: TensorParallelPart,
    ) -> Result<impl FnMut(&str) -> Result<Tensor> + 'a> {
        let shape = config.shape();
        shape.sliced(part).map_err(|source| ModelError::Split { model: self.folder.display().to_string(), source })?;
        let params = shape.units.iter().flat_map(|unit| &unit.params);
        let slices: HashMap<String, (Vec<i64>, ParamSlice)> =
            params.map(|param| (param.name.clone(), (param.shape.clone(), shape.slice(param, part)))).collect();
        Ok(move |name: &str| {
            let (shape, slice) =
                slices.get(name).unwrap_or_else(|| panic!("`{name}` is a parameter of this architecture"));
            let tensor = self.tensor_slice(name, shape, *slice)?;
            Ok(tensor.f_to_device(device)?.f_to_kind(kind)?)
        })
    }
}

/// A tensor around `bytes` of `map`; a copy where they are not aligned.
fn wrapped(bytes: &[u8], shape: &[i64], kind: Kind, map: &Arc<Mmap>) -> Result<Tensor> {
    let at = bytes.as_ptr() as usize;
    if !at.is_multiple_of(kind.elt_size_in_bytes()) {
        return Ok(Tensor::f_from_data_size(bytes, shape, kind)?);
    }
    // SAFETY: `whole` checked that the file holds these bytes; the map lives in the tensor and is never written.
    Ok(unsafe { shim::from_mapping(at, shape, kind, Box::new(map.clone())) }?)
}

fn map_file(path: &Path) -> Result<Mmap> {
    let io = |source| ModelError::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    // SAFETY: the map is private and read-only (AR-16); that nobody cuts the file meanwhile is the user's promise.
    unsafe { MmapOptions::new().map_copy_read_only(&file) }.map_err(io)
}

/// Where the tensor data begins, once the header fits the file and the file is as long as the header says.
fn whole(path: &Path, map: &[u8]) -> Result<usize> {
    let damaged = |expected: String, found: String| ModelError::Damaged { file: path.into(), expected, found };
    let Some(length) = map.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes)) else {
        return Err(damaged("at least 8 bytes".into(), format!("{} bytes", map.len())));
    };
    let begin = length.saturating_add(8);
    if begin > map.len() as u64 {
        return Err(damaged(format!("a header of {length} bytes"), format!("a file of {} bytes", map.len())));
    }
    let header: Value = serde_json::from_slice(&map[8..begin as usize])
        .map_err(|error| damaged("a JSON header".into(), error.to_string()))?;
    let end = header
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(_, tensor)| tensor.get("data_offsets")?.get(1)?.as_u64())
        .max()
        .unwrap_or(0);
    if begin.saturating_add(end) > map.len() as u64 {
        let expected = format!("{} bytes by its header", begin.saturating_add(end));
        return Err(damaged(expected, format!("{} bytes", map.len())));
    }
    Ok(begin as usize)
}

fn kind_of(dtype: Dtype) -> Result<Kind, String> {
    match dtype {
        Dtype::F32 => Ok(Kind::Float),
        Dtype::F16 => Ok(Kind::Half),
        Dtype::BF16 => Ok(Kind::BFloat16),
        other => Err(format!("{other:?}")),
    }
}

/// Begins a folder that transformers loads: weights in `kind`, and `config.json` as in `like` with the dtype and the
/// head's architecture set. `weights` names them with their shapes; write them in that order. Tokenizer files are the
/// tokenizer's to save.
pub fn save_pretrained(
    folder: &Path,
    like: &Path,
    head: HeadKind,
    weights: &[(String, Vec<i64>)],
    kind: Kind,
    extra: &[(&str, Value)],
) -> Result<WeightsWriter> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| ModelError::Io { path, source }
    };
    std::fs::create_dir_all(folder).map_err(io(folder))?;
    let config = saved_config(&like.join("config.json"), head, kind, extra)?;
    let path = folder.join("config.json");
    std::fs::write(&path, serde_json::to_string_pretty(&config).expect("JSON serialises") + "\n").map_err(io(&path))?;
    let generation = like.join("generation_config.json");
    if generation.exists() {
        let to = folder.join("generation_config.json");
        std::fs::copy(&generation, &to).map_err(io(&to))?;
    }
    WeightsWriter::create(folder, weights, kind)
}

fn saved_config(like: &Path, head: HeadKind, kind: Kind, extra: &[(&str, Value)]) -> Result<Value> {
    let mut config = read_json(like)?;
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or("llama").to_string();
    let stem = match model_type.as_str() {
        "mistral" => "Mistral",
        "qwen2" => "Qwen2",
        "qwen3" => "Qwen3",
        _ => "Llama",
    };
    let table = config.as_object_mut().expect("config.json was read as a table before");
    let dtype = if table.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    table.insert(dtype.into(), dtype_name(kind).into());
    match head {
        HeadKind::Logits => {
            table.insert("architectures".into(), json!([format!("{stem}ForCausalLM")]));
        }
        HeadKind::Score => {
            table.insert("architectures".into(), json!([format!("{stem}ForSequenceClassification")]));
            table.insert("id2label".into(), json!({"0": "LABEL_0"}));
            table.insert("label2id".into(), json!({"LABEL_0": 0}));
        }
    }
    for (key, value) in extra {
        table.insert((*key).into(), value.clone());
    }
    Ok(config)
}

/// Tensors by name and shape.
type NamedShapes = Vec<(String, Vec<i64>)>;

/// Weights of a Hugging Face folder on their way to disk, tensor by tensor, in files of at most [`SHARD_BYTES`].
pub struct WeightsWriter {
    folder: PathBuf,
    kind: Kind,
    /// Files still to begin, last first.
    files: Vec<(String, NamedShapes)>,
    /// The file being written, and how many of its tensors are still to come.
    current: Option<(PathBuf, TensorWriter, usize)>,
    /// Where there are several files.
    index: Option<Value>,
}

impl WeightsWriter {
    fn create(folder: &Path, weights: &[(String, Vec<i64>)], kind: Kind) -> Result<WeightsWriter> {
        let bytes = |shape: &[i64]| shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
        let shards = split_into_shards(weights, bytes);
        let name = |index: usize| match shards.len() {
            1 => "model.safetensors".to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let mut files: Vec<_> = shards.iter().enumerate().map(|(index, part)| (name(index), part.to_vec())).collect();
        let index = (files.len() > 1).then(|| {
            let of_file = |(file, part): &(String, NamedShapes)| {
                part.iter().map(|(tensor, _)| (tensor.clone(), file.clone())).collect::<Vec<_>>()
            };
            let weight_map: BTreeMap<String, String> = files.iter().flat_map(of_file).collect();
            let total: usize = weights.iter().map(|(_, shape)| bytes(shape)).sum();
            json!({"metadata": {"total_size": total}, "weight_map": weight_map})
        });
        files.reverse();
        Ok(WeightsWriter { folder: folder.into(), kind, files, current: None, index })
    }

    /// Writes the next tensor, converted to the folder's dtype.
    ///
    /// # Panics
    /// It is not the one announced.
    pub fn write(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        if self.current.is_none() {
            let (file, part) = self.files.pop().expect("a tensor that was announced");
            let path = self.folder.join(file);
            let writer = TensorWriter::create(&path, &part, self.kind, &[("format", "pt".into())])
                .map_err(|source| ModelError::Write { path: path.clone(), source })?;
            self.current = Some((path, writer, part.len()));
        }
        let (path, mut writer, left) = self.current.take().expect("opened above");
        let failed = |source| ModelError::Write { path: path.clone(), source };
        writer.write(name, tensor).map_err(failed)?;
        match left {
            1 => writer.finish().map_err(failed)?,
            _ => self.current = Some((path, writer, left - 1)),
        }
        Ok(())
    }

    /// Writes the index, where there are several files.
    ///
    /// # Panics
    /// A tensor announced was not written.
    pub fn finish(self) -> Result<()> {
        assert!(self.files.is_empty() && self.current.is_none(), "tensors announced and not written");
        let Some(index) = &self.index else { return Ok(()) };
        let path = self.folder.join("model.safetensors.index.json");
        std::fs::write(&path, index.to_string()).map_err(|source| ModelError::Io { path, source })
    }
}

/// Parts of at most [`SHARD_BYTES`], in order.
fn split_into_shards(weights: &[(String, Vec<i64>)], bytes: impl Fn(&[i64]) -> usize) -> Vec<&[(String, Vec<i64>)]> {
    let (mut begin, mut used) = (0, 0);
    let mut shards = Vec::new();
    for (index, (_, shape)) in weights.iter().enumerate() {
        if used + bytes(shape) > SHARD_BYTES && used > 0 {
            shards.push(&weights[begin..index]);
            (begin, used) = (index, 0);
        }
        used += bytes(shape);
    }
    shards.push(&weights[begin..]);
    shards
}

fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Half => "float16",
        Kind::BFloat16 => "bfloat16",
        Kind::Double => "float64",
        _ => "float32",
    }
}

/// Copies of a model's parameters for one that starts from random weights: normal with `initializer_range`, norms 1,
/// biases 0. Every number is a function of the seed and the parameter's name.
pub fn random_parameter(name: &str, shape: &[i64], initializer_range: f64, seed: u64) -> Tensor {
    use echelon_core::random::{Domain, normal};
    if name.ends_with("norm.weight") {
        return Tensor::ones(shape, (Kind::Float, Device::Cpu));
    }
    if name.ends_with(".bias") {
        return Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    }
    let stream = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let values: Vec<f32> = (0..shape.iter().product::<i64>())
        .map(|i| (initializer_range * normal(seed, Domain::Weights, stream, i as u32, (i >> 32) as u32)) as f32)
        .collect();
    Tensor::from_slice(&values).view(shape)
}
