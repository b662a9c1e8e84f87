//! The memory ledger: what every role holds on a device in every phase of a step, byte by byte, with the formula.
//!
//! Model states follow the ZeRO paper (Rajbhandari et al. 2020, section 3): with Ψ parameters, mixed-precision Adam
//! (K = 12: f32 master, momentum, variance) and N ranks a rank holds
//!
//! | stage | partitioned | bytes per rank |
//! |---|---|---|
//! | 0 | nothing | (2 + 2 + K) Ψ |
//! | 1 | optimizer states | 2Ψ + 2Ψ + KΨ/N |
//! | 2 | + gradients | 2Ψ + (2 + K) Ψ/N |
//! | 3 | + parameters | (2 + 2 + K) Ψ/N |
//!
//! In f32 the master is the parameter: 4 + 4 + 8 bytes, no master entry. That is the paper's arithmetic. What a rank holds
//! here differs in one entry ([`model_states`]): gradients are always accumulated in f32, so that a mini-batch may have
//! any number of micro-batches, and take 4 bytes instead of 2 in bf16.
//!
//! Everything else is activations and buffers of a pass. Those entries are *transient*: roles on one device take turns,
//! so a phase needs all resident entries and the transient ones of one role, the largest. A pass has several *instants*
//! at which it may be largest (the head's logits, a layer's backward, the embedding's gradient …); the entries are those of
//! the largest one.
//!
//! The formulas depend on what goes through a model at once ([`Loads`]): what the limits of a recipe allow, when a run is
//! planned, or what a step really had, when the ledger is compared with an allocator ([`compare`]).

pub mod compare;
mod generation;
mod pass;
mod runtime;
mod sizes;

use std::borrow::Cow;

use echelon_core::compute::ComputeDtype;
use echelon_core::memory::{DecodeLoad, PassLoad, Phase, StateBytes, Work};
use echelon_core::role::Role;
use echelon_core::weight_layout::STEPS_THAT_PAY;
use echelon_core::workload::{Sampling, Training, Workload};
use serde::{Deserialize, Serialize};

pub use runtime::{RUNTIME, runtime_bytes};
pub use sizes::ModelSizes;

use crate::tier::ROLES;

/// Bytes of one of the two buffers through which weights go to a generator elsewhere.
const SYNC_BUCKET_BYTES: u64 = crate::weight_sync::BUCKET_BYTES as u64;

/// Whose memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    Device,
    /// Host memory, per device.
    Host,
}

/// One line of the ledger: bytes that a role holds on each of its devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub role: Role,
    pub name: Cow<'static, str>,
    pub bytes: u64,
    /// How the bytes come about, in words.
    pub formula: Cow<'static, str>,
    pub place: Place,
    /// Only while the role has its turn in a phase; other roles' transient bytes are not there at that time.
    pub transient: bool,
    pub phases: Vec<Phase>,
}

impl Entry {
    /// Of a role, in a step with these phases.
    fn new(role: Role, item: Item, phases: &[Phase]) -> Entry {
        let there = |phase: &&Phase| {
            let its_turn = !item.transient || phase.role.is_none_or(|learner| learner == role);
            item.during.contains(phase.work) && its_turn
        };
        Entry {
            role,
            name: item.name.into(),
            bytes: item.bytes,
            formula: item.formula.into(),
            place: item.place,
            transient: item.transient,
            phases: phases.iter().filter(there).copied().collect(),
        }
    }
}

/// How one role is held on its devices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoleJob<'a> {
    pub role: Role,
    pub model: &'a ModelSizes,
    pub workload: &'a Workload,
    /// Devices of the role's group: the ranks over which rows and shards are split.
    pub ranks: usize,
    /// 0 to 3; frozen roles hold the whole model below 3 and a shard at 3.
    pub zero_stage: u8,
    /// Master weights and moments in host memory.
    pub adam_offload: bool,
    /// Devices per engine (generator).
    pub tensor_parallel: usize,
    /// Sequences decoded at once (generator).
    pub slots: usize,
    /// The generator computes on the weights that the actor holds on the same device.
    pub shares_weights: bool,
    /// What is not needed for generation moves to host memory meanwhile.
    pub moves_to_host: bool,
    /// The device is a share of a host: norms, rotations and gates are fused in f32, and the engine lays out a second copy
    /// of its matrices for decoding.
    pub on_cpu: bool,
}

/// What goes through a role's model at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loads {
    pub score: PassLoad,
    pub train: PassLoad,
    pub decode: DecodeLoad,
}

/// What a rank of `ranks` holds of `params` parameters at a ZeRO stage: gradients in the accumulators' dtype, f32 at least.
pub fn model_states(params: u64, ranks: usize, stage: u8, dtype: ComputeDtype) -> StateBytes {
    let part = |from_stage: u8| if stage >= from_stage { params.div_ceil(ranks as u64) } else { params };
    let master_bytes = if dtype == ComputeDtype::Bfloat16 { 4 } else { 0 };
    StateBytes {
        weights: dtype.bytes() * part(3),
        gradients: dtype.wide_bytes() * part(2),
        master: master_bytes * part(1),
        moments: 2 * dtype.wide_bytes() * part(1),
    }
}

/// A set of kinds of work, as bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Works(u8);

impl Works {
    pub const ALL: Works = Works(15);

    pub const fn of(work: Work) -> Works {
        Works(1 << work as u8)
    }

    pub const fn and(self, work: Work) -> Works {
        Works(self.0 | 1 << work as u8)
    }

    const fn without(self, other: Works) -> Works {
        Works(self.0 & !other.0)
    }

    pub fn contains(self, work: Work) -> bool {
        self.0 & (1 << work as u8) != 0
    }
}

/// An [`Entry`] before it is shown: no allocation, so that a search can go through millions.
#[derive(Clone, Copy, Debug)]
pub struct Item {
    pub name: &'static str,
    pub bytes: u64,
    pub formula: &'static str,
    pub place: Place,
    pub transient: bool,
    /// The kinds of work at which it is there; what is transient at the role's own.
    pub during: Works,
}

const AWAY_WHEN_MOVED: Works = Works::of(Work::Generate).and(Work::Publish);

impl RoleJob<'_> {
    /// The ledger of this role as lines to show.
    pub fn entries(&self) -> Vec<Entry> {
        self.entries_at(&self.most())
    }

    /// Every line of the ledger of this role on one device, at most; empty lines are left out.
    pub fn items(&self, each: &mut impl FnMut(Item)) {
        self.items_at(&self.most(), each);
    }

    /// [`RoleJob::items`] for what goes through the model at once.
    pub fn items_at(&self, loads: &Loads, each: &mut impl FnMut(Item)) {
        let mut each = |item: Item| {
            if item.bytes > 0 {
                each(item)
            }
        };
        if self.role == Role::Generator {
            return self.generation(&loads.decode, &mut each);
        }
        let training = self.learns();
        match training {
            Some(_) => self.training_state(&mut each),
            None => self.frozen_weights(&mut each),
        }
        if self.workload.passes(self.role, Work::Score).next().is_some() {
            self.scoring(&loads.score, &mut each);
        }
        if let Some(training) = training {
            self.training(&training, &loads.train, &mut each);
        }
    }

    /// How the role learns; None of a frozen one and of the generator.
    pub fn learns(&self) -> Option<Training> {
        self.workload.training(self.role)
    }

    /// Units of rows of the largest pass of a kind, on one rank.
    fn units(&self, work: Work) -> usize {
        let rows = self.workload.passes(self.role, work).map(|pass| pass.rows).max().unwrap_or(0);
        self.workload.units(rows).div_ceil(self.ranks)
    }

    /// The largest loads that the limits allow: every token of a micro-batch may have its prediction wanted.
    pub fn most(&self) -> Loads {
        let work = self.workload;
        let pass = |units: usize| {
            let tokens = work.tokens_at_once(units) as u64;
            PassLoad { tokens, predicted: tokens, passes: work.micro_batches(units) as u64 }
        };
        let decode = work.sampling.as_ref().map_or(DecodeLoad::default(), |sampling| self.most_decoded(sampling));
        Loads { score: pass(self.units(Work::Score)), train: pass(self.units(Work::Learn)), decode }
    }

    fn most_decoded(&self, sampling: &Sampling) -> DecodeLoad {
        let work = self.workload;
        let engines = (self.ranks / self.tensor_parallel).max(1);
        let prompts = sampling.prompts.div_ceil(engines).min(sampling.max_sequences);
        let prefill = sampling.max_batched_tokens.min(prompts * work.max_prompt_tokens).max(work.max_prompt_tokens);
        DecodeLoad {
            slots: self.slots as u64,
            slot_tokens: work.max_tokens() as u64,
            prompt_slot_tokens: work.max_prompt_tokens as u64,
            prefill_tokens: prefill as u64,
            prefill_prompts: prefill.div_ceil(work.max_prompt_tokens).min(prompts) as u64,
            refills: self.slots < sampling.sequences(engines),
            packs: self.on_cpu && work.max_response_tokens > STEPS_THAT_PAY && work.dtype != ComputeDtype::Float64,
        }
    }

    /// Model states of a trained role.
    pub fn states(&self) -> StateBytes {
        model_states(self.model.params, self.ranks, self.zero_stage, self.workload.dtype)
    }

    fn training_state(&self, each: &mut impl FnMut(Item)) {
        let states = self.states();
        let [weights, gradients, master, moments] = self.state_formulas();
        let moved = |away: Works| if self.moves_to_host { Works::ALL.without(away) } else { Works::ALL };
        // A generator that computes on these weights needs them where they are; sync reads them in any case.
        let is_published = self.workload.published() == Some(self.role);
        let kept = is_published && self.shares_weights;
        let away = if is_published { Works::of(Work::Generate) } else { AWAY_WHEN_MOVED };
        let weights_on = if kept { Works::ALL } else { moved(away) };
        let state_on = moved(AWAY_WHEN_MOVED);
        each(resident("weights", states.weights, weights, weights_on));
        each(resident("gradients", states.gradients, gradients, state_on));
        let adam = if self.adam_offload { Place::Host } else { Place::Device };
        let adam_on = if self.adam_offload { Works::ALL } else { state_on };
        each(Item { place: adam, ..resident("master weights", states.master, master, adam_on) });
        each(Item { place: adam, ..resident("moments", states.moments, moments, adam_on) });
        if self.adam_offload {
            let staged = self.workload.dtype.wide_bytes() * self.model.params.div_ceil(self.ranks as u64);
            let formula = "accumulator bytes x parameters / ranks: gradients on their way to the host's step";
            each(host("gradient staging", staged, formula, Works::ALL));
        }
        if self.moves_to_host {
            let adam = if self.adam_offload { 0 } else { states.master + states.moments };
            let moved = adam + if kept { 0 } else { states.weights };
            let formula = "weights, master and moments that leave the device while the generator works";
            each(host("moved training state", moved, formula, AWAY_WHEN_MOVED));
        }
    }

    /// What the entries of the model states say, by stage and dtype.
    fn state_formulas(&self) -> [&'static str; 4] {
        let split = |from: u8, whole: &'static str, part: &'static str| match self.zero_stage >= from {
            true => part,
            false => whole,
        };
        let gradients = split(
            2,
            "accumulator bytes (f32: 4) x parameters",
            "accumulator bytes (f32: 4) x parameters / ranks (ZeRO 2 and 3)",
        );
        [
            split(3, "compute bytes x parameters", "compute bytes x parameters / ranks (ZeRO 3)"),
            gradients,
            split(1, "4 bytes x parameters", "4 bytes x parameters / ranks (ZeRO 1 to 3)"),
            split(
                1,
                "2 x moment bytes (f32: 4) x parameters",
                "2 x moment bytes (f32: 4) x parameters / ranks (ZeRO 1 to 3)",
            ),
        ]
    }

    fn frozen_weights(&self, each: &mut impl FnMut(Item)) {
        let bytes = self.workload.dtype.bytes() * self.frozen_params();
        let formula = match self.zero_stage {
            3 => "compute bytes x parameters / ranks (ZeRO 3)",
            _ => "compute bytes x parameters",
        };
        if self.offloaded() {
            each(host("weights", bytes, formula, Works::ALL));
            let formula = "compute bytes x parameters, on the device for its turn (offload)";
            each(transient("weights", bytes, formula, Works::of(Work::Score)));
        } else if self.moves_to_host {
            each(resident("weights", bytes, formula, Works::ALL.without(AWAY_WHEN_MOVED)));
            each(host(
                "moved weights",
                bytes,
                "weights that leave the device while the generator works",
                AWAY_WHEN_MOVED,
            ));
        } else {
            each(resident("weights", bytes, formula, Works::ALL));
        }
    }

    /// Parameters of a frozen model on one rank.
    fn frozen_params(&self) -> u64 {
        if self.zero_stage == 3 { self.model.params.div_ceil(self.ranks as u64) } else { self.model.params }
    }

    /// Whether a frozen role's weights live in host memory.
    pub fn offloaded(&self) -> bool {
        let mut models = self.workload.models.iter();
        models.any(|model| model.role == self.role && model.training.is_none() && model.offload)
    }
}

fn resident(name: &'static str, bytes: u64, formula: &'static str, during: Works) -> Item {
    Item { name, bytes, formula, place: Place::Device, transient: false, during }
}

fn host(name: &'static str, bytes: u64, formula: &'static str, during: Works) -> Item {
    Item { place: Place::Host, ..resident(name, bytes, formula, during) }
}

fn transient(name: &'static str, bytes: u64, formula: &'static str, during: Works) -> Item {
    Item { transient: true, ..resident(name, bytes, formula, during) }
}

/// The instant with the most bytes.
fn largest<'a>(instants: &[&'a [Item]]) -> &'a [Item] {
    let bytes = |items: &&&[Item]| items.iter().map(|item| item.bytes).sum::<u64>();
    instants.iter().max_by_key(bytes).copied().unwrap_or_default()
}

/// Bytes of one device and its host share in every phase, added up over the roles that live there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// What stays, of all roles together, by kind of work.
    device: [u64; 4],
    host: [u64; 4],
    /// What a role's own work takes, by role and kind.
    turns: [[u64; 4]; 5],
}

impl Totals {
    /// Adds one more role of the device.
    pub fn add(&mut self, job: &RoleJob) {
        job.items(&mut |item| {
            let sums = match (item.place, item.transient) {
                (_, true) => &mut self.turns[job.role as usize],
                (Place::Device, _) => &mut self.device,
                (Place::Host, _) => &mut self.host,
            };
            let there = sums.iter_mut().enumerate().filter(|(work, _)| item.during.0 >> work & 1 == 1);
            there.for_each(|(_, sum)| *sum += item.bytes);
        });
    }

    /// Bytes on the device at the height of a phase.
    pub fn device_bytes(&self, phase: Phase) -> u64 {
        let turn = |role: Role| self.turns[role as usize][phase.work as usize];
        self.device[phase.work as usize]
            + phase.role.map_or_else(|| ROLES.map(turn).into_iter().max().unwrap_or(0), turn)
    }

    /// Bytes of host memory that belong to this device in a phase.
    pub fn host_bytes(&self, phase: Phase) -> u64 {
        self.host[phase.work as usize]
    }
}

#[cfg(test)]
pub(crate) mod tests;
