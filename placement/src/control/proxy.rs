//! What stands on the driver for a worker in another process: a ractor actor that ends when the worker is lost, and the
//! handle through which it is called.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::Limits;
use super::awake::stay_awake;
use super::door::Hold;
use super::error::{ControlError, Peer, STREAM_BROKE, seconds};
use super::framing::{CallTo, Outgoing, Sending, order};
use super::heartbeat::Heartbeat;
use super::protocol::{Beat, Dismissed, Hello, Order, Ping, ToWorker};
use super::server::LocalOutput;

/// Bytes of queued bodies are counted in these.
const ROOM_UNIT: usize = 1024;

/// Handle of one incarnation of a worker. Clones address the same one; a successor has its own handle.
#[derive(Clone)]
pub struct RemoteWorker(Arc<Seat>);

struct Seat {
    peer: Arc<Peer>,
    hello: Hello,
    proxy: ActorRef<Message>,
    /// Calls that wait or run.
    slots: Arc<Semaphore>,
    /// Bytes that are not sent yet, in [`ROOM_UNIT`]s.
    room: Arc<Semaphore>,
    limits: Limits,
    line: Arc<Line>,
}

/// What the reader of the stream, the proxy and the handles share.
pub(super) struct Line {
    heard: Mutex<Heard>,
    /// Who waits for an answer: the reader of the stream hands it over without a detour through the mailbox.
    pending: Mutex<HashMap<u64, Waiting>>,
    lost: OnceLock<(String, Vec<String>)>,
    output: Option<Arc<dyn LocalOutput>>,
    peer: Arc<Peer>,
}

/// A caller, and its slot in the queue.
type Waiting = (oneshot::Sender<Answer>, OwnedSemaphorePermit);

struct Heard {
    at: Instant,
    heartbeat: Heartbeat,
}

impl RemoteWorker {
    /// Asks the worker for `operation` and awaits the answer.
    ///
    /// Calls made one after the other run in that order. Dropping the future gives up the answer, not the work.
    ///
    /// # Errors
    /// [`ControlError::Worker`] with its own words, [`ControlError::Deadline`], [`ControlError::Lost`],
    /// [`ControlError::Busy`] or [`ControlError::TooLarge`], each with rank, address and operation.
    pub async fn call(&self, operation: &'static str, body: Bytes, deadline: Duration) -> Result<Bytes, ControlError> {
        let (slot, room) = self.admit(operation, body.len())?;
        let (reply, answer) = oneshot::channel();
        let due = Instant::now().checked_add(deadline);
        let call = Message::Call(OutgoingCall { operation, body, due, slot, room, reply });
        self.0.proxy.cast(call).map_err(|_| self.lost(operation))?;
        stay_awake();
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(Answer::Body(body))) => Ok(body),
            Ok(Ok(Answer::Error(cause))) => {
                Err(ControlError::Worker { peer: self.0.peer.clone(), operation: operation.into(), cause })
            }
            Ok(Ok(Answer::Full)) => Err(self.busy(operation, format!("{} calls wait to be sent", self.0.limits.calls))),
            Ok(Err(_)) => Err(self.lost(operation)),
            Err(_) => Err(ControlError::Deadline {
                peer: self.0.peer.clone(),
                operation: operation.into(),
                deadline,
                progress: self.heartbeat().to_string(),
                stderr: self.0.line.last_lines(),
            }),
        }
    }

    /// Takes the room that a call needs, or refuses it.
    fn admit(
        &self,
        operation: &'static str,
        bytes: usize,
    ) -> Result<(OwnedSemaphorePermit, Option<OwnedSemaphorePermit>), ControlError> {
        let seat = &self.0;
        let limit = seat.limits.body_bytes;
        if bytes > limit {
            return Err(ControlError::TooLarge { peer: seat.peer.clone(), operation: operation.into(), bytes, limit });
        }
        let slot = seat.slots.clone().try_acquire_owned();
        let slot = slot.map_err(|_| self.busy(operation, format!("{} calls wait or run", seat.limits.calls)))?;
        let units = u32::try_from(bytes.div_ceil(ROOM_UNIT)).unwrap_or(u32::MAX);
        if units <= 1 {
            return Ok((slot, None)); // a small one is counted by its slot
        }
        let room = seat.room.clone().try_acquire_many_owned(units);
        let full = |_| self.busy(operation, format!("{} bytes may wait to be sent", seat.limits.queued_bytes));
        Ok((slot, Some(room.map_err(full)?)))
    }

    /// Who it is, for messages.
    pub fn peer(&self) -> &Peer {
        &self.0.peer
    }

    pub fn rank(&self) -> u32 {
        self.0.peer.rank
    }

    /// What it said of itself when it joined.
    pub fn hello(&self) -> &Hello {
        &self.0.hello
    }

    /// What it was at when it was last heard.
    pub fn heartbeat(&self) -> Heartbeat {
        self.0.line.heard.lock().expect("never held over a panic").heartbeat.clone()
    }

    /// Whether calls wait or run.
    pub fn is_busy(&self) -> bool {
        self.0.slots.available_permits() < self.0.limits.calls
    }

    /// Why it is lost, once it is.
    pub fn loss(&self) -> Option<ControlError> {
        self.0.line.lost.get().map(|_| self.lost("between calls"))
    }

    /// Lets the worker go; `finished` when the run is over and all is well.
    pub(super) fn dismiss(&self, finished: bool, reason: &str) {
        let _ = self.0.proxy.cast(Message::Dismiss(Dismissed { finished, reason: reason.into() }));
    }

    /// Whether it says anything within `patience` when asked.
    pub(super) async fn answers(&self, patience: Duration) -> bool {
        let asked = Instant::now();
        if self.0.proxy.cast(Message::Probe).is_err() {
            return false;
        }
        while asked.elapsed() < patience {
            tokio::time::sleep(patience / 50).await;
            if self.0.line.heard.lock().expect("never held over a panic").at > asked {
                return true;
            }
        }
        false
    }

    pub(super) fn proxy(&self) -> &ActorRef<Message> {
        &self.0.proxy
    }

    fn busy(&self, operation: &str, waiting: String) -> ControlError {
        ControlError::Busy { peer: self.0.peer.clone(), operation: operation.into(), waiting }
    }

    fn lost(&self, operation: &str) -> ControlError {
        let (cause, stderr) =
            self.0.line.lost.get().cloned().unwrap_or_else(|| ("the driver let it go".into(), vec![]));
        ControlError::Lost { peer: self.0.peer.clone(), operation: operation.into(), cause, stderr }
    }
}

impl Line {
    pub fn new(peer: Peer, output: Option<Arc<dyn LocalOutput>>) -> Line {
        let now = Instant::now();
        let heard = Heard { at: now, heartbeat: Heartbeat::new(Beat::default(), now) };
        Line {
            heard: Mutex::new(heard),
            pending: Mutex::default(),
            lost: OnceLock::new(),
            output,
            peer: Arc::new(peer),
        }
    }

    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Something came from the worker.
    pub fn heard(&self) {
        self.heard.lock().expect("never held over a panic").at = Instant::now();
    }

    /// A heartbeat came from the worker.
    pub fn beat(&self, beat: Beat) {
        let now = Instant::now();
        let mut heard = self.heard.lock().expect("never held over a panic");
        heard.at = now;
        heard.heartbeat.update(beat, now);
    }

    /// Hands an answer to whoever waits for it still.
    pub fn answer(&self, sequence: u64, answer: Answer) {
        let waiting = self.waiting().remove(&sequence);
        if let Some((reply, slot)) = waiting {
            drop(slot); // first: the caller may ask again at once
            stay_awake();
            let _ = reply.send(answer);
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Waiting>> {
        self.pending.lock().expect("never held over a panic")
    }

    /// The cause of the loss, with how the process ended where it is ours: that is often known a moment later.
    pub async fn ending(&self, cause: String) -> String {
        const PATIENCE: usize = 30;
        for _ in 0..PATIENCE {
            match self.report() {
                None if cause.starts_with(STREAM_BROKE) => {
                    return format!("{cause}; its process is gone, or the network between: see its own log");
                }
                None => return cause,
                // A process that ends breaks its stream.
                Some((_, Some(ending))) if cause.starts_with(STREAM_BROKE) => return ending,
                Some((_, Some(ending))) => return format!("{ending} ({cause})"),
                Some((_, None)) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        cause
    }

    fn silence(&self) -> Duration {
        self.heard.lock().expect("never held over a panic").at.elapsed()
    }

    fn last_lines(&self) -> Vec<String> {
        self.report().map(|(lines, _)| lines).unwrap_or_default()
    }

    fn report(&self) -> Option<(Vec<String>, Option<String>)> {
        self.output.as_ref().and_then(|output| output.report(self.peer.rank, self.peer.pid))
    }
}

pub(super) enum Message {
    Call(OutgoingCall),
    Dismiss(Dismissed),
    Probe,
    Tick,
    /// The stream is over.
    End(String),
}

pub(super) struct OutgoingCall {
    operation: &'static str,
    body: Bytes,
    due: Option<Instant>,
    slot: OwnedSemaphorePermit,
    room: Option<OwnedSemaphorePermit>,
    reply: oneshot::Sender<Answer>,
}

pub(super) enum Answer {
    Body(Bytes),
    /// In the worker's words.
    Error(String),
    /// The stream takes no more.
    Full,
}

/// One per worker, child of the supervisor.
pub(super) struct Proxy;

/// What a proxy is made of.
pub(super) struct Seating {
    pub hello: Hello,
    pub line: Arc<Line>,
    pub sending: Sending<ToWorker>,
    pub hold: Hold,
    pub limits: Limits,
}

/// Dropping it ends the stream and, a moment later, the connection.
pub(super) struct State {
    line: Arc<Line>,
    sending: Option<Sending<ToWorker>>,
    hold: Option<Hold>,
    limits: Limits,
    next: u64,
    ticked: Instant,
}

impl Proxy {
    /// Starts the proxy under `supervisor` and gives the handle.
    ///
    /// # Errors
    /// The supervisor is ending.
    pub async fn seat(seating: Seating, supervisor: ractor::ActorCell) -> Result<RemoteWorker, ractor::SpawnErr> {
        let Seating { hello, line, limits, .. } = &seating;
        let (hello, line, limits) = (hello.clone(), line.clone(), limits.clone());
        let (proxy, _) = Actor::spawn_linked(None, Proxy, seating, supervisor).await?;
        let units = (limits.queued_bytes / ROOM_UNIT).clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
        Ok(RemoteWorker(Arc::new(Seat {
            peer: line.peer.clone(),
            hello,
            proxy,
            slots: Arc::new(Semaphore::new(limits.calls)),
            room: Arc::new(Semaphore::new(units)),
            limits,
            line,
        })))
    }
}

impl Actor for Proxy {
    type Msg = Message;
    type State = State;
    type Arguments = Seating;

    async fn pre_start(&self, me: ActorRef<Message>, seating: Seating) -> Result<State, ActorProcessingErr> {
        let Seating { line, sending, hold, limits, .. } = seating;
        me.send_interval(limits.heartbeat, || Message::Tick);
        Ok(State { line, sending: Some(sending), hold: Some(hold), limits, next: 1, ticked: Instant::now() })
    }

    async fn handle(
        &self,
        me: ActorRef<Message>,
        message: Message,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            Message::Call(call) => state.call(call),
            Message::Probe => state.ping(true),
            Message::Tick => {
                if let Some(cause) = state.tick() {
                    return Err(state.lose(cause, false));
                }
            }
            Message::Dismiss(dismissed) if dismissed.finished => {
                state.let_go(dismissed);
                me.stop(None);
            }
            Message::Dismiss(dismissed) => return Err(state.lose(dismissed.reason, true)),
            Message::End(cause) => return Err(state.lose(cause, false)),
        }
        Ok(())
    }
}

/// However the proxy ends, nobody waits for ever.
impl Drop for State {
    fn drop(&mut self) {
        self.line.waiting().clear();
    }
}

impl State {
    fn call(&mut self, call: OutgoingCall) {
        let OutgoingCall { operation, body, due, slot, room, reply } = call;
        let Some(sending) = &self.sending else { return };
        let outgoing = Outgoing { head: CallTo(self.next, operation, due), body, expires: due, room };
        // Known before it is sent: the answer may be quick.
        self.line.waiting().insert(self.next, (reply, slot));
        if let Err(refused) = sending.bodies.try_send(outgoing) {
            let waiting = self.line.waiting().remove(&self.next);
            // Of a closed stream, the reader is about to say why; a dropped reply tells the caller.
            if let (TrySendError::Full(_), Some((reply, slot))) = (refused, waiting) {
                drop(slot);
                let _ = reply.send(Answer::Full);
            }
        }
        self.next += 1;
    }

    /// Forgets callers that have given up, and says why the worker is lost if it is.
    fn tick(&mut self) -> Option<String> {
        self.line.waiting().retain(|_, (reply, _)| !reply.is_closed());
        self.ping(false);
        let late = self.ticked.elapsed() > 3 * self.limits.heartbeat;
        self.ticked = Instant::now();
        if late {
            self.line.heard(); // this process slept, not the worker: what it said meanwhile is still unread
        }
        let (silence, limit) = (self.line.silence(), self.limits.silence);
        let frozen = "it is frozen, or the network has cut it off";
        (silence > limit).then(|| format!("no heartbeat for {} s: {frozen}", seconds(&silence)))
    }

    fn ping(&self, answer: bool) {
        if let Some(sending) = &self.sending {
            let _ = sending.urgent.try_send(order(Order::Ping(Ping { answer })));
        }
    }

    /// Makes the cause known; callers learn it when the state is dropped.
    fn lose(&mut self, cause: String, tell: bool) -> ActorProcessingErr {
        let _ = self.line.lost.set((cause.clone(), self.line.last_lines()));
        if tell {
            self.let_go(Dismissed { finished: false, reason: cause.clone() });
        }
        cause.into()
    }

    /// Says farewell, and closes the connection when that had time to arrive.
    fn let_go(&mut self, dismissed: Dismissed) {
        if let Some(sending) = self.sending.take() {
            let _ = sending.urgent.try_send(order(Order::Dismissed(dismissed)));
        }
        if let Some(hold) = self.hold.take() {
            hold.let_go();
        }
    }
}
