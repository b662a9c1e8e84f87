//! The one server of a host: a thread that never waits for a client.

use std::collections::HashMap;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

use super::id::ObjectId;
use super::inventory::{Client, Found, Inventory};
use super::packet::{Packet, PacketListener, PacketSocket, timespec};
use super::protocol::{MAX_MESSAGE, MAX_NAME, Refusal, Reply, Request, Token, VERSION, random_hex};
use super::segment::Segment;

/// How long a connection may be there without having said the token.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections that have not said the token yet; one more, and the oldest of them goes.
const MAX_STRANGERS: usize = 64;

/// Connections taken in before those that are there are looked at again.
const ACCEPTED_AT_ONCE: usize = 16;

/// References of one client taken back before the next client's turn.
const RELEASES_AT_ONCE: usize = 256;

/// After the system had no descriptor for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Descriptors that a process keeps for everything but the store's objects and connections.
const SPARE_DESCRIPTORS: u64 = 256;

/// How much a store may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// Memory of objects, in bytes.
    pub capacity_bytes: u64,
    /// Each takes a file descriptor of the server's process.
    pub max_objects: usize,
    /// A client has one for each of its threads that talk to the store at once.
    pub max_connections: usize,
}

impl StoreConfig {
    /// A store of `capacity_bytes`, with as many objects and connections as this process may have descriptors for.
    pub fn new(capacity_bytes: u64) -> StoreConfig {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(65_536);
        let descriptors = limit.saturating_sub(SPARE_DESCRIPTORS).max(64) as usize;
        StoreConfig {
            capacity_bytes,
            max_objects: (descriptors * 3 / 4).min(16_384),
            max_connections: (descriptors / 4).min(1024),
        }
    }
}

/// Where a host's store is, and the secret to be let in: pass it on by file or stream, never by command line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoreAddress {
    /// An abstract Unix socket's name, of this host and network namespace.
    pub socket: String,
    pub token: Token,
}

/// A running store. Dropping it ends the server; objects that are mapped stay with those who mapped them.
#[derive(Debug)]
pub struct StoreServer {
    address: StoreAddress,
    /// Its other end tells the thread that this one is gone.
    stop: Option<PacketSocket>,
    thread: Option<JoinHandle<()>>,
}

impl StoreServer {
    /// Starts the server on a thread of its own.
    pub fn start(config: StoreConfig) -> Result<StoreServer> {
        let socket = format!("echelon-store-{}", random_hex::<16>()?);
        let listener = PacketListener::bind(&socket)?;
        let address = StoreAddress { socket, token: Token::random()? };
        let (stop, stopped) = PacketSocket::pair()?;
        let server = Server {
            config,
            token: address.token.clone(),
            uid: rustix::process::geteuid().as_raw(),
            inventory: Inventory::new(config.capacity_bytes, config.max_objects),
            connections: HashMap::new(),
            next: 0,
            paused_until: None,
        };
        let thread =
            std::thread::Builder::new().name("object-store".into()).spawn(move || server.run(&listener, &stopped))?;
        Ok(StoreServer { address, stop: Some(stop), thread: Some(thread) })
    }

    pub fn address(&self) -> &StoreAddress {
        &self.address
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

struct Server {
    config: StoreConfig,
    token: Token,
    uid: u32,
    inventory: Inventory,
    connections: HashMap<Client, Connection>,
    next: Client,
    /// No connections are taken in before this.
    paused_until: Option<Instant>,
}

struct Connection {
    socket: PacketSocket,
    since: Instant,
    pid: i32,
    /// It has said the token.
    welcome: bool,
    waiting: Option<Waiting>,
}

/// A `Get` that is not answered yet.
struct Waiting {
    id: ObjectId,
    since: Instant,
    until: Instant,
    claim: bool,
    take: bool,
}

/// What is to be done about a connection after its message.
enum Next {
    Keep,
    /// Something changed for those who wait.
    Wake,
    Close(String),
}

impl Server {
    fn run(mut self, listener: &PacketListener, stopped: &PacketSocket) {
        loop {
            let clients: Vec<Client> = self.connections.keys().copied().collect();
            let now = Instant::now();
            let accepts = self.paused_until.is_none_or(|until| until <= now);
            let ready: Vec<bool> = {
                let mut fds = vec![PollFd::new(stopped, PollFlags::IN)];
                let events = if accepts { PollFlags::IN } else { PollFlags::empty() };
                fds.push(PollFd::new(listener, events));
                fds.extend(clients.iter().map(|client| PollFd::new(&self.connections[client].socket, PollFlags::IN)));
                let timeout = self.next_deadline().map(|at| timespec(at.saturating_duration_since(now)));
                match poll(&mut fds, timeout.as_ref()) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => {
                        tracing::error!("object store: poll: {error}; the store ends");
                        return;
                    }
                }
                fds.iter().map(|fd| !fd.revents().is_empty()).collect()
            };
            if ready[0] {
                return;
            }
            // Who is in goes before who wants in: a flood of strangers delays a client by one round at most.
            let ready_clients = clients.iter().zip(&ready[2..]).filter(|(_, ready)| **ready).map(|(client, _)| *client);
            // All that is let go comes before all that is asked for: who lets go by one connection and then asks by
            // another finds the room.
            let requests: Vec<_> = ready_clients.filter_map(|client| Some((client, self.listen(client)?))).collect();
            for (client, (request, memory)) in requests {
                let next = self.answer(client, request, memory.map(Segment::from_fd));
                self.proceed(client, next);
            }
            if ready[1] {
                self.accept(listener);
            }
            self.pass_deadlines();
        }
    }

    /// When something is to be done though nobody says anything.
    fn next_deadline(&self) -> Option<Instant> {
        let of_connection = |connection: &Connection| match (&connection.waiting, connection.welcome) {
            (Some(waiting), _) => Some(waiting.until),
            (None, false) => Some(connection.since + HELLO_TIMEOUT),
            (None, true) => None,
        };
        self.connections.values().filter_map(of_connection).chain(self.paused_until).min()
    }

    fn accept(&mut self, listener: &PacketListener) {
        for _ in 0..ACCEPTED_AT_ONCE {
            let socket = match listener.try_accept() {
                Ok(socket) => socket,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!("object store: accept: {error}");
                    self.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            };
            let Ok(peer) = socket.peer() else { continue };
            if peer.uid != self.uid {
                tracing::warn!(
                    "object store: user {} (pid {}) is not the run's and was turned away",
                    peer.uid,
                    peer.pid
                );
                continue;
            }
            let strangers = self.connections.iter().filter(|(_, connection)| !connection.welcome);
            let num_strangers = strangers.clone().count();
            if num_strangers >= MAX_STRANGERS || self.connections.len() >= self.config.max_connections {
                // Numbers grow: the smallest is the oldest.
                match strangers.map(|(client, _)| *client).min() {
                    Some(oldest) => self.close(oldest, "others came, and it had not said the token"),
                    None => {
                        let max = self.config.max_connections;
                        let reason = format!("the store has {max} connections, which is all it may have");
                        let _turned_away = socket.try_send(&encode(&Reply::Refused(Refusal::Protocol(reason))), None);
                        continue;
                    }
                }
            }
            let connection = Connection { socket, since: Instant::now(), pid: peer.pid, welcome: false, waiting: None };
            self.connections.insert(self.next, connection);
            self.next += 1;
        }
    }

    /// Takes a client's messages up to the first that wants an answer, which is returned.
    fn listen(&mut self, client: Client) -> Option<(Request, Option<OwnedFd>)> {
        for _ in 0..RELEASES_AT_ONCE {
            let connection = self.connections.get(&client)?;
            let mut buffer = [0; MAX_MESSAGE];
            let next = match connection.socket.try_receive(&mut buffer) {
                Ok(Packet { len, fd }) => match serde_json::from_slice(&buffer[..len]) {
                    Ok(Request::Release { id }) if connection.welcome => match self.inventory.release(client, &id) {
                        true => continue,
                        false => Next::Close(format!("it let go of an object it does not hold: {id}")),
                    },
                    Ok(request) => return Some((request, fd)),
                    Err(error) => Next::Close(format!("its message cannot be read: {error}")),
                },
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return None,
                Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                    Next::Close(String::new())
                }
                Err(error) => Next::Close(error.to_string()),
            };
            self.proceed(client, next);
            return None;
        }
        None
    }

    fn proceed(&mut self, client: Client, next: Next) {
        match next {
            Next::Keep => {}
            Next::Wake => self.wake(),
            Next::Close(reason) => self.close(client, &reason),
        }
    }

    fn answer(
        &mut self,
        client: Client,
        request: Request,
        memory: Option<std::result::Result<Segment, super::SegmentError>>,
    ) -> Next {
        // One that was let go since it spoke.
        let Some(connection) = self.connections.get_mut(&client) else { return Next::Keep };
        let request = match (request, connection.welcome) {
            (Request::Hello { version, token, name }, false) => return self.greet(client, version, &token, &name),
            (Request::Hello { .. }, true) => return Next::Close("it said hello twice".into()),
            (_, false) => return Next::Close("it did not begin with a hello".into()),
            (request, true) => request,
        };
        if connection.waiting.is_some() {
            return Next::Close("it asked again before its answer".into());
        }
        let (outcome, wake) = match request {
            Request::Reserve { id, .. } | Request::Get { id, .. } if !id.fits() => {
                (Err(Refusal::Protocol("an id of more than 1024 bytes".into())), false)
            }
            Request::Reserve { id, bytes } => (self.inventory.reserve(client, &id, bytes), false),
            Request::Commit { id, hand_over } => match memory {
                Some(Ok(segment)) => (self.inventory.commit(client, &id, segment, hand_over), true),
                Some(Err(error)) => (Err(Refusal::Protocol(format!("{id}: {error}"))), false),
                None => (Err(Refusal::Protocol(format!("{id}: no memory came with it"))), false),
            },
            Request::Abandon { id } => (Ok(()), self.inventory.abandon(client, &id)),
            Request::Remove { id } => (self.inventory.remove(&id), true),
            Request::Report => {
                let report = Reply::Report(self.inventory.report(self.connections.len()));
                return self.reply(client, &report, None);
            }
            Request::Get { id, wait_ms, claim, take } => {
                let now = Instant::now();
                // A year is for ever, and cannot overflow.
                let wait = Duration::from_millis(wait_ms).min(Duration::from_secs(31_536_000));
                return self.find(client, Waiting { id, since: now, until: now + wait, claim, take });
            }
            Request::Hello { .. } | Request::Release { .. } => unreachable!("taken before"),
        };
        let reply = outcome.map_or_else(Reply::Refused, |()| Reply::Done);
        match self.reply(client, &reply, None) {
            Next::Keep if wake => Next::Wake,
            next => next,
        }
    }

    fn greet(&mut self, client: Client, version: u32, token: &Token, name: &str) -> Next {
        let refusal = if !token.matches(&self.token) {
            // The reason is not told: whoever guesses learns nothing.
            return Next::Close("it does not know the run's token".into());
        } else if version != VERSION {
            Some(format!("this store speaks version {VERSION}, the client version {version}: use one build for a run"))
        } else if name.len() > MAX_NAME {
            Some(format!("a client's name of {} bytes; at most {MAX_NAME} are allowed", name.len()))
        } else {
            None
        };
        if let Some(reason) = refusal {
            let _refused = self.reply(client, &Reply::Refused(Refusal::Protocol(reason.clone())), None);
            return Next::Close(reason);
        }
        let connection = self.connections.get_mut(&client).expect("looked up by the caller");
        connection.welcome = true;
        let name = format!("{name} (pid {})", connection.pid);
        self.inventory.join(client, name);
        self.reply(client, &Reply::Done, None)
    }

    /// Answers a `Get`, now or later.
    fn find(&mut self, client: Client, wanted: Waiting) -> Next {
        let over = wanted.until <= Instant::now();
        let (fate, by) = match self.inventory.get(client, &wanted.id, wanted.take) {
            Found::Ready(segment) => {
                let connection = &self.connections[&client];
                return sent(connection.socket.try_send(&encode(&Reply::Object), Some(segment.as_fd())));
            }
            Found::Absent(_) if wanted.claim => {
                let claimed = self.inventory.claim(client, &wanted.id);
                return self.reply(client, &claimed.map_or_else(Reply::Refused, |()| Reply::Claimed), None);
            }
            Found::Absent(fate) => (fate, None),
            Found::Writing { by } => (self.inventory.fate(&wanted.id), Some(by)),
        };
        if !over {
            self.connections.get_mut(&client).expect("a client that asks").waiting = Some(wanted);
            return Next::Keep;
        }
        let waited_ms = wanted.since.elapsed().as_millis() as u64;
        let at_once = wanted.since == wanted.until && by.is_none();
        let refusal = match at_once {
            true => Refusal::Unknown { id: wanted.id, fate },
            false => Refusal::NotInTime { id: wanted.id, waited_ms, by, fate },
        };
        self.reply(client, &Reply::Refused(refusal), None)
    }

    /// Looks again for everybody who waits.
    fn wake(&mut self) {
        self.answer_waiting(|_| true);
    }

    fn pass_deadlines(&mut self) {
        let now = Instant::now();
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
        }
        self.answer_waiting(|waiting| waiting.until <= now);
        let silent = |connection: &Connection| !connection.welcome && connection.since + HELLO_TIMEOUT <= now;
        let late: Vec<Client> =
            self.connections.iter().filter(|(_, connection)| silent(connection)).map(|(client, _)| *client).collect();
        late.into_iter().for_each(|client| self.close(client, "it said nothing"));
    }

    fn answer_waiting(&mut self, due: impl Fn(&Waiting) -> bool) {
        let due = |connection: &Connection| connection.waiting.as_ref().is_some_and(&due);
        let mut clients: Vec<Client> =
            self.connections.iter().filter(|(_, connection)| due(connection)).map(|(client, _)| *client).collect();
        // Who waits longest is first to be asked to bring what is missing.
        clients.sort_unstable_by_key(|client| self.connections[client].waiting.as_ref().map(|waiting| waiting.since));
        for client in clients {
            let Some(connection) = self.connections.get_mut(&client) else { continue };
            let Some(waiting) = connection.waiting.take() else { continue };
            if let Next::Close(reason) = self.find(client, waiting) {
                self.close(client, &reason);
            }
        }
    }

    fn reply(&self, client: Client, reply: &Reply, memory: Option<&Segment>) -> Next {
        sent(self.connections[&client].socket.try_send(&encode(reply), memory.map(AsFd::as_fd)))
    }

    /// Forgets a connection: its references are given back, and what it was bringing may be brought by another.
    fn close(&mut self, client: Client, reason: &str) {
        let Some(connection) = self.connections.remove(&client) else { return };
        if !reason.is_empty() {
            tracing::warn!("object store: connection of pid {} closed: {reason}", connection.pid);
        }
        if self.inventory.leave(client) {
            self.wake();
        }
    }
}

fn encode(reply: &Reply) -> Vec<u8> {
    let message = serde_json::to_vec(reply).expect("plain data serialises");
    if message.len() <= MAX_MESSAGE {
        return message;
    }
    // Only quoted names with many escapes make one so long.
    let short = Reply::Refused(Refusal::Protocol("refused, for a reason too long to tell".into()));
    serde_json::to_vec(&short).expect("plain data serialises")
}

/// A client that does not take its answer (it has one at a time, and room for many) is let go.
fn sent(result: std::result::Result<(), Error>) -> Next {
    match result {
        Ok(()) => Next::Keep,
        Err(error) => Next::Close(format!("it does not take its answer: {error}")),
    }
}
