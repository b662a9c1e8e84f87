//! Tensors from GGUF blocks to one safetensors file.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use half::bf16;
use serde_json::{Map, json};

use super::ImportError;
use super::config::{Architecture, ModelConfig, ROPE_DIVISORS};
use super::header::{Header, TensorEntry};

/// Elements converted at a time: 16 MiB of f32.
const CHUNK_ELEMENTS: u64 = 1 << 22;

/// Type of the weights that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightDtype {
    #[default]
    Bfloat16,
    Float32,
}

impl WeightDtype {
    /// The name in `config.json`, the name in a safetensors file, and the bytes of an element.
    fn description(self) -> (&'static str, &'static str, u64) {
        match self {
            Self::Bfloat16 => ("bfloat16", "BF16", 2),
            Self::Float32 => ("float32", "F32", 4),
        }
    }

    /// The name in `config.json`.
    pub fn torch_name(self) -> &'static str {
        self.description().0
    }
}

/// One tensor to write: its name in the folder and where the file keeps it.
#[derive(Debug)]
pub(super) struct PlannedTensor {
    source: String,
    target: String,
    entry: TensorEntry,
    /// Rows of one head whose two halves the file interleaves.
    interleaved_rows: Option<u64>,
}

/// The tensors of the model in the order of their new names, shapes checked against the configuration.
///
/// # Errors
/// A tensor that is missing, has another shape, or belongs to no part of the architecture.
pub(super) fn plan(header: &Header, config: &ModelConfig) -> Result<Vec<PlannedTensor>, ImportError> {
    let mut planner = Planner { header, plan: Vec::new() };
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    planner.add("token_embd.weight", "model.embed_tokens.weight", &[vocab, hidden])?;
    planner.add("output_norm.weight", "model.norm.weight", &[hidden])?;
    if !config.tied_embeddings {
        planner.add("output.weight", "lm_head.weight", &[vocab, hidden])?;
    }
    for layer in 0..config.num_layers {
        planner.add_layer(layer, config)?;
    }
    planner.refuse_leftovers()?;
    planner.plan.sort_by(|a, b| a.target.cmp(&b.target));
    Ok(planner.plan)
}

struct Planner<'a> {
    header: &'a Header,
    plan: Vec<PlannedTensor>,
}

impl Planner<'_> {
    fn add_layer(&mut self, layer: u64, config: &ModelConfig) -> Result<(), ImportError> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let q = config.num_heads * config.head_dim;
        let kv = config.num_kv_heads * config.head_dim;
        // Only the llama converter interleaves the halves of a head, for q and k, which are rotated.
        let rotated = (config.architecture == Architecture::Llama).then_some(config.head_dim);
        let qkv_bias = config.attention_bias;
        let other_bias = qkv_bias && config.architecture != Architecture::Qwen2;
        for (from, to, rows, columns, heads, bias) in [
            ("attn_q", "self_attn.q_proj", q, hidden, rotated, qkv_bias),
            ("attn_k", "self_attn.k_proj", kv, hidden, rotated, qkv_bias),
            ("attn_v", "self_attn.v_proj", kv, hidden, None, qkv_bias),
            ("attn_output", "self_attn.o_proj", hidden, q, None, other_bias),
            ("ffn_gate", "mlp.gate_proj", inner, hidden, None, config.mlp_bias),
            ("ffn_up", "mlp.up_proj", inner, hidden, None, config.mlp_bias),
            ("ffn_down", "mlp.down_proj", hidden, inner, None, config.mlp_bias),
        ] {
            self.add_rows(layer, &format!("{from}.weight"), &format!("{to}.weight"), &[rows, columns], heads)?;
            if bias {
                self.add_rows(layer, &format!("{from}.bias"), &format!("{to}.bias"), &[rows], heads)?;
            }
        }
        self.add_rows(layer, "attn_norm.weight", "input_layernorm.weight", &[hidden], None)?;
        self.add_rows(layer, "ffn_norm.weight", "post_attention_layernorm.weight", &[hidden], None)?;
        if config.architecture == Architecture::Qwen3 {
            self.add_rows(layer, "attn_q_norm.weight", "self_attn.q_norm.weight", &[config.head_dim], None)?;
            self.add_rows(layer, "attn_k_norm.weight", "self_attn.k_norm.weight", &[config.head_dim], None)?;
        }
        Ok(())
    }

    fn add_rows(
        &mut self,
        layer: u64,
        from: &str,
        to: &str,
        shape: &[u64],
        interleaved_rows: Option<u64>,
    ) -> Result<(), ImportError> {
        self.add(&format!("blk.{layer}.{from}"), &format!("model.layers.{layer}.{to}"), shape)?;
        if let Some(added) = self.plan.last_mut() {
            added.interleaved_rows = interleaved_rows;
        }
        Ok(())
    }

    fn add(&mut self, source: &str, target: &str, shape: &[u64]) -> Result<(), ImportError> {
        let entry = self.header.tensor(source);
        let entry = entry
            .ok_or_else(|| self.header.tensor_error(source, format!("shape {shape:?}"), "no such tensor".to_owned()))?;
        if entry.shape != shape {
            return Err(self.header.tensor_error(
                source,
                format!("shape {shape:?}"),
                format!("shape {:?}", entry.shape),
            ));
        }
        self.plan.push(PlannedTensor {
            source: source.to_owned(),
            target: target.to_owned(),
            entry: entry.clone(),
            interleaved_rows: None,
        });
        Ok(())
    }

    /// A tensor nobody asked for means a model that is not what its architecture says: experts, adapters, more layers.
    fn refuse_leftovers(&self) -> Result<(), ImportError> {
        let planned: HashSet<&str> = self.plan.iter().map(|tensor| tensor.source.as_str()).collect();
        let unknown = |name: &&str| !planned.contains(name) && *name != ROPE_DIVISORS;
        match self.header.tensor_names().filter(unknown).min() {
            None => Ok(()),
            Some(name) => Err(self.header.tensor_error(
                name,
                "only tensors of the architecture".to_owned(),
                "this one".to_owned(),
            )),
        }
    }
}

/// Writes the planned tensors of the GGUF file `gguf` to the safetensors file `output`; returns their elements.
pub(super) fn write(
    gguf: &Path,
    header: &Header,
    plan: &[PlannedTensor],
    dtype: WeightDtype,
    output: &Path,
) -> Result<u64, ImportError> {
    let mut input = File::open(gguf).map_err(|cause| ImportError::io(gguf, cause))?;
    let file = File::create(output).map_err(|cause| ImportError::io(output, cause))?;
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    writer.write_all(&safetensors_head(plan, dtype)).map_err(|cause| ImportError::io(output, cause))?;
    for tensor in plan {
        for_each_chunk(&mut input, gguf, header, tensor, |values| {
            write_values(&mut writer, &values, dtype).map_err(|cause| ImportError::io(output, cause))
        })?;
    }
    let file = writer.into_inner().map_err(|cause| ImportError::io(output, cause.into_error()))?;
    file.sync_all().map_err(|cause| ImportError::io(output, cause))?;
    Ok(plan.iter().map(PlannedTensor::elements).sum())
}

/// The values of the one-dimensional tensor `name`, if the file has it.
pub(super) fn read_vector(gguf: &Path, header: &Header, name: &str) -> Result<Option<Vec<f32>>, ImportError> {
    let Some(entry) = header.tensor(name) else {
        return Ok(None);
    };
    let tensor =
        PlannedTensor { source: name.to_owned(), target: String::new(), entry: entry.clone(), interleaved_rows: None };
    let mut input = File::open(gguf).map_err(|cause| ImportError::io(gguf, cause))?;
    let mut vector = Vec::new();
    for_each_chunk(&mut input, gguf, header, &tensor, |values| {
        vector.extend(values);
        Ok(())
    })?;
    Ok(Some(vector))
}

/// Calls `consume` with the values of a few whole rows at a time, in the order of the new tensor.
fn for_each_chunk(
    input: &mut File,
    gguf: &Path,
    header: &Header,
    tensor: &PlannedTensor,
    mut consume: impl FnMut(Vec<f32>) -> Result<(), ImportError>,
) -> Result<(), ImportError> {
    let wrong = |expected: &str, found: String| header.tensor_error(&tensor.source, expected.to_owned(), found);
    let chunk = tensor.bytes_per_chunk().ok_or_else(|| {
        wrong(
            "a block type that holds whole rows",
            format!("{} in shape {:?}", tensor.entry.block.name, tensor.entry.shape),
        )
    })?;
    input.seek(SeekFrom::Start(tensor.entry.start)).map_err(|cause| ImportError::io(gguf, cause))?;
    let mut left = tensor.entry.bytes;
    while left > 0 {
        let mut data = vec![0; chunk.min(left) as usize];
        input.read_exact(&mut data).map_err(|cause| ImportError::io(gguf, cause))?;
        left -= data.len() as u64;
        if let Some(head_rows) = tensor.interleaved_rows {
            data = split_halves(&data, head_rows as usize, tensor.bytes_per_row() as usize);
        }
        let values = tensor.entry.block.dequantize(&data).map_err(|found| wrong("blocks that decode", found))?;
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(wrong("finite weights", format!("{value}; the file is damaged, fetch it again")));
        }
        consume(values)?;
    }
    Ok(())
}

impl PlannedTensor {
    fn elements(&self) -> u64 {
        self.entry.shape.iter().product()
    }

    /// A row is the unit that moves when heads are reordered; a vector has rows of one element.
    fn elements_per_row(&self) -> u64 {
        self.entry.shape[1..].iter().product()
    }

    fn bytes_per_row(&self) -> u64 {
        self.elements_per_row() / self.entry.block.elements() * self.entry.block.bytes()
    }

    /// Bytes of the rows converted at a time, whole heads where heads are reordered; `None` when rows are not blocks.
    fn bytes_per_chunk(&self) -> Option<u64> {
        let row = self.elements_per_row();
        if row == 0 || !row.is_multiple_of(self.entry.block.elements()) {
            return None;
        }
        let unit = self.interleaved_rows.unwrap_or(1);
        let rows = (CHUNK_ELEMENTS / row / unit).max(1) * unit;
        Some(rows * self.bytes_per_row())
    }
}

/// Puts the rows of each head from the order (pair, half) into the order (half, pair).
///
/// GGUF rotates neighbouring rows, Hugging Face row i with row i + head_dim / 2.
fn split_halves(data: &[u8], head_rows: usize, row_bytes: usize) -> Vec<u8> {
    let mut split = Vec::with_capacity(data.len());
    for head in data.chunks_exact(head_rows * row_bytes) {
        for half in 0..2 {
            for row in (half..head_rows).step_by(2) {
                split.extend_from_slice(&head[row * row_bytes..][..row_bytes]);
            }
        }
    }
    split
}

/// Length and JSON of a safetensors file, padded so that the data is aligned.
fn safetensors_head(plan: &[PlannedTensor], dtype: WeightDtype) -> Vec<u8> {
    let mut head = Map::new();
    head.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let (mut offset, (_, name, bytes)) = (0, dtype.description());
    for tensor in plan {
        let end = offset + tensor.elements() * bytes;
        let description = json!({"dtype": name, "shape": tensor.entry.shape, "data_offsets": [offset, end]});
        head.insert(tensor.target.clone(), description);
        offset = end;
    }
    let mut json = serde_json::Value::Object(head).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json);
    bytes
}

fn write_values(writer: &mut impl Write, values: &[f32], dtype: WeightDtype) -> std::io::Result<()> {
    let bytes: Vec<u8> = match dtype {
        WeightDtype::Bfloat16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        WeightDtype::Float32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    };
    writer.write_all(&bytes)
}
