//! What a client and the server of a store say to each other: one JSON message each way, memory as a descriptor beside it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::id::ObjectId;

/// Both sides must have the same.
pub(super) const VERSION: u32 = 2;

/// The longest message of the protocol, in bytes.
pub(super) const MAX_MESSAGE: usize = 8 << 10;

/// The longest name of a client, in bytes.
pub(super) const MAX_NAME: usize = 64;

/// All but `Release` are answered, one at a time on each connection.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// First on a connection.
    Hello {
        version: u32,
        token: Token,
        name: String,
    },
    /// Room for an object that this connection will bring.
    Reserve {
        id: ObjectId,
        bytes: u64,
    },
    /// The object, complete: its memory comes with the message. The connection holds one reference to it from now on; with
    /// `hand_over` none, and the object waits for its reader.
    Commit {
        id: ObjectId,
        hand_over: bool,
    },
    /// The object will not come.
    Abandon {
        id: ObjectId,
    },
    /// A reference to an object, waiting for it. With `claim`, whoever finds it absent and unclaimed is to bring it. With
    /// `take` nobody else gets it any more, and it goes with its last reference.
    Get {
        id: ObjectId,
        wait_ms: u64,
        claim: bool,
        take: bool,
    },
    /// One reference less.
    Release {
        id: ObjectId,
    },
    /// Nobody needs the object any more: it goes with its last reference.
    Remove {
        id: ObjectId,
    },
    Report,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    Done,
    /// Its memory comes with the message.
    Object,
    /// The connection is the one to bring the object.
    Claimed,
    Report(StoreReport),
    Refused(Refusal),
}

/// What a store holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreReport {
    pub capacity_bytes: u64,
    /// Of objects and of room reserved, in whole pages.
    pub used_bytes: u64,
    pub num_objects: usize,
    /// Objects that some process holds or is writing.
    pub num_held: usize,
    pub num_connections: usize,
    /// Evicted since the start.
    pub num_evicted: u64,
}

/// Why a store says no.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    #[error("{id}: is here already, from {by}; an id is used once")]
    Exists { id: ObjectId, by: String },
    #[error("{id}: {by} is bringing it; wait for it, or use another id")]
    BeingWritten { id: ObjectId, by: String },
    #[error("{id}: {fate}")]
    Unknown { id: ObjectId, fate: Fate },
    #[error("{id}: not there after {waited_ms} ms: {}", match by { Some(by) => format!("{by} is still bringing it"), None => fate.to_string() })]
    NotInTime { id: ObjectId, waited_ms: u64, by: Option<String>, fate: Fate },
    #[error(
        "{id}: {} more bytes wanted by {by}, but {} of the store's {} bytes are taken and {} can be freed; held by {}; let go of objects sooner, or give the store more bytes",
        room.wanted, room.used, room.capacity, room.free_able, room.holders
    )]
    Full { id: ObjectId, by: String, room: Box<Room> },
    #[error("{id}: {by} wants one object more than the {max} a store may have, and all are held; let go of some")]
    TooMany { id: ObjectId, by: String, max: usize },
    #[error("{id}: {by} has reserved no room for it on this connection")]
    NotReserved { id: ObjectId, by: String },
    #[error("{0}")]
    Protocol(String),
}

/// The bytes of a store that is full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    pub wanted: u64,
    pub used: u64,
    pub capacity: u64,
    /// What could be evicted.
    pub free_able: u64,
    /// Who holds the most, for people.
    pub holders: String,
}

/// What became of an object that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fate {
    NeverPut,
    Evicted,
    Removed,
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fate::NeverPut => "was never put into this host's store (or left it long ago); put it, or wait for it",
            Fate::Evicted => {
                "was evicted to make room while nobody held it; hold it until its reader has it, or put it under another id"
            }
            Fate::Removed => "was removed",
        })
    }
}

/// The secret of a run's store. Who has it may read and write all of it.
#[derive(Clone, Serialize, Deserialize)]
pub struct Token(String);

impl Token {
    /// 256 random bits from the kernel.
    pub(super) fn random() -> std::io::Result<Token> {
        Ok(Token(random_hex::<32>()?))
    }

    /// Takes the same time wherever they differ.
    pub(super) fn matches(&self, other: &Token) -> bool {
        let (a, b) = (self.0.as_bytes(), other.0.as_bytes());
        a.len() == b.len() && a.iter().zip(b).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

pub(super) fn random_hex<const N: usize>() -> std::io::Result<String> {
    let mut bytes = [0u8; N];
    let mut filled = 0;
    while filled < N {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
