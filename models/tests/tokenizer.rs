//! The tokenizer and chat templates against transformers: every expected value in golden/tokenizer was written by make_golden.py there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use echelon_models::chat_template::{ChatTemplate, ChatTemplateError, Message};
use echelon_models::tokenizer::{Tokenizer, TokenizerError};
use serde_json::{Map, Value, json};

#[test]
fn templates_render_as_transformers_renders_them() {
    let golden = golden("templates.json");
    let special_tokens: BTreeMap<String, String> = serde_json::from_value(golden["special_tokens"].clone()).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let source = fs::read_to_string(folder("templates").join(text(&case["template"]))).unwrap();
        let mut template = ChatTemplate::new(&source, special_tokens.clone()).unwrap();
        template.set_render_time(text(&golden["time"])).unwrap();
        let messages = golden["conversations"][text(&case["conversation"])].as_array().unwrap();
        let add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
        let rendered = template.render(messages, add_generation_prompt, case["more"].as_object().unwrap());
        let name = format!("{} with {}", case["template"], case["conversation"]);
        match (&rendered, case.get("expected")) {
            (Ok(rendered), Some(expected)) => assert_eq!(rendered, text(expected), "{name}"),
            (Err(ChatTemplateError::Raised { message }), None) => {
                assert_eq!(message, text(&case["error"]), "{name}")
            }
            _ => panic!("{name}: {rendered:?}, expected {case}"),
        }
    }
}

#[test]
fn ids_are_those_of_transformers() {
    for_each_tokenizer(|name, tokenizer, case| {
        assert_eq!(tokenizer.vocab_size() as u64, case["vocab_size"].as_u64().unwrap(), "{name}");
        assert_eq!(tokenizer.eos_ids()[0], case["eos_id"].as_i64().unwrap(), "{name}");
        for text_case in case["texts"].as_array().unwrap() {
            let input = text(&text_case["text"]);
            assert_eq!(tokenizer.encode(input).unwrap(), ids(&text_case["ids"]), "{name}: {input:?}");
            assert_eq!(tokenizer.encode_plain(input).unwrap(), ids(&text_case["plain"]), "{name}: {input:?}");
        }
    });
}

#[test]
fn texts_are_those_of_transformers() {
    for_each_tokenizer(|name, tokenizer, case| {
        for decoded in case["decoded"].as_array().unwrap() {
            let ids = ids(&decoded["ids"]);
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text(&decoded["text"]), "{name}: {ids:?}");
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text(&decoded["skip_special"]), "{name}: {ids:?}");
        }
    });
}

#[test]
fn chats_are_encoded_without_a_second_bos_and_with_the_assistants_tokens_marked() {
    let conversations = golden("templates.json")["conversations"].clone();
    let mut masks = 0;
    for_each_tokenizer(|name, tokenizer, case| {
        for chat in case["chats"].as_array().unwrap() {
            let conversation = text(&chat["conversation"]);
            let messages: Vec<Message> = serde_json::from_value(conversations[conversation].clone()).unwrap();
            assert_eq!(
                tokenizer.encode_chat(&messages, true).unwrap(),
                ids(&chat["prompt_ids"]),
                "{name} {conversation}"
            );
            assert_eq!(tokenizer.encode_chat(&messages, false).unwrap(), ids(&chat["ids"]), "{name} {conversation}");
            if let Some(expected) = chat.get("mask") {
                let (encoded, mask) = tokenizer.encode_conversation(&messages).unwrap();
                assert_eq!(encoded, ids(&chat["ids"]), "{name} {conversation}");
                assert_eq!(json!(mask), *expected, "{name} {conversation}");
                masks += 1;
            }
        }
    });
    assert_eq!(masks, 4);
}

#[test]
fn masked_tokens_are_the_answer_and_its_end() {
    let answer = Message::new("assistant", "It is 4.");
    let messages = [Message::new("user", "2 + 2?"), answer.clone(), Message::new("user", "3?"), answer];
    for (name, expected) in [
        ("chatml", ["It is 4.<|im_end|>", "It is 4.<|im_end|>"].concat()),
        ("llama3", ["It is 4.<|eot_id|>", "It is 4.<|eot_id|>"].concat()),
        ("stories_eos", ["It is 4.</s>", " It is 4.</s>"].concat()),
    ] {
        let tokenizer = Tokenizer::load(&folder(name)).unwrap();
        let (ids, mask) = tokenizer.encode_conversation(&messages).unwrap();
        let learnt: Vec<i64> = ids.iter().zip(&mask).filter(|(_, learnt)| **learnt).map(|(id, _)| *id).collect();
        assert_eq!(tokenizer.decode(&learnt, false).unwrap(), expected, "{name}");
    }
}

#[test]
fn a_template_that_rewrites_earlier_turns_is_refused() {
    let tokenizer = Tokenizer::load(&folder("qwen")).unwrap();
    let answer = Message::new("assistant", "<think>\n2 and 2\n</think>\n\n4");
    let question = Message::new("user", "2 + 2?");
    let (_, mask) = tokenizer.encode_conversation(&[question.clone(), answer.clone()]).unwrap();
    assert!(mask.contains(&true));
    let error = tokenizer.encode_conversation(&[question.clone(), answer, question]).unwrap_err();
    assert!(matches!(error, TokenizerError::Inconsistent { index: 1, .. }), "{error}");
    assert!(error.to_string().contains("when further messages follow"), "{error}");
}

#[test]
fn streamed_pieces_are_the_whole_text() {
    for_each_tokenizer(|name, tokenizer, case| {
        for text_case in case["texts"].as_array().unwrap() {
            for skip_special in [false, true] {
                let ids = ids(&text_case["ids"]);
                let pieces = stream(&tokenizer, &ids, skip_special);
                let whole = tokenizer.decode(&ids, skip_special).unwrap();
                assert_eq!(pieces.concat(), whole, "{name}: {ids:?}");
                let (held, given) = pieces.split_last().unwrap();
                assert!(held.is_empty() && given.iter().all(|piece| !piece.contains('\u{fffd}')), "{name}: {pieces:?}");
            }
        }
    });
}

#[test]
fn a_character_split_over_tokens_comes_whole_and_a_broken_one_comes_at_the_end() {
    for name in ["chatml", "stories"] {
        let tokenizer = Tokenizer::load(&folder(name)).unwrap();
        let mut ids = tokenizer.encode_plain("a🜚").unwrap();
        assert!(stream(&tokenizer, &ids, true).contains(&"🜚".to_owned()), "{name}");
        ids.pop();
        let pieces = stream(&tokenizer, &ids, true);
        assert_eq!(pieces.first().unwrap(), "a", "{name}");
        assert!(pieces.last().unwrap().starts_with('\u{fffd}'), "{name}: {pieces:?}");
        // A broken character does not hold back the text after it.
        let broken = *ids.last().unwrap();
        let later = [ids, vec![broken; 20], tokenizer.encode_plain("b").unwrap()].concat();
        let (held, given) =
            stream(&tokenizer, &later, true).split_last().map(|(a, b)| (a.clone(), b.to_vec())).unwrap();
        assert!(held.is_empty() && given.concat().ends_with('b') && given.len() > 3, "{name}: {given:?}");
    }
}

#[test]
fn every_eos_id_counts_once_and_in_a_stable_order() {
    let eos_ids = |name| Tokenizer::load(&folder(name)).unwrap().eos_ids().to_vec();
    assert_eq!(eos_ids("chatml"), [2, 0]);
    assert_eq!(eos_ids("llama3"), [1, 4]);
    assert_eq!(eos_ids("stories"), [2]);
}

#[test]
fn fingerprints_tell_vocabularies_apart_and_nothing_else() {
    let fingerprint = |name| Tokenizer::load(&folder(name)).unwrap().fingerprint();
    assert_ne!(fingerprint("chatml"), fingerprint("llama3"));
    // stories_eos adds a token; without it only the form of the merges and the post-processor differ.
    assert_ne!(fingerprint("stories"), fingerprint("stories_eos"));
    let copy = TemporaryFolder::new("fingerprint");
    fs::copy(folder("stories_eos").join("tokenizer.json"), copy.0.join("tokenizer.json")).unwrap();
    assert_eq!(fingerprint("stories"), Tokenizer::load(&copy.0).unwrap().fingerprint());
    assert_eq!(fingerprint("stories").len(), 64);
}

#[test]
fn saving_copies_every_file_of_the_tokenizer_byte_for_byte() {
    let copy = TemporaryFolder::new("save");
    let original = folder("chatml");
    Tokenizer::load(&original).unwrap().save(&copy.0).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"] {
        assert_eq!(fs::read(copy.0.join(name)).unwrap(), fs::read(original.join(name)).unwrap(), "{name}");
    }
    assert!(!copy.0.join("config.json").exists());
    let error = Tokenizer::load(&copy.0).unwrap().save(&copy.0.join("missing")).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
}

#[test]
fn wrong_folders_are_named_with_file_key_and_what_was_found() {
    let broken = TemporaryFolder::new("wrong");
    let message = |files: &[(&str, &str)]| {
        fs::copy(folder("stories").join("tokenizer.json"), broken.0.join("tokenizer.json")).unwrap();
        for (name, content) in files {
            fs::write(broken.0.join(name), content).unwrap();
        }
        let error = Tokenizer::load(&broken.0).map(|_| ()).unwrap_err().to_string();
        for (name, _) in files {
            fs::remove_file(broken.0.join(name)).unwrap();
        }
        error.replace(&format!("{}/", broken.0.display()), "")
    };
    let config = |content| message(&[("tokenizer_config.json", content)]);
    assert!(message(&[("tokenizer.json", "{}")]).starts_with("tokenizer.json: no tokenizer that can be used: "));
    assert!(config("{").starts_with("tokenizer_config.json: not valid JSON: EOF"));
    assert_eq!(
        config(r#"{"eos_token": 7}"#),
        "tokenizer_config.json: `eos_token`: expected a string or an object with `content`, found 7"
    );
    assert_eq!(
        message(&[("generation_config.json", r#"{"eos_token_id": [2, -1]}"#)]),
        "generation_config.json: `eos_token_id`: expected a token id or a list of token ids, found [2,-1]"
    );
    assert!(
        config(r#"{"added_tokens_decoder": {"7": {"content": "</s>"}}}"#)
            .contains("`</s>` is declared with id 7, but tokenizer.json gives it id 2")
    );
    assert!(
        config(r#"{"chat_template": [{"name": "a", "template": ""}, {"name": "b", "template": ""}]}"#)
            .contains("(a, b)")
    );
    assert!(config(r#"{"chat_template": "a\n{% if %}"}"#).starts_with("chat template, line 2: "));
    assert_eq!(message(&[("tokenizer.json", "")]).split(':').next(), Some("tokenizer.json"));
}

#[test]
fn one_tokenizer_serves_all_threads() {
    fn shared<T: Send + Sync>(_: &T) {}
    let tokenizer = Tokenizer::load(&folder("chatml")).unwrap();
    shared(&tokenizer);
    shared(&tokenizer.decode_stream(true));
}

#[test]
fn use_without_what_is_needed_is_an_error() {
    let missing = Tokenizer::load(&folder("templates")).unwrap_err();
    assert!(missing.to_string().ends_with("tokenizer.json: no such file; a model's folder needs one"), "{missing}");
    let tokenizer = Tokenizer::load(&folder("stories")).unwrap();
    let error = tokenizer.encode_chat(&[Message::new("user", "a")], true).unwrap_err();
    assert!(matches!(error, TokenizerError::NoChatTemplate { .. }), "{error}");
    assert!(matches!(tokenizer.decode(&[-1], true), Err(TokenizerError::IdRange { id: -1 })));
    let render = |source: &str| {
        let template = ChatTemplate::new(source, BTreeMap::new()).unwrap();
        template.render::<Message>(&[], false, &Map::new()).unwrap_err().to_string()
    };
    assert!(render("\n{{ nothing.a }}").starts_with("chat template, line 2: rendering failed: "));
    assert!(render("{{ strftime_now('%Q') }}").contains("strftime_now does not know the format `%Q`"));
    assert_eq!(render("{{ raise_exception('No ' ~ 1) }}"), "the chat template refuses these messages: No 1");
}

fn stream(tokenizer: &Tokenizer, ids: &[i64], skip_special: bool) -> Vec<String> {
    let mut stream = tokenizer.decode_stream(skip_special);
    let mut pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    pieces.push(stream.finish().unwrap());
    pieces
}

fn for_each_tokenizer(mut check: impl FnMut(&str, Tokenizer, &Value)) {
    let golden = golden("tokenizers.json");
    for case in golden["cases"].as_array().unwrap() {
        let name = text(&case["folder"]);
        let mut tokenizer = Tokenizer::load(&folder(name)).unwrap();
        tokenizer.set_render_time(text(&golden["time"])).unwrap();
        check(name, tokenizer, case);
    }
}

/// A folder that is removed when the test ends.
struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    fn new(name: &str) -> Self {
        Self(tempfile::Builder::new().prefix(&format!("echelon-tokenizer-{name}-")).tempdir().unwrap().keep())
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer").join(name)
}

fn golden(name: &str) -> Value {
    serde_json::from_slice(&fs::read(folder(name)).unwrap()).unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn ids(value: &Value) -> Vec<i64> {
    serde_json::from_value(value.clone()).unwrap()
}
