//! Scores from a server over HTTP, by OpenRLHF's contract for remote reward models.
//!
//! `POST {"query": [prompt + response, …], "prompts": […], "labels": […]}` is answered by `{"rewards": […]}`, one finite
//! number per query, in order. `scores` may be beside it and is not used here; the numbers of `extra_logs` become
//! metrics. Several servers, parted by commas, share the requests evenly and work at the same time.
//!
//! A server that cannot be reached, breaks off, is too slow, or answers 408, 429 or 5xx is asked again, after a
//! pause that doubles. Any other answer is final: asking again would not make a wrong list right.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use ureq::Agent;

use super::error::{RequestExcerpt, excerpt};
use super::{RewardError, RewardRequest, RewardSource};

/// How servers are asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UrlConfig {
    /// Times a server is asked before its failure counts; at least 1.
    pub attempts: usize,
    /// Longest wait for one answer.
    pub timeout: Duration,
    /// Pause before the second attempt; each further one is twice as long, up to 30 s.
    pub first_pause: Duration,
    /// Longest answer read, in bytes.
    pub max_response_bytes: u64,
}

impl Default for UrlConfig {
    /// 5 attempts, 180 s each, a first pause of 1 s, 64 MiB.
    fn default() -> Self {
        let (timeout, first_pause) = (Duration::from_secs(180), Duration::from_secs(1));
        Self { attempts: 5, timeout, first_pause, max_response_bytes: 64 << 20 }
    }
}

/// One or more reward servers.
pub struct UrlReward {
    servers: Vec<Server>,
    config: UrlConfig,
    metrics: Mutex<Vec<(String, f64)>>,
}

struct Server {
    url: String,
    agent: Agent,
}

#[derive(Serialize)]
struct Question<'a> {
    query: Vec<String>,
    prompts: Vec<&'a str>,
    labels: Vec<Option<&'a str>>,
}

/// What one server answered.
struct Answer {
    rewards: Vec<f64>,
    extra_logs: BTreeMap<String, f64>,
}

/// Why an attempt failed, and whether another may help.
struct Failure {
    problem: String,
    may_pass: bool,
}

impl UrlReward {
    /// A source over the servers of `urls`, parted by commas.
    ///
    /// # Errors
    /// An empty list, or a URL that does not start with `http://` or `https://`.
    pub fn new(urls: &str, config: UrlConfig) -> Result<Self, RewardError> {
        let urls: Vec<&str> = urls.split(',').map(str::trim).filter(|url| !url.is_empty()).collect();
        let setting = |message: String| RewardError::Setting { rule: "url".to_owned(), message };
        if urls.is_empty() {
            return Err(setting("it names no server".to_owned()));
        }
        if let Some(url) = urls.iter().find(|url| !has_host(url)) {
            return Err(setting(format!("{url:?} is no URL of a server; write http://HOST:PORT/PATH")));
        }
        let server = |url: &str| Server { url: url.to_owned(), agent: agent(url, &config) };
        Ok(Self { servers: urls.into_iter().map(server).collect(), config, metrics: Mutex::default() })
    }
}

fn has_host(url: &str) -> bool {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    rest.is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_alphanumeric() || first == '['))
        && url.parse::<ureq::http::Uri>().is_ok()
}

fn agent(url: &str, config: &UrlConfig) -> Agent {
    let mut builder = Agent::config_builder()
        .timeout_global(Some(config.timeout))
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false);
    if is_loopback(url) {
        builder = builder.proxy(None); // the environment's proxy is for other hosts than this one
    }
    builder.build().new_agent()
}

fn is_loopback(url: &str) -> bool {
    let uri = url.parse::<ureq::http::Uri>();
    let host = uri.ok().and_then(|uri| uri.host().map(str::to_owned)).unwrap_or_default();
    host == "localhost" || host == "[::1]" || host.starts_with("127.")
}

impl RewardSource for UrlReward {
    fn name(&self) -> String {
        "url".to_owned()
    }

    fn score(&self, requests: &[RewardRequest]) -> Result<Vec<f64>, RewardError> {
        let answers: Vec<Result<Answer, RewardError>> = thread::scope(|scope| {
            let parts = self.servers.iter().zip(even_parts(requests, self.servers.len()));
            let asked = parts.filter(|(_, part)| !part.is_empty());
            let threads: Vec<_> = asked.map(|(server, part)| scope.spawn(move || self.ask(server, part))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        let answers = answers.into_iter().collect::<Result<Vec<_>, _>>()?;
        *self.metrics.lock().unwrap_or_else(|poison| poison.into_inner()) = mean_logs(&answers);
        Ok(answers.into_iter().flat_map(|answer| answer.rewards).collect())
    }

    fn take_metrics(&self) -> Vec<(String, f64)> {
        std::mem::take(&mut *self.metrics.lock().unwrap_or_else(|poison| poison.into_inner()))
    }
}

/// `count` runs of neighbouring requests whose lengths differ by at most one.
fn even_parts(requests: &[RewardRequest], count: usize) -> impl Iterator<Item = &[RewardRequest]> {
    let bound = move |part: usize| part * requests.len() / count;
    (0..count).map(move |part| &requests[bound(part)..bound(part + 1)])
}

/// Mean of each extra log over the servers, by the number of requests each answered.
fn mean_logs(answers: &[Answer]) -> Vec<(String, f64)> {
    let mut sums: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for answer in answers {
        let weight = answer.rewards.len() as f64;
        for (name, value) in &answer.extra_logs {
            let (sum, total) = sums.entry(name).or_default();
            (*sum, *total) = (*sum + weight * value, *total + weight);
        }
    }
    sums.into_iter().map(|(name, (sum, total))| (format!("reward/{name}"), sum / total)).collect()
}

impl UrlReward {
    /// Asks one server, again where that may help.
    fn ask(&self, server: &Server, requests: &[RewardRequest]) -> Result<Answer, RewardError> {
        let attempts = self.config.attempts.max(1);
        let mut pause = self.config.first_pause;
        for attempt in 1.. {
            let Failure { problem, may_pass } = match self.ask_once(server, requests) {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            if !may_pass || attempt == attempts {
                let RequestExcerpt { count, prompt, .. } = RequestExcerpt::new(requests, 0);
                return Err(RewardError::Server { url: server.url.clone(), attempt, attempts, count, prompt, problem });
            }
            tracing::warn!(
                "reward server {}: attempt {attempt} of {attempts}: {problem}; again in {pause:?}",
                server.url
            );
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(30));
        }
        unreachable!("the last attempt returns")
    }

    fn ask_once(&self, server: &Server, requests: &[RewardRequest]) -> Result<Answer, Failure> {
        let question = Question {
            query: requests.iter().map(|request| format!("{}{}", request.prompt, request.response)).collect(),
            prompts: requests.iter().map(|request| request.prompt.as_str()).collect(),
            labels: requests.iter().map(|request| request.label.as_deref()).collect(),
        };
        let may_pass = |problem: String| Failure { problem, may_pass: true };
        let final_one = |problem: String| Failure { problem, may_pass: false };
        let sent = server.agent.post(&server.url).send_json(&question);
        let response = sent.map_err(|error| may_pass(format!("no answer: {error}")))?;
        let status = response.status();
        let limit = self.config.max_response_bytes;
        let body = match response.into_body().into_with_config().limit(limit).read_to_vec() {
            Ok(body) => body,
            Err(ureq::Error::BodyExceedsLimit(_)) => {
                return Err(final_one(format!("status {status}: an answer longer than {limit} bytes")));
            }
            Err(error) => {
                return Err(may_pass(format!("status {status}: the answer broke off: {error}")));
            }
        };
        let body = String::from_utf8_lossy(&body);
        let came_back = |problem: String| format!("status {status}: {problem}; body: {:?}", excerpt(&body, 300));
        if !status.is_success() {
            let again = status.is_server_error() || matches!(status.as_u16(), 408 | 429);
            return Err(Failure { problem: came_back("not a success".to_owned()), may_pass: again });
        }
        parse_answer(&body, requests.len()).map_err(|problem| final_one(came_back(problem)))
    }
}

fn parse_answer(body: &str, num_requests: usize) -> Result<Answer, String> {
    let answer: Value = serde_json::from_str(body).map_err(|error| format!("not JSON: {error}"))?;
    let list = answer.get("rewards").ok_or("no \"rewards\" in the answer")?;
    let list = list.as_array().ok_or("\"rewards\" is not a list")?;
    if list.len() != num_requests {
        return Err(format!("{num_requests} requests, {} rewards", list.len()));
    }
    let reward = |(index, value): (usize, &Value)| {
        let number = value.as_f64().filter(|number| number.is_finite());
        number.ok_or_else(|| {
            format!(
                "reward {} of {num_requests} is {}, not a finite number",
                index + 1,
                excerpt(&value.to_string(), 40)
            )
        })
    };
    let rewards = list.iter().enumerate().map(reward).collect::<Result<_, _>>()?;
    let logs = answer.get("extra_logs").and_then(Value::as_object).into_iter().flatten();
    let extra_logs = logs.filter_map(|(name, value)| Some((name.clone(), log_value(value)?))).collect();
    Ok(Answer { rewards, extra_logs })
}

/// A number, or the mean of a list of numbers with one for each query.
fn log_value(value: &Value) -> Option<f64> {
    let Some(list) = value.as_array() else {
        return value.as_f64();
    };
    let numbers: Option<Vec<f64>> = list.iter().map(Value::as_f64).collect();
    let numbers = numbers.filter(|numbers| !numbers.is_empty())?;
    Some(numbers.iter().sum::<f64>() / numbers.len() as f64)
}
