//! The driver's end of other nodes: sends calls to their workers in batches, and sends them elsewhere when a worker is lost.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use echelon_core::Error;
use prost::Message;
use tokio::runtime::Handle;

use super::ATTEMPTS;
use super::demand::NodeConfig;
use super::error::TaskError;
use super::schedule::{Entry, NodeId, Started};
use super::server::read;
use super::tasks::{Core, Job, OWN, Queued, State};
use super::wire::{Batch, Outcomes, VERB};
use crate::control::{ControlError, RemoteWorker};

/// No task takes so long. Its caller sets the deadline that counts; a worker that is gone is noticed without any.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

/// Before a worker that has too many calls of roles is asked again.
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// The workers of the other nodes.
#[derive(Default)]
pub(super) struct Peers {
    by_node: HashMap<NodeId, Vec<Peer>>,
    next: u64,
}

struct Peer {
    number: u64,
    worker: RemoteWorker,
    in_flight: usize,
    handle: Handle,
}

impl Peers {
    fn of(&mut self, node: NodeId) -> &mut Vec<Peer> {
        self.by_node.entry(node).or_default()
    }

    /// A worker ends a call, or is gone.
    fn find(&mut self, node: NodeId, number: u64) -> Option<&mut Peer> {
        self.of(node).iter_mut().find(|peer| peer.number == number)
    }
}

/// See [`super::Tasks::add_worker`].
pub(super) fn add_worker(core: &Arc<Core>, config: &NodeConfig, worker: RemoteWorker) -> Result<(), TaskError> {
    let unfit = |cause: String| TaskError::Start { node: config.name.clone(), cause };
    if config.name == core.name {
        return Err(unfit("it is the node of this process: its tasks need no worker".into()));
    }
    let handle = Handle::try_current().map_err(|error| unfit(error.to_string()))?;
    let mut state = core.lock();
    let node = state.schedule.add_node(config).map_err(unfit)?;
    let number = state.peers.next;
    state.peers.next += 1;
    state.peers.of(node).push(Peer { number, worker, in_flight: 0, handle });
    core.advance(state, node);
    Ok(())
}

/// Calls on their way to a worker and back.
struct Flight {
    core: Arc<Core>,
    node: NodeId,
    node_name: String,
    peer: u64,
    worker: RemoteWorker,
    /// None once it was given back.
    started: Option<Started>,
    batch: Vec<Entry<Queued>>,
}

impl Core {
    /// Sends what can begin on another node.
    pub(super) fn send_off(self: &Arc<Core>, mut state: MutexGuard<'_, State>, node: NodeId) {
        let (mut flights, mut dead) = (Vec::new(), Vec::new());
        loop {
            let State { schedule, peers, closed, .. } = &mut *state;
            let Some(peer) = peers.of(node).iter_mut().min_by_key(|peer| peer.in_flight).filter(|_| !*closed) else {
                break;
            };
            let mut batch = Vec::new();
            let Some(started) = schedule.start(node, &mut batch, &mut dead) else { break };
            peer.in_flight += 1;
            let (worker, handle) = (peer.worker.clone(), peer.handle.clone());
            let node_name = schedule.name(node).to_owned();
            let flight = Flight {
                core: self.clone(),
                node,
                node_name,
                peer: peer.number,
                worker,
                started: Some(started),
                batch,
            };
            flights.push((handle, flight));
        }
        drop(state);
        drop(dead);
        for (handle, flight) in flights {
            handle.spawn(flight.fly());
        }
    }

    /// A worker is gone. With the last of its node, the node is: what waited for it goes elsewhere.
    fn lose_peer(self: &Arc<Core>, node: NodeId, peer: u64, cause: &str) {
        let mut state = self.lock();
        let peers = state.peers.of(node);
        peers.retain(|known| known.number != peer);
        if !peers.is_empty() || !state.schedule.is_alive(node) {
            return;
        }
        let name = state.schedule.name(node).to_owned();
        let stranded = state.schedule.lose(node);
        drop(state);
        tracing::warn!(node = name, cause, waiting = stranded.len(), "node lost: its tasks run elsewhere");
        for entry in stranded {
            self.place_again(entry, (&name, cause));
        }
    }
}

impl Flight {
    async fn fly(mut self) {
        self.batch.retain(|entry| entry.work.stage.begin());
        self.batch.iter_mut().for_each(|entry| entry.work.attempts += 1);
        let Some(body) = self.body() else { return self.land(0, 0, 0) };
        let begun = Instant::now();
        let outcome = loop {
            match self.worker.call(VERB, body.clone(), LONGEST).await {
                Err(ControlError::Busy { .. }) => tokio::time::sleep(BUSY_PAUSE).await,
                outcome => break outcome,
            }
        };
        let took_ns = begun.elapsed().as_nanos() as u64;
        match outcome {
            Ok(answer) => self.take(answer, took_ns),
            Err(ControlError::Lost { cause, .. }) => self.lose(&cause),
            Err(ControlError::Stopped) => self.lose("the control plane has stopped"),
            // It still holds what it was granted: the books say so until the worker is lost.
            Err(error @ ControlError::Deadline { .. }) => {
                self.started = None;
                self.fail(&error.to_string());
            }
            Err(error) => self.refused(&error),
        }
    }

    /// The message for the worker; none when every caller has gone.
    fn body(&self) -> Option<Bytes> {
        let function = self.batch.first()?.name.to_owned();
        let arguments = self.batch.iter().filter_map(|entry| match &entry.work.job {
            Job::Call(call) => Some(call.arguments.clone()),
            Job::Here(_) => None,
        });
        let gpus = self.started.iter().flat_map(|started| started.gpus()).map(|gpu| *gpu as u32).collect();
        Some(Batch { function, arguments: arguments.collect(), gpus }.encode_to_vec().into())
    }

    fn take(mut self, answer: Bytes, took_ns: u64) {
        let outcomes = match Outcomes::decode(answer) {
            Ok(outcomes) if outcomes.outcomes.len() == self.batch.len() => outcomes,
            Ok(outcomes) => {
                let (sent, came) = (self.batch.len(), outcomes.outcomes.len());
                return self.fail(&format!("{sent} calls were sent, {came} outcomes came back"));
            }
            Err(error) => return self.fail(&format!("its answer cannot be read: {error}")),
        };
        let Outcomes { outcomes, ran_ns } = outcomes;
        let batch = std::mem::take(&mut self.batch);
        let node = self.node_name.clone();
        // First what they were granted comes back: their callers are to find it there.
        self.land(batch.len(), ran_ns, took_ns.saturating_sub(ran_ns));
        for (entry, outcome) in batch.into_iter().zip(outcomes) {
            entry.work.answer(read(outcome, entry.name, &node));
        }
    }

    /// The worker is gone: its calls run again, each alone, for one of them may be the reason (TK-8).
    fn lose(mut self, cause: &str) {
        let (core, batch) = (self.core.clone(), std::mem::take(&mut self.batch));
        let node = self.node_name.clone();
        core.lose_peer(self.node, self.peer, cause);
        self.land(0, 0, 0);
        for mut entry in batch {
            let attempts = entry.work.attempts;
            if attempts >= ATTEMPTS {
                let (task, cause) = (entry.name, cause.to_owned());
                entry.work.fail(TaskError::Lost { task, node: node.clone(), attempts, cause });
            } else if entry.work.stage.put_back() {
                entry.work.alone = true;
                core.place_again(entry, (&node, cause));
            }
        }
    }

    /// The worker answered with an error of its own: of several calls, each is tried alone.
    fn refused(mut self, error: &ControlError) {
        if self.batch.len() == 1 {
            return self.fail(&error.to_string());
        }
        let (core, batch) = (self.core.clone(), std::mem::take(&mut self.batch));
        let node = self.node_name.clone();
        self.land(0, 0, 0);
        for mut entry in batch.into_iter().filter(|entry| entry.work.stage.put_back()) {
            entry.work.alone = true;
            entry.work.attempts -= 1; // it did not run
            core.place_again(entry, (&node, "its worker refused it"));
        }
    }

    fn fail(mut self, cause: &str) {
        let (batch, node) = (std::mem::take(&mut self.batch), self.node_name.clone());
        self.land(0, 0, 0);
        for entry in batch {
            let cause = Error::Refused(cause.to_owned());
            entry.work.answer(Err(TaskError::Failed { task: entry.name, node: node.clone(), cause }));
        }
    }

    /// Gives back what was granted, and sends what can begin now.
    fn land(mut self, count: usize, ran_ns: u64, way_ns: u64) {
        let Some(started) = self.started.take() else { return };
        let node = self.node;
        self.core.change(|state| {
            state.schedule.end(started, count, ran_ns, way_ns);
            if let Some(peer) = state.peers.find(node, self.peer) {
                peer.in_flight -= 1;
            }
            node
        });
    }
}

/// Only when the event loop ends in the middle of a flight: nothing can be sent any more.
impl Drop for Flight {
    fn drop(&mut self) {
        let Some(started) = self.started.take() else { return };
        debug_assert!(started.node != OWN);
        const CAUSE: &str = "the event loop of the control plane has ended";
        self.core.lose_peer(self.node, self.peer, CAUSE);
        self.core.lock().schedule.end(started, 0, 0, 0);
        for entry in self.batch.drain(..) {
            let (task, node, attempts) = (entry.name, self.node_name.clone(), entry.work.attempts);
            entry.work.fail(TaskError::Lost { task, node, attempts, cause: CAUSE.into() });
        }
    }
}
