//! One operating-system thread that owns everything on a device and runs one job at a time.
//!
//! `tch::Tensor` is `Send` but not `Sync`, and libtorch keeps per-thread state: models never leave this thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use echelon_core::{Error, Result};
use tokio::sync::oneshot;

use crate::control::awake::{MOMENT, stay_awake};

/// Work for the thread; it answers through whatever it captured.
pub type Job<H> = Box<dyn FnOnce(&mut H) + Send>;

/// Jobs that may wait; one more is refused instead of growing the queue.
const QUEUE: usize = 64;

/// Dropping it ends the thread after the job in progress.
pub struct DeviceThread<H> {
    jobs: Option<SyncSender<Job<H>>>,
    thread: Option<JoinHandle<()>>,
}

impl<H: 'static> DeviceThread<H> {
    /// Starts the thread and waits until `build` has made the host there.
    ///
    /// # Errors
    /// What `build` says, or that the thread could not start.
    pub async fn start(
        name: &str,
        build: impl FnOnce() -> Result<H> + Send + 'static,
    ) -> Result<(DeviceThread<H>, oneshot::Receiver<String>)> {
        let (jobs, queue) = sync_channel::<Job<H>>(QUEUE);
        let (ready, built) = oneshot::channel();
        let (ended, end) = oneshot::channel();
        let body = move || {
            let cause = match catch_unwind(AssertUnwindSafe(build)) {
                Ok(Ok(host)) => {
                    let _ = ready.send(Ok(()));
                    serve(host, &queue)
                }
                Ok(Err(error)) => {
                    let _ = ready.send(Err(error));
                    return;
                }
                Err(panic) => {
                    let _ = ready.send(Err(of_panic(panic.as_ref())));
                    return;
                }
            };
            let _ = ended.send(cause);
        };
        let thread = std::thread::Builder::new()
            .name(name.into())
            .stack_size(16 << 20) // autograd recurses
            .spawn(body)
            .map_err(|error| Error::other("starting a device thread", error))?;
        built.await.map_err(|_| Error::WorkerGone("it ended while loading".into()))??;
        Ok((DeviceThread { jobs: Some(jobs), thread: Some(thread) }, end))
    }

    /// Queues a job.
    pub fn submit(&self, job: Job<H>) -> Result<()> {
        stay_awake(); // for the answer
        let jobs = self.jobs.as_ref().expect("open until drop");
        jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => Error::Refused(format!("{QUEUE} requests are waiting for this device already")),
            TrySendError::Disconnected(_) => Error::WorkerGone("it has ended".into()),
        })
    }
}

impl<H> Drop for DeviceThread<H> {
    fn drop(&mut self) {
        self.jobs.take();
        // Joining frees the models before libtorch's own statics go.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Runs jobs until the queue closes or one panics; says why it ended.
fn serve<H>(mut host: H, queue: &Receiver<Job<H>>) -> String {
    while let Some(job) = next(queue) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(&mut host))) {
            return panic_message(panic.as_ref());
        }
    }
    "stopped".into()
}

/// The next job; none when the queue is closed. A job may follow at once on the answer to the last one: sleeping in between
/// and being woken takes longer than the calls do.
fn next<H>(queue: &Receiver<Job<H>>) -> Option<Job<H>> {
    let until = Instant::now() + MOMENT;
    while Instant::now() < until {
        match queue.try_recv() {
            Ok(job) => return Some(job),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) => std::thread::yield_now(),
        }
    }
    queue.recv().ok()
}

/// What a panic is for whoever waits for an answer: libtorch says by one, too, that a device has no room.
pub(crate) fn of_panic(panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic_text(panic);
    Error::of_torch(text).unwrap_or_else(|| Error::WorkerGone(first_line(text)))
}

pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    first_line(panic_text(panic))
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("panic")
}

/// The first line of a panic's message: below it libtorch's have a C++ backtrace, whose line ends may be written out.
fn first_line(message: &str) -> String {
    let lines = message.lines().flat_map(|line| line.split("\\n"));
    lines.map(str::trim).find(|line| !line.is_empty()).unwrap_or("panic").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_by_its_first_line() {
        let message = |panic: Box<dyn std::any::Any + Send>| panic_message(panic.as_ref());
        let torch = String::from("called on an Err: \"shape mismatch\n");
        let escaped = r#"called on an Err: Torch("shapes differ\nException raised from"#;
        assert_eq!(message(Box::new(escaped)), r#"called on an Err: Torch("shapes differ"#);
        assert_eq!(
            message(Box::new(torch + "frame #0: c10::Error\nframe #1: main")),
            "called on an Err: \"shape mismatch"
        );
        assert_eq!(message(Box::new("short")), "short");
        assert_eq!(message(Box::new(7)), "panic");
    }
}
