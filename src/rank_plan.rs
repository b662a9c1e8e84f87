//! What a worker builds of a run's spec, by the program whose run it is.

use std::sync::Arc;

use echelon_algorithms::Algorithm;
use echelon_algorithms::ppo::{PolicyLoss, Ppo, ValueLoss};
use echelon_algorithms::reward_model::{PairwiseRanking, RewardModel};
use echelon_algorithms::schedule::LrSchedule;
use echelon_algorithms::sft::{NegativeLogLikelihood, Sft};
use echelon_core::loss::Loss;
use echelon_core::role::Role;
use echelon_generation::EngineConfig;
use echelon_models::head::ScalarRows;
use echelon_placement::launch::Place;
use echelon_roles::models::Held;
use echelon_roles::plan::RankPlan;
use echelon_roles::trained::{Reads, TrainedPlan};

use crate::devices;
use crate::machine;
use crate::program::Failure;
use crate::recipe::{Compute, Devices, Init, Model, Optimizer, Recipe, ResolvedRecipe, RewardRecipe, SftRecipe};
use crate::run_spec::RunSpec;

/// What a worker builds, at its place among those of its host, and a warning about its device.
///
/// # Errors
/// A recipe that this worker reads otherwise than the driver, or an algorithm that it does not know; a device that is not
/// here.
pub fn rank_plan(spec: &RunSpec, place: Option<&Place>) -> Result<(RankPlan, Option<String>), Failure> {
    let held = |compute: &Compute, devices: &Devices| {
        let (held, warning) = devices::held(compute, devices, place)?;
        Ok::<_, Failure>((Held { weight_layout: machine::usable(spec.weight_layout, held), ..held }, warning))
    };
    match spec.program.as_str() {
        Ppo::NAME => {
            let recipe = Recipe::read_text(&spec.recipe)?.resolve();
            let (held, warning) = held(&recipe.train.compute, &recipe.placement.devices)?;
            Ok((of_ppo(spec, &recipe, held), warning))
        }
        Sft::NAME => {
            let recipe = SftRecipe::read_text(&spec.recipe)?;
            let (held, warning) = held(&recipe.train.compute, &recipe.placement)?;
            Ok((of_sft(spec, &recipe, held), warning))
        }
        RewardModel::NAME => {
            let recipe = RewardRecipe::read_text(&spec.recipe)?;
            let (held, warning) = held(&recipe.train.compute, &recipe.placement)?;
            Ok((of_reward(spec, &recipe, held), warning))
        }
        other => {
            let known = [Ppo::NAME, Sft::NAME, RewardModel::NAME].join(", ");
            Err(Failure::Input(format!(
                "this worker knows no algorithm `{other}`, it knows {known}: start it from the driver's own program"
            )))
        }
    }
}

/// Of a PPO run.
fn of_ppo(spec: &RunSpec, recipe: &ResolvedRecipe, held: Held) -> RankPlan {
    let compute = &recipe.train.compute;
    let temperature = recipe.rollout.temperature;
    let trained = |role, reads, optimizer: &Optimizer, loss| TrainedPlan {
        role,
        folder: spec.folder(role),
        random: false,
        seed: recipe.seed,
        reads,
        optimizer: optimizer.config(compute),
        lr: optimizer.lr,
        schedule: LrSchedule::of(optimizer, spec.optimizer_steps[&role]),
        losses: vec![loss],
    };
    let policy_loss: Arc<dyn Loss> = Arc::new(PolicyLoss::of(&recipe.ppo));
    let value_loss = Arc::new(ValueLoss::of(&recipe.ppo));
    let (logprobs, values) = (Reads::Logprobs { temperature }, Reads::Scalars(ScalarRows::Predecessors));
    let trained = vec![
        trained(Role::Actor, logprobs, &recipe.actor.optimizer, policy_loss),
        trained(Role::Critic, values, &recipe.critic.optimizer, value_loss),
    ];
    RankPlan {
        temperature,
        engine: recipe.generation.engine_config(held.weight_layout),
        ..of_spec(spec, held, trained)
    }
}

/// Of an `sft` run.
fn of_sft(spec: &RunSpec, recipe: &SftRecipe, held: Held) -> RankPlan {
    let (reads, loss) = (Reads::Logprobs { temperature: 1.0 }, Arc::new(NegativeLogLikelihood));
    alone(spec, (Role::Actor, reads, loss), (&recipe.model, &recipe.train.compute, recipe.seed), held)
}

/// Of a `reward` run.
fn of_reward(spec: &RunSpec, recipe: &RewardRecipe, held: Held) -> RankPlan {
    let (reads, loss) = (Reads::Scalars(ScalarRows::LastTokens), Arc::new(PairwiseRanking));
    alone(spec, (Role::Reward, reads, loss), (&recipe.model, &recipe.train.compute, recipe.seed), held)
}

/// One model that is trained alone.
fn alone(
    spec: &RunSpec,
    (role, reads, loss): (Role, Reads, Arc<dyn Loss>),
    (model, compute, seed): (&Model, &Compute, u64),
    held: Held,
) -> RankPlan {
    let trained = TrainedPlan {
        role,
        folder: spec.folder(role),
        random: model.init == Init::Random,
        seed,
        reads,
        optimizer: model.optimizer.config(compute),
        lr: model.optimizer.lr,
        schedule: LrSchedule::of(&model.optimizer, spec.optimizer_steps[&role]),
        losses: vec![loss],
    };
    of_spec(spec, held, vec![trained])
}

fn of_spec(spec: &RunSpec, held: Held, trained: Vec<TrainedPlan>) -> RankPlan {
    let frozen = |role| spec.folders.get(&role).filter(|_| trained.iter().all(|plan| plan.role != role)).cloned();
    RankPlan {
        held,
        reference: frozen(Role::Reference),
        reward: frozen(Role::Reward),
        trained,
        temperature: 1.0,
        engine: EngineConfig::default(),
        run_folder: spec.run_folder.clone(),
        store: None,
    }
}
