//! What was measured of this machine once and is kept for later runs, so that the same run gives the same bits again.
//!
//! Kept in `echelon/weight-layouts.json` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`), by processor, by the
//! settings that change what libraries do on it, and by the shapes of a model's matrices. `ECHELON_WEIGHT_LAYOUT` overrides
//! it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use echelon_core::device::aside;
use echelon_core::shape::ModelShape;
use echelon_core::weight_layout::WeightLayout;
use echelon_generation::weight_layout::{Matrices, fastest, works};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::program::{Failure, write_whole};
use echelon_roles::models::Held;

/// Chooses the layout by name, whatever is fastest.
const FORCED: &str = "ECHELON_WEIGHT_LAYOUT";

/// What changes how libtorch and its libraries multiply on one and the same processor.
const SETTINGS: [&str; 5] =
    ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR"];

/// How the weights of a model of `shape` lie while this machine decodes: as the run that is resumed had them, where that works here; else as was
/// measured, now or before. A sentence for the person where a layout of before is not kept.
///
/// # Errors
/// [`Failure::Input`]: a name in the environment that is no layout's.
pub fn weight_layout(
    shape: &ModelShape,
    held: Held,
    before: Option<WeightLayout>,
) -> Result<(WeightLayout, Option<String>), Failure> {
    if held.pass.device != Device::Cpu || held.kind == Kind::Double {
        return Ok((WeightLayout::Plain, None));
    }
    let forced = match std::env::var(FORCED) {
        Ok(name) => Some(name.parse().map_err(|error| Failure::Input(format!("{FORCED}: {error}")))?),
        Err(_) => None,
    };
    let usable = |layout: &WeightLayout| aside(|| works(*layout, held.kind));
    let chosen = match (forced, before.filter(usable)) {
        (Some(forced), _) => Some(forced).filter(usable).unwrap_or_default(),
        (None, Some(before)) => before,
        (None, None) => aside(|| measured(held.kind, &Matrices::of(shape))),
    };
    let note = before.filter(|before| *before != chosen).map(|before| {
        format!(
            "weights lie as {chosen} while decoding, and lay as {before} when the checkpoint was written: the last digits \
             of what comes may be others"
        )
    });
    Ok((chosen, note))
}

/// The driver's choice, where this worker's processor can follow it; else the plain layout, with a warning.
pub fn usable(told: WeightLayout, held: Held) -> WeightLayout {
    if held.pass.device != Device::Cpu || aside(|| works(told, held.kind)) {
        return told;
    }
    tracing::warn!("weights lie plainly here: this processor does not have the driver's layout, {told}");
    WeightLayout::Plain
}

/// As kept, else as measured and kept.
fn measured(kind: Kind, matrices: &Matrices) -> WeightLayout {
    let records = cache_folder().map(|folder| Records::open(&folder));
    match records {
        Some(Ok(records)) => records.get_or_measure(kind, matrices),
        _ => fastest(kind, matrices).0,
    }
}

/// The file of records, locked: of several programs that begin at once, one measures.
struct Records {
    path: PathBuf,
    _lock: File,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    layout: WeightLayout,
    /// Of the products that were measured; absent where there was nothing to choose from.
    seconds: BTreeMap<String, f64>,
}

impl Records {
    fn open(folder: &Path) -> std::io::Result<Records> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join("weight-layouts.json");
        let lock = File::create(path.with_extension("lock"))?;
        // SAFETY: a system call on an open descriptor; a file system without locks has none to give.
        unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) };
        Ok(Records { path, _lock: lock })
    }

    fn get_or_measure(&self, kind: Kind, matrices: &Matrices) -> WeightLayout {
        let mut records = self.read();
        let key = key(kind, matrices);
        if let Some(record) = records.get(&key).filter(|record| works(record.layout, kind)) {
            return record.layout;
        }
        let (layout, seconds) = fastest(kind, matrices);
        let seconds = seconds.into_iter().filter(|(_, seconds)| seconds.is_finite());
        let seconds = seconds.map(|(layout, seconds)| (layout.to_string(), seconds)).collect();
        records.insert(key, Record { layout, seconds });
        let text = serde_json::to_string_pretty(&records).expect("names and numbers");
        if let Err(error) = write_whole(&self.path, &(text + "\n")) {
            tracing::debug!(%error, "the measured weight layout is not kept");
        }
        layout
    }

    /// Nothing where there is no file, or none that can be read: what it had is measured again.
    fn read(&self) -> BTreeMap<String, Record> {
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }
}

fn cache_folder() -> Option<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = from("XDG_CACHE_HOME").or_else(|| Some(from("HOME")?.join(".cache")))?;
    cache.is_absolute().then(|| cache.join("echelon"))
}

/// Processor, settings, dtype and shapes, readable.
fn key(kind: Kind, matrices: &Matrices) -> String {
    let settings = SETTINGS.iter().filter_map(|name| Some(format!("{name}={}", std::env::var(name).ok()?)));
    let parts =
        [processor(), format!("echelon {}", env!("CARGO_PKG_VERSION")), format!("{kind:?}"), matrices.describe()];
    parts.into_iter().chain(settings).collect::<Vec<_>>().join(", ")
}

/// The processor's name, and a number of what it can do: virtual machines give many processors one name.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |name: &str| {
        let line = text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|line| Some(line.split_once(':')?.1.trim().to_string())).unwrap_or_default()
    };
    let abilities = [value("cpu family"), value("model"), value("stepping"), value("flags")].join(" ");
    format!("{} {:08x}", value("model name"), crc32c::crc32c(abilities.as_bytes()))
}

#[cfg(test)]
mod tests {
    use echelon_models::config::DecoderConfig;

    use super::*;

    #[test]
    fn a_measurement_is_kept_and_one_that_cannot_be_read_is_made_again() {
        let matrices =
            Matrices::of(&DecoderConfig::read(Path::new("recipes/quickstart/language-model")).unwrap().shape());
        let get = |records: &Records| records.get_or_measure(Kind::Float, &matrices);
        let key = key(Kind::Float, &matrices);
        let folder = tempfile::tempdir().unwrap();
        let chosen = get(&Records::open(folder.path()).unwrap());
        let records = Records::open(folder.path()).unwrap();
        assert_eq!(records.read()[&key].layout, chosen);

        // What is kept decides, not what is fastest.
        let other = WeightLayout::ALL.into_iter().find(|&other| other != chosen && works(other, Kind::Float)).unwrap();
        let kept = BTreeMap::from([(key.clone(), Record { layout: other, seconds: BTreeMap::new() })]);
        std::fs::write(&records.path, serde_json::to_string(&kept).unwrap()).unwrap();
        assert_eq!(get(&records), other);

        std::fs::write(&records.path, "{ not json").unwrap();
        get(&records);
        assert!(records.read().contains_key(&key));
    }
}
