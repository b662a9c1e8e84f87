//! `generate`, `score` and `import` as their users meet them: the real programs, their files, messages and exit codes.
//!
//! Error messages are snapshots in `snapshots/inference/`; `ECHELON_BLESS=1` writes them anew. Tests of the real
//! SmolLM2-135M-Instruct run when `ECHELON_SMOLLM2` names its folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

const TOLERANCE: f64 = 1e-4;
const GENERATE: &str = env!("CARGO_BIN_EXE_generate");
const SCORE: &str = env!("CARGO_BIN_EXE_score");
const IMPORT: &str = env!("CARGO_BIN_EXE_import");

/// A folder of a test's own files, with the programs' ways to run in it.
struct Desk(TempDir);

impl Desk {
    fn new() -> Desk {
        Desk(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    /// Runs in this folder; file names in messages are then without its path.
    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let threads = std::env::var("OMP_NUM_THREADS").unwrap_or("1".into());
        let mut command = Command::new(program);
        command.current_dir(self.0.path()).args(arguments).env("OMP_NUM_THREADS", threads);
        command.output().unwrap()
    }

    /// Runs a program over `rows`; what it wrote, and its stderr.
    fn answers(&self, program: &str, model: &Path, rows: &[Value], more: &[&str]) -> (Vec<Value>, String) {
        self.write("in.jsonl", &rows.iter().map(|row| format!("{row}\n")).collect::<String>());
        let input = if program == GENERATE { "--prompts" } else { "--input" };
        let model = model.to_str().unwrap();
        let mut arguments = vec!["--model", model, input, "in.jsonl", "--output", "out.jsonl"];
        arguments.extend(more);
        let output = self.run(program, &arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        let lines = fs::read_to_string(self.path("out.jsonl")).unwrap();
        (lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), stderr)
    }

    fn scores(&self, model: &Path, rows: &[Value]) -> Vec<Value> {
        self.answers(SCORE, model, rows, &[]).0
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden").join(name)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().filter(|x| !x.is_null()).map(|x| x.as_f64().unwrap()).collect()
}

fn ids(list: &Value) -> Vec<i64> {
    list.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

#[track_caller]
fn assert_close(ours: &[f64], theirs: &[f64]) {
    assert_eq!(ours.len(), theirs.len());
    let worst = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst <= TOLERANCE, "differ by {worst:e}");
}

#[test]
fn score_equals_transformers_for_every_architecture() {
    let desk = Desk::new();
    let mut heads = [0, 0];
    for entry in fs::read_dir(golden("checkpoints")).unwrap() {
        let folder = entry.unwrap().path();
        let expected = read_json(&folder.join("expected.json"));
        let sequences = expected["sequences"].as_array().unwrap();
        let rows: Vec<Value> = sequences.iter().map(|s| json!({"token_ids": s["token_ids"]})).collect();
        let answers = desk.scores(&folder, &rows);
        assert_eq!(answers.len(), sequences.len());
        if expected.get("scores").is_some() {
            let scores: Vec<f64> = answers.iter().map(|answer| answer["score"].as_f64().unwrap()).collect();
            assert_close(&scores, &numbers(&expected["scores"]));
            heads[1] += 1;
            continue;
        }
        for (answer, sequence) in answers.iter().zip(sequences) {
            assert!(answer["logprobs"][0].is_null());
            assert_close(&numbers(&answer["logprobs"]), &numbers(&sequence["logprobs"]));
        }
        heads[0] += 1;
    }
    assert!(heads[0] >= 8 && heads[1] == 2, "{heads:?}");
}

#[test]
fn a_lone_token_has_no_logprob() {
    let rows = [json!({"token_ids": [5]}), json!({"token_ids": [5, 6]})];
    let answers = Desk::new().scores(&golden("checkpoints/llama_tied_f32"), &rows);
    assert_eq!(answers[0], json!({"logprobs": [null]}));
    assert_eq!(numbers(&answers[1]["logprobs"]).len(), 1);
}

/// Greedy tokens against the obvious way: score every continuation by every token and take the best.
#[test]
fn greedy_is_the_best_scored_token_again_and_again() {
    let desk = Desk::new();
    for model in ["llama_tied_f32", "qwen3_head_dim", "mistral_sliding_window"] {
        let folder = golden("checkpoints").join(model);
        let vocabulary = read_json(&folder.join("config.json"))["vocab_size"].as_i64().unwrap();
        let prompts = [vec![9, 8, 7, 6, 5, 4, 3], vec![3]];
        let rows: Vec<Value> = prompts.iter().map(|prompt| json!({"prompt_token_ids": prompt})).collect();
        let options = ["--temperature", "0", "--max-new-tokens", "4"];
        let (responses, stderr) = desk.answers(GENERATE, &folder, &rows, &options);
        let mut candidates = Vec::new();
        for (prompt, response) in prompts.iter().zip(&responses) {
            let all = [prompt.clone(), ids(&response["token_ids"])].concat();
            for length in prompt.len()..all.len() {
                candidates
                    .extend((0..vocabulary).map(|next| json!({"token_ids": ([&all[..length], &[next]].concat())})));
            }
            assert_eq!(ids(&response["prompt_token_ids"]), *prompt);
            assert_eq!((all.len(), response["finish_reason"].as_str()), (prompt.len() + 4, Some("length")));
        }
        let scores = desk.scores(&folder, &candidates);
        let scores: Vec<f64> = scores.iter().map(|a| *numbers(&a["logprobs"]).last().unwrap()).collect();
        let tokens = responses.iter().flat_map(|response| ids(&response["token_ids"]));
        let logprobs = responses.iter().flat_map(|response| numbers(&response["logprobs"]));
        for ((token, logprob), scores) in tokens.zip(logprobs).zip(scores.chunks(vocabulary as usize)) {
            let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap();
            assert_eq!(token, best as i64, "{model}");
            assert_close(&[logprob], &[scores[best]]);
        }
        let timing: Value = serde_json::from_str(stderr.lines().last().unwrap()).unwrap();
        assert_eq!((&timing["prefill_tokens"], &timing["generated_tokens"]), (&json!(8), &json!(8)));
        let per_second = timing["tokens_per_second"].as_f64().unwrap();
        assert!((per_second * timing["seconds"].as_f64().unwrap() - 8.0).abs() < 1e-6);
    }
}

#[test]
fn sampled_tokens_follow_the_seed_and_not_the_neighbours() {
    let (desk, folder) = (Desk::new(), golden("checkpoints/llama_tied_f32"));
    let rows: Vec<Value> = (1..6).map(|id| json!({"prompt_token_ids": [id, 2 * id]})).collect();
    let sample = |seed, slots| {
        desk.answers(GENERATE, &folder, &rows, &["--max-new-tokens", "12", "--seed", seed, "--max-sequences", slots]).0
    };
    let tokens = |rows: Vec<Value>| rows.iter().map(|row| ids(&row["token_ids"])).collect::<Vec<_>>();
    let first = sample("7", "64");
    assert_eq!(tokens(first.clone()), tokens(sample("7", "2")));
    assert_ne!(tokens(first), tokens(sample("8", "64")));
}

/// The weights of an imported file against those that gguf's own Python package reads from it.
#[test]
fn an_imported_model_scores_as_the_weights_in_its_file() {
    let desk = Desk::new();
    let expected = read_json(&golden("gguf/expected.json"));
    for model in ["llama_legacy_blocks", "qwen3_half", "llama3_rope", "mistral_sentencepiece"] {
        let source = golden("gguf").join(format!("{model}.gguf"));
        let imported = desk.path(model);
        let output = desk.run(IMPORT, &[source.to_str().unwrap(), "--output", imported.to_str().unwrap()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let reference = desk.path(&format!("{model}-reference"));
        fs::create_dir(&reference).unwrap();
        fs::copy(imported.join("config.json"), reference.join("config.json")).unwrap();
        fs::copy(golden("gguf").join(format!("{model}.safetensors")), reference.join("model.safetensors")).unwrap();

        let encodings: Vec<&Value> = expected[model]["encodings"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|e| !ids(&e["token_ids"]).is_empty())
            .collect();
        let texts: Vec<Value> = encodings.iter().map(|e| json!({"text": e["text"]})).collect();
        let tokens: Vec<Value> = encodings.iter().map(|e| json!({"token_ids": e["token_ids"]})).collect();
        let ours = desk.scores(&imported, &texts);
        let theirs = desk.scores(&reference, &tokens);
        assert!(ours.len() >= 8);
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_close(&numbers(&ours["logprobs"]), &numbers(&theirs["logprobs"]));
        }

        let text = encodings[0];
        let rows = [json!({"prompt": text["text"]}), json!({"prompt_token_ids": text["token_ids"]})];
        let (responses, _) =
            desk.answers(GENERATE, &imported, &rows, &["--temperature", "0", "--max-new-tokens", "6", "--ignore-eos"]);
        assert_eq!(responses[0], responses[1], "text and its token ids are the same prompt");
        assert_eq!(responses[0]["prompt_token_ids"], text["token_ids"]);
        assert!(responses[0]["text"].is_string());
    }
}

/// Copies a golden checkpoint, so that a test can break it.
fn copied(desk: &Desk, model: &str) -> PathBuf {
    let to = desk.path("model");
    fs::create_dir(&to).unwrap();
    for entry in fs::read_dir(golden("checkpoints").join(model)).unwrap() {
        let from = entry.unwrap().path();
        fs::copy(&from, to.join(from.file_name().unwrap())).unwrap();
    }
    to
}

/// Replaces text of the same length in the header of a checkpoint.
fn edit_weights(folder: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).expect("the name is in the header");
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    fs::write(path, bytes).unwrap();
}

/// Runs a program that must refuse (exit code 2, no output, nothing left behind) with the message of the snapshot.
#[track_caller]
fn assert_refused(desk: &Desk, program: &str, arguments: &[&str], snapshot: &str) {
    let before = desk.names();
    let output = desk.run(program, arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(desk.names(), before, "{snapshot}: files were left");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/inference").join(format!("{snapshot}.txt"));
    if std::env::var_os("ECHELON_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &stderr).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(stderr, expected, "{snapshot}: ECHELON_BLESS=1 accepts the new message");
}

#[test]
fn lines_that_cannot_be_used_are_named() {
    let desk = Desk::new();
    copied(&desk, "llama_tied_f32");
    let cases = [
        ("bad-json", "{\"token_ids\": [1, 2]}\n{\"token_ids\": [1,\n"),
        ("not-an-object", "[1, 2]\n"),
        ("wrong-key", "{\"token_ids\": [1, 2]}\n\n{\"tokens\": [1, 2], \"id\": 4}\n"),
        ("no-key", "{}\n"),
        ("both-keys", "{\"token_ids\": [1], \"text\": \"a\"}\n"),
        ("wrong-type", "{\"token_ids\": \"1 2\"}\n"),
        ("wrong-element", "{\"token_ids\": [1, 2.5]}\n"),
        ("text-not-text", "{\"text\": 5}\n"),
        ("no-tokens", "{\"token_ids\": []}\n"),
        ("outside-vocabulary", "{\"token_ids\": [1, 2]}\n{\"token_ids\": [1, 999999]}\n"),
        ("negative-id", "{\"token_ids\": [-1]}\n"),
        ("no-tokenizer", "{\"text\": \"hello\"}\n"),
        ("empty-file", "\n"),
    ];
    for (name, text) in cases {
        desk.write("in.jsonl", text);
        let arguments = ["--model", "model", "--input", "in.jsonl", "--output", "out.jsonl"];
        assert_refused(&desk, SCORE, &arguments, name);
    }
    desk.write("prompts.jsonl", "{\"promt\": \"x\"}\n");
    let arguments = ["--model", "model", "--prompts", "prompts.jsonl", "--output", "out.jsonl"];
    assert_refused(&desk, GENERATE, &arguments, "generate-wrong-key");
}

#[test]
fn arguments_and_files_that_cannot_be_used_are_named() {
    let desk = Desk::new();
    copied(&desk, "llama_tied_f32");
    desk.write("in.jsonl", "{\"token_ids\": [1, 2]}\n");
    desk.write("prompts.jsonl", "{\"prompt_token_ids\": [1, 2]}\n");
    let score = |model: &str, input: &str, output: &str, name: &str| {
        assert_refused(&desk, SCORE, &["--model", model, "--input", input, "--output", output], name);
    };
    score("nowhere", "in.jsonl", "out.jsonl", "no-such-model");
    score("model", "missing.jsonl", "out.jsonl", "missing-input");
    score("model", "in.jsonl", "nowhere/out.jsonl", "no-output-folder");
    score("model", "in.jsonl", "model", "output-is-a-folder");
    assert_refused(&desk, SCORE, &["--model", "model", "--input", "in.jsonl"], "output-not-given");
    assert_refused(&desk, SCORE, &["--modle", "model"], "unknown-option");
    let generate = |more: &[&str], name: &str| {
        let arguments = [&["--model", "model", "--prompts", "prompts.jsonl", "--output", "out.jsonl"], more].concat();
        assert_refused(&desk, GENERATE, &arguments, name);
    };
    generate(&["--temperature", "-1"], "negative-temperature");
    generate(&["--max-new-tokens", "many"], "max-new-tokens-not-a-number");
    generate(&["--max-new-tokens", "0"], "max-new-tokens-zero");
    generate(&["--dtype", "int8"], "unknown-dtype");
    assert_refused(&desk, IMPORT, &["missing.gguf", "--output", "imported"], "import-missing-source");
    assert_refused(&desk, IMPORT, &["in.jsonl", "--output", "imported"], "import-not-gguf");
    let source = golden("gguf/qwen3_half.gguf");
    assert_refused(&desk, IMPORT, &[source.to_str().unwrap(), "--output", "model"], "import-occupied");
}

#[test]
fn models_that_cannot_be_used_are_named() {
    type Break = fn(&Path);
    let cases: [(&str, &str, Break); 7] = [
        ("truncated-weights", "llama_tied_f32", |folder| {
            let path = folder.join("model.safetensors");
            let bytes = fs::read(&path).unwrap();
            fs::write(path, &bytes[..bytes.len() - 1000]).unwrap();
        }),
        ("missing-tensor", "llama_tied_f32", |folder| {
            edit_weights(folder, "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.pu_proj.weight");
        }),
        ("no-weights", "llama_tied_f32", |folder| fs::remove_file(folder.join("model.safetensors")).unwrap()),
        ("no-config", "llama_tied_f32", |folder| fs::remove_file(folder.join("config.json")).unwrap()),
        ("unsupported-architecture", "llama_tied_f32", |folder| {
            let mut config = read_json(&folder.join("config.json"));
            config["architectures"] = json!(["GooseForCausalLM"]);
            config["model_type"] = json!("goose");
            fs::write(folder.join("config.json"), config.to_string()).unwrap();
        }),
        ("wrong-shape", "llama_tied_f32", |folder| {
            let mut config = read_json(&folder.join("config.json"));
            config["intermediate_size"] = json!(config["intermediate_size"].as_i64().unwrap() + 1);
            fs::write(folder.join("config.json"), config.to_string()).unwrap();
        }),
        ("missing-shard", "llama3_sharded", |folder| {
            fs::remove_file(folder.join("model-00002-of-00003.safetensors")).unwrap();
        }),
    ];
    for (name, model, damage) in cases {
        let desk = Desk::new();
        damage(&copied(&desk, model));
        desk.write("in.jsonl", "{\"token_ids\": [1, 2]}\n");
        let arguments = ["--model", "model", "--input", "in.jsonl", "--output", "out.jsonl"];
        assert_refused(&desk, SCORE, &arguments, name);
    }
    let desk = Desk::new();
    copied(&desk, "llama_score");
    desk.write("prompts.jsonl", "{\"prompt_token_ids\": [1, 2]}\n");
    let arguments = ["--model", "model", "--prompts", "prompts.jsonl", "--output", "out.jsonl"];
    assert_refused(&desk, GENERATE, &arguments, "generate-from-a-score-head");
}

#[test]
fn a_program_does_not_write_over_its_own_input() {
    let desk = Desk::new();
    copied(&desk, "llama_tied_f32");
    let (prompts, input) = ("{\"prompt_token_ids\": [1, 2]}\n", "{\"token_ids\": [1, 2]}\n");
    desk.write("prompts.jsonl", prompts);
    desk.write("in.jsonl", input);
    std::os::unix::fs::symlink("in.jsonl", desk.path("other-name.jsonl")).unwrap();
    let arguments = ["--model", "model", "--prompts", "prompts.jsonl", "--output", "./prompts.jsonl"];
    assert_refused(&desk, GENERATE, &arguments, "generate-onto-its-input");
    let arguments = ["--model", "model", "--input", "in.jsonl", "--output", "other-name.jsonl"];
    assert_refused(&desk, SCORE, &arguments, "score-onto-its-input");
    assert_eq!(fs::read_to_string(desk.path("prompts.jsonl")).unwrap(), prompts);
    assert_eq!(fs::read_to_string(desk.path("in.jsonl")).unwrap(), input);
}

#[test]
fn a_response_stays_inside_the_models_context() {
    let desk = Desk::new();
    copied(&desk, "llama_tied_f32"); // 128 positions
    desk.write("prompts.jsonl", "{\"prompt_token_ids\": [1]}\n{\"prompt_token_ids\": [1, 2, 3]}\n");
    let generate = |tokens: &'static str| {
        let arguments = ["--model", "model", "--prompts", "prompts.jsonl", "--output", "out.jsonl"];
        [&arguments[..], &["--ignore-eos", "--max-new-tokens", tokens]].concat()
    };
    assert_refused(&desk, GENERATE, &generate("126"), "generate-beyond-the-context");
    let output = desk.run(GENERATE, &generate("125"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn what_was_there_stays_when_a_program_refuses() {
    let desk = Desk::new();
    copied(&desk, "llama_tied_f32");
    desk.write("in.jsonl", "{\"token_ids\": [1, 999999]}\n");
    desk.write("out.jsonl", "before\n");
    let output = desk.run(SCORE, &["--model", "model", "--input", "in.jsonl", "--output", "out.jsonl"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(fs::read_to_string(desk.path("out.jsonl")).unwrap(), "before\n");
}

/// The real model, where the machine has it: a folder in `ECHELON_SMOLLM2`, and transformers' numbers for it in the
/// file that `ECHELON_SMOLLM2_REFERENCE` names (`cases` of `prompt`, `prompt_ids`, `prompt_token_logprobs`,
/// `last_top10` and `greedy_ids`).
#[test]
fn smollm2_equals_transformers() {
    let Some(model) = std::env::var_os("ECHELON_SMOLLM2").map(PathBuf::from) else {
        println!("skipped: ECHELON_SMOLLM2 names no folder of SmolLM2-135M-Instruct");
        return;
    };
    let desk = Desk::new();
    let prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n";
    let (responses, _) =
        desk.answers(GENERATE, &model, &[json!({"prompt": prompt})], &["--temperature", "0", "--max-new-tokens", "8"]);
    assert!(responses[0]["text"].as_str().unwrap().contains("Paris"), "{}", responses[0]);

    let Some(reference) = std::env::var_os("ECHELON_SMOLLM2_REFERENCE") else { return };
    for case in read_json(Path::new(&reference))["cases"].as_array().unwrap() {
        let top = case["last_top10"].as_array().unwrap();
        let mut rows = vec![json!({"text": case["prompt"]})];
        rows.extend(
            top.iter().map(
                |pair| json!({"token_ids": ([ids(&case["prompt_ids"]), vec![pair[0].as_i64().unwrap()]].concat())}),
            ),
        );
        let answers = desk.scores(&model, &rows);
        assert_close(&numbers(&answers[0]["logprobs"]), &numbers(&case["prompt_token_logprobs"]));
        for (answer, pair) in answers[1..].iter().zip(top) {
            assert_close(&[*numbers(&answer["logprobs"]).last().unwrap()], &[pair[1].as_f64().unwrap()]);
        }
        let length = ids(&case["greedy_ids"]).len().to_string();
        let options = ["--temperature", "0", "--max-new-tokens", &length];
        let (responses, _) = desk.answers(GENERATE, &model, &[json!({"prompt": case["prompt"]})], &options);
        assert_eq!(responses[0]["token_ids"], case["greedy_ids"]);
    }
}
