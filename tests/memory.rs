//! A program of its own, because it reads the process-wide counters of the CPU allocator.

use echelon_core::data::Rows;
use echelon_core::role::Role;
use echelon_core::shim;
use echelon_core::weight_layout::WeightLayout;
use echelon_core::zero::{OptimizerConfig, PassConfig, Sharding};
use echelon_roles::models::{Held, trainable_policy};
use serde_json::json;
use tch::{Device, Kind};

/// The head goes in chunks: what a micro-batch takes at its peak does not grow with vocabulary × sequence.
#[test]
fn the_peak_of_a_micro_batch_does_not_grow_with_vocabulary_times_sequence() {
    shim::install_cpu_allocator();
    let few = peak(1 << 14, 2048);
    for (vocabulary, tokens) in [(1 << 17, 1024), (1 << 17, 2048)] {
        let logits = vocabulary * tokens * 4;
        let more = peak(vocabulary, tokens);
        assert!(more - few < 64 << 20 && more < logits / 2, "{vocabulary} x {tokens}: {more} bytes against {few}");
    }
}

/// Bytes that a forward and backward pass over one sequence takes beyond weights and gradients.
fn peak(vocabulary: i64, tokens: i64) -> i64 {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let pass = PassConfig { device: Device::Cpu, tokens_per_micro_batch: tokens, activation_checkpointing: false };
    let held = Held { kind: Kind::Float, pass, weight_layout: WeightLayout::Plain, deterministic: true };
    let optimizer = OptimizerConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.0, max_grad_norm: 1.0 };
    let mut policy =
        trainable_policy(Role::Actor, folder.path(), Some(1), held, (optimizer, &Sharding::whole()), 1.0).unwrap();
    let row = ((0..tokens).map(|t| (t * 31) % vocabulary).collect(), (0..tokens).map(|t| t > 0).collect());
    let rows = Rows::of_tokens(&[row]);
    let mut pass = || policy.forward_backward(&rows, |output| Ok(-output.logprobs.sum(Kind::Float))).unwrap();
    pass(); // gradients are taken page by page at their first touch
    let before = shim::live_bytes(Device::Cpu);
    shim::reset_peak_bytes(Device::Cpu);
    pass();
    shim::peak_bytes(Device::Cpu) as i64 - before as i64
}
