//! What one device's thread owns: the roles placed on it, and how each verb is answered.

use std::path::PathBuf;
use std::sync::Arc;

use echelon_algorithms::update::{ActorConfig, CriticConfig, update_actor, update_critic};
use echelon_core::experience::Experience;
use echelon_core::memory::{Load, MemoryReport, Meter, PassLoad, Phase, StateBytes};
use echelon_core::progress::{Interrupt, Progress};
use echelon_core::role::Role;
use echelon_core::rollout::{Rollout, Tokens};
use echelon_core::shim;
use echelon_core::verb::*;
use echelon_core::zero::{
    Head, PolicyOutput, ScalarValues, Trainable, TrainingState, Units, forward_rows_through, stack_rows, write_tensors,
};
use echelon_core::{Error, Result};
use echelon_generation::Engine;
use echelon_models::config::HeadKind;
use echelon_models::decoder::Decoder;
use echelon_models::head::{LogprobOutput, ScalarOutput};
use echelon_models::tokenizer::Tokenizer;
use tch::{Device, Tensor};

use crate::generator::{Generator, Sender};
use crate::learner::Learner;
use crate::matmul_rate::matmul_rate;
use crate::models::{FrozenPolicy, FrozenScorer, Held, Policy, Scorer, export, restore_state, save_state};
use crate::seat::Seat;

/// The roles of one device. A role that is placed elsewhere is `None` here.
pub struct DeviceRoles {
    pub actor: Option<LearningActor>,
    pub critic: Option<Deferred<LearningCritic>>,
    pub reference: Option<Deferred<FrozenPolicy>>,
    pub reward: Option<Deferred<RewardModel>>,
    pub generator: Option<Generator>,
    /// What a program trains that is not PPO.
    pub learner: Option<Learner>,
    /// Sends the actor's weights to generators on other workers.
    pub sender: Option<Sender>,
    pub engine: Engine,
    pub tokenizer: Arc<Tokenizer>,
    pub held: Held,
    pub seat: Seat,
    pub policy_version: u64,
    pub interrupt: Interrupt,
    pub progress: Arc<dyn Progress>,
    /// Where a batch that made a loss non-finite is written for inspection.
    pub run_folder: PathBuf,
    pub meter: Meter,
    /// Of large products on this device, once it is known.
    pub matmul_rate: Option<f64>,
}

pub struct LearningActor {
    pub policy: Policy,
    pub config: ActorConfig,
    /// The folder it started from.
    pub folder: PathBuf,
}

pub struct LearningCritic {
    pub model: Scorer,
    pub config: CriticConfig,
    pub folder: PathBuf,
}

pub struct RewardModel {
    pub model: FrozenScorer,
    /// Its tokenizer, where it is not the actor's: then it gets the text.
    pub tokenizer: Option<Tokenizer>,
}

/// A role that is loaded when it is first asked: the first rollout does not wait for models that only score.
pub struct Deferred<T> {
    state: DeferredState<T>,
    device: Device,
}

enum DeferredState<T> {
    Waiting(Option<Build<T>>),
    Loaded(T, u64),
}

type Build<T> = Box<dyn FnOnce() -> Result<T>>;

impl<T> Deferred<T> {
    /// A role of `device`.
    pub fn new(device: Device, build: impl FnOnce() -> Result<T> + 'static) -> Deferred<T> {
        Deferred { state: DeferredState::Waiting(Some(Box::new(build))), device }
    }

    /// # Errors
    /// What loading says; a later call says that it failed before.
    pub fn get(&mut self) -> Result<&mut T> {
        if let DeferredState::Waiting(build) = &mut self.state {
            let build = build.take().ok_or_else(|| Error::Refused("this model could not be loaded before".into()))?;
            let before = held_bytes(self.device);
            let value = build()?;
            self.state = DeferredState::Loaded(value, held_bytes(self.device).saturating_sub(before));
        }
        match &mut self.state {
            DeferredState::Loaded(value, _) => Ok(value),
            DeferredState::Waiting(_) => unreachable!("loaded above"),
        }
    }

    /// What was loaded, if it was.
    fn loaded(&mut self) -> Option<&mut T> {
        if let DeferredState::Loaded(value, _) = &mut self.state { Some(value) } else { None }
    }

    /// Bytes that loading left in tensors, mapped ones among them: a frozen model's weights.
    fn weights(&self) -> StateBytes {
        let weights = if let DeferredState::Loaded(_, bytes) = &self.state { *bytes } else { 0 };
        StateBytes { weights, ..StateBytes::default() }
    }
}

/// Bytes live in tensors of this rank's device, and those of mapped weights that a CPU computes on.
fn held_bytes(device: Device) -> u64 {
    let mapped = if device == Device::Cpu { shim::mapped_bytes() } else { 0 };
    (shim::live_bytes(device) + mapped) as u64
}

impl DeviceRoles {
    /// No role yet.
    pub fn none(
        seat: Seat,
        held: Held,
        tokenizer: Arc<Tokenizer>,
        (interrupt, progress): (Interrupt, Arc<dyn Progress>),
    ) -> DeviceRoles {
        DeviceRoles {
            actor: None,
            critic: None,
            reference: None,
            reward: None,
            generator: None,
            learner: None,
            sender: None,
            engine: Engine::default(),
            tokenizer,
            held,
            seat,
            policy_version: 0,
            interrupt,
            progress,
            run_folder: PathBuf::new(),
            meter: Meter::new(held.pass.device),
            matmul_rate: None,
        }
    }

    fn learner(&mut self, what: &str) -> Result<&mut Learner> {
        self.learner.as_mut().ok_or_else(|| Error::Refused(format!("`{what}`, and no model learns from examples here")))
    }

    /// The training state of a role.
    fn state(&mut self, role: Role) -> Result<&mut TrainingState> {
        match role {
            _ if self.learner.is_some() => Ok(self.learner.as_mut().expect("seen").state()),
            Role::Critic => Ok(&mut self.critic()?.model.state),
            _ => Ok(&mut self.actor()?.policy.state),
        }
    }

    fn actor(&mut self) -> Result<&mut LearningActor> {
        self.actor.as_mut().ok_or_else(|| not_here(Role::Actor))
    }

    fn critic(&mut self) -> Result<&mut LearningCritic> {
        self.critic.as_mut().ok_or_else(|| not_here(Role::Critic))?.get()
    }

    /// Node reuse: before the generator works, what the plan moves goes to host memory. The actor's weights stay where it
    /// computes on them.
    fn set_aside(&mut self) -> Result<()> {
        let (layout, worker) = (self.seat.layout.clone(), self.seat.worker);
        let moves = |role| layout.of_worker(worker, role).is_some_and(|group| group.moves_to_host);
        let whole = |state: &TrainingState| !state.sharding().parameters();
        if let Some(actor) = self.actor.as_mut().filter(|_| moves(Role::Actor)) {
            let kept = layout.shares_weights() && whole(&actor.policy.state);
            actor.policy.state.set_aside(!kept)?;
        }
        if let Some(critic) = self.critic.as_mut().filter(|_| moves(Role::Critic)).and_then(Deferred::loaded) {
            critic.model.state.set_aside(true)?;
        }
        if let Some(frozen) = self.reference.as_mut().filter(|_| moves(Role::Reference)).and_then(Deferred::loaded) {
            frozen.units.set_aside()?;
        }
        if let Some(frozen) = self.reward.as_mut().filter(|_| moves(Role::Reward)).and_then(Deferred::loaded) {
            frozen.model.units.set_aside()?;
        }
        Ok(())
    }

    /// Ends [`DeviceRoles::set_aside`], if there was one: before anything but the generator works.
    fn bring_back(&mut self) -> Result<()> {
        if let Some(actor) = &mut self.actor {
            actor.policy.state.bring_back()?;
        }
        if let Some(critic) = self.critic.as_mut().and_then(Deferred::loaded) {
            critic.model.state.bring_back()?;
        }
        if let Some(frozen) = self.reference.as_mut().and_then(Deferred::loaded) {
            frozen.units.bring_back()?;
        }
        if let Some(frozen) = self.reward.as_mut().and_then(Deferred::loaded) {
            frozen.model.units.bring_back()?;
        }
        Ok(())
    }

    /// What a forward pass without learning needs beside a model.
    fn asking(&self, phase: &'static str) -> Asking {
        Asking { phase, held: self.held, interrupt: self.interrupt.clone(), progress: self.progress.clone() }
    }

    /// What of `tokens` goes through a model at once.
    fn pass_load(&self, tokens: &Tokens) -> Load {
        Load::Pass(PassLoad::of(tokens, self.held.pass.tokens_per_micro_batch))
    }

    /// Writes the batch of a refused optimizer step beside the run's other files and says where.
    fn keep_evidence(&self, error: Error, tokens: &Tokens, more: &[(&str, &Tensor)]) -> Error {
        let Error::NonFinite { role, optimizer_step, .. } = &error else { return error };
        let worker = if self.seat.is_alone() { String::new() } else { format!("-worker-{}", self.seat.worker) };
        let path = self.run_folder.join(format!("non-finite-{role}-{optimizer_step}{worker}.safetensors"));
        let named = |(name, tensor): (&str, &Tensor)| (name.to_string(), tensor.shallow_clone());
        let lengths = Tensor::from_slice(&tokens.lengths);
        let own = [("token_ids", &tokens.token_ids), ("lengths", &lengths), ("response_mask", &tokens.mask)];
        let tensors: Vec<_> = own.into_iter().chain(more.iter().copied()).map(named).collect();
        match write_tensors(&path, &tensors, &[]) {
            Ok(()) => Error::Refused(format!("{error}; its batch is in {}", path.display())),
            Err(_) => error,
        }
    }

    fn keep_experience(&self, error: Error, experience: &Experience) -> Error {
        let mut more = vec![
            ("old_logprobs", &experience.old_logprobs),
            ("values", &experience.values),
            ("advantages", &experience.advantages),
            ("returns", &experience.returns),
        ];
        more.extend(experience.ref_logprobs.iter().map(|tensor| ("ref_logprobs", tensor)));
        self.keep_evidence(error, &experience.tokens, &more)
    }
}

struct Asking {
    phase: &'static str,
    held: Held,
    interrupt: Interrupt,
    progress: Arc<dyn Progress>,
}

impl Asking {
    /// Outputs of a model that does not learn, one per micro-batch, in the order of the rows.
    fn ask<H: Head>(
        &self,
        (units, model): (&mut dyn Units, (&Decoder, &H)),
        tokens: &Tokens,
        read: impl Fn(&H::Output) -> Tensor,
    ) -> Result<Vec<Tensor>> {
        let mut parts = Vec::new();
        let each = self.collect(tokens, &mut parts, read);
        forward_rows_through(units, model, &self.held.pass, tokens, &self.interrupt, each)?;
        Ok(parts)
    }

    /// The same of one that learns.
    fn ask_learner<H: Head>(
        &self,
        model: &mut Trainable<Decoder, H>,
        tokens: &Tokens,
        read: impl Fn(&H::Output) -> Tensor,
    ) -> Result<Vec<Tensor>> {
        let mut parts = Vec::new();
        let each = self.collect(tokens, &mut parts, read);
        model.forward_rows(tokens, &self.interrupt, each)?;
        Ok(parts)
    }

    fn collect<O>(
        &self,
        tokens: &Tokens,
        parts: &mut Vec<Tensor>,
        read: impl Fn(&O) -> Tensor,
    ) -> impl FnMut(&[i64], O) {
        let mut done = 0;
        move |rows, output| {
            parts.push(read(&output));
            done += rows.len();
            self.progress.advance(self.phase, done, tokens.num_rows());
        }
    }
}

fn not_here(role: Role) -> Error {
    Error::Refused(format!("the {role} is not placed on this device"))
}

fn size(tokens: &Tokens) -> [i64; 2] {
    [tokens.num_rows() as i64, tokens.token_ids.size()[1]]
}

impl Serve<Generate> for DeviceRoles {
    fn serve(&mut self, request: Generate) -> Result<Rollout> {
        let generator = self.generator.as_ref().ok_or_else(|| not_here(Role::Generator))?;
        generator.check(self.policy_version)?;
        let mut gathered = 0;
        if let (Generator::OnActor, Some(actor)) = (generator, &mut self.actor) {
            actor.policy.state.bring_back()?; // a part that is away cannot be gathered
            let before = held_bytes(self.held.pass.device);
            actor.policy.state.gather_all()?;
            gathered = held_bytes(self.held.pass.device).saturating_sub(before);
        }
        self.set_aside()?;
        // Metered when what leaves the device has left it.
        let metering = self.meter.begin_with(Role::Generator, Phase::Generate, gathered);
        let generator = self.generator.as_ref().expect("seen above");
        let own = match generator {
            Generator::OnActor => None,
            Generator::Beside(weights) => Some((&weights.model, &weights.head)),
            Generator::Apart(apart) => Some((&apart.weights.model, &apart.weights.head)),
        };
        let actor = if own.is_none() { self.actor.as_mut() } else { None };
        let (model, head) = match (own, &actor) {
            (Some(own), _) => own,
            (None, Some(actor)) => (&actor.policy.model, actor.policy.head.weight()),
            (None, None) => return Err(not_here(Role::Actor)),
        };
        let policy = echelon_generation::Policy { model, head, tokenizer: Some(&self.tokenizer) };
        let (prompts, sampling) = (&request.prompts, &request.sampling);
        let generated = self.engine.generate(policy, prompts, sampling, self.progress.as_ref(), &self.interrupt);
        let load = generated.as_ref().ok().map(|(sequences, _)| self.engine.load(model, prompts, sampling, sequences));
        if let Some(actor) = actor {
            actor.policy.state.release_all()?;
        }
        let (sequences, report) = generated?;
        let resident = StateBytes { weights: generator.bytes() as u64, ..StateBytes::default() };
        self.meter.end(metering, resident, Load::Decode(load.expect("it generated")));
        Ok(Rollout::from_sequences(prompts, &sequences, self.policy_version, report))
    }
}

impl Serve<Logprobs> for DeviceRoles {
    fn serve(&mut self, request: Logprobs) -> Result<Tensor> {
        self.bring_back()?;
        let tokens = &request.tokens;
        let read = |output: &LogprobOutput| output.logprobs().shallow_clone();
        let load = self.pass_load(tokens);
        let parts = match request.role {
            Role::Reference => {
                let asking = self.asking("reference");
                let deferred = self.reference.as_mut().ok_or_else(|| not_here(Role::Reference))?;
                let FrozenPolicy { model, head, units } = deferred.get()?;
                let metering = self.meter.begin(Role::Reference, Phase::Score);
                let parts = asking.ask((&mut **units, (model, head)), tokens, read)?;
                self.meter.end(metering, deferred.weights(), load);
                parts
            }
            _ => {
                let asking = self.asking("logprobs");
                let metering = self.meter.begin(Role::Actor, Phase::Score);
                let policy = &mut self.actor()?.policy;
                let parts = asking.ask_learner(policy, tokens, read)?;
                let resident = policy.state.device_bytes_by_part();
                self.meter.end(metering, resident, load);
                parts
            }
        };
        Ok(stack_rows(&parts, size(tokens)))
    }
}

impl Serve<Values> for DeviceRoles {
    fn serve(&mut self, request: Values) -> Result<Tensor> {
        self.bring_back()?;
        let asking = self.asking("values");
        let read = |output: &ScalarOutput| output.values().shallow_clone();
        self.critic()?; // loaded before it is metered
        let metering = self.meter.begin(Role::Critic, Phase::Score);
        let model = &mut self.critic()?.model;
        let parts = asking.ask_learner(model, &request.tokens, read)?;
        let resident = model.state.device_bytes_by_part();
        self.meter.end(metering, resident, self.pass_load(&request.tokens));
        Ok(stack_rows(&parts, size(&request.tokens)))
    }
}

impl Serve<Scores> for DeviceRoles {
    fn serve(&mut self, request: Scores) -> Result<Tensor> {
        self.bring_back()?;
        let asking = self.asking("scores");
        let deferred = self.reward.as_mut().ok_or_else(|| not_here(Role::Reward))?;
        let reward = deferred.get()?;
        let tokens = match &reward.tokenizer {
            None => request.tokens,
            Some(tokenizer) => encode_texts(tokenizer, &request.prompts, &request.responses)?,
        };
        let read = |output: &ScalarOutput| output.values().to_device(Device::Cpu);
        let FrozenScorer { model, head, units } = &mut reward.model;
        let metering = self.meter.begin(Role::Reward, Phase::Score);
        let parts = asking.ask((&mut **units, (model, head)), &tokens, read)?;
        let resident = deferred.weights();
        self.meter.end(metering, resident, self.pass_load(&tokens));
        // A rank without rows has no part.
        Ok(if parts.is_empty() { Tensor::zeros([0], tch::kind::FLOAT_CPU) } else { Tensor::cat(&parts, 0) })
    }
}

/// Prompt and response in the words of another tokenizer, ended as its own training ended them.
fn encode_texts(tokenizer: &Tokenizer, prompts: &[String], responses: &[String]) -> Result<Tokens> {
    let rows = prompts.iter().zip(responses).map(|(prompt, response)| {
        let mut ids = tokenizer
            .encode(&format!("{prompt}{response}"))
            .map_err(|error| Error::other("the reward model's tokenizer", error))?;
        ids.extend(tokenizer.eos_ids().first());
        let mask = vec![false; ids.len()];
        Ok((ids, mask))
    });
    Ok(Tokens::from_rows(&rows.collect::<Result<Vec<_>>>()?))
}

impl Serve<UpdateActor> for DeviceRoles {
    fn serve(&mut self, request: UpdateActor) -> Result<ActorReport> {
        self.bring_back()?;
        let UpdateActor { experience, num_tokens, kl_coef } = request;
        let metering = self.meter.begin(Role::Actor, Phase::TrainActor);
        let actor = self.actor()?;
        let updated = update_actor(&mut actor.policy, &experience, num_tokens, kl_coef, &actor.config);
        let resident = actor.policy.state.device_bytes_by_part();
        self.meter.end(metering, resident, self.pass_load(&experience.tokens));
        self.progress.advance("train actor", experience.num_rows(), experience.num_rows());
        updated.map_err(|error| self.keep_experience(error, &experience))
    }
}

impl Serve<UpdateCritic> for DeviceRoles {
    fn serve(&mut self, request: UpdateCritic) -> Result<CriticReport> {
        self.bring_back()?;
        let UpdateCritic { experience, num_tokens } = request;
        self.critic()?; // loaded before it is metered
        let metering = self.meter.begin(Role::Critic, Phase::TrainCritic);
        let critic = self.critic()?;
        let updated = update_critic(&mut critic.model, &experience, num_tokens, &critic.config);
        let resident = critic.model.state.device_bytes_by_part();
        self.meter.end(metering, resident, self.pass_load(&experience.tokens));
        self.progress.advance("train critic", experience.num_rows(), experience.num_rows());
        updated.map_err(|error| self.keep_experience(error, &experience))
    }
}

impl Serve<Learn> for DeviceRoles {
    fn serve(&mut self, request: Learn) -> Result<LearnReport> {
        let (role, phase) = self.learner(Learn::NAME)?.metered();
        let metering = self.meter.begin(role, phase);
        let learner = self.learner(Learn::NAME)?;
        let learned = learner.learn(&request);
        let (resident, load) = (learner.state().device_bytes_by_part(), learner.load(&request.rows, true));
        self.meter.end(metering, resident, Load::Pass(load));
        let rows = request.rows.num_rows();
        self.progress.advance("train", rows, rows);
        learned.map_err(|error| self.keep_evidence(error, &request.rows, &[]))
    }
}

impl Serve<Assess> for DeviceRoles {
    fn serve(&mut self, Assess { rows }: Assess) -> Result<Tensor> {
        let (interrupt, progress) = (self.interrupt.clone(), self.progress.clone());
        let (role, _) = self.learner(Assess::NAME)?.metered();
        let metering = self.meter.begin(role, Phase::Score);
        let learner = self.learner(Assess::NAME)?;
        let tell = |done| progress.advance("evaluate", done, rows.num_rows());
        let numbers = learner.assess(&rows, &interrupt, tell)?;
        let (resident, load) = (learner.state().device_bytes_by_part(), learner.load(&rows, false));
        self.meter.end(metering, resident, Load::Pass(load));
        Ok(numbers)
    }
}

impl Serve<Publish> for DeviceRoles {
    fn serve(&mut self, Publish { policy_version }: Publish) -> Result<()> {
        self.bring_back()?;
        let mut actor = self.actor.as_mut();
        if let (Some(sender), Some(actor)) = (&mut self.sender, &actor) {
            sender.publish(&actor.policy.state, policy_version)?;
        }
        if let Some(generator) = &mut self.generator {
            generator.take_up(actor.as_mut().map(|actor| &mut actor.policy.state), policy_version)?;
        }
        self.policy_version = policy_version;
        Ok(())
    }
}

impl Serve<Memory> for DeviceRoles {
    fn serve(&mut self, _request: Memory) -> Result<MemoryReport> {
        Ok(self.meter.report())
    }
}

impl Serve<MatmulRate> for DeviceRoles {
    fn serve(&mut self, _request: MatmulRate) -> Result<f64> {
        let (kind, device) = (self.held.kind, self.held.pass.device);
        Ok(*self.matmul_rate.get_or_insert_with(|| matmul_rate(kind, device)))
    }
}

impl Serve<Save> for DeviceRoles {
    fn serve(&mut self, request: Save) -> Result<()> {
        self.bring_back()?;
        save_state(self.state(request.role)?, &request.file)
    }
}

impl Serve<Restore> for DeviceRoles {
    fn serve(&mut self, request: Restore) -> Result<()> {
        self.bring_back()?;
        restore_state(self.state(request.role)?, &request.file)
    }
}

impl Serve<Export> for DeviceRoles {
    fn serve(&mut self, request: Export) -> Result<()> {
        self.bring_back()?;
        let Export { role, folder, score_statistics } = request;
        match (&mut self.learner, role) {
            (Some(learner), _) => learner.export(&folder, score_statistics)?,
            (None, Role::Critic) => {
                let critic = self.critic()?;
                export(&critic.model.state, HeadKind::Score, &critic.folder, &folder, &[])?;
            }
            (None, _) => {
                let actor = self.actor()?;
                export(&actor.policy.state, HeadKind::Logits, &actor.folder, &folder, &[])?;
            }
        }
        let group = self.seat.layout.group(role);
        if self.seat.rank_in(group) != Some(0) {
            return Ok(()); // the first rank writes
        }
        self.tokenizer.save(&folder).map_err(|error| Error::other("saving the tokenizer", error))
    }
}
