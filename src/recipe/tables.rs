//! The tables of a recipe whose run learns from its own responses. A field's doc comment, default and range are all there is
//! to know about a key: the reference page, the error messages and `recipe.resolved.toml` are made from them.
//!
//! Defaults are OpenRLHF's.

use std::path::PathBuf;

use echelon_algorithms::{Algorithm, OnPolicy};
use echelon_core::compute::Compute;
use echelon_core::optimizer::Optimizer;
use echelon_generation::keys::Generation;
use echelon_placement::devices::Placement;
use echelon_schema::{MOST, ModelSource, NewPath, Origins, above, above_to, at_least, between, table};
use echelon_tasks::reward::SourceKeys;

table! {
    /// A run that learns from its own responses.
    pub struct Recipe<K: OnPolicy> {
        inline origins: Origins;
        /// Names the run folder `runs/<name>/`. Default: the recipe's file name.
        pub name: String = String::new();
        /// Every random number of the run follows from it: data order, sampling, fresh weights.
        pub seed: u64 = 42, in at_least(0.0);
        /// The policy that is trained.
        pub actor: Actor = Actor::default();
        /// The value model that is trained beside it.
        pub critic: Critic = Critic::default(), when K::has_critic();
        /// The frozen policy that the KL penalty is measured against; not loaded at all when `ppo.kl_coef = 0`.
        pub reference: Reference = Reference::default();
        /// Where scores come from: one source in this table, or several `[[reward.mix]]` tables.
        pub reward: Reward = Reward::default();
        /// The prompts: one source in this table, or several `[[data.mix]]` tables.
        pub data: Data = Data::default();
        /// What one step samples.
        pub rollout: Rollout = Rollout::default();
        /// How a step learns from its rollout.
        pub keys: K = K::default(), named K::Algorithm::NAME;
        /// Length of the run, numbers and memory.
        pub train: Train = Train::default();
        /// The engine that samples.
        pub generation: Generation = Generation::default();
        /// Which devices do what.
        pub placement: Placement = Placement::default();
        /// What is saved to resume from.
        pub checkpoint: Checkpoint = Checkpoint::default();
        /// Held-out prompts, scored before the first step, during the run and after the last.
        pub eval: Eval = Eval::default();
    }
}

table! {
    /// The policy that is trained.
    pub struct Actor {
        /// Hugging Face folder, or hub id `owner/name`.
        pub model: ModelSource;
        /// Folder with the model's `config.json`, enough for `--plan` where the weights are not at hand.
        pub shape: Option<PathBuf> = None;
        /// AdamW of the actor.
        pub optimizer: Optimizer = Optimizer::default();
    }
}

table! {
    /// The value model that is trained beside the actor.
    pub struct Critic {
        /// Where it starts. Default: the reward model if there is one, else the actor's backbone with a fresh value head.
        pub model: Option<ModelSource> = None;
        /// Folder with its `config.json`, for `--plan`.
        pub shape: Option<PathBuf> = None;
        /// AdamW of the critic.
        pub optimizer: Optimizer = Optimizer { lr: 9e-6, ..Optimizer::default() };
    }
}

table! {
    /// The frozen policy that the KL penalty is measured against.
    pub struct Reference {
        /// Default: the weights that the actor starts from.
        pub model: Option<ModelSource> = None;
        /// Folder with its `config.json`, for `--plan`.
        pub shape: Option<PathBuf> = None;
        /// Keep its weights in host memory and bring them to the device only for its turn.
        pub offload: bool = false;
    }
}

table! {
    /// Where scores come from.
    pub struct Reward {
        inline source: SourceKeys;
        /// Scores are clipped to this range.
        pub clip_range: Option<[f64; 2]> = Some([-10.0, 10.0]);
        /// Subtract the reward model's stored mean from its scores and divide by its stored standard deviation. In a mix this
        /// comes before the weights, and the other sources keep their scores.
        pub normalize: bool = false;
        /// Subtracted from the score of a response that reached `max_new_tokens` without ending.
        pub missing_eos_penalty: Option<f64> = None;
        /// Several sources, added up by weight.
        pub mix: Vec<RewardMix> = Vec::new();
    }
}

table! {
    /// Each has one source, with the keys of `[reward]`, and its weight.
    pub struct RewardMix {
        inline source: SourceKeys;
        /// Factor of this source's score; negative to punish.
        pub weight: f64 = 1.0;
    }
}

table! {
    /// The prompts.
    pub struct Data {
        /// File or folder of jsonl, json or parquet.
        pub prompts: Option<PathBuf> = None;
        /// Key of a row's prompt: a string, or a list of chat messages.
        pub prompt_key: String = String::from("prompt");
        /// Key of a row's label, handed to the reward.
        pub label_key: Option<String> = None;
        /// Wrap each prompt in the actor's chat template.
        pub apply_chat_template: bool = false;
        /// System message put before each prompt; needs `apply_chat_template`.
        pub system_prompt: Option<String> = None;
        /// Prompts with more tokens are left out, and counted.
        pub max_prompt_tokens: usize = 1024, in between(1.0, MOST);
        /// Use the first so many rows of all sources.
        pub max_samples: Option<usize> = None, in at_least(1.0);
        /// Several sources, drawn from by weight.
        pub mix: Vec<DataMix> = Vec::new();
    }
}

table! {
    /// Each names one source.
    pub struct DataMix {
        /// File or folder of jsonl, json or parquet.
        pub prompts: PathBuf;
        /// Share of this source among all, relative to the other weights.
        pub weight: f64 = 1.0, in above(0.0);
        /// Default: that of `[data]`.
        pub prompt_key: Option<String> = None;
        /// Default: that of `[data]`.
        pub label_key: Option<String> = None;
    }
}

table! {
    /// What one step samples.
    pub struct Rollout {
        /// Prompts per step.
        pub batch_size: usize = 1024, in between(1.0, MOST);
        /// Responses sampled for each prompt.
        pub samples_per_prompt: usize = 1, in between(1.0, MOST);
        /// A response ends after so many tokens.
        pub max_new_tokens: usize = 1024, in between(1.0, MOST);
        /// Logits are divided by it, for sampling and for log-probabilities.
        pub temperature: f64 = 1.0, in above_to(0.0, 100.0);
        /// Sample among the likeliest tokens whose probabilities sum to this.
        pub top_p: f64 = 1.0, in above_to(0.0, 1.0);
        /// Sample among this many likeliest tokens.
        pub top_k: Option<usize> = None, in at_least(1.0);
        /// Leave out tokens less likely than this part of the likeliest one's probability.
        pub min_p: f64 = 0.0, in between(0.0, 1.0);
        /// Strings that end a response, beside the model's own end tokens.
        pub stop: Vec<String> = Vec::new();
        /// Keep every step's rollout in this folder, for `replay`.
        pub record: Option<NewPath> = None;
        /// Take the rollouts from this folder instead of sampling: what is learned from equal rollouts can be compared.
        pub replay: Option<PathBuf> = None;
    }
}

table! {
    /// Length of the run, numbers and memory.
    pub struct Train {
        /// Steps of the run: each is one rollout and its optimizer steps.
        pub steps: usize = 100, in at_least(1.0);
        /// Measure this machine after the first step, for some ten seconds, and say beside every step what the planner expects
        /// of it: `perf/planned_*`.
        pub calibrate: bool = false;
        inline_last compute: Compute;
    }
}

table! {
    /// What is saved to resume from.
    pub struct Checkpoint {
        /// Save every so many steps. A stopped run saves too.
        pub every_steps: Option<usize> = Some(50), in at_least(1.0);
        /// Newest checkpoints kept.
        pub keep: usize = 3, in at_least(1.0);
        /// Also keep the checkpoint in which this eval metric was best: highest, or lowest for a loss and a perplexity.
        pub best_metric: Option<String> = None;
    }
}

table! {
    /// Held-out prompts.
    pub struct Eval {
        /// File or folder, with the keys of `[data]`. Default: no evaluation.
        pub prompts: Option<PathBuf> = None;
        /// Evaluate every so many steps, beside before and after the run.
        pub every_steps: Option<usize> = None, in at_least(1.0);
        /// Responses sampled for each prompt.
        pub samples_per_prompt: usize = 4, in between(1.0, MOST);
        /// Sampling temperature; 0 takes the likeliest token.
        pub temperature: f64 = 0.6, in between(0.0, 100.0);
        /// Use the first so many prompts.
        pub max_samples: Option<usize> = None, in at_least(1.0);
    }
}
