//! `reward RECIPE`: reward-model training, as a recipe describes it.

fn main() -> ! {
    echelon::programs::learn("reward")
}
