//! Trainers and generators as threads, each with sockets of its own: to c10d they are processes.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::role::Role;
use echelon_core::shape::{ModelShape, ParamShape, TensorParallelAxis, TensorParallelPart, UnitShape};
use echelon_core::store::{LiveMap, LiveSegment};
use echelon_core::zero::{OptimizerConfig, Sharding, StatePart, TrainingState, ZeroStage};
use tch::{Device, Kind, Tensor};

use super::broadcast::{BroadcastReceiver, BroadcastSender, SyncPlace, join_lanes};
use super::shared::{SharedReceiver, SharedSender};
use super::{SyncConfig, SyncPlan, SyncReport};

type Tensors = HashMap<String, Tensor>;

/// Two layers, fewer key-value heads than slices, a vocabulary that does not divide, biases; with `frozen`, the embedding and
/// one layer's wide matrices are not trained.
fn shape(tied: bool, frozen: bool) -> ModelShape {
    use TensorParallelAxis::{Columns, KeyValueRows, Replicated, Rows};
    let (hidden, heads, head_dim, ffn, vocabulary) = (12, 4, 4, 20, 33);
    let param = |name: String, shape: &[i64], axis| {
        let trainable = !(frozen && ["embedding", "1.up", "1.down"].contains(&name.as_str()));
        ParamShape { name, shape: shape.into(), axis, trainable }
    };
    let mut units = vec![UnitShape {
        name: "embedding".into(),
        params: vec![param("embedding".into(), &[vocabulary, hidden], Rows)],
    }];
    for layer in 0..2 {
        let named = |name: &str, shape: &[i64], axis| param(format!("{layer}.{name}"), shape, axis);
        let params = vec![
            named("norm", &[hidden], Replicated),
            named("q", &[heads * head_dim, hidden], Rows),
            named("k", &[head_dim, hidden], KeyValueRows),
            named("k bias", &[head_dim], KeyValueRows),
            named("o", &[hidden, heads * head_dim], Columns),
            named("up", &[ffn, hidden], Rows),
            named("down", &[hidden, ffn], Columns),
        ];
        units.push(UnitShape { name: format!("layer {layer}"), params });
    }
    let mut last = vec![param("last norm".into(), &[hidden], Replicated)];
    if !tied {
        last.push(param("head".into(), &[vocabulary, hidden], Rows));
    }
    units.push(UnitShape { name: "head".into(), params: last });
    ModelShape {
        units,
        hidden_size: hidden,
        num_layers: 2,
        num_heads: heads,
        num_kv_heads: 1,
        head_dim,
        intermediate_size: ffn,
        vocab_size: vocabulary,
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    trainers: usize,
    stage: u8,
    replicas: usize,
    tensor_parallel: usize,
    tied: bool,
    frozen: bool,
    trainer_kind: Kind,
    kind: Kind,
    bucket_bytes: usize,
    pack_below: usize,
}

const SMALL: Case = Case {
    trainers: 2,
    stage: 3,
    replicas: 1,
    tensor_parallel: 1,
    tied: true,
    frozen: false,
    trainer_kind: Kind::Float,
    kind: Kind::Float,
    bucket_bytes: 1000,
    pack_below: 128,
};

/// Every number of trainers, stage, arrangement of generators and head, with dtypes, what is frozen and sizes of messages in
/// turn.
fn cases() -> Vec<Case> {
    let kinds = [
        (Kind::Float, Kind::Float),
        (Kind::Float, Kind::BFloat16),
        (Kind::BFloat16, Kind::BFloat16),
        (Kind::BFloat16, Kind::Float),
        (Kind::Double, Kind::Float),
    ];
    let mut cases = Vec::new();
    for trainers in [1, 2, 4] {
        for stage in 0..4 {
            for (replicas, tensor_parallel) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
                for tied in [true, false] {
                    let (trainer_kind, kind) = kinds[cases.len() % kinds.len()];
                    let bucket_bytes = [700, 3001, 1 << 20][cases.len() % 3];
                    let pack_below = [0, 64, 400, usize::MAX][cases.len() / 3 % 4];
                    cases.push(Case {
                        trainers,
                        stage,
                        replicas,
                        tensor_parallel,
                        tied,
                        frozen: (cases.len() / 2 + stage as usize) % 2 == 1,
                        trainer_kind,
                        kind,
                        bucket_bytes,
                        pack_below,
                    });
                }
            }
        }
    }
    cases
}

impl Case {
    fn shape(&self) -> ModelShape {
        shape(self.tied, self.frozen)
    }

    fn plan(&self) -> SyncPlan {
        let Case { trainers, replicas, tensor_parallel, kind, bucket_bytes, pack_below, .. } = *self;
        let config = SyncConfig { trainers, replicas, tensor_parallel, kind, bucket_bytes, pack_below };
        SyncPlan::new(&self.shape(), config).unwrap()
    }

    fn state(&self, group: ProcessGroup, seed: f64) -> TrainingState {
        let shape = self.shape();
        let optimizer = OptimizerConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.0, max_grad_norm: 0.0 };
        let sharding = Sharding { group, stage: ZeroStage::from_number(self.stage).unwrap(), offload: false };
        let place = (self.trainer_kind, Device::Cpu);
        let load = &mut |name: &str| Ok(numbers(&shape, name, seed));
        TrainingState::new(Role::Actor, &shape, optimizer, place, &sharding, load).unwrap()
    }

    /// Generator ranks, as (replica, rank in it).
    fn generators(&self) -> Vec<(usize, usize)> {
        (0..self.replicas).flat_map(|replica| (0..self.tensor_parallel).map(move |rank| (replica, rank))).collect()
    }

    /// A generator rank's tensors, with nothing of the model in them.
    fn blank(&self, tp_rank: usize) -> Tensors {
        let shapes = self.plan().slice_shapes(tp_rank);
        shapes.into_iter().map(|(name, shape)| (name, Tensor::full(shape, -7.0, (self.kind, Device::Cpu)))).collect()
    }
}

fn numbers(shape: &ModelShape, name: &str, seed: f64) -> Tensor {
    let param = shape.units.iter().flat_map(|unit| &unit.params).find(|param| param.name == name).unwrap();
    let seed = name.bytes().fold(seed, |seed, byte| seed * 1.7 + f64::from(byte));
    let waves = (Tensor::arange(param.numel(), tch::kind::DOUBLE_CPU) * 12.9898 + seed).sin();
    waves.to_kind(Kind::Float).view(param.shape.as_slice())
}

/// Moves a state to other weights, as a step would.
fn change(case: &Case, state: &mut TrainingState, seed: f64) {
    let shape = case.shape();
    let load = &mut |name: &str| {
        let (part, name) = name.split_once('.').unwrap();
        let numbers = numbers(&shape, name, seed);
        Ok(if part == "weights" { numbers } else { numbers.zeros_like() })
    };
    state.restore(1, load).unwrap();
}

/// The whole weights as an exported model has them.
fn exported(state: &TrainingState) -> Tensors {
    let mut tensors = HashMap::new();
    let mut keep = |name: &str, tensor: &Tensor| {
        tensors.insert(name.strip_prefix("weights.").unwrap().to_string(), tensor.copy());
        Ok(())
    };
    state.visit(&[StatePart::Weights], &mut keep).unwrap();
    tensors
}

/// Asserts that a generator rank holds its slices of the exported weights, bit for bit.
fn assert_slices(case: &Case, tp_rank: usize, held: &Tensors, exported: &Tensors) {
    let shape = case.shape();
    let part = TensorParallelPart { rank: tp_rank, size: case.tensor_parallel };
    for param in shape.units.iter().flat_map(|unit| &unit.params) {
        let slice = shape.slice(param, part);
        let expected = exported[&param.name].narrow(slice.dim as i64, slice.start, slice.length).to_kind(case.kind);
        assert_eq!(held[&param.name], expected, "{case:?}: slice {tp_rank} of {}", param.name);
    }
}

const PATIENCE: Patience =
    Patience { join: Duration::from_secs(30), progress: Duration::from_secs(10), remind: Duration::from_secs(30) };

/// Runs `each` on the threads of `size` ranks that meet, and gives what each returns, in order.
fn ranks<T: Send>(size: usize, each: impl Fn(usize, &MeetingPoint) -> T + Sync) -> Vec<T> {
    let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
    let port = point.port();
    let run = |rank| {
        tch::set_num_threads(1);
        each(rank, &MeetingPoint::join("127.0.0.1", port, PATIENCE).unwrap())
    };
    std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn trainers(case: &Case, name: &str, at: &MeetingPoint, rank: usize) -> ProcessGroup {
    ProcessGroup::join(at, &format!("trainers of {name}"), (rank, case.trainers), "127.0.0.1", PATIENCE).unwrap()
}

/// Runs every trainer and generator rank of each case on a thread of its own; what they return, by case.
fn run<A: Send, B: Send>(
    cases: &[Case],
    trainer: impl Fn(&Case, TrainingState, BroadcastSender) -> A + Sync,
    generator: impl Fn(&Case, usize, BroadcastReceiver) -> B + Sync,
) -> Vec<(Vec<A>, Vec<B>)> {
    let most = |count: fn(&Case) -> usize| cases.iter().map(count).max().unwrap();
    let (num_trainers, num_generators) = (most(|case| case.trainers), most(|case| case.generators().len()));
    let in_case = |(index, case): (usize, &Case), rank: usize, at: &MeetingPoint| {
        let name = format!("case {index}");
        let lanes = |place| join_lanes(at, &name, &case.plan(), place, "127.0.0.1", PATIENCE).unwrap();
        if rank < case.trainers {
            let state = case.state(trainers(case, &name, at, rank), 1.0);
            let sender = BroadcastSender::new(case.plan(), lanes(SyncPlace::Trainer(rank))).unwrap();
            return (Some(trainer(case, state, sender)), None);
        }
        let Some((replica, tp_rank)) =
            rank.checked_sub(num_trainers).and_then(|rank| case.generators().get(rank).copied())
        else {
            return (None, None);
        };
        let lanes = lanes(SyncPlace::Generator { replica, tp_rank });
        let receiver = BroadcastReceiver::new(case.plan(), tp_rank, lanes, Device::Cpu).unwrap();
        (None, Some(generator(case, tp_rank, receiver)))
    };
    let mut by_rank: Vec<_> = ranks(num_trainers + num_generators, |rank, at| {
        cases.iter().enumerate().map(|case| in_case(case, rank, at)).collect::<Vec<_>>().into_iter()
    });
    let of_case = |_: &Case| {
        let (sent, received): (Vec<_>, Vec<_>) = by_rank.iter_mut().filter_map(Iterator::next).unzip();
        (sent.into_iter().flatten().collect(), received.into_iter().flatten().collect())
    };
    cases.iter().map(of_case).collect()
}

fn checksum<'a>(reports: impl Iterator<Item = &'a SyncReport>) -> u64 {
    reports.fold(0, |sum, report| sum.wrapping_add(report.checksum))
}

/// WS-2, WS-7: over two versions, for every number of trainers, stage, arrangement of generators, head, and dtypes.
#[test]
fn broadcast_slices_are_the_exported_state() {
    let cases = cases();
    let results = run(
        &cases,
        |case, mut state, mut sender| {
            let first = exported(&state);
            let before = sender.bytes_sent();
            let of_first = sender.publish(&state, 1).unwrap();
            change(case, &mut state, 2.0);
            let reports = [of_first, sender.publish(&state, 2).unwrap()];
            let bytes = sender.bytes_sent() - before;
            (first, exported(&state), reports, bytes)
        },
        |_, tp_rank, mut receiver| {
            let mut receive = |version| {
                let report = receiver.receive(version).unwrap();
                let copy = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.copy());
                (report, receiver.tensors().iter().map(copy).collect::<Tensors>())
            };
            let (first, second) = (receive(1), receive(2));
            receiver.check(2).unwrap();
            (tp_rank, [first, second])
        },
    );
    for (case, (sent, received)) in cases.iter().zip(results) {
        assert_eq!((sent.len(), received.len()), (case.trainers, case.replicas * case.tensor_parallel));
        let plan = case.plan();
        for (rank, (_, _, reports, bytes)) in sent.iter().enumerate() {
            let sizes = |bytes: fn(&SyncPlan, usize, usize) -> usize| {
                (0..case.tensor_parallel).map(|tp_rank| bytes(&plan, rank, tp_rank)).sum::<usize>()
            };
            let trailers = (0..plan.num_buckets()).map(|bucket| plan.trailer_bytes(bucket)).sum::<usize>();
            let messages = sizes(SyncPlan::weight_bytes) + case.tensor_parallel * trailers;
            assert_eq!(*bytes as usize, 2 * messages, "{case:?}");
            assert!(reports.iter().all(|report| report.bytes == sizes(SyncPlan::weight_bytes)), "{case:?}");
        }
        for (tp_rank, versions) in &received {
            for ((report, tensors), expected) in versions.iter().zip([&sent[0].0, &sent[0].1]) {
                assert_slices(case, *tp_rank, tensors, expected);
                assert_eq!(report.bytes, slice_bytes(case, *tp_rank), "{case:?}");
            }
        }
        for version in 0..2 {
            let of_one_replica = received[..case.tensor_parallel].iter().map(|(_, versions)| &versions[version].0);
            assert_eq!(checksum(sent.iter().map(|(_, _, reports, _)| &reports[version])), checksum(of_one_replica));
        }
    }
}

fn slice_bytes(case: &Case, tp_rank: usize) -> usize {
    let part = TensorParallelPart { rank: tp_rank, size: case.tensor_parallel };
    case.shape().sliced(part).unwrap().num_params() as usize * case.kind.elt_size_in_bytes()
}

/// WS-4, WS-5, WS-6: one wrong bit is found and named; nothing is sampled with until a whole sync has succeeded.
#[test]
fn a_spoilt_bucket_is_named_and_its_version_refused() {
    let case = Case { tensor_parallel: 2, ..SMALL };
    // A weight among short runs; the first sum of long ones, behind the version.
    let (short, long) = (Case { pack_below: usize::MAX, ..case }, Case { pack_below: 0, ..case });
    run(
        &[short, long],
        |case, state, mut sender| {
            sender.publish(&state, 1).unwrap();
            let spoil: fn(usize, &mut [u8]) = match case.pack_below {
                0 => |bucket, bytes| bytes[8] ^= u8::from(bucket == 2),
                _ => |bucket, bytes| bytes[0] ^= u8::from(bucket == 2),
            };
            sender.spoil = (state.sharding().group.rank() == 1).then_some(spoil);
            sender.publish(&state, 2).unwrap();
            sender.spoil = None;
            sender.publish(&state, 3).unwrap();
        },
        |_, _, mut receiver| {
            let refusal = |receiver: &BroadcastReceiver, version| receiver.check(version).unwrap_err().to_string();
            assert!(refusal(&receiver, 1).contains("has got none yet"));
            receiver.receive(1).unwrap();
            receiver.check(1).unwrap();
            let error = receiver.receive(2).unwrap_err().to_string();
            assert!(
                error.contains("weight sync: bucket 2, unit `layer 0` from trainer 1: arrived with checksum"),
                "{error}"
            );
            for version in [1, 2] {
                let refusal = refusal(&receiver, version);
                assert!(
                    refusal.contains("weights of version 2 arrived only in part (weight sync: bucket 2"),
                    "{refusal}"
                );
            }
            receiver.receive(3).unwrap();
            receiver.check(3).unwrap();
            let refusal = refusal(&receiver, 4);
            assert!(refusal.contains("version 4 are asked for, and this generator holds version 3"), "{refusal}");
        },
    );
}

/// WS-4: sides that speak of different versions find out at the first bucket, and are in step afterwards.
#[test]
fn another_version_is_refused() {
    run(
        &[SMALL],
        |_, state, mut sender| [4, 6].map(|version| sender.publish(&state, version).unwrap()),
        |_, _, mut receiver| {
            let error = receiver.receive(5).unwrap_err().to_string();
            assert!(
                error.contains("bucket 0 from trainer 0 carries version 4, and version 5 is to be received"),
                "{error}"
            );
            assert!(receiver.check(4).is_err() && receiver.check(5).is_err());
            receiver.receive(6).unwrap();
            receiver.check(6).unwrap();
        },
    );
}

/// WS-5: a trainer that goes away in the middle of a sync leaves a generator that refuses to sample.
#[test]
fn a_trainer_that_goes_in_the_middle_leaves_nothing_to_sample_with() {
    run(
        &[SMALL],
        |_, state, mut sender| {
            sender.publish(&state, 1).unwrap();
            if state.sharding().group.rank() == 1 {
                sender.spoil = Some(|bucket, _| assert!(bucket < 2, "this trainer goes away here"));
            }
            let published = catch_unwind(AssertUnwindSafe(|| sender.publish(&state, 2)));
            assert_eq!(published.is_err(), state.sharding().group.rank() == 1);
        },
        |_, _, mut receiver| {
            receiver.receive(1).unwrap();
            let before = receiver.tensors()["embedding"].copy();
            let error = receiver.receive(2).unwrap_err().to_string();
            assert!(error.contains("weights of version 2, bucket"), "{error}");
            assert_eq!(receiver.tensors()["embedding"], before, "the trainers' weights are the same ones");
            for version in [1, 2] {
                let refusal = receiver.check(version).unwrap_err().to_string();
                assert!(refusal.contains("weights of version 2 arrived only in part"), "{refusal}");
            }
        },
    );
}

fn map(sender: &SharedSender) -> LiveMap {
    let fd = sender.writer().segment().as_fd().try_clone_to_owned().unwrap();
    LiveSegment::from_fd(fd).unwrap().map().unwrap()
}

fn senders(case: &Case) -> Vec<SharedSender> {
    (0..case.trainers).map(|trainer| SharedSender::new(case.plan(), trainer).unwrap()).collect()
}

fn receiver(case: &Case, tp_rank: usize, senders: &[SharedSender], patience: Duration) -> SharedReceiver {
    SharedReceiver::new(case.plan(), tp_rank, senders.iter().map(map).collect(), patience).unwrap()
}

/// WS-2, WS-8: the same through shared memory, where what lies in one trainer's part is not copied.
#[test]
fn shared_slices_are_the_exported_state() {
    let cases = cases();
    let mut by_rank: Vec<_> = ranks(4, |rank, at| {
        let of_trainer = |(index, case): (usize, &Case)| {
            let group = trainers(case, &format!("case {index}"), at, rank);
            let mut sender = SharedSender::new(case.plan(), rank).unwrap();
            let mut state = case.state(group, 1.0);
            sender.publish(&state, 1).unwrap();
            change(case, &mut state, 2.0);
            (exported(&state), sender.publish(&state, 2).unwrap(), sender)
        };
        let mine = cases.iter().enumerate().filter(|(_, case)| rank < case.trainers);
        mine.map(of_trainer).collect::<Vec<_>>().into_iter()
    });
    for case in &cases {
        let mut sent: Vec<_> = by_rank[..case.trainers].iter_mut().map(|mine| mine.next().unwrap()).collect();
        let exported = std::mem::take(&mut sent[0].0);
        let reports: Vec<SyncReport> = sent.iter().map(|(_, report, _)| *report).collect();
        let senders: Vec<SharedSender> = sent.into_iter().map(|(_, _, sender)| sender).collect();
        let mut received = Vec::new();
        for (_, tp_rank) in case.generators() {
            let mut receiver = receiver(case, tp_rank, &senders, Duration::ZERO);
            received.push(receiver.receive(2).unwrap());
            receiver.check(2).unwrap();
            assert_slices(case, tp_rank, receiver.tensors(), &exported);
            let (copied, bytes) = (receiver.copied_bytes(), slice_bytes(case, tp_rank));
            assert_eq!(received.last().unwrap().bytes, bytes, "{case:?}");
            assert!(if case.trainers == 1 { copied == 0 } else { copied < bytes }, "{case:?}: {copied} of {bytes}");

            let own = case.blank(tp_rank);
            let maps = senders.iter().map(map).collect();
            let mut copying = SharedReceiver::copying(case.plan(), tp_rank, maps, &own, Duration::ZERO).unwrap();
            copying.receive(2).unwrap();
            assert_slices(case, tp_rank, &own, &exported);
            assert_eq!(copying.copied_bytes(), bytes);
        }
        assert_eq!(checksum(reports.iter()), checksum(received[..case.tensor_parallel].iter()), "{case:?}");
    }
}

/// WS-4, WS-5, WS-6 through shared memory.
#[test]
fn shared_weights_that_are_not_whole_are_refused() {
    let case = Case { trainers: 1, stage: 0, ..SMALL };
    let state = case.state(ProcessGroup::solo(), 1.0);
    let mut senders = senders(&case);
    let mut receiver = receiver(&case, 0, &senders, Duration::from_millis(200));
    assert!(receiver.check(1).unwrap_err().to_string().contains("has got none yet"));

    let error = receiver.receive(1).unwrap_err().to_string();
    assert!(error.contains("version 1: trainer 0 wrote nothing of unit `embedding` for 0 s"), "{error}");
    senders[0].publish(&state, 1).unwrap();
    receiver.receive(1).unwrap();
    receiver.check(1).unwrap();

    senders[0].publish(&state, 2).unwrap();
    let refusal = receiver.check(1).unwrap_err().to_string();
    assert!(refusal.contains("version 1 are being overwritten: trainer 0 has begun version 2"), "{refusal}");
    let error = receiver.receive(1).unwrap_err().to_string();
    assert!(error.contains("trainer 0 writes version 2, and version 1 is to be received"), "{error}");

    senders[0].spoil();
    let error = receiver.receive(2).unwrap_err().to_string();
    assert!(error.contains("unit `head` from trainer 0: arrived with checksum"), "{error}");
    let refusal = receiver.check(2).unwrap_err().to_string();
    assert!(refusal.contains("weights of version 2 arrived only in part"), "{refusal}");
    senders[0].publish(&state, 3).unwrap();
    receiver.receive(3).unwrap();
    receiver.check(3).unwrap();

    let other = Case { bucket_bytes: 900, ..case };
    let error = SharedReceiver::new(other.plan(), 0, vec![map(&senders[0])], Duration::ZERO).err().unwrap().to_string();
    assert!(error.contains("the segment of trainer 0 is of another plan"), "{error}");
}

#[test]
fn what_cannot_be_planned_or_does_not_fit_is_refused() {
    let plan = |trainers, replicas, slices| {
        let config = SyncConfig::new(trainers, replicas, slices, Kind::Float);
        SyncPlan::new(&shape(true, false), config).err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert_eq!(plan(2, 1, 2), "");
    assert!(plan(0, 1, 1).contains("between 0 trainers and 1 generators"));
    assert!(plan(1, 1, 3).contains("3 ranks cannot share 4 heads"), "{}", plan(1, 1, 3));

    let case = Case { trainers: 1, stage: 0, ..SMALL };
    let copying = |tensors: &Tensors| {
        let maps = senders(&case).iter().map(map).collect();
        SharedReceiver::copying(case.plan(), 0, maps, tensors, Duration::ZERO).err().unwrap().to_string()
    };
    let mut tensors = case.blank(0);
    tensors.insert("0.q".into(), Tensor::zeros([3, 12], tch::kind::FLOAT_CPU));
    assert!(
        copying(&tensors)
            .contains("the generator's `0.q` is Float [3, 12], and its slice is a contiguous Float [16, 12]")
    );
    tensors.remove("0.q");
    assert!(copying(&tensors).contains("the generator has no tensor `0.q`"));

    let state = Case { tied: false, ..case }.state(ProcessGroup::solo(), 1.0);
    let error = senders(&case)[0].publish(&state, 1).unwrap_err().to_string();
    assert!(error.contains("planned for a model of another shape"), "{error}");
}
