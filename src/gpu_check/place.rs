//! Where a step works: its folders, its device, the programs and recipes beside this one, and runs of `ppo`.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use echelon_core::device::{self, DeviceChoice};
use echelon_core::shim;
use serde_json::{Map, Value};
use tch::Device;

use super::child::{cause, dies_with_us};
use super::verdict::Findings;
use crate::program::{Failure, failed};

/// What a step is told.
#[derive(Clone, Debug)]
pub struct Place {
    /// The folder of the whole check.
    pub out: PathBuf,
    /// Small models and few repeats.
    pub tiny: bool,
    /// A Python that has PyTorch and transformers.
    pub peer: Option<String>,
}

/// What a stand-in for CUDA calls itself.
const STAND_IN: &str = "stand-in";

impl Place {
    /// The CUDA device, opened in this process.
    ///
    /// # Errors
    /// There is none that works.
    pub fn device(&self) -> Result<Device, Failure> {
        match device::choose(DeviceChoice::Cuda) {
            Ok(chosen) => Ok(chosen.device),
            Err(error) => Err(Failure::Input(format!("no CUDA device works here: {}", error.why()))),
        }
    }

    /// The device, and findings to fill.
    pub fn open(&self) -> Result<(Device, Findings), Failure> {
        let device = self.device()?;
        Ok((device, Findings::new(is_stand_in())))
    }

    /// A folder for what need not stay.
    pub fn scratch(&self, name: &str) -> Result<PathBuf, Failure> {
        let folder = self.out.join(SCRATCH).join(name);
        std::fs::create_dir_all(&folder).map_err(|error| failed(&folder, error))?;
        Ok(folder)
    }

    /// The small one with `--tiny`.
    pub fn size<T>(&self, usual: T, tiny: T) -> T {
        if self.tiny { tiny } else { usual }
    }

    /// Runs `ppo RECIPE` into `folder` with these settings.
    ///
    /// # Errors
    /// It does not end well: its own message.
    pub fn ppo(&self, recipe: &Path, sets: &[String], folder: &Path) -> Result<(), Failure> {
        let log = folder.with_extension("log");
        let file = std::fs::File::create(&log).map_err(|error| failed(&log, error))?;
        let copy = file.try_clone().map_err(|error| failed(&log, error))?;
        let mut command = Command::new(beside("ppo")?);
        command.arg(recipe).arg("--output-dir").arg(folder);
        command.args(sets.iter().flat_map(|set| ["--set", set]));
        command.stdin(Stdio::null()).stdout(file).stderr(copy);
        dies_with_us(&mut command);
        let status = command.status().map_err(|error| Failure::Other(format!("starting ppo: {error}")))?;
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        print!("{said}");
        if status.success() {
            return Ok(());
        }
        Err(Failure::Other(format!("ppo ended with {status}: {}", cause(&said).unwrap_or_default())))
    }
}

/// The folder in that of the check that is removed at its end.
pub const SCRATCH: &str = "scratch";

/// Whether CUDA is a stand-in for it. Open the device first.
pub fn is_stand_in() -> bool {
    shim::torch_build().contains(STAND_IN)
}

/// This program once more. In a package its file has another name, and the one that it is called by decides what it is.
pub fn this_program() -> std::io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg0("gpu-check");
    Ok(command)
}

/// A program of this package: it lies beside this one.
fn beside(name: &str) -> Result<PathBuf, Failure> {
    let here = std::env::current_exe().map_err(|error| Failure::Other(format!("this program's own path: {error}")))?;
    let path = here.with_file_name(name);
    if path.exists() { Ok(path) } else { Err(Failure::Input(format!("there is no {}", path.display()))) }
}

/// A file or folder of `recipes`: that of the working directory, or that of the package or build which this program is in.
///
/// # Errors
/// There is none.
pub fn recipes(name: &str) -> Result<PathBuf, Failure> {
    let here = std::env::current_exe().unwrap_or_default();
    let folders = std::iter::once(Path::new("")).chain(here.ancestors().skip(1).take(4));
    let candidates = folders.map(|folder| folder.join("recipes").join(name));
    candidates.clone().find(|path| path.exists()).ok_or_else(|| {
        let tried: Vec<String> = candidates.map(|path| path.display().to_string()).collect();
        Failure::Input(format!(
            "recipes/{name} is not here (tried {}): run this in the package's folder",
            tried.join(", ")
        ))
    })
}

/// The metrics of a run's steps.
///
/// # Errors
/// There are none.
pub fn metrics(run: &Path) -> Result<Vec<Map<String, Value>>, Failure> {
    let path = run.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).map_err(|error| failed(&path, error))?;
    let steps: Result<Vec<_>, _> = text.lines().map(serde_json::from_str).collect();
    let steps = steps.map_err(|error| failed(&path, error))?;
    if steps.is_empty() { Err(failed(&path, "no step")) } else { Ok(steps) }
}
