//! Where the models of a run are, and what they look like from outside.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use echelon_algorithms::OnPolicy;
use echelon_core::role::Role;
use echelon_models::config::{DecoderConfig, HeadKind};
use echelon_models::hub::resolve_model;
use echelon_models::tokenizer::Tokenizer;

use crate::plan::{Shapes, shape_with};
use crate::program::{Failure, absolute};
use crate::recipe::{ModelSource, ResolvedRecipe};
use echelon_roles::models::check_folder;

/// Folders of the models that a run needs, fetched where the recipe names a hub id.
#[derive(Clone, Debug)]
pub struct ModelFolders {
    pub actor: PathBuf,
    pub critic: Option<PathBuf>,
    pub reference: Option<PathBuf>,
    pub reward: Option<PathBuf>,
}

impl ModelFolders {
    /// Where other processes find them.
    pub fn by_role(&self) -> BTreeMap<Role, PathBuf> {
        let others = [(Role::Critic, &self.critic), (Role::Reference, &self.reference), (Role::Reward, &self.reward)];
        let others = others.into_iter().filter_map(|(role, folder)| Some((role, absolute(folder.as_ref()?))));
        std::iter::once((Role::Actor, absolute(&self.actor))).chain(others).collect()
    }
}

/// Finds (or fetches) and checks every model folder; no weight is read yet.
///
/// # Errors
/// A model that is not there or does not fit its role: [`Failure::Input`].
pub fn model_folders<K: OnPolicy>(recipe: &ResolvedRecipe<K>) -> Result<ModelFolders, Failure> {
    let sources = recipe.reward.sources();
    let mut models = sources.iter().filter_map(|(source, _)| source.model.as_ref());
    let reward = models.next();
    if let (Some(first), Some(second)) = (reward, models.next()) {
        let message = format!("[[reward.mix]]: one source may be a `model`, found {first} and {second}");
        return Err(Failure::Input(format!("{message}; serve the other as a `command` or `url`")));
    }
    let folders = ModelFolders {
        actor: model_folder(&recipe.actor.model)?,
        critic: recipe.critic.model.as_ref().map(|critic| critic_folder(recipe, critic, reward)).transpose()?,
        reference: recipe.reference.model.as_ref().map(model_folder).transpose()?,
        reward: reward.map(model_folder).transpose()?,
    };
    for (role, folder, head) in [
        (Role::Actor, Some(&folders.actor), Some(HeadKind::Logits)),
        (Role::Critic, folders.critic.as_ref(), None),
        (Role::Reference, folders.reference.as_ref(), Some(HeadKind::Logits)),
        (Role::Reward, folders.reward.as_ref(), Some(HeadKind::Score)),
    ] {
        if let Some(folder) = folder {
            check_folder(folder, head).map_err(|error| Failure::Input(format!("[{role}] {error}")))?;
        }
    }
    Ok(folders)
}

/// The critic reads the actor's tokens: where it would start from a reward model with another tokenizer only because
/// the recipe names no critic, it starts from the actor.
fn critic_folder<K: OnPolicy>(
    recipe: &ResolvedRecipe<K>,
    critic: &ModelSource,
    reward: Option<&ModelSource>,
) -> Result<PathBuf, Failure> {
    let folder = model_folder(critic)?;
    if reward != Some(critic) {
        return Ok(folder);
    }
    let actor = model_folder(&recipe.actor.model)?;
    Ok(if fingerprint(&folder)? == fingerprint(&actor)? { folder } else { actor })
}

pub fn model_folder(source: &ModelSource) -> Result<PathBuf, Failure> {
    match source {
        ModelSource::Folder(folder) => Ok(folder.clone()),
        ModelSource::Hub(id) => resolve_model(id, Path::new("")).map_err(Failure::input),
    }
}

pub fn fingerprint(folder: &Path) -> Result<String, Failure> {
    Tokenizer::load(folder).map(|tokenizer| tokenizer.fingerprint()).map_err(Failure::input)
}

/// The shape of a folder's model, for arithmetic.
pub fn shape(folder: &Path) -> Result<DecoderConfig, Failure> {
    DecoderConfig::read(folder).map_err(Failure::input)
}

/// The shapes of a run's models.
pub fn shapes(folders: &ModelFolders) -> Result<Shapes, Failure> {
    let shape = |folder: &PathBuf, head| shape_with(folder, Some(head));
    Ok(Shapes {
        actor: shape(&folders.actor, HeadKind::Logits)?,
        critic: folders.critic.as_ref().map(|folder| shape(folder, HeadKind::Score)).transpose()?,
        reference: folders.reference.as_ref().map(|folder| shape(folder, HeadKind::Logits)).transpose()?,
        reward: folders.reward.as_ref().map(|folder| shape(folder, HeadKind::Score)).transpose()?,
    })
}
