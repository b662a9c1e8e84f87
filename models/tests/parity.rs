//! Log-probs and scores against transformers, for every architecture (golden/make_checkpoints.py made the folders).

use std::path::{Path, PathBuf};

use echelon_core::data::Rows;
use echelon_core::pack::PackedRows;
use echelon_core::zero::forward;
use echelon_models::checkpoint::Checkpoint;
use echelon_models::config::{DecoderConfig, HeadKind};
use echelon_models::decoder::Decoder;
use echelon_models::head::{LogprobHead, ScalarHead, ScalarRows};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

#[path = "common/mapped.rs"]
mod mapped;

use mapped::lies_in;

fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 10, "golden checkpoints are there");
    folders
}

fn expected(folder: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(folder.join("expected.json")).unwrap()).unwrap()
}

fn ids(sequence: &Value) -> Vec<i64> {
    sequence["token_ids"].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

/// All sequences of a file as one packed batch, every token but the first wanted.
fn batch(expected: &Value) -> PackedRows {
    let rows: Vec<_> = expected["sequences"]
        .as_array()
        .unwrap()
        .iter()
        .map(ids)
        .map(|ids| (ids.clone(), vec![true; ids.len()]))
        .collect();
    PackedRows::new(&Rows::of_tokens(&rows), Device::Cpu)
}

/// Ours minus transformers' for every token, in f64.
fn logprob_differences(folder: &Path, kind: Kind) -> Vec<f64> {
    let config = DecoderConfig::read(folder).unwrap();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut load = checkpoint.loader(&config, kind, Device::Cpu);
    let decoder = Decoder::new(&config, &mut load).unwrap();
    let weight =
        if config.tied_embeddings { decoder.embedding().shallow_clone() } else { load("lm_head.weight").unwrap() };
    let expected = expected(folder);
    let batch = batch(&expected);
    let output = forward(&decoder, &LogprobHead::frozen(weight, 1.0), &batch).unwrap();
    let ours = output.logprobs.flatten(0, -1).index_select(0, &batch.columns).to_kind(Kind::Double);
    let ours: Vec<f64> = Vec::try_from(ours).unwrap();
    let theirs =
        expected["sequences"].as_array().unwrap().iter().flat_map(|s| s["logprobs"].as_array().unwrap()[1..].to_vec());
    ours.into_iter().zip(theirs).map(|(ours, theirs)| ours - theirs.as_f64().unwrap()).collect()
}

#[test]
fn f32_logprobs_equal_transformers() {
    let mut checked = 0;
    for folder in folders() {
        if DecoderConfig::read(&folder).unwrap().head == HeadKind::Score {
            continue;
        }
        let worst = logprob_differences(&folder, Kind::Float).into_iter().map(f64::abs).fold(0.0, f64::max);
        println!("{}: max abs difference {worst:.2e}", folder.file_name().unwrap().display());
        assert!(worst <= 1e-4, "{}: {worst:e}", folder.display());
        checked += 1;
    }
    assert!(checked >= 8);
}

#[test]
fn bf16_is_as_close_to_f32_as_transformers_own() {
    for folder in folders() {
        if DecoderConfig::read(&folder).unwrap().head == HeadKind::Score {
            continue;
        }
        let differences = logprob_differences(&folder, Kind::BFloat16);
        let ours = differences.iter().map(|d| d.abs()).sum::<f64>() / differences.len() as f64;
        let theirs = expected(&folder)["bf16_mean_abs_error"].as_f64().unwrap();
        println!("{}: {ours:.4} against transformers' {theirs:.4}", folder.file_name().unwrap().display());
        assert!(ours <= 1.2 * theirs, "{}: {ours} against {theirs}", folder.display());
    }
}

#[test]
fn scores_at_the_last_token_equal_transformers() {
    let mut checked = 0;
    for folder in folders() {
        let config = DecoderConfig::read(&folder).unwrap();
        if config.head != HeadKind::Score {
            continue;
        }
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let mut load = checkpoint.loader(&config, Kind::Float, Device::Cpu);
        let decoder = Decoder::new(&config, &mut load).unwrap();
        let head = ScalarHead::frozen(load("score.weight").unwrap(), ScalarRows::LastTokens);
        let expected = expected(&folder);
        let ours: Vec<f32> = Vec::try_from(forward(&decoder, &head, &batch(&expected)).unwrap().values).unwrap();
        for (ours, theirs) in ours.iter().zip(expected["scores"].as_array().unwrap()) {
            assert!(
                (f64::from(*ours) - theirs.as_f64().unwrap()).abs() <= 1e-4,
                "{}: {ours} {theirs}",
                folder.display()
            );
        }
        checked += 1;
    }
    assert_eq!(checked, 2);
}

#[test]
fn frozen_weights_lie_in_the_file() {
    for folder in folders() {
        let config = DecoderConfig::read(&folder).unwrap();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        for param in config.shape().units.iter().flat_map(|unit| &unit.params) {
            let tensor = checkpoint.tensor(&param.name, &param.shape).unwrap();
            assert!(lies_in(&folder, &tensor), "{}: {}", folder.display(), param.name);
        }
        assert!(!lies_in(&folder, &Tensor::from(1.0)));
    }
}

#[test]
fn a_tensor_outlives_its_checkpoint() {
    let folder = &folders()[0];
    let config = DecoderConfig::read(folder).unwrap();
    let shape = [config.vocab_size, config.hidden_size];
    let checkpoint = Checkpoint::open(folder).unwrap();
    let tensor = checkpoint.tensor("model.embed_tokens.weight", &shape).unwrap();
    let sum = tensor.sum(Kind::Double).double_value(&[]);
    drop(checkpoint);
    assert_eq!(tensor.sum(Kind::Double).double_value(&[]), sum);
}
