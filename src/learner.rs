//! A model that learns from examples, on one rank: what the `sft` and `reward` programs train.

use std::path::{Path, PathBuf};

use echelon_algorithms::reward_model::pair_batches;
use echelon_algorithms::{reward_model, sft};
use echelon_core::Result;
use echelon_core::compute::Compute;
use echelon_core::memory::{PassLoad, Phase};
use echelon_core::progress::Interrupt;
use echelon_core::role::Role;
use echelon_core::rollout::{Tokens, micro_batches};
use echelon_core::verb::{Learn, LearnReport};
use echelon_core::zero::{OptimizerConfig, PolicyOutput, ScalarValues, TrainingState};
use echelon_models::config::HeadKind;
use echelon_models::head::ScalarRows;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::models::{Held, Policy, Scorer, export, trainable_policy, trainable_scorer};
use crate::recipe::{Init, Model, RewardRecipe, SftRecipe};
use crate::seat::Seat;
use crate::wire;

/// What a rank's learner is built from; crosses to its device thread.
#[derive(Clone)]
pub struct LearnerPlan {
    /// Whose model it becomes.
    pub role: Role,
    pub held: Held,
    folder: PathBuf,
    seed: u64,
    /// Fresh weights instead of the folder's.
    random: bool,
    optimizer: OptimizerConfig,
}

/// A model that learns, and the folder it started from.
pub struct Learner {
    model: LearningModel,
    folder: PathBuf,
}

enum LearningModel {
    Language(Policy),
    Reward(Scorer),
}

impl LearnerPlan {
    /// Of an `sft` run.
    pub fn of_sft(recipe: &SftRecipe, folder: &Path, held: Held) -> LearnerPlan {
        LearnerPlan::new(Role::Actor, (&recipe.model, &recipe.train.compute, recipe.seed), folder, held)
    }

    /// Of a `reward` run.
    pub fn of_reward(recipe: &RewardRecipe, folder: &Path, held: Held) -> LearnerPlan {
        LearnerPlan::new(Role::Reward, (&recipe.model, &recipe.train.compute, recipe.seed), folder, held)
    }

    fn new(role: Role, (model, compute, seed): (&Model, &Compute, u64), folder: &Path, held: Held) -> LearnerPlan {
        let random = model.init == Init::Random;
        let optimizer = model.optimizer.config(compute);
        LearnerPlan { role, held, folder: folder.to_owned(), seed, random, optimizer }
    }

    /// Runs on the device thread.
    pub fn build(self, seat: &Seat) -> Result<Learner> {
        let LearnerPlan { role, held, folder, seed, random, optimizer } = self;
        let sharding = seat.sharding(seat.layout.group(role));
        let (random, training) = (random.then_some(seed), (optimizer, &sharding));
        let model = match role {
            Role::Actor => LearningModel::Language(trainable_policy(role, &folder, random, held, training, 1.0)?),
            _ => {
                let reads = ScalarRows::LastTokens;
                LearningModel::Reward(trainable_scorer(role, &folder, random, seed, held, training, reads)?)
            }
        };
        Ok(Learner { model, folder })
    }
}

impl Learner {
    pub fn state(&mut self) -> &mut TrainingState {
        match &mut self.model {
            LearningModel::Language(policy) => &mut policy.state,
            LearningModel::Reward(scorer) => &mut scorer.state,
        }
    }

    /// What of `rows` goes through the model at once, in an optimizer step or without one.
    pub fn load(&self, rows: &Tokens, learns: bool) -> PassLoad {
        match &self.model {
            LearningModel::Language(policy) => PassLoad::of(rows, policy.pass.tokens_per_micro_batch),
            LearningModel::Reward(scorer) => {
                let budget = scorer.pass.tokens_per_micro_batch;
                let batches = if learns { pair_batches(rows, budget) } else { micro_batches(&rows.lengths, budget) };
                PassLoad::of_batches(rows, &batches, |_| 1)
            }
        }
    }

    /// The role by whose formulas the memory ledger knows this model, and its phase of training.
    pub fn metered(&self) -> (Role, Phase) {
        match &self.model {
            LearningModel::Language(_) => (Role::Actor, Phase::TrainActor),
            LearningModel::Reward(_) => (Role::Critic, Phase::TrainCritic),
        }
    }

    /// One optimizer step on this rank's rows.
    pub fn learn(&mut self, request: &Learn) -> Result<LearnReport> {
        let Learn { rows, num_learned, lr, .. } = request;
        match &mut self.model {
            LearningModel::Language(policy) => sft::step(policy, rows, *num_learned, *lr),
            LearningModel::Reward(scorer) => reward_model::step(scorer, rows, *num_learned, *lr),
        }
    }

    /// `[B]` f64: of each row the log-prob of its learned tokens, or its score. `each` is told how many rows are done.
    pub fn assess(&mut self, rows: &Tokens, interrupt: &Interrupt, mut each: impl FnMut(usize)) -> Result<Tensor> {
        let (mut parts, mut done) = (vec![Tensor::zeros([0], (Kind::Double, Device::Cpu))], 0);
        let mut keep = |part: Tensor| {
            done += part.size()[0] as usize;
            parts.push(part.to_device(Device::Cpu).to_kind(Kind::Double));
            each(done);
        };
        match &mut self.model {
            LearningModel::Language(policy) => policy.forward_rows(rows, interrupt, |_, output| {
                // Log-probs are 0 where nothing is learned.
                keep(output.logprobs().to_kind(Kind::Double).sum_dim_intlist(1, false, Kind::Double));
            })?,
            LearningModel::Reward(scorer) => {
                scorer.forward_rows(rows, interrupt, |_, output| keep(output.values().shallow_clone()))?;
            }
        }
        Ok(Tensor::cat(&parts, 0))
    }

    /// Writes the model as a Hugging Face folder. A reward model's statistics go into `config.json`, where
    /// `reward.normalize` finds them.
    pub fn export(&mut self, folder: &Path, score_statistics: Option<(f64, f64)>) -> Result<()> {
        match &self.model {
            LearningModel::Language(policy) => export(&policy.state, HeadKind::Logits, &self.folder, folder, &[]),
            LearningModel::Reward(scorer) => {
                let mut extra = vec![("num_labels", json!(1))];
                if let Some((mean, std)) = score_statistics {
                    extra.extend([("mean", json!(mean)), ("std", json!(std))]);
                }
                export(&scorer.state, HeadKind::Score, &self.folder, folder, &extra)
            }
        }
    }
}
