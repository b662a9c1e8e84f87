//! Rows divided among the CPUs of this node, and their results in row order.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use echelon_core::{Error, Result};

use super::demand::Demand;
use super::error::TaskError;
use super::handle::TaskHandle;
use super::tasks::Tasks;

/// Parts per CPU: rows are not alike, and an early part must not leave its CPU idle for long.
const PARTS_PER_CPU: usize = 4;

/// Results of rows that tasks are at, part by part.
#[must_use = "dropping it cancels what has not begun"]
pub struct RowTasks<R>(Vec<(Range<usize>, TaskHandle<Vec<R>>)>);

impl Tasks {
    /// Divides `0..num_rows` into contiguous parts of at least `least` rows, one task of one CPU each; `work` gives one
    /// result per row of its part.
    ///
    /// # Errors
    /// As [`Tasks::try_run`].
    pub fn over_rows<R: Send + 'static>(
        &self,
        task: &'static str,
        num_rows: usize,
        least: usize,
        work: impl Fn(Range<usize>) -> Result<Vec<R>> + Send + Sync + 'static,
    ) -> Result<RowTasks<R>, TaskError> {
        let cpus = self.nodes()[0].total.num_cpus.max(1.0) as usize;
        let num_parts = (num_rows / least.max(1)).clamp(1, PARTS_PER_CPU * cpus);
        let work = Arc::new(work);
        let parts = (0..num_parts).map(|part| {
            let rows = part * num_rows / num_parts..(part + 1) * num_rows / num_parts;
            let (work, own) = (work.clone(), rows.clone());
            let counted = move || {
                let (count, results) = (own.len(), work(own)?);
                let found = results.len();
                let wrong = || Error::Refused(format!("{count} rows gave {found} results"));
                if found == count { Ok(results) } else { Err(wrong()) }
            };
            Ok((rows, self.try_run(task, Demand::CPU, counted)?))
        });
        parts.collect::<Result<_, _>>().map(RowTasks)
    }
}

impl<R> RowTasks<R> {
    /// Awaits all of them.
    ///
    /// # Errors
    /// Of the first part, in row order, that has one (TK-10).
    pub async fn gather(self) -> Result<Vec<R>, TaskError> {
        let mut results = Vec::new();
        for (_, part) in self.0 {
            results.extend(part.await?);
        }
        Ok(results)
    }

    /// Blocks until all are there, at most for `deadline`.
    ///
    /// # Errors
    /// As [`RowTasks::gather`] and [`TaskHandle::wait`].
    pub fn wait(self, deadline: Duration) -> Result<Vec<R>, TaskError> {
        let until = Instant::now().checked_add(deadline);
        let mut results = Vec::new();
        for (_, part) in self.0 {
            let left = until.map_or(deadline, |until| until.saturating_duration_since(Instant::now()));
            results.extend(part.wait(left)?);
        }
        Ok(results)
    }
}
