//! A recipe before it has types: one tree whose every node knows its place, and the texts it was read from.

use std::ops::Range;
use std::path::{Component, Path, PathBuf};

/// The parsed recipe before it is given types.
pub struct Node {
    /// What stands there.
    pub item: Item,
    /// Where it stands.
    pub origin: Origin,
}

/// A TOML value with positions inside.
pub enum Item {
    String(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    Datetime(String),
    Array(Vec<Node>),
    Table(Vec<Entry>),
}

/// One `key = value` of a table.
pub struct Entry {
    pub key: String,
    pub key_origin: Origin,
    pub node: Node,
}

/// A byte range in one of the [`Documents`].
#[derive(Debug, Clone, PartialEq)]
pub struct Origin {
    /// Index into [`Documents`].
    pub document: usize,
    /// Bytes in that document's text.
    pub span: Range<usize>,
}

/// The recipe file (always the first) and the `--set` arguments.
#[derive(Debug, Default)]
pub struct Documents(pub Vec<Document>);

/// One text that keys were read from.
#[derive(Debug)]
pub struct Document {
    /// As the user named it: the path, or the whole `--set` argument.
    pub label: String,
    /// Its text.
    pub text: String,
    /// The folder that relative paths inside it start from.
    pub base: PathBuf,
    /// False for a `--set` argument, which has no line numbers.
    pub is_file: bool,
}

impl Documents {
    /// The absolute path that `written`, found at `origin`, means.
    pub fn resolve_path(&self, origin: &Origin, written: &str) -> PathBuf {
        clean(&self.0[origin.document].base.join(written))
    }
}

impl Item {
    /// Names the value for "found …" in a message.
    pub fn found(&self) -> String {
        match self {
            Item::String(text) => format!("the string \"{text}\""),
            Item::Integer(value) => format!("the integer {value}"),
            Item::Float(value) => format!("the number {value:?}"),
            Item::Boolean(value) => format!("`{value}`"),
            Item::Datetime(value) => format!("the date {value}"),
            Item::Array(elements) => format!("a list of {}", elements.len()),
            Item::Table(_) => "a table".to_owned(),
        }
    }
}

/// Removes `.` and `x/..` by spelling alone: a symbolic link at the end keeps its name, and so its extension.
fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                cleaned.pop();
            }
            other => cleaned.push(other),
        }
    }
    cleaned
}
