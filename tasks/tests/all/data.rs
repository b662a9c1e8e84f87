//! Rows from files.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use echelon_tasks::data::{
    DataError, FilterError, LoadReport, Loaded, Message, Pair, PairKeys, PromptKeys, PromptRow, PromptText,
    TrainingExample, TrainingKeys, Verdict, load_pairs, load_training,
};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use crate::{Folder, golden};

fn keys(prompt: &str, label: Option<&str>) -> PromptKeys {
    PromptKeys { prompt: prompt.to_owned(), label: label.map(str::to_owned) }
}

fn pair_keys() -> PairKeys {
    let [prompt, chosen, rejected] = ["prompt", "chosen", "rejected"].map(str::to_owned);
    PairKeys { prompt, chosen, rejected }
}

/// Prompts judged one by one.
fn load_prompts(
    path: &Path,
    keys: &PromptKeys,
    source: usize,
    max_samples: Option<usize>,
    filter: &mut dyn FnMut(&PromptRow) -> Result<Verdict, FilterError>,
) -> Result<Loaded<PromptRow>, DataError> {
    let judge = &mut |rows: &Arc<Vec<PromptRow>>| rows.iter().map(&mut *filter).collect::<Vec<_>>();
    echelon_tasks::data::load_prompts(path, keys, source, max_samples, (1, judge))
}

fn load(path: &Path, keys: &PromptKeys) -> Result<Loaded<PromptRow>, DataError> {
    load_prompts(path, keys, 0, None, &mut |_| Ok(Verdict::Keep))
}

/// Prompt and label of every row of `path`, under the keys `q` and `a`.
fn questions(path: &Path) -> Vec<(String, Option<String>)> {
    let loaded = load(path, &keys("q", Some("a"))).unwrap();
    let text = |prompt| match prompt {
        PromptText::Plain(text) => text,
        PromptText::Chat(messages) => panic!("{messages:?}"),
    };
    loaded.rows.into_iter().map(|row| (text(row.prompt), row.label)).collect()
}

/// The error for `content` in a file of that name, with the file's path shown as FILE.
fn problem(name: &str, content: impl AsRef<[u8]>) -> String {
    let folder = Folder::new();
    let path = folder.write(name, content);
    let message = load(&path, &keys("q", Some("a"))).unwrap_err().to_string();
    message.replace(path.to_str().unwrap(), "FILE")
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}

fn plain(text: &str) -> PromptText {
    PromptText::Plain(text.to_owned())
}

const LINES: &str = "{\"q\": \"one\", \"a\": 1}\n\n{\"q\": \"two\", \"a\": \"2\"}\r\n{\"q\": \"drei\\n\", \"a\": true, \"z\": 0}\n{\"a\": null, \"q\": \"\"}";

fn lines_rows() -> Vec<(String, Option<String>)> {
    let rows = [("one", Some("1")), ("two", Some("2")), ("drei\n", Some("true")), ("", None)];
    rows.map(|(q, a)| (q.to_owned(), a.map(str::to_owned))).to_vec()
}

fn gzip(content: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(content.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn every_text_format_gives_the_same_rows() {
    let folder = Folder::new();
    let objects: Vec<&str> = LINES.lines().filter(|line| !line.is_empty()).collect();
    let array = format!("[{}]", objects.join(",\n"));
    let members: Vec<u8> = objects.iter().flat_map(|line| gzip(&format!("{line}\n"))).collect();
    for path in [
        folder.write("lines.jsonl", LINES),
        folder.write("lines.ndjson", format!("\u{feff}{LINES}\n\n")),
        folder.write("lines.jsonl.gz", gzip(LINES)),
        folder.write("several members.jsonl.gz", members),
        folder.write("array.json", &array),
        folder.write("array.json.gz", gzip(&array)),
        folder.write("data.JSON", format!("{{\"version\": 2, \"data\": {array}}}")),
        folder.write("really lines.json", LINES),
    ] {
        assert_eq!(questions(&path), lines_rows(), "{}", path.display());
    }
}

#[test]
fn a_folder_is_read_in_order_of_names() {
    let folder = Folder::new();
    folder.write("b.json", r#"[{"q": "3", "a": 3}]"#);
    folder.write("a.jsonl", "{\"q\": \"1\", \"a\": 1}\n{\"q\": \"2\", \"a\": 2}\n");
    folder.write("c.jsonl.gz", gzip("{\"q\": \"4\", \"a\": 4}"));
    folder.write("README.md", "not data");
    folder.write(".hidden.jsonl", "not data");
    let prompts: Vec<String> = questions(&folder.0).into_iter().map(|(prompt, _)| prompt).collect();
    assert_eq!(prompts, ["1", "2", "3", "4"]);
    let rows = load_prompts(&folder.0, &keys("q", None), 6, Some(3), &mut |_| Ok(Verdict::Keep)).unwrap().rows;
    assert_eq!(
        rows.iter().map(|row| (row.source, row.row, row.label.clone())).collect::<Vec<_>>(),
        [(6, 0, None), (6, 1, None), (6, 2, None)]
    );
}

#[test]
fn bad_files_are_named_with_line_and_key() {
    for (name, content, expected) in [
        (
            "x.jsonl",
            "{\"q\": \"1\", \"a\": 1}\n{\"question\": \"2\", \"a\": 1}\n",
            "FILE:2: no key \"q\"; the row has \"question\", \"a\"",
        ),
        ("x.jsonl", "{}", "FILE:1: no key \"q\"; the row has no keys"),
        ("x.jsonl", "{\"q\": \"1\"}", "FILE:1: no key \"a\"; the row has \"q\""),
        (
            "x.jsonl",
            "{\"q\": 7, \"a\": 1}",
            "FILE:1: key \"q\": expected a string or a list of messages, found a number; the row has \"q\", \"a\"",
        ),
        (
            "x.jsonl",
            "{\"q\": \"1\", \"a\": [1]}",
            "FILE:1: key \"a\": expected a string, a number or a bool, found a list; the row has \"q\", \"a\"",
        ),
        (
            "x.jsonl",
            "{\"q\": [{\"role\": \"user\", \"text\": \"x\"}], \"a\": 1}",
            "FILE:1: key \"q\": expected a list of messages {\"role\": string, \"content\": string}, \
             found at message 1 {\"role\": a string, \"text\": a string}; the row has \"q\", \"a\"",
        ),
        ("x.jsonl", "\n{\"q\": }", "FILE:2: not valid JSON: expected value at line 1 column 7"),
        ("x.jsonl", "[1]", "FILE:1: expected an object with one key per column, found a list"),
        (
            "x.json",
            "[{\"q\": \"1\", \"a\": 1}, 5]",
            "FILE: row 2: expected an object with one key per column, found a number",
        ),
        ("x.json", "[\n{\"q\": \"1\"\n", "FILE:3: not valid JSON: EOF while parsing an object at line 3 column 0"),
        (
            "x.json",
            "{\"rows\": []}",
            "FILE: expected an array of rows, or an object whose \"data\" is one; found an object with 1 keys, none of them \"data\"",
        ),
        ("x.json", "3", "FILE: expected an array of rows, or an object whose \"data\" is one; found a number"),
        ("x.json", " \n", "no data in FILE: the file has no rows"),
        ("x.json", "[]", "no data in FILE: the file has no rows"),
        ("x.jsonl", "", "no data in FILE: the file has no rows"),
        (
            "x.csv",
            "q,a\n",
            "cannot read FILE: expected a .jsonl, .jsonl.gz, .json or .parquet file, or a folder of them",
        ),
    ] {
        assert_eq!(problem(name, content), expected);
    }
    assert!(problem("x.jsonl", b"{\"q\": \"\xff\"}").starts_with("FILE:1: not valid JSON: invalid unicode"));
    assert!(problem("x.jsonl.gz", &gzip(&LINES.repeat(100))[..60]).contains(": cannot read the line: "));
    assert!(problem("x.jsonl.gz", LINES).starts_with("FILE:1: cannot read the line: invalid gzip header"));
    assert!(
        problem("x.parquet", "PAR1 and then nothing")
            .starts_with("cannot read FILE: not a whole parquet file, near row 1: ")
    );

    let folder = Folder::new();
    let missing = load(&folder.0.join("none.jsonl"), &keys("q", None)).unwrap_err().to_string();
    assert!(missing.starts_with("cannot read ") && missing.contains("none.jsonl: No such file"), "{missing}");
    let empty = load(&folder.0, &keys("q", None)).unwrap_err().to_string();
    assert!(empty.starts_with("no data in folder "), "{empty}");
}

#[test]
fn dropped_rows_are_counted_by_reason() {
    let folder = Folder::new();
    let path =
        folder.write("x.jsonl", (0..10).map(|i| format!("{{\"q\": \"{}\"}}\n", "x".repeat(i))).collect::<String>());
    let at_most = |max: usize| {
        move |row: &PromptRow| -> Result<Verdict, FilterError> {
            let PromptText::Plain(text) = &row.prompt else { unreachable!() };
            Ok(match text.len() {
                0 => Verdict::Drop("blank".to_owned()),
                length if length > max => Verdict::Drop(format!("longer than {max}")),
                _ => Verdict::Keep,
            })
        }
    };
    let loaded = load_prompts(&path, &keys("q", None), 0, None, &mut at_most(7)).unwrap();
    assert_eq!(loaded.rows.iter().map(|row| row.row).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7]);
    let LoadReport { num_read, num_kept, .. } = loaded.report;
    assert_eq!((num_read, num_kept, loaded.report.num_dropped()), (10, 7, 3));
    let report = loaded.report.to_string().replace(path.to_str().unwrap(), "FILE");
    assert_eq!(
        report,
        "10 rows read, 7 kept, 3 dropped: 1 blank, the first at FILE:1; 2 longer than 7, the first at FILE:9"
    );

    let few = load_prompts(&path, &keys("q", None), 0, Some(2), &mut at_most(7)).unwrap();
    assert_eq!((few.rows.len(), few.report.num_read), (2, 3));

    let none = load_prompts(&path, &keys("q", None), 0, None, &mut at_most(0)).unwrap_err().to_string();
    let expected = "no usable row in FILE: 10 rows read, 0 kept, 10 dropped: 1 blank, the first at FILE:1; 9 longer than 0, the first at FILE:2";
    assert_eq!(none.replace(path.to_str().unwrap(), "FILE"), expected);

    let failed =
        load_prompts(&path, &keys("q", None), 0, None, &mut |_| Err("no template".into())).unwrap_err().to_string();
    assert!(failed.ends_with("x.jsonl:1: cannot check the row: no template"), "{failed}");
}

#[test]
fn chat_prompts() {
    let folder = Folder::new();
    let path = folder.write(
        "x.jsonl",
        r#"{"q": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
{"q": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}"#,
    );
    let rows = load(&path, &keys("q", None)).unwrap().rows;
    assert_eq!(rows[0].prompt, PromptText::Chat(vec![message("system", "s"), message("user", "ab")]));
    assert_eq!(rows[1].prompt, PromptText::Chat(vec![message("user", "h"), message("assistant", "g")]));
}

#[test]
fn parquet_as_pyarrow_writes_it() {
    let path = golden("prompts.parquet");
    let labels = |key| -> Vec<Option<String>> {
        load(&path, &keys("question", Some(key))).unwrap().rows.into_iter().map(|row| row.label).collect()
    };
    let texts = |expected: [&str; 2]| vec![Some(expected[0].to_owned()), Some(expected[1].to_owned()), None];
    assert_eq!(labels("answer"), texts(["2", "-7"]));
    assert_eq!(labels("share"), texts(["0.5", "1.25"]));
    assert_eq!(labels("easy"), texts(["true", "false"]));
    let rows = load(&path, &keys("chat", None)).unwrap().rows;
    assert_eq!(rows[1].prompt, PromptText::Chat(vec![message("system", "be brief"), message("user", "Zürich — où?")]));
    let plain_rows = load(&path, &keys("question", None)).unwrap().rows;
    assert_eq!(plain_rows[1].prompt, plain("Zürich — où?"));
    let missing = load(&path, &keys("prompt", None)).unwrap_err().to_string();
    assert!(
        missing.ends_with("prompts.parquet: row 1: no key \"prompt\"; the row has \"question\", \"chat\", \"answer\", \"share\", \"easy\""),
        "{missing}"
    );
    let pairs = load_pairs(&golden("pairs.parquet"), &pair_keys(), None, &mut |_| Ok(Verdict::Keep)).unwrap().rows;
    let chat = |role: &str, content: &str| PromptText::Chat(vec![message(role, content)]);
    let (chosen, rejected) = (chat("assistant", "hi, how are you?"), chat("assistant", "go away"));
    assert_eq!(pairs, [Pair { prompt: Some(chat("user", "hello")), chosen, rejected }]);
}

#[test]
fn parquet_round_trip() {
    let folder = Folder::new();
    let path = folder.0.join("x.parquet");
    let schema = Arc::new(
        parse_message_type("message rows { required binary q (UTF8); required int64 a; required binary raw; }")
            .unwrap(),
    );
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
    for group in 0..3_i64 {
        let text = |row: i64| ByteArray::from(format!("q{}", 100 * group + row).into_bytes());
        let texts: Vec<ByteArray> = (0..100).map(text).collect();
        let numbers: Vec<i64> = (0..100).map(|row| 100 * group + row).collect();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&numbers, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
    let expected: Vec<_> = (0..300).map(|row| (format!("q{row}"), Some(row.to_string()))).collect();
    assert_eq!(questions(&path), expected);
    // bytes without a string mark, as older writers leave them
    let raw = load(&path, &keys("raw", None)).unwrap().rows;
    assert_eq!(raw[299].prompt, plain("q299"));
}

/// Cuts and changed bytes all over the file: an error or rows, never a panic.
#[test]
fn damaged_parquet_is_an_error() {
    let folder = Folder::new();
    let whole = std::fs::read(golden("prompts.parquet")).unwrap();
    for end in (0..whole.len()).step_by(11) {
        let path = folder.write("cut.parquet", &whole[..end]);
        assert!(matches!(load(&path, &keys("question", None)), Err(DataError::Parquet { .. })), "cut at {end}");
    }
    for (index, at) in (0..whole.len()).step_by(5).enumerate() {
        let mut bytes = whole.clone();
        bytes[at] ^= [0x01, 0x80, 0xff][index % 3];
        let _rows_or_error = load(&folder.write("changed.parquet", bytes), &keys("question", Some("answer")));
    }
}

fn training(content: &str) -> Result<Vec<TrainingExample>, String> {
    let folder = Folder::new();
    let path = folder.write("x.jsonl", content);
    let [messages, prompt, completion, text] = ["messages", "prompt", "completion", "text"].map(str::to_owned);
    let keys = TrainingKeys { messages, prompt, completion, text };
    let loaded = load_training(&path, &keys, None, &mut |_| Ok(Verdict::Keep));
    loaded.map(|loaded| loaded.rows).map_err(|error| error.to_string().replace(path.to_str().unwrap(), "FILE"))
}

#[test]
fn training_examples_take_the_form_the_row_has() {
    let rows = training(
        r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "prompt": "unused"}
{"prompt": "2+2=", "completion": " 4"}
{"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]}
{"text": "once upon a time"}
{"text": "\n\nHuman: hi\n\nAssistant: hello"}"#,
    );
    let completion =
        |prompt, completion: &str| TrainingExample::Completion { prompt, completion: completion.to_owned() };
    let expected = [
        TrainingExample::Conversation(vec![message("user", "a"), message("assistant", "b")]),
        completion(plain("2+2="), " 4"),
        completion(PromptText::Chat(vec![message("user", "2+2?")]), "4"),
        TrainingExample::Text("once upon a time".to_owned()),
        TrainingExample::Conversation(vec![message("user", "hi"), message("assistant", "hello")]),
    ];
    assert_eq!(rows.unwrap(), expected);
}

#[test]
fn training_rows_of_no_form_are_errors() {
    for (content, expected) in [
        (r#"{"question": "a"}"#, "FILE:1: no key \"messages\" or \"completion\" or \"text\"; the row has \"question\""),
        (r#"{"completion": "a"}"#, "FILE:1: no key \"prompt\"; the row has \"completion\""),
        (r#"{"text": 3}"#, "FILE:1: key \"text\": expected a string, found a number; the row has \"text\""),
        (
            r#"{"messages": "a"}"#,
            "FILE:1: key \"messages\": expected a list of messages, found a string; the row has \"messages\"",
        ),
        (
            r#"{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}"#,
            "FILE:1: key \"completion\": expected a string or one assistant message, found 1 messages starting with the user's; \
             the row has \"prompt\", \"completion\"",
        ),
    ] {
        assert_eq!(training(content).unwrap_err(), expected);
    }
    assert!(training(r#"{"messages": []}"#).unwrap_err().contains("found an empty list"));
}

fn pairs(content: &str) -> Result<Loaded<Pair>, DataError> {
    let folder = Folder::new();
    load_pairs(&folder.write("x.jsonl", content), &pair_keys(), None, &mut |_| Ok(Verdict::Keep))
}

#[test]
fn pairs_of_text() {
    let rows = pairs(
        r#"{"prompt": "q", "chosen": "a", "rejected": "b"}
{"chosen": "a", "rejected": "b"}
{"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}"#,
    );
    let answer = |text: &str| PromptText::Chat(vec![message("assistant", text)]);
    let expected = [
        Pair { prompt: Some(plain("q")), chosen: plain("a"), rejected: plain("b") },
        Pair { prompt: None, chosen: plain("a"), rejected: plain("b") },
        Pair { prompt: Some(PromptText::Chat(vec![message("user", "q")])), chosen: answer("a"), rejected: answer("b") },
    ];
    assert_eq!(rows.unwrap().rows, expected);
}

#[test]
fn pairs_of_transcripts_share_their_common_start() {
    let start = r"\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:";
    let content = format!(
        "{{\"chosen\": \"{start} so\", \"rejected\": \"{start}\"}}\n{{\"chosen\": \"{start} so\", \"rejected\": \"{start} so\"}}\n\
         {{\"chosen\": \"{start} a\\n\\nHuman: x\", \"rejected\": \"{start} a\\n\\nHuman: y\\n\\nAssistant: z\"}}"
    );
    let loaded = pairs(&content).unwrap();
    let prompt =
        Some(PromptText::Chat(vec![message("user", "hi"), message("assistant", "hello"), message("user", "why?")]));
    let side = |messages: &[(&str, &str)]| {
        PromptText::Chat(messages.iter().map(|(role, content)| message(role, content)).collect())
    };
    let expected = [
        Pair { prompt: prompt.clone(), chosen: side(&[("assistant", "so")]), rejected: side(&[("assistant", "")]) },
        Pair {
            prompt,
            chosen: side(&[("assistant", "a"), ("user", "x")]),
            rejected: side(&[("assistant", "a"), ("user", "y"), ("assistant", "z")]),
        },
    ];
    assert_eq!(loaded.rows, expected);
    assert_eq!(loaded.report.dropped["with equal chosen and rejected sides"].count, 1);
}

#[test]
fn pairs_of_messages_keep_their_prompt_once() {
    let chosen = r#"[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]"#;
    let rejected = chosen.replace("\"a\"", "\"b\"");
    let side = |text: &str| PromptText::Chat(vec![message("assistant", text)]);
    let expected =
        Pair { prompt: Some(PromptText::Chat(vec![message("user", "q")])), chosen: side("a"), rejected: side("b") };
    for prompt in ["\"q\"", "null", r#"[{"role": "user", "content": "q"}]"#] {
        let rows =
            pairs(&format!("{{\"prompt\": {prompt}, \"chosen\": {chosen}, \"rejected\": {rejected}}}")).unwrap().rows;
        assert_eq!(rows, std::slice::from_ref(&expected), "{prompt}");
    }
    let answers = r#"{"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}"#;
    assert_eq!(pairs(answers).unwrap().rows, [expected]);
    let mixed = pairs(&format!("{{\"chosen\": {chosen}, \"rejected\": \"b\"}}")).unwrap_err().to_string();
    assert!(mixed.contains("key \"rejected\": expected messages like the chosen side, found a string"), "{mixed}");
    assert!(
        pairs(r#"{"chosen": "a", "reject": "b"}"#)
            .unwrap_err()
            .to_string()
            .contains("no key \"rejected\"; the row has \"chosen\", \"reject\"")
    );
}
