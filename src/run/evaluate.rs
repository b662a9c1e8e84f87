//! The policy on held-out prompts: the same prompts and random numbers every time.

use echelon_core::Result;
use echelon_core::rollout::{Prompts, SamplingConfig};
use tch::Kind;

use crate::monitor::{EvalResponse, Evaluation, Metrics};
use crate::recipe::ResolvedRecipe;
use crate::wire::{self, Wired};

pub struct Evaluator {
    prompts: Prompts,
    sampling: SamplingConfig,
}

impl Evaluator {
    pub fn new(prompts: Prompts, recipe: &ResolvedRecipe) -> Evaluator {
        Evaluator { prompts, sampling: wire::sampling(recipe, recipe.eval.temperature) }
    }

    /// Rewards are the sources' scores as they are, without shaping or KL.
    pub async fn run(&self, wired: &Wired) -> Result<Evaluation> {
        let rollout = wired.roles.generator.generate(self.prompts.clone(), &self.sampling).await?;
        let scored = wired.roles.reward.scores(&rollout).await?.scores;
        let rewards: Vec<f64> = Vec::try_from(&scored).expect("a vector of scores");
        let texts = rollout.prompts.iter().zip(&rollout.responses).zip(&rewards);
        let responses = texts.map(|((prompt, response), &reward)| EvalResponse {
            prompt: prompt.clone(),
            response: response.clone(),
            reward,
        });
        Ok(Evaluation {
            mean_reward: scored.mean(Kind::Double).double_value(&[]),
            std_reward: scored.std(false).double_value(&[]),
            num_prompts: self.prompts.rows.len(),
            responses: responses.collect(),
        })
    }
}

pub fn eval_metrics(evaluation: &Evaluation) -> Metrics {
    let mut metrics = Metrics::new();
    metrics.set("eval/reward", evaluation.mean_reward).set("eval/reward_std", evaluation.std_reward);
    metrics
}
