//! Weights by packed broadcasts: from each trainer to those ranks of the replicas that hold the same slices.
//!
//! A trainer and the replicas' ranks of one tensor-parallel index form a *lane*, a process group of its own in which the
//! trainer comes first: a broadcast reaches those who need its bytes, and all lanes work at once. A bucket's long stretches are
//! messages of their own, from where they are to where they belong, and are only summed on both sides; its short ones
//! follow in one packed message, with the policy version and the sums. Both sides work on a bucket while another is on its
//! way.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Instant;

use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::zero::TrainingState;
use echelon_core::{Error, Result};
use tch::{Device, Kind, Tensor};

use super::checksum::Checksum;
use super::destination::{Destination, Place};
use super::held::Held;
use super::pack::{Source, bytes_of, bytes_of_mut, check_state};
use super::plan::{Stretch, SyncPlan};
use super::{SyncReport, damaged};

/// Who a process is in a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncPlace {
    Trainer(usize),
    Generator { replica: usize, tp_rank: usize },
}

/// Joins the lanes that a process takes part in; trainers and generators of `name` call this together.
///
/// # Errors
/// Not everybody joins in time.
pub fn join_lanes(
    at: &MeetingPoint,
    name: &str,
    plan: &SyncPlan,
    place: SyncPlace,
    address: &str,
    patience: Patience,
) -> Result<Vec<ProcessGroup>> {
    let config = plan.config();
    let size = 1 + config.replicas;
    let join = |trainer: usize, tp_rank: usize, rank: usize| {
        let name = format!("{name} of trainer {trainer} for slice {tp_rank}");
        ProcessGroup::join(at, &name, (rank, size), address, patience)
    };
    // Everybody by trainer, then by slice: none waits in a lane for one who waits in another.
    match place {
        SyncPlace::Trainer(trainer) => (0..config.tensor_parallel).map(|tp_rank| join(trainer, tp_rank, 0)).collect(),
        SyncPlace::Generator { replica, tp_rank } => {
            (0..config.trainers).map(|trainer| join(trainer, tp_rank, 1 + replica)).collect()
        }
    }
}

/// A trainer's end.
pub struct BroadcastSender {
    plan: SyncPlan,
    lanes: Vec<LaneEnd>,
    /// Spoils a bucket's packed message, given its number, after the bucket was summed.
    #[cfg(test)]
    pub(super) spoil: Option<fn(usize, &mut [u8])>,
}

impl BroadcastSender {
    /// With what [`join_lanes`] gave.
    pub fn new(plan: SyncPlan, lanes: Vec<ProcessGroup>) -> Result<BroadcastSender> {
        let trainer = |lane: &LaneEnd| (0..plan.config().trainers).map(|trainer| (trainer, lane.index)).collect();
        let lanes = lane_ends(&plan, lanes, trainer)?;
        Ok(BroadcastSender {
            plan,
            lanes,
            #[cfg(test)]
            spoil: None,
        })
    }

    /// Sends this trainer's part of the weights; all trainers publish, and all generators receive, the same version
    /// together.
    ///
    /// # Errors
    /// A generator that is gone or does not receive; a state that the plan is not for.
    pub fn publish(&mut self, state: &TrainingState, version: u64) -> Result<SyncReport> {
        let begun = Instant::now();
        let _guard = tch::no_grad_guard();
        check_state(&self.plan, state)?;
        let trainer = state.sharding().group.rank();
        let (mut checksum, mut bytes) = (0u64, 0);
        std::thread::scope(|scope| {
            let ends: Vec<Lane> = self.lanes.iter().map(|end| end.start(scope, version)).collect();
            let mut send_all = || {
                for bucket in 0..self.plan.num_buckets() {
                    if bucket >= 2 && !ends.iter().all(Lane::take) {
                        return Ok(()); // the lane's thread says why
                    }
                    let segments = self.plan.segments(bucket).iter();
                    let sources = segments.map(|segment| Source::new(&self.plan, state, segment));
                    let sources = sources.collect::<Result<Vec<_>>>()?;
                    for (tp_rank, lane) in ends.iter().enumerate() {
                        let of = Outgoing { bucket, trainer, tp_rank, sources: &sources };
                        checksum = checksum.wrapping_add(self.send(&of, version, lane));
                        bytes += self.plan.bucket_weight_bytes(bucket, trainer, tp_rank);
                    }
                }
                Ok(())
            };
            let given: Result<()> = send_all();
            let sent: Vec<Result<()>> = ends.into_iter().map(Lane::end).collect();
            given.and_then(|()| sent.into_iter().collect::<Result<()>>())
        })?;
        Ok(SyncReport { version, bytes, seconds: begun.elapsed().as_secs_f64(), checksum })
    }

    /// Bytes that this process has sent over its lanes so far.
    pub fn bytes_sent(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.group.bytes_sent()).sum()
    }

    /// Gives a lane a bucket: long stretches as they are, then the packed message. Returns its sums added up.
    fn send(&self, of: &Outgoing, version: u64, lane: &Lane) -> u64 {
        let plan = &self.plan;
        let Outgoing { bucket, trainer, tp_rank, sources } = *of;
        let mut buffer = self.lanes[tp_rank].buffer(bucket, plan.packed_bytes(bucket, trainer, tp_rank));
        let packed = bytes_of_mut(&mut buffer);
        let (mut end, mut trailer) = (0, vec![version]);
        for (segment, source) in plan.segments(bucket).iter().zip(sources) {
            let mut sums = Sums::default();
            for stretch in plan.stretches(segment, trainer, tp_rank) {
                let from = source.bytes(stretch.from, stretch.length);
                if plan.is_packed(&stretch) {
                    sums.short.copy(from, &mut packed[end..end + from.len()]);
                    end += from.len();
                } else {
                    let tensor = source.memory(stretch.from, stretch.length);
                    lane.give(Message { bucket, tensor, counts: false });
                    sums.long.read(from);
                }
            }
            trailer.push(sums.value());
        }
        let words: Vec<u8> = trailer.iter().flat_map(|word| word.to_le_bytes()).collect();
        packed[end..].copy_from_slice(&words);
        #[cfg(test)]
        if let Some(spoil) = self.spoil {
            spoil(bucket, packed);
        }
        lane.give(Message { bucket, tensor: buffer, counts: true });
        trailer[1..].iter().fold(0, |all, sum| all.wrapping_add(*sum))
    }
}

/// A bucket that is to be sent.
struct Outgoing<'a> {
    bucket: usize,
    trainer: usize,
    tp_rank: usize,
    /// By segment.
    sources: &'a [Source],
}

/// A generator rank's end.
pub struct BroadcastReceiver {
    plan: SyncPlan,
    tp_rank: usize,
    /// By trainer.
    lanes: Vec<LaneEnd>,
    tensors: HashMap<String, Tensor>,
    destination: Destination,
    held: Held,
}

impl BroadcastReceiver {
    /// With what [`join_lanes`] gave.
    pub fn new(plan: SyncPlan, tp_rank: usize, lanes: Vec<ProcessGroup>, device: Device) -> Result<BroadcastReceiver> {
        let (destination, tensors) = Destination::by_unit(&plan, tp_rank, device)?;
        let lanes = lane_ends(&plan, lanes, |lane| vec![(lane.index, tp_rank)])?;
        Ok(BroadcastReceiver { plan, tp_rank, lanes, tensors, destination, held: Held::Nothing })
    }

    /// What the generator computes on, by parameter name: filled in place. Before the first sync there is nothing in it.
    pub fn tensors(&self) -> &HashMap<String, Tensor> {
        &self.tensors
    }

    /// Takes up the weights of `version` from all trainers.
    ///
    /// # Errors
    /// A trainer that is gone or does not publish; another version; bytes that are not those sent. Nothing can be sampled
    /// with then, until a whole sync succeeds.
    pub fn receive(&mut self, version: u64) -> Result<SyncReport> {
        let begun = Instant::now();
        self.held.begin(version);
        let outcome = self.receive_buckets(version);
        self.held.end(version, &outcome);
        let (bytes, checksum) = outcome?;
        Ok(SyncReport { version, bytes, seconds: begun.elapsed().as_secs_f64(), checksum })
    }

    /// # Errors
    /// The weights of `version` are not here, or not all of them: do not sample.
    pub fn check(&self, version: u64) -> Result<()> {
        self.held.check(version)
    }

    /// Bytes and sum of what arrived. After a bucket that is wrong the others are still taken off the lanes, so that the
    /// next sync finds them in step.
    fn receive_buckets(&mut self, version: u64) -> Result<(usize, u64)> {
        let _guard = tch::no_grad_guard();
        self.destination.begin();
        let (plan, tp_rank, lanes, destination) = (&self.plan, self.tp_rank, &self.lanes, &mut self.destination);
        let bucket = |bucket: usize, trainer: usize| {
            let packed = lanes[trainer].buffer(bucket, plan.packed_bytes(bucket, trainer, tp_rank));
            Incoming { plan, bucket, trainer, tp_rank, packed }
        };
        let mut arrived: Result<(usize, u64)> = Ok((0, 0));
        std::thread::scope(|scope| {
            let ends: Vec<Lane> = lanes.iter().map(|end| end.start(scope, version)).collect();
            let mut expect_all = || {
                for index in 0..plan.num_buckets().min(2) {
                    for (trainer, lane) in ends.iter().enumerate() {
                        bucket(index, trainer).expect(destination, lane)?;
                    }
                }
                for index in 0..plan.num_buckets() {
                    for (trainer, lane) in ends.iter().enumerate() {
                        let Some(sum) = bucket(index, trainer).take_up(version, destination, lane) else {
                            return Ok(()); // the lane's thread says why
                        };
                        let weights = plan.bucket_weight_bytes(index, trainer, tp_rank);
                        arrived = std::mem::replace(&mut arrived, Ok((0, 0)))
                            .and_then(|(bytes, checksum)| Ok((bytes + weights, checksum.wrapping_add(sum?))));
                        if index + 2 < plan.num_buckets() {
                            bucket(index + 2, trainer).expect(destination, lane)?;
                        }
                    }
                }
                Ok(())
            };
            let expected: Result<()> = expect_all();
            let received: Vec<Result<()>> = ends.into_iter().map(Lane::end).collect();
            received.into_iter().collect::<Result<()>>().and(expected).and(arrived)
        })
    }
}

/// A bucket that is to arrive.
struct Incoming<'a> {
    plan: &'a SyncPlan,
    bucket: usize,
    trainer: usize,
    tp_rank: usize,
    packed: Tensor,
}

impl Incoming<'_> {
    fn place(&self, unit: usize, stretch: &Stretch) -> Place {
        let begin = stretch.to as usize * self.plan.element_bytes();
        Place { unit, piece: 0, bytes: begin..begin + self.plan.stretch_bytes(stretch) }
    }

    /// Lets the lane write the long stretches where they belong, and the rest into the buffer.
    fn expect(self, destination: &mut Destination, lane: &Lane) -> Result<()> {
        let Incoming { plan, bucket, .. } = self;
        for segment in plan.segments(bucket) {
            let stretches = plan.stretches(segment, self.trainer, self.tp_rank);
            for long in stretches.iter().filter(|stretch| !plan.is_packed(stretch)) {
                let tensor = destination.memory(&self.place(segment.unit, long))?;
                lane.give(Message { bucket, tensor, counts: true });
            }
        }
        lane.give(Message { bucket, tensor: self.packed, counts: true });
        Ok(())
    }

    /// Sums the long stretches as they arrive, and copies the short ones to their places: all sums added up. None when the
    /// lane has failed.
    fn take_up(&self, version: u64, destination: &mut Destination, lane: &Lane) -> Option<Result<u64>> {
        let Incoming { plan, bucket, trainer, tp_rank, .. } = *self;
        let mut outcome = Ok(());
        let mut sums = Vec::new();
        for segment in plan.segments(bucket) {
            let mut of_segment = Sums::default();
            let stretches = plan.stretches(segment, trainer, tp_rank);
            for long in stretches.iter().filter(|stretch| !plan.is_packed(stretch)) {
                if !lane.take() {
                    return None;
                }
                let place = self.place(segment.unit, long);
                outcome = outcome.and(destination.take(&place, |arrived| of_segment.long.read(arrived)));
            }
            sums.push(of_segment);
        }
        lane.take().then(|| outcome.and_then(|()| self.unpack(version, sums, destination)))
    }

    /// Copies the short stretches to their places, and compares the sums.
    fn unpack(&self, version: u64, sums: Vec<Sums>, destination: &mut Destination) -> Result<u64> {
        let Incoming { plan, bucket, trainer, tp_rank, .. } = *self;
        let packed = bytes_of(&self.packed);
        let (weights, trailer) = packed.split_at(packed.len() - plan.trailer_bytes(bucket));
        let words: Vec<u64> =
            trailer.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect();
        if words[0] != version {
            return Err(Error::Refused(format!(
                "weight sync: bucket {bucket} from trainer {trainer} carries version {}, and version {version} is to be \
                 received: publish and receive the same version",
                words[0]
            )));
        }
        let (mut begin, mut total) = (0, 0u64);
        for ((segment, mut sums), &sent) in plan.segments(bucket).iter().zip(sums).zip(&words[1..]) {
            let stretches = plan.stretches(segment, trainer, tp_rank);
            for short in stretches.iter().filter(|stretch| plan.is_packed(stretch)) {
                let from = &weights[begin..begin + plan.stretch_bytes(short)];
                begin += from.len();
                destination.take(&self.place(segment.unit, short), |to| sums.short.copy(from, to))?;
            }
            if sums.value() != sent {
                let unit = &plan.shape().units[segment.unit].name;
                return Err(damaged(format_args!("bucket {bucket}"), unit, trainer, (sent, sums.value())));
            }
            total = total.wrapping_add(sent);
        }
        Ok(total)
    }
}

/// Of a segment's stretches: those that travel by themselves, and those that are packed.
#[derive(Default)]
struct Sums {
    long: Checksum,
    short: Checksum,
}

impl Sums {
    fn value(&self) -> u64 {
        self.long.value().rotate_left(1).wrapping_add(self.short.value())
    }
}

/// A process's end of a lane, with its two buffers.
struct LaneEnd {
    index: usize,
    group: ProcessGroup,
    buffers: [Tensor; 2],
}

/// Buffers as large as any packed message of the (trainer, slice) pairs that an end may carry.
fn lane_ends(
    plan: &SyncPlan,
    groups: Vec<ProcessGroup>,
    pairs: impl Fn(&LaneEnd) -> Vec<(usize, usize)>,
) -> Result<Vec<LaneEnd>> {
    let end = |(index, group)| {
        let mut end = LaneEnd { index, group, buffers: [Tensor::new(), Tensor::new()] };
        let of_pair = |(trainer, tp_rank)| {
            (0..plan.num_buckets()).map(move |bucket| plan.packed_bytes(bucket, trainer, tp_rank)).max().unwrap_or(0)
        };
        let largest = pairs(&end).into_iter().map(of_pair).max().unwrap_or(0);
        for buffer in &mut end.buffers {
            *buffer = Tensor::f_zeros([largest as i64], (Kind::Uint8, Device::Cpu))?;
        }
        Ok(end)
    };
    groups.into_iter().enumerate().map(end).collect()
}

impl LaneEnd {
    fn buffer(&self, bucket: usize, bytes: usize) -> Tensor {
        self.buffers[bucket % 2].narrow(0, 0, bytes as i64)
    }

    fn start<'scope>(&self, scope: &'scope Scope<'scope, '_>, version: u64) -> Lane<'scope> {
        let (give, work) = channel::<Message>();
        let (done, take) = channel();
        let group = self.group.clone();
        let broadcast = move || {
            let mut flying = VecDeque::new();
            loop {
                let next = match flying.len() {
                    0 => work.recv().ok(),
                    IN_FLIGHT.. => None,
                    _ => work.try_recv().ok(),
                };
                if let Some(Message { bucket, tensor, counts }) = next {
                    let operation = format!("weights of version {version}, bucket {bucket}");
                    flying.push_back((group.start_broadcast(&operation, &tensor, 0)?, counts));
                } else if let Some((pending, counts)) = flying.pop_front() {
                    pending.wait()?;
                    if counts && done.send(()).is_err() {
                        return Ok(());
                    }
                } else {
                    return Ok(());
                }
            }
        };
        Lane { give, take, thread: scope.spawn(broadcast) }
    }
}

/// Messages of a lane that are on their way at once: the next one is with Gloo when one is through.
const IN_FLIGHT: usize = 3;

/// What one broadcast carries.
struct Message {
    bucket: usize,
    tensor: Tensor,
    /// [`Lane::take`] waits for it.
    counts: bool,
}

/// A lane at work: messages given are broadcast in order.
struct Lane<'scope> {
    give: Sender<Message>,
    take: Receiver<()>,
    thread: ScopedJoinHandle<'scope, Result<()>>,
}

impl Lane<'_> {
    /// The message's memory is the lane's until a [`Lane::take`] has counted it or a later one.
    fn give(&self, message: Message) {
        let _ = self.give.send(message); // a thread that ended early says why at `end`
    }

    /// Waits until the next message that counts is through; false when the lane has failed.
    fn take(&self) -> bool {
        self.take.recv().is_ok()
    }

    /// Waits until all that was given is through.
    fn end(self) -> Result<()> {
        drop(self.give);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
