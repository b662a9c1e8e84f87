//! A checkpoint in the memory that a host's processes share: converted once, wrapped by each without a copy.

use std::path::Path;
use std::time::Duration;

use echelon_core::store::{Store, StoreConfig, StoreServer};
use echelon_models::checkpoint::{Checkpoint, random_parameter, save_pretrained};
use echelon_models::config::{DecoderConfig, HeadKind};
use tch::{Device, Kind};

const PATIENCE: Duration = Duration::from_secs(30);

const CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
  "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
  "max_position_embeddings": 64, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": true,
  "torch_dtype": "float32"
}"#;

fn write_model(folder: &Path, kind: Kind) -> DecoderConfig {
    std::fs::write(folder.join("config.json"), CONFIG).unwrap();
    let config = DecoderConfig::read(folder).unwrap();
    let params: Vec<_> = config.shape().units.into_iter().flat_map(|unit| unit.params).collect();
    let named: Vec<_> = params.iter().map(|param| (param.name.clone(), param.shape.clone())).collect();
    let mut writer = save_pretrained(folder, folder, HeadKind::Logits, &named, kind, &[]).unwrap();
    for (name, shape) in &named {
        writer.write(name, &random_parameter(name, shape, 0.02, 7)).unwrap();
    }
    writer.finish().unwrap();
    config
}

#[test]
fn a_model_in_another_dtype_is_converted_once_for_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let config = write_model(folder.path(), Kind::BFloat16);
    let server = StoreServer::start(StoreConfig::new(64 << 20)).unwrap();
    let [one, two] = ["worker 0", "worker 1"].map(|name| Store::connect(server.address(), name).unwrap());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let shared = |store, kind| checkpoint.shared_in(&config, kind, store, PATIENCE).unwrap();
    assert!(shared(&one, Kind::BFloat16).is_none(), "a map of the file is as good");

    let [first, second] = [&one, &two].map(|store| shared(store, Kind::Float).unwrap());
    let report = one.report().unwrap();
    assert_eq!((report.num_objects, report.num_held), (1, 1));
    let mut loader = checkpoint.loader(&config, Kind::Float, Device::Cpu);
    for param in config.shape().units.iter().flat_map(|unit| &unit.params) {
        let own = loader(&param.name).unwrap();
        assert!(own.equal(&first[&param.name]) && own.equal(&second[&param.name]), "{}", param.name);
        assert_eq!(second[&param.name].kind(), Kind::Float);
    }
    assert_eq!(shared(&one, Kind::Double).unwrap()["model.norm.weight"].kind(), Kind::Double);
    drop((first, second));
    assert_eq!(one.report().unwrap().num_held, 0);
}
