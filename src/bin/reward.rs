//! `reward RECIPE`: reward-model training, as a recipe describes it.

use std::process::ExitCode;

use echelon::program::{self, Arguments};

fn main() -> ExitCode {
    program::main(|| echelon::supervised::reward(&Arguments::read("reward")?))
}
