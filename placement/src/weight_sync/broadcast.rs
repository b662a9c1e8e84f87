//! Weights by packed broadcasts: from each trainer to those ranks of the replicas that hold the same slices.
//!
//! A trainer and the replicas' ranks of one tensor-parallel index form a *lane*, a process group of its own in which the
//! trainer comes first: a broadcast reaches those who need its bytes, and all lanes work at once. A bucket is packed while
//! the one before is on its way, and copied out while the next one arrives.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Instant;

use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::zero::TrainingState;
use echelon_core::{Error, Result};
use tch::{Device, Kind, Tensor};

use super::checksum::Checksum;
use super::destination::Destination;
use super::held::Held;
use super::pack::{Source, bytes_of, bytes_of_mut, check_state};
use super::plan::SyncPlan;
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
    /// Spoils a bucket, given its number, after it was summed.
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
        let (mut checksum, mut bytes) = (0u64, 0);
        std::thread::scope(|scope| {
            let ends: Vec<Lane> = self.lanes.iter().map(|end| end.start(scope, version)).collect();
            let mut pack_all = || {
                for bucket in 0..self.plan.num_buckets() {
                    if bucket >= 2 && !ends.iter().all(Lane::take) {
                        return Ok(()); // the lane's thread says why
                    }
                    let mut buffers = self.buffers(state, bucket);
                    checksum = checksum.wrapping_add(pack(&self.plan, state, bucket, version, &mut buffers)?);
                    #[cfg(test)]
                    if let Some(spoil) = self.spoil {
                        buffers.iter_mut().for_each(|buffer| spoil(bucket, bytes_of_mut(buffer)));
                    }
                    for (lane, buffer) in ends.iter().zip(buffers) {
                        bytes += buffer.numel() - trailer_bytes(&self.plan, bucket);
                        lane.give(bucket, buffer);
                    }
                }
                Ok(())
            };
            let packed: Result<()> = pack_all();
            let sent: Vec<Result<()>> = ends.into_iter().map(Lane::end).collect();
            packed.and_then(|()| sent.into_iter().collect::<Result<()>>())
        })?;
        Ok(SyncReport { version, bytes, seconds: begun.elapsed().as_secs_f64(), checksum })
    }

    /// Bytes that this process has sent over its lanes so far.
    pub fn bytes_sent(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.group.bytes_sent()).sum()
    }

    /// Each lane's buffer for a bucket, in the bucket's size.
    fn buffers(&self, state: &TrainingState, bucket: usize) -> Vec<Tensor> {
        let trainer = state.sharding().group.rank();
        let sized =
            |(tp_rank, end): (usize, &LaneEnd)| end.buffer(bucket, self.plan.bucket_bytes(bucket, trainer, tp_rank));
        self.lanes.iter().enumerate().map(sized).collect()
    }
}

/// A generator rank's end.
pub struct BroadcastReceiver {
    plan: SyncPlan,
    tp_rank: usize,
    /// By trainer.
    lanes: Vec<LaneEnd>,
    destination: Destination,
    held: Held,
}

impl BroadcastReceiver {
    /// With what [`join_lanes`] gave. `tensors` are what the generator computes on, by parameter name: they are filled in
    /// place.
    ///
    /// # Errors
    /// A tensor is not the slice that the plan has for `tp_rank`.
    pub fn new(
        plan: SyncPlan,
        tp_rank: usize,
        lanes: Vec<ProcessGroup>,
        tensors: &HashMap<String, Tensor>,
    ) -> Result<BroadcastReceiver> {
        let destination = Destination::new(&plan, tp_rank, tensors)?;
        let lanes = lane_ends(&plan, lanes, |lane| vec![(lane.index, tp_rank)])?;
        Ok(BroadcastReceiver { plan, tp_rank, lanes, destination, held: Held::Nothing })
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
        let mut arrived: Result<(usize, u64)> = Ok((0, 0));
        let buffer =
            |trainer: usize, bucket: usize| lanes[trainer].buffer(bucket, plan.bucket_bytes(bucket, trainer, tp_rank));
        std::thread::scope(|scope| {
            let ends: Vec<Lane> = lanes.iter().map(|end| end.start(scope, version)).collect();
            for (trainer, lane) in ends.iter().enumerate() {
                (0..plan.num_buckets().min(2)).for_each(|bucket| lane.give(bucket, buffer(trainer, bucket)));
            }
            'buckets: for bucket in 0..plan.num_buckets() {
                for (trainer, lane) in ends.iter().enumerate() {
                    if !lane.take() {
                        break 'buckets; // the lane's thread says why
                    }
                    arrived = arrived.and_then(|(bytes, checksum)| {
                        let buffer = buffer(trainer, bucket);
                        let from = Bucket { plan, bucket, trainer, bytes: bytes_of(&buffer) };
                        let sum = from.unpack(tp_rank, version, destination)?;
                        let weights = buffer.numel() - trailer_bytes(plan, bucket);
                        Ok((bytes + weights, checksum.wrapping_add(sum)))
                    });
                    if bucket + 2 < plan.num_buckets() {
                        lane.give(bucket + 2, buffer(trainer, bucket + 2));
                    }
                }
            }
            let received: Vec<Result<()>> = ends.into_iter().map(Lane::end).collect();
            received.into_iter().collect::<Result<()>>().and(arrived)
        })
    }
}

fn trailer_bytes(plan: &SyncPlan, bucket: usize) -> usize {
    8 * (1 + plan.segments(bucket).len())
}

/// Fills each lane's buffer: the weights of its slices, then version and sums. Returns all sums added up.
fn pack(plan: &SyncPlan, state: &TrainingState, bucket: usize, version: u64, buffers: &mut [Tensor]) -> Result<u64> {
    let trainer = state.sharding().group.rank();
    let mut ends = vec![0; buffers.len()];
    let mut trailers = vec![vec![version]; buffers.len()];
    for segment in plan.segments(bucket) {
        let source = Source::new(plan, state, segment)?;
        for (tp_rank, buffer) in buffers.iter_mut().enumerate() {
            let (buffer, end) = (bytes_of_mut(buffer), &mut ends[tp_rank]);
            let mut sum = Checksum::default();
            plan.each_run(segment, trainer, tp_rank, &mut |run| {
                let from = source.bytes(run.from, run.length);
                sum.copy(from, &mut buffer[*end..*end + from.len()]);
                *end += from.len();
            });
            trailers[tp_rank].push(sum.value());
        }
    }
    for ((buffer, end), trailer) in buffers.iter_mut().zip(ends).zip(&trailers) {
        let bytes: Vec<u8> = trailer.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes_of_mut(buffer)[end..].copy_from_slice(&bytes);
    }
    Ok(trailers.iter().flat_map(|trailer| &trailer[1..]).fold(0, |all, sum| all.wrapping_add(*sum)))
}

/// A bucket that arrived.
struct Bucket<'a> {
    plan: &'a SyncPlan,
    bucket: usize,
    trainer: usize,
    bytes: &'a [u8],
}

impl Bucket<'_> {
    /// Copies the weights to their places; returns their sums added up.
    fn unpack(&self, tp_rank: usize, version: u64, destination: &mut Destination) -> Result<u64> {
        let Bucket { plan, bucket, trainer, bytes } = *self;
        let (weights, trailer) = bytes.split_at(bytes.len() - trailer_bytes(plan, bucket));
        let words: Vec<u64> =
            trailer.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect();
        if words[0] != version {
            return Err(Error::Refused(format!(
                "weight sync: bucket {bucket} from trainer {trainer} carries version {}, and version {version} is to be \
                 received: publish and receive the same version",
                words[0]
            )));
        }
        let size = plan.element_bytes();
        let (mut begin, mut total) = (0, 0u64);
        for (segment, &sent) in plan.segments(bucket).iter().zip(&words[1..]) {
            let mut sum = Checksum::default();
            let mut written = Ok(());
            plan.each_run(segment, trainer, tp_rank, &mut |run| {
                let from = &weights[begin..begin + run.length as usize * size];
                let place = ((segment.unit, run.param), (run.to as usize * size, from.len()));
                let copied = destination.write(place.0, place.1, |to| sum.copy(from, to));
                written = std::mem::replace(&mut written, Ok(())).and(copied);
                begin += from.len();
            });
            written?;
            if sum.value() != sent {
                let unit = &plan.shape().units[segment.unit].name;
                return Err(damaged(format_args!("bucket {bucket}"), unit, trainer, (sent, sum.value())));
            }
            total = total.wrapping_add(sent);
        }
        Ok(total)
    }
}

/// A process's end of a lane, with its two buffers.
struct LaneEnd {
    index: usize,
    group: ProcessGroup,
    buffers: [Tensor; 2],
}

/// Buffers as large as any bucket of the (trainer, slice) pairs that an end may carry.
fn lane_ends(
    plan: &SyncPlan,
    groups: Vec<ProcessGroup>,
    pairs: impl Fn(&LaneEnd) -> Vec<(usize, usize)>,
) -> Result<Vec<LaneEnd>> {
    let end = |(index, group)| {
        let mut end = LaneEnd { index, group, buffers: [Tensor::new(), Tensor::new()] };
        let of_pair = |(trainer, tp_rank)| {
            (0..plan.num_buckets()).map(move |bucket| plan.bucket_bytes(bucket, trainer, tp_rank)).max().unwrap_or(0)
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
        let (give, work) = channel::<(usize, Tensor)>();
        let (done, take) = channel();
        let group = self.group.clone();
        let broadcast = move || {
            for (bucket, buffer) in work {
                group.broadcast(&format!("weights of version {version}, bucket {bucket}"), &buffer, 0)?;
                if done.send(()).is_err() {
                    break;
                }
            }
            Ok(())
        };
        Lane { give, take, thread: scope.spawn(broadcast) }
    }
}

/// A lane at work: buckets given are broadcast in order.
struct Lane<'scope> {
    give: Sender<(usize, Tensor)>,
    take: Receiver<()>,
    thread: ScopedJoinHandle<'scope, Result<()>>,
}

impl Lane<'_> {
    /// The buffer is the lane's until a [`Lane::take`] has counted it.
    fn give(&self, bucket: usize, buffer: Tensor) {
        let _ = self.give.send((bucket, buffer)); // a thread that ended early says why at `end`
    }

    /// Waits for the next bucket's broadcast; false when the lane has failed.
    fn take(&self) -> bool {
        self.take.recv().is_ok()
    }

    /// Waits until all that was given is through.
    fn end(self) -> Result<()> {
        drop(self.give);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
