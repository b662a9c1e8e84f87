//! Rows for supervised fine-tuning and for reward models.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::DataError;
use super::file::{Row, kind_of};
use super::prompt::{Message, PromptText};
use super::transcript::parse_transcript;

/// One example for supervised fine-tuning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainingExample {
    /// A whole conversation; the assistant's turns are what is learned.
    Conversation(Vec<Message>),
    /// A prompt and what should follow it, which alone is learned.
    Completion { prompt: PromptText, completion: String },
    /// Plain text, learned whole.
    Text(String),
}

/// A better and a worse response to one prompt.
///
/// `chosen` and `rejected` go after `prompt`: messages after messages, text after text. Without a prompt they
/// are whole texts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    pub prompt: Option<PromptText>,
    pub chosen: PromptText,
    pub rejected: PromptText,
}

/// The columns a [`TrainingExample`] is read from. The first form whose columns the row has is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainingKeys {
    /// Column with a list of messages (`{"role", "content"}`, or ShareGPT's `{"from", "value"}`).
    pub messages: String,
    /// Column with a string or a list of messages, read together with `completion`.
    pub prompt: String,
    /// Column with a string, or a list with one assistant message.
    pub completion: String,
    /// Column with plain text, or with a transcript in HH-RLHF's form.
    pub text: String,
}

/// The columns a [`Pair`] is read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairKeys {
    /// May be missing from a row.
    pub prompt: String,
    pub chosen: String,
    pub rejected: String,
}

impl TrainingExample {
    /// Reads one example, in the form whose columns the row has.
    ///
    /// # Errors
    /// A row without any of the forms' columns, or with a value of another type.
    pub fn read(row: &Row, keys: &TrainingKeys) -> Result<Self, DataError> {
        if let Some(value) = row.columns.get(&keys.messages) {
            let list = value.as_array();
            let list = list.ok_or_else(|| row.wrong_type(&keys.messages, "a list of messages", kind_of(value)))?;
            return Ok(Self::Conversation(row.messages(&keys.messages, list)?));
        }
        if row.columns.contains_key(&keys.completion) {
            let prompt = row.prompt_text(&[&keys.prompt])?;
            return Ok(Self::Completion { prompt, completion: completion_of(row, &keys.completion)? });
        }
        if row.columns.contains_key(&keys.text) {
            let text = row.text(&[&keys.text])?;
            return Ok(parse_transcript(&text).map_or(Self::Text(text), Self::Conversation));
        }
        row.require(&[&keys.messages, &keys.completion, &keys.text])?;
        unreachable!("require fails when the row has none of the keys")
    }
}

fn completion_of(row: &Row, key: &str) -> Result<String, DataError> {
    match row.prompt_text(&[key])? {
        PromptText::Plain(text) => Ok(text),
        PromptText::Chat(mut messages) if messages.len() == 1 && messages[0].role == "assistant" => {
            Ok(messages.remove(0).content)
        }
        PromptText::Chat(messages) => {
            let found = format!("{} messages starting with the {}'s", messages.len(), messages[0].role);
            Err(row.wrong_type(key, "a string or one assistant message", found))
        }
    }
}

impl Pair {
    /// Reads one pair.
    ///
    /// Strings are responses to the row's prompt, except transcripts in HH-RLHF's form, which become messages.
    /// Where both sides are messages, what they share before the last assistant turn at which they part is
    /// the prompt; the row's own prompt is put in front unless they already hold it.
    ///
    /// # Errors
    /// A missing key, a value of another type, or one side in messages and the other in text.
    pub fn read(row: &Row, keys: &PairKeys) -> Result<Self, DataError> {
        let prompt = match row.columns.get(&keys.prompt) {
            None | Some(Value::Null) => None,
            Some(_) => Some(row.prompt_text(&[&keys.prompt])?),
        };
        let chosen = as_messages(row.prompt_text(&[&keys.chosen])?);
        let rejected = as_messages(row.prompt_text(&[&keys.rejected])?);
        match (chosen, rejected) {
            (PromptText::Plain(chosen), PromptText::Plain(rejected)) => Ok(plain_pair(prompt, chosen, rejected)),
            (PromptText::Chat(chosen), PromptText::Chat(rejected)) => Ok(chat_pair(prompt, chosen, rejected)),
            (PromptText::Plain(_), PromptText::Chat(_)) => {
                Err(row.wrong_type(&keys.rejected, "a string like the chosen side", "messages"))
            }
            (PromptText::Chat(_), PromptText::Plain(_)) => {
                Err(row.wrong_type(&keys.rejected, "messages like the chosen side", "a string"))
            }
        }
    }
}

fn as_messages(text: PromptText) -> PromptText {
    match text {
        PromptText::Plain(text) => parse_transcript(&text).map_or(PromptText::Plain(text), PromptText::Chat),
        chat => chat,
    }
}

fn plain_pair(prompt: Option<PromptText>, chosen: String, rejected: String) -> Pair {
    let answer = |content: String| match &prompt {
        Some(PromptText::Chat(_)) => PromptText::Chat(vec![Message { role: "assistant".to_owned(), content }]),
        _ => PromptText::Plain(content),
    };
    Pair { chosen: answer(chosen), rejected: answer(rejected), prompt }
}

fn chat_pair(prompt: Option<PromptText>, mut chosen: Vec<Message>, mut rejected: Vec<Message>) -> Pair {
    let num_shared = shared_prefix(&chosen, &rejected);
    let shared: Vec<Message> = chosen.drain(..num_shared).collect();
    rejected.drain(..num_shared);
    let mut messages = match prompt {
        None => Vec::new(),
        Some(PromptText::Plain(text)) if shared.iter().any(|message| message.content == text) => Vec::new(),
        Some(PromptText::Plain(content)) => vec![Message { role: "user".to_owned(), content }],
        Some(PromptText::Chat(messages)) if shared.starts_with(&messages) => Vec::new(),
        Some(PromptText::Chat(messages)) => messages,
    };
    messages.extend(shared);
    let prompt = (!messages.is_empty()).then_some(PromptText::Chat(messages));
    Pair { prompt, chosen: PromptText::Chat(chosen), rejected: PromptText::Chat(rejected) }
}

/// How many messages both start with, such that both go on with an assistant's turn; 0 where there is no such place.
fn shared_prefix(chosen: &[Message], rejected: &[Message]) -> usize {
    let num_equal = chosen.iter().zip(rejected).take_while(|(a, b)| a == b).count();
    let answers = |messages: &[Message], at: usize| messages.get(at).is_some_and(|message| message.role == "assistant");
    (0..=num_equal).rev().find(|&at| answers(chosen, at) && answers(rejected, at)).unwrap_or(0)
}
