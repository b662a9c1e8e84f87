//! Errors of a recipe, printed as a compiler prints them: place, what is wrong, the line with a caret, what to do.

use std::fmt;
use std::path::PathBuf;

use crate::{Documents, Origin};

/// Why a recipe was refused. Its text is complete: print it and exit with code 2.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The file could not be read at all.
    #[error("cannot read the recipe `{}`: {source}", path.display())]
    Read {
        /// As the user wrote it.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// Everything wrong that was found in one pass, in the order of the text.
    #[error("{}", join(.0))]
    Invalid(Vec<Diagnostic>),
}

/// One error with its place, ready to print.
#[derive(Debug)]
pub struct Diagnostic {
    /// `recipes/x.toml:12:1`, or the `--set` argument.
    pub location: String,
    /// What is wrong.
    pub message: String,
    /// The source line with a caret under the offending part.
    pub snippet: String,
    /// What to do about it, one hint per entry.
    pub help: Vec<String>,
}

/// One error while its place is still a byte range.
#[derive(Debug)]
pub struct Problem {
    origin: Origin,
    message: String,
    help: Vec<String>,
}

impl Problem {
    /// An error at `origin`.
    pub fn new(origin: Origin, message: impl Into<String>) -> Self {
        Self { origin, message: message.into(), help: Vec::new() }
    }

    /// Adds one hint; an empty one is ignored.
    pub fn help(mut self, hint: impl Into<String>) -> Self {
        let hint = hint.into();
        if !hint.is_empty() {
            self.help.push(hint);
        }
        self
    }

    fn render(self, documents: &Documents) -> Diagnostic {
        let document = &documents.0[self.origin.document];
        let span = &self.origin.span;
        let start = span.start.min(document.text.len());
        let line_start = document.text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = document.text[start..].find('\n').map_or(document.text.len(), |newline| start + newline);
        let line = &document.text[line_start..line_end].trim_end_matches('\r');
        let column = document.text[line_start..start].chars().count();
        let width = document.text[start..span.end.clamp(start, line_end)].chars().count().max(1);
        let number = document.text[..line_start].matches('\n').count() + 1;
        let (location, margin) = if document.is_file {
            (format!("{}:{number}:{}", document.label, column + 1), number.to_string())
        } else {
            (document.label.clone(), String::new())
        };
        let gutter = " ".repeat(margin.len());
        let shown = line.replace('\t', " ");
        let caret = format!("{}{}", " ".repeat(column), "^".repeat(width));
        let snippet = format!("{gutter} |\n{margin} | {shown}\n{gutter} | {caret}");
        Diagnostic { location, message: self.message, snippet, help: self.help }
    }
}

impl RecipeError {
    /// Sorts problems by their place and renders them.
    pub fn from_problems(mut problems: Vec<Problem>, documents: &Documents) -> Self {
        problems.sort_by_key(|problem| (problem.origin.document, problem.origin.span.start));
        Self::Invalid(problems.into_iter().map(|problem| problem.render(documents)).collect())
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}\n{}", self.location, self.message, self.snippet)?;
        let gutter = self.snippet.find('|').unwrap_or(0);
        for hint in &self.help {
            write!(f, "\n{}= {hint}", " ".repeat(gutter))?;
        }
        Ok(())
    }
}

fn join(diagnostics: &[Diagnostic]) -> String {
    let mut text = diagnostics.iter().map(Diagnostic::to_string).collect::<Vec<_>>().join("\n\n");
    if diagnostics.len() > 1 {
        text.push_str(&format!("\n\n{} errors in the recipe", diagnostics.len()));
    }
    text
}
