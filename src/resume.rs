//! What `--resume` goes on from, and whether it may. All of this is read and checked before a file of the run folder
//! changes.
//!
//! * RS-1: a refused resume leaves the run folder as it was.
//! * RS-2: a run goes on under the program and the recipe that it began with; the keys that may change neither decide
//!   what a step learns nor whether its numbers can be compared with those before.
//! * RS-3: a run that was stopped before its first checkpoint begins anew. One that has finished never does.

use std::path::Path;

use crate::checkpoint::{Checkpoints, Resumed};
use crate::program::Failure;
use crate::recipe::{RESOLVED_FILE, Root, changes_since, free_keys};
use echelon_monitor::{Evaluation, RunLog};

/// What only a run that has come to its end leaves in its folder.
const ENDS: [&str; 4] = ["actor", "model", "eval_after.json", "report.html"];

/// The newest whole checkpoint in `folder`, if the run of the resolved recipe `present` may go on from it.
///
/// # Errors
/// [`Failure::Input`]: no checkpoint is whole, it is another program's, the recipe has changed, or the run has finished
/// and left none.
pub(crate) fn resume<T: Root>(folder: &Path, checkpoints: &Checkpoints, present: &str) -> Result<Resumed, Failure> {
    let resumed = checkpoints.newest()?;
    match &resumed.saved {
        Some((path, state)) if state.program != T::PROGRAM => {
            return Err(Failure::Input(format!(
                "{} is a checkpoint of `{}`, and this is `{}`: resume it with `{}`, or choose another --output-dir",
                path.display(),
                state.program,
                T::PROGRAM,
                state.program
            )));
        }
        None => refuse_finished(folder)?,
        Some(_) => {}
    }
    refuse_changes::<T>(folder, present)?;
    let step = resumed.saved.as_ref().map_or(0, |(_, state)| state.step);
    RunLog::check(folder, step).map_err(Failure::input)?;
    if step > 0 {
        Evaluation::read(&folder.join("eval_before.json")).map_err(Failure::input)?; // else it is made again
    }
    Ok(resumed)
}

fn refuse_finished(folder: &Path) -> Result<(), Failure> {
    let Some(end) = ENDS.into_iter().find(|end| folder.join(end).exists()) else { return Ok(()) };
    Err(Failure::Input(format!(
        "the run in {} has finished ({end} is there) and has no checkpoint to go on from; starting over would overwrite \
         it: put a checkpoint back, or start a new run with another --output-dir",
        folder.display()
    )))
}

fn refuse_changes<T: Root>(folder: &Path, present: &str) -> Result<(), Failure> {
    let stored = folder.join(RESOLVED_FILE);
    if !stored.exists() {
        return Ok(()); // stopped before it was written
    }
    let changes = changes_since::<T>(&stored, present).map_err(|error| {
        Failure::Input(format!(
            "{error}\nthe recipe that this run began with cannot be read by `{}`: resume it with the program that began \
             it, or choose another --output-dir",
            T::PROGRAM
        ))
    })?;
    if changes.is_empty() {
        return Ok(());
    }
    let lines: String = changes.iter().map(|change| format!("\n  {change}")).collect();
    Err(Failure::Input(format!(
        "the recipe is not the one that the run in {} began with:{lines}\nchange it back, or start a new run with another \
         --output-dir; a resumed run may change {}",
        folder.display(),
        free_keys(present).join(", ")
    )))
}
