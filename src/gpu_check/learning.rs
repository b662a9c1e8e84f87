//! Steps that run `ppo` as its users do: it learns, takes the memory that was planned, and repeats itself.

use std::path::{Path, PathBuf};

use echelon_core::zero::TensorWriter;
use serde_json::{Map, Value};
use tch::Kind;

use super::models::{HALF_BILLION, TINY, random};
use super::place::{self, Place, recipes};
use super::speed::write_config;
use super::verdict::Findings;
use crate::program::{Failure, failed};
use echelon_monitor::Evaluation;

/// By how much the ledger may be off: what `tests/ledger.rs` holds it to on CPUs.
const LEDGER_TOLERANCE: f64 = 0.10;

/// Memory below which an error of the ledger is not looked at: blocks are rounded up to 512 bytes and 2 MiB.
const SMALL_BYTES: f64 = (64 << 20) as f64;

/// Step `quickstart`.
pub fn quickstart(place: &Place) -> Result<Findings, Failure> {
    let (_, mut findings) = place.open()?;
    let folder = finished_quickstart(place)?;
    let evaluation = |name: &str| -> Result<f64, Failure> {
        let path = folder.join(name);
        let evaluation = Evaluation::read(&path).map_err(Failure::other)?;
        evaluation.map(|it| it.mean_reward).ok_or_else(|| failed(&path, "there is no evaluation"))
    };
    let (before, after) = (evaluation("eval_before.json")?, evaluation("eval_after.json")?);
    let steps = place::metrics(&folder)?;
    findings.tell("held-out reward before", before, "");
    findings.tell("held-out reward after", after, "");
    findings.tell("steps", steps.len(), "");
    let gain = place.size(2.0, 1.0);
    findings.at_least("held-out reward gained", after - before, gain, "");
    let worst = most(&steps, "perf/rollout_logprob_diff_max");
    findings.tell("engine beside trainer, largest difference of log-probs", worst, "");
    let seconds = most(&steps[steps.len() - 1..], "train/timing/step_total");
    findings.speed("the last step", seconds, "s");
    Ok(findings)
}

/// The quickstart's run folder; it is run where it has not been.
fn finished_quickstart(place: &Place) -> Result<PathBuf, Failure> {
    let folder = place.out.join("quickstart");
    if folder.join("eval_after.json").exists() {
        return Ok(folder);
    }
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(|error| failed(&folder, error))?;
    }
    let mut sets = vec!["placement.device=\"cuda\"".to_owned(), "checkpoint.every_steps=\"off\"".into()];
    if place.tiny {
        // Fewer steps, each a longer one.
        let few = [
            "train.steps=5",
            "rollout.batch_size=64",
            "rollout.max_new_tokens=20",
            "ppo.mini_batch_size=16",
            "actor.optimizer.lr=1e-3",
            "critic.optimizer.lr=3e-3",
            "eval.max_samples=64",
            "train.dtype=\"float32\"",
        ];
        sets.extend(few.map(str::to_owned));
    }
    place.ppo(&recipes("quickstart.toml")?, &sets, &folder)?;
    Ok(folder)
}

/// The largest of a metric; NaN where no step has it.
fn most(steps: &[Map<String, Value>], name: &str) -> f64 {
    steps.iter().filter_map(|step| step.get(name)?.as_f64()).fold(f64::NAN, f64::max)
}

/// Step `memory`: what the quickstart's phases took on the device, beside the ledger.
pub fn memory(place: &Place) -> Result<Findings, Failure> {
    let (_, mut findings) = place.open()?;
    let steps = place::metrics(&finished_quickstart(place)?)?;
    tell_memory(&steps, &mut findings);
    Ok(findings)
}

fn tell_memory(steps: &[Map<String, Value>], findings: &mut Findings) {
    let peak = most(steps, "perf/memory_peak_bytes");
    findings.holds("memory at its height, bytes", peak, "above 0", peak > 0.0);
    let phases = steps.iter().flat_map(|step| step.keys()).filter(|name| name.starts_with("perf/memory_"));
    let phases: std::collections::BTreeSet<&String> = phases.filter(|name| name.ends_with("_bytes")).collect();
    for name in phases {
        findings.tell(name.as_str(), most(steps, name), "bytes");
    }
    let error = most(steps, "perf/memory_ledger_error_max");
    let small = peak < SMALL_BYTES;
    let bound = if small { 2.0 * LEDGER_TOLERANCE } else { LEDGER_TOLERANCE };
    findings.at_most("the ledger is off by", error, bound, "of what was measured");
}

/// Step `deterministic`: two runs with `train.deterministic = true`, bit for bit.
pub fn deterministic(place: &Place) -> Result<Findings, Failure> {
    let (_, mut findings) = place.open()?;
    let (steps, rows) = (place.size(4, 2), place.size(32, 8));
    let sets = [
        "placement.device=\"cuda\"".to_owned(),
        "train.deterministic=true".into(),
        format!("train.dtype=\"{}\"", dtype(place)),
        format!("train.steps={steps}"),
        format!("rollout.batch_size={rows}"),
        format!("ppo.mini_batch_size={}", rows / 2),
        "eval.max_samples=8".into(),
        "checkpoint.every_steps=\"off\"".into(),
    ];
    let folder = place.scratch("deterministic")?;
    let (first, second) = (folder.join("first"), folder.join("second"));
    for run in [&first, &second] {
        place.ppo(&recipes("quickstart.toml")?, &sets, run)?;
    }
    let equal = |name: &str, read: &dyn Fn(&Path) -> Result<Vec<u8>, Failure>| -> Result<(String, bool), Failure> {
        Ok((name.to_owned(), read(&first)? == read(&second)?))
    };
    let file = |name: &'static str| {
        move |run: &Path| std::fs::read(run.join(name)).map_err(|error| failed(&run.join(name), error))
    };
    let found = [
        equal("metrics but clocks", &without_clocks)?,
        equal("samples.jsonl", &file("samples.jsonl"))?,
        equal("eval_after.json", &file("eval_after.json"))?,
        equal("trained weights", &file("actor/model.safetensors"))?,
    ];
    for (name, same) in found {
        findings.holds(name, if same { "equal" } else { "unlike" }, "equal bit for bit", same);
    }
    Ok(findings)
}

/// What a run computes in: CPUs under a stand-in may have no units for bfloat16.
fn dtype(place: &Place) -> &'static str {
    place.size("auto", "float32")
}

/// The metrics that do not tell of time or memory, as they are written.
fn without_clocks(run: &Path) -> Result<Vec<u8>, Failure> {
    let mut steps = place::metrics(run)?;
    for step in &mut steps {
        step.retain(|name, _| !name.starts_with("perf/") && !name.starts_with("train/timing/"));
    }
    serde_json::to_vec(&steps).map_err(Failure::other)
}

/// Step `ppo-step`: a PPO step of a 0.5B model, by `ppo` from a folder, and its memory beside the ledger.
pub fn ppo_step(place: &Place) -> Result<Findings, Failure> {
    let (device, mut findings) = place.open()?;
    let folder = place.scratch("ppo-step")?;
    let shape = place.size(HALF_BILLION, TINY);
    let model = folder.join("model");
    write_model(&model, shape, device)?;
    let recipe = folder.join("ppo-step.toml");
    let (rows, new) = (place.size(64, 8), place.size(128, 12));
    std::fs::write(&recipe, recipe_of((rows, new), dtype(place), &recipes("quickstart/prompts-train.jsonl")?))
        .map_err(|error| failed(&recipe, error))?;
    place.ppo(&recipe, &[], &folder.join("run"))?;
    let steps = place::metrics(&folder.join("run"))?;
    let last = &steps[steps.len() - 1..];
    findings.tell("work", format!("{rows} prompts, {new} new tokens each, {} model, second step", shape.name), "");
    for (what, name) in [
        ("whole step", "train/timing/step_total"),
        ("generation", "train/timing/generation"),
        ("scoring", "train/timing/make_experience"),
        ("training", "train/timing/ppo_train"),
    ] {
        findings.speed(what, most(last, name), "s");
    }
    if !findings.stand_in {
        findings.tell(
            "weights to the generator (shared on one device: nothing is copied)",
            most(last, "perf/weight_sync_s"),
            "s",
        );
    }
    tell_memory(&steps, &mut findings);
    Ok(findings)
}

fn recipe_of((rows, new): (usize, usize), dtype: &str, prompts: &Path) -> String {
    let prompts = std::path::absolute(prompts).unwrap_or_else(|_| prompts.into());
    format!(
        "name = \"ppo-step\"\nseed = 1\n[actor]\nmodel = \"model\"\n[critic]\nmodel = \"model\"\n\
         [reward]\nrule = \"length\"\ntarget_tokens = {new}\n\
         [data]\nprompts = {prompts:?}\nmax_prompt_tokens = 32\n[rollout]\nbatch_size = {rows}\nmax_new_tokens = {new}\n\
         [ppo]\nmini_batch_size = {}\n[train]\nsteps = 2\ndtype = \"{dtype}\"\ntokens_per_micro_batch = 8192\n\
         [generation]\nmax_sequences = {rows}\n[placement]\ndevice = \"cuda\"\n[checkpoint]\nevery_steps = \"off\"\n",
        rows / 2
    )
}

/// A Hugging Face folder with random weights in bfloat16, and the quickstart's tokenizer.
fn write_model(folder: &Path, shape: super::models::Shape, device: tch::Device) -> Result<(), Failure> {
    std::fs::create_dir_all(folder).map_err(|error| failed(folder, error))?;
    write_config(shape, folder)?;
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let from = recipes("quickstart/language-model")?.join(name);
        std::fs::copy(&from, folder.join(name)).map_err(|error| failed(&from, error))?;
    }
    let units = shape.config().shape().units;
    let tensors: Vec<(String, Vec<i64>)> =
        units.iter().flat_map(|unit| &unit.params).map(|param| (param.name.clone(), param.shape.clone())).collect();
    let file = folder.join("model.safetensors");
    let metadata = [("format", "pt".to_owned())];
    let mut writer = TensorWriter::create(&file, &tensors, Kind::BFloat16, &metadata).map_err(Failure::other)?;
    for (name, size) in &tensors {
        writer.write(name, &random(name, size, (Kind::BFloat16, device))).map_err(Failure::other)?;
    }
    writer.finish().map_err(Failure::other)
}
