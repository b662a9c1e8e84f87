//! The outer loop of a PPO run: step, log, evaluate, checkpoint, stop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use echelon_algorithms::kl::KlController;
use echelon_algorithms::ppo::{self, Moment, StepReport};
use echelon_core::Error;
use echelon_core::progress::Interrupt;
use echelon_core::role::{Role, Roles};
use echelon_core::verb::{Export, Restore, Save};
use echelon_models::tokenizer::Tokenizer;
use echelon_placement::planner::Plan;

use crate::checkpoint::{Checkpoints, Measured, Resumed, RunState};
use crate::crew::End;
use crate::forecast::Forecast;
use crate::layout::Layout;
use crate::machine;
use crate::models::Held;
use crate::monitor::{Evaluation, Metrics, Outcome, RunClock, RunLog, StepLine, Terminal, write_report};
use crate::plan;
use crate::program::{
    Arguments, BEFORE_THE_FIRST_STEP, Failure, WholeFolder, make_run_folder, run_folder, watch_signals, write_whole,
};
use crate::prompts::{TrainingPrompts, evaluation_prompts};
use crate::recipe::{RESOLVED_FILE, Recipe, ResolvedRecipe, Root};
use crate::replay::{self, record};
use crate::resume::resume;
use crate::watch::Watch;
use crate::wire::{self, ModelFolders, RunInputs, Wired};
use crate::worker;

mod evaluate;
pub mod memory;
pub(crate) mod metrics;
mod out_of_memory;

use evaluate::{Evaluator, eval_metrics};
use memory::MemoryLedger;
use metrics::{Work, samples_of, step_metrics};

/// `ppo RECIPE`: everything from the arguments to the report.
///
/// # Errors
/// See [`Failure`].
pub fn main(arguments: &Arguments) -> Result<(), Failure> {
    if let Some(format) = arguments.plan {
        let recipe = Recipe::load_for_plan(&arguments.recipe, &arguments.sets)?;
        recipe.check_shapes()?;
        let mut recipe = recipe.resolve();
        plan::count_gpus(&mut recipe.placement.devices);
        let headed = recipe.to_toml_headed("The recipe as it would run, with every default.");
        return plan::print(format, (headed, recipe.to_json()), plan::ask(&recipe)?);
    }
    let mut recipe = Recipe::load(&arguments.recipe, &arguments.sets)?.resolve();
    plan::count_gpus(&mut recipe.placement.devices);
    let folder = run_folder(&recipe.name, arguments)?;
    let runtime = tokio::runtime::Runtime::new().map_err(Failure::other)?;
    // The driver's tensors are Send but not Sync: the loop stays on this thread.
    let outcome = runtime.block_on(async {
        let mut run = Run::prepare(recipe, folder, arguments.resume).await?;
        let outcome = match run.steps().await {
            Err(failure) => Err(run.with_next_step(run.wired.crew.explain(failure).await)),
            done => done,
        };
        run.wired.crew.finish(outcome.as_ref().err().map_or(End::Done, End::of)).await;
        outcome
    });
    runtime.shutdown_background(); // a reward program that is still thinking is not waited for
    outcome
}

/// A run between its first line and its last.
struct Run {
    recipe: ResolvedRecipe,
    folder: PathBuf,
    wired: Wired,
    prompts: TrainingPrompts,
    evaluator: Option<Evaluator>,
    checkpoints: Checkpoints,
    log: RunLog,
    kl: KlController,
    tokenizer: Arc<Tokenizer>,
    terminal: Arc<Terminal>,
    watch: Arc<Watch>,
    interrupt: Interrupt,
    work: Work,
    memory: MemoryLedger,
    /// What the devices reach together in large products; known after the first step.
    matmul_rate: Option<f64>,
    /// Where `train.calibrate` asks for it.
    forecast: Option<Forecast>,
    clock: RunClock,
    held: Held,
    begun: Instant,
    /// The last finished step.
    step: u64,
    policy_version: u64,
    /// What `checkpoint.best_metric` was at that step, where it was measured.
    metric: Option<Measured>,
    /// The newest checkpoint that is known to be whole, with its step.
    saved: Option<(u64, PathBuf)>,
}

impl Run {
    /// Loads, checks and restores everything; only then is the run folder made, or changed.
    async fn prepare(recipe: ResolvedRecipe, folder: PathBuf, resumes: bool) -> Result<Run, Failure> {
        let begun = Instant::now();
        let resolved = recipe.to_toml();
        let checkpoints = Checkpoints::new(&folder, &recipe.checkpoint);
        let resumed = if resumes { resume::<Recipe>(&folder, &checkpoints, &resolved)? } else { Resumed::default() };
        let mut inputs = Inputs::load(&recipe, &resumed)?;
        check_replay(&recipe, &resumed, &mut inputs.prompts)?;

        let terminal = Arc::new(Terminal::new(recipe.train.steps as u64));
        let watch = Arc::new(Watch::new(terminal.clone()));
        let interrupt = Interrupt::default();
        watch_signals(interrupt.clone());
        let shape = wire::shape(&inputs.folders.actor)?;
        let memory = MemoryLedger::new(&recipe, &inputs.folders, inputs.held, &inputs.layout)?;
        let forecast = match recipe.train.calibrate {
            true => Some(Forecast::new(&recipe, &inputs.folders, inputs.held, &inputs.layout)?),
            false => None,
        };
        header(&terminal, (&recipe, shape.shape().num_params()), &inputs, &folder);
        resumed.notes.iter().chain(&inputs.note).for_each(|note| terminal.note(note));
        let Inputs { folders, held, tokenizer, mut prompts, evaluator, layout, plan, .. } = inputs;
        let (device, saved) = (wire::device_name(held.pass.device), resumed.saved.as_ref());
        let elsewhere = saved.and_then(|(_, state)| state.note_on(&device, held.deterministic));
        elsewhere.iter().for_each(|note| terminal.note(note));
        let plan = plan.map(|plan| format!("workers {layout}\n\n{plan}\n"));
        let parts = (interrupt.clone(), watch.clone() as _);
        let teller = terminal.clone();
        let say = Arc::new(move |line: &str| teller.note(line));
        let read = RunInputs { folders, held, tokenizer: tokenizer.clone(), layout, run_folder: folder.clone() };
        let wired = wire::wire(&recipe, read, parts, say).await?;
        let step = resumed.saved.as_ref().map_or(0, |(_, state)| state.step);
        let opened = async {
            if let Some((path, state)) = &resumed.saved {
                restore(&wired, &mut prompts, path, state).await?;
            }
            make_run_folder(&folder)?;
            let log = if resumes { RunLog::resume(&folder, step)? } else { RunLog::create(&folder)? };
            write_whole(&folder.join(RESOLVED_FILE), &resolved)?;
            if step < recipe.train.steps as u64 {
                plan::keep(&folder, plan.as_deref())?;
            }
            Ok(log)
        };
        let log = match opened.await {
            Ok(log) => log,
            Err(failure) => return Err(wired.crew.give_up(failure).await),
        };
        let mut run = Run {
            folder,
            wired,
            prompts,
            evaluator,
            checkpoints,
            log,
            kl: kl_controller(&recipe),
            tokenizer,
            terminal,
            watch,
            interrupt,
            work: Work::new(&shape, &recipe),
            memory,
            matmul_rate: None,
            forecast,
            clock: RunClock::start(),
            held,
            begun,
            step,
            policy_version: 0,
            metric: None,
            saved: None,
            recipe,
        };
        if let Some((path, state)) = resumed.saved {
            run.take_up(path, state);
        }
        Ok(run)
    }

    /// Goes on from a checkpoint that the roles and the prompts have taken up.
    fn take_up(&mut self, path: PathBuf, state: RunState) {
        self.terminal.note(&format!("resumed after step {} from {}", state.step, path.display()));
        self.kl = state.kl.unwrap_or(self.kl);
        self.policy_version = state.policy_version;
        self.metric = state.metric;
        self.saved = Some((state.step, path));
    }

    /// Every step that is left, with what surrounds it.
    async fn steps(&mut self) -> Result<(), Failure> {
        let before = match self.evaluate_once("eval_before.json").await {
            Err(Failure::Interrupted(_)) => return self.stop().await,
            before => before?,
        };
        self.clock = RunClock::start();
        while self.step < self.recipe.train.steps as u64 {
            let position = self.prompts.position();
            match self.step().await {
                Err(error) if matches!(error.root(), Error::Interrupted) => {
                    self.prompts.restore(&position)?;
                    return self.stop().await;
                }
                outcome => outcome.map_err(|error| self.memory.explained(error))?,
            }
            if self.interrupt.is_raised() {
                return self.stop().await;
            }
        }
        match self.evaluate_once("eval_after.json").await {
            Err(Failure::Interrupted(_)) => self.stop().await,
            after => self.finish(before, after?).await,
        }
    }

    /// One step: learn, then log, evaluate and save as the recipe says.
    async fn step(&mut self) -> Result<(), Error> {
        let step = self.step + 1;
        let begun = Instant::now();
        let recipe = &self.recipe;
        let (size, samples) = (recipe.rollout.batch_size, recipe.rollout.samples_per_prompt);
        let prompts =
            self.prompts.next_batch(step, size, samples, recipe.seed).map_err(|e| Error::Refused(e.to_string()))?;
        self.work.begin();
        let now = Moment { step, kl_coef: self.kl.coef(), interrupt: &self.interrupt };
        let report = ppo::step(&self.wired.ppo, &self.wired.roles, prompts, now).await?;
        let _finishing = self.interrupt.defer(); // the weights have moved: what belongs to this step is done
        if let (Some(folder), Some(rollout)) = (&recipe.rollout.record, &report.rollout) {
            record(&folder.0, step, rollout)?;
        }
        self.watch.clear();
        let mut metrics = step_metrics(&report, self.kl.coef());
        self.kl.update(report.kl, report.scores.len());
        self.step = step;
        self.policy_version = report.policy_version;
        let phases_s = begun.elapsed().as_secs_f64();
        if self.matmul_rate.is_none() {
            self.matmul_rate = Some(self.wired.crew.matmul_rate().await?);
        }
        self.work.record(&mut metrics, &report, phases_s, self.matmul_rate.filter(|rate| *rate > 0.0));
        let memory = self.wired.crew.memory().await?;
        for warning in self.memory.record(&mut metrics, &memory) {
            self.terminal.note(&warning);
        }
        if let Some(forecast) = &mut self.forecast {
            let begun = Instant::now();
            forecast.record(&mut metrics, &report, &self.interrupt);
            self.clock.name("perf/calibration_s", begun.elapsed().as_secs_f64());
        }
        let evaluation_began = Instant::now();
        let evaluation = match (&self.evaluator, recipe.eval.every_steps) {
            (Some(evaluator), Some(every)) if step.is_multiple_of(every as u64) => {
                Some(evaluator.run(&self.wired).await?)
            }
            _ => None,
        };
        if let Some(evaluation) = &evaluation {
            metrics.extend(eval_metrics(evaluation));
            self.clock.name("perf/evaluation_s", evaluation_began.elapsed().as_secs_f64());
        }
        self.clock.record(&mut metrics, phases_s);
        self.record(&metrics, &report).map_err(|error| Error::other("logging", error))?;
        let last = step == self.recipe.train.steps as u64;
        let checkpoint = &self.recipe.checkpoint;
        self.metric = self.checkpoints.measured(&metrics);
        if checkpoint.every_steps.is_some_and(|every| last || step.is_multiple_of(every as u64)) {
            let unsaved = |error| Error::Refused(format!("{error}; --resume continues from the checkpoint before it"));
            let begun = Instant::now();
            self.save().await.map_err(unsaved)?;
            self.clock.name("perf/checkpoint_s", begun.elapsed().as_secs_f64());
        }
        Ok(())
    }

    fn record(&mut self, metrics: &Metrics, report: &StepReport) -> Result<(), Failure> {
        let samples = samples_of(self.step, report, self.recipe.rollout.samples_per_prompt);
        self.log.write(self.step, metrics, &samples)?;
        self.terminal.step(&StepLine::ppo(self.step, metrics));
        Ok(())
    }

    async fn save(&mut self) -> Result<PathBuf, Failure> {
        self.log.sync()?;
        let unfinished = self.checkpoints.begin(self.step)?;
        let file = |name| worker::absolute(&unfinished.file(name));
        let (actor, critic) = (file("actor.safetensors"), file("critic.safetensors"));
        self.wired.roles.actor.save(Save { role: Role::Actor, file: actor }).await?;
        self.wired.roles.critic.save(Save { role: Role::Critic, file: critic }).await?;
        let state = RunState {
            program: Recipe::PROGRAM.into(),
            step: self.step,
            policy_version: self.policy_version,
            data: self.prompts.position(),
            kl: Some(self.kl),
            num_threads: tch::get_num_threads(),
            weight_layout: Some(self.held.weight_layout),
            device: Some(wire::device_name(self.held.pass.device)),
            deterministic: Some(self.held.deterministic),
            render_time: self.tokenizer.render_time(),
            metric: self.metric.clone(),
        };
        let path = unfinished.finish(&state)?;
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

    /// The held-out evaluation of this name, unless it is there already (from before a resume).
    async fn evaluate_once(&mut self, name: &str) -> Result<Option<Evaluation>, Failure> {
        let path = self.folder.join(name);
        let Some(evaluator) = &self.evaluator else { return Ok(None) };
        if name == "eval_before.json" && self.step > 0 {
            return Ok(Evaluation::read(&path)?);
        }
        let evaluation = evaluator.run(&self.wired).await.map_err(|error| self.memory.explained(error))?;
        self.watch.clear();
        let reward = format!("{:.3} ±{:.3}", evaluation.mean_reward, evaluation.std_reward);
        let when = if name == "eval_before.json" { "before" } else { "after" };
        self.terminal.note(&format!("{when} training: reward {reward} on {} held-out prompts", evaluation.num_prompts));
        evaluation.write(&path)?;
        Ok(Some(evaluation))
    }

    /// The trained actor as a Hugging Face folder, the report, the last lines.
    async fn finish(&mut self, before: Option<Evaluation>, after: Option<Evaluation>) -> Result<(), Failure> {
        let actor = self.folder.join("actor");
        let whole = WholeFolder::begin(&actor)?;
        let folder = worker::absolute(whole.path());
        self.wired.roles.actor.export(Export { role: Role::Actor, folder, score_statistics: None }).await?;
        whole.finish()?;
        let report = write_report(&self.folder)?;
        let reward = |evaluation: &Evaluation| (evaluation.mean_reward, evaluation.std_reward);
        self.terminal.summary(&Outcome {
            steps: self.step,
            seconds: self.begun.elapsed().as_secs_f64(),
            num_prompts: after.as_ref().map_or(0, |evaluation| evaluation.num_prompts),
            reward_before: before.as_ref().map(reward),
            reward_after: after.as_ref().map(reward),
            kl: self.work.last_kl,
            report: Some(report),
            model: Some(actor),
            tensorboard: Some(self.folder.join("tensorboard")),
        });
        Ok(())
    }
}

/// What a run reads before it starts anything.
struct Inputs {
    folders: ModelFolders,
    held: Held,
    /// Why the device is not what the hardware suggests.
    warning: Option<String>,
    /// What is otherwise than before a resume.
    note: Option<String>,
    tokenizer: Arc<Tokenizer>,
    prompts: TrainingPrompts,
    evaluator: Option<Evaluator>,
    layout: Layout,
    plan: Option<Plan>,
}

impl Inputs {
    fn load(recipe: &ResolvedRecipe, resumed: &Resumed) -> Result<Inputs, Failure> {
        let folders = wire::model_folders(recipe)?;
        let (held, warning) = wire::held(&recipe.train.compute, &recipe.placement.devices, None)?;
        wire::check_limits(recipe, &folders, held)?;
        let (layout, plan) = wire::layout(recipe, &folders, held)?;
        let tokenizer = Arc::new(resumed.tokenizer(&folders.actor)?);
        let format = wire::prompt_format(recipe, tokenizer.clone());
        let prompts = TrainingPrompts::load(&recipe.data, format.clone(), recipe.seed)?;
        let evaluator = evaluation_prompts(recipe, &format)?.map(|prompts| Evaluator::new(prompts, recipe));
        let before = resumed.saved.as_ref().and_then(|(_, state)| state.weight_layout);
        let (weight_layout, note) = machine::weight_layout(&wire::shape(&folders.actor)?.shape(), held, before)?;
        let held = Held { weight_layout, ..held };
        Ok(Inputs { folders, held, warning, note, tokenizer, prompts, evaluator, layout, plan })
    }
}

/// Refuses rollouts that are not those of the steps to come. The prompts are drawn from and put back.
fn check_replay(recipe: &ResolvedRecipe, resumed: &Resumed, prompts: &mut TrainingPrompts) -> Result<(), Failure> {
    let begun = prompts.position();
    if let Some((_, state)) = &resumed.saved {
        prompts.restore(&state.data)?;
    }
    let step = resumed.saved.as_ref().map_or(0, |(_, state)| state.step) + 1;
    let (size, samples) = (recipe.rollout.batch_size, recipe.rollout.samples_per_prompt);
    let first = prompts.next_batch(step, size, samples, recipe.seed)?;
    prompts.restore(&begun)?;
    let steps = step..=recipe.train.steps as u64;
    let first = (!steps.is_empty()).then_some(&first);
    replay::check(&recipe.rollout, steps, first)
}

/// Gives the roles and the prompts what they had at a checkpoint; the run folder stays as it is.
async fn restore(wired: &Wired, prompts: &mut TrainingPrompts, path: &Path, state: &RunState) -> Result<(), Failure> {
    tch::set_num_threads(state.num_threads);
    prompts.restore(&state.data)?;
    let request = |role, file| Restore { role, file: worker::absolute(&path.join(file)) };
    let Roles { actor, critic, generator, .. } = &wired.roles;
    actor.restore(request(Role::Actor, "actor.safetensors")).await.map_err(Failure::input)?;
    critic.restore(request(Role::Critic, "critic.safetensors")).await.map_err(Failure::input)?;
    Ok(actor.publish_weights(generator, state.policy_version).await?)
}

fn kl_controller(recipe: &ResolvedRecipe) -> KlController {
    match recipe.ppo.kl_target {
        Some(target) => KlController::adaptive(recipe.ppo.kl_coef, target, recipe.ppo.kl_horizon),
        None => KlController::fixed(recipe.ppo.kl_coef),
    }
}

fn header(
    terminal: &Terminal,
    (recipe, num_params): (&ResolvedRecipe, i64),
    Inputs { held, warning, prompts, layout, .. }: &Inputs,
    folder: &Path,
) {
    let mut rows = vec![
        ("actor", format!("{} ({:.1}M parameters)", recipe.actor.model, num_params as f64 / 1e6)),
        ("device", wire::device_line(*held)),
        ("prompts", format!("{} to learn from", prompts.num_rows())),
        ("batch", recipe.batch.to_string()),
        ("run folder", folder.display().to_string()),
    ];
    if layout.num_workers > 1 {
        rows.insert(2, ("workers", layout.to_string()));
        let shares = layout.shares(&recipe.batch);
        if !shares.is_empty() {
            rows.insert(5, ("shares", shares.join("\n"))); // none, where every role has one worker
        }
    }
    rows.extend(warning.iter().map(|warning| ("warning", warning.clone())));
    for (name, report) in prompts.reports.iter().filter(|(_, report)| report.num_dropped() > 0) {
        rows.push(("left out", format!("{name}: {report}")));
    }
    terminal.header(&format!("ppo {}", recipe.name), &rows);
}
