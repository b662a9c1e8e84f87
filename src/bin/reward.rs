//! `reward RECIPE`: reward-model training, as a recipe describes it.

use echelon::program::{self, Arguments};

fn main() -> ! {
    program::main(|| echelon::supervised::reward(&Arguments::read("reward")?))
}
