//! Bodies in pieces: a stream that cuts them as the wire takes them, so that heartbeats overtake, and their assembly.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio_stream::Stream;

use super::protocol::{AnswerHead, CallHead, FromWorker, Order, PIECE_BYTES, Piece, ToWorker, Word};

/// Urgent messages that may wait: heartbeats and farewells.
const URGENT: usize = 8;

/// A message that may carry a body, or a piece of one.
pub(super) trait Carrier: Unpin + Send + 'static {
    type Head: Unpin + Send + 'static;
    /// `first` of `total` bytes.
    fn begin(head: Self::Head, total: u64, first: Bytes) -> Self;
    fn piece(piece: Bytes) -> Self;
}

/// A body on its way out.
pub(super) struct Outgoing<M: Carrier> {
    pub head: M::Head,
    pub body: Bytes,
    /// Not worth sending any more from then on.
    pub expires: Option<Instant>,
    /// Room in a bounded queue, given back once the body is sent or dropped.
    pub room: Option<OwnedSemaphorePermit>,
}

/// The sending ends of an [`Outbox`]; it ends when they are dropped.
pub(super) struct Sending<M: Carrier> {
    pub urgent: Sender<M>,
    pub bodies: Sender<Outgoing<M>>,
}

impl<M: Carrier> Clone for Sending<M> {
    fn clone(&self) -> Sending<M> {
        Sending { urgent: self.urgent.clone(), bodies: self.bodies.clone() }
    }
}

/// What goes out on one stream: urgent messages first, then bodies in order, a piece at a time.
pub(super) struct Outbox<M: Carrier> {
    urgent: Receiver<M>,
    bodies: Receiver<Outgoing<M>>,
    /// The rest of the body that is being sent.
    rest: Bytes,
    room: Option<OwnedSemaphorePermit>,
}

impl<M: Carrier> Outbox<M> {
    /// At most `waiting` bodies wait.
    pub fn new(waiting: usize) -> (Sending<M>, Outbox<M>) {
        let (urgent, urgent_out) = mpsc::channel(URGENT);
        let (bodies, bodies_out) = mpsc::channel(waiting);
        let outbox = Outbox { urgent: urgent_out, bodies: bodies_out, rest: Bytes::new(), room: None };
        (Sending { urgent, bodies }, outbox)
    }

    /// The head of a body with its first piece; none when nobody waits for it any more.
    fn begin(&mut self, outgoing: Outgoing<M>) -> Option<M> {
        let Outgoing { head, mut body, expires, room } = outgoing;
        if expires.is_some_and(|at| at <= Instant::now()) {
            return None;
        }
        let total = body.len() as u64;
        let first = body.split_to(body.len().min(PIECE_BYTES));
        self.room = if body.is_empty() { None } else { room };
        self.rest = body;
        Some(M::begin(head, total, first))
    }

    fn next_piece(&mut self) -> M {
        let piece = self.rest.split_to(self.rest.len().min(PIECE_BYTES));
        if self.rest.is_empty() {
            self.room = None;
        }
        M::piece(piece)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<M>> {
        // Wakers are registered only when there is nothing to send.
        match self.urgent.try_recv() {
            Ok(message) => return Poll::Ready(Some(message)),
            Err(TryRecvError::Disconnected) => return Poll::Ready(None),
            Err(TryRecvError::Empty) if !self.rest.is_empty() => return Poll::Ready(Some(self.next_piece())),
            Err(TryRecvError::Empty) => {}
        }
        while let Ok(body) = self.bodies.try_recv() {
            if let Some(message) = self.begin(body) {
                return Poll::Ready(Some(message));
            }
        }
        if let Poll::Ready(message) = self.urgent.poll_recv(cx) {
            return Poll::Ready(message);
        }
        // The urgent end decides when the stream is over: a farewell may still come.
        while let Poll::Ready(Some(body)) = self.bodies.poll_recv(cx) {
            if let Some(message) = self.begin(body) {
                return Poll::Ready(Some(message));
            }
        }
        Poll::Pending
    }
}

/// As the worker's end of gRPC wants it.
impl Stream for Outbox<FromWorker> {
    type Item = FromWorker;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<FromWorker>> {
        self.get_mut().poll(cx)
    }
}

/// As the driver's end of gRPC wants it.
impl Stream for Outbox<ToWorker> {
    type Item = Result<ToWorker, tonic::Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll(cx).map(|message| message.map(Ok))
    }
}

/// Head of a call: sequence, verb, and when it is due.
pub(super) struct CallTo(pub u64, pub &'static str, pub Option<Instant>);

impl Carrier for ToWorker {
    type Head = CallTo;

    fn begin(CallTo(sequence, verb, due): CallTo, total: u64, piece: Bytes) -> ToWorker {
        let left = due.map(|due| due.saturating_duration_since(Instant::now()).as_millis());
        let deadline_ms = left.and_then(|left| u64::try_from(left).ok()).unwrap_or(u64::MAX);
        order(Order::Call(CallHead { sequence, verb: verb.into(), deadline_ms, total, piece }))
    }

    fn piece(piece: Bytes) -> ToWorker {
        order(Order::Piece(Piece { piece }))
    }
}

/// Head of an answer: sequence, and the error in its place.
pub(super) struct AnswerTo(pub u64, pub Option<String>);

impl Carrier for FromWorker {
    type Head = AnswerTo;

    fn begin(AnswerTo(sequence, error): AnswerTo, total: u64, piece: Bytes) -> FromWorker {
        word(Word::Answer(AnswerHead { sequence, error, total, piece }))
    }

    fn piece(piece: Bytes) -> FromWorker {
        word(Word::Piece(Piece { piece }))
    }
}

pub(super) fn order(order: Order) -> ToWorker {
    ToWorker { order: Some(order) }
}

pub(super) fn word(word: Word) -> FromWorker {
    FromWorker { word: Some(word) }
}

/// The body that is arriving.
pub(super) struct Assembly<H> {
    limit: usize,
    open: Option<(H, usize, Vec<u8>)>,
}

impl<H> Assembly<H> {
    /// Bodies of at most `limit` bytes.
    pub fn new(limit: usize) -> Assembly<H> {
        Assembly { limit, open: None }
    }

    /// Takes a head with the first piece; gives both back when that was all.
    ///
    /// # Errors
    /// What the other end did against the protocol.
    pub fn begin(&mut self, head: H, total: u64, piece: Bytes) -> Result<Option<(H, Bytes)>, String> {
        if self.open.is_some() {
            return Err("it began a body before it had finished the last".into());
        }
        let total = usize::try_from(total).ok().filter(|total| *total <= self.limit);
        let Some(total) = total else { return Err(format!("it announced a body over {} bytes", self.limit)) };
        if piece.len() == total {
            return Ok(Some((head, piece)));
        }
        let mut body = Vec::new();
        // Untouched memory costs nothing: what was announced and never sent does not count.
        body.try_reserve_exact(total).map_err(|error| format!("a body of {total} bytes: {error}"))?;
        self.open = Some((head, total, body));
        self.piece(piece)
    }

    /// Takes the next piece; gives head and body back when it was the last.
    ///
    /// # Errors
    /// What the other end did against the protocol.
    pub fn piece(&mut self, piece: Bytes) -> Result<Option<(H, Bytes)>, String> {
        let Some((_, total, body)) = &mut self.open else { return Err("it sent a piece of no body".into()) };
        if piece.is_empty() || piece.len() > *total - body.len() {
            return Err(format!("it sent {} bytes where {} of a body were left", piece.len(), *total - body.len()));
        }
        body.extend_from_slice(&piece);
        if body.len() < *total {
            return Ok(None);
        }
        Ok(self.open.take().map(|(head, _, body)| (head, Bytes::from(body))))
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;

    use super::*;
    use crate::control::protocol::Ping;

    fn call(sequence: u64, body: Bytes) -> Outgoing<ToWorker> {
        Outgoing { head: CallTo(sequence, "verb", None), body, expires: None, room: None }
    }

    #[tokio::test]
    async fn a_ping_overtakes_a_body_and_calls_keep_their_order() {
        let (sending, mut outbox) = Outbox::<ToWorker>::new(4);
        let body = Bytes::from((0..3 * PIECE_BYTES + 5).map(|i| i as u8).collect::<Vec<u8>>());
        assert!(sending.bodies.try_send(call(1, body.clone())).is_ok());
        assert!(sending.bodies.try_send(call(2, Bytes::from_static(b"ab"))).is_ok());
        let mut assembly = Assembly::new(1 << 30);
        let (mut done, mut pings) = (Vec::new(), Vec::new());
        for turn in 0..6 {
            if turn == 2 {
                sending.urgent.try_send(order(Order::Ping(Ping::default()))).unwrap();
            }
            let finished = match outbox.next().await.unwrap().unwrap().order.unwrap() {
                Order::Call(head) => assembly.begin(head.sequence, head.total, head.piece).unwrap(),
                Order::Piece(piece) => assembly.piece(piece.piece).unwrap(),
                Order::Ping(_) => {
                    pings.push(turn);
                    None
                }
                other => panic!("{other:?}"),
            };
            done.extend(finished);
        }
        assert_eq!(pings, [2], "between the pieces of the first body");
        assert_eq!(done, [(1, body), (2, Bytes::from_static(b"ab"))]);
        drop(sending);
        assert!(outbox.next().await.is_none());
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_not_sent() {
        let (sending, mut outbox) = Outbox::<ToWorker>::new(4);
        let late = Outgoing { expires: Some(Instant::now()), ..call(1, Bytes::new()) };
        assert!(sending.bodies.try_send(late).is_ok() && sending.bodies.try_send(call(2, Bytes::new())).is_ok());
        let Order::Call(head) = outbox.next().await.unwrap().unwrap().order.unwrap() else { panic!("a call") };
        assert_eq!(head.sequence, 2);
    }

    #[test]
    fn pieces_against_the_protocol_are_errors() {
        let bytes = |n: usize| Bytes::from(vec![0; n]);
        let mut assembly = Assembly::new(100);
        assert!(assembly.begin((), u64::MAX, bytes(1)).unwrap_err().contains("over 100 bytes"));
        assert!(assembly.piece(bytes(1)).unwrap_err().contains("no body"));
        assert!(assembly.begin((), 3, bytes(4)).is_err());
        let mut assembly = Assembly::new(100);
        assert!(assembly.begin((), 10, bytes(4)).unwrap().is_none());
        assert!(assembly.begin((), 10, bytes(4)).is_err(), "a second body inside the first");
        assert!(assembly.piece(bytes(7)).is_err() && assembly.piece(bytes(0)).is_err());
        assert_eq!(assembly.piece(bytes(6)).unwrap().unwrap().1.len(), 10);
    }
}
