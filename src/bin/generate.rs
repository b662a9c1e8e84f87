//! `generate --model DIR --prompts FILE.jsonl --output FILE.jsonl`: responses of a causal language model.

fn main() -> ! {
    echelon::programs::generate()
}
