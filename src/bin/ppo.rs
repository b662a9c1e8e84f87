//! `ppo RECIPE`: reinforcement learning from a reward, as a recipe describes it.

use std::process::ExitCode;

use echelon::program::{self, Arguments};

fn main() -> ExitCode {
    program::main(|| echelon::run::main(&Arguments::read("ppo")?))
}
