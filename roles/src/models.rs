//! Roles' models from Hugging Face folders: trainable ones in flat buffers, frozen ones around the mapped file.

use std::path::Path;
use std::time::Duration;

use echelon_core::random::{Domain, normal};
use echelon_core::role::Role;
use echelon_core::store::Store;
use echelon_core::weight_layout::WeightLayout;
use echelon_core::zero::{
    FrozenState, FrozenWhole, OptimizerConfig, ParamWithGrad, PassConfig, Sharding, StatePart, TensorFile,
    TensorWriter, Trainable, TrainingState, Units, WholeModel, ZeroStage,
};
use echelon_core::{Error, Result};
use echelon_models::ModelError;
use echelon_models::checkpoint::{Checkpoint, WeightsWriter, random_parameter, save_pretrained};
use echelon_models::config::{DecoderConfig, HeadKind};
use echelon_models::decoder::Decoder;
use echelon_models::head::{LogprobHead, ScalarHead, ScalarRows};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// How a model is held: dtype, device and passes, how weights lie while a CPU decodes, and whether the same work always
/// gives the same bits.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub kind: Kind,
    pub pass: PassConfig,
    pub weight_layout: WeightLayout,
    pub deterministic: bool,
}

pub type Policy = Trainable<Decoder, LogprobHead>;
pub type Scorer = Trainable<Decoder, ScalarHead>;

/// Checks that a folder's config is readable, has the wanted head, and that every parameter is there in its shape. Only
/// headers are read.
pub fn check_folder(folder: &Path, head: Option<HeadKind>) -> Result<()> {
    let config = DecoderConfig::read(folder)?;
    if head.is_some_and(|head| head != config.head) {
        let (has, needs) = match config.head {
            HeadKind::Score => ("a score head (ForSequenceClassification)", "a causal language model (ForCausalLM)"),
            HeadKind::Logits => {
                ("a language-model head (ForCausalLM)", "a score head (ForSequenceClassification, num_labels = 1)")
            }
        };
        return Err(Error::Refused(format!("{}: this role needs {needs}, the model has {has}", folder.display())));
    }
    let checkpoint = Checkpoint::open(folder)?;
    for param in config.shape().units.iter().flat_map(|unit| &unit.params) {
        let _ = checkpoint.tensor(&param.name, &param.shape)?; // wrapping checks name, shape and dtype
    }
    Ok(())
}

/// A causal language model that learns; log-probs at `temperature`.
pub fn trainable_policy(
    role: Role,
    folder: &Path,
    random: Option<u64>,
    held: Held,
    (optimizer, sharding): (OptimizerConfig, &Sharding),
    temperature: f64,
) -> Result<Policy> {
    let config = DecoderConfig::read(folder)?;
    if config.head != HeadKind::Logits {
        return Err(Error::Refused(format!(
            "{}: a {role} needs a causal language model, this has a score head",
            folder.display()
        )));
    }
    let state = match random {
        Some(seed) => state(role, &config, held, (optimizer, sharding), &mut |name, shape| {
            Ok(random_parameter(name, shape, config.initializer_range, seed))
        })?,
        None => {
            let checkpoint = Checkpoint::open(folder)?;
            let mut load = |name: &str, shape: &[i64]| Ok(checkpoint.tensor(name, shape)?);
            state(role, &config, held, (optimizer, sharding), &mut load)?
        }
    };
    policy_of(&config, state, held, temperature)
}

/// A policy of `config` whose weights are made: `load` gives each by name and shape, the same one at every call.
pub fn made_policy(
    config: &DecoderConfig,
    held: Held,
    (optimizer, sharding): (OptimizerConfig, &Sharding),
    load: &mut dyn FnMut(&str, &[i64]) -> Result<Tensor>,
) -> Result<Policy> {
    let state = state(Role::Actor, config, held, (optimizer, sharding), load)?;
    policy_of(config, state, held, 1.0)
}

fn policy_of(config: &DecoderConfig, state: TrainingState, held: Held, temperature: f64) -> Result<Policy> {
    let params = state.params();
    let model = decoder_of(config, &params)?;
    let head = if config.tied_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
    let head = LogprobHead::trained(params[head].shallow_clone(), temperature);
    Ok(Trainable::new(state, model, head, held.pass))
}

/// A model with one number per position (critic) or per sequence (reward model) that learns. A folder without a score
/// head gets a fresh one, N(0, 1/(H+1)) as OpenRLHF draws it.
pub fn trainable_scorer(
    role: Role,
    folder: &Path,
    random: Option<u64>,
    seed: u64,
    held: Held,
    (optimizer, sharding): (OptimizerConfig, &Sharding),
    reads: ScalarRows,
) -> Result<Scorer> {
    let config = DecoderConfig { head: HeadKind::Score, ..DecoderConfig::read(folder)? };
    let fresh_head = |shape: &[i64]| {
        let deviation = 1.0 / (config.hidden_size + 1) as f64;
        let values: Vec<f32> = (0..config.hidden_size)
            .map(|i| (deviation * normal(seed, Domain::Weights, i as u64, 0, 1)) as f32)
            .collect();
        Tensor::from_slice(&values).view(shape)
    };
    let checkpoint = if random.is_some() { None } else { Some(Checkpoint::open(folder)?) };
    let state = state(role, &config, held, (optimizer, sharding), &mut |name, shape| match (&checkpoint, random) {
        (Some(checkpoint), _) if checkpoint.contains(name) || name != "score.weight" => {
            Ok(checkpoint.tensor(name, shape)?)
        }
        (None, Some(seed)) if name != "score.weight" => {
            Ok(random_parameter(name, shape, config.initializer_range, seed))
        }
        _ => Ok(fresh_head(shape)),
    })?;
    let params = state.params();
    let model = decoder_of(&config, &params)?;
    let head = ScalarHead::trained(params["score.weight"].shallow_clone(), reads);
    Ok(Trainable::new(state, model, head, held.pass))
}

type Params = std::collections::HashMap<String, ParamWithGrad>;

fn state(
    role: Role,
    config: &DecoderConfig,
    held: Held,
    (optimizer, sharding): (OptimizerConfig, &Sharding),
    load: &mut dyn FnMut(&str, &[i64]) -> Result<Tensor>,
) -> Result<TrainingState> {
    let shape = config.shape();
    let shapes: std::collections::HashMap<&str, &[i64]> =
        shape.units.iter().flat_map(|unit| &unit.params).map(|p| (p.name.as_str(), p.shape.as_slice())).collect();
    let place = (held.kind, held.pass.device);
    TrainingState::new(role, &shape, optimizer, place, sharding, &mut |name| load(name, shapes[name]))
}

fn decoder_of(config: &DecoderConfig, params: &Params) -> Result<Decoder> {
    Ok(Decoder::new(config, &mut |name| Ok(params[name].weight.shallow_clone()))?)
}

/// A causal language model that does not learn.
pub struct FrozenPolicy {
    pub model: Decoder,
    pub head: LogprobHead,
    pub units: Box<dyn Units>,
}

/// How long a rank waits for another of its host to convert a model for both.
const CONVERTING: Duration = Duration::from_secs(600);

/// Wraps the mapped file where dtype and device allow, else what the ranks of this host share by `store`, where it is given;
/// or keeps this rank's part where `sharding` divides parameters.
pub fn frozen_policy(
    folder: &Path,
    held: Held,
    temperature: f64,
    (sharding, store): (&Sharding, Option<&Store>),
) -> Result<FrozenPolicy> {
    let config = DecoderConfig { head: HeadKind::Logits, ..DecoderConfig::read(folder)? };
    let FrozenParams { mut load, units } = FrozenParams::open(folder, &config, held, (sharding, store))?;
    let model = Decoder::new(&config, &mut *load)?;
    let weight = if config.tied_embeddings { model.embedding().shallow_clone() } else { load("lm_head.weight")? };
    Ok(FrozenPolicy { model, head: LogprobHead::frozen(weight, temperature), units })
}

/// A reward model that does not learn.
pub struct FrozenScorer {
    pub model: Decoder,
    pub head: ScalarHead,
    pub units: Box<dyn Units>,
}

/// As [`frozen_policy`].
pub fn frozen_scorer(
    folder: &Path,
    held: Held,
    (sharding, store): (&Sharding, Option<&Store>),
) -> Result<FrozenScorer> {
    let config = DecoderConfig::read(folder)?;
    if config.head != HeadKind::Score {
        let what = "a reward model needs a ForSequenceClassification architecture with one label (score.weight)";
        return Err(Error::Refused(format!("{}: {what}", folder.display())));
    }
    let FrozenParams { mut load, units } = FrozenParams::open(folder, &config, held, (sharding, store))?;
    let model = Decoder::new(&config, &mut *load)?;
    let head = ScalarHead::frozen(load("score.weight")?, ScalarRows::LastTokens);
    Ok(FrozenScorer { model, head, units })
}

type LoadParam = dyn FnMut(&str) -> std::result::Result<Tensor, ModelError>;

/// Where a frozen model's parameters come from, and what a pass does to their units.
struct FrozenParams {
    load: Box<LoadParam>,
    units: Box<dyn Units>,
}

impl FrozenParams {
    fn open(
        folder: &Path,
        config: &DecoderConfig,
        held: Held,
        (sharding, store): (&Sharding, Option<&Store>),
    ) -> Result<FrozenParams> {
        let checkpoint = Checkpoint::open(folder)?;
        let (kind, device) = (held.kind, held.pass.device);
        if sharding.stage < ZeroStage::Three || sharding.group.size() == 1 {
            let config = config.clone();
            if device == Device::Cpu {
                let shared = match store {
                    Some(store) => checkpoint.shared_in(&config, kind, store, CONVERTING)?,
                    None => None,
                };
                if let Some(shared) = shared {
                    let load = move |name: &str| Ok(shared[name].shallow_clone());
                    return Ok(FrozenParams { load: Box::new(load), units: Box::new(WholeModel) });
                }
                // The mapping lives in the tensors.
                let load = move |name: &str| checkpoint.loader(&config, kind, device)(name);
                return Ok(FrozenParams { load: Box::new(load), units: Box::new(WholeModel) });
            }
            let mut loader = checkpoint.loader(&config, kind, device);
            let params = config.shape().units.into_iter().flat_map(|unit| unit.params);
            let weights: std::collections::HashMap<String, Tensor> =
                params.map(|param| Ok((param.name.clone(), loader(&param.name)?))).collect::<Result<_>>()?;
            let units = FrozenWhole::new(weights.values().map(Tensor::shallow_clone).collect());
            let load = move |name: &str| Ok(weights[name].shallow_clone());
            return Ok(FrozenParams { load: Box::new(load), units: Box::new(units) });
        }
        let shape = config.shape();
        let params = shape.units.iter().flat_map(|unit| &unit.params);
        let shapes: std::collections::HashMap<&str, &[i64]> =
            params.map(|param| (param.name.as_str(), param.shape.as_slice())).collect();
        let state = FrozenState::new(&shape, (kind, device), &sharding.group, &mut |name| {
            Ok(checkpoint.tensor(name, shapes[name])?)
        })?;
        let params = state.params();
        let load = move |name: &str| Ok(params[name].shallow_clone());
        Ok(FrozenParams { load: Box::new(load), units: Box::new(state) })
    }
}

/// Mean and standard deviation of a reward model's scores on its held-out data: `mean` and `std` of its `config.json`, as
/// `reward` and OpenRLHF store them.
///
/// # Errors
/// They are not there, or cannot be subtracted and divided by.
pub fn score_statistics(folder: &Path) -> Result<(f64, f64)> {
    let file = folder.join("config.json");
    let refused = |what: &str| {
        let next =
            "train the model again with the `reward` program, which stores them, or set reward.normalize = false";
        Error::Refused(format!("{}: reward.normalize = true, and {what}: {next}", file.display()))
    };
    let text = std::fs::read_to_string(&file).map_err(|error| refused(&error.to_string()))?;
    let config: Value = serde_json::from_str(&text).map_err(|error| refused(&error.to_string()))?;
    let number = |key: &str| config.get(key).and_then(Value::as_f64);
    let (Some(mean), Some(std)) = (number("mean"), number("std")) else {
        return Err(refused("it lacks the scores' `mean` and `std`"));
    };
    if !mean.is_finite() || !std.is_finite() || std <= 0.0 {
        return Err(refused(&format!("scores with `mean` = {mean} and `std` = {std} cannot be normalised")));
    }
    Ok((mean, std))
}

/// The dtype of a trained folder: as it came, unless that would round what training computed with, so that the folder says
/// what the evaluated model said. Neither transformers nor vLLM expects f64.
fn exported_kind(came_in: Option<Kind>, computed_in: Kind) -> Kind {
    match (came_in, computed_in) {
        (Some(came_in), computed_in) if came_in == computed_in => came_in,
        (_, Kind::Float | Kind::Double) | (Some(Kind::Float) | None, _) => Kind::Float,
        (Some(_), half) => half,
    }
}

/// Writes a learner's weights as a Hugging Face folder, in the wider of the dtypes of the folder it started from and of
/// its passes.
pub fn export(
    state: &TrainingState,
    head: HeadKind,
    like: &Path,
    folder: &Path,
    extra: &[(&str, Value)],
) -> Result<()> {
    let parts = [StatePart::Weights];
    let own = |name: &str| name.strip_prefix("weights.").expect("a part's name").to_string();
    let names: Vec<_> = state.names(&parts).into_iter().map(|(name, shape)| (own(&name), shape)).collect();
    let kind = exported_kind(DecoderConfig::read(like)?.dtype, state.compute_kind());
    let first = state.sharding().group.rank() == 0;
    let mut writer = first.then(|| save_pretrained(folder, like, head, &names, kind, extra)).transpose()?;
    state.visit(&parts, &mut |name, tensor| match &mut writer {
        Some(writer) => Ok(writer.write(&own(name), tensor)?),
        None => Ok(()),
    })?;
    Ok(writer.map_or(Ok(()), WeightsWriter::finish)?)
}

/// Writes a learner's whole training state: the first rank, with every rank's part.
pub fn save_state(state: &TrainingState, file: &Path) -> Result<()> {
    let failed = |error| Error::other("saving a checkpoint", error);
    let metadata = [("optimizer_steps", state.steps.to_string())];
    let (names, first) = (state.names(&StatePart::ALL), state.sharding().group.rank() == 0);
    let create = || TensorWriter::create(file, &names, state.kind(), &metadata);
    let mut writer = first.then(create).transpose().map_err(failed)?;
    state.visit(&StatePart::ALL, &mut |name, tensor| match &mut writer {
        Some(writer) => writer.write(name, tensor).map_err(failed),
        None => Ok(()),
    })?;
    writer.map_or(Ok(()), TensorWriter::finish).map_err(failed)
}

/// Takes up what [`save_state`] wrote.
pub fn restore_state(state: &mut TrainingState, file: &Path) -> Result<()> {
    let failed = |error| Error::other("resuming", error);
    let tensors = TensorFile::open(file).map_err(failed)?;
    let steps = tensors.metadata().map_err(failed)?.get("optimizer_steps").and_then(|steps| steps.parse().ok());
    let steps =
        steps.ok_or_else(|| Error::Refused(format!("{}: no optimizer_steps in its metadata", file.display())))?;
    state.restore(steps, &mut |name| tensors.tensor(name).map_err(failed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exporting_never_rounds_what_was_computed_with() {
        use Kind::{BFloat16, Double, Float, Half};
        let cases = [
            (Some(BFloat16), Float, Float),
            (Some(BFloat16), BFloat16, BFloat16),
            (Some(BFloat16), Double, Float),
            (Some(Half), BFloat16, BFloat16),
            (Some(Float), BFloat16, Float),
            (None, BFloat16, Float),
        ];
        for (came_in, computed_in, exported) in cases {
            assert_eq!(exported_kind(came_in, computed_in), exported, "{came_in:?} {computed_in:?}");
        }
    }
}
