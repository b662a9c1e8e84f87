//! The bridge to c10d in `csrc/`: the store that ranks meet at, a group's operations, and storages that come and go.

use tch::{TchError, Tensor};

use crate::shim::{adopt, raw, torch_error};

#[cxx::bridge(namespace = "echelon")]
pub(crate) mod ffi {
    unsafe extern "C++" {
        include!("process_group.h");
        #[namespace = "at"]
        type Tensor = crate::shim::ffi::Tensor;
        type MeetingStore;
        fn meet_at(host: &str, port: u16, listener: i32, timeout_ms: i64) -> Result<UniquePtr<MeetingStore>>;
        fn port(self: &MeetingStore) -> u16;
        fn set(self: &MeetingStore, key: &str, value: &[u8]) -> Result<()>;
        fn get(self: &MeetingStore, key: &str, timeout_ms: i64) -> Result<Vec<u8>>;
        fn has(self: &MeetingStore, key: &str) -> Result<bool>;
        fn add(self: &MeetingStore, key: &str, amount: i64) -> Result<i64>;
        fn advance(self: &MeetingStore, key: &str, from: i64) -> Result<bool>;
        fn remove(self: &MeetingStore, key: &str) -> Result<()>;

        type RankGroup;
        fn join_gloo(
            store: &MeetingStore,
            prefix: &str,
            rank: i32,
            size: i32,
            address: &str,
            connect_ms: i64,
        ) -> Result<UniquePtr<RankGroup>>;
        fn all_reduce(self: &RankGroup, tensor: &Tensor) -> Result<UniquePtr<PendingWork>>;
        fn all_gather(self: &RankGroup, gathered: &Tensor, shard: &Tensor) -> Result<UniquePtr<PendingWork>>;
        fn all_gather_in_place(self: &RankGroup, gathered: &Tensor, shard: &Tensor) -> Result<UniquePtr<PendingWork>>;
        fn all_to_all(self: &RankGroup, received: &Tensor, sent: &Tensor) -> Result<UniquePtr<PendingWork>>;
        fn broadcast(self: &RankGroup, tensor: &Tensor, root: i64) -> Result<UniquePtr<PendingWork>>;
        fn send(self: &RankGroup, tensor: &Tensor, to: i32, tag: i32) -> Result<UniquePtr<PendingWork>>;
        fn recv(self: &RankGroup, tensor: &Tensor, from: i32, tag: i32) -> Result<UniquePtr<PendingWork>>;
        fn barrier(self: &RankGroup) -> Result<UniquePtr<PendingWork>>;
        fn abort(self: &RankGroup) -> Result<()>;

        type PendingWork;
        fn wait(self: &PendingWork, timeout_ms: i64) -> Result<bool>;

        include!("device_stream.h");
        type DeviceStream;
        fn side_stream(cuda_index: i32) -> Result<UniquePtr<DeviceStream>>;
        fn handle(self: &DeviceStream) -> Result<usize>;
        fn follow_current(self: &DeviceStream) -> Result<()>;
        fn mark(self: &DeviceStream) -> Result<UniquePtr<StreamMark>>;
        type StreamMark;
        fn is_reached(self: &StreamMark) -> Result<bool>;

        fn allocate_storage(tensor: &Tensor) -> Result<()>;
        fn free_storage(tensor: &Tensor) -> Result<()>;
        fn unversioned(tensor: &Tensor) -> Result<UniquePtr<Tensor>>;
    }
}

// SAFETY: c10d's stores, backends and works guard themselves with locks and may be used from any thread.
unsafe impl Send for ffi::MeetingStore {}
unsafe impl Sync for ffi::MeetingStore {}
unsafe impl Send for ffi::RankGroup {}
unsafe impl Sync for ffi::RankGroup {}
unsafe impl Send for ffi::PendingWork {}
// SAFETY: plain handles of the device's runtime, which may be used from any thread; each is used by one at a time.
unsafe impl Send for ffi::DeviceStream {}
unsafe impl Sync for ffi::DeviceStream {}
unsafe impl Send for ffi::StreamMark {}

/// Takes memory for a tensor whose storage was freed; views see it at once. What it holds is undefined.
///
/// # Errors
/// libtorch's, when memory runs out.
pub fn allocate_storage(tensor: &Tensor) -> Result<(), TchError> {
    ffi::allocate_storage(raw(tensor)).map_err(torch_error)
}

/// Gives a tensor's memory back while it and its views stay; they must not be read until it is allocated again.
///
/// # Errors
/// libtorch's.
pub fn free_storage(tensor: &Tensor) -> Result<(), TchError> {
    ffi::free_storage(raw(tensor)).map_err(torch_error)
}

/// The same memory without a history: graphs that saved the tensor do not notice writes to it.
///
/// # Errors
/// libtorch's.
pub fn unversioned(tensor: &Tensor) -> Result<Tensor, TchError> {
    Ok(adopt(&ffi::unversioned(raw(tensor)).map_err(torch_error)?))
}
