//! The future of a task's value.

use std::cell::RefCell;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::books::Devices;
use super::error::TaskError;
use super::tasks::Core;

/// Await it, or [`wait`](TaskHandle::wait) for it; dropping it cancels a task that has not begun (TK-6).
#[must_use = "dropping it cancels the task; detach it to let it run by itself"]
pub struct TaskHandle<T> {
    pub(super) task: &'static str,
    pub(super) stage: Arc<Stage>,
    pub(super) answer: Answer<T>,
    /// Told when a task is cancelled; none once that can no longer be.
    pub(super) core: Weak<Core>,
}

/// Where the value comes from.
pub(super) enum Answer<T> {
    Value(oneshot::Receiver<Result<T, TaskError>>),
    Bytes(oneshot::Receiver<Result<Bytes, TaskError>>, fn(&Bytes) -> Result<T, String>),
}

impl<T> TaskHandle<T> {
    /// The task's name.
    pub fn task(&self) -> &'static str {
        self.task
    }

    /// Blocks until the value is there, at most for `deadline`; for callers outside of any event loop.
    ///
    /// # Errors
    /// The task's, or [`TaskError::Deadline`]: then the task is cancelled if it has not begun.
    pub fn wait(mut self, deadline: Duration) -> Result<T, TaskError> {
        let until = Instant::now().checked_add(deadline);
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut cx = Context::from_waker(&waker);
        loop {
            if let Poll::Ready(value) = Pin::new(&mut self).poll(&mut cx) {
                return value;
            }
            match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => std::thread::park(),
                Some(Duration::ZERO) => return Err(self.late(deadline)),
                Some(left) => std::thread::park_timeout(left),
            }
        }
    }

    /// Awaits the value, at most for `deadline`.
    ///
    /// # Errors
    /// As [`TaskHandle::wait`].
    pub async fn within(mut self, deadline: Duration) -> Result<T, TaskError> {
        match tokio::time::timeout(deadline, &mut self).await {
            Ok(value) => value,
            Err(_) => Err(self.late(deadline)),
        }
    }

    /// Lets the task run although nobody waits for its value.
    pub fn detach(mut self) {
        self.core = Weak::new();
    }

    fn late(&self, waited: Duration) -> TaskError {
        let begun = self.stage.has_begun();
        let state =
            if begun { "runs, and holds its resources until it ends" } else { "had not begun, and is cancelled" };
        TaskError::Deadline { task: self.task, waited, state }
    }
}

impl<T> Unpin for TaskHandle<T> {}

impl<T> Future for TaskHandle<T> {
    type Output = Result<T, TaskError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T, TaskError>> {
        let this = self.get_mut();
        if in_task() {
            return Poll::Ready(Err(TaskError::Nested { task: this.task }));
        }
        let stopped = TaskError::Stopped { task: this.task };
        match &mut this.answer {
            Answer::Value(value) => Pin::new(value).poll(cx).map(|value| value.unwrap_or(Err(stopped))),
            Answer::Bytes(bytes, read) => Pin::new(bytes).poll(cx).map(|bytes| {
                let task = this.task;
                let unreadable = |cause| TaskError::Format { task, what: "reading its value", cause };
                read(&bytes.unwrap_or(Err(stopped))?).map_err(unreadable)
            }),
        }
    }
}

impl<T> Drop for TaskHandle<T> {
    fn drop(&mut self) {
        if let Some(core) = self.core.upgrade()
            && self.stage.leave()
        {
            core.cancelled();
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// How far a task is; decides between its beginning and its cancellation.
#[derive(Default)]
pub(super) struct Stage(AtomicU8);

const WAITING: u8 = 0;
const BEGUN: u8 = 1;
const CANCELLED: u8 = 2;
/// Begun, and its caller has gone.
const UNWANTED: u8 = 3;

impl Stage {
    /// Whether the task may run: once, unless it was put back.
    pub fn begin(&self) -> bool {
        self.change(WAITING, BEGUN)
    }

    /// A task that was lost waits again; false when nobody wants it any more.
    pub fn put_back(&self) -> bool {
        self.change(BEGUN, WAITING)
    }

    /// Its caller goes; true when the task had not begun and never will.
    fn leave(&self) -> bool {
        let cancelled = self.change(WAITING, CANCELLED);
        if !cancelled {
            self.change(BEGUN, UNWANTED);
        }
        cancelled
    }

    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire) == CANCELLED
    }

    fn has_begun(&self) -> bool {
        self.0.load(Ordering::Acquire) != WAITING
    }

    fn change(&self, from: u8, to: u8) -> bool {
        self.0.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

thread_local! {
    /// GPUs of the task that runs on this thread; none outside of tasks.
    static RUNNING: RefCell<Option<Devices>> = const { RefCell::new(None) };
}

/// Marks this thread as one that runs tasks with these GPUs, or none.
pub(super) fn enter_task(gpus: Option<Devices>) {
    RUNNING.with(|running| *running.borrow_mut() = gpus);
}

pub(super) fn in_task() -> bool {
    RUNNING.with(|running| running.borrow().is_some())
}

/// GPUs that the running task was granted, by their number on its node; empty outside of tasks.
pub fn gpus_of_this_task() -> Devices {
    RUNNING.with(|running| running.borrow().clone().unwrap_or_default())
}
