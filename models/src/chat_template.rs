//! Chat templates: the Jinja program that ships with a checkpoint and turns messages into the text its model was tuned on.
//!
//! Rendered by minijinja, set up to agree with transformers, which uses Python's jinja2: blocks trimmed, loop controls,
//! Python's string methods, `raise_exception`, `strftime_now`, `{% generation %}` blocks, and a `tojson` that is
//! `json.dumps` (minijinja's own escapes HTML).
//!
//! The time that `strftime_now` sees is fixed when the template is compiled, so that one run renders one date: every rollout of a
//! run sees the same system prompt, and a resumed run can set the date of its first start.

use std::collections::BTreeMap;
use std::error::Error as _;

use chrono::NaiveDateTime;
use minijinja::value::{Kwargs, Rest, Serde, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, context, syntax::SyntaxConfig};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Serialize};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`; a template may know more roles.
    pub role: String,
    /// The turn's text.
    pub content: String,
}

impl Message {
    /// A message of any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Why a chat template could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ChatTemplateError {
    /// The template is not valid Jinja.
    #[error("chat template, line {line}: {message}")]
    Syntax { line: usize, message: String },
    /// The template called `raise_exception`: it refuses this conversation.
    #[error("the chat template refuses these messages: {message}")]
    Raised { message: String },
    /// The template failed while rendering.
    #[error("chat template, line {line}: rendering failed: {message}")]
    Render { line: usize, message: String },
    /// A time that is neither a date and time nor seconds since 1970.
    #[error("{name}: expected {expected}, found `{found}`")]
    Time { name: &'static str, expected: &'static str, found: String },
}

/// A compiled chat template with the special tokens it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
    render_time: NaiveDateTime,
}

const NAME: &str = "chat_template";
const EPOCH: &str = "SOURCE_DATE_EPOCH";
const TIME_FORMAT: &str = "%Y-%m-%dT%H:%M:%S";

impl ChatTemplate {
    /// Compiles `source`. `special_tokens` are the names a template may use, such as `bos_token`, with their text.
    ///
    /// `strftime_now` shows `SOURCE_DATE_EPOCH` (seconds since 1970, in UTC) if the environment has it, else the local time of this call.
    ///
    /// # Errors
    /// Invalid Jinja, with its line; a `SOURCE_DATE_EPOCH` that is no number.
    pub fn new(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self, ChatTemplateError> {
        let mut environment = Environment::new();
        environment.set_syntax(syntax());
        environment.set_unknown_method_callback(python_method);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_template_owned(NAME, generation_blocks_as_scopes(source)).map_err(|error| {
            ChatTemplateError::Syntax { line: error.line().unwrap_or(0), message: describe(&error) }
        })?;
        let mut template = Self { environment, special_tokens, render_time: NaiveDateTime::default() };
        template.use_time(start_time()?);
        Ok(template)
    }

    /// Renders `messages`; with `add_generation_prompt` the text ends where the assistant is to go on.
    ///
    /// `more` are further variables for the template, such as `enable_thinking`.
    ///
    /// # Errors
    /// [`ChatTemplateError::Raised`] if the template refuses the conversation, [`ChatTemplateError::Render`] for every other failure.
    pub fn render<M: Serialize>(
        &self,
        messages: &[M],
        add_generation_prompt: bool,
        more: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, ChatTemplateError> {
        // transformers passes `tools` and `documents` as None where there are none, and templates test `is not none`.
        let context = context! {
            ..Value::from(Serde(more)),
            ..context! {
                messages => Value::from(Serde(messages)),
                add_generation_prompt => add_generation_prompt,
                tools => (),
                documents => (),
            },
            ..Value::from(Serde(&self.special_tokens))
        };
        let template = self.environment.get_template(NAME).map_err(|error| failure(&error))?;
        template.render(context).map_err(|error| failure(&error))
    }

    /// The time that `strftime_now` shows, as `2026-11-20T16:18:00`: what a checkpoint stores.
    pub fn render_time(&self) -> String {
        self.render_time.format(TIME_FORMAT).to_string()
    }

    /// Makes `strftime_now` show `time`, written as [`ChatTemplate::render_time`] writes it.
    ///
    /// # Errors
    /// `time` has another form.
    pub fn set_render_time(&mut self, time: &str) -> Result<(), ChatTemplateError> {
        let parsed = NaiveDateTime::parse_from_str(time, TIME_FORMAT).map_err(|_| ChatTemplateError::Time {
            name: "render time",
            expected: "YYYY-MM-DDTHH:MM:SS",
            found: time.to_owned(),
        })?;
        self.use_time(parsed);
        Ok(())
    }

    fn use_time(&mut self, time: NaiveDateTime) {
        self.render_time = time;
        self.environment.add_function("strftime_now", move |format: &str| strftime(time, format));
    }
}

/// transformers compiles templates with `trim_blocks` and `lstrip_blocks`.
fn syntax() -> SyntaxConfig {
    let built = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    built.expect("the default delimiters are valid")
}

/// Turns transformers' `{% generation %}` blocks, which only mark the assistant's text, into plain scopes with the same trimming.
fn generation_blocks_as_scopes(source: &str) -> String {
    let tag = regex::Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a valid pattern");
    tag.replace_all(source, "{%${1} ${2}with ${3}%}").into_owned()
}

/// `SOURCE_DATE_EPOCH` if it is set, else the local time.
fn start_time() -> Result<NaiveDateTime, ChatTemplateError> {
    match std::env::var_os(EPOCH) {
        Some(seconds) => epoch_time(&seconds.to_string_lossy()),
        None => Ok(chrono::Local::now().naive_local()),
    }
}

fn epoch_time(seconds: &str) -> Result<NaiveDateTime, ChatTemplateError> {
    let time = seconds.trim().parse().ok().and_then(|seconds| chrono::DateTime::from_timestamp(seconds, 0));
    time.map(|time| time.naive_utc()).ok_or_else(|| ChatTemplateError::Time {
        name: EPOCH,
        expected: "seconds since 1970",
        found: seconds.to_owned(),
    })
}

fn strftime(time: NaiveDateTime, format: &str) -> Result<String, Error> {
    use std::fmt::Write;
    let mut text = String::new();
    write!(text, "{}", time.format(format)).map_err(|_| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know the format `{format}`"))
    })?;
    Ok(text)
}

/// What the template itself said; carried as the source of a minijinja error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct RaisedByTemplate(String);

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let raised = RaisedByTemplate(message.to_string());
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(raised))
}

fn failure(error: &Error) -> ChatTemplateError {
    let mut cause = error.source();
    while let Some(source) = cause {
        if let Some(raised) = source.downcast_ref::<RaisedByTemplate>() {
            return ChatTemplateError::Raised { message: raised.0.clone() };
        }
        cause = source.source();
    }
    ChatTemplateError::Render { line: error.line().unwrap_or(0), message: describe(error) }
}

/// The error's kind and detail without minijinja's own position, which our message states.
fn describe(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// Python's methods: those of minijinja's pycompat, and the ones it lacks that templates use.
fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return unknown_method_callback(state, value, method, args);
    };
    match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (head, tail) = text.split_once(separator).unwrap_or((text, ""));
            let found = if head.len() == text.len() { "" } else { separator };
            Ok(strings([head, found, tail]))
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (head, tail) = text.rsplit_once(separator).unwrap_or(("", text));
            let found = if tail.len() == text.len() { "" } else { separator };
            Ok(strings([head, found, tail]))
        }
        "rsplit" => {
            let (separator, limit): (&str, Option<usize>) = from_args(args)?;
            let parts = limit.map_or(usize::MAX, |limit| limit.saturating_add(1));
            let mut pieces: Vec<&str> = text.rsplitn(parts, separator).collect();
            pieces.reverse();
            Ok(strings(pieces))
        }
        _ => unknown_method_callback(state, value, method, args),
    }
}

fn strings<'a>(texts: impl IntoIterator<Item = &'a str>) -> Value {
    texts.into_iter().map(Value::from).collect()
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, the filter of transformers.
fn tojson(value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let argument = |index: usize| -> Result<Option<Value>, Error> {
        let named: Option<Value> = kwargs.get(NAMES[index])?;
        let given = positional.get(index).cloned().or(named);
        Ok(given.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let indent = match argument(1)? {
        None => None,
        Some(text) if text.as_str().is_some() => Some(text.to_string()),
        Some(spaces) => Some(" ".repeat(usize::try_from(spaces)?)),
    };
    let separators = match argument(2)? {
        Some(pair) => (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string()),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let json = PythonJson {
        ensure_ascii: argument(0)?.is_some_and(|value| value.is_true()),
        sort_keys: argument(3)?.is_some_and(|value| value.is_true()),
        indent,
        separators,
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    json.write(&mut out, value, 0)?;
    Ok(out)
}

/// Python's JSON writer with its options.
struct PythonJson {
    ensure_ascii: bool,
    sort_keys: bool,
    /// One level of indentation; everything on one line if absent.
    indent: Option<String>,
    /// Between items, and between a key and its value.
    separators: (String, String),
}

impl PythonJson {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => out.push_str(&scalar(value)?),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.block(out, ('[', ']'), &items, depth, |out, item| self.write(out, item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()? {
                    let name = if key.as_str().is_some() { key.to_string() } else { scalar(&key)? };
                    pairs.push((name, value.get_item(&key)?));
                }
                if self.sort_keys {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.block(out, ('{', '}'), &pairs, depth, |out, (name, item)| {
                    self.string(out, name);
                    out.push_str(&self.separators.1);
                    self.write(out, item, depth + 1)
                })?;
            }
            kind => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("tojson cannot write a value of kind {kind}"),
                ));
            }
        }
        Ok(())
    }

    fn block<T>(
        &self,
        out: &mut String,
        (open, close): (char, char),
        items: &[T],
        depth: usize,
        mut write_item: impl FnMut(&mut String, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                out.push_str(&self.separators.0);
            }
            self.new_line(out, depth + 1);
            write_item(out, item)?;
        }
        if !items.is_empty() {
            self.new_line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn new_line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for char in text.chars() {
            match char {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                '\0'..='\u{1f}' => escape_utf16(out, char),
                '\u{7f}'.. if self.ensure_ascii && char != '\u{7f}' => escape_utf16(out, char),
                _ => out.push(char),
            }
        }
        out.push('"');
    }
}

fn escape_utf16(out: &mut String, char: char) {
    for unit in char.encode_utf16(&mut [0; 2]) {
        out.push_str(&format!("\\u{unit:04x}"));
    }
}

/// None, booleans and numbers as Python's json writes them.
fn scalar(value: &Value) -> Result<String, Error> {
    Ok(match value.kind() {
        ValueKind::None => "null".to_owned(),
        ValueKind::Bool => value.is_true().to_string(),
        ValueKind::Number if !value.is_integer() => python_float(f64::try_from(value.clone())?),
        ValueKind::Number => value.to_string(),
        kind => {
            return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson cannot use a key of kind {kind}")));
        }
    })
}

/// `repr(float)`: the shortest digits that read back, scientific below 1e-4 and from 1e16 on.
fn python_float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').expect("`{:e}` writes an exponent");
    let exponent: i32 = exponent.parse().expect("the exponent is an integer");
    if number != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    format!("{number:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_date_epoch_is_utc_and_must_be_a_number() {
        // date -u -d @1793869623
        assert_eq!(epoch_time("1793869623").unwrap().to_string(), "2026-11-05 09:07:03");
        let error = epoch_time("today").unwrap_err().to_string();
        assert_eq!(error, "SOURCE_DATE_EPOCH: expected seconds since 1970, found `today`");
    }

    #[test]
    fn a_stored_render_time_is_shown_again() {
        let now = ChatTemplate::new("{{ strftime_now('%d %b') }}", BTreeMap::new()).unwrap();
        let mut resumed = ChatTemplate::new("{{ strftime_now('%d %b %H') }}", BTreeMap::new()).unwrap();
        resumed.set_render_time(&now.render_time()).unwrap();
        assert_eq!(resumed.render_time(), now.render_time());
        resumed.set_render_time("2024-02-29T23:00:01").unwrap();
        assert_eq!(resumed.render::<Message>(&[], true, &serde_json::Map::new()).unwrap(), "29 Feb 23");
        assert!(resumed.set_render_time("2024-02-30T00:00:00").is_err());
    }

    #[test]
    fn floats_are_written_as_python_writes_them() {
        // The right-hand sides are Python's repr of the same literals.
        for (number, expected) in [
            (1e16, "1e+16"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (999999999999999.9, "999999999999999.9"),
            (0.0001, "0.0001"),
            (0.00001234, "1.234e-05"),
            (5e-324, "5e-324"),
            (-2.0, "-2.0"),
            (1e15, "1000000000000000.0"),
        ] {
            assert_eq!(python_float(number), expected);
        }
    }
}
