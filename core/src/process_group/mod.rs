//! Ranks that run collectives together: c10d's Gloo between processes, NCCL between GPUs, nothing at all for a group of one.
//!
//! Every rank calls the same operations in the same order. Each operation has a name and a sequence number; while ranks
//! wait for each other they tell, through the store they met at, how far they are, so that a wait without progress ends
//! in an error that names the ranks behind.
//!
//! A group that failed stays failed: its operations in flight are ended on every rank, each hears the first rank's reason,
//! and [`ProcessGroup::rebuild`] or a new [`ProcessGroup::join`] meets in the next generation.

mod alone;
mod meeting;
mod nccl;
mod pending;
mod standing;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

pub use self::alone::{nccl_alone, nccl_version};
pub use self::meeting::{MeetingPoint, Patience};
pub use self::pending::{Parts, Pending};
pub use self::standing::Standing;

use self::meeting::{Generation, Seat, milliseconds};
use self::pending::Work;
use self::standing::{Journal, Pulse};
use crate::collective::ffi;
use crate::error::{Error, Result};
use crate::shim::{self, raw, torch_error};

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
    gloo: cxx::UniquePtr<ffi::RankGroup>,
    /// Made with the first operation on a CUDA tensor.
    nccl: Mutex<Option<Arc<nccl::Communicator>>>,
    at: MeetingPoint,
    generation: Generation,
    address: String,
    patience: Patience,
    /// Why the group is of no use any more.
    given_up: Mutex<Option<String>>,
    rank: usize,
    journal: Arc<Journal>,
    pulse: Mutex<Option<Pulse>>,
}

/// Operations begin one after another, whatever their groups: c10d notes each in a table of the process (its flight
/// recorder) that it does not guard.
static BEGINNING: Mutex<()> = Mutex::new(());

/// What ranks do together, on which tensors.
enum Operation<'a> {
    AllReduce(&'a Tensor),
    AllGather {
        gathered: &'a Tensor,
        shard: &'a Tensor,
    },
    /// With as little memory as there can be.
    AllGatherInPlace {
        gathered: &'a Tensor,
        shard: &'a Tensor,
    },
    AllToAll {
        received: &'a Tensor,
        sent: &'a Tensor,
    },
    Broadcast(&'a Tensor, usize),
    Send(&'a Tensor, usize, i32),
    Recv(&'a Tensor, usize, i32),
    Barrier,
}

impl Operation<'_> {
    fn tensors(&self) -> Vec<Tensor> {
        let tensors: &[&Tensor] = match self {
            Operation::AllReduce(tensor) | Operation::Broadcast(tensor, _) => &[tensor],
            Operation::Send(tensor, ..) | Operation::Recv(tensor, ..) => &[tensor],
            Operation::AllGather { gathered, shard } | Operation::AllGatherInPlace { gathered, shard } => {
                &[gathered, shard]
            }
            Operation::AllToAll { received, sent } => &[sent, received],
            Operation::Barrier => &[],
        };
        tensors.iter().map(|tensor| tensor.shallow_clone()).collect()
    }
}

impl ProcessGroup {
    /// A group of one rank: every collective is the identity, and there is no network.
    pub fn solo() -> ProcessGroup {
        ProcessGroup::alone("solo")
    }

    fn alone(name: &str) -> ProcessGroup {
        let inner = Inner { name: name.into(), rank: 0, size: 1, journal: Arc::default(), peers: None };
        ProcessGroup { inner: Arc::new(inner) }
    }

    /// Joins the group called `name` as `rank` of `size`; `address` is where other ranks reach this one.
    ///
    /// # Errors
    /// Not every rank joined within `patience.join`: the missing ones by number. Another worker sits on this rank.
    pub fn join(
        at: &MeetingPoint,
        name: &str,
        (rank, size): (usize, usize),
        address: &str,
        patience: Patience,
    ) -> Result<ProcessGroup> {
        if rank >= size {
            return Err(Error::Refused(format!("group `{name}` has ranks 0 to {}, and no rank {rank}", size - 1)));
        }
        if size == 1 {
            return Ok(ProcessGroup::alone(name));
        }
        let seat = Seat { at, name, rank, size, patience };
        let generation = seat.meet()?;
        let connect = milliseconds(patience.join);
        let gloo = ffi::join_gloo(&at.store, &generation.prefix(), rank as i32, size as i32, address, connect)
            .inspect_err(|_| generation.end(rank))
            .map_err(|error| seat.failed(error))?;
        seat.all_connected(&generation)?;
        let journal = Arc::<Journal>::default();
        let pulse = Pulse::start(generation.clone(), rank, journal.clone());
        let peers = Peers {
            gloo,
            nccl: Mutex::default(),
            at: at.clone(),
            generation,
            address: address.into(),
            patience,
            given_up: Mutex::default(),
            rank,
            journal: journal.clone(),
            pulse: Mutex::new(Some(pulse)),
        };
        let inner = Inner { name: name.into(), rank, size, journal, peers: Some(peers) };
        Ok(ProcessGroup { inner: Arc::new(inner) })
    }

    /// The group of these ranks of this one, in this order; its members call this, with the same `label`, which no other
    /// sub-group of this group has. None on a rank that is not among them.
    ///
    /// # Errors
    /// A rank that this group does not have, or that is named twice; a member that does not come.
    pub fn subgroup(&self, label: &str, ranks: &[usize]) -> Result<Option<ProcessGroup>> {
        let repeated = |(place, rank): (usize, &usize)| *rank >= self.size() || ranks[..place].contains(rank);
        if ranks.is_empty() || ranks.iter().enumerate().any(repeated) {
            return Err(Error::Refused(format!(
                "sub-group `{label}` of ranks {ranks:?}: group `{}` has ranks 0 to {}, and each is named once",
                self.inner.name,
                self.size() - 1
            )));
        }
        let Some(rank) = ranks.iter().position(|&rank| rank == self.rank()) else { return Ok(None) };
        let Some(peers) = &self.inner.peers else { return Ok(Some(ProcessGroup::alone(label))) };
        // Of this generation: sub-groups of one that failed are met anew.
        let name = format!("{}/{label}", peers.generation.prefix());
        ProcessGroup::join(&peers.at, &name, (rank, ranks.len()), &peers.address, peers.patience).map(Some)
    }

    /// Leaves this generation of the group and joins the next one, together with the others that do, or with workers that
    /// took their places. Operations in flight end with an error, and so do those of other handles of this group.
    ///
    /// # Errors
    /// As of [`ProcessGroup::join`].
    pub fn rebuild(&self) -> Result<ProcessGroup> {
        let Some(peers) = &self.inner.peers else { return Ok(ProcessGroup::alone(&self.inner.name)) };
        peers.leave(&format!("rank {} of {} left to rebuild it", self.rank(), self.size()));
        ProcessGroup::join(&peers.at, &self.inner.name, (self.rank(), self.size()), &peers.address, peers.patience)
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

    /// Says which micro-batch is in work, from 1; 0 outside of passes.
    pub fn at_micro_batch(&self, micro_batch: u64) {
        self.inner.journal.micro_batch.store(micro_batch, Ordering::Relaxed);
    }

    /// Replaces `tensor` by the sum over ranks.
    pub fn all_reduce_sum(&self, operation: &str, tensor: &Tensor) -> Result<()> {
        self.start_all_reduce_sum(operation, tensor)?.wait()
    }

    /// Starts to replace `tensor` by the sum over ranks.
    pub fn start_all_reduce_sum(&self, operation: &str, tensor: &Tensor) -> Result<Pending> {
        self.start(operation, &Operation::AllReduce(tensor), 2.0 * self.others())
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

    /// Whether it holds on any rank.
    pub fn any(&self, operation: &str, mine: bool) -> Result<bool> {
        Ok(self.max(operation, i64::from(mine))? > 0)
    }

    /// Starts to fill the flat `gathered` with the ranks' flat `shard`s, in order.
    pub fn start_all_gather(&self, operation: &str, gathered: &Tensor, shard: &Tensor) -> Result<Pending> {
        if self.inner.peers.is_none() {
            tch::no_grad(|| gathered.shallow_clone().f_copy_(shard))?;
        }
        self.start(operation, &Operation::AllGather { gathered, shard }, self.others())
    }

    /// The same without a copy of everything on the way, which Gloo's all-gather makes; `shard` may be this rank's part of
    /// `gathered`. Only groups of this program understand each other in this: PyTorch's all-gather is the other one.
    pub fn start_all_gather_in_place(&self, operation: &str, gathered: &Tensor, shard: &Tensor) -> Result<Pending> {
        if self.inner.peers.is_none() {
            tch::no_grad(|| gathered.shallow_clone().f_copy_(shard))?;
        }
        self.start(operation, &Operation::AllGatherInPlace { gathered, shard }, self.others())
    }

    /// Starts to send each rank its part of the flat `full`; [`Parts::sum`] is then this rank's part of the sum over
    /// ranks.
    pub fn start_reduce_scatter(&self, operation: &str, full: &Tensor) -> Result<Parts> {
        self.start_all_to_all(operation, full)
    }

    /// Starts to give rank `i` the `i`-th part of the flat `sent`, and to take the parts for this rank.
    pub fn start_all_to_all(&self, operation: &str, sent: &Tensor) -> Result<Parts> {
        if self.inner.peers.is_none() {
            return Ok(Parts::new(self.idle(operation), sent.shallow_clone(), 1));
        }
        let received = sent.f_empty_like()?;
        let pending = self.start(operation, &Operation::AllToAll { received: &received, sent }, self.others())?;
        Ok(Parts::new(pending, received, self.size() as i64))
    }

    /// Gives rank `i` the `i`-th part of the flat `sent` and takes the parts for this rank, in the order of ranks.
    pub fn all_to_all(&self, operation: &str, sent: &Tensor) -> Result<Tensor> {
        self.start_all_to_all(operation, sent)?.parts()
    }

    /// Replaces `tensor` by the one of `root`.
    pub fn broadcast(&self, operation: &str, tensor: &Tensor, root: usize) -> Result<()> {
        self.start_broadcast(operation, tensor, root)?.wait()
    }

    /// Starts to replace `tensor` by the one of `root`.
    pub fn start_broadcast(&self, operation: &str, tensor: &Tensor, root: usize) -> Result<Pending> {
        let share = if self.rank() == root { 1.0 } else { 0.0 };
        self.start(operation, &Operation::Broadcast(tensor, root), share)
    }

    /// Every rank's bytes, in order.
    pub fn gather_bytes(&self, operation: &str, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let length = Tensor::from_slice(&[bytes.len() as i64]);
        let lengths = Tensor::zeros([self.size() as i64], tch::kind::INT64_CPU);
        self.start_all_gather(operation, &lengths, &length)?.wait()?;
        let lengths = Vec::<i64>::try_from(lengths)?;
        let widest = lengths.iter().copied().max().unwrap_or(0).max(1);
        let mine = Tensor::zeros([widest], (Kind::Uint8, Device::Cpu));
        tch::no_grad(|| mine.narrow(0, 0, bytes.len() as i64).f_copy_(&Tensor::from_slice(bytes)))?;
        let all = Tensor::zeros([widest * self.size() as i64], (Kind::Uint8, Device::Cpu));
        self.start_all_gather(operation, &all, &mine)?.wait()?;
        let part = |(rank, &length): (usize, &i64)| Vec::try_from(all.narrow(0, rank as i64 * widest, length));
        Ok(lengths.iter().enumerate().map(part).collect::<std::result::Result<_, _>>()?)
    }

    /// Sends to one rank; it must call [`ProcessGroup::recv`] with the same tag.
    pub fn send(&self, operation: &str, tensor: &Tensor, to: usize, tag: i32) -> Result<()> {
        self.start_send(operation, tensor, to, tag)?.wait()
    }

    /// Starts to send to one rank.
    pub fn start_send(&self, operation: &str, tensor: &Tensor, to: usize, tag: i32) -> Result<Pending> {
        self.start(operation, &Operation::Send(tensor, to, tag), 1.0)
    }

    /// Fills `tensor` with what `from` sends.
    pub fn recv(&self, operation: &str, tensor: &Tensor, from: usize, tag: i32) -> Result<()> {
        self.start_recv(operation, tensor, from, tag)?.wait()
    }

    /// Starts to fill `tensor` with what `from` sends.
    pub fn start_recv(&self, operation: &str, tensor: &Tensor, from: usize, tag: i32) -> Result<Pending> {
        self.start(operation, &Operation::Recv(tensor, from, tag), 0.0)
    }

    /// Waits until every rank is here.
    pub fn barrier(&self, operation: &str) -> Result<()> {
        self.start(operation, &Operation::Barrier, 0.0)?.wait()
    }

    /// (N − 1) / N.
    fn others(&self) -> f64 {
        (self.size() - 1) as f64 / self.size() as f64
    }

    /// Begins an operation; of the bytes of its first tensor, `share` are sent.
    fn start(&self, name: &str, operation: &Operation, share: f64) -> Result<Pending> {
        let Some(peers) = &self.inner.peers else { return Ok(self.idle(name)) };
        let tensors = operation.tensors();
        if let Some(reason) = peers.given_up() {
            let next = self.standing().sequence + 1;
            return Err(Error::Refused(format!("{}: the group was given up: {reason}", self.place_of(name, next))));
        }
        let bytes = tensors.first().map_or(0, |tensor| tensor.numel() * tensor.kind().elt_size_in_bytes());
        let sequence = self.inner.journal.begin(name, (bytes as f64 * share).round() as u64);
        let work = self.begin(peers, operation, tensors.first().map(Tensor::device)).map_err(|cause| {
            let error = Error::other(self.place_of(name, sequence), cause);
            peers.leave(&error.to_string());
            error
        })?;
        Ok(Pending::new(self.clone(), work, name, sequence, tensors))
    }

    fn begin(&self, peers: &Peers, operation: &Operation, device: Option<Device>) -> Result<Work> {
        if let Some(Device::Cuda(index)) = device {
            return Ok(Work::Nccl(peers.nccl(self, index)?.begin(operation)?));
        }
        let gloo = &peers.gloo;
        let _turn = BEGINNING.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = match *operation {
            Operation::AllReduce(tensor) => gloo.all_reduce(raw(tensor)),
            Operation::AllGather { gathered, shard } => gloo.all_gather(raw(gathered), raw(shard)),
            Operation::AllGatherInPlace { gathered, shard } => gloo.all_gather_in_place(raw(gathered), raw(shard)),
            Operation::AllToAll { received, sent } => gloo.all_to_all(raw(received), raw(sent)),
            Operation::Broadcast(tensor, root) => gloo.broadcast(raw(tensor), root as i64),
            Operation::Send(tensor, to, tag) => gloo.send(raw(tensor), to as i32, tag),
            Operation::Recv(tensor, from, tag) => gloo.recv(raw(tensor), from as i32, tag),
            Operation::Barrier => gloo.barrier(),
        };
        Ok(Work::Gloo(begun.map_err(torch_error)?))
    }

    fn idle(&self, operation: &str) -> Pending {
        Pending::new(self.clone(), Work::Done, operation, 0, Vec::new())
    }

    /// Such as `rank 0 of 3: reduce layer 4 (test #2, micro-batch 1)`.
    fn place_of(&self, operation: &str, sequence: u64) -> String {
        let micro_batch = match self.standing().micro_batch {
            0 => String::new(),
            number => format!(", micro-batch {number}"),
        };
        format!("rank {} of {}: {operation} ({} #{sequence}{micro_batch})", self.rank(), self.size(), self.inner.name)
    }
}

impl Peers {
    fn given_up(&self) -> Option<String> {
        self.given_up.lock().expect("never poisoned").clone()
    }

    /// Gives the group up: tells the others why, ends what is in flight on every rank, and opens the next generation.
    fn leave(&self, reason: &str) {
        {
            let mut given_up = self.given_up.lock().expect("never poisoned");
            if given_up.is_some() {
                return;
            }
            *given_up = Some(reason.into());
        }
        self.generation.report_failure(reason); // before anybody sees a connection close
        self.abort();
        self.close();
    }

    fn abort(&self) {
        if let Some(nccl) = self.nccl.lock().expect("never poisoned").take() {
            nccl.abort();
        }
        // It can only fail by a connection being gone already, which is what it is for.
        let _ = self.gloo.abort();
    }

    fn close(&self) {
        drop(self.pulse.lock().expect("never poisoned").take());
        self.generation.end(self.rank);
    }

    /// The communicator of this group's GPUs; every rank comes here with its first operation on one.
    fn nccl(&self, group: &ProcessGroup, device: usize) -> Result<Arc<nccl::Communicator>> {
        let mut made = self.nccl.lock().expect("never poisoned");
        if let Some(communicator) = &*made {
            return communicator.on(device).map(|()| communicator.clone());
        }
        let library = nccl::Library::open()?;
        let id = Tensor::zeros([nccl::ID_BYTES as i64], (Kind::Uint8, Device::Cpu));
        if group.rank() == 0 {
            let fresh = Tensor::from_slice(&library.unique_id()?);
            tch::no_grad(|| id.shallow_clone().f_copy_(&fresh))?;
        }
        // Over Gloo, whose waits are watched: NCCL's own wait for a rank that does not come has no end.
        group.broadcast("share NCCL's id", &id, 0)?;
        let id = Vec::<u8>::try_from(id)?;
        let place = (group.rank(), group.size());
        shim::give_back_kept(Device::Cuda(device)); // NCCL takes memory for itself
        let communicator = nccl::Communicator::join(library, &id, place, device, &mut self.connecting(group))?;
        self.generation.tell_connected(self.rank);
        let communicator = Arc::new(communicator);
        *made = Some(communicator.clone());
        Ok(communicator)
    }

    /// Asked while this rank's GPU connects with the others: whether to wait on.
    fn connecting<'a>(&'a self, group: &'a ProcessGroup) -> impl FnMut() -> Result<()> + 'a {
        const LOOK: Duration = Duration::from_millis(200);
        self.generation.tell_connecting(self.rank);
        let (begun, mut looked) = (Instant::now(), Instant::now());
        move || {
            if looked.elapsed() < LOOK {
                return Ok(());
            }
            looked = Instant::now();
            if let Some(reason) = self.generation.failure() {
                return Err(Error::Refused(format!("ended while GPUs connected: {reason}")));
            }
            match begun.elapsed() > self.patience.join {
                true => Err(Error::Refused(self.generation.unconnected(group.size(), self.patience.join))),
                false => Ok(()),
            }
        }
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        if self.given_up().is_none() {
            // What nobody waits for any more would keep Gloo's threads, and this drop, waiting for the others.
            if self.journal.in_flight.load(Ordering::Relaxed) > 0 {
                self.abort();
            }
            self.close();
        }
    }
}
