//! What scores responses in a run, all at once: reward models on their workers; rules, programs and servers as tasks of this
//! node. Their scores are summed by weight.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use echelon_algorithms::reward_shaping::normalize_scores;
use echelon_core::data::{LABELS, PROMPTS, RESPONSES, Report, Rows, TRUNCATED};
use echelon_core::progress::Interrupt;
use echelon_core::verb::{Answer, Reward, Scored, WorkerGroup};
use echelon_core::{Error, Result};
use echelon_placement::task::{Demand, RowTasks, TaskError};
use echelon_tasks::reward::{
    CommandConfig, CommandReward, RewardRequest, RewardSource, RuleConfig, SourceKeys, UrlConfig, UrlReward,
    score_checked,
};
use futures_util::future::try_join_all;
use tch::{Kind, Tensor};

use crate::node;
use crate::program::Failure;
use crate::rules::{RulePart, SCORE_BY_RULE, built};

/// One source of scores.
pub enum Source {
    Model {
        group: WorkerGroup,
        /// Mean and standard deviation that its scores are normalised by before they are weighted.
        normalization: Option<(f64, f64)>,
    },
    Task(Task),
}

/// What scores without a model.
#[derive(Clone)]
pub enum Task {
    /// A rule, which any node can apply.
    Anywhere(RuleConfig),
    /// A program, a server, or a rule that reads a file of this host, with what it takes of the node.
    Here(Arc<dyn RewardSource>, Demand),
}

/// Sources with weights.
pub struct WeightedSources {
    pub sources: Vec<(String, f64, Source)>,
    /// A program or server that is slow to answer is not waited for after a signal.
    pub interrupt: Interrupt,
}

/// How often a wait for scores looks at the interrupt.
const LOOK_EVERY: Duration = Duration::from_millis(50);

impl Reward for WeightedSources {
    fn scores<'a>(&'a self, rows: &'a Rows) -> Answer<'a, Scored> {
        Box::pin(async move {
            let mut total = Tensor::zeros([rows.num_rows() as i64], tch::kind::DOUBLE_CPU);
            let mut report = Report::default();
            let scoring = self.sources.iter().map(|(_, _, source)| source.scores(rows, &self.interrupt));
            for ((name, weight, _), scores) in self.sources.iter().zip(try_join_all(scoring).await?) {
                if self.sources.len() > 1 {
                    let mean = scores.mean(Kind::Double).double_value(&[]);
                    report.stats.last(format!("train/reward_{name}"), mean);
                }
                total += scores * *weight;
            }
            Ok(Scored { scores: total, report })
        })
    }
}

impl Source {
    /// `[B]` f64.
    async fn scores(&self, rows: &Rows, interrupt: &Interrupt) -> Result<Tensor> {
        match self {
            Source::Model { group, normalization } => {
                let scores = all_finite(group.scores(rows).await?.to_kind(Kind::Double), rows)?;
                Ok(normalization.map_or(scores.shallow_clone(), |(mean, std)| normalize_scores(&scores, mean, std)))
            }
            Source::Task(task) => {
                let mut scoring = pin!(start_scoring(task.clone(), requests(rows))?.gather());
                loop {
                    match tokio::time::timeout(LOOK_EVERY, &mut scoring).await {
                        Ok(scores) => return Ok(Tensor::from_slice(&scores.map_err(TaskError::into_cause)?)),
                        Err(_) => interrupt.check()?,
                    }
                }
            }
        }
    }
}

/// Rules on all CPUs of the run's nodes, a part of the rows each; a program or server in one task, which keeps its order.
fn start_scoring(task: Task, requests: Vec<RewardRequest>) -> Result<RowTasks<f64>> {
    let (count, tasks) = (requests.len(), node::tasks()?);
    let (source, demand) = match task {
        Task::Anywhere(rule) if tasks.nodes().len() > 1 => {
            let part = |part: Range<usize>| RulePart {
                rule: rule.clone(),
                first: part.start,
                count,
                requests: requests[part].to_vec(),
            };
            return Ok(tasks.call_over_rows(&SCORE_BY_RULE, count, REQUESTS_PER_TASK, part)?);
        }
        Task::Anywhere(rule) => (built(&rule)?, Demand::CPU),
        Task::Here(source, demand) => (source, demand),
    };
    let least = if source.is_per_request() { REQUESTS_PER_TASK } else { count };
    let score = move |part: Range<usize>| {
        let scored = score_checked(source.as_ref(), &requests[part.clone()]);
        scored.map_err(|error| Error::other("reward", error.in_batch(part.start, count)))
    };
    Ok(tasks.over_rows(("reward", demand), count, least, score)?)
}

/// Fewer are not worth a task.
const REQUESTS_PER_TASK: usize = 16;

/// A reward model with damaged weights, or one whose numbers overflow, is no judge.
fn all_finite(scores: Tensor, rows: &Rows) -> Result<Tensor> {
    let values: Vec<f64> = Vec::try_from(&scores).expect("a vector of scores");
    match values.iter().position(|score| !score.is_finite()) {
        None => Ok(scores),
        Some(row) => Err(Error::Refused(format!(
            "the reward model's score of response {} of {} (prompt {:?}) is {}, not a finite number",
            row + 1,
            values.len(),
            rows[PROMPTS][row],
            values[row]
        ))),
    }
}

fn requests(rows: &Rows) -> Vec<RewardRequest> {
    let lengths: Vec<f64> = Vec::try_from(rows.own_lengths()).expect("a vector of lengths");
    let truncated: Vec<bool> = Vec::try_from(&rows[TRUNCATED]).expect("a vector of flags");
    (0..rows.num_rows())
        .map(|row| RewardRequest {
            prompt: rows[PROMPTS][row].to_string(),
            response: rows[RESPONSES][row].to_string(),
            label: rows[LABELS][row].as_deref().map(str::to_owned),
            num_response_tokens: lengths[row] as usize,
            finished: !truncated[row],
        })
        .collect()
}

/// A source and its name in metrics.
pub type NamedTask = (String, Task);

/// Starts a source that needs no model, with its name for metrics; `None` for a reward model.
pub fn task_source(keys: &SourceKeys) -> Result<Option<NamedTask>, Failure> {
    let timeout = Duration::from_secs_f64(keys.timeout_s);
    let (task, demand): (Arc<dyn RewardSource>, Demand) = if let Some(rule) = keys.rule() {
        let source = rule.build().map_err(Failure::input)?;
        if !matches!(rule, RuleConfig::Sentiment { .. }) {
            return Ok(Some((source.name(), Task::Anywhere(rule))));
        }
        (source.into(), Demand::CPU) // it has read a file of this host
    } else if let Some(url) = &keys.url {
        let config = UrlConfig { attempts: keys.retries + 1, timeout, ..UrlConfig::default() };
        (Arc::new(UrlReward::new(url, config).map_err(Failure::input)?), Demand::NONE)
    } else if let Some(command) = &keys.command {
        let (num_cpus, there_are) = (keys.num_cpus, node::tasks()?.nodes()[0].total.num_cpus);
        if num_cpus > there_are {
            let message = format!("reward.num_cpus = {num_cpus}: this node has {there_are} CPUs: ask for fewer");
            return Err(Failure::Input(message));
        }
        let config =
            CommandConfig { directory: keys.command_dir.clone(), timeout, ..CommandConfig::new(command.clone()) };
        (Arc::new(CommandReward::start(config).map_err(Failure::input)?), Demand::cpus(num_cpus))
    } else {
        return Ok(None);
    };
    Ok(Some((task.name(), Task::Here(task, demand))))
}

/// The names of several sources in metrics; equal ones are numbered from 1.
pub fn distinct_names(names: &[String]) -> Vec<String> {
    let count = |names: &[String], name: &String| names.iter().filter(|other| *other == name).count();
    let named = names.iter().enumerate().map(|(index, name)| match count(names, name) {
        1 => name.clone(),
        _ => format!("{name}_{}", count(&names[..=index], name)),
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use echelon_tasks::reward::RuleName;

    #[test]
    fn equal_names_are_numbered_and_others_are_not() {
        let names = ["math", "length", "math", "model", "math"].map(str::to_owned);
        assert_eq!(distinct_names(&names), ["math_1", "length", "math_2", "model", "math_3"]);
    }

    #[test]
    fn rules_in_parts_score_as_in_one_and_name_the_request_of_the_batch() {
        let mut requests: Vec<_> = (0..500)
            .map(|row| RewardRequest {
                prompt: format!("prompt {row}"),
                response: format!("the answer is {}", row % 7),
                label: Some((row % 5).to_string()),
                num_response_tokens: 1,
                finished: true,
            })
            .collect();
        let source = SourceKeys { rule: Some(RuleName::Math), tolerance: Some(1e-6), ..SourceKeys::default() };
        let (_, task) = task_source(&source).unwrap().expect("a rule is no model");
        let in_parts = |requests: &[RewardRequest]| {
            start_scoring(task.clone(), requests.to_vec()).unwrap().wait(Duration::from_secs(20))
        };
        let rule = built(&RuleConfig::Math { tolerance: 1e-6 }).unwrap();
        let whole = rule.score(&requests).unwrap();
        assert!(whole.contains(&0.0) && whole.contains(&1.0));
        assert_eq!(in_parts(&requests).unwrap(), whole);
        for row in [321, 499] {
            requests[row].label = None;
        }
        let error = in_parts(&requests).unwrap_err().into_cause().to_string();
        assert_eq!(error, format!("reward: {}", rule.score(&requests).unwrap_err()));
        assert!(error.contains("request 322 of 500 (prompt \"prompt 321\")"), "{error}");
    }

    #[test]
    fn a_program_gets_no_more_cpus_than_there_are() {
        let program = |num_cpus| SourceKeys {
            command: Some("while read line; do echo '{\"score\": 1}'; done".into()),
            command_dir: Some(std::env::temp_dir()),
            num_cpus,
            timeout_s: 20.0,
            ..SourceKeys::default()
        };
        let Err(refused) = task_source(&program(1000.0)) else { panic!("there are so many CPUs") };
        let error = refused.to_string();
        assert!(error.starts_with("reward.num_cpus = 1000: this node has "), "{error}");
        assert!(matches!(task_source(&program(0.5)), Ok(Some((_, Task::Here(_, Demand { num_cpus: 0.5, .. }))))));
    }

    #[test]
    fn retries_come_after_the_first_attempt() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let request = RewardRequest {
            prompt: "p".into(),
            response: "r".into(),
            label: None,
            num_response_tokens: 1,
            finished: true,
        };
        for retries in [0, 1] {
            let source = SourceKeys { url: Some(url.clone()), timeout_s: 5.0, retries, ..SourceKeys::default() };
            let Some((_, Task::Here(task, _))) = task_source(&source).unwrap() else {
                panic!("a server is of this host")
            };
            let message = task.score(std::slice::from_ref(&request)).unwrap_err().to_string();
            let attempts = retries + 1;
            assert!(message.contains(&format!("attempt {attempts} of {attempts},")), "{message}");
        }
    }
}
