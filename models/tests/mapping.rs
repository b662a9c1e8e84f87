//! Frozen weights stay in the file's map: a forward pass makes no private copy of them.

use std::path::Path;

use echelon_core::pack::PackedRows;
use echelon_core::rollout::Tokens;
use echelon_core::zero::{forward, write_tensors};
use echelon_models::checkpoint::Checkpoint;
use echelon_models::config::DecoderConfig;
use echelon_models::decoder::Decoder;
use echelon_models::head::LogprobHead;
use tch::{Device, Kind, Tensor};

/// 39.9 million parameters: 160 MB in f32, 80 MB in bf16.
const CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 2048,
  "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 12288,
  "max_position_embeddings": 512, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": true,
  "torch_dtype": "float32"
}"#;

fn write_model(folder: &Path, kind: Kind) -> DecoderConfig {
    std::fs::write(folder.join("config.json"), CONFIG).unwrap();
    let config = DecoderConfig::read(folder).unwrap();
    tch::manual_seed(1);
    let shape = config.shape();
    let tensors: Vec<(String, Tensor)> = shape
        .units
        .iter()
        .flat_map(|unit| &unit.params)
        .map(|param| {
            (param.name.clone(), (Tensor::randn(&param.shape, (Kind::Float, Device::Cpu)) * 0.02).to_kind(kind))
        })
        .collect();
    write_tensors(&folder.join("model.safetensors"), &tensors, &[]).unwrap();
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

/// One test for both dtypes: memory is the process's, and tests of one file share it.
#[test]
fn a_forward_pass_leaves_the_weights_in_the_file() {
    let batch = PackedRows::new(&Tokens::from_rows(&[((0..32).collect(), vec![true; 32])]), Device::Cpu);
    for (kind, own_bytes) in [(Kind::Float, 4), (Kind::BFloat16, 2)] {
        let folder = tempfile::tempdir().unwrap();
        let config = write_model(folder.path(), kind);
        let weights = config.shape().num_params() as u64 * own_bytes;
        assert!(weights > 70_000_000, "{weights}");
        // libtorch's thread pools and buffers of the first pass are not the weights'.
        let expected = logprobs(folder.path(), &config, kind, &batch, |_| ());

        let (_, before) = private_dirty(folder.path());
        let found = logprobs(folder.path(), &config, kind, &batch, |_| {
            let (of_map, after) = private_dirty(folder.path());
            let growth = after.saturating_sub(before);
            println!("{kind:?}: {weights} bytes of weights, {growth} more private dirty, {of_map} in the map");
            assert_eq!(of_map, 0, "the map was written to");
            assert!(growth < weights / 20, "{growth} bytes more are private and dirty, for {weights} of weights");
            // The counters see the map: its pages were read.
            assert!(resident(folder.path()) > weights / 2);
        });
        assert_eq!(found, expected);
        // They would see a copy, too.
        let other = if kind == Kind::Float { Kind::Double } else { Kind::Float };
        let (_, before) = private_dirty(folder.path());
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let copy = Decoder::new(&config, &mut checkpoint.loader(&config, other, Device::Cpu)).unwrap();
        let (_, after) = private_dirty(folder.path());
        assert!(after.saturating_sub(before) > weights, "a converted copy is private");
        drop(copy);
    }
}
