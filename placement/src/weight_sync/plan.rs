//! Which bytes go from which trainer to which generator, in which order: a function of shapes, known to both sides.

use std::collections::HashMap;
use std::ops::Range;

use echelon_core::shape::{ModelShape, ParamShape, ParamSlice, TensorParallelPart};
use echelon_core::zero::FlatLayout;
use echelon_core::{Error, Result};
use tch::Kind;

/// Who exchanges weights, and in what.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SyncConfig {
    /// World size of the trainers; their ZeRO stage does not matter.
    pub trainers: usize,
    /// Generators that each hold a whole model, by `tensor_parallel` ranks together.
    pub replicas: usize,
    pub tensor_parallel: usize,
    /// What generators compute in.
    pub kind: Kind,
    /// What is on its way at once; a process has two buckets per peer that it talks to.
    pub bucket_bytes: usize,
    /// By broadcast, stretches shorter than this are packed together; others go from where they are to where they belong.
    pub pack_below: usize,
}

impl SyncConfig {
    /// Buckets and stretches of the default sizes.
    pub fn new(trainers: usize, replicas: usize, tensor_parallel: usize, kind: Kind) -> SyncConfig {
        SyncConfig { trainers, replicas, tensor_parallel, kind, bucket_bytes: BUCKET_BYTES, pack_below: PACK_BELOW }
    }
}

/// Small enough that copying the first and the last bucket, which nothing overlaps, costs little.
pub const BUCKET_BYTES: usize = 64 << 20;

/// A message costs as much as copying about so many bytes.
const PACK_BELOW: usize = 256 << 10;

/// The way of every weight from the trainers' flat shards to the generators' slices.
///
/// A trainer answers for its even part of every unit, of its trained and of its frozen parameters each: what is called a unit
/// here is a [region](ModelShape::by_region). Its parts, laid end to end, are cut into buckets; a bucket holds
/// for each generator rank the elements that fall into its slices.
#[derive(Clone, Debug)]
pub struct SyncPlan {
    shape: ModelShape,
    config: SyncConfig,
    layouts: Vec<FlatLayout>,
    /// By tensor-parallel rank, unit and parameter.
    slices: Vec<Vec<Vec<ParamSlice>>>,
    /// By tensor-parallel rank and unit: where the slices stand that are filled by broadcast.
    slice_layouts: Vec<Vec<FlatLayout>>,
    buckets: Vec<Vec<Segment>>,
}

/// Elements of one unit within a bucket, counted from where a trainer's part of the unit begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub unit: usize,
    pub range: Range<i64>,
}

/// Elements that lie together on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The parameter's index in its unit.
    pub param: usize,
    /// Place in the unit's flat buffer.
    pub from: i64,
    /// Place in the generator's slice of the parameter.
    pub to: i64,
    pub length: i64,
}

/// Runs that lie together on both sides, where a unit's slices are laid out as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    /// Place in the unit's flat buffer.
    pub from: i64,
    /// Place in the slices of the unit.
    pub to: i64,
    pub length: i64,
}

impl SyncPlan {
    /// # Errors
    /// A model that does not split into so many slices; nobody to send or to receive.
    pub fn new(shape: &ModelShape, config: SyncConfig) -> Result<SyncPlan> {
        let SyncConfig { trainers, replicas, tensor_parallel: size, .. } = config;
        if trainers == 0 || replicas == 0 {
            let who = format!("{trainers} trainers and {replicas} generators");
            return Err(Error::Refused(format!("weight sync between {who}: it takes at least one of each")));
        }
        let shape = shape.by_region();
        let layouts: Vec<_> = shape.units.iter().map(|unit| FlatLayout::new(unit, trainers)).collect();
        let laid_out = |rank: usize| {
            let sliced = shape.sliced(TensorParallelPart { rank, size });
            let sliced = sliced.map_err(|error| Error::other("weight sync to generators", error))?;
            Ok(sliced.units.iter().map(|unit| FlatLayout::new(unit, 1)).collect())
        };
        let slice_layouts = (0..size).map(laid_out).collect::<Result<_>>()?;
        let of_rank = |rank: usize| {
            let part = TensorParallelPart { rank, size };
            let of_unit = |params: &Vec<ParamShape>| params.iter().map(|param| shape.slice(param, part)).collect();
            shape.units.iter().map(|unit| of_unit(&unit.params)).collect()
        };
        let slices = (0..size).map(of_rank).collect();
        let elements = (config.bucket_bytes / config.kind.elt_size_in_bytes()).max(1) as i64;
        let buckets = cut(&layouts, trainers, elements);
        Ok(SyncPlan { shape, config, layouts, slices, slice_layouts, buckets })
    }

    pub fn config(&self) -> &SyncConfig {
        &self.config
    }

    /// The model by region.
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// Of each trainer for each tensor-parallel rank in one sync.
    pub fn num_buckets(&self) -> usize {
        self.buckets.len()
    }

    /// Bytes of weights from `trainer` to a generator's rank `tp_rank` in one sync.
    pub fn weight_bytes(&self, trainer: usize, tp_rank: usize) -> usize {
        (0..self.num_buckets()).map(|bucket| self.bucket_weight_bytes(bucket, trainer, tp_rank)).sum()
    }

    /// Every parameter of a generator's rank `tp_rank`, with the shape of its slice.
    pub fn slice_shapes(&self, tp_rank: usize) -> HashMap<String, Vec<i64>> {
        let units = self.shape.units.iter().zip(&self.slices[tp_rank]);
        let params = units.flat_map(|(unit, slices)| unit.params.iter().zip(slices));
        params
            .map(|(param, slice)| {
                let mut shape = param.shape.clone();
                shape[slice.dim] = slice.length;
                (param.name.clone(), shape)
            })
            .collect()
    }

    /// Where the slices of a generator's rank stand in a unit.
    pub(super) fn slice_layout(&self, tp_rank: usize, unit: usize) -> &FlatLayout {
        &self.slice_layouts[tp_rank][unit]
    }

    pub(super) fn segments(&self, bucket: usize) -> &[Segment] {
        &self.buckets[bucket]
    }

    /// Bytes of a bucket's weights.
    pub(super) fn bucket_weight_bytes(&self, bucket: usize, trainer: usize, tp_rank: usize) -> usize {
        let mut elements = 0;
        for segment in &self.buckets[bucket] {
            self.each_run(segment, trainer, tp_rank, &mut |run| elements += run.length);
        }
        elements as usize * self.element_bytes()
    }

    /// Bytes of the policy version and a sum per segment, at the end of a bucket.
    pub(super) fn trailer_bytes(&self, bucket: usize) -> usize {
        8 * (1 + self.buckets[bucket].len())
    }

    /// Bytes of the message with a bucket's short stretches and its trailer.
    pub(super) fn packed_bytes(&self, bucket: usize, trainer: usize, tp_rank: usize) -> usize {
        let of_segment = |segment| -> usize {
            let stretches = self.stretches(segment, trainer, tp_rank);
            stretches.iter().filter(|stretch| self.is_packed(stretch)).map(|stretch| self.stretch_bytes(stretch)).sum()
        };
        self.trailer_bytes(bucket) + self.buckets[bucket].iter().map(of_segment).sum::<usize>()
    }

    pub(super) fn is_packed(&self, stretch: &Stretch) -> bool {
        self.stretch_bytes(stretch) < self.config.pack_below
    }

    pub(super) fn stretch_bytes(&self, stretch: &Stretch) -> usize {
        stretch.length as usize * self.element_bytes()
    }

    pub(super) fn element_bytes(&self) -> usize {
        self.config.kind.elt_size_in_bytes()
    }

    /// Elements of every trainer's part of a unit.
    pub(super) fn part_length(&self, unit: usize) -> i64 {
        self.layouts[unit].length / self.config.trainers as i64
    }

    /// Where a trainer's part of a unit begins in the unit's flat buffer.
    pub(super) fn part_start(&self, unit: usize, trainer: usize) -> i64 {
        self.part_length(unit) * trainer as i64
    }

    /// The runs of a segment of `trainer` that go to `tp_rank`, the same on both sides and in the same order.
    pub(super) fn each_run(&self, segment: &Segment, trainer: usize, tp_rank: usize, each: &mut dyn FnMut(Run)) {
        let start = self.part_start(segment.unit, trainer);
        let flat = start + segment.range.start..start + segment.range.end;
        let params = &self.shape.units[segment.unit].params;
        let (offsets, slices) = (&self.layouts[segment.unit].offsets, &self.slices[tp_rank][segment.unit]);
        for (index, param) in params.iter().enumerate() {
            let offset = offsets[index];
            let wanted = (flat.start - offset).max(0)..(flat.end - offset).min(param.numel());
            if wanted.start < wanted.end {
                runs_of_slice(&param.shape, slices[index], wanted, &mut |from, to, length| {
                    each(Run { param: index, from: offset + from, to, length });
                });
            }
        }
    }

    /// A segment's runs, joined where nothing lies between them, in the order in which they lie with the trainer.
    pub(super) fn stretches(&self, segment: &Segment, trainer: usize, tp_rank: usize) -> Vec<Stretch> {
        let offsets = &self.slice_layouts[tp_rank][segment.unit].offsets;
        let mut runs = Vec::new();
        self.each_run(segment, trainer, tp_rank, &mut |run| {
            runs.push(Stretch { from: run.from, to: offsets[run.param] + run.to, length: run.length });
        });
        runs.sort_unstable_by_key(|run| run.from);
        let mut stretches = Vec::new();
        runs.into_iter().for_each(|run| extend(&mut stretches, run));
        stretches
    }
}

/// Appends a run, or makes the last stretch longer by it.
fn extend(stretches: &mut Vec<Stretch>, run: Stretch) {
    match stretches.last_mut() {
        Some(last) if (last.from + last.length, last.to + last.length) == (run.from, run.to) => {
            last.length += run.length
        }
        _ => stretches.push(run),
    }
}

/// The trainers' streams of parts in buckets of at most `elements`. All trainers' parts are of one size.
fn cut(layouts: &[FlatLayout], trainers: usize, elements: i64) -> Vec<Vec<Segment>> {
    let mut buckets = vec![Vec::new()];
    let mut room = elements;
    for (unit, layout) in layouts.iter().enumerate() {
        let part = layout.length / trainers as i64;
        let mut start = 0;
        while start < part {
            if room == 0 {
                buckets.push(Vec::new());
                room = elements;
            }
            let end = part.min(start + room);
            buckets.last_mut().expect("never empty").push(Segment { unit, range: start..end });
            room -= end - start;
            start = end;
        }
    }
    buckets
}

/// The elements `wanted` of a parameter, as far as they are in a slice of it: (place in the parameter, place in the slice,
/// length) of each run.
fn runs_of_slice(shape: &[i64], slice: ParamSlice, wanted: Range<i64>, each: &mut dyn FnMut(i64, i64, i64)) {
    // A slice is `length` of every `stride` elements, from `start` on; a slice of rows is one such stretch.
    let inner: i64 = shape[slice.dim + 1..].iter().product();
    let (stride, start, length) = (shape[slice.dim] * inner, slice.start * inner, slice.length * inner);
    if length == stride {
        return each(wanted.start, wanted.start, wanted.end - wanted.start);
    }
    for outer in wanted.start / stride..=(wanted.end - 1) / stride {
        let first = outer * stride + start;
        let (begin, end) = (wanted.start.max(first), wanted.end.min(first + length));
        if begin < end {
            each(begin, outer * length + begin - first, end - begin);
        }
    }
}
