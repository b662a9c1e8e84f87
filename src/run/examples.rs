//! What a run on examples is made of: text to learn, or pairs.

use std::path::Path;
use std::sync::Arc;

use echelon_algorithms::Algorithm;
use echelon_core::data::Rows;
use echelon_core::role::Role;
use echelon_models::tokenizer::{Tokenizer, TokenizerError};
use echelon_placement::planner::{Alone, Plan};
use echelon_tasks::data::{LoadReport, Mix, MixSource, RowStream, hold_out};
use serde::{Deserialize, Serialize};

use super::feed::{ExampleFeed, Feed};
use super::inputs::{Inputs, Program};
use super::memory::MemoryLedger;
use crate::checkpoint::Resumed;
use crate::devices;
use crate::model_folders;
use crate::plan::{self, TrainingJob};
use crate::program::{Arguments, Failure, PlanFormat, absolute};
use crate::recipe::{self, Checkpoint, Devices, Model, Root, SupervisedTrain, json_of};
use crate::run_spec::RunSpec;
use crate::settings;
use echelon_placement::layout::Layout;
use echelon_roles::models::Held;

mod pairs;
mod texts;

/// What is learned from at once: one row of tokens, or the two of a pair. `own[t]` is true where token `t` is learned.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Example(Vec<(Vec<i64>, Vec<bool>)>);

impl Example {
    fn longest(&self) -> usize {
        self.0.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0)
    }

    pub fn rows<'a>(examples: impl Iterator<Item = &'a Example>) -> Rows {
        Rows::of_tokens(&examples.flat_map(|example| example.0.iter().cloned()).collect::<Vec<_>>())
    }
}

/// A recipe of a model that learns from examples: what `sft` and `reward` do each in its way.
pub trait Lesson: Root {
    type Algorithm: Algorithm + Default;
    /// Neighbouring rows that belong together: 2 of a pair.
    const ROWS_PER_EXAMPLE: usize;

    fn parts(&self) -> Parts<'_>;
    fn devices_mut(&mut self) -> &mut Devices;
    fn load_data(&self, tokenizer: &Tokenizer) -> Result<Data, Failure>;
}

/// The tables that both kinds of recipe have.
pub struct Parts<'a> {
    model: &'a Model,
    train: &'a SupervisedTrain,
    checkpoint: &'a Checkpoint,
    devices: &'a Devices,
    seed: u64,
}

/// Rows to learn from and rows held out.
pub struct Data {
    sources: Vec<MixSource<Example>>,
    held_out: Vec<Example>,
    reports: Vec<(String, LoadReport)>,
}

impl Data {
    /// Reads every file with its weight. Held-out rows have a file of their own, or are a fraction of each of these.
    fn read(
        files: Vec<(&Path, f64)>,
        (held_out, fraction): (Option<&Path>, f64),
        seed: u64,
        load: impl Fn(&Path) -> Result<(Vec<Example>, LoadReport), Failure>,
    ) -> Result<Data, Failure> {
        let mut data = Data { sources: Vec::new(), held_out: Vec::new(), reports: Vec::new() };
        for (path, weight) in files {
            let (rows, report) = load(path)?;
            data.reports.push((path.display().to_string(), report));
            data.sources.push(MixSource { name: path.display().to_string(), weight, rows });
        }
        if let Some(path) = held_out {
            let (rows, report) = load(path)?;
            data.reports.push((format!("{} (held out)", path.display()), report));
            data.held_out = rows;
        } else if fraction > 0.0 {
            for source in &mut data.sources {
                let rows = std::mem::take(&mut source.rows);
                let count = ((rows.len() as f64 * fraction).round() as usize).max(1);
                let (kept, held) = hold_out(rows, count, seed);
                source.rows = kept;
                data.held_out.extend(held);
            }
        }
        Ok(data)
    }
}

impl<L: Lesson> Program for L {
    type Algorithm = <L as Lesson>::Algorithm;
    type Written = L;

    fn read(arguments: &Arguments) -> Result<L, Failure> {
        Ok(recipe::load(&arguments.recipe, &arguments.sets, arguments.plan.is_none())?)
    }

    fn name(&self) -> &str {
        Root::name(self)
    }

    fn text(&self) -> String {
        self.resolved_text()
    }

    fn devices(&self) -> &Devices {
        self.parts().devices
    }

    fn devices_mut(&mut self) -> &mut Devices {
        Lesson::devices_mut(self)
    }

    fn checkpoint(&self) -> &Checkpoint {
        self.parts().checkpoint
    }

    fn print_plan(&self, format: PlanFormat) -> Result<(), Failure> {
        let text = self.resolved_text();
        let headed = format!("# The recipe as it would run, with every default.\n\n{text}");
        let plan = training_job(self, None).ask()?;
        let shown = plan.as_ref().map(|plan| plan.as_ref().map(Alone));
        plan::print(format, (headed, json_of(&text)), shown)
    }

    fn inputs(&self, resumed: &Resumed, run_folder: &Path) -> Result<Inputs<Self::Algorithm>, Failure> {
        let Parts { model, train, devices, seed, .. } = self.parts();
        let folder = model_folders::model_folder(&model.model)?;
        settings::check_context(&folder, train.max_tokens, &format!("train.max_tokens = {}", train.max_tokens))?;
        let (held, warning) = devices::held(&train.compute, devices, None)?;
        let (layout, plan) = layout(self, &folder, devices::num_workers(devices, held)?)?;
        let tokenizer = Arc::new(resumed.tokenizer(&folder)?);
        let data = self.load_data(&tokenizer)?;
        let num_rows: usize = data.sources.iter().map(|source| source.rows.len()).sum();
        let total = train.optimizer_steps(num_rows);
        let header = header(self, (&folder, held, warning), &layout, (&data, num_rows, total), run_folder)?;
        let workload = training_job(self, Some(&folder)).workload()?;
        Ok(Inputs {
            algorithm: Self::Algorithm::default(),
            spec: RunSpec {
                program: L::PROGRAM.into(),
                recipe: self.resolved_text(),
                folders: [(role::<L>(), absolute(&folder))].into(),
                optimizer_steps: [(role::<L>(), total)].into(),
                weight_layout: held.weight_layout,
                layout: layout.clone(),
                run_folder: absolute(run_folder),
            },
            feed: Feed::Examples(Box::new(ExampleFeed {
                held_out: Example::rows(data.held_out.iter()),
                stream: RowStream::new(Mix::new(data.sources).map_err(Failure::input)?, seed),
                batch_size: train.batch_size,
                evaluate_every: train.eval_every_steps.map(|every| every as u64),
            })),
            tokenizer,
            held,
            rewards: None,
            memory: workload.map(|workload| MemoryLedger::new(workload, held, &layout)),
            forecast: None,
            arithmetic: None,
            total: total as u64,
            plan: plan.map(|plan| format!("workers {layout}\n\n{}\n", Alone(&plan))),
            header,
            notes: Vec::new(),
        })
    }
}

/// Whose model it becomes.
fn role<L: Lesson>() -> Role {
    <L as Lesson>::Algorithm::EXPORTS.0
}

/// What is planned, of a model that may be at hand already.
fn training_job<'a, L: Lesson>(recipe: &'a L, folder: Option<&'a Path>) -> TrainingJob<'a> {
    let Parts { model, train, devices, .. } = recipe.parts();
    TrainingJob { role: role::<L>(), model, folder, train, devices, rows_per_example: L::ROWS_PER_EXAMPLE }
}

/// One model on every worker, as the planner would train it, with its plan.
fn layout<L: Lesson>(recipe: &L, model: &Path, workers: usize) -> Result<(Layout, Option<Plan>), Failure> {
    let plan = match workers {
        1 => None,
        _ => training_job(recipe, Some(model)).ask()?.transpose().map_err(Failure::input)?,
    };
    let alone = || Layout::alone(role::<L>(), workers, (0, recipe.parts().train.compute.adam_offload));
    Ok((plan.as_ref().map_or_else(alone, Layout::of), plan))
}

fn header<L: Lesson>(
    recipe: &L,
    (folder, held, warning): (&Path, Held, Option<String>),
    layout: &Layout,
    (data, num_rows, total): (&Data, usize, usize),
    run_folder: &Path,
) -> Result<Vec<(&'static str, String)>, Failure> {
    let Parts { model, train, .. } = recipe.parts();
    let params = model_folders::shape(folder)?.shape().num_params();
    let batch = train.batch_size;
    let mut rows = vec![
        ("model", format!("{} ({:.1}M parameters)", model.model, params as f64 / 1e6)),
        ("device", devices::device_line(held)),
    ];
    if layout.num_workers > 1 {
        let stage = layout.group(role::<L>()).zero_stage;
        rows.push(("workers", format!("{} processes, ZeRO {stage}", layout.num_workers)));
    }
    rows.extend([
        ("rows", format!("{num_rows} to learn from, {} held out", data.held_out.len())),
        ("batch", format!("{num_rows} rows in batches of {batch} -> {total} optimizer steps")),
        ("run folder", run_folder.display().to_string()),
    ]);
    rows.extend(warning.map(|warning| ("warning", warning)));
    for (name, report) in data.reports.iter().filter(|(_, report)| report.num_dropped() > 0) {
        rows.push(("left out", format!("{name}: {report}")));
    }
    Ok(rows)
}

/// A prompt's tokens followed by a response's and the end-of-sequence token, with the mask on the response.
fn prompt_and_response(
    tokenizer: &Tokenizer,
    prompt: &str,
    response: &str,
) -> Result<(Vec<i64>, Vec<bool>), TokenizerError> {
    let mut ids = tokenizer.encode(prompt)?;
    let prompt_tokens = ids.len();
    ids.extend(tokenizer.encode_plain(response)?);
    ids.extend(tokenizer.eos_ids().first());
    let mask = (0..ids.len()).map(|position| position >= prompt_tokens).collect();
    Ok((ids, mask))
}
