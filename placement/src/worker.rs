//! A worker: a ractor mailbox in front of a device thread, and the endpoint through which roles are asked.

use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};

use echelon_core::verb::{Answer, Endpoint, Request, Serve, Verb};
use echelon_core::{Error, Result};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;

use crate::device_thread::{DeviceThread, Job, of_panic};

/// Handle of a worker whose device thread owns an `H`. Clones address the same worker.
pub struct Worker<H: 'static> {
    mailbox: ActorRef<Message<H>>,
    /// Why the device thread ended, once it has.
    ended: Arc<Mutex<Option<String>>>,
}

impl<H> Clone for Worker<H> {
    fn clone(&self) -> Worker<H> {
        Worker { mailbox: self.mailbox.clone(), ended: self.ended.clone() }
    }
}

/// Starts a worker in this process; `build` runs on its device thread. Await the handle after [`Worker::stop`].
///
/// # Errors
/// What `build` says.
pub async fn start_worker<H: 'static>(
    name: &str,
    build: impl FnOnce() -> Result<H> + Send + 'static,
) -> Result<(Worker<H>, tokio::task::JoinHandle<()>)> {
    let (thread, end) = DeviceThread::start(name, build).await?;
    let ended = Arc::new(Mutex::new(None));
    let spawned = Actor::spawn(None, Mailbox(PhantomData), thread).await;
    let (mailbox, handle) = spawned.map_err(|error| Error::other("starting a worker", error))?;
    let (watched, actor) = (ended.clone(), mailbox.clone());
    tokio::spawn(async move {
        if let Ok(cause) = end.await {
            *watched.lock().expect("never held over a panic") = Some(cause.clone());
            actor.stop(Some(cause));
        }
    });
    Ok((Worker { mailbox, ended }, handle))
}

impl<H: 'static> Worker<H> {
    /// Ends the worker after the request in progress.
    pub fn stop(&self) {
        self.mailbox.stop(None);
    }

    /// Runs `work` on the device thread.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce(&mut H) -> Result<T> + Send + 'static) -> Result<T> {
        self.submit(work).await
    }

    /// Puts `work` in the queue now; the future is its outcome.
    pub fn submit<T: Send + 'static, W>(&self, work: W) -> impl Future<Output = Result<T>> + Send + use<T, W, H>
    where
        W: FnOnce(&mut H) -> Result<T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let refused = reply_slot(reply);
        let on_refusal = refused.clone();
        let job: Job<H> = Box::new(move |host| {
            // A panic answers this request with its message (AR-18), then goes on to end the thread.
            let (outcome, panic) = match catch_unwind(AssertUnwindSafe(|| work(host))) {
                Ok(outcome) => (outcome, None),
                Err(panic) => match of_panic(panic.as_ref()) {
                    error @ Error::WorkerGone(_) => (Err(error), Some(panic)),
                    error => (Err(error), None), // no fault of ours: the thread can go on
                },
            };
            if let Some(reply) = take(&refused) {
                let _ = reply.send(outcome);
            }
            if let Some(panic) = panic {
                resume_unwind(panic);
            }
        });
        let refuse = move |error| {
            if let Some(reply) = take(&on_refusal) {
                let _ = reply.send(Err(error));
            }
        };
        let sent = self.mailbox.cast(Message { job, refuse: Box::new(refuse) });
        let ended = self.ended.clone();
        async move {
            sent.map_err(|_| gone(&ended))?;
            answer.await.map_err(|_| gone(&ended))?
        }
    }
}

fn gone(ended: &Mutex<Option<String>>) -> Error {
    let ended = ended.lock().expect("never held over a panic");
    Error::WorkerGone(ended.clone().unwrap_or_else(|| "it ended in the middle of this request".into()))
}

impl<H: Serve<V> + 'static, V: Verb> Endpoint<V> for Worker<H> {
    fn call(&self, request: Request<V>) -> Answer<'_, V::Reply> {
        Box::pin(self.run(move |host: &mut H| host.serve(request)))
    }
}

/// One request: the work, and what to do with an error when the device does not take it.
struct Message<H> {
    job: Job<H>,
    refuse: Box<dyn FnOnce(Error) + Send>,
}

struct Mailbox<H>(PhantomData<fn(H)>);

impl<H: 'static> Actor for Mailbox<H> {
    type Msg = Message<H>;
    type State = DeviceThread<H>;
    type Arguments = DeviceThread<H>;

    async fn pre_start(
        &self,
        _me: ActorRef<Message<H>>,
        thread: DeviceThread<H>,
    ) -> Result<DeviceThread<H>, ActorProcessingErr> {
        Ok(thread)
    }

    async fn handle(
        &self,
        _me: ActorRef<Message<H>>,
        message: Message<H>,
        thread: &mut DeviceThread<H>,
    ) -> Result<(), ActorProcessingErr> {
        if let Err(error) = thread.submit(message.job) {
            (message.refuse)(error);
        }
        Ok(())
    }
}

type ReplySlot<T> = Arc<Mutex<Option<oneshot::Sender<Result<T>>>>>;

fn reply_slot<T>(reply: oneshot::Sender<Result<T>>) -> ReplySlot<T> {
    Arc::new(Mutex::new(Some(reply)))
}

fn take<T>(slot: &ReplySlot<T>) -> Option<oneshot::Sender<Result<T>>> {
    slot.lock().expect("never held over a panic").take()
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;

    struct Counter(u64);

    #[derive(Clone, Serialize, Deserialize)]
    struct Add(u64);

    impl Verb for Add {
        type Reply = f64;
        const NAME: &'static str = "add";
    }

    impl Serve<Add> for Counter {
        fn serve(&mut self, Request { verb: Add(n), .. }: Request<Add>) -> Result<f64> {
            assert!(n < 100, "a hundred is too much");
            self.0 += n;
            Ok(self.0 as f64)
        }
    }

    fn add(n: u64) -> Request<Add> {
        Request::of_worker(Add(n))
    }

    #[tokio::test]
    async fn requests_are_answered_in_order() {
        let (worker, handle) = start_worker("counter", || Ok(Counter(1))).await.unwrap();
        let (a, b) = tokio::join!(worker.call(add(2)), worker.call(add(3)));
        assert_eq!((a.unwrap(), b.unwrap()), (3.0, 6.0));
        worker.stop();
        handle.await.unwrap();
        let after = worker.call(add(1)).await.unwrap_err();
        assert!(matches!(after, Error::WorkerGone(_)), "{after}");
    }

    #[tokio::test]
    async fn a_panic_is_an_error_with_its_message() {
        let (worker, _handle) = start_worker("counter", || Ok(Counter(1))).await.unwrap();
        let error = worker.call(add(100)).await.unwrap_err().to_string();
        assert!(error.contains("a hundred is too much"), "{error}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        let error = worker.call(add(1)).await.unwrap_err().to_string();
        assert!(error.contains("a hundred is too much"), "{error}");
    }

    #[tokio::test]
    async fn a_host_that_cannot_be_built_says_why() {
        let started = start_worker::<Counter>("counter", || Err(Error::Refused("no such model".into()))).await;
        assert_eq!(started.err().unwrap().to_string(), "no such model");
    }
}
