//! What a recipe means for the algorithm, its losses, its optimizers and the engine.

use std::path::Path;
use std::sync::Arc;

use echelon_algorithms::kl::{self, KlController};
use echelon_algorithms::losses::PolicyClip;
use echelon_algorithms::ppo::{KlPlacement, PolicyLoss, Ppo, ValueLoss};
use echelon_algorithms::reward_shaping::ScoreShaping;
use echelon_algorithms::schedule::{Decay, LrSchedule};
use echelon_core::rollout::SamplingConfig;
use echelon_core::zero::OptimizerConfig;
use echelon_generation::{EngineConfig, check_budget};
use echelon_models::tokenizer::Tokenizer;

use crate::model_folders::{ModelFolders, fingerprint, shape};
use crate::program::Failure;
use crate::prompts::PromptFormat;
use crate::recipe::{self, Compute, KlEstimator, Optimizer, ResolvedRecipe, Schedule};
use echelon_roles::models::Held;

/// Refuses what the models and the device cannot do, before anything starts.
///
/// # Errors
/// [`Failure::Input`]: sequences beyond a model's context, an engine over more devices than there are, or a key-value cache
/// that does not hold one sequence.
pub fn check_limits(recipe: &ResolvedRecipe, folders: &ModelFolders, held: Held) -> Result<(), Failure> {
    let tensor_parallel_size = recipe.generation.tensor_parallel_size;
    if tensor_parallel_size > 1 && recipe.placement.devices.count().unwrap_or(1) == 1 {
        return Err(Failure::Input(format!(
            "generation.tensor_parallel_size = {tensor_parallel_size}, but this run has one device: delete the key, or set \
             placement.workers"
        )));
    }
    let (prompt, response) = (recipe.data.max_prompt_tokens, recipe.rollout.max_new_tokens);
    let keys = format!("data.max_prompt_tokens = {prompt} plus rollout.max_new_tokens = {response}");
    let own = [Some(&folders.actor), Some(&folders.critic), folders.reference.as_ref()];
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
        &engine_config(recipe, held),
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

pub fn engine_config(recipe: &ResolvedRecipe, held: Held) -> EngineConfig {
    EngineConfig {
        max_sequences: recipe.generation.max_sequences,
        max_batched_tokens: recipe.generation.max_batched_tokens,
        kv_cache_bytes: recipe.generation.kv_cache_bytes.fixed(),
        weight_layout: held.weight_layout,
    }
}

/// How rows of data become prompts of this run.
pub fn prompt_format(recipe: &ResolvedRecipe, tokenizer: Arc<Tokenizer>) -> PromptFormat {
    PromptFormat {
        tokenizer,
        apply_chat_template: recipe.data.apply_chat_template,
        system_prompt: recipe.data.system_prompt.clone(),
        max_prompt_tokens: recipe.data.max_prompt_tokens,
    }
}

pub fn ppo(recipe: &ResolvedRecipe, normalization: Option<(f64, f64)>) -> Ppo {
    Ppo {
        epochs: recipe.ppo.epochs,
        mini_batch_size: recipe.ppo.mini_batch_size,
        gamma: recipe.ppo.gamma,
        gae_lambda: recipe.ppo.gae_lambda,
        kl_estimator: kl_estimator(recipe.ppo.kl_estimator),
        kl_placement: match recipe.ppo.kl_placement {
            recipe::KlPlacement::Reward => KlPlacement::Reward,
            recipe::KlPlacement::Loss => KlPlacement::Loss,
        },
        kl: match recipe.ppo.kl_target {
            Some(target) => KlController::adaptive(recipe.ppo.kl_coef, target, recipe.ppo.kl_horizon),
            None => KlController::fixed(recipe.ppo.kl_coef),
        },
        score_shaping: ScoreShaping {
            normalization,
            missing_eos_penalty: recipe.reward.missing_eos_penalty,
            clip_range: recipe.reward.clip_range.map(|[low, high]| (low, high)),
        },
        critic_warmup_steps: recipe.ppo.critic_warmup_steps as u64,
        policy_loss: policy_loss(recipe),
        value_loss: value_loss(recipe),
        seed: recipe.seed,
    }
}

/// Sampling of the rollout, or of an evaluation at another temperature.
pub fn sampling(recipe: &ResolvedRecipe, temperature: f64) -> SamplingConfig {
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

fn kl_estimator(estimator: KlEstimator) -> kl::KlEstimator {
    match estimator {
        KlEstimator::K1 => kl::KlEstimator::K1,
        KlEstimator::K2 => kl::KlEstimator::K2,
        KlEstimator::K3 => kl::KlEstimator::K3,
    }
}

pub fn policy_loss(recipe: &ResolvedRecipe) -> PolicyLoss {
    PolicyLoss {
        clip: PolicyClip {
            low: recipe.ppo.policy_clip,
            high: recipe.ppo.policy_clip_high.unwrap_or(recipe.ppo.policy_clip),
            dual: recipe.ppo.dual_clip,
        },
        entropy_coef: recipe.ppo.entropy_coef,
        kl_estimator: kl_estimator(recipe.ppo.kl_estimator),
    }
}

pub fn value_loss(recipe: &ResolvedRecipe) -> ValueLoss {
    ValueLoss { value_clip: recipe.ppo.value_clip }
}

/// The learning rate's course over `total` optimizer steps.
pub fn schedule(optimizer: &Optimizer, total: usize) -> LrSchedule {
    let decay = match optimizer.schedule {
        Schedule::Constant => Decay::Constant,
        Schedule::Linear => Decay::Linear,
        Schedule::Cosine => Decay::CosineWithMinLr,
    };
    LrSchedule::new(decay, total, optimizer.warmup_ratio, optimizer.min_lr_ratio)
}

/// AdamW's settings.
pub fn optimizer(optimizer: &Optimizer, compute: &Compute) -> OptimizerConfig {
    OptimizerConfig {
        betas: (optimizer.betas[0], optimizer.betas[1]),
        eps: optimizer.eps,
        weight_decay: optimizer.weight_decay,
        max_grad_norm: compute.max_grad_norm.unwrap_or(0.0),
    }
}
