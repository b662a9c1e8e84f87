//! What `generate` and `score` do: a frozen model around its mapped file, JSON lines in, JSON lines out.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use echelon_core::data::Rows;
use echelon_core::device::{self, DeviceChoice};
use echelon_core::progress::{Interrupt, Unwatched};
use echelon_core::rollout::{FinishReason, GenerationReport, Prompt, Prompts, SamplingConfig, Sequence};
use echelon_core::weight_layout::WeightLayout;
use echelon_core::zero::{PassConfig, Sharding, forward_rows};
use echelon_generation::{Engine, EngineConfig, Policy};
use echelon_models::config::{DecoderConfig, HeadKind};
use echelon_models::hub::resolve_model;
use echelon_models::tokenizer::Tokenizer;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::json_lines::{self, LineWriter, kind_of};
use crate::machine;
use crate::options::{Options, Usage};
use crate::program::{Failure, watch_signals};
use echelon_roles::models::{Held, check_folder, frozen_policy, frozen_scorer};

/// Rows of one forward pass of `score`.
const TOKENS_PER_MICRO_BATCH: i64 = 4096;

/// The command line of `generate`.
pub const GENERATE: Usage = Usage {
    text: "usage: generate --model DIR --prompts FILE.jsonl --output FILE.jsonl
  --model DIR           a Hugging Face folder or a hub id (owner/name[@revision])
  --prompts FILE        lines {\"prompt\": \"text\"} or {\"prompt_token_ids\": [..]}
  --output FILE         lines {\"prompt_token_ids\", \"token_ids\", \"text\", \"logprobs\", \"finish_reason\"} in the same order
  --max-new-tokens N    tokens of a response, at most (128)
  --temperature T       0 takes the most likely token (1.0)
  --seed S              of the random numbers (1)
  --ignore-eos          go on after an end-of-sequence token
  --max-sequences N     responses generated together, at most (64)
  --dtype NAME          auto, float32, bfloat16 or float64 (auto: bfloat16 on CUDA, else float32)
  --device NAME         auto, cpu or cuda (auto)",
    values: &[
        "model", "prompts", "output", "max-new-tokens", "temperature", "seed", "max-sequences", "dtype", "device",
    ],
    flags: &["ignore-eos"],
    words: &[],
};

/// The command line of `score`.
pub const SCORE: Usage = Usage {
    text: "usage: score --model DIR --input FILE.jsonl --output FILE.jsonl
  --model DIR           a Hugging Face folder or a hub id (owner/name[@revision])
  --input FILE          lines {\"token_ids\": [..]} or {\"text\": \"..\"}
  --output FILE         lines {\"logprobs\": [null, ..]} of a causal model, {\"score\": x} of one with a score head
  --dtype NAME          auto, float32, bfloat16 or float64 (auto: bfloat16 on CUDA, else float32)
  --device NAME         auto, cpu or cuda (auto)",
    values: &["model", "input", "output", "dtype", "device"],
    flags: &[],
    words: &[],
};

/// `generate`: one response to each prompt, then a JSON line of timing to stderr.
///
/// # Errors
/// [`Failure::Input`] for arguments, a model or a line that cannot be used; nothing is written then.
pub fn generate(options: &Options) -> Result<(), Failure> {
    let temperature = options.number("temperature", 1.0, "a number from 0")?;
    let max_new_tokens = options.number("max-new-tokens", 128, "a whole number from 1")?;
    let ignore_eos = options.flag("ignore-eos");
    let sampling = SamplingConfig { ignore_eos, ..SamplingConfig::uncut(temperature, max_new_tokens) };
    let seed = options.number("seed", 1, "a whole number from 0")?;
    let defaults = EngineConfig::default();
    let max_sequences = options.number("max-sequences", defaults.max_sequences, "a whole number from 1")?;
    check_counts(&sampling, max_sequences)?;

    let reader = Reader::open(options)?;
    let held = held(options)?;
    check_folder(&reader.folder, Some(HeadKind::Logits)).map_err(Failure::input)?;
    let (prompts, output) = files(options, "prompts")?;
    let rows = json_lines::read(prompts, |line| {
        let (token_ids, text) = reader.tokens(line, "prompt_token_ids", "prompt")?;
        reader.check_context(token_ids.len(), sampling.max_new_tokens)?;
        Ok((token_ids, text.unwrap_or_default()))
    })?;
    let rows = rows.into_iter().enumerate();
    let rows = rows.map(|(id, (token_ids, text))| Prompt { id: id as u64, token_ids, text, label: None }).collect();
    let prompts = Prompts { rows, samples_per_prompt: 1, seed, evaluation: false };
    let mut output = LineWriter::create(output)?;

    let policy = frozen_policy(&reader.folder, held, 1.0, (&Sharding::whole(), None)).map_err(Failure::input)?;
    let policy = Policy { model: &policy.model, head: policy.head.weight(), tokenizer: reader.tokenizer.as_ref() };
    let (weight_layout, _) = machine::weight_layout(&reader.config.shape(), held, None)?;
    let engine = Engine::new(EngineConfig { max_sequences, weight_layout, ..defaults });
    let (sequences, report) =
        interruptible(|interrupt| Ok(engine.generate(policy, &prompts, &sampling, &Unwatched, interrupt)?))?;
    for sequence in &sequences {
        output.write(&Generated::new(sequence))?;
    }
    output.finish()?;
    eprintln!("{}", timing(&report));
    Ok(())
}

/// `score`: log-probs of every token given its prefix, or a reward model's score.
///
/// # Errors
/// [`Failure::Input`] for arguments, a model or a line that cannot be used; nothing is written then.
pub fn score(options: &Options) -> Result<(), Failure> {
    let reader = Reader::open(options)?;
    let (input, output) = files(options, "input")?;
    let rows = json_lines::read(input, |line| {
        let (token_ids, _) = reader.tokens(line, "token_ids", "text")?;
        let wanted = vec![true; token_ids.len()];
        Ok((token_ids, wanted))
    })?;
    let rows = Rows::of_tokens(&rows);
    let held = held(options)?;
    check_folder(&reader.folder, None).map_err(Failure::input)?;
    let mut output = LineWriter::create(output)?;
    interruptible(|interrupt| match reader.config.head {
        HeadKind::Logits => write_logprobs(&reader.folder, held, &rows, interrupt, &mut output),
        HeadKind::Score => write_scores(&reader.folder, held, &rows, interrupt, &mut output),
    })?;
    output.finish()
}

fn write_logprobs(
    folder: &Path,
    held: Held,
    rows: &Rows,
    interrupt: &Interrupt,
    output: &mut LineWriter,
) -> Result<(), Failure> {
    let policy = frozen_policy(folder, held, 1.0, (&Sharding::whole(), None)).map_err(Failure::input)?;
    let mut outputs = Vec::new();
    forward_rows((&policy.model, &policy.head), &held.pass, rows, interrupt, |batch, read| {
        outputs.extend(batch.iter().zip(0..).map(|(&row, place)| (row, numbers(&read.logprobs.get(place)))));
    })?;
    for (row, numbers) in outputs {
        let given = &numbers[1..rows.lengths[row as usize] as usize];
        check_finite(row, given)?;
        let logprobs: Vec<Option<f64>> = std::iter::once(None).chain(given.iter().copied().map(Some)).collect();
        output.write(&json!({"logprobs": logprobs}))?;
    }
    Ok(())
}

fn write_scores(
    folder: &Path,
    held: Held,
    rows: &Rows,
    interrupt: &Interrupt,
    output: &mut LineWriter,
) -> Result<(), Failure> {
    let scorer = frozen_scorer(folder, held, (&Sharding::whole(), None)).map_err(Failure::input)?;
    let mut scores = Vec::new();
    forward_rows((&scorer.model, &scorer.head), &held.pass, rows, interrupt, |_, read| {
        scores.extend(numbers(&read.values));
    })?;
    for (row, &score) in scores.iter().enumerate() {
        check_finite(row as i64, &[score])?;
        output.write(&json!({"score": score}))?;
    }
    Ok(())
}

#[derive(Serialize)]
struct Generated<'a> {
    prompt_token_ids: &'a [i64],
    token_ids: &'a [i64],
    text: &'a str,
    logprobs: &'a [f32],
    finish_reason: FinishReason,
}

impl<'a> Generated<'a> {
    fn new(sequence: &'a Sequence) -> Generated<'a> {
        Generated {
            prompt_token_ids: &sequence.prompt_token_ids,
            token_ids: &sequence.response_token_ids,
            text: &sequence.response,
            logprobs: &sequence.rollout_logprobs,
            finish_reason: sequence.finish_reason,
        }
    }
}

/// The file of `--INPUT` and that of `--output`, which must not be the same one.
fn files<'a>(options: &'a Options, input: &str) -> Result<(&'a Path, &'a Path), Failure> {
    let (read, written) = (Path::new(options.required(input)?), Path::new(options.required("output")?));
    let file =
        |path: &Path| std::fs::metadata(path).ok().filter(Metadata::is_file).map(|file| (file.dev(), file.ino()));
    if file(written).is_some() && file(read) == file(written) {
        return Err(Failure::Input(format!(
            "--output {} is the file of --{input}, which would be lost: give it another name",
            written.display()
        )));
    }
    Ok((read, written))
}

/// A model's folder, and how lines become its token ids.
struct Reader {
    folder: PathBuf,
    config: DecoderConfig,
    /// Absent where the folder has none: then lines give token ids, and responses have no text.
    tokenizer: Option<Tokenizer>,
}

impl Reader {
    fn open(options: &Options) -> Result<Reader, Failure> {
        let folder = resolve_model(options.required("model")?, Path::new("")).map_err(Failure::input)?;
        let config = DecoderConfig::read(&folder).map_err(Failure::input)?;
        let has_tokenizer = folder.join("tokenizer.json").exists();
        let tokenizer = has_tokenizer.then(|| Tokenizer::load(&folder)).transpose().map_err(Failure::input)?;
        Ok(Reader { folder, config, tokenizer })
    }

    /// Token ids of a line under the key `ids`, or those of its text under the key `text`, and that text.
    fn tokens(&self, line: &Map<String, Value>, ids: &str, text: &str) -> Result<(Vec<i64>, Option<String>), String> {
        let (token_ids, given) = match (line.get(ids), line.get(text)) {
            (Some(list), None) => (token_ids(ids, list)?, None),
            (None, Some(Value::String(words))) => (self.encode(ids, words)?, Some(words.clone())),
            (None, Some(other)) => return Err(format!("`{text}`: expected a text, found {}", kind_of(other))),
            (Some(_), Some(_)) => return Err(format!("`{ids}` and `{text}` are both given: keep one of them")),
            (None, None) => {
                let keys: Vec<String> = line.keys().map(|key| format!("`{key}`")).collect();
                let found = if keys.is_empty() { "no key".into() } else { keys.join(", ") };
                return Err(format!("expected `{ids}` (a list of token ids) or `{text}` (a text), found {found}"));
            }
        };
        if token_ids.is_empty() {
            return Err("expected at least one token, found none".into());
        }
        let vocabulary = self.config.vocab_size;
        match token_ids.iter().find(|id| !(0..vocabulary).contains(id)) {
            Some(id) => Err(format!(
                "token id {id} is outside the model's vocabulary of {vocabulary} tokens (0 to {})",
                vocabulary - 1
            )),
            None => Ok((token_ids, given)),
        }
    }

    /// Refuses a response that would leave the positions the model was made for.
    fn check_context(&self, prompt_tokens: usize, max_new_tokens: usize) -> Result<(), String> {
        let (tokens, most) = (prompt_tokens + max_new_tokens, self.config.max_positions);
        if tokens as i64 <= most {
            return Ok(());
        }
        Err(format!(
            "{prompt_tokens} tokens and --max-new-tokens {max_new_tokens} make {tokens}, but the model's \
             max_position_embeddings is {most}: shorten the prompt, or lower --max-new-tokens"
        ))
    }

    fn encode(&self, ids: &str, text: &str) -> Result<Vec<i64>, String> {
        let Some(tokenizer) = &self.tokenizer else {
            return Err(format!(
                "a text needs a tokenizer, but {} has no tokenizer.json: give `{ids}`",
                self.folder.display()
            ));
        };
        tokenizer.encode(text).map_err(|error| error.to_string())
    }
}

fn token_ids(key: &str, value: &Value) -> Result<Vec<i64>, String> {
    let wrong = |found: String| format!("`{key}`: expected a list of token ids, found {found}");
    let list = value.as_array().ok_or_else(|| wrong(kind_of(value).into()))?;
    list.iter().map(|id| id.as_i64().ok_or_else(|| wrong(format!("{id} in it")))).collect()
}

/// Dtype and device by the options; a warning goes to stderr.
fn held(options: &Options) -> Result<Held, Failure> {
    let dtype = [
        ("auto", None),
        ("float32", Some(Kind::Float)),
        ("bfloat16", Some(Kind::BFloat16)),
        ("float64", Some(Kind::Double)),
    ];
    let kind = options.choice("dtype", &dtype)?;
    let devices = [("auto", DeviceChoice::Auto), ("cpu", DeviceChoice::Cpu), ("cuda", DeviceChoice::Cuda)];
    let chosen = device::choose(options.choice("device", &devices)?).map_err(Failure::input)?;
    if let Some(warning) = chosen.warning {
        eprintln!("warning: {warning}");
    }
    let automatic = if chosen.device == Device::Cpu { Kind::Float } else { Kind::BFloat16 };
    let pass = PassConfig {
        device: chosen.device,
        tokens_per_micro_batch: TOKENS_PER_MICRO_BATCH,
        activation_checkpointing: false,
    };
    let deterministic = chosen.device == Device::Cpu;
    Ok(Held { kind: kind.unwrap_or(automatic), pass, weight_layout: WeightLayout::Plain, deterministic })
}

fn check_counts(sampling: &SamplingConfig, max_sequences: usize) -> Result<(), Failure> {
    if !(sampling.temperature.is_finite() && sampling.temperature >= 0.0) {
        return Err(Failure::Input(format!(
            "--temperature: expected a number from 0, found `{}`",
            sampling.temperature
        )));
    }
    for (name, count) in [("max-new-tokens", sampling.max_new_tokens), ("max-sequences", max_sequences)] {
        if count == 0 {
            return Err(Failure::Input(format!("--{name}: expected a whole number from 1, found `0`")));
        }
    }
    Ok(())
}

/// Runs `work` so that Ctrl-C and SIGTERM end it in order, without output.
fn interruptible<T>(work: impl FnOnce(&Interrupt) -> Result<T, Failure>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(Failure::other)?;
    let interrupt = Interrupt::default();
    let _inside = runtime.enter();
    watch_signals(interrupt.clone());
    work(&interrupt).map_err(|failure| match failure {
        Failure::Interrupted(_) => Failure::Interrupted("nothing was written".into()),
        failure => failure,
    })
}

fn check_finite(row: i64, numbers: &[f64]) -> Result<(), Failure> {
    match numbers.iter().find(|number| !number.is_finite()) {
        Some(number) => {
            Err(Failure::Other(format!("row {row}: the model's output is {number}: are its weights whole?")))
        }
        None => Ok(()),
    }
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_device(Device::Cpu).to_kind(Kind::Double).flatten(0, -1)).expect("f64 numbers")
}

fn timing(report: &GenerationReport) -> Value {
    json!({
        "prefill_tokens": report.prefill_tokens,
        "generated_tokens": report.generated_tokens,
        "seconds": report.seconds,
        "tokens_per_second": report.generated_tokens as f64 / report.seconds,
    })
}
