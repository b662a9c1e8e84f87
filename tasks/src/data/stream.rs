//! An endless stream of rows from weighted sources, and its position.
//!
//! * ST-1: each source is drawn in passes (epochs); a pass holds each of its rows once, in the order
//!   [`permutation`] gives for (seed, source, epoch).
//! * ST-2: after any number `n` of draws a source of share `w` (its weight over the sum of weights) was drawn less
//!   than `w · n + 1` times: the next draw goes to the source furthest behind its share, so every batch has the mix.
//! * ST-3: the position is the number of draws from each source and nothing else, so a restored stream goes on
//!   exactly as the first one would have.

use std::io;

use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::prompt::PromptRow;
use super::shuffle::permutation;

/// The rows of one source and how much of the stream they make.
#[derive(Debug, Clone)]
pub struct MixSource<T> {
    /// As messages name it: usually its path.
    pub name: String,
    /// Relative to the other sources' weights.
    pub weight: f64,
    pub rows: Vec<T>,
}

/// The rows of all sources.
#[derive(Debug, Clone)]
pub struct Mix<T> {
    sources: Vec<MixSource<T>>,
    /// Weights over their sum.
    shares: Vec<f64>,
}

/// A row of a [`Mix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RowId {
    /// Index of the source in the mix.
    pub source: usize,
    /// Index of the row among the rows the source kept.
    pub index: usize,
}

/// One row drawn from a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draw {
    pub id: RowId,
    /// Pass over the row's source, from 0.
    pub epoch: u64,
}

/// Draws rows without end.
#[derive(Debug, Clone)]
pub struct RowStream<T> {
    mix: Mix<T>,
    seed: u64,
    fingerprint: String,
    /// Draws so far from each source.
    drawn: Vec<u64>,
    /// Each source's order in its current pass.
    orders: Vec<Option<PassOrder>>,
}

/// The stream the PPO loop draws from.
pub type PromptStream = RowStream<PromptRow>;

/// Where a stream stands; part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamPosition {
    pub seed: u64,
    /// Draws so far from each source.
    pub drawn: Vec<u64>,
    /// Rows of each source.
    pub num_rows: Vec<usize>,
    /// Hash of all rows and weights, hexadecimal.
    pub fingerprint: String,
}

#[derive(Debug, Clone)]
struct PassOrder {
    epoch: u64,
    rows: Vec<usize>,
}

impl<T> Mix<T> {
    /// A mix of one or more sources.
    ///
    /// # Errors
    /// No source, one without rows, or a weight that is not a finite number above 0.
    pub fn new(sources: Vec<MixSource<T>>) -> Result<Self, DataError> {
        if sources.is_empty() {
            return Err(DataError::NoSource);
        }
        for MixSource { name, weight, rows } in &sources {
            if rows.is_empty() {
                return Err(DataError::EmptySource { name: name.clone() });
            }
            if !(weight.is_finite() && *weight > 0.0) {
                return Err(DataError::Weight { name: name.clone(), weight: *weight });
            }
        }
        let largest = sources.iter().map(|source| source.weight).fold(0.0, f64::max);
        let total: f64 = sources.iter().map(|source| source.weight / largest).sum(); // scaled: no overflow
        let shares = sources.iter().map(|source| source.weight / largest / total).collect();
        Ok(Self { sources, shares })
    }

    /// Rows of all sources together.
    pub fn num_rows(&self) -> usize {
        self.sources.iter().map(|source| source.rows.len()).sum()
    }

    /// The row a stream over this mix drew.
    ///
    /// # Panics
    /// When `id` comes from another mix.
    pub fn row(&self, id: RowId) -> &T {
        &self.sources[id.source].rows[id.index]
    }
}

impl<T: Serialize> RowStream<T> {
    /// A stream over `mix` from its beginning.
    pub fn new(mix: Mix<T>, seed: u64) -> Self {
        let num_sources = mix.sources.len();
        let fingerprint = fingerprint(&mix);
        Self { mix, seed, fingerprint, drawn: vec![0; num_sources], orders: vec![None; num_sources] }
    }

    /// The next `num_rows` rows. A batch may reach over the end of a pass into the next one.
    pub fn next_batch(&mut self, num_rows: usize) -> Vec<Draw> {
        (0..num_rows).map(|_| self.next_draw()).collect()
    }

    pub fn mix(&self) -> &Mix<T> {
        &self.mix
    }

    /// The row of a draw.
    ///
    /// # Panics
    /// When `id` comes from another stream.
    pub fn row(&self, id: RowId) -> &T {
        self.mix.row(id)
    }

    /// Where the stream stands: what [`Self::restore`] needs to go on from here.
    pub fn position(&self) -> StreamPosition {
        StreamPosition {
            seed: self.seed,
            drawn: self.drawn.clone(),
            num_rows: self.mix.sources.iter().map(|source| source.rows.len()).collect(),
            fingerprint: self.fingerprint.clone(),
        }
    }

    /// Goes to `position`, saved by a stream over the same rows, weights and seed.
    ///
    /// # Errors
    /// [`DataError::Position`] when seed, sources, rows or weights are others; the stream then stays where it was.
    pub fn restore(&mut self, position: &StreamPosition) -> Result<(), DataError> {
        let current = self.position();
        let differs = |what: &str, saved: String, current: String| {
            if saved == current {
                return Ok(());
            }
            Err(DataError::Position { what: what.to_owned(), saved, current })
        };
        differs("the seed", position.seed.to_string(), current.seed.to_string())?;
        differs("the number of sources", position.drawn.len().to_string(), current.drawn.len().to_string())?;
        differs("the number of rows by source", format!("{:?}", position.num_rows), format!("{:?}", current.num_rows))?;
        differs("the hash of the rows and weights", position.fingerprint.clone(), current.fingerprint)?;
        self.drawn.clone_from(&position.drawn);
        Ok(())
    }

    fn next_draw(&mut self) -> Draw {
        let source = self.source_furthest_behind();
        let num_rows = self.mix.sources[source].rows.len();
        let drawn = self.drawn[source];
        let (epoch, place) = (drawn / num_rows as u64, (drawn % num_rows as u64) as usize);
        let order = self.orders[source].take().filter(|order| order.epoch == epoch);
        let order =
            order.unwrap_or_else(|| PassOrder { epoch, rows: permutation(num_rows, self.seed, source as u64, epoch) });
        let index = order.rows[place];
        self.orders[source] = Some(order);
        self.drawn[source] += 1;
        Draw { id: RowId { source, index }, epoch }
    }

    /// The source that the draw counts leave furthest behind its share; the first of equals.
    fn source_furthest_behind(&self) -> usize {
        let num_draws = self.drawn.iter().map(|&count| count as f64).sum::<f64>() + 1.0;
        let deficit = |source: usize| self.mix.shares[source] * num_draws - self.drawn[source] as f64;
        (1..self.drawn.len()).fold(0, |best, source| if deficit(source) > deficit(best) { source } else { best })
    }
}

/// FNV-1a over the weights and the rows as JSON: finds changed data, by accident and not by attack.
fn fingerprint<T: Serialize>(mix: &Mix<T>) -> String {
    let mut hash = Fnv1a(0xcbf2_9ce4_8422_2325);
    for source in &mix.sources {
        hash.add(&source.weight.to_le_bytes());
        hash.add(&(source.rows.len() as u64).to_le_bytes());
        for row in &source.rows {
            serde_json::to_writer(&mut hash, row).expect("rows are plain strings, numbers and lists, which JSON holds");
        }
    }
    format!("{:016x}", hash.0)
}

struct Fnv1a(u64);

impl Fnv1a {
    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

impl io::Write for Fnv1a {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.add(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
