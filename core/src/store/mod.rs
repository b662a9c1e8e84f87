//! The object store of a host: batches and weights as safetensors objects in memory that all its processes share.
//!
//! One server per host ([`StoreServer`]) keeps objects; processes reach it by a [`Store`], write an object where it will
//! stay ([`Store::put`], [`Store::create`]) and map those of others without a copy ([`Store::get`]). What an object's memory
//! is, is [`segment`]; how a process hands it to another, [`packet`]. Calls block the thread that makes them: async code
//! wraps them in `spawn_blocking`.
//!
//! * **OS-1** An object is written once. When others can see it, it is sealed by the kernel: its bytes never change and it
//!   never shrinks, so that reading it cannot fault, whatever its writer does or however it ends.
//! * **OS-2** A reader maps the writer's pages. No byte is copied, and none goes through a socket.
//! * **OS-3** What a process has mapped stays valid until it lets go: through eviction, removal and the server's death.
//! * **OS-4** Objects are safetensors. Their bytes are checked before the store takes them and again by each reader: bytes that
//!   are damaged or made to harm are an error, never a panic and never a read outside of them.
//! * **OS-5** References are counted by connection, and a connection goes with its process: who is killed holds nothing.
//! * **OS-6** What is held, or handed over and not taken yet, is never evicted. Room is made from what nobody holds, least recently let go first; when that is
//!   not enough nothing is evicted, and the error says who holds what.
//! * **OS-7** An id stands for one object and is used once. Of several who miss it at once, one brings it; when that one
//!   fails or dies, the next.
//! * **OS-8** There is nothing to clean up. Memory has no file and the socket no path: all is gone with the last process that
//!   uses it, however it ends.
//! * **OS-9** The server waits for nobody and grows for nobody: one request and some notices per client and round, one unanswered
//!   request per connection, connections and objects counted, strangers dropped after seconds. Only the run's user is let in, and only with its token.
//! * **OS-10** Every wait has a deadline, and every error says what to do.

mod client;
mod error;
mod id;
mod inventory;
mod memory;
mod object;
pub mod packet;
mod protocol;
pub mod segment;
mod server;
mod writer;

pub use client::{Claim, Store};
pub use error::StoreError;
pub use id::ObjectId;
pub use memory::{available, total};
pub use object::Object;
pub use packet::{PacketListener, PacketSocket};
pub use protocol::{Fate, Refusal, Room, StoreReport, Token};
pub use segment::{LiveMap, LiveSegment, LiveWriter, Segment, SegmentError, SegmentMap, SegmentWriter};
pub use server::{StoreAddress, StoreConfig, StoreServer};
pub use writer::ObjectWriter;
