//! The `sft` and `reward` programs: one loop over batches of rows, two ways to learn from them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use echelon_algorithms::schedule::LrSchedule;
use echelon_core::Error;
use echelon_core::progress::Interrupt;
use echelon_core::rollout::Tokens;
use echelon_core::zero::TrainingState;
use echelon_models::tokenizer::Tokenizer;
use echelon_tasks::data::{LoadReport, Mix, MixSource, RowStream, hold_out};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoints, Measured, Resumed, RunState};
use crate::models::{restore_state, save_state};
use crate::monitor::{Metrics, Outcome, RunLog, StepLine, Terminal, write_report};
use crate::program::{Arguments, BEFORE_THE_FIRST_STEP, Failure, run_folder, watch_signals, write_whole};
use crate::recipe::{Checkpoint, ModelSource, RESOLVED_FILE, RewardRecipe, Root, SftRecipe, SupervisedTrain};
use crate::resume::resume;
use crate::wire;

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
    fn evaluate(&mut self, rows: &Tokens, interrupt: &Interrupt) -> echelon_core::Result<Metrics>;
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
    let plan = Plan::new(&recipe, (&recipe.model.model, &recipe.train, &recipe.checkpoint), recipe.seed, arguments)?;
    let data = language_model::load_data(&recipe, &plan.tokenizer)?;
    plan.run(data, |total| LanguageModel::start(&recipe, plan.tokenizer.clone(), total))
}

/// `reward RECIPE`.
///
/// # Errors
/// See [`Failure`].
pub fn reward(arguments: &Arguments) -> Result<(), Failure> {
    let recipe = RewardRecipe::load(&arguments.recipe, &arguments.sets)?;
    let plan = Plan::new(&recipe, (&recipe.model.model, &recipe.train, &recipe.checkpoint), recipe.seed, arguments)?;
    let data = reward_model::load_data(&recipe, &plan.tokenizer)?;
    plan.run(data, |total| RewardModel::start(&recipe, plan.tokenizer.clone(), total))
}

/// What both programs take from their recipe.
struct Plan<'a> {
    program: &'static str,
    name: String,
    seed: u64,
    train: &'a SupervisedTrain,
    checkpoint: &'a Checkpoint,
    recipe_text: String,
    folder: PathBuf,
    resumes: bool,
    resumed: Resumed,
    tokenizer: Arc<Tokenizer>,
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
    /// Checks what the recipe asks for and what `--resume` may go on from; reads the tokenizer, but neither rows nor weights.
    fn new<T: Root>(
        recipe: &T,
        (model, train, checkpoint): (&ModelSource, &'a SupervisedTrain, &'a Checkpoint),
        seed: u64,
        arguments: &Arguments,
    ) -> Result<Plan<'a>, Failure> {
        let recipe_text = recipe.resolved_text();
        let name = recipe.name().to_owned();
        let folder = run_folder(&name, arguments)?;
        let resumed = match arguments.resume {
            true => resume::<T>(&folder, &Checkpoints::new(&folder, checkpoint), &recipe_text)?,
            false => Resumed::default(),
        };
        let model = wire::model_folder(model)?;
        let keys = format!("train.max_tokens = {}", train.max_tokens);
        wire::check_context(&model, train.max_tokens, &keys)?;
        let tokenizer = Arc::new(resumed.tokenizer(&model)?);
        let (program, resumes) = (T::PROGRAM, arguments.resume);
        Ok(Plan { program, name, seed, train, checkpoint, recipe_text, folder, resumes, resumed, tokenizer })
    }

    fn run<L: Learner>(
        &self,
        data: Data,
        start: impl FnOnce(usize) -> Result<(L, Speed), Failure>,
    ) -> Result<(), Failure> {
        let num_rows: usize = data.sources.iter().map(|source| source.rows.len()).sum();
        let total = self.train.optimizer_steps(num_rows);
        let (mut learner, speed) = start(total)?;
        let runtime = tokio::runtime::Runtime::new().map_err(Failure::other)?;
        let _guard = runtime.enter();
        let interrupt = Interrupt::default();
        watch_signals(interrupt.clone());
        let terminal = Arc::new(Terminal::new(total as u64));
        self.header(&terminal, &data, num_rows, total);
        self.resumed.notes.iter().for_each(|note| terminal.note(note));
        let held_out = rows_of(data.held_out.iter());
        let mut stream = RowStream::new(Mix::new(data.sources).map_err(Failure::input)?, self.seed);
        let mut step = 0;
        if let Some((path, state)) = &self.resumed.saved {
            restore(&mut learner, &mut stream, path, state)?;
            terminal.note(&format!("resumed after step {} from {}", state.step, path.display()));
            step = state.step;
        }

        std::fs::create_dir_all(&self.folder).map_err(|e| Failure::Other(format!("{}: {e}", self.folder.display())))?;
        let log = if self.resumes { RunLog::resume(&self.folder, step)? } else { RunLog::create(&self.folder)? };
        write_whole(&self.folder.join(RESOLVED_FILE), &self.recipe_text)?;
        let run = Run {
            plan: self,
            learner,
            speed,
            stream,
            held_out,
            checkpoints: Checkpoints::new(&self.folder, self.checkpoint),
            log,
            terminal,
            interrupt,
            step,
            saved: step,
            metric: None,
            total: total as u64,
        };
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
    /// What `checkpoint.best_metric` was at the last finished step, where it was measured.
    metric: Option<Measured>,
    total: u64,
}

impl<L: Learner> Run<'_, L> {
    fn steps(mut self) -> Result<(), Failure> {
        let begun = Instant::now();
        if self.step == 0 {
            self.evaluate_before()?;
        }
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

    /// What the model is like before it learns: a line of news, step 0 in TensorBoard, and `eval_before.json`.
    fn evaluate_before(&mut self) -> Result<(), Failure> {
        if self.held_out.num_rows() == 0 {
            return Ok(());
        }
        let metrics = self.learner.evaluate(&self.held_out, &self.interrupt).map_err(|error| match error.root() {
            Error::Interrupted => Failure::Interrupted(BEFORE_THE_FIRST_STEP.into()),
            _ => error.into(),
        })?;
        self.log.write_start(&metrics)?;
        metrics.write_file(&self.plan.folder.join("eval_before.json"))?;
        let shown: Vec<String> = metrics.scalars.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        self.terminal.note(&format!("before training: {}", shown.join(", ")));
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
        self.metric = self.checkpoints.measured(&metrics);
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
            program: self.plan.program.into(),
            step: self.step,
            policy_version: 0,
            data: self.stream.position(),
            kl: None,
            num_threads: tch::get_num_threads(),
            render_time: self.plan.tokenizer.render_time(),
            metric: self.metric.clone(),
        };
        unfinished.finish(&state)?;
        self.saved = self.step;
        self.checkpoints.prune(self.step)
    }
}

/// Gives the learner and the rows what they had at a checkpoint; the run folder stays as it is.
fn restore(
    learner: &mut impl Learner,
    stream: &mut RowStream<Example>,
    path: &Path,
    state: &RunState,
) -> Result<(), Failure> {
    tch::set_num_threads(state.num_threads);
    stream.restore(&state.data).map_err(Failure::input)?;
    restore_state(learner.state(), &path.join("model.safetensors")).map_err(Failure::input)
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
