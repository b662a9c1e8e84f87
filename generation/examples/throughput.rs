//! Tokens per second of the engine on a model folder: `cargo run -p echelon-generation --example throughput -- FOLDER`.
//!
//! 16 prompts of 32 tokens, 128 new tokens each; `--bf16` decodes in bfloat16.

use std::path::Path;
use std::time::Instant;

use echelon_core::progress::{Interrupt, Unwatched};
use echelon_core::random::{Domain, uniform};
use echelon_core::rollout::{Prompt, Prompts, SamplingConfig};
use echelon_generation::{Engine, EngineConfig, Policy};
use echelon_models::checkpoint::Checkpoint;
use echelon_models::config::DecoderConfig;
use echelon_models::decoder::Decoder;
use tch::{Device, Kind};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let folder = Path::new(arguments.first().ok_or("give a model folder")?);
    let kind = if arguments.iter().any(|a| a == "--bf16") { Kind::BFloat16 } else { Kind::Float };
    let config = DecoderConfig::read(folder)?;
    let checkpoint = Checkpoint::open(folder)?;
    let mut load = checkpoint.loader(&config, kind, Device::Cpu);
    let model = Decoder::new(&config, &mut load)?;
    let head = if config.tied_embeddings { model.embedding().shallow_clone() } else { load("lm_head.weight")? };
    let policy = Policy { model: &model, head: &head, tokenizer: None };
    for new_tokens in [1, 128, 128] {
        let sampling = SamplingConfig {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            max_new_tokens: new_tokens,
            stop: vec![],
            ignore_eos: true,
        };
        let started = Instant::now();
        let (_, report) = Engine::new(EngineConfig::default()).generate(
            policy,
            &prompts(config.vocab_size),
            &sampling,
            &Unwatched,
            &Interrupt::default(),
        )?;
        let seconds = started.elapsed().as_secs_f64();
        println!(
            "{} prompt tokens, {} new tokens in {seconds:.2} s: {:.0} tokens/s, {} decode steps",
            report.prefill_tokens,
            report.generated_tokens,
            report.generated_tokens as f64 / seconds,
            report.decode_steps
        );
    }
    Ok(())
}

fn prompts(vocab_size: i64) -> Prompts {
    let token = |id, at| (uniform(1, Domain::Data, id, at, 0) * vocab_size as f64) as i64;
    let row =
        |id| Prompt { id, token_ids: (0..32).map(|at| token(id, at)).collect(), text: String::new(), label: None };
    Prompts { rows: (0..16).map(row).collect(), samples_per_prompt: 1, seed: 1, evaluation: false }
}
