//! `reward`: a model with a score head learns which of two responses is the better.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use echelon_algorithms::reward_model;
use echelon_core::Error;
use echelon_core::progress::Interrupt;
use echelon_core::role::Role;
use echelon_core::rollout::Tokens;
use echelon_core::zero::{ScalarValues, Sharding, TrainingState};
use echelon_models::chat_template::Message;
use echelon_models::config::HeadKind;
use echelon_models::head::ScalarRows;
use echelon_models::tokenizer::{Tokenizer, TokenizerError};
use echelon_tasks::data::{MixSource, Pair, PairKeys, PromptText, Verdict, load_pairs};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::{Data, Example, Learner, Speed, prompt_and_response};
use crate::models::{Scorer, export, trainable_scorer};
use crate::monitor::Metrics;
use crate::program::Failure;
use crate::recipe::{Init, RewardRecipe};
use crate::wire;

pub struct RewardModel {
    scorer: Scorer,
    folder: PathBuf,
    tokenizer: Arc<Tokenizer>,
}

impl RewardModel {
    pub fn start(
        recipe: &RewardRecipe,
        tokenizer: Arc<Tokenizer>,
        total: usize,
    ) -> Result<(RewardModel, Speed), Failure> {
        let folder = wire::model_folder(&recipe.model.model)?;
        wire::check_one_device("reward", &recipe.placement)?;
        let (held, _) = wire::held(&recipe.train.compute, &recipe.placement, None)?;
        let optimizer = wire::optimizer(&recipe.model.optimizer, &recipe.train.compute);
        let random = (recipe.model.init == Init::Random).then_some(recipe.seed);
        let reads = ScalarRows::LastTokens;
        let scorer =
            trainable_scorer(Role::Reward, &folder, random, recipe.seed, held, (optimizer, &Sharding::whole()), reads)
                .map_err(Failure::input)?;
        let schedule = wire::schedule(&recipe.model.optimizer, total);
        let speed = Speed { lr: recipe.model.optimizer.lr, schedule };
        Ok((RewardModel { scorer, folder, tokenizer }, speed))
    }

    /// `[2P]` f64 scores: chosen and rejected in turn.
    fn scores(&mut self, rows: &Tokens, interrupt: &Interrupt) -> echelon_core::Result<Tensor> {
        let mut parts = Vec::new();
        self.scorer.forward_rows(rows, interrupt, |_, output| {
            parts.push(output.values().to_device(Device::Cpu).to_kind(Kind::Double));
        })?;
        Ok(Tensor::cat(&parts, 0))
    }
}

impl Learner for RewardModel {
    fn state(&mut self) -> &mut TrainingState {
        &mut self.scorer.state
    }

    fn step(&mut self, rows: &Tokens, lr: f64) -> echelon_core::Result<Metrics> {
        let report = reward_model::step(&mut self.scorer, rows, lr)?;
        let mut metrics = Metrics::new();
        metrics
            .set("train/loss", report.loss)
            .set("train/accuracy", report.accuracy)
            .set("train/grad_norm", report.grad_norm)
            .set("train/lr", report.lr);
        Ok(metrics)
    }

    fn evaluate(&mut self, rows: &Tokens, interrupt: &Interrupt) -> echelon_core::Result<Metrics> {
        let scores = self.scores(rows, interrupt)?;
        let pairs = scores.view([-1, 2]);
        let margin = pairs.select(1, 0) - pairs.select(1, 1);
        let mut metrics = Metrics::new();
        metrics
            .set("eval/accuracy", margin.gt(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]))
            .set("eval/loss", -margin.log_sigmoid().mean(Kind::Double).double_value(&[]))
            .set("eval/score_mean", scores.mean(Kind::Double).double_value(&[]))
            .set("eval/score_std", scores.std(false).double_value(&[]));
        Ok(metrics)
    }

    /// `mean` and `std` of the held-out scores go into `config.json`, where `reward.normalize` finds them.
    fn export(&mut self, rows: &Tokens, folder: &Path) -> echelon_core::Result<()> {
        let mut extra = vec![("num_labels", json!(1))];
        if rows.num_rows() > 0 {
            let scores = self.scores(rows, &Interrupt::default())?;
            extra.push(("mean", json!(scores.mean(Kind::Double).double_value(&[]))));
            extra.push(("std", json!(scores.std(false).double_value(&[]))));
        }
        export(&self.scorer.state, HeadKind::Score, &self.folder, folder, &extra)?;
        self.tokenizer.save(folder).map_err(|error| Error::other("saving the tokenizer", error))
    }

    fn shown(&self) -> &'static [&'static str] {
        &["train/loss", "train/accuracy", "eval/accuracy", "eval/loss"]
    }
}

/// Pairs as tokens; those with a side over `max_tokens` are dropped and counted.
pub fn load_data(recipe: &RewardRecipe, tokenizer: &Tokenizer) -> Result<Data, Failure> {
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
