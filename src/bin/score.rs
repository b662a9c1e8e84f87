//! `score --model DIR --input FILE.jsonl --output FILE.jsonl`: log-probs of a causal model, scores of a reward model.

use echelon::inference::{self, SCORE};
use echelon::options::Options;
use echelon::program;

fn main() -> ! {
    program::main(|| inference::score(&Options::read(SCORE)?))
}
