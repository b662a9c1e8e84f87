//! Decides what a recipe left open.
//!
//! What depends on files and devices stays `auto`: dtype, ZeRO stage, number of devices. Everything else is a value.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use echelon_algorithms::OnPolicy;
use echelon_schema::{ModelSource, to_toml};
use echelon_tasks::reward::SourceKeys;

use super::arithmetic::BatchArithmetic;
use super::tables::{Critic, Data, DataMix, Recipe, Reference, Reward, RewardMix};
use super::{Devices, json_of};

/// A recipe with nothing left to decide: critic and reference have their models where the algorithm reads them, and every source of scores or prompts says all of its keys.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedRecipe<K: OnPolicy> {
    recipe: Recipe<K>,
    /// Sizes that follow from the others.
    pub batch: BatchArithmetic,
}

impl<K: OnPolicy> Deref for ResolvedRecipe<K> {
    type Target = Recipe<K>;

    fn deref(&self) -> &Recipe<K> {
        &self.recipe
    }
}

impl<K: OnPolicy> Recipe<K> {
    /// Decides what the recipe left open. It cannot fail: a loaded recipe is consistent.
    ///
    /// # Panics
    /// On a recipe put together by hand that breaks the rules that loading checks.
    pub fn resolve(mut self) -> ResolvedRecipe<K> {
        // A command runs where its recipe lies, also when the recipe is read again from a run folder.
        self.reward.resolve(&self.origins.folder());
        self.data.resolve();
        let actor = (self.actor.model.clone(), self.actor.shape.clone());
        let judge = self.reward.model().map(|source| (source.model.clone().expect("it has one"), source.shape.clone()));
        let Critic { model, shape, .. } = &mut self.critic;
        if K::has_critic() {
            start(model, shape, judge.as_ref().unwrap_or(&actor));
        }
        let Reference { model, shape, .. } = &mut self.reference;
        match self.keys.learning().reads_reference {
            true => start(model, shape, &actor),
            false => (*model, *shape) = (None, None),
        }
        self.keys.resolve();
        self.origins = Default::default();
        ResolvedRecipe { batch: self.batch_arithmetic(), recipe: self }
    }
}

/// A model that is not given is the `usual` one, with its shape.
fn start(model: &mut Option<ModelSource>, shape: &mut Option<PathBuf>, usual: &(ModelSource, Option<PathBuf>)) {
    if model.is_none() {
        *model = Some(usual.0.clone());
        *shape = shape.take().or_else(|| usual.1.clone());
    }
}

impl Reward {
    /// What scores, with its weight.
    pub fn sources(&self) -> Vec<(&SourceKeys, f64)> {
        match &self.mix[..] {
            [] => vec![(&self.source, 1.0)],
            mix => mix.iter().map(|part| (&part.source, part.weight)).collect(),
        }
    }

    /// The first source that is a model.
    pub fn model(&self) -> Option<&SourceKeys> {
        self.sources().into_iter().map(|(source, _)| source).find(|source| source.model.is_some())
    }

    fn resolve(&mut self, folder: &Path) {
        if let [RewardMix { weight: 1.0, .. }] = &self.mix[..] {
            self.source = self.mix.remove(0).source;
        }
        let mixed = self.mix.iter_mut().map(|part| &mut part.source);
        std::iter::once(&mut self.source).chain(mixed).for_each(|source| source.resolve(folder));
    }
}

impl Data {
    /// Files of prompts, with the keys of their rows.
    pub fn sources(&self) -> Vec<DataMix> {
        let single = self.prompts.iter().map(|prompts| DataMix {
            prompts: prompts.clone(),
            weight: 1.0,
            prompt_key: Some(self.prompt_key.clone()),
            label_key: self.label_key.clone(),
        });
        single.chain(self.mix.iter().cloned()).collect()
    }

    fn resolve(&mut self) {
        for part in &mut self.mix {
            part.prompt_key.get_or_insert_with(|| self.prompt_key.clone());
            part.label_key = part.label_key.take().or_else(|| self.label_key.clone());
        }
        if let [only] = &self.mix[..]
            && only.weight == 1.0
            && only.prompt_key.as_ref() == Some(&self.prompt_key)
            && only.label_key == self.label_key
        {
            self.prompts = Some(self.mix.remove(0).prompts);
        }
    }
}

impl<K: OnPolicy> ResolvedRecipe<K> {
    /// The devices, for what only this machine knows.
    pub fn devices_mut(&mut self) -> &mut Devices {
        &mut self.recipe.placement.devices
    }

    /// `recipe.resolved.toml`: every decided key, one per line. It loads again, and resolves to an equal value.
    pub fn to_toml(&self) -> String {
        self.to_toml_headed("The recipe as it ran, with every default.")
    }

    /// The same below another first line.
    pub fn to_toml_headed(&self, heading: &str) -> String {
        let batch = self.batch.to_string();
        let comment: String = batch.lines().map(|line| format!("# {line}\n")).collect();
        format!("# {heading}\n{comment}\n{}", to_toml(&self.recipe))
    }

    /// The same as JSON, for programs.
    pub fn to_json(&self) -> serde_json::Value {
        json_of(&self.to_toml())
    }
}
