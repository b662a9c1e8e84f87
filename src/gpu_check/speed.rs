//! Steps that measure: what the device can do, and how much of it decoding, prefill and training reach.
//!
//! Each step measures the device's copy bandwidth and matmul rate itself, just before its own work: clocks and neighbours
//! change. Parts are of those, not of a data sheet's numbers. Weights are random, work is the programs' own code.

use std::path::Path;
use std::time::Instant;

use echelon_core::data::Rows;
use echelon_core::progress::{Interrupt, Unwatched};
use echelon_core::rollout::{GenerationReport, Prompt, Prompts, SamplingConfig};
use echelon_core::weight_layout::WeightLayout;
use echelon_core::zero::PassConfig;
use echelon_generation::{Engine, EngineConfig, Policy as Sampled};
use echelon_models::decoder::Decoder;
use echelon_models::head::{LogprobHead, LogprobOutput};
use tch::{Device, Kind, Tensor};

use super::child::dies_with_us;
use super::models::{HALF_BILLION, Shape, TINY, frozen, learning};
use super::place::{Place, this_program};
use super::verdict::Findings;
use crate::program::{Failure, failed};
use echelon_monitor::{ModelSize, forward_flops_per_token, training_flops_per_token};
use echelon_roles::models::{Held, Policy};

/// Of several measurements the fastest.
const TRIES: usize = 4;

/// Makes libtorch use TF32 in a process that begins with it.
const TF32: &str = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE";

/// Step `rates`.
pub fn rates(place: &Place) -> Result<Findings, Failure> {
    let (device, mut findings) = place.open()?;
    findings.speed("copy on the device (read and written)", copy_rate(place, device)? / 1e9, "GB/s");
    for (name, kind) in [("bfloat16", Kind::BFloat16), ("float32, TF32 off", Kind::Float)] {
        findings.speed(format!("matmul, {name}"), matmul_rate(place, (kind, device))? / 1e12, "TFLOP/s");
    }
    let found = in_tf32(place)?;
    let rate = found.number(TF32_RATE).unwrap_or(if findings.stand_in { 1.0 } else { f64::NAN });
    findings.speed("matmul, float32 in TF32", rate, "TFLOP/s");
    Ok(findings)
}

const TF32_RATE: &str = "matmul";

/// What [`rates`] runs in another process.
pub fn tf32_rate(place: &Place) -> Result<Findings, Failure> {
    let (device, mut findings) = place.open()?;
    findings.speed(TF32_RATE, matmul_rate(place, (Kind::Float, device))? / 1e12, "TFLOP/s");
    Ok(findings)
}

fn in_tf32(place: &Place) -> Result<Findings, Failure> {
    let file = place.scratch("rates")?.join("tf32.json");
    let mut command = this_program().map_err(Failure::other)?;
    command.args(["--step", "tf32", "--out"]).arg(&place.out).arg("--found").arg(&file).env(TF32, "1");
    if place.tiny {
        command.arg("--tiny");
    }
    dies_with_us(&mut command);
    let status = command.status().map_err(Failure::other)?;
    let text =
        std::fs::read(&file).map_err(|error| Failure::Other(format!("measuring TF32 ended with {status}: {error}")))?;
    serde_json::from_slice(&text).map_err(|error| failed(&file, error))
}

/// Bytes read and written per second.
fn copy_rate(place: &Place, device: Device) -> Result<f64, Failure> {
    let numbers = place.size(1 << 28, 1 << 18);
    let from = Tensor::f_ones([numbers], (Kind::Float, device)).map_err(Failure::other)?;
    let mut to = from.f_empty_like().map_err(Failure::other)?;
    let times = place.size(16, 2);
    let seconds = fastest(device, || {
        (0..times).for_each(|_| to.copy_(&from));
        Ok(())
    })?;
    Ok((2 * 4 * numbers * times) as f64 / seconds)
}

/// Floating-point operations per second of a large square product.
fn matmul_rate(place: &Place, options: (Kind, Device)) -> Result<f64, Failure> {
    let side = place.size(8192, 128);
    let matrix = Tensor::f_randn([side, side], options).map_err(Failure::other)?;
    let seconds = fastest(options.1, || {
        let _product = matrix.f_matmul(&matrix).map_err(Failure::other)?;
        Ok(())
    })?;
    Ok(2.0 * (side as f64).powi(3) / seconds)
}

/// Seconds of the fastest of some tries after a first, until the device has done it.
fn fastest(device: Device, mut work: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    let mut best = f64::INFINITY;
    for attempt in 0..=TRIES {
        wait_for(device);
        let begun = Instant::now();
        work()?;
        wait_for(device);
        if attempt > 0 {
            best = best.min(begun.elapsed().as_secs_f64());
        }
    }
    Ok(best)
}

pub fn wait_for(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

/// Steps `decode-0.5b` and `decode-1.5b`.
pub fn decode(place: &Place, usual: Shape) -> Result<Findings, Failure> {
    let (device, mut findings) = place.open()?;
    let shape = place.size(usual, TINY);
    let bandwidth = copy_rate(place, device)?;
    findings.speed("copy on the device", bandwidth / 1e9, "GB/s");
    let model = frozen(&shape.config(), (Kind::BFloat16, device), device)?;
    let (prompt, new) = (place.size(128, 8), place.size(64, 4));
    findings.tell("work", format!("{} model in bfloat16, prompts of {prompt} tokens, {new} new ones", shape.name), "");
    for batch in place.size(vec![1, 16, 64, 256], vec![1, 4]) {
        let (made, step_s) = decoding_step(&model, shape, (batch, prompt, new))?;
        findings.holds(format!("batch {batch}: tokens"), made, &(batch * new).to_string(), made == batch * new);
        let cached = batch as f64 * (prompt as f64 + new as f64 / 2.0) * shape.cached_numbers();
        let read = 2.0 * (shape.num_params() + cached);
        findings.speed(format!("batch {batch}: a step"), 1e3 * step_s, "ms");
        findings.speed(format!("batch {batch}: new tokens"), batch as f64 / step_s, "tokens/s");
        findings.speed(
            format!("batch {batch}: weights and cache read, part of the copy bandwidth"),
            read / step_s / bandwidth,
            "",
        );
    }
    Ok(findings)
}

/// Rows made, and seconds of a decoding step: of all `new` tokens but the first, which prefill makes.
fn decoding_step(
    model: &(Decoder, LogprobHead),
    shape: Shape,
    (batch, prompt, new): (usize, usize, usize),
) -> Result<(usize, f64), Failure> {
    generate(model, shape, (batch, prompt, 4))?; // takes memory, and picks kernels, for the first time
    let first = generate(model, shape, (batch, prompt, 1))?;
    let all = generate(model, shape, (batch, prompt, new))?;
    Ok((all.generated_tokens, (all.seconds - first.seconds) / (new - 1) as f64))
}

/// Greedy responses of `new` tokens to `batch` prompts.
pub fn generate(
    (model, head): &(Decoder, LogprobHead),
    shape: Shape,
    (batch, prompt, new): (usize, usize, usize),
) -> Result<GenerationReport, Failure> {
    let sampling = SamplingConfig { ignore_eos: true, ..SamplingConfig::uncut(0.0, new) };
    let row = |id: usize| Prompt { id: id as u64, token_ids: ids(id, prompt, shape), text: String::new(), label: None };
    let prompts = Prompts { rows: (0..batch).map(row).collect(), samples_per_prompt: 1, seed: 1, evaluation: false };
    let engine = Engine::new(EngineConfig {
        max_sequences: batch,
        max_batched_tokens: PASS_TOKENS as usize,
        ..EngineConfig::default()
    });
    let policy = Sampled { model, head: head.weight(), tokenizer: None };
    let (_, report) = engine.generate(policy, &prompts, &sampling, &Unwatched, &Interrupt::default())?;
    Ok(report)
}

fn ids(row: usize, length: usize, shape: Shape) -> Vec<i64> {
    (0..length).map(|at| ((at * 7919 + row * 104_729 + 2) as i64) % shape.vocabulary).collect()
}

/// Rows of one pass.
const PASS_TOKENS: i64 = 8192;

/// Steps `passes-0.5b` and `passes-1.5b`.
pub fn passes(place: &Place, usual: Shape) -> Result<Findings, Failure> {
    let (device, mut findings) = place.open()?;
    let shape = place.size(usual, TINY);
    let peak = matmul_rate(place, (Kind::BFloat16, device))?;
    findings.speed("matmul, bfloat16", peak / 1e12, "TFLOP/s");
    let (batch, prompt) = prefill_work(place);
    let model = frozen(&shape.config(), (Kind::BFloat16, device), device)?;
    let mut seconds = f64::INFINITY;
    for _ in 0..TRIES {
        seconds = seconds.min(generate(&model, shape, (batch, prompt, 1))?.seconds);
    }
    drop(model);
    findings.tell(
        "prefill's work",
        format!("{} model in bfloat16, {batch} prompts of {prompt} tokens", shape.name),
        "",
    );
    findings.speed("prefill", (batch * prompt) as f64 / seconds, "tokens/s");
    findings.speed("prefill, part of the matmul rate", prefill_flops(shape, (batch, prompt)) / seconds / peak, "");

    let (rows, length) = training_work(place);
    let mut policy = learning(&shape.config(), held(device))?;
    let tokens = rows_of(shape, (rows, length));
    let seconds = fastest(device, || forward_backward(&mut policy, &tokens))?;
    let stepped = fastest(device, || Ok(policy.optimizer_step(1e-6).map(drop)?));
    findings.tell(
        "training's work",
        format!("forward and backward of {rows} rows of {length} tokens, one micro-batch, every token predicted"),
        "",
    );
    findings.speed("training", (rows * length) as f64 / seconds, "tokens/s");
    let flops = training_flops_per_token(size(shape, true), length as f64 / 2.0) * (rows * length) as f64;
    findings.speed("training, part of the matmul rate (MFU)", flops / seconds / peak, "");
    findings.speed("optimizer's step", 1e3 * stepped?, "ms");
    Ok(findings)
}

/// Prompts and their tokens.
pub fn prefill_work(place: &Place) -> (usize, usize) {
    place.size((16, 512), (2, 16))
}

/// Rows and their tokens.
pub fn training_work(place: &Place) -> (usize, usize) {
    place.size((8, 1024), (2, 16))
}

/// Layers on every token, the head on each prompt's last.
fn prefill_flops(shape: Shape, (batch, prompt): (usize, usize)) -> f64 {
    let layers = forward_flops_per_token(size(shape, false), prompt as f64 / 2.0) * (batch * prompt) as f64;
    layers + 2.0 * (shape.vocabulary * shape.hidden) as f64 * batch as f64
}

fn size(shape: Shape, with_head: bool) -> ModelSize {
    let head = if with_head { 0.0 } else { (shape.vocabulary * shape.hidden) as f64 };
    let hidden = (shape.heads * shape.head_dim) as f64;
    ModelSize { params: shape.num_params() - head, layers: shape.layers as f64, hidden }
}

pub fn held(device: Device) -> Held {
    let pass = PassConfig { device, tokens_per_micro_batch: PASS_TOKENS, activation_checkpointing: false };
    Held { kind: Kind::BFloat16, pass, weight_layout: WeightLayout::Plain, deterministic: false }
}

pub fn rows_of(shape: Shape, (rows, length): (usize, usize)) -> Rows {
    let row = |row: usize| (ids(row, length, shape), (0..length).map(|at| at > 0).collect());
    Rows::of_tokens(&(0..rows).map(row).collect::<Vec<_>>())
}

/// One micro-batch; its gradients stay.
pub fn forward_backward(policy: &mut Policy, rows: &Rows) -> Result<(), Failure> {
    policy.micro_batches(&rows.lengths, 1)?;
    policy.forward_backward(rows, |output: &LogprobOutput| Ok(-output.logprobs.mean(Kind::Float)))?;
    Ok(())
}

/// Step `hand-over`: what learns leaves the device and comes back, as in node reuse.
pub fn hand_over(place: &Place) -> Result<Findings, Failure> {
    let (device, mut findings) = place.open()?;
    let shape = place.size(HALF_BILLION, TINY);
    let mut policy = learning(&shape.config(), held(device))?;
    let state = &mut policy.state;
    let bytes = state.bytes_by_part();
    let moved = (bytes.total() - bytes.gradients) as f64;
    let weights = |state: &echelon_core::zero::TrainingState| state.params()[EMBEDDING].weight.detach().copy();
    let before = weights(state);
    let (mut away_s, mut back_s) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..2 {
        let begun = Instant::now();
        state.set_aside(true)?;
        wait_for(device);
        away_s = away_s.min(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        state.bring_back()?;
        wait_for(device);
        back_s = back_s.min(begun.elapsed().as_secs_f64());
    }
    let same = weights(state).f_equal(&before).map_err(Failure::other)?;
    findings.holds("weights that left and came back", if same { "equal" } else { "unlike" }, "equal bit for bit", same);
    findings.tell(
        "work",
        format!("weights, master copy and moments of a {} model that learns: {:.2} GB", shape.name, moved / 1e9),
        "",
    );
    findings.speed("to host memory", moved / away_s / 1e9, "GB/s");
    findings.speed("back to the device", moved / back_s / 1e9, "GB/s");
    Ok(findings)
}

const EMBEDDING: &str = "model.embed_tokens.weight";

/// Step `launches`: what the host takes for a layer, by models so narrow that the device waits for it. Launches themselves
/// are counted in the rehearsal alone: here there is no profiler.
pub fn launches(place: &Place) -> Result<Findings, Failure> {
    let (device, mut findings) = place.open()?;
    let depths = place.size([4, 16], [1, 2]);
    let one = one_launch(place, device)?;
    findings.speed("one launch (an addition of 64 numbers)", 1e6 * one, "µs");
    let mut seconds = Vec::new();
    for layers in depths {
        let shape = Shape { layers, ..TINY };
        let model = frozen(&shape.config(), (Kind::BFloat16, device), device)?;
        let new = place.size(64, 4);
        let (_, step_s) = decoding_step(&model, shape, (1, 8, new))?;
        let mut policy = learning(&shape.config(), held(device))?;
        let rows = rows_of(shape, (4, 32));
        let micro_batch_s = fastest(device, || forward_backward(&mut policy, &rows))?;
        findings.speed(format!("decoding step, batch 1, {layers} layers"), 1e6 * step_s, "µs");
        findings.speed(format!("micro-batch forward and backward, {layers} layers"), 1e6 * micro_batch_s, "µs");
        seconds.push([step_s, micro_batch_s]);
    }
    if !findings.stand_in {
        let layers = (depths[1] - depths[0]) as f64;
        for (kind, what) in ["decoding step", "micro-batch"].iter().enumerate() {
            let layer = (seconds[1][kind] - seconds[0][kind]) / layers;
            findings.tell(format!("each layer of a {what}"), 1e6 * layer, "µs");
            findings.tell("the same in launches, about", layer / one, "");
            let beside = seconds[0][kind] - layer * depths[0] as f64;
            findings.tell(format!("the rest of a {what}"), 1e6 * beside, "µs");
        }
    }
    findings.tell(
        "launches and host waits themselves",
        "not measurable here: docs/performance.md has the rehearsal's counts",
        "",
    );
    Ok(findings)
}

fn one_launch(place: &Place, device: Device) -> Result<f64, Failure> {
    let times = place.size(4000, 100);
    let mut numbers = Tensor::f_zeros([64], (Kind::Float, device)).map_err(Failure::other)?;
    let seconds = fastest(device, || {
        (0..times).for_each(|_| drop(numbers.g_add_scalar_(1.0)));
        Ok(())
    })?;
    Ok(seconds / f64::from(times))
}

/// Where a shape's `config.json` is written for others.
pub fn write_config(shape: Shape, folder: &Path) -> Result<std::path::PathBuf, Failure> {
    let path = folder.join("config.json");
    std::fs::write(&path, shape.config_json().to_string()).map_err(|error| failed(&path, error))?;
    Ok(path)
}
