//! How long one training step of a policy takes over ranks, and what it takes of memory: ours at every ZeRO stage, and beside
//! it PyTorch's fully_shard, DDP and one process with the same work, in turns.
//!
//! ```text
//! target/debug/examples/train_step [--model FOLDER] [--python PYTHON] [--rounds 3] [--steps 3] [--only 3]
//! ```
//!
//! 16 rows of 32 prompt and 48 response tokens in f32, PPO's clipped loss, clipping by the global norm, AdamW; two ranks of one
//! thread each, each a process of its own, over Gloo. Without a model's folder, random weights in SmolLM2-135M's shape. Without
//! a Python that has PyTorch 2.11 and transformers, PyTorch is not run, and the result says so. Prints JSON lines.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use echelon_core::data::Rows;
use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::random::{Domain, uniform};
use echelon_core::role::Role;
use echelon_core::shim;
use echelon_core::zero::{OptimizerConfig, PassConfig, Sharding, TensorWriter, Trainable, TrainingState, ZeroStage};
use echelon_models::checkpoint::Checkpoint;
use echelon_models::config::DecoderConfig;
use echelon_models::decoder::Decoder;
use echelon_models::head::{LogprobHead, LogprobOutput};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const ROWS: i64 = 16;
const PROMPT: i64 = 32;
const RESPONSE: i64 = 48;
const LOOPBACK: &str = "127.0.0.1";
const PEER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../benchmarks/peers/fully_shard.py");

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str| arguments.iter().position(|a| a == name).and_then(|at| arguments.get(at + 1)).cloned();
    let number = |name: &str, default: usize| option(name).map_or(Ok(default), |text| text.parse());
    let steps = number("--steps", 3)?;
    if let (Some(rank), Some(folder)) = (option("--rank"), option("--model")) {
        let place = (rank.parse()?, number("--ranks", 2)?, number("--port", 0)? as u16);
        let report = rank_of(Path::new(&folder), place, number("--stage", 3)? as u8, steps)?;
        println!("{report}");
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    let folder = match option("--model") {
        Some(folder) => PathBuf::from(folder),
        None => random_model(scratch.path())?,
    };
    let only = option("--only");
    let mut runs: Vec<Run> = (0..4).rev().map(Run::Ours).collect();
    match option("--python") {
        Some(python) => runs.extend(["fully_shard", "ddp", "one"].map(|mode| Run::Torch(python.clone(), mode))),
        None => println!("{}", json!({"fully_shard": "not run: name a Python that has PyTorch 2.11 with --python"})),
    }
    runs.retain(|run| run.is_wanted(only.as_deref()));
    let mut seconds = vec![Vec::new(); runs.len()];
    let mut peaks = vec![0; runs.len()];
    for _ in 0..number("--rounds", 3)? {
        for (index, run) in runs.iter().enumerate() {
            let report = run.measure(&folder, steps)?;
            println!("{report}");
            seconds[index].push(report["seconds"].as_f64().unwrap_or(f64::NAN));
            let of_ranks = report["peak_bytes_per_rank"].as_array().into_iter().flatten();
            peaks[index] = of_ranks.filter_map(Value::as_u64).max().unwrap_or(0).max(peaks[index]);
        }
    }
    let compared = runs.iter().position(|run| matches!(run, Run::Torch(_, "fully_shard")));
    for (index, run) in runs.iter().enumerate() {
        let mut summary = json!({
            "summary": run.name(), "seconds": middle(seconds[index].clone()), "peak_bytes_per_rank": peaks[index],
        });
        if let Some(peer) = compared {
            // Round by round: a machine that others use is fast in one and slow in another.
            let ratios = seconds[index].iter().zip(&seconds[peer]).map(|(mine, peers)| mine / peers).collect();
            summary["of_fully_shards_seconds"] = json!(middle(ratios));
            summary["of_fully_shards_bytes"] = json!(peaks[index] as f64 / peaks[peer] as f64);
        }
        println!("{summary}");
    }
    Ok(())
}

/// The median.
fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What is measured.
enum Run {
    /// At this ZeRO stage.
    Ours(u8),
    /// By this Python, in this mode of the peer's script.
    Torch(String, &'static str),
}

impl Run {
    fn name(&self) -> String {
        match self {
            Run::Ours(stage) => format!("echelon stage {stage}"),
            Run::Torch(_, mode) => format!("torch {mode}"),
        }
    }

    /// `only` is a list of stages and modes, such as `3,fully_shard`.
    fn is_wanted(&self, only: Option<&str>) -> bool {
        let word = match self {
            Run::Ours(stage) => stage.to_string(),
            Run::Torch(_, mode) => mode.to_string(),
        };
        only.is_none_or(|list| list.split(',').any(|wanted| wanted == word))
    }

    fn measure(&self, folder: &Path, steps: usize) -> Outcome<Value> {
        match self {
            Run::Ours(stage) => ours(folder, *stage, steps),
            Run::Torch(python, mode) => {
                let mut command = Command::new(python);
                let output = command.arg(PEER).arg(folder).arg(mode).arg(steps.to_string()).output()?;
                if !output.status.success() {
                    return Err(format!("{python}: {}", String::from_utf8_lossy(&output.stderr)).into());
                }
                let text = String::from_utf8(output.stdout)?;
                Ok(serde_json::from_str(text.lines().last().unwrap_or_default())?)
            }
        }
    }
}

/// Two processes of this program.
fn ours(folder: &Path, stage: u8, steps: usize) -> Outcome<Value> {
    let meeting = MeetingPoint::serve(LOOPBACK, 0)?;
    let mut ranks = Vec::new();
    for rank in 0..2 {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--model").arg(folder).stdout(Stdio::piped());
        for (name, value) in [("rank", rank), ("ranks", 2), ("port", i32::from(meeting.port()))] {
            command.arg(format!("--{name}")).arg(value.to_string());
        }
        command.arg("--stage").arg(stage.to_string()).arg("--steps").arg(steps.to_string());
        ranks.push(command.spawn()?);
    }
    let mut reports = Vec::new();
    for rank in ranks {
        let output = rank.wait_with_output()?;
        if !output.status.success() {
            return Err(format!("a rank at stage {stage} ended with {}", output.status).into());
        }
        reports.push(serde_json::from_slice::<Value>(&output.stdout)?);
    }
    let of = |name: &str| reports.iter().map(|report| report[name].clone()).collect::<Vec<_>>();
    let mut report = reports[0].clone();
    report["program"] = json!(format!("echelon stage {stage}"));
    report["ranks"] = json!(2);
    report["seconds"] = json!(of("seconds").iter().filter_map(Value::as_f64).fold(0.0, f64::max));
    report["peak_bytes_per_rank"] = json!(of("peak_bytes"));
    report["tensor_bytes_per_rank"] = json!(of("tensor_bytes"));
    Ok(report)
}

/// One rank's steps.
fn rank_of(folder: &Path, (rank, ranks, port): (usize, usize, u16), stage: u8, steps: usize) -> Outcome<Value> {
    shim::install_cpu_allocator();
    tch::set_num_threads((2 / ranks as i32).max(1));
    let patience = Patience::default();
    let meeting = MeetingPoint::join(LOOPBACK, port, patience)?;
    let group = ProcessGroup::join(&meeting, "train step", (rank, ranks), LOOPBACK, patience)?;
    let stage = ZeroStage::from_number(stage).ok_or("a ZeRO stage is 0 to 3")?;
    let mut policy = policy(folder, Sharding { group: group.clone(), stage, offload: false })?;
    let vocab = policy.model.embedding().size()[0];
    let length = PROMPT + RESPONSE;
    let row = |row: i64| {
        let ids = (row * length..(row + 1) * length).map(|place| place * 7919 % (vocab - 3) + 3).collect();
        (ids, (0..length).map(|at| at >= PROMPT).collect())
    };
    let mine: Vec<i64> = (rank as i64..ROWS).step_by(ranks).collect();
    let rows: Vec<(Vec<i64>, Vec<bool>)> = mine.iter().map(|&index| row(index)).collect();
    let tokens = Rows::of_tokens(&rows);
    let of_response = Tensor::arange(ROWS * RESPONSE, tch::kind::FLOAT_CPU).sin().view([ROWS, RESPONSE]);
    let advantages = of_response.index_select(0, &Tensor::from_slice(&mine)).constant_pad_nd([PROMPT, 0]);
    std::fs::write("/proc/self/clear_refs", "5")?;
    shim::reset_peak_bytes(Device::Cpu);
    let mut seconds = Vec::new();
    let mut first = None;
    for _ in 0..=steps {
        group.barrier("begin a step")?;
        let (begun, sent) = (Instant::now(), group.bytes_sent());
        let mut sums = (0.0, 0.0);
        let loss_of = |output: &LogprobOutput| {
            let ratio = (&output.logprobs - output.logprobs.detach()).exp();
            let objective = (&ratio * &advantages).minimum(&(ratio.clamp(0.8, 1.2) * &advantages));
            sums.0 = output.logprobs.sum(Kind::Double).double_value(&[]);
            sums.1 = output.entropy.as_ref().map_or(0.0, |entropy| entropy.sum(Kind::Double).double_value(&[]));
            Ok(-objective.sum(Kind::Float) / (ROWS * RESPONSE) as f64)
        };
        policy.micro_batches(&tokens.lengths, 1)?;
        policy.forward_backward(&tokens, loss_of)?;
        let grad_norm = policy.optimizer_step(1e-6)?;
        seconds.push(begun.elapsed().as_secs_f64());
        let sent = group.bytes_sent() - sent;
        first.get_or_insert((grad_norm, sums, sent));
    }
    let (grad_norm, (logprobs, entropy), bytes_sent) = first.ok_or("no step was made")?;
    Ok(json!({
        "seconds": middle(seconds[1..].to_vec()),
        "peak_bytes": peak_resident()?,
        "tensor_bytes": shim::peak_bytes(Device::Cpu),
        "bytes_sent": bytes_sent,
        "grad_norm": grad_norm,
        "logprobs": group.sum("log-probs", logprobs)?,
        "entropy": group.sum("entropy", entropy)?,
    }))
}

fn policy(folder: &Path, sharding: Sharding) -> Outcome<Trainable<Decoder, LogprobHead>> {
    let config = DecoderConfig::read(folder)?;
    let checkpoint = Checkpoint::open(folder)?;
    let shape = config.shape();
    let shapes: std::collections::HashMap<String, Vec<i64>> =
        shape.units.iter().flat_map(|unit| &unit.params).map(|p| (p.name.clone(), p.shape.clone())).collect();
    let optimizer = OptimizerConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.01, max_grad_norm: 1.0 };
    let mut load = |name: &str| {
        checkpoint.tensor(name, &shapes[name]).map_err(|error| echelon_core::Error::other("the model", error))
    };
    let state = TrainingState::new(Role::Actor, &shape, optimizer, (Kind::Float, Device::Cpu), &sharding, &mut load)?;
    let params = state.params();
    let model = Decoder::new(&config, &mut |name| Ok(params[name].weight.shallow_clone()))?;
    let head = if config.tied_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
    let head = LogprobHead::trained(params[head].shallow_clone(), 1.0);
    let pass = PassConfig {
        device: Device::Cpu,
        tokens_per_micro_batch: ROWS * (PROMPT + RESPONSE),
        activation_checkpointing: false,
    };
    Ok(Trainable::new(state, model, head, pass))
}

/// Most bytes of this process in memory at once since loading.
fn peak_resident() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM in /proc/self/status")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

/// A checkpoint in SmolLM2-135M's shape with random weights of a usual size.
fn random_model(folder: &Path) -> Outcome<PathBuf> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "vocab_size": 49152,
        "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
    });
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let shape = DecoderConfig::read(folder)?.shape();
    let tensors: Vec<(String, Vec<i64>)> =
        shape.units.iter().flat_map(|unit| &unit.params).map(|p| (p.name.clone(), p.shape.clone())).collect();
    let mut file =
        TensorWriter::create(&folder.join("model.safetensors"), &tensors, Kind::Float, &[("format", "pt".into())])?;
    for (index, (name, size)) in tensors.iter().enumerate() {
        let tensor = if size.len() == 1 {
            Tensor::ones(size.as_slice(), tch::kind::FLOAT_CPU)
        } else {
            let phase = uniform(1, Domain::Data, index as u64, 0, 0) * 1e4;
            let count: i64 = size.iter().product();
            ((Tensor::arange(count, tch::kind::DOUBLE_CPU) * 12.9898 + phase).sin() * 0.03)
                .to_kind(Kind::Float)
                .view(size.as_slice())
        };
        file.write(name, &tensor)?;
    }
    file.finish()?;
    Ok(folder.into())
}
