//! What a run that samples its own responses is made of.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use echelon_algorithms::{Algorithm, OnPolicy};
use echelon_core::role::Role;

use super::feed::{Feed, PromptFeed};
use super::inputs::{Inputs, Program};
use super::memory::MemoryLedger;
use super::metrics;
use crate::checkpoint::Resumed;
use crate::devices;
use crate::forecast::Forecast;
use crate::machine;
use crate::model_folders::{self, ModelFolders, shapes};
use crate::plan;
use crate::program::{Arguments, Failure, PlanFormat, absolute};
use crate::prompts::{TrainingPrompts, evaluation_prompts};
use crate::recipe::{Checkpoint, Devices, Recipe, ResolvedRecipe, Root};
use crate::replay;
use crate::run_spec::RunSpec;
use crate::settings;
use crate::wire::{self, Rewards};
use echelon_placement::layout::Layout;
use echelon_roles::models::Held;

impl<K: OnPolicy> Program for ResolvedRecipe<K> {
    type Algorithm = K::Algorithm;
    type Written = Recipe<K>;

    fn read(arguments: &Arguments) -> Result<Self, Failure> {
        if arguments.plan.is_none() {
            return Ok(Recipe::<K>::load(&arguments.recipe, &arguments.sets)?.resolve());
        }
        let recipe = Recipe::<K>::load_for_plan(&arguments.recipe, &arguments.sets)?;
        recipe.check_shapes()?;
        Ok(recipe.resolve())
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn text(&self) -> String {
        self.to_toml()
    }

    fn devices(&self) -> &Devices {
        &self.placement.devices
    }

    fn devices_mut(&mut self) -> &mut Devices {
        self.devices_mut()
    }

    fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    fn print_plan(&self, format: PlanFormat) -> Result<(), Failure> {
        let headed = self.to_toml_headed("The recipe as it would run, with every default.");
        plan::print(format, (headed, self.to_json()), plan::ask(self)?.as_ref().map(Result::as_ref))
    }

    fn inputs(&self, resumed: &Resumed, run_folder: &Path) -> Result<Inputs<K::Algorithm>, Failure> {
        let losses: Vec<_> = self.keys.losses().iter().map(|(role, loss)| (*role, loss.name())).collect();
        check_learners((K::Algorithm::NAME, K::Algorithm::EXPORTS.0), K::Algorithm::LEARNERS, &losses)?;
        let folders = model_folders::model_folders(self)?;
        let (held, warning) = devices::held(&self.train.compute, &self.placement.devices, None)?;
        settings::check_limits(self, &folders, held)?;
        let (layout, plan) = wire::layout(self, &folders, held)?;
        let tokenizer = Arc::new(resumed.tokenizer(&folders.actor)?);
        let mut feed = self.feed(&tokenizer)?;
        let before = resumed.saved.as_ref().and_then(|(_, state)| state.weight_layout);
        let shape = model_folders::shape(&folders.actor)?;
        let (weight_layout, note) = machine::weight_layout(&shape.shape(), held, before)?;
        let held = Held { weight_layout, ..held };
        check_replay(&mut feed, resumed, self.train.steps as u64)?;
        let memory = MemoryLedger::new(plan::workload_of(self, shapes(&folders)?), held, &layout);
        let forecast = match self.train.calibrate {
            true => Some(Forecast::new(self, &folders, held, &layout)?),
            false => None,
        };
        let header = self.header(shape.shape().num_params(), (held, warning), &feed, &layout, run_folder);
        let rewards = Rewards::start(self, &folders)?;
        let plan = plan.map(|plan| format!("workers {layout}\n\n{plan}\n"));
        Ok(Inputs {
            algorithm: settings::algorithm(self, rewards.alone),
            arithmetic: Some(metrics::Work::new(&shape, feed.samples_per_prompt)),
            feed: Feed::Prompts(Box::new(feed)),
            spec: self.spec(&folders, held, layout, run_folder),
            tokenizer,
            held,
            rewards: Some(rewards),
            memory: Some(memory),
            forecast,
            total: self.train.steps as u64,
            plan,
            header,
            notes: note.into_iter().collect(),
        })
    }
}

impl<K: OnPolicy> ResolvedRecipe<K> {
    /// All that the run is made from.
    pub fn spec(&self, folders: &ModelFolders, held: Held, layout: Layout, run_folder: &Path) -> RunSpec {
        RunSpec {
            program: K::Algorithm::NAME.into(),
            recipe: self.to_toml(),
            folders: folders.by_role(),
            optimizer_steps: std::iter::once((Role::Actor, self.batch.actor_optimizer_steps))
                .chain(self.batch.critic_optimizer_steps.map(|steps| (Role::Critic, steps)))
                .collect(),
            weight_layout: held.weight_layout,
            layout,
            run_folder: absolute(run_folder),
        }
    }

    fn feed(&self, tokenizer: &Arc<echelon_models::tokenizer::Tokenizer>) -> Result<PromptFeed, Failure> {
        let format = settings::prompt_format(self, tokenizer.clone());
        let prompts = TrainingPrompts::load(&self.data, format.clone(), self.seed)?;
        let held_out = evaluation_prompts(self, &format)?;
        Ok(PromptFeed {
            prompts,
            batch_size: self.rollout.batch_size,
            samples_per_prompt: self.rollout.samples_per_prompt,
            seed: self.seed,
            sampling: settings::sampling(self, self.rollout.temperature),
            record: self.rollout.record.as_ref().map(|folder| folder.0.clone()),
            replay: self.rollout.replay.clone(),
            held_out: held_out.map(|prompts| (prompts, settings::sampling(self, self.eval.temperature))),
            evaluate_every: self.eval.every_steps.map(|every| every as u64),
        })
    }

    fn header(
        &self,
        num_params: i64,
        (held, warning): (Held, Option<String>),
        feed: &PromptFeed,
        layout: &Layout,
        folder: &Path,
    ) -> Vec<(&'static str, String)> {
        let mut rows = vec![
            ("actor", format!("{} ({:.1}M parameters)", self.actor.model, num_params as f64 / 1e6)),
            ("device", devices::device_line(held)),
            ("prompts", format!("{} to learn from", feed.prompts.num_rows())),
            ("batch", self.batch.to_string()),
            ("run folder", folder.display().to_string()),
        ];
        if layout.num_workers > 1 {
            rows.insert(2, ("workers", layout.to_string()));
            let shares = self.batch.shares(layout);
            if !shares.is_empty() {
                rows.insert(5, ("shares", shares.join("\n"))); // none, where every role has one worker
            }
        }
        rows.extend(warning.map(|warning| ("warning", warning)));
        for (name, report) in feed.prompts.reports.iter().filter(|(_, report)| report.num_dropped() > 0) {
            rows.push(("left out", format!("{name}: {report}")));
        }
        rows
    }
}

/// Refuses rollouts that are not those of the steps to come. The prompts are drawn from and put back.
fn check_replay(feed: &mut PromptFeed, resumed: &Resumed, total: u64) -> Result<(), Failure> {
    let begun = feed.prompts.position();
    if let Some((_, state)) = &resumed.saved {
        feed.prompts.restore(&state.data)?;
    }
    let step = resumed.saved.as_ref().map_or(0, |(_, state)| state.step) + 1;
    let first = feed.draw(step)?;
    feed.prompts.restore(&begun)?;
    let steps = step..=total;
    let first = (!steps.is_empty()).then_some(&first);
    let folders: (Option<&PathBuf>, Option<&PathBuf>) = (feed.record.as_ref(), feed.replay.as_ref());
    replay::check(folders, steps, first)
}

/// The roles that can learn in such a run.
const CAN_LEARN: [Role; 2] = [Role::Actor, Role::Critic];

/// Refuses an algorithm whose roles nobody builds, or that have nothing to minimise, or whose result would not be there.
fn check_learners(
    (name, exported): (&str, Role),
    learners: &[(Role, &str)],
    losses: &[(Role, &str)],
) -> Result<(), Failure> {
    let refuse = |why: String| Err(Failure::Other(format!("the algorithm `{name}`: {why}")));
    for needed in [Role::Actor, exported] {
        if learners.iter().all(|(role, _)| *role != needed) {
            return refuse(format!("the {needed} samples or is exported, and is none of LEARNERS"));
        }
    }
    for (index, (role, file)) in learners.iter().enumerate() {
        if learners[..index].iter().any(|(other, its)| other == role || its == file) {
            return refuse(format!("the {role} or its name `{file}` stands twice in LEARNERS"));
        }
        if !CAN_LEARN.contains(role) {
            let [actor, critic] = CAN_LEARN;
            return refuse(format!("the {role} shall learn, and only {actor} and {critic} are built to: see LEARNERS"));
        }
        if losses.iter().all(|(of, _)| of != role) {
            return refuse(format!("the {role} learns, and has no loss: name one in losses()"));
        }
    }
    match losses.iter().find(|(role, _)| learners.iter().all(|(learner, _)| learner != role)) {
        Some((role, loss)) => refuse(format!("the loss `{loss}` is the {role}'s, which is none of LEARNERS")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_and_losses_that_do_not_meet_are_named() {
        let refused_of = |exported: Role, learners: &[(Role, &str)], losses: &[(Role, &str)]| {
            check_learners(("mine", exported), learners, losses)
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default()
        };
        let refused = |learners: &[(Role, &str)], losses: &[(Role, &str)]| refused_of(Role::Actor, learners, losses);
        let actor = (Role::Actor, "actor");
        let error = refused_of(Role::Critic, &[actor], &[(Role::Actor, "surrogate")]);
        assert!(error.contains("the critic samples or is exported, and is none of LEARNERS"), "{error}");
        let error = refused(&[actor, (Role::Critic, "actor")], &[(Role::Actor, "surrogate")]);
        assert!(error.contains("`actor` stands twice in LEARNERS"), "{error}");
        assert_eq!(refused(&[actor], &[(Role::Actor, "surrogate")]), "");
        let error = refused(&[actor, (Role::Reward, "judge")], &[(Role::Actor, "surrogate")]);
        assert!(error.contains("`mine`: the reward shall learn, and only actor and critic are built to"), "{error}");
        let error = refused(&[actor, (Role::Critic, "critic")], &[(Role::Actor, "surrogate")]);
        assert!(error.contains("the critic learns, and has no loss"), "{error}");
        let error = refused(&[actor], &[(Role::Actor, "surrogate"), (Role::Critic, "value")]);
        assert!(error.contains("the loss `value` is the critic's, which is none of LEARNERS"), "{error}");
    }
}
