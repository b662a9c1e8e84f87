//! What a recipe means for the algorithm, its losses, its optimizers and the engine.

use std::path::Path;
use std::sync::Arc;

use echelon_algorithms::OnPolicy;
use echelon_algorithms::reward_shaping::ScoreShaping;
use echelon_core::rollout::SamplingConfig;
use echelon_generation::check_budget;
use echelon_models::tokenizer::Tokenizer;

use crate::model_folders::{ModelFolders, fingerprint, shape};
use crate::program::Failure;
use crate::prompts::PromptFormat;
use crate::recipe::ResolvedRecipe;
use echelon_roles::models::Held;

/// Refuses what the models and the device cannot do, before anything starts.
///
/// # Errors
/// [`Failure::Input`]: sequences beyond a model's context, an engine over more devices than there are, or a key-value cache
/// that does not hold one sequence.
pub fn check_limits<K: OnPolicy>(
    recipe: &ResolvedRecipe<K>,
    folders: &ModelFolders,
    held: Held,
) -> Result<(), Failure> {
    let tensor_parallel_size = recipe.generation.tensor_parallel_size;
    if tensor_parallel_size > 1 && recipe.placement.devices.count().unwrap_or(1) == 1 {
        return Err(Failure::Input(format!(
            "generation.tensor_parallel_size = {tensor_parallel_size}, but this run has one device: delete the key, or set \
             placement.workers"
        )));
    }
    let (prompt, response) = (recipe.data.max_prompt_tokens, recipe.rollout.max_new_tokens);
    let keys = format!("data.max_prompt_tokens = {prompt} plus rollout.max_new_tokens = {response}");
    let own = [Some(&folders.actor), folders.critic.as_ref(), folders.reference.as_ref()];
    for folder in own.into_iter().flatten() {
        check_context(folder, prompt + response, &keys)?;
    }
    // A reward model with a tokenizer of its own counts other tokens.
    if let Some(folder) = &folders.reward
        && let Err(error) = check_context(folder, prompt + response, &keys)
        && fingerprint(folder)? == fingerprint(&folders.actor)?
    {
        return Err(error);
    }
    check_budget(
        &recipe.generation.engine_config(held.weight_layout),
        (&shape(&folders.actor)?, held.kind, tensor_parallel_size),
        prompt,
        response,
    )
    .map_err(|error| Failure::Input(format!("generation.{error}")))
}

/// Refuses sequences of up to `tokens`, which come of `keys`, where the model in `folder` was made for shorter ones.
///
/// # Errors
/// [`Failure::Input`], with both numbers.
pub fn check_context(folder: &Path, tokens: usize, keys: &str) -> Result<(), Failure> {
    let most = shape(folder)?.max_positions;
    if tokens as i64 <= most {
        return Ok(());
    }
    Err(Failure::Input(format!(
        "{}: max_position_embeddings is {most}, but {keys} gives sequences of up to {tokens} tokens: lower the limit",
        folder.join("config.json").display()
    )))
}

/// How rows of data become prompts of this run.
pub fn prompt_format<K: OnPolicy>(recipe: &ResolvedRecipe<K>, tokenizer: Arc<Tokenizer>) -> PromptFormat {
    PromptFormat {
        tokenizer,
        apply_chat_template: recipe.data.apply_chat_template,
        system_prompt: recipe.data.system_prompt.clone(),
        max_prompt_tokens: recipe.data.max_prompt_tokens,
    }
}

/// The algorithm, which learns from scores normalised by a mean and a standard deviation.
pub fn algorithm<K: OnPolicy>(recipe: &ResolvedRecipe<K>, normalization: Option<(f64, f64)>) -> K::Algorithm {
    let score_shaping = ScoreShaping {
        normalization,
        missing_eos_penalty: recipe.reward.missing_eos_penalty,
        clip_range: recipe.reward.clip_range.map(|[low, high]| (low, high)),
    };
    recipe.keys.algorithm(score_shaping, recipe.seed)
}

/// Sampling of the rollout, or of an evaluation at another temperature.
pub fn sampling<K: OnPolicy>(recipe: &ResolvedRecipe<K>, temperature: f64) -> SamplingConfig {
    SamplingConfig {
        temperature,
        top_k: recipe.rollout.top_k.map_or(0, |top_k| top_k as i64),
        top_p: recipe.rollout.top_p,
        min_p: recipe.rollout.min_p,
        max_new_tokens: recipe.rollout.max_new_tokens,
        stop: recipe.rollout.stop.clone(),
        ignore_eos: false,
    }
}
