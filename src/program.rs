//! What all programs share: arguments, exit codes, signals, and the process's settings.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use echelon_core::Error;
use echelon_core::progress::Interrupt;
use echelon_core::whole_file;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

use crate::recipe::RecipeError;
use echelon_monitor::MonitorError;

/// Why a program ends without having done its work.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The recipe or an input is wrong; nothing was started (AR-17). Exit code 2.
    #[error("{0}")]
    Input(String),
    /// A worker failed. Exit code 3.
    #[error("{0}")]
    Worker(String),
    /// Anything else. Exit code 1.
    #[error("{0}")]
    Other(String),
    /// Stopped by a signal, after saving what there was. Exit code 130 or 143.
    #[error("interrupted: {0}")]
    Interrupted(String),
}

impl Failure {
    /// An input that cannot be used, with everything that its error says.
    pub fn input(error: impl std::fmt::Display) -> Failure {
        Failure::Input(error.to_string())
    }

    pub fn other(error: impl std::fmt::Display) -> Failure {
        Failure::Other(error.to_string())
    }

    fn exit_code(&self) -> u8 {
        match self {
            Failure::Input(_) => 2,
            Failure::Worker(_) => 3,
            Failure::Other(_) => 1,
            Failure::Interrupted(_) => SIGNAL.load(Ordering::SeqCst) as u8,
        }
    }
}

impl From<RecipeError> for Failure {
    fn from(error: RecipeError) -> Failure {
        Failure::Input(error.to_string())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error.root() {
            Error::Interrupted => Failure::Interrupted("--resume goes on from the newest checkpoint".into()),
            Error::WorkerGone(_) => Failure::Worker(error.to_string()),
            _ => Failure::Other(error.to_string()),
        }
    }
}

impl From<MonitorError> for Failure {
    fn from(error: MonitorError) -> Failure {
        Failure::Other(error.to_string())
    }
}

/// Driver and worker must be made of the same sources, whichever of the programs they are.
pub const BUILD: &str = env!("ECHELON_BUILD");

/// Where `path` would be looked for from elsewhere: what is sent to another process must not depend on where it runs.
pub fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.into())
}

/// How a run ends that was stopped before its first step was finished.
pub const BEFORE_THE_FIRST_STEP: &str = "no step was finished, so nothing was saved; --resume begins this run again";

/// [`whole_file::write_whole`], with an error that names the file.
///
/// # Errors
/// The operating system's.
pub fn write_whole(path: &Path, text: &str) -> Result<(), Failure> {
    whole_file::write_whole(path, text).map_err(|error| failed(path, error))
}

/// An error that names the file or folder.
pub fn failed(path: &Path, error: impl std::fmt::Display) -> Failure {
    Failure::Other(format!("{}: {error}", path.display()))
}

/// Runs a program's work and turns its end into an exit code; the message goes to stderr.
pub fn main(work: impl FnOnce() -> Result<(), Failure>) -> ! {
    begin_with_settings();
    echelon_core::shim::install_cpu_allocator();
    show_warnings();
    tell_panics_in_a_line();
    // A file-size limit is then a failed write with a message, not a silent end.
    // SAFETY: ignoring a signal runs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let done = if asks_for_version() { say_version() } else { without_panics_of_libtorch(work) };
    let code = match done {
        Ok(()) => 0,
        Err(failure) => {
            match &failure {
                Failure::Interrupted(_) => eprintln!("{failure}"),
                failure => eprintln!("error: {failure}"),
            }
            failure.exit_code()
        }
    };
    let _ = std::io::stdout().flush();
    // A device may still be at work, for a driver that is gone: libtorch's exit handlers would take away what it uses.
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(i32::from(code)) }
}

/// What libtorch says by a panic and is no fault of ours is a failure like any other.
fn without_panics_of_libtorch(work: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    std::panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let failure = text_of(panic.as_ref()).and_then(Error::of_torch).map(Failure::from);
        Err(failure.unwrap_or_else(|| resume_unwind(panic)))
    })
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> Option<&str> {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str))
}

/// libtorch's errors come as panics with C++ backtraces, line ends written out: their first line says what happened. Of what is no
/// fault of ours, such as a device without room, whoever asked for the work is told.
fn tell_panics_in_a_line() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = text_of(panic.payload());
        if text.is_some_and(|text| Error::of_torch(text).is_some()) {
            return;
        }
        match text.and_then(|text| Some(text.split_once("\\n")?.0)) {
            Some(said) => {
                let place = panic.location().map(|at| format!(" at {}:{}", at.file(), at.line())).unwrap_or_default();
                eprintln!("panic{place}: {said}");
            }
            None => usual(panic),
        }
    }));
}

/// Whether all that is wanted is `--version`.
fn asks_for_version() -> bool {
    std::env::args_os().skip(1).eq(["--version"])
}

/// Workers and drivers of one version work together.
fn say_version() -> Result<(), Failure> {
    println!("{}", BUILD);
    Ok(())
}

/// How long libgomp's threads look for work before they sleep. Its default is milliseconds, which take the cores from whoever
/// has work where other programs run beside: two to five times slower there. Much less, and a program alone is slower,
/// whose threads sleep between any two products (docs/log.md).
const LOOKING: Duration = Duration::from_micros(80);

/// [`LOOKING`] in libgomp's unit, a pause of the processor, which takes twice as long on some as on others.
fn spins() -> u32 {
    const PAUSES: u32 = 500;
    let pauses = || {
        let begun = Instant::now();
        (0..PAUSES).for_each(|_| std::hint::spin_loop());
        begun.elapsed()
    };
    let fastest = (0..5).map(|_| pauses()).min().unwrap_or_default().max(Duration::from_nanos(1));
    (LOOKING.as_nanos() * u128::from(PAUSES) / fastest.as_nanos()).clamp(500, 50_000) as u32
}

/// What libraries read when they are loaded, unless somebody has chosen.
fn settings() -> Vec<(&'static str, String)> {
    let chosen = |names: &[&str]| names.iter().any(|name| std::env::var_os(name).is_some());
    // One thread waits for nobody.
    let alone = std::env::var("OMP_NUM_THREADS").is_ok_and(|threads| threads == "1");
    let mut settings = Vec::new();
    if !alone && !chosen(&["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"]) {
        settings.push(("GOMP_SPINCOUNT", spins().to_string()));
    }
    // Segments of a GPU's memory that grow, instead of many that phases of different shapes leave in pieces.
    if !chosen(&["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"]) {
        settings.push(("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True".into()));
    }
    settings
}

/// Begins this program again, once, with [`settings`]: some are read before `main`.
fn begin_with_settings() {
    let settings = settings();
    if let (false, Ok(program)) = (settings.is_empty(), std::env::current_exe()) {
        let mut arguments = std::env::args_os();
        let name = arguments.next().unwrap_or_else(|| program.clone().into());
        let _not_replaced = Command::new(program).arg0(name).args(arguments).envs(settings).exec();
    }
}

/// Warnings of all parts go to stderr; `RUST_LOG=echelon=debug` shows more.
fn show_warnings() {
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::ERROR.into());
    let ours =
        ["echelon", "echelon_core", "echelon_models", "echelon_generation", "echelon_placement", "echelon_tasks"];
    let by_default = ours.map(|part| format!("{part}=warn")).join(",");
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(wanted) => filter.parse_lossy(wanted),
        Err(_) => filter.parse_lossy(by_default),
    };
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _set_before = lines.with_target(false).without_time().try_init();
}

/// `PROGRAM RECIPE [--set table.key=value]… [--output-dir DIR] [--plan[=json]] [--resume]`.
#[derive(Debug, Default)]
pub struct Arguments {
    pub recipe: PathBuf,
    pub sets: Vec<String>,
    pub output_dir: Option<PathBuf>,
    pub resume: bool,
    pub plan: Option<PlanFormat>,
}

/// How `--plan` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlanFormat {
    Text,
    Json,
}

impl Arguments {
    /// Reads the process's arguments.
    ///
    /// # Errors
    /// What is wrong, with the usage.
    pub fn read(program: &str) -> Result<Arguments, Failure> {
        let usage =
            format!("usage: {program} RECIPE [--set table.key=value]... [--output-dir DIR] [--resume] [--plan[=json]]");
        let wrong = |message: String| Failure::Input(format!("{message}\n{usage}"));
        let mut arguments = Arguments::default();
        let mut given = std::env::args().skip(1);
        let mut recipe = None;
        while let Some(argument) = given.next() {
            let (name, attached) = match argument.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name.to_string(), Some(value.to_string())),
                _ => (argument.clone(), None),
            };
            let mut value = |what: &str| {
                attached.clone().or_else(|| given.next()).ok_or_else(|| wrong(format!("{name} needs {what}")))
            };
            match name.as_str() {
                "--set" => arguments.sets.push(value("table.key=value")?),
                "--output-dir" => arguments.output_dir = Some(value("a folder")?.into()),
                "--resume" => arguments.resume = true,
                "--plan" => {
                    arguments.plan = Some(match attached.as_deref() {
                        None => PlanFormat::Text,
                        Some("json") => PlanFormat::Json,
                        Some(other) => return Err(wrong(format!("--plan prints text or json, not `{other}`"))),
                    });
                }
                "-h" | "--help" => {
                    println!("{usage}");
                    std::process::exit(0);
                }
                _ if name.starts_with('-') => return Err(wrong(format!("unknown option `{argument}`"))),
                _ if recipe.is_some() => return Err(wrong(format!("one recipe at a time, found `{argument}` too"))),
                _ => recipe = Some(PathBuf::from(argument)),
            }
        }
        arguments.recipe = recipe.ok_or_else(|| wrong("no recipe given".into()))?;
        Ok(arguments)
    }
}

/// Exit code of the signal that came, 0 before.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// Raises `interrupt` at the first Ctrl-C or SIGTERM; at the second the process exits at once.
pub fn watch_signals(interrupt: Interrupt) {
    tokio::spawn(async move {
        use tokio::signal::unix::{SignalKind, signal};
        let (Ok(mut ctrl_c), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
            return;
        };
        loop {
            let code = tokio::select! {
                _ = ctrl_c.recv() => 130,
                _ = term.recv() => 143,
            };
            if interrupt.is_raised() {
                // SAFETY: ends the process at once; exit handlers must not run beside a device thread at work.
                unsafe { libc::_exit(code) };
            }
            SIGNAL.store(code, Ordering::SeqCst);
            interrupt.raise();
        }
    });
}

/// The folder of a run: given, or `runs/<name>`. One that is resumed is this process's from here on.
///
/// # Errors
/// It has files already and this is no `--resume`; it cannot be made; another run is at work in it.
pub fn run_folder(name: &str, arguments: &Arguments) -> Result<PathBuf, Failure> {
    let folder = arguments.output_dir.clone().unwrap_or_else(|| PathBuf::from("runs").join(name));
    let occupied = std::fs::read_dir(&folder).is_ok_and(|mut entries| entries.next().is_some());
    if occupied && !arguments.resume {
        let folder = folder.display();
        return Err(Failure::Input(format!(
            "the run folder {folder} is not empty: add --resume to continue that run, or choose another with --output-dir"
        )));
    }
    if folder.exists() && !folder.is_dir() {
        let folder = folder.display();
        return Err(Failure::Input(format!("the run folder {folder} is a file: choose another with --output-dir")));
    }
    if folder.is_dir() {
        hold(&folder)?;
    } else {
        try_to_make(&folder)?;
    }
    Ok(folder)
}

/// Makes a run's folder, if it is not there, and keeps other runs out of it.
///
/// # Errors
/// It cannot be made, or another run is at work in it.
pub fn make_run_folder(folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder).map_err(|error| failed(folder, error))?;
    hold(folder)
}

/// Keeps other runs out of a folder as long as this process lives, however it ends.
fn hold(folder: &Path) -> Result<(), Failure> {
    static HELD: OnceLock<File> = OnceLock::new();
    if HELD.get().is_some() {
        return Ok(());
    }
    let opened = File::open(folder).map_err(|error| Failure::Input(format!("{}: {error}", folder.display())))?;
    // SAFETY: a system call on an open descriptor.
    let taken = unsafe { libc::flock(opened.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    if taken != 0 && std::io::Error::last_os_error().kind() == std::io::ErrorKind::WouldBlock {
        let folder = folder.display();
        return Err(Failure::Input(format!(
            "another run is at work in {folder}: wait for its end, or choose another folder with --output-dir"
        )));
    }
    let _ = HELD.set(opened); // a file system without locks has none to give
    Ok(())
}

/// Finds out before anything starts whether a folder can be made; leaves nothing.
fn try_to_make(folder: &Path) -> Result<(), Failure> {
    let missing: Vec<&Path> =
        folder.ancestors().take_while(|part| !part.as_os_str().is_empty() && !part.exists()).collect();
    let made = std::fs::create_dir_all(folder);
    missing.iter().for_each(|part| {
        let _ = std::fs::remove_dir(part); // innermost first
    });
    made.map_err(|error| {
        let folder = folder.display();
        Failure::Input(format!("the run folder {folder} cannot be made: {error}; choose another with --output-dir"))
    })
}
