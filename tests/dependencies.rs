//! The directions in which this project's packages may depend on each other, read from their manifests, and what
//! their sources must leave to others: docs/architecture.md, AR-1 to AR-4.

use std::collections::{BTreeMap, BTreeSet};
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
    ("roles", &["algorithms", "core", "generation", "models", "placement", "schema"]),
    ("generation", &["core", "models", "schema"]),
    ("monitor", &["algorithms", "core"]), // its tests alone know algorithms
];

/// Outside packages that one package alone may use, because it hides them from the others.
const BELONGS_TO: &[(&str, &str)] = &[
    ("toml", "."),
    ("toml_writer", "schema"),
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

/// A module with the files in its folder is one floor; floors import those below them.
#[test]
fn modules_import_in_one_direction() {
    for package in MAY_USE.iter().map(|(package, _)| *package).chain(["."]) {
        let imports = imports(&root().join(package).join("src"));
        let found = circles(&imports);
        if let Some(circle) = found.first() {
            let path = circle_in(circle, &imports).join(" -> ");
            panic!("{package}: {path}: a circle of {circle:?} (AR-1)");
        }
    }
}

#[test]
fn a_circle_is_found_and_named() {
    let graph = |edges: &[(&str, &[&str])]| -> Imports {
        let set = |to: &[&str]| to.iter().map(|name| name.to_string()).collect();
        edges.iter().map(|(from, to)| (from.to_string(), set(to))).collect()
    };
    let imports = graph(&[("a", &["b"]), ("b", &["c"]), ("c", &["a", "d"]), ("d", &[]), ("e", &["a", "d"])]);
    assert_eq!(circles(&imports), [["a", "b", "c"]]);
    assert_eq!(circle_in(&circles(&imports)[0], &imports), ["a", "b", "c", "a"]);
    assert!(circles(&graph(&[("a", &["b", "c"]), ("b", &["c"]), ("c", &[])])).is_empty());
}

#[test]
fn imports_are_read_from_code() {
    let names = |code: &'static str| names_after_crate(code).collect::<Vec<_>>();
    assert_eq!(names("use crate::a::{b, c};\nlet x = crate::d::e();"), ["a", "d"]);
    assert_eq!(names("use crate::{a::{b, c}, d};"), ["a", "d"]);
    assert_eq!(names("use my_crate::a; use echelon_core::b; pub(crate) fn c() {}"), Vec::<&str>::new());
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

/// The modules that each module of a package imports, without itself.
type Imports = BTreeMap<String, BTreeSet<String>>;

/// Of the package in `folder`; unit tests, comments, the root file and programs do not count.
fn imports(folder: &Path) -> Imports {
    let mut imports = Imports::new();
    let mut codes = Vec::new();
    for file in rust_files(folder) {
        let inside = file.strip_prefix(folder).expect("inside").with_extension("");
        let parts: Vec<&str> = inside.iter().filter_map(|part| part.to_str()).collect();
        if ["lib", "main", "bin"].contains(&parts[0]) || parts[1..].contains(&"tests") {
            continue;
        }
        imports.entry(parts[0].into()).or_default();
        let text = fs::read_to_string(&file).unwrap();
        let lines = text.lines().take_while(|line| line.trim() != "#[cfg(test)]");
        let code: Vec<&str> = lines.map(|line| line.split("//").next().unwrap_or(line)).collect();
        // In a module's own file `super` is the root of the package.
        let code = code.join("\n");
        let at_top = parts.len() == 1 || parts[1..] == ["mod"];
        codes.push((parts[0].to_string(), if at_top { code.replace("super::", "crate::") } else { code }));
    }
    let modules: BTreeSet<String> = imports.keys().cloned().collect();
    for (module, code) in codes {
        let others = names_after_crate(&code).filter(|name| *name != module && modules.contains(*name));
        imports.get_mut(&module).expect("entered above").extend(others.map(str::to_string));
    }
    imports
}

/// The first names of all paths that begin with `crate::`, also where several stand in braces.
fn names_after_crate(code: &str) -> impl Iterator<Item = &str> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let at = code.match_indices("crate::").filter(move |(at, _)| !code[..*at].ends_with(is_word));
    at.flat_map(move |(at, word)| {
        let rest = &code[at + word.len()..];
        let Some(group) = rest.strip_prefix('{') else { return vec![first_word(rest)] };
        let (mut depth, mut begin, mut names) = (0, 0, Vec::new());
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                ',' | '}' if depth == 0 => {
                    names.push(first_word(&group[begin..at]));
                    begin = at + 1;
                    if c == '}' {
                        break;
                    }
                }
                '}' => depth -= 1,
                _ => {}
            }
        }
        names
    })
}

fn first_word(text: &str) -> &str {
    let text = text.trim_start();
    &text[..text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len())]
}

/// Everything that can be reached from a module; itself only where it is in a circle.
fn reached<'a>(from: &'a str, imports: &'a Imports) -> BTreeSet<&'a str> {
    let (mut reached, mut open) = (BTreeSet::new(), vec![from]);
    while let Some(module) = open.pop() {
        let next = imports.get(module).into_iter().flatten().map(String::as_str);
        open.extend(next.filter(|next| reached.insert(*next)));
    }
    reached
}

/// Modules that can reach each other, each set in the order of names.
fn circles(imports: &Imports) -> Vec<Vec<&str>> {
    let reach: BTreeMap<&str, BTreeSet<&str>> =
        imports.keys().map(|module| (module.as_str(), reached(module, imports))).collect();
    let of = |module: &&str| -> Vec<&str> {
        reach.keys().copied().filter(|other| reach[module].contains(other) && reach[other].contains(module)).collect()
    };
    let circles: BTreeSet<Vec<&str>> = reach.keys().map(of).filter(|circle| !circle.is_empty()).collect();
    circles.into_iter().collect()
}

/// A shortest way from the first module of a set of [`circles`] back to it.
fn circle_in<'a>(circle: &[&'a str], imports: &'a Imports) -> Vec<&'a str> {
    let mut ways = vec![vec![circle[0]]];
    for _ in circle {
        let mut longer = Vec::new();
        let mut seen = BTreeSet::new();
        for way in &ways {
            for next in imports[way[way.len() - 1]].iter().map(String::as_str) {
                let way = [way.as_slice(), &[next]].concat();
                if next == circle[0] {
                    return way;
                }
                if circle.contains(&next) && seen.insert(next) {
                    longer.push(way);
                }
            }
        }
        ways = longer;
    }
    unreachable!("every module of a circle comes back to itself")
}
