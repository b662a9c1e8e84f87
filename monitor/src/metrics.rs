//! The numbers of a step, and `metrics.jsonl`: one JSON object per step, written when the step ends.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde::Serialize;
use serde_json::{Map, Value};

use super::MonitorError;

/// Everything measured in one step, by name (`train/reward`, `perf/tokens_per_second`), in the order it was set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Single numbers: they go to TensorBoard and to `metrics.jsonl`.
    pub scalars: IndexMap<String, f64>,
    /// Distributions over a step's responses or tokens: TensorBoard only.
    pub histograms: IndexMap<String, Vec<f32>>,
    /// Markdown texts: TensorBoard only.
    pub texts: IndexMap<String, String>,
}

impl Metrics {
    /// No metric yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets one scalar; a later value for the same name replaces the earlier one.
    pub fn set(&mut self, name: impl Into<String>, value: f64) -> &mut Self {
        self.scalars.insert(name.into(), value);
        self
    }

    /// Sets the values of one histogram. Non-finite values are left out when it is written.
    pub fn set_histogram(&mut self, name: impl Into<String>, values: Vec<f32>) -> &mut Self {
        self.histograms.insert(name.into(), values);
        self
    }

    /// Sets one Markdown text.
    pub fn set_text(&mut self, name: impl Into<String>, markdown: impl Into<String>) -> &mut Self {
        self.texts.insert(name.into(), markdown.into());
        self
    }

    /// The scalar of that name, when it was set.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.scalars.get(name).copied()
    }

    /// Takes over everything in `other`; its values win.
    pub fn extend(&mut self, other: Metrics) -> &mut Self {
        self.scalars.extend(other.scalars);
        self.histograms.extend(other.histograms);
        self.texts.extend(other.texts);
        self
    }

    /// Writes the scalars as one JSON object: what was measured at no step.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_file(&self, path: &Path) -> Result<(), MonitorError> {
        let object: Map<String, Value> =
            self.scalars.iter().map(|(name, value)| (name.clone(), Value::from(*value))).collect();
        let text = format!("{:#}\n", Value::Object(object));
        std::fs::write(path, text).map_err(|source| MonitorError::io("write", path, source))
    }

    /// The line of `metrics.jsonl` for `step`: `step`, then the scalars; non-finite ones are null.
    pub(super) fn to_json(&self, step: u64) -> Value {
        let mut object = Map::new();
        object.insert("step".into(), step.into());
        for (name, value) in &self.scalars {
            object.insert(name.clone(), Value::from(*value)); // serde_json turns non-finite into null
        }
        Value::Object(object)
    }
}

/// A file of JSON lines that all carry a `step`, in ascending order.
#[derive(Debug)]
pub(super) struct JsonLines {
    path: PathBuf,
    file: File,
}

impl JsonLines {
    /// Starts an empty file at `path`; one that exists is emptied.
    pub(super) fn create(path: &Path) -> Result<Self, MonitorError> {
        let file = File::create(path).map_err(|source| MonitorError::io("create", path, source))?;
        Ok(Self { path: path.into(), file })
    }

    /// Bytes of the lines of `step` or before; 0 where there is no file.
    pub(super) fn kept_bytes(path: &Path, step: u64) -> Result<usize, MonitorError> {
        match std::fs::read(path) {
            Ok(bytes) => length_up_to(&bytes, step, path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(MonitorError::io("read", path, error)),
        }
    }

    /// Cuts the file after its last line of `step` or before, a torn last line too, and continues there. A missing file is
    /// an empty one.
    pub(super) fn resume(path: &Path, step: u64) -> Result<Self, MonitorError> {
        let kept = Self::kept_bytes(path, step)?;
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .and_then(|file| file.set_len(kept as u64).map(|()| file))
            .map_err(|source| MonitorError::io("continue", path, source))?;
        Ok(Self { path: path.into(), file })
    }

    /// Writes one line per record, in one write, so that a kill leaves whole lines or a torn last one.
    pub(super) fn append<T: Serialize>(&mut self, records: &[T]) -> Result<(), MonitorError> {
        let mut buffer = Vec::new();
        for record in records {
            serde_json::to_writer(&mut buffer, record)
                .map_err(|source| MonitorError::io("write", &self.path, source.into()))?;
            buffer.push(b'\n');
        }
        self.file.write_all(&buffer).map_err(|source| MonitorError::io("write", &self.path, source))
    }

    pub(super) fn sync(&self) -> Result<(), MonitorError> {
        self.file.sync_data().map_err(|source| MonitorError::io("sync", &self.path, source))
    }
}

/// Bytes of the leading lines whose step is at most `step`.
fn length_up_to(bytes: &[u8], step: u64, path: &Path) -> Result<usize, MonitorError> {
    let mut kept = 0;
    for (index, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
        let is_last = kept + line.len() == bytes.len();
        match step_of(line) {
            Some(line_step) if line_step > step => break,
            Some(_) if line.ends_with(b"\n") => kept += line.len(),
            _ if is_last => break, // torn by a kill while it was written
            _ => {
                return Err(MonitorError::DamagedLine { path: path.into(), line: index + 1 });
            }
        }
    }
    Ok(kept)
}

fn step_of(line: &[u8]) -> Option<u64> {
    serde_json::from_slice::<Value>(line).ok()?.get("step")?.as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(path: &Path) -> Vec<u64> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| step_of(line.as_bytes()).unwrap()).collect()
    }

    fn written(path: &Path, last_step: u64) {
        let mut log = JsonLines::create(path).unwrap();
        for step in 1..=last_step {
            log.append(&[Metrics::new().set("train/reward", step as f64 / 3.0).to_json(step)]).unwrap();
        }
    }

    #[test]
    fn a_line_has_the_step_first_then_scalars_in_order_and_null_for_non_finite() {
        let mut metrics = Metrics::new();
        metrics.set("train/reward", 0.1).set("perf/mfu", f64::NAN).set("a", f64::INFINITY).set("train/kl", 1.0);
        metrics.set_histogram("train/rewards", vec![1.0]).set_text("samples", "text");
        assert_eq!(
            metrics.to_json(7).to_string(),
            r#"{"step":7,"train/reward":0.1,"perf/mfu":null,"a":null,"train/kl":1.0}"#
        );
    }

    #[test]
    fn floats_round_trip_bit_for_bit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let mut log = JsonLines::create(&path).unwrap();
        let mut bits = 0x9e37_79b9_7f4a_7c15_u64;
        let values: Vec<f64> = std::iter::repeat_with(|| {
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            f64::from_bits(bits)
        })
        .filter(|value| value.is_finite())
        .take(500)
        .collect();
        let mut metrics = Metrics::new();
        for (index, value) in values.iter().enumerate() {
            metrics.set(format!("m/{index}"), *value);
        }
        log.append(&[metrics.to_json(1)]).unwrap();
        let line: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        for (index, value) in values.iter().enumerate() {
            assert_eq!(line[format!("m/{index}")].as_f64().unwrap().to_bits(), value.to_bits());
        }
    }

    #[test]
    fn resume_cuts_later_steps_and_a_torn_line_and_appends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        written(&path, 5);
        let mut log = JsonLines::resume(&path, 3).unwrap();
        log.append(&[Metrics::new().to_json(4)]).unwrap();
        assert_eq!(steps(&path), [1, 2, 3, 4]);

        for torn in ["{\"step\":5,\"train/rew", "{\"step\":5}", "\0\0\0\0", "{}\n"] {
            written(&path, 4);
            let whole = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, whole.clone() + torn).unwrap();
            JsonLines::resume(&path, 9).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), whole, "after {torn:?}");
        }
    }

    #[test]
    fn resume_starts_a_missing_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        JsonLines::resume(&path, 3).unwrap().append(&[Metrics::new().to_json(4)]).unwrap();
        assert_eq!(steps(&path), [4]);
    }

    #[test]
    fn a_damaged_line_before_the_last_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\":1}\n{\"st\n{\"step\":3}\n").unwrap();
        let error = JsonLines::resume(&path, 3).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl:2"), "{error}");
        assert!(!error.ends_with('.'), "{error}");
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let error = JsonLines::create(Path::new("no/such/folder/metrics.jsonl")).unwrap_err();
        assert!(error.to_string().contains("no/such/folder/metrics.jsonl"), "{error}");
    }
}
