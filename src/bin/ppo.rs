//! `ppo RECIPE`: reinforcement learning from a reward, as a recipe describes it.

use echelon::program::{self, Arguments};
use echelon::worker;

fn main() -> ! {
    let arguments = worker::arguments();
    program::main(|| match worker::is_asked(&arguments) {
        true => worker::main(&arguments), // started by a driver
        false => echelon::run::main(&Arguments::read("ppo")?),
    })
}
