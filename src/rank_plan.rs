//! What a worker builds of a run's spec, by the program whose run it is.

use std::sync::Arc;

use echelon_algorithms::reward_model::PairwiseRanking;
use echelon_algorithms::schedule::LrSchedule;
use echelon_algorithms::sft::NegativeLogLikelihood;
use echelon_algorithms::{Algorithm, OnPolicy};
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
use crate::recipe::{Compute, Devices, Init, Model, Recipe, RewardRecipe, Root, SftRecipe, for_each_recipe};
use crate::run_spec::RunSpec;

/// A recipe of a program, as a worker reads it.
pub trait RankSide: Root {
    /// What a worker builds at its place among those of its host, and a warning about its device.
    ///
    /// # Errors
    /// A recipe that this worker reads otherwise than the driver; a device that is not here.
    fn rank_plan(spec: &RunSpec, place: Option<&Place>) -> Built;
}

type RanksOf = fn(&RunSpec, Option<&Place>) -> Built;
type Built = Result<(RankPlan, Option<String>), Failure>;

/// The same by the name of the program.
///
/// # Errors
/// As [`RankSide::rank_plan`]; an algorithm that this worker does not know.
pub fn rank_plan(spec: &RunSpec, place: Option<&Place>) -> Built {
    ranks_of(&spec.program)?(spec, place)
}

fn ranks_of(program: &str) -> Result<RanksOf, Failure> {
    let found = PROGRAMS.iter().find(|(name, _)| *name == program);
    found.map(|(_, plan)| *plan).ok_or_else(|| {
        let known = PROGRAMS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        Failure::Input(format!(
            "this worker knows no algorithm `{program}`, it knows {known}: start it from the driver's own program"
        ))
    })
}

macro_rules! by_name {
    ($($Recipe:ty),* $(,)?) => {
        &[$((<$Recipe>::PROGRAM, <$Recipe as RankSide>::rank_plan)),*]
    };
}

const PROGRAMS: &[(&str, RanksOf)] = for_each_recipe!(by_name);

/// What a worker computes on, and a warning about its device.
fn held(
    spec: &RunSpec,
    compute: &Compute,
    devices: &Devices,
    place: Option<&Place>,
) -> Result<(Held, Option<String>), Failure> {
    let (held, warning) = devices::held(compute, devices, place)?;
    Ok((Held { weight_layout: machine::usable(spec.weight_layout, held), ..held }, warning))
}

impl<K: OnPolicy> RankSide for Recipe<K> {
    fn rank_plan(spec: &RunSpec, place: Option<&Place>) -> Built {
        let recipe = Recipe::<K>::read_text(&spec.recipe)?.resolve();
        let (compute, temperature) = (&recipe.train.compute, recipe.rollout.temperature);
        let (held, warning) = held(spec, compute, &recipe.placement.devices, place)?;
        let trained = K::Algorithm::LEARNERS.iter().map(|&(role, _)| {
            let critic = role == Role::Critic;
            let optimizer = if critic { &recipe.critic.optimizer } else { &recipe.actor.optimizer };
            TrainedPlan {
                role,
                folder: spec.folder(role),
                random: false,
                seed: recipe.seed,
                reads: if critic { Reads::Scalars(ScalarRows::Predecessors) } else { Reads::Logprobs { temperature } },
                optimizer: optimizer.config(compute),
                lr: optimizer.lr,
                schedule: LrSchedule::of(optimizer, spec.optimizer_steps[&role]),
                losses: recipe.keys.losses().into_iter().filter(|(of, _)| *of == role).map(|(_, loss)| loss).collect(),
            }
        });
        let engine = recipe.generation.engine_config(held.weight_layout);
        Ok((RankPlan { temperature, engine, ..of_spec(spec, held, trained.collect()) }, warning))
    }
}

impl RankSide for SftRecipe {
    fn rank_plan(spec: &RunSpec, place: Option<&Place>) -> Built {
        let SftRecipe { model, train, placement, seed, .. } = SftRecipe::read_text(&spec.recipe)?;
        let (reads, loss) = (Reads::Logprobs { temperature: 1.0 }, Arc::new(NegativeLogLikelihood));
        alone(spec, (Role::Actor, reads, loss), (&model, &train.compute, seed), (&placement, place))
    }
}

impl RankSide for RewardRecipe {
    fn rank_plan(spec: &RunSpec, place: Option<&Place>) -> Built {
        let RewardRecipe { model, train, placement, seed, .. } = RewardRecipe::read_text(&spec.recipe)?;
        let (reads, loss) = (Reads::Scalars(ScalarRows::LastTokens), Arc::new(PairwiseRanking));
        alone(spec, (Role::Reward, reads, loss), (&model, &train.compute, seed), (&placement, place))
    }
}

/// One model that is trained alone.
fn alone(
    spec: &RunSpec,
    (role, reads, loss): (Role, Reads, Arc<dyn Loss>),
    (model, compute, seed): (&Model, &Compute, u64),
    (devices, place): (&Devices, Option<&Place>),
) -> Built {
    let (held, warning) = held(spec, compute, devices, place)?;
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
    Ok((of_spec(spec, held, vec![trained]), warning))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_algorithm_that_a_worker_does_not_know_is_refused_with_those_it_knows() {
        let error = ranks_of("mine").err().unwrap().to_string();
        assert!(error.contains("no algorithm `mine`, it knows ppo, sft, reward"), "{error}");
        assert!(ranks_of("ppo").is_ok());
    }
}
