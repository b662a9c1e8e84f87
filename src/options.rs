//! Command lines of the programs that take no recipe: `--name VALUE`, `--name=VALUE`, `--flag` and positional words.

use std::collections::{HashMap, HashSet};
use std::str::FromStr;

use crate::program::Failure;

/// What a program accepts.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Printed by `--help` and under every complaint.
    pub text: &'static str,
    /// Options with a value, without the dashes.
    pub values: &'static [&'static str],
    /// Options without one.
    pub flags: &'static [&'static str],
    /// Words without dashes, by what they are.
    pub words: &'static [&'static str],
}

/// A command line as given.
#[derive(Debug)]
pub struct Options {
    usage: Usage,
    values: HashMap<&'static str, String>,
    flags: HashSet<&'static str>,
    words: Vec<String>,
}

impl Options {
    /// Reads the process's arguments; `--help` prints the usage and ends the process.
    ///
    /// # Errors
    /// As [`Options::parse`].
    pub fn read(usage: Usage) -> Result<Options, Failure> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        if arguments.iter().any(|argument| argument == "-h" || argument == "--help") {
            println!("{}", usage.text);
            std::process::exit(0);
        }
        Options::parse(usage, arguments)
    }

    /// # Errors
    /// An unknown option, one given twice or without its value, a word too many.
    pub fn parse(usage: Usage, arguments: Vec<String>) -> Result<Options, Failure> {
        let mut options = Options { usage, values: HashMap::new(), flags: HashSet::new(), words: Vec::new() };
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let Some(option) = argument.strip_prefix("--") else {
                options.word(argument)?;
                continue;
            };
            let (name, attached) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (option, None),
            };
            let known = |names: &'static [&'static str]| names.iter().copied().find(|&known| known == name);
            if let Some(name) = known(usage.values) {
                let value = attached.or_else(|| arguments.next());
                let value = value.ok_or_else(|| options.wrong(format!("--{name} needs a value")))?;
                if options.values.insert(name, value).is_some() {
                    return Err(options.wrong(format!("--{name} is given twice")));
                }
            } else if let Some(name) = known(usage.flags).filter(|_| attached.is_none()) {
                options.flags.insert(name);
            } else {
                return Err(options.wrong(format!("unknown option `{argument}`")));
            }
        }
        Ok(options)
    }

    /// The value of `--name`.
    ///
    /// # Errors
    /// It was not given.
    pub fn required(&self, name: &str) -> Result<&str, Failure> {
        self.get(name).ok_or_else(|| self.wrong(format!("--{name} is missing")))
    }

    /// The value of `--name`, where it was given.
    pub fn get(&self, name: &str) -> Option<&str> {
        debug_assert!(self.usage.values.contains(&name), "--{name} is an option of this program");
        self.values.get(name).map(String::as_str)
    }

    /// The number after `--name`, or `default`.
    ///
    /// # Errors
    /// It is no such number; the message says what was `expected`.
    pub fn number<T: FromStr>(&self, name: &str, default: T, expected: &str) -> Result<T, Failure> {
        let Some(text) = self.get(name) else { return Ok(default) };
        text.parse().map_err(|_| self.wrong(format!("--{name}: expected {expected}, found `{text}`")))
    }

    /// What `--name` chooses among named things; the first where it was not given.
    ///
    /// # Errors
    /// The name is none of theirs.
    pub fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)]) -> Result<T, Failure> {
        let given = self.get(name).unwrap_or(choices[0].0);
        let chosen = choices.iter().find(|(name, _)| *name == given);
        chosen.map(|(_, value)| *value).ok_or_else(|| {
            let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
            self.wrong(format!("--{name}: expected {}, found `{given}`", names.join(" or ")))
        })
    }

    /// Whether `--name` was given.
    pub fn flag(&self, name: &str) -> bool {
        self.flags.contains(name)
    }

    /// The word at `index`.
    ///
    /// # Errors
    /// There are fewer.
    pub fn required_word(&self, index: usize) -> Result<&str, Failure> {
        let word = self.words.get(index).map(String::as_str);
        word.ok_or_else(|| self.wrong(format!("no {} given", self.usage.words[index])))
    }

    fn word(&mut self, word: String) -> Result<(), Failure> {
        if word.starts_with('-') && word.len() > 1 {
            return Err(self.wrong(format!("unknown option `{word}`")));
        }
        if self.words.len() == self.usage.words.len() {
            return Err(self.wrong(format!("unexpected argument `{word}`")));
        }
        self.words.push(word);
        Ok(())
    }

    fn wrong(&self, message: String) -> Failure {
        Failure::Input(format!("{message}\n{}", self.usage.text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USAGE: Usage =
        Usage { text: "usage: fly", values: &["height", "speed"], flags: &["honk"], words: &["goose"] };

    fn parse(line: &str) -> Result<Options, String> {
        let arguments = line.split_whitespace().map(str::to_owned).collect();
        Options::parse(USAGE, arguments).map_err(|failure| failure.to_string())
    }

    #[test]
    fn values_follow_or_are_attached() {
        let options = parse("akka --height 3 --speed=-2.5 --honk").unwrap();
        assert_eq!(options.required_word(0).unwrap(), "akka");
        assert_eq!(options.number("height", 0usize, "a count").unwrap(), 3);
        assert_eq!(options.number("speed", 0.0, "a number").unwrap(), -2.5);
        assert!(options.flag("honk"));
        assert_eq!(parse("akka").unwrap().number("height", 7, "a count").unwrap(), 7);
    }

    #[test]
    fn choices_go_by_name_and_default_to_the_first() {
        let choices = [("low", 1), ("high", 2)];
        assert_eq!(parse("").unwrap().choice("height", &choices).unwrap(), 1);
        assert_eq!(parse("--height high").unwrap().choice("height", &choices).unwrap(), 2);
        let complaint = parse("--height up").unwrap().choice("height", &choices).unwrap_err().to_string();
        assert_eq!(complaint, "--height: expected low or high, found `up`\nusage: fly");
    }

    #[test]
    fn complaints_name_the_option_and_end_with_the_usage() {
        for (line, complaint) in [
            ("--hieght 3", "unknown option `--hieght`"),
            ("-x", "unknown option `-x`"),
            ("--honk=1", "unknown option `--honk=1`"),
            ("--height", "--height needs a value"),
            ("--height 1 --height 2", "--height is given twice"),
            ("akka martin", "unexpected argument `martin`"),
        ] {
            assert_eq!(parse(line).unwrap_err(), format!("{complaint}\nusage: fly"));
        }
        let empty = parse("").unwrap();
        assert!(empty.required("height").unwrap_err().to_string().starts_with("--height is missing"));
        assert!(empty.required_word(0).unwrap_err().to_string().starts_with("no goose given"));
    }
}
