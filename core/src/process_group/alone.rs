//! NCCL on one device without a peer, which a [`ProcessGroup`](super::ProcessGroup) of one rank never calls: whether the
//! library loads, connects and computes can be seen where there is a single GPU.

use std::ffi::c_int;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::Operation;
use super::nccl::{Communicator, Library};
use crate::error::{Error, Result};

/// How long an operation that has nobody to wait for may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Such as `2.28.9`.
///
/// # Errors
/// NCCL is not on this machine.
pub fn nccl_version() -> Result<String> {
    Library::open()?;
    let failed = |error: libloading::Error| Error::Refused(format!("asking NCCL for its version: {error}"));
    let mut code: c_int = 0;
    // SAFETY: the signature is that of nccl.h; the library is open for the life of the process.
    unsafe {
        let library = libloading::Library::new("libnccl.so.2").map_err(failed)?;
        let version: libloading::Symbol<unsafe extern "C" fn(*mut c_int) -> c_int> =
            library.get(b"ncclGetVersion\0").map_err(failed)?;
        version(&mut code);
    }
    Ok(format!("{}.{}.{}", code / 10_000, code / 100 % 100, code % 100))
}

/// Every collective once in a group of this device alone, where each must give back what it was given; their names.
///
/// # Errors
/// NCCL is missing or refuses; a result that is another one; an operation that does not end.
pub fn nccl_alone(device: usize) -> Result<Vec<&'static str>> {
    let library = Library::open()?;
    let begun = Instant::now();
    let mut in_time = || match begun.elapsed() < PATIENCE {
        true => Ok(()),
        false => Err(Error::Refused(format!("NCCL has not connected one rank after {PATIENCE:?}"))),
    };
    let communicator = Communicator::join(library, &library.unique_id()?, (0, 1), device, &mut in_time)?;
    let communicator = Arc::new(communicator);
    let numbers = || Tensor::arange(1024, (Kind::Float, Device::Cuda(device)));
    let (reduced, gathered, sent, told) = (numbers(), numbers().zeros_like(), numbers(), numbers());
    let received = sent.zeros_like();
    let operations = [
        ("all-reduce", Operation::AllReduce(&reduced), &reduced),
        ("all-gather", Operation::AllGather { gathered: &gathered, shard: &sent }, &gathered),
        ("all-to-all", Operation::AllToAll { received: &received, sent: &sent }, &received),
        ("broadcast", Operation::Broadcast(&told, 0), &told),
    ];
    for (name, operation, result) in &operations {
        if !communicator.begin(operation)?.wait(PATIENCE)? {
            return Err(Error::Refused(format!("NCCL's {name} of one rank has not ended after {PATIENCE:?}")));
        }
        if !result.f_equal(&numbers())? {
            return Err(Error::Refused(format!("NCCL's {name} of one rank gave other numbers than it was given")));
        }
    }
    Ok(operations.iter().map(|(name, ..)| *name).collect())
}
