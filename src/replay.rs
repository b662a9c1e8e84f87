//! Rollouts kept in files, which a run reads instead of sampling: what follows from a rollout can then be
//! compared between layouts, dtypes and versions, without the rounding that sampling magnifies.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use echelon_core::data::{
    GROUPS, LABELS, POLICY_VERSION, PROMPTS, RESPONSES, ROLLOUT_LOGPROBS, Report, Rows, TRUNCATED,
};
use echelon_core::message::{Body, Message, decode, encode};
use echelon_core::rollout::{FinishReason, GenerationReport, Prompts};
use echelon_core::verb::Generated;
use echelon_core::whole_file::write_whole;
use echelon_core::{Error, Result};
use tch::Tensor;

use crate::program::Failure;

/// The columns that sampling makes.
const SAMPLED: [&str; 7] = [
    ROLLOUT_LOGPROBS.name,
    PROMPTS.name,
    RESPONSES.name,
    LABELS.name,
    GROUPS.name,
    TRUNCATED.name,
    POLICY_VERSION.name,
];

/// Keeps a step's rollout as `step-N.safetensors` in `folder`.
///
/// # Errors
/// The folder cannot be written to.
pub fn record(folder: &Path, step: u64, rows: &Rows, report: &Report) -> Result<()> {
    let file = file(folder, step);
    let failed = |error| Error::other(format!("rollout.record: {}", file.display()), error);
    std::fs::create_dir_all(folder).map_err(failed)?;
    let rows = rows.only(&SAMPLED);
    let rollout = Generated { rows, report: report.shallow_clone() };
    write_whole(&file, encode(&rollout)).map_err(failed)
}

/// Refuses, before anything starts, a folder for rollouts that has some already, and one to replay that is not of this
/// run: `steps` are those still to come, `first` the prompts of the first of them where they are known.
///
/// # Errors
/// [`Failure::Input`], with the key and the file.
pub fn check(
    (record, replay): (Option<&PathBuf>, Option<&PathBuf>),
    steps: RangeInclusive<u64>,
    first: Option<&Prompts>,
) -> Result<(), Failure> {
    let input = |message: String| Err(Failure::Input(message));
    if let Some(used) = record.and_then(|folder| steps.clone().map(|n| file(folder, n)).find(|f| f.exists())) {
        let used = used.display();
        return input(format!(
            "rollout.record: {used} is there already: choose a folder without rollouts of these steps"
        ));
    }
    let Some(folder) = replay else { return Ok(()) };
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
///
/// # Errors
/// It is not there, cannot be read, or is of other prompts.
pub fn read(folder: &Path, prompts: &Prompts) -> Result<Generated> {
    let step = prompts.rows.first().map_or(0, |prompt| prompt.id >> 32);
    let file = file(folder, step);
    let bytes =
        std::fs::read(&file).map_err(|error| Error::other(format!("rollout.replay: {}", file.display()), error))?;
    let decoded = decode(&bytes).or_else(|error| decode(&bytes).map(|OfBefore(rollout)| rollout).map_err(|_| error));
    let rollout: Generated =
        decoded.map_err(|error| Error::Refused(format!("rollout.replay: {}: {error}", file.display())))?;
    let rollout = whole(rollout, prompts).map_err(|column| {
        Error::Refused(format!("rollout.replay: {}: it has no column `{column}` of its kind", file.display()))
    })?;
    let asked = prompts.rows.iter().flat_map(|prompt| vec![&prompt.text; prompts.samples_per_prompt]);
    let recorded = &rollout.rows[PROMPTS];
    if asked.map(String::as_str).ne(recorded.iter().map(|text| &**text)) {
        return Err(Error::Refused(format!(
            "rollout.replay: {}: its {} prompts are not this step's: replay with the data, seed and batch size that it was \
             recorded with",
            file.display(),
            recorded.len()
        )));
    }
    Ok(rollout)
}

/// The rollout with every column that sampling makes; else the name of one that it lacks. Versions before the rows' columns
/// kept no groups: rows are in the order of the prompts.
fn whole(mut rollout: Generated, prompts: &Prompts) -> Result<Generated, &'static str> {
    let rows = &rollout.rows;
    let columns = [
        (ROLLOUT_LOGPROBS.name, rows.get(ROLLOUT_LOGPROBS).is_some()),
        (PROMPTS.name, rows.get(PROMPTS).is_some()),
        (RESPONSES.name, rows.get(RESPONSES).is_some()),
        (LABELS.name, rows.get(LABELS).is_some()),
        (TRUNCATED.name, rows.get(TRUNCATED).is_some()),
        (POLICY_VERSION.name, rows.get(POLICY_VERSION).is_some()),
    ];
    if let Some((name, _)) = columns.into_iter().find(|(_, is_there)| !is_there) {
        return Err(name);
    }
    if rows.get(GROUPS).is_none() {
        let groups = prompts.rows.iter().flat_map(|prompt| vec![prompt.id as i64; prompts.samples_per_prompt]);
        let groups = Tensor::from_slice(&groups.collect::<Vec<_>>());
        rollout.rows = rollout.rows.with(GROUPS, groups).map_err(|_| GROUPS.name)?;
    }
    Ok(rollout)
}

/// A rollout as versions before the rows' columns wrote it.
struct OfBefore(Generated);

impl Message for OfBefore {
    const KIND: &'static str = Generated::KIND;
    fn to_body(&self) -> Body {
        self.0.to_body()
    }
    fn from_body(body: &mut Body) -> Result<OfBefore> {
        let lengths = Vec::<i64>::try_from(body.tensor("lengths")?)?;
        let rows = Rows::new(body.tensor("token_ids")?, lengths, body.tensor("mask")?)?;
        let truncated = body.field::<Vec<FinishReason>>("finish_reasons")?.into_iter();
        let truncated: Vec<bool> = truncated.map(|reason| reason == FinishReason::Length).collect();
        let texts = |texts: Vec<String>| texts.into_iter().map(Into::into).collect();
        let labels = body.field::<Vec<Option<String>>>("labels")?.into_iter().map(|label| label.map(Into::into));
        let versions = vec![body.field::<i64>("policy_version")?; rows.num_rows()];
        let report = body.field::<GenerationReport>("generation")?.told();
        let rows = rows
            .with(ROLLOUT_LOGPROBS, body.tensor("rollout_logprobs")?)?
            .with(PROMPTS, texts(body.field("prompts")?))?
            .with(RESPONSES, texts(body.field("responses")?))?
            .with(LABELS, labels.collect())?
            .with(TRUNCATED, Tensor::from_slice(&truncated))?
            .with(POLICY_VERSION, Tensor::from_slice(&versions))?;
        Ok(OfBefore(Generated { rows, report }))
    }
}

fn file(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step}.safetensors"))
}
