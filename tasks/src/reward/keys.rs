//! The recipe's keys of a source of scores.

use std::path::{Path, PathBuf};

use echelon_schema::{Choice, ModelSource, Rules, above, at_least, between, choice, table};

use super::RuleConfig;

table! {
    /// One way to score a response: exactly one of `model`, `rule`, `url` and `command`.
    pub struct SourceKeys {
        /// A sequence-classification checkpoint: Hugging Face folder or hub id. One with another tokenizer than the actor's gets the decoded text.
        pub model: Option<ModelSource> = None;
        /// Folder with the model's `config.json`, for `--plan`.
        pub shape: Option<PathBuf> = None;
        /// A built-in rule.
        pub rule: Option<RuleName> = None;
        /// For `rule = "math"`: largest difference that passes, as a part of the label's size; 0 compares exact fractions.
        pub tolerance: Option<f64> = None, in between(0.0, 1.0);
        /// For `rule = "regex"`: the regular expression, in the syntax of Rust's regex crate.
        pub pattern: Option<String> = None;
        /// For `rule = "format"`: the form of a whole response, where `…` or `...` stands for any text. Default: `<think>…</think><answer>…</answer>`.
        pub structure: Option<String> = None;
        /// For `rule = "length"`: the length in tokens that scores best.
        pub target_tokens: Option<usize> = None, in at_least(1.0);
        /// For `rule = "length"`: shorter responses score less.
        pub min_tokens: Option<usize> = None, in at_least(0.0);
        /// For `rule = "length"`: longer responses score less.
        pub max_tokens: Option<usize> = None, in at_least(1.0);
        /// For `rule = "sentiment"`: file with one `word<TAB>valence` per line, as VADER's lexicon.
        pub lexicon: Option<PathBuf> = None;
        /// A reward server: it gets POST `{"query", "prompts", "labels"}` and answers `{"rewards"}`, as OpenRLHF's do.
        pub url: Option<String> = None;
        /// A program, run by `sh -c`: it gets one JSON object per response on stdin and answers one per line.
        pub command: Option<String> = None;
        /// Working directory of `command`. Default: the recipe's folder.
        pub command_dir: Option<PathBuf> = None;
        /// For `command`: CPUs that it keeps busy while it scores; other tasks do not get them.
        pub num_cpus: f64 = 1.0, in between(0.0, 1024.0);
        /// For `url` and `command`: seconds that one request may take.
        pub timeout_s: f64 = 180.0, in above(0.0);
        /// For `url`: how often a failed request is tried again, after the first attempt.
        pub retries: usize = 5, in between(0.0, 100.0);
    }
}

choice! {
    /// A built-in scoring rule.
    pub enum RuleName {
        /// 1 when the response's number equals the label's: after `####`, in `\boxed{}`, else the last one.
        Math = "math",
        /// 1 when `pattern` is found in the response.
        Regex = "regex",
        /// 1 at `target_tokens`, or between `min_tokens` and `max_tokens`; falls to 0 at no token and at twice the most.
        Length = "length",
        /// 1 when the whole response has the form of `structure`.
        Format = "format",
        /// -1 to 1: how positive the words are, by `lexicon`.
        Sentiment = "sentiment",
    }
}

impl SourceKeys {
    /// Which of the keys that name a source are set: exactly one should be.
    pub fn given(&self) -> Vec<&'static str> {
        let keys = [
            ("model", self.model.is_some()),
            ("rule", self.rule.is_some()),
            ("url", self.url.is_some()),
            ("command", self.command.is_some()),
        ];
        keys.into_iter().filter(|(_, set)| *set).map(|(key, _)| key).collect()
    }

    /// Rules between its keys, which stand in the table `table`; `labels` says whether prompts have them.
    pub fn check(&self, table: &str, labels: bool, rules: &mut Rules) {
        let key = |name: &str| format!("{table}.{name}");
        match self.given()[..] {
            [] => {
                let help = "give one of `model`, `rule`, `url` and `command`, or several [[reward.mix]] tables";
                return rules.broken(&[table], format!("[{table}] has no source"), help);
            }
            [_] => {}
            [first, second, ..] => {
                let message = format!("[{table}] has two sources, `{first}` and `{second}`");
                let replace = format!("--set '{table}={{{second}=\"…\"}}' replaces the whole table");
                let both = "keep one, or give each its own [[reward.mix]] table with a weight".to_owned();
                let by_set = [first, second].iter().any(|name| rules.is_set(&key(name)));
                return rules.broken(&[&key(second)], message, if by_set { replace } else { both });
            }
        }
        check_rule_keys(table, self, rules);
        if self.rule == Some(RuleName::Math) && !labels {
            let message =
                format!("`{}` = \"math\" compares with a label, and `data.label_key` is not set", key("rule"));
            rules.broken(&[&key("rule")], message, "name the key of the expected answer: `label_key` in [data]");
        }
        if let Some(url) = self.url.as_ref().filter(|url| !url.starts_with("http://") && !url.starts_with("https://")) {
            let message = format!("`{}` = \"{url}\" is no address", key("url"));
            rules.broken(&[&key("url")], message, "it starts with http:// or https://");
        }
    }

    /// Decides what the recipe left open. A command runs in `folder`, the recipe's.
    pub fn resolve(&mut self, folder: &Path) {
        match self.rule {
            Some(RuleName::Math) => drop(self.tolerance.get_or_insert(0.0)),
            Some(RuleName::Format) => drop(self.structure.get_or_insert_with(|| FORMAT_STRUCTURE.into())),
            Some(RuleName::Length) => {
                let (min, max) = self.length_range().unwrap_or_default();
                (self.target_tokens, self.min_tokens, self.max_tokens) = (None, Some(min), max);
            }
            _ => {}
        }
        if self.command.is_some() {
            self.command_dir.get_or_insert_with(|| folder.to_owned());
        }
    }

    /// The rule of a source that is one, with its settings.
    pub fn rule(&self) -> Option<RuleConfig> {
        Some(match self.rule? {
            RuleName::Math => RuleConfig::Math { tolerance: self.tolerance.unwrap_or(0.0) },
            RuleName::Regex => RuleConfig::Regex { pattern: self.pattern.clone().unwrap_or_default() },
            RuleName::Length => {
                let (min, max) = self.length_range().unwrap_or_default();
                RuleConfig::Length { min, max }
            }
            RuleName::Format => {
                let structure = self.structure.clone();
                RuleConfig::Format { structure: structure.unwrap_or_else(|| FORMAT_STRUCTURE.into()) }
            }
            RuleName::Sentiment => RuleConfig::Sentiment { lexicon: self.lexicon.clone().unwrap_or_default() },
        })
    }

    /// Fewest and most tokens that score fully, where the recipe gives any.
    fn length_range(&self) -> Option<(usize, Option<usize>)> {
        match (self.target_tokens, self.min_tokens, self.max_tokens) {
            (Some(target), ..) => Some((target, Some(target))),
            (None, None, None) => None,
            (None, min, max) => Some((min.unwrap_or(0), max)),
        }
    }
}

/// What `rule = "format"` asks for unless the recipe says otherwise.
const FORMAT_STRUCTURE: &str = "<think>…</think><answer>…</answer>";

/// Keys that belong to one kind of source, and what each kind cannot do without.
fn check_rule_keys(table: &str, source: &SourceKeys, rules: &mut Rules) {
    let key = |name: &str| format!("{table}.{name}");
    let rule = |name| source.rule == Some(name);
    let remote = source.url.is_some() || source.command.is_some();
    let owned = [
        ("shape", source.model.is_some(), "`model`"),
        ("tolerance", rule(RuleName::Math), "`rule = \"math\"`"),
        ("pattern", rule(RuleName::Regex), "`rule = \"regex\"`"),
        ("structure", rule(RuleName::Format), "`rule = \"format\"`"),
        ("target_tokens", rule(RuleName::Length), "`rule = \"length\"`"),
        ("min_tokens", rule(RuleName::Length), "`rule = \"length\"`"),
        ("max_tokens", rule(RuleName::Length), "`rule = \"length\"`"),
        ("lexicon", rule(RuleName::Sentiment), "`rule = \"sentiment\"`"),
        ("command_dir", source.command.is_some(), "`command`"),
        ("num_cpus", source.command.is_some(), "`command`"),
        ("timeout_s", remote, "`url` and `command`"),
        ("retries", source.url.is_some(), "`url`"),
    ];
    // Defaults written out by `recipe.resolved.toml` say nothing, so they may stand anywhere.
    let plain = SourceKeys::default();
    let silent = |name| match name {
        "timeout_s" => source.timeout_s == plain.timeout_s,
        "retries" => source.retries == plain.retries,
        "num_cpus" => source.num_cpus == plain.num_cpus,
        "tolerance" => source.tolerance.is_none(),
        "target_tokens" => source.target_tokens.is_none(),
        "min_tokens" => source.min_tokens.is_none(),
        "max_tokens" => source.max_tokens.is_none(),
        _ => false,
    };
    for (name, fits, owner) in owned {
        if !fits && rules.has(&key(name)) && !silent(name) {
            let message = format!("`{name}` in [{table}] belongs to {owner}, which this source is not");
            rules.broken(&[&key(name)], message, "delete it, or change the source");
        }
    }
    let lacks = match source.rule {
        Some(RuleName::Regex) if source.pattern.is_none() => "`pattern`, the regular expression",
        Some(RuleName::Sentiment) if source.lexicon.is_none() => "`lexicon`, a file of words and their valence",
        Some(RuleName::Length) if source.length_range().is_none() => "`target_tokens`, or `min_tokens` or `max_tokens`",
        _ => return check_length(table, source, rules),
    };
    let word = source.rule.map(|rule| rule.word()).unwrap_or_default();
    rules.broken(&[&key("rule")], format!("`{}` = \"{word}\" needs {lacks}", key("rule")), "");
}

fn check_length(table: &str, source: &SourceKeys, rules: &mut Rules) {
    let (min, max) = (source.min_tokens, source.max_tokens);
    let keys = [format!("{table}.max_tokens"), format!("{table}.min_tokens")];
    let keys = [keys[0].as_str(), keys[1].as_str()];
    if source.target_tokens.is_some() && (min.is_some() || max.is_some()) {
        let message = format!("[{table}] has `target_tokens` and a range of lengths");
        rules.broken(&keys, message, "keep `target_tokens`, or `min_tokens` and `max_tokens`");
    } else if let (Some(min), Some(max)) = (min, max)
        && min > max
    {
        rules.broken(&keys, format!("[{table}] has `min_tokens` = {min} above `max_tokens` = {max}"), "");
    }
}
