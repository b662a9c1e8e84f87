//! A checkpoint in the memory that a host's processes share: copied in once, wrapped by each without a copy.

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
fn weights_are_wrapped_where_the_host_shares_them() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let config = write_model(folder, Kind::Float);
    let server = StoreServer::start(StoreConfig::new(64 << 20)).unwrap();
    let [one, two] = ["reference", "reward"].map(|name| Store::connect(server.address(), name).unwrap());

    let shared = Checkpoint::open_shared(folder, &one, PATIENCE).unwrap();
    let again = Checkpoint::open_shared(folder, &two, PATIENCE).unwrap();
    assert_eq!(one.report().unwrap().num_objects, 1, "one file, copied in once");
    let object = one.put_file(&folder.join("model.safetensors"), PATIENCE).unwrap();
    let file = Checkpoint::open(folder).unwrap();
    let mut loaders = [&file, &shared, &again].map(|from| Box::new(from.loader(&config, Kind::Float, Device::Cpu)));
    for param in config.shape().units.iter().flat_map(|unit| &unit.params) {
        let [of_file, weight, other] = loaders.each_mut().map(|loader| loader(&param.name).unwrap());
        assert!(of_file.equal(&weight) && of_file.equal(&other), "{}", param.name);
        assert!(shared.holds(&weight) && again.holds(&other) && !file.holds(&weight), "{} is a copy", param.name);
        assert_eq!(weight.size(), param.shape);
    }
    drop(loaders);
    let weight = shared.tensor("model.norm.weight", &[32]).unwrap();
    drop((object, again, shared));
    assert_eq!(one.report().unwrap().num_held, 1, "a weight holds the object");
    drop(weight);
    assert_eq!(one.report().unwrap().num_held, 0);

    // A file that changed is another object; one that is damaged is refused, and named.
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let error = Checkpoint::open_shared(folder, &one, PATIENCE).unwrap_err().to_string();
    assert!(error.contains("model.safetensors") && error.contains("bytes of tensors"), "{error}");
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
