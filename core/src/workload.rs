//! What a step of a run works on, as its algorithm says it: models, who learns, what is asked of whom, and how many rows.
//!
//! Planner, memory ledger and forecast know algorithms by this alone:
//!
//! | | models | passes of a step |
//! |---|---|---|
//! | PPO | actor and critic learn; reference and reward are frozen | generate; log-probs, values, scores; learn, `epochs` times over all mini-batches |
//! | GRPO | the actor learns; reference and reward, where there are any, are frozen | as PPO, without the critic's |
//! | DPO | the actor learns, the reference is frozen; 2 rows to a unit | the reference's log-probs; learn |
//! | SFT | the actor learns | learn; log-probs of held-out rows, which no step waits for |
//! | reward model | the reward model learns; 2 rows to a unit | learn; scores of held-out rows |

use serde::Serialize;

use crate::compute::ComputeDtype;
pub use crate::loss::Gives;
use crate::memory::{Phase, Work};
use crate::role::Role;
use crate::shape::ModelShape;

/// How a model learns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Training {
    /// The loss has an entropy term: its backward pass needs one more copy of the logits.
    pub entropy_in_loss: bool,
}

/// A role that has a model of its own.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoleModel {
    pub role: Role,
    pub shape: ModelShape,
    pub gives: Gives,
    /// None of a frozen model.
    pub training: Option<Training>,
    /// A frozen model's weights stay in host memory and come to the device for its turn.
    pub offload: bool,
}

/// How responses are sampled.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sampling {
    /// Whose weights are published to the generator.
    pub published: Role,
    /// Prompts per step.
    pub prompts: usize,
    pub samples_per_prompt: usize,
    /// Most sequences that one engine decodes at once; fewer where memory is short.
    pub max_sequences: usize,
    /// Tokens of one prefill pass.
    pub max_batched_tokens: usize,
    /// Limit of one device's KV cache; None is what is free, up to `max_sequences` of full length.
    pub kv_cache_bytes: Option<u64>,
}

/// Rows that go through a role's model in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Pass {
    pub role: Role,
    /// `Verb::NAME` of the request.
    pub verb: &'static str,
    /// Over all ranks; of `learn` those of one optimizer step.
    pub rows: usize,
    /// How often in a step; 0 of what no step waits for, which takes memory nevertheless.
    pub times: usize,
}

/// One step of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Workload {
    /// In the order in which they are shown.
    pub models: Vec<RoleModel>,
    pub sampling: Option<Sampling>,
    /// In the order in which they are asked.
    pub passes: Vec<Pass>,
    /// Rows per step, over all ranks.
    pub rows: usize,
    /// Neighbouring rows that stay together wherever rows are divided: 2 of a pair.
    pub rows_per_unit: usize,
    /// Longest prompt and response of a row: what memory is reserved for. Rows that nobody samples are all response.
    pub max_prompt_tokens: usize,
    pub max_response_tokens: usize,
    /// Expected prompt and response: what time is estimated for.
    pub mean_prompt_tokens: f64,
    pub mean_response_tokens: f64,
    /// Tokens per forward and backward pass on one device; a longer unit goes alone.
    pub tokens_per_micro_batch: usize,
    pub dtype: ComputeDtype,
    pub activation_checkpointing: bool,
}

/// What is asked of models whose responses are sampled: everything scores all `rows`; then who learns makes `times`
/// optimizer steps with `batch` rows each.
pub fn passes_with_sampling(models: &[RoleModel], rows: usize, batch: usize, times: usize) -> Vec<Pass> {
    let scoring = models.iter().map(|model| {
        let verb = match (model.gives, model.training) {
            (Gives::Logprobs, _) => "logprobs",
            (Gives::Scalars, Some(_)) => "values",
            (Gives::Scalars, None) => "scores",
        };
        Pass { role: model.role, verb, rows, times: 1 }
    });
    let learn = |model: &RoleModel| Pass { role: model.role, verb: "learn", rows: batch, times };
    let generate = Pass { role: Role::Generator, verb: "generate", rows, times: 1 };
    let learning = models.iter().filter(|model| model.training.is_some()).map(learn);
    std::iter::once(generate).chain(scoring).chain(learning).collect()
}

impl Workload {
    /// The roles that have a model, in the order in which they are shown; the generator computes what is published to it.
    pub fn roles(&self) -> Vec<Role> {
        let generator = self.sampling.as_ref().map(|_| Role::Generator);
        self.models.iter().map(|model| model.role).chain(generator).collect()
    }

    /// The only role, which then learns alone on all devices.
    pub fn alone(&self) -> Option<Role> {
        match self.models.as_slice() {
            [only] if self.sampling.is_none() => Some(only.role),
            _ => None,
        }
    }

    /// A role's model; the generator's is the one that is published.
    pub fn model(&self, role: Role) -> Option<&RoleModel> {
        let role = if role == Role::Generator { self.published()? } else { role };
        self.models.iter().find(|model| model.role == role)
    }

    /// Whose weights the generator gets.
    pub fn published(&self) -> Option<Role> {
        self.sampling.as_ref().map(|sampling| sampling.published)
    }

    /// How a role learns; None of a frozen one and of the generator.
    pub fn training(&self, role: Role) -> Option<Training> {
        self.models.iter().find(|model| model.role == role)?.training
    }

    /// Whose size stands for the run's: the first that learns.
    pub fn main_role(&self) -> Option<Role> {
        self.models.iter().find(|model| model.training.is_some()).map(|model| model.role)
    }

    /// What is asked of a role that is work of this kind.
    pub fn passes(&self, role: Role, work: Work) -> impl Iterator<Item = &Pass> {
        self.passes.iter().filter(move |pass| pass.role == role && Work::of(pass.verb) == Some(work))
    }

    /// The parts of a step, in order.
    pub fn phases(&self) -> Vec<Phase> {
        let mut phases: Vec<Phase> = Vec::new();
        let publish = self.sampling.as_ref().map(|sampling| (sampling.published, "publish"));
        for (role, verb) in self.passes.iter().map(|pass| (pass.role, pass.verb)).chain(publish) {
            phases.extend(Phase::of(role, verb).filter(|phase| !phases.contains(phase)));
        }
        phases
    }

    /// The same work with other numbers of rows: per step, and per optimizer step.
    pub fn resize(&mut self, rows: usize, batch: usize) {
        for pass in &mut self.passes {
            let learns = Work::of(pass.verb) == Some(Work::Learn);
            let epochs = if learns { pass.times / self.rows.div_ceil(pass.rows) } else { 1 };
            *pass = match learns {
                true => Pass { rows: batch, times: epochs * rows.div_ceil(batch), ..*pass },
                false => Pass { rows, ..*pass },
            };
        }
        if let Some(sampling) = &mut self.sampling {
            sampling.prompts = rows / sampling.samples_per_prompt;
        }
        self.rows = rows;
    }

    /// Rows as units.
    pub fn units(&self, rows: usize) -> usize {
        rows / self.rows_per_unit
    }

    /// Tokens of the longest row.
    pub fn max_tokens(&self) -> usize {
        self.max_prompt_tokens + self.max_response_tokens
    }

    /// Tokens of the longest unit, whose rows are in one micro-batch.
    pub fn max_unit_tokens(&self) -> usize {
        self.max_tokens() * self.rows_per_unit
    }

    /// Tokens of the expected unit.
    pub fn mean_unit_tokens(&self) -> f64 {
        (self.mean_prompt_tokens + self.mean_response_tokens) * self.rows_per_unit as f64
    }

    /// Tokens in the largest micro-batch when a rank has so many units: whole units of full length up to
    /// `tokens_per_micro_batch`, at least one.
    pub fn tokens_at_once(&self, units: usize) -> usize {
        let together = (self.tokens_per_micro_batch / self.max_unit_tokens()).max(1);
        let packed = self.tokens_per_micro_batch.max(self.max_unit_tokens());
        // Shorter units fill a micro-batch to its limit, when there are enough of them.
        if units <= together { units * self.max_unit_tokens() } else { packed }
    }

    /// Micro-batches that so many units of expected length make on one rank.
    pub fn micro_batches(&self, units: usize) -> usize {
        let together = (self.tokens_per_micro_batch as f64 / self.mean_unit_tokens()).floor().max(1.0);
        (units as f64 / together).ceil() as usize
    }

    /// Most sequences that one of `engines` engines decodes at once: as many as there are, as `max_sequences` and
    /// `kv_cache_bytes` allow. None where nothing is sampled.
    pub fn slots_wanted(&self, engines: usize, kv_bytes_per_token: u64) -> Option<usize> {
        let sampling = self.sampling.as_ref()?;
        let slots = sampling.max_sequences.min(sampling.sequences(engines));
        let one = (kv_bytes_per_token * self.max_tokens() as u64).max(1);
        Some(sampling.kv_cache_bytes.map_or(slots, |budget| slots.min((budget / one) as usize)))
    }
}

impl Sampling {
    /// Sequences that one of `engines` engines has in a step.
    pub fn sequences(&self, engines: usize) -> usize {
        self.prompts.div_ceil(engines) * self.samples_per_prompt
    }
}
