//! `sft RECIPE`: supervised fine-tuning, as a recipe describes it.

fn main() -> ! {
    echelon::programs::learn("sft")
}
