//! Random numbers by counter: a number is a pure function of a seed and of what it is for, so it does not depend on
//! what else was drawn, on batching, on ranks or on restarts (AR-6).

/// What a random number is for; every consumer has a domain of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Domain {
    /// Sampling a token of a response.
    Sampling = 1,
    /// Ordering the mini-batches of an epoch.
    MiniBatches = 2,
    /// Initialising weights.
    Weights = 3,
    /// Ordering rows of a data set.
    Data = 4,
    /// Sampling in an evaluation.
    Evaluation = 5,
}

/// A uniform number in (0, 1) for (`seed`, `domain`, `a`, `b`, `c`), e.g. prompt, sample and position.
pub fn uniform(seed: u64, domain: Domain, a: u64, b: u32, c: u32) -> f64 {
    let bits = draw(seed, domain, a, b, c);
    (bits[0] as f64 * 2f64.powi(21) + (bits[1] >> 11) as f64 + 0.5) / 2f64.powi(53)
}

/// A standard normal number for the same key (Box–Muller).
pub fn normal(seed: u64, domain: Domain, a: u64, b: u32, c: u32) -> f64 {
    let bits = draw(seed, domain, a, b, c);
    let u = (bits[0] as f64 + 0.5) / 2f64.powi(32);
    let v = (bits[1] as f64 + 0.5) / 2f64.powi(32);
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// A permutation of `0..n` for (`seed`, `domain`, `a`, `b`): Fisher–Yates over counter-based numbers.
pub fn permutation(n: usize, seed: u64, domain: Domain, a: u64, b: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        let j = (uniform(seed, domain, a, b, i as u32) * (i + 1) as f64) as usize;
        order.swap(i, j.min(i));
    }
    order
}

fn draw(seed: u64, domain: Domain, a: u64, b: u32, c: u32) -> [u32; 4] {
    // The domain enters the key: streams of different domains never share a counter.
    let key = [seed as u32, (seed >> 32) as u32 ^ (domain as u32).wrapping_mul(0x9E37_79B9)];
    philox([a as u32, (a >> 32) as u32, b, c], key)
}

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let left = 0xD251_1F53u64 * u64::from(counter[0]);
        let right = 0xCD9E_8D57u64 * u64::from(counter[2]);
        counter = [
            (right >> 32) as u32 ^ counter[1] ^ key[0],
            right as u32,
            (left >> 32) as u32 ^ counter[3] ^ key[1],
            left as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with Random123.
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_permutation_holds_every_index_once() {
        let mut order = permutation(1000, 7, Domain::Data, 3, 0);
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn uniform_numbers_fill_the_interval() {
        let mean = (0..10_000).map(|i| uniform(1, Domain::Sampling, i, 0, 0)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
    }
}
