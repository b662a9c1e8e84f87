//! How fast this machine is at a recipe's work: some seconds of the real code on a model of the same widths with few layers.
//!
//! Rated speeds say little about small matrices, a busy machine, or a CPU that nobody has rated. So a probe is run: rows as
//! long as the recipe's go through the recipe's own layers and head, forward, forward and backward with an optimizer step,
//! and through the engine. A large model is probed at two depths, and what a layer adds is added for the others. The planner
//! estimates the same rows with its default rates, and every rate is scaled by what the estimate was off
//! ([`Rates::calibrated`]): what is left to be predicted is how work grows with rows and roles. Where several workers share
//! this host, as many probes run at once, each with a worker's threads, and the link between them is measured as well.

use std::path::Path;
use std::time::Instant;

use echelon_core::data::Rows;
use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::progress::{Interrupt, Unwatched};
use echelon_core::role::Role;
use echelon_core::rollout::{Prompt, Prompts, SamplingConfig};
use echelon_core::store::total;
use echelon_core::verb::{Learn, Verb};
use echelon_core::workload::{Gives, RoleModel, Sampling, Workload, passes_with_sampling};
use echelon_core::zero::{OptimizerConfig, Sharding};
use echelon_core::{Error, Result};
use echelon_generation::{Engine, EngineConfig};
use echelon_models::config::{DecoderConfig, HeadKind};
use echelon_models::head::LogprobOutput;
use echelon_placement::cluster::{Cluster, Link};
use echelon_placement::planner::{Constraints, plan};
use echelon_placement::rates::Rates;
use tch::{Kind, Tensor};

use crate::models::{Held, Policy, made_policy};

/// Floating-point operations of one forward and backward pass of the probe, about.
const PASS_FLOPS: f64 = 1.6e11;

/// Parameters up to which a model is its own probe.
const SMALL_MODEL: i64 = 4_000_000;

/// Layers of the probes of a larger one.
const PROBE_LAYERS: [usize; 2] = [2, 6];

const TRIES: usize = 3;

/// Most tokens that each of the probe's sequences gets.
const PROBE_TOKENS: usize = 32;

/// How many workers of this host compute at once.
#[derive(Clone, Copy, Debug)]
pub struct Here {
    pub generate: usize,
    pub score: usize,
    pub train: usize,
    /// CPU threads of each.
    pub threads: usize,
}

/// Rates at which estimates of `workload`'s like come out right on this machine; takes some seconds.
///
/// # Errors
/// A model that cannot be read, or work that cannot be planned.
pub fn measure(here: Here, workload: &Workload, (folder, held): (&Path, Held), interrupt: &Interrupt) -> Result<Rates> {
    let before = tch::get_num_threads();
    let rates = measure_at_once(here, workload, (folder, held), interrupt);
    tch::set_num_threads(before); // what a probe's thread sets is what later threads begin with
    rates
}

fn measure_at_once(
    here: Here,
    workload: &Workload,
    (folder, held): (&Path, Held),
    interrupt: &Interrupt,
) -> Result<Rates> {
    let cluster = &Cluster::cpu(1, here.threads, total()).map_err(|error| Error::other("the probe's host", error))?;
    let probe = Probe { interrupt: interrupt.clone(), here, ..Probe::new(workload, folder, held)? };
    let constraints = Constraints { zero_stage: Some(0), adam_offload: Some(false), ..Constraints::default() };
    let rates = Rates::of(cluster);
    let estimate = |rates: &Rates| {
        let plan = plan(cluster, &probe.workload, &constraints, rates);
        plan.map(|plan| plan.seconds).map_err(|error| Error::other("planning the probe", error))
    };
    let estimated = estimate(&rates)?;
    // As if the optimizer's step took no time: it is calibrated by itself, for it grows with parameters, not with rows.
    let passes = estimate(&Rates { optimizer_fraction: f64::INFINITY, ..rates })?.train;
    let measured = probe.seconds()?;
    let calibrated = rates.calibrated(
        (estimated.generate, measured.generate),
        (estimated.score, measured.score),
        (passes, measured.passes),
    );
    let optimizer = rates.calibrated((0.0, 0.0), (0.0, 0.0), (estimated.train - passes, measured.optimizer));
    Ok(Rates {
        optimizer_fraction: optimizer.optimizer_fraction,
        host_optimizer_bytes_per_s: optimizer.host_optimizer_bytes_per_s,
        ..calibrated
    })
}

/// Seconds of the probe's phases.
struct Seconds {
    generate: f64,
    score: f64,
    /// Forward and backward.
    passes: f64,
    optimizer: f64,
}

struct Probe {
    here: Here,
    /// Of the whole model.
    config: DecoderConfig,
    held: Held,
    workload: Workload,
    /// Looked at between its parts.
    interrupt: Interrupt,
}

impl Probe {
    fn new(workload: &Workload, folder: &Path, held: Held) -> Result<Probe> {
        let config = DecoderConfig { head: HeadKind::Logits, ..DecoderConfig::read(folder)? };
        let shape = config.shape();
        let prompt = (workload.mean_prompt_tokens.round() as usize).max(2);
        let response = (workload.mean_response_tokens.round() as usize).max(1);
        let shallow = of_depth(&config, depths(&config)[0]).shape().num_params();
        let batch = workload.passes.iter().filter(|pass| pass.verb == Learn::NAME).map(|pass| pass.rows).max();
        let rows = (PASS_FLOPS / (6.0 * shallow as f64 * (prompt + response) as f64)) as usize;
        let rows = rows.min(workload.tokens_per_micro_batch / (prompt + response)).clamp(1, batch.unwrap_or(1));
        let training = workload.main_role().and_then(|role| workload.training(role));
        let models = vec![RoleModel { role: Role::Actor, shape, gives: Gives::Logprobs, training, offload: false }];
        let sampling = workload.sampling.clone();
        let sampling =
            sampling.map(|like| Sampling { published: Role::Actor, prompts: rows, samples_per_prompt: 1, ..like });
        let workload = Workload {
            passes: passes_with_sampling(&models, rows, rows, 1),
            models,
            sampling,
            rows,
            max_prompt_tokens: prompt,
            max_response_tokens: response,
            mean_prompt_tokens: prompt as f64,
            mean_response_tokens: response as f64,
            ..workload.clone()
        };
        let here = Here { generate: 1, score: 1, train: 1, threads: 1 };
        Ok(Probe { here, config, held, workload, interrupt: Interrupt::default() })
    }

    /// Of the whole model, by its probes.
    fn seconds(&self) -> Result<Seconds> {
        let [shallow, deep] = depths(&self.config);
        let first = self.run(shallow)?;
        if shallow == self.config.num_layers {
            return Ok(first);
        }
        let second = self.run(deep)?;
        let more = (self.config.num_layers - shallow) as f64 / (deep - shallow) as f64;
        let whole = |first: f64, second: f64| first + more * (second - first).max(0.0);
        Ok(Seconds {
            generate: whole(first.generate, second.generate),
            score: whole(first.score, second.score),
            passes: whole(first.passes, second.passes),
            optimizer: whole(first.optimizer, second.optimizer),
        })
    }

    /// With so many of its layers.
    fn run(&self, num_layers: usize) -> Result<Seconds> {
        let optimizer = OptimizerConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.0, max_grad_norm: 1.0 };
        let config = of_depth(&self.config, num_layers);
        let policy = |_| made_policy(&config, self.held, (optimizer, &Sharding::whole()), &mut probe_parameter);
        let Here { generate, score, train, .. } = self.here;
        let mut ranks = (0..generate.max(score).max(train)).map(policy).collect::<Result<Vec<_>>>()?;
        let [passes, optimizer] = self.at_once(&mut ranks[..train], |policy| {
            let rows = self.rows();
            usual(|| {
                let passes = timed(|| self.learn(policy, &rows))?;
                Ok([passes, timed(|| policy.optimizer_step(0.0).map(drop))?])
            })
        })?;
        let [score] = self.at_once(&mut ranks[..score], |policy| {
            let rows = self.rows();
            usual(|| {
                self.is_wanted()?;
                Ok([timed(|| policy.forward_rows(&rows, &Interrupt::default(), |_, _| ()))?])
            })
        })?;
        let [generate] = self.at_once(&mut ranks[..generate], |policy| usual(|| Ok([self.generate(policy)?])))?;
        Ok(Seconds { generate, score, passes, optimizer })
    }

    /// Every rank's work at once, on a thread of its own; the slowest of each figure.
    fn at_once<const N: usize>(
        &self,
        ranks: &mut [Policy],
        work: impl Fn(&mut Policy) -> Result<[f64; N]> + Sync,
    ) -> Result<[f64; N]> {
        let work = |policy: &mut Policy| {
            tch::set_num_threads(self.here.threads as i32);
            work(policy)
        };
        let work = &work;
        std::thread::scope(|scope| {
            let ranks: Vec<_> = ranks.iter_mut().map(|policy| scope.spawn(move || work(policy))).collect();
            ranks.into_iter().try_fold([0.0; N], |slowest, rank| {
                let seconds = rank.join().expect("a probe does not panic")?;
                Ok(std::array::from_fn(|figure| f64::max(slowest[figure], seconds[figure])))
            })
        })
    }

    fn rows(&self) -> Rows {
        let work = &self.workload;
        let (prompt, length) = (work.max_prompt_tokens, work.max_tokens());
        let ids = (0..length as i64).map(|t| t * 31 % self.config.vocab_size).collect::<Vec<_>>();
        let row = (ids, (0..length).map(|t| t >= prompt).collect::<Vec<_>>());
        Rows::of_tokens(&vec![row; work.rows])
    }

    /// Also while the run's own step may not be stopped.
    fn is_wanted(&self) -> Result<()> {
        if self.interrupt.is_raised() { Err(Error::Interrupted) } else { Ok(()) }
    }

    fn learn(&self, policy: &mut Policy, rows: &Rows) -> Result<()> {
        self.is_wanted()?;
        let loss = |output: &LogprobOutput| Ok(-output.logprobs.sum(Kind::Float) / rows.num_rows() as f64);
        policy.forward_backward(rows, loss).map(drop)
    }

    /// Seconds of a rollout such as the workload's probe has, from one with fewer tokens.
    fn generate(&self, policy: &Policy) -> Result<f64> {
        self.is_wanted()?;
        let work = &self.workload;
        let Some(limits) = &work.sampling else { return Ok(0.0) };
        let max_new_tokens = work.max_response_tokens.min(PROBE_TOKENS);
        let sampling = SamplingConfig { ignore_eos: true, ..SamplingConfig::uncut(1.0, max_new_tokens) };
        let ids = |id: usize| (0..work.max_prompt_tokens).map(move |t| ((id + t) as i64 * 31) % self.config.vocab_size);
        let prompt =
            |id: usize| Prompt { id: id as u64, token_ids: ids(id).collect(), text: String::new(), label: None };
        let rows = (0..work.rows).map(prompt).collect();
        let prompts = Prompts { rows, samples_per_prompt: 1, seed: 1, evaluation: true };
        let engine = Engine::new(EngineConfig {
            max_sequences: limits.max_sequences,
            max_batched_tokens: limits.max_batched_tokens,
            kv_cache_bytes: None,
            weight_layout: self.held.weight_layout,
        });
        let model = echelon_generation::Policy { model: &policy.model, head: policy.head.weight(), tokenizer: None };
        let (_, report) = engine.generate(model, &prompts, &sampling, &Unwatched, &Interrupt::default())?;
        let (first, steps) = (report.first_token_s, report.decode_steps as f64);
        let step_s = if steps > 0.0 { (report.seconds - first) / steps } else { 0.0 };
        Ok(first + step_s * (work.max_response_tokens - 1) as f64)
    }
}

/// The link between processes of this host, as `num_ranks` of them find it when they gather and reduce together.
///
/// # Errors
/// Their group does not come about.
pub fn measure_link(num_ranks: usize) -> Result<Link> {
    let point = MeetingPoint::serve("127.0.0.1", 0)?;
    let rank = |rank: usize| -> Result<(f64, f64)> {
        let patience = Patience::default();
        let point = MeetingPoint::join("127.0.0.1", point.port(), patience)?;
        let group = ProcessGroup::join(&point, "calibration", (rank, num_ranks), "127.0.0.1", patience)?;
        let seconds = |numbers: usize| {
            let length = (numbers - numbers % num_ranks) as i64;
            let gathered = Tensor::zeros([length], tch::kind::FLOAT_CPU);
            let share = length / num_ranks as i64;
            let shard = gathered.narrow(0, rank as i64 * share, share);
            // As training does: a unit's weights are gathered, its gradients reduced.
            usual(|| {
                let exchange = || {
                    group.start_all_gather_in_place("gather", &gathered, &shard)?.wait()?;
                    group.start_reduce_scatter("reduce", &gathered)?.sum().map(drop)
                };
                Ok([timed(exchange)?])
            })
        };
        let ([few], [many]) = (seconds(num_ranks * 16)?, seconds(LINK_NUMBERS)?);
        Ok((few, many))
    };
    let rank = &rank;
    let ranks: Vec<Result<(f64, f64)>> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..num_ranks).map(|number| scope.spawn(move || rank(number))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a probe does not panic")).collect()
    });
    let mut slowest = (0.0, 0.0);
    for seconds in ranks {
        let (few, many) = seconds?;
        slowest = (f64::max(slowest.0, few), f64::max(slowest.1, many));
    }
    let (few, many) = slowest;
    let sent = 2.0 * 4.0 * LINK_NUMBERS as f64 * (num_ranks - 1) as f64 / num_ranks as f64;
    // The planner counts a latency for each halving of the group.
    let latency_s = few / 2.0 / (num_ranks as f64).log2().ceil();
    Ok(Link { bytes_per_s: sent / (many - few).max(1e-6), latency_s })
}

/// What the link is measured with: a unit of some millions of parameters, in f32.
const LINK_NUMBERS: usize = 4 << 20;

/// Layers of the two probes: both all of them, where the model is small.
fn depths(config: &DecoderConfig) -> [usize; 2] {
    let small = config.shape().num_params() <= SMALL_MODEL || config.num_layers <= PROBE_LAYERS[1];
    if small { [config.num_layers; 2] } else { PROBE_LAYERS }
}

fn of_depth(config: &DecoderConfig, num_layers: usize) -> DecoderConfig {
    let windows = config.windows.iter().copied().take(num_layers).collect();
    DecoderConfig { num_layers, windows, ..config.clone() }
}

/// A parameter of a probe, which means nothing: numbers of a usual size, made quickly.
fn probe_parameter(name: &str, shape: &[i64]) -> Result<Tensor> {
    if name.ends_with("norm.weight") {
        return Ok(Tensor::ones(shape, tch::kind::FLOAT_CPU));
    }
    Ok(Tensor::linspace(-0.03, 0.03, shape.iter().product::<i64>(), tch::kind::FLOAT_CPU).view(shape))
}

/// Means of a few tries after a first, which takes memory for the first time: a machine that others use is slower than it
/// can be.
fn usual<const N: usize>(mut seconds: impl FnMut() -> Result<[f64; N]>) -> Result<[f64; N]> {
    seconds()?;
    let tries = (0..TRIES).map(|_| seconds()).collect::<Result<Vec<_>>>()?;
    Ok(std::array::from_fn(|figure| tries.iter().map(|each| each[figure]).sum::<f64>() / TRIES as f64))
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begun = Instant::now();
    work()?;
    Ok(begun.elapsed().as_secs_f64())
}
