//! Loading a source: read each row, ask the caller's filter, keep or count.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use super::error::{DataError, Place};
use super::file::{Row, visit_rows};
use super::prompt::{PromptKeys, PromptRow};
use super::training::{Pair, PairKeys, TrainingExample, TrainingKeys};

/// What a filter says of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Keep,
    /// Leave the row out, and count it under this reason, for example `longer than max_prompt_tokens = 512`.
    Drop(String),
}

/// Why a filter could not judge a row, for example a chat template that refused it.
pub type FilterError = Box<dyn std::error::Error + Send + Sync>;

/// The rows of one source, and how many were left out.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// Never empty.
    pub rows: Vec<T>,
    pub report: LoadReport,
}

/// How many rows were read, kept and dropped, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadReport {
    pub num_read: usize,
    pub num_kept: usize,
    /// By reason.
    pub dropped: BTreeMap<String, Dropped>,
}

/// The rows dropped for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dropped {
    pub count: usize,
    pub first: Place,
}

impl LoadReport {
    /// Rows dropped for any reason.
    pub fn num_dropped(&self) -> usize {
        self.dropped.values().map(|dropped| dropped.count).sum()
    }

    fn drop(&mut self, reason: String, place: Place) {
        self.dropped.entry(reason).or_insert(Dropped { count: 0, first: place }).count += 1;
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows read, {} kept, {} dropped", self.num_read, self.num_kept, self.num_dropped())?;
        for (index, (reason, Dropped { count, first })) in self.dropped.iter().enumerate() {
            let separator = if index == 0 { ": " } else { "; " };
            write!(f, "{separator}{count} {reason}, the first at {first}")?;
        }
        Ok(())
    }
}

/// The prompts of `path`, of source number `source`, judged `block` at a time: `judge` gives one verdict for each, or ends
/// with an error.
///
/// It sees every prompt before it is kept; what it drops is counted, never shortened. Reading stops once `max_samples`
/// prompts are kept.
///
/// # Errors
/// A file that cannot be read, a row without its keys, a judge that failed, or no row left: then the error says how
/// many were dropped and why.
pub fn load_prompts(
    path: &Path,
    keys: &PromptKeys,
    source: usize,
    max_samples: Option<usize>,
    (block, judge): (usize, &mut Judge<'_, PromptRow>),
) -> Result<Loaded<PromptRow>, DataError> {
    load_blocks(path, max_samples, &mut |row, index| PromptRow::read(row, keys, source, index), (block, judge))
}

/// The examples of `path` for supervised fine-tuning, as [`load_prompts`] loads prompts, but one by one through `filter`.
///
/// # Errors
/// As [`load_prompts`].
pub fn load_training(
    path: &Path,
    keys: &TrainingKeys,
    max_samples: Option<usize>,
    filter: &mut dyn FnMut(&TrainingExample) -> Result<Verdict, FilterError>,
) -> Result<Loaded<TrainingExample>, DataError> {
    load_rows(path, max_samples, &mut |row| TrainingExample::read(row, keys), filter)
}

/// The preference pairs of `path`, as [`load_training`] loads examples. Pairs whose sides are equal say nothing
/// and are dropped and counted.
///
/// # Errors
/// As [`load_prompts`].
pub fn load_pairs(
    path: &Path,
    keys: &PairKeys,
    max_samples: Option<usize>,
    filter: &mut dyn FnMut(&Pair) -> Result<Verdict, FilterError>,
) -> Result<Loaded<Pair>, DataError> {
    load_rows(path, max_samples, &mut |row| Pair::read(row, keys), &mut |pair| {
        if pair.chosen == pair.rejected {
            return Ok(Verdict::Drop("with equal chosen and rejected sides".to_owned()));
        }
        filter(pair)
    })
}

fn load_rows<T: Clone>(
    path: &Path,
    max_samples: Option<usize>,
    read: &mut dyn FnMut(&Row) -> Result<T, DataError>,
    filter: &mut dyn FnMut(&T) -> Result<Verdict, FilterError>,
) -> Result<Loaded<T>, DataError> {
    load_blocks(path, max_samples, &mut |row, _| read(row), (1, &mut |rows| rows.iter().map(&mut *filter).collect()))
}

/// Judges rows that stand together.
pub type Judge<'a, T> = dyn FnMut(&Arc<Vec<T>>) -> Vec<Result<Verdict, FilterError>> + 'a;

/// Rows read and not yet judged, and what became of those before them.
struct Reading<T> {
    rows: Vec<T>,
    report: LoadReport,
    max_samples: Option<usize>,
    pending: Vec<T>,
    places: Vec<Place>,
}

impl<T: Clone> Reading<T> {
    fn is_full(&self) -> bool {
        self.max_samples.is_some_and(|max| self.rows.len() >= max)
    }

    /// Keeps or counts what is pending, in order; what comes after the last that is wanted was never read.
    fn settle(&mut self, judge: &mut Judge<'_, T>) -> Result<(), DataError> {
        let pending = Arc::new(std::mem::take(&mut self.pending));
        let verdicts = if pending.is_empty() { Vec::new() } else { judge(&pending) };
        let rows = Arc::unwrap_or_clone(pending).into_iter().zip(self.places.drain(..).collect::<Vec<_>>());
        for ((row, place), verdict) in rows.zip(verdicts) {
            if self.is_full() {
                break;
            }
            self.report.num_read += 1;
            match verdict.map_err(|source| DataError::Filter { place: place.clone(), source })? {
                Verdict::Keep => self.rows.push(row),
                Verdict::Drop(reason) => self.report.drop(reason, place),
            }
        }
        Ok(())
    }
}

/// `read` makes a value from a row and its index (from 0, dropped rows included).
fn load_blocks<T: Clone>(
    path: &Path,
    max_samples: Option<usize>,
    read: &mut dyn FnMut(&Row, usize) -> Result<T, DataError>,
    (block, judge): (usize, &mut Judge<'_, T>),
) -> Result<Loaded<T>, DataError> {
    let (rows, pending, places) = Default::default();
    let mut reading = Reading { rows, report: LoadReport::default(), max_samples, pending, places };
    let visited = visit_rows(path, &mut |row| {
        if reading.is_full() {
            return Ok(ControlFlow::Break(()));
        }
        let value = read(&row, reading.report.num_read + reading.pending.len())?;
        reading.pending.push(value);
        reading.places.push(row.place);
        if reading.pending.len() >= block {
            reading.settle(judge)?;
        }
        Ok(ControlFlow::Continue(()))
    });
    reading.settle(judge)?;
    // What was read ahead of the last row that is wanted may be anything.
    if !reading.is_full() || reading.rows.is_empty() {
        visited?;
    }
    let Reading { rows, mut report, .. } = reading;
    report.num_kept = rows.len();
    if rows.is_empty() {
        return Err(DataError::AllDropped { path: path.to_owned(), report: Box::new(report) });
    }
    Ok(Loaded { rows, report })
}
