//! A step's report as named metrics, samples and speed.

use echelon_algorithms::ppo::StepReport;
use echelon_core::rollout::FinishReason;
use echelon_models::config::DecoderConfig;

use crate::monitor::{
    Metrics, ModelSize, PhaseWork, Sample, forward_flops_per_token, process_age, record_perf, samples_markdown,
    training_flops_per_token,
};
use crate::recipe::{ResolvedRecipe, ScoreSource};

/// Samples of a step that are written down.
const SAMPLES: usize = 8;

/// OpenRLHF's names where it has one. Everything outside `perf/` and `train/timing/` is deterministic.
pub fn step_metrics(report: &StepReport, kl_coef: f64) -> Metrics {
    let mut metrics = Metrics::new();
    metrics
        .set("train/reward", mean(&report.scores))
        .set("train/reward_std", deviation(&report.scores))
        .set("train/score", mean(&report.shaped_scores))
        .set("train/return", report.return_mean)
        .set("train/total_reward", mean(&report.total_rewards))
        .set("train/kl", report.kl)
        .set("train/kl_coef", kl_coef)
        .set("train/response_length", mean(&report.response_lengths))
        .set("train/truncated", report.truncated_rate)
        .set("train/values", report.values_mean)
        .set("train/explained_variance", report.explained_variance);
    if !report.actor.is_empty() {
        let of = |read: fn(&echelon_core::verb::ActorReport) -> f64| report.actor.iter().map(read).collect::<Vec<_>>();
        metrics
            .set("train/policy_loss", mean(&of(|r| r.policy_loss)))
            .set("train/kl_loss", mean(&of(|r| r.kl_loss)))
            .set("train/entropy", mean(&of(|r| r.entropy)))
            .set("train/ppo_clip_ratio", mean(&of(|r| r.clip_fraction)))
            .set("train/ppo_kl", mean(&of(|r| r.ppo_kl)))
            .set("train/approx_kl", mean(&of(|r| r.approx_kl)))
            .set("train/ratio_max", of(|r| r.ratio_max).into_iter().fold(f64::NAN, f64::max))
            .set("train/actor_grad_norm", mean(&of(|r| r.grad_norm)))
            .set("train/actor_lr", report.actor.last().map_or(f64::NAN, |r| r.lr));
        metrics.set_histogram("train/ratios", report.actor.iter().flat_map(|r| r.ratios.iter().copied()).collect());
    }
    let of = |read: fn(&echelon_core::verb::CriticReport) -> f64| report.critic.iter().map(read).collect::<Vec<_>>();
    metrics
        .set("train/critic_loss", mean(&of(|r| r.critic_loss)))
        .set("train/critic_clip_ratio", mean(&of(|r| r.clip_fraction)))
        .set("train/critic_grad_norm", mean(&of(|r| r.grad_norm)))
        .set("train/critic_lr", report.critic.last().map_or(f64::NAN, |r| r.lr))
        .set("train/policy_version", report.policy_version as f64)
        .set("perf/rollout_logprob_diff_max", report.logprob_diff_max)
        .set("perf/rollout_logprob_diff_mean", report.logprob_diff_mean);
    for (name, mean) in &report.sources {
        metrics.set(format!("train/reward_{name}"), *mean);
    }
    metrics.set_histogram("train/rewards", narrow(&report.scores));
    metrics.set_histogram("train/response_lengths", narrow(&report.response_lengths));
    metrics
}

/// The first responses of the step, one per prompt.
pub fn samples_of(step: u64, report: &StepReport, samples_per_prompt: usize) -> Vec<Sample> {
    let Some(rollout) = &report.rollout else { return Vec::new() };
    let rows = (0..rollout.num_rows()).step_by(samples_per_prompt).take(SAMPLES);
    rows.map(|row| Sample {
        step,
        prompt: rollout.prompts[row].clone(),
        response: rollout.responses[row].clone(),
        reward: report.total_rewards[row],
        score: report.scores[row],
        kl: report.row_kl[row],
        response_length: report.response_lengths[row] as u64,
        finish_reason: match rollout.finish_reasons[row] {
            FinishReason::Stop => "stop".into(),
            FinishReason::Length => "length".into(),
        },
    })
    .collect()
}

/// The arithmetic of a step, for tokens/s and MFU.
pub struct Work {
    size: ModelSize,
    /// Models that score: actor, critic, and reference and reward model where there are any.
    scoring_models: f64,
    /// Age of the process at the beginning of the run's first step; none after it.
    age: Option<f64>,
    epochs: f64,
    samples_per_prompt: usize,
    pub last_kl: Option<f64>,
}

impl Work {
    /// Critic, reference and reward model are counted as large as the actor.
    pub fn new(config: &DecoderConfig, recipe: &ResolvedRecipe) -> Work {
        let shape = config.shape();
        let embedding = if config.tied_embeddings { 0 } else { config.vocab_size * config.hidden_size };
        let model_rewards = recipe.reward.sources.iter().filter(|s| matches!(s.source, ScoreSource::Model(_))).count();
        Work {
            size: ModelSize {
                params: (shape.num_params() - embedding) as f64,
                layers: config.num_layers as f64,
                hidden: (config.num_heads * config.head_dim) as f64,
            },
            scoring_models: 2.0 + f64::from(u8::from(recipe.reference.is_some())) + model_rewards as f64,
            age: None,
            epochs: recipe.ppo.epochs as f64,
            samples_per_prompt: recipe.rollout.samples_per_prompt,
            last_kl: None,
        }
    }

    /// Call before a step's first work.
    pub fn begin(&mut self) {
        self.age = self.last_kl.is_none().then(process_age).flatten();
    }

    /// Sets timings, tokens per second and MFU; `matmul_rate` is what the run's devices reach together, in floating-point
    /// operations per second.
    pub fn record(&mut self, metrics: &mut Metrics, report: &StepReport, seconds: f64, matmul_rate: Option<f64>) {
        let Some(rollout) = &report.rollout else { return };
        let tokens: i64 = rollout.lengths.iter().sum();
        let context = tokens as f64 / rollout.num_rows() as f64 / 2.0;
        let forward = forward_flops_per_token(self.size, context);
        let generated = rollout.generation.prefill_tokens + rollout.generation.generated_tokens;
        let learned: i64 = report.actor.iter().map(|r| r.num_tokens).sum::<i64>()
            + report.critic.iter().map(|r| r.num_tokens).sum::<i64>();
        let timing = &report.timing;
        let phase = |name, tokens: f64, seconds, flops| PhaseWork { name, tokens: tokens as u64, seconds, flops };
        let phases = [
            phase(
                "generation",
                rollout.generation.generated_tokens as f64,
                timing.generation_s,
                forward * generated as f64,
            ),
            phase(
                "make_experience",
                tokens as f64 * self.scoring_models,
                timing.experience_s,
                forward * tokens as f64 * self.scoring_models,
            ),
            phase(
                "ppo_train",
                tokens as f64 * self.epochs,
                timing.train_s,
                training_flops_per_token(self.size, context) * learned as f64,
            ),
        ];
        record_perf(metrics, &phases, tokens as u64, seconds, matmul_rate);
        metrics
            .set("train/timing/broadcast", timing.publish_s)
            .set("perf/weight_sync_s", timing.publish_s)
            .set("perf/prefill_tokens", rollout.generation.prefill_tokens as f64)
            .set("perf/decode_steps", rollout.generation.decode_steps as f64);
        let generation = &rollout.generation;
        let waited = timing.generation_s - generation.seconds + generation.first_token_s;
        metrics.set("perf/first_token_s", waited);
        if let Some(age) = self.age {
            metrics.set("perf/start_to_first_token_s", age + waited);
        }
        metrics.set_text("samples", samples_markdown(&samples_of(0, report, self.samples_per_prompt)));
        self.last_kl = Some(report.kl);
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Population standard deviation.
fn deviation(values: &[f64]) -> f64 {
    let center = mean(values);
    (values.iter().map(|value| (value - center).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&value| value as f32).collect()
}
