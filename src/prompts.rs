//! Prompts from data files: read, filtered by length, tokenised, drawn in a seeded order.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use echelon_algorithms::OnPolicy;
use echelon_core::Error;
use echelon_core::rollout::{Prompt, Prompts};
use echelon_models::chat_template::Message;
use echelon_models::tokenizer::{Tokenizer, TokenizerError};
use echelon_placement::task::Demand;
use echelon_tasks::data::{
    FilterError, LoadReport, Mix, MixSource, PromptKeys, PromptRow, PromptStream, PromptText, StreamPosition, Verdict,
    load_prompts,
};

use crate::node;
use crate::program::Failure;
use crate::recipe::{Data, ResolvedRecipe};

/// How a row becomes the tokens that the policy sees.
#[derive(Clone)]
pub struct PromptFormat {
    pub tokenizer: Arc<Tokenizer>,
    pub apply_chat_template: bool,
    pub system_prompt: Option<String>,
    pub max_prompt_tokens: usize,
}

impl PromptFormat {
    /// Token ids and text of a row.
    pub fn encode(&self, prompt: &PromptText) -> Result<(Vec<i64>, String), TokenizerError> {
        let messages = match prompt {
            PromptText::Chat(messages) => {
                self.with_system(messages.iter().map(|m| Message::new(&m.role, &m.content)).collect())
            }
            PromptText::Plain(text) if self.apply_chat_template => self.with_system(vec![Message::new("user", text)]),
            PromptText::Plain(text) => return Ok((self.tokenizer.encode(text)?, text.clone())),
        };
        let text = self.tokenizer.apply_chat_template(&messages, true)?;
        Ok((self.tokenizer.encode_chat(&messages, true)?, text))
    }

    fn with_system(&self, messages: Vec<Message>) -> Vec<Message> {
        let has_own = messages.first().is_some_and(|message| message.role == "system");
        let system = self.system_prompt.as_ref().filter(|_| !has_own).map(|text| Message::new("system", text));
        system.into_iter().chain(messages).collect()
    }

    fn load(
        &self,
        path: &Path,
        keys: &PromptKeys,
        source: usize,
        max_samples: Option<usize>,
    ) -> Result<Loaded, Failure> {
        let judge = &mut |rows: &Arc<Vec<PromptRow>>| self.verdicts(rows);
        let loaded = load_prompts(path, keys, source, max_samples, (BLOCK, judge)).map_err(Failure::input)?;
        Ok((loaded.rows, loaded.report))
    }

    /// Which rows are kept, judged as tasks on all CPUs of this node.
    fn verdicts(&self, rows: &Arc<Vec<PromptRow>>) -> Vec<Result<Verdict, FilterError>> {
        let (format, shared) = (self.clone(), rows.clone());
        let judge = move |part: Range<usize>| Ok(shared[part].iter().map(|row| format.verdict(row)).collect());
        let tasks = node::tasks().and_then(|tasks| {
            tasks
                .over_rows(("tokenise prompts", Demand::CPU), rows.len(), ROWS_PER_TASK, judge)?
                .wait(Duration::MAX)
                .map_err(Error::from)
        });
        tasks.unwrap_or_else(|error| vec![Err(error.into())])
    }

    fn verdict(&self, row: &PromptRow) -> Result<Verdict, FilterError> {
        let limit = self.max_prompt_tokens;
        let (ids, _) = self.encode(&row.prompt)?;
        Ok(match ids.len() {
            0 => Verdict::Drop("without a token".into()),
            n if n > limit => Verdict::Drop(format!("longer than max_prompt_tokens = {limit}")),
            _ => Verdict::Keep,
        })
    }
}

/// Rows that are read before they are judged together, and the fewest that are worth a task.
const BLOCK: usize = 1024;
const ROWS_PER_TASK: usize = 32;

type Loaded = (Vec<PromptRow>, LoadReport);

/// The prompts that a run learns from.
pub struct TrainingPrompts {
    stream: PromptStream,
    format: PromptFormat,
    /// What was read and dropped, per source.
    pub reports: Vec<(String, LoadReport)>,
}

impl TrainingPrompts {
    pub fn load(data: &Data, format: PromptFormat, seed: u64) -> Result<TrainingPrompts, Failure> {
        let mut sources = Vec::new();
        let mut reports = Vec::new();
        let mut room = data.max_samples;
        for (index, source) in data.sources().into_iter().enumerate() {
            if room == Some(0) {
                break;
            }
            let prompt = source.prompt_key.unwrap_or_else(|| data.prompt_key.clone());
            let keys = PromptKeys { prompt, label: source.label_key };
            let (rows, report) = format.load(&source.prompts, &keys, index, room)?;
            room = room.map(|room| room - rows.len());
            let name = source.prompts.display().to_string();
            sources.push(MixSource { name: name.clone(), weight: source.weight, rows });
            reports.push((name, report));
        }
        let stream = PromptStream::new(Mix::new(sources).map_err(Failure::input)?, seed);
        Ok(TrainingPrompts { stream, format, reports })
    }

    /// The prompts of `step`; their ids are of this step alone, so a prompt drawn again is sampled anew.
    pub fn next_batch(
        &mut self,
        step: u64,
        size: usize,
        samples_per_prompt: usize,
        seed: u64,
    ) -> Result<Prompts, Failure> {
        let draws = self.stream.next_batch(size);
        let rows = draws
            .iter()
            .enumerate()
            .map(|(index, draw)| prompt(&self.format, self.stream.row(draw.id), (step << 32) | index as u64));
        Ok(Prompts { rows: rows.collect::<Result<_, _>>()?, samples_per_prompt, seed, evaluation: false })
    }

    pub fn position(&self) -> StreamPosition {
        self.stream.position()
    }

    pub fn restore(&mut self, position: &StreamPosition) -> Result<(), Failure> {
        self.stream.restore(position).map_err(Failure::input)
    }

    pub fn num_rows(&self) -> usize {
        self.stream.mix().num_rows()
    }
}

/// Held-out prompts, the same at every evaluation and sampled with the same numbers.
pub fn evaluation_prompts<K: OnPolicy>(
    recipe: &ResolvedRecipe<K>,
    format: &PromptFormat,
) -> Result<Option<Prompts>, Failure> {
    let Some(path) = &recipe.eval.prompts else { return Ok(None) };
    let keys = PromptKeys { prompt: recipe.data.prompt_key.clone(), label: recipe.data.label_key.clone() };
    let (rows, _) = format.load(path, &keys, 0, recipe.eval.max_samples)?;
    let rows = rows.iter().enumerate().map(|(index, row)| prompt(format, row, index as u64));
    let rows = rows.collect::<Result<_, _>>()?;
    Ok(Some(Prompts { rows, samples_per_prompt: recipe.eval.samples_per_prompt, seed: recipe.seed, evaluation: true }))
}

fn prompt(format: &PromptFormat, row: &PromptRow, id: u64) -> Result<Prompt, Failure> {
    let (token_ids, text) = format.encode(&row.prompt).map_err(Failure::input)?;
    Ok(Prompt { id, token_ids, text, label: row.label.clone() })
}
