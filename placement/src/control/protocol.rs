//! What driver and worker say to each other: the messages of the one stream, as protobuf.
//!
//! The field numbers are the wire format. A change that an older build would misread raises [`PROTOCOL`]; the build in the
//! Hello must be the same on both ends anyway, so the version serves to say so in words.

use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher, RandomState};
use std::io::{Read, Seek, SeekFrom};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use prost::{Message, Oneof};
use tonic_prost::ProstCodec;

/// Version of the messages below.
pub const PROTOCOL: u32 = 1;

/// Service and method of the stream.
pub const PATH: &str = "/echelon.Control/Join";

/// Largest piece of a body in one message, bytes.
pub const PIECE_BYTES: usize = 256 << 10;

/// Largest message, bytes: a piece, names and text around it.
pub const MESSAGE_BYTES: usize = PIECE_BYTES + (64 << 10);

/// Codec of the driver's end.
pub type DriverCodec = ProstCodec<ToWorker, FromWorker>;

/// Codec of the worker's end.
pub type WorkerCodec = ProstCodec<FromWorker, ToWorker>;

/// Driver to worker.
#[derive(Clone, PartialEq, Message)]
pub struct ToWorker {
    #[prost(oneof = "Order", tags = "1, 2, 3, 4, 5")]
    pub order: Option<Order>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum Order {
    /// First: the rank is yours.
    #[prost(message, tag = "1")]
    Welcome(Welcome),
    #[prost(message, tag = "2")]
    Call(CallHead),
    #[prost(message, tag = "3")]
    Piece(Piece),
    /// The driver lives.
    #[prost(message, tag = "4")]
    Ping(Ping),
    /// Last.
    #[prost(message, tag = "5")]
    Dismissed(Dismissed),
}

/// Worker to driver.
#[derive(Clone, PartialEq, Message)]
pub struct FromWorker {
    #[prost(oneof = "Word", tags = "1, 2, 3, 4, 5")]
    pub word: Option<Word>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum Word {
    /// First: who this is.
    #[prost(message, tag = "1")]
    Hello(Hello),
    #[prost(message, tag = "2")]
    Answer(AnswerHead),
    #[prost(message, tag = "3")]
    Piece(Piece),
    #[prost(message, tag = "4")]
    Heartbeat(Beat),
    /// Last: why the worker leaves.
    #[prost(string, tag = "5")]
    Goodbye(String),
}

/// Who a worker is.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    #[prost(uint32, tag = "1")]
    pub protocol: u32,
    /// Of the program: see [`build_of_this_program`].
    #[prost(string, tag = "2")]
    pub build: String,
    #[prost(uint32, tag = "3")]
    pub rank: u32,
    /// Workers of the run as this one was told; 0 when nobody told it.
    #[prost(uint32, tag = "4")]
    pub num_workers: u32,
    /// How often a scheduler has restarted the job; a higher one is newer whatever the clocks say.
    #[prost(uint32, tag = "5")]
    pub attempt: u32,
    /// Start of this process, nanoseconds since 1970.
    #[prost(uint64, tag = "6")]
    pub started_ns: u64,
    /// Tells apart two processes of one start time.
    #[prost(uint64, tag = "7")]
    pub nonce: u64,
    #[prost(string, tag = "8")]
    pub host: String,
    #[prost(uint32, tag = "9")]
    pub pid: u32,
    /// What it computes on, for messages.
    #[prost(string, tag = "10")]
    pub device: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Welcome {
    #[prost(uint32, tag = "1")]
    pub num_workers: u32,
    /// How often the driver wants to hear a heartbeat, ms.
    #[prost(uint64, tag = "2")]
    pub heartbeat_ms: u64,
}

/// A call, with the first piece of its body.
#[derive(Clone, PartialEq, Message)]
pub struct CallHead {
    /// From 1, rising.
    #[prost(uint64, tag = "1")]
    pub sequence: u64,
    #[prost(string, tag = "2")]
    pub verb: String,
    /// What is left of its time, ms.
    #[prost(uint64, tag = "3")]
    pub deadline_ms: u64,
    /// Bytes of the whole body.
    #[prost(uint64, tag = "4")]
    pub total: u64,
    #[prost(bytes = "bytes", tag = "5")]
    pub piece: Bytes,
}

/// The answer to a call, with the first piece of its body.
#[derive(Clone, PartialEq, Message)]
pub struct AnswerHead {
    #[prost(uint64, tag = "1")]
    pub sequence: u64,
    /// Of the worker, in words; then there is no body.
    #[prost(string, optional, tag = "2")]
    pub error: Option<String>,
    #[prost(uint64, tag = "3")]
    pub total: u64,
    #[prost(bytes = "bytes", tag = "4")]
    pub piece: Bytes,
}

/// The next bytes of the body that was begun last.
#[derive(Clone, PartialEq, Message)]
pub struct Piece {
    #[prost(bytes = "bytes", tag = "1")]
    pub piece: Bytes,
}

/// What the worker is at.
#[derive(Clone, PartialEq, Message)]
pub struct Beat {
    #[prost(string, tag = "1")]
    pub operation: String,
    #[prost(uint64, tag = "2")]
    pub sequence: u64,
    #[prost(uint64, tag = "3")]
    pub micro_batch: u64,
    /// Phase of the work in progress, for whoever watches, with `done` of `total` units.
    #[prost(string, tag = "4")]
    pub phase: String,
    #[prost(uint64, tag = "5")]
    pub done: u64,
    #[prost(uint64, tag = "6")]
    pub total: u64,
    /// Counts what is finished between operations.
    #[prost(uint64, tag = "7")]
    pub work: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Ping {
    /// Answer with a heartbeat at once.
    #[prost(bool, tag = "1")]
    pub answer: bool,
}

/// Why the driver lets a worker go.
#[derive(Clone, PartialEq, Message)]
pub struct Dismissed {
    /// The run is over, and all is well.
    #[prost(bool, tag = "1")]
    pub finished: bool,
    #[prost(string, tag = "2")]
    pub reason: String,
}

impl Hello {
    /// Of this process, as `rank` of `num_workers`, in the scheduler's `attempt`.
    pub fn of_this_process(rank: u32, num_workers: u32, attempt: u32, device: &str) -> Hello {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // RandomState's keys come from the system's random source.
        let nonce = RandomState::new().hash_one((now, std::process::id()));
        Hello {
            protocol: PROTOCOL,
            build: build_of_this_program(),
            rank,
            num_workers,
            attempt,
            started_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            nonce,
            host: host_name(),
            pid: std::process::id(),
            device: device.into(),
        }
    }

    /// Orders the incarnations of a rank.
    pub fn incarnation(&self) -> (u32, u64, u64) {
        (self.attempt, self.started_ns, self.nonce)
    }
}

/// Version of the package, and a hash over the length and both ends of this program's file: the head of an executable
/// holds its build id, the tail its section table, so that two builds differ in it.
pub fn build_of_this_program() -> String {
    static BUILD: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    BUILD.get_or_init(|| format!("{}+{:016x}", env!("CARGO_PKG_VERSION"), hash_of_program().unwrap_or(0))).clone()
}

fn hash_of_program() -> std::io::Result<u64> {
    const END_BYTES: u64 = 64 << 10;
    let mut file = std::fs::File::open("/proc/self/exe")?;
    let length = file.metadata()?.len();
    let mut ends = Vec::new();
    file.by_ref().take(END_BYTES).read_to_end(&mut ends)?;
    file.seek(SeekFrom::Start(length.saturating_sub(END_BYTES)))?;
    file.take(END_BYTES).read_to_end(&mut ends)?;
    let mut hash = DefaultHasher::new();
    (length, ends).hash(&mut hash);
    Ok(hash.finish())
}

/// Of this machine, as the kernel has it.
pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "unknown".into() } else { name.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_is_newer_whatever_the_clock_says() {
        let old = Hello { attempt: 1, started_ns: 900, ..Hello::default() };
        let new = Hello { attempt: 2, started_ns: 100, ..Hello::default() };
        assert!(new.incarnation() > old.incarnation());
        let (a, b) = (Hello::of_this_process(0, 1, 0, "cpu"), Hello::of_this_process(0, 1, 0, "cpu"));
        assert_ne!(a.incarnation(), b.incarnation());
        assert_eq!(a.build, b.build);
    }

    #[test]
    fn messages_are_what_protobuf_says() {
        // Field 2 (a call), 7 bytes: sequence = 3, verb = "add"; written by hand from the protobuf encoding.
        let call = CallHead { sequence: 3, verb: "add".into(), ..CallHead::default() };
        let message = ToWorker { order: Some(Order::Call(call)) };
        assert_eq!(message.encode_to_vec(), [0x12, 7, 0x08, 3, 0x12, 3, b'a', b'd', b'd']);
        assert!(FromWorker::decode(&[0xff; 16][..]).is_err());
    }
}
