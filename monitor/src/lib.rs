//! What a person sees of a run: TensorBoard, `metrics.jsonl`, `samples.jsonl`, the terminal and `report.html`.
//!
//! [`RunLog`] writes the files of a run folder, one step at a time; [`Terminal`] shows the run while it goes;
//! [`write_report`] makes a page of the files afterwards. Nothing here knows models or recipes; what a line and
//! the page lead with, an algorithm says.

mod chart;
mod clock;
mod event;
mod metrics;
mod perf;
mod report;
mod samples;
mod tensorboard;
mod terminal;

use std::path::{Path, PathBuf};

pub use chart::escape;
pub use clock::{RunClock, process_age};
use metrics::JsonLines;
pub use metrics::Metrics;
pub use perf::{ModelSize, PhaseWork, forward_flops_per_token, record_perf, training_flops_per_token};
pub use report::{EvalResponse, Evaluation, STYLE, write_report};
pub use samples::{Sample, samples_markdown};
use tensorboard::EventWriter;
pub use terminal::{Phase, StepLine, Summary, Terminal, TerminalOptions};

/// The files of a run folder that grow by the step: `metrics.jsonl`, `samples.jsonl` and `tensorboard/`.
#[derive(Debug)]
pub struct RunLog {
    metrics: JsonLines,
    samples: JsonLines,
    events: EventWriter,
}

impl RunLog {
    /// Starts the files in `run_dir`, which exists.
    ///
    /// # Errors
    /// A file cannot be created.
    pub fn create(run_dir: &Path) -> Result<Self, MonitorError> {
        Ok(Self {
            metrics: JsonLines::create(&run_dir.join(METRICS_FILE))?,
            samples: JsonLines::create(&run_dir.join(SAMPLES_FILE))?,
            events: EventWriter::create(&run_dir.join(TENSORBOARD_FOLDER))?,
        })
    }

    /// Continues the files in `run_dir` after `step`, the checkpoint's: what came later is cut off.
    ///
    /// # Errors
    /// A file cannot be read, cut or continued, or holds a damaged line.
    pub fn resume(run_dir: &Path, step: u64) -> Result<Self, MonitorError> {
        Ok(Self {
            metrics: JsonLines::resume(&run_dir.join(METRICS_FILE), step)?,
            samples: JsonLines::resume(&run_dir.join(SAMPLES_FILE), step)?,
            events: EventWriter::resume(&run_dir.join(TENSORBOARD_FOLDER), step)?,
        })
    }

    /// Whether the files in `run_dir` can be continued after `step`. Changes nothing.
    ///
    /// # Errors
    /// A file cannot be read or holds a damaged line.
    pub fn check(run_dir: &Path, step: u64) -> Result<(), MonitorError> {
        [METRICS_FILE, SAMPLES_FILE]
            .iter()
            .try_for_each(|file| JsonLines::kept_bytes(&run_dir.join(file), step).map(|_| ()))
    }

    /// Writes what was measured before the first step, to TensorBoard alone: `metrics.jsonl` counts steps from 1.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_start(&mut self, metrics: &Metrics) -> Result<(), MonitorError> {
        self.events.write(0, metrics)
    }

    /// Writes one step: scalars everywhere, histograms and texts to TensorBoard, `samples` to `samples.jsonl`.
    ///
    /// # Errors
    /// A file cannot be written (the disk is full, say).
    pub fn write(&mut self, step: u64, metrics: &Metrics, samples: &[Sample]) -> Result<(), MonitorError> {
        self.samples.append(samples)?;
        self.events.write(step, metrics)?;
        self.metrics.append(&[metrics.to_json(step)])
    }

    /// Waits until the JSON lines have reached the disk: before a checkpoint that relies on them.
    ///
    /// # Errors
    /// The operating system reports a failed write.
    pub fn sync(&self) -> Result<(), MonitorError> {
        self.metrics.sync()?;
        self.samples.sync()
    }
}

const METRICS_FILE: &str = "metrics.jsonl";
const SAMPLES_FILE: &str = "samples.jsonl";
/// How a run of several workers was planned.
pub const PLAN_FILE: &str = "plan.txt";
const TENSORBOARD_FOLDER: &str = "tensorboard";

/// A file of the run folder could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    /// A line that is no JSON object with a step, before the last line of its file.
    #[error("{}:{line}: not a JSON object with a `step`; repair or delete this line, then resume again", path.display())]
    DamagedLine { path: PathBuf, line: usize },
    /// A JSON file of the run folder does not have the form it was written in.
    #[error("{}: {source}; delete the file to make the report without it", path.display())]
    DamagedFile { path: PathBuf, source: serde_json::Error },
}

impl MonitorError {
    fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.into(), source }
    }
}

/// `value` with `decimals` digits after the point; in exponent form where that would show a false zero or too many digits.
fn fixed(value: f64, decimals: usize) -> String {
    let smallest_shown = 0.5 * 10_f64.powi(-(decimals as i32));
    let magnitude = value.abs();
    if !value.is_finite() {
        "-".into()
    } else if value == 0.0 {
        format!("{:.decimals$}", 0.0)
    } else if magnitude < smallest_shown || magnitude >= 1e7 {
        format!("{value:.1e}")
    } else {
        format!("{value:.decimals$}")
    }
}

/// A duration as people say it: `0.4s`, `12s`, `13m05s`, `2h03m`, `3d04h`.
fn duration_text(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".into();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1}s");
    }
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole}s"),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d{:02}h", whole / 86_400, whole % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_their_meaning_when_short() {
        let shown = |value, decimals| fixed(value, decimals);
        assert_eq!(shown(0.41234, 3), "0.412");
        assert_eq!(shown(-0.0112, 3), "-0.011");
        assert_eq!(shown(-0.0, 3), "0.000");
        assert_eq!(shown(3.1e-7, 4), "3.1e-7");
        assert_eq!(shown(f64::NAN, 2), "-");
        assert_eq!(shown(2.5e9, 1), "2.5e9");
    }

    #[test]
    fn durations_read_as_people_say_them() {
        let cases = [
            (0.42, "0.4s"),
            (59.6, "1m00s"),
            (12.0, "12s"),
            (785.0, "13m05s"),
            (7380.0, "2h03m"),
            (273_600.0, "3d04h"),
        ];
        for (seconds, text) in cases {
            assert_eq!(duration_text(seconds), text);
        }
        assert_eq!(duration_text(f64::NAN), "-");
    }

    #[test]
    fn a_resumed_run_folder_equals_an_undisturbed_one() {
        let sample = |step| Sample {
            step,
            prompt: "a".into(),
            response: "b".into(),
            reward: 1.0,
            score: 1.0,
            kl: 0.0,
            response_length: 1,
            finish_reason: "stop".into(),
        };
        let run = |log: &mut RunLog, steps: std::ops::RangeInclusive<u64>| {
            for step in steps {
                log.write(step, Metrics::new().set("train/reward", step as f64 * 0.1), &[sample(step)]).unwrap();
            }
            log.sync().unwrap();
        };
        let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        run(&mut RunLog::create(whole.path()).unwrap(), 1..=6);
        run(&mut RunLog::create(killed.path()).unwrap(), 1..=5);
        run(&mut RunLog::resume(killed.path(), 2).unwrap(), 3..=6);
        for name in [METRICS_FILE, SAMPLES_FILE] {
            let read = |directory: &Path| std::fs::read_to_string(directory.join(name)).unwrap();
            assert_eq!(read(whole.path()), read(killed.path()), "{name}");
        }
    }
}
