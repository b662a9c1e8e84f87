//! Rows from files: JSON lines (plain or gzip), JSON, parquet, and folders of them in order of their names.
//!
//! Rows are handed to a visitor one at a time, so that a filter drops them before they are held in memory.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::error::{DataError, Place};
use super::parquet_file;

/// One row: its columns by name, and where it stands.
#[derive(Debug, Clone)]
pub struct Row {
    pub place: Place,
    pub columns: Map<String, Value>,
}

/// What a visitor answers: go on, stop reading, or an error.
pub type Visit = Result<ControlFlow<()>, DataError>;

/// Hands every row of `path`, a file or a folder of files, to `visit`, in order, until it breaks.
///
/// The format follows the file's name: `.jsonl` or `.ndjson` (one object per line, blank lines skipped), `.json` (an
/// array of objects, an object whose `data` is one, or one object per line), `.parquet`, and `.gz` after any of
/// the JSON names. A folder's data files are read in order of their names; other files in it are passed over.
///
/// # Errors
/// A file that cannot be read, is empty, or holds anything but rows; and the visitor's own.
pub fn visit_rows(path: &Path, visit: &mut dyn FnMut(Row) -> Visit) -> Result<(), DataError> {
    for file in data_files(path)? {
        let mut num_rows = 0;
        let mut stopped = false;
        visit_file(&file, &mut |row| {
            num_rows += 1;
            let flow = visit(row)?;
            stopped = flow.is_break();
            Ok(flow)
        })?;
        if num_rows == 0 {
            return Err(DataError::EmptyFile { path: file });
        }
        if stopped {
            break;
        }
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Lines,
    Json,
    Parquet,
}

/// The format a file's name tells, and whether gzip is around it.
fn format_of(path: &Path) -> Option<(Format, bool)> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let (stem, gzip) = match name.strip_suffix(".gz") {
        Some(stem) => (stem, true),
        None => (name.as_str(), false),
    };
    let format = match stem.rsplit_once('.')?.1 {
        "jsonl" | "ndjson" => Format::Lines,
        "json" => Format::Json,
        "parquet" if !gzip => Format::Parquet,
        _ => return None,
    };
    Some((format, gzip))
}

fn data_files(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    let failed = |source| DataError::Read { path: path.to_owned(), source };
    if !std::fs::metadata(path).map_err(failed)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        let hidden = file.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && file.is_file() && format_of(&file).is_some() {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(DataError::EmptyFolder { path: path.to_owned() });
    }
    files.sort();
    Ok(files)
}

fn visit_file(path: &Path, visit: &mut dyn FnMut(Row) -> Visit) -> Result<(), DataError> {
    let (format, gzip) = format_of(path).ok_or_else(|| DataError::UnknownFormat { path: path.to_owned() })?;
    let file = File::open(path).map_err(|source| DataError::Read { path: path.to_owned(), source })?;
    if format == Format::Parquet {
        return parquet_file::visit_rows(path, file, visit);
    }
    let reader: Box<dyn Read> = if gzip { Box::new(flate2::read::MultiGzDecoder::new(file)) } else { Box::new(file) };
    match format {
        Format::Json => visit_json(path, reader, visit),
        _ => visit_lines(path, BufReader::new(reader), visit),
    }
}

fn visit_lines(path: &Path, mut reader: impl BufRead, visit: &mut dyn FnMut(Row) -> Visit) -> Result<(), DataError> {
    let mut bytes = Vec::new();
    for line in 1.. {
        let place = Place::Line { path: path.to_owned(), line };
        bytes.clear();
        match reader.read_until(b'\n', &mut bytes) {
            Err(source) => return Err(DataError::ReadLine { place, source }),
            Ok(0) => break,
            Ok(_) => {}
        }
        let text = if line == 1 { bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes) } else { &bytes };
        if text.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let value = serde_json::from_slice(text).map_err(|source| DataError::Json { place: place.clone(), source })?;
        if visit(object_row(place, value)?)?.is_break() {
            break;
        }
    }
    Ok(())
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

fn visit_json(path: &Path, mut reader: impl Read, visit: &mut dyn FnMut(Row) -> Visit) -> Result<(), DataError> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).map_err(|source| DataError::Read { path: path.to_owned(), source })?;
    let text = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
    if text.iter().all(u8::is_ascii_whitespace) {
        return Ok(()); // no rows: the caller says that the file is empty
    }
    let value = match serde_json::from_slice::<Value>(text) {
        Ok(value) => value,
        Err(_) if is_json_lines(text) => return visit_lines(path, text, visit),
        Err(source) => {
            let place = Place::Line { path: path.to_owned(), line: source.line() };
            return Err(DataError::Json { place, source });
        }
    };
    for (index, value) in rows_of(path, value)?.into_iter().enumerate() {
        let place = Place::Row { path: path.to_owned(), row: index + 1 };
        if visit(object_row(place, value)?)?.is_break() {
            break;
        }
    }
    Ok(())
}

/// Whether a `.json` file that is not one JSON value starts with an object on a line of its own: many data sets
/// give JSON lines that name.
fn is_json_lines(text: &[u8]) -> bool {
    let first = text.split(|&byte| byte == b'\n').find(|line| !line.iter().all(u8::is_ascii_whitespace));
    first.is_some_and(|line| line.len() < text.len() && serde_json::from_slice::<Map<String, Value>>(line).is_ok())
}

fn rows_of(path: &Path, value: Value) -> Result<Vec<Value>, DataError> {
    let found = match value {
        Value::Array(rows) => return Ok(rows),
        Value::Object(mut object) => match object.remove("data") {
            Some(Value::Array(rows)) => return Ok(rows),
            Some(other) => format!("an object whose \"data\" is {}", kind_of(&other)),
            None => format!("an object with {} keys, none of them \"data\"", object.len()),
        },
        other => kind_of(&other).to_owned(),
    };
    Err(DataError::NotRows { path: path.to_owned(), found })
}

fn object_row(place: Place, value: Value) -> Result<Row, DataError> {
    match value {
        Value::Object(columns) => Ok(Row { place, columns }),
        other => Err(DataError::NotObject { place, found: kind_of(&other).to_owned() }),
    }
}

/// A JSON value's type in words.
pub(super) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a bool",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

impl Row {
    /// The value of the first of `keys` that the row has.
    ///
    /// # Errors
    /// [`DataError::MissingKey`] with the keys the row does have.
    pub fn require(&self, keys: &[&str]) -> Result<(&str, &Value), DataError> {
        let found = keys.iter().find_map(|key| self.columns.get_key_value(*key));
        found.map(|(key, value)| (key.as_str(), value)).ok_or_else(|| DataError::MissingKey {
            place: self.place.clone(),
            expected: keys.iter().map(|&key| key.to_owned()).collect(),
            found: self.keys(),
        })
    }

    /// The error for a value of another type than `expected`.
    pub(super) fn wrong_type(&self, key: &str, expected: &str, found: impl std::fmt::Display) -> DataError {
        DataError::WrongType {
            place: self.place.clone(),
            key: key.to_owned(),
            problem: format!("expected {expected}, found {found}"),
            keys: self.keys(),
        }
    }

    fn keys(&self) -> Vec<String> {
        self.columns.keys().cloned().collect()
    }
}
