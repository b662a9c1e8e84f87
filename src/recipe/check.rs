//! Rules between the keys of a recipe: what each key alone allows but the recipe as a whole does not.

use echelon_algorithms::reward_model::RewardModel;
use echelon_algorithms::sft::Sft;
use echelon_algorithms::{Algorithm, OnPolicy};
use echelon_placement::devices::{Devices, Placement};
use echelon_placement::tier::Tier;
use echelon_schema::{Auto, ModelSource, Origins, RecipeError, Rules, nearest};
use echelon_tasks::reward::RuleName;

use super::supervised::{Init, RewardRecipe, SftRecipe, SupervisedTrain};
use super::tables::*;
use super::{ResolvedRecipe, Root};

impl<K: OnPolicy> Root for Recipe<K> {
    type Resolved = ResolvedRecipe<K>;
    const PROGRAM: &'static str = K::Algorithm::NAME;
    const TABLE: &'static str = "actor";

    fn name(&self) -> &str {
        &self.name
    }

    fn common(&mut self) -> (&mut String, &mut Origins) {
        (&mut self.name, &mut self.origins)
    }

    fn resolved_text(&self) -> String {
        self.clone().resolve().to_toml()
    }

    fn check(&self, rules: &mut Rules) {
        check_name(&self.name, rules);
        check_reward(&self.reward, self.labels(), rules);
        check_prompts(&self.data, rules);
        check_stop(&self.rollout, rules);
        check_replay(&self.rollout, rules);
        check_mini_batch(self, rules);
        self.keys.check(self.train.steps, rules);
        self.placement.devices.check(rules);
        check_parallelism(self, rules);
        check_ranks(self, rules);
        self.placement.check(rules);
        check_eval(self, rules);
    }
}

impl Root for SftRecipe {
    type Resolved = SftRecipe;
    const PROGRAM: &'static str = Sft::NAME;
    const TABLE: &'static str = "model";

    fn name(&self) -> &str {
        &self.name
    }

    fn common(&mut self) -> (&mut String, &mut Origins) {
        (&mut self.name, &mut self.origins)
    }

    fn check(&self, rules: &mut Rules) {
        check_name(&self.name, rules);
        check_init(self.model.init, &self.model.model, rules);
        check_supervised(self.data.sources(), &self.train, &self.checkpoint, &["eval/loss", "eval/perplexity"], rules);
        self.placement.check(rules);
        check_no_tier(Self::PROGRAM, &self.placement, rules);
    }
}

impl Root for RewardRecipe {
    type Resolved = RewardRecipe;
    const PROGRAM: &'static str = RewardModel::NAME;
    const TABLE: &'static str = "model";

    fn name(&self) -> &str {
        &self.name
    }

    fn common(&mut self) -> (&mut String, &mut Origins) {
        (&mut self.name, &mut self.origins)
    }

    fn check(&self, rules: &mut Rules) {
        check_name(&self.name, rules);
        check_init(self.model.init, &self.model.model, rules);
        let measured = ["eval/accuracy", "eval/loss", "eval/score_mean", "eval/score_std"];
        check_supervised(self.data.sources(), &self.train, &self.checkpoint, &measured, rules);
        self.placement.check(rules);
        check_no_tier(Self::PROGRAM, &self.placement, rules);
        if self.data.chosen_key == self.data.rejected_key {
            let message = format!("`data.chosen_key` and `data.rejected_key` are both \"{}\"", self.data.chosen_key);
            rules.broken(&["data.rejected_key", "data.chosen_key"], message, "");
        }
    }
}

impl<K: OnPolicy> Recipe<K> {
    /// Refuses a `shape` that is no folder with a `config.json`: a plan may need it.
    ///
    /// # Errors
    /// The first such key.
    pub fn check_shapes(&self) -> Result<(), RecipeError> {
        let shapes = [
            ("actor.shape", &self.actor.shape),
            ("critic.shape", &self.critic.shape),
            ("reference.shape", &self.reference.shape),
            ("reward.shape", &self.reward.source.shape),
        ];
        for (key, folder) in shapes.into_iter().filter_map(|(key, shape)| Some((key, shape.as_ref()?))) {
            if !folder.join("config.json").is_file() {
                let message = format!("`{key}`: {} has no config.json", folder.display());
                return Err(self.origins.error_at(
                    key,
                    &message,
                    "name a folder with the model's; it needs no weights",
                ));
            }
        }
        Ok(())
    }

    /// Whether every prompt source has labels.
    fn labels(&self) -> bool {
        let all_mixed = !self.data.mix.is_empty() && self.data.mix.iter().all(|source| source.label_key.is_some());
        self.data.label_key.is_some() || all_mixed
    }
}

fn check_name(name: &str, rules: &mut Rules) {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if rules.has("name") && (name.is_empty() || name.starts_with('.') || !name.chars().all(allowed)) {
        let message = format!("`name` = \"{name}\" cannot name a folder");
        rules.broken(&["name"], message, "use letters, digits, `-`, `_` and `.`");
    }
}

fn check_reward(reward: &Reward, labels: bool, rules: &mut Rules) {
    let single = reward.source.given();
    if reward.mix.is_empty() {
        reward.source.check("reward", labels, rules);
    } else {
        if let Some(key) = single.first() {
            let message = format!("[reward] has the source `{key}` and {} [[reward.mix]] tables", reward.mix.len());
            rules.broken(&[&format!("reward.{key}")], message, "move it into a [[reward.mix]] table of its own");
        }
        for (index, part) in reward.mix.iter().enumerate() {
            part.source.check(&format!("reward.mix.{index}"), labels, rules);
        }
    }
    let models = reward.source.model.is_some() || reward.mix.iter().any(|part| part.source.model.is_some());
    if reward.normalize && !models {
        let help = "rules, servers and commands score as they are: delete the key";
        rules.broken(&["reward.normalize"], "`reward.normalize` needs a reward `model` with stored mean and std", help);
    }
    if let Some([low, high]) = reward.clip_range.filter(|[low, high]| low >= high) {
        let message = format!("`reward.clip_range` = [{low}, {high}] is empty");
        rules.broken(&["reward.clip_range"], message, "write the smaller bound first");
    }
}

fn check_prompts(data: &Data, rules: &mut Rules) {
    if data.prompts.is_some() && !data.mix.is_empty() {
        let message = format!("[data] has `prompts` and {} [[data.mix]] tables", data.mix.len());
        rules.broken(&["data.prompts"], message, "move it into a [[data.mix]] table of its own");
    } else if data.prompts.is_none() && data.mix.is_empty() {
        let help = "give `prompts = \"file or folder\"`, or several [[data.mix]] tables";
        rules.broken(&["data"], "[data] has no prompts", help);
    }
    if data.system_prompt.is_some() && !data.apply_chat_template {
        let message = "`data.system_prompt` has no place without a chat template";
        rules.broken(&["data.system_prompt"], message, "set `apply_chat_template = true`, or delete it");
    }
}

fn check_stop(rollout: &Rollout, rules: &mut Rules) {
    if rollout.stop.iter().any(String::is_empty) {
        rules.broken(&["rollout.stop"], "`rollout.stop` has an empty string, which would end every response", "");
    }
}

fn check_replay(rollout: &Rollout, rules: &mut Rules) {
    if let (Some(record), Some(replay)) = (&rollout.record, &rollout.replay)
        && record.0 == *replay
    {
        let message = format!("`rollout.record` and `rollout.replay` are both {}", replay.display());
        rules.broken(&["rollout.record", "rollout.replay"], message, "keep one, or record elsewhere");
    }
}

fn check_mini_batch<K: OnPolicy>(recipe: &Recipe<K>, rules: &mut Rules) {
    let (prompts, samples) = (recipe.rollout.batch_size, recipe.rollout.samples_per_prompt);
    let mini_batch = recipe.keys.learning().mini_batch_size;
    let keys = [&mini_batch_key::<K>(), "rollout.batch_size", "rollout.samples_per_prompt"];
    let Some(responses) = prompts.checked_mul(samples) else {
        return rules.broken(&keys[1..], format!("{prompts} prompts x {samples} samples is too many"), "");
    };
    if !responses.is_multiple_of(mini_batch) {
        let unit =
            if responses < mini_batch { "less than one mini-batch" } else { "not a whole number of mini-batches" };
        let message =
            format!("{prompts} prompts x {samples} samples = {responses} responses, which is {unit} of {mini_batch}");
        rules.broken(
            &keys,
            message,
            format!("`mini_batch_size = {}` divides them", nearest_divisor(responses, mini_batch)),
        );
    }
}

fn mini_batch_key<K: OnPolicy>() -> String {
    format!("{}.mini_batch_size", K::Algorithm::NAME)
}

/// The divisor of `number` nearest to `wanted`; the larger of two equally near.
fn nearest_divisor(number: usize, wanted: usize) -> usize {
    let small =
        (1..).take_while(|divisor| divisor * divisor <= number).filter(|divisor| number.is_multiple_of(*divisor));
    let all = small.flat_map(|divisor| [divisor, number / divisor]);
    all.min_by_key(|divisor| (divisor.abs_diff(wanted), std::cmp::Reverse(*divisor))).unwrap_or(1)
}

/// A model that is trained alone shares its devices with nobody.
fn check_no_tier(program: &str, devices: &Devices, rules: &mut Rules) {
    if devices.tier != Auto::Auto {
        let message = format!("`placement.tier` says how roles share devices, and `{program}` has one model");
        rules.broken(&["placement.tier"], message, "delete the key");
    }
}

/// A rank without a row has nothing to do. Where roles have workers of their own, the planner sees to it.
fn check_ranks<K: OnPolicy>(recipe: &Recipe<K>, rules: &mut Rules) {
    let Placement { devices, actor, critic, reward, reference, generator } = &recipe.placement;
    let hands = [actor, critic, reward, reference, generator];
    let apart = hands.iter().any(|hand| hand.devices.is_some())
        || matches!(devices.tier, Auto::Fixed(Tier::Medium | Tier::Large));
    if apart {
        return;
    }
    let Some(workers) = devices.workers.fixed().filter(|workers| *workers > 1) else { return };
    let (mini_batch, rows) = (mini_batch_key::<K>(), recipe.keys.learning().mini_batch_size);
    for (key, rows) in [("rollout.batch_size", recipe.rollout.batch_size), (mini_batch.as_str(), rows)] {
        if workers > rows {
            let message = format!("{workers} workers are more than `{key}` = {rows}");
            rules.broken(&["placement.workers", key], message, "every worker needs a row");
        }
    }
}

fn check_parallelism<K: OnPolicy>(recipe: &Recipe<K>, rules: &mut Rules) {
    let size = recipe.generation.tensor_parallel_size;
    let Placement { devices, generator, .. } = &recipe.placement;
    let own = generator.devices.as_ref().map(Vec::len);
    let count =
        own.or_else(|| devices.count().filter(|_| !matches!(devices.tier, Auto::Fixed(Tier::Medium | Tier::Large))));
    if let Some(count) = count.filter(|count| !count.is_multiple_of(size)) {
        let message = format!("`generation.tensor_parallel_size` = {size} does not divide the {count} devices");
        rules.broken(&["generation.tensor_parallel_size"], message, "engines of this size must fill the devices");
    }
}

fn check_eval<K: OnPolicy>(recipe: &Recipe<K>, rules: &mut Rules) {
    let eval = &recipe.eval;
    if eval.every_steps.is_some() && eval.prompts.is_none() {
        let help = "give `prompts = \"file or folder\"` in [eval]";
        rules.broken(&["eval.every_steps"], "`eval.every_steps` has no prompts to evaluate on", help);
    }
    let sources = std::iter::once(&recipe.reward.source).chain(recipe.reward.mix.iter().map(|part| &part.source));
    let needs_label = sources.into_iter().any(|source| source.rule == Some(RuleName::Math));
    if needs_label && eval.prompts.is_some() && recipe.data.label_key.is_none() {
        let message = "`eval.prompts` has no labels for `rule = \"math\"`: `data.label_key` is not set";
        rules.broken(&["eval.prompts"], message, "evaluation reads the keys of [data]");
    }
    check_best_metric(&recipe.checkpoint, &["eval/reward", "eval/reward_std"], rules);
    if recipe.checkpoint.best_metric.is_some() && (eval.prompts.is_none() || eval.every_steps.is_none()) {
        let help = "give [eval] `prompts` and `every_steps`";
        rules.broken(&["checkpoint.best_metric"], "`checkpoint.best_metric` is never measured", help);
    }
}

/// A metric that is never measured would keep no checkpoint.
fn check_best_metric(checkpoint: &Checkpoint, measured: &[&'static str], rules: &mut Rules) {
    let Some(name) = checkpoint.best_metric.as_deref().filter(|name| !measured.contains(name)) else { return };
    let meant = nearest(name, measured.iter().copied());
    let help = match meant {
        Some(meant) => format!("did you mean \"{meant}\"?"),
        None => format!("an evaluation measures {}", measured.join(", ")),
    };
    rules.broken(&["checkpoint.best_metric"], format!("`checkpoint.best_metric` = \"{name}\" is no eval metric"), help);
}

fn check_init(init: Init, model: &ModelSource, rules: &mut Rules) {
    if init == Init::Random && matches!(model, ModelSource::Hub(_)) {
        let help = "name a folder with `config.json` and the tokenizer's files";
        rules.broken(&["model.model"], format!("`init = \"random\"` needs a folder, and `{model}` is a hub id"), help);
    }
}

fn check_supervised(
    (single, mixed, held_out, fraction): (bool, usize, bool, f64),
    train: &SupervisedTrain,
    checkpoint: &Checkpoint,
    measured: &[&'static str],
    rules: &mut Rules,
) {
    if single && mixed > 0 {
        let message = format!("[data] has `train` and {mixed} [[data.mix]] tables");
        rules.broken(&["data.train"], message, "move it into a [[data.mix]] table of its own");
    } else if !single && mixed == 0 {
        let help = "give `train = \"file or folder\"`, or several [[data.mix]] tables";
        rules.broken(&["data"], "[data] has nothing to train on", help);
    }
    if held_out && fraction > 0.0 {
        let message = "[data] has an `eval` source and holds out a fraction as well";
        rules.broken(&["data.eval_fraction"], message, "keep one");
    }
    if train.steps.is_some() && rules.has("train.epochs") && train.epochs != SupervisedTrain::default().epochs {
        let message = "[train] has `steps` and `epochs`";
        rules.broken(&["train.epochs"], message, "keep one: `steps` counts optimizer steps");
    }
    let evaluates = held_out || fraction > 0.0;
    if train.eval_every_steps.is_some() && !evaluates {
        let help = "give `eval`, or `eval_fraction`, in [data]";
        rules.broken(&["train.eval_every_steps"], "`train.eval_every_steps` has no rows to evaluate on", help);
    }
    check_best_metric(checkpoint, measured, rules);
    if checkpoint.best_metric.is_some() && !(evaluates && train.eval_every_steps.is_some()) {
        let help = "give held-out rows in [data] and `eval_every_steps` in [train]";
        rules.broken(&["checkpoint.best_metric"], "`checkpoint.best_metric` is never measured", help);
    }
}
