//! Tokens per second of the engine on a model folder, as JSON lines:
//! `target/debug/examples/throughput FOLDER [--bf16] [--random] [--tensor-parallel N]`.
//!
//! 16 prompts of 32 tokens, 128 new tokens each (after a call that asks for one token each). `--bf16` computes in bfloat16;
//! `--random` needs no weights, only a `config.json`. With `--tensor-parallel N` the model is shared by N processes on this
//! machine's loopback, which divide its CPUs.

use std::path::Path;
use std::process::{Child, Command};
use std::time::Instant;

use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::progress::{Interrupt, Unwatched};
use echelon_core::random::{Domain, uniform};
use echelon_core::rollout::{Prompt, Prompts, SamplingConfig};
use echelon_core::shape::ModelShape;
use echelon_core::weight_layout::WeightLayout;
use echelon_generation::weight_layout::{Matrices, fastest};
use echelon_generation::{Engine, EngineConfig, Policy};
use echelon_models::checkpoint::{Checkpoint, random_parameter};
use echelon_models::config::DecoderConfig;
use echelon_models::decoder::{Decoder, Load};
use echelon_models::tensor_parallel::TensorParallel;
use serde_json::json;
use tch::{Device, Kind, Tensor};

const USAGE: &str = "throughput FOLDER [--bf16] [--random] [--tensor-parallel N]";
const HOST: &str = "127.0.0.1";

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |name: &str| -> Result<Option<usize>, Failure> {
        let Some(at) = arguments.iter().position(|argument| argument == name) else { return Ok(None) };
        let value = arguments.get(at + 1).ok_or(format!("{name} needs a number: {USAGE}"))?;
        Ok(Some(value.parse().map_err(|_| format!("{name} {value}: expected a number: {USAGE}"))?))
    };
    let flag = |name: &str| arguments.iter().any(|argument| argument == name);
    let folder = Path::new(arguments.first().ok_or(USAGE)?);
    let kind = if flag("--bf16") { Kind::BFloat16 } else { Kind::Float };
    let size = number("--tensor-parallel")?.unwrap_or(1).max(1);
    let config = DecoderConfig::read(folder)?;
    let cpus = std::thread::available_parallelism()?.get();
    tch::set_num_threads((cpus / size).max(1) as i32);

    // Hidden arguments of the processes that this one starts.
    if let (Some(rank), Some(port)) = (number("--rank")?, number("--port")?) {
        let point = MeetingPoint::join(HOST, port as u16, Patience::default())?;
        return measure(folder, &config, (kind, flag("--random")), join(&point, rank, size)?);
    }
    let point = MeetingPoint::serve(HOST, 0)?;
    let start = |rank: usize| {
        let placed = [("--rank", rank.to_string()), ("--port", point.port().to_string())];
        let placed = placed.into_iter().flat_map(|(name, value)| [name.to_string(), value]);
        Command::new(std::env::current_exe()?).args(&arguments).args(placed).spawn()
    };
    let mut others: Vec<Child> = (1..size).map(start).collect::<Result<_, _>>()?;
    let measured =
        join(&point, 0, size).and_then(|over_ranks| measure(folder, &config, (kind, flag("--random")), over_ranks));
    for other in &mut others {
        if measured.is_err() {
            let _ = other.kill();
        }
        other.wait()?;
    }
    measured
}

fn join(point: &MeetingPoint, rank: usize, size: usize) -> Result<TensorParallel, Failure> {
    let patience = Patience::default();
    Ok(TensorParallel::new(ProcessGroup::join(point, "throughput", (rank, size), HOST, patience)?))
}

fn measure(
    folder: &Path,
    config: &DecoderConfig,
    (kind, random): (Kind, bool),
    over_ranks: TensorParallel,
) -> Result<(), Failure> {
    let part = over_ranks.part();
    let shape = config.shape();
    shape.sliced(part)?;
    let checkpoint = if random { None } else { Some(Checkpoint::open(folder)?) };
    let mut from_file =
        checkpoint.as_ref().map(|checkpoint| checkpoint.slice_loader(config, kind, Device::Cpu, part)).transpose()?;
    let load: &mut Load = &mut |name| match &mut from_file {
        Some(load) => load(name),
        None => Ok(random_slice(config, &shape, &over_ranks, name).to_kind(kind)),
    };
    let model = Decoder::sliced(config, &over_ranks, load)?;
    let head = if config.tied_embeddings { model.embedding().shallow_clone() } else { load("lm_head.weight")? };
    let policy = Policy { model: &model, head: &head, tokenizer: None };
    let weight_layout = weight_layout(kind, &Matrices::of(&shape), &over_ranks)?;
    for max_new_tokens in [1, 128, 128] {
        let (temperature, top_k, top_p, min_p) = (1.0, 0, 1.0, 0.0);
        let sampling =
            SamplingConfig { temperature, top_k, top_p, min_p, max_new_tokens, stop: vec![], ignore_eos: true };
        let group = over_ranks.group();
        let (collectives, bytes_sent) = (group.standing().sequence, group.bytes_sent());
        let started = Instant::now();
        let engine = Engine::new(EngineConfig { weight_layout, ..EngineConfig::default() });
        let (_, report) =
            engine.generate(policy, &prompts(config.vocab_size), &sampling, &Unwatched, &Interrupt::default())?;
        let seconds = started.elapsed().as_secs_f64();
        if over_ranks.rank() == 0 {
            let line = json!({
                "tensor_parallel": over_ranks.size(),
                "threads_per_rank": tch::get_num_threads(),
                "dtype": format!("{kind:?}"),
                "weight_layout": weight_layout,
                "prompt_tokens": report.prefill_tokens,
                "new_tokens": report.generated_tokens,
                "decode_steps": report.decode_steps,
                "seconds": seconds,
                "tokens_per_s": report.generated_tokens as f64 / seconds,
                "collectives": group.standing().sequence - collectives,
                "bytes_sent": group.bytes_sent() - bytes_sent,
            });
            println!("{line}");
        }
    }
    Ok(())
}

/// What the first rank finds fastest.
fn weight_layout(kind: Kind, matrices: &Matrices, over_ranks: &TensorParallel) -> Result<WeightLayout, Failure> {
    let number = |layout| WeightLayout::ALL.iter().position(|known| *known == layout).unwrap_or_default();
    let found = if over_ranks.rank() == 0 { number(fastest(kind, matrices).0) } else { 0 };
    Ok(WeightLayout::ALL[over_ranks.group().max("weight layout", found as i64)? as usize])
}

/// This rank's slice of a parameter of a model with random weights.
fn random_slice(config: &DecoderConfig, shape: &ModelShape, over_ranks: &TensorParallel, name: &str) -> Tensor {
    let param = shape.units.iter().flat_map(|unit| &unit.params).find(|param| param.name == name);
    let param = param.expect("a parameter of this architecture");
    let slice = shape.slice(param, over_ranks.part());
    let whole = random_parameter(name, &param.shape, config.initializer_range, 1);
    whole.narrow(slice.dim as i64, slice.start, slice.length).copy()
}

fn prompts(vocab_size: i64) -> Prompts {
    let token = |id, at| (uniform(1, Domain::Data, id, at, 0) * vocab_size as f64) as i64;
    let row =
        |id| Prompt { id, token_ids: (0..32).map(|at| token(id, at)).collect(), text: String::new(), label: None };
    Prompts { rows: (0..16).map(row).collect(), samples_per_prompt: 1, seed: 1, evaluation: false }
}
