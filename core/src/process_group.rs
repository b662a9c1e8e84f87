//! Ranks that run collectives together: c10d's Gloo between processes, nothing at all for a group of one.
//!
//! Every rank calls the same operations in the same order. Each operation has a name and a sequence number; while ranks
//! wait for each other they tell, through the store they met at, how far they are, so that a wait without progress ends
//! in an error that names the ranks behind.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use crate::collective::ffi;
use crate::error::{Error, Result};
use crate::shim::{raw, torch_error};

/// How long ranks wait for each other.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For all ranks to join.
    pub join: Duration,
    /// For a rank that others wait for and that makes no progress.
    pub progress: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { join: Duration::from_secs(30), progress: Duration::from_secs(30) }
    }
}

/// Where ranks meet before they are a group: a key-value store over TCP that one of them serves.
pub struct MeetingPoint {
    store: Arc<cxx::UniquePtr<ffi::MeetingStore>>,
    host: String,
}

impl MeetingPoint {
    /// Serves the store on `host`; port 0 takes a free one.
    ///
    /// # Errors
    /// The port is in use, or the host is not this machine's.
    pub fn serve(host: &str, port: u16) -> Result<MeetingPoint> {
        MeetingPoint::open(host, port, true, Duration::from_secs(10))
    }

    /// Connects to the store that another rank serves.
    ///
    /// # Errors
    /// Nobody answers there within `patience.join`.
    pub fn join(host: &str, port: u16, patience: Patience) -> Result<MeetingPoint> {
        MeetingPoint::open(host, port, false, patience.join)
    }

    fn open(host: &str, port: u16, serve: bool, timeout: Duration) -> Result<MeetingPoint> {
        let store = ffi::meet_at(host, port, serve, timeout.as_millis() as i64).map_err(|error| {
            let what = if serve { "serving the meeting point" } else { "connecting to the meeting point" };
            Error::other(format!("{what} {host}:{port}"), torch_error(error))
        })?;
        Ok(MeetingPoint { store: Arc::new(store), host: host.into() })
    }

    pub fn port(&self) -> u16 {
        self.store.port()
    }
}

/// What a rank is doing in a group, as its peers and heartbeats see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The last operation begun, and its number from 1; 0 before the first.
    pub operation: String,
    pub sequence: u64,
    /// Counts what the rank finishes between operations (layers, micro-batches).
    pub work: u64,
}

#[derive(Debug, Default)]
struct Journal {
    operation: Mutex<String>,
    sequence: AtomicU64,
    work: AtomicU64,
    bytes_sent: AtomicU64,
}

impl Journal {
    fn standing(&self) -> Standing {
        Standing {
            operation: self.operation.lock().expect("never poisoned").clone(),
            sequence: self.sequence.load(Ordering::Relaxed),
            work: self.work.load(Ordering::Relaxed),
        }
    }
}

/// The ranks of one group, seen from one of them. Clones are handles of the same group.
#[derive(Clone)]
pub struct ProcessGroup {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    rank: usize,
    size: usize,
    journal: Arc<Journal>,
    peers: Option<Peers>,
}

struct Peers {
    group: cxx::UniquePtr<ffi::RankGroup>,
    store: Arc<cxx::UniquePtr<ffi::MeetingStore>>,
    patience: Patience,
    _pulse: Pulse,
}

/// Operations begin one after another, whatever their groups: c10d notes each in a table of the process (its flight
/// recorder) that it does not guard.
static BEGINNING: Mutex<()> = Mutex::new(());

impl ProcessGroup {
    /// A group of one rank: every collective is the identity, and there is no network.
    pub fn solo() -> ProcessGroup {
        ProcessGroup::of("solo", (0, 1), Arc::default(), None)
    }

    fn of(name: &str, (rank, size): (usize, usize), journal: Arc<Journal>, peers: Option<Peers>) -> ProcessGroup {
        ProcessGroup { inner: Arc::new(Inner { name: name.into(), rank, size, journal, peers }) }
    }

    /// Joins the group called `name` as `rank` of `size`; `address` is where other ranks reach this one.
    ///
    /// # Errors
    /// Not every rank joined within `patience.join`: the missing ones by number.
    pub fn join(
        at: &MeetingPoint,
        name: &str,
        (rank, size): (usize, usize),
        address: &str,
        patience: Patience,
    ) -> Result<ProcessGroup> {
        if size == 1 {
            return Ok(ProcessGroup::of(name, (0, 1), Arc::default(), None));
        }
        let failed = |error| Error::other(format!("rank {rank} of {size} joining group `{name}`"), torch_error(error));
        let store = at.store.clone();
        let joined = |rank: usize| format!("{name}/joined/{rank}");
        if store.has(&joined(rank)).map_err(failed)? {
            return Err(Error::Refused(format!(
                "two workers claim rank {rank} of group `{name}` at {}:{}: give each its own rank",
                at.host,
                at.port()
            )));
        }
        store.set(&joined(rank), &[1]).map_err(failed)?;
        let begun = Instant::now();
        while let Some(missing) = missing_ranks(&store, size, &joined)? {
            if begun.elapsed() > patience.join {
                return Err(Error::Refused(format!(
                    "group `{name}` waits for {missing} of {size} since {} s: start them, with {}:{} as meeting point",
                    patience.join.as_secs(),
                    at.host,
                    at.port()
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // Collectives end by our own judgement of progress, long before this.
        let never = Duration::from_secs(24 * 3600).as_millis() as i64;
        let group = ffi::join_gloo(&store, name, rank as i32, size as i32, address, never).map_err(failed)?;
        let journal = Arc::<Journal>::default();
        let pulse = Pulse::start(store.clone(), format!("{name}/standing/{rank}"), journal.clone());
        let peers = Some(Peers { group, store, patience, _pulse: pulse });
        Ok(ProcessGroup::of(name, (rank, size), journal, peers))
    }

    pub fn rank(&self) -> usize {
        self.inner.rank
    }

    pub fn size(&self) -> usize {
        self.inner.size
    }

    /// Bytes that this rank has sent to others in collectives.
    pub fn bytes_sent(&self) -> u64 {
        self.inner.journal.bytes_sent.load(Ordering::Relaxed)
    }

    /// What this rank is doing.
    pub fn standing(&self) -> Standing {
        self.inner.journal.standing()
    }

    /// Says that something was finished between operations: peers that wait then wait on.
    pub fn made_progress(&self) {
        self.inner.journal.work.fetch_add(1, Ordering::Relaxed);
    }

    /// Replaces `tensor` by the sum over ranks.
    pub fn all_reduce_sum(&self, operation: &str, tensor: &Tensor) -> Result<()> {
        self.start(operation, [tensor], 2.0 * self.others(), |group| group.all_reduce(raw(tensor)))?.wait()
    }

    /// The sum over ranks of one number.
    pub fn sum(&self, operation: &str, value: f64) -> Result<f64> {
        let total = Tensor::from(value).view([1]);
        self.all_reduce_sum(operation, &total)?;
        Ok(total.double_value(&[0]))
    }

    /// The largest of the ranks' numbers.
    pub fn max(&self, operation: &str, value: i64) -> Result<i64> {
        let all = Tensor::zeros([self.size() as i64], tch::kind::INT64_CPU);
        self.start_all_gather(operation, &all, &Tensor::from_slice(&[value]))?.wait()?;
        Ok(all.max().int64_value(&[]))
    }

    /// Starts to fill the flat `gathered` with the ranks' flat `shard`s, in order.
    pub fn start_all_gather(&self, operation: &str, gathered: &Tensor, shard: &Tensor) -> Result<Pending> {
        if self.inner.peers.is_none() {
            tch::no_grad(|| gathered.shallow_clone().f_copy_(shard))?;
        }
        let (gathered, shard) = (&gathered.shallow_clone(), &shard.shallow_clone());
        self.start(operation, [gathered, shard], self.others(), |group| group.all_gather(raw(gathered), raw(shard)))
    }

    /// Starts to send each rank its part of the flat `full`; [`Parts::sum`] is then this rank's part of the sum over
    /// ranks.
    pub fn start_reduce_scatter(&self, operation: &str, full: &Tensor) -> Result<Parts> {
        if self.inner.peers.is_none() {
            return Ok(Parts { pending: self.idle(operation), received: full.shallow_clone(), size: 1 });
        }
        let received = full.f_empty_like()?;
        let pending = self
            .start(operation, [full, &received], self.others(), |group| group.all_to_all(raw(&received), raw(full)))?;
        Ok(Parts { pending, received, size: self.size() as i64 })
    }

    /// Gives rank `i` the `i`-th part of the flat `sent` and takes the parts for this rank, in the order of ranks.
    pub fn all_to_all(&self, operation: &str, sent: &Tensor) -> Result<Tensor> {
        if self.inner.peers.is_none() {
            return Ok(sent.shallow_clone());
        }
        let received = sent.f_empty_like()?;
        self.start(operation, [sent, &received], self.others(), |group| group.all_to_all(raw(&received), raw(sent)))?
            .wait()?;
        Ok(received)
    }

    /// Replaces `tensor` by the one of `root`.
    pub fn broadcast(&self, operation: &str, tensor: &Tensor, root: usize) -> Result<()> {
        let share = if self.rank() == root { 1.0 } else { 0.0 };
        self.start(operation, [tensor], share, |group| group.broadcast(raw(tensor), root as i64))?.wait()
    }

    /// Every rank's bytes, in order.
    pub fn gather_bytes(&self, operation: &str, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let length = Tensor::from_slice(&[bytes.len() as i64]);
        let lengths = Tensor::zeros([self.size() as i64], tch::kind::INT64_CPU);
        self.start_all_gather(operation, &lengths, &length)?.wait()?;
        let lengths = Vec::<i64>::try_from(lengths)?;
        let widest = lengths.iter().copied().max().unwrap_or(0).max(1);
        let mine = Tensor::zeros([widest], (Kind::Uint8, tch::Device::Cpu));
        tch::no_grad(|| mine.narrow(0, 0, bytes.len() as i64).f_copy_(&Tensor::from_slice(bytes)))?;
        let all = Tensor::zeros([widest * self.size() as i64], (Kind::Uint8, tch::Device::Cpu));
        self.start_all_gather(operation, &all, &mine)?.wait()?;
        let part = |(rank, &length): (usize, &i64)| Vec::try_from(all.narrow(0, rank as i64 * widest, length));
        Ok(lengths.iter().enumerate().map(part).collect::<std::result::Result<_, _>>()?)
    }

    /// Sends to one rank; it must call [`ProcessGroup::recv`] with the same tag.
    pub fn send(&self, operation: &str, tensor: &Tensor, to: usize, tag: i32) -> Result<()> {
        self.start(operation, [tensor], 1.0, |group| group.send(raw(tensor), to as i32, tag))?.wait()
    }

    /// Fills `tensor` with what `from` sends.
    pub fn recv(&self, operation: &str, tensor: &Tensor, from: usize, tag: i32) -> Result<()> {
        self.start(operation, [tensor], 0.0, |group| group.recv(raw(tensor), from as i32, tag))?.wait()
    }

    /// Waits until every rank is here.
    pub fn barrier(&self, operation: &str) -> Result<()> {
        self.start(operation, [], 0.0, |group| group.barrier())?.wait()
    }

    /// (N − 1) / N.
    fn others(&self) -> f64 {
        (self.size() - 1) as f64 / self.size() as f64
    }

    /// Begins an operation; of the bytes of the first of `tensors`, `share` are sent.
    fn start<const K: usize>(
        &self,
        operation: &str,
        tensors: [&Tensor; K],
        share: f64,
        begin: impl FnOnce(&ffi::RankGroup) -> std::result::Result<cxx::UniquePtr<ffi::PendingWork>, cxx::Exception>,
    ) -> Result<Pending> {
        let Some(peers) = &self.inner.peers else { return Ok(self.idle(operation)) };
        let bytes = tensors.first().map_or(0, |tensor| tensor.numel() * tensor.kind().elt_size_in_bytes());
        let sequence = self.inner.journal.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        *self.inner.journal.operation.lock().expect("never poisoned") = operation.into();
        self.inner.journal.bytes_sent.fetch_add((bytes as f64 * share).round() as u64, Ordering::Relaxed);
        let work = {
            let _turn = BEGINNING.lock().unwrap_or_else(PoisonError::into_inner);
            begin(&peers.group).map_err(|error| self.failed(operation, sequence, error))?
        };
        let kept = tensors.iter().map(|tensor| tensor.shallow_clone()).collect();
        Ok(Pending { group: self.clone(), work: Some(work), operation: operation.into(), sequence, _kept: kept })
    }

    fn idle(&self, operation: &str) -> Pending {
        Pending { group: self.clone(), work: None, operation: operation.into(), sequence: 0, _kept: Vec::new() }
    }

    fn failed(&self, operation: &str, sequence: u64, error: cxx::Exception) -> Error {
        let context = format!("rank {} of {}: {operation} ({} #{sequence})", self.rank(), self.size(), self.inner.name);
        Error::other(context, torch_error(error))
    }
}

/// An operation in flight; it keeps its tensors until it is waited for or dropped.
#[must_use = "the tensors are not whole before `wait`"]
pub struct Pending {
    group: ProcessGroup,
    work: Option<cxx::UniquePtr<ffi::PendingWork>>,
    operation: String,
    sequence: u64,
    _kept: Vec<Tensor>,
}

impl Pending {
    /// Waits until this rank's part is done.
    ///
    /// # Errors
    /// A rank is gone, or makes no progress for [`Patience::progress`] while this one waits: it is named.
    pub fn wait(self) -> Result<()> {
        let (Some(work), Some(peers)) = (&self.work, &self.group.inner.peers) else { return Ok(()) };
        let mut watch = StallWatch::new(&self.group, peers, self.sequence);
        loop {
            match work.wait(StallWatch::INTERVAL.as_millis() as i64) {
                Ok(true) => return Ok(()),
                Ok(false) => watch.look(&self.operation)?,
                Err(error) => return Err(self.group.failed(&self.operation, self.sequence, error)),
            }
        }
    }
}

/// What [`ProcessGroup::start_reduce_scatter`] receives.
#[must_use = "the parts are not here before `sum`"]
pub struct Parts {
    pending: Pending,
    received: Tensor,
    size: i64,
}

impl Parts {
    /// This rank's part of the sum over ranks, added up in the order of ranks.
    pub fn sum(self) -> Result<Tensor> {
        self.pending.wait()?;
        let _guard = tch::no_grad_guard();
        let length = self.received.size()[0] / self.size;
        let mut total = self.received.narrow(0, 0, length);
        for rank in 1..self.size {
            let _ = total.f_add_(&self.received.narrow(0, rank * length, length))?;
        }
        Ok(total)
    }
}

/// Ranks without a key yet, as `rank 1` or `ranks 1, 3`.
fn missing_ranks(store: &ffi::MeetingStore, size: usize, joined: &impl Fn(usize) -> String) -> Result<Option<String>> {
    let mut missing = Vec::new();
    for rank in 0..size {
        if !store.has(&joined(rank)).map_err(|error| Error::other("the meeting point", torch_error(error)))? {
            missing.push(rank.to_string());
        }
    }
    Ok(match missing.as_slice() {
        [] => None,
        [one] => Some(format!("rank {one}")),
        several => Some(format!("ranks {}", several.join(", "))),
    })
}

/// Tells peers every second how far this rank is.
struct Pulse {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Pulse {
    fn start(store: Arc<cxx::UniquePtr<ffi::MeetingStore>>, key: String, journal: Arc<Journal>) -> Pulse {
        let stop = Arc::<AtomicBool>::default();
        let stopped = stop.clone();
        let beat = move || {
            while !stopped.load(Ordering::Relaxed) {
                let Standing { operation, sequence, work } = journal.standing();
                if store.set(&key, format!("{sequence} {work} {operation}").as_bytes()).is_err() {
                    return; // the meeting point is gone: whoever waits hears it from the collective
                }
                std::thread::park_timeout(Duration::from_secs(1));
            }
        };
        let thread = std::thread::Builder::new().name("pulse".into()).spawn(beat).ok();
        Pulse { stop, thread }
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// Judges a wait by how the other ranks stand.
struct StallWatch<'a> {
    group: &'a ProcessGroup,
    peers: &'a Peers,
    sequence: u64,
    seen: Vec<(Option<Standing>, Instant)>,
}

impl<'a> StallWatch<'a> {
    const INTERVAL: Duration = Duration::from_millis(500);

    fn new(group: &'a ProcessGroup, peers: &'a Peers, sequence: u64) -> StallWatch<'a> {
        StallWatch { group, peers, sequence, seen: vec![(None, Instant::now()); group.size()] }
    }

    /// Notes how the others stand.
    ///
    /// # Errors
    /// A rank that has not moved for too long: the one behind, else (all are here and nothing moves) every other.
    fn look(&mut self, operation: &str) -> Result<()> {
        for rank in (0..self.group.size()).filter(|&rank| rank != self.group.rank()) {
            let standing = self.standing_of(rank);
            if standing != self.seen[rank].0 {
                self.seen[rank] = (standing, Instant::now());
            }
        }
        let patience = self.peers.patience.progress;
        let others = || (0..self.group.size()).filter(|&rank| rank != self.group.rank());
        let behind = |rank: &usize| self.seen[*rank].0.as_ref().is_none_or(|s| s.sequence < self.sequence);
        let stuck = |rank: &usize| self.seen[*rank].1.elapsed() > patience;
        let mut late: Vec<usize> = others().filter(behind).filter(stuck).collect();
        if late.is_empty() && others().all(|rank| !behind(&rank) && stuck(&rank)) {
            late = others().collect();
        }
        if late.is_empty() {
            return Ok(());
        }
        let places: Vec<String> = late.iter().map(|&rank| self.place(rank)).collect();
        let (me, size, name) = (self.group.rank(), self.group.size(), &self.group.inner.name);
        Err(Error::Refused(format!(
            "rank {me} of {size}: {operation} ({name} #{}) waits, and for {} s there is no progress: {}",
            self.sequence,
            patience.as_secs(),
            places.join(", ")
        )))
    }

    fn standing_of(&self, rank: usize) -> Option<Standing> {
        let key = format!("{}/standing/{rank}", self.group.inner.name);
        if !self.peers.store.has(&key).ok()? {
            return None;
        }
        let text = String::from_utf8(self.peers.store.get(&key, 1000).ok()?).ok()?;
        let mut parts = text.splitn(3, ' ');
        let (sequence, work) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        Some(Standing { operation: parts.next()?.into(), sequence, work })
    }

    fn place(&self, rank: usize) -> String {
        match &self.seen[rank].0 {
            Some(Standing { operation, sequence, .. }) if *sequence > 0 => {
                format!("rank {rank} is at {operation} (#{sequence})")
            }
            _ => format!("rank {rank} has begun nothing"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `each` on the threads of `size` ranks of one group and gives what each returns, in order.
    fn ranks<T: Send>(size: usize, patience: Patience, each: impl Fn(&ProcessGroup) -> T + Sync) -> Vec<T> {
        let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
        let port = point.port();
        std::thread::scope(|scope| {
            let run = |rank| {
                let each = &each;
                scope.spawn(move || {
                    let point = MeetingPoint::join("127.0.0.1", port, patience).unwrap();
                    let group = ProcessGroup::join(&point, "test", (rank, size), "127.0.0.1", patience).unwrap();
                    each(&group)
                })
            };
            let threads: Vec<_> = (0..size).map(run).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn numbers(values: &[f64], kind: Kind) -> Tensor {
        Tensor::from_slice(values).to_kind(kind)
    }

    fn values(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap()
    }

    #[test]
    fn collectives_do_what_they_say_for_every_size_and_dtype() {
        for size in [1usize, 2, 3] {
            for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
                let results = ranks(size, Patience::default(), |group| {
                    let rank = group.rank() as f64;
                    let full: Vec<f64> = (0..2 * size).map(|i| i as f64 + 10.0 * rank).collect();
                    let full = numbers(&full, kind);
                    let summed = full.copy();
                    group.all_reduce_sum("sum", &summed).unwrap();
                    let part = group.start_reduce_scatter("scatter", &full.copy()).unwrap().sum().unwrap();
                    let gathered = summed.zeros_like();
                    group.start_all_gather("gather", &gathered, &part).unwrap().wait().unwrap();
                    let exchanged = group.all_to_all("exchange", &full).unwrap();
                    let sent = full.copy();
                    group.broadcast("broadcast", &sent, size - 1).unwrap();
                    let bytes = group.gather_bytes("bytes", &vec![7; group.rank() * 3]).unwrap();
                    group.barrier("end").unwrap();
                    let total = group.sum("one number", rank + 0.5).unwrap();
                    (values(&summed), values(&gathered), values(&exchanged), values(&sent), bytes, total)
                });
                let n = size as f64;
                let expected: Vec<f64> = (0..2 * size).map(|i| n * i as f64 + 10.0 * n * (n - 1.0) / 2.0).collect();
                for (rank, (summed, gathered, exchanged, sent, bytes, total)) in results.into_iter().enumerate() {
                    assert_eq!(summed, expected, "sum, {size} ranks of {kind:?}");
                    assert_eq!(gathered, expected, "reduce-scatter, then all-gather");
                    let from = |i: usize| (2 * rank + i % 2) as f64 + 10.0 * (i / 2) as f64;
                    assert_eq!(exchanged, (0..2 * size).map(from).collect::<Vec<_>>());
                    assert_eq!(sent, (0..2 * size).map(|i| i as f64 + 10.0 * (n - 1.0)).collect::<Vec<_>>());
                    assert_eq!(bytes, (0..size).map(|rank| vec![7; rank * 3]).collect::<Vec<_>>());
                    assert_eq!(total, n * (n - 1.0) / 2.0 + 0.5 * n);
                }
            }
        }
    }

    #[test]
    fn ranks_send_to_each_other_and_count_their_bytes() {
        let bytes = ranks(2, Patience::default(), |group| {
            let tensor = numbers(&[1.0, 2.0, 3.0], Kind::Float);
            if group.rank() == 0 {
                group.send("hand over", &tensor, 1, 5).unwrap();
            } else {
                let received = tensor.zeros_like();
                group.recv("take", &received, 0, 5).unwrap();
                assert_eq!(received, tensor);
            }
            let before = group.bytes_sent();
            group
                .start_all_gather(
                    "gather",
                    &Tensor::zeros([8], tch::kind::FLOAT_CPU),
                    &Tensor::zeros([4], tch::kind::FLOAT_CPU),
                )
                .unwrap()
                .wait()
                .unwrap();
            (before, group.bytes_sent() - before)
        });
        assert_eq!(bytes, [(12, 16), (0, 16)]);
    }

    #[test]
    fn a_rank_that_stands_still_is_named_with_its_place() {
        let patience = Patience { progress: Duration::from_secs(2), ..Patience::default() };
        let errors = ranks(3, patience, |group| {
            group.barrier("begin").unwrap();
            if group.rank() == 1 {
                std::thread::sleep(Duration::from_secs(5));
                return String::new();
            }
            group.all_reduce_sum("reduce layer 4", &Tensor::zeros([4], tch::kind::FLOAT_CPU)).unwrap_err().to_string()
        });
        let expected =
            "rank 0 of 3: reduce layer 4 (test #2) waits, and for 2 s there is no progress: rank 1 is at begin (#1)";
        assert_eq!(errors[0], expected);
        assert!(errors[2].ends_with("rank 1 is at begin (#1)"), "{}", errors[2]);
    }

    #[test]
    fn a_slow_rank_that_works_is_waited_for() {
        let patience = Patience { progress: Duration::from_secs(2), ..Patience::default() };
        ranks(2, patience, |group| {
            if group.rank() == 1 {
                for _ in 0..8 {
                    std::thread::sleep(Duration::from_millis(500));
                    group.made_progress();
                }
            }
            group.barrier("meet").unwrap();
        });
    }

    #[test]
    fn who_is_missing_or_doubled_is_named() {
        let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
        let patience = Patience { join: Duration::from_millis(300), ..Patience::default() };
        let join =
            |rank| ProcessGroup::join(&point, "test", (rank, 4), "127.0.0.1", patience).err().unwrap().to_string();
        assert!(join(2).contains("waits for ranks 0, 1, 3 of 4"), "{}", join(2));
        assert!(join(2).contains("two workers claim rank 2 of group `test`"));
        let taken = MeetingPoint::serve("127.0.0.1", point.port()).err().unwrap().to_string();
        assert!(taken.contains(&format!("127.0.0.1:{}", point.port())), "{taken}");
    }
}
