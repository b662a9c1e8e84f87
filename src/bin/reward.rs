//! `reward RECIPE`: reward-model training, as a recipe describes it.

use echelon::program::Arguments;
use echelon::worker;

fn main() -> ! {
    worker::or_driver(|| echelon::supervised::reward(&Arguments::read("reward")?))
}
