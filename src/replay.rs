//! Rollouts kept in files, and a generator that reads them instead of sampling: what follows from a rollout can then be
//! compared between layouts, dtypes and versions, without the rounding that sampling magnifies.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use echelon_core::message::{decode, encode};
use echelon_core::role::{Answer, Endpoint, GeneratorGroup, GeneratorRank, Role, WorkerGroup};
use echelon_core::rollout::{Prompts, Rollout};
use echelon_core::verb::{Generate, Publish};
use echelon_core::whole_file::write_whole;
use echelon_core::{Error, Result};

use crate::program::Failure;
use crate::recipe;

/// Keeps a step's rollout as `step-N.safetensors` in `folder`.
///
/// # Errors
/// The folder cannot be written to.
pub fn record(folder: &Path, step: u64, rollout: &Rollout) -> Result<()> {
    let file = file(folder, step);
    let failed = |error| Error::other(format!("rollout.record: {}", file.display()), error);
    std::fs::create_dir_all(folder).map_err(failed)?;
    write_whole(&file, encode(rollout)).map_err(failed)
}

/// Refuses, before anything starts, a folder for rollouts that has some already, and one to replay that is not of this
/// run: `steps` are those still to come, `first` the prompts of the first of them where they are known.
///
/// # Errors
/// [`Failure::Input`], with the key and the file.
pub fn check(rollout: &recipe::Rollout, steps: RangeInclusive<u64>, first: Option<&Prompts>) -> Result<(), Failure> {
    let input = |message: String| Err(Failure::Input(message));
    if let Some(used) =
        rollout.record.as_ref().and_then(|folder| steps.clone().map(|n| file(&folder.0, n)).find(|f| f.exists()))
    {
        let used = used.display();
        return input(format!(
            "rollout.record: {used} is there already: choose a folder without rollouts of these steps"
        ));
    }
    let Some(folder) = &rollout.replay else { return Ok(()) };
    if let Some(step) = steps.clone().find(|step| !file(folder, *step).is_file()) {
        let (file, last) = (file(folder, step), steps.end());
        let file = file.display();
        return input(format!(
            "rollout.replay: no {file}, and the run goes to step {last}: lower train.steps, or record more"
        ));
    }
    match first {
        Some(prompts) => read(folder, prompts).map(drop).map_err(Failure::input),
        None => Ok(()),
    }
}

/// The rollout of these prompts.
fn read(folder: &Path, prompts: &Prompts) -> Result<Rollout> {
    let step = prompts.rows.first().map_or(0, |prompt| prompt.id >> 32);
    let file = file(folder, step);
    let bytes =
        std::fs::read(&file).map_err(|error| Error::other(format!("rollout.replay: {}", file.display()), error))?;
    let rollout: Rollout =
        decode(&bytes).map_err(|error| Error::Refused(format!("rollout.replay: {}: {error}", file.display())))?;
    let asked = prompts.rows.iter().flat_map(|prompt| vec![&prompt.text; prompts.samples_per_prompt]);
    if asked.ne(&rollout.prompts) {
        return Err(Error::Refused(format!(
            "rollout.replay: {}: its {} prompts are not this step's: replay with the data, seed and batch size that it was \
             recorded with",
            file.display(),
            rollout.prompts.len()
        )));
    }
    Ok(rollout)
}

/// The generator that answers with the rollouts recorded in `folder`. Evaluations are sampled by `engine` as ever.
pub fn replaying(folder: &Path, engine: GeneratorGroup, apart: bool) -> GeneratorGroup {
    #[allow(clippy::arc_with_non_send_sync)] // a group holds its ranks so, and the driver stays on one thread
    let replay: Arc<dyn GeneratorRank> = Arc::new(Replay { folder: folder.into(), engine });
    let group = WorkerGroup::new(Role::Generator, vec![replay]);
    if apart { group.apart_from_actor() } else { group }
}

struct Replay {
    folder: PathBuf,
    engine: GeneratorGroup,
}

impl Endpoint<Generate> for Replay {
    fn call(&self, request: Generate) -> Answer<'_, Rollout> {
        Box::pin(async move {
            let Generate { prompts, sampling } = request;
            if prompts.evaluation {
                return self.engine.generate(prompts, &sampling).await;
            }
            read(&self.folder, &prompts)
        })
    }
}

impl Endpoint<Publish> for Replay {
    fn call(&self, request: Publish) -> Answer<'_, ()> {
        Box::pin(self.engine.publish(request))
    }
}

fn file(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step}.safetensors"))
}
