//! What README.md and docs/ point at is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

#[test]
fn every_link_names_an_existing_file() {
    let mut num_links = 0;
    for page in pages() {
        let text = without_comments(&fs::read_to_string(&page).unwrap());
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or(link);
            if !target.is_empty() && !target.contains("://") {
                let file = page.parent().unwrap().join(target);
                assert!(file.exists(), "{} links to {link}, and there is no {}", page.display(), file.display());
                num_links += 1;
            }
        }
    }
    assert!(num_links > 10, "only {num_links} links were found");
}

#[test]
fn every_inclusion_has_its_anchor() {
    let page = root().join("docs/algorithms/ppo.md");
    let text = fs::read_to_string(&page).unwrap();
    let (path, anchor) =
        text.split("{{#include ").nth(1).and_then(|rest| rest.split("}}").next()).unwrap().split_once(':').unwrap();
    let source = fs::read_to_string(page.parent().unwrap().join(path)).unwrap();
    let included = source.split(&format!("// ANCHOR: {anchor}\n")).nth(1).expect("the anchor");
    let included = included.split(&format!("// ANCHOR_END: {anchor}\n")).next().expect("its end");
    assert!(included.contains("async fn learn("), "{included}");
}

/// Each AR-n of docs/architecture.md is cited by a source or a test, and none that is not there.
#[test]
fn every_invariant_is_cited_where_it_holds() {
    let numbers = |text: &str| -> BTreeSet<u32> {
        let after = text.split("AR-").skip(1);
        after.filter_map(|rest| rest.split(|digit: char| !digit.is_ascii_digit()).next()?.parse().ok()).collect()
    };
    let listed = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let listed: String = listed.lines().filter(|line| line.starts_with("* **AR-")).collect();
    let manifest: toml::Table = fs::read_to_string(root().join("Cargo.toml")).unwrap().parse().unwrap();
    let members = manifest["workspace"]["members"].as_array().unwrap().iter().map(|member| member.as_str().unwrap());
    let folders =
        members.chain(["."]).flat_map(|member| ["src", "tests"].map(|folder| root().join(member).join(folder)));
    let sources = folders.flat_map(|folder| rust_sources(&folder)).map(|file| fs::read_to_string(file).unwrap());
    let cited: BTreeSet<u32> = sources.flat_map(|source| numbers(&source)).collect();
    assert_eq!(numbers(&listed), cited);
}

#[test]
fn every_page_is_in_the_summary() {
    let summary = fs::read_to_string(root().join("docs/SUMMARY.md")).unwrap();
    for page in pages() {
        let Ok(name) = page.strip_prefix(root().join("docs")) else { continue };
        let name = name.to_str().unwrap();
        assert!(name == "SUMMARY.md" || summary.contains(&format!("({name})")), "{name} is not in docs/SUMMARY.md");
    }
}

#[test]
fn the_readme_names_every_recipe_and_every_folder() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let recipes = names(&root().join("recipes")).into_iter().filter(|name| name.ends_with(".toml"));
    for name in recipes.filter(|name| !name.contains("n8g")) {
        assert!(readme.contains(&format!("`{name}`")), "README.md has no line for recipes/{name}");
    }
    let manifest: toml::Table = fs::read_to_string(root().join("Cargo.toml")).unwrap().parse().unwrap();
    for member in manifest["workspace"]["members"].as_array().unwrap() {
        let line = format!("\n{}/ ", member.as_str().unwrap());
        assert!(readme.contains(&line), "README.md's tree has no line for {member}");
    }
}

/// The text outside `<!-- … -->`.
fn without_comments(text: &str) -> String {
    let mut parts = text.split("<!--");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.split_once("-->").map_or("", |(_, after)| after))
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn pages() -> Vec<PathBuf> {
    let folders = [root().join("docs"), root().join("docs/algorithms")];
    let in_folder = |folder: &PathBuf| names(folder).into_iter().map(|name| folder.join(name)).collect::<Vec<_>>();
    let pages = folders.iter().flat_map(in_folder).filter(|page| page.extension() == Some("md".as_ref()));
    pages.chain([root().join("README.md")]).collect()
}

fn rust_sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
    let inside = |path: PathBuf| if path.is_dir() { rust_sources(&path) } else { vec![path] };
    entries.flat_map(inside).filter(|path| path.extension() == Some("rs".as_ref())).collect()
}

fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}
