//! A process's way to its host's store. Calls block, each with a deadline; clones and threads share it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::error::StoreError;
use super::id::ObjectId;
use super::object::Object;
use super::packet::PacketSocket;
use super::protocol::{MAX_MESSAGE, MAX_NAME, Refusal, Reply, Request, StoreReport, VERSION};
use super::segment::Segment;
use super::server::StoreAddress;
use super::writer::ObjectWriter;

/// For what the server answers at once.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// For a message that nobody answers.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(1);

/// A client of the host's store.
#[derive(Clone, Debug)]
pub struct Store(Arc<Client>);

#[derive(Debug)]
struct Client {
    address: StoreAddress,
    name: String,
    /// Connections that no call is using. One more is made when all are in use.
    idle: Mutex<Vec<Arc<Connection>>>,
}

/// References belong to a connection: all that came by it are given back when it closes.
#[derive(Debug)]
struct Connection {
    socket: PacketSocket,
    /// An answer did not come, and might come when another is expected: no call uses it any more.
    broken: AtomicBool,
}

/// A process's hold on an object.
#[derive(Debug)]
pub(super) struct Reference {
    connection: Arc<Connection>,
    id: ObjectId,
}

impl Drop for Reference {
    fn drop(&mut self) {
        self.connection.notice(&Request::Release { id: self.id.clone() });
    }
}

impl Connection {
    /// Tells what nobody answers. A server that is gone has nothing to be told.
    fn notice(&self, request: &Request) {
        let message = serde_json::to_vec(request).expect("plain data serialises");
        if let Err(error) = self.socket.send(&message, None, Instant::now() + NOTICE_TIMEOUT) {
            tracing::debug!("object store: {error}");
        }
    }
}

impl Store {
    /// Connects to the store of this host. `name` tells people who this is: a role and rank.
    ///
    /// # Errors
    /// Nobody serves it, another user does, or the token or the build is not the run's.
    pub fn connect(address: &StoreAddress, name: &str) -> Result<Store, StoreError> {
        let name = name.chars().filter(|c| !c.is_control()).take(MAX_NAME / 4).collect();
        let client = Arc::new(Client { address: address.clone(), name, idle: Mutex::default() });
        client.lease()?.give_back();
        Ok(Store(client))
    }

    /// The object, mapped here without a copy.
    ///
    /// # Errors
    /// It is not there: never put, evicted, or still being written.
    pub fn get(&self, id: &ObjectId) -> Result<Object, StoreError> {
        self.wait_for(id, Duration::ZERO)
    }

    /// The object, as soon as it is there.
    ///
    /// # Errors
    /// It is not there after `timeout`; the error names who was bringing it.
    pub fn wait_for(&self, id: &ObjectId, timeout: Duration) -> Result<Object, StoreError> {
        self.found(id, timeout, false)
    }

    /// The object, for this reader alone: it goes when this reader lets go of it.
    ///
    /// # Errors
    /// It is not there: never put, or taken before.
    pub fn take(&self, id: &ObjectId) -> Result<Object, StoreError> {
        self.found(id, Duration::ZERO, true)
    }

    fn found(&self, id: &ObjectId, timeout: Duration, take: bool) -> Result<Object, StoreError> {
        match self.look(id, timeout, false, take)? {
            Looked::Object(object) => Ok(object),
            Looked::Claimed(_) => Err(self.0.misspoke("get")),
        }
    }

    /// The object; when it is not on this host, one of those who ask (of all processes) runs `fetch`, which takes room with
    /// [`Claim::allocate`] and fills it, and the others wait. When it fails, the next one's turn comes.
    ///
    /// # Errors
    /// `fetch` failed here, the bytes are no safetensors, or the object was not there after `timeout`.
    pub fn get_or_fetch(
        &self,
        id: &ObjectId,
        timeout: Duration,
        fetch: impl FnOnce(Claim) -> Result<ObjectWriter, Box<dyn std::error::Error + Send + Sync>>,
    ) -> Result<Object, StoreError> {
        match self.look(id, timeout, true, false)? {
            Looked::Object(object) => Ok(object),
            Looked::Claimed(claim) => {
                let writer = fetch(claim).map_err(|source| StoreError::Fetch { id: id.clone(), source })?;
                writer.finish()
            }
        }
    }

    /// Room for an object of `len` bytes, to be filled here.
    ///
    /// # Errors
    /// The id is used, or the store is full of what others hold.
    pub fn create(&self, id: &ObjectId, len: usize) -> Result<ObjectWriter, StoreError> {
        Claim { id: id.clone(), lease: self.0.lease()?, done: true }.allocate(len)
    }

    /// Lets an object go with its last reference. Who holds it keeps it; nobody new gets it.
    ///
    /// # Errors
    /// It is not there.
    pub fn remove(&self, id: &ObjectId) -> Result<(), StoreError> {
        let lease = self.0.lease()?;
        lease.done(&Request::Remove { id: id.clone() }, None)?;
        lease.give_back();
        Ok(())
    }

    pub fn report(&self) -> Result<StoreReport, StoreError> {
        let lease = self.0.lease()?;
        let (reply, _) = lease.call(&Request::Report, None, ANSWER_TIMEOUT)?;
        lease.give_back();
        match reply {
            Reply::Report(report) => Ok(report),
            _ => Err(self.0.misspoke("report")),
        }
    }

    fn look(&self, id: &ObjectId, timeout: Duration, claim: bool, take: bool) -> Result<Looked, StoreError> {
        let lease = self.0.lease()?;
        let wait_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let request = Request::Get { id: id.clone(), wait_ms, claim, take };
        let (reply, fd) = lease.call(&request, None, timeout.saturating_add(ANSWER_TIMEOUT))?;
        match (reply, fd) {
            (Reply::Object, Some(fd)) => {
                // From here on the reference is given back, whatever fails.
                let reference = lease.reference(id);
                lease.give_back();
                let segment = |source| StoreError::Segment { id: id.clone(), source };
                let map = Segment::from_fd(fd).and_then(|segment| segment.map()).map_err(segment)?;
                Ok(Looked::Object(Object::new(id.clone(), map, reference)?))
            }
            (Reply::Claimed, _) if claim => Ok(Looked::Claimed(Claim { id: id.clone(), lease, done: false })),
            (Reply::Refused(refusal), _) => {
                lease.give_back();
                Err(refusal.into())
            }
            _ => Err(self.0.misspoke("get")),
        }
    }
}

enum Looked {
    Object(Object),
    Claimed(Claim),
}

/// The right, and the duty, to bring an object: others wait for it. Dropped, it passes on.
#[derive(Debug)]
pub struct Claim {
    id: ObjectId,
    lease: Lease,
    /// There is nothing to pass on (any more).
    done: bool,
}

impl Claim {
    /// Room for `len` bytes of the object, to be filled here.
    ///
    /// # Errors
    /// The store is full of what others hold, or the host has no memory left.
    pub fn allocate(mut self, len: usize) -> Result<ObjectWriter, StoreError> {
        self.lease.done(&Request::Reserve { id: self.id.clone(), bytes: len as u64 }, None)?;
        self.done = false;
        ObjectWriter::new(self.id.clone(), len, self)
    }

    /// Hands the complete object over to the server.
    pub(super) fn commit(mut self, segment: &Segment) -> Result<Reference, StoreError> {
        self.give(segment, false)?;
        Ok(self.lease.reference(&self.id))
    }

    /// The same, for its reader.
    pub(super) fn hand_over(mut self, segment: &Segment) -> Result<(), StoreError> {
        self.give(segment, true)
    }

    fn give(&mut self, segment: &Segment, hand_over: bool) -> Result<(), StoreError> {
        self.lease.done(&Request::Commit { id: self.id.clone(), hand_over }, Some(segment))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = self.lease.done(&Request::Abandon { id: self.id.clone() }, None)
        {
            tracing::debug!("{error}");
        }
        self.lease.keep();
    }
}

/// A connection that one call uses. It goes back to the others only when its answers have all been taken.
#[derive(Debug)]
struct Lease {
    client: Arc<Client>,
    connection: Arc<Connection>,
}

impl Client {
    fn lease(self: &Arc<Client>) -> Result<Lease, StoreError> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => self.open()?,
        };
        Ok(Lease { client: self.clone(), connection })
    }

    fn open(self: &Arc<Client>) -> Result<Arc<Connection>, StoreError> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let socket =
            PacketSocket::connect(&self.address.socket, deadline).map_err(|source| self.failed("connect", source))?;
        // Before the token is said: anybody may take a name that nobody has.
        let peer = socket.peer().map_err(|source| self.failed("connect", source))?;
        let uid = rustix::process::geteuid().as_raw();
        if peer.uid != uid {
            let source = io::Error::other(format!("it is served by user {} and this is user {uid}", peer.uid));
            return Err(self.failed("connect", source));
        }
        let connection = Arc::new(Connection { socket, broken: AtomicBool::new(true) });
        let lease = Lease { client: self.clone(), connection };
        let (token, name) = (self.address.token.clone(), self.name.clone());
        lease.done(&Request::Hello { version: VERSION, token, name }, None).map_err(|error| match error {
            StoreError::Server { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof => {
                let source = io::Error::other("it let go of this process: the token is not this run's, or it is full");
                self.failed("hello", source)
            }
            error => error,
        })?;
        Ok(lease.connection)
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> StoreError {
        StoreError::Server { socket: self.address.socket.clone(), operation, source }
    }

    fn misspoke(&self, operation: &'static str) -> StoreError {
        self.failed(operation, io::Error::new(io::ErrorKind::InvalidData, "an answer that does not fit the question"))
    }
}

impl Lease {
    fn call(
        &self,
        request: &Request,
        memory: Option<&Segment>,
        timeout: Duration,
    ) -> Result<(Reply, Option<OwnedFd>), StoreError> {
        let failed = |source| self.client.failed("call", source);
        let message = serde_json::to_vec(request).expect("plain data serialises");
        if message.len() > MAX_MESSAGE {
            return Err(Refusal::Protocol("an id of more than 1024 bytes".into()).into());
        }
        let deadline = Instant::now().checked_add(timeout).unwrap_or_else(|| Instant::now() + ANSWER_TIMEOUT);
        let Connection { socket, broken } = &*self.connection;
        broken.store(true, Ordering::Relaxed);
        socket.send(&message, memory.map(AsFd::as_fd), deadline).map_err(failed)?;
        let mut buffer = [0; MAX_MESSAGE];
        let packet = socket.receive(&mut buffer, deadline).map_err(failed)?;
        let reply = serde_json::from_slice(&buffer[..packet.len]).map_err(|_| self.client.misspoke("call"))?;
        broken.store(false, Ordering::Relaxed);
        Ok((reply, packet.fd))
    }

    /// A call that has nothing to bring back.
    fn done(&self, request: &Request, memory: Option<&Segment>) -> Result<(), StoreError> {
        match self.call(request, memory, ANSWER_TIMEOUT)?.0 {
            Reply::Done => Ok(()),
            Reply::Refused(refusal) => Err(refusal.into()),
            _ => Err(self.client.misspoke("call")),
        }
    }

    fn reference(&self, id: &ObjectId) -> Reference {
        Reference { connection: self.connection.clone(), id: id.clone() }
    }

    fn give_back(self) {
        self.keep();
    }

    /// Lets another call use the connection, if it is sound; this one must not any more.
    fn keep(&self) {
        if self.connection.broken.load(Ordering::Relaxed) {
            return;
        }
        self.client.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.connection.clone());
    }
}
