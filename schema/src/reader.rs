//! Reads a parsed recipe into typed tables and collects every error on the way.

use std::collections::BTreeMap;

use crate::{Documents, Entry, Field, Foreign, Item, Key, Node, Origin, Problem, Table, names};

/// State of one reading: where we are, what went wrong, where each key stood.
pub struct Reader<'a> {
    /// The texts, for resolving paths.
    pub documents: &'a Documents,
    /// Whether files named in the recipe must exist.
    pub check_files: bool,
    /// Names of other frameworks, to suggest ours.
    pub foreign: &'a Foreign,
    /// Found so far.
    pub problems: Vec<Problem>,
    /// Place of every key read, by its dotted name.
    pub origins: BTreeMap<String, Origin>,
    path: Vec<String>,
    known: Vec<String>,
}

impl<'a> Reader<'a> {
    /// A reader for a recipe whose keys `root` describes.
    pub fn new(documents: &'a Documents, check_files: bool, foreign: &'a Foreign, root: &[Key]) -> Self {
        let mut known = Vec::new();
        collect_names("", root, &mut known);
        let (problems, origins, path) = (Vec::new(), BTreeMap::new(), Vec::new());
        Self { documents, check_files, foreign, problems, origins, path, known }
    }

    /// Reads the whole recipe.
    pub fn root<T: Table>(&mut self, table: &mut T, node: &Node) {
        if let Item::Table(entries) = &node.item {
            self.entries(table, entries, &Origin { document: 0, span: 0..0 });
        }
    }

    /// Reads the table `name` inside the current one.
    pub fn table<T: Table>(&mut self, table: &mut T, name: &str, node: &Node) {
        let Item::Table(entries) = &node.item else {
            return self.wrong_type(name, node, "a table");
        };
        self.enter(name, |reader| reader.entries(table, entries, &node.origin));
    }

    /// Runs `read` with `name` appended to the current path.
    pub fn enter(&mut self, name: &str, read: impl FnOnce(&mut Self)) {
        self.path.push(name.to_owned());
        read(self);
        self.path.pop();
    }

    /// The dotted name of `key` in the current table.
    pub fn dotted(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path.join(".")) }
    }

    /// Reports a value of the wrong type.
    pub fn wrong_type(&mut self, name: &str, node: &Node, expected: &str) {
        self.report(node, format!("`{}` must be {expected}, found {}", self.dotted(name), node.item.found()), "");
    }

    /// Reports `message` at `node`; an empty hint is left out.
    pub fn report(&mut self, node: &Node, message: String, hint: &str) {
        self.problems.push(Problem::new(node.origin.clone(), message).help(hint));
    }

    /// Checks a number against its key's range.
    pub fn check_range(&mut self, field: &Field, node: &Node, value: f64) -> bool {
        let inside = field.range.contains(value);
        if !inside {
            let words = field.range.words();
            let words = if words.is_empty() { "finite".to_owned() } else { words };
            let message = format!("`{}` = {value} is out of range: must be {words}", self.dotted(field.name));
            self.report(node, message, "");
        }
        inside
    }

    fn entries<T: Table>(&mut self, table: &mut T, entries: &[Entry], place: &Origin) {
        for entry in entries {
            self.origins.insert(self.dotted(&entry.key), entry.key_origin.clone());
            if !table.take(&entry.key, &entry.node, self) {
                let problem = self.unknown(&entry.key, entry, &table.describe());
                self.problems.push(problem);
            }
        }
        for key in table.describe() {
            if entries.iter().all(|entry| entry.key != key.name) {
                self.missing(&key, place);
            }
        }
    }

    fn missing(&mut self, key: &Key, place: &Origin) {
        let inner = key.table.as_deref().unwrap_or_default();
        let message = if key.required {
            format!("missing key `{}` in {}", key.name, self.here())
        } else if let Some(first) = inner.iter().find(|inner| inner.required).filter(|_| !key.repeated) {
            format!("missing table [{}] with its key `{}`", self.dotted(key.name), first.name)
        } else {
            return;
        };
        self.problems.push(Problem::new(place.clone(), message).help(names::first_sentence(&key.doc)));
    }

    fn unknown(&self, name: &str, entry: &Entry, keys: &[Key]) -> Problem {
        let mut inside = Vec::new();
        inner_keys("", &entry.node, &mut inside);
        let message = match (&entry.node.item, self.path.is_empty()) {
            (Item::Table(_), _) => format!("unknown table [{}]", self.dotted(name)),
            (_, true) => format!("unknown key `{name}` outside of all tables"),
            (_, false) => format!("unknown key `{name}` in {}", self.here()),
        };
        let problem = Problem::new(entry.key_origin.clone(), message);
        let own: Vec<&str> = keys.iter().map(|key| key.name).collect();
        self.foreign.hints(&self.path, name, &inside, &own, &self.known).into_iter().fold(problem, Problem::help)
    }

    /// `[ppo]`, or words for the top of the file.
    fn here(&self) -> String {
        if self.path.is_empty() { "the recipe".to_owned() } else { format!("[{}]", self.path.join(".")) }
    }
}

/// Every dotted key written below `node`.
fn inner_keys(prefix: &str, node: &Node, names: &mut Vec<String>) {
    let Item::Table(entries) = &node.item else {
        return names.extend((!prefix.is_empty()).then(|| prefix.to_owned()));
    };
    for entry in entries {
        let name = if prefix.is_empty() { entry.key.clone() } else { format!("{prefix}.{}", entry.key) };
        inner_keys(&name, &entry.node, names);
    }
}

/// Every dotted key below `keys`.
pub fn collect_names(prefix: &str, keys: &[Key], names: &mut Vec<String>) {
    for key in keys {
        let name = if prefix.is_empty() { key.name.to_owned() } else { format!("{prefix}.{}", key.name) };
        collect_names(&name, key.table.as_deref().unwrap_or_default(), names);
        names.push(name);
    }
}
