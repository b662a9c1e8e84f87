//! The five roles of PPO, and the handles through which the driver asks them.
//!
//! A handle is a [`WorkerGroup`]: one endpoint per rank. Behind an endpoint is a worker, in this process or another.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::divide::Divide;
use crate::error::{Error, Result};
use crate::experience::Experience;
use crate::rollout::{Prompts, Rollout, SamplingConfig};
use crate::verb::*;

/// Who is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Actor,
    Critic,
    Reference,
    Reward,
    Generator,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Actor => "actor",
            Role::Critic => "critic",
            Role::Reference => "reference",
            Role::Reward => "reward",
            Role::Generator => "generator",
        })
    }
}

pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + 'a>>;

/// One rank that answers `V`.
pub trait Endpoint<V: Verb> {
    fn call(&self, request: V) -> Answer<'_, V::Reply>;
}

/// The ranks of one role; `E` says which verbs they answer.
pub struct WorkerGroup<E: ?Sized> {
    role: Role,
    ranks: Vec<Arc<E>>,
}

impl<E: ?Sized> WorkerGroup<E> {
    /// # Panics
    /// Without a rank: a group is at least one.
    pub fn new(role: Role, ranks: Vec<Arc<E>>) -> WorkerGroup<E> {
        assert!(!ranks.is_empty(), "a worker group has at least one rank");
        WorkerGroup { role, ranks }
    }

    /// Runs one verb on the group, with a span that times it and the role and rank on its error.
    async fn call<V: Divide>(&self, request: V) -> Result<V::Reply>
    where
        E: Endpoint<V>,
    {
        let begun = Instant::now();
        let answer = match self.ranks.as_slice() {
            [only] => only.call(request).await.map_err(|cause| self.failed(0, V::NAME, cause)),
            ranks => self.call_all(ranks, request).await,
        };
        tracing::debug!(role = %self.role, verb = V::NAME, seconds = begun.elapsed().as_secs_f64(), "call");
        answer
    }

    /// Every rank answers its share; the first failure to arrive is the group's.
    async fn call_all<V: Divide>(&self, ranks: &[Arc<E>], request: V) -> Result<V::Reply>
    where
        E: Endpoint<V>,
    {
        let (requests, shares) = request.divide(ranks.len());
        let calls = ranks.iter().zip(requests).enumerate().map(|(rank, (endpoint, request))| async move {
            endpoint.call(request).await.map_err(|cause| self.failed(rank, V::NAME, cause))
        });
        V::unite(try_join_all(calls).await?, &shares)
    }

    fn failed(&self, rank: usize, verb: &'static str, cause: Error) -> Error {
        match cause {
            Error::Interrupted => Error::Interrupted,
            cause => Error::Worker { role: self.role, rank, verb, cause: Box::new(cause) },
        }
    }
}

/// What an actor rank answers.
pub trait ActorRank:
    Endpoint<Logprobs> + Endpoint<UpdateActor> + Endpoint<Publish> + Endpoint<Save> + Endpoint<Restore> + Endpoint<Export>
{
}
impl<T> ActorRank for T where
    T: Endpoint<Logprobs>
        + Endpoint<UpdateActor>
        + Endpoint<Publish>
        + Endpoint<Save>
        + Endpoint<Restore>
        + Endpoint<Export>
{
}

/// What a critic rank answers.
pub trait CriticRank:
    Endpoint<Values> + Endpoint<UpdateCritic> + Endpoint<Save> + Endpoint<Restore> + Endpoint<Export>
{
}
impl<T> CriticRank for T where
    T: Endpoint<Values> + Endpoint<UpdateCritic> + Endpoint<Save> + Endpoint<Restore> + Endpoint<Export>
{
}

pub type ActorGroup = WorkerGroup<dyn ActorRank>;
pub type CriticGroup = WorkerGroup<dyn CriticRank>;
pub type ReferenceGroup = WorkerGroup<dyn Endpoint<Logprobs>>;
pub type RewardGroup = WorkerGroup<dyn Endpoint<Scores>>;
pub type GeneratorGroup = WorkerGroup<dyn Endpoint<Generate>>;

impl ActorGroup {
    /// `[B, T]` log π_old(token | prefix), 0 off the response mask.
    pub async fn logprobs(&self, rollout: &Rollout) -> Result<Tensor> {
        self.call(Logprobs { role: Role::Actor, tokens: rollout.tokens() }).await
    }

    /// One optimizer step on the mini-batch.
    pub async fn update(&self, experience: Experience, kl_coef: f64) -> Result<ActorReport> {
        let num_tokens = experience.num_response_tokens();
        self.call(UpdateActor { experience, num_tokens, kl_coef }).await
    }

    /// Gives the generators the new weights; returns the policy version they then hold.
    pub async fn publish_weights(&self, _generator: &GeneratorGroup) -> Result<u64> {
        self.call(Publish).await
    }

    pub async fn save(&self, request: Save) -> Result<()> {
        self.call(request).await
    }

    pub async fn restore(&self, request: Restore) -> Result<()> {
        self.call(request).await
    }

    pub async fn export(&self, request: Export) -> Result<()> {
        self.call(request).await
    }
}

impl CriticGroup {
    /// `[B, T]` V(prefix), 0 off the response mask.
    pub async fn values(&self, rollout: &Rollout) -> Result<Tensor> {
        self.call(Values { tokens: rollout.tokens() }).await
    }

    /// One optimizer step on the mini-batch.
    pub async fn update(&self, experience: Experience) -> Result<CriticReport> {
        let num_tokens = experience.num_response_tokens();
        self.call(UpdateCritic { experience, num_tokens }).await
    }

    pub async fn save(&self, request: Save) -> Result<()> {
        self.call(request).await
    }

    pub async fn restore(&self, request: Restore) -> Result<()> {
        self.call(request).await
    }
}

impl ReferenceGroup {
    /// `[B, T]` log π_ref(token | prefix), 0 off the response mask.
    pub async fn logprobs(&self, rollout: &Rollout) -> Result<Tensor> {
        self.call(Logprobs { role: Role::Reference, tokens: rollout.tokens() }).await
    }
}

impl RewardGroup {
    /// `[B]` scores of the reward model, raw.
    pub async fn scores(&self, rollout: &Rollout) -> Result<Tensor> {
        let request =
            Scores { tokens: rollout.tokens(), prompts: rollout.prompts.clone(), responses: rollout.responses.clone() };
        self.call(request).await
    }
}

impl GeneratorGroup {
    /// Samples `samples_per_prompt` responses to every prompt.
    pub async fn generate(&self, prompts: Prompts, sampling: &SamplingConfig) -> Result<Rollout> {
        self.call(Generate { prompts, sampling: sampling.clone() }).await
    }
}

/// What scores responses: a reward model, rules, a server, a program, or several with weights.
pub trait Reward {
    fn scores<'a>(&'a self, rollout: &'a Rollout) -> Answer<'a, ScoredRollout>;
}

/// Scores of a rollout.
#[derive(Debug)]
pub struct ScoredRollout {
    /// `[B]` f64: the weighted sum over sources.
    pub scores: Tensor,
    /// Mean score of each source, where there are several.
    pub source_means: Vec<(String, f64)>,
}

/// The handles a PPO step works with.
pub struct Roles {
    pub actor: ActorGroup,
    pub critic: CriticGroup,
    /// None when the KL coefficient is 0: it is not even loaded.
    pub reference: Option<ReferenceGroup>,
    pub reward: Box<dyn Reward>,
    pub generator: GeneratorGroup,
}
