//! The ranks of a role, as the driver asks them: one call on a group divides the rows, runs on all ranks, and unites the
//! answers in row order.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use futures_util::future::try_join_all;
use tch::Tensor;

use super::{Rank, Reply, Request, Verb};
use crate::data::{Report, Rows};
use crate::error::{Error, Result};
use crate::role::Role;

pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + 'a>>;

/// One rank that answers `V`. Behind it is a worker, in this process or another.
pub trait Endpoint<V: Verb> {
    fn call(&self, request: Request<V>) -> Answer<'_, V::Reply>;
}

/// One call on a group, from its beginning to its end.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub role: Role,
    pub verb: &'static str,
    /// Tokens of the rows that were sent.
    pub tokens: i64,
    pub began: Instant,
    pub ended: Instant,
}

/// The calls on all groups of a run that have ended. Clones are the same list.
#[derive(Clone, Debug, Default)]
pub struct Calls(Arc<Mutex<Vec<Span>>>);

impl Calls {
    /// Those since this was last asked.
    pub fn take(&self) -> Vec<Span> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn ended(&self, span: Span) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(span);
    }
}

/// The ranks of one role.
pub struct WorkerGroup {
    role: Role,
    ranks: Vec<Arc<dyn Rank>>,
    /// Neighbouring ranks that hold slices of one model and answer the same rows together.
    tensor_parallel: usize,
    /// Its weights are the actor's own tensors, or are filled by the actor's workers.
    follows_actor: bool,
    calls: Calls,
}

impl WorkerGroup {
    /// # Panics
    /// Without a rank: a group is at least one.
    pub fn new(role: Role, ranks: Vec<Arc<dyn Rank>>, calls: Calls) -> WorkerGroup {
        assert!(!ranks.is_empty(), "a worker group has at least one rank");
        WorkerGroup { role, ranks, tensor_parallel: 1, follows_actor: true, calls }
    }

    /// The same ranks, `size` neighbours at a time as one.
    ///
    /// # Panics
    /// The ranks are no multiple of `size`.
    #[must_use]
    pub fn tensor_parallel(self, size: usize) -> WorkerGroup {
        assert!(size > 0 && self.ranks.len().is_multiple_of(size), "{} ranks in parts of {size}", self.ranks.len());
        WorkerGroup { tensor_parallel: size, ..self }
    }

    /// The same ranks on workers of their own: new weights must be sent to them.
    #[must_use]
    pub fn apart_from_actor(self) -> WorkerGroup {
        WorkerGroup { follows_actor: false, ..self }
    }

    pub fn follows_actor(&self) -> bool {
        self.follows_actor
    }

    pub fn num_ranks(&self) -> usize {
        self.ranks.len()
    }

    /// Runs one verb on the group; its time is kept, and role and rank are on its error.
    pub(super) async fn call<V: Verb>(&self, verb: V, rows: Rows) -> Result<V::Reply>
    where
        dyn Rank: Endpoint<V>,
    {
        let (began, tokens) = (Instant::now(), rows.num_tokens());
        let request = Request { role: Some(self.role), verb, rows };
        let answer = match self.ranks.as_slice() {
            [only] => only.call(request).await.map_err(|cause| self.failed(0, V::NAME, cause)),
            ranks => self.call_all(ranks, request).await,
        };
        let ended = Instant::now();
        tracing::debug!(role = %self.role, verb = V::NAME, seconds = (ended - began).as_secs_f64(), "call");
        self.calls.ended(Span { role: self.role, verb: V::NAME, tokens, began, ended });
        answer
    }

    /// Every rank answers its share, tensor-parallel neighbours the same one; the first failure to arrive is the group's.
    async fn call_all<V: Verb>(&self, ranks: &[Arc<dyn Rank>], request: Request<V>) -> Result<V::Reply>
    where
        dyn Rank: Endpoint<V>,
    {
        let size = self.tensor_parallel;
        let (requests, shares) = V::divide(request, ranks.len() / size);
        let requests = requests.into_iter().flat_map(|request| {
            let again: Vec<Request<V>> = (1..size).map(|_| request.with(request.rows.shallow_clone())).collect();
            std::iter::once(request).chain(again)
        });
        let calls = ranks.iter().zip(requests).enumerate().map(|(rank, (endpoint, request))| async move {
            endpoint.call(request).await.map_err(|cause| self.failed(rank, V::NAME, cause))
        });
        let replies = try_join_all(calls).await?;
        V::Reply::unite(replies.into_iter().step_by(size).collect(), &shares)
    }

    fn failed(&self, rank: usize, verb: &'static str, cause: Error) -> Error {
        match cause {
            Error::Interrupted => Error::Interrupted,
            cause => Error::Worker { role: self.role, rank, verb, cause: Box::new(cause) },
        }
    }
}

/// What scores responses: a reward model, rules, a server, a program, or several with weights.
pub trait Reward {
    fn scores<'a>(&'a self, rows: &'a Rows) -> Answer<'a, Scored>;
}

/// Scores of rows.
#[derive(Debug)]
pub struct Scored {
    /// `[B]` f64: the weighted sum over sources.
    pub scores: Tensor,
    /// The mean score of each source, where there are several.
    pub report: Report,
}

/// The handles that an algorithm works with.
pub struct Roles {
    pub groups: BTreeMap<Role, WorkerGroup>,
    /// None where nothing is scored.
    pub reward: Option<Box<dyn Reward>>,
    /// What was asked of them.
    pub calls: Calls,
}

impl Roles {
    /// None where this run has no such role, such as the reference when the KL coefficient is 0: it is not even loaded.
    pub fn get(&self, role: Role) -> Option<&WorkerGroup> {
        self.groups.get(&role)
    }

    /// # Panics
    /// The run has no such role: an algorithm asks for those of its workload.
    pub fn group(&self, role: Role) -> &WorkerGroup {
        self.get(role).unwrap_or_else(|| panic!("this run has no {role}"))
    }

    pub fn actor(&self) -> &WorkerGroup {
        self.group(Role::Actor)
    }

    pub fn critic(&self) -> &WorkerGroup {
        self.group(Role::Critic)
    }

    pub fn generator(&self) -> &WorkerGroup {
        self.group(Role::Generator)
    }

    /// `[B, T]` log π_ref(token | prefix); None without a reference.
    pub async fn ref_logprobs(&self, rows: &Rows) -> Result<Option<Tensor>> {
        match self.get(Role::Reference) {
            Some(reference) => Ok(Some(reference.logprobs(rows).await?)),
            None => Ok(None),
        }
    }

    /// # Errors
    /// A source that cannot score; a run without one.
    pub async fn scores(&self, rows: &Rows) -> Result<Scored> {
        let reward = self.reward.as_ref().ok_or_else(|| Error::Refused("this run scores nothing".into()))?;
        let began = Instant::now();
        let scored = reward.scores(rows).await?;
        self.calls.ended(Span { role: Role::Reward, verb: "scores", tokens: 0, began, ended: Instant::now() });
        Ok(scored)
    }
}
