//! Programs and tests of this package find libtorch through an rpath, and driver and worker know each other by their
//! sources.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

/// What a program is made of.
const SOURCES: [&str; 9] = [
    "src",
    "core/src",
    "core/csrc",
    "models/src",
    "generation/src",
    "algorithms/src",
    "placement/src",
    "tasks/src",
    "Cargo.lock",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    }
    let mut files = Vec::new();
    for source in SOURCES {
        println!("cargo:rerun-if-changed={source}");
        collect(Path::new(source), &mut files);
    }
    files.sort();
    let mut hash = DefaultHasher::new();
    for file in files {
        (file.as_path(), fs::read(&file).unwrap_or_default()).hash(&mut hash);
    }
    println!("cargo:rustc-env=ECHELON_BUILD={}+{:016x}", env!("CARGO_PKG_VERSION"), hash.finish());
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) {
    match fs::read_dir(path) {
        Ok(entries) => entries.flatten().for_each(|entry| collect(&entry.path(), files)),
        Err(_) => files.push(path.into()),
    }
}
