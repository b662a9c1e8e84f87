//! Steps `zero`, `offload` and `node-reuse`: where state lies must not change what is learned. PPO of the quickstart's
//! models runs twice in this process, in float32, on the device.
//!
//! The bound is 1e-3 · max(1, |x|) for every metric. Sums on a GPU may be added in another order every time (1e-6 in
//! float32); AdamW divides a gradient by its own size, so a weight whose gradient is nothing but rounding moves by up to the
//! learning rate either way, 2e-4, and three steps on the metrics differ by some 1e-4. A wrong layout is off by 1e-1.

use std::sync::Arc;

use echelon_algorithms::{Algorithm, Moment, Outcome};
use echelon_core::progress::{Interrupt, Unwatched};
use echelon_core::role::Role;
use echelon_core::rollout::{Prompt, Prompts};
use echelon_models::tokenizer::Tokenizer;

use super::place::{Place, recipes};
use super::verdict::Findings;
use crate::devices;
use crate::model_folders;
use crate::program::Failure;
use crate::recipe::{PpoRecipe, Root};
use crate::run::metrics::metrics_of;
use crate::settings;
use crate::wire::{self, Rewards};
use crate::workers::End;
use echelon_placement::layout::Layout;

const BOUND: f64 = 1e-3;

const KL_COEF: f64 = 0.1;

const GRAD_NORM: &str = "train/actor_grad_norm";

/// Names and numbers of all steps, in order.
type Numbers = Vec<(String, f64)>;

/// Step `zero`.
pub fn zero(place: &Place) -> Result<Findings, Failure> {
    let mut findings =
        compare(place, "ZeRO 3 beside ZeRO 0", Layout::together(1, 0, false), Layout::together(1, 3, false))?;
    findings.tell("not shown", "gathers and reductions: one rank divides nothing (step nccl runs the collectives)", "");
    Ok(findings)
}

/// Step `offload`.
pub fn offload(place: &Place) -> Result<Findings, Failure> {
    compare(place, "adam_offload beside none", Layout::together(1, 0, false), Layout::together(1, 0, true))
}

/// Step `node-reuse`.
pub fn node_reuse(place: &Place) -> Result<Findings, Failure> {
    let stays = Layout::together(1, 0, false);
    let mut moves = stays.clone();
    for group in moves.groups.iter_mut().filter(|group| group.role != Role::Generator) {
        group.moves_to_host = true;
    }
    compare(place, "node reuse beside none", stays, moves)
}

fn compare(place: &Place, what: &str, usual: Layout, other: Layout) -> Result<Findings, Failure> {
    let (_, mut findings) = place.open()?;
    let (expected, found) = (learn(place, usual)?, learn(place, other)?);
    let (mut worst, mut name) = (0.0, None);
    for ((_, found), (of, expected)) in found.iter().zip(&expected) {
        // A number that is none on both sides agrees, on one side alone it does not.
        let off = match found.is_nan() && expected.is_nan() {
            true => 0.0,
            false => (found - expected).abs() / expected.abs().max(1.0),
        };
        let off = if off.is_nan() { f64::INFINITY } else { off };
        if off > worst {
            (worst, name) = (off, Some(of));
        }
    }
    findings.holds("as many numbers", found.len(), &expected.len().to_string(), found.len() == expected.len());
    let learned = expected.iter().any(|(name, value)| name.starts_with(GRAD_NORM) && *value > 0.0);
    findings.holds("the actor's gradients", if learned { "above 0" } else { "all 0" }, "above 0", learned);
    findings.at_most(format!("{what}: largest difference of any metric"), worst, BOUND, "");
    findings.tell("found in", name.map_or("no metric", String::as_str), "");
    Ok(findings)
}

/// What the metrics of some PPO steps are with this layout.
fn learn(place: &Place, layout: Layout) -> Result<Numbers, Failure> {
    let runtime = tokio::runtime::Runtime::new().map_err(Failure::other)?;
    runtime.block_on(steps(place, layout))
}

async fn steps(place: &Place, layout: Layout) -> Result<Numbers, Failure> {
    let rows = place.size(16, 4);
    let sets = [
        "placement.device=\"cuda\"".to_owned(),
        "train.dtype=\"float32\"".into(),
        format!("rollout.batch_size={rows}"),
        "rollout.max_new_tokens=12".into(),
        format!("ppo.mini_batch_size={}", rows / 2),
        "train.tokens_per_micro_batch=128".into(),
        format!("ppo.kl_coef={KL_COEF}"),
    ];
    let recipe = PpoRecipe::load(&recipes("quickstart.toml")?, &sets)?.resolve();
    let folders = model_folders::model_folders(&recipe)?;
    let (held, _) = devices::held(&recipe.train.compute, &recipe.placement.devices, None)?;
    let tokenizer = Arc::new(Tokenizer::load(&folders.actor).map_err(Failure::other)?);
    let run_folder = place.scratch("same")?;
    let rewards = Rewards::start(&recipe, &folders)?;
    let mut ppo = settings::algorithm(&recipe, rewards.alone);
    let spec = recipe.spec(&folders, held, layout, &run_folder);
    let (devices, parts) = (&recipe.placement.devices, (Interrupt::default(), Arc::new(Unwatched) as _));
    let (roles, workers) =
        wire::connect((spec, tokenizer.clone()), devices, Some(rewards), parts, Arc::new(|_| ())).await?;
    let sampling = settings::sampling(&recipe, recipe.rollout.temperature);
    let mut numbers = Vec::new();
    for step in 1..=place.size(3, 2) {
        let prompts = prompts(&tokenizer, step, rows)?;
        let now = Moment { step, interrupt: &Interrupt::default() };
        // Twice in a row, as an evaluation and a rollout.
        roles.generator().generate(prompts.clone(), &sampling).await?;
        let rows = roles.generator().generate(prompts, &sampling).await?.rows;
        let Outcome { report, .. } = ppo.learn(&roles, rows, now).await?;
        roles.actor().publish_weights(roles.generator(), step).await?;
        let metrics = metrics_of(&report, None).scalars;
        numbers.extend(metrics.into_iter().map(|(name, value)| (format!("{name} of step {step}"), value)));
    }
    workers.finish(End::Done).await;
    Ok(numbers)
}

fn prompts(tokenizer: &Tokenizer, step: u64, rows: usize) -> Result<Prompts, Failure> {
    const TEXTS: [&str; 4] = ["the food at the", "a film about", "my room was", "we waited and"];
    let row = |index: usize| -> Result<Prompt, Failure> {
        let text = TEXTS[index % TEXTS.len()];
        let token_ids = tokenizer.encode(text).map_err(Failure::other)?;
        Ok(Prompt { id: 1000 * step + index as u64, token_ids, text: text.into(), label: None })
    };
    let rows = (0..rows).map(row).collect::<Result<_, _>>()?;
    Ok(Prompts { rows, samples_per_prompt: 1, seed: step, evaluation: false })
}
