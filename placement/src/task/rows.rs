//! Rows divided among the CPUs of this node, or of all, and their results in row order.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use echelon_core::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::demand::Demand;
use super::error::TaskError;
use super::function::Function;
use super::handle::TaskHandle;
use super::schedule::NodeReport;
use super::tasks::Tasks;

/// Parts per CPU: rows are not alike, and an early part must not leave its CPU idle for long.
const PARTS_PER_CPU: usize = 4;

/// Results of rows that tasks are at, part by part.
#[must_use = "dropping it cancels what has not begun"]
pub struct RowTasks<R>(Vec<(Range<usize>, TaskHandle<Vec<R>>)>);

impl Tasks {
    /// Divides `0..num_rows` into contiguous parts of at least `least` rows, one task of `demand` each; `work` gives one
    /// result per row of its part.
    ///
    /// # Errors
    /// As [`Tasks::try_run`].
    pub fn over_rows<R: Send + 'static>(
        &self,
        (task, demand): (&'static str, Demand),
        num_rows: usize,
        least: usize,
        work: impl Fn(Range<usize>) -> Result<Vec<R>> + Send + Sync + 'static,
    ) -> Result<RowTasks<R>, TaskError> {
        let work = Arc::new(work);
        let parts = divided(num_rows, least, &self.nodes()[..1]).map(|rows| {
            let (work, own) = (work.clone(), rows.clone());
            let counted = move || {
                let (count, results) = (own.len(), work(own)?);
                let found = results.len();
                let wrong = || Error::Refused(format!("{count} rows gave {found} results"));
                if found == count { Ok(results) } else { Err(wrong()) }
            };
            Ok((rows, self.try_run(task, demand, counted)?))
        });
        parts.collect::<Result<_, _>>().map(RowTasks)
    }

    /// The same over all nodes: `function` is called with what `arguments` makes of a part.
    ///
    /// # Errors
    /// As [`Tasks::try_call`].
    pub fn call_over_rows<A: Serialize, R: DeserializeOwned>(
        &self,
        function: &Function<A, Vec<R>>,
        num_rows: usize,
        least: usize,
        arguments: impl Fn(Range<usize>) -> A,
    ) -> Result<RowTasks<R>, TaskError> {
        let parts = divided(num_rows, least, &self.nodes()).map(|rows| {
            let part = self.try_call(function, Demand::CPU, &arguments(rows.clone()))?;
            Ok((rows, part))
        });
        parts.collect::<Result<_, _>>().map(RowTasks)
    }
}

/// Contiguous parts of at least `least` rows, for the CPUs of these nodes.
fn divided(num_rows: usize, least: usize, nodes: &[NodeReport]) -> impl Iterator<Item = Range<usize>> + use<> {
    let cpus: f64 = nodes.iter().filter(|node| node.alive).map(|node| node.total.num_cpus).sum();
    let num_parts = (num_rows / least.max(1)).clamp(1, PARTS_PER_CPU * cpus.max(1.0) as usize);
    (0..num_parts).map(move |part| part * num_rows / num_parts..(part + 1) * num_rows / num_parts)
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
