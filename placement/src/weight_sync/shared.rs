//! Weights through memory that the processes of one host share.
//!
//! Each trainer has a segment that it alone writes: a head of words, then its part of every generator slice, as the slices
//! lie in generators' memory. The head says how far the trainer is (version and number of segments of the plan written)
//! and holds a sum per slice and segment. Generators read along while trainers write.
//!
//! Trainers overwrite the version before: publish when no generator samples. One that tries is refused (WS-5).

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use echelon_core::process_group::{MeetingPoint, Patience};
use echelon_core::store::{LiveMap, LiveSegment, LiveWriter, SegmentWriter};
use echelon_core::zero::TrainingState;
use echelon_core::{Error, Result, shim};
use tch::{Device, Kind, Tensor};

use super::checksum::Checksum;
use super::destination::{Destination, Place};
use super::held::Held;
use super::pack::{Source, check_state};
use super::plan::{Segment, SyncPlan};
use super::{SyncReport, damaged};

/// The head's words: what the plan is, and how far the trainer is; the sums follow.
const FINGERPRINT: usize = 0;
const PROGRESS: usize = 8;
const SUMS: usize = 16;

/// Blocks begin on these boundaries.
const ALIGNMENT: usize = 64;

/// Where a trainer's part of each slice stands in its segment.
struct SegmentLayout {
    /// Segments of the plan, in the order of writing.
    segments: Vec<Segment>,
    /// By tensor-parallel rank, unit and parameter.
    blocks: HashMap<(usize, usize, usize), Block>,
    bytes: usize,
}

/// A stretch of a slice.
#[derive(Clone, Copy, Debug)]
struct Block {
    offset: usize,
    /// The slice's element that it begins with.
    first: i64,
    length: i64,
}

impl Block {
    /// Where element `at` of the slice stands in the segment.
    fn place(&self, at: i64, element_bytes: usize) -> usize {
        self.offset + (at - self.first) as usize * element_bytes
    }
}

impl SegmentLayout {
    fn new(plan: &SyncPlan, trainer: usize) -> SegmentLayout {
        let segments: Vec<Segment> =
            (0..plan.num_buckets()).flat_map(|bucket| plan.segments(bucket).to_vec()).collect();
        let mut blocks = HashMap::<_, Block>::new();
        let mut order = Vec::new();
        for tp_rank in 0..plan.config().tensor_parallel {
            for segment in &segments {
                plan.each_run(segment, trainer, tp_rank, &mut |run| {
                    let key = (tp_rank, segment.unit, run.param);
                    let block = blocks.entry(key).or_insert_with(|| {
                        order.push(key);
                        Block { offset: 0, first: run.to, length: 0 }
                    });
                    assert_eq!(block.first + block.length, run.to, "a trainer's part of a slice lies together");
                    block.length += run.length;
                });
            }
        }
        let mut end = SUMS + 8 * segments.len() * plan.config().tensor_parallel;
        for key in order {
            let block = blocks.get_mut(&key).expect("listed when it was made");
            block.offset = end.next_multiple_of(ALIGNMENT);
            end = block.offset + block.length as usize * plan.element_bytes();
        }
        SegmentLayout { segments, blocks, bytes: end }
    }

    fn sum_place(&self, tp_rank: usize, segment: usize) -> usize {
        SUMS + 8 * (tp_rank * self.segments.len() + segment)
    }
}

/// What a trainer has written: a version, and how many of its segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Written {
    version: u64,
    segments: usize,
}

impl Written {
    const SEGMENT_BITS: u32 = 24;

    fn word(self) -> u64 {
        self.version << Written::SEGMENT_BITS | self.segments as u64
    }

    fn of(word: u64) -> Written {
        Written {
            version: word >> Written::SEGMENT_BITS,
            segments: (word & ((1 << Written::SEGMENT_BITS) - 1)) as usize,
        }
    }
}

/// Both sides write and read by the same plan.
fn fingerprint(plan: &SyncPlan) -> u64 {
    let config = plan.config();
    let (trainers, slices) = (config.trainers, config.tensor_parallel);
    let text = format!("{:?} {trainers} {slices} {:?} {}", plan.shape(), config.kind, config.bucket_bytes);
    let mut sum = Checksum::default();
    sum.read(text.as_bytes());
    sum.value()
}

/// A trainer's end: the segment that it writes.
pub struct SharedSender {
    plan: SyncPlan,
    trainer: usize,
    layout: SegmentLayout,
    writer: LiveWriter,
}

impl SharedSender {
    /// Takes the memory, and touches it.
    ///
    /// # Errors
    /// There is not enough.
    pub fn new(plan: SyncPlan, trainer: usize) -> Result<SharedSender> {
        let layout = SegmentLayout::new(&plan, trainer);
        let name = format!("weights of trainer {trainer}");
        let mut memory =
            SegmentWriter::create(&name, layout.bytes).map_err(|error| Error::other("weight sync", error))?;
        memory.bytes()[FINGERPRINT..FINGERPRINT + 8].copy_from_slice(&fingerprint(&plan).to_le_bytes());
        let writer = memory.share().map_err(|error| Error::other("weight sync", error))?;
        Ok(SharedSender { plan, trainer, layout, writer })
    }

    /// What generators map: hand its descriptor to their processes.
    pub fn writer(&self) -> &LiveWriter {
        &self.writer
    }

    /// Tells generators' processes of this host, at the ranks' meeting point, where they find the segment: among the files
    /// that this process has open, which the kernel shows to its own user alone.
    ///
    /// # Errors
    /// The meeting point is gone.
    pub fn offer(&self, at: &MeetingPoint, name: &str) -> Result<()> {
        let descriptor = self.writer.segment().as_fd().as_raw_fd();
        at.tell(&key(name, self.trainer), &format!("/proc/{}/fd/{descriptor}", std::process::id()))
    }

    /// Writes this trainer's part of the weights.
    ///
    /// # Errors
    /// A state that the plan is not for.
    pub fn publish(&mut self, state: &TrainingState, version: u64) -> Result<SyncReport> {
        let begun = Instant::now();
        let _guard = tch::no_grad_guard();
        check_state(&self.plan, state)?;
        let SharedSender { plan, trainer, layout, writer } = self;
        writer.set_word(PROGRESS, Written { version, segments: 0 }.word());
        let (mut bytes, mut checksum) = (0, 0u64);
        for (index, segment) in layout.segments.iter().enumerate() {
            let source = Source::new(plan, state, segment)?;
            for tp_rank in 0..plan.config().tensor_parallel {
                let memory = writer.bytes();
                let mut sum = Checksum::default();
                plan.each_run(segment, *trainer, tp_rank, &mut |run| {
                    let from = source.bytes(run.from, run.length);
                    let block = &layout.blocks[&(tp_rank, segment.unit, run.param)];
                    let place = block.place(run.to, plan.element_bytes());
                    sum.copy_away(from, &mut memory[place..place + from.len()]);
                    bytes += from.len();
                });
                checksum = checksum.wrapping_add(sum.value());
                writer.set_word(layout.sum_place(tp_rank, index), sum.value());
            }
            writer.set_word(PROGRESS, Written { version, segments: index + 1 }.word());
        }
        Ok(SyncReport { version, bytes, seconds: begun.elapsed().as_secs_f64(), checksum })
    }

    /// Spoils a byte of the weights as an error of the memory would.
    #[cfg(test)]
    pub(super) fn spoil(&mut self) {
        *self.writer.bytes().last_mut().expect("a segment has bytes") ^= 1;
    }
}

fn key(name: &str, trainer: usize) -> String {
    format!("{name}/segment of trainer {trainer}")
}

/// The segments that the trainers [offer](SharedSender::offer), in the order of their ranks.
///
/// # Errors
/// A trainer that offers none in time, or whose segment cannot be opened here.
pub fn find_segments(at: &MeetingPoint, name: &str, trainers: usize, patience: Patience) -> Result<Vec<LiveMap>> {
    let find = |trainer: usize| {
        let path = at.hear(&key(name, trainer), patience)?;
        let failed = |error: &dyn std::fmt::Display| {
            Error::Refused(format!(
                "weight sync: the memory of trainer {trainer} cannot be opened as {path}: {error}; trainers and generators \
                 must be processes of one user, on one host and in one container"
            ))
        };
        let file = std::fs::File::open(&path).map_err(|error| failed(&error))?;
        LiveSegment::from_fd(OwnedFd::from(file)).and_then(|segment| segment.map()).map_err(|error| failed(&error))
    };
    (0..trainers).map(find).collect()
}

/// A generator rank's end: the trainers' segments, and the tensors that it computes on.
pub struct SharedReceiver {
    plan: SyncPlan,
    tp_rank: usize,
    trainers: Vec<(SegmentLayout, Arc<LiveMap>)>,
    /// Unit and parameter of the slices that are computed on in place.
    in_place: HashSet<(usize, usize)>,
    tensors: HashMap<String, Tensor>,
    destination: Destination,
    held: Held,
    patience: Duration,
}

impl SharedReceiver {
    /// With the trainers' segments in the order of their ranks. Slices that lie in one segment become tensors over it;
    /// the others have memory of their own. `patience` is how long a trainer may make no progress in a sync.
    ///
    /// # Errors
    /// Segments of another plan.
    pub fn new(plan: SyncPlan, tp_rank: usize, segments: Vec<LiveMap>, patience: Duration) -> Result<SharedReceiver> {
        let trainers = checked(&plan, segments)?;
        let (mut tensors, mut in_place) = (HashMap::new(), HashSet::new());
        let shapes = plan.slice_shapes(tp_rank);
        for (unit, shape) in plan.shape().units.iter().enumerate() {
            for (index, param) in shape.params.iter().enumerate() {
                let shape = &shapes[&param.name];
                let whole = trainers.iter().find_map(|(layout, map)| {
                    let block = layout.blocks.get(&(tp_rank, unit, index))?;
                    (block.length == shape.iter().product::<i64>()).then_some((block, map))
                });
                let kind = plan.config().kind;
                let tensor = match whole {
                    Some((block, map)) => tensor_over(map, block.offset, shape, kind)?,
                    None => Tensor::f_zeros(shape, (kind, Device::Cpu))?,
                };
                in_place.extend(whole.map(|_| (unit, index)));
                tensors.insert(param.name.clone(), tensor);
            }
        }
        let destination = Destination::by_param(&plan, tp_rank, &tensors)?;
        let held = Held::Nothing;
        Ok(SharedReceiver { plan, tp_rank, trainers, in_place, tensors, destination, held, patience })
    }

    /// A receiver that copies all slices into `tensors`, which may be on a device.
    ///
    /// # Errors
    /// Segments of another plan; a tensor that is not the slice that the plan has for `tp_rank`.
    pub fn copying(
        plan: SyncPlan,
        tp_rank: usize,
        segments: Vec<LiveMap>,
        tensors: &HashMap<String, Tensor>,
        patience: Duration,
    ) -> Result<SharedReceiver> {
        let trainers = checked(&plan, segments)?;
        let destination = Destination::by_param(&plan, tp_rank, tensors)?;
        let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        let (in_place, held) = (HashSet::new(), Held::Nothing);
        Ok(SharedReceiver { plan, tp_rank, trainers, in_place, tensors, destination, held, patience })
    }

    /// What the generator computes on, by parameter name. Read only: those over the trainers' memory fault when written.
    pub fn tensors(&self) -> &HashMap<String, Tensor> {
        &self.tensors
    }

    /// Bytes of the slices that a sync copies; the others are computed on where trainers wrote them.
    pub fn copied_bytes(&self) -> usize {
        let mut elements = 0;
        for (trainer, (layout, _)) in self.trainers.iter().enumerate() {
            for segment in &layout.segments {
                self.plan.each_run(segment, trainer, self.tp_rank, &mut |run| {
                    elements += if self.in_place.contains(&(segment.unit, run.param)) { 0 } else { run.length };
                });
            }
        }
        elements as usize * self.plan.element_bytes()
    }

    /// Takes up the weights of `version` as the trainers write them.
    ///
    /// # Errors
    /// A trainer that writes nothing for too long, or another version; bytes that are not those written. Nothing can be
    /// sampled with then, until a whole sync succeeds.
    pub fn receive(&mut self, version: u64) -> Result<SyncReport> {
        let begun = Instant::now();
        self.held.begin(version);
        self.destination.begin();
        let outcome = self.receive_segments(version);
        self.held.end(version, &outcome);
        let (bytes, checksum) = outcome?;
        Ok(SyncReport { version, bytes, seconds: begun.elapsed().as_secs_f64(), checksum })
    }

    /// # Errors
    /// The weights of `version` are not here, or not all of them, or a trainer writes others: do not sample.
    pub fn check(&self, version: u64) -> Result<()> {
        self.held.check(version)?;
        self.check_unchanged(version)
    }

    fn check_unchanged(&self, version: u64) -> Result<()> {
        for (trainer, (layout, map)) in self.trainers.iter().enumerate() {
            let written = Written::of(map.word(PROGRESS));
            if written != (Written { version, segments: layout.segments.len() }) {
                return Err(Error::Refused(format!(
                    "weights of version {version} are being overwritten: trainer {trainer} has begun version {}: receive \
                     that one before sampling",
                    written.version
                )));
            }
        }
        Ok(())
    }

    fn receive_segments(&mut self, version: u64) -> Result<(usize, u64)> {
        let _guard = tch::no_grad_guard();
        let (mut bytes, mut checksum) = (0, 0u64);
        for index in 0..self.trainers[0].0.segments.len() {
            for trainer in 0..self.trainers.len() {
                self.wait_for(trainer, index, version)?;
                let (received, sum) = self.take_up(trainer, index)?;
                bytes += received;
                checksum = checksum.wrapping_add(sum);
            }
        }
        self.check_unchanged(version)?;
        Ok((bytes, checksum))
    }

    /// Waits until a trainer has written a segment of a version.
    fn wait_for(&self, trainer: usize, segment: usize, version: u64) -> Result<()> {
        let (layout, map) = &self.trainers[trainer];
        let (mut seen, mut since) = (map.word(PROGRESS), Instant::now());
        loop {
            let word = map.word(PROGRESS);
            let written = Written::of(word);
            if written.version == version && written.segments > segment {
                return Ok(());
            }
            if written.version > version {
                return Err(Error::Refused(format!(
                    "weight sync: trainer {trainer} writes version {}, and version {version} is to be received: publish \
                     and receive the same version",
                    written.version
                )));
            }
            if word != seen {
                (seen, since) = (word, Instant::now());
            }
            if since.elapsed() > self.patience {
                let unit = &self.plan.shape().units[layout.segments[segment].unit].name;
                return Err(Error::Refused(format!(
                    "weight sync: version {version}: trainer {trainer} wrote nothing of unit `{unit}` for {} s (it stands at \
                     version {}): its process is gone or stuck",
                    self.patience.as_secs(),
                    written.version
                )));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Sums a written segment's runs, and copies those that are not computed on in place.
    fn take_up(&mut self, trainer: usize, index: usize) -> Result<(usize, u64)> {
        let SharedReceiver { plan, tp_rank, trainers, in_place, destination, .. } = self;
        let (layout, map) = &trainers[trainer];
        let (segment, size) = (&layout.segments[index], plan.element_bytes());
        let (mut sum, mut bytes, mut outcome) = (Checksum::default(), 0, Ok(()));
        plan.each_run(segment, trainer, *tp_rank, &mut |run| {
            let length = run.length as usize * size;
            let place = layout.blocks[&(*tp_rank, segment.unit, run.param)].place(run.to, size);
            // SAFETY: in the map by `checked`; the trainer's progress says that it has written this part, and it writes it
            // again only in the next sync.
            let from = unsafe { std::slice::from_raw_parts(map.as_ptr().add(place), length) };
            bytes += length;
            if in_place.contains(&(segment.unit, run.param)) {
                return sum.read(from);
            }
            let begin = run.to as usize * size;
            let to = Place { unit: segment.unit, piece: run.param, bytes: begin..begin + length };
            let copied = destination.take(&to, |to| sum.copy(from, to));
            outcome = std::mem::replace(&mut outcome, Ok(())).and(copied);
        });
        outcome?;
        let sent = map.word(layout.sum_place(*tp_rank, index));
        if sum.value() != sent {
            let unit = &plan.shape().units[segment.unit].name;
            return Err(damaged(format_args!("segment {index}"), unit, trainer, (sent, sum.value())));
        }
        Ok((bytes, sent))
    }
}

/// The trainers' segments with their layouts.
fn checked(plan: &SyncPlan, segments: Vec<LiveMap>) -> Result<Vec<(SegmentLayout, Arc<LiveMap>)>> {
    let trainers = plan.config().trainers;
    if segments.len() != trainers {
        let found = segments.len();
        return Err(Error::Refused(format!(
            "weight sync: {found} segments for {trainers} trainers: one each is needed"
        )));
    }
    let with_layout = |(trainer, map): (usize, LiveMap)| {
        let layout = SegmentLayout::new(plan, trainer);
        if map.num_bytes() != layout.bytes || map.word(FINGERPRINT) != fingerprint(plan) {
            return Err(Error::Refused(format!(
                "weight sync: the segment of trainer {trainer} is of another plan: use one shape, world size, slices, \
                 dtype and bucket size on both sides"
            )));
        }
        Ok((layout, Arc::new(map)))
    };
    segments.into_iter().enumerate().map(with_layout).collect()
}

/// A tensor over a trainer's memory, which it keeps mapped.
fn tensor_over(map: &Arc<LiveMap>, offset: usize, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let address = map.as_ptr() as usize + offset;
    // SAFETY: `checked` found the segment to be of the plan's size, blocks are aligned, and the tensor keeps the map. The
    // trainer writes while nobody computes: `check` refuses to sample then.
    Ok(unsafe { shim::from_mapping(address, shape, kind, Box::new(map.clone())) }?)
}
