//! Frozen weights stay in the file's map: a forward pass makes no private copy of them.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use echelon_core::data::Rows;
use echelon_core::pack::PackedRows;
use echelon_core::zero::forward;
use echelon_models::checkpoint::Checkpoint;
use echelon_models::config::DecoderConfig;
use echelon_models::decoder::Decoder;
use echelon_models::head::LogprobHead;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

/// 39.9 million parameters: 160 MB in f32, 80 MB in bf16.
const CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 2048,
  "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 12288,
  "max_position_embeddings": 512, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": true,
  "torch_dtype": "float32"
}"#;

/// Writes the folder a piece at a time: memory that was used and freed would hide a copy made later.
fn write_model(folder: &Path, kind: Kind) -> DecoderConfig {
    std::fs::write(folder.join("config.json"), CONFIG).unwrap();
    let config = DecoderConfig::read(folder).unwrap();
    let (name, size) = if kind == Kind::Float { ("F32", 4) } else { ("BF16", 2) };
    let mut header = Map::new();
    let mut end = 0;
    for param in config.shape().units.iter().flat_map(|unit| &unit.params) {
        let begin = end;
        end += param.numel() * size;
        header.insert(param.name.clone(), json!({"dtype": name, "shape": param.shape, "data_offsets": [begin, end]}));
    }
    let header = Value::from(header).to_string();
    let header = format!("{header:<width$}", width = header.len().next_multiple_of(64));
    let mut file = BufWriter::new(File::create(folder.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let mut state = 1u32;
    for _ in 0..end / size {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let value = (state as f32 / u32::MAX as f32 - 0.5) * 0.1;
        // The upper half of a float32 is its bfloat16, cut.
        file.write_all(&value.to_le_bytes()[4 - size as usize..]).unwrap();
    }
    file.flush().unwrap();
    // Pages of the file that wait to be written to the disk count as dirty in the map as well.
    file.get_ref().sync_all().unwrap();
    config
}

/// Bytes of `Private_Dirty` of this process's mappings: of those of files under `folder`, and of all.
fn private_dirty(folder: &Path) -> (u64, u64) {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut in_folder, mut of_folder, mut of_all) = (false, 0, 0);
    for line in smaps.lines() {
        if let Some(kilobytes) = line.strip_prefix("Private_Dirty:") {
            let bytes = 1024 * kilobytes.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
            of_all += bytes;
            of_folder += if in_folder { bytes } else { 0 };
        } else if line.split_whitespace().next().is_some_and(|first| first.contains('-')) {
            in_folder = line.contains(folder.to_str().unwrap());
        }
    }
    (of_folder, of_all)
}

/// Bytes of the folder's files that this process has touched.
fn resident(folder: &Path) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let lines = smaps.lines().skip_while(|line| !line.contains(folder.to_str().unwrap()));
    let rss = lines.take(10).find_map(|line| line.strip_prefix("Rss:")).expect("the map is listed");
    1024 * rss.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
}

fn logprobs(
    folder: &Path,
    config: &DecoderConfig,
    kind: Kind,
    batch: &PackedRows,
    check: impl FnOnce(&Checkpoint),
) -> Tensor {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let decoder = Decoder::new(config, &mut checkpoint.loader(config, kind, Device::Cpu)).unwrap();
    let head = LogprobHead::frozen(decoder.embedding().shallow_clone(), 1.0);
    let logprobs = forward(&decoder, &head, batch).unwrap().logprobs;
    check(&checkpoint);
    logprobs
}

/// One test for all of it: memory is the process's, and the tests of a file share one.
#[test]
fn a_forward_pass_leaves_the_weights_in_the_file() {
    let batch = PackedRows::new(&Rows::of_tokens(&[((0..32).collect(), vec![true; 32])]), Device::Cpu);
    let folders = [Kind::Float, Kind::BFloat16].map(|kind| (kind, tempfile::tempdir().unwrap()));
    for (kind, folder) in &folders {
        let folder = folder.path();
        let config = write_model(folder, *kind);
        let weights = config.shape().num_params() as u64 * kind.elt_size_in_bytes() as u64;
        assert!(weights > 70_000_000, "{weights}");
        // libtorch's thread pools and buffers of the first pass are not the weights'.
        let expected = logprobs(folder, &config, *kind, &batch, |_| ());

        let (_, before) = private_dirty(folder);
        let found = logprobs(folder, &config, *kind, &batch, |_| {
            let (of_map, after) = private_dirty(folder);
            let growth = after.saturating_sub(before);
            println!("{kind:?}: {weights} bytes of weights, {growth} more private dirty, {of_map} in the map");
            assert_eq!(of_map, 0, "the map was written to");
            assert!(growth < weights / 20, "{growth} bytes more are private and dirty, for {weights} of weights");
            assert!(resident(folder) > weights / 2, "the counters see the map, whose pages were read");
        });
        assert_eq!(found, expected);
    }
    a_copy_would_be_seen(folders[0].1.path());
}

/// The counters of the test above move when weights are copied: here to another dtype.
fn a_copy_would_be_seen(folder: &Path) {
    let config = DecoderConfig::read(folder).unwrap();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let (_, before) = private_dirty(folder);
    let copy = Decoder::new(&config, &mut checkpoint.loader(&config, Kind::BFloat16, Device::Cpu)).unwrap();
    let (_, after) = private_dirty(folder);
    let copied = config.shape().num_params() as u64 * 2;
    assert!(after - before > copied * 9 / 10, "{} of {copied} bytes", after - before);
    drop(copy);
}
