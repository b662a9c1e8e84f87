//! TensorBoard event files: scalars, histograms and texts, one file per start of the program.
//!
//! A file is a sequence of TFRecords (length, masked CRC of the length, payload, masked CRC of the payload); the payload is
//! an [`Event`]. Scalars are written as `simple_value`, the form that every reader of event files understands.
//!
//! After a resume no step may show twice. Readers that are already running learn it from a session-start event, which
//! drops what they hold from its step on; for all later readers the old files are cut at the checkpoint's step as well,
//! because the default reader ignores session events.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use super::event::{
    DATA_CLASS_TENSOR, DT_STRING, Event, HistogramProto, PluginData, SESSION_START, SessionLog, Summary,
    SummaryMetadata, SummaryValue, TensorDim, TensorProto, TensorShapeProto, Value, What,
};
use super::{Metrics, MonitorError};

const FILE_PREFIX: &str = "events.out.tfevents.";
const HISTOGRAM_BUCKETS: usize = 30;

/// Writes one TensorBoard event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts an event file in `directory`, which is created when it is missing.
    ///
    /// # Errors
    /// The folder or the file cannot be created or written.
    pub fn create(directory: &Path) -> Result<Self, MonitorError> {
        Self::start(directory, 0)
    }

    /// Continues after `step`: events of later steps are cut from the files in `directory`, and a new file starts.
    ///
    /// # Errors
    /// A file cannot be read, cut, created or written.
    pub fn resume(directory: &Path, step: u64) -> Result<Self, MonitorError> {
        for path in event_files(directory)? {
            cut_after(&path, step)?;
        }
        Self::start(directory, step + 1)
    }

    /// Writes everything in `metrics` as one event of `step`.
    ///
    /// # Errors
    /// It cannot be written (the disk is full, say).
    pub fn write(&mut self, step: u64, metrics: &Metrics) -> Result<(), MonitorError> {
        let scalars = metrics.scalars.iter().map(|(tag, value)| scalar(tag, *value));
        let histograms = metrics.histograms.iter().filter_map(|(tag, values)| histogram(tag, values));
        let texts = metrics.texts.iter().map(|(tag, markdown)| text(tag, markdown));
        let value = scalars.chain(histograms).chain(texts).collect();
        self.append(step, What::Summary(Summary { value }))
    }

    /// A new file whose first events are the format's version and the start of a session at `step`.
    fn start(directory: &Path, step: u64) -> Result<Self, MonitorError> {
        std::fs::create_dir_all(directory).map_err(|source| MonitorError::io("create", directory, source))?;
        let path = next_path(directory)?;
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(&path)
            .map_err(|source| MonitorError::io("create", &path, source))?;
        let mut writer = Self { path, file };
        writer.append(0, What::FileVersion("brain.Event:2".into()))?;
        writer.append(step, What::SessionLog(SessionLog { status: SESSION_START }))?;
        Ok(writer)
    }

    fn append(&mut self, step: u64, what: What) -> Result<(), MonitorError> {
        let event = Event { wall_time: seconds_since_epoch(), step: step as i64, what: Some(what) };
        let mut bytes = Vec::new();
        push_record(&mut bytes, &event.encode_to_vec());
        self.file.write_all(&bytes).map_err(|source| MonitorError::io("write", &self.path, source))
    }
}

fn scalar(tag: &str, value: f64) -> SummaryValue {
    SummaryValue { tag: tag.into(), metadata: None, value: Some(Value::Scalar(value as f32)) }
}

/// None when no value is finite: TensorBoard has no empty histogram.
fn histogram(tag: &str, values: &[f32]) -> Option<SummaryValue> {
    let histogram = histogram_of(values)?;
    Some(SummaryValue { tag: tag.into(), metadata: None, value: Some(Value::Histogram(histogram)) })
}

fn text(tag: &str, markdown: &str) -> SummaryValue {
    let plugin_data = PluginData { plugin_name: "text".into() };
    let metadata = SummaryMetadata { plugin_data: Some(plugin_data), data_class: DATA_CLASS_TENSOR };
    let tensor = TensorProto {
        dtype: DT_STRING,
        tensor_shape: Some(TensorShapeProto { dim: vec![TensorDim { size: 1 }] }),
        string_val: vec![markdown.as_bytes().to_vec()],
    };
    SummaryValue { tag: tag.into(), metadata: Some(metadata), value: Some(Value::Tensor(tensor)) }
}

/// Buckets of equal width from the smallest to the largest finite value.
fn histogram_of(values: &[f32]) -> Option<HistogramProto> {
    let finite: Vec<f64> = values.iter().map(|&value| f64::from(value)).filter(|value| value.is_finite()).collect();
    let min = finite.iter().copied().reduce(f64::min)?;
    let max = finite.iter().copied().reduce(f64::max)?;
    let buckets = if min == max { 1 } else { HISTOGRAM_BUCKETS };
    let width = (max - min) / buckets as f64;
    let mut bucket = vec![0.0; buckets];
    for value in &finite {
        let index = if width > 0.0 { ((value - min) / width) as usize } else { 0 };
        bucket[index.min(buckets - 1)] += 1.0; // the largest value closes the last bucket
    }
    let mut bucket_limit: Vec<f64> = (1..=buckets).map(|index| min + width * index as f64).collect();
    bucket_limit[buckets - 1] = max;
    Some(HistogramProto {
        min,
        max,
        num: finite.len() as f64,
        sum: finite.iter().sum(),
        sum_squares: finite.iter().map(|value| value * value).sum(),
        bucket_limit,
        bucket,
    })
}

/// `events.out.tfevents.<seconds>.<host>`, sorting after every file already there: readers go by name.
fn next_path(directory: &Path) -> Result<PathBuf, MonitorError> {
    let newest = event_files(directory)?.iter().filter_map(|path| file_seconds(path)).max();
    let now = seconds_since_epoch() as u64;
    let seconds = newest.map_or(now, |newest| now.max(newest + 1));
    Ok(directory.join(format!("{FILE_PREFIX}{seconds:010}.{}", host_name())))
}

fn file_seconds(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix(FILE_PREFIX)?.split('.').next()?.parse().ok()
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).collect();
    if name.is_empty() { "localhost".into() } else { name }
}

fn seconds_since_epoch() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |duration| duration.as_secs_f64())
}

/// The event files of a folder, oldest first; none when the folder is missing.
fn event_files(directory: &Path) -> Result<Vec<PathBuf>, MonitorError> {
    let io = |source| MonitorError::io("list", directory, source);
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(io)?.path();
        if file_seconds(&path).is_some() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Cuts a file before its first event later than `step`, or before its first damaged record.
fn cut_after(path: &Path, step: u64) -> Result<(), MonitorError> {
    let bytes = std::fs::read(path).map_err(|source| MonitorError::io("read", path, source))?;
    let mut kept = 0;
    while let Some((event, length)) = read_event(&bytes[kept..]) {
        if event.step > step as i64 {
            break;
        }
        kept += length;
    }
    if kept == bytes.len() {
        return Ok(());
    }
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|file| file.set_len(kept as u64))
        .map_err(|source| MonitorError::io("cut", path, source))
}

const RECORD_HEADER_BYTES: usize = 12;
const RECORD_OVERHEAD_BYTES: usize = RECORD_HEADER_BYTES + 4;

fn push_record(bytes: &mut Vec<u8>, payload: &[u8]) {
    let length = (payload.len() as u64).to_le_bytes();
    bytes.extend_from_slice(&length);
    bytes.extend_from_slice(&masked_crc(&length).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes.extend_from_slice(&masked_crc(payload).to_le_bytes());
}

/// The event at the start of `bytes` and the bytes it takes; None when it is torn or damaged.
fn read_event(bytes: &[u8]) -> Option<(Event, usize)> {
    let length: [u8; 8] = bytes.get(..8)?.try_into().ok()?;
    if le_u32(bytes.get(8..RECORD_HEADER_BYTES)?)? != masked_crc(&length) {
        return None;
    }
    let length = usize::try_from(u64::from_le_bytes(length)).ok()?;
    let end = RECORD_HEADER_BYTES.checked_add(length)?;
    let payload = bytes.get(RECORD_HEADER_BYTES..end)?;
    if le_u32(bytes.get(end..end.checked_add(4)?)?)? != masked_crc(payload) {
        return None;
    }
    Some((Event::decode(payload).ok()?, length + RECORD_OVERHEAD_BYTES))
}

fn le_u32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// TFRecord's checksum: CRC-32C, rotated and offset, so that a checksum of data with checksums in it stays sound.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(path: &Path) -> Vec<Event> {
        let bytes = std::fs::read(path).unwrap();
        let (mut events, mut position) = (Vec::new(), 0);
        while position < bytes.len() {
            let (event, length) = read_event(&bytes[position..]).expect("a whole record");
            events.push(event);
            position += length;
        }
        events
    }

    fn summary_steps(directory: &Path) -> Vec<i64> {
        let all = event_files(directory).unwrap().into_iter().flat_map(|path| events(&path));
        all.filter(|event| matches!(event.what, Some(What::Summary(_)))).map(|event| event.step).collect()
    }

    fn is_start(event: &Event) -> bool {
        matches!(&event.what, Some(What::SessionLog(log)) if log.status == SESSION_START)
    }

    #[test]
    fn crc_equals_the_vectors_of_rfc_3720() {
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c::crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c::crc32c(&ascending), 0x46dd_794e);
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn the_first_record_has_the_bytes_tensorflow_writes() {
        // The version record of an event file written by TensorBoard's own EventFileWriter at wall time 1.0.
        let event = Event { wall_time: 1.0, step: 0, what: Some(What::FileVersion("brain.Event:2".into())) };
        let mut bytes = Vec::new();
        push_record(&mut bytes, &event.encode_to_vec());
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, GOLDEN_VERSION_RECORD);
    }

    const GOLDEN_VERSION_RECORD: &str =
        "1800000000000000a37f4b2209000000000000f03f1a0d627261696e2e4576656e743a3286bf577a";

    #[test]
    fn a_step_reads_back_with_its_scalars_histograms_and_texts() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(directory.path()).unwrap();
        let mut metrics = Metrics::new();
        metrics.set("train/reward", 0.25).set_histogram("train/rewards", vec![0.0, 1.0, 1.0, f32::NAN]);
        metrics.set_histogram("train/empty", vec![]).set_text("samples", "**é**");
        writer.write(3, &metrics).unwrap();

        let events = events(&writer.path);
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".into())));
        assert!(is_start(&events[1]));
        let Some(What::Summary(summary)) = &events[2].what else { panic!("no summary") };
        assert_eq!(events[2].step, 3);
        let tags: Vec<&str> = summary.value.iter().map(|value| value.tag.as_str()).collect();
        assert_eq!(tags, ["train/reward", "train/rewards", "samples"]);
        assert_eq!(summary.value[0].value, Some(Value::Scalar(0.25)));
        let Some(Value::Tensor(tensor)) = &summary.value[2].value else { panic!("no tensor") };
        assert_eq!(tensor.string_val, ["**é**".as_bytes()]);
    }

    #[test]
    fn histogram_buckets_hold_every_value_within_their_limits() {
        let values: Vec<f32> = (0..1000_i16).map(|i| (f32::from(i) * 0.37).sin() * 5.0 - 1.0).collect();
        let histogram = histogram_of(&values).unwrap();
        let mut lower = histogram.min;
        for (index, (&limit, &count)) in histogram.bucket_limit.iter().zip(&histogram.bucket).enumerate() {
            let closes = index + 1 == histogram.bucket.len();
            let inside = values.iter().map(|&v| f64::from(v)).filter(|&v| v >= lower && (v < limit || closes)).count();
            assert!((count - inside as f64).abs() <= 1.0, "bucket {index}: {count} against {inside}"); // rounding at a limit
            lower = limit;
        }
        assert_eq!(histogram.bucket.iter().sum::<f64>(), 1000.0);
        assert_eq!(histogram.num, 1000.0);
        assert_eq!(*histogram.bucket_limit.last().unwrap(), histogram.max);
        let one = histogram_of(&[2.5, 2.5]).unwrap();
        assert_eq!((one.bucket, one.bucket_limit), (vec![2.0], vec![2.5]));
        assert_eq!(histogram_of(&[f32::NAN]), None);
    }

    #[test]
    fn resume_cuts_later_events_and_announces_the_next_step() {
        let directory = tempfile::tempdir().unwrap();
        let write = |writer: &mut EventWriter, steps: std::ops::RangeInclusive<u64>| {
            for step in steps {
                writer.write(step, Metrics::new().set("train/reward", step as f64)).unwrap();
            }
        };
        write(&mut EventWriter::create(directory.path()).unwrap(), 1..=5);
        let mut second = EventWriter::resume(directory.path(), 3).unwrap();
        write(&mut second, 4..=8);
        let start = &events(&second.path)[1];
        assert!(is_start(start));
        assert_eq!(start.step, 4);
        assert_eq!(summary_steps(directory.path()), [1, 2, 3, 4, 5, 6, 7, 8]);

        write(&mut EventWriter::resume(directory.path(), 2).unwrap(), 3..=4); // an older checkpoint
        assert_eq!(summary_steps(directory.path()), [1, 2, 3, 4]);
        assert_eq!(event_files(directory.path()).unwrap().len(), 3);
    }

    #[test]
    fn resume_cuts_a_torn_record() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(directory.path()).unwrap();
        writer.write(1, Metrics::new().set("a", 1.0)).unwrap();
        let whole = std::fs::read(&writer.path).unwrap();
        writer.write(2, Metrics::new().set("a", 2.0)).unwrap();
        let all = std::fs::read(&writer.path).unwrap();
        for length in whole.len()..all.len() {
            std::fs::write(&writer.path, &all[..length]).unwrap();
            cut_after(&writer.path, 9).unwrap();
            assert_eq!(std::fs::read(&writer.path).unwrap(), whole, "cut at {length}");
        }
        let mut damaged = all.clone();
        *damaged.last_mut().unwrap() ^= 1;
        std::fs::write(&writer.path, &damaged).unwrap();
        cut_after(&writer.path, 9).unwrap();
        assert_eq!(std::fs::read(&writer.path).unwrap(), whole);
    }
}
