//! What a rank's roles hold and take, as its device's allocator counts it: to be compared with the memory ledger.
//!
//! Every verb that works on a model is metered: bytes live before it, at its height, and after it, with what went through
//! the model at once, which is all that a pass's memory depends on. Counters belong to a device: on a CPU to the process.

use serde::{Deserialize, Serialize};
use tch::Device;

use crate::data::{Rows, micro_batches};
use crate::plain_messages;
use crate::role::Role;
use crate::shim;

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
    pub fn begin(&mut self, role: Role, phase: Phase) -> Metering {
        self.begin_with(role, phase, 0)
    }

    /// [`Meter::begin`], of work for which `brought` bytes are on the device already.
    pub fn begin_with(&mut self, role: Role, phase: Phase, brought: u64) -> Metering {
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
