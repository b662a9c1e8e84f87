//! The sizes of a step that follow from the recipe, and the lines that show them at the start.

use std::fmt;

use echelon_algorithms::{Learning, OnPolicy};
use echelon_core::role::Role;
use echelon_placement::layout::{Layout, RoleGroup};

use super::tables::Recipe;

/// How a step's prompts become optimizer steps.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchArithmetic {
    /// Prompts per step.
    pub prompts: usize,
    /// Responses per prompt.
    pub samples_per_prompt: usize,
    /// Responses per step.
    pub responses: usize,
    /// Responses per optimizer step.
    pub mini_batch_size: usize,
    /// Passes over the responses.
    pub epochs: usize,
    /// Optimizer steps per step, over all epochs.
    pub optimizer_steps: usize,
    /// Steps of the run.
    pub steps: usize,
    /// Optimizer steps of the critic in the whole run, where there is one.
    pub critic_optimizer_steps: Option<usize>,
    /// Optimizer steps of the actor in the whole run: none during the critic's warm-up.
    pub actor_optimizer_steps: usize,
    /// Optimizer steps over which the actor's learning rate rises.
    pub actor_warmup_steps: usize,
    /// Most tokens of a prompt.
    pub max_prompt_tokens: usize,
    /// Most tokens of a response.
    pub max_new_tokens: usize,
    /// Tokens per forward and backward pass on one device.
    pub tokens_per_micro_batch: usize,
}

impl<K: OnPolicy> Recipe<K> {
    /// The sizes that follow from this recipe.
    pub fn batch_arithmetic(&self) -> BatchArithmetic {
        let Learning { epochs, mini_batch_size, critic_warmup_steps, .. } = self.keys.learning();
        let responses = self.rollout.batch_size * self.rollout.samples_per_prompt;
        let optimizer_steps = (responses / mini_batch_size).saturating_mul(epochs);
        let actor_optimizer_steps = optimizer_steps.saturating_mul(self.train.steps - critic_warmup_steps);
        BatchArithmetic {
            prompts: self.rollout.batch_size,
            samples_per_prompt: self.rollout.samples_per_prompt,
            responses,
            mini_batch_size,
            epochs,
            optimizer_steps,
            steps: self.train.steps,
            critic_optimizer_steps: K::has_critic().then_some(optimizer_steps.saturating_mul(self.train.steps)),
            actor_optimizer_steps,
            actor_warmup_steps: self.actor.optimizer.warmup_steps(actor_optimizer_steps),
            max_prompt_tokens: self.data.max_prompt_tokens,
            max_new_tokens: self.rollout.max_new_tokens,
            tokens_per_micro_batch: self.train.compute.tokens_per_micro_batch,
        }
    }
}

impl BatchArithmetic {
    /// What each rank works on, a line for each group of roles.
    pub fn shares(&self, layout: &Layout) -> Vec<String> {
        let line = |(workers, groups): (&Vec<usize>, Vec<&RoleGroup>)| {
            let names: Vec<String> = groups.iter().map(|group| group.role.to_string()).collect();
            let (names, parts) = (names.join(", "), workers.len() / groups[0].tensor_parallel);
            let trains = groups.iter().any(|group| matches!(group.role, Role::Actor | Role::Critic));
            let share = if trains { self.training_share(parts) } else { self.share(parts) };
            let by = match groups[0].tensor_parallel {
                1 => "on each rank".into(),
                size => format!("for each engine of {size}"),
            };
            format!("{names}: {share} {by}")
        };
        layout.by_place().into_iter().filter(|(workers, _)| workers.len() > 1).map(line).collect()
    }

    /// Most micro-batches of one mini-batch on one of `ranks` ranks, when every sequence has full length.
    pub fn micro_batches_at_most(&self, ranks: usize) -> usize {
        let rows = self.mini_batch_size.div_ceil(ranks);
        let sequence = self.max_prompt_tokens + self.max_new_tokens;
        let rows_together = (self.tokens_per_micro_batch / sequence).max(1);
        rows.div_ceil(rows_together)
    }

    /// What each of a trained role's `ranks` ranks works on.
    pub fn training_share(&self, ranks: usize) -> String {
        let [responses, rows] = [self.responses, self.mini_batch_size].map(|rows| shown(rows, ranks));
        let at_most = self.micro_batches_at_most(ranks);
        format!("{responses} responses, {rows} of each mini-batch in at most {}", count(at_most, "micro-batch"))
    }

    /// What each of `parts` engines, or of a frozen role's ranks, works on.
    pub fn share(&self, parts: usize) -> String {
        format!("{} responses", shown(self.responses, parts))
    }

    fn lines(&self) -> Vec<String> {
        vec![self.rollout_line(), self.run_line(), self.micro_batch_line()]
    }

    fn rollout_line(&self) -> String {
        let (prompts, samples) = (count(self.prompts, "prompt"), count(self.samples_per_prompt, "sample"));
        let updates = count(self.responses / self.mini_batch_size, "optimizer step");
        let line =
            format!("{prompts} x {samples} = {} responses -> {updates} of {}", self.responses, self.mini_batch_size);
        match self.epochs {
            1 => line,
            epochs => format!("{line}, {epochs} epochs: {}", self.optimizer_steps),
        }
    }

    fn run_line(&self) -> String {
        let (steps, actor) = (count(self.steps, "step"), count(self.actor_optimizer_steps, "optimizer step"));
        let critic = self.critic_optimizer_steps.map_or(String::new(), |critic| format!("; {critic} of the critic"));
        format!("{steps}: {actor} of the actor, {} of them warm-up{critic}", self.actor_warmup_steps)
    }

    fn micro_batch_line(&self) -> String {
        let (prompt, response) = (self.max_prompt_tokens, self.max_new_tokens);
        format!(
            "up to {prompt} + {response} = {} tokens a sequence, micro-batches of {} tokens: at most {} per optimizer step on one device",
            prompt + response,
            self.tokens_per_micro_batch,
            self.micro_batches_at_most(1),
        )
    }
}

impl fmt::Display for BatchArithmetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines().join("\n"))
    }
}

/// `rows / parts`, or both bounds where it is no whole number.
fn shown(rows: usize, parts: usize) -> String {
    let low = rows / parts;
    if rows.is_multiple_of(parts) { low.to_string() } else { format!("{low} to {}", low + 1) }
}

fn count(number: usize, noun: &str) -> String {
    let plural = match noun {
        _ if number == 1 => "",
        "micro-batch" => "es",
        _ => "s",
    };
    format!("{number} {noun}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_group_has_its_own_shares() {
        let batch = BatchArithmetic {
            prompts: 16,
            samples_per_prompt: 1,
            responses: 16,
            mini_batch_size: 8,
            epochs: 1,
            optimizer_steps: 2,
            steps: 1,
            critic_optimizer_steps: Some(2),
            actor_optimizer_steps: 2,
            actor_warmup_steps: 0,
            max_prompt_tokens: 10,
            max_new_tokens: 10,
            tokens_per_micro_batch: 40,
        };
        let group = |role, workers: &[usize], tensor_parallel| RoleGroup {
            role,
            workers: workers.to_vec(),
            zero_stage: 3,
            adam_offload: false,
            moves_to_host: false,
            tensor_parallel,
        };
        let groups = vec![
            group(Role::Actor, &[0, 1], 1),
            group(Role::Critic, &[2, 3], 1),
            group(Role::Generator, &[4, 5, 6, 7], 2),
        ];
        let layout = Layout { num_workers: 8, devices: (0..8).collect(), groups };
        let shares = batch.shares(&layout);
        assert_eq!(shares[0], "actor: 8 responses, 4 of each mini-batch in at most 2 micro-batches on each rank");
        assert_eq!(shares[2], "generator: 8 responses for each engine of 2");
        assert_eq!((shares.len(), batch.shares(&Layout::together(1, 0, false)).len()), (3, 0));
    }
}
