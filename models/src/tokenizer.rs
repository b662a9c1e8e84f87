//! The tokenizer of a Hugging Face folder: text to token ids and back, special tokens, chat.
//!
//! It gives what the `tokenizers` library makes of `tokenizer.json`, with special tokens read from the other files with the precedence
//! of transformers 5, so that a model is trained on the ids it will be served with. `tokenizer.json` alone decides how text is split
//! and which special tokens are added to it: `add_bos_token` and `add_eos_token` of `tokenizer_config.json` are for folders
//! without it, as in transformers.
//!
//! Departures from transformers 5, on purpose: `tokenizer_class` is ignored (some classes there, `GPT2Tokenizer` for one, replace the
//! pre-tokenizer of `tokenizer.json` by their own; `PreTrainedTokenizerFast` keeps it); the end-of-sequence ids are all those that
//! any of the folder's files names; `clean_up_tokenization_spaces` is ignored (it changes what the model wrote).

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokenizers::{AddedToken, Encoding};

use crate::chat_template::{ChatTemplate, ChatTemplateError, Message};

/// Why a tokenizer could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// A file is not JSON.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    /// A key has a value of another type than it must have.
    #[error("{}: `{key}`: expected {expected}, found {found}", path.display())]
    Key { path: PathBuf, key: String, expected: &'static str, found: String },
    /// `tokenizer.json` is JSON, but no tokenizer.
    #[error("{}: no tokenizer that can be used: {message}", path.display())]
    Definition { path: PathBuf, message: String },
    /// A special token has another id in `tokenizer_config.json` than in `tokenizer.json`.
    #[error("{}: token `{token}` is declared with id {declared}, but tokenizer.json gives it id {found}: the two files are of different models", path.display())]
    TokenId { path: PathBuf, token: String, declared: u32, found: u32 },
    /// Text could not be encoded, or ids not decoded.
    #[error("{operation} failed: {message}")]
    Convert { operation: &'static str, message: String },
    /// A token id below 0 or above 2^32.
    #[error("token id {id} cannot be decoded: ids are between 0 and 4294967295")]
    IdRange { id: i64 },
    /// Messages were given, but the folder has no chat template.
    #[error("{}: no chat template: give prompts as plain text, or put a chat_template.jinja into the folder", folder.display())]
    NoChatTemplate { folder: PathBuf },
    /// Several named templates and none is the default.
    #[error("{}: `chat_template` has several templates ({names}) and none named `default`: put the one to use into chat_template.jinja", path.display())]
    NoDefaultTemplate { path: PathBuf, names: String },
    /// The template renders a message differently when others follow it, so its tokens cannot be told apart.
    #[error(
        "the chat template does not write message {index} (`{role}`) the same way {when}: split the conversation so that each ends with the assistant turn to learn"
    )]
    Inconsistent { index: usize, role: String, when: &'static str },
    /// The chat template is invalid or refused the messages.
    #[error(transparent)]
    ChatTemplate(#[from] ChatTemplateError),
}

type Result<T> = std::result::Result<T, TokenizerError>;

/// A tokenizer with its special tokens and its chat template. Cheap to share behind an `Arc`; all methods take `&self`.
#[derive(Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    folder: PathBuf,
    eos_ids: Vec<i64>,
    chat_template: Option<ChatTemplate>,
    /// Name and bytes of every tokenizer file of the folder.
    files: Vec<(&'static str, Vec<u8>)>,
}

/// Files that belong to a tokenizer; those that exist are copied by [`Tokenizer::save`].
const FILES: [&str; 12] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "tekken.json",
];

/// The special tokens with a name, as templates use them.
const NAMED_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl Tokenizer {
    /// Loads the tokenizer of a Hugging Face folder. Only `tokenizer.json` must exist.
    ///
    /// # Errors
    /// `tokenizer.json` is missing, or a file is unreadable, not JSON, of the wrong shape or contradicts another; names file and key.
    pub fn load(dir: &Path) -> Result<Self> {
        let folder = Folder::read(dir)?;
        let mut inner = folder.definition()?;
        let special_tokens = folder.special_tokens(&inner)?;
        // Cutting and padding are the caller's affair.
        inner.with_padding(None);
        folder.add_missing_tokens(&mut inner, &special_tokens)?;
        let eos = special_tokens.named.get("eos_token").and_then(|token| inner.token_to_id(&token.content));
        let texts = special_tokens.named.iter().map(|(name, token)| (name.clone(), token.content.clone()));
        Ok(Self {
            eos_ids: union(eos.map(i64::from), folder.eos_ids()?),
            chat_template: match folder.chat_template()? {
                Some(source) => Some(ChatTemplate::new(&source, texts.collect())?),
                None => None,
            },
            inner: Arc::new(inner),
            folder: folder.path,
            files: folder.files,
        })
    }

    /// The token ids of `text` with the special tokens that the tokenizer itself adds, as `tokenizer(text)` of transformers.
    ///
    /// # Errors
    /// The tokenizer has no token for a part of the text and no unknown token.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        Ok(ids(&self.encoding(text, true)?))
    }

    /// The token ids of `text` alone (`add_special_tokens=False`). Special tokens written in the text still become their ids.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<i64>> {
        Ok(ids(&self.encoding(text, false)?))
    }

    /// The text of `ids`, without special tokens if `skip_special`. Ids beyond the vocabulary (padded embeddings) have no text.
    ///
    /// # Errors
    /// A negative id.
    pub fn decode(&self, ids: &[i64], skip_special: bool) -> Result<String> {
        let ids = ids.iter().map(|&id| token_id(id)).collect::<Result<Vec<u32>>>()?;
        self.inner.decode(&ids, skip_special).map_err(convert("decoding"))
    }

    /// Decodes one sequence token by token, for streaming and stop strings.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream {
        DecodeStream {
            tokenizer: Arc::clone(&self.inner),
            skip_special,
            ids: Vec::new(),
            context: 0,
            given: String::new(),
        }
    }

    /// Every id that ends a sequence: the tokenizer's eos token, then those of `generation_config.json`, then of `config.json`.
    pub fn eos_ids(&self) -> &[i64] {
        &self.eos_ids
    }

    /// Number of tokens including added ones. The model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// A SHA-256 over what maps text to ids and back (model, normalizer, pre-tokenizer, decoder, added tokens): ids may be passed
    /// between two models iff their tokenizers' fingerprints are equal. Reads the whole vocabulary: call once.
    pub fn fingerprint(&self) -> String {
        // The tokenizer's own serialisation, not the file: merges, for one, have been written in two forms.
        let mut definition =
            serde_json::to_value(&*self.inner).expect("a tokenizer read from JSON can be written as JSON");
        let mut hash = Sha256::new();
        for key in ["model", "normalizer", "pre_tokenizer", "decoder", "added_tokens"] {
            let mut part = definition.get_mut(key).map(Value::take).unwrap_or_default();
            part.sort_all_objects();
            hash.update(key);
            hash.update(part.to_string());
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Writes the tokenizer's files into `dir`, byte for byte as they were loaded.
    ///
    /// # Errors
    /// A file cannot be written; names it.
    pub fn save(&self, dir: &Path) -> Result<()> {
        for (name, bytes) in &self.files {
            let path = dir.join(name);
            std::fs::write(&path, bytes).map_err(|source| TokenizerError::Io { path, source })?;
        }
        Ok(())
    }

    fn encoding(&self, text: &str, add_special_tokens: bool) -> Result<Encoding> {
        self.inner.encode(text, add_special_tokens).map_err(convert("encoding"))
    }
}

/// Chat.
impl Tokenizer {
    /// The conversation as the model's text; with `add_generation_prompt` it ends where the assistant is to go on.
    ///
    /// # Errors
    /// No chat template, or the template refuses the messages (its own words are in the error).
    pub fn apply_chat_template(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        Ok(self.template()?.render(messages, add_generation_prompt, &Map::new())?)
    }

    /// The conversation as token ids. The template alone decides about special tokens, so none is added a second time.
    ///
    /// # Errors
    /// As [`Tokenizer::apply_chat_template`] and [`Tokenizer::encode`].
    pub fn encode_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<i64>> {
        self.encode_plain(&self.apply_chat_template(messages, add_generation_prompt)?)
    }

    /// Token ids of a whole conversation and, for each, whether the assistant wrote it: content and end-of-turn token, but neither the
    /// turn's header nor what the template writes after its end.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_chat`]; [`TokenizerError::Inconsistent`] if the template changes earlier turns when later ones follow.
    pub fn encode_conversation(&self, messages: &[Message]) -> Result<(Vec<i64>, Vec<bool>)> {
        let text = self.apply_chat_template(messages, false)?;
        let encoding = self.encoding(&text, false)?;
        let mut mask = vec![false; encoding.len()];
        for (index, message) in messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let (start, end) = self.turn_bytes(messages, index, &text)?;
            let turn: Vec<usize> = tokens_within(&encoding, start, end).collect();
            let last = turn.iter().rposition(|&token| self.ends_turn(encoding.get_ids()[token]));
            for &token in &turn[..last.map_or(turn.len(), |last| last + 1)] {
                mask[token] = true;
            }
        }
        Ok((ids(&encoding), mask))
    }

    /// The time that templates with a date show; see [`ChatTemplate::render_time`].
    pub fn render_time(&self) -> Option<String> {
        self.chat_template.as_ref().map(ChatTemplate::render_time)
    }

    /// Makes templates show `time` (`2026-11-20T16:18:00`): for a resumed run, and for tests.
    ///
    /// # Errors
    /// `time` has another form.
    pub fn set_render_time(&mut self, time: &str) -> Result<()> {
        match &mut self.chat_template {
            Some(template) => Ok(template.set_render_time(time)?),
            None => Ok(()),
        }
    }

    fn template(&self) -> Result<&ChatTemplate> {
        let missing = || TokenizerError::NoChatTemplate { folder: self.folder.clone() };
        self.chat_template.as_ref().ok_or_else(missing)
    }

    /// Where in `text` the assistant's turn `index` stands, without its header.
    fn turn_bytes(&self, messages: &[Message], index: usize, text: &str) -> Result<(usize, usize)> {
        let inconsistent = |when| TokenizerError::Inconsistent { index, role: messages[index].role.clone(), when };
        let before = self.apply_chat_template(&messages[..index], true)?;
        let through = self.apply_chat_template(&messages[..=index], false)?;
        if !through.starts_with(&before) {
            return Err(inconsistent("after a generation prompt"));
        }
        if !text.starts_with(&through) {
            return Err(inconsistent("when further messages follow"));
        }
        Ok((before.len(), through.len()))
    }

    fn ends_turn(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        self.eos_ids.contains(&i64::from(id)) || added.get(&id).is_some_and(|token| token.special)
    }
}

/// The text of a sequence as its tokens come.
///
/// A token may hold a part of a character: its text comes with the token that completes it. The pieces and [`DecodeStream::finish`]
/// together are what [`Tokenizer::decode`] gives for all ids, as long as the ids are valid UTF-8.
#[derive(Debug, Clone)]
pub struct DecodeStream {
    tokenizer: Arc<tokenizers::Tokenizer>,
    skip_special: bool,
    /// The newest tokens: first `context` ones, given out already, since decoders look at what stands before; then the new ones.
    ids: Vec<u32>,
    context: usize,
    /// The text of `ids` that was given out.
    given: String,
}

impl DecodeStream {
    /// An incomplete character decodes to at most three U+FFFD; those before them are broken for good.
    const MAX_INCOMPLETE: usize = 3;
    /// So many tokens without a whole character at their end are noise, and the context starts afresh.
    const MAX_TOKENS: usize = 64;

    /// Takes the next token and returns the text that became certain with it, if any.
    ///
    /// # Errors
    /// A negative id.
    pub fn push(&mut self, id: i64) -> Result<Option<String>> {
        self.ids.push(token_id(id)?);
        let mut text = self.text()?;
        if !text.starts_with(&self.given) && self.certain(&text).len() >= self.given.len() {
            // Invalid bytes can change how the bytes before them decode; those were given out already.
            self.ids.drain(..self.context);
            self.context = 0;
            self.given.clear();
            text = self.text()?;
        }
        let certain = self.certain(&text);
        let new = certain.strip_prefix(&self.given).unwrap_or_default().to_owned();
        let whole = certain.len() == text.len();
        self.given.push_str(&new);
        if whole && !new.is_empty() {
            self.ids.drain(..self.context);
            self.context = self.ids.len();
            self.given = self.text()?;
        }
        Ok(Some(new).filter(|new| !new.is_empty()))
    }

    /// The text that was held back: a character whose last bytes never came, written as U+FFFD.
    ///
    /// # Errors
    /// The decoder of the tokenizer fails.
    pub fn finish(self) -> Result<String> {
        let text = self.text()?;
        Ok(text.strip_prefix(&self.given).unwrap_or_default().to_owned())
    }

    fn text(&self) -> Result<String> {
        self.tokenizer.decode(&self.ids, self.skip_special).map_err(convert("decoding"))
    }

    /// `text` without what the next token may still change.
    fn certain<'a>(&self, text: &'a str) -> &'a str {
        let sound = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let broken = text[sound.len()..].chars().count();
        if self.ids.len() > Self::MAX_TOKENS && broken > Self::MAX_INCOMPLETE {
            return text;
        }
        let kept = broken.saturating_sub(Self::MAX_INCOMPLETE) * char::REPLACEMENT_CHARACTER.len_utf8();
        &text[..sound.len() + kept]
    }
}

/// The special tokens of the folder's files.
struct SpecialTokens {
    named: BTreeMap<String, AddedToken>,
    /// `additional_special_tokens` and `extra_special_tokens`.
    extra: Vec<AddedToken>,
}

/// The files of a tokenizer's folder, read and parsed.
struct Folder {
    path: PathBuf,
    files: Vec<(&'static str, Vec<u8>)>,
    config: Map<String, Value>,
    special_tokens_map: Map<String, Value>,
    generation_config: Map<String, Value>,
    model_config: Map<String, Value>,
}

impl Folder {
    fn read(path: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for name in FILES {
            if let Some(bytes) = read_if_exists(&path.join(name))? {
                files.push((name, bytes));
            }
        }
        let model_config = read_if_exists(&path.join("config.json"))?;
        let object = |name: &str| {
            let bytes = files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| bytes.as_slice());
            json_object(&path.join(name), bytes)
        };
        Ok(Self {
            config: object("tokenizer_config.json")?,
            special_tokens_map: object("special_tokens_map.json")?,
            generation_config: object("generation_config.json")?,
            model_config: json_object(&path.join("config.json"), model_config.as_deref())?,
            path: path.to_owned(),
            files,
        })
    }

    /// The tokenizer of `tokenizer.json`, without its truncation.
    fn definition(&self) -> Result<tokenizers::Tokenizer> {
        let path = self.path.join(FILES[0]);
        let Some((_, bytes)) = self.files.iter().find(|(name, _)| *name == FILES[0]) else {
            let source = std::io::Error::new(std::io::ErrorKind::NotFound, "no such file; a model's folder needs one");
            return Err(TokenizerError::Io { path, source });
        };
        let failed = |error: tokenizers::Error| TokenizerError::Definition { path, message: error.to_string() };
        let parse = || {
            let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes)?;
            tokenizer.with_truncation(None)?;
            Ok(tokenizer)
        };
        parse().map_err(failed)
    }

    /// Named and further special tokens. As in transformers, `special_tokens_map.json` counts only where `tokenizer_config.json`
    /// is of the older kind that has no `added_tokens_decoder`, and wins there; the pad token may also stand in the padding of `tokenizer.json`.
    fn special_tokens(&self, tokenizer: &tokenizers::Tokenizer) -> Result<SpecialTokens> {
        let mut sources = vec![("tokenizer_config.json", &self.config)];
        if !self.config.contains_key("added_tokens_decoder") {
            sources.push(("special_tokens_map.json", &self.special_tokens_map));
        }
        let mut tokens = SpecialTokens { named: BTreeMap::new(), extra: Vec::new() };
        if let Some(padding) = tokenizer.get_padding().filter(|_| !self.config.contains_key("pad_token")) {
            tokens.named.insert("pad_token".to_owned(), AddedToken::from(padding.pad_token.as_str(), true));
        }
        for (file, values) in sources {
            for name in NAMED_TOKENS {
                if let Some(token) = self.special_token(file, name, values.get(name))? {
                    tokens.named.insert(name.to_owned(), token);
                }
            }
            for name in ["additional_special_tokens", "extra_special_tokens"] {
                let list = values.get(name).and_then(Value::as_array);
                for value in list.into_iter().flatten() {
                    tokens.extra.extend(self.special_token(file, name, Some(value))?);
                }
            }
        }
        Ok(tokens)
    }

    /// A token written as a string or as an object with `content`; null is none.
    fn special_token(&self, file: &str, key: &str, value: Option<&Value>) -> Result<Option<AddedToken>> {
        let token = match value {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(content)) => Some(AddedToken::from(content.as_str(), true)),
            Some(Value::Object(object)) => added_token(object).map(|token| token.special(true)),
            Some(_) => None,
        };
        token.map(Some).ok_or_else(|| self.wrong(file, key, "a string or an object with `content`", value))
    }

    /// Adds the tokens that only the configuration names, in transformers' order, so that they get the same ids.
    fn add_missing_tokens(&self, tokenizer: &mut tokenizers::Tokenizer, special: &SpecialTokens) -> Result<()> {
        const FILE: &str = "tokenizer_config.json";
        let known: HashSet<String> =
            tokenizer.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
        let mut declared = BTreeMap::new();
        for (key, value) in self.config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
            let token = value.as_object().and_then(added_token);
            let (Ok(id), Some(token)) = (key.parse::<u32>(), token) else {
                let key = format!("added_tokens_decoder.{key}");
                return Err(self.wrong(FILE, &key, "a token id and an object with `content`", Some(value)));
            };
            declared.insert(id, token);
        }
        let missing = declared.values().chain(special.named.values()).chain(&special.extra);
        for token in missing.filter(|token| !known.contains(&token.content)) {
            let add = tokenizer.add_tokens([token.clone()]);
            add.map_err(|error| TokenizerError::Definition { path: self.path.join(FILE), message: error.to_string() })?;
        }
        for (id, token) in declared {
            let found = tokenizer.token_to_id(&token.content);
            if let Some(found) = found.filter(|&found| found != id) {
                let path = self.path.join(FILE);
                return Err(TokenizerError::TokenId { path, token: token.content, declared: id, found });
            }
        }
        Ok(())
    }

    /// The end-of-sequence ids of `generation_config.json` and then `config.json`: an integer, a list, or nothing.
    fn eos_ids(&self) -> Result<Vec<i64>> {
        const KEY: &str = "eos_token_id";
        let mut ids = Vec::new();
        for (file, values) in [("generation_config.json", &self.generation_config), ("config.json", &self.model_config)]
        {
            let value = values.get(KEY);
            let list = match value {
                None | Some(Value::Null) => continue,
                Some(Value::Array(list)) => list.as_slice(),
                Some(single) => std::slice::from_ref(single),
            };
            for id in list {
                let wrong = || self.wrong(file, KEY, "a token id or a list of token ids", value);
                ids.push(id.as_i64().filter(|id| u32::try_from(*id).is_ok()).ok_or_else(wrong)?);
            }
        }
        Ok(ids)
    }

    /// The template's source: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`, a string or a list of named ones.
    fn chat_template(&self) -> Result<Option<String>> {
        const FILE: &str = "tokenizer_config.json";
        const EXPECTED: &str = "a template or a list of objects with `name` and `template`";
        if let Some((name, bytes)) = self.files.iter().find(|(name, _)| *name == "chat_template.jinja") {
            let text = String::from_utf8(bytes.clone());
            let invalid = |error| std::io::Error::new(std::io::ErrorKind::InvalidData, error);
            return text
                .map(Some)
                .map_err(|error| TokenizerError::Io { path: self.path.join(name), source: invalid(error) });
        }
        let value = self.config.get("chat_template");
        let list = match value {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(source)) => return Ok(Some(source.clone())),
            Some(Value::Array(list)) => list,
            other => return Err(self.wrong(FILE, "chat_template", EXPECTED, other)),
        };
        let named = list.iter().map(|entry| Some((entry.get("name")?.as_str()?, entry.get("template")?.as_str()?)));
        let Some(named) = named.collect::<Option<Vec<_>>>() else {
            return Err(self.wrong(FILE, "chat_template", EXPECTED, value));
        };
        match named.as_slice() {
            [] => Ok(None),
            [(_, only)] => Ok(Some((*only).to_owned())),
            several => match several.iter().find(|(name, _)| *name == "default") {
                Some((_, source)) => Ok(Some((*source).to_owned())),
                None => {
                    let names: Vec<&str> = several.iter().map(|(name, _)| *name).collect();
                    Err(TokenizerError::NoDefaultTemplate { path: self.path.join(FILE), names: names.join(", ") })
                }
            },
        }
    }

    fn wrong(&self, file: &str, key: &str, expected: &'static str, found: Option<&Value>) -> TokenizerError {
        let mut found = found.map_or_else(|| "nothing".to_owned(), Value::to_string);
        if let Some((cut, _)) = found.char_indices().nth(80) {
            found.truncate(cut);
            found.push('…');
        }
        TokenizerError::Key { path: self.path.join(file), key: key.to_owned(), expected, found }
    }
}

fn read_if_exists(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Io { path: path.to_owned(), source }),
    }
}

fn json_object(path: &Path, bytes: Option<&[u8]>) -> Result<Map<String, Value>> {
    let Some(bytes) = bytes else {
        return Ok(Map::new());
    };
    serde_json::from_slice(bytes).map_err(|source| TokenizerError::Json { path: path.to_owned(), source })
}

/// A token as `added_tokens_decoder` and `special_tokens_map.json` write it.
fn added_token(object: &Map<String, Value>) -> Option<AddedToken> {
    let flag = |key: &str| object.get(key).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(false);
    let token = AddedToken::from(object.get("content")?.as_str()?, special)
        .single_word(flag("single_word").unwrap_or(false))
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false))
        .normalized(flag("normalized").unwrap_or(!special));
    Some(token)
}

/// The tokens whose text lies within the bytes `start..end`, at least in part.
fn tokens_within(encoding: &Encoding, start: usize, end: usize) -> impl Iterator<Item = usize> + '_ {
    // Trimmed offsets leave a token of spaces alone with an empty range at its end.
    let begins = |&(from, to): &(usize, usize)| from.min(to.saturating_sub(1));
    let within = move |offsets: &(usize, usize)| offsets.1 > start && begins(offsets) < end;
    encoding.get_offsets().iter().enumerate().filter(move |(_, offsets)| within(offsets)).map(|(token, _)| token)
}

fn union(first: Option<i64>, more: Vec<i64>) -> Vec<i64> {
    let mut seen = HashSet::new();
    first.into_iter().chain(more).filter(|id| seen.insert(*id)).collect()
}

fn ids(encoding: &Encoding) -> Vec<i64> {
    encoding.get_ids().iter().map(|&id| i64::from(id)).collect()
}

fn token_id(id: i64) -> Result<u32> {
    u32::try_from(id).map_err(|_| TokenizerError::IdRange { id })
}

fn convert(operation: &'static str) -> impl Fn(tokenizers::Error) -> TokenizerError {
    move |error| TokenizerError::Convert { operation, message: error.to_string() }
}
