//! Who is let in: TCP and TLS up to a proven certificate, at a bounded cost per stranger.
//!
//! A connection first costs a socket and a small task; TLS state is made when it has sent the first byte of a TLS
//! handshake. At most [`Limits::strangers`] are undecided at a time: then the oldest goes, unless it has just come. All of
//! them are gone [`Limits::handshake`] after they came, and so is an admitted one that does not say Hello.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::Limits;
use super::error::ControlError;

/// Connections that the kernel may hold until they are accepted.
const BACKLOG: u32 = 4096;
/// A stranger is not sent away for another before this: an honest handshake takes a few milliseconds.
const GRACE: Duration = Duration::from_millis(200);
/// How long last words may take to reach a worker before its connection is cut.
const FAREWELL: Duration = Duration::from_secs(1);
/// First byte of a TLS handshake.
const TLS_HANDSHAKE: u8 = 0x16;

/// Listens on `address`; port 0 lets the system choose.
///
/// # Errors
/// The port is in use, or may not be had; the message says what to do.
pub(super) fn listen(address: SocketAddr) -> Result<TcpListener, ControlError> {
    let open = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    open().map_err(|error| cannot_listen(address, &error))
}

pub(super) fn cannot_listen(address: SocketAddr, error: &io::Error) -> ControlError {
    let advice = match error.kind() {
        io::ErrorKind::AddrInUse => "another program has the port: stop it, choose another port, or 0 for any",
        io::ErrorKind::AddrNotAvailable => "this machine has no such address: give one of its own, or 0.0.0.0",
        io::ErrorKind::PermissionDenied => "ports below 1024 need rights: choose a higher one",
        _ => "choose another address or port",
    };
    ControlError::Listen { address: address.to_string(), cause: error.to_string(), advice }
}

/// Accepts for ever; sends on whoever has proved to be of this run.
pub(super) async fn keep(listener: TcpListener, tls: TlsAcceptor, limits: Limits, admitted: mpsc::Sender<Admitted>) {
    let mut tasks = JoinSet::new();
    let mut strangers = VecDeque::new();
    loop {
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Mostly: out of file descriptors. Some come back as strangers go.
                tracing::warn!(%error, "accepting a connection");
                sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        while tasks.try_join_next().is_some() {}
        make_room(&mut strangers, limits.strangers).await;
        let by = Instant::now() + limits.handshake;
        let task = tasks.spawn(greet(stream, address, tls.clone(), by, admitted.clone()));
        strangers.push_back((Instant::now(), task));
    }
}

async fn make_room(strangers: &mut VecDeque<(Instant, AbortHandle)>, limit: usize) {
    if strangers.len() >= limit {
        strangers.retain(|(_, task)| !task.is_finished());
    }
    while strangers.len() >= limit {
        let Some((since, oldest)) = strangers.pop_front() else { return };
        sleep_until(since + GRACE).await;
        oldest.abort();
    }
}

/// Sees a stranger through the TLS handshake, or drops the connection.
async fn greet(
    stream: TcpStream,
    address: SocketAddr,
    tls: TlsAcceptor,
    by: Instant,
    admitted: mpsc::Sender<Admitted>,
) {
    let handshake = async {
        let mut first = [0];
        if stream.peek(&mut first).await? == 0 || first[0] != TLS_HANDSHAKE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no TLS handshake"));
        }
        stream.set_nodelay(true)?;
        tls.accept(stream).await
    };
    match timeout_at(by, handshake).await {
        Ok(Ok(stream)) => {
            let _ = admitted.send(Admitted::new(stream, address, by)).await;
        }
        Ok(Err(error)) => tracing::debug!(%address, %error, "a stranger was turned away"),
        Err(_) => tracing::debug!(%address, "a stranger was silent for too long"),
    }
}

/// A connection whose other end is of this run.
pub(super) struct Admitted {
    stream: TlsStream<TcpStream>,
    arrival: Arrival,
    /// Until then it must have said Hello.
    hello_by: Option<Pin<Box<Sleep>>>,
    /// Ends when the [`Hold`] is let go.
    cut: oneshot::Receiver<()>,
}

/// Who came, and the hold on the connection for whoever takes care of it.
#[derive(Clone)]
pub(super) struct Arrival {
    pub address: SocketAddr,
    pub certificate: Option<CertificateDer<'static>>,
    hold: Arc<Mutex<Option<Hold>>>,
}

/// Dropping it closes the connection.
pub(super) struct Hold(#[expect(dead_code, reason = "its drop is the message")] oneshot::Sender<()>);

impl Hold {
    /// Closes the connection when last words have had time to arrive.
    pub fn let_go(self) {
        tokio::spawn(async move {
            sleep(FAREWELL).await;
            drop(self);
        });
    }
}

impl Arrival {
    /// From now on the connection lives as long as the hold. One caller gets it.
    pub fn take_hold(&self) -> Option<Hold> {
        self.hold.lock().expect("never held over a panic").take()
    }

    fn is_held(&self) -> bool {
        self.hold.lock().expect("never held over a panic").is_none()
    }
}

impl Admitted {
    fn new(stream: TlsStream<TcpStream>, address: SocketAddr, hello_by: Instant) -> Admitted {
        let certificates = stream.get_ref().1.peer_certificates();
        let certificate = certificates.and_then(|chain| chain.first()).map(|leaf| leaf.clone().into_owned());
        let (hold, cut) = oneshot::channel();
        let arrival = Arrival { address, certificate, hold: Arc::new(Mutex::new(Some(Hold(hold)))) };
        Admitted { stream, arrival, hello_by: Some(Box::pin(sleep_until(hello_by))), cut }
    }

    /// Ready with an error once this connection is to end.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if let Some(deadline) = &mut self.hello_by {
            if self.arrival.is_held() {
                self.hello_by = None;
            } else {
                ready!(deadline.as_mut().poll(cx));
                return Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, "no Hello in time"));
            }
        }
        if self.cut.is_terminated() {
            return Poll::Ready(io::ErrorKind::ConnectionAborted.into());
        }
        Pin::new(&mut self.cut).poll(cx).map(|_| io::ErrorKind::ConnectionAborted.into())
    }
}

impl Connected for Admitted {
    type ConnectInfo = Arrival;

    fn connect_info(&self) -> Arrival {
        self.arrival.clone()
    }
}

impl AsyncRead for Admitted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(error) = self.poll_end(cx) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Admitted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
