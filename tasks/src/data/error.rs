//! What can be wrong with data, said with the file, the line and the key.

use std::fmt;
use std::path::PathBuf;

use super::source::{FilterError, LoadReport};

/// Where a row stands: a line of a text file, or a row of a file that has no lines. Both count from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// `prompts.jsonl:17`
    Line { path: PathBuf, line: usize },
    /// `prompts.parquet: row 17`
    Row { path: PathBuf, row: usize },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Row { path, row } => write!(f, "{}: row {row}", path.display()),
        }
    }
}

/// Why data could not be read, mixed or continued.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },

    #[error("{place}: cannot read the line: {source}")]
    ReadLine { place: Place, source: std::io::Error },

    #[error("cannot read {}: expected a .jsonl, .jsonl.gz, .json or .parquet file, or a folder of them", path.display())]
    UnknownFormat { path: PathBuf },

    #[error("no data in folder {}: it has no .jsonl, .jsonl.gz, .json or .parquet file (folders inside it are not searched)", path.display())]
    EmptyFolder { path: PathBuf },

    #[error("no data in {}: the file has no rows", path.display())]
    EmptyFile { path: PathBuf },

    #[error("{place}: not valid JSON: {source}")]
    Json { place: Place, source: serde_json::Error },

    #[error("{}: expected an array of rows, or an object whose \"data\" is one; found {found}", path.display())]
    NotRows { path: PathBuf, found: String },

    #[error("{place}: expected an object with one key per column, found {found}")]
    NotObject { place: Place, found: String },

    #[error("cannot read {}: not a whole parquet file, near row {row}: {message}", path.display())]
    Parquet { path: PathBuf, row: usize, message: String },

    #[error("{place}: no key {}; the row has {}", quote(expected, " or "), quote(found, ", "))]
    MissingKey { place: Place, expected: Vec<String>, found: Vec<String> },

    #[error("{place}: key \"{key}\": {problem}; the row has {}", quote(keys, ", "))]
    WrongType {
        place: Place,
        key: String,
        /// What was expected and what was found.
        problem: String,
        keys: Vec<String>,
    },

    #[error("{place}: cannot check the row: {source}")]
    Filter { place: Place, source: FilterError },

    #[error("no usable row in {}: {report}", path.display())]
    AllDropped { path: PathBuf, report: Box<LoadReport> },

    #[error("no source of data: name at least one file or folder")]
    NoSource,

    #[error("data source {name}: it has no rows")]
    EmptySource { name: String },

    #[error("data source {name}: weight {weight} must be a finite number above 0")]
    Weight { name: String, weight: f64 },

    #[error(
        "the data position does not fit the data: {what} was {saved} when it was saved and is {current} now; \
         restore the data and seed of that run, or start a new run"
    )]
    Position { what: String, saved: String, current: String },
}

fn quote(keys: &[String], separator: &str) -> String {
    if keys.is_empty() {
        return "no keys".to_owned();
    }
    keys.iter().map(|key| format!("\"{key}\"")).collect::<Vec<_>>().join(separator)
}
