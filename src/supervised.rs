//! The `sft` and `reward` programs: one loop over batches of rows, two ways to learn from them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use echelon_algorithms::schedule::LrSchedule;
use echelon_core::Error;
use echelon_core::progress::Interrupt;
use echelon_core::role::{LearnerGroup, LearnerRank, Role};
use echelon_core::rollout::Tokens;
use echelon_core::verb::{Learn, LearnReport};
use echelon_models::tokenizer::Tokenizer;
use echelon_placement::devices::Devices;
use echelon_placement::planner::TrainingPlan;
use echelon_tasks::data::{LoadReport, Mix, MixSource, RowStream, hold_out};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::assignment::{HostPlan, Job};
use crate::checkpoint::{Checkpoints, Measured, Resumed, RunState};
use crate::crew::{Crew, End};
use crate::layout::Layout;
use crate::learner::LearnerPlan;
use crate::models::Held;
use crate::monitor::{Metrics, Outcome, RunClock, RunLog, StepLine, Terminal, write_report};
use crate::plan::{self, TrainingJob, count_gpus};
use crate::program::{
    Arguments, BEFORE_THE_FIRST_STEP, Failure, WholeFolder, make_run_folder, run_folder, watch_signals, write_whole,
};
use crate::recipe::{self, Checkpoint, Model, RESOLVED_FILE, RewardRecipe, Root, SftRecipe, SupervisedTrain, json_of};
use crate::resume::resume;
use crate::run::memory::MemoryLedger;
use crate::watch::Watch;
use crate::wire::{self, Work};
use crate::worker::absolute;

mod language_model;
mod reward_model;

/// What is learned from at once: one row of tokens, or the two of a pair. `mask[t]` is true where token `t` is learned.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Example(Vec<(Vec<i64>, Vec<bool>)>);

impl Example {
    fn longest(&self) -> usize {
        self.0.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0)
    }
}

/// A recipe of a model that learns from examples: what `sft` and `reward` do each in its way.
trait Lesson: Root + Sized {
    /// Whose model it becomes.
    const ROLE: Role;
    /// Neighbouring rows that belong together: 2 of a pair.
    const ROWS_PER_EXAMPLE: usize;
    /// What a step's line shows.
    const SHOWN: &'static [&'static str];

    fn parts(&self) -> Parts<'_>;
    fn devices_mut(&mut self) -> &mut Devices;
    fn load_data(&self, tokenizer: &Tokenizer) -> Result<Data, Failure>;
    /// What a device thread builds the model from.
    fn learner(&self, folder: &Path, held: Held) -> LearnerPlan;
    /// The same for a worker in another process.
    fn job(&self, folder: PathBuf) -> Job;
    /// What the loss of a batch is the mean over: learned tokens, or pairs.
    fn num_learned(rows: &Tokens) -> f64;
    /// Metrics named `train/…` of an optimizer step.
    fn learned(report: &LearnReport) -> Metrics;
    /// Metrics named `eval/…` of held-out rows, from the number that the model gives each.
    fn evaluated(rows: &Tokens, numbers: &Tensor) -> Metrics;
    /// Mean and standard deviation of held-out scores, where the model gives scores.
    fn score_statistics(_numbers: &Tensor) -> Option<(f64, f64)> {
        None
    }
}

/// The tables that both kinds of recipe have.
struct Parts<'a> {
    model: &'a Model,
    train: &'a SupervisedTrain,
    checkpoint: &'a Checkpoint,
    devices: &'a Devices,
    seed: u64,
}

/// `sft RECIPE`.
///
/// # Errors
/// See [`Failure`].
pub fn sft(arguments: &Arguments) -> Result<(), Failure> {
    main::<SftRecipe>(arguments)
}

/// `reward RECIPE`.
///
/// # Errors
/// See [`Failure`].
pub fn reward(arguments: &Arguments) -> Result<(), Failure> {
    main::<RewardRecipe>(arguments)
}

/// Everything from the arguments to the report.
fn main<L: Lesson>(arguments: &Arguments) -> Result<(), Failure> {
    let mut recipe: L = recipe::load(&arguments.recipe, &arguments.sets, arguments.plan.is_none())?;
    count_gpus(recipe.devices_mut());
    if let Some(format) = arguments.plan {
        let text = recipe.resolved_text();
        let headed = format!("# The recipe as it would run, with every default.\n\n{text}");
        return plan::print(format, (headed, json_of(&text)), training_job(&recipe, None).ask()?);
    }
    let prepared = Prepared::new(&recipe, arguments)?;
    let data = recipe.load_data(&prepared.tokenizer)?;
    let runtime = tokio::runtime::Runtime::new().map_err(Failure::other)?;
    let outcome = runtime.block_on(async {
        let mut run = prepared.start(data).await?;
        let outcome = match run.steps().await {
            Err(failure) => Err(run.with_next_step(run.crew.explain(failure).await)),
            done => done,
        };
        run.crew.finish(outcome.as_ref().err().map_or(End::Done, End::of)).await;
        outcome
    });
    runtime.shutdown_background();
    outcome
}

/// What is planned, of a model that may be at hand already.
fn training_job<'a, L: Lesson>(recipe: &'a L, folder: Option<&'a Path>) -> TrainingJob<'a> {
    let Parts { model, train, devices, .. } = recipe.parts();
    TrainingJob { role: L::ROLE, model, folder, train, devices, rows_per_example: L::ROWS_PER_EXAMPLE }
}

/// Rows to learn from and rows held out.
struct Data {
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

/// A run before its rows are read.
struct Prepared<'a, L> {
    recipe: &'a L,
    recipe_text: String,
    folder: PathBuf,
    model: PathBuf,
    held: Held,
    warning: Option<String>,
    layout: Layout,
    plan: Option<TrainingPlan>,
    resumes: bool,
    resumed: Resumed,
    tokenizer: Arc<Tokenizer>,
}

impl<'a, L: Lesson> Prepared<'a, L> {
    /// Checks what the recipe asks for and what `--resume` may go on from; reads the tokenizer, but neither rows nor weights.
    fn new(recipe: &'a L, arguments: &Arguments) -> Result<Prepared<'a, L>, Failure> {
        let recipe_text = recipe.resolved_text();
        let folder = run_folder(recipe.name(), arguments)?;
        let Parts { model, train, checkpoint, devices, .. } = recipe.parts();
        let resumed = match arguments.resume {
            true => resume::<L>(&folder, &Checkpoints::new(&folder, checkpoint), &recipe_text)?,
            false => Resumed::default(),
        };
        let model = wire::model_folder(&model.model)?;
        let keys = format!("train.max_tokens = {}", train.max_tokens);
        wire::check_context(&model, train.max_tokens, &keys)?;
        let (held, warning) = wire::held(&train.compute, devices, None)?;
        let (layout, plan) = layout(recipe, &model, wire::num_workers(devices, held)?)?;
        let tokenizer = Arc::new(resumed.tokenizer(&model)?);
        let resumes = arguments.resume;
        Ok(Prepared { recipe, recipe_text, folder, model, held, warning, layout, plan, resumes, resumed, tokenizer })
    }

    /// Starts the workers, and takes up a checkpoint; only then is the run folder made, or changed.
    async fn start(self, data: Data) -> Result<Run<'a, L>, Failure> {
        let Parts { model, train, checkpoint, devices, seed } = self.recipe.parts();
        let num_rows: usize = data.sources.iter().map(|source| source.rows.len()).sum();
        let total = train.optimizer_steps(num_rows);
        let terminal = Arc::new(Terminal::new(total as u64));
        let watch = Arc::new(Watch::new(terminal.clone()));
        let interrupt = Interrupt::default();
        watch_signals(interrupt.clone());
        self.header(&terminal, &data, num_rows, total)?;
        self.resumed.notes.iter().for_each(|note| terminal.note(note));
        let (device, deterministic) = (wire::device_name(self.held.pass.device), self.held.deterministic);
        let saved = self.resumed.saved.as_ref();
        saved.and_then(|(_, state)| state.note_on(&device, deterministic)).iter().for_each(|note| terminal.note(note));
        let held_out = rows_of(data.held_out.iter());
        let mut stream = RowStream::new(Mix::new(data.sources).map_err(Failure::input)?, seed);

        let memory = training_job(self.recipe, Some(&self.model)).training()?;
        let work = Work {
            job: self.recipe.job(absolute(&self.model)),
            plan: HostPlan::Learner(self.recipe.learner(&self.model, self.held), self.folder.clone()),
            layout: self.layout.clone(),
            tokenizer: self.tokenizer.clone(),
            run_folder: self.folder.clone(),
        };
        let teller = terminal.clone();
        let say = Arc::new(move |line: &str| teller.note(line));
        let crew = wire::start_crew(work, devices, (interrupt.clone(), watch.clone()), say).await?;
        let learner = crew.group::<dyn LearnerRank>(&self.layout, L::ROLE, |w| Arc::new(w), |w| Arc::new(w));
        let step = self.resumed.saved.as_ref().map_or(0, |(_, state)| state.step);
        let opened = async {
            if let Some((path, state)) = &self.resumed.saved {
                restore(&learner, &mut stream, path, state).await?;
                terminal.note(&format!("resumed after step {step} from {}", path.display()));
            }
            make_run_folder(&self.folder)?;
            let log = if self.resumes { RunLog::resume(&self.folder, step)? } else { RunLog::create(&self.folder)? };
            write_whole(&self.folder.join(RESOLVED_FILE), &self.recipe_text)?;
            if step < total as u64 {
                let plan = self.plan.as_ref().map(|plan| format!("workers {}\n\n{plan}\n", self.layout));
                plan::keep(&self.folder, plan.as_deref())?;
            }
            Ok(log)
        };
        let log = match opened.await {
            Ok(log) => log,
            Err(failure) => return Err(crew.give_up(failure).await),
        };
        let run = Run {
            recipe: self.recipe,
            learner,
            crew,
            memory: memory.map(|training| MemoryLedger::of_training(&training, self.held, &self.layout)),
            lr: model.optimizer.lr,
            schedule: LrSchedule::of(&model.optimizer, total),
            stream,
            held_out,
            checkpoints: Checkpoints::new(&self.folder, checkpoint),
            folder: self.folder,
            tokenizer: self.tokenizer,
            log,
            terminal,
            watch,
            interrupt,
            step,
            saved: (step > 0).then_some(step),
            metric: None,
            held: self.held,
            clock: RunClock::start(),
            total: total as u64,
        };
        Ok(run)
    }

    fn header(&self, terminal: &Terminal, data: &Data, num_rows: usize, total: usize) -> Result<(), Failure> {
        let Parts { model, train, .. } = self.recipe.parts();
        let params = wire::shape(&self.model)?.shape().num_params();
        let batch = train.batch_size;
        let mut rows = vec![
            ("model", format!("{} ({:.1}M parameters)", model.model, params as f64 / 1e6)),
            ("device", wire::device_line(self.held)),
        ];
        if self.layout.num_workers > 1 {
            let stage = self.layout.group(L::ROLE).zero_stage;
            rows.push(("workers", format!("{} processes, ZeRO {stage}", self.layout.num_workers)));
        }
        rows.extend([
            ("rows", format!("{num_rows} to learn from, {} held out", data.held_out.len())),
            ("batch", format!("{num_rows} rows in batches of {batch} -> {total} optimizer steps")),
            ("run folder", self.folder.display().to_string()),
        ]);
        rows.extend(self.warning.iter().map(|warning| ("warning", warning.clone())));
        for (name, report) in data.reports.iter().filter(|(_, report)| report.num_dropped() > 0) {
            rows.push(("left out", format!("{name}: {report}")));
        }
        terminal.header(&format!("{} {}", L::PROGRAM, self.recipe.name()), &rows);
        Ok(())
    }
}

/// One model on every worker, as the planner would train it, with its plan.
fn layout<L: Lesson>(recipe: &L, model: &Path, workers: usize) -> Result<(Layout, Option<TrainingPlan>), Failure> {
    let plan = match workers {
        1 => None,
        _ => training_job(recipe, Some(model)).ask()?.transpose().map_err(Failure::input)?,
    };
    let held = match &plan {
        Some(plan) => (plan.zero_stage, plan.adam_offload),
        None => (0, recipe.parts().train.compute.adam_offload),
    };
    Ok((Layout::alone(L::ROLE, workers, held), plan))
}

struct Run<'a, L> {
    recipe: &'a L,
    learner: LearnerGroup,
    crew: Crew,
    held: Held,
    memory: Option<MemoryLedger>,
    lr: f64,
    schedule: LrSchedule,
    stream: RowStream<Example>,
    held_out: Tokens,
    checkpoints: Checkpoints,
    folder: PathBuf,
    tokenizer: Arc<Tokenizer>,
    log: RunLog,
    terminal: Arc<Terminal>,
    watch: Arc<Watch>,
    interrupt: Interrupt,
    step: u64,
    /// The newest step with a checkpoint.
    saved: Option<u64>,
    /// What `checkpoint.best_metric` was at the last finished step, where it was measured.
    metric: Option<Measured>,
    clock: RunClock,
    total: u64,
}

impl<L: Lesson> Run<'_, L> {
    async fn steps(&mut self) -> Result<(), Failure> {
        let begun = Instant::now();
        if self.step == 0 {
            self.evaluate_before().await?;
        }
        self.clock = RunClock::start();
        while self.step < self.total {
            self.one_step().await?;
            if self.interrupt.is_raised() {
                if self.saved != Some(self.step) {
                    self.save().await?;
                }
                let path = self.checkpoints.path(self.step);
                let message = format!("step {} is saved in {}; --resume continues", self.step, path.display());
                return Err(Failure::Interrupted(message));
            }
        }
        let model = self.folder.join("model");
        self.export(&model).await?;
        let report = write_report(&self.folder)?;
        self.terminal.summary(&Outcome {
            steps: self.step,
            seconds: begun.elapsed().as_secs_f64(),
            report: Some(report),
            model: Some(model),
            tensorboard: Some(self.folder.join("tensorboard")),
            ..Outcome::default()
        });
        Ok(())
    }

    /// What the model is like before it learns: a line of news, step 0 in TensorBoard, and `eval_before.json`.
    async fn evaluate_before(&mut self) -> Result<(), Failure> {
        if self.held_out.num_rows() == 0 {
            return Ok(());
        }
        let metrics = self.evaluate().await.map_err(|error| match error.root() {
            Error::Interrupted => Failure::Interrupted(BEFORE_THE_FIRST_STEP.into()),
            _ => error.into(),
        })?;
        self.log.write_start(&metrics)?;
        metrics.write_file(&self.folder.join("eval_before.json"))?;
        let shown: Vec<String> = metrics.scalars.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        self.terminal.note(&format!("before training: {}", shown.join(", ")));
        Ok(())
    }

    async fn evaluate(&self) -> echelon_core::Result<Metrics> {
        let numbers = self.learner.assess(&self.held_out).await.map_err(|error| self.explained(error))?;
        self.watch.clear();
        Ok(L::evaluated(&self.held_out, &numbers))
    }

    /// An error with what holds the memory of a device that has no room.
    fn explained(&self, error: Error) -> Error {
        self.memory.iter().fold(error, |error, ledger| ledger.explained(error))
    }

    async fn one_step(&mut self) -> Result<(), Failure> {
        let begun = Instant::now();
        let step = self.step + 1;
        let interrupt = self.interrupt.clone();
        let _whole = interrupt.defer(); // a step is short: it is finished, with its evaluation
        let Parts { train, checkpoint, .. } = self.recipe.parts();
        let draws = self.stream.next_batch(train.batch_size);
        let rows = rows_of(draws.iter().map(|draw| self.stream.row(draw.id)));
        let (tokens, num_learned) = (rows.lengths.iter().sum::<i64>(), L::num_learned(&rows));
        let lr = self.lr * self.schedule.factor(self.step as usize);
        let request = Learn { rows, rows_per_example: L::ROWS_PER_EXAMPLE, num_learned, lr };
        let learned = self.learner.learn(request).await.map_err(|error| self.explained(error))?;
        let mut metrics = L::learned(&learned);
        self.watch.clear();
        let seconds = begun.elapsed().as_secs_f64();
        metrics.set("train/timing/step_total", seconds).set("perf/tokens_per_second", tokens as f64 / seconds);
        self.step = step;
        let every = train.eval_every_steps.map(|every| every as u64);
        let evaluates = step == self.total || every.is_some_and(|every| step.is_multiple_of(every));
        if evaluates && self.held_out.num_rows() > 0 {
            let begun = Instant::now();
            metrics.extend(self.evaluate().await?);
            self.clock.name("perf/evaluation_s", begun.elapsed().as_secs_f64());
        }
        let reports = self.crew.memory().await?;
        for warning in self.memory.iter_mut().flat_map(|ledger| ledger.record(&mut metrics, &reports)) {
            self.terminal.note(&warning);
        }
        self.clock.record(&mut metrics, seconds);
        self.metric = self.checkpoints.measured(&metrics);
        self.log.write(step, &metrics, &[])?;
        let mut line = StepLine::new(step, seconds);
        line.tokens_per_second = Some(tokens as f64 / seconds);
        for name in L::SHOWN {
            if let Some(value) = metrics.get(name) {
                line = line.field(
                    name.rsplit_once('/').map_or(name, |_| name.trim_start_matches("train/")),
                    format!("{value:.4}"),
                );
            }
        }
        self.terminal.step(&line);
        let due = checkpoint.every_steps.is_some_and(|every| step.is_multiple_of(every as u64));
        if due || step == self.total {
            let begun = Instant::now();
            self.save().await?;
            self.clock.name("perf/checkpoint_s", begun.elapsed().as_secs_f64());
        }
        Ok(())
    }

    async fn save(&mut self) -> Result<(), Failure> {
        self.log.sync()?;
        let unfinished = self.checkpoints.begin(self.step)?;
        self.learner.save(absolute(&unfinished.file("model.safetensors"))).await?;
        let state = RunState {
            program: L::PROGRAM.into(),
            step: self.step,
            policy_version: 0,
            data: self.stream.position(),
            kl: None,
            num_threads: tch::get_num_threads(),
            weight_layout: None,
            device: Some(wire::device_name(self.held.pass.device)),
            deterministic: Some(self.held.deterministic),
            render_time: self.tokenizer.render_time(),
            metric: self.metric.clone(),
        };
        unfinished.finish(&state)?;
        self.saved = Some(self.step);
        self.checkpoints.prune(self.step)
    }

    /// The model as a Hugging Face folder, with what it learned about its own scores.
    async fn export(&self, folder: &Path) -> Result<(), Failure> {
        let statistics = match self.held_out.num_rows() {
            0 => None,
            _ => {
                let _whole = self.interrupt.defer();
                L::score_statistics(&self.learner.assess(&self.held_out).await?)
            }
        };
        self.watch.clear();
        let whole = WholeFolder::begin(folder)?;
        self.learner.export(absolute(whole.path()), statistics).await?;
        whole.finish()
    }

    /// A lost worker, and how the run goes on without it.
    fn with_next_step(&self, failure: Failure) -> Failure {
        let Failure::Worker(cause) = failure else { return failure };
        let next = match self.saved {
            Some(step) => format!("--resume goes on from the checkpoint of step {step}"),
            None => "there is no checkpoint yet: --resume begins this run again".into(),
        };
        Failure::Worker(format!("{cause}\n{next}"))
    }
}

/// Gives the learner and the rows what they had at a checkpoint; the run folder stays as it is.
async fn restore(
    learner: &LearnerGroup,
    stream: &mut RowStream<Example>,
    path: &Path,
    state: &RunState,
) -> Result<(), Failure> {
    tch::set_num_threads(state.num_threads);
    stream.restore(&state.data).map_err(Failure::input)?;
    learner.restore(absolute(&path.join("model.safetensors"))).await.map_err(Failure::input)
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
