//! `sft RECIPE`: supervised fine-tuning, as a recipe describes it.

use echelon::program::{self, Arguments};

fn main() -> ! {
    program::main(|| echelon::supervised::sft(&Arguments::read("sft")?))
}
