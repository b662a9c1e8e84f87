//! `score --model DIR --input FILE.jsonl --output FILE.jsonl`: log-probs of a causal model, scores of a reward model.

fn main() -> ! {
    echelon::programs::score()
}
