//! All that a run is made from: what its workers are told, and what its roles can be built from again.

use std::collections::BTreeMap;
use std::path::PathBuf;

use echelon_algorithms::Algorithm;
use echelon_algorithms::ppo::Ppo;
use echelon_algorithms::reward_model::RewardModel;
use echelon_algorithms::sft::Sft;
use echelon_core::role::Role;
use echelon_core::weight_layout::WeightLayout;
use echelon_placement::launch::Place;
use serde::{Deserialize, Serialize};

use crate::host_plan::HostPlan;
use crate::layout::Layout;
use crate::machine;
use crate::models::Held;
use crate::program::Failure;
use crate::recipe::{Compute, Devices, Recipe, RewardRecipe, SftRecipe};
use crate::wire;

/// A run, as every process of it knows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunSpec {
    /// The name of its algorithm.
    pub program: String,
    /// The resolved recipe, as TOML.
    pub recipe: String,
    /// Where the roles' models start.
    pub folders: BTreeMap<Role, PathBuf>,
    /// Of the whole run, by the role that learns; where examples are read, known when they are counted.
    pub optimizer_steps: BTreeMap<Role, usize>,
    /// How weights lie while a CPU decodes.
    pub weight_layout: WeightLayout,
    pub layout: Layout,
    pub run_folder: PathBuf,
}

impl RunSpec {
    /// # Panics
    /// The role has no model in this run.
    pub fn folder(&self, role: Role) -> PathBuf {
        self.folders.get(&role).unwrap_or_else(|| panic!("the {role} has no folder")).clone()
    }

    /// The roles of this run: those with a model of their own, and the generator, which has the actor's, where it is placed
    /// beside others.
    pub fn roles(&self) -> Vec<Role> {
        let generator = self.layout.groups.iter().map(|group| group.role).filter(|role| *role == Role::Generator);
        self.folders.keys().copied().chain(generator).collect()
    }

    /// Whose tokenizer the run uses: the actor's, or that of the one model that is trained.
    pub fn tokenizer_folder(&self) -> PathBuf {
        self.folder(if self.folders.contains_key(&Role::Actor) { Role::Actor } else { Role::Reward })
    }

    /// What a worker builds, at its place among those of its host, and a warning about its device.
    ///
    /// # Errors
    /// A recipe that this worker reads otherwise than the driver, or an algorithm that it does not know; a device that is not
    /// here.
    pub fn host_plan(&self, place: Option<&Place>) -> Result<(HostPlan, Option<String>), Failure> {
        let held = |compute: &Compute, devices: &Devices| {
            let (held, warning) = wire::held(compute, devices, place)?;
            Ok::<_, Failure>((Held { weight_layout: machine::usable(self.weight_layout, held), ..held }, warning))
        };
        match self.program.as_str() {
            Ppo::NAME => {
                let recipe = Recipe::read_text(&self.recipe)?.resolve();
                let (held, warning) = held(&recipe.train.compute, &recipe.placement.devices)?;
                Ok((HostPlan::of_ppo(self, &recipe, held), warning))
            }
            Sft::NAME => {
                let recipe = SftRecipe::read_text(&self.recipe)?;
                let (held, warning) = held(&recipe.train.compute, &recipe.placement)?;
                Ok((HostPlan::of_sft(self, &recipe, held), warning))
            }
            RewardModel::NAME => {
                let recipe = RewardRecipe::read_text(&self.recipe)?;
                let (held, warning) = held(&recipe.train.compute, &recipe.placement)?;
                Ok((HostPlan::of_reward(self, &recipe, held), warning))
            }
            other => {
                let known = [Ppo::NAME, Sft::NAME, RewardModel::NAME].join(", ");
                Err(Failure::Input(format!(
                    "this worker knows no algorithm `{other}`, it knows {known}: start it from the driver's own program"
                )))
            }
        }
    }
}
