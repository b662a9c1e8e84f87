//! The memory ledger beside the allocator's figures, for every role and phase of a model: prints one JSON object per role
//! and phase, or a table with `--table`.
//!
//! `target/debug/examples/memory_ledger FOLDER [--table] [--random] [--config k=v,…]` with FOLDER a causal language model
//! (its `config.json` is enough with `--random`, which draws weights of its shape). Settings: dtype=f32|bf16|f64,
//! checkpointing, entropy, rows=N, prompt=N, response=N, tokens=N, sequences=N; several `--config` are run one after another.

#[path = "../tests/common/ledger.rs"]
mod ledger;

use std::path::Path;

use echelon_core::shim;
use echelon_core::zero::{Sharding, ZeroStage};
use echelon_placement::ledger::compare::relative;
use ledger::{Setting, compare, meter_frozen, meter_learners, random_models};
use serde_json::json;
use tch::Kind;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    shim::install_cpu_allocator();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| arguments.iter().any(|argument| argument == name);
    let folder = arguments.first().ok_or("a model's folder is missing")?;
    let configs: Vec<&str> = arguments
        .iter()
        .zip(arguments.iter().skip(1))
        .filter(|(name, _)| *name == "--config")
        .map(|(_, value)| value.as_str())
        .collect();
    let config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(format!("{folder}/config.json"))?)?;
    let random = flag("--random");
    let made = tempfile::tempdir()?;
    let (policy, scorer) = if random {
        random_models(made.path(), &config);
        (made.path().join("policy"), made.path().join("scorer"))
    } else {
        // A reward model of this shape: the score head is new, the rest is the folder's.
        random_models(made.path(), &config);
        (Path::new(folder).to_path_buf(), made.path().join("scorer"))
    };
    for text in if configs.is_empty() { vec![""] } else { configs } {
        let setting = setting(text)?;
        let folders = (policy.as_path(), scorer.as_path());
        let mut uses = meter_frozen(&setting, folders);
        uses.extend(meter_learners(&setting, folders, None, &Sharding::whole()));
        for (found, measured) in compare(&setting, folders, (1, ZeroStage::Zero), &uses).iter().zip(&uses) {
            if flag("--table") {
                let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
                println!(
                    "{text:40} {:10} {:13} resident {:8.1} / {:8.1} MiB  pass {:8.1} / {:8.1} MiB ({:+6.1} %)  together {:+6.1} %",
                    found.role.to_string(),
                    found.phase.name(),
                    mib(found.ledger_resident),
                    mib(found.measured_resident),
                    mib(found.ledger_transient),
                    mib(found.measured_transient),
                    100.0 * relative(found.ledger_transient, found.measured_transient),
                    100.0 * found.error(),
                );
            } else {
                println!(
                    "{}",
                    json!({"config": text, "comparison": found, "measured": measured, "error": found.error(),
                           "kept_bytes": shim::kept_bytes(tch::Device::Cpu)})
                );
            }
        }
    }
    Ok(())
}

/// Of `key=value` pairs.
fn setting(text: &str) -> Result<Setting, Box<dyn std::error::Error>> {
    let mut setting = Setting::plain(Kind::Float);
    for pair in text.split(',').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, "1"));
        match (key, value) {
            ("dtype", "f32") => setting.kind = Kind::Float,
            ("dtype", "bf16") => setting.kind = Kind::BFloat16,
            ("dtype", "f64") => setting.kind = Kind::Double,
            ("checkpointing", _) => setting.activation_checkpointing = true,
            ("entropy", _) => setting.entropy = true,
            ("rows", n) => setting.rows = n.parse()?,
            ("prompt", n) => setting.prompt_tokens = n.parse()?,
            ("response", n) => setting.response_tokens = n.parse()?,
            ("tokens", n) => setting.tokens_per_micro_batch = n.parse()?,
            ("layout", name) => setting.weight_layout = name.parse()?,
            ("sequences", n) => setting.max_sequences = n.parse()?,
            _ => return Err(format!("`{pair}` is no setting").into()),
        }
    }
    Ok(setting)
}
