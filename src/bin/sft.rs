//! `sft RECIPE`: supervised fine-tuning, as a recipe describes it.

use std::process::ExitCode;

use echelon::program::{self, Arguments};

fn main() -> ExitCode {
    program::main(|| echelon::supervised::sft(&Arguments::read("sft")?))
}
