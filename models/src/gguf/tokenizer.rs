//! The tokenizer rebuilt from a GGUF file's vocabulary.
//!
//! GGUF keeps tokens, their types, merges or scores, special ids and the chat template. The rules that split text
//! before byte-pair merging are only named (`tokenizer.ggml.pre`); they are written here as `tokenizer.json` spells
//! them. The result is loaded once before it is written, so an inconsistent vocabulary fails here.

use std::collections::HashMap;
use std::str::FromStr;

use serde_json::{Map, Value as Json, json};

use super::ImportError;
use super::config::ModelConfig;
use super::header::Header;

/// GGUF's types of tokens.
mod token_type {
    pub const NORMAL: i64 = 1;
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER_DEFINED: i64 = 4;
    pub const UNUSED: i64 = 5;
    pub const BYTE: i64 = 6;
}

/// The JSON files of the tokenizer.
pub(super) struct TokenizerFiles {
    pub tokenizer: Json,
    pub tokenizer_config: Json,
    pub special: SpecialTokens,
    /// Entries of the vocabulary.
    pub vocab_tokens: usize,
}

impl TokenizerFiles {
    /// # Errors
    /// A tokenizer model or pre-tokenizer that is not supported; keys that are missing or contradict each other.
    pub fn from_header(header: &Header, config: &ModelConfig) -> Result<Self, ImportError> {
        let vocabulary = Vocabulary::from_header(header, config)?;
        let special = SpecialTokens::from_header(header, &vocabulary)?;
        let key = "tokenizer.ggml.model";
        let recipe = match header.text(key)? {
            Some("gpt2") => byte_level(header, &vocabulary)?,
            Some("llama") => sentence_piece(header, &vocabulary)?,
            Some(found) => {
                let supported = "gpt2 (byte-level BPE), llama (SentencePiece BPE)";
                return Err(ImportError::unsupported(&header.file, "tokenizer", found, supported));
            }
            None => return Err(header.missing(key, "gpt2 or llama")),
        };
        let adds = Adds {
            bos: header.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(recipe.adds_bos) && special.bos.is_some(),
            eos: header.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false) && special.eos.is_some(),
        };
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": vocabulary.added_tokens(),
            "normalizer": recipe.normalizer,
            "pre_tokenizer": recipe.pre_tokenizer,
            "post_processor": adds.post_processor(&special),
            "decoder": recipe.decoder,
            "model": recipe.model,
        });
        tokenizers::Tokenizer::from_str(&tokenizer.to_string())
            .map_err(|cause| ImportError::Tokenizer { file: header.file.clone(), detail: cause.to_string() })?;
        Ok(Self {
            tokenizer,
            tokenizer_config: tokenizer_config(header, config, &special, &adds)?,
            special,
            vocab_tokens: vocabulary.in_use().count(),
        })
    }
}

/// The parts of `tokenizer.json` in which tokenizer models differ.
struct Recipe {
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    model: Json,
    adds_bos: bool,
}

/// Tokens by id, with their types.
struct Vocabulary<'a> {
    tokens: &'a [String],
    types: Vec<i64>,
}

impl<'a> Vocabulary<'a> {
    fn from_header(header: &'a Header, config: &ModelConfig) -> Result<Self, ImportError> {
        let key = "tokenizer.ggml.tokens";
        let tokens = header.texts(key)?.ok_or_else(|| header.missing(key, "the vocabulary"))?;
        if tokens.len() as u64 > config.vocab_size {
            let expected = format!("at most the embedding's {} rows", config.vocab_size);
            return Err(header.key_error(key, &expected, format!("{} tokens", tokens.len())));
        }
        let key = "tokenizer.ggml.token_type";
        let types = header.integers(key)?.map_or_else(|| vec![token_type::NORMAL; tokens.len()], <[i64]>::to_vec);
        if types.len() != tokens.len() {
            let expected = format!("one type for each of {} tokens", tokens.len());
            return Err(header.key_error(key, &expected, format!("{} types", types.len())));
        }
        let vocabulary = Self { tokens, types };
        let mut seen = HashMap::new();
        for (id, token) in vocabulary.in_use() {
            if let Some(first) = seen.insert(token, id) {
                let found = format!("{token:?} as {first} and {id}");
                return Err(header.key_error("tokenizer.ggml.tokens", "distinct tokens", found));
            }
        }
        Ok(vocabulary)
    }

    /// Ids and tokens without the fillers that pad the embedding.
    fn in_use(&self) -> impl Iterator<Item = (usize, &'a str)> {
        let used = |(_, kind): &(_, &i64)| **kind != token_type::UNUSED;
        self.tokens.iter().enumerate().zip(&self.types).filter(used).map(|((id, token), _)| (id, token.as_str()))
    }

    fn of_type(&self, wanted: i64) -> impl Iterator<Item = (usize, &'a str)> {
        self.in_use().filter(move |(id, _)| self.types[*id] == wanted)
    }

    fn json(&self) -> Json {
        Json::Object(self.in_use().map(|(id, token)| (token.to_owned(), json!(id))).collect::<Map<_, _>>())
    }

    /// Tokens matched in text before anything else: control tokens, which are special, and user-defined ones.
    fn added_tokens(&self) -> Vec<Json> {
        let added = self.in_use().filter_map(|(id, token)| {
            let special = match self.types[id] {
                token_type::UNKNOWN | token_type::CONTROL => true,
                token_type::USER_DEFINED => false,
                _ => return None,
            };
            Some(json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special}))
        });
        added.collect()
    }
}

/// How one name in `tokenizer.ggml.pre` splits text.
struct PreTokenizer {
    names: &'static [&'static str],
    splits: Splits,
    normalizes_nfc: bool,
    /// A split that is a token as a whole is not merged from its bytes.
    ignore_merges: bool,
    adds_bos: bool,
}

enum Splits {
    /// Every digit alone, then GPT-2's pattern.
    DigitsThenGpt2,
    Gpt2,
    /// Each pattern in turn, its matches and what lies between them.
    Patterns(&'static [&'static str]),
}

const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_PATTERN: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// What llama.cpp applies to files that name no rules.
const DEFAULT_PATTERNS: &[&str] = &[
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

/// What most of them are.
const PLAIN: PreTokenizer =
    PreTokenizer { names: &[], splits: Splits::Gpt2, normalizes_nfc: false, ignore_merges: false, adds_bos: false };

const PRE_TOKENIZERS: &[PreTokenizer] = &[
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        splits: Splits::DigitsThenGpt2,
        ..PLAIN
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        splits: Splits::Patterns(&[LLAMA3_PATTERN]),
        ignore_merges: true,
        adds_bos: true,
        ..PLAIN
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen"],
        splits: Splits::Patterns(&[QWEN2_PATTERN]),
        normalizes_nfc: true,
        ..PLAIN
    },
    PreTokenizer { names: &["gpt-2", "gpt2"], ..PLAIN },
    PreTokenizer { names: &["default"], splits: Splits::Patterns(DEFAULT_PATTERNS), ..PLAIN },
];

impl PreTokenizer {
    /// The rules that the file names, or llama.cpp's own where it names none.
    fn from_header(header: &Header) -> Result<&'static Self, ImportError> {
        let name = header.text("tokenizer.ggml.pre")?.unwrap_or("default");
        PRE_TOKENIZERS.iter().find(|rules| rules.names.contains(&name)).ok_or_else(|| {
            let names: Vec<&str> = PRE_TOKENIZERS.iter().flat_map(|rules| rules.names).copied().collect();
            ImportError::unsupported(&header.file, "pre-tokenizer", name, &names.join(", "))
        })
    }

    fn json(&self) -> Json {
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let mut steps = match &self.splits {
            Splits::Gpt2 => return byte_level(true),
            Splits::DigitsThenGpt2 => vec![json!({"type": "Digits", "individual_digits": true})],
            Splits::Patterns(patterns) => patterns
                .iter()
                .map(|regex| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}))
                .collect(),
        };
        steps.push(byte_level(matches!(self.splits, Splits::DigitsThenGpt2)));
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

/// GPT-2's kind: text split by rules, each part merged from its bytes.
fn byte_level(header: &Header, vocabulary: &Vocabulary) -> Result<Recipe, ImportError> {
    let rules = PreTokenizer::from_header(header)?;
    let key = "tokenizer.ggml.merges";
    let merges = header.texts(key)?.ok_or_else(|| header.missing(key, "the merges"))?;
    Ok(Recipe {
        normalizer: if rules.normalizes_nfc { json!({"type": "NFC"}) } else { Json::Null },
        pre_tokenizer: rules.json(),
        decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        model: bpe_model(vocabulary, json!(merges), None, false, rules.ignore_merges),
        adds_bos: rules.adds_bos,
    })
}

/// Llama 2's kind: the whole text merged by score, characters without a token as bytes.
fn sentence_piece(header: &Header, vocabulary: &Vocabulary) -> Result<Recipe, ImportError> {
    let key = "tokenizer.ggml.scores";
    let scores = header.floats(key)?.ok_or_else(|| header.missing(key, "the scores"))?;
    if scores.len() != vocabulary.tokens.len() {
        let expected = format!("one score for each of {} tokens", vocabulary.tokens.len());
        return Err(header.key_error(key, &expected, format!("{} scores", scores.len())));
    }
    let prefix = header.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let squeeze = header.flag("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(false);
    let mut normalizers = Vec::new();
    if squeeze {
        normalizers.push(json!({"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""}));
        normalizers.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
    }
    if prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": "▁"}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}));
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = vocabulary.of_type(token_type::UNKNOWN).next().map(|(_, token)| token);
    let has_bytes = vocabulary.of_type(token_type::BYTE).next().is_some();
    Ok(Recipe {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Json::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: bpe_model(vocabulary, json!(merges_by_score(vocabulary, scores)), unknown, has_bytes, false),
        adds_bos: true,
    })
}

/// SentencePiece joins the neighbours whose union has the best score: every way to split a token into two tokens is
/// a merge, ranked by the token's score.
fn merges_by_score(vocabulary: &Vocabulary, scores: &[f32]) -> Vec<String> {
    let ids: HashMap<&str, usize> = vocabulary.in_use().map(|(id, token)| (token, id)).collect();
    let mut merges = Vec::new();
    for (id, token) in vocabulary.of_type(token_type::NORMAL) {
        let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let mut pairs: Vec<_> =
            splits.filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?, left, right))).collect();
        pairs.sort_unstable();
        merges.extend(pairs.into_iter().map(|(_, _, left, right)| (scores[id], format!("{left} {right}"))));
    }
    // The sort is stable: of two tokens with the same score the one with the lower id comes first.
    merges.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    merges.into_iter().map(|(_, merge)| merge).collect()
}

fn bpe_model(vocabulary: &Vocabulary, merges: Json, unknown: Option<&str>, bytes: bool, ignore_merges: bool) -> Json {
    json!({
        "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": unknown.is_some(), "byte_fallback": bytes,
        "ignore_merges": ignore_merges, "vocab": vocabulary.json(), "merges": merges,
    })
}

/// A token with a role, by id and text.
#[derive(Debug, Clone, PartialEq)]
struct SpecialToken {
    id: u64,
    text: String,
}

/// The tokens with a role. `eos` are all that end a response: end of text, of turn and of message.
pub(super) struct SpecialTokens {
    bos: Option<SpecialToken>,
    eos: Option<SpecialToken>,
    eos_ids: Vec<u64>,
    pad: Option<SpecialToken>,
    unk: Option<SpecialToken>,
}

impl SpecialTokens {
    fn from_header(header: &Header, vocabulary: &Vocabulary) -> Result<Self, ImportError> {
        let role = |name: &str| special_token(header, vocabulary, &format!("tokenizer.ggml.{name}_token_id"));
        let eos = role("eos")?;
        let mut eos_ids: Vec<u64> = eos.iter().map(|token| token.id).collect();
        for end in [role("eot")?, role("eom")?].into_iter().flatten() {
            if !eos_ids.contains(&end.id) {
                eos_ids.push(end.id);
            }
        }
        Ok(Self { bos: role("bos")?, eos, eos_ids, pad: role("padding")?, unk: role("unknown")? })
    }

    pub fn bos_id(&self) -> Option<u64> {
        self.bos.as_ref().map(|token| token.id)
    }

    pub fn pad_id(&self) -> Option<u64> {
        self.pad.as_ref().map(|token| token.id)
    }

    /// One id, or the list of several, as `config.json` writes them.
    pub fn eos_json(&self) -> Json {
        match self.eos_ids.as_slice() {
            [] => Json::Null,
            [one] => json!(one),
            several => json!(several),
        }
    }

    pub fn generation_config(&self) -> Json {
        let mut config = json!({"_from_model_config": true});
        for (key, value) in [
            ("bos_token_id", json!(self.bos_id())),
            ("eos_token_id", self.eos_json()),
            ("pad_token_id", json!(self.pad_id())),
        ] {
            if !value.is_null() {
                config[key] = value;
            }
        }
        config
    }

    /// `special_tokens_map.json`: roles that are filled.
    pub fn map(&self) -> Json {
        let roles =
            [("bos_token", &self.bos), ("eos_token", &self.eos), ("pad_token", &self.pad), ("unk_token", &self.unk)];
        let filled = roles.into_iter().filter_map(|(role, token)| Some((role.to_owned(), json!(token.as_ref()?.text))));
        Json::Object(filled.collect())
    }
}

fn special_token(header: &Header, vocabulary: &Vocabulary, key: &str) -> Result<Option<SpecialToken>, ImportError> {
    let Some(id) = header.count(key)? else {
        return Ok(None);
    };
    let token = vocabulary
        .tokens
        .get(id as usize)
        .ok_or_else(|| header.key_error(key, &format!("an id below {}", vocabulary.tokens.len()), id.to_string()))?;
    Ok(Some(SpecialToken { id, text: token.clone() }))
}

/// Which tokens encoding puts around a text.
struct Adds {
    bos: bool,
    eos: bool,
}

impl Adds {
    fn post_processor(&self, special: &SpecialTokens) -> Json {
        let before = special.bos.as_ref().filter(|_| self.bos);
        let after = special.eos.as_ref().filter(|_| self.eos);
        if before.is_none() && after.is_none() {
            return Json::Null;
        }
        let template = |text: &str, type_id: u64| {
            let part = |token: &SpecialToken| json!({"SpecialToken": {"id": token.text, "type_id": type_id}});
            let text = json!({"Sequence": {"id": text, "type_id": type_id}});
            before.map(part).into_iter().chain([text]).chain(after.map(part)).collect::<Vec<_>>()
        };
        let mut tokens = Map::new();
        for token in [before, after].into_iter().flatten() {
            tokens.insert(token.text.clone(), json!({"id": token.text, "ids": [token.id], "tokens": [token.text]}));
        }
        let pair = [template("A", 0), template("B", 1)].concat();
        json!({"type": "TemplateProcessing", "single": template("A", 0), "pair": pair, "special_tokens": tokens})
    }
}

fn tokenizer_config(
    header: &Header,
    config: &ModelConfig,
    special: &SpecialTokens,
    adds: &Adds,
) -> Result<Json, ImportError> {
    let mut json = json!({
        "add_bos_token": adds.bos,
        "add_eos_token": adds.eos,
        "clean_up_tokenization_spaces": false,
        "model_max_length": config.context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    if let (Json::Object(json), Json::Object(roles)) = (&mut json, special.map()) {
        json.extend(roles);
    }
    let template = chat_template(header)?;
    if !template.is_null() {
        json["chat_template"] = template;
    }
    Ok(json)
}

/// One template as text; several, which GGUF keeps under `tokenizer.chat_template.NAME`, as the list that
/// transformers writes.
fn chat_template(header: &Header) -> Result<Json, ImportError> {
    let default = header.text("tokenizer.chat_template")?;
    let prefix = "tokenizer.chat_template.";
    let mut keys: Vec<&str> = header.keys(prefix).collect();
    keys.sort_unstable();
    if keys.is_empty() {
        return Ok(json!(default));
    }
    let mut list: Vec<Json> =
        default.map(|template| json!({"name": "default", "template": template})).into_iter().collect();
    for key in keys {
        list.push(json!({"name": key[prefix.len()..], "template": header.text(key)?}));
    }
    Ok(json!(list))
}
