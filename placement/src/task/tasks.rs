//! The handle through which tasks are submitted, and what all of its parts share.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use bytes::Bytes;
use echelon_core::Result;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::books::Devices;
use super::demand::{Demand, NodeConfig, Units};
use super::error::TaskError;
use super::function::{Function, Functions, read, write};
pub use super::handle::gpus_of_this_task;
use super::handle::{Answer, Stage, TaskHandle, enter_task};
use super::remote::Peers;
use super::schedule::{Entry, Held, NodeId, NodeReport, Schedule, Work};
use crate::control::RemoteWorker;
use crate::device_thread::panic_message;

/// The node of this process.
pub(super) const OWN: NodeId = 0;

/// Bytes of arguments are counted in these.
const ROOM_UNIT: usize = 1024;

/// What the tasks of a process start from.
pub struct TasksConfig {
    /// The node of this process.
    pub node: NodeConfig,
    pub functions: Functions,
    /// Tasks that wait or run, over all nodes; one more is refused.
    pub waiting: usize,
    /// Bytes of their arguments, and of the arguments of one.
    pub waiting_bytes: usize,
}

impl TasksConfig {
    /// 16,384 tasks and 256 MiB of arguments may wait.
    pub fn new(node: NodeConfig) -> TasksConfig {
        TasksConfig { node, functions: Functions::default(), waiting: 1 << 14, waiting_bytes: 256 << 20 }
    }
}

/// Submits tasks; clones share everything. When the last is dropped, what waits is dropped and what runs ends by itself.
#[derive(Clone)]
pub struct Tasks(Arc<Owner>);

/// Ends the threads with the last handle.
struct Owner(Arc<Core>);

/// What handles, threads and the ways to other nodes share.
pub(super) struct Core {
    state: Mutex<State>,
    /// Threads of this node wait on it.
    pub wake: Condvar,
    pub functions: Functions,
    pub name: String,
    room: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    limits: (usize, usize),
    /// Tasks that wait although their callers have gone.
    num_cancelled: AtomicUsize,
}

pub(super) struct State {
    pub schedule: Schedule<Queued>,
    pub pool: super::pool::Pool,
    /// Workers of each other node.
    pub peers: Peers,
    pub closed: bool,
}

/// A task that waits.
pub(super) struct Queued {
    pub stage: Arc<Stage>,
    pub job: Job,
    /// How often it was begun and lost.
    pub attempts: u32,
    /// It may be what its nodes were lost by.
    pub alone: bool,
    room: Room,
}

pub(super) enum Job {
    Here(Box<dyn Here>),
    Call(Call),
}

/// A closure of any type.
pub(super) trait Here: Send {
    fn run(&mut self, task: &'static str, node: &str);
    /// Gives the value to the caller, or the error in its place.
    fn deliver(self: Box<Self>, error: Option<TaskError>);
}

struct Closure<F, T> {
    work: Option<F>,
    value: Option<Result<T, TaskError>>,
    reply: oneshot::Sender<Result<T, TaskError>>,
}

impl<T: Send, F: FnOnce() -> Result<T> + Send> Here for Closure<F, T> {
    fn run(&mut self, task: &'static str, node: &str) {
        self.value = self.work.take().map(|work| guarded(task, node, work));
    }

    fn deliver(self: Box<Self>, error: Option<TaskError>) {
        if let Some(value) = error.map(Err).or(self.value) {
            let _ = self.reply.send(value);
        }
    }
}

/// A call of a [`Function`].
pub(super) struct Call {
    pub arguments: Bytes,
    pub value: Option<Result<Bytes, TaskError>>,
    pub reply: oneshot::Sender<Result<Bytes, TaskError>>,
}

/// Its place in the bounded queue.
pub(super) struct Room {
    _task: OwnedSemaphorePermit,
    _bytes: Option<OwnedSemaphorePermit>,
}

impl Work for Queued {
    fn is_cancelled(&self) -> bool {
        self.stage.is_cancelled()
    }

    fn portable_bytes(&self) -> Option<usize> {
        match &self.job {
            Job::Here(_) => None,
            Job::Call(call) => Some(call.arguments.len()),
        }
    }

    fn is_alone(&self) -> bool {
        self.alone
    }
}

impl Tasks {
    /// With the node of this process; its threads start as they are needed.
    ///
    /// # Errors
    /// A node that means nothing, or a system that grants no thread.
    pub fn start(config: TasksConfig) -> Result<Tasks, TaskError> {
        let TasksConfig { node, functions, waiting, waiting_bytes } = config;
        let name = node.name.clone();
        let unfit = |cause: String| TaskError::Start { node: name.clone(), cause };
        let schedule = Schedule::new(&node).map_err(unfit)?;
        let units = waiting_bytes.div_ceil(ROOM_UNIT).min(u32::MAX as usize);
        let state = State { schedule, pool: super::pool::Pool::new(&node), peers: Peers::default(), closed: false };
        let core = Core {
            state: Mutex::new(state),
            wake: Condvar::new(),
            functions,
            name: node.name,
            room: Arc::new(Semaphore::new(waiting.clamp(1, u32::MAX as usize))),
            bytes: Arc::new(Semaphore::new(units)),
            limits: (waiting, units * ROOM_UNIT),
            num_cancelled: AtomicUsize::new(0),
        };
        let core = Arc::new(core);
        core.start_thread(&mut core.lock()).map_err(|error| unfit(error.to_string()))?;
        Ok(Tasks(Arc::new(Owner(core))))
    }

    /// Adds a worker's process as a place for calls; several of one node share its books, and the node of a lost worker comes
    /// back with its successor. To be called within the event loop of the control plane.
    ///
    /// # Errors
    /// A node that means nothing, or the name of this process's own.
    pub fn add_worker(&self, node: &NodeConfig, worker: RemoteWorker) -> Result<(), TaskError> {
        super::remote::add_worker(self.core(), node, worker)
    }

    /// Submits a closure, which runs on this node; `task` names it in errors and in running averages.
    ///
    /// # Errors
    /// [`TaskError::Impossible`] when this node never has what it demands, [`TaskError::Busy`] when too much waits.
    pub fn try_run<T: Send + 'static>(
        &self,
        task: &'static str,
        demand: Demand,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<TaskHandle<T>, TaskError> {
        self.core().run(task, demand, work)
    }

    /// Submits a call, which runs on this node or on another (TK-2).
    ///
    /// # Errors
    /// [`TaskError::Impossible`] when no node ever has what it demands, [`TaskError::Busy`] when too much waits, and arguments
    /// that are too large or cannot be written.
    pub fn try_call<A: Serialize, R: DeserializeOwned>(
        &self,
        function: &Function<A, R>,
        demand: Demand,
        arguments: &A,
    ) -> Result<TaskHandle<R>, TaskError> {
        self.core().call(function, demand, arguments)
    }

    /// Takes what a role demands, on the node of that name or on the first with room, until the reservation is dropped.
    ///
    /// # Errors
    /// [`TaskError::Impossible`] when it could never be had there, [`TaskError::Taken`] when it cannot be had now.
    pub fn reserve(&self, role: &str, node: Option<&str>, demand: Demand) -> Result<Reservation, TaskError> {
        self.core().reserve(role, node, demand)
    }

    /// All nodes as they stand, this one first.
    pub fn nodes(&self) -> Vec<NodeReport> {
        self.core().lock().schedule.reports()
    }

    pub(super) fn core(&self) -> &Arc<Core> {
        &self.0.0
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.0.lock();
            state.closed = true;
            state.schedule.drain()
        };
        self.0.wake.notify_all();
        drop(waiting);
    }
}

/// What a role holds until this is dropped.
pub struct Reservation {
    core: Arc<Core>,
    held: Held,
    node: String,
}

impl Reservation {
    /// The node it is on.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Its GPUs, by their number on the node.
    pub fn gpus(&self) -> &Devices {
        self.held.gpus()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.core.change(|state| {
            state.schedule.end_reservation(&self.held);
            self.held.node
        });
    }
}

impl Core {
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("never held over a panic")
    }

    /// Changes what is waiting or in use on the node that `change` names, and begins there what can begin now.
    pub fn change(self: &Arc<Core>, change: impl FnOnce(&mut State) -> NodeId) {
        let mut state = self.lock();
        let node = change(&mut state);
        self.advance(state, node);
    }

    /// Begins what can begin on a node.
    pub fn advance(self: &Arc<Core>, mut state: MutexGuard<'_, State>, node: NodeId) {
        if node == OWN {
            let wakes = self.rouse(&mut state);
            drop(state);
            if wakes {
                self.wake.notify_one();
            }
        } else {
            self.send_off(state, node);
        }
    }

    /// A task was cancelled. Its place is taken from it when at least half of what waits is like it.
    pub fn cancelled(&self) {
        let cancelled = self.num_cancelled.fetch_add(1, Ordering::Relaxed) + 1;
        let mut state = self.lock();
        if 2 * cancelled >= state.schedule.waiting() {
            self.num_cancelled.store(0, Ordering::Relaxed);
            let dead = state.schedule.sweep();
            drop(state);
            drop(dead);
        }
    }

    fn room(&self, task: &'static str, bytes: usize) -> Result<Room, TaskError> {
        let _bytes = match self.bytes_of(task, bytes)? {
            0 => None,
            units => {
                let refused = || format!("{} bytes of arguments may wait, {bytes} more are too many", self.limits.1);
                let permit = self.bytes.clone().try_acquire_many_owned(units);
                Some(permit.map_err(|_| TaskError::Busy { task, waiting: refused() })?)
            }
        };
        let permit = self.room.clone().try_acquire_owned();
        let refused = || format!("{} tasks wait or run already", self.limits.0);
        Ok(Room { _task: permit.map_err(|_| TaskError::Busy { task, waiting: refused() })?, _bytes })
    }

    /// In [`ROOM_UNIT`]s; a small one is counted by its task alone.
    fn bytes_of(&self, task: &'static str, bytes: usize) -> Result<u32, TaskError> {
        let limit = self.limits.1;
        if bytes > limit {
            return Err(TaskError::TooLarge { task, bytes, limit });
        }
        let units = bytes.div_ceil(ROOM_UNIT);
        Ok(if units <= 1 { 0 } else { u32::try_from(units).expect("bounded by the limit") })
    }

    fn run<T: Send + 'static>(
        self: &Arc<Core>,
        task: &'static str,
        demand: Demand,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<TaskHandle<T>, TaskError> {
        let room = self.room(task, 0)?;
        let (reply, answer) = oneshot::channel();
        let job = Job::Here(Box::new(Closure { work: Some(work), value: None, reply }));
        let stage = Arc::new(Stage::default());
        self.submit(task, demand, Queued { stage: stage.clone(), job, attempts: 0, alone: false, room })?;
        Ok(TaskHandle { task, stage, answer: Answer::Value(answer), core: Arc::downgrade(self) })
    }

    fn call<A: Serialize, R: DeserializeOwned>(
        self: &Arc<Core>,
        function: &Function<A, R>,
        demand: Demand,
        arguments: &A,
    ) -> Result<TaskHandle<R>, TaskError> {
        let task = function.name;
        if self.functions.find(task).is_none() {
            return Err(TaskError::Unknown { task, known: self.functions.names() });
        }
        let unwritten = |cause| TaskError::Format { task, what: "writing its arguments", cause };
        let arguments = write(arguments).map_err(unwritten)?;
        let room = self.room(task, arguments.len())?;
        let (reply, answer) = oneshot::channel();
        let stage = Arc::new(Stage::default());
        let job = Job::Call(Call { arguments, value: None, reply });
        self.submit(task, demand, Queued { stage: stage.clone(), job, attempts: 0, alone: false, room })?;
        Ok(TaskHandle { task, stage, answer: Answer::Bytes(answer, read), core: Arc::downgrade(self) })
    }

    fn submit(self: &Arc<Core>, task: &'static str, demand: Demand, queued: Queued) -> Result<(), TaskError> {
        let units = demand.units().map_err(|problem| TaskError::Demand { task: format!("task {task}"), problem })?;
        let portable = queued.portable_bytes().is_some();
        let mut state = self.lock();
        if state.closed {
            return Err(TaskError::Stopped { task });
        }
        let Some(node) = state.schedule.place(OWN, units, portable) else {
            return Err(impossible(&state, format!("task {task}"), units, portable));
        };
        state.schedule.enqueue(node, (task, units, OWN), queued);
        self.advance(state, node);
        Ok(())
    }

    /// Lets a task that cannot begin where it waited, or was lost there, wait elsewhere; `cause` says what became of it.
    pub fn place_again(self: &Arc<Core>, entry: Entry<Queued>, (node, cause): (&str, &str)) {
        let mut state = self.lock();
        let portable = entry.work.portable_bytes().is_some();
        if state.closed {
            drop(state);
            let task = entry.name;
            return entry.work.fail(TaskError::Stopped { task });
        }
        match state.schedule.place(entry.own, entry.units, portable) {
            Some(node) => {
                state.schedule.insert(node, entry);
                self.advance(state, node);
            }
            None => {
                let unplaced = impossible(&state, format!("task {}", entry.name), entry.units, portable);
                drop(state);
                let (task, attempts, cause) = (entry.name, entry.work.attempts, format!("{cause}; {unplaced}"));
                entry.work.fail(TaskError::Lost { task, node: node.into(), attempts, cause });
            }
        }
    }

    fn reserve(self: &Arc<Core>, role: &str, node: Option<&str>, demand: Demand) -> Result<Reservation, TaskError> {
        let units = demand.units().map_err(|problem| TaskError::Demand { task: format!("role {role}"), problem })?;
        let mut state = self.lock();
        let known = node.map(|name| state.schedule.find(name));
        let held = match known {
            Some(None) => None,
            known => state.schedule.reserve(known.flatten(), units),
        };
        let Some(held) = held else {
            let reports = state.schedule.reports();
            let place = node.map_or("any node".into(), |name| format!("node {name}"));
            let role = format!("role {role}");
            let asked = |report: &&NodeReport| report.alive && node.is_none_or(|name| report.name == name);
            let ever = reports
                .iter()
                .filter(asked)
                .any(|report| report.total.num_cpus >= demand.num_cpus && report.total.num_gpus >= demand.num_gpus);
            let nodes = told(&reports);
            if ever {
                return Err(TaskError::Taken { role, demand, place, nodes });
            }
            let advice = "place the role on a node that has them, or lower what it demands";
            return Err(TaskError::Impossible { task: role, demand, nodes, advice });
        };
        // Tasks cannot wait for what the role holds.
        let evicted = state.schedule.evict(held.node);
        let name = state.schedule.name(held.node).to_owned();
        drop(state);
        for entry in evicted {
            self.place_again(entry, (&name, &format!("role {role} holds its resources")));
        }
        Ok(Reservation { core: self.clone(), held, node: name })
    }
}

impl Queued {
    /// Runs it on this thread, unless it was cancelled; whether it ran.
    fn run(&mut self, task: &'static str, core: &Core) -> bool {
        if !self.stage.begin() {
            return false;
        }
        match &mut self.job {
            Job::Here(here) => here.run(task, &core.name),
            Job::Call(call) => {
                call.value = Some(guarded(task, &core.name, || match core.functions.find(task) {
                    Some(function) => function(&call.arguments),
                    None => unreachable!("calls of unknown functions are refused"),
                }));
            }
        }
        true
    }

    /// Gives its value to the caller; one that did not run has none.
    pub fn deliver(self) {
        let Queued { job, room, .. } = self;
        drop(room); // first: the caller may submit again at once
        match job {
            Job::Here(here) => here.deliver(None),
            Job::Call(Call { value, reply, .. }) => drop(value.map(|value| reply.send(value))),
        }
    }

    /// Tells the caller that there is no value, and why.
    pub fn fail(self, error: TaskError) {
        let Queued { job, room, .. } = self;
        drop(room);
        match job {
            Job::Here(here) => here.deliver(Some(error)),
            Job::Call(call) => drop(call.reply.send(Err(error))),
        }
    }

    /// A call's value, from elsewhere.
    pub fn answer(self, value: Result<Bytes, TaskError>) {
        let Queued { job, room, .. } = self;
        drop(room);
        match job {
            Job::Call(call) => drop(call.reply.send(value)),
            Job::Here(_) => unreachable!("a closure does not leave its node"),
        }
    }
}

/// Runs a task's work: its panic is an error of its own (TK-7).
fn guarded<T>(task: &'static str, node: &str, work: impl FnOnce() -> Result<T>) -> Result<T, TaskError> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(value) => value.map_err(|cause| TaskError::Failed { task, node: node.into(), cause }),
        Err(panic) => Err(TaskError::Panicked { task, node: node.into(), message: panic_message(panic.as_ref()) }),
    }
}

/// Runs tasks, one after the other, with what they were granted; how many ran. All but the last have been delivered then:
/// its caller is to find that what it was granted has come back.
pub(super) fn run_all(batch: &mut Vec<Entry<Queued>>, gpus: &Devices, core: &Core) -> (usize, Option<Queued>) {
    enter_task(Some(gpus.clone()));
    let (mut ran, mut last) = (0, None);
    for Entry { name, work: mut queued, .. } in batch.drain(..) {
        if let Some(former) = last.take() {
            Queued::deliver(former);
        }
        ran += usize::from(queued.run(name, core));
        last = Some(queued);
    }
    enter_task(None);
    (ran, last)
}

fn impossible(state: &State, task: String, units: Units, portable: bool) -> TaskError {
    let reports = state.schedule.reports();
    let (nodes, advice) = if portable {
        (told(&reports), "lower what it demands, add a node that has it, or end the roles that hold it")
    } else {
        (
            told(&reports[..1]),
            "a closure runs on this node: lower what it demands, or make it a Function, which runs on any",
        )
    };
    TaskError::Impossible { task, demand: units.demand(), nodes, advice }
}

/// Totals and what roles hold, by node.
fn told(reports: &[NodeReport]) -> String {
    const SHOWN: usize = 16;
    let node = |report: &NodeReport| {
        let NodeReport { name, alive, total, reserved, .. } = report;
        match (alive, *reserved == Demand::NONE) {
            (false, _) => format!("node {name} is lost"),
            (true, true) => format!("node {name} has {total}"),
            (true, false) => format!("node {name} has {total}, of which roles hold {reserved}"),
        }
    };
    let mut parts: Vec<String> = reports.iter().take(SHOWN).map(node).collect();
    if reports.len() > SHOWN {
        parts.push(format!("and {} more", reports.len() - SHOWN));
    }
    parts.join("; ")
}
