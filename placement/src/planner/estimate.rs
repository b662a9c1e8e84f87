//! What a group of roles costs on a slice of the cluster: whether it fits, and its seconds per phase.
//!
//! Floating-point operations are the usual counts: a forward pass takes 2 per parameter and token in matrices and
//! 2 L² times the query width per layer and sequence in causal attention; a backward pass takes twice a forward pass,
//! checkpointing one forward pass more. Bytes per rank and optimizer step are the ZeRO paper's (section 7): 2Ψ(N−1)/N at
//! stages 0 to 2 and 3Ψ(N−1)/N at stage 3 with one micro-batch; from stage 2 on every micro-batch reduces, and at stage 3
//! every micro-batch gathers twice.

use echelon_core::compute::ComputeDtype;
use echelon_core::memory::{Phase, Work};
use echelon_core::role::Role;
use echelon_core::workload::Workload;

use super::Reject;
use crate::cluster::Link;
use crate::ledger::{ModelSizes, Place, RoleJob, Totals};
use crate::rates::Rates;
use crate::tier::{ROLES, RoleSet};

/// Bytes that Adam's step reads and writes per parameter: gradient, weight, two moments, in f32.
const ADAM_BYTES: f64 = 28.0;

/// The question: a workload, and how fast things are.
#[derive(Debug)]
pub(super) struct Problem<'a> {
    pub workload: &'a Workload,
    pub phases: Vec<Phase>,
    pub rates: &'a Rates,
    /// By role; None where a role has no model.
    pub models: [Option<ModelSizes>; 5],
    /// Between a trainer and a generator on other devices.
    pub sync_link: Link,
    /// ZeRO stages to choose from, lowest first.
    pub stages: Vec<u8>,
    pub offloads: Vec<bool>,
}

/// Devices of one group, as far as cost depends on them: the slowest and smallest of them decide.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Slice {
    pub devices: usize,
    /// Largest number that divides the group's devices on every node: engines stay within a node.
    pub per_node: usize,
    /// Bytes that tensors may take on a device, and in its share of host memory.
    pub usable_bytes: u64,
    pub usable_host_bytes: u64,
    pub bf16_flops_per_s: f64,
    pub f32_flops_per_s: f64,
    pub memory_bytes_per_s: f64,
    pub host_link_bytes_per_s: f64,
    pub shares_host_memory: bool,
    /// Among all of the group's devices, and within its nodes.
    pub link: Link,
    pub within: Link,
}

/// The choices within one group. Roles that are not in the group keep the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GroupConfig {
    /// By role.
    pub stages: [u8; 5],
    pub offloads: [bool; 5],
    pub tensor_parallel: usize,
}

/// Seconds per step of one group, phase by phase.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Cost {
    pub generate: f64,
    pub score: f64,
    /// By role.
    pub learn: [f64; 5],
    pub sync: f64,
    /// Training state to host memory and back.
    pub switch: f64,
    /// How the roles are held while that is so.
    pub held: Held,
}

/// What follows from the room on the devices.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Held {
    /// Training state leaves the devices while the generator works.
    pub moves_to_host: bool,
    /// Sequences that each engine decodes at once.
    pub slots: usize,
}

impl Cost {
    /// What no other group's work hides.
    pub fn fixed(&self) -> f64 {
        self.generate + self.sync + self.switch
    }

    pub fn train(&self) -> f64 {
        self.learn.iter().sum()
    }
}

impl Problem<'_> {
    /// Seconds of `roles` on `slice`, or why they cannot be there. Where a generator shares the devices, the faster of
    /// two ways counts: training state stays, or moves to host memory and back and leaves room for more sequences.
    pub fn cost(&self, roles: RoleSet, slice: &Slice, config: &GroupConfig) -> Result<Cost, Reject> {
        self.check_ranks(roles, slice, config)?;
        let stays = self.cost_with(roles, slice, config, false);
        if !can_move(roles, slice) {
            return stays;
        }
        let wanted = self.slots_wanted(slice, config);
        if stays.as_ref().is_ok_and(|cost| cost.held.slots == wanted) {
            return stays;
        }
        match (stays, self.cost_with(roles, slice, config, true)) {
            (Ok(stays), Ok(moves)) => Ok(if moves.fixed() < stays.fixed() { moves } else { stays }),
            (stays, moves) => stays.or(moves),
        }
    }

    fn cost_with(&self, roles: RoleSet, slice: &Slice, config: &GroupConfig, moves: bool) -> Result<Cost, Reject> {
        let (held, totals) = self.held(roles, slice, config, moves)?;
        let mut cost = Cost { held, ..Cost::default() };
        for role in roles.iter() {
            self.add_role(&mut cost, role, roles, slice, config);
        }
        if moves {
            let bytes = totals.host_bytes(Phase::GENERATE).saturating_sub(totals.host_bytes(Phase::SCORE));
            cost.switch = 2.0 * bytes as f64 / self.host_link(slice);
        }
        Ok(cost)
    }

    /// With as many slots as there is room for, one at least.
    fn held(&self, roles: RoleSet, slice: &Slice, config: &GroupConfig, moves: bool) -> Result<(Held, Totals), Reject> {
        let one = Held { moves_to_host: moves, slots: 1 };
        let totals = self.totals(roles, slice, config, one);
        self.fits(&totals, slice)?;
        if !roles.contains(Role::Generator) {
            return Ok((one, totals));
        }
        let shared = if slice.shares_host_memory { totals.host_bytes(Phase::GENERATE) } else { 0 };
        let room = slice.usable_bytes - totals.device_bytes(Phase::GENERATE) - shared;
        let more = room / self.job(Role::Generator, roles, slice, config, one).slot_bytes();
        let held = Held { slots: self.slots_wanted(slice, config).min(1 + more as usize), ..one };
        Ok((held, totals))
    }

    fn slots_wanted(&self, slice: &Slice, config: &GroupConfig) -> usize {
        let model = self.models[Role::Generator as usize].expect("a generator computes the published model");
        let per_token = model.kv_bytes_per_token(self.workload.dtype, config.tensor_parallel);
        self.workload.slots_wanted(slice.devices / config.tensor_parallel, per_token).unwrap_or(0)
    }

    /// The ledger's jobs of `roles` on one device of `slice`.
    pub fn job(&self, role: Role, roles: RoleSet, slice: &Slice, config: &GroupConfig, held: Held) -> RoleJob<'_> {
        let stage = if role == Role::Generator { 0 } else { config.stages[role as usize] };
        let whole = |published: Role| roles.contains(published) && config.stages[published as usize] < 3;
        let published_whole = self.workload.published().is_some_and(whole);
        RoleJob {
            role,
            model: self.models[role as usize].as_ref().expect("a placed role has a model"),
            workload: self.workload,
            ranks: slice.devices,
            zero_stage: stage,
            adam_offload: config.offloads[role as usize],
            tensor_parallel: config.tensor_parallel,
            shares_weights: roles.contains(Role::Generator) && published_whole && config.tensor_parallel == 1,
            slots: held.slots,
            moves_to_host: held.moves_to_host && role != Role::Generator,
            on_cpu: slice.shares_host_memory,
        }
    }

    pub fn totals(&self, roles: RoleSet, slice: &Slice, config: &GroupConfig, held: Held) -> Totals {
        let mut totals = Totals::default();
        for role in roles.iter() {
            totals.add(&self.job(role, roles, slice, config, held));
        }
        totals
    }

    fn check_ranks(&self, roles: RoleSet, slice: &Slice, config: &GroupConfig) -> Result<(), Reject> {
        let passes = self.workload.passes.iter().filter(|pass| roles.contains(pass.role));
        let units = passes.map(|pass| self.workload.units(pass.rows)).min().unwrap_or(0);
        if slice.devices > units {
            let pairs = self.workload.rows_per_unit > 1;
            return Err(Reject::Ranks { devices: slice.devices, units, pairs });
        }
        if roles.contains(Role::Generator) {
            self.check_engines(slice, config)?;
        }
        let lowest = self.stages.first().copied().unwrap_or(0);
        let sharded = |role: Role| config.stages[role as usize] > lowest;
        let offloads = config.offloads.contains(&true) && self.offloads.contains(&false);
        if (slice.devices == 1 && roles.iter().any(sharded)) || (slice.shares_host_memory && offloads) {
            return Err(Reject::Redundant);
        }
        Ok(())
    }

    /// Engines fit the nodes and the model, and each has a prompt and room for a sequence.
    fn check_engines(&self, slice: &Slice, config: &GroupConfig) -> Result<(), Reject> {
        let size = config.tensor_parallel;
        let model = self.models[Role::Generator as usize].expect("a generator computes the published model");
        if !slice.per_node.is_multiple_of(size) || !model.splits_into(size) {
            let divided = [model.num_heads, model.num_kv_heads, model.intermediate, slice.per_node as u64];
            return Err(Reject::TensorParallel { size, divided });
        }
        let (devices, units) = (slice.devices / size, self.workload.sampling.as_ref().map_or(0, |how| how.prompts));
        if devices > units {
            return Err(Reject::Ranks { devices, units, pairs: false });
        }
        if self.slots_wanted(slice, config) == 0 {
            let per_token = model.kv_bytes_per_token(self.workload.dtype, size);
            return Err(Reject::KvCache { needed: per_token * self.workload.max_tokens() as u64 });
        }
        Ok(())
    }

    /// Whether every phase fits; the worst one if not. Where device memory is host memory, both count together.
    fn fits(&self, totals: &Totals, slice: &Slice) -> Result<(), Reject> {
        let mut worst: Option<(u64, Reject)> = None;
        for &phase in &self.phases {
            let (device, host) = (totals.device_bytes(phase), totals.host_bytes(phase));
            let on_device = if slice.shares_host_memory { device + host } else { device };
            let on_host = if slice.shares_host_memory { 0 } else { host };
            for (place, needed, usable) in
                [(Place::Device, on_device, slice.usable_bytes), (Place::Host, on_host, slice.usable_host_bytes)]
            {
                let lacking = needed.saturating_sub(usable);
                if lacking > worst.as_ref().map_or(0, |(most, _)| *most) {
                    worst = Some((lacking, Reject::Memory { phase, place, needed, usable }));
                }
            }
        }
        worst.map_or(Ok(()), |(_, reject)| Err(reject))
    }

    fn add_role(&self, cost: &mut Cost, role: Role, roles: RoleSet, slice: &Slice, config: &GroupConfig) {
        let job = self.job(role, roles, slice, config, cost.held);
        if role == Role::Generator {
            cost.generate += self.generate_s(&job, slice);
            cost.sync += self.sync_s(&job, roles, slice, config);
            return;
        }
        for pass in self.workload.passes.iter().filter(|pass| pass.role == role) {
            let units = self.workload.units(pass.rows).div_ceil(slice.devices);
            match Work::of(pass.verb) {
                Some(Work::Learn) => cost.learn[role as usize] += self.train_s(&job, units, slice) * pass.times as f64,
                _ => cost.score += self.score_s(&job, units, slice) * pass.times as f64,
            }
        }
    }

    /// Multiplications of one rank's forward pass over so many expected units: layers, and the head on response tokens.
    fn forward_flops(&self, job: &RoleJob, units: f64) -> (f64, f64) {
        let (model, workload) = (job.model, self.workload);
        let tokens = units * workload.mean_unit_tokens();
        let attention = (2 * model.num_layers * model.query_width) as f64 * tokens * workload.mean_unit_tokens();
        let layers = 2.0 * model.layer_params as f64 * tokens + attention;
        let predicted = workload.mean_response_tokens * workload.rows_per_unit as f64;
        let logits = (2 * model.vocab * model.hidden) as f64 * units * predicted;
        (layers, if job.has_logits() { logits } else { 0.0 })
    }

    fn score_s(&self, job: &RoleJob, units: usize, slice: &Slice) -> f64 {
        let passes = self.workload.micro_batches(units) as f64;
        let (layers, head) = self.forward_flops(job, units as f64);
        let computing = (layers + head) / (self.flops(slice) * self.rates.score_fraction);
        let gathers = if job.zero_stage == 3 && !job.offloaded() { passes } else { 0.0 };
        let sending = gathers * self.collective_s(job, self.workload.dtype.bytes(), slice);
        let weights = if job.offloaded() { self.weight_bytes(job.model) } else { 0.0 };
        self.overlapped(computing, sending) + weights / self.host_link(slice) + passes * self.rates.micro_batch_s
    }

    /// One optimizer step.
    fn train_s(&self, job: &RoleJob, units: usize, slice: &Slice) -> f64 {
        let passes = self.workload.micro_batches(units) as f64;
        let (layers, head) = self.forward_flops(job, units as f64);
        let layer_passes = if self.workload.activation_checkpointing { 4.0 } else { 3.0 };
        let flops = layer_passes * layers + 4.0 * head;
        let computing = flops / (self.flops(slice) * self.rates.train_fraction);
        let (gathers, reductions) = match job.zero_stage {
            3 => (2.0 * passes, passes),
            2 => (1.0, passes),
            _ => (1.0, 1.0),
        };
        let gather_s = self.collective_s(job, self.workload.dtype.bytes(), slice);
        let gradient_bytes = self.workload.dtype.wide_bytes(); // reduced as they are accumulated
        let sending = gathers * gather_s + reductions * self.collective_s(job, gradient_bytes, slice);
        self.overlapped(computing, sending) + passes * self.rates.micro_batch_s + self.optimizer_s(job, slice)
    }

    /// Adam on the rank's part: the whole model at stage 0.
    fn optimizer_s(&self, job: &RoleJob, slice: &Slice) -> f64 {
        let share = if job.zero_stage == 0 { 1.0 } else { job.ranks as f64 };
        let params = job.model.params as f64 / share;
        let (wide, compute) = (self.workload.dtype.wide_bytes() as f64, self.workload.dtype.bytes() as f64);
        let bytes = params * ADAM_BYTES * wide / 4.0;
        if !job.adam_offload {
            return bytes / (slice.memory_bytes_per_s * self.rates.optimizer_fraction);
        }
        let own_share = if slice.shares_host_memory { slice.memory_bytes_per_s } else { f64::INFINITY };
        bytes / self.rates.host_optimizer_bytes_per_s.min(own_share) + params * (wide + compute) / self.host_link(slice)
    }

    /// Prompts are prefilled once for all their samples; then every slot makes a token per decoding step, and a step
    /// reads the weights and the cache once.
    fn generate_s(&self, job: &RoleJob, slice: &Slice) -> f64 {
        let (model, workload, rates, size) = (job.model, self.workload, self.rates, job.tensor_parallel);
        let Some(sampling) = &workload.sampling else { return 0.0 };
        let engines = slice.devices / size;
        let (slots, sequences) = (job.slots, sampling.sequences(engines));
        let prompts = sampling.prompts.div_ceil(engines) as f64;
        let matrices = (model.layer_params + model.vocab * model.hidden) as f64 / size as f64;
        let flops = self.flops(slice);
        let prefill_tokens = prompts * workload.mean_prompt_tokens;
        let attention =
            (2 * model.num_layers * model.query_width) as f64 * prefill_tokens * workload.mean_prompt_tokens;
        let layers = 2.0 * model.layer_params as f64 * prefill_tokens + attention;
        let prefill = layers / size as f64 / (flops * rates.prefill_fraction);

        let bandwidth = slice.memory_bytes_per_s * rates.decode_bytes_fraction;
        let context = workload.mean_prompt_tokens + workload.mean_response_tokens / 2.0;
        let cached = slots as f64 * context * model.kv_bytes_per_token(workload.dtype, size) as f64;
        let reading = (matrices * workload.dtype.bytes() as f64 + cached) / bandwidth;
        let multiplying = 2.0 * matrices * slots as f64 / (flops * rates.decode_flops_fraction);
        let step = reading.max(multiplying) + self.tensor_parallel_s(job, slots, slice) + rates.decode_step_s;
        // Slots are refilled until nothing waits; then the longest response decides when the last one ends.
        let tail = (workload.max_response_tokens as f64 - workload.mean_response_tokens).max(0.0);
        let steps = workload.mean_response_tokens * (sequences as f64 / slots as f64) + tail;
        prefill + steps * step
    }

    /// Two all-reduces of the hidden states per layer.
    fn tensor_parallel_s(&self, job: &RoleJob, slots: usize, slice: &Slice) -> f64 {
        let size = job.tensor_parallel as f64;
        if job.tensor_parallel == 1 {
            return 0.0;
        }
        let bytes = (slots as u64 * job.model.hidden * self.workload.dtype.bytes()) as f64;
        let one = slice.within.latency_s
            + 2.0 * bytes * (size - 1.0) / size / (slice.within.bytes_per_s * self.rates.collective_fraction);
        2.0 * job.model.num_layers as f64 * one
    }

    /// Nothing where the generator computes on the published weights themselves; a gather on the same devices; else a
    /// pipelined broadcast to the generator's.
    fn sync_s(&self, job: &RoleJob, roles: RoleSet, slice: &Slice, config: &GroupConfig) -> f64 {
        if job.shares_weights {
            return 0.0;
        }
        let weights = self.weight_bytes(job.model);
        let here = self.workload.published().filter(|published| roles.contains(*published));
        let Some(published) = here else {
            let rate = self.sync_link.bytes_per_s * self.rates.collective_fraction;
            return weights / rate + job.model.num_units as f64 * self.sync_link.latency_s;
        };
        let sharded = config.stages[published as usize] == 3;
        let gathering = if sharded { self.collective_s(job, self.workload.dtype.bytes(), slice) } else { 0.0 };
        gathering + 2.0 * weights / job.tensor_parallel as f64 / slice.memory_bytes_per_s
    }

    /// One collective over every unit of the model: Ψ(N−1)/N numbers of `bytes` bytes leave each rank.
    fn collective_s(&self, job: &RoleJob, bytes: u64, slice: &Slice) -> f64 {
        let ranks = slice.devices as f64;
        let sent = (bytes * job.model.params) as f64 * (ranks - 1.0) / ranks;
        let latency = job.model.num_units as f64 * slice.link.latency_s * ranks.log2().ceil();
        sent / (slice.link.bytes_per_s * self.rates.collective_fraction) + latency
    }

    fn overlapped(&self, computing: f64, sending: f64) -> f64 {
        computing + sending - self.rates.overlap * computing.min(sending)
    }

    fn weight_bytes(&self, model: &ModelSizes) -> f64 {
        (model.params * self.workload.dtype.bytes()) as f64
    }

    fn host_link(&self, slice: &Slice) -> f64 {
        slice.host_link_bytes_per_s * self.rates.host_link_fraction
    }

    fn flops(&self, slice: &Slice) -> f64 {
        match self.workload.dtype {
            ComputeDtype::Bfloat16 => slice.bf16_flops_per_s,
            ComputeDtype::Float32 => slice.f32_flops_per_s,
            ComputeDtype::Float64 => slice.f32_flops_per_s / 2.0,
        }
    }
}

/// Whether training state can make room for the generator.
pub(super) fn can_move(roles: RoleSet, slice: &Slice) -> bool {
    let generator = RoleSet::of(&[Role::Generator]);
    roles.contains(Role::Generator) && roles != generator && !slice.shares_host_memory
}

impl GroupConfig {
    /// The choices for `roles`: every stage and offload of the trained ones, whole or sharded for the frozen ones, every
    /// tensor-parallel size of the generator; plainest first.
    pub fn all(problem: &Problem, roles: RoleSet, tensor_parallel_sizes: &[usize]) -> Vec<GroupConfig> {
        let plain = GroupConfig { stages: [problem.stages[0]; 5], offloads: [false; 5], tensor_parallel: 1 };
        let mut configs = vec![plain];
        for role in ROLES.into_iter().filter(|role| roles.contains(*role)) {
            let choices = problem.choices(role, tensor_parallel_sizes);
            let with = |config: &GroupConfig| choices.iter().map(|set| set(*config)).collect::<Vec<_>>();
            configs = configs.iter().flat_map(with).collect();
        }
        configs
    }
}

type Choice<'a> = Box<dyn Fn(GroupConfig) -> GroupConfig + 'a>;

impl Problem<'_> {
    fn choices<'a>(&'a self, role: Role, sizes: &'a [usize]) -> Vec<Choice<'a>> {
        let index = role as usize;
        let staged = move |mut config: GroupConfig, stage: u8| {
            config.stages[index] = stage;
            config
        };
        if role == Role::Generator {
            let set =
                |&tensor_parallel| -> Choice<'a> { Box::new(move |config| GroupConfig { tensor_parallel, ..config }) };
            return sizes.iter().map(set).collect();
        }
        if self.workload.training(role).is_none() {
            // Below stage 3 a frozen model is whole, whatever the stage.
            let shards = self.stages.contains(&3);
            let whole = self.stages.iter().copied().find(|stage| *stage < 3);
            let stages = whole.into_iter().chain(shards.then_some(3)).chain((whole.is_none() && !shards).then_some(0));
            return stages.map(|stage| -> Choice<'a> { Box::new(move |config| staged(config, stage)) }).collect();
        }
        let pairs = self.offloads.iter().flat_map(|&off| self.stages.iter().map(move |&stage| (stage, off)));
        let set = |(stage, off)| -> Choice<'a> {
            Box::new(move |config| {
                let mut config = staged(config, stage);
                config.offloads[index] = off;
                config
            })
        };
        pairs.map(set).collect()
    }
}
