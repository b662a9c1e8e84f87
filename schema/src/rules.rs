//! Rules between keys: what each key alone allows but the recipe as a whole does not.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::{Diagnostic, Documents, Key, Node, Origin, Problem, Reader, RecipeError, Table, Writer};

/// Collects broken rules at the places of the keys they are about.
pub struct Rules<'a> {
    origins: &'a Origins,
    problems: Vec<Problem>,
}

impl<'a> Rules<'a> {
    /// No rule broken yet.
    pub fn new(origins: &'a Origins) -> Self {
        Self { origins, problems: Vec::new() }
    }

    /// The broken rules.
    pub fn finish(self) -> Vec<Problem> {
        self.problems
    }

    /// Reports `message` at the first of `keys` that the recipe has.
    pub fn broken(&mut self, keys: &[&str], message: impl Into<String>, help: impl Into<String>) {
        let written = keys.iter().find(|key| self.origins.places.contains_key(**key)).unwrap_or(&keys[0]);
        self.problems.push(Problem::new(self.origins.place(written), message).help(help));
    }

    /// Whether a `--set` wrote `key`.
    pub fn is_set(&self, key: &str) -> bool {
        self.origins.places.get(key).is_some_and(|origin| origin.document > 0)
    }

    /// Whether the recipe has `key`.
    pub fn has(&self, key: &str) -> bool {
        self.origins.places.contains_key(key)
    }
}

/// Where each key of a loaded recipe was written. Not part of the recipe's value: two recipes that differ only
/// here are equal.
#[derive(Debug, Clone, Default)]
pub struct Origins {
    /// The texts it was read from.
    pub documents: Arc<Documents>,
    /// Each key's place, by its dotted name.
    pub places: BTreeMap<String, Origin>,
}

impl Origins {
    /// An error found later than reading, at the place of `key` (`"data.prompts"`).
    pub fn error_at(&self, key: &str, message: &str, help: &str) -> RecipeError {
        if self.documents.0.is_empty() {
            let location = format!("`{key}`");
            let help = vec![help.to_owned()];
            return RecipeError::Invalid(vec![Diagnostic {
                location,
                message: message.into(),
                snippet: String::new(),
                help,
            }]);
        }
        let problem = Problem::new(self.place(key), message).help(help);
        RecipeError::from_problems(vec![problem], &self.documents)
    }

    /// The recipe's folder; empty for a recipe that was not loaded.
    pub fn folder(&self) -> PathBuf {
        self.documents.0.first().map_or_else(Default::default, |document| document.base.clone())
    }

    /// The place of `key`, else of the nearest table around it, else the start of the file.
    pub fn place(&self, key: &str) -> Origin {
        let mut name = key;
        loop {
            if let Some(origin) = self.places.get(name) {
                return origin.clone();
            }
            match name.rsplit_once('.') {
                Some((parent, _)) => name = parent,
                None => return Origin { document: 0, span: 0..0 },
            }
        }
    }
}

impl PartialEq for Origins {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Table for Origins {
    const DOC: &'static str = "";

    fn take(&mut self, _: &str, _: &Node, _: &mut Reader) -> bool {
        false
    }

    fn describe(&self) -> Vec<Key> {
        Vec::new()
    }

    fn write(&self, _: usize, _: &mut Writer) {}
}
