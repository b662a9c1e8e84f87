//! Where a recipe's text comes from: the file and each `--set`, as one tree whose every node knows its place.
//!
//! `toml` parses; this module keeps what error messages need and a plain `toml::Value` forgets: the byte span
//! of each key and value, and whether the file or an argument wrote it.

use std::ops::Range;

use echelon_schema::{Documents, Entry, Item, Node, Origin, Problem};
use toml::de::{DeTable, DeValue};

/// Parses the file and lays every `--set` over it, in order: a later one wins.
///
/// # Errors
/// Syntax errors of the file: the rest of its tree would be a guess. Those of `--set` come beside the tree.
pub fn parse(documents: &Documents) -> Result<(Node, Vec<Problem>), Vec<Problem>> {
    let (mut root, mut problems) = parse_file(&documents.0[0].text);
    if !problems.is_empty() {
        return Err(problems);
    }
    for index in 1..documents.0.len() {
        if let Err(problem) = apply_set(&documents.0[index].text, index, &mut root) {
            problems.push(problem);
        }
    }
    Ok((root, problems))
}

fn apply_set(text: &str, document: usize, root: &mut Node) -> Result<(), Problem> {
    let whole = Origin { document, span: SET_PREFIX.len()..text.len() };
    let Some(equals) = text.find('=') else {
        return Err(Problem::new(whole, "expected `table.key=value`").help("for example `--set train.steps=10`"));
    };
    let mut start = SET_PREFIX.len();
    let mut path = Vec::new();
    for part in text[start..equals].split('.') {
        path.push((part.trim().to_owned(), Origin { document, span: start..start + part.len() }));
        start += part.len() + 1;
    }
    if path.iter().any(|(key, _)| key.is_empty()) {
        return Err(Problem::new(whole, "empty key before `=`").help("for example `--set train.steps=10`"));
    }
    let value = parse_value(document, &text[equals + 1..], equals + 1);
    insert(root, &path, value)
}

/// Written before a `--set` argument where it is shown, and stored in front of its text.
pub const SET_PREFIX: &str = "--set ";

fn parse_file(text: &str) -> (Node, Vec<Problem>) {
    let (table, errors) = DeTable::parse_recoverable(text);
    let problems = errors
        .into_iter()
        .map(|error| {
            let span = error.span().unwrap_or(0..0);
            Problem::new(Origin { document: 0, span }, error.message().lines().collect::<Vec<_>>().join(", "))
        })
        .collect();
    let span = table.span();
    (Node { item: table_item(table.into_inner(), 0, 0), origin: Origin { document: 0, span } }, problems)
}

/// TOML where it parses as TOML, else the text itself as a string.
fn parse_value(document: usize, text: &str, offset: usize) -> Node {
    let trimmed = text.trim();
    let offset = offset + (text.len() - text.trim_start().len());
    let origin = Origin { document, span: offset..offset + trimmed.len() };
    match DeValue::parse(trimmed) {
        Ok(value) => Node { item: item(value.into_inner(), document, offset), origin },
        Err(_) => Node { item: Item::String(trimmed.to_owned()), origin },
    }
}

fn insert(node: &mut Node, path: &[(String, Origin)], value: Node) -> Result<(), Problem> {
    let Some(((key, origin), rest)) = path.split_first() else {
        *node = value;
        return Ok(());
    };
    match &mut node.item {
        Item::Table(entries) => {
            let index = entries.iter().position(|entry| entry.key == *key).unwrap_or_else(|| {
                let node = Node { item: Item::Table(Vec::new()), origin: origin.clone() };
                entries.push(Entry { key: key.clone(), key_origin: origin.clone(), node });
                entries.len() - 1
            });
            let entry = &mut entries[index];
            if rest.is_empty() {
                entry.key_origin = origin.clone();
            }
            insert(&mut entry.node, rest, value)
        }
        Item::Array(elements) => {
            let count = elements.len();
            match key.parse::<usize>().ok().and_then(|index| elements.get_mut(index)) {
                Some(element) => insert(element, rest, value),
                None => Err(Problem::new(origin.clone(), format!("no element `{key}` in a list of {count}"))
                    .help("elements are numbered from 0, as in `--set reward.mix.0.weight=0.5`")),
            }
        }
        other => {
            Err(Problem::new(origin.clone(), format!("`{key}` is set inside {}, not inside a table", other.found())))
        }
    }
}

fn table_item(table: DeTable<'_>, document: usize, offset: usize) -> Item {
    let mut entries: Vec<Entry> = table
        .into_iter()
        .map(|(key, value)| {
            let key_origin = Origin { document, span: shift(key.span(), offset) };
            let origin = Origin { document, span: shift(value.span(), offset) };
            let node = Node { item: item(value.into_inner(), document, offset), origin };
            Entry { key: key.into_inner().into_owned(), key_origin, node }
        })
        .collect();
    entries.sort_by_key(|entry| entry.key_origin.span.start);
    Item::Table(entries)
}

fn item(value: DeValue<'_>, document: usize, offset: usize) -> Item {
    match value {
        DeValue::String(text) => Item::String(text.into_owned()),
        // An integer beyond i64 can only be out of range: as a float its size survives for the message.
        DeValue::Integer(digits) => match i64::from_str_radix(digits.as_str(), digits.radix()) {
            Ok(integer) => Item::Integer(integer),
            Err(_) => Item::Float(digits.as_str().parse().unwrap_or(f64::INFINITY)),
        },
        DeValue::Float(digits) => Item::Float(digits.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(value) => Item::Boolean(value),
        DeValue::Datetime(value) => Item::Datetime(value.to_string()),
        DeValue::Array(elements) => Item::Array(
            elements
                .into_iter()
                .map(|element| {
                    let origin = Origin { document, span: shift(element.span(), offset) };
                    Node { item: item(element.into_inner(), document, offset), origin }
                })
                .collect(),
        ),
        DeValue::Table(table) => table_item(table, document, offset),
    }
}

fn shift(span: Range<usize>, offset: usize) -> Range<usize> {
    span.start + offset..span.end + offset
}
