//! Parent of the proxies: gives each rank to one worker, and keeps the roster of who is here and who was lost.

use std::collections::{BTreeMap, HashMap};

use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::{oneshot, watch};

use super::error::ControlError;
use super::protocol::Hello;
use super::proxy::{Proxy, RemoteWorker, Seating};

/// Losses that are remembered; the first is the one that counts.
const LOSSES: usize = 64;

/// Who is here.
#[derive(Clone, Default)]
pub struct Roster {
    /// By rank.
    pub workers: BTreeMap<u32, RemoteWorker>,
    /// In the order in which they were noticed; the first is the cause of the others, more often than not.
    pub losses: Vec<ControlError>,
    /// While workers were missing, one that can never join this run tried to.
    pub misconfigured: Option<ControlError>,
}

pub(super) enum Message {
    Claim(Box<Claim>),
    Misconfigured(ControlError),
    /// A rendezvous is over: what went wrong in it does not count for the next.
    Met,
    /// Lets all workers go: the run is over, well or not.
    Finish {
        finished: bool,
        reason: String,
    },
}

/// A worker asks for its rank.
pub(super) struct Claim {
    pub seating: Seating,
    /// The holder that this claim may put aside, having been found silent.
    pub instead_of: Option<Incarnation>,
    pub reply: oneshot::Sender<Claimed>,
}

/// See [`Hello::incarnation`].
pub(super) type Incarnation = (u32, u64, u64);

pub(super) enum Claimed {
    Seated(RemoteWorker),
    /// Somebody has the rank; here is the claim back.
    Held(RemoteWorker, Seating),
    /// A newer incarnation had the rank already.
    Stale(Seating),
    /// The run is over, for this reason.
    Over(Seating, String),
}

pub(super) struct Supervisor;

pub(super) struct State {
    num_workers: usize,
    roster: watch::Sender<Roster>,
    /// Newest incarnation that ever had a rank: an older one never comes back.
    newest: HashMap<u32, Incarnation>,
    /// Why the run is over.
    finished: Option<String>,
}

impl Actor for Supervisor {
    type Msg = Message;
    type State = State;
    type Arguments = (u32, watch::Sender<Roster>);

    async fn pre_start(
        &self,
        _me: ActorRef<Message>,
        (num_workers, roster): (u32, watch::Sender<Roster>),
    ) -> Result<State, ActorProcessingErr> {
        Ok(State { num_workers: num_workers as usize, roster, newest: HashMap::new(), finished: None })
    }

    async fn handle(
        &self,
        me: ActorRef<Message>,
        message: Message,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            Message::Claim(claim) => {
                let Claim { seating, instead_of, reply } = *claim;
                let _ = reply.send(state.claim(seating, instead_of, &me).await?);
            }
            Message::Misconfigured(error) => state.roster.send_modify(|roster| {
                if roster.workers.len() < state.num_workers {
                    roster.misconfigured.get_or_insert(error); // the rendezvous ends with it
                } else {
                    tracing::warn!("a worker was refused: {error}");
                }
            }),
            Message::Met => state.roster.send_modify(|roster| roster.misconfigured = None),
            Message::Finish { finished, reason } => {
                state.finished = Some(reason.clone());
                for worker in state.roster.borrow().workers.values() {
                    worker.dismiss(finished, &reason);
                }
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _me: ActorRef<Message>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        let (SupervisionEvent::ActorFailed(gone, _) | SupervisionEvent::ActorTerminated(gone, _, _)) = event else {
            return Ok(());
        };
        state.roster.send_modify(|roster| {
            let seated = roster.workers.iter().find(|(_, worker)| worker.proxy().get_id() == gone.get_id());
            let Some((&rank, worker)) = seated else { return };
            if let Some(loss) = worker.loss().filter(|_| state.finished.is_none() && roster.losses.len() < LOSSES) {
                tracing::debug!(%loss, "worker lost"); // the driver says why the run ends
                roster.losses.push(loss);
            }
            roster.workers.remove(&rank);
        });
        Ok(())
    }
}

impl State {
    async fn claim(
        &mut self,
        seating: Seating,
        instead_of: Option<Incarnation>,
        me: &ActorRef<Message>,
    ) -> Result<Claimed, ActorProcessingErr> {
        let (rank, incarnation) = (seating.hello.rank, seating.hello.incarnation());
        if let Some(reason) = self.finished.clone() {
            return Ok(Claimed::Over(seating, reason));
        }
        let holder = self.roster.borrow().workers.get(&rank).cloned();
        if let Some(holder) = holder {
            let held_by = holder.hello().incarnation();
            let (attempt, held_attempt) = (seating.hello.attempt, holder.hello().attempt);
            if attempt < held_attempt {
                return Ok(Claimed::Stale(seating));
            }
            let newer_attempt = attempt > held_attempt;
            if instead_of != Some(held_by) && held_by != incarnation && !newer_attempt {
                return Ok(Claimed::Held(holder, seating));
            }
            if incarnation >= held_by {
                // Its end is no loss to report: its rank is filled.
                self.roster.send_modify(|roster| drop(roster.workers.remove(&rank)));
                holder.dismiss(false, &format!("replaced by a newer incarnation, {}", told(&seating.hello)));
            }
        }
        if self.newest.get(&rank).is_some_and(|newest| *newest > incarnation) {
            return Ok(Claimed::Stale(seating));
        }
        let worker = Proxy::seat(seating, me.get_cell()).await?;
        self.newest.insert(rank, incarnation);
        self.roster.send_modify(|roster| drop(roster.workers.insert(rank, worker.clone())));
        Ok(Claimed::Seated(worker))
    }
}

fn told(hello: &Hello) -> String {
    format!("pid {} on host {}", hello.pid, hello.host)
}
