//! The driver's end: listens, checks who joins, and gives each worker its proxy.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use ractor::{Actor, ActorRef};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{Grpc, StreamingService};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use super::Limits;
use super::door::{self, Arrival};
use super::error::{ControlError, Peer, RefusalKind, stream_broke};
use super::framing::{Assembly, Outbox, order};
use super::identity::{RunAuthority, allows_rank};
use super::protocol::{self, DriverCodec, FromWorker, Hello, MESSAGE_BYTES, Order, ToWorker, Welcome, Word};
use super::proxy::{self, Answer, Line, RemoteWorker, Seating};
use super::supervisor::{self, Claim, Claimed, Roster, Supervisor};

/// HTTP/2 window of a worker's stream, bytes: 10 Gb/s over 3 ms.
const WINDOW_BYTES: u32 = 4 << 20;
/// Characters of a stranger's text that are repeated in messages.
const NAME_CHARS: usize = 120;

/// What the driver's end needs to know.
pub struct ControlConfig {
    /// Where to listen; port 0 for any.
    pub listen: SocketAddr,
    /// Ranks of the run are 0 to this.
    pub num_workers: u32,
    /// What a worker must be built from: [`protocol::build_of_this_program`].
    pub build: String,
    pub limits: Limits,
    /// Of the workers that this process started.
    pub output: Option<Arc<dyn LocalOutput>>,
}

/// What is known of worker processes that this one started.
pub trait LocalOutput: Send + Sync {
    /// Last stderr lines of a process, and how it ended once it has; none when it is not ours.
    fn report(&self, rank: u32, pid: u32) -> Option<(Vec<String>, Option<String>)>;

    /// A process of ours that has ended although nobody asked it to.
    fn ended(&self) -> Option<ControlError>;
}

/// The driver's end. Dropping it closes every connection.
pub struct ControlServer {
    address: SocketAddr,
    num_workers: u32,
    roster: watch::Receiver<Roster>,
    output: Option<Arc<dyn LocalOutput>>,
    supervisor: ActorRef<supervisor::Message>,
    tasks: [JoinHandle<()>; 2],
}

impl ControlServer {
    /// Listens and lets workers join from now on.
    ///
    /// # Errors
    /// [`ControlError::Listen`] when the address cannot be had.
    pub async fn start(config: ControlConfig, authority: &RunAuthority) -> Result<ControlServer, ControlError> {
        let ControlConfig { listen, num_workers, build, mut limits, output } = config;
        limits.strangers = limits.strangers.min(raise_open_files() / 4).max(16);
        let listener = door::listen(listen)?;
        let address = listener.local_addr().map_err(|error| door::cannot_listen(listen, &error))?;
        let tls = TlsAcceptor::from(authority.server_config()?);
        let (changes, roster) = watch::channel(Roster::default());
        let spawned = Actor::spawn(None, Supervisor, (num_workers, changes)).await;
        let (supervisor, _) = spawned.map_err(|_| ControlError::Stopped)?;
        let (admitted, connections) = mpsc::channel(64);
        let reception = Reception {
            num_workers,
            build,
            limits: limits.clone(),
            output: output.clone(),
            supervisor: supervisor.clone(),
        };
        let serving = Server::builder()
            .max_concurrent_streams(4)
            .max_frame_size(64 << 10)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES + (1 << 20))
            .http2_max_header_list_size(16 << 10)
            .serve_with_incoming(
                Control(Arc::new(reception)),
                ReceiverStream::new(connections).map(Ok::<_, Infallible>),
            );
        let tasks = [
            tokio::spawn(door::keep(listener, tls, limits, admitted)),
            tokio::spawn(async {
                if let Err(error) = serving.await {
                    tracing::error!(%error, "control plane");
                }
            }),
        ];
        Ok(ControlServer { address, num_workers, roster, output, supervisor, tasks })
    }

    /// Where it listens, with the port that the system chose.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn num_workers(&self) -> u32 {
        self.num_workers
    }

    /// Who is here; changes can be awaited.
    pub fn roster(&self) -> watch::Receiver<Roster> {
        self.roster.clone()
    }

    /// The worker that has `rank` now.
    pub fn worker(&self, rank: u32) -> Option<RemoteWorker> {
        self.roster.borrow().workers.get(&rank).cloned()
    }

    /// Ready when a worker has been lost: the first loss.
    pub async fn first_loss(&self) -> ControlError {
        let mut roster = self.roster.clone();
        match roster.wait_for(|roster| !roster.losses.is_empty()).await {
            Ok(roster) => roster.losses[0].clone(),
            Err(_) => ControlError::Stopped,
        }
    }

    /// Tells every worker that the run is over and waits until they are gone, at most `patience`.
    pub async fn finish(self, reason: &str, patience: Duration) {
        self.end(true, reason, patience).await;
    }

    /// The same of a run that failed: to its workers that is an error.
    pub async fn fail(self, reason: &str, patience: Duration) {
        self.end(false, reason, patience).await;
    }

    async fn end(self, finished: bool, reason: &str, patience: Duration) {
        let _ = self.supervisor.cast(supervisor::Message::Finish { finished, reason: reason.into() });
        let mut roster = self.roster.clone();
        let _ = tokio::time::timeout(patience, roster.wait_for(|roster| roster.workers.is_empty())).await;
        // The farewells are on their way: connections outlive their proxies by a moment.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    pub(super) fn met(&self) {
        let _ = self.supervisor.cast(supervisor::Message::Met);
    }

    pub(super) fn output(&self) -> Option<&Arc<dyn LocalOutput>> {
        self.output.as_ref()
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.supervisor.stop(None); // its children end with it, and their connections with them
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Checks who joins.
struct Reception {
    num_workers: u32,
    build: String,
    limits: Limits,
    output: Option<Arc<dyn LocalOutput>>,
    supervisor: ActorRef<supervisor::Message>,
}

/// Why a worker may not join, in words for both ends.
struct Refusal(RefusalKind, String);

impl Reception {
    async fn join(&self, request: Request<Streaming<FromWorker>>) -> Result<Outbox<ToWorker>, Status> {
        let arrival = request.extensions().get::<Arrival>().cloned();
        let arrival = arrival.ok_or_else(|| Status::internal("a connection without an address"))?;
        let mut words = request.into_inner();
        let Some(FromWorker { word: Some(Word::Hello(hello)) }) = words.message().await? else {
            return Err(Status::invalid_argument("the first message must be Hello"));
        };
        let hello =
            Hello { host: shown(&hello.host), build: shown(&hello.build), device: shown(&hello.device), ..hello };
        let peer =
            Peer { rank: hello.rank, address: arrival.address.to_string(), host: hello.host.clone(), pid: hello.pid };
        if let Err(refusal) = self.check(&hello, &peer, &arrival) {
            return Err(self.refuse(refusal));
        }
        let hold = arrival.take_hold().ok_or_else(|| Status::invalid_argument("one stream per connection"))?;
        let (sending, outbox) = Outbox::new(self.limits.calls);
        let welcome = Welcome { num_workers: self.num_workers, heartbeat_ms: self.limits.heartbeat.as_millis() as u64 };
        let _ = sending.urgent.try_send(order(Order::Welcome(welcome)));
        let line = Arc::new(Line::new(peer, self.output.clone()));
        let seating = Seating { hello, line: line.clone(), sending, hold, limits: self.limits.clone() };
        let worker = self.seat(seating).await?;
        tokio::spawn(listen(words, line, worker.proxy().clone(), self.limits.body_bytes));
        Ok(outbox)
    }

    /// What a Hello must be like, whoever else is here.
    fn check(&self, hello: &Hello, peer: &Peer, arrival: &Arrival) -> Result<(), Refusal> {
        let refuse = |kind, reason: String| Err(Refusal(kind, format!("{peer}: {reason}")));
        if hello.protocol != protocol::PROTOCOL || hello.build != self.build {
            let (ours, theirs) = (&self.build, &hello.build);
            let versions = format!("protocol {} against {}", hello.protocol, protocol::PROTOCOL);
            let advice = "start all of them from one program file";
            return refuse(
                RefusalKind::OtherBuild,
                format!("it is build {theirs}, the driver is build {ours} ({versions}): {advice}"),
            );
        }
        if hello.rank >= self.num_workers {
            let (rank, last) = (hello.rank, self.num_workers - 1);
            let advice = "start as many workers as placement.workers says, or correct that";
            return refuse(
                RefusalKind::RankOutOfRange,
                format!("ranks of this run are 0 to {last}, not {rank}: {advice}"),
            );
        }
        if hello.num_workers != 0 && hello.num_workers != self.num_workers {
            let (theirs, ours) = (hello.num_workers, self.num_workers);
            let advice = "make the scheduler's number of tasks and placement.workers the same";
            return refuse(
                RefusalKind::OtherWorldSize,
                format!("it was started as one of {theirs} workers, the driver wants {ours}: {advice}"),
            );
        }
        let certified = arrival.certificate.as_ref().is_some_and(|leaf| allows_rank(leaf, hello.rank));
        if !certified {
            let advice = "give it the credentials that were made for its rank";
            return refuse(RefusalKind::OtherCertificate, format!("its certificate is for another rank: {advice}"));
        }
        Ok(())
    }

    /// Gives the worker its rank: at once when that is free, else when its holder turns out to be silent.
    async fn seat(&self, mut seating: Seating) -> Result<RemoteWorker, Status> {
        let mut instead_of = None;
        loop {
            let (newcomer, rank) = (seating.line.peer().clone(), seating.hello.rank);
            let (reply, claimed) = oneshot::channel();
            let claim = supervisor::Message::Claim(Box::new(Claim { seating, instead_of, reply }));
            self.supervisor.cast(claim).map_err(|_| Status::unavailable("the run is over"))?;
            match claimed.await.map_err(|_| Status::unavailable("the run is over"))? {
                Claimed::Seated(worker) => return Ok(worker),
                Claimed::Stale(returned) => {
                    returned.hold.let_go();
                    let reason = format!("{newcomer}: a newer incarnation has had this rank: end this process");
                    return Err(self.refuse(Refusal(RefusalKind::Stale, reason)));
                }
                Claimed::Over(returned, reason) => {
                    returned.hold.let_go();
                    let reason = format!("{newcomer}: it came when the run was over: {reason}");
                    return Err(self.refuse(Refusal(RefusalKind::Over, reason)));
                }
                Claimed::Held(holder, returned) => {
                    if holder.answers(self.limits.probe).await {
                        returned.hold.let_go();
                        let holder = holder.peer();
                        let advice = "give every worker its own rank, and start one per device";
                        let reason =
                            format!("two workers claim rank {rank}: {holder} has it, {newcomer} wants it: {advice}");
                        return Err(self.refuse(Refusal(RefusalKind::RankTaken, reason)));
                    }
                    instead_of = Some(holder.hello().incarnation());
                    seating = returned;
                }
            }
        }
    }

    /// Tells the driver what it must know, and the worker why.
    fn refuse(&self, Refusal(kind, reason): Refusal) -> Status {
        tracing::debug!(?kind, %reason, "a worker was refused");
        if kind.is_fatal() {
            let error = ControlError::Misconfigured { kind, reason: reason.clone() };
            let _ = self.supervisor.cast(supervisor::Message::Misconfigured(error));
        }
        Status::failed_precondition(reason)
    }
}

/// Reads what a worker says until the stream ends, then tells its proxy why.
async fn listen(mut words: Streaming<FromWorker>, line: Arc<Line>, proxy: ActorRef<proxy::Message>, body_bytes: usize) {
    let mut assembly = Assembly::new(body_bytes);
    let cause = loop {
        let word = match words.message().await {
            Ok(Some(FromWorker { word })) => word,
            Ok(None) => break "it closed its stream".into(),
            Err(status) => break stream_broke(&status),
        };
        line.heard();
        let assembled = match word {
            Some(Word::Heartbeat(beat)) => {
                line.beat(beat);
                continue;
            }
            Some(Word::Answer(head)) => assembly.begin((head.sequence, head.error), head.total, head.piece),
            Some(Word::Piece(piece)) => assembly.piece(piece.piece),
            Some(Word::Goodbye(reason)) => break format!("it left: {}", shown(&reason)),
            Some(Word::Hello(_)) | None => Err("it sent a message that has no place here".into()),
        };
        match assembled {
            Ok(None) => {}
            Ok(Some(((sequence, error), body))) => {
                let answer = error.map_or(Answer::Body(body), Answer::Error);
                line.answer(sequence, answer);
            }
            Err(cause) => break cause,
        }
    };
    let cause = line.ending(cause).await;
    let _ = proxy.cast(proxy::Message::End(cause));
}

/// Text from outside, safe to repeat.
fn shown(text: &str) -> String {
    text.chars().filter(|char| !char.is_control()).take(NAME_CHARS).collect()
}

/// The gRPC service of one method.
#[derive(Clone)]
struct Control(Arc<Reception>);

impl Service<http::Request<tonic::body::Body>> for Control {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let reception = self.0.clone();
        Box::pin(async move {
            if request.uri().path() != protocol::PATH {
                return Ok(Status::unimplemented("there is one method here").into_http());
            }
            let mut grpc = Grpc::new(DriverCodec::default()).apply_max_message_size_config(Some(MESSAGE_BYTES), None);
            Ok(grpc.streaming(Join(reception), request).await)
        })
    }
}

struct Join(Arc<Reception>);

impl StreamingService<FromWorker> for Join {
    type Response = ToWorker;
    type ResponseStream = Outbox<ToWorker>;
    type Future = BoxFuture<Response<Outbox<ToWorker>>, Status>;

    fn call(&mut self, request: Request<Streaming<FromWorker>>) -> Self::Future {
        let reception = self.0.clone();
        Box::pin(async move { reception.join(request).await.map(Response::new) })
    }
}

/// Lets this process hold as many connections as the system grants; returns that number.
fn raise_open_files() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls only read or write the struct given.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) != 0 {
            return 1024;
        }
        let granted = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
        if libc::setrlimit(libc::RLIMIT_NOFILE, &granted) == 0 {
            limit = granted;
        }
    }
    usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpStream;
    use tokio_rustls::TlsConnector;

    use super::*;
    use crate::control::identity::driver_name;

    #[tokio::test]
    async fn who_has_a_certificate_and_says_nothing_is_sent_away() {
        let authority = RunAuthority::new().unwrap();
        let limits = Limits { handshake: Duration::from_millis(300), ..Limits::default() };
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let config = ControlConfig { listen, num_workers: 1, build: String::new(), limits, output: None };
        let server = ControlServer::start(config, &authority).await.unwrap();
        let tls = TlsConnector::from(authority.worker(None).unwrap().client_config().unwrap());
        let stream = TcpStream::connect(server.address()).await.unwrap();
        let mut stream = tls.connect(driver_name(), stream).await.unwrap();
        let mut bytes = Vec::new();
        let end = stream.read_to_end(&mut bytes);
        assert!(tokio::time::timeout(Duration::from_secs(2), end).await.is_ok(), "still open after 2 s");
    }
}
