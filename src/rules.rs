//! Rules that judge responses, as any node of a run can apply them.

use std::sync::{Arc, Mutex, PoisonError};

use echelon_core::{Error, Result};
use echelon_placement::task::Function;
use echelon_tasks::reward::{RewardRequest, RewardSource, RuleConfig, score_checked};
use serde::{Deserialize, Serialize};

/// Scores a part of a batch on whichever node has room.
pub const SCORE_BY_RULE: Function<RulePart, Vec<f64>> = Function::new("score_by_rule", score_part);

/// A part of a batch, and the rule that judges it.
#[derive(Serialize, Deserialize)]
pub struct RulePart {
    pub rule: RuleConfig,
    pub requests: Vec<RewardRequest>,
    /// Which of the batch its first is, and how many the batch has: for errors.
    pub first: usize,
    pub count: usize,
}

fn score_part(RulePart { rule, requests, first, count }: RulePart) -> Result<Vec<f64>> {
    let scored = score_checked(built(&rule)?.as_ref(), &requests);
    scored.map_err(|error| Error::other("reward", error.in_batch(first, count)))
}

/// The rule, made once per process: parts of every step need it.
pub fn built(rule: &RuleConfig) -> Result<Arc<dyn RewardSource>> {
    static BUILT: Mutex<Vec<(RuleConfig, Arc<dyn RewardSource>)>> = Mutex::new(Vec::new());
    let mut known = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, source)) = known.iter().find(|(known, _)| known == rule) {
        return Ok(source.clone());
    }
    let source: Arc<dyn RewardSource> = rule.build().map_err(|error| Error::other("reward", error))?.into();
    known.push((rule.clone(), source.clone()));
    Ok(source)
}
