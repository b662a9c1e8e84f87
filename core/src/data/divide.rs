//! Which rows go where: shares of ranks, and micro-batches.

/// The rows of each rank, by index into the request's rows, in rising order.
pub type Shares = Vec<Vec<i64>>;

/// Deals rows so that ranks get about as many tokens: the longest first, each to the rank with the fewest so far.
/// Neighbouring rows of a `unit` (2 of a pair) stay together.
pub fn deal(lengths: &[i64], unit: usize, ranks: usize) -> Shares {
    let units: Vec<i64> = lengths.chunks(unit).map(|rows| rows.iter().sum()).collect();
    let mut order: Vec<usize> = (0..units.len()).collect();
    order.sort_by_key(|&unit| (std::cmp::Reverse(units[unit]), unit));
    let mut shares = vec![Vec::new(); ranks];
    let mut tokens = vec![0; ranks];
    for unit in order {
        let rank = (0..ranks).min_by_key(|&rank| tokens[rank]).expect("at least one rank");
        tokens[rank] += units[unit];
        shares[rank].push(unit as i64);
    }
    shares.iter_mut().for_each(|units| units.sort_unstable());
    shares.iter().map(|units| rows_of(units, unit)).collect()
}

/// Where each of the request's rows stands in the ranks' answers laid end to end.
pub(crate) fn places(shares: &Shares) -> Vec<i64> {
    let mut places = vec![0; shares.iter().map(Vec::len).sum()];
    for (place, &row) in shares.iter().flatten().enumerate() {
        places[row as usize] = place as i64;
    }
    places
}

/// Splits rows, in order, into micro-batches of at most `budget` tokens each, which never part a `unit`; a longer one is
/// alone.
pub fn micro_batches(lengths: &[i64], unit: usize, budget: i64) -> Vec<Vec<i64>> {
    let mut batches: Vec<Vec<i64>> = Vec::new();
    let mut used = 0;
    for (index, rows) in lengths.chunks(unit).enumerate() {
        let length = rows.iter().sum::<i64>();
        if batches.is_empty() || used + length > budget {
            batches.push(Vec::new());
            used = 0;
        }
        used += length;
        batches.last_mut().expect("just pushed").extend(rows_of(&[index as i64], unit));
    }
    batches
}

/// The rows of units.
pub(crate) fn rows_of(units: &[i64], unit: usize) -> Vec<i64> {
    let unit = unit as i64;
    units.iter().flat_map(|&index| index * unit..(index + 1) * unit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_dealt_by_tokens() {
        let lengths = [9, 1, 5, 5, 1, 1, 8, 2];
        for ranks in 1..5 {
            let shares = deal(&lengths, 1, ranks);
            let mut rows: Vec<i64> = shares.concat();
            rows.sort_unstable();
            assert_eq!(rows, (0..8).collect::<Vec<i64>>());
            let tokens: Vec<i64> =
                shares.iter().map(|rows| rows.iter().map(|&row| lengths[row as usize]).sum()).collect();
            assert!(tokens.iter().max().unwrap() - tokens.iter().min().unwrap() <= 2, "{tokens:?}");
            assert!(shares.iter().all(|rows| rows.is_sorted()));
        }
        assert_eq!(deal(&[3], 1, 3), [vec![0], vec![], vec![]]);
    }

    #[test]
    fn pairs_stay_together() {
        let lengths = [5, 5, 9, 9, 2, 2, 6, 6];
        assert_eq!(deal(&lengths, 2, 2), [[2, 3, 4, 5], [0, 1, 6, 7]]);
        assert_eq!(micro_batches(&lengths, 2, 20), [vec![0, 1], vec![2, 3], vec![4, 5, 6, 7]]);
        assert_eq!(micro_batches(&lengths, 1, 20), [vec![0, 1, 2], vec![3, 4, 5, 6], vec![7]]);
    }
}
