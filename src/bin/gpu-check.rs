//! `gpu-check`: what works on this machine's GPU, and how fast, in at most eight minutes.

use echelon::gpu_check::{self, USAGE};
use echelon::options::Options;
use echelon::program;

fn main() -> ! {
    program::main(|| gpu_check::main(&Options::read(USAGE)?))
}
