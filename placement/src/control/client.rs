//! The worker's end: dials in, says Hello, takes calls in order and sends answers and heartbeats.

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use super::Limits;
use super::awake::stay_awake;
use super::error::{ControlError, stream_broke, with_causes};
use super::framing::{AnswerTo, Assembly, Outbox, Outgoing, Sending, word};
use super::heartbeat::Progress;
use super::identity::{Credentials, driver_name};
use super::protocol::{self, Dismissed, FromWorker, Hello, MESSAGE_BYTES, Order, ToWorker, Welcome, Word, WorkerCodec};

/// For one attempt to connect, and for the driver to answer a Hello.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Between attempts: doubled from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// HTTP/2 window of the stream, bytes.
const WINDOW_BYTES: u32 = 4 << 20;

/// A worker's membership in a run. Dropping it ends the stream.
pub struct Session {
    driver: String,
    num_workers: u32,
    calls: mpsc::Receiver<Call>,
    progress: Progress,
    sending: Option<Sending<FromWorker>>,
    /// Gives the reason for which the stream ended; none when the run is over.
    reader: Option<JoinHandle<Option<ControlError>>>,
    heartbeats: JoinHandle<()>,
    _channel: Channel,
}

/// What the driver asks.
pub struct Call {
    pub verb: String,
    pub sequence: u64,
    /// Nobody waits for the answer after it.
    pub due: Instant,
    pub body: Bytes,
    pub reply: Reply,
}

/// What is served beside the device: its calls neither wait for those of the device nor hold them up.
pub trait Beside: Send + Sync {
    /// Takes a call of a verb of its own, without blocking; gives back any other.
    fn offer(&self, call: Call) -> Option<Call>;
}

/// Where the answer to a call goes. Dropped without one, it tells the driver so.
pub struct Reply {
    sequence: u64,
    sending: Sending<FromWorker>,
    slot: Option<OwnedSemaphorePermit>,
    body_bytes: usize,
}

/// Dials the driver at `HOST:PORT` until it answers, at most `patience`, and joins its run. Calls of verbs of `beside` are
/// served beside those that [`Session::next`] gives.
///
/// # Errors
/// [`ControlError::Unreachable`] when no driver answered in time; [`ControlError::Refused`] in the driver's words;
/// [`ControlError::OtherRun`] when the credentials are not of its run.
pub async fn join(
    driver: &str,
    credentials: &Credentials,
    hello: Hello,
    limits: Limits,
    patience: Duration,
    beside: Option<Arc<dyn Beside>>,
) -> Result<Session, ControlError> {
    let tls = TlsConnector::from(credentials.client_config()?);
    let begun = Instant::now();
    let mut pause = BACKOFF.0;
    loop {
        let attempt = timeout(ATTEMPT, enter(driver, &tls, &hello, &limits, beside.as_ref())).await;
        let cause = match attempt {
            Ok(Ok(session)) => return Ok(session),
            Ok(Err(Attempt::Refused(reason))) => {
                return Err(ControlError::Refused { driver: driver.into(), reason });
            }
            Ok(Err(Attempt::OtherRun(cause))) => return Err(ControlError::OtherRun { driver: driver.into(), cause }),
            Ok(Err(Attempt::Failed(cause))) => cause,
            Err(_) => format!("no answer within {} s", ATTEMPT.as_secs()),
        };
        tracing::debug!(driver, cause, "not joined yet");
        if begun.elapsed() + pause > patience {
            return Err(ControlError::Unreachable { driver: driver.into(), tried: begun.elapsed(), cause });
        }
        // A thousand workers do not come back at one moment.
        sleep(pause.mul_f64(0.5 + (hello.nonce % 1024) as f64 / 1024.0)).await;
        pause = (2 * pause).min(BACKOFF.1);
    }
}

/// Why an attempt to join did not succeed.
enum Attempt {
    /// Trying again may help.
    Failed(String),
    Refused(String),
    /// Its certificate or ours is another run's.
    OtherRun(String),
}

async fn enter(
    driver: &str,
    tls: &TlsConnector,
    hello: &Hello,
    limits: &Limits,
    beside: Option<&Arc<dyn Beside>>,
) -> Result<Session, Attempt> {
    let channel = connect(driver, tls).await?;
    let (sending, outbox) = Outbox::<FromWorker>::new(limits.calls);
    let _ = sending.urgent.try_send(word(Word::Hello(hello.clone())));
    let mut grpc = Grpc::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES);
    grpc.ready().await.map_err(|error| fault(&error))?;
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(protocol::PATH);
    let streaming = grpc.streaming(Request::new(outbox), path, WorkerCodec::default()).await;
    let mut orders = streaming.map_err(|status| status_fault(&status))?.into_inner();
    let first = orders.message().await.map_err(|status| status_fault(&status))?;
    let Some(ToWorker { order: Some(Order::Welcome(welcome)) }) = first else {
        return Err(Attempt::Failed("the driver did not say Welcome".into()));
    };
    let ends = (channel, sending, orders);
    Ok(Session::begin(driver, ends, &welcome, limits, beside.cloned()))
}

/// One TLS connection to the driver, with HTTP/2 on it.
async fn connect(driver: &str, tls: &TlsConnector) -> Result<Channel, Attempt> {
    let stream = TcpStream::connect(driver).await.map_err(|error| Attempt::Failed(error.to_string()))?;
    stream.set_nodelay(true).map_err(|error| Attempt::Failed(error.to_string()))?;
    let stream = tls.connect(driver_name(), stream).await.map_err(|error| fault(&error))?;
    let mut connected = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        let stream = connected.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        async { stream }
    });
    let endpoint = Endpoint::from_static("http://driver.echelon") // TLS is below: see `connector`
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES + (1 << 20))
        .max_frame_size(64 << 10);
    endpoint.connect_with_connector(connector).await.map_err(|error| fault(&error))
}

fn status_fault(status: &Status) -> Attempt {
    match status.code() {
        tonic::Code::FailedPrecondition | tonic::Code::InvalidArgument => Attempt::Refused(status.message().into()),
        _ => fault(status),
    }
}

/// A certificate that one end does not accept will not be accepted later either.
fn fault(error: &(dyn StdError + 'static)) -> Attempt {
    match std::iter::successors(Some(error), |&error| error.source()).find_map(tls_refusal) {
        Some(tls) => Attempt::OtherRun(tls),
        None => Attempt::Failed(with_causes(error.to_string(), error)),
    }
}

fn tls_refusal(error: &(dyn StdError + 'static)) -> Option<String> {
    let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    let tls = match inner {
        Some(inner) => inner.downcast_ref::<rustls::Error>(),
        None => error.downcast_ref::<rustls::Error>(),
    };
    let refused = matches!(tls?, rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_));
    refused.then(|| tls.map(ToString::to_string)).flatten()
}

impl Session {
    fn begin(
        driver: &str,
        (channel, sending, orders): (Channel, Sending<FromWorker>, Streaming<ToWorker>),
        welcome: &Welcome,
        limits: &Limits,
        beside: Option<Arc<dyn Beside>>,
    ) -> Session {
        let progress = Progress::default();
        let (deliver, calls) = mpsc::channel(limits.calls);
        let reader = Reader {
            driver: driver.into(),
            orders,
            deliver,
            sending: sending.clone(),
            progress: progress.clone(),
            slots: Arc::new(Semaphore::new(limits.calls)),
            limits: limits.clone(),
            beside,
        };
        let every = Duration::from_millis(welcome.heartbeat_ms.clamp(10, 60_000));
        Session {
            driver: driver.into(),
            num_workers: welcome.num_workers,
            calls,
            heartbeats: tokio::spawn(beat(every, sending.clone(), progress.clone())),
            progress,
            sending: Some(sending),
            reader: Some(tokio::spawn(reader.run())),
            _channel: channel,
        }
    }

    /// The next call, in the order in which the driver made them; none when the run is over.
    ///
    /// # Errors
    /// [`ControlError::DriverLost`], or [`ControlError::LetGo`].
    pub async fn next(&mut self) -> Result<Option<Call>, ControlError> {
        while let Some(call) = self.calls.recv().await {
            if Instant::now() < call.due {
                return Ok(Some(call));
            }
            call.reply.send(Err("its deadline had passed before it began".into()));
        }
        let lost = |cause: String| ControlError::DriverLost { driver: self.driver.clone(), cause };
        match self.reader.take() {
            None => Err(lost("the session was over already".into())),
            Some(reader) => match reader.await {
                Ok(None) => Ok(None),
                Ok(Some(error)) => Err(error),
                Err(error) => Err(lost(error.to_string())),
            },
        }
    }

    /// Where to write what this worker is at, for its heartbeats.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Workers of the run, in the driver's word.
    pub fn num_workers(&self) -> u32 {
        self.num_workers
    }

    /// Ends the membership with a reason for the driver, once the answers given so far are on their way.
    pub async fn leave(mut self, reason: &str) {
        let Some(sending) = self.sending.take() else { return };
        let drained = sending.bodies.reserve_many(sending.bodies.max_capacity());
        let _ = timeout(ATTEMPT, drained).await;
        let _ = sending.urgent.send(word(Word::Goodbye(reason.into()))).await;
        let _ = timeout(ATTEMPT, sending.urgent.reserve_many(sending.urgent.max_capacity())).await;
        sleep(Duration::from_millis(20)).await; // from the stream to the socket
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.heartbeats.abort();
        if let Some(reader) = &self.reader {
            reader.abort();
        }
    }
}

impl Reply {
    /// Sends the answer, or the error in words.
    pub fn send(mut self, answer: Result<Bytes, String>) {
        self.give(answer);
    }

    fn give(&mut self, answer: Result<Bytes, String>) {
        let Some(slot) = self.slot.take() else { return };
        stay_awake();
        let limit = self.body_bytes;
        let (error, body) = match answer {
            Ok(body) if body.len() > limit => {
                (Some(format!("its answer of {} bytes is over the limit of {limit}", body.len())), Bytes::new())
            }
            Ok(body) => (None, body),
            Err(error) => (Some(clipped(error)), Bytes::new()),
        };
        let head = AnswerTo(self.sequence, error);
        // There is room for as many answers as there are slots; it fails only when the stream is over.
        let _ = self.sending.bodies.try_send(Outgoing { head, body, expires: None, room: Some(slot) });
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.give(Err("the worker dropped the call without an answer".into()));
    }
}

/// An error's text, short enough for one message.
fn clipped(mut text: String) -> String {
    const ERROR_BYTES: usize = 32 << 10;
    if text.len() > ERROR_BYTES {
        let end = (0..=ERROR_BYTES).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push_str(" ...");
    }
    text
}

async fn beat(every: Duration, sending: Sending<FromWorker>, progress: Progress) {
    let mut ticks = tokio::time::interval(every);
    loop {
        ticks.tick().await;
        // Full means that the driver does not read: it will find out itself.
        if let Err(mpsc::error::TrySendError::Closed(_)) =
            sending.urgent.try_send(word(Word::Heartbeat(progress.beat())))
        {
            return;
        }
    }
}

/// Reads what the driver orders.
struct Reader {
    driver: String,
    orders: Streaming<ToWorker>,
    deliver: mpsc::Sender<Call>,
    sending: Sending<FromWorker>,
    progress: Progress,
    slots: Arc<Semaphore>,
    limits: Limits,
    beside: Option<Arc<dyn Beside>>,
}

/// Head of a call that is arriving.
type Head = (u64, String, u64);

impl Reader {
    /// Until the stream ends: why, or none when the run is over.
    async fn run(mut self) -> Option<ControlError> {
        let mut assembly = Assembly::<Head>::new(self.limits.body_bytes);
        let lost = |cause: String| Some(ControlError::DriverLost { driver: self.driver.clone(), cause });
        loop {
            let order = match timeout(self.limits.driver_silence, self.orders.message()).await {
                Ok(Ok(Some(ToWorker { order }))) => order,
                Ok(Ok(None)) => return lost("it closed the stream".into()),
                Ok(Err(status)) => {
                    return lost(format!("{}; its process is gone, or the network between", stream_broke(&status)));
                }
                Err(_) => return lost(format!("it said nothing for {} s", self.limits.driver_silence.as_secs_f64())),
            };
            let assembled = match order {
                Some(Order::Call(call)) => {
                    assembly.begin((call.sequence, call.verb, call.deadline_ms), call.total, call.piece)
                }
                Some(Order::Piece(piece)) => assembly.piece(piece.piece),
                Some(Order::Ping(ping)) => {
                    if ping.answer {
                        let _ = self.sending.urgent.try_send(word(Word::Heartbeat(self.progress.beat())));
                    }
                    continue;
                }
                Some(Order::Dismissed(Dismissed { finished: true, .. })) => return None,
                Some(Order::Dismissed(Dismissed { reason, .. })) => {
                    return Some(ControlError::LetGo { driver: self.driver.clone(), reason });
                }
                Some(Order::Welcome(_)) | None => Err("it sent a message that has no place here".into()),
            };
            match assembled {
                Ok(None) => {}
                Ok(Some((head, body))) => self.take(head, body),
                Err(cause) => return lost(cause),
            }
        }
    }

    /// Hands a call to the session, or refuses it when too many are unanswered.
    fn take(&self, (sequence, verb, deadline_ms): Head, body: Bytes) {
        let (sending, body_bytes) = (self.sending.clone(), self.limits.body_bytes);
        let Ok(slot) = self.slots.clone().try_acquire_owned() else {
            let error = format!("refused: {} calls are unanswered at this worker", self.limits.calls);
            let head = AnswerTo(sequence, Some(error));
            let _ = sending.bodies.try_send(Outgoing { head, body: Bytes::new(), expires: None, room: None });
            return;
        };
        let now = Instant::now();
        let due = now.checked_add(Duration::from_millis(deadline_ms)).unwrap_or(now + Duration::from_secs(1 << 32));
        let reply = Reply { sequence, sending, slot: Some(slot), body_bytes };
        let call = Call { verb, sequence, due, body, reply };
        let call = match &self.beside {
            Some(beside) => beside.offer(call),
            None => Some(call),
        };
        if let Some(call) = call {
            // As many fit as there are slots; it fails only when the session is gone, and then the reply says so.
            let _ = self.deliver.try_send(call);
        }
    }
}
