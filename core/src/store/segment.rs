//! A piece of anonymous memory that processes of one host share: no file, no name, gone with its last holder.
//!
//! Two kinds. A [`Segment`] was written once and is sealed: nobody can change it any more, so that its bytes are as good
//! as a process's own. A [`LiveSegment`] keeps the one writer it was made with, and everybody else can only read it:
//! writer and readers have to agree on when (a policy version in one of its words, or a message).
//!
//! All memory is taken when a segment is made, so that a lack of it is an error there and no signal later.

use std::fmt;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{Mmap, MmapMut, MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::memory;

/// Why there is no segment.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    #[error(
        "no memory for {name}: {needed} bytes needed, {available} bytes available{limit}; use fewer workers on this host, smaller batches, or a machine with more memory"
    )]
    NoMemory { name: String, needed: usize, available: u64, limit: &'static str },
    #[error("{name}: {operation}: {source}")]
    System { name: String, operation: &'static str, source: io::Error },
    /// A descriptor that came from another process and could change, shrink or fault under a reader.
    #[error("not a shared segment of the kind expected: {0}")]
    Foreign(&'static str),
}

/// What nobody may do to a segment that is whole.
const FIXED_SIZE: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// A segment on its way: only this process can see it.
pub struct SegmentWriter {
    name: String,
    fd: OwnedFd,
    map: MmapMut,
}

impl SegmentWriter {
    /// Takes `len` bytes of zeros. The name is for people who look at the process's maps.
    ///
    /// # Errors
    /// Too little memory, by what the system says and at the latest when it is taken.
    pub fn create(name: &str, len: usize) -> Result<SegmentWriter, SegmentError> {
        let failed = |operation| {
            let name = name.to_string();
            move |source: io::Error| SegmentError::System { name, operation, source }
        };
        if len == 0 {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "a segment has at least one byte");
            return Err(failed("size")(source));
        }
        memory::check(name, len)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create(short(name), flags).map_err(|e| failed("memfd_create")(e.into()))?;
        rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, len as u64).map_err(|error| match error {
            Errno::NOSPC | Errno::NOMEM | Errno::DQUOT => memory::none_left(name, len),
            error => failed("fallocate")(error.into()),
        })?;
        // SAFETY: the descriptor is this process's alone, and its memory has been taken.
        let map = unsafe { MmapOptions::new().len(len).populate().map_mut(fd.as_raw_fd()) }.map_err(failed("mmap"))?;
        Ok(SegmentWriter { name: name.into(), fd, map })
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.map
    }

    /// Ends writing for ever: no process can change the bytes or their number after this.
    pub fn seal(self) -> Result<Segment, SegmentError> {
        let SegmentWriter { name, fd, map } = self;
        let len = map.len();
        // The kernel refuses to seal what can still be written through a map.
        drop(map);
        rustix::fs::fcntl_add_seals(&fd, FIXED_SIZE | SealFlags::WRITE | SealFlags::SEAL)
            .map_err(|e| SegmentError::System { name, operation: "seal", source: e.into() })?;
        Ok(Segment { fd, len })
    }

    /// Keeps this process as the only writer: others that get the segment can read it, and will see what it writes.
    pub fn share(self) -> Result<LiveWriter, SegmentError> {
        let SegmentWriter { name, fd, map } = self;
        let sealed = rustix::fs::fcntl_add_seals(&fd, FIXED_SIZE | SealFlags::FUTURE_WRITE | SealFlags::SEAL);
        sealed.map_err(|e| SegmentError::System { name, operation: "seal", source: e.into() })?;
        Ok(LiveWriter { segment: LiveSegment { fd, len: map.len() }, map })
    }
}

impl fmt::Debug for SegmentWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SegmentWriter({}, {} bytes)", self.name, self.map.len())
    }
}

/// A name that the kernel takes: at most 249 bytes, none of them zero.
fn short(name: &str) -> String {
    let clean: String = name.chars().map(|c| if c == '\0' { ' ' } else { c }).collect();
    clean.chars().take(60).collect()
}

/// Memory that was written once. Its descriptor can be sent to other processes of this host.
#[derive(Debug)]
pub struct Segment {
    fd: OwnedFd,
    /// Bytes, at least one.
    pub(super) len: usize,
}

impl Segment {
    /// A segment that another process sent.
    ///
    /// # Errors
    /// It is not sealed: its bytes could change, or end, under a reader.
    pub fn from_fd(fd: OwnedFd) -> Result<Segment, SegmentError> {
        let len = sealed_len(&fd, FIXED_SIZE | SealFlags::WRITE)?;
        Ok(Segment { fd, len })
    }

    /// Maps it here, read-only. No byte is copied; the map outlives the segment, its sender and its descriptors.
    pub fn map(&self) -> Result<SegmentMap, SegmentError> {
        // Private, because kernels before 6.7 refuse shared maps of sealed memory; without a write the pages are the same.
        // SAFETY: sealed memory neither changes nor shrinks.
        let map = unsafe { MmapOptions::new().len(self.len).map_copy_read_only(self.fd.as_raw_fd()) };
        let map = map.map_err(|source| SegmentError::System { name: "segment".into(), operation: "mmap", source })?;
        Ok(SegmentMap(map))
    }
}

impl AsFd for Segment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A sealed segment's bytes. They are the same, at the same place, as long as this lives.
#[derive(Debug)]
pub struct SegmentMap(Mmap);

impl Deref for SegmentMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// The end of a live segment that writes.
pub struct LiveWriter {
    segment: LiveSegment,
    map: MmapMut,
}

impl LiveWriter {
    /// What to send to those who read.
    pub fn segment(&self) -> &LiveSegment {
        &self.segment
    }

    /// The bytes, to be changed while no reader looks at them.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.map
    }

    /// Sets the word at `offset` (a multiple of 8): a reader who sees it sees all that was written before it.
    ///
    /// # Panics
    /// The word does not lie in the segment.
    pub fn set_word(&self, offset: usize, value: u64) {
        word(self.map.as_ptr(), self.map.len(), offset).store(value, Ordering::Release);
    }
}

impl fmt::Debug for LiveWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LiveWriter({} bytes)", self.map.len())
    }
}

/// Memory that one process keeps writing. Its descriptor can be sent to other processes of this host.
#[derive(Debug)]
pub struct LiveSegment {
    fd: OwnedFd,
    len: usize,
}

impl LiveSegment {
    /// A segment that another process sent.
    ///
    /// # Errors
    /// Its size could change under a reader, or this process could write to it.
    pub fn from_fd(fd: OwnedFd) -> Result<LiveSegment, SegmentError> {
        let len = sealed_len(&fd, FIXED_SIZE | SealFlags::FUTURE_WRITE)?;
        Ok(LiveSegment { fd, len })
    }

    /// Maps it here, read-only. The map outlives the segment, its sender and its descriptors.
    pub fn map(&self) -> Result<LiveMap, SegmentError> {
        let map = MmapOptions::new().len(self.len).map_raw_read_only(self.fd.as_raw_fd());
        let map = map.map_err(|source| SegmentError::System { name: "segment".into(), operation: "mmap", source })?;
        Ok(LiveMap(map))
    }
}

impl AsFd for LiveSegment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A live segment, seen by a reader.
#[derive(Debug)]
pub struct LiveMap(MmapRaw);

impl LiveMap {
    pub fn num_bytes(&self) -> usize {
        self.0.len()
    }

    pub fn as_ptr(&self) -> *const u8 {
        self.0.as_ptr()
    }

    /// The word at `offset` (a multiple of 8), and with it all that the writer wrote before it.
    ///
    /// # Panics
    /// The word does not lie in the segment.
    pub fn word(&self, offset: usize) -> u64 {
        word(self.0.as_ptr(), self.0.len(), offset).load(Ordering::Acquire)
    }
}

fn word<'a>(base: *const u8, len: usize, offset: usize) -> &'a AtomicU64 {
    assert!(
        offset.is_multiple_of(8) && offset.checked_add(8).is_some_and(|end| end <= len),
        "a word at {offset} of {len} bytes"
    );
    // SAFETY: in the map, and aligned because a map begins on a page; a reader's page is only loaded from.
    unsafe { AtomicU64::from_ptr(base.add(offset).cast_mut().cast()) }
}

/// The length of a segment that has the seals in `wanted`.
fn sealed_len(fd: &OwnedFd, wanted: SealFlags) -> Result<usize, SegmentError> {
    let Ok(seals) = rustix::fs::fcntl_get_seals(fd) else {
        return Err(SegmentError::Foreign("the descriptor is no anonymous memory"));
    };
    if !seals.contains(wanted) {
        return Err(SegmentError::Foreign("it is not sealed, so it could change or shrink while it is read"));
    }
    let stat = rustix::fs::fstat(fd).map_err(|e| SegmentError::System {
        name: "segment".into(),
        operation: "fstat",
        source: e.into(),
    })?;
    match usize::try_from(stat.st_size) {
        Ok(0) | Err(_) => Err(SegmentError::Foreign("it is empty")),
        Ok(len) => Ok(len),
    }
}
