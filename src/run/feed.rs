//! Where a run's rows come from: prompts that are answered, or examples as they are.

use std::path::PathBuf;
use std::sync::Arc;

use echelon_core::data::{Report, Rows};
use echelon_core::progress::Progress;
use echelon_core::rollout::{Prompts, SamplingConfig};
use echelon_core::verb::{Generated, Roles};
use echelon_core::{Error, Result};
use echelon_tasks::data::{RowStream, StreamPosition};

use super::examples::Example;
use super::metrics::samples_of;
use crate::program::Failure;
use crate::prompts::TrainingPrompts;
use crate::replay;
use crate::watch::Watch;
use echelon_monitor::Sample;

pub enum Feed {
    Prompts(Box<PromptFeed>),
    Examples(Box<ExampleFeed>),
}

/// Prompts that are drawn, and answered by the generator.
pub struct PromptFeed {
    pub prompts: TrainingPrompts,
    /// Prompts per step.
    pub batch_size: usize,
    pub samples_per_prompt: usize,
    pub seed: u64,
    pub sampling: SamplingConfig,
    /// Where every step's rollout is kept, and where rollouts are read instead of sampled.
    pub record: Option<PathBuf>,
    pub replay: Option<PathBuf>,
    /// The same prompts and random numbers every time.
    pub held_out: Option<(Prompts, SamplingConfig)>,
    pub evaluate_every: Option<u64>,
}

/// Examples that are drawn.
pub struct ExampleFeed {
    pub stream: RowStream<Example>,
    /// Examples per step.
    pub batch_size: usize,
    pub held_out: Rows,
    pub evaluate_every: Option<u64>,
}

impl Feed {
    /// Whether rows are read instead of sampled; a step is short then.
    pub fn reads_examples(&self) -> bool {
        matches!(self, Feed::Examples(_))
    }

    pub fn position(&self) -> StreamPosition {
        match self {
            Feed::Prompts(feed) => feed.prompts.position(),
            Feed::Examples(feed) => feed.stream.position(),
        }
    }

    pub fn restore(&mut self, position: &StreamPosition) -> std::result::Result<(), Failure> {
        match self {
            Feed::Prompts(feed) => feed.prompts.restore(position),
            Feed::Examples(feed) => feed.stream.restore(position).map_err(Failure::input),
        }
    }

    /// The rows of a step, and what sampling them did.
    pub async fn next(&mut self, step: u64, roles: &Roles) -> Result<Generated> {
        match self {
            Feed::Prompts(feed) => {
                let prompts = feed.draw(step).map_err(|error| Error::Refused(error.to_string()))?;
                match &feed.replay {
                    Some(folder) => replay::read(folder, &prompts),
                    None => roles.generator().generate(prompts, &feed.sampling).await,
                }
            }
            Feed::Examples(feed) => {
                let draws = feed.stream.next_batch(feed.batch_size);
                let rows = Example::rows(draws.iter().map(|draw| feed.stream.row(draw.id)));
                Ok(Generated { rows, report: Report::default() })
            }
        }
    }

    /// Keeps a step's rollout, where that is asked for.
    pub fn keep(&self, step: u64, rows: &Rows, report: &Report) -> Result<()> {
        match self {
            Feed::Prompts(feed) => feed.record.iter().try_for_each(|folder| replay::record(folder, step, rows, report)),
            Feed::Examples(_) => Ok(()),
        }
    }

    /// What is written down of a step's rows.
    pub fn samples(&self, step: u64, rows: &Rows) -> Vec<Sample> {
        match self {
            Feed::Prompts(feed) => samples_of(step, rows, feed.samples_per_prompt),
            Feed::Examples(_) => Vec::new(),
        }
    }

    /// Whether there are held-out rows.
    pub fn evaluates(&self) -> bool {
        match self {
            Feed::Prompts(feed) => feed.held_out.is_some(),
            Feed::Examples(feed) => feed.held_out.num_rows() > 0,
        }
    }

    /// Whether they are evaluated after this step.
    pub fn evaluates_at(&self, step: u64, total: u64) -> bool {
        let (every, last) = match self {
            Feed::Prompts(feed) => (feed.evaluate_every, false),
            Feed::Examples(feed) => (feed.evaluate_every, step == total),
        };
        self.evaluates() && (last || every.is_some_and(|every| step.is_multiple_of(every)))
    }

    /// Held-out rows: prompts with the responses of the policy as it is now, or examples.
    pub async fn held_out(&self, roles: &Roles) -> Result<Rows> {
        match self {
            Feed::Prompts(feed) => {
                let (prompts, sampling) = feed.held_out.as_ref().expect("asked for where there are some");
                Ok(roles.generator().generate(prompts.clone(), sampling).await?.rows)
            }
            Feed::Examples(feed) => Ok(feed.held_out.shallow_clone()),
        }
    }

    /// Held-out prompts.
    pub fn num_held_out(&self) -> usize {
        match self {
            Feed::Prompts(feed) => feed.held_out.as_ref().map_or(0, |(prompts, _)| prompts.rows.len()),
            Feed::Examples(feed) => feed.held_out.num_rows(),
        }
    }

    /// The roles' progress as a person sees it: where a model learns from examples, all but that is its evaluation.
    pub fn shown(&self, watch: Arc<Watch>) -> Arc<dyn Progress> {
        match self {
            Feed::Prompts(_) => watch,
            Feed::Examples(_) => Arc::new(Evaluating(watch)),
        }
    }
}

impl PromptFeed {
    /// The prompts of a step.
    pub fn draw(&mut self, step: u64) -> std::result::Result<Prompts, Failure> {
        self.prompts.next_batch(step, self.batch_size, self.samples_per_prompt, self.seed)
    }
}

struct Evaluating(Arc<Watch>);

impl Progress for Evaluating {
    fn advance(&self, phase: &str, done: usize, total: usize) {
        self.0.advance(if phase == "train" { phase } else { "evaluate" }, done, total);
    }
}
