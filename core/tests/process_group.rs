//! Groups of ranks on one machine. Ranks are threads here, each with its own sockets: to c10d they are processes.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup, Standing};
use tch::{Kind, Tensor};

const LOOPBACK: &str = "127.0.0.1";

/// Runs `each` on the threads of `size` ranks of one group and gives what each returns, in order.
fn ranks<T: Send>(size: usize, patience: Patience, each: impl Fn(&ProcessGroup) -> T + Sync) -> Vec<T> {
    let point = MeetingPoint::serve(LOOPBACK, 0).unwrap();
    let port = point.port();
    std::thread::scope(|scope| {
        let run = |rank| {
            let each = &each;
            scope.spawn(move || {
                let point = MeetingPoint::join(LOOPBACK, port, patience).unwrap();
                let group = ProcessGroup::join(&point, "test", (rank, size), LOOPBACK, patience).unwrap();
                each(&group)
            })
        };
        let threads: Vec<_> = (0..size).map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn patient_for(progress: Duration) -> Patience {
    Patience { progress, ..Patience::default() }
}

fn numbers(values: &[f64], kind: Kind) -> Tensor {
    Tensor::from_slice(values).to_kind(kind)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

#[test]
fn collectives_do_what_they_say_for_every_size_and_dtype() {
    for size in [1usize, 2, 3] {
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
            let results = ranks(size, Patience::default(), |group| {
                let rank = group.rank() as f64;
                let full: Vec<f64> = (0..2 * size).map(|i| i as f64 + 10.0 * rank).collect();
                let full = numbers(&full, kind);
                let summed = full.copy();
                group.all_reduce_sum("sum", &summed).unwrap();
                let part = group.start_reduce_scatter("scatter", &full.copy()).unwrap().sum().unwrap();
                let gathered = summed.zeros_like();
                group.start_all_gather("gather", &gathered, &part).unwrap().wait().unwrap();
                let in_place = summed.zeros_like();
                group.start_all_gather_in_place("gather", &in_place, &part).unwrap().wait().unwrap();
                assert_eq!(in_place, gathered);
                let mine = in_place.chunk(size as i64, 0).swap_remove(group.rank());
                group.start_all_gather_in_place("gather", &in_place, &mine).unwrap().wait().unwrap();
                assert_eq!(in_place, gathered, "of parts that are where they belong");
                let exchanged = group.all_to_all("exchange", &full).unwrap();
                let sent = full.copy();
                group.broadcast("broadcast", &sent, size - 1).unwrap();
                let bytes = group.gather_bytes("bytes", &vec![7; group.rank() * 3]).unwrap();
                group.barrier("end").unwrap();
                let total = group.sum("one number", rank + 0.5).unwrap();
                (values(&summed), values(&gathered), values(&exchanged), values(&sent), bytes, total)
            });
            let n = size as f64;
            let expected: Vec<f64> = (0..2 * size).map(|i| n * i as f64 + 10.0 * n * (n - 1.0) / 2.0).collect();
            for (rank, (summed, gathered, exchanged, sent, bytes, total)) in results.into_iter().enumerate() {
                assert_eq!(summed, expected, "sum, {size} ranks of {kind:?}");
                assert_eq!(gathered, expected, "reduce-scatter, then all-gather");
                let from = |i: usize| (2 * rank + i % 2) as f64 + 10.0 * (i / 2) as f64;
                assert_eq!(exchanged, (0..2 * size).map(from).collect::<Vec<_>>());
                assert_eq!(sent, (0..2 * size).map(|i| i as f64 + 10.0 * (n - 1.0)).collect::<Vec<_>>());
                assert_eq!(bytes, (0..size).map(|rank| vec![7; rank * 3]).collect::<Vec<_>>());
                assert_eq!(total, n * (n - 1.0) / 2.0 + 0.5 * n);
            }
        }
    }
}

#[test]
fn ranks_send_to_each_other_and_count_their_bytes() {
    let bytes = ranks(2, Patience::default(), |group| {
        let tensor = numbers(&[1.0, 2.0, 3.0], Kind::Float);
        if group.rank() == 0 {
            group.send("hand over", &tensor, 1, 5).unwrap();
        } else {
            let received = tensor.zeros_like();
            group.recv("take", &received, 0, 5).unwrap();
            assert_eq!(received, tensor);
        }
        let before = group.bytes_sent();
        group
            .start_all_gather(
                "gather",
                &Tensor::zeros([8], tch::kind::FLOAT_CPU),
                &Tensor::zeros([4], tch::kind::FLOAT_CPU),
            )
            .unwrap()
            .wait()
            .unwrap();
        (before, group.bytes_sent() - before)
    });
    assert_eq!(bytes, [(12, 16), (0, 16)]);
}

#[test]
fn a_rank_that_stands_still_is_named_with_its_place() {
    let patience = patient_for(Duration::from_secs(2));
    let errors = ranks(3, patience, |group| {
        group.barrier("begin").unwrap();
        if group.rank() == 1 {
            std::thread::sleep(Duration::from_secs(5));
            return String::new();
        }
        group.all_reduce_sum("reduce layer 4", &Tensor::zeros([4], tch::kind::FLOAT_CPU)).unwrap_err().to_string()
    });
    let expected =
        "rank 0 of 3: reduce layer 4 (test #2) waits, and for 2 s there is no progress: rank 1 is at begin (#1)";
    assert_eq!(errors[0], expected);
    assert!(errors[2].ends_with("rank 1 is at begin (#1)"), "{}", errors[2]);
}

#[test]
fn a_slow_rank_that_works_is_waited_for() {
    let patience = patient_for(Duration::from_secs(2));
    ranks(2, patience, |group| {
        if group.rank() == 1 {
            for _ in 0..8 {
                std::thread::sleep(Duration::from_millis(500));
                group.made_progress();
            }
        }
        group.barrier("meet").unwrap();
    });
}

/// A message that comes late breaks nothing: Gloo itself closes every connection when a wait for one times out.
#[test]
fn messages_cross_in_every_dtype_and_may_come_late() {
    ranks(2, Patience::default(), |group| {
        let other = 1 - group.rank();
        for (tag, kind) in [Kind::Float, Kind::BFloat16].into_iter().enumerate() {
            let mine = numbers(&[1.5, group.rank() as f64], kind);
            let received = mine.zeros_like();
            let receiving = group.start_recv("take", &received, other, tag as i32).unwrap();
            if group.rank() == 0 {
                std::thread::sleep(Duration::from_millis(1300));
            }
            let sending = group.start_send("hand over", &mine, other, tag as i32).unwrap();
            receiving.wait().unwrap();
            sending.wait().unwrap();
            assert_eq!(values(&received), [1.5, other as f64]);
        }
        group.barrier("still together").unwrap();
    });
}

/// Three operations begun before any is waited for, and waited for in another order.
#[test]
fn operations_in_flight_keep_their_tensors() {
    let size = 3;
    ranks(size, Patience::default(), |group| {
        let rank = group.rank() as f64;
        let summing = numbers(&[rank, 1.0], Kind::BFloat16);
        let sum = group.start_all_reduce_sum("sum", &summing).unwrap();
        let sent = numbers(&[7.0 + rank], Kind::Float);
        let broadcast = group.start_broadcast("broadcast", &sent, 2).unwrap();
        let exchange = {
            let parts = numbers(&[0.0, 1.0, 2.0], Kind::BFloat16) + rank * 10.0;
            group.start_all_to_all("exchange", &parts).unwrap()
        };
        assert_eq!(values(&exchange.parts().unwrap()), [rank, rank + 10.0, rank + 20.0]);
        broadcast.wait().unwrap();
        sum.wait().unwrap();
        assert_eq!((values(&summing), values(&sent)), (vec![3.0, 3.0], vec![9.0]));
    });
}

#[test]
fn some_ranks_of_a_group_are_a_group() {
    let sums = ranks(4, Patience::default(), |group| {
        let outer = group.subgroup("outer", &[3, 0]).unwrap();
        let inner = group.subgroup("inner", &[1, 2]).unwrap();
        let alone = group.subgroup(&format!("alone {}", group.rank()), &[group.rank()]).unwrap().unwrap();
        assert_eq!(alone.sum("alone", 5.0).unwrap(), 5.0);
        assert!(outer.is_some() != inner.is_some());
        let mine = outer.or(inner).unwrap();
        let sum = mine.sum("ranks", group.rank() as f64).unwrap();
        assert_eq!(group.sum("all", 1.0).unwrap(), 4.0, "the whole group goes on");
        let error = group.subgroup("wrong", &[0, 4]).err().unwrap().to_string();
        assert!(error.contains("sub-group `wrong` of ranks [0, 4]: group `test` has ranks 0 to 3"), "{error}");
        assert!(group.subgroup("twice", &[1, 1]).is_err() && group.subgroup("none", &[]).is_err());
        (mine.rank(), mine.size(), sum)
    });
    assert_eq!(sums, [(1, 2, 3.0), (0, 2, 3.0), (1, 2, 3.0), (0, 2, 3.0)]);
}

#[test]
fn a_stall_is_told_with_operation_number_and_micro_batch() {
    let errors = ranks(2, patient_for(Duration::from_secs(2)), |group| {
        group.barrier("begin").unwrap();
        group.at_micro_batch(3 + group.rank() as u64);
        if group.rank() == 1 {
            std::thread::sleep(Duration::from_secs(4));
            return String::new();
        }
        group.barrier("meet").unwrap_err().to_string()
    });
    assert_eq!(
        errors[0],
        "rank 0 of 2: meet (test #2, micro-batch 3) waits, and for 2 s there is no progress: rank 1 is at begin (#1, \
         micro-batch 4)"
    );
}

#[test]
fn a_rank_tells_where_it_stands() {
    let group = ProcessGroup::solo();
    group.at_micro_batch(2);
    group.made_progress();
    assert_eq!(group.standing(), Standing { operation: String::new(), sequence: 0, micro_batch: 2, work: 1 });
}

/// Ranks 0 and 2 wait for rank 1 until their patience ends, with operations in flight. Their group closes at once, and all
/// three meet again under the same name; what rank 1 still has of the old group is refused, with the reason.
#[test]
fn a_group_that_timed_out_is_torn_down_and_rebuilt() {
    let patience = patient_for(Duration::from_secs(2));
    ranks(3, patience, |group| {
        group.barrier("begin").unwrap();
        if group.rank() == 1 {
            std::thread::sleep(Duration::from_millis(3500));
        }
        let big = Tensor::ones([1 << 20], tch::kind::FLOAT_CPU);
        let (first, second) = (big.copy(), big.copy());
        let begun = Instant::now();
        let in_flight = group.start_all_reduce_sum("first", &first);
        let error = match in_flight {
            Ok(in_flight) => {
                let behind = group.start_all_reduce_sum("second", &second);
                let error = in_flight.wait().unwrap_err().to_string();
                drop(behind);
                error
            }
            Err(error) => error.to_string(),
        };
        assert!(error.contains("rank 1 is at begin (#1)"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(4), "the end took {:?}", begun.elapsed());
        let refused = group.barrier("of no use").unwrap_err().to_string();
        assert!(refused.contains("the group was given up: ") && refused.contains("rank 1 is at begin"), "{refused}");
        let again = group.rebuild().unwrap();
        assert_eq!(again.sum("ranks", again.rank() as f64).unwrap(), 3.0);
        let inner = again.subgroup("pair", &[0, 1]).unwrap();
        assert_eq!(inner.map(|pair| pair.sum("pair", 1.0).unwrap()), (again.rank() < 2).then_some(2.0));
    });
}

/// Rank 1's worker ends without a word, and another takes its place while rank 0 rebuilds. Neither reads what the first
/// generation left in the store.
#[test]
fn a_worker_that_took_anothers_place_meets_the_survivors() {
    let point = MeetingPoint::serve(LOOPBACK, 0).unwrap();
    let patience = Patience { join: Duration::from_secs(20), ..patient_for(Duration::from_secs(2)) };
    let (first, port) = (&point, point.port());
    std::thread::scope(|scope| {
        let join = move |rank| {
            let point = MeetingPoint::join(LOOPBACK, port, patience).unwrap();
            ProcessGroup::join(&point, "ranks", (rank, 2), LOOPBACK, patience).unwrap()
        };
        let survivor = scope.spawn(move || {
            let group = ProcessGroup::join(first, "ranks", (0, 2), LOOPBACK, patience).unwrap();
            group.barrier("begin").unwrap();
            let error = group.barrier("alone").unwrap_err().to_string();
            assert!(error.contains("rank 0 of 2: alone (ranks #2)"), "{error}");
            let group = group.rebuild().unwrap();
            group.sum("again", 1.0).unwrap()
        });
        let lost = scope.spawn(move || {
            let group = join(1);
            group.barrier("begin").unwrap();
        });
        lost.join().unwrap();
        let successor = scope.spawn(move || join(1).sum("again", 1.0).unwrap());
        assert_eq!((survivor.join().unwrap(), successor.join().unwrap()), (2.0, 2.0));
    });
}

#[test]
fn who_is_missing_is_named_and_may_come_later() {
    let point = MeetingPoint::serve(LOOPBACK, 0).unwrap();
    let patience = Patience { join: Duration::from_millis(300), ..Patience::default() };
    let join = |rank, size| ProcessGroup::join(&point, "test", (rank, size), LOOPBACK, patience).err().unwrap();
    for _ in 0..2 {
        let error = join(2, 4).to_string();
        assert!(error.contains("rank 2 of group `test` waits for ranks 0, 1, 3 of 4"), "{error}");
    }
    assert!(join(4, 4).to_string().contains("no rank 4"));
    // A join that failed has left nothing behind.
    std::thread::scope(|scope| {
        let (patience, port) = (Patience::default(), point.port());
        let join = |rank| {
            scope.spawn(move || {
                let point = MeetingPoint::join(LOOPBACK, port, patience).unwrap();
                ProcessGroup::join(&point, "test", (rank, 2), LOOPBACK, patience).unwrap().size()
            })
        };
        assert_eq!([join(0), join(1)].map(|thread| thread.join().unwrap()), [2, 2]);
    });
    let taken = MeetingPoint::serve(LOOPBACK, point.port()).err().unwrap().to_string();
    assert!(taken.contains(&format!("127.0.0.1:{}", point.port())), "{taken}");
}

#[test]
fn two_workers_on_one_rank_are_told() {
    let point = MeetingPoint::serve(LOOPBACK, 0).unwrap();
    let patience = |seconds| Patience { join: Duration::from_secs(seconds), ..Patience::default() };
    std::thread::scope(|scope| {
        let point = &point;
        scope.spawn(move || ProcessGroup::join(point, "test", (1, 3), LOOPBACK, patience(3)).err().unwrap());
        std::thread::sleep(Duration::from_millis(500));
        let error = ProcessGroup::join(point, "test", (1, 3), LOOPBACK, patience(1)).err().unwrap().to_string();
        assert!(error.contains("two workers claim rank 1 of group `test` at 127.0.0.1:"), "{error}");
    });
}

/// What warnings say.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<String>>>);

impl tracing::field::Visit for Heard {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.0.lock().unwrap().push(format!("{value:?}"));
        }
    }
}

impl tracing::Subscriber for Heard {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        event.record(&mut self.clone());
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn while_ranks_are_missing_they_are_named_again_and_again() {
    assert_eq!(Patience::scheduled().join, Duration::from_secs(600));
    assert_eq!(Patience::scheduled().remind, Duration::from_secs(30));
    let point = MeetingPoint::serve(LOOPBACK, 0).unwrap();
    let patience =
        Patience { join: Duration::from_secs(1), remind: Duration::from_millis(300), ..Patience::scheduled() };
    let heard = Heard::default();
    tracing::subscriber::with_default(heard.clone(), || {
        ProcessGroup::join(&point, "test", (0, 3), LOOPBACK, patience).err().unwrap()
    });
    let heard = heard.0.lock().unwrap();
    assert!(heard.len() >= 2, "{heard:?}");
    assert!(heard.iter().all(|message| message.starts_with("waiting for ranks 1, 2 of 3 since ")), "{heard:?}");
}
