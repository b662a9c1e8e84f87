//! All that a run is made from: what its workers are told, and what its roles can be built from again.

use std::collections::BTreeMap;
use std::path::PathBuf;

use echelon_core::role::Role;
use echelon_core::weight_layout::WeightLayout;
use serde::{Deserialize, Serialize};

use echelon_placement::layout::Layout;

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
}
