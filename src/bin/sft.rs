//! `sft RECIPE`: supervised fine-tuning, as a recipe describes it.

use echelon::program::Arguments;
use echelon::worker;

fn main() -> ! {
    worker::or_driver(|| echelon::supervised::sft(&Arguments::read("sft")?))
}
