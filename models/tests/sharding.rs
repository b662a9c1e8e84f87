//! Training over several ranks gives one process's numbers, whatever is divided. Ranks are threads here, each with its own
//! sockets: to c10d they are processes.

use std::path::Path;

use echelon_core::data::Rows;
use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::progress::Interrupt;
use echelon_core::random::{Domain, uniform};
use echelon_core::role::Role;
use echelon_core::zero::{
    OptimizerConfig, ParamWithGrad, PassConfig, Sharding, StatePart, Trainable, TrainingState, ZeroStage,
};
use echelon_models::checkpoint::Checkpoint;
use echelon_models::config::DecoderConfig;
use echelon_models::decoder::Decoder;
use echelon_models::head::{LogprobHead, LogprobOutput};
use tch::{Device, Kind, Tensor};

#[path = "common/float32.rs"]
mod float32;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/checkpoints");
const STEPS: usize = 4;

/// One way of dividing the work.
#[derive(Clone, Copy, Debug)]
struct Case {
    ranks: usize,
    stage: ZeroStage,
    checkpointing: bool,
    tokens_per_micro_batch: i64,
}

/// What a run leaves behind.
#[derive(Debug, PartialEq)]
struct Trace {
    losses: Vec<f64>,
    norms: Vec<f64>,
    /// Of the first step, as AdamW's first moment has it: a fixed share of the clipped gradient.
    gradient: Vec<f64>,
    /// Every tensor of the state after the last step.
    state: Vec<(String, Vec<f64>)>,
    logprobs: Vec<f64>,
    /// By rank.
    bytes_kept: Vec<usize>,
    bytes_sent: Vec<u64>,
    num_params: i64,
}

fn policy(
    folder: &Path,
    kind: Kind,
    sharding: &Sharding,
    case: Case,
    nudge: Option<u64>,
) -> Trainable<Decoder, LogprobHead> {
    let config = DecoderConfig::read(folder).unwrap();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let shape = config.shape();
    let shapes: std::collections::HashMap<String, Vec<i64>> =
        shape.units.iter().flat_map(|unit| &unit.params).map(|p| (p.name.clone(), p.shape.clone())).collect();
    let optimizer = OptimizerConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.01, max_grad_norm: 1.0 };
    let state = TrainingState::new(Role::Actor, &shape, optimizer, (kind, Device::Cpu), sharding, &mut |name| {
        let weight = checkpoint.tensor(name, &shapes[name])?;
        Ok(nudge.map_or(weight.shallow_clone(), |draw| float32::nudged(name, &weight, draw)))
    })
    .unwrap();
    let params = state.params();
    let model = Decoder::new(&config, &mut |name| Ok(params[name].weight.shallow_clone())).unwrap();
    let head = if config.tied_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
    let head: ParamWithGrad = params[head].shallow_clone();
    let pass = PassConfig {
        device: Device::Cpu,
        tokens_per_micro_batch: case.tokens_per_micro_batch,
        activation_checkpointing: case.checkpointing,
    };
    Trainable::new(state, model, LogprobHead::trained(head, 1.0), pass)
}

/// The rows of one mini-batch, the same on every rank; a rank takes every `ranks`-th.
fn rows(step: usize) -> Vec<(Vec<i64>, Vec<bool>)> {
    let row = |index: usize| {
        let number = |at: u32| uniform(step as u64, Domain::Data, index as u64, at, 0);
        let length = 3 + (number(0) * 9.0) as usize;
        let ids = (0..length).map(|at| (3.0 + number(at as u32 + 1) * 100.0) as i64).collect();
        (ids, (0..length).map(|at| at > 1).collect())
    };
    (0..7).map(row).collect()
}

fn run_rank(folder: &Path, kind: Kind, case: Case, group: ProcessGroup, nudge: Option<u64>) -> Trace {
    let sharding = Sharding { group: group.clone(), stage: case.stage, offload: false };
    let mut policy = policy(folder, kind, &sharding, case, nudge);
    let bytes_kept = vec![policy.state.bytes()];
    let num_params = policy.state.names(&[StatePart::Weights]).iter().map(|(_, s)| s.iter().product::<i64>()).sum();
    let numbers = |t: &Tensor| Vec::<f64>::try_from(t.to_kind(Kind::Double).flatten(0, -1)).unwrap();
    let (mut losses, mut norms, mut gradient) = (Vec::new(), Vec::new(), Vec::new());
    let mut bytes_sent = 0;
    for step in 0..STEPS {
        let all = rows(step);
        let num_tokens: f64 = all.iter().map(|(_, mask)| mask.iter().filter(|&&m| m).count() as f64).sum();
        let mine: Vec<_> = all.into_iter().skip(group.rank()).step_by(case.ranks).collect();
        let mine = Rows::of_tokens(&mine);
        let before = group.bytes_sent();
        let mut loss = 0.0;
        for batch in policy.micro_batches(&mine.lengths, 1).unwrap() {
            let loss_of = |output: &LogprobOutput| Ok(-output.logprobs.sum(Kind::Double) / num_tokens);
            loss += policy.forward_backward(&mine.select(&batch), loss_of).unwrap();
        }
        norms.push(policy.optimizer_step(1e-2).unwrap());
        bytes_sent = group.bytes_sent() - before;
        losses.push(group.sum("loss", loss).unwrap());
        if step == 0 {
            let tensors = policy.state.tensors().unwrap();
            let moments = tensors.iter().filter(|(name, _)| name.starts_with("exp_avg."));
            gradient = moments.flat_map(|(_, moment)| numbers(moment)).collect();
        }
    }
    let mut logprobs = Vec::new();
    let all = Rows::of_tokens(&rows(99));
    let take = |rows: &[i64], output: LogprobOutput| {
        for (place, &row) in rows.iter().enumerate() {
            let row = output.logprobs.get(place as i64).narrow(0, 0, all.lengths[row as usize]);
            logprobs.extend(Vec::<f64>::try_from(row.to_kind(Kind::Double)).unwrap());
        }
    };
    policy.forward_rows(&all, &Interrupt::default(), take).unwrap();
    let state = policy.state.tensors().unwrap().iter().map(|(name, t)| (name.clone(), numbers(t))).collect();
    Trace { losses, norms, gradient, state, logprobs, bytes_kept, bytes_sent: vec![bytes_sent], num_params }
}

fn run(folder: &Path, kind: Kind, case: Case) -> Trace {
    run_nudged(folder, kind, case, None)
}

fn run_nudged(folder: &Path, kind: Kind, case: Case, nudge: Option<u64>) -> Trace {
    let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
    let port = point.port();
    let mut traces: Vec<Trace> = std::thread::scope(|scope| {
        let rank = |rank| {
            scope.spawn(move || {
                tch::set_num_threads(1);
                let patience = Patience::default();
                let point = MeetingPoint::join("127.0.0.1", port, patience).unwrap();
                let group = ProcessGroup::join(&point, "test", (rank, case.ranks), "127.0.0.1", patience).unwrap();
                run_rank(folder, kind, case, group, nudge)
            })
        };
        let threads: Vec<_> = (0..case.ranks).map(rank).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let bytes_kept = traces.iter().map(|trace| trace.bytes_kept[0]).collect();
    let bytes_sent = traces.iter().map(|trace| trace.bytes_sent[0]).collect();
    for other in &traces[1..] {
        assert_eq!((&other.losses, &other.norms), (&traces[0].losses, &traces[0].norms), "{case:?}: ranks disagree");
        assert_eq!(other.state, traces[0].state, "{case:?}: ranks disagree on the state");
    }
    Trace { bytes_kept, bytes_sent, ..traces.swap_remove(0) }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for ranks in [1, 2, 4] {
        for stage in 0..4 {
            let stage = ZeroStage::from_number(stage).unwrap();
            for (checkpointing, tokens_per_micro_batch) in [(false, 1000), (true, 12)] {
                cases.push(Case { ranks, stage, checkpointing, tokens_per_micro_batch });
            }
        }
    }
    cases
}

fn worst(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, f64::max)
}

/// The difference of two vectors, in the length of the second.
fn relative_l2(found: &[f64], expected: &[f64]) -> f64 {
    assert!(found.len() == expected.len() && !found.is_empty());
    let length = |squares: &mut dyn Iterator<Item = f64>| squares.sum::<f64>().sqrt();
    let difference = length(&mut found.iter().zip(expected).map(|(a, b)| (a - b).powi(2)));
    difference / length(&mut expected.iter().map(|b| b.powi(2)))
}

/// How far a run is from another.
#[derive(Clone, Copy, Debug)]
struct Off {
    losses: f64,
    norms: f64,
    gradient: f64,
    logprobs: f64,
}

impl Off {
    fn of(found: &Trace, expected: &Trace) -> Off {
        Off {
            losses: worst(&found.losses, &expected.losses),
            norms: worst(&found.norms, &expected.norms),
            gradient: relative_l2(&found.gradient, &expected.gradient),
            logprobs: worst(&found.logprobs, &expected.logprobs),
        }
    }

    /// What f32 can promise, from f64 runs of as many steps.
    fn promised_of_f32(folder: &Path, case: Case, exact: &Trace) -> Off {
        let draws: Vec<Off> = (1..=float32::DRAWS)
            .map(|draw| Off::of(&run_nudged(folder, Kind::Double, case, Some(draw)), exact))
            .collect();
        let of = |read: fn(&Off) -> f64| float32::promise(|draw| read(&draws[draw as usize - 1]));
        Off {
            losses: of(|o| o.losses),
            norms: of(|o| o.norms),
            gradient: of(|o| o.gradient),
            logprobs: of(|o| o.logprobs),
        }
    }

    fn is_within(&self, bound: &Off) -> bool {
        self.losses <= bound.losses
            && self.norms <= bound.norms
            && self.gradient <= bound.gradient
            && self.logprobs <= bound.logprobs
    }
}

/// Losses, gradients, their norms and log-probs, and in f64 weights and moments, after four steps: a tied model and one with its own head.
#[test]
fn every_stage_gives_one_processs_numbers() {
    for (name, tied) in [("llama_tied_f32", true), ("llama_biases", false)] {
        let folder = Path::new(GOLDEN).join(name);
        assert_eq!(DecoderConfig::read(&folder).unwrap().tied_embeddings, tied, "{name}");
        let whole = Case { ranks: 1, stage: ZeroStage::Zero, checkpointing: false, tokens_per_micro_batch: 1000 };
        let promised = Off::promised_of_f32(&folder, whole, &run(&folder, Kind::Double, whole));
        println!("{name}: f32 promises {promised:?}");
        let exact = Off { losses: 1e-9, norms: 1e-9, gradient: 1e-9, logprobs: 1e-9 };
        for (kind, bound) in [(Kind::Double, exact), (Kind::Float, promised)] {
            let expected = run(&folder, kind, whole);
            for case in cases().into_iter().filter(|case| kind == Kind::Double || case.ranks > 1) {
                let found = run(&folder, kind, case);
                let off = Off::of(&found, &expected);
                assert!(off.is_within(&bound), "{name} {kind:?} {case:?}: {off:?}, allowed is {bound:?}");
                // In f32 a bias of the keys, whose true gradient is 0, follows AdamW's view of the rounding.
                for ((tensor, found), (_, expected)) in found.state.iter().zip(&expected.state) {
                    let off = worst(found, expected);
                    assert!(kind == Kind::Float || off < 1e-9, "{name} {case:?}: {tensor} is off by {off:e}");
                }
            }
        }
    }
}

/// What a rank keeps and sends, against ZeRO's formulas, for the psi elements of the padded units.
#[test]
fn ranks_keep_and_send_what_the_formulas_say() {
    let folder = Path::new(GOLDEN).join("llama_tied_f32");
    for kind in [Kind::Float, Kind::BFloat16] {
        for ranks in [1usize, 2, 4] {
            for stage in [ZeroStage::Zero, ZeroStage::One, ZeroStage::Two, ZeroStage::Three] {
                let case = Case { ranks, stage, checkpointing: true, tokens_per_micro_batch: 1000 };
                let trace = run(&folder, kind, case);
                let (psi, n) = (trace.num_params as f64, ranks as f64);
                let over = |from: ZeroStage| if stage >= from { n } else { 1.0 };
                let weight = kind.elt_size_in_bytes() as f64;
                let master = if kind == Kind::Float { 0.0 } else { 4.0 };
                let kept = psi
                    * (weight / over(ZeroStage::Three)
                        + 4.0 / over(ZeroStage::Two)
                        + (master + 8.0) / over(ZeroStage::One));
                for (rank, &bytes) in trace.bytes_kept.iter().enumerate() {
                    let ratio = bytes as f64 / kept;
                    assert!((ratio - 1.0).abs() < 0.05, "{case:?} {kind:?} rank {rank} keeps {bytes}, formula {kept}");
                }
                let gathers = if stage == ZeroStage::Three { 2.0 } else { 1.0 };
                let weights_sent = if stage == ZeroStage::Zero { 4.0 } else { gathers * weight };
                let sent = psi * (n - 1.0) / n * (4.0 + weights_sent);
                for (rank, &bytes) in trace.bytes_sent.iter().enumerate() {
                    let off = (bytes as f64 - sent).abs();
                    assert!(off <= 0.05 * sent + 64.0, "{case:?} {kind:?} rank {rank} sends {bytes}, formula {sent}");
                }
            }
        }
    }
}

/// A rank whose rows make one micro-batch waits for the one that has several, and none hangs.
#[test]
fn ranks_with_unequal_micro_batches_finish_together() {
    let folder = Path::new(GOLDEN).join("llama_tied_f32");
    for stage in [ZeroStage::Two, ZeroStage::Three] {
        let case = Case { ranks: 4, stage, checkpointing: false, tokens_per_micro_batch: 9 };
        let trace = run(&folder, Kind::Float, case);
        assert!(trace.losses.iter().all(|loss| loss.is_finite()));
    }
}

/// A loss that is not finite on one rank stops all of them before the optimizer moves.
#[test]
fn one_ranks_bad_loss_is_everyones() {
    let folder = Path::new(GOLDEN).join("llama_tied_f32");
    let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
    let (port, folder) = (point.port(), &folder);
    std::thread::scope(|scope| {
        for rank in 0..2 {
            scope.spawn(move || {
                let patience = Patience::default();
                let point = MeetingPoint::join("127.0.0.1", port, patience).unwrap();
                let group = ProcessGroup::join(&point, "test", (rank, 2), "127.0.0.1", patience).unwrap();
                let stage = ZeroStage::Three;
                let case = Case { ranks: 2, stage, checkpointing: false, tokens_per_micro_batch: 1000 };
                let mut policy = policy(folder, Kind::Float, &Sharding { group, stage, offload: false }, case, None);
                let before = policy.state.tensors().unwrap();
                let mine = Rows::of_tokens(&rows(1));
                for batch in policy.micro_batches(&mine.lengths, 1).unwrap() {
                    let spoiled = if rank == 1 { f64::NAN } else { 1.0 };
                    let loss_of = |output: &LogprobOutput| Ok(output.logprobs.sum(Kind::Double) * spoiled);
                    policy.forward_backward(&mine.select(&batch), loss_of).unwrap();
                }
                let error = policy.optimizer_step(1e-2).unwrap_err().to_string();
                assert!(error.contains("the loss is NaN at optimizer step 1"), "{error}");
                for ((_, before), (name, after)) in before.iter().zip(policy.state.tensors().unwrap()) {
                    assert_eq!(*before, after, "{name}");
                }
            });
        }
    });
}

/// One rank that is asked to stop stops all before the same pass, also those that only pass by, and they stay in step.
#[test]
fn ranks_stop_together() {
    let folder = Path::new(GOLDEN).join("llama_tied_f32");
    let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
    let (port, folder) = (point.port(), &folder);
    std::thread::scope(|scope| {
        for rank in 0..2 {
            scope.spawn(move || {
                let patience = Patience::default();
                let point = MeetingPoint::join("127.0.0.1", port, patience).unwrap();
                let group = ProcessGroup::join(&point, "test", (rank, 2), "127.0.0.1", patience).unwrap();
                let stage = ZeroStage::Three;
                let case = Case { ranks: 2, stage, checkpointing: false, tokens_per_micro_batch: 9 };
                let mut policy = policy(folder, Kind::Float, &Sharding { group, stage, offload: false }, case, None);
                let all = rows(1);
                let mine = Rows::of_tokens(if rank == 0 { &all[..] } else { &all[..1] });
                let interrupt = Interrupt::default();
                let mut passes = 0;
                let each = |_: &[i64], _| {
                    passes += 1;
                    if passes == 2 {
                        interrupt.raise(); // rank 0 alone comes to this
                    }
                };
                let stopped = policy.forward_rows(&mine, &interrupt, each).unwrap_err();
                assert!(matches!(stopped, echelon_core::Error::Interrupted), "{stopped}");
                policy.forward_rows(&mine, &Interrupt::default(), |_, _| ()).unwrap();
            });
        }
    });
}

/// Node reuse: a state that was in host memory between two steps goes on as one that stayed, and at stage 3 the gathered
/// weights outlive the part that left.
#[test]
fn a_state_comes_back_as_it_went() {
    let folder = Path::new(GOLDEN).join("llama_tied_f32");
    for stage in [ZeroStage::Zero, ZeroStage::One, ZeroStage::Two, ZeroStage::Three] {
        let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
        let (port, folder) = (point.port(), &folder);
        std::thread::scope(|scope| {
            for rank in 0..2 {
                scope.spawn(move || {
                    let patience = Patience::default();
                    let point = MeetingPoint::join("127.0.0.1", port, patience).unwrap();
                    let group = ProcessGroup::join(&point, "test", (rank, 2), "127.0.0.1", patience).unwrap();
                    let case = Case { ranks: 2, stage, checkpointing: false, tokens_per_micro_batch: 1000 };
                    let learn = |aside: bool| {
                        let sharding = Sharding { group: group.clone(), stage, offload: false };
                        let mut policy = policy(folder, Kind::Float, &sharding, case, None);
                        for step in 0..3 {
                            let mine = Rows::of_tokens(&rows(step)[rank..=rank]);
                            for batch in policy.micro_batches(&mine.lengths, 1).unwrap() {
                                let loss_of = |output: &LogprobOutput| Ok(output.logprobs.sum(Kind::Double));
                                policy.forward_backward(&mine.select(&batch), loss_of).unwrap();
                            }
                            policy.optimizer_step(1e-2).unwrap();
                            policy.state.gather_all().unwrap();
                            let norm =
                                |state: &TrainingState| state.params()["model.norm.weight"].weight.detach().copy();
                            let before = norm(&policy.state);
                            if aside {
                                policy.state.set_aside(stage == ZeroStage::Three).unwrap();
                                policy.state.set_aside(stage == ZeroStage::Three).unwrap(); // it is away already
                            }
                            assert_eq!(norm(&policy.state), before, "a generator computes on it");
                            policy.state.release_all().unwrap();
                            policy.state.bring_back().unwrap();
                        }
                        policy.state.tensors().unwrap()
                    };
                    for ((name, stayed), (_, moved)) in learn(false).iter().zip(learn(true)) {
                        assert_eq!(*stayed, moved, "{name} at {stage:?}");
                    }
                });
            }
        });
    }
}

/// Peers and heartbeats learn which micro-batch a rank is in, and that it is in none between mini-batches.
#[test]
fn a_pass_tells_its_micro_batch() {
    let folder = Path::new(GOLDEN).join("llama_tied_f32");
    let case = Case { ranks: 1, stage: ZeroStage::Zero, checkpointing: false, tokens_per_micro_batch: 12 };
    let group = ProcessGroup::solo();
    let sharding = Sharding { group: group.clone(), stage: case.stage, offload: false };
    let mut policy = policy(&folder, Kind::Float, &sharding, case, None);
    let mine = Rows::of_tokens(&rows(1));
    let batches = policy.micro_batches(&mine.lengths, 1).unwrap();
    assert!(batches.len() > 1);
    for (index, batch) in batches.iter().enumerate() {
        let loss_of = |output: &LogprobOutput| {
            assert_eq!(group.standing().micro_batch, index as u64 + 1);
            Ok(output.logprobs.sum(Kind::Double))
        };
        policy.forward_backward(&mine.select(batch), loss_of).unwrap();
    }
    policy.optimizer_step(1e-2).unwrap();
    assert_eq!(group.standing().micro_batch, 0);
    let mut seen = Vec::new();
    policy.forward_rows(&mine, &Interrupt::default(), |_, _| seen.push(group.standing().micro_batch)).unwrap();
    assert_eq!(seen, (1..=batches.len() as u64).collect::<Vec<_>>());
}
