//! `reward`: a model with a score head learns which of two responses is the better.

use std::path::Path;

use echelon_algorithms::reward_model::RewardModel;
use echelon_models::chat_template::Message;
use echelon_models::tokenizer::{Tokenizer, TokenizerError};
use echelon_placement::devices::Devices;
use echelon_tasks::data::{Pair, PairKeys, PromptText, Verdict, load_pairs};

use super::{Data, Example, Lesson, Parts, prompt_and_response};
use crate::program::Failure;
use crate::recipe::RewardRecipe;

/// Rows 2i and 2i + 1 are pair i's chosen and rejected sequences.
impl Lesson for RewardRecipe {
    type Algorithm = RewardModel;
    const ROWS_PER_EXAMPLE: usize = 2;

    fn parts(&self) -> Parts<'_> {
        let RewardRecipe { model, train, checkpoint, placement: devices, seed, .. } = self;
        Parts { model, train, checkpoint, devices, seed: *seed }
    }

    fn devices_mut(&mut self) -> &mut Devices {
        &mut self.placement
    }

    fn load_data(&self, tokenizer: &Tokenizer) -> Result<Data, Failure> {
        load_data(self, tokenizer)
    }
}

/// Pairs as tokens; those with a side over `max_tokens` are dropped and counted.
fn load_data(recipe: &RewardRecipe, tokenizer: &Tokenizer) -> Result<Data, Failure> {
    let data = &recipe.data;
    let keys = PairKeys {
        prompt: data.prompt_key.clone(),
        chosen: data.chosen_key.clone(),
        rejected: data.rejected_key.clone(),
    };
    let limit = recipe.train.max_tokens;
    let load = |path: &Path| {
        let loaded = load_pairs(path, &keys, data.max_samples, &mut |pair| {
            let length = encode(tokenizer, pair, data.apply_chat_template)?.longest();
            Ok(if length > limit { Verdict::Drop(format!("longer than max_tokens = {limit}")) } else { Verdict::Keep })
        })
        .map_err(Failure::input)?;
        let encode = |pair| encode(tokenizer, pair, data.apply_chat_template).map_err(Failure::input);
        Ok::<_, Failure>((loaded.rows.iter().map(encode).collect::<Result<Vec<_>, _>>()?, loaded.report))
    };
    Data::read(data.files(), data.held_out(), recipe.seed, load)
}

/// Both sides as PPO will show them: the prompt, the response, and the token that ends it.
fn encode(tokenizer: &Tokenizer, pair: &Pair, apply_chat_template: bool) -> Result<Example, TokenizerError> {
    let side = |response: &PromptText| -> Result<(Vec<i64>, Vec<bool>), TokenizerError> {
        let prompt = pair.prompt.clone().unwrap_or(PromptText::Plain(String::new()));
        if let (PromptText::Plain(prompt), PromptText::Plain(response), false) =
            (&prompt, response, apply_chat_template)
        {
            return prompt_and_response(tokenizer, prompt, response);
        }
        let messages: Vec<Message> = messages(&prompt, "user").chain(messages(response, "assistant")).collect();
        let (mut ids, mut mask) = tokenizer.encode_conversation(&messages)?;
        // What a template writes after the last turn's end token, PPO's sequences do not have.
        let end = mask.iter().rposition(|&learned| learned).map_or(ids.len(), |last| last + 1);
        ids.truncate(end);
        mask.truncate(end);
        Ok((ids, mask))
    };
    Ok(Example(vec![side(&pair.chosen)?, side(&pair.rejected)?]))
}

fn messages<'a>(text: &'a PromptText, role: &'static str) -> Box<dyn Iterator<Item = Message> + 'a> {
    match text {
        PromptText::Plain(text) if text.is_empty() => Box::new(std::iter::empty()),
        PromptText::Plain(text) => Box::new(std::iter::once(Message::new(role, text))),
        PromptText::Chat(messages) => Box::new(messages.iter().map(|m| Message::new(&m.role, &m.content))),
    }
}
