//! What can be asked of a role: one type per request, with the type of its answer.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::Result;
use crate::experience::Experience;
use crate::memory::MemoryReport;
use crate::role::Role;
use crate::rollout::{Prompts, Rollout, SamplingConfig, Tokens};

/// A request with a typed answer.
pub trait Verb: Send + 'static {
    type Reply: Send + 'static;
    /// As it stands in errors and traces.
    const NAME: &'static str;
}

/// What holds the roles of one device; runs on that device's thread, one request at a time.
pub trait Serve<V: Verb> {
    fn serve(&mut self, request: V) -> Result<V::Reply>;
}

/// Sample responses.
#[derive(Clone)]
pub struct Generate {
    pub prompts: Prompts,
    pub sampling: SamplingConfig,
}

/// `[B, T]` log-probs of the masked tokens, by the actor or the reference.
pub struct Logprobs {
    pub role: Role,
    pub tokens: Tokens,
}

/// `[B, T]` values of the masked tokens' prefixes.
pub struct Values {
    pub tokens: Tokens,
}

/// `[B]` scores by the reward model; the texts serve one with another tokenizer.
pub struct Scores {
    pub tokens: Tokens,
    pub prompts: Vec<String>,
    pub responses: Vec<String>,
}

/// One optimizer step of the actor on a mini-batch.
pub struct UpdateActor {
    pub experience: Experience,
    /// Response tokens of the whole mini-batch, over all ranks.
    pub num_tokens: f64,
    /// Weight of a KL term in the loss; unused when the KL is in the reward.
    pub kl_coef: f64,
}

/// One optimizer step of the critic on a mini-batch.
pub struct UpdateCritic {
    pub experience: Experience,
    pub num_tokens: f64,
}

/// One optimizer step of a model that learns from examples.
pub struct Learn {
    /// The mask says which tokens are learned.
    pub rows: Tokens,
    /// Neighbouring rows that belong together: 2 of a pair.
    pub rows_per_example: usize,
    /// Tokens to learn, or pairs, of the whole batch, over all ranks: the loss is their mean.
    pub num_learned: f64,
    pub lr: f64,
}

/// `[B]` f64, one number per row: the log-prob of its learned tokens together, or its score.
pub struct Assess {
    pub rows: Tokens,
}

/// Make the actor's weights the generators', as this version of the policy. The actor's ranks and those of generators with
/// weights of their own answer it together.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Publish {
    pub policy_version: u64,
}

/// Write a trainable role's whole training state to a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Save {
    pub role: Role,
    pub file: PathBuf,
}

/// Take up the training state that [`Save`] wrote.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Restore {
    pub role: Role,
    pub file: PathBuf,
}

/// Write a role's weights as a Hugging Face folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Export {
    pub role: Role,
    pub folder: PathBuf,
    /// Mean and standard deviation of a reward model's scores on held-out rows, for its `config.json`.
    pub score_statistics: Option<(f64, f64)>,
}

/// Say what the rank's device was metered at since it was last asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Memory;

/// Say how many floating-point operations per second a large matrix product reaches on the rank's device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MatmulRate;

/// What one optimizer step of the actor did. Means are over response tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ActorReport {
    pub policy_loss: f64,
    pub kl_loss: f64,
    pub entropy: f64,
    /// Fraction of tokens whose clipped term was the smaller one.
    pub clip_fraction: f64,
    /// Mean of old_logprobs − logprobs (k1), OpenRLHF's `ppo_kl`.
    pub ppo_kl: f64,
    /// Mean k3 estimate between the old and the new policy.
    pub approx_kl: f64,
    pub ratio_max: f64,
    pub grad_norm: f64,
    pub lr: f64,
    /// Importance ratios of the tokens, for a histogram.
    pub ratios: Vec<f32>,
    /// Tokens forwarded and learned from.
    pub num_tokens: i64,
    /// Those of them that are the policy's own.
    pub response_tokens: f64,
}

/// What one optimizer step of the critic did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CriticReport {
    pub critic_loss: f64,
    pub clip_fraction: f64,
    pub values_mean: f64,
    pub grad_norm: f64,
    pub lr: f64,
    pub num_tokens: i64,
    pub response_tokens: f64,
}

/// What one optimizer step of a model that learns from examples did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LearnReport {
    /// Mean over the batch's learned tokens, or its pairs.
    pub loss: f64,
    /// Part of the pairs whose chosen side scored higher; 0 where there are no pairs.
    pub accuracy: f64,
    pub grad_norm: f64,
    pub lr: f64,
    /// Tokens forwarded and learned from.
    pub num_tokens: i64,
}

macro_rules! verbs {
    ($($verb:ty => $reply:ty, $name:literal;)*) => {
        $(impl Verb for $verb { type Reply = $reply; const NAME: &'static str = $name; })*
    };
}

verbs! {
    Generate => Rollout, "generate";
    Logprobs => Tensor, "logprobs";
    Values => Tensor, "values";
    Scores => Tensor, "scores";
    UpdateActor => ActorReport, "update";
    UpdateCritic => CriticReport, "update";
    Learn => LearnReport, "learn";
    Assess => Tensor, "assess";
    Publish => (), "publish";
    Save => (), "save";
    Restore => (), "restore";
    Export => (), "export";
    Memory => MemoryReport, "memory";
    MatmulRate => f64, "measure products";
}
