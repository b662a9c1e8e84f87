//! What a rank's roles hold and take, as its device's allocator counts it: to be compared with the memory ledger.
//!
//! Every verb that works on a model is metered: bytes live before it, at its height, and after it, with what went through
//! the model at once, which is all that a pass's memory depends on. Counters belong to a device: on a CPU to the process.

use serde::de::Error;
use serde::de::value::StrDeserializer;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tch::Device;

use crate::data::{Rows, micro_batches};
use crate::plain_messages;
use crate::role::Role;
use crate::shim;

/// What a verb does to a model: what its memory and its seconds depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Work {
    /// The engine decodes.
    Generate,
    /// A forward pass.
    Score,
    /// Forward and backward passes, and an optimizer step.
    Learn,
    /// The generator gets the new weights.
    Publish,
}

impl Work {
    /// None of a verb that works on no model.
    pub fn of(verb: &str) -> Option<Work> {
        match verb {
            "generate" => Some(Work::Generate),
            "logprobs" | "values" | "scores" => Some(Work::Score),
            "learn" => Some(Work::Learn),
            "publish" => Some(Work::Publish),
            _ => None,
        }
    }
}

/// A part of a step: a kind of work, and whose it is where each role has a part of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Phase {
    pub work: Work,
    /// Who learns; None where roles take turns.
    pub role: Option<Role>,
}

impl Phase {
    pub const GENERATE: Phase = Phase { work: Work::Generate, role: None };
    pub const SCORE: Phase = Phase { work: Work::Score, role: None };
    pub const SYNC: Phase = Phase { work: Work::Publish, role: None };

    pub fn learn(role: Role) -> Phase {
        Phase { work: Work::Learn, role: Some(role) }
    }

    /// The part of a step to which a role's verb belongs; None of a verb that works on no model.
    pub fn of(role: Role, verb: &str) -> Option<Phase> {
        let work = Work::of(verb)?;
        Some(Phase { work, role: (work == Work::Learn).then_some(role) })
    }

    /// Without the role, such as "train".
    pub fn short_name(self) -> &'static str {
        match self.work {
            Work::Generate => "generate",
            Work::Score => "score",
            Work::Learn => "train",
            Work::Publish => "sync",
        }
    }

    /// As a person reads it, such as "train actor".
    pub fn name(self) -> String {
        self.role.map_or_else(|| self.short_name().into(), |role| format!("{} {role}", self.short_name()))
    }
}

/// As its name, such as "train_actor".
impl Serialize for Phase {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name().replace(' ', "_"))
    }
}

impl<'de> Deserialize<'de> for Phase {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Phase, D::Error> {
        let name = String::deserialize(deserializer)?;
        let learner = |role: &str| Role::deserialize(StrDeserializer::<D::Error>::new(role));
        match (name.as_str(), name.strip_prefix("train_")) {
            (_, Some(role)) => Ok(Phase::learn(learner(role)?)),
            ("generate", _) => Ok(Phase::GENERATE),
            ("score", _) => Ok(Phase::SCORE),
            ("sync", _) => Ok(Phase::SYNC),
            _ => Err(D::Error::custom(format!("`{name}` is no phase"))),
        }
    }
}

/// Logits in one chunk of a log-prob head: 2^24 numbers, 64 MB in f32, whatever the vocabulary and the sequence length.
pub const CHUNK_LOGITS: u32 = 1 << 24;

/// The largest micro-batch of a verb.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassLoad {
    pub tokens: u64,
    /// Tokens of it whose prediction a log-prob or value head makes.
    pub predicted: u64,
    /// Micro-batches of the verb.
    pub passes: u64,
}

impl PassLoad {
    /// Of rows that go through a model in micro-batches of at most `budget` tokens, which never part a `unit` of rows; a head
    /// that reads `per_row` predicts once for each.
    pub fn of(rows: &Rows, unit: usize, budget: i64, per_row: bool) -> PassLoad {
        let own = Vec::<u8>::try_from(rows.own.to_device(Device::Cpu).to_kind(tch::Kind::Uint8).flatten(0, -1))
            .expect("a mask of bools");
        let width = rows.size()[1] as usize;
        let predicted = |&row: &i64| {
            let (first, length) = (row as usize * width, rows.lengths[row as usize] as usize);
            let after_the_first = own.get(first + 1..first + length).unwrap_or_default();
            if per_row { 1 } else { after_the_first.iter().map(|&wanted| u64::from(wanted)).sum() }
        };
        let batches = micro_batches(&rows.lengths, unit, budget);
        let mut load = PassLoad { passes: batches.len() as u64, ..PassLoad::default() };
        for batch in &batches {
            let tokens: i64 = batch.iter().map(|&row| rows.lengths[row as usize]).sum();
            load.tokens = load.tokens.max(tokens as u64);
            load.predicted = load.predicted.max(batch.iter().map(predicted).sum());
        }
        load
    }
}

/// What the generator's engine did at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecodeLoad {
    /// Sequences decoded together.
    pub slots: u64,
    /// Tokens for which each slot has room.
    pub slot_tokens: u64,
    /// The same while the first prompts are prefilled.
    pub prompt_slot_tokens: u64,
    /// Tokens and prompts of the largest prefill pass.
    pub prefill_tokens: u64,
    pub prefill_prompts: u64,
    /// Prompts are still prefilled when sequences are decoded: there are more sequences than slots.
    pub refills: bool,
    /// Enough tokens follow that a second layout of the weights pays.
    pub packs: bool,
}

/// What a metered verb worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Load {
    Pass(PassLoad),
    Decode(DecodeLoad),
}

/// Bytes of a model that stay between verbs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateBytes {
    pub weights: u64,
    pub gradients: u64,
    /// 0 where the parameter is the master.
    pub master: u64,
    pub moments: u64,
}

impl StateBytes {
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.master + self.moments
    }
}

/// One role in one phase; of several verbs the one that took most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryUse {
    pub role: Role,
    pub phase: Phase,
    /// What the role holds between verbs.
    pub resident: StateBytes,
    /// Bytes live on the device before the verb, whoever's they are.
    pub before: u64,
    /// Most bytes live during it.
    pub peak: u64,
    /// Bytes live when it had its answer.
    pub after: u64,
    pub load: Load,
}

impl MemoryUse {
    /// What the verb took beyond what was there.
    pub fn transient(&self) -> u64 {
        self.peak.saturating_sub(self.before)
    }
}

/// What a rank was metered at since it was last asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryReport {
    pub uses: Vec<MemoryUse>,
    /// Most bytes live at any time.
    pub peak: u64,
    /// Bytes live now, and those of mapped weights.
    pub live: u64,
    pub mapped: u64,
    /// Bytes that the device's allocator holds beyond that: rounding, and blocks kept for later.
    pub kept: u64,
    /// Page-locked host memory.
    pub pinned: u64,
    /// Bytes of a GPU that are taken beside its allocator: context, NCCL, other processes.
    pub runtime: u64,
}

plain_messages! {
    MemoryReport = "memory_report";
}

/// Meters the verbs of one device, on its thread.
#[derive(Debug)]
pub struct Meter {
    device: Device,
    peak: u64,
    uses: Vec<MemoryUse>,
}

/// A verb under way.
#[derive(Debug)]
#[must_use = "nothing is recorded before `Meter::end`"]
pub struct Metering {
    role: Role,
    phase: Phase,
    before: u64,
}

impl Meter {
    pub fn new(device: Device) -> Meter {
        Meter { device, peak: 0, uses: Vec::new() }
    }

    /// Call when the role is loaded, before its work.
    ///
    /// # Panics
    /// The verb works on no model ([`Work::of`]).
    pub fn begin(&mut self, role: Role, verb: &str) -> Metering {
        self.begin_with(role, verb, 0)
    }

    /// [`Meter::begin`], of work for which `brought` bytes are on the device already.
    pub fn begin_with(&mut self, role: Role, verb: &str, brought: u64) -> Metering {
        let phase = Phase::of(role, verb).unwrap_or_else(|| panic!("`{verb}` works on no model"));
        self.note_peak();
        Metering { role, phase, before: (shim::live_bytes(self.device) as u64).saturating_sub(brought) }
    }

    /// Call when the work is done.
    pub fn end(&mut self, metering: Metering, resident: StateBytes, load: Load) {
        let Metering { role, phase, before } = metering;
        let peak = shim::peak_bytes(self.device) as u64;
        let after = shim::live_bytes(self.device) as u64;
        let now = MemoryUse { role, phase, resident, before, peak, after, load };
        match self.uses.iter_mut().find(|known| (known.role, known.phase) == (role, phase)) {
            Some(known) if known.transient() >= now.transient() => {}
            Some(known) => *known = now,
            None => self.uses.push(now),
        }
    }

    /// What was metered since the last call.
    pub fn report(&mut self) -> MemoryReport {
        self.note_peak();
        MemoryReport {
            uses: std::mem::take(&mut self.uses),
            peak: std::mem::take(&mut self.peak),
            live: shim::live_bytes(self.device) as u64,
            mapped: shim::mapped_bytes() as u64,
            kept: shim::kept_bytes(self.device) as u64,
            pinned: shim::pinned_bytes() as u64,
            runtime: self.runtime_bytes(),
        }
    }

    fn runtime_bytes(&self) -> u64 {
        let Some((free, total)) = shim::free_and_total_bytes(self.device) else { return 0 };
        (total - free).saturating_sub(shim::live_bytes(self.device) + shim::kept_bytes(self.device)) as u64
    }

    fn note_peak(&mut self) {
        self.peak = self.peak.max(shim::peak_bytes(self.device) as u64);
        shim::reset_peak_bytes(self.device);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_is_the_largest_micro_batch() {
        let row =
            |length: i64, wanted: i64| ((0..length).collect(), (0..length).map(|t| t >= length - wanted).collect());
        let rows = Rows::of_tokens(&[row(6, 2), row(3, 3), row(8, 1), row(2, 1)]);
        let load = PassLoad::of(&rows, 1, 9, false);
        // Rows 0 and 1, then 2, then 3; a first token is never predicted.
        assert_eq!(load, PassLoad { tokens: 9, predicted: 4, passes: 3 });
        assert_eq!(PassLoad::of(&rows, 1, 100, false), PassLoad { tokens: 19, predicted: 6, passes: 1 });
    }
}
