//! `ppo RECIPE`: reinforcement learning from a reward, as a recipe describes it.

use echelon::program::Arguments;
use echelon::worker;

fn main() -> ! {
    worker::or_driver(|| echelon::run::main(&Arguments::read("ppo")?))
}
