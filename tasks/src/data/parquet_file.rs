//! Rows of a parquet file, through the row API, as JSON values.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row as Record};
use serde_json::{Map, Value};

use super::error::{DataError, Place};
use super::file::{Row, Visit};

/// Hands every row of a parquet file to `visit`.
pub(super) fn visit_rows(path: &Path, file: File, visit: &mut dyn FnMut(Row) -> Visit) -> Result<(), DataError> {
    let broken = |row, message| DataError::Parquet { path: path.to_owned(), row, message };
    let reader = guarded(|| SerializedFileReader::new(file)).map_err(|message| broken(1, message))?;
    let mut records = guarded(|| reader.get_row_iter(None)).map_err(|message| broken(1, message))?;
    for row in 1.. {
        let next = guarded(|| records.next().transpose()).map_err(|message| broken(row, message))?;
        let Some(record) = next else { break };
        let place = Place::Row { path: path.to_owned(), row };
        if visit(Row { place, columns: columns_of(record) })?.is_break() {
            break;
        }
    }
    Ok(())
}

/// Runs one call of the parquet reader, which asserts about the bytes of a damaged file in places where it could
/// answer with an error: a panic there is the file's fault and becomes its error.
fn guarded<T>(call: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the reader stopped at damaged bytes".to_owned()),
    }
}

fn columns_of(record: Record) -> Map<String, Value> {
    record.into_columns().into_iter().map(|(name, field)| (name, value_of(field))).collect()
}

/// A parquet value as JSON: numbers, strings, lists and structs as such; dates, times and decimals as the text the
/// parquet crate shows; bytes as text when they are UTF-8 (older writers mark no strings), else null.
fn value_of(field: Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(x) => x.into(),
        Field::Byte(x) => x.into(),
        Field::Short(x) => x.into(),
        Field::Int(x) => x.into(),
        Field::Long(x) => x.into(),
        Field::UByte(x) => x.into(),
        Field::UShort(x) => x.into(),
        Field::UInt(x) => x.into(),
        Field::ULong(x) => x.into(),
        Field::Float(x) => shortest(x),
        Field::Double(x) => x.into(),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        Field::Group(record) => Value::Object(columns_of(record)),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value_of).collect(),
        Field::MapInternal(map) => map.entries().iter().map(entry_of).collect::<Map<_, _>>().into(),
        other => other.to_string().into(),
    }
}

/// The double that is written as `x` is: 0.1 stays 0.1.
fn shortest(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

fn entry_of((key, value): &(Field, Field)) -> (String, Value) {
    let name = match key {
        Field::Str(name) => name.clone(),
        other => other.to_string(),
    };
    (name, value_of(value.clone()))
}
