//! The directions in which this project's packages may depend on each other, read from their manifests, and what
//! their sources must leave to others: docs/architecture.md, AR-1 to AR-4.

use std::fs;
use std::path::{Path, PathBuf};

/// Every package of the workspace, and the packages of the workspace it may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("schema", &[]),
    ("core", &["schema"]),
    ("models", &["core", "schema"]),
    ("tasks", &["core", "schema"]),
    ("algorithms", &["core", "schema"]),
    ("placement", &["core", "schema"]),
    ("generation", &["core", "models", "schema"]),
];

/// Outside packages that one package alone may use, because it hides them from the others.
const BELONGS_TO: &[(&str, &str)] = &[
    ("toml", "."),
    ("toml_writer", "schema"),
    ("anyhow", "."),
    ("ractor", "placement"),
    ("tonic", "placement"),
    ("rcgen", "placement"),
    ("tokenizers", "models"),
];

/// Packages that must work for any architecture.
const WITHOUT_ARCHITECTURE: &[&str] = &["schema", "core", "tasks", "algorithms", "placement", "generation"];

#[test]
fn the_table_above_names_every_package() {
    let workspace = manifest(".");
    let members = workspace["workspace"]["members"].as_array().expect("a list");
    let mut members: Vec<&str> = members.iter().map(|member| member.as_str().expect("a name")).collect();
    let mut known: Vec<&str> = MAY_USE.iter().map(|(package, _)| *package).collect();
    members.sort_unstable();
    known.sort_unstable();
    assert_eq!(members, known);
}

#[test]
fn packages_depend_in_one_direction() {
    for (package, may_use) in MAY_USE {
        for dependency in dependencies(&manifest(package)) {
            let Some(used) = dependency.strip_prefix("echelon") else { continue };
            let used = used.trim_start_matches('-');
            assert!(may_use.contains(&used), "{package}/Cargo.toml uses {dependency}; it may use {may_use:?} (AR-1)");
        }
    }
}

#[test]
fn outside_packages_stay_where_they_belong() {
    let packages = MAY_USE.iter().map(|(package, _)| *package).chain(["."]);
    for package in packages {
        for dependency in dependencies(&manifest(package)) {
            let owner =
                BELONGS_TO.iter().find(|(outside, _)| *outside == dependency).map_or(package, |(_, owner)| owner);
            assert_eq!(owner, package, "{package}/Cargo.toml uses {dependency}, which is {owner}'s (AR-3, AR-4)");
        }
    }
}

#[test]
fn only_programs_print_and_exit() {
    let forbidden = ["println!", "eprintln!", "print!", "eprint!", "process::exit(", "process::abort("];
    for (package, _) in MAY_USE {
        refuse(&root().join(package).join("src"), &forbidden, "only src/ prints and exits (AR-2)");
    }
}

#[test]
fn only_the_recipe_reads_toml() {
    for file in rust_files(&root().join("src")) {
        if !file.starts_with(root().join("src/recipe")) {
            refuse(&file, &["toml::"], "only src/recipe reads TOML (AR-3)");
        }
    }
}

#[test]
fn architectures_are_known_to_models_alone() {
    for package in WITHOUT_ARCHITECTURE {
        let names = ["llama", "mistral", "qwen"];
        refuse(&root().join(package).join("src"), &names, "architectures belong to models/ (AR-1)");
    }
}

#[test]
fn a_word_is_found_in_code_and_not_in_comments_or_longer_words() {
    assert!(contains_word("    println!(\"x\");", "println!"));
    assert!(contains_word("use models::Llama;", "llama"));
    assert!(!contains_word("    eprintln!(\"x\");", "println!"));
    assert!(!contains_word("    // println!(\"x\")", "println!"));
    assert!(!contains_word("serde_toml::from_str", "toml::"));
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn manifest(package: &str) -> toml::Table {
    let path = root().join(package).join("Cargo.toml");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Names in all dependency tables of a manifest, those of single targets included.
fn dependencies(manifest: &toml::Table) -> Vec<String> {
    let targets =
        manifest.get("target").and_then(toml::Value::as_table).into_iter().flat_map(|targets| targets.values());
    let places = targets.filter_map(toml::Value::as_table).chain([manifest]);
    let kinds = ["dependencies", "dev-dependencies", "build-dependencies"];
    let tables = places.flat_map(|place| kinds.map(|kind| place.get(kind))).flatten().filter_map(toml::Value::as_table);
    tables.flat_map(|table| table.keys().cloned()).collect()
}

/// Panics at the first line of code under `path`, a folder or a file, that has one of `words`; unit tests are free.
fn refuse(path: &Path, words: &[&str], reason: &str) {
    for file in rust_files(path) {
        let text = fs::read_to_string(&file).unwrap();
        for (number, line) in text.lines().enumerate().take_while(|(_, line)| line.trim() != "#[cfg(test)]") {
            let word = words.iter().find(|word| contains_word(line, word));
            assert!(word.is_none(), "{}:{}: `{}`: {reason}", file.display(), number + 1, line.trim());
        }
    }
}

fn rust_files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries = fs::read_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .flat_map(
            |path| if path.is_dir() || path.extension() == Some("rs".as_ref()) { rust_files(&path) } else { vec![] },
        )
        .collect()
}

/// Whether the code of a line has `word` with no letter before it; upper and lower case are the same.
fn contains_word(line: &str, word: &str) -> bool {
    let code = line.split("//").next().unwrap_or(line).to_lowercase();
    code.match_indices(word)
        .any(|(at, _)| !code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_'))
}
