//! The reference page: every key of a table and of the tables inside, from the field docs.

use crate::Key;

/// The section of one program: its recipe's table, described by `doc` and `keys`.
pub fn program(page: &mut String, name: &str, doc: &str, keys: &[Key]) {
    page.push_str(&format!("\n## Recipes of `{name}`\n\n{}\n", prose(doc)));
    page.push_str(&key_table("", keys));
    tables(page, "", keys);
}

/// One section per table, depth first.
fn tables(page: &mut String, prefix: &str, keys: &[Key]) {
    for key in keys {
        let Some(inner) = &key.table else { continue };
        let path = if prefix.is_empty() { key.name.to_owned() } else { format!("{prefix}.{}", key.name) };
        let header = if key.repeated { format!("[[{path}]]") } else { format!("[{path}]") };
        page.push_str(&format!("\n### `{header}`\n\n{}\n", prose(&key.doc)));
        page.push_str(&key_table(&path, inner));
        tables(page, &path, inner);
    }
}

fn key_table(path: &str, keys: &[Key]) -> String {
    let rows: Vec<String> = keys.iter().filter(|key| key.table.is_none()).map(|key| row(path, key)).collect();
    if rows.is_empty() {
        return String::new();
    }
    format!("\n| key | type | default | meaning |\n|---|---|---|---|\n{}\n", rows.join("\n"))
}

fn row(path: &str, key: &Key) -> String {
    let default = match (&key.default, key.required) {
        (_, true) => "required".to_owned(),
        (None, false) => "unset".to_owned(),
        // The name's default is the file's name, which its doc says; an empty string would mislead.
        (Some(_), false) if path.is_empty() && key.name == "name" => "file name".to_owned(),
        (Some(value), false) => format!("`{value}`"),
    };
    let range = if key.range.is_empty() { String::new() } else { format!(", {}", key.range) };
    let cells = [format!("`{}`", key.name), key.kind.clone() + &range, default, prose(&key.doc)];
    format!("| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | "))
}

/// A doc comment as one paragraph; `<` would start HTML outside code.
fn prose(doc: &str) -> String {
    doc.split_whitespace().collect::<Vec<_>>().join(" ")
}
