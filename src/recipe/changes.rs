//! What has changed between the recipe that a run began with and the one it is resumed with.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use super::{RecipeError, Root, load};

/// Name of a run's resolved recipe in its folder.
pub(crate) const RESOLVED_FILE: &str = "recipe.resolved.toml";

/// Keys that a resumed run may change; `.*` stands for every key below.
const FREE_KEYS: [&str; 19] = [
    "name",
    "train.steps",
    "train.epochs",
    "train.eval_every_steps",
    "train.tokens_per_micro_batch",
    "train.zero_stage",
    "train.adam_offload",
    "train.activation_checkpointing",
    "train.calibrate",
    "train.deterministic",
    "rollout.record",
    "generation.*",
    "reward.url",
    "reward.timeout_s",
    "reward.retries",
    "checkpoint.*",
    "eval.*",
    "placement.*",
    "*.shape",
];

/// Those of [`FREE_KEYS`] that are of tables of this recipe.
pub(crate) fn free_keys(resolved: &str) -> Vec<&'static str> {
    let tables: Vec<String> =
        flat(resolved).into_keys().map(|key| key.split('.').next().unwrap_or_default().into()).collect();
    let has = |key: &&str| {
        let table = key.split('.').next().unwrap_or_default();
        table == "*" || !key.contains('.') || tables.iter().any(|known| known == table)
    };
    FREE_KEYS.into_iter().filter(has).collect()
}

/// A key with another value than before; `None` where it is not set.
#[derive(Debug, PartialEq)]
pub(crate) struct Change {
    key: String,
    before: Option<toml::Value>,
    now: Option<toml::Value>,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &Option<toml::Value>| value.as_ref().map_or("unset".to_owned(), toml::Value::to_string);
        write!(f, "{}: {} before, {} now", self.key, shown(&self.before), shown(&self.now))
    }
}

/// Keys, in order, in which the resolved recipe `present` differs from the one in the file `stored`, but for
/// [`FREE_KEYS`].
///
/// # Errors
/// The stored recipe cannot be read, or is not one of this program.
pub(crate) fn changes_since<T: Root>(stored: &Path, present: &str) -> Result<Vec<Change>, RecipeError> {
    let stored: T = load(stored, &[], false)?;
    let (mut before, mut now) = (flat(&stored.resolved_text()), flat(present));
    let keys: Vec<String> = before.keys().chain(now.keys().filter(|key| !before.contains_key(*key))).cloned().collect();
    let mut changes: Vec<Change> = keys
        .into_iter()
        .filter(|key| !is_free(key))
        .map(|key| Change { before: before.remove(&key), now: now.remove(&key), key })
        .filter(|change| change.before != change.now)
        .collect();
    changes.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(changes)
}

fn is_free(key: &str) -> bool {
    FREE_KEYS.iter().any(|free| match (free.strip_suffix('*'), free.strip_prefix('*')) {
        (Some(start), _) => key.starts_with(start),
        (_, Some(end)) => key.ends_with(end),
        _ => key == *free,
    })
}

/// Every value by its dotted key; tables in lists are numbered from 0, as `--set` numbers them.
fn flat(text: &str) -> BTreeMap<String, toml::Value> {
    let table: toml::Table = text.parse().expect("a resolved recipe is TOML");
    let mut keys = BTreeMap::new();
    flatten("", toml::Value::Table(table), &mut keys);
    keys
}

fn flatten(key: &str, value: toml::Value, keys: &mut BTreeMap<String, toml::Value>) {
    let below = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match value {
        toml::Value::Table(table) => table.into_iter().for_each(|(name, value)| flatten(&below(&name), value, keys)),
        toml::Value::Array(rows) if rows.iter().any(toml::Value::is_table) => {
            rows.into_iter().enumerate().for_each(|(index, row)| flatten(&below(&index.to_string()), row, keys));
        }
        value => drop(keys.insert(key.to_owned(), value)),
    }
}
