//! The order of rows, from the seed alone.
//!
//! A permutation of `n` rows is Fisher–Yates fed by SplitMix64 (Steele, Lea and Flood 2014), whose state starts at a
//! mix of seed, stream and epoch. Both are written out here rather than taken from a crate: the order is part of
//! what a seed means, and must not change with a dependency's version.

/// The order of `len` rows in pass number `epoch` of stream number `stream`.
///
/// Each index from 0 to `len - 1` appears once; equal arguments give equal orders on every machine.
pub fn permutation(len: usize, seed: u64, stream: u64, epoch: u64) -> Vec<usize> {
    let mut random = SplitMix64::keyed([seed, stream, epoch]);
    let mut order: Vec<usize> = (0..len).collect();
    for last in (1..len).rev() {
        let chosen = random.below(last as u64 + 1) as usize;
        order.swap(last, chosen);
    }
    order
}

/// Splits rows into a training part and `num_held_out` rows set aside (all but one row at most), chosen by `seed`;
/// both keep the order of the rows.
pub fn hold_out<T>(rows: Vec<T>, num_held_out: usize, seed: u64) -> (Vec<T>, Vec<T>) {
    /// Keeps the choice apart from the epochs' orders of the same seed.
    const HOLD_OUT_STREAM: u64 = u64::MAX;
    let num_held_out = num_held_out.min(rows.len().saturating_sub(1));
    let mut is_held_out = vec![false; rows.len()];
    for &index in permutation(rows.len(), seed, HOLD_OUT_STREAM, 0).iter().take(num_held_out) {
        is_held_out[index] = true;
    }
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    for (row, out) in rows.into_iter().zip(is_held_out) {
        if out { held_out.push(row) } else { train.push(row) }
    }
    (train, held_out)
}

struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    /// A generator of its own for each list of words: each word is mixed into what the ones before it gave.
    fn keyed(words: [u64; 3]) -> Self {
        let mut state = 0;
        for word in words {
            state = Self { state: state ^ word }.next();
        }
        Self { state }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, each equally likely: the high word of a product (Lemire 2019), where the few
    /// products that would favour some numbers are drawn again.
    fn below(&mut self, bound: u64) -> u64 {
        let unfair = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            if product as u64 >= unfair {
                return (product >> 64) as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// First outputs for seed 1234567, as published with the reference C code (Rosetta Code, "Splitmix64").
    #[test]
    fn splitmix_matches_the_published_numbers() {
        let mut random = SplitMix64 { state: 1_234_567 };
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!(expected, [random.next(), random.next(), random.next()]);
    }

    #[test]
    fn an_order_holds_each_index_once_and_differs_by_each_argument() {
        for len in [0, 1, 2, 3, 10, 257, 1000] {
            let mut order = permutation(len, 7, 0, 0);
            order.sort_unstable();
            assert_eq!(order, (0..len).collect::<Vec<_>>(), "{len} rows");
        }
        let order = permutation(100, 7, 1, 2);
        assert_eq!(order, permutation(100, 7, 1, 2));
        for other in
            [permutation(100, 8, 1, 2), permutation(100, 7, 2, 2), permutation(100, 7, 1, 3), permutation(100, 1, 7, 2)]
        {
            assert_ne!(order, other);
        }
    }

    #[test]
    fn every_place_is_equally_likely() {
        let (len, rounds) = (5, 10_000);
        let mut counts = vec![[0_u32; 5]; len];
        for epoch in 0..rounds {
            for (place, index) in permutation(len, 3, 0, epoch).into_iter().enumerate() {
                counts[index][place] += 1;
            }
        }
        // expected 2000 with a standard deviation of 40
        for count in counts.into_iter().flatten() {
            assert!((1800..=2200).contains(&count), "{count} of 10000");
        }
    }

    #[test]
    fn rows_held_out_and_kept_are_all_rows() {
        let (train, held_out) = hold_out((0..100).collect(), 20, 5);
        assert_eq!((train.len(), held_out.len()), (80, 20));
        let mut all: Vec<i32> = train.iter().chain(&held_out).copied().collect();
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
        assert!(train.is_sorted() && held_out.is_sorted());
        assert_ne!(held_out, (80..100).collect::<Vec<_>>());
        assert_eq!(hold_out(vec![1], 20, 5), (vec![1], vec![]));
    }
}
