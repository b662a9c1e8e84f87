//! The five roles of PPO, and the handles through which the driver asks them.
//!
//! A handle is a [`WorkerGroup`]: one endpoint per rank. Behind an endpoint is a worker, in this process or another.

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use echelon_schema::{Choice, scalar_value};
use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::divide::Divide;
use crate::error::{Error, Result};
use crate::experience::Experience;
use crate::rollout::{Prompts, Rollout, SamplingConfig, Tokens};
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

/// In the order in which the recipe's reference lists them; that of the enum is the planner's.
impl Choice for Role {
    const ALL: &'static [(Self, &'static str, &'static str)] = &[
        (Role::Actor, "actor", "The policy being trained."),
        (Role::Critic, "critic", "The value model."),
        (Role::Reward, "reward", "The reward model."),
        (Role::Reference, "reference", "The frozen policy."),
        (Role::Generator, "generator", "The sampling engine."),
    ];
}

scalar_value!(Role);

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
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
    /// Neighbouring ranks that hold slices of one model and answer the same rows together.
    tensor_parallel: usize,
    /// Its weights are the actor's own tensors, or are filled by the actor's workers.
    follows_actor: bool,
}

impl<E: ?Sized> WorkerGroup<E> {
    /// # Panics
    /// Without a rank: a group is at least one.
    pub fn new(role: Role, ranks: Vec<Arc<E>>) -> WorkerGroup<E> {
        assert!(!ranks.is_empty(), "a worker group has at least one rank");
        WorkerGroup { role, ranks, tensor_parallel: 1, follows_actor: true }
    }

    /// The same ranks, `size` neighbours at a time as one.
    ///
    /// # Panics
    /// The ranks are no multiple of `size`.
    #[must_use]
    pub fn tensor_parallel(self, size: usize) -> WorkerGroup<E> {
        assert!(size > 0 && self.ranks.len().is_multiple_of(size), "{} ranks in parts of {size}", self.ranks.len());
        WorkerGroup { tensor_parallel: size, ..self }
    }

    /// The same ranks on workers of their own: new weights must be sent to them.
    #[must_use]
    pub fn apart_from_actor(self) -> WorkerGroup<E> {
        WorkerGroup { follows_actor: false, ..self }
    }

    pub fn num_ranks(&self) -> usize {
        self.ranks.len()
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

    /// Every rank answers its share, tensor-parallel neighbours the same one; the first failure to arrive is the group's.
    async fn call_all<V: Divide>(&self, ranks: &[Arc<E>], request: V) -> Result<V::Reply>
    where
        E: Endpoint<V>,
    {
        let size = self.tensor_parallel;
        let (requests, shares) = request.divide(ranks.len() / size);
        let requests = requests.into_iter().flat_map(|request| {
            let again: Vec<V> = (1..size).map(|_| request.again()).collect();
            std::iter::once(request).chain(again)
        });
        let calls = ranks.iter().zip(requests).enumerate().map(|(rank, (endpoint, request))| async move {
            endpoint.call(request).await.map_err(|cause| self.failed(rank, V::NAME, cause))
        });
        let replies = try_join_all(calls).await?;
        V::unite(replies.into_iter().step_by(size).collect(), &shares)
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

/// What a generator rank answers.
pub trait GeneratorRank: Endpoint<Generate> + Endpoint<Publish> {}
impl<T> GeneratorRank for T where T: Endpoint<Generate> + Endpoint<Publish> {}

/// What a rank of a model that learns from examples answers.
pub trait LearnerRank:
    Endpoint<Learn> + Endpoint<Assess> + Endpoint<Save> + Endpoint<Restore> + Endpoint<Export>
{
}
impl<T> LearnerRank for T where
    T: Endpoint<Learn> + Endpoint<Assess> + Endpoint<Save> + Endpoint<Restore> + Endpoint<Export>
{
}

pub type ActorGroup = WorkerGroup<dyn ActorRank>;
pub type CriticGroup = WorkerGroup<dyn CriticRank>;
pub type ReferenceGroup = WorkerGroup<dyn Endpoint<Logprobs>>;
pub type RewardGroup = WorkerGroup<dyn Endpoint<Scores>>;
pub type GeneratorGroup = WorkerGroup<dyn GeneratorRank>;
pub type LearnerGroup = WorkerGroup<dyn LearnerRank>;

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

    /// Gives the generators the weights as they are now, as `policy_version`. Nothing is sent where they compute on the
    /// actor's own tensors.
    pub async fn publish_weights(&self, generator: &GeneratorGroup, policy_version: u64) -> Result<()> {
        let request = Publish { policy_version };
        if generator.follows_actor {
            return self.call(request).await;
        }
        // Both ends of a collective: neither returns without the other.
        let (sent, received) = futures_util::future::join(self.call(request.clone()), generator.publish(request)).await;
        sent.and(received)
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

impl LearnerGroup {
    /// One optimizer step on the batch.
    pub async fn learn(&self, request: Learn) -> Result<LearnReport> {
        self.call(request).await
    }

    /// `[B]` f64: of each row the log-prob of its learned tokens, or its score.
    pub async fn assess(&self, rows: &Tokens) -> Result<Tensor> {
        self.call(Assess { rows: rows.shallow_clone() }).await
    }

    pub async fn save(&self, file: PathBuf) -> Result<()> {
        self.call(Save { role: self.role, file }).await
    }

    pub async fn restore(&self, file: PathBuf) -> Result<()> {
        self.call(Restore { role: self.role, file }).await
    }

    pub async fn export(&self, folder: PathBuf, score_statistics: Option<(f64, f64)>) -> Result<()> {
        self.call(Export { role: self.role, folder, score_statistics }).await
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
    /// Takes up the weights that the actor's ranks send at the same time.
    pub async fn publish(&self, request: Publish) -> Result<()> {
        self.call(request).await
    }

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
