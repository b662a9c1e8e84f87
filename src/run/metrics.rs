//! A step's report as named metrics, samples and speed.

use std::collections::BTreeSet;
use std::time::Instant;

use echelon_algorithms::columns::{KL, REWARDS, SCORES};
use echelon_algorithms::masked::masked_row_mean;
use echelon_core::data::{PROMPTS, RESPONSES, Report, Rows, TRUNCATED};
use echelon_core::verb::{Generate, Learn, Logprobs, Publish, Scores, Span, Values, Verb};
use echelon_models::config::DecoderConfig;
use tch::{Kind, Tensor};

use echelon_monitor::{
    Metrics, ModelSize, PhaseWork, Sample, forward_flops_per_token, process_age, record_perf, samples_markdown,
    training_flops_per_token,
};

/// Samples of a step that are written down.
const SAMPLES: usize = 8;

/// What a step told, as metrics: those of `perf/` behind the others, and behind `policy_version` where there is one.
/// Everything outside `perf/` and `train/timing/` is deterministic.
pub fn metrics_of(report: &Report, policy_version: Option<u64>) -> Metrics {
    let (speed, learning): (Vec<_>, Vec<_>) = report.stats.numbers().partition(|(name, _)| name.starts_with("perf/"));
    let version = policy_version.map(|version| ("train/policy_version", version as f64));
    let mut metrics = Metrics::new();
    for (name, number) in learning.into_iter().chain(version).chain(speed) {
        metrics.set(name, number);
    }
    for (name, values) in report.histograms.values() {
        metrics.set_histogram(name, values);
    }
    metrics
}

/// The first responses of the step, one per prompt.
pub fn samples_of(step: u64, rows: &Rows, samples_per_prompt: usize) -> Vec<Sample> {
    let numbers =
        |numbers: &Tensor| Vec::<f64>::try_from(numbers.to_kind(Kind::Double)).expect("a number for each row");
    let none = vec![0.0; rows.num_rows()];
    let lengths = numbers(&rows.own_lengths());
    let truncated: Vec<bool> = Vec::try_from(&rows[TRUNCATED]).expect("a vector of flags");
    let scores = rows.get(SCORES).map_or_else(|| none.clone(), numbers);
    let summed = |rewards: &Tensor| numbers(&rewards.sum_dim_intlist(1, false, Kind::Double));
    let rewards = rows.get(REWARDS).map_or_else(|| scores.clone(), summed);
    let kl = rows.get(KL).map_or(none, |kl| numbers(&masked_row_mean(kl, &rows.own)));
    let sample = |row: usize| Sample {
        step,
        prompt: rows[PROMPTS][row].to_string(),
        response: rows[RESPONSES][row].to_string(),
        reward: rewards[row],
        score: scores[row],
        kl: kl[row],
        response_length: lengths[row] as u64,
        finish_reason: if truncated[row] { "length" } else { "stop" }.into(),
    };
    (0..rows.num_rows()).step_by(samples_per_prompt).take(SAMPLES).map(sample).collect()
}

/// Where the seconds of a step went: from the calls on its roles, those that overlap counted once.
#[derive(Clone, Copy, Debug, Default)]
pub struct PhaseSeconds {
    pub generation: f64,
    /// Scoring by all roles, and what the driver makes of it until the first optimizer step.
    pub experience: f64,
    pub train: f64,
    pub publish: f64,
}

impl PhaseSeconds {
    pub fn of(calls: &[Span]) -> PhaseSeconds {
        let of = |wanted: fn(&Span) -> bool| {
            let began = calls.iter().filter(|span| wanted(span)).map(|span| span.began).min();
            began.zip(calls.iter().filter(|span| wanted(span)).map(|span| span.ended).max())
        };
        let seconds =
            |span: Option<(Instant, Instant)>| span.map_or(0.0, |(began, ended)| (ended - began).as_secs_f64());
        let scoring = of(is_scoring);
        let training = of(|span| span.verb == Learn::NAME);
        let until = scoring.zip(training).map_or(scoring, |((began, _), (learns, _))| Some((began, learns)));
        PhaseSeconds {
            generation: seconds(of(|span| span.verb == Generate::NAME)),
            experience: seconds(until),
            train: seconds(training),
            publish: seconds(of(|span| span.verb == Publish::NAME)),
        }
    }
}

fn is_scoring(span: &Span) -> bool {
    [Logprobs::NAME, Values::NAME, Scores::NAME].contains(&span.verb)
}

/// The arithmetic of a step, for tokens/s and MFU.
pub struct Work {
    size: ModelSize,
    /// Age of the process at the beginning of the run's first step; none after it.
    age: Option<f64>,
    /// Whether a step has begun.
    begun: bool,
    samples_per_prompt: usize,
    pub last_kl: Option<f64>,
}

impl Work {
    /// All models are counted as large as the actor.
    pub fn new(config: &DecoderConfig, samples_per_prompt: usize) -> Work {
        let shape = config.shape();
        let embedding = if config.tied_embeddings { 0 } else { config.vocab_size * config.hidden_size };
        Work {
            size: ModelSize {
                params: (shape.num_params() - embedding) as f64,
                layers: config.num_layers as f64,
                hidden: (config.num_heads * config.head_dim) as f64,
            },
            age: None,
            begun: false,
            samples_per_prompt,
            last_kl: None,
        }
    }

    /// Call before a step's first work.
    pub fn begin(&mut self) {
        let begun = std::mem::replace(&mut self.begun, true);
        self.age = (!begun).then(process_age).flatten();
    }

    /// Sets timings, tokens per second and MFU; `matmul_rate` is what the run's devices reach together, in floating-point
    /// operations per second.
    pub fn record(
        &mut self,
        metrics: &mut Metrics,
        (rows, sampled, calls): (&Rows, &Report, &[Span]),
        seconds: f64,
        matmul_rate: Option<f64>,
    ) {
        let (tokens, timing) = (rows.num_tokens(), PhaseSeconds::of(calls));
        let context = tokens as f64 / rows.num_rows() as f64 / 2.0;
        let forward = forward_flops_per_token(self.size, context);
        let training = training_flops_per_token(self.size, context);
        let of = |name| sampled.stats.get(name).unwrap_or(0.0);
        let sum = |wanted: fn(&Span) -> bool| {
            calls.iter().filter(|span| wanted(span)).map(|span| span.tokens as f64).sum::<f64>()
        };
        let (scored, learned) = (sum(is_scoring), sum(|span| span.verb == Learn::NAME));
        let learners =
            calls.iter().filter(|span| span.verb == Learn::NAME).map(|span| span.role).collect::<BTreeSet<_>>();
        let (prefilled, generated) = (of("prefill_tokens"), of("generated_tokens"));
        let phase = |name, tokens: f64, seconds, flops| PhaseWork { name, tokens: tokens as u64, seconds, flops };
        let phases = [
            phase("generation", generated, timing.generation, forward * (prefilled + generated)),
            phase("make_experience", scored, timing.experience, forward * scored),
            phase("ppo_train", learned / learners.len().max(1) as f64, timing.train, training * learned),
        ];
        record_perf(metrics, &phases, tokens as u64, seconds, matmul_rate);
        let waited = timing.generation - of("seconds") + of("first_token_s");
        metrics
            .set("train/timing/broadcast", timing.publish)
            .set("perf/weight_sync_s", timing.publish)
            .set("perf/prefill_tokens", prefilled)
            .set("perf/decode_steps", of("decode_steps"))
            .set("perf/first_token_s", waited);
        if let Some(age) = self.age {
            metrics.set("perf/start_to_first_token_s", age + waited);
        }
        metrics.set_text("samples", samples_markdown(&samples_of(0, rows, self.samples_per_prompt)));
        self.last_kl = metrics.get("train/kl");
    }
}
