//! Suggestions for an unknown key: the nearest key, the table it belongs in, and what other frameworks call it.
//!
//! Foreign names are only ever suggested, never accepted: a recipe reads the same for everybody.

/// What other frameworks call our keys and words.
pub struct Foreign {
    /// (framework, its key, ours, what differs).
    pub keys: &'static [(&'static str, &'static str, &'static str, &'static str)],
    /// (word of another framework, ours): values rather than keys.
    pub words: &'static [(&'static str, &'static str)],
}

impl Foreign {
    /// Hints for the unknown key `name` (with the dotted keys `inside`, when it is a table) in the table `path`.
    ///
    /// `own` are the table's keys, `known` every dotted key of the recipe.
    pub fn hints(&self, path: &[String], name: &str, inside: &[String], own: &[&str], known: &[String]) -> Vec<String> {
        let table = path.join(".");
        let foreign = self.foreign_hints(&table, name, known);
        let here = if table.is_empty() { name.to_owned() } else { format!("{table}.{name}") };
        let translated = inside.iter().flat_map(|key| self.foreign_hints(&here, key, known));
        if let Some(close) = near(name, own.iter().copied(), 2) {
            let same = foreign.into_iter().filter(|hint| hint.contains(&format!("`{close}`")));
            return [format!("did you mean `{close}`?")].into_iter().chain(same).chain(translated).collect();
        }
        let foreign: Vec<String> = foreign.into_iter().chain(translated).collect();
        let is_qualified = self.keys.iter().any(|entry| entry.1 == here);
        let home = known.iter().find(|key| last(key) == name && !parent(key).is_empty() && parent(key) != table);
        if let Some(home) = home.filter(|_| !is_qualified) {
            return vec![format!("`{name}` is a key of {}", place(parent(home)))];
        }
        if !foreign.is_empty() {
            return foreign;
        }
        if let Some(close) = nearest(name, own.iter().copied()) {
            return vec![format!("did you mean `{close}`?")];
        }
        match known.iter().find(|key| near(name, [last(key)], 2).is_some()) {
            Some(key) => vec![format!("did you mean `{}` of {}?", last(key), place(parent(key)))],
            None => {
                vec![format!("known here: {}", own.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", "))]
            }
        }
    }

    /// What a word of another framework is called here, if it is one of `words`.
    pub fn word<'a>(&self, word: &str, words: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
        let ours = self.words.iter().find(|(foreign, _)| *foreign == word)?.1;
        words.into_iter().find(|known| *known == ours)
    }

    /// One hint per key of ours that `name` may mean: entries that name the table as well win over the others.
    fn foreign_hints(&self, table: &str, name: &str, known: &[String]) -> Vec<String> {
        let qualified = if table.is_empty() { name.to_owned() } else { format!("{table}.{name}") };
        let exact: Vec<_> = self.keys.iter().filter(|entry| entry.1 == qualified).collect();
        let loose = || self.keys.iter().filter(|entry| last(entry.1) == last(name)).collect();
        let mut found: Vec<&(&str, &str, &str, &str)> = if exact.is_empty() { loose() } else { exact };
        found.retain(|entry| known.iter().any(|key| key == entry.2));
        let mut targets: Vec<&str> = found.iter().map(|entry| entry.2).collect();
        targets.dedup();
        targets.into_iter().map(|ours| foreign_hint(ours, &found)).collect()
    }
}

/// The candidate nearest to `word`, if one is near enough to be meant.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    near(word, candidates, 2.max(word.len() / 3))
}

/// The first sentence of a doc comment, on one line.
pub fn first_sentence(doc: &str) -> String {
    let line = doc.split_whitespace().collect::<Vec<_>>().join(" ");
    let end = line.find(". ").map_or(line.len(), |stop| stop);
    line[..end].trim_end_matches('.').to_owned()
}

fn near<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>, limit: usize) -> Option<&'a str> {
    let limit = limit.min(word.chars().count() / 2);
    let scored = candidates.into_iter().map(|candidate| (edit_distance(word, candidate), candidate));
    scored.filter(|(distance, _)| *distance <= limit).min().map(|(_, candidate)| candidate)
}

/// Edits (insert, delete, replace, swap of neighbours) between two keys, blind to case and `-` against `_`.
fn edit_distance(left: &str, right: &str) -> usize {
    let fold = |text: &str| text.to_ascii_lowercase().replace('-', "_").chars().collect::<Vec<_>>();
    let (left, right) = (fold(left), fold(right));
    let mut rows = vec![(0..=right.len()).collect::<Vec<usize>>()];
    for i in 1..=left.len() {
        let mut row = vec![i];
        for j in 1..=right.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(left[i - 1] != right[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && left[i - 1] == right[j - 2] && left[i - 2] == right[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[left.len()][right.len()]
}

fn foreign_hint(ours: &str, found: &[&(&str, &str, &str, &str)]) -> String {
    let same: Vec<_> = found.iter().filter(|entry| entry.2 == ours).collect();
    let mut frameworks: Vec<&str> = same.iter().map(|entry| entry.0).collect();
    frameworks.dedup();
    let call = if frameworks.len() == 1 { "calls" } else { "call" };
    let (_, foreign, _, note) = same[0];
    let note = if note.is_empty() { String::new() } else { format!(" ({note})") };
    let (who, place) = (frameworks.join(" and "), place(parent(ours)));
    format!("{who} {call} this `{foreign}`; here it is `{}` in {place}{note}", last(ours))
}

fn last(key: &str) -> &str {
    key.rsplit_once('.').map_or(key, |(_, last)| last)
}

fn parent(key: &str) -> &str {
    key.rsplit_once('.').map_or("", |(parent, _)| parent)
}

fn place(table: &str) -> String {
    if table.is_empty() { "the top of the recipe".to_owned() } else { format!("[{table}]") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The textbook recursion, which shares nothing with the table above.
    fn slow_distance(left: &[char], right: &[char]) -> usize {
        let ([a, left_rest @ ..], [b, right_rest @ ..]) = (left, right) else {
            return left.len() + right.len();
        };
        let mut best = (slow_distance(left_rest, right_rest) + usize::from(a != b))
            .min(slow_distance(left_rest, right) + 1)
            .min(slow_distance(left, right_rest) + 1);
        if let ([_, c, left_tail @ ..], [_, d, right_tail @ ..]) = (left, right)
            && a == d
            && c == b
        {
            best = best.min(slow_distance(left_tail, right_tail) + 1);
        }
        best
    }

    #[test]
    fn edit_distance_equals_the_recursion() {
        let words = ["", "a", "lr", "betas", "kl_coef", "kl_ceof", "gamma", "gmama", "steps", "step"];
        for left in words {
            for right in words {
                let chars = |text: &str| text.chars().collect::<Vec<_>>();
                assert_eq!(edit_distance(left, right), slow_distance(&chars(left), &chars(right)), "{left} {right}");
            }
        }
    }

    #[test]
    fn short_or_distant_words_are_not_suggested() {
        assert_eq!(nearest("lr", ["eps", "k"]), None);
        assert_eq!(nearest("kl-coeff", ["kl_coef", "kl_target"]), Some("kl_coef"));
        assert_eq!(nearest("nonsense", ["kl_coef", "gamma"]), None);
    }
}
