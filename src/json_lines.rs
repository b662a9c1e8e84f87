//! Files of JSON lines: read with errors that name the line, written beside their name and renamed when complete.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use echelon_core::whole_file::WholeFile;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::program::{Failure, failed};

/// Reads every line that is not blank, each a JSON object, through `parse`.
///
/// # Errors
/// [`Failure::Input`] for an unreadable file, a line that is no object or that `parse` refuses (named as `FILE:LINE`),
/// and a file without lines.
pub fn read<T>(
    path: &Path,
    mut parse: impl FnMut(&Map<String, Value>) -> Result<T, String>,
) -> Result<Vec<T>, Failure> {
    let unreadable = |error: std::io::Error| Failure::Input(format!("{}: {error}", path.display()));
    let file = File::open(path).map_err(unreadable)?;
    let mut rows = Vec::new();
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let refused = |message: String| Failure::Input(format!("{}:{}: {message}", path.display(), index + 1));
        let line = line.map_err(|error| refused(error.to_string()))?;
        if line.trim().is_empty() {
            continue;
        }
        let value: Value = serde_json::from_str(&line).map_err(|error| {
            let error = error.to_string().replace(" at line 1 column", " at column");
            refused(format!("expected a JSON object on one line: {error}"))
        })?;
        let object =
            value.as_object().ok_or_else(|| refused(format!("expected a JSON object, found {}", kind_of(&value))))?;
        rows.push(parse(object).map_err(refused)?);
    }
    if rows.is_empty() {
        return Err(Failure::Input(format!("{}: the file has no lines", path.display())));
    }
    Ok(rows)
}

/// What a JSON value is, in words.
pub fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// JSON lines on their way to a file. Until [`finish`](Self::finish) they stand beside it; dropped before, they go.
///
/// What exists and is no ordinary file (a pipe, a terminal) is written directly.
pub struct LineWriter {
    path: PathBuf,
    file: Lines,
}

enum Lines {
    Beside(WholeFile),
    Direct(BufWriter<File>),
}

impl LineWriter {
    /// # Errors
    /// [`Failure::Input`] when nothing can be written there.
    pub fn create(path: &Path) -> Result<LineWriter, Failure> {
        let refused = |error: std::io::Error| Failure::Input(format!("{}: {error}", path.display()));
        let special = fs::metadata(path).is_ok_and(|metadata| !metadata.is_file());
        if special {
            let file = File::options().write(true).open(path).map_err(refused)?;
            return Ok(LineWriter { path: path.into(), file: Lines::Direct(BufWriter::new(file)) });
        }
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.into());
        let file = Lines::Beside(WholeFile::create(&path, 0o666).map_err(refused)?);
        Ok(LineWriter { path, file })
    }

    /// # Errors
    /// The disk is full, the pipe closed.
    pub fn write(&mut self, row: &impl Serialize) -> Result<(), Failure> {
        let line = serde_json::to_string(row).map_err(|error| failed(&self.path, error))? + "\n";
        let file: &mut dyn Write = match &mut self.file {
            Lines::Beside(file) => file,
            Lines::Direct(file) => file,
        };
        file.write_all(line.as_bytes()).map_err(|error| failed(&self.path, error))
    }

    /// Makes the lines appear under the file's name.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn finish(self) -> Result<(), Failure> {
        let LineWriter { path, file } = self;
        let finished = match file {
            Lines::Beside(file) => file.finish(),
            Lines::Direct(mut file) => file.flush(),
        };
        finished.map_err(|error| failed(&path, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_appear_when_they_are_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let names = || fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
        let mut abandoned = LineWriter::create(&path).unwrap();
        abandoned.write(&1).unwrap();
        assert!(!path.exists());
        drop(abandoned);
        assert!(names().is_empty());
        let mut writer = LineWriter::create(&path).unwrap();
        writer.write(&Value::from("å")).unwrap();
        writer.finish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "\"å\"\n");
        assert_eq!(names(), ["out.jsonl"]);
    }

    #[test]
    fn blank_lines_are_skipped_but_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in.jsonl");
        fs::write(&path, "\n{\"a\": 1}\n\n[2]\n").unwrap();
        let complaint = read(&path, |_| Ok(())).unwrap_err().to_string();
        assert_eq!(complaint, format!("{}:4: expected a JSON object, found a list", path.display()));
        fs::write(&path, "\n{\"a\": 1}\n").unwrap();
        assert_eq!(read(&path, |row| Ok(row["a"].clone())).unwrap(), [Value::from(1)]);
    }
}
