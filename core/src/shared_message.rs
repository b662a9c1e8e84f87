//! Messages between processes of one host: a large one is handed over in the host's object store, and only its place goes
//! over the stream. Its tensors are copied once, by the sender; the receiver computes on the shared pages.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::message::{Body, Message, decode, encode, kind_of_message, of_parts};
use crate::plain_messages;
use crate::store::{ObjectId, Store, StoreError};

/// From this size on the store is faster than an encrypted stream (docs/performance.md).
pub const SHARED_FROM: usize = 256 << 10;

/// One end of the messages to and from one rank.
#[derive(Debug)]
pub struct SharedMessages {
    store: Store,
    rank: u32,
    from: usize,
    sent: AtomicU64,
}

/// Where a message lies.
#[derive(Debug, Serialize, Deserialize)]
struct Place {
    id: ObjectId,
}

plain_messages! {
    Place = "place";
}

impl SharedMessages {
    /// Messages to or from `rank`, by the store where their tensors have `from` bytes or more.
    pub fn new(store: Store, rank: u32, from: usize) -> SharedMessages {
        SharedMessages { store, rank, from, sent: AtomicU64::new(0) }
    }

    /// The bytes that go over the stream: the message, or its place. A store that has no room is no reason to fail: then
    /// the message goes as it is.
    pub fn encode<M: Message>(&self, message: &M) -> Vec<u8> {
        let body = message.to_body();
        let bytes = |tensor: &tch::Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        let tensors: usize = body.tensors().values().map(bytes).sum();
        if tensors < self.from {
            return body.to_bytes(M::KIND);
        }
        match self.hand_over(M::KIND, &body) {
            Ok(id) => encode(&Place { id }),
            Err(error) => {
                tracing::warn!("{error}; the batch goes over the network instead");
                body.to_bytes(M::KIND)
            }
        }
    }

    fn hand_over(&self, kind: &str, body: &Body) -> std::result::Result<ObjectId, StoreError> {
        let id = ObjectId::batch(kind, self.rank, self.sent.fetch_add(1, Ordering::Relaxed));
        let tensors: Vec<_> = body.tensors().iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let metadata = body.metadata(kind);
        let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value.as_str())).collect();
        self.store.write(&id, &tensors, &metadata)?.hand_over()?;
        Ok(id)
    }

    /// The message that came over the stream, or that lies where it says. Tensors of the latter are read-only.
    ///
    /// # Errors
    /// The bytes are damaged or hold another message; the message is not where it should be.
    pub fn decode<M: Message>(&self, bytes: &[u8]) -> Result<M> {
        if kind_of_message(bytes).as_deref() != Some(Place::KIND) {
            return decode(bytes);
        }
        let Place { id } = decode(bytes)?;
        let failed = |error| Error::other(format!("a `{}` message", M::KIND), error);
        let object = self.store.take(&id).map_err(failed)?;
        let tensor = |name: &String| Ok((name.clone(), object.tensor(name)?));
        let tensors: HashMap<_, _> =
            object.names().iter().map(tensor).collect::<std::result::Result<_, _>>().map_err(failed)?;
        of_parts(|key| object.metadata(key), tensors)
    }

    /// Lets go of what [`SharedMessages::encode`] handed over, where the receiver may never take it.
    pub fn forget(&self, bytes: &[u8]) {
        if kind_of_message(bytes).as_deref() == Some(Place::KIND)
            && let Ok(Place { id }) = decode(bytes)
        {
            let _taken_before = self.store.remove(&id);
        }
    }
}
