//! How long planning takes, from one device to ten thousand: prints one JSON object per cluster.
//!
//! `target/debug/examples/plan_scale [--text]`; with `--text` the plans themselves.

use std::time::Instant;

use echelon_core::compute::ComputeDtype;
use echelon_core::role::Role;
use echelon_core::shape::{ModelShape, ParamShape, TensorParallelAxis, UnitShape};
use echelon_core::workload::{Gives, RoleModel, Sampling, Training, Workload, passes_with_sampling};
use echelon_placement::cluster::Cluster;
use echelon_placement::planner::{Constraints, PlanError, plan};
use echelon_placement::rates::Rates;
use serde_json::json;

/// Hidden, layers, query heads, key-value heads, gated width, vocabulary.
const SMOLLM2: [i64; 6] = [576, 30, 9, 3, 1536, 49152];
const GATED_7B: [i64; 6] = [4096, 32, 32, 32, 11008, 32000];
const GATED_13B: [i64; 6] = [5120, 40, 40, 40, 13824, 32000];
const GATED_70B: [i64; 6] = [8192, 80, 64, 8, 28672, 32000];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let as_text = std::env::args().any(|argument| argument == "--text");
    let gpus = |nodes: usize, devices: usize, kind: &str| Cluster::of(nodes, devices, kind);
    let (mut large, mut small) = (workload(GATED_70B), workload(GATED_7B));
    large.resize(20480, 5120);
    small.resize(20480, 10240);
    let unlike = gpus(600, 8, "H100-80GB")?.joined(gpus(650, 8, "A100-80GB")?);
    let cases = [
        ("smollm2, 2 CPU workers", Cluster::cpu(2, 2, 16 << 30)?, on_cpu()),
        ("7b, 1 GPU", gpus(1, 1, "H200")?, workload(GATED_7B)),
        ("7b, 8 GPUs", gpus(1, 8, "H100-80GB")?, workload(GATED_7B)),
        ("13b, 8 GPUs", gpus(1, 8, "H100-80GB")?, workload(GATED_13B)),
        ("13b, 16 GPUs", gpus(2, 8, "H100-80GB")?, workload(GATED_13B)),
        ("70b, 8 GPUs", gpus(1, 8, "H200")?, workload(GATED_70B)),
        ("70b, 64 GPUs", gpus(8, 8, "H100-80GB")?, workload(GATED_70B)),
        ("70b, 1000 GPUs", gpus(125, 8, "H100-80GB")?, large.clone()),
        ("7b, 10000 GPUs", gpus(1250, 8, "H100-80GB")?, small),
        ("70b, 10000 GPUs", gpus(1250, 8, "H100-80GB")?, large.clone()),
        ("70b, 10000 GPUs of two kinds", unlike, large),
    ];
    for (name, cluster, workload) in cases {
        let begun = Instant::now();
        let planned = plan(&cluster, &workload, &Constraints::default(), &Rates::of(&cluster));
        let seconds = begun.elapsed().as_secs_f64();
        match planned {
            Ok(plan) if as_text => println!("== {name}\n{plan}\n"),
            Err(error) if as_text => println!("== {name}\n{error}\n"),
            Ok(plan) => {
                let (tier, step) = (plan.tier, plan.seconds.step);
                let (considered, idle) = (plan.considered, plan.idle_devices);
                println!(
                    "{}",
                    json!({"case": name, "devices": cluster.num_devices(), "planning_s": seconds, "tier": tier,
                           "step_s": step, "considered": considered, "idle_devices": idle})
                );
            }
            Err(PlanError::Refused(refusal)) => {
                let devices = cluster.num_devices();
                println!(
                    "{}",
                    json!({"case": name, "devices": devices, "planning_s": seconds, "refused": refusal.change})
                );
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn on_cpu() -> Workload {
    let mut work = Workload {
        max_prompt_tokens: 32,
        max_response_tokens: 48,
        mean_prompt_tokens: 32.0,
        mean_response_tokens: 43.0,
        tokens_per_micro_batch: 1280,
        dtype: ComputeDtype::Float32,
        activation_checkpointing: false,
        ..workload_of(SMOLLM2, &[Role::Actor, Role::Critic, Role::Reference])
    };
    work.resize(16, 16);
    work
}

/// Four models of one size; 1,024 prompts of at most 1,024 tokens, as many new ones, on average half of that.
fn workload(size: [i64; 6]) -> Workload {
    workload_of(size, &[Role::Actor, Role::Critic, Role::Reference, Role::Reward])
}

fn workload_of(size: [i64; 6], roles: &[Role]) -> Workload {
    let model = |&role: &Role| {
        let scores = matches!(role, Role::Critic | Role::Reward);
        RoleModel {
            role,
            shape: gated(size, scores),
            gives: if scores { Gives::Scalars } else { Gives::Logprobs },
            training: matches!(role, Role::Actor | Role::Critic).then(Training::default),
            offload: false,
        }
    };
    let models: Vec<RoleModel> = roles.iter().map(model).collect();
    Workload {
        passes: passes_with_sampling(&models, 1024, 128, 8),
        models,
        sampling: Some(Sampling {
            published: Role::Actor,
            prompts: 1024,
            samples_per_prompt: 1,
            max_sequences: 256,
            max_batched_tokens: 8192,
            kv_cache_bytes: None,
        }),
        rows: 1024,
        rows_per_unit: 1,
        max_prompt_tokens: 1024,
        max_response_tokens: 1024,
        mean_prompt_tokens: 512.0,
        mean_response_tokens: 512.0,
        tokens_per_micro_batch: 8192,
        dtype: ComputeDtype::Bfloat16,
        activation_checkpointing: true,
    }
}

/// The shape of a Llama-like model with an untied head, or one score.
fn gated([h, layers, heads, kv_heads, f, v]: [i64; 6], scores: bool) -> ModelShape {
    use TensorParallelAxis::{Columns, Replicated, Rows};
    let param =
        |name: &str, shape: &[i64], axis| ParamShape { name: name.into(), shape: shape.into(), axis, trainable: true };
    let kv = h / heads * kv_heads;
    let layer = |index: i64| UnitShape {
        name: format!("layer {index}"),
        params: vec![
            param("norms", &[2, h], Replicated),
            param("query", &[h, h], Rows),
            param("key", &[kv, h], Rows),
            param("value", &[kv, h], Rows),
            param("output", &[h, h], Columns),
            param("gate", &[f, h], Rows),
            param("up", &[f, h], Rows),
            param("down", &[h, f], Columns),
        ],
    };
    let head = if scores { param("score", &[1, h], Replicated) } else { param("lm_head", &[v, h], Rows) };
    let mut units = vec![UnitShape { name: "embedding".into(), params: vec![param("embedding", &[v, h], Rows)] }];
    units.extend((0..layers).map(layer));
    units.push(UnitShape { name: "head".into(), params: vec![param("norm", &[h], Replicated), head] });
    ModelShape {
        units,
        hidden_size: h,
        num_layers: layers as usize,
        num_heads: heads,
        num_kv_heads: kv_heads,
        head_dim: h / heads,
        intermediate_size: f,
        vocab_size: v,
    }
}
