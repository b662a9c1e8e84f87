//! Checkpoints of a run: `checkpoints/step-N/`, written beside, synced and renamed, so that a folder of that name is
//! whole or has been damaged since.
//!
//! * CK-1: a checkpoint is taken at a step's end and holds all that the next step depends on (AR-12).
//! * CK-2: `manifest.json` has every file's length and checksum; a checkpoint that does not match is not used.
//! * CK-3: the newest `keep` and the best by the eval metric stay; nothing is deleted before its successor is whole.
//!
//! [`crate::resume`] decides whether a run may go on from one.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use echelon_core::weight_layout::WeightLayout;
use echelon_core::whole_file::WholeFolder;
use echelon_models::tokenizer::Tokenizer;
use echelon_tasks::data::StreamPosition;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::program::Failure;
use crate::recipe::Checkpoint;
use echelon_monitor::Metrics;

/// What a run needs to go on, beside the roles' training states.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunState {
    /// Whose run it is: `ppo`, `sft` or `reward`.
    pub program: String,
    /// The last finished step.
    pub step: u64,
    pub policy_version: u64,
    /// Where the prompts stand.
    pub data: StreamPosition,
    /// The algorithm's own, such as an adaptive KL coefficient.
    #[serde(alias = "kl")]
    pub algorithm: Value,
    /// libtorch's CPU threads: sums round by how work is split.
    pub num_threads: i32,
    /// How weights lay while a CPU decoded: products round by it. Of a PPO run.
    pub weight_layout: Option<WeightLayout>,
    /// What the run computed on, as [`crate::devices::device_name`] has it.
    pub device: Option<String>,
    /// Whether the same work gave the same bits there.
    pub deterministic: Option<bool>,
    /// What `strftime_now` shows in chat templates.
    pub render_time: Option<String>,
    /// What `checkpoint.best_metric` was at this step, where it was measured.
    pub metric: Option<Measured>,
}

impl RunState {
    /// What a person should know before a run goes on elsewhere than it was: the same bits do not come there.
    pub fn note_on(&self, device: &str, deterministic: bool) -> Option<String> {
        let before = self.device.as_deref()?;
        let worded = |deterministic| if deterministic { "deterministic" } else { "not deterministic" };
        let then = self.deterministic.unwrap_or(true);
        (before != device || then != deterministic).then(|| {
            format!(
                "the checkpoint was written on {before} ({}), and the run goes on on {device} ({}): numbers go on to rounding, \
                 not bit for bit",
                worded(then),
                worded(deterministic)
            )
        })
    }
}

/// A metric and its value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    pub name: String,
    pub value: f64,
}

impl Measured {
    /// The larger, the better: losses and perplexities count downwards.
    fn goodness(&self) -> f64 {
        let falls = ["loss", "perplexity"].iter().any(|end| self.name.ends_with(end));
        if falls { -self.value } else { self.value }
    }
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    files: Vec<FileEntry>,
}

#[derive(Serialize, Deserialize, PartialEq, Debug)]
struct FileEntry {
    name: String,
    bytes: u64,
    crc32c: u32,
}

/// The checkpoints of one run folder.
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
    best_metric: Option<String>,
}

/// Where a run continues.
#[derive(Default)]
pub struct Resumed {
    /// The newest whole checkpoint.
    pub saved: Option<(PathBuf, RunState)>,
    /// Sentences for the person who resumes.
    pub notes: Vec<String>,
}

impl Resumed {
    /// The tokenizer of a model folder, whose chat template shows the time that it showed when the run began.
    ///
    /// # Errors
    /// The folder has none that can be used.
    pub fn tokenizer(&self, folder: &Path) -> Result<Tokenizer, Failure> {
        let mut tokenizer = Tokenizer::load(folder).map_err(Failure::input)?;
        if let Some(time) = self.saved.as_ref().and_then(|(_, state)| state.render_time.as_ref()) {
            tokenizer.set_render_time(time).map_err(Failure::input)?;
        }
        Ok(tokenizer)
    }
}

/// A checkpoint being written; dropping it unfinished leaves nothing.
pub struct Unfinished(WholeFolder);

impl Checkpoints {
    pub fn new(run_folder: &Path, recipe: &Checkpoint) -> Checkpoints {
        let folder = run_folder.join("checkpoints");
        Checkpoints { folder, keep: recipe.keep, best_metric: recipe.best_metric.clone() }
    }

    /// The metric that decides which checkpoint is best, as a step's `metrics` have it.
    pub fn measured(&self, metrics: &Metrics) -> Option<Measured> {
        let name = self.best_metric.as_ref()?;
        metrics.get(name).map(|value| Measured { name: name.clone(), value })
    }

    /// A folder to write the roles' states into. What killed runs left unfinished is removed first.
    pub fn begin(&self, step: u64) -> Result<Unfinished, Failure> {
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let left = entry.path();
            if left.extension().is_some_and(|extension| extension == "partial") {
                std::fs::remove_dir_all(&left).map_err(|error| failed(&left, error))?;
            }
        }
        let temporary = self.folder.join(format!("step-{step}.partial"));
        let whole =
            WholeFolder::begin(&self.path(step), temporary.clone()).map_err(|error| failed(&temporary, error))?;
        std::fs::create_dir_all(&temporary).map_err(|error| failed(&temporary, error))?;
        Ok(Unfinished(whole))
    }

    /// After the checkpoint of `newest`: deletes what is neither among the newest nor the best. Later steps are of a course
    /// that this run has left (damaged ones, say); they neither count nor go.
    pub fn prune(&self, newest: u64) -> Result<(), Failure> {
        let steps: Vec<u64> = self.steps().into_iter().filter(|&step| step <= newest).collect();
        let goodness = |step: u64| {
            let measured = self.state(step).ok()?.metric?;
            (Some(&measured.name) == self.best_metric.as_ref()).then(|| measured.goodness())
        };
        let best = steps
            .iter()
            .filter_map(|&step| Some((goodness(step)?, step)))
            .max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)))
            .map(|(_, step)| step);
        for &step in steps.iter().skip(self.keep).filter(|step| Some(**step) != best) {
            let path = self.path(step);
            std::fs::remove_dir_all(&path).map_err(|error| failed(&path, error))?;
        }
        Ok(())
    }

    /// The newest whole checkpoint, with a note about each newer one that is damaged.
    ///
    /// # Errors
    /// There are checkpoints and none is whole: starting over would overwrite what the run has logged.
    pub fn newest(&self) -> Result<Resumed, Failure> {
        let mut damaged = Vec::new();
        for step in self.steps() {
            let path = self.path(step);
            match verify(&path).and_then(|()| self.state(step).map_err(|error| error.to_string())) {
                Ok(state) => {
                    let taken = |sentence| format!("{sentence}; the newest whole one is taken, of step {step}");
                    let notes = damaged.into_iter().map(taken).collect();
                    return Ok(Resumed { saved: Some((path, state)), notes });
                }
                Err(reason) => damaged.push(format!("step-{step} is damaged: {reason}")),
            }
        }
        let folder = self.folder.display();
        if damaged.is_empty() {
            let note = format!("no checkpoint in {folder}: the run starts at its first step");
            return Ok(Resumed { saved: None, notes: vec![note] });
        }
        Err(Failure::Input(format!(
            "{}\nno whole checkpoint is left in {folder}: put one back, or start a new run with another --output-dir",
            damaged.join("\n")
        )))
    }

    fn state(&self, step: u64) -> Result<RunState, Failure> {
        read_json(&self.path(step).join("state.json"))
    }

    /// The folder of a step's checkpoint.
    pub fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step}"))
    }

    /// Steps with a checkpoint, newest first.
    fn steps(&self) -> Vec<u64> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut steps: Vec<u64> =
            entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        steps
    }
}

impl Unfinished {
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.unfinished().join(name)
    }

    /// Adds the run's own state and the manifest, syncs everything, and gives the folder its name.
    pub fn finish(self, state: &RunState) -> Result<PathBuf, Failure> {
        write_json(&self.file("state.json"), state)?;
        let folder = self.0.unfinished();
        let manifest = Manifest { files: entries(folder).map_err(|error| failed(folder, error))? };
        write_json(&self.file("manifest.json"), &manifest)?;
        let done = folder.with_extension("");
        self.0.finish().map_err(|error| failed(&done, error))?;
        Ok(done)
    }
}

fn verify(path: &Path) -> Result<(), String> {
    let manifest: Manifest = read_json(&path.join("manifest.json")).map_err(|error| error.to_string())?;
    for expected in manifest.files {
        let file = path.join(&expected.name);
        let found = entry(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        if found != expected {
            return Err(format!(
                "{}: expected {} bytes with checksum {:08x}, found {} bytes with {:08x}",
                file.display(),
                expected.bytes,
                expected.crc32c,
                found.bytes,
                found.crc32c
            ));
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> std::io::Result<Vec<FileEntry>> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    files.sort();
    files.iter().map(|file| entry(file)).collect()
}

fn entry(path: &Path) -> std::io::Result<FileEntry> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let (mut bytes, mut checksum) = (0, 0);
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        bytes += read as u64;
        checksum = crc32c::crc32c_append(checksum, &buffer[..read]);
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_string();
    Ok(FileEntry { name, bytes, crc32c: checksum })
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| failed(path, error.into()))? + "\n";
    let write = || {
        std::fs::write(path, text)?;
        File::open(path)?.sync_all()
    };
    write().map_err(|error| failed(path, error))
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| failed(path, error))?;
    serde_json::from_str(&text).map_err(|error| failed(path, error.into()))
}

fn failed(path: &Path, error: std::io::Error) -> Failure {
    Failure::Other(format!("checkpoint {}: {error}", path.display()))
}
