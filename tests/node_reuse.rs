//! Node reuse: what learns leaves the device while the generator works there and comes back, and nothing else changes.

use std::path::Path;
use std::sync::Arc;

use common::{SMALL, Workplace};
use echelon::devices;
use echelon::model_folders;
use echelon::recipe::{PpoRecipe, Root};
use echelon::settings;
use echelon::wire::{self, Rewards};
use echelon_algorithms::{Algorithm, Moment};
use echelon_core::data::Report;
use echelon_core::progress::{Interrupt, Unwatched};
use echelon_core::role::Role;
use echelon_core::rollout::{Prompt, Prompts};
use echelon_models::tokenizer::Tokenizer;
use echelon_placement::layout::Layout;

mod common;

const STEPS: u64 = 3;

/// What the steps of a run with everything on one worker report.
async fn run(recipe: &Path, folder: &Path, moves_to_host: bool) -> Vec<Report> {
    let recipe = PpoRecipe::load(recipe, &[]).unwrap().resolve();
    let folders = model_folders::model_folders(&recipe).unwrap();
    let (held, _) = devices::held(&recipe.train.compute, &recipe.placement.devices, None).unwrap();
    let mut layout = Layout::together(1, 0, false);
    for group in layout.groups.iter_mut().filter(|group| group.role != Role::Generator) {
        group.moves_to_host = moves_to_host;
    }
    let tokenizer = Arc::new(Tokenizer::load(&folders.actor).unwrap());
    let rewards = Rewards::start(&recipe, &folders).unwrap();
    let mut ppo = settings::algorithm(&recipe, rewards.alone);
    let spec = recipe.spec(&folders, held, layout, folder);
    let (devices, parts) = (&recipe.placement.devices, (Interrupt::default(), Arc::new(Unwatched) as _));
    let (roles, workers) =
        wire::connect((spec, tokenizer.clone()), devices, Some(rewards), parts, Arc::new(|_| ())).await.unwrap();
    let texts = ["the food at the", "a film about", "my room was", "we waited and"];
    let sampling = settings::sampling(&recipe, 1.0);
    let mut reports = Vec::new();
    for step in 1..=STEPS {
        let row = |(index, text): (usize, &str)| Prompt {
            id: 4 * step + index as u64,
            token_ids: tokenizer.encode(text).unwrap(),
            text: text.into(),
            label: None,
        };
        let rows = texts.iter().copied().enumerate().map(row).collect();
        let prompts = Prompts { rows, samples_per_prompt: 2, seed: step, evaluation: false };
        let now = Moment { step, interrupt: &Interrupt::default() };
        // Twice in a row, as an evaluation and a rollout.
        roles.generator().generate(prompts.clone(), &sampling).await.unwrap();
        let rows = roles.generator().generate(prompts, &sampling).await.unwrap().rows;
        reports.push(ppo.learn(&roles, rows, now).await.unwrap().report);
        roles.actor().publish_weights(roles.generator(), step).await.unwrap();
    }
    workers.finish(echelon::workers::End::Done).await;
    reports
}

#[test]
fn state_that_was_moved_learns_the_same() {
    let workplace = Workplace::new();
    let recipe = workplace.write("recipe.toml", SMALL);
    tch::set_num_threads(1); // beside other tests, threads of tiny operations only wait for each other
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let [stays, moves] = [false, true].map(|moves| runtime.block_on(run(&recipe, &workplace.path("run"), moves)));
    for (stays, moves) in stays.iter().zip(&moves) {
        assert!(stays.stats.get("train/actor_grad_norm") > Some(0.0));
        assert!(stays.stats.numbers().eq(moves.stats.numbers()), "{stays:?}\n{moves:?}");
    }
}
