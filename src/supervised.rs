//! The `sft` and `reward` programs: one loop over batches of rows, two ways to learn from them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use echelon_algorithms::schedule::LrSchedule;
use echelon_core::progress::Interrupt;
use echelon_core::rollout::Tokens;
use echelon_core::zero::TrainingState;
use echelon_models::tokenizer::Tokenizer;
use echelon_tasks::data::{LoadReport, Mix, MixSource, RowStream, hold_out};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoints, Resumed, RunState};
use crate::models::{restore_state, save_state};
use crate::monitor::{Metrics, Outcome, RunLog, StepLine, Terminal, write_report};
use crate::program::{Arguments, Failure, run_folder, watch_signals};
use crate::recipe::{Checkpoint, RewardRecipe, SftRecipe, SupervisedTrain};

mod language_model;
mod reward_model;

use language_model::LanguageModel;
use reward_model::RewardModel;

/// What is learned from at once: one row of tokens, or the two of a pair. `mask[t]` is true where token `t` is learned.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Example(Vec<(Vec<i64>, Vec<bool>)>);

impl Example {
    fn longest(&self) -> usize {
        self.0.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0)
    }
}

/// A model that learns from examples.
trait Learner {
    fn state(&mut self) -> &mut TrainingState;
    /// One optimizer step; metrics named `train/…`.
    fn step(&mut self, rows: &Tokens, lr: f64) -> echelon_core::Result<Metrics>;
    /// Metrics named `eval/…` over all held-out rows; a row's micro-batch never matters.
    fn evaluate(&self, rows: &Tokens, interrupt: &Interrupt) -> echelon_core::Result<Metrics>;
    /// Writes the model as a Hugging Face folder, with what it learned about its own scores.
    fn export(&mut self, rows: &Tokens, folder: &Path) -> echelon_core::Result<()>;
    /// What a step's line shows.
    fn shown(&self) -> &'static [&'static str];
}

/// `sft RECIPE`.
///
/// # Errors
/// See [`Failure`].
pub fn sft(arguments: &Arguments) -> Result<(), Failure> {
    let recipe = SftRecipe::load(&arguments.recipe, &arguments.sets)?;
    let text = crate::recipe::to_toml(&recipe);
    let plan = Plan::new("sft", &recipe.name, recipe.seed, &recipe.train, &recipe.checkpoint, text, arguments)?;
    let data = language_model::load_data(&recipe)?;
    plan.run(data, |total| LanguageModel::start(&recipe, total))
}

/// `reward RECIPE`.
///
/// # Errors
/// See [`Failure`].
pub fn reward(arguments: &Arguments) -> Result<(), Failure> {
    let recipe = RewardRecipe::load(&arguments.recipe, &arguments.sets)?;
    let text = crate::recipe::to_toml(&recipe);
    let plan = Plan::new("reward", &recipe.name, recipe.seed, &recipe.train, &recipe.checkpoint, text, arguments)?;
    let data = reward_model::load_data(&recipe)?;
    plan.run(data, |total| RewardModel::start(&recipe, total))
}

/// What both programs take from their recipe.
struct Plan<'a> {
    program: &'static str,
    name: &'a str,
    seed: u64,
    train: &'a SupervisedTrain,
    checkpoint: &'a Checkpoint,
    recipe_text: String,
    folder: PathBuf,
    resume: bool,
}

/// Rows to learn from and rows held out.
struct Data {
    sources: Vec<MixSource<Example>>,
    held_out: Vec<Example>,
    reports: Vec<(String, LoadReport)>,
}

impl Data {
    /// Sets `fraction` of each source aside, unless there are held-out rows of their own.
    fn new(
        mut sources: Vec<MixSource<Example>>,
        held_out: Option<Vec<Example>>,
        fraction: f64,
        seed: u64,
        reports: Vec<(String, LoadReport)>,
    ) -> Data {
        let held_out = held_out.unwrap_or_else(|| {
            let mut aside = Vec::new();
            for source in sources.iter_mut().filter(|_| fraction > 0.0) {
                let rows = std::mem::take(&mut source.rows);
                let count = (rows.len() as f64 * fraction).round() as usize;
                let (kept, held) = hold_out(rows, count, seed);
                source.rows = kept;
                aside.extend(held);
            }
            aside
        });
        Data { sources, held_out, reports }
    }
}

impl<'a> Plan<'a> {
    fn new(
        program: &'static str,
        name: &'a str,
        seed: u64,
        train: &'a SupervisedTrain,
        checkpoint: &'a Checkpoint,
        recipe_text: String,
        arguments: &Arguments,
    ) -> Result<Plan<'a>, Failure> {
        let folder = run_folder(name, arguments)?;
        Ok(Plan { program, name, seed, train, checkpoint, recipe_text, folder, resume: arguments.resume })
    }

    fn run<L: Learner>(
        &self,
        data: Data,
        start: impl FnOnce(usize) -> Result<(L, Speed), Failure>,
    ) -> Result<(), Failure> {
        let num_rows: usize = data.sources.iter().map(|source| source.rows.len()).sum();
        let total = self.train.optimizer_steps(num_rows);
        let (learner, speed) = start(total)?;
        let checkpoints = Checkpoints::new(&self.folder, self.checkpoint.keep);
        let Resumed { saved, notes } = if self.resume { checkpoints.newest()? } else { Resumed::default() };
        let runtime = tokio::runtime::Runtime::new().map_err(Failure::other)?;
        let _guard = runtime.enter();
        let interrupt = Interrupt::default();
        watch_signals(interrupt.clone());
        let terminal = Arc::new(Terminal::new(total as u64));
        self.header(&terminal, &data, num_rows, total);
        notes.iter().for_each(|note| terminal.note(note));

        std::fs::create_dir_all(&self.folder).map_err(|e| Failure::Other(format!("{}: {e}", self.folder.display())))?;
        let resolved = self.folder.join("recipe.resolved.toml");
        std::fs::write(&resolved, &self.recipe_text)
            .map_err(|e| Failure::Other(format!("{}: {e}", resolved.display())))?;
        let step = saved.as_ref().map_or(0, |(_, state)| state.step);
        let log = if self.resume { RunLog::resume(&self.folder, step)? } else { RunLog::create(&self.folder)? };
        let held_out = rows_of(data.held_out.iter());
        let stream = RowStream::new(Mix::new(data.sources).map_err(Failure::input)?, self.seed);
        let mut run = Run {
            plan: self,
            learner,
            speed,
            stream,
            held_out,
            checkpoints,
            log,
            terminal,
            interrupt,
            step,
            saved: step,
            total: total as u64,
        };
        if let Some((path, state)) = saved {
            run.restore(&path, &state)?;
        }
        run.steps()
    }

    fn header(&self, terminal: &Terminal, data: &Data, num_rows: usize, total: usize) {
        let mut rows = vec![
            ("rows", format!("{num_rows} to learn from, {} held out", data.held_out.len())),
            ("batch", format!("{num_rows} rows in batches of {} -> {total} optimizer steps", self.train.batch_size)),
            ("run folder", self.folder.display().to_string()),
        ];
        for (name, report) in data.reports.iter().filter(|(_, report)| report.num_dropped() > 0) {
            rows.push(("left out", format!("{name}: {report}")));
        }
        terminal.header(&format!("{} {}", self.program, self.name), &rows);
    }
}

/// Learning rate over the run.
struct Speed {
    lr: f64,
    schedule: LrSchedule,
}

struct Run<'a, L> {
    plan: &'a Plan<'a>,
    learner: L,
    speed: Speed,
    stream: RowStream<Example>,
    held_out: Tokens,
    checkpoints: Checkpoints,
    log: RunLog,
    terminal: Arc<Terminal>,
    interrupt: Interrupt,
    step: u64,
    /// The last step with a checkpoint of this process.
    saved: u64,
    total: u64,
}

impl<L: Learner> Run<'_, L> {
    fn steps(mut self) -> Result<(), Failure> {
        let begun = Instant::now();
        while self.step < self.total {
            self.one_step()?;
            if self.interrupt.is_raised() {
                if self.saved != self.step {
                    self.save()?;
                }
                let path = self.checkpoints.path(self.step);
                let message = format!("step {} is saved in {}; --resume continues", self.step, path.display());
                return Err(Failure::Interrupted(message));
            }
        }
        let model = self.plan.folder.join("model");
        self.learner.export(&self.held_out, &model)?;
        let report = write_report(&self.plan.folder)?;
        self.terminal.summary(&Outcome {
            steps: self.step,
            seconds: begun.elapsed().as_secs_f64(),
            report: Some(report),
            model: Some(model),
            tensorboard: Some(self.plan.folder.join("tensorboard")),
            ..Outcome::default()
        });
        Ok(())
    }

    fn one_step(&mut self) -> Result<(), Failure> {
        let begun = Instant::now();
        let step = self.step + 1;
        let _whole = self.interrupt.defer(); // a step is short: it is finished, with its evaluation
        let draws = self.stream.next_batch(self.plan.train.batch_size);
        let rows = rows_of(draws.iter().map(|draw| self.stream.row(draw.id)));
        let lr = self.speed.lr * self.speed.schedule.factor(self.step as usize);
        let mut metrics = self.learner.step(&rows, lr)?;
        let seconds = begun.elapsed().as_secs_f64();
        let tokens: i64 = rows.lengths.iter().sum();
        metrics.set("train/timing/step_total", seconds).set("perf/tokens_per_second", tokens as f64 / seconds);
        self.step = step;
        let every = self.plan.train.eval_every_steps.map(|every| every as u64);
        let evaluates = step == self.total || every.is_some_and(|every| step.is_multiple_of(every));
        if evaluates && self.held_out.num_rows() > 0 {
            metrics.extend(self.learner.evaluate(&self.held_out, &self.interrupt)?);
        }
        self.log.write(step, &metrics, &[])?;
        let mut line = StepLine::new(step, seconds);
        line.tokens_per_second = Some(tokens as f64 / seconds);
        for name in self.learner.shown() {
            if let Some(value) = metrics.get(name) {
                line = line.field(
                    name.rsplit_once('/').map_or(name, |_| name.trim_start_matches("train/")),
                    format!("{value:.4}"),
                );
            }
        }
        self.terminal.step(&line);
        let due = self.plan.checkpoint.every_steps.is_some_and(|every| step.is_multiple_of(every as u64));
        if due || step == self.total {
            self.save()?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<(), Failure> {
        self.log.sync()?;
        let unfinished = self.checkpoints.begin(self.step)?;
        save_state(self.learner.state(), &unfinished.file("model.safetensors"))?;
        let state = RunState {
            step: self.step,
            policy_version: 0,
            data: self.stream.position(),
            kl: None,
            num_threads: tch::get_num_threads(),
            render_time: None,
            metric: None,
        };
        unfinished.finish(&state)?;
        self.saved = self.step;
        self.checkpoints.prune(self.step)
    }

    fn restore(&mut self, path: &Path, state: &RunState) -> Result<(), Failure> {
        tch::set_num_threads(state.num_threads);
        restore_state(self.learner.state(), &path.join("model.safetensors"))?;
        self.stream.restore(&state.data).map_err(Failure::input)?;
        self.terminal.note(&format!("resumed after step {} from {}", state.step, path.display()));
        Ok(())
    }
}

fn rows_of<'a>(examples: impl Iterator<Item = &'a Example>) -> Tokens {
    Tokens::from_rows(&examples.flat_map(|example| example.0.iter().cloned()).collect::<Vec<_>>())
}

/// A prompt's tokens followed by a response's and the end-of-sequence token, with the mask on the response.
fn prompt_and_response(
    tokenizer: &Tokenizer,
    prompt: &str,
    response: &str,
) -> Result<(Vec<i64>, Vec<bool>), echelon_models::tokenizer::TokenizerError> {
    let mut ids = tokenizer.encode(prompt)?;
    let prompt_tokens = ids.len();
    ids.extend(tokenizer.encode_plain(response)?);
    ids.extend(tokenizer.eos_ids().first());
    let mask = (0..ids.len()).map(|position| position >= prompt_tokens).collect();
    Ok((ids, mask))
}
