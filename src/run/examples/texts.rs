//! `sft`: a causal language model learns completions, assistant turns, or plain text.

use std::path::Path;

use echelon_algorithms::sft::Sft;
use echelon_models::chat_template::Message;
use echelon_models::tokenizer::{Tokenizer, TokenizerError};
use echelon_placement::devices::Devices;
use echelon_tasks::data::{PromptText, TrainingExample, TrainingKeys, Verdict, load_training};

use super::{Data, Example, Lesson, Parts, prompt_and_response};
use crate::program::Failure;
use crate::recipe::SftRecipe;

impl Lesson for SftRecipe {
    type Algorithm = Sft;
    const ROWS_PER_EXAMPLE: usize = 1;

    fn parts(&self) -> Parts<'_> {
        let SftRecipe { model, train, checkpoint, placement: devices, seed, .. } = self;
        Parts { model, train, checkpoint, devices, seed: *seed }
    }

    fn devices_mut(&mut self) -> &mut Devices {
        &mut self.placement
    }

    fn load_data(&self, tokenizer: &Tokenizer) -> Result<Data, Failure> {
        load_data(self, tokenizer)
    }
}

/// Rows as tokens; those over `max_tokens` are dropped and counted.
fn load_data(recipe: &SftRecipe, tokenizer: &Tokenizer) -> Result<Data, Failure> {
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
    Data::read(data.files(), data.held_out(), recipe.seed, load)
}

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
