//! The one run of every program that learns: draw, sample, learn, publish; log, evaluate, save, stop, finish.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use echelon_algorithms::{Algorithm, Outcome};
use echelon_core::Error;
use echelon_core::data::{Report, Rows};
use echelon_core::progress::Interrupt;
use echelon_core::whole_file::WholeFolder;
use echelon_models::tokenizer::Tokenizer;

use crate::checkpoint::{Checkpoints, Measured, Resumed};
use crate::devices;
use crate::forecast::Forecast;
use crate::plan;
use crate::program::{
    Arguments, BEFORE_THE_FIRST_STEP, Failure, absolute, failed, make_run_folder, run_folder, watch_signals,
    write_whole,
};
use crate::recipe::RESOLVED_FILE;
use crate::resume::resume;
use crate::watch::Watch;
use crate::wire;
use crate::workers::{End, Workers};
use echelon_monitor::{Metrics, RunClock, RunLog, StepLine, Summary, Terminal, write_report};
use echelon_roles::models::Held;

mod evaluate;
pub mod examples;
pub mod feed;
pub mod inputs;
pub mod learning;
pub mod memory;
pub(crate) mod metrics;
mod on_policy;
mod out_of_memory;

use evaluate::Evaluation;
use inputs::Program;
use learning::Learning;
use memory::MemoryLedger;
use metrics::{Work, metrics_of};

/// `PROGRAM RECIPE`: everything from the arguments to the report.
///
/// # Errors
/// See [`Failure`].
pub fn main<P: Program>(arguments: &Arguments) -> Result<(), Failure> {
    let mut recipe = P::read(arguments)?;
    plan::count_gpus(recipe.devices_mut());
    if let Some(format) = arguments.plan {
        return recipe.print_plan(format);
    }
    let folder = run_folder(recipe.name(), arguments)?;
    let runtime = tokio::runtime::Runtime::new().map_err(Failure::other)?;
    // The driver's tensors are Send but not Sync: the loop stays on this thread.
    let outcome = runtime.block_on(async {
        let mut run = Run::prepare(&recipe, folder, arguments.resume).await?;
        let outcome = match run.steps().await {
            Err(failure) => Err(run.with_next_step(run.workers.explain(failure).await)),
            done => done,
        };
        run.workers.finish(outcome.as_ref().err().map_or(End::Done, End::of)).await;
        outcome
    });
    runtime.shutdown_background(); // a reward program that is still thinking is not waited for
    outcome
}

/// A run between its first line and its last.
struct Run<A> {
    folder: PathBuf,
    learning: Learning<A>,
    workers: Workers,
    checkpoints: Checkpoints,
    log: RunLog,
    tokenizer: Arc<Tokenizer>,
    terminal: Arc<Terminal>,
    watch: Arc<Watch>,
    interrupt: Interrupt,
    /// The arithmetic of a step, where responses are sampled.
    work: Option<Work>,
    memory: Option<MemoryLedger>,
    /// What the devices reach together in large products; known after the first step.
    matmul_rate: Option<f64>,
    /// Where `train.calibrate` asks for it.
    forecast: Option<Forecast>,
    clock: RunClock,
    held: Held,
    begun: Instant,
    total: u64,
    save_every: Option<u64>,
    /// The last finished step.
    step: u64,
    /// What `checkpoint.best_metric` was at that step, where it was measured.
    metric: Option<Measured>,
    /// The newest checkpoint that is known to be whole, with its step.
    saved: Option<(u64, PathBuf)>,
}

impl<A: Algorithm> Run<A> {
    /// Loads, checks and restores everything; only then is the run folder made, or changed.
    async fn prepare<P: Program<Algorithm = A>>(recipe: &P, folder: PathBuf, resumes: bool) -> Result<Run<A>, Failure> {
        let (begun, resolved) = (Instant::now(), recipe.text());
        let checkpoints = Checkpoints::new(&folder, recipe.checkpoint());
        let resumed = match resumes {
            true => resume::<P::Written>(&folder, &checkpoints, &resolved)?,
            false => Resumed::default(),
        };
        let inputs = recipe.inputs(&resumed, &folder)?;
        let terminal = Arc::new(Terminal::new(inputs.total));
        let watch = Arc::new(Watch::new(terminal.clone()));
        let interrupt = Interrupt::default();
        watch_signals(interrupt.clone());
        terminal.header(&format!("{} {}", A::NAME, recipe.name()), &inputs.header);
        let (held, total, tokenizer) = (inputs.held, inputs.total, inputs.tokenizer);
        let (device, saved) = (devices::device_name(held.pass.device), resumed.saved.as_ref());
        let elsewhere = saved.and_then(|(_, state)| state.note_on(&device, held.deterministic));
        resumed.notes.iter().chain(&inputs.notes).chain(&elsewhere).for_each(|note| terminal.note(note));
        let teller = terminal.clone();
        let say = Arc::new(move |line: &str| teller.note(line));
        let watched = (interrupt.clone(), inputs.feed.shown(watch.clone()));
        let (roles, workers) =
            wire::connect((inputs.spec, tokenizer.clone()), recipe.devices(), inputs.rewards, watched, say).await?;
        let mut run = Learning { algorithm: inputs.algorithm, roles, feed: inputs.feed, policy_version: 0 };
        let step = saved.map_or(0, |(_, state)| state.step);
        let restored = match &resumed.saved {
            Some((path, state)) => run.restore(path, state).await,
            None => Ok(()),
        };
        let opened = restored.and_then(|()| open_folder(&folder, resumes, (step, total), &resolved, inputs.plan));
        let log = match opened {
            Ok(log) => log,
            Err(failure) => return Err(workers.give_up(failure).await),
        };
        if let Some((path, _)) = &resumed.saved {
            terminal.note(&format!("resumed after step {step} from {}", path.display()));
        }
        Ok(Run {
            folder,
            learning: run,
            workers,
            checkpoints,
            log,
            tokenizer,
            terminal,
            watch,
            interrupt,
            work: inputs.arithmetic,
            memory: inputs.memory,
            matmul_rate: None,
            forecast: inputs.forecast,
            clock: RunClock::start(),
            held,
            begun,
            total,
            save_every: recipe.checkpoint().every_steps.map(|every| every as u64),
            step,
            metric: saved.and_then(|(_, state)| state.metric.clone()),
            saved: resumed.saved.map(|(path, state)| (state.step, path)),
        })
    }

    /// Every step that is left, with what surrounds it.
    async fn steps(&mut self) -> Result<(), Failure> {
        let before = match self.evaluate_once(BEFORE).await {
            Err(Failure::Interrupted(_)) => return self.stop().await,
            before => before?,
        };
        self.clock = RunClock::start();
        while self.step < self.total {
            let position = self.learning.feed.position();
            match self.step().await {
                Err(error) if matches!(error.root(), Error::Interrupted) => {
                    self.learning.feed.restore(&position)?;
                    return self.stop().await;
                }
                outcome => outcome.map_err(|error| self.explained(error))?,
            }
            if self.interrupt.is_raised() {
                return self.stop().await;
            }
        }
        match self.evaluate_once(AFTER).await {
            Err(Failure::Interrupted(_)) => self.stop().await,
            after => self.finish(before, after?).await,
        }
    }

    /// One step: learn, then log, evaluate and save as the recipe says.
    async fn step(&mut self) -> Result<(), Error> {
        let (step, begun) = (self.step + 1, Instant::now());
        self.work.iter_mut().for_each(Work::begin);
        self.learning.roles.calls.take(); // what came before is no step's
        // A step on examples is short: it is finished, with its evaluation.
        let _whole = self.learning.feed.reads_examples().then(|| self.interrupt.defer());
        let (sampled, Outcome { report, rows }) = self.learning.step(step, &self.interrupt).await?;
        let _finishing = self.interrupt.defer(); // the weights have moved: what belongs to this step is done
        self.learning.feed.keep(step, &rows, &sampled)?;
        self.watch.clear();
        self.step = step;
        let phases_s = begun.elapsed().as_secs_f64();
        let mut metrics = metrics_of(&report, self.learning.published());
        self.record_speed(&mut metrics, (&rows, &sampled), phases_s).await?;
        let on_examples = self.learning.feed.reads_examples();
        if on_examples {
            self.evaluate_when_due(&mut metrics).await?; // what it takes is metered with the step
        }
        self.record_memory(&mut metrics).await?;
        if let Some(forecast) = &mut self.forecast {
            let begun = Instant::now();
            forecast.record(&mut metrics, &rows, &self.interrupt);
            self.clock.name("perf/calibration_s", begun.elapsed().as_secs_f64());
        }
        if !on_examples {
            self.evaluate_when_due(&mut metrics).await?;
        }
        self.clock.record(&mut metrics, phases_s);
        self.metric = self.checkpoints.measured(&metrics);
        let samples = self.learning.feed.samples(step, &rows);
        self.log.write(step, &metrics, &samples).map_err(|error| Error::other("logging", error))?;
        self.terminal.step(&StepLine::of(step, &metrics, A::LEADS));
        self.save_when_due().await
    }

    /// Timings, tokens per second, MFU.
    async fn record_speed(
        &mut self,
        metrics: &mut Metrics,
        (rows, sampled): (&Rows, &Report),
        seconds: f64,
    ) -> Result<(), Error> {
        let Some(work) = &mut self.work else {
            let tokens = rows.num_tokens() as f64;
            metrics.set("train/timing/step_total", seconds).set("perf/tokens_per_second", tokens / seconds);
            return Ok(());
        };
        if self.matmul_rate.is_none() {
            self.matmul_rate = Some(self.workers.matmul_rate().await?);
        }
        let calls = self.learning.roles.calls.take();
        let rate = self.matmul_rate.filter(|rate| *rate > 0.0);
        work.record(metrics, (rows, sampled, &calls), seconds, rate);
        Ok(())
    }

    async fn record_memory(&mut self, metrics: &mut Metrics) -> Result<(), Error> {
        let reports = self.workers.memory().await?;
        for warning in self.memory.iter_mut().flat_map(|ledger| ledger.record(metrics, &reports)) {
            self.terminal.note(&warning);
        }
        Ok(())
    }

    /// An error with what holds the memory of a device that has no room.
    fn explained(&self, error: Error) -> Error {
        self.memory.iter().fold(error, |error, ledger| ledger.explained(error))
    }

    async fn evaluate_when_due(&mut self, metrics: &mut Metrics) -> Result<(), Error> {
        if !self.learning.feed.evaluates_at(self.step, self.total) {
            return Ok(());
        }
        let begun = Instant::now();
        metrics.extend(metrics_of(&self.learning.evaluate().await?.report, None));
        self.watch.clear();
        self.clock.name("perf/evaluation_s", begun.elapsed().as_secs_f64());
        Ok(())
    }

    /// The held-out evaluation before or after the run, unless it is there already (from before a resume).
    async fn evaluate_once(&mut self, when: &str) -> Result<Option<Evaluation>, Failure> {
        let path = self.folder.join(format!("eval_{when}.json"));
        let feed = &self.learning.feed;
        if !feed.evaluates() || (when == AFTER && feed.reads_examples()) {
            return Ok(None); // on examples the last step has done it
        }
        if when == BEFORE && self.step > 0 {
            return Ok(Evaluation::read(&path)?);
        }
        let found = self.learning.evaluate().await.map_err(|error| self.explained(error))?;
        self.watch.clear();
        let evaluation = Evaluation::of(&found, &self.learning.feed);
        self.terminal.note(&format!("{when} training: {}", evaluation.said()));
        if let Evaluation::Examples(metrics) = &evaluation {
            self.log.write_start(metrics)?;
        }
        evaluation.write(&path)?;
        Ok(Some(evaluation))
    }

    async fn save_when_due(&mut self) -> Result<(), Error> {
        let last = self.step == self.total;
        let due = self.save_every.is_some_and(|every| last || self.step.is_multiple_of(every));
        if due || (last && self.learning.feed.reads_examples()) {
            let unsaved = |error| Error::Refused(format!("{error}; --resume continues from the checkpoint before it"));
            let begun = Instant::now();
            self.save().await.map_err(unsaved)?;
            self.clock.name("perf/checkpoint_s", begun.elapsed().as_secs_f64());
        }
        Ok(())
    }

    async fn save(&mut self) -> Result<PathBuf, Failure> {
        self.log.sync()?;
        let unfinished = self.checkpoints.begin(self.step)?;
        let path = self.learning.save(unfinished, self.step, (self.held, &self.tokenizer), self.metric.clone()).await?;
        self.saved = Some((self.step, path.clone()));
        self.checkpoints.prune(self.step)?;
        Ok(path)
    }

    /// A lost worker, and how the run goes on without it.
    fn with_next_step(&self, failure: Failure) -> Failure {
        let Failure::Worker(cause) = failure else { return failure };
        let next = match &self.saved {
            Some((step, _)) => format!("--resume goes on from the checkpoint of step {step}"),
            None => "there is no checkpoint yet: --resume begins this run again".into(),
        };
        Failure::Worker(format!("{cause}\n{next}"))
    }

    /// After a signal: the last finished step is saved. Before the first there is nothing to save, only to begin again.
    async fn stop(&mut self) -> Result<(), Failure> {
        self.watch.clear();
        if self.step == 0 {
            return Err(Failure::Interrupted(BEFORE_THE_FIRST_STEP.into()));
        }
        let path = match &self.saved {
            Some((step, path)) if *step == self.step => path.clone(),
            _ => self.save().await?,
        };
        Err(Failure::Interrupted(format!("step {} is saved in {}; --resume continues", self.step, path.display())))
    }

    /// The trained model as a Hugging Face folder, the report, the last lines.
    async fn finish(&mut self, before: Option<Evaluation>, after: Option<Evaluation>) -> Result<(), Failure> {
        let (role, name) = A::EXPORTS;
        let model = self.folder.join(name);
        let statistics = self.learning.score_statistics(&self.interrupt).await?;
        self.watch.clear();
        let unwritten = |error| failed(&model, error);
        let whole = WholeFolder::begin(&model, model.with_extension("unfinished")).map_err(unwritten)?;
        self.learning.roles.group(role).export(absolute(whole.unfinished()), statistics).await?;
        whole.finish().map_err(unwritten)?;
        let report = write_report(&self.folder, A::REPORT)?;
        self.terminal.summary(&Summary {
            steps: self.step,
            seconds: self.begun.elapsed().as_secs_f64(),
            num_prompts: after.as_ref().map_or(0, Evaluation::num_prompts),
            reward_before: before.as_ref().and_then(Evaluation::reward),
            reward_after: after.as_ref().and_then(Evaluation::reward),
            kl: self.work.as_ref().and_then(|work| work.last_kl),
            report: Some(report),
            model: Some(model),
            tensorboard: Some(self.folder.join("tensorboard")),
        });
        Ok(())
    }
}

/// Makes the run folder, or takes it up as it was after `step`.
fn open_folder(
    folder: &Path,
    resumes: bool,
    (step, total): (u64, u64),
    resolved: &str,
    plan: Option<String>,
) -> Result<RunLog, Failure> {
    make_run_folder(folder)?;
    let log = if resumes { RunLog::resume(folder, step)? } else { RunLog::create(folder)? };
    write_whole(&folder.join(RESOLVED_FILE), resolved)?;
    if step < total {
        plan::keep(folder, plan.as_deref())?;
    }
    Ok(log)
}

const BEFORE: &str = "before";
const AFTER: &str = "after";
