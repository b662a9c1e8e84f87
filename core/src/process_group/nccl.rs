//! Collectives between GPUs: NCCL, loaded at run time, on a stream of its own beside libtorch's.
//!
//! Declared by hand instead of by a bindings crate: it is a dozen functions over plain values, libtorch's CUDA build brings
//! the library itself, and streams and events come from libtorch, so nothing of CUDA is needed to build. Waits are
//! the host's: an operation's tensors are not released, nor read by later work, before it has ended.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use super::Operation;
use crate::collective::ffi;
use crate::error::{Error, Result};
use crate::shim::torch_error;

pub(super) const ID_BYTES: usize = 128;

/// `ncclUniqueId`: what ranks share to find each other.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; ID_BYTES]);

/// `ncclConfig_t` of NCCL 2.14, the first with it; newer ones take what is missing as not said.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

impl Config {
    /// Calls return at once and are asked how far they are: NCCL's own waits have no end.
    const NON_BLOCKING: Config =
        Config { size: size_of::<Config>(), magic: 0xcafe_beef, version: 2_14_00, blocking: 0 };
}

/// `ncclComm_t`.
type RawCommunicator = *mut c_void;
/// `cudaStream_t`.
type Stream = usize;

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// How long a call may take until its work is in the stream: connections are made by then.
const LONGEST_BEGINNING: Duration = Duration::from_secs(60);
/// `ncclInt8`: bytes, so that every dtype travels unchanged.
const BYTES: c_int = 0;
/// `ncclSum`.
const SUM: c_int = 0;

macro_rules! library {
    ($($name:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// NCCL's functions; the library stays open for the life of the process.
        pub(super) struct Library {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Library {
            fn load(name: &str) -> std::result::Result<Library, libloading::Error> {
                // SAFETY: NCCL's initialisers may run at any time; the signatures are those of nccl.h since 2.4, and the
                // library is never closed.
                unsafe {
                    let library = libloading::Library::new(name)?;
                    let functions = Library { $($name: *library.get($symbol)?,)* };
                    std::mem::forget(library);
                    Ok(functions)
                }
            }
        }
    };
}

library! {
    get_unique_id = b"ncclGetUniqueId\0": fn(*mut UniqueId) -> c_int;
    init_rank = b"ncclCommInitRankConfig\0": fn(*mut RawCommunicator, c_int, UniqueId, c_int, *mut Config) -> c_int;
    destroy = b"ncclCommDestroy\0": fn(RawCommunicator) -> c_int;
    abort = b"ncclCommAbort\0": fn(RawCommunicator) -> c_int;
    async_error = b"ncclCommGetAsyncError\0": fn(RawCommunicator, *mut c_int) -> c_int;
    error_string = b"ncclGetErrorString\0": fn(c_int) -> *const c_char;
    group_start = b"ncclGroupStart\0": fn() -> c_int;
    group_end = b"ncclGroupEnd\0": fn() -> c_int;
    all_reduce = b"ncclAllReduce\0": fn(*const c_void, *mut c_void, usize, c_int, c_int, RawCommunicator, Stream) -> c_int;
    all_gather = b"ncclAllGather\0": fn(*const c_void, *mut c_void, usize, c_int, RawCommunicator, Stream) -> c_int;
    broadcast = b"ncclBroadcast\0": fn(*const c_void, *mut c_void, usize, c_int, c_int, RawCommunicator, Stream) -> c_int;
    send = b"ncclSend\0": fn(*const c_void, usize, c_int, c_int, RawCommunicator, Stream) -> c_int;
    recv = b"ncclRecv\0": fn(*mut c_void, usize, c_int, c_int, RawCommunicator, Stream) -> c_int;
}

impl Library {
    /// # Errors
    /// NCCL is not on this machine, with what to install.
    pub fn open() -> Result<&'static Library> {
        static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
        Library::open_in(&LIBRARY, "libnccl.so.2")
    }

    fn open_in(slot: &'static OnceLock<std::result::Result<Library, String>>, name: &str) -> Result<&'static Library> {
        slot.get_or_init(|| Library::load(name).map_err(|error| error.to_string())).as_ref().map_err(|message| {
            Error::Refused(format!(
                "collectives between GPUs need NCCL 2.14 or newer: {message}; install it (pip install nvidia-nccl-cu13, or \
                 the distribution's libnccl2) and let the loader find it (LD_LIBRARY_PATH)"
            ))
        })
    }

    /// For one rank to make and the others to be told.
    pub fn unique_id(&self) -> Result<[u8; ID_BYTES]> {
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: the pointer is to a whole `ncclUniqueId`.
        self.check("ncclGetUniqueId", unsafe { (self.get_unique_id)(&mut id) })?;
        Ok(id.0)
    }

    fn check(&self, function: &str, code: c_int) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: NCCL returns a static string for every code.
        let message = unsafe { CStr::from_ptr((self.error_string)(code)) }.to_string_lossy();
        Err(Error::Refused(format!("{function}: {message} (NCCL error {code})")))
    }
}

/// One rank's end of the connections between a group's GPUs.
pub(super) struct Communicator {
    library: &'static Library,
    /// None once it was given up.
    raw: Mutex<Option<Raw>>,
    given_up: AtomicBool,
    stream: cxx::UniquePtr<ffi::DeviceStream>,
    device: usize,
    size: usize,
}

struct Raw(RawCommunicator);

// SAFETY: NCCL allows calls from any thread, one at a time; the mutex around it sees to that.
unsafe impl Send for Raw {}

/// An operation on the device's queue.
pub(super) struct Enqueued {
    mark: cxx::UniquePtr<ffi::StreamMark>,
    communicator: Arc<Communicator>,
}

impl Communicator {
    /// Connects this rank's `device`; every rank does this at once. `wait_on` is asked now and then whether to wait on.
    ///
    /// # Errors
    /// NCCL's, or what `wait_on` says.
    pub fn join(
        library: &'static Library,
        id: &[u8],
        (rank, size): (usize, usize),
        device: usize,
        wait_on: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Communicator> {
        let stream = ffi::side_stream(device as i32).map_err(torch_error)?;
        let mut shared = UniqueId([0; ID_BYTES]);
        shared.0.copy_from_slice(id);
        let (mut raw, mut config) = (std::ptr::null_mut(), Config::NON_BLOCKING);
        // SAFETY: `raw` takes the communicator; the thread's device is the stream's.
        let code = unsafe { (library.init_rank)(&mut raw, size as c_int, shared, rank as c_int, &mut config) };
        let (raw, given_up) = (Mutex::new(Some(Raw(raw))), AtomicBool::new(false));
        let communicator = Communicator { library, raw, given_up, stream, device, size };
        let joined = communicator.settle("ncclCommInitRankConfig", code, communicator.raw()?, wait_on);
        joined.inspect_err(|_| communicator.abort())?;
        Ok(communicator)
    }

    /// # Errors
    /// A tensor on another device than the first one's.
    pub fn on(&self, device: usize) -> Result<()> {
        if device == self.device {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "a tensor on cuda:{device}, and this rank of the group is cuda:{}: a rank has one device",
            self.device
        )))
    }

    /// Enqueues an operation behind what the current stream has so far.
    pub fn begin(self: &Arc<Self>, operation: &Operation) -> Result<Enqueued> {
        let raw = self.raw.lock().expect("never poisoned");
        let Some(Raw(raw)) = *raw else { return Err(given_up()) };
        self.stream.follow_current().map_err(torch_error)?;
        let stream = self.stream.handle().map_err(torch_error)?;
        self.enqueue(operation, raw, stream)?;
        Ok(Enqueued { mark: self.stream.mark().map_err(torch_error)?, communicator: self.clone() })
    }

    fn enqueue(&self, operation: &Operation, raw: RawCommunicator, stream: Stream) -> Result<()> {
        let nccl = self.library;
        // SAFETY: pointers and lengths are those of contiguous tensors on this communicator's device, which the caller
        // keeps until the operation has ended.
        unsafe {
            match *operation {
                Operation::AllReduce(tensor) => {
                    let (data, _) = memory(tensor)?;
                    let code = (nccl.all_reduce)(data, data, tensor.numel(), dtype(tensor)?, SUM, raw, stream);
                    self.begun("ncclAllReduce", code, raw)
                }
                Operation::AllGather { gathered, shard } | Operation::AllGatherInPlace { gathered, shard } => {
                    let ((to, _), (from, length)) = (memory(gathered)?, memory(shard)?);
                    self.begun("ncclAllGather", (nccl.all_gather)(from, to, length, BYTES, raw, stream), raw)
                }
                Operation::AllToAll { received, sent } => {
                    let ((to, _), (from, length)) = (memory(received)?, memory(sent)?);
                    let part = length / self.size;
                    nccl.check("ncclGroupStart", (nccl.group_start)())?;
                    let mut failed = SUCCESS;
                    for peer in 0..self.size {
                        let at = peer * part;
                        let sent = (nccl.send)(from.byte_add(at), part, BYTES, peer as c_int, raw, stream);
                        let received = (nccl.recv)(to.byte_add(at), part, BYTES, peer as c_int, raw, stream);
                        failed =
                            [sent, received].into_iter().filter(|&code| code != IN_PROGRESS).fold(failed, c_int::max);
                    }
                    let ended = (nccl.group_end)();
                    nccl.check("ncclSend and ncclRecv", failed)?;
                    self.begun("ncclGroupEnd", ended, raw)
                }
                Operation::Broadcast(tensor, root) => {
                    let (data, length) = memory(tensor)?;
                    let code = (nccl.broadcast)(data, data, length, BYTES, root as c_int, raw, stream);
                    self.begun("ncclBroadcast", code, raw)
                }
                // NCCL has no tags: two ranks' messages arrive in the order they were sent.
                Operation::Send(tensor, to, _) => {
                    let (data, length) = memory(tensor)?;
                    self.begun("ncclSend", (nccl.send)(data, length, BYTES, to as c_int, raw, stream), raw)
                }
                Operation::Recv(tensor, from, _) => {
                    let (data, length) = memory(tensor)?;
                    self.begun("ncclRecv", (nccl.recv)(data, length, BYTES, from as c_int, raw, stream), raw)
                }
                Operation::Barrier => unreachable!("a barrier has no tensor on a device"),
            }
        }
    }

    /// Waits until a call has done what it has to do before its work is in the stream.
    fn begun(&self, function: &str, code: c_int, raw: RawCommunicator) -> Result<()> {
        let begun = Instant::now();
        self.settle(function, code, raw, &mut || match begun.elapsed() < LONGEST_BEGINNING {
            true => Ok(()),
            false => Err(Error::Refused(format!("{function}: not begun for {} s", LONGEST_BEGINNING.as_secs()))),
        })
    }

    /// Waits for the end of a call that returned at once.
    fn settle(
        &self,
        function: &str,
        mut code: c_int,
        raw: RawCommunicator,
        wait_on: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let mut pause = Duration::from_micros(20);
        while code == IN_PROGRESS {
            wait_on()?;
            if self.given_up.load(Ordering::Acquire) {
                return Err(given_up());
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
            code = self.state_of(raw)?;
        }
        self.library.check(function, code)
    }

    /// What a communicator that nobody else knows yet, or whose lock is held, is at.
    fn state_of(&self, raw: RawCommunicator) -> Result<c_int> {
        let mut code = SUCCESS;
        // SAFETY: the communicator is alive.
        self.library.check("ncclCommGetAsyncError", unsafe { (self.library.async_error)(raw, &mut code) })?;
        Ok(code)
    }

    fn raw(&self) -> Result<RawCommunicator> {
        self.raw.lock().expect("never poisoned").as_ref().map(|Raw(raw)| *raw).ok_or_else(given_up)
    }

    /// Ends what is in flight. What it had written by then is of no use.
    pub fn abort(&self) {
        self.given_up.store(true, Ordering::Release); // before an operation that it ends seems to be done
        if let Some(Raw(raw)) = self.raw.lock().expect("never poisoned").take() {
            // SAFETY: taken, so nobody uses it any more.
            let _ = unsafe { (self.library.abort)(raw) };
        }
    }

    /// # Errors
    /// The connections were given up, or a peer or the network failed, since the last look.
    fn look(&self) -> Result<()> {
        if self.given_up.load(Ordering::Acquire) {
            return Err(given_up());
        }
        let raw = self.raw.lock().expect("never poisoned");
        let Some(Raw(raw)) = *raw else { return Err(given_up()) };
        let code = self.state_of(raw)?;
        if code == IN_PROGRESS { Ok(()) } else { self.library.check("NCCL", code) }
    }
}

fn given_up() -> Error {
    Error::Refused("NCCL's connections were given up".into())
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if let Some(Raw(raw)) = self.raw.get_mut().expect("never poisoned").take() {
            // SAFETY: this was its last owner.
            let _ = unsafe { (self.library.destroy)(raw) };
        }
    }
}

impl Enqueued {
    /// False when the time is up.
    pub fn wait(&self, up_to: Duration) -> Result<bool> {
        let begun = Instant::now();
        let mut pause = Duration::from_micros(5);
        while !self.mark.is_reached().map_err(torch_error)? {
            if begun.elapsed() > up_to {
                self.communicator.look()?;
                return Ok(false);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_micros(200));
        }
        // The stream also goes on where the operation was ended, or failed: then what it should have written is garbage.
        self.communicator.look()?;
        Ok(true)
    }
}

/// Address and length in bytes of a contiguous tensor.
fn memory(tensor: &Tensor) -> Result<(*mut c_void, usize)> {
    if !tensor.is_contiguous() {
        return Err(Error::Refused("a collective needs contiguous tensors".into()));
    }
    Ok((tensor.data_ptr(), tensor.numel() * tensor.kind().elt_size_in_bytes()))
}

/// `ncclDataType_t` of what can be summed.
fn dtype(tensor: &Tensor) -> Result<c_int> {
    match tensor.kind() {
        Kind::Int => Ok(2),
        Kind::Int64 => Ok(4),
        Kind::Half => Ok(6),
        Kind::Float => Ok(7),
        Kind::Double => Ok(8),
        Kind::BFloat16 => Ok(9),
        other => Err(Error::Refused(format!("NCCL does not sum {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_nccl_the_error_says_what_to_install() {
        static SLOT: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
        let error = Library::open_in(&SLOT, "libnccl-that-is-not-here.so.2").err().unwrap().to_string();
        assert!(error.starts_with("collectives between GPUs need NCCL 2.14 or newer: "), "{error}");
        assert!(
            error.contains("libnccl-that-is-not-here.so.2") && error.contains("pip install nvidia-nccl"),
            "{error}"
        );
    }
}
