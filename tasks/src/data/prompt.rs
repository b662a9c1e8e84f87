//! Prompts: plain text or chat messages, with the label a rule compares against.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::DataError;
use super::file::{Row, kind_of};

/// One prompt of a data set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptRow {
    /// What the model is asked.
    pub prompt: PromptText,
    /// The reference answer, if the data set has one; numbers and bools as their JSON text.
    pub label: Option<String>,
    /// Index of the source among the run's sources.
    pub source: usize,
    /// Index of the row among all rows of its source, dropped ones included.
    pub row: usize,
}

/// Text to continue, or a conversation to answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptText {
    /// Goes to the tokenizer as it stands.
    Plain(String),
    /// Goes through the chat template first.
    Chat(Vec<Message>),
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or whatever else the chat template knows.
    pub role: String,
    pub content: String,
}

/// The columns a prompt is read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptKeys {
    /// Column with a string or a list of messages.
    pub prompt: String,
    /// Column with a string, a number or a bool; null is a row without a label.
    pub label: Option<String>,
}

impl PromptRow {
    /// Reads a row's prompt and label.
    ///
    /// # Errors
    /// A missing key or a value of another type, with the place, the key and the keys found.
    pub fn read(row: &Row, keys: &PromptKeys, source: usize, index: usize) -> Result<Self, DataError> {
        let prompt = row.prompt_text(&[&keys.prompt])?;
        let label = keys.label.as_deref().map(|key| row.label(key)).transpose()?.flatten();
        Ok(Self { prompt, label, source, row: index })
    }
}

impl Row {
    /// The string or messages under the first of `keys` that the row has.
    pub(super) fn prompt_text(&self, keys: &[&str]) -> Result<PromptText, DataError> {
        let (key, value) = self.require(keys)?;
        match value {
            Value::String(text) => Ok(PromptText::Plain(text.clone())),
            Value::Array(list) => Ok(PromptText::Chat(self.messages(key, list)?)),
            other => Err(self.wrong_type(key, "a string or a list of messages", kind_of(other))),
        }
    }

    /// The string under the first of `keys` that the row has.
    pub(super) fn text(&self, keys: &[&str]) -> Result<String, DataError> {
        let (key, value) = self.require(keys)?;
        value.as_str().map(str::to_owned).ok_or_else(|| self.wrong_type(key, "a string", kind_of(value)))
    }

    /// A list of messages as `{"role", "content"}` or ShareGPT's `{"from", "value"}`.
    pub(super) fn messages(&self, key: &str, list: &[Value]) -> Result<Vec<Message>, DataError> {
        const EXPECTED: &str = "a list of messages {\"role\": string, \"content\": string}";
        if list.is_empty() {
            return Err(self.wrong_type(key, EXPECTED, "an empty list"));
        }
        let read = |(index, value): (usize, &Value)| {
            value
                .as_object()
                .and_then(message_of)
                .ok_or_else(|| self.wrong_type(key, EXPECTED, format!("at message {} {}", index + 1, describe(value))))
        };
        list.iter().enumerate().map(read).collect()
    }

    fn label(&self, key: &str) -> Result<Option<String>, DataError> {
        match self.require(&[key])?.1 {
            Value::String(text) => Ok(Some(text.clone())),
            Value::Number(number) => Ok(Some(number.to_string())),
            Value::Bool(flag) => Ok(Some(flag.to_string())),
            Value::Null => Ok(None),
            other => Err(self.wrong_type(key, "a string, a number or a bool", kind_of(other))),
        }
    }
}

fn message_of(object: &Map<String, Value>) -> Option<Message> {
    if let (Some(role), Some(content)) = (object.get("role"), object.get("content")) {
        return Some(Message { role: role.as_str()?.to_owned(), content: content_of(content)? });
    }
    let role = match object.get("from")?.as_str()? {
        "human" => "user",
        "gpt" => "assistant",
        other => other,
    };
    Some(Message { role: role.to_owned(), content: object.get("value")?.as_str()?.to_owned() })
}

/// A string, or OpenAI's list of parts when all of them are text.
fn content_of(content: &Value) -> Option<String> {
    let part_text = |part: &Value| part.get("text")?.as_str().map(str::to_owned);
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts.iter().map(part_text).collect(),
        _ => None,
    }
}

fn describe(value: &Value) -> String {
    match value.as_object() {
        Some(object) => {
            let columns = object.iter().map(|(key, value)| format!("\"{key}\": {}", kind_of(value)));
            format!("{{{}}}", columns.collect::<Vec<_>>().join(", "))
        }
        None => kind_of(value).to_owned(),
    }
}
