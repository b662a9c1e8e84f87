//! Recipes: the TOML a person writes, checked, and the value the programs run on.
//!
//! [`Root::load`] reads a file and the `--set` arguments into typed tables, or says everything that is wrong
//! with them at once. [`Recipe::resolve`] then decides what the recipe left open: its result is written to
//! `recipe.resolved.toml` and loads again to the same value. `sft` and `reward` have recipes of their own.
//!
//! * RE-1: an unknown key, a wrong type, a number out of range or tables that contradict each other never start a run.
//! * RE-2: keys, defaults, ranges and docs have one source, the [`table!`](echelon_schema::table) declarations.
//! * RE-3: relative paths mean the recipe's folder, those of `--set` the working directory; in the value all are absolute.

mod arithmetic;
mod changes;
mod check;
mod foreign;
mod parse;
mod reference;
mod registry;
mod resolve;
mod supervised;
mod tables;

use std::path::Path;
use std::sync::Arc;

pub use echelon_algorithms::ppo::PpoKeys;
pub use echelon_core::compute::Compute;
pub use echelon_core::optimizer::Optimizer;
pub use echelon_placement::devices::{Devices, Placement};
pub use echelon_schema::{Auto, Choice, ModelSource, RecipeError, to_toml};
use echelon_schema::{Document, Documents, Item, Node, Origins, Problem, Reader, Rules, Table};

pub use arithmetic::BatchArithmetic;
pub(crate) use changes::{RESOLVED_FILE, changes_since, free_keys};
use parse::{SET_PREFIX, parse};
pub use reference::reference_page;
pub use registry::check_names;
pub(crate) use registry::for_each_recipe;
pub use resolve::ResolvedRecipe;
pub use supervised::{Init, Model, PairData, RewardRecipe, SftData, SftRecipe, SupervisedTrain, TrainMix};
pub use tables::*;

/// A recipe of `ppo`.
pub type PpoRecipe = Recipe<PpoKeys>;

/// A whole recipe of one of the programs.
pub trait Root: Table {
    /// The program that runs it.
    const PROGRAM: &'static str;
    /// With nothing left to decide.
    type Resolved;
    /// The table that no recipe of this program is without.
    const TABLE: &'static str;
    /// Names the run folder.
    fn name(&self) -> &str;
    /// The name and the places, which every recipe has.
    fn common(&mut self) -> (&mut String, &mut Origins);
    /// Checks the rules between keys.
    fn check(&self, rules: &mut Rules);
    /// What `recipe.resolved.toml` holds.
    fn resolved_text(&self) -> String {
        to_toml(self)
    }

    /// Reads the recipe at `path` with the `--set` arguments `sets` (`table.key=value`) laid over it.
    ///
    /// # Errors
    /// Everything wrong with it: syntax, unknown keys, types, ranges, rules between keys, missing files.
    fn load(path: &Path, sets: &[String]) -> Result<Self, RecipeError> {
        load(path, sets, true)
    }

    /// As `load`, for `--plan`: files that the recipe names need not exist.
    ///
    /// # Errors
    /// As `load`, but for missing files.
    fn load_for_plan(path: &Path, sets: &[String]) -> Result<Self, RecipeError> {
        load(path, sets, false)
    }

    /// A resolved recipe as another process of the run has it: its paths are absolute, and its files were found there.
    ///
    /// # Errors
    /// As `load`, but for missing files.
    fn read_text(text: &str) -> Result<Self, RecipeError> {
        let label = "the driver's recipe".to_owned();
        let base = Path::new("/").to_owned();
        let document = Document { label, text: text.to_owned(), base, is_file: true };
        from_documents(Documents(vec![document]), false)
    }
}

/// A resolved recipe as JSON, for programs.
///
/// # Panics
/// `text` is none of [`to_toml`]'s.
pub fn json_of(text: &str) -> serde_json::Value {
    let table: toml::Table = text.parse().expect("a resolved recipe is TOML");
    serde_json::to_value(&table).expect("a table of plain values serialises")
}

/// Reads a recipe of any program, with the `--set` arguments laid over it; for `--plan`, files that it names need not exist.
///
/// # Errors
/// Everything wrong with it.
pub(crate) fn load<T: Root>(path: &Path, sets: &[String], check_files: bool) -> Result<T, RecipeError> {
    let mut recipe: T = from_documents(read_documents(path, sets)?, check_files)?;
    let (name, _) = recipe.common();
    if name.is_empty() {
        *name = path.file_stem().map_or_else(|| T::PROGRAM.to_owned(), |stem| stem.to_string_lossy().into_owned());
    }
    Ok(recipe)
}

fn from_documents<T: Root>(documents: Documents, check_files: bool) -> Result<T, RecipeError> {
    let documents = Arc::new(documents);
    let refuse = |problems: Vec<Problem>| match problems.is_empty() {
        true => Ok(()),
        false => Err(RecipeError::from_problems(problems, &documents)),
    };
    let (node, mut problems) =
        parse(&documents).map_err(|problems| RecipeError::from_problems(problems, &documents))?;
    refuse(other_program::<T>(&node).into_iter().collect())?;
    let mut recipe = T::default();
    let mut reader = Reader::new(&documents, check_files, &foreign::FOREIGN, &recipe.describe());
    reader.root(&mut recipe, &node);
    problems.extend(reader.problems);
    let origins = Origins { documents: documents.clone(), places: reader.origins };
    refuse(problems)?;
    let mut rules = Rules::new(&origins);
    recipe.check(&mut rules);
    refuse(rules.finish())?;
    *recipe.common().1 = origins;
    Ok(recipe)
}

macro_rules! tables {
    ($($Recipe:ty),* $(,)?) => {
        &[$((<$Recipe>::PROGRAM, <$Recipe>::TABLE)),*]
    };
}

/// The table that no recipe of a program is without.
const TABLES: &[(&str, &str)] = for_each_recipe!(tables);

/// A recipe of another program gets one error, not one per key.
fn other_program<T: Root>(root: &Node) -> Option<Problem> {
    let Item::Table(entries) = &root.item else { return None };
    let find = |name: &str| entries.iter().find(|entry| entry.key == name);
    let foreign = ["actor", "model"].into_iter().filter(|table| *table != T::TABLE).find_map(find)?;
    if find(T::TABLE).is_some() {
        return None;
    }
    let message = format!("a recipe of `{}` has [{}], this one has [{}]", T::PROGRAM, T::TABLE, foreign.key);
    let programs = TABLES.iter().filter(|(_, table)| *table == foreign.key).map(|(program, _)| format!("`{program}`"));
    let programs = programs.collect::<Vec<_>>().join(" or ");
    Some(Problem::new(foreign.key_origin.clone(), message).help(format!("run it with {programs}")))
}

fn read_documents(path: &Path, sets: &[String]) -> Result<Documents, RecipeError> {
    let read_error = |source| RecipeError::Read { path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(read_error)?;
    let folder = path.canonicalize().map_err(read_error)?;
    let base = folder.parent().unwrap_or(Path::new("/")).to_owned();
    let mut documents = vec![Document { label: path.display().to_string(), text, base, is_file: true }];
    let working_directory = std::env::current_dir().map_err(read_error)?;
    for set in sets {
        let text = format!("{SET_PREFIX}{set}");
        documents.push(Document { label: text.clone(), text, base: working_directory.clone(), is_file: false });
    }
    Ok(Documents(documents))
}

#[cfg(test)]
mod tests;
