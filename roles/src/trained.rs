//! A model that is trained, on one rank: a policy, or one with a number per token or row.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use echelon_algorithms::schedule::LrSchedule;
use echelon_core::data::{Report, Rows};
use echelon_core::loss::{Gives, Loss, check_columns};
use echelon_core::memory::PassLoad;
use echelon_core::progress::Interrupt;
use echelon_core::role::Role;
use echelon_core::verb::{Learn, Logprobs, Scores, Values, Verb};
use echelon_core::zero::{OptimizerConfig, Told, TrainingState};
use echelon_core::{Error, Result};
use echelon_models::config::HeadKind;
use echelon_models::head::ScalarRows;
use serde_json::json;
use tch::Tensor;

use crate::membership::Membership;
use crate::models::{Held, Policy, Scorer, export, trainable_policy, trainable_scorer};

/// What a rank's trained model is built from; crosses to its device thread.
#[derive(Clone)]
pub struct TrainedPlan {
    /// Whose model it is.
    pub role: Role,
    pub folder: PathBuf,
    /// Fresh weights instead of the folder's.
    pub random: bool,
    /// Of fresh weights.
    pub seed: u64,
    pub reads: Reads,
    pub optimizer: OptimizerConfig,
    pub lr: f64,
    pub schedule: LrSchedule,
    pub losses: Vec<Arc<dyn Loss>>,
}

/// What a model says of rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reads {
    /// Log-probs of the own tokens at this temperature.
    Logprobs { temperature: f64 },
    /// A number before each own token, or for each row.
    Scalars(ScalarRows),
}

/// A model that learns, and what it learns by.
pub struct Trained {
    model: Model,
    plan: TrainedPlan,
}

enum Model {
    Policy(Policy),
    Scorer(Scorer),
}

/// Runs `$body` with the model, whichever it is.
macro_rules! either {
    ($model:expr, $name:ident => $body:expr) => {
        match $model {
            Model::Policy($name) => $body,
            Model::Scorer($name) => $body,
        }
    };
}

impl TrainedPlan {
    /// Runs on the device thread.
    pub fn build(self, membership: &Membership, held: Held) -> Result<Trained> {
        let TrainedPlan { role, seed, .. } = self;
        let sharding = membership.sharding(membership.layout.group(role));
        let (random, training) = (self.random.then_some(seed), (self.optimizer, &sharding));
        let model = match self.reads {
            Reads::Logprobs { temperature } => {
                Model::Policy(trainable_policy(role, &self.folder, random, held, training, temperature)?)
            }
            Reads::Scalars(reads) => {
                Model::Scorer(trainable_scorer(role, &self.folder, random, seed, held, training, reads)?)
            }
        };
        Ok(Trained { model, plan: self })
    }
}

impl Trained {
    pub fn state(&mut self) -> &mut TrainingState {
        either!(&mut self.model, model => &mut model.state)
    }

    /// The policy that responses are sampled from, where it is one.
    pub fn policy(&self) -> Option<&Policy> {
        if let Model::Policy(policy) = &self.model { Some(policy) } else { None }
    }

    /// The verb that it answers with what it says of rows.
    pub fn answers(&self) -> &'static str {
        match self.plan.reads {
            Reads::Logprobs { .. } => Logprobs::NAME,
            Reads::Scalars(ScalarRows::Predecessors) => Values::NAME,
            Reads::Scalars(ScalarRows::LastTokens) => Scores::NAME,
        }
    }

    fn gives(&self) -> Gives {
        if let Model::Policy(_) = self.model { Gives::Logprobs } else { Gives::Scalars }
    }

    /// What of `rows`, of which `unit` stay together, goes through the model at once.
    pub fn load(&self, rows: &Rows, unit: usize) -> PassLoad {
        let budget = either!(&self.model, model => model.pass.tokens_per_micro_batch);
        PassLoad::of(rows, unit, budget, self.plan.reads == Reads::Scalars(ScalarRows::LastTokens))
    }

    /// # Errors
    /// This model learns nothing of that name.
    pub fn loss(&self, name: &str) -> Result<Arc<dyn Loss>> {
        let known = &self.plan.losses;
        known.iter().find(|loss| loss.name() == name).cloned().ok_or_else(|| {
            let known: Vec<&str> = known.iter().map(|loss| loss.name()).collect();
            Error::Refused(format!("the {} has no loss `{name}`, it has {}", self.plan.role, known.join(", ")))
        })
    }

    /// One optimizer step on this rank's rows.
    ///
    /// # Errors
    /// A loss that does not fit this model or the rows; one that is not finite.
    pub fn learn(&mut self, loss: &dyn Loss, request: &Learn, rows: &Rows) -> Result<Report> {
        if loss.gives() != self.gives() {
            let (role, name) = (self.plan.role, loss.name());
            return Err(Error::Refused(format!(
                "the loss `{name}` reads {:?}, the {role} gives {:?}",
                loss.gives(),
                self.gives()
            )));
        }
        if rows.num_rows() > 0 {
            check_columns(loss, rows)?;
        }
        let steps = self.state().steps as usize;
        let lr = self.plan.lr * self.plan.schedule.factor(steps);
        either!(&mut self.model, model => model.learn(loss, rows, (&request.totals, &request.numbers), lr))
    }

    /// What it says of rows, one tensor per micro-batch, in their order; `each` is told of the rows of each.
    pub fn ask(&mut self, rows: &Rows, interrupt: &Interrupt, mut each: impl FnMut(usize)) -> Result<Vec<Tensor>> {
        let mut parts = Vec::new();
        either!(&mut self.model, model => model.forward_rows(rows, interrupt, |batch, output| {
            parts.push(output.numbers().shallow_clone());
            each(batch.len());
        })?);
        Ok(parts)
    }

    /// Writes the model as a Hugging Face folder. A reward model's statistics go into `config.json`, where
    /// `reward.normalize` finds them.
    pub fn export(&mut self, folder: &Path, score_statistics: Option<(f64, f64)>) -> Result<()> {
        let (head, mut extra) = match self.plan.reads {
            Reads::Logprobs { .. } => (HeadKind::Logits, Vec::new()),
            Reads::Scalars(ScalarRows::Predecessors) => (HeadKind::Score, Vec::new()),
            Reads::Scalars(ScalarRows::LastTokens) => (HeadKind::Score, vec![("num_labels", json!(1))]),
        };
        if let Some((mean, std)) = score_statistics {
            extra.extend([("mean", json!(mean)), ("std", json!(std))]);
        }
        let like = self.plan.folder.clone();
        export(self.state(), head, &like, folder, &extra)
    }
}
