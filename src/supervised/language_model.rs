//! `sft`: a causal language model learns completions, assistant turns, or plain text.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use echelon_algorithms::masked::masked_sum;
use echelon_algorithms::sft;
use echelon_core::Error;
use echelon_core::progress::Interrupt;
use echelon_core::role::Role;
use echelon_core::rollout::Tokens;
use echelon_core::zero::{PolicyOutput, Sharding, TrainingState};
use echelon_models::chat_template::Message;
use echelon_models::config::HeadKind;
use echelon_models::tokenizer::Tokenizer;
use echelon_tasks::data::{MixSource, PromptText, TrainingExample, TrainingKeys, Verdict, load_training};
use tch::Kind;

use super::{Data, Example, Learner, Speed, prompt_and_response};
use crate::models::{Policy, export, trainable_policy};
use crate::monitor::Metrics;
use crate::program::Failure;
use crate::recipe::{Init, SftRecipe};
use crate::wire;

pub struct LanguageModel {
    policy: Policy,
    folder: PathBuf,
    tokenizer: Arc<Tokenizer>,
}

impl LanguageModel {
    pub fn start(
        recipe: &SftRecipe,
        tokenizer: Arc<Tokenizer>,
        total: usize,
    ) -> Result<(LanguageModel, Speed), Failure> {
        let folder = wire::model_folder(&recipe.model.model)?;
        wire::check_one_device("sft", &recipe.placement)?;
        let (held, _) = wire::held(&recipe.train.compute, &recipe.placement, None)?;
        let optimizer = wire::optimizer(&recipe.model.optimizer, &recipe.train.compute);
        let random = (recipe.model.init == Init::Random).then_some(recipe.seed);
        let policy = trainable_policy(Role::Actor, &folder, random, held, (optimizer, &Sharding::whole()), 1.0)
            .map_err(Failure::input)?;
        let schedule = wire::schedule(&recipe.model.optimizer, total);
        let speed = Speed { lr: recipe.model.optimizer.lr, schedule };
        Ok((LanguageModel { policy, folder, tokenizer }, speed))
    }
}

impl Learner for LanguageModel {
    fn state(&mut self) -> &mut TrainingState {
        &mut self.policy.state
    }

    fn step(&mut self, rows: &Tokens, lr: f64) -> echelon_core::Result<Metrics> {
        let report = sft::step(&mut self.policy, rows, lr)?;
        let mut metrics = Metrics::new();
        metrics.set("train/loss", report.loss).set("train/grad_norm", report.grad_norm).set("train/lr", report.lr);
        Ok(metrics)
    }

    fn evaluate(&mut self, rows: &Tokens, interrupt: &Interrupt) -> echelon_core::Result<Metrics> {
        let mut sum = 0.0;
        let device = self.policy.pass.device;
        self.policy.forward_rows(rows, interrupt, |indices, output| {
            let mask = rows.select(indices).mask.to_device(device);
            sum -= masked_sum(&output.logprobs().to_kind(Kind::Double), &mask).double_value(&[]);
        })?;
        let loss = sum / rows.mask.sum(Kind::Double).double_value(&[]);
        let mut metrics = Metrics::new();
        metrics.set("eval/loss", loss).set("eval/perplexity", loss.exp());
        Ok(metrics)
    }

    fn export(&mut self, _rows: &Tokens, folder: &Path) -> echelon_core::Result<()> {
        export(&self.policy.state, HeadKind::Logits, &self.folder, folder, &[])?;
        self.tokenizer.save(folder).map_err(|error| Error::other("saving the tokenizer", error))
    }

    fn shown(&self) -> &'static [&'static str] {
        &["train/loss", "eval/loss", "train/grad_norm"]
    }
}

/// Rows as tokens; those over `max_tokens` are dropped and counted.
pub fn load_data(recipe: &SftRecipe, tokenizer: &Tokenizer) -> Result<Data, Failure> {
    let data = &recipe.data;
    let keys = TrainingKeys {
        messages: data.messages_key.clone(),
        prompt: data.prompt_key.clone(),
        completion: data.completion_key.clone(),
        text: data.text_key.clone(),
    };
    let encode = |row: &TrainingExample| encode(tokenizer, row, data.apply_chat_template, data.completion_only);
    let limit = recipe.train.max_tokens;
    let load = |path: &Path| {
        let loaded = load_training(path, &keys, data.max_samples, &mut |row| {
            let length = encode(row)?.longest();
            Ok(if length > limit { Verdict::Drop(format!("longer than max_tokens = {limit}")) } else { Verdict::Keep })
        })
        .map_err(Failure::input)?;
        let rows = loaded.rows.iter().map(|row| encode(row).map_err(Failure::input)).collect::<Result<Vec<_>, _>>()?;
        Ok::<_, Failure>((rows, loaded.report))
    };
    let files = data.train.iter().map(|path| (path, 1.0)).chain(data.mix.iter().map(|part| (&part.train, part.weight)));
    let (mut sources, mut reports) = (Vec::new(), Vec::new());
    for (path, weight) in files {
        let (rows, report) = load(path)?;
        reports.push((path.display().to_string(), report));
        sources.push(MixSource { name: path.display().to_string(), weight, rows });
    }
    let held_out = data.eval.as_deref().map(load).transpose()?.map(|(rows, _)| rows);
    Ok(Data::new(sources, held_out, data.eval_fraction, recipe.seed, reports))
}

type TokenizerError = echelon_models::tokenizer::TokenizerError;

fn encode(
    tokenizer: &Tokenizer,
    row: &TrainingExample,
    apply_chat_template: bool,
    completion_only: bool,
) -> Result<Example, TokenizerError> {
    let chat = |messages: &[echelon_tasks::data::Message]| -> Vec<Message> {
        messages.iter().map(|message| Message::new(&message.role, &message.content)).collect()
    };
    let (ids, mut mask) = match row {
        TrainingExample::Text(text) => {
            let (ids, _) = prompt_and_response(tokenizer, "", text)?;
            (ids.clone(), vec![true; ids.len()])
        }
        TrainingExample::Conversation(messages) => tokenizer.encode_conversation(&chat(messages))?,
        TrainingExample::Completion { prompt: PromptText::Plain(prompt), completion } if !apply_chat_template => {
            prompt_and_response(tokenizer, prompt, completion)?
        }
        TrainingExample::Completion { prompt, completion } => {
            let mut messages = match prompt {
                PromptText::Plain(text) => vec![Message::new("user", text)],
                PromptText::Chat(messages) => chat(messages),
            };
            messages.push(Message::new("assistant", completion));
            tokenizer.encode_conversation(&messages)?
        }
    };
    if !completion_only {
        mask.fill(true);
    }
    Ok(Example(vec![(ids, mask)]))
}
