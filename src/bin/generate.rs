//! `generate --model DIR --prompts FILE.jsonl --output FILE.jsonl`: responses of a causal language model.

use echelon::inference::{self, GENERATE};
use echelon::options::Options;
use echelon::program;

fn main() -> ! {
    program::main(|| inference::generate(&Options::read(GENERATE)?))
}
