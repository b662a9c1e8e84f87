//! Orders, mixes and positions.

use echelon_tasks::data::{DataError, Draw, Mix, MixSource, RowStream, StreamPosition, permutation};
use serde_json::Value;

use crate::golden;

#[test]
fn orders_equal_the_scripts() {
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(golden("permutations.json")).unwrap()).unwrap();
    assert_eq!(cases.len(), 7);
    for case in &cases {
        let number = |key: &str| case[key].as_u64().unwrap();
        let expected: Vec<usize> = serde_json::from_value(case["order"].clone()).unwrap();
        assert_eq!(permutation(number("len") as usize, number("seed"), number("stream"), number("epoch")), expected);
    }
}

fn mix(sizes_and_weights: &[(usize, f64)]) -> Mix<String> {
    let source = |(index, &(len, weight)): (usize, &(usize, f64))| {
        let rows = (0..len).map(|row| format!("{index}/{row}")).collect();
        MixSource { name: format!("source {index}"), weight, rows }
    };
    Mix::new(sizes_and_weights.iter().enumerate().map(source).collect()).unwrap()
}

fn stream(seed: u64) -> RowStream<String> {
    RowStream::new(mix(&[(7, 5.0), (40, 3.0), (1, 0.5)]), seed)
}

/// ST-1.
#[test]
fn every_pass_holds_each_row_once_in_an_order_of_its_own() {
    let mut stream = RowStream::new(mix(&[(50, 1.0)]), 3);
    let passes: Vec<Vec<usize>> = (0..4)
        .map(|pass| {
            let draws = stream.next_batch(50);
            assert!(draws.iter().all(|draw| draw.epoch == pass));
            draws.iter().map(|draw| draw.id.index).collect()
        })
        .collect();
    for (pass, order) in passes.iter().enumerate() {
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
        assert!(!passes[..pass].contains(order));
    }
    let draws = stream.next_batch(75);
    assert_eq!((draws[49].epoch, draws[50].epoch), (4, 5));
    assert_eq!(stream.row(draws[0].id), &format!("0/{}", draws[0].id.index));
}

/// ST-2, for mixes of any kind and every number of draws.
#[test]
fn weights_are_kept_at_every_draw() {
    for weights in [
        vec![1.0, 1.0],
        vec![0.9, 0.1],
        vec![3.0, 2.0, 1.0],
        vec![1e300, 1e300, 1e298],
        vec![1.0; 7],
        vec![100.0, 1.0, 1.0, 7.5],
    ] {
        let sources: Vec<_> = weights.iter().enumerate().map(|(index, &weight)| (index + 3, weight)).collect();
        let mut stream = RowStream::new(mix(&sources), 1);
        let mut counts = vec![0_u32; weights.len()];
        let total: f64 = weights.iter().map(|weight| weight / 1e300).sum::<f64>();
        for num_draws in 1..=3000 {
            counts[stream.next_batch(1)[0].id.source] += 1;
            for (count, weight) in counts.iter().zip(&weights) {
                let share = weight / 1e300 / total * f64::from(num_draws);
                let count = f64::from(*count);
                let behind = (weights.len() - 1) as f64;
                assert!(count < share + 1.0 + 1e-6, "{weights:?}: {count} of {num_draws}, share {share}");
                assert!(count > share - behind - 1e-6, "{weights:?}: {count} of {num_draws}, share {share}");
            }
        }
    }
}

/// ST-3, at every one of 150 positions, through JSON, with the batches cut anywhere.
#[test]
fn a_restored_stream_goes_on_as_the_first_one() {
    let whole: Vec<Draw> = stream(11).next_batch(300);
    for taken in 0..150 {
        let mut first = stream(11);
        let _ = (first.next_batch(taken / 3), first.next_batch(taken - taken / 3));
        let saved = serde_json::to_string(&first.position()).unwrap();
        let position: StreamPosition = serde_json::from_str(&saved).unwrap();

        let mut second = stream(11);
        second.next_batch(taken % 13); // wherever it stood before
        second.restore(&position).unwrap();
        assert_eq!(second.position(), position);
        assert_eq!(second.next_batch(150), whole[taken..taken + 150], "after {taken} rows");
        assert_eq!(first.next_batch(150), whole[taken..taken + 150]);
    }
}

#[test]
fn other_seeds_give_other_orders() {
    assert_ne!(stream(1).next_batch(50), stream(2).next_batch(50));
    assert_eq!(stream(1).next_batch(50), stream(1).next_batch(50));
}

#[test]
fn a_position_of_other_data_is_refused() {
    let mut saved = stream(1);
    saved.next_batch(20);
    let position = saved.position();
    let refused = |mut stream: RowStream<String>| {
        let before = stream.position();
        let message = stream.restore(&position).unwrap_err().to_string();
        assert_eq!(stream.position(), before);
        message
    };
    let refused_mix = |sources: &[(usize, f64)]| refused(RowStream::new(mix(sources), 1));
    assert!(refused(stream(2)).contains("the seed was 1 when it was saved and is 2 now"));
    assert!(refused_mix(&[(7, 5.0), (40, 3.0)]).contains("the number of sources was 3 when it was saved and is 2 now"));
    assert!(
        refused_mix(&[(7, 5.0), (41, 3.0), (1, 0.5)])
            .contains("was [7, 40, 1] when it was saved and is [7, 41, 1] now")
    );
    assert!(refused_mix(&[(7, 5.0), (40, 3.5), (1, 0.5)]).contains("the hash of the rows and weights"));
    let renamed = Mix::new(vec![
        MixSource { name: String::new(), weight: 5.0, rows: (0..7).map(|row| format!("0/{row}")).collect() },
        MixSource {
            name: String::new(),
            weight: 3.0,
            rows: (0..40).map(|row| format!("1/{}", row / 39 + row)).collect(),
        },
        MixSource { name: String::new(), weight: 0.5, rows: vec!["2/0".to_owned()] },
    ]);
    assert!(refused(RowStream::new(renamed.unwrap(), 1)).contains("the hash of the rows and weights"));
}

#[test]
fn mixes_that_mean_nothing_are_refused() {
    assert!(matches!(Mix::<u8>::new(vec![]), Err(DataError::NoSource)));
    let source = |weight, rows| MixSource { name: "reviews".to_owned(), weight, rows };
    let message = |weight, rows| Mix::new(vec![source(1.0, vec![1]), source(weight, rows)]).unwrap_err().to_string();
    assert_eq!(message(1.0, vec![]), "data source reviews: it has no rows");
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(
            message(weight, vec![1]),
            format!("data source reviews: weight {weight} must be a finite number above 0")
        );
    }
}
