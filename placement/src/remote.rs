//! A rank in another process, behind the endpoint of one in this: the driver's end and the worker's.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use echelon_core::message::{Message, decode, encode, error_from_text, error_to_text};
use echelon_core::progress::Progress;
use echelon_core::shared_message::SharedMessages;
use echelon_core::verb::{Answer, Endpoint, Request, Serve, Verb};
use echelon_core::{Error, Result};

use crate::control::{Call, ControlError, RemoteWorker, heartbeat};
use crate::worker::Worker;

/// The longest that one call may take. A worker that is lost or stands still is noticed long before.
pub const DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// A worker in another process. Clones address the same one.
#[derive(Clone)]
pub struct RemoteRank {
    pub worker: RemoteWorker,
    /// Where the worker shares memory with this process.
    pub shared: Option<Arc<SharedMessages>>,
}

impl RemoteRank {
    /// One request of any kind.
    ///
    /// # Errors
    /// The worker's own, or [`Error::WorkerGone`] when there is no answer to come.
    pub async fn ask<M: Message, R: Message>(&self, request: &M, deadline: Duration) -> Result<R> {
        let shared = self.shared.as_deref();
        let body = Bytes::from(shared.map_or_else(|| encode(request), |shared| shared.encode(request)));
        let answer = self.worker.call(M::KIND, body.clone(), deadline).await;
        if let (Err(_), Some(shared)) = (&answer, shared) {
            shared.forget(&body);
        }
        match answer {
            Ok(answer) => shared.map_or_else(|| decode(&answer), |shared| shared.decode(&answer)),
            Err(ControlError::Worker { cause, .. }) => Err(error_from_text(&cause)),
            Err(error @ (ControlError::Busy { .. } | ControlError::TooLarge { .. })) => {
                Err(Error::Refused(error.to_string()))
            }
            Err(error) => Err(Error::WorkerGone(error.without_operation())),
        }
    }
}

impl<V: Verb> Endpoint<V> for RemoteRank {
    fn call(&self, request: Request<V>) -> Answer<'_, V::Reply> {
        Box::pin(async move { self.ask(&request, DEADLINE).await })
    }
}

/// Hands a call to the device thread, in the order of calls, and its answer to the driver when it is there. Both go by the
/// host's store where the driver shares it. `begin` comes before the call on the device thread.
pub fn serve<H, V>(
    worker: &Worker<H>,
    call: Call,
    shared: Option<&Arc<SharedMessages>>,
    begin: impl FnOnce(&mut H) + Send + 'static,
) where
    H: Serve<V> + 'static,
    V: Verb,
{
    let Call { body, reply, .. } = call;
    let shared = shared.cloned();
    // Also read and written there: a tensor's bytes may be on the device, and a store's calls wait.
    let answer = worker.submit(move |host: &mut H| {
        begin(host);
        match &shared {
            Some(shared) => host.serve(shared.decode(&body)?).map(|answer| shared.encode(&answer)),
            None => host.serve(decode(&body)?).map(|answer| encode(&answer)),
        }
    });
    tokio::spawn(async move {
        let answer = answer.await;
        reply.send(answer.map(Bytes::from).map_err(|error| error_to_text(&error)));
    });
}

/// Tells the driver of a worker's phases, in its heartbeats.
pub struct InHeartbeats(pub heartbeat::Progress);

impl Progress for InHeartbeats {
    fn advance(&self, phase: &str, done: usize, total: usize) {
        self.0.phase(phase, done as u64, total as u64);
    }
}

/// Tells `progress` of a remote worker's phases, as its heartbeats come; ends when it is dropped.
pub async fn relay(worker: RemoteWorker, progress: Arc<dyn Progress>) {
    const EVERY: Duration = Duration::from_millis(250);
    let mut shown = (String::new(), 0);
    loop {
        tokio::time::sleep(EVERY).await;
        let heard = worker.heartbeat();
        let now = (heard.phase, heard.done);
        if heard.total > 0 && now != shown {
            progress.advance(&now.0, now.1 as usize, heard.total as usize);
            shown = now;
        }
    }
}
