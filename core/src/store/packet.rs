//! Sockets between the processes of a host: whole messages, each with at most one file descriptor.
//!
//! Their names are abstract: they are no files, and go with the process that listens, however it ends.

use std::io::{Error, ErrorKind, IoSlice, IoSliceMut, Result};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// Connections that the kernel holds for a listener until it accepts them.
const BACKLOG: i32 = 128;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// One end of a connection. Messages arrive whole and in order; a send is atomic, so threads may share an end.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

/// A message's length, and what came with it.
#[derive(Debug)]
pub struct Packet {
    pub len: usize,
    pub fd: Option<OwnedFd>,
}

/// Who holds the other end, as the kernel tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub pid: i32,
    pub uid: u32,
}

impl PacketSocket {
    /// Two ends that are connected; neither is inherited by programs that this process starts.
    pub fn pair() -> Result<(PacketSocket, PacketSocket)> {
        let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
        Ok((PacketSocket(a), PacketSocket(b)))
    }

    /// Connects to the listener of this abstract name.
    ///
    /// # Errors
    /// `ConnectionRefused` when nobody listens; `TimedOut` when its backlog stays full.
    pub fn connect(name: &str, deadline: Instant) -> Result<PacketSocket> {
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
        loop {
            match rustix::net::connect(&socket, &address).map_err(Error::from) {
                Ok(()) => return Ok(PacketSocket(socket)),
                // A full backlog: Unix sockets do not tell when there is room.
                Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(ErrorKind::TimedOut.into()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends a message, with a descriptor that the other process gets a copy of. `WouldBlock` when there is no room.
    pub fn try_send(&self, message: &[u8], fd: Option<BorrowedFd>) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(|fd| [fd]);
        if let Some(fds) = &fds {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "the space was made for one descriptor");
        }
        let flags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);
        let sent = rustix::net::sendmsg(&self.0, &[IoSlice::new(message)], &mut control, flags)?;
        assert_eq!(sent, message.len(), "messages are sent whole");
        Ok(())
    }

    /// Sends a message, waiting for room until `deadline`.
    pub fn send(&self, message: &[u8], fd: Option<BorrowedFd>, deadline: Instant) -> Result<()> {
        self.retry(PollFlags::OUT, deadline, || self.try_send(message, fd))
    }

    /// Takes the next message into `buffer`. `WouldBlock` when there is none, `UnexpectedEof` when the other end is gone,
    /// `InvalidData` when the message is longer than `buffer` or brings more than one descriptor.
    pub fn try_receive(&self, buffer: &mut [u8]) -> Result<Packet> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC.union(RecvFlags::DONTWAIT);
        let received = rustix::net::recvmsg(&self.0, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let cut = ReturnFlags::TRUNC.union(ReturnFlags::CTRUNC);
        if received.flags.intersects(cut) || fds.len() > 1 {
            return Err(Error::new(ErrorKind::InvalidData, "a message longer than the protocol's"));
        }
        if received.bytes == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(Packet { len: received.bytes, fd: fds.pop() })
    }

    /// Takes the next message, waiting for it until `deadline`. Errors as [`PacketSocket::try_receive`], and `TimedOut`.
    pub fn receive(&self, buffer: &mut [u8], deadline: Instant) -> Result<Packet> {
        self.retry(PollFlags::IN, deadline, || self.try_receive(buffer))
    }

    fn retry<T>(&self, event: PollFlags, deadline: Instant, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        loop {
            match attempt() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => wait(self.as_fd(), event, deadline)?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }

    pub fn peer(&self) -> Result<Peer> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.0)?;
        Ok(Peer { pid: credentials.pid.as_raw_nonzero().get(), uid: credentials.uid.as_raw() })
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until `fd` is ready for `event`, or its other end is gone. `TimedOut` at the deadline.
fn wait(fd: BorrowedFd, event: PollFlags, deadline: Instant) -> Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(&mut [PollFd::from_borrowed_fd(fd, event)], Some(&timespec(left))) {
            Ok(0) if left.is_zero() => return Err(ErrorKind::TimedOut.into()),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// A span of time as the kernel takes it.
pub(super) fn timespec(span: Duration) -> Timespec {
    Timespec::try_from(span).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
}

/// Where connections to an abstract name arrive.
#[derive(Debug)]
pub struct PacketListener(OwnedFd);

impl PacketListener {
    /// Takes the name. `AddrInUse` when another process has it.
    pub fn bind(name: &str) -> Result<PacketListener> {
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(PacketListener(socket))
    }

    /// The next connection. `WouldBlock` when there is none.
    pub fn try_accept(&self) -> Result<PacketSocket> {
        Ok(PacketSocket(rustix::net::accept_with(&self.0, FLAGS)?))
    }

    /// The next connection, waiting for it until `deadline`.
    pub fn accept(&self, deadline: Instant) -> Result<PacketSocket> {
        loop {
            match self.try_accept() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => wait(self.as_fd(), PollFlags::IN, deadline)?,
                done => return done,
            }
        }
    }
}

impl AsFd for PacketListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
