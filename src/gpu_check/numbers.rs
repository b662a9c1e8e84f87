//! Step `log-probs`: the device's numbers beside the CPU's.
//!
//! In float32 both add the same products in other orders. A sum of n products is off by some √n · 2⁻²⁴ of its terms' size:
//! 4e-6 for the widest here (n = 4,864), and a few layers add up to some 1e-5: the bound is 1e-4. TF32 rounds each factor
//! to 11 bits (5e-4), so where it is on against orders the bound breaks. In bfloat16 the device must be no further from
//! the CPU's float32 than twice what the CPU's own bfloat16 is: rounding is the same, its places differ.

use echelon_core::data::Rows;
use echelon_core::progress::{Interrupt, Unwatched};
use echelon_core::role::Role;
use echelon_core::rollout::{Prompt, Prompts, SamplingConfig};
use echelon_core::weight_layout::WeightLayout;
use echelon_core::zero::{PassConfig, Sharding, forward_rows, stack_rows};
use echelon_generation::{Engine, EngineConfig, Policy};
use echelon_models::config::DecoderConfig;
use echelon_models::decoder::Decoder;
use echelon_models::head::{LogprobHead, LogprobOutput};
use tch::{Device, Kind, Tensor};

use super::models::{HALF_BILLION, OPTIMIZER, Shape, TINY, frozen};
use super::place::{Place, recipes};
use super::verdict::Findings;
use crate::program::Failure;
use echelon_roles::models::{Held, frozen_policy, trainable_policy};

const FLOAT32_BOUND: f64 = 1e-4;

/// Of bfloat16: so many times the CPU's own, and this much beside it.
const BFLOAT16_TIMES: f64 = 2.0;
const BFLOAT16_BESIDE: f64 = 5e-3;

type Model = (Decoder, LogprobHead);

/// Step `log-probs`.
pub fn logprobs(place: &Place) -> Result<Findings, Failure> {
    let (device, mut findings) = place.open()?;
    let folder = recipes("quickstart/language-model")?;
    let quickstart = |kind, device| -> Result<Model, Failure> {
        let policy = frozen_policy(&folder, held(kind, device), 1.0, (&Sharding::whole(), None))?;
        Ok((policy.model, policy.head))
    };
    let config = DecoderConfig::read(&folder).map_err(Failure::other)?;
    let rows = rows_of(place.size(16, 4), place.size(120, 40), config.vocab_size);
    compare("quickstart model", &quickstart, &rows, device, &mut findings)?;

    let wide = place.size(Shape { layers: 4, vocabulary: 8192, ..HALF_BILLION }, TINY);
    let random = |kind, device| frozen(&wide.config(), (kind, device), Device::Cpu);
    let rows = rows_of(place.size(4, 2), place.size(128, 32), wide.vocabulary);
    let name = format!("random model, {} wide", wide.hidden);
    compare(&name, &random, &rows, device, &mut findings)?;

    gradients(&folder, &rows_of(4, 40, config.vocab_size), device, &mut findings)?;
    engine(&quickstart(Kind::Float, device)?, config.vocab_size, device, &mut findings)?;
    Ok(findings)
}

fn held(kind: Kind, device: Device) -> Held {
    let pass = PassConfig { device, tokens_per_micro_batch: 1024, activation_checkpointing: false };
    Held { kind, pass, weight_layout: WeightLayout::Plain, deterministic: false }
}

/// Rows of unlike lengths, every token of which but the first is predicted.
fn rows_of(rows: usize, length: usize, vocabulary: i64) -> Rows {
    let row = |row: usize| {
        let length = length - row % 5;
        let ids = (0..length).map(|at| ((at * 31 + row * 97 + 2) as i64) % vocabulary).collect();
        (ids, (0..length).map(|at| at > 0).collect())
    };
    Rows::of_tokens(&(0..rows).map(row).collect::<Vec<_>>())
}

/// Float32 and bfloat16 on the device beside the CPU's float32.
fn compare(
    name: &str,
    model: &dyn Fn(Kind, Device) -> Result<Model, Failure>,
    rows: &Rows,
    device: Device,
    findings: &mut Findings,
) -> Result<(), Failure> {
    let of = |kind, device| -> Result<Tensor, Failure> {
        let (model, head) = model(kind, device)?;
        through((&model, &head), rows, held(kind, device).pass)
    };
    let exact = of(Kind::Float, Device::Cpu)?;
    let [found, rounded, rounded_here] =
        [of(Kind::Float, device)?, of(Kind::BFloat16, device)?, of(Kind::BFloat16, Device::Cpu)?];
    let (worst, _) = apart(&found, &exact);
    findings.at_most(format!("{name}, float32: largest difference"), worst, FLOAT32_BOUND, "");
    let ((worst, mean), (worst_here, mean_here)) = (apart(&rounded, &exact), apart(&rounded_here, &exact));
    let bound = |here: f64| BFLOAT16_TIMES * here + BFLOAT16_BESIDE;
    findings.at_most(format!("{name}, bfloat16: mean difference"), mean, bound(mean_here), "");
    findings.at_most(format!("{name}, bfloat16: largest difference"), worst, 2.0 * bound(worst_here), "");
    Ok(())
}

/// `[B, T]` log-probs on the CPU.
fn through((model, head): (&Decoder, &LogprobHead), rows: &Rows, pass: PassConfig) -> Result<Tensor, Failure> {
    let mut parts = Vec::new();
    forward_rows((model, head), &pass, rows, &Interrupt::default(), |_, output| parts.push(output.logprobs))?;
    let size = rows.token_ids.size();
    Ok(stack_rows(&parts, [size[0], size[1]]).to_kind(Kind::Double))
}

/// Largest and mean difference, relative where numbers are above 1.
fn apart(found: &Tensor, expected: &Tensor) -> (f64, f64) {
    let difference = (found - expected).abs() / expected.abs().clamp_min(1.0);
    (difference.max().double_value(&[]), difference.mean(Kind::Double).double_value(&[]))
}

/// The norm of the gradients of one micro-batch in float32.
fn gradients(folder: &std::path::Path, rows: &Rows, device: Device, findings: &mut Findings) -> Result<(), Failure> {
    let norm = |device: Device| -> Result<f64, Failure> {
        let training = (OPTIMIZER, &Sharding::whole());
        let mut policy = trainable_policy(Role::Actor, folder, None, held(Kind::Float, device), training, 1.0)?;
        policy.micro_batches(&rows.lengths, 1)?;
        policy.forward_backward(rows, |output: &LogprobOutput| Ok(-output.logprobs.mean(Kind::Float)))?;
        Ok(policy.optimizer_step(0.0)?)
    };
    let (found, expected) = (norm(device)?, norm(Device::Cpu)?);
    let off = (found - expected).abs() / expected;
    findings.at_most("quickstart model, float32: gradient norm, relative difference", off, FLOAT32_BOUND, "");
    Ok(())
}

/// What the engine says of the tokens that it sampled, beside what scoring says of them.
fn engine((model, head): &Model, vocabulary: i64, device: Device, findings: &mut Findings) -> Result<(), Failure> {
    let sampling = SamplingConfig { ignore_eos: true, ..SamplingConfig::uncut(1.0, 16) };
    let prompt = |id: usize| Prompt {
        id: id as u64,
        token_ids: (0..8 + id).map(|at| ((at * 31 + id * 7 + 2) as i64) % vocabulary).collect(),
        text: String::new(),
        label: None,
    };
    let prompts = Prompts { rows: (0..6).map(prompt).collect(), samples_per_prompt: 1, seed: 1, evaluation: false };
    let policy = Policy { model, head: head.weight(), tokenizer: None };
    let engine = Engine::new(EngineConfig { max_sequences: 4, ..EngineConfig::default() });
    let (sequences, _) = engine.generate(policy, &prompts, &sampling, &Unwatched, &Interrupt::default())?;
    let row = |sequence: &echelon_core::rollout::Sequence| {
        let before = sequence.prompt_token_ids.len();
        let ids = [&sequence.prompt_token_ids[..], &sequence.response_token_ids[..]].concat();
        let mask = (0..ids.len()).map(|at| at >= before).collect();
        (ids, mask)
    };
    let rows = Rows::of_tokens(&sequences.iter().map(row).collect::<Vec<_>>());
    let scored = through((model, head), &rows, held(Kind::Float, device).pass)?;
    let mut worst: f64 = 0.0;
    for (index, sequence) in sequences.iter().enumerate() {
        for (at, &said) in sequence.rollout_logprobs.iter().enumerate() {
            let at = sequence.prompt_token_ids.len() + at;
            worst = worst.max((scored.double_value(&[index as i64, at as i64]) - f64::from(said)).abs());
        }
    }
    findings.at_most("engine beside scoring, float32: largest difference", worst, FLOAT32_BOUND, "");
    Ok(())
}
