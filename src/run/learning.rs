//! What a step works with: the algorithm, its roles, and where its rows come from.

use std::path::{Path, PathBuf};

use echelon_algorithms::{Algorithm, Moment, Outcome};
use echelon_core::Result;
use echelon_core::data::Report;
use echelon_core::progress::Interrupt;
use echelon_core::role::Role;
use echelon_core::verb::{Generated, Roles};
use echelon_models::tokenizer::Tokenizer;

use super::feed::Feed;
use crate::checkpoint::{Measured, RunState, Unfinished};
use crate::devices;
use crate::program::{Failure, absolute};
use echelon_roles::models::Held;

pub struct Learning<A> {
    pub algorithm: A,
    pub roles: Roles,
    pub feed: Feed,
    pub policy_version: u64,
}

impl<A: Algorithm> Learning<A> {
    /// Draws, samples, learns and publishes; what sampling did comes beside the outcome.
    pub async fn step(&mut self, step: u64, interrupt: &Interrupt) -> Result<(Report, Outcome)> {
        let Generated { rows, report: sampled } = self.feed.next(step, &self.roles).await?;
        let outcome = self.algorithm.learn(&self.roles, rows, Moment { step, interrupt }).await?;
        self.publish(self.policy_version + 1).await?;
        Ok((sampled, outcome))
    }

    /// When this returns every generator holds the actor's weights, so the next rollout is on-policy (AR-15).
    async fn publish(&mut self, version: u64) -> Result<()> {
        if let Some(generator) = self.roles.get(Role::Generator) {
            self.roles.actor().publish_weights(generator, version).await?;
            self.policy_version = version;
        }
        Ok(())
    }

    /// The version that the generators have, where there are some.
    pub fn published(&self) -> Option<u64> {
        self.roles.get(Role::Generator).map(|_| self.policy_version)
    }

    /// The algorithm's metrics of held-out rows.
    pub async fn evaluate(&self) -> Result<Outcome> {
        let rows = self.feed.held_out(&self.roles).await?;
        self.algorithm.evaluate(&self.roles, rows).await
    }

    /// Mean and standard deviation of the scores that a model gives held-out rows, where it is one that scores.
    pub async fn score_statistics(&self, interrupt: &Interrupt) -> Result<Option<(f64, f64)>> {
        if A::EXPORTS.0 != Role::Reward || !self.feed.evaluates() {
            return Ok(None);
        }
        let _whole = interrupt.defer();
        let stats = self.evaluate().await?.report.stats;
        Ok(stats.get("eval/score_mean").zip(stats.get("eval/score_std")))
    }

    /// Writes all that the next step depends on.
    pub async fn save(
        &self,
        unfinished: Unfinished,
        step: u64,
        (held, tokenizer): (Held, &Tokenizer),
        metric: Option<Measured>,
    ) -> std::result::Result<PathBuf, Failure> {
        for (role, name) in A::LEARNERS {
            let file = unfinished.file(&format!("{name}.safetensors"));
            self.roles.group(*role).save(absolute(&file)).await?;
        }
        unfinished.finish(&RunState {
            program: A::NAME.into(),
            step,
            policy_version: self.policy_version,
            data: self.feed.position(),
            algorithm: self.algorithm.state(),
            num_threads: tch::get_num_threads(),
            weight_layout: (!self.feed.reads_examples()).then_some(held.weight_layout),
            device: Some(devices::device_name(held.pass.device)),
            deterministic: Some(held.deterministic),
            render_time: tokenizer.render_time(),
            metric,
        })
    }

    /// Gives the roles, the algorithm and the data what they had at a checkpoint; the run folder stays as it is (AR-14).
    pub async fn restore(&mut self, path: &Path, state: &RunState) -> std::result::Result<(), Failure> {
        if state.num_threads < 1 {
            let (path, threads) = (path.display(), state.num_threads);
            return Err(Failure::Input(format!(
                "{path}: `num_threads` = {threads} in state.json: at least 1 computes"
            )));
        }
        tch::set_num_threads(state.num_threads);
        self.feed.restore(&state.data)?;
        self.algorithm.restore(state.algorithm.clone()).map_err(Failure::input)?;
        for (role, name) in A::LEARNERS {
            let file = absolute(&path.join(format!("{name}.safetensors")));
            self.roles.group(*role).restore(file).await.map_err(Failure::input)?;
        }
        Ok(self.publish(state.policy_version).await?)
    }
}
