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
//! In f32 the master is the parameter: 4 + 4 + 8 bytes, no master entry. When a mini-batch has several micro-batches,
//! bf16 gradients are accumulated in f32: 4 bytes instead of 2.
//!
//! Everything else is activations and buffers of a pass. Those entries are *transient*: roles on one device take turns,
//! so a phase needs all resident entries and the transient ones of one role, the largest.

mod workload;

use std::borrow::Cow;

use echelon_core::role::Role;
use serde::{Deserialize, Serialize};

pub use workload::{ComputeDtype, ModelSizes, Workload};

use crate::tier::role_name;

/// Logits made at once by a log-prob head, whatever vocabulary and sequence length.
const CHUNK_LOGITS: u64 = 1 << 24;

/// Bytes of one of the two buffers through which weights go to a generator elsewhere.
const SYNC_BUCKET_BYTES: u64 = 256 << 20;

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Generate,
    Score,
    TrainActor,
    TrainCritic,
    /// The generator gets the new weights.
    Sync,
}

impl Phase {
    pub const ALL: [Phase; 5] = [Phase::Generate, Phase::Score, Phase::TrainActor, Phase::TrainCritic, Phase::Sync];

    pub fn name(self) -> &'static str {
        match self {
            Phase::Generate => "generate",
            Phase::Score => "score",
            Phase::TrainActor => "train actor",
            Phase::TrainCritic => "train critic",
            Phase::Sync => "sync",
        }
    }
}

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
    #[serde(with = "role_name")]
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
    /// The device is a share of a host: the engine lays out a second copy of its matrices for decoding.
    pub packs_weights: bool,
}

/// Bytes of a model's training state on one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelStates {
    pub weights: u64,
    pub gradients: u64,
    /// 0 where the parameter is the master.
    pub master: u64,
    pub moments: u64,
}

impl ModelStates {
    /// Of `params` parameters over `ranks` ranks at a ZeRO stage; `accumulates` keeps gradients in f32.
    pub fn new(params: u64, ranks: usize, stage: u8, dtype: ComputeDtype, accumulates: bool) -> ModelStates {
        let part = |from_stage: u8| if stage >= from_stage { params.div_ceil(ranks as u64) } else { params };
        let gradient_bytes = if accumulates { dtype.wide_bytes() } else { dtype.bytes() };
        let master_bytes = if dtype == ComputeDtype::Bfloat16 { 4 } else { 0 };
        ModelStates {
            weights: dtype.bytes() * part(3),
            gradients: gradient_bytes * part(2),
            master: master_bytes * part(1),
            moments: 2 * dtype.wide_bytes() * part(1),
        }
    }

    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.master + self.moments
    }
}

/// A set of phases, as bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phases(u8);

impl Phases {
    pub const NONE: Phases = Phases(0);
    pub const ALL: Phases = Phases(31);

    pub const fn of(phase: Phase) -> Phases {
        Phases(1 << phase as u8)
    }

    pub const fn and(self, phase: Phase) -> Phases {
        Phases(self.0 | 1 << phase as u8)
    }

    const fn without(self, other: Phases) -> Phases {
        Phases(self.0 & !other.0)
    }

    pub fn contains(self, phase: Phase) -> bool {
        self.0 & (1 << phase as u8) != 0
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
    pub phases: Phases,
}

const AWAY_WHEN_MOVED: Phases = Phases::of(Phase::Generate).and(Phase::Sync);

impl RoleJob<'_> {
    /// The ledger of this role as lines to show.
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        self.items(&mut |item| {
            entries.push(Entry {
                role: self.role,
                name: item.name.into(),
                bytes: item.bytes,
                formula: item.formula.into(),
                place: item.place,
                transient: item.transient,
                phases: Phase::ALL.into_iter().filter(|phase| item.phases.contains(*phase)).collect(),
            })
        });
        entries
    }

    /// Every line of the ledger of this role on one device; empty lines are left out.
    pub fn items(&self, each: &mut impl FnMut(Item)) {
        let mut each = |item: Item| {
            if item.bytes > 0 {
                each(item)
            }
        };
        match self.role {
            Role::Actor | Role::Critic => {
                self.training_state(&mut each);
                self.scoring(&mut each);
                self.training(&mut each);
            }
            Role::Reference | Role::Reward => {
                self.frozen_weights(&mut each);
                self.scoring(&mut each);
            }
            Role::Generator => self.generation(&mut each),
        }
    }

    /// Rows of a mini-batch on one rank.
    pub fn train_rows(&self) -> usize {
        self.workload.mini_batch.div_ceil(self.ranks)
    }

    /// Rows of a step on one rank.
    pub fn score_rows(&self) -> usize {
        self.workload.responses().div_ceil(self.ranks)
    }

    /// Whether gradients of several micro-batches are added up.
    pub fn accumulates(&self) -> bool {
        let most_rows = self.workload.tokens_per_micro_batch / self.workload.max_tokens();
        self.train_rows() > most_rows.max(1)
    }

    /// Model states of a trained role, by the ZeRO paper.
    pub fn states(&self) -> ModelStates {
        ModelStates::new(self.model.params, self.ranks, self.zero_stage, self.workload.dtype, self.accumulates())
    }

    fn training_state(&self, each: &mut impl FnMut(Item)) {
        let states = self.states();
        let [weights, gradients, master, moments] = self.state_formulas();
        let moved = |away: Phases| if self.moves_to_host { Phases::ALL.without(away) } else { Phases::ALL };
        // A generator that computes on these weights needs them where they are; sync reads them in any case.
        let kept = self.role == Role::Actor && self.shares_weights;
        let away = if self.role == Role::Actor { Phases::of(Phase::Generate) } else { AWAY_WHEN_MOVED };
        let weights_on = if kept { Phases::ALL } else { moved(away) };
        let state_on = moved(AWAY_WHEN_MOVED);
        each(resident("weights", states.weights, weights, weights_on));
        each(resident("gradients", states.gradients, gradients, state_on));
        let adam = if self.adam_offload { Place::Host } else { Place::Device };
        let adam_on = if self.adam_offload { Phases::ALL } else { state_on };
        each(Item { place: adam, ..resident("master weights", states.master, master, adam_on) });
        each(Item { place: adam, ..resident("moments", states.moments, moments, adam_on) });
        if self.adam_offload {
            let staged = self.workload.dtype.wide_bytes() * self.model.params.div_ceil(self.ranks as u64);
            let formula = "accumulator bytes x parameters / ranks: gradients on their way to the host's step";
            each(host("gradient staging", staged, formula, Phases::ALL));
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
        let wide = self.accumulates() || self.workload.dtype != ComputeDtype::Bfloat16;
        let gradients = match wide {
            true => split(
                2,
                "accumulator bytes (f32: 4) x parameters",
                "accumulator bytes (f32: 4) x parameters / ranks (ZeRO 2 and 3)",
            ),
            false => split(2, "2 bytes x parameters", "2 bytes x parameters / ranks (ZeRO 2 and 3)"),
        };
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
            each(host("weights", bytes, formula, Phases::ALL));
            let formula = "compute bytes x parameters, on the device for its turn (offload)";
            each(transient("weights", bytes, formula, Phases::of(Phase::Score)));
        } else if self.moves_to_host {
            each(resident("weights", bytes, formula, Phases::ALL.without(AWAY_WHEN_MOVED)));
            each(host(
                "moved weights",
                bytes,
                "weights that leave the device while the generator works",
                AWAY_WHEN_MOVED,
            ));
        } else {
            each(resident("weights", bytes, formula, Phases::ALL));
        }
    }

    /// Parameters of a frozen model on one rank.
    fn frozen_params(&self) -> u64 {
        if self.zero_stage == 3 { self.model.params.div_ceil(self.ranks as u64) } else { self.model.params }
    }

    /// Whether a frozen role's weights live in host memory.
    pub fn offloaded(&self) -> bool {
        self.role == Role::Reference && self.workload.reference_offload
    }

    /// A forward pass without a graph. One layer's widest moment: input, residual, norm and the three gated widths, or
    /// input, norm and attention's query, repeated keys and values, output and its packed copy.
    fn scoring(&self, each: &mut impl FnMut(Item)) {
        let score = Phases::of(Phase::Score);
        let tokens = self.workload.tokens_at_once(self.score_rows()) as u64;
        self.gathered(each, score);
        let formula = "compute bytes x tokens of a micro-batch x the wider of 3 hidden + 3 intermediate and 2 hidden + 5 query widths";
        each(transient("activations", self.forward_bytes(tokens), formula, score));
        let logits = 2 * self.chunk_logits(tokens) * self.workload.dtype.wide_bytes();
        each(transient("logits", logits, "2 x f32 bytes x logits of a chunk (2^24 at most)", score));
    }

    fn training(&self, each: &mut impl FnMut(Item)) {
        let phase = Phases::of(if self.role == Role::Actor { Phase::TrainActor } else { Phase::TrainCritic });
        let dtype = self.workload.dtype;
        let tokens = self.workload.tokens_at_once(self.train_rows()) as u64;
        self.gathered(each, phase);
        self.activations(each, tokens, phase);
        let logits = 4 * self.chunk_logits(tokens) * dtype.wide_bytes();
        let formula = "4 x f32 bytes x logits of a chunk (2^24 at most): logits, probabilities, slope, product";
        each(transient("logits", logits, formula, phase));
        let several = self.ranks > 1;
        if (dtype == ComputeDtype::Bfloat16 && self.accumulates()) || (several && self.zero_stage >= 2) {
            let formula = "compute bytes x largest layer unit: its gradient before it is accumulated or reduced";
            each(transient("unit gradient", dtype.bytes() * self.model.largest_unit, formula, phase));
        }
        if several {
            let formula = "accumulator bytes x largest layer unit: what a reduction receives";
            each(transient("communication", dtype.wide_bytes() * self.model.largest_unit, formula, phase));
        }
    }

    /// Stage 3 holds two gathered units at most: the one at work and the next in flight.
    fn gathered(&self, each: &mut impl FnMut(Item), phases: Phases) {
        if self.zero_stage == 3 && self.ranks > 1 && !self.offloaded() {
            let bytes = self.workload.dtype.bytes() * self.model.two_largest_units;
            each(transient("gathered units", bytes, "compute bytes x the two largest layer units (ZeRO 3)", phases));
        }
    }

    /// What backward needs. Per token a layer keeps, in the compute dtype: input, both norms and the residual between
    /// (4 hidden), rotated queries, repeated keys and values, attention's output and its packed copy (5 query widths),
    /// gate, up and their product (3 intermediate), and an f32 log-sum-exp per head. With checkpointing only the
    /// input of every layer stays, and one layer at a time is run again. The gradients in flight are those of one
    /// layer's gated widths and two hidden states.
    fn activations(&self, each: &mut impl FnMut(Item), tokens: u64, phase: Phases) {
        let (model, dtype) = (self.model, self.workload.dtype);
        let layer = tokens * self.layer_bytes();
        if self.workload.activation_checkpointing {
            let inputs = dtype.bytes() * tokens * model.hidden * model.num_layers;
            let formula = "compute bytes x tokens of a micro-batch x hidden x layers: the input of every layer";
            each(transient("activations", inputs, formula, phase));
            each(transient("recomputed layer", layer, "what one layer keeps for its backward pass", phase));
        } else {
            let formula = "tokens of a micro-batch x layers x (compute bytes x (4 hidden + 5 query widths + 3 intermediate) + 4 bytes x heads)";
            each(transient("activations", layer * model.num_layers, formula, phase));
        }
        let gradients = dtype.bytes() * tokens * (3 * model.intermediate + 2 * model.hidden);
        let formula = "compute bytes x tokens of a micro-batch x (3 intermediate + 2 hidden)";
        each(transient("activation gradients", gradients, formula, phase));
    }

    /// Bytes that one layer keeps per token for its backward pass.
    fn layer_bytes(&self) -> u64 {
        let model = self.model;
        let kept = 4 * model.hidden + 5 * model.query_width + 3 * model.intermediate;
        self.workload.dtype.bytes() * kept + 4 * model.num_heads
    }

    fn forward_bytes(&self, tokens: u64) -> u64 {
        let model = self.model;
        let mlp = 3 * model.hidden + 3 * model.intermediate;
        let attention = 2 * model.hidden + 5 * model.query_width;
        self.workload.dtype.bytes() * tokens * mlp.max(attention)
    }

    /// Logits of one chunk; none for a head that gives one number.
    fn chunk_logits(&self, tokens: u64) -> u64 {
        match self.role {
            Role::Actor | Role::Reference => (tokens * self.model.vocab).min(CHUNK_LOGITS.max(self.model.vocab)),
            _ => 0,
        }
    }

    /// Bytes that one more slot of the generator takes.
    pub fn slot_bytes(&self) -> u64 {
        let per_token = self.model.kv_bytes_per_token(self.workload.dtype, self.tensor_parallel);
        let cached = per_token * self.workload.max_tokens() as u64;
        (cached + 3 * self.workload.dtype.wide_bytes() * self.model.vocab).max(1)
    }

    fn generation(&self, each: &mut impl FnMut(Item)) {
        let (model, dtype, size) = (self.model, self.workload.dtype, self.tensor_parallel);
        let generate = Phases::of(Phase::Generate);
        if !self.shares_weights {
            let weights = dtype.bytes() * model.tensor_parallel_params(size);
            let formula = "compute bytes x (split parameters / tensor-parallel size + replicated ones)";
            each(resident("weights", weights, formula, generate.and(Phase::Sync)));
            let bucket = 2 * SYNC_BUCKET_BYTES.min(weights);
            each(transient(
                "sync buckets",
                bucket,
                "2 x the smaller of 256 MiB and the weights",
                Phases::of(Phase::Sync),
            ));
        }
        if self.packs_weights {
            let matrices = (model.layer_params + model.vocab * model.hidden) / size as u64;
            let formula = "compute bytes x matrices of layers and head: their layout for decoding";
            each(transient("packed weights", dtype.bytes() * matrices, formula, generate));
        }
        let per_token = model.kv_bytes_per_token(dtype, size);
        let slots = self.slots;
        let cached = slots as u64 * self.workload.max_tokens() as u64 * per_token;
        let formula = "slots x longest sequence x 2 x layers x key-value width x compute bytes / tensor-parallel size";
        each(transient("KV cache", cached, formula, generate));
        let prompts = self.workload.prompts.div_ceil(self.ranks / size).min(self.workload.max_sequences);
        let prefill = self.workload.max_batched_tokens.min(prompts * self.workload.max_prompt_tokens);
        let prefill = prefill.max(self.workload.max_prompt_tokens) as u64;
        let formula = "compute bytes x tokens of a prefill pass x the wider of 3 hidden + 3 intermediate and 2 hidden + 5 query widths / tensor-parallel size";
        each(transient("prefill activations", self.forward_bytes(prefill) / size as u64, formula, generate));
        let logits = 3 * dtype.wide_bytes() * slots as u64 * model.vocab;
        each(transient(
            "sampling",
            logits,
            "3 x f32 bytes x slots x vocabulary: logits, probabilities, their sums",
            generate,
        ));
    }
}

fn resident(name: &'static str, bytes: u64, formula: &'static str, phases: Phases) -> Item {
    Item { name, bytes, formula, place: Place::Device, transient: false, phases }
}

fn host(name: &'static str, bytes: u64, formula: &'static str, phases: Phases) -> Item {
    Item { place: Place::Host, ..resident(name, bytes, formula, phases) }
}

fn transient(name: &'static str, bytes: u64, formula: &'static str, phases: Phases) -> Item {
    Item { transient: true, ..resident(name, bytes, formula, phases) }
}

/// Bytes of one device and its host share in every phase, added up over the roles that live there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    device: [Sum; 5],
    host: [Sum; 5],
}

/// Resident bytes of all roles, and the largest transient bytes of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Sum {
    resident: u64,
    transient: u64,
}

impl Totals {
    /// Adds one more role of the device.
    pub fn add(&mut self, job: &RoleJob) {
        let mut turns = [0u64; 5];
        job.items(&mut |item| {
            let sums = if item.place == Place::Device { &mut self.device } else { &mut self.host };
            for phase in Phase::ALL.into_iter().filter(|phase| item.phases.contains(*phase)) {
                match item.transient {
                    true => turns[phase as usize] += item.bytes,
                    false => sums[phase as usize].resident += item.bytes,
                }
            }
        });
        for (sum, turn) in self.device.iter_mut().zip(turns) {
            sum.transient = sum.transient.max(turn);
        }
    }

    /// Bytes on the device at the height of a phase.
    pub fn device_bytes(&self, phase: Phase) -> u64 {
        let sum = self.device[phase as usize];
        sum.resident + sum.transient
    }

    /// Bytes of host memory that belong to this device in a phase.
    pub fn host_bytes(&self, phase: Phase) -> u64 {
        self.host[phase as usize].resident
    }
}

#[cfg(test)]
pub(crate) mod tests;
