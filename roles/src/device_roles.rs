//! What one device's thread owns: the roles placed on it, and how each verb is answered.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use echelon_core::data::{PROMPTS, RESPONSES, Report, Rows};
use echelon_core::memory::{Load, MemoryReport, Meter, PassLoad, StateBytes};
use echelon_core::progress::{Interrupt, Progress};
use echelon_core::role::Role;
use echelon_core::rollout::rows_of;
use echelon_core::verb::{
    Export, Generate, Generated, Learn, Logprobs, MatmulRate, Memory, Publish, Request, Restore, Save, Scores, Serve,
    Values, Verb,
};
use echelon_core::zero::{Head, Told, TrainingState, Units, forward_rows_through, stack_rows, write_tensors};
use echelon_core::{Error, Result};
use echelon_generation::Engine;
use echelon_models::decoder::Decoder;
use echelon_models::tokenizer::Tokenizer;
use tch::{Device, Tensor};

use crate::deferred::{Deferred, held_bytes};
use crate::generator::{Generator, Sender};
use crate::matmul_rate::matmul_rate;
use crate::membership::Membership;
use crate::models::{FrozenPolicy, FrozenScorer, Held, restore_state, save_state};
use crate::trained::Trained;

/// The roles of one device; those that are placed elsewhere are missing.
pub struct DeviceRoles {
    pub trained: BTreeMap<Role, Deferred<Trained>>,
    pub frozen: BTreeMap<Role, Deferred<Frozen>>,
    pub generator: Option<Generator>,
    /// Sends the actor's weights to generators on other workers.
    pub sender: Option<Sender>,
    pub engine: Engine,
    pub tokenizer: Arc<Tokenizer>,
    pub held: Held,
    pub membership: Membership,
    pub policy_version: u64,
    pub interrupt: Interrupt,
    pub progress: Arc<dyn Progress>,
    /// Where a batch that made a loss non-finite is written for inspection.
    pub run_folder: PathBuf,
    pub meter: Meter,
    /// Of large products on this device, once it is known.
    pub matmul_rate: Option<f64>,
}

/// A model that does not learn.
pub enum Frozen {
    Policy(FrozenPolicy),
    /// With its tokenizer, where it is not the actor's: then it gets the text.
    Scorer(Box<FrozenScorer>, Option<Tokenizer>),
}

impl Frozen {
    fn units(&mut self) -> &mut dyn Units {
        match self {
            Frozen::Policy(policy) => &mut *policy.units,
            Frozen::Scorer(scorer, _) => &mut *scorer.units,
        }
    }

    fn answers(&self) -> &'static str {
        if let Frozen::Policy(_) = self { Logprobs::NAME } else { Scores::NAME }
    }
}

impl DeviceRoles {
    /// The training state of a role.
    fn state(&mut self, role: Role) -> Result<&mut TrainingState> {
        Ok(self.trained(role)?.state())
    }

    fn trained(&mut self, role: Role) -> Result<&mut Trained> {
        self.trained.get_mut(&role).ok_or_else(|| not_here(role))?.get()
    }

    /// The actor, where it is on this device.
    fn actor(&mut self) -> Option<&mut Trained> {
        self.trained.get_mut(&Role::Actor).and_then(Deferred::loaded)
    }

    /// Node reuse: before the generator works, what the plan moves goes to host memory. The actor's weights stay where it
    /// computes on them.
    fn set_aside(&mut self) -> Result<()> {
        let (layout, worker) = (self.membership.layout.clone(), self.membership.worker);
        let moves = |role: &Role| layout.of_worker(worker, *role).is_some_and(|group| group.moves_to_host);
        for (role, trained) in self.trained.iter_mut().filter(|(role, _)| moves(role)) {
            let Some(state) = trained.loaded().map(Trained::state) else { continue };
            let kept = *role == Role::Actor && layout.shares_weights() && !state.sharding().parameters();
            state.set_aside(!kept)?;
        }
        let frozen = self.frozen.iter_mut().filter(|(role, _)| moves(role));
        frozen.filter_map(|(_, frozen)| frozen.loaded()).try_for_each(|frozen| frozen.units().set_aside())
    }

    /// Ends [`DeviceRoles::set_aside`], if there was one: before anything but the generator works.
    fn bring_back(&mut self) -> Result<()> {
        for trained in self.trained.values_mut().filter_map(Deferred::loaded) {
            trained.state().bring_back()?;
        }
        self.frozen.values_mut().filter_map(Deferred::loaded).try_for_each(|frozen| frozen.units().bring_back())
    }

    /// What a role's model says of rows, one tensor per micro-batch, in their order.
    fn ask<V: Verb>(&mut self, role: Role, rows: &Rows) -> Result<Vec<Tensor>> {
        self.bring_back()?;
        let (interrupt, progress, total) = (self.interrupt.clone(), self.progress.clone(), rows.num_rows());
        let mut done = 0;
        let mut each = |phase: &str, rows: usize| {
            done += rows;
            progress.advance(phase, done, total);
        };
        if self.trained.contains_key(&role) {
            let trained = self.trained(role)?; // loaded before it is metered
            answers::<V>(role, trained.answers())?;
            let metering = self.meter.begin(role, V::NAME);
            let trained = self.trained(role)?;
            let parts = trained.ask(rows, &interrupt, |rows| each(V::NAME, rows))?;
            let (resident, load) = (trained.state().device_bytes_by_part(), trained.load(rows, 1));
            self.meter.end(metering, resident, Load::Pass(load));
            return Ok(parts);
        }
        let pass = self.held.pass;
        let deferred = self.frozen.get_mut(&role).ok_or_else(|| not_here(role))?;
        let frozen = deferred.get()?;
        answers::<V>(role, frozen.answers())?;
        let metering = self.meter.begin(role, V::NAME);
        let parts = match frozen {
            Frozen::Policy(FrozenPolicy { model, head, units }) => {
                through(&mut **units, (model, head), &pass, rows, &interrupt, |rows| each("reference", rows))?
            }
            Frozen::Scorer(scorer, _) => {
                let FrozenScorer { model, head, units } = &mut **scorer;
                through(&mut **units, (model, head), &pass, rows, &interrupt, |rows| each(V::NAME, rows))?
            }
        };
        let load = PassLoad::of(rows, 1, pass.tokens_per_micro_batch, false);
        self.meter.end(metering, deferred.weights(), Load::Pass(load));
        Ok(parts)
    }

    /// Writes the batch of a refused optimizer step beside the run's other files and says where.
    fn keep_evidence(&self, error: Error, rows: &Rows) -> Error {
        let Error::NonFinite { role, optimizer_step, .. } = &error else { return error };
        let worker =
            if self.membership.is_alone() { String::new() } else { format!("-worker-{}", self.membership.worker) };
        let path = self.run_folder.join(format!("non-finite-{role}-{optimizer_step}{worker}.safetensors"));
        match write_tensors(&path, &rows.named_tensors(), &[]) {
            Ok(()) => Error::Refused(format!("{error}; its batch is in {}", path.display())),
            Err(_) => error,
        }
    }
}

/// Outputs of a model that does not learn, one per micro-batch.
fn through<H: Head<Output: Told>>(
    units: &mut dyn Units,
    model: (&Decoder, &H),
    pass: &echelon_core::zero::PassConfig,
    rows: &Rows,
    interrupt: &Interrupt,
    mut each: impl FnMut(usize),
) -> Result<Vec<Tensor>> {
    let mut parts = Vec::new();
    forward_rows_through(units, model, pass, rows, interrupt, |batch, output| {
        parts.push(output.numbers().shallow_clone());
        each(batch.len());
    })?;
    Ok(parts)
}

fn not_here(role: Role) -> Error {
    Error::Refused(format!("the {role} is not placed on this device"))
}

fn answers<V: Verb>(role: Role, own: &str) -> Result<()> {
    match own == V::NAME {
        true => Ok(()),
        false => Err(Error::Refused(format!("the {role} answers `{own}`, not `{}`", V::NAME))),
    }
}

/// Whom a request is for.
fn asked<V: Verb>(request: &Request<V>) -> Result<Role> {
    request.role.ok_or_else(|| Error::Refused(format!("`{}` of no role", V::NAME)))
}

impl Serve<Generate> for DeviceRoles {
    fn serve(&mut self, request: Request<Generate>) -> Result<Generated> {
        let generator = self.generator.as_ref().ok_or_else(|| not_here(Role::Generator))?;
        generator.check(self.policy_version)?;
        let (device, mut gathered) = (self.held.pass.device, 0);
        let on_actor = matches!(generator, Generator::OnActor);
        if let Some(actor) = self.actor().filter(|_| on_actor) {
            actor.state().bring_back()?; // a part that is away cannot be gathered
            let before = held_bytes(device);
            actor.state().gather_all()?;
            gathered = held_bytes(device).saturating_sub(before);
        }
        self.set_aside()?;
        // Metered when what leaves the device has left it.
        let metering = self.meter.begin_with(Role::Generator, Generate::NAME, gathered);
        let Generate { prompts, sampling } = &request.verb;
        let generator = self.generator.as_ref().expect("seen above");
        let actor = self.trained.get_mut(&Role::Actor).and_then(Deferred::loaded);
        let (model, head) = match (generator, actor.as_ref().and_then(|actor| actor.policy())) {
            (Generator::Beside(weights), _) => (&weights.model, &weights.head),
            (Generator::Apart(apart), _) => (&apart.weights.model, &apart.weights.head),
            (Generator::OnActor, Some(policy)) => (&policy.model, policy.head.weight()),
            (Generator::OnActor, None) => return Err(not_here(Role::Actor)),
        };
        let policy = echelon_generation::Policy { model, head, tokenizer: Some(&self.tokenizer) };
        let generated = self.engine.generate(policy, prompts, sampling, self.progress.as_ref(), &self.interrupt);
        let load = generated.as_ref().ok().map(|(sequences, _)| self.engine.load(model, prompts, sampling, sequences));
        if let Some(actor) = actor.filter(|_| on_actor) {
            actor.state().release_all()?;
        }
        let (sequences, report) = generated?;
        let resident = StateBytes { weights: generator.bytes() as u64, ..StateBytes::default() };
        self.meter.end(metering, resident, Load::Decode(load.expect("it generated")));
        Ok(Generated { rows: rows_of(prompts, &sequences, self.policy_version)?, report: report.told() })
    }
}

impl Serve<Logprobs> for DeviceRoles {
    fn serve(&mut self, request: Request<Logprobs>) -> Result<Tensor> {
        Ok(stack_rows(&self.ask::<Logprobs>(asked(&request)?, &request.rows)?, request.rows.size()))
    }
}

impl Serve<Values> for DeviceRoles {
    fn serve(&mut self, request: Request<Values>) -> Result<Tensor> {
        Ok(stack_rows(&self.ask::<Values>(asked(&request)?, &request.rows)?, request.rows.size()))
    }
}

impl Serve<Scores> for DeviceRoles {
    fn serve(&mut self, request: Request<Scores>) -> Result<Tensor> {
        let role = asked(&request)?;
        let frozen = self.frozen.get_mut(&role).map(Deferred::get).transpose()?;
        let rows = match frozen {
            Some(Frozen::Scorer(_, Some(tokenizer))) => encode_texts(tokenizer, &request.rows)?,
            _ => request.rows,
        };
        let parts = self.ask::<Scores>(role, &rows)?;
        let parts: Vec<Tensor> = parts.iter().map(|part| part.to_device(Device::Cpu)).collect();
        // A rank without rows has no part.
        Ok(if parts.is_empty() { Tensor::zeros([0], tch::kind::FLOAT_CPU) } else { Tensor::cat(&parts, 0) })
    }
}

/// Prompt and response in the words of another tokenizer, ended as its own training ended them.
fn encode_texts(tokenizer: &Tokenizer, rows: &Rows) -> Result<Rows> {
    let rows = rows[PROMPTS].iter().zip(&rows[RESPONSES]).map(|(prompt, response)| {
        let mut ids = tokenizer
            .encode(&format!("{prompt}{response}"))
            .map_err(|error| Error::other("the reward model's tokenizer", error))?;
        ids.extend(tokenizer.eos_ids().first());
        let own = vec![false; ids.len()];
        Ok((ids, own))
    });
    Ok(Rows::of_tokens(&rows.collect::<Result<Vec<_>>>()?))
}

impl Serve<Learn> for DeviceRoles {
    fn serve(&mut self, request: Request<Learn>) -> Result<Report> {
        self.bring_back()?;
        let (role, Request { verb, rows, .. }) = (asked(&request)?, &request);
        let trained = self.trained(role)?; // loaded before it is metered
        let loss = trained.loss(&verb.loss)?;
        let metering = self.meter.begin(role, Learn::NAME);
        let trained = self.trained(role)?;
        let learned = trained.learn(&*loss, verb, rows);
        let (resident, load) = (trained.state().device_bytes_by_part(), trained.load(rows, verb.unit));
        self.meter.end(metering, resident, Load::Pass(load));
        let phase = loss.prefix().trim_end_matches(['_', '/']).replace('/', " ");
        self.progress.advance(&phase, rows.num_rows(), rows.num_rows());
        learned.map_err(|error| self.keep_evidence(error, rows))
    }
}

impl Serve<Publish> for DeviceRoles {
    fn serve(&mut self, Request { verb: Publish { policy_version }, .. }: Request<Publish>) -> Result<()> {
        self.bring_back()?;
        let actor = self.trained.get_mut(&Role::Actor).and_then(Deferred::loaded).map(Trained::state);
        if let (Some(sender), Some(actor)) = (&mut self.sender, &actor) {
            sender.publish(actor, policy_version)?;
        }
        if let Some(generator) = &mut self.generator {
            generator.take_up(actor, policy_version)?;
        }
        self.policy_version = policy_version;
        Ok(())
    }
}

impl Serve<Memory> for DeviceRoles {
    fn serve(&mut self, _request: Request<Memory>) -> Result<MemoryReport> {
        Ok(self.meter.report())
    }
}

impl Serve<MatmulRate> for DeviceRoles {
    fn serve(&mut self, _request: Request<MatmulRate>) -> Result<f64> {
        let (kind, device) = (self.held.kind, self.held.pass.device);
        Ok(*self.matmul_rate.get_or_insert_with(|| matmul_rate(kind, device)))
    }
}

impl Serve<Save> for DeviceRoles {
    fn serve(&mut self, request: Request<Save>) -> Result<()> {
        self.bring_back()?;
        save_state(self.state(asked(&request)?)?, &request.verb.file)
    }
}

impl Serve<Restore> for DeviceRoles {
    fn serve(&mut self, request: Request<Restore>) -> Result<()> {
        self.bring_back()?;
        restore_state(self.state(asked(&request)?)?, &request.verb.file)
    }
}

impl Serve<Export> for DeviceRoles {
    fn serve(&mut self, request: Request<Export>) -> Result<()> {
        self.bring_back()?;
        let (role, Export { folder, score_statistics }) = (asked(&request)?, &request.verb);
        self.trained(role)?.export(folder, *score_statistics)?;
        let group = self.membership.layout.group(role);
        if self.membership.rank_in(group) != Some(0) {
            return Ok(()); // the first rank writes
        }
        self.tokenizer.save(folder).map_err(|error| Error::other("saving the tokenizer", error))
    }
}
