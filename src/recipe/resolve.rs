//! Decides what a recipe left open.
//!
//! What depends on files and devices stays `auto`: dtype, ZeRO stage, number of devices. Everything else is a value.

use std::path::{Path, PathBuf};

use echelon_schema::{ModelSource, to_toml};

use super::arithmetic::BatchArithmetic;
use super::check::length_range;
use super::tables::*;
use super::{Optimizer, Placement, PpoKeys, json_of};

/// A PPO recipe with nothing left to decide.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedRecipe {
    /// Names the run folder.
    pub name: String,
    /// Every random number of the run follows from it.
    pub seed: u64,
    /// The policy that is trained.
    pub actor: Actor,
    /// Where the critic starts: a checkpoint with a score head keeps it, any other gets a fresh value head.
    pub critic: StartModel,
    /// AdamW of the critic.
    pub critic_optimizer: Optimizer,
    /// The frozen policy; `None` when `ppo.kl_coef = 0`: it is not loaded.
    pub reference: Option<StartModel>,
    /// Keep the reference in host memory between its turns.
    pub reference_offload: bool,
    /// Where scores come from.
    pub reward: ResolvedReward,
    /// The prompts.
    pub data: ResolvedData,
    /// What one step samples.
    pub rollout: Rollout,
    /// How a step learns; `policy_clip_high` is always given.
    pub ppo: PpoKeys,
    /// Length of the run, numbers and memory.
    pub train: Train,
    /// The engine that samples.
    pub generation: Generation,
    /// Which devices do what.
    pub placement: Placement,
    /// What is saved to resume from.
    pub checkpoint: Checkpoint,
    /// Held-out prompts.
    pub eval: Eval,
    /// Sizes that follow from the others.
    pub batch: BatchArithmetic,
}

/// A model that a role starts from.
#[derive(Debug, Clone, PartialEq)]
pub struct StartModel {
    /// Folder or hub id.
    pub model: ModelSource,
    /// Folder with its `config.json`, for `--plan`.
    pub shape: Option<PathBuf>,
}

/// Where scores come from.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedReward {
    /// Sources, added up by weight; at least one.
    pub sources: Vec<WeightedSource>,
    /// Scores are clipped to this range.
    pub clip_range: Option<[f64; 2]>,
    /// Use the reward model's stored mean and standard deviation.
    pub normalize: bool,
    /// Subtracted from the score of a response that did not end.
    pub missing_eos_penalty: Option<f64>,
}

/// One source of scores and its factor.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedSource {
    /// What scores.
    pub source: ScoreSource,
    /// Factor of its score.
    pub weight: f64,
}

/// One way to score a response.
#[derive(Debug, Clone, PartialEq)]
pub enum ScoreSource {
    /// A sequence-classification checkpoint.
    Model(StartModel),
    /// A built-in rule.
    Rule(Rule),
    /// A reward server.
    Url { url: String, timeout_s: f64, retries: usize },
    /// A program run by `sh -c` in `folder`.
    Command { command: String, folder: PathBuf, num_cpus: f64, timeout_s: f64 },
}

/// A built-in rule with its parameters.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Rule {
    /// The response's number equals the label's, up to `tolerance` times its size.
    Math { tolerance: f64 },
    /// The regular expression is found in the response.
    Regex { pattern: String },
    /// The response has `min_tokens` to `max_tokens` tokens; without `max_tokens` none is too long.
    Length { min_tokens: usize, max_tokens: Option<usize> },
    /// The whole response has this form.
    Format { structure: String },
    /// How positive the words are, by the lexicon file.
    Sentiment { lexicon: PathBuf },
}

/// The prompts.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedData {
    /// At least one.
    pub sources: Vec<PromptSource>,
    /// Key of a row's prompt in `eval.prompts`.
    pub prompt_key: String,
    /// Key of a row's label in `eval.prompts`.
    pub label_key: Option<String>,
    /// Wrap each prompt in the actor's chat template.
    pub apply_chat_template: bool,
    /// System message put before each prompt.
    pub system_prompt: Option<String>,
    /// Prompts with more tokens are left out.
    pub max_prompt_tokens: usize,
    /// Use the first so many rows of all sources.
    pub max_samples: Option<usize>,
}

/// One file or folder of prompts.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptSource {
    /// File or folder.
    pub path: PathBuf,
    /// Relative to the other sources' weights.
    pub weight: f64,
    /// Key of a row's prompt.
    pub prompt_key: String,
    /// Key of a row's label.
    pub label_key: Option<String>,
}

impl Recipe {
    /// Decides what the recipe left open. It cannot fail: a loaded recipe is consistent.
    ///
    /// # Panics
    /// On a recipe put together by hand that breaks the rules that loading checks.
    pub fn resolve(&self) -> ResolvedRecipe {
        let sources = self.score_sources();
        let actor_start = StartModel { model: self.actor.model.clone(), shape: self.actor.shape.clone() };
        let reward_model = sources.iter().find_map(|weighted| match &weighted.source {
            ScoreSource::Model(start) => Some(start.clone()),
            _ => None,
        });
        let critic_default = reward_model.unwrap_or_else(|| actor_start.clone());
        let reference = start(&self.reference.model, &self.reference.shape, &actor_start);
        let clip_high = self.ppo.policy_clip_high.unwrap_or(self.ppo.policy_clip);
        ResolvedRecipe {
            name: self.name.clone(),
            seed: self.seed,
            actor: self.actor.clone(),
            critic: start(&self.critic.model, &self.critic.shape, &critic_default),
            critic_optimizer: self.critic.optimizer.clone(),
            reference: (self.ppo.kl_coef > 0.0).then_some(reference),
            reference_offload: self.reference.offload,
            reward: ResolvedReward {
                sources,
                clip_range: self.reward.clip_range,
                normalize: self.reward.normalize,
                missing_eos_penalty: self.reward.missing_eos_penalty,
            },
            data: self.resolve_data(),
            rollout: self.rollout.clone(),
            ppo: PpoKeys { policy_clip_high: Some(clip_high), ..self.ppo.clone() },
            train: self.train.clone(),
            generation: self.generation.clone(),
            placement: self.placement.clone(),
            checkpoint: self.checkpoint.clone(),
            eval: self.eval.clone(),
            batch: self.batch_arithmetic(),
        }
    }

    fn score_sources(&self) -> Vec<WeightedSource> {
        // A command runs where its recipe lies, also when the recipe is read again from a run folder.
        let folder = self.origins.folder();
        if self.reward.mix.is_empty() {
            return vec![WeightedSource { source: score_source(&self.reward.source, &folder), weight: 1.0 }];
        }
        let parts = self.reward.mix.iter();
        parts.map(|part| WeightedSource { source: score_source(&part.source, &folder), weight: part.weight }).collect()
    }

    fn resolve_data(&self) -> ResolvedData {
        let data = &self.data;
        let (prompt_key, label_key) = (data.prompt_key.clone(), data.label_key.clone());
        let single = data.prompts.iter().map(|path| PromptSource {
            path: path.clone(),
            weight: 1.0,
            prompt_key: prompt_key.clone(),
            label_key: label_key.clone(),
        });
        let mixed = data.mix.iter().map(|part| PromptSource {
            path: part.prompts.clone(),
            weight: part.weight,
            prompt_key: part.prompt_key.clone().unwrap_or_else(|| prompt_key.clone()),
            label_key: part.label_key.clone().or_else(|| label_key.clone()),
        });
        ResolvedData {
            sources: single.chain(mixed).collect(),
            prompt_key: prompt_key.clone(),
            label_key: label_key.clone(),
            apply_chat_template: data.apply_chat_template,
            system_prompt: data.system_prompt.clone(),
            max_prompt_tokens: data.max_prompt_tokens,
            max_samples: data.max_samples,
        }
    }
}

impl ResolvedRecipe {
    /// `recipe.resolved.toml`: every decided key, one per line. It loads again, and resolves to an equal value.
    pub fn to_toml(&self) -> String {
        self.to_toml_headed("The recipe as it ran, with every default.")
    }

    /// The same below another first line.
    pub fn to_toml_headed(&self, heading: &str) -> String {
        let recipe = self.to_recipe();
        let batch = self.batch.to_string();
        let comment: String = batch.lines().map(|line| format!("# {line}\n")).collect();
        format!("# {heading}\n{comment}\n{}", to_toml(&recipe))
    }

    /// The same as JSON, for programs.
    pub fn to_json(&self) -> serde_json::Value {
        json_of(&self.to_toml())
    }

    /// The recipe that says all this outright.
    pub fn to_recipe(&self) -> Recipe {
        let reference = self.reference.clone();
        Recipe {
            origins: Default::default(),
            name: self.name.clone(),
            seed: self.seed,
            actor: self.actor.clone(),
            critic: Critic {
                model: Some(self.critic.model.clone()),
                shape: self.critic.shape.clone(),
                optimizer: self.critic_optimizer.clone(),
            },
            reference: Reference {
                shape: reference.as_ref().and_then(|start| start.shape.clone()),
                model: reference.map(|start| start.model),
                offload: self.reference_offload,
            },
            reward: self.reward.to_table(),
            data: self.data.to_table(),
            rollout: self.rollout.clone(),
            ppo: self.ppo.clone(),
            train: self.train.clone(),
            generation: self.generation.clone(),
            placement: self.placement.clone(),
            checkpoint: self.checkpoint.clone(),
            eval: self.eval.clone(),
        }
    }
}

impl ResolvedReward {
    fn to_table(&self) -> Reward {
        let mut table = Reward {
            clip_range: self.clip_range,
            normalize: self.normalize,
            missing_eos_penalty: self.missing_eos_penalty,
            ..Reward::default()
        };
        match &self.sources[..] {
            [WeightedSource { source, weight: 1.0 }] => table.source = source.to_table(),
            parts => {
                let mix = parts.iter().map(|part| RewardMix { source: part.source.to_table(), weight: part.weight });
                table.mix = mix.collect();
            }
        }
        table
    }
}

impl ResolvedData {
    fn to_table(&self) -> Data {
        let mut table = Data {
            prompt_key: self.prompt_key.clone(),
            label_key: self.label_key.clone(),
            apply_chat_template: self.apply_chat_template,
            system_prompt: self.system_prompt.clone(),
            max_prompt_tokens: self.max_prompt_tokens,
            max_samples: self.max_samples,
            ..Data::default()
        };
        match &self.sources[..] {
            [only] if only.weight == 1.0 && only.prompt_key == self.prompt_key && only.label_key == self.label_key => {
                table.prompts = Some(only.path.clone());
            }
            sources => {
                let mix = sources.iter().map(|source| DataMix {
                    prompts: source.path.clone(),
                    weight: source.weight,
                    prompt_key: Some(source.prompt_key.clone()),
                    label_key: source.label_key.clone(),
                });
                table.mix = mix.collect();
            }
        }
        table
    }
}

fn start(model: &Option<ModelSource>, shape: &Option<PathBuf>, default: &StartModel) -> StartModel {
    match model {
        Some(model) => StartModel { model: model.clone(), shape: shape.clone() },
        None => StartModel { model: default.model.clone(), shape: shape.clone().or_else(|| default.shape.clone()) },
    }
}

/// The one source that a loaded recipe's table has.
fn score_source(table: &RewardSource, folder: &Path) -> ScoreSource {
    let (timeout_s, retries) = (table.timeout_s, table.retries);
    if let Some(model) = &table.model {
        return ScoreSource::Model(StartModel { model: model.clone(), shape: table.shape.clone() });
    }
    if let Some(url) = &table.url {
        return ScoreSource::Url { url: url.clone(), timeout_s, retries };
    }
    if let Some(command) = &table.command {
        let folder = table.command_dir.clone().unwrap_or_else(|| folder.to_owned());
        return ScoreSource::Command { command: command.clone(), folder, num_cpus: table.num_cpus, timeout_s };
    }
    let rule = table.rule.expect("a loaded recipe has one reward source");
    ScoreSource::Rule(match rule {
        RuleName::Math => Rule::Math { tolerance: table.tolerance.unwrap_or(0.0) },
        RuleName::Regex => Rule::Regex { pattern: table.pattern.clone().unwrap_or_default() },
        RuleName::Length => {
            let (min_tokens, max_tokens) = length_range(table).unwrap_or((0, None));
            Rule::Length { min_tokens, max_tokens }
        }
        RuleName::Format => {
            let structure = table.structure.clone();
            Rule::Format { structure: structure.unwrap_or_else(|| FORMAT_STRUCTURE.to_owned()) }
        }
        RuleName::Sentiment => Rule::Sentiment { lexicon: table.lexicon.clone().unwrap_or_default() },
    })
}

/// What `rule = "format"` asks for unless the recipe says otherwise.
const FORMAT_STRUCTURE: &str = "<think>…</think><answer>…</answer>";

impl ScoreSource {
    fn to_table(&self) -> RewardSource {
        let table = RewardSource::default();
        match self.clone() {
            ScoreSource::Model(start) => RewardSource { model: Some(start.model), shape: start.shape, ..table },
            ScoreSource::Url { url, timeout_s, retries } => {
                RewardSource { url: Some(url), timeout_s, retries, ..table }
            }
            ScoreSource::Command { command, folder, num_cpus, timeout_s } => {
                RewardSource { command: Some(command), command_dir: Some(folder), num_cpus, timeout_s, ..table }
            }
            ScoreSource::Rule(rule) => rule.to_table(),
        }
    }
}

impl Rule {
    fn to_table(&self) -> RewardSource {
        let mut table = RewardSource::default();
        match self.clone() {
            Rule::Math { tolerance } => {
                table.rule = Some(RuleName::Math);
                table.tolerance = Some(tolerance);
            }
            Rule::Regex { pattern } => {
                table.rule = Some(RuleName::Regex);
                table.pattern = Some(pattern);
            }
            Rule::Length { min_tokens, max_tokens } => {
                table.rule = Some(RuleName::Length);
                table.min_tokens = Some(min_tokens);
                table.max_tokens = max_tokens;
            }
            Rule::Format { structure } => {
                table.rule = Some(RuleName::Format);
                table.structure = Some(structure);
            }
            Rule::Sentiment { lexicon } => {
                table.rule = Some(RuleName::Sentiment);
                table.lexicon = Some(lexicon);
            }
        }
        table
    }
}
