//! `report.html`: one page about a finished run, made of the files in its folder alone, so that it can be made again.
//!
//! Self-contained: style, script, charts and every number of `metrics.jsonl` (verbatim, as JSON) are inside, and nothing
//! is loaded from anywhere. Charts are drawn here, not by the script, so that the page works without scripts and prints.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use echelon_core::leads::ReportLeads;
use echelon_core::whole_file::write_whole;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

use super::chart::{Series, distribution_chart, escape, line_chart, mean_of, significant};
use super::{METRICS_FILE, MonitorError, PLAN_FILE, SAMPLES_FILE, duration_text, fixed};

/// How a page looks.
pub const STYLE: &str = include_str!("report.css");

/// Name of the report in a run folder.
const REPORT_FILE: &str = "report.html";
/// Steps at each end of a run that stand for its start and its end.
const END_STEPS: usize = 10;
/// Held-out prompts shown at once, and at all.
const OPEN_PAIRS: usize = 6;
const MAX_PAIRS: usize = 30;

/// Writes `report.html` into the run folder from the other files there, and returns its path.
///
/// `leads` says what comes first. Reads `metrics.jsonl`, and where they exist `recipe.resolved.toml`, `plan.txt`, `eval_before.json`, `eval_after.json`
/// and `samples.jsonl`. A torn last line of a killed run is left out.
///
/// # Errors
/// `metrics.jsonl` is missing, a file is damaged, or the report cannot be written.
pub fn write_report(run_dir: &Path, leads: ReportLeads) -> Result<PathBuf, MonitorError> {
    let page = Run::read(run_dir, leads)?.page();
    let path = run_dir.join(REPORT_FILE);
    write_whole(&path, page).map_err(|source| MonitorError::io("write", &path, source))?;
    Ok(path)
}

/// `eval_before.json` and `eval_after.json`: the policy on held-out prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean reward over all responses.
    #[serde(deserialize_with = "null_is_nan")]
    pub mean_reward: f64,
    /// Standard deviation of the rewards over all responses.
    #[serde(deserialize_with = "null_is_nan")]
    pub std_reward: f64,
    /// Held-out prompts; each has one response or more.
    pub num_prompts: usize,
    /// Every response, in the prompts' order.
    pub responses: Vec<EvalResponse>,
}

/// One response of an [`Evaluation`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalResponse {
    pub prompt: String,
    pub response: String,
    #[serde(deserialize_with = "null_is_nan")]
    pub reward: f64,
}

impl Evaluation {
    /// Writes the file that [`write_report`] reads.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), MonitorError> {
        let json =
            serde_json::to_string_pretty(self).map_err(|source| MonitorError::io("write", path, source.into()))?;
        std::fs::write(path, json + "\n").map_err(|source| MonitorError::io("write", path, source))
    }

    /// Reads the file at `path`; None when there is none, or when it holds metrics, as those of `sft` and `reward` do.
    ///
    /// # Errors
    /// The file cannot be read or has another form.
    pub fn read(path: &Path) -> Result<Option<Self>, MonitorError> {
        let Some(text) = read_if_present(path)? else {
            return Ok(None);
        };
        if serde_json::from_str(&text).is_ok_and(|value| is_metrics(&value)) {
            return Ok(None);
        }
        let evaluation = serde_json::from_str(&text);
        evaluation.map(Some).map_err(|source| MonitorError::DamagedFile { path: path.into(), source })
    }

    /// Standard error of the mean reward, counting prompts: responses to one prompt are not independent.
    fn standard_error(&self) -> f64 {
        self.std_reward / (self.num_prompts as f64).sqrt()
    }

    /// The evaluation without its responses, for the page's data.
    fn summary(&self) -> Value {
        json!({ "mean_reward": self.mean_reward, "std_reward": self.std_reward, "num_prompts": self.num_prompts })
    }
}

fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// JSON that cannot end the script element it stands in: `<` occurs only inside JSON's strings, where it may be an escape.
fn script_json(json: &str) -> String {
    json.replace('<', "\\u003c")
}

/// The files of a run folder, read.
struct Run {
    leads: ReportLeads,
    name: String,
    recipe: Option<String>,
    plan: Option<String>,
    /// The lines of `metrics.jsonl` as they stand, and parsed.
    lines: Vec<String>,
    steps: Vec<Map<String, Value>>,
    before: Option<Evaluation>,
    after: Option<Evaluation>,
    /// What a model that learns from examples was measured at before.
    metrics_before: Map<String, Value>,
    samples: Vec<Map<String, Value>>,
}

impl Run {
    fn read(run_dir: &Path, leads: ReportLeads) -> Result<Self, MonitorError> {
        let metrics_path = run_dir.join(METRICS_FILE);
        let missing = || MonitorError::io("read", &metrics_path, ErrorKind::NotFound.into());
        let metrics = read_if_present(&metrics_path)?.ok_or_else(missing)?;
        let (lines, steps) = parse_lines(&metrics, &metrics_path)?.into_iter().unzip();
        let samples_path = run_dir.join(SAMPLES_FILE);
        let samples = read_if_present(&samples_path)?.unwrap_or_default();
        let recipe = read_if_present(&run_dir.join("recipe.resolved.toml"))?;
        Ok(Self {
            leads,
            name: recipe.as_deref().and_then(recipe_name).unwrap_or_else(|| folder_name(run_dir)),
            recipe,
            plan: read_if_present(&run_dir.join(PLAN_FILE))?,
            lines,
            steps,
            metrics_before: metrics_before(&run_dir.join("eval_before.json"))?,
            before: Evaluation::read(&run_dir.join("eval_before.json"))?,
            after: Evaluation::read(&run_dir.join("eval_after.json"))?,
            samples: parse_lines(&samples, &samples_path)?.into_iter().map(|(_, sample)| sample).collect(),
        })
    }

    /// The whole page.
    fn page(&self) -> String {
        let name = escape(&self.name);
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>{name}: training report</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n\
             <p class=\"kind\">Training report</p>\n<h1>{name}</h1>\n\
             <p class=\"lead\">{lead}</p>\n{tiles}{charts}{comparison}{samples}{placement}{settings}\
             <footer>Made by Echelon from the files of this run's folder. Every number of <code>metrics.jsonl</code> is \
             inside this page.</footer>\n</main>\n\
             <script type=\"application/json\" id=\"metrics\">[{metrics}]</script>\n\
             <script type=\"application/json\" id=\"evaluations\">{evaluations}</script>\n\
             <script>\n{script}</script>\n</body>\n</html>\n",
            css = STYLE,
            script = include_str!("report.js"),
            lead = self.lead(),
            tiles = self.tiles(),
            charts = self.charts(),
            comparison = self.comparison(),
            samples = self.training_samples(),
            placement = self.placement(),
            settings = self.settings(),
            metrics = script_json(&self.lines.join(",\n")),
            evaluations = script_json(&self.evaluations().to_string()),
        )
    }

    /// The outcome in one paragraph.
    fn lead(&self) -> String {
        let Some(last_step) = self.steps.last().and_then(|step| step.get("step")?.as_u64()) else {
            return "No step of this run was finished.".into();
        };
        let mut text = match (&self.before, &self.after) {
            (Some(before), Some(after)) => held_out_sentence(before, after),
            _ => self.training_sentence(),
        };
        let kl = self.end_mean("train/kl");
        let end = self.steps.len().min(END_STEPS);
        if kl.is_finite() {
            let _ = write!(
                text,
                " Over the last {end} steps the KL divergence from the reference model is {}.",
                significant(kl, 3)
            );
        }
        let seconds: f64 =
            self.points("train/timing/step_total").iter().map(|(_, s)| *s).filter(|s| s.is_finite()).sum();
        let _ = write!(text, " The run took {} {}", last_step, if last_step == 1 { "step" } else { "steps" });
        if seconds > 0.0 {
            let _ = write!(text, " and {} of training", duration_text(seconds));
        }
        text + "."
    }

    /// What can be said without held-out prompts.
    fn training_sentence(&self) -> String {
        if let Some((_, key, before, after)) = self.held_out().first() {
            let name = key.trim_start_matches("eval/");
            let [before, after] = [before, after].map(|value| significant(*value, 4));
            return format!("On the held-out rows the {name} went from <b>{before}</b> to <b>{after}</b>.");
        }
        let (start, end) = (self.start_mean("train/reward"), self.end_mean("train/reward"));
        let steps = self.steps.len().min(END_STEPS);
        if !start.is_finite() || !end.is_finite() {
            return "The run was not evaluated on held-out prompts.".into();
        }
        format!(
            "The mean reward of the training responses went from <b>{}</b> (first {steps} steps) to <b>{}</b> (last {steps}). \
             The run was not evaluated on held-out prompts.",
            significant(start, 3),
            significant(end, 3)
        )
    }

    /// Of a model that learns from examples: title, key, and what held-out rows were measured at before and at the end.
    fn held_out(&self) -> Vec<(&'static str, &'static str, f64, f64)> {
        let measured = HELD_OUT.iter().filter_map(|&(title, key)| {
            let before = self.metrics_before.get(key)?.as_f64()?;
            let (_, after) = self.points(key).into_iter().next_back()?;
            Some((title, key, before, after))
        });
        measured.collect()
    }

    fn tiles(&self) -> String {
        let mut tiles = String::from("<dl class=\"tiles\">\n");
        let mut push = |class: &str, name: &str, value: String, note: String| {
            let _ = writeln!(tiles, "<div{class}><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>");
        };
        if let (Some(before), Some(after)) = (&self.before, &self.after) {
            let value = format!("{} → {}", fixed(before.mean_reward, 3), fixed(after.mean_reward, 3));
            push(
                " class=\"wide\"",
                "Held-out reward",
                value,
                format!("before → after, n = {} prompts", after.num_prompts),
            );
        } else if !self.metrics_before.is_empty() {
            for (title, _, before, after) in self.held_out() {
                let value = format!("{} → {}", significant(before, 3), significant(after, 3));
                push(" class=\"wide\"", title, value, "before → after".into());
            }
        } else {
            let (name, key) = match self.has("train/loss") {
                true => ("Training loss", "train/loss"),
                false => ("Training reward", "train/reward"),
            };
            let [first, last] = [self.start_mean(key), self.end_mean(key)].map(|mean| significant(mean, 3));
            push(" class=\"wide\"", name, format!("{first} → {last}"), "first → last steps".into());
        }
        let last_steps = format!("mean, last {} steps", self.steps.len().min(END_STEPS));
        for (name, key) in self.leads.tiles.iter().chain(&[("Tokens per second", "perf/tokens_per_second")]) {
            if self.end_mean(key).is_finite() {
                push("", name, significant(self.end_mean(key), 3), last_steps.clone());
            }
        }
        tiles + "</dl>\n"
    }

    fn charts(&self) -> String {
        if self.steps.is_empty() {
            return String::new();
        }
        let window = (self.steps.len() / 20).clamp(3, 50);
        let mut shown: Vec<&str> = vec!["step"];
        let mut main = String::new();
        main.extend(self.rewards_figure());
        for (title, keys) in self.leads.charts.iter().chain(SPEED_CHARTS) {
            let present: Vec<&str> = keys.iter().copied().filter(|key| self.has(key)).collect();
            main.extend(self.figure(title, &present, window));
            shown.extend(present);
        }
        let timing: Vec<&str> = self.names().into_iter().filter(|name| is_phase_time(name)).collect();
        main.extend(self.figure("Seconds by phase", &timing, window));
        shown.extend(timing);
        let others: String = self
            .names()
            .into_iter()
            .filter(|name| !shown.contains(name))
            .filter_map(|name| self.figure(name.rsplit('/').next().unwrap_or(name), &[name], window))
            .collect();
        let mut html = format!(
            "<h2>Curves</h2>\n<p class=\"hint\">Over training steps. Thin: each step; thick: mean of the last {window} steps. \
             Point at a curve for its exact numbers.</p>\n<div class=\"charts\">\n{main}</div>\n"
        );
        if !others.is_empty() {
            let _ = writeln!(
                html,
                "<details class=\"plain\"><summary>Every other metric</summary><div class=\"charts\">\n{others}</div></details>"
            );
        }
        html
    }

    /// One chart of the named metrics with its caption; None when none has a finite value.
    fn figure(&self, title: &str, keys: &[&str], window: usize) -> Option<String> {
        let points: Vec<Vec<(f64, f64)>> = keys.iter().map(|key| self.points(key)).collect();
        let series: Vec<Series> = keys.iter().zip(&points).map(|(name, points)| Series { name, points }).collect();
        let svg = line_chart(&series, window)?;
        let latest = points.iter().map(|points| points.last().map_or(f64::NAN, |(_, value)| *value));
        let latest: Vec<String> = latest.map(|value| significant(value, 4)).collect();
        let names = if let [key] = keys { format!("<code>{}</code>", escape(key)) } else { color_key(keys) };
        Some(format!(
            "<figure data-keys=\"{}\"><figcaption>{}<output>{}</output></figcaption>{names}{svg}</figure>\n",
            escape(&json!(keys).to_string()),
            escape(title),
            if keys.len() == 1 { format!("last {}", latest.join(" · ")) } else { String::new() },
        ))
    }

    /// How the held-out rewards are distributed, before and after.
    fn rewards_figure(&self) -> Option<String> {
        let rewards = |evaluation: &Evaluation| evaluation.responses.iter().map(|r| r.reward).collect::<Vec<_>>();
        let svg = distribution_chart(&rewards(self.before.as_ref()?), &rewards(self.after.as_ref()?))?;
        Some(format!(
            "<figure><figcaption>Held-out rewards<output>% of responses</output></figcaption><ul class=\"key\"><li><i class=\"kb\"></i>before\
             </li><li><i class=\"k0\"></i>after</li></ul>{svg}</figure>\n"
        ))
    }

    fn comparison(&self) -> String {
        let pairs = pairs(self.before.as_ref(), self.after.as_ref());
        if pairs.is_empty() {
            return String::new();
        }
        let shown: Vec<String> = pairs.iter().take(MAX_PAIRS).map(Pair::html).collect();
        let (open, folded) = shown.split_at(shown.len().min(OPEN_PAIRS));
        let mut html = format!(
            "<h2>Before and after</h2>\n<p class=\"hint\">Responses to held-out prompts: the first {} of {}, in the file's order, \
             not chosen by reward.</p>\n{}",
            shown.len(),
            pairs.len(),
            open.concat()
        );
        if !folded.is_empty() {
            let _ = writeln!(
                html,
                "<details class=\"plain\"><summary>{} more</summary>{}</details>",
                folded.len(),
                folded.concat()
            );
        }
        html
    }

    /// Responses of the first, the middle and the last step in `samples.jsonl`.
    fn training_samples(&self) -> String {
        let step_of = |sample: &Map<String, Value>| sample.get("step").and_then(Value::as_u64);
        let mut steps: Vec<u64> = self.samples.iter().filter_map(step_of).collect();
        steps.dedup();
        let (Some(&first), Some(&last)) = (steps.first(), steps.last()) else {
            return String::new();
        };
        let mut chosen = vec![first, steps[steps.len() / 2], last];
        chosen.dedup();
        let mut html = String::from("<h2>Samples from training</h2>\n");
        for step in chosen {
            let samples = self.samples.iter().filter(|sample| step_of(sample) == Some(step)).take(4);
            let samples: String = samples.map(sample_html).collect();
            let _ = writeln!(html, "<details class=\"box\"><summary>Step {step}</summary>{samples}</details>");
        }
        html
    }

    /// Who held what, of a run of several workers.
    fn placement(&self) -> String {
        let measured = match self.has("perf/planned_step_s") {
            true => "; the metrics <code>perf/planned_*</code> rest on rates measured here",
            false => "",
        };
        self.plan.as_ref().map_or_else(String::new, |plan| {
            format!(
                "<h2>Placement</h2>\n<p class=\"hint\">The plan that this run followed last. Its seconds rest on usual rates{measured}.</p>\n\
                 <details class=\"box\"><summary>plan.txt</summary><pre>{}</pre></details>\n",
                escape(plan)
            )
        })
    }

    fn settings(&self) -> String {
        self.recipe.as_ref().map_or_else(String::new, |recipe| {
            format!(
                "<h2>Settings</h2>\n<p class=\"hint\">The resolved recipe: every key with the value this run used.</p>\n\
                 <details class=\"box\" open><summary>recipe.resolved.toml</summary><pre>{}</pre></details>\n",
                escape(recipe)
            )
        })
    }

    fn evaluations(&self) -> Value {
        let summary = |evaluation: &Option<Evaluation>| evaluation.as_ref().map(Evaluation::summary);
        json!({ "before": summary(&self.before), "after": summary(&self.after) })
    }

    /// Names of all metrics, in the order they first occur.
    fn names(&self) -> Vec<&str> {
        let mut seen = std::collections::HashSet::new();
        self.steps.iter().flat_map(Map::keys).map(String::as_str).filter(|name| seen.insert(*name)).collect()
    }

    fn has(&self, name: &str) -> bool {
        self.steps.iter().any(|step| step.contains_key(name))
    }

    /// `(step, value)` of every step that has the metric; null becomes NaN.
    fn points(&self, name: &str) -> Vec<(f64, f64)> {
        let point = |step: &Map<String, Value>| {
            Some((step.get("step")?.as_f64()?, step.get(name)?.as_f64().unwrap_or(f64::NAN)))
        };
        self.steps.iter().filter_map(point).collect()
    }

    fn start_mean(&self, name: &str) -> f64 {
        mean_of(self.points(name).iter().take(END_STEPS).map(|(_, value)| *value))
    }

    fn end_mean(&self, name: &str) -> f64 {
        mean_of(self.points(name).iter().rev().take(END_STEPS).map(|(_, value)| *value))
    }
}

/// Curves of every run, behind those that its algorithm leads with.
const SPEED_CHARTS: &[(&str, &[&str])] =
    &[("Tokens per second", &["perf/tokens_per_second"]), ("Model FLOP/s utilisation", &["perf/mfu"])];

/// What held-out rows of a model that learns from examples are measured at, the first of them in words.
const HELD_OUT: [(&str, &str); 3] = [
    ("Held-out accuracy", "eval/accuracy"),
    ("Held-out loss", "eval/loss"),
    ("Held-out perplexity", "eval/perplexity"),
];

/// The metrics in `eval_before.json`, as `sft` and `reward` write them; none where it holds an [`Evaluation`].
fn metrics_before(path: &Path) -> Result<Map<String, Value>, MonitorError> {
    let text = read_if_present(path)?.unwrap_or_default();
    Ok(serde_json::from_str(&text).ok().filter(is_metrics).unwrap_or_default())
}

/// Whether a JSON object is metrics, whose names are paths.
fn is_metrics(object: &Map<String, Value>) -> bool {
    object.keys().any(|key| key.contains('/'))
}

fn is_phase_time(name: &str) -> bool {
    name.starts_with("train/timing/") && name != "train/timing/step_total"
}

fn held_out_sentence(before: &Evaluation, after: &Evaluation) -> String {
    let gain = after.mean_reward - before.mean_reward;
    let mean = |evaluation: &Evaluation| {
        format!("<b>{}</b>\u{a0}±\u{a0}{}", fixed(evaluation.mean_reward, 3), fixed(evaluation.standard_error(), 3))
    };
    let direction = if gain > 0.0 { "rose" } else { "went" };
    let mut text = format!(
        "On {} held-out prompts the mean reward {direction} from {} to {} (± is the standard error)",
        after.num_prompts,
        mean(before),
        mean(after)
    );
    if before.std_reward > 0.0 {
        let relative = gain / before.std_reward;
        let _ = write!(text, ": {gain:+.3}, or {relative:+.2} standard deviations of the rewards before training");
    }
    text + "."
}

fn color_key(keys: &[&str]) -> String {
    let entry = |(index, key): (usize, &&str)| {
        let short = key.strip_prefix("train/").unwrap_or(key);
        let short = short.strip_prefix("timing/").unwrap_or(short);
        format!("<li><i class=\"k{}\"></i>{}</li>", index % 6, escape(short))
    };
    format!("<ul class=\"key\">{}</ul>", keys.iter().enumerate().map(entry).collect::<String>())
}

/// One held-out prompt with what was said before and after training.
struct Pair<'a> {
    prompt: &'a str,
    before: Option<&'a EvalResponse>,
    after: Option<&'a EvalResponse>,
}

impl Pair<'_> {
    fn html(&self) -> String {
        let change = match (self.before, self.after) {
            (Some(before), Some(after)) => after.reward - before.reward,
            _ => 0.0,
        };
        let class = match change.partial_cmp(&0.0) {
            Some(Ordering::Greater) => "up",
            Some(Ordering::Less) => "down",
            _ => "",
        };
        let side = |title: &str, class: &str, said: Option<&EvalResponse>| match said {
            Some(EvalResponse { response, reward, .. }) => format!(
                "<section><h3>{title}<span class=\"{class}\">reward {}</span></h3><p class=\"said\">{}</p></section>",
                fixed(*reward, 3),
                escape(response)
            ),
            None => {
                format!("<section><h3>{title}</h3><p class=\"said\">(no response)</p></section>")
            }
        };
        format!(
            "<article class=\"pair\"><p class=\"said\">{}</p><div>{}{}</div></article>\n",
            escape(self.prompt),
            side("before", "", self.before),
            side("after", class, self.after)
        )
    }
}

/// Responses to the same prompt side by side, in the order of `before`; the k-th of a prompt meets its k-th.
fn pairs<'a>(before: Option<&'a Evaluation>, after: Option<&'a Evaluation>) -> Vec<Pair<'a>> {
    let responses = |evaluation: Option<&'a Evaluation>| evaluation.map_or(&[][..], |evaluation| &evaluation.responses);
    let mut later: HashMap<&str, VecDeque<&EvalResponse>> = HashMap::new();
    for response in responses(after) {
        later.entry(&response.prompt).or_default().push_back(response);
    }
    let mut pairs = Vec::new();
    for response in responses(before) {
        let after = later.get_mut(response.prompt.as_str()).and_then(VecDeque::pop_front);
        pairs.push(Pair { prompt: &response.prompt, before: Some(response), after });
    }
    for response in responses(after) {
        let unmatched = later.get_mut(response.prompt.as_str()).and_then(|queue| {
            queue.front().is_some_and(|first| std::ptr::eq(*first, response)).then(|| queue.pop_front()).flatten()
        });
        pairs.extend(unmatched.map(|after| Pair { prompt: &response.prompt, before: None, after: Some(after) }));
    }
    pairs
}

fn sample_html(sample: &Map<String, Value>) -> String {
    let text = |key: &str| escape(sample.get(key).and_then(Value::as_str).unwrap_or_default());
    let number = |key: &str| significant(sample.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN), 3);
    format!(
        "<article class=\"pair\"><p class=\"said\">{}</p><section><h3>score {} · reward {} · kl {}</h3><p class=\"said\">{}</p></section></article>\n",
        text("prompt"),
        number("score"),
        number("reward"),
        number("kl"),
        text("response")
    )
}

/// A line as it stands in its file, and the object it holds.
type ParsedLine = (String, Map<String, Value>);

/// Each line of a JSON-lines file as it stands, with its object. A last line that a kill tore is left out.
fn parse_lines(text: &str, path: &Path) -> Result<Vec<ParsedLine>, MonitorError> {
    let mut lines = Vec::new();
    let mut all = text.split_inclusive('\n').enumerate().peekable();
    while let Some((index, line)) = all.next() {
        match serde_json::from_str::<Map<String, Value>>(line) {
            Ok(object) if object.contains_key("step") => lines.push((line.trim_end().to_owned(), object)),
            _ if all.peek().is_none() => break,
            _ => {
                return Err(MonitorError::DamagedLine { path: path.into(), line: index + 1 });
            }
        }
    }
    Ok(lines)
}

fn read_if_present(path: &Path) -> Result<Option<String>, MonitorError> {
    match std::fs::read(path) {
        // A torn last line may end inside a character.
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(MonitorError::io("read", path, error)),
    }
}

/// The resolved recipe has one key per line; `name` stands above the first table.
fn recipe_name(recipe: &str) -> Option<String> {
    let mut top = recipe.lines().take_while(|line| !line.starts_with('['));
    let value = top.find_map(|line| line.strip_prefix("name = "))?;
    Some(value.trim().trim_matches(['"', '\'']).to_owned())
}

fn folder_name(run_dir: &Path) -> String {
    let whole = std::fs::canonicalize(run_dir).unwrap_or_else(|_| run_dir.into());
    whole.file_name().map_or_else(|| "run".into(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use echelon_algorithms::Algorithm;
    use echelon_algorithms::ppo::Ppo;

    use super::*;
    use crate::Metrics;
    use crate::metrics::JsonLines;

    const HOSTILE: &str = "</script><script>alert(1)</script> & <b> \"quoted\" 'single' <!--";

    fn evaluation(mean_reward: f64) -> Evaluation {
        let response = |index: usize| EvalResponse {
            prompt: format!("{HOSTILE} {index}"),
            response: format!("{HOSTILE} answer {mean_reward}"),
            reward: mean_reward + index as f64 * 0.01,
        };
        Evaluation { mean_reward, std_reward: 0.2, num_prompts: 4, responses: (0..4).map(response).collect() }
    }

    fn run_folder() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut log = JsonLines::create(&path(METRICS_FILE)).unwrap();
        for step in 1..=40_u32 {
            let mut metrics = Metrics::new();
            metrics.set("train/reward", f64::from(step).sqrt() / 7.0).set("train/kl", f64::from(step) * 1e-3);
            metrics.set("train/timing/generation", 1.5).set("train/timing/step_total", 3.0);
            metrics.set(HOSTILE, if step == 3 { f64::NAN } else { 0.1 + f64::from(step) / 3.0 });
            log.append(&[metrics.to_json(u64::from(step))]).unwrap();
        }
        std::fs::write(path("recipe.resolved.toml"), format!("name = 'a <b> run'\nseed = 1 # {HOSTILE}\n")).unwrap();
        evaluation(0.25).write(&path("eval_before.json")).unwrap();
        evaluation(0.75).write(&path("eval_after.json")).unwrap();
        let sample =
            json!({ "step": 1, "prompt": HOSTILE, "response": HOSTILE, "reward": 0.5, "score": 1.0, "kl": null });
        std::fs::write(path(SAMPLES_FILE), format!("{sample}\n")).unwrap();
        directory
    }

    fn report(directory: &Path) -> String {
        std::fs::read_to_string(write_report(directory, Ppo::REPORT).unwrap()).unwrap()
    }

    /// The JSON inside the script element of that id, found as a browser finds it: up to the first `</script`.
    fn embedded(page: &str, id: &str) -> Value {
        let (_, rest) = page.split_once(&format!("id=\"{id}\">")).unwrap();
        serde_json::from_str(rest.split("</script").next().unwrap()).unwrap()
    }

    #[test]
    fn the_embedded_numbers_equal_those_of_metrics_jsonl() {
        let directory = run_folder();
        let page = report(directory.path());
        let lines = std::fs::read_to_string(directory.path().join(METRICS_FILE)).unwrap();
        let expected: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(embedded(&page, "metrics"), Value::Array(expected));
        assert_eq!(embedded(&page, "evaluations")["after"]["mean_reward"], json!(0.75));
    }

    #[test]
    fn text_of_a_run_cannot_become_markup() {
        let directory = run_folder();
        let page = report(directory.path());
        assert!(!page.contains("<script>alert"));
        assert!(!page.contains("<b> \"quoted\""));
        assert!(page.contains("<title>a &lt;b&gt; run: training report</title>"));
        assert_eq!(page.matches("</script").count(), 3);
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        let directory = run_folder();
        let page = report(directory.path());
        for forbidden in ["http:", "https:", "src=", "<link", "@import", "url("] {
            assert!(!page.contains(forbidden), "{forbidden}");
        }
    }

    #[test]
    fn the_outcome_names_gain_error_count_and_kl() {
        let directory = run_folder();
        let page = report(directory.path());
        assert!(page.contains("On 4 held-out prompts the mean reward rose from <b>0.250</b>\u{a0}±\u{a0}0.100 to <b>0.750</b>\u{a0}±\u{a0}0.100"));
        assert!(page.contains(": +0.500, or +2.50 standard deviations"));
        assert!(page.contains("KL divergence from the reference model is 0.0355"));
        assert!(page.contains("40 steps and 2m00s of training"));
    }

    #[test]
    fn a_report_needs_metrics_only_and_tolerates_a_torn_line() {
        let directory = run_folder();
        for name in ["recipe.resolved.toml", "eval_before.json", "eval_after.json", SAMPLES_FILE] {
            std::fs::remove_file(directory.path().join(name)).unwrap();
        }
        let path = directory.path().join(METRICS_FILE);
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, whole + "{\"step\":41,\"train/re").unwrap();
        let page = report(directory.path());
        assert!(page.contains("not evaluated on held-out prompts"));
        assert_eq!(embedded(&page, "metrics").as_array().unwrap().len(), 40);

        std::fs::write(&path, "").unwrap();
        assert!(report(directory.path()).contains("No step of this run was finished"));
        std::fs::remove_file(&path).unwrap();
        let error = write_report(directory.path(), Ppo::REPORT).unwrap_err().to_string();
        assert!(error.contains(METRICS_FILE), "{error}");
    }

    #[test]
    fn a_run_that_learns_from_examples_is_told_by_its_held_out_rows() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("eval_before.json"), r#"{"eval/loss": 2.5, "eval/perplexity": 12.1825}"#).unwrap();
        let mut log = JsonLines::create(&path(METRICS_FILE)).unwrap();
        for step in 1..=4_u32 {
            let mut metrics = Metrics::new();
            metrics.set("train/loss", 3.0 / f64::from(step));
            if step == 4 {
                metrics.set("eval/loss", 0.75).set("eval/perplexity", 2.117);
            }
            log.append(&[metrics.to_json(u64::from(step))]).unwrap();
        }
        std::fs::write(path(PLAN_FILE), "4 devices <of one>").unwrap();
        let page = report(directory.path());
        assert!(
            page.contains("On the held-out rows the loss went from <b>2.5</b> to <b>0.75</b>."),
            "{}",
            &page[..4000]
        );
        assert!(page.contains("Held-out perplexity") && page.contains("12.2 → 2.12"));
        assert!(!page.contains("not evaluated") && !page.contains("Training reward"));
        assert!(page.contains("<h2>Placement</h2>") && page.contains("<pre>4 devices &lt;of one&gt;</pre>"));
    }

    #[test]
    fn a_damaged_evaluation_is_named() {
        let directory = run_folder();
        std::fs::write(directory.path().join("eval_after.json"), "{\"mean_reward\": \"high\"}").unwrap();
        let error = write_report(directory.path(), Ppo::REPORT).unwrap_err().to_string();
        assert!(error.contains("eval_after.json") && error.contains("line 1"), "{error}");
    }

    #[test]
    fn responses_meet_by_prompt_and_occurrence() {
        let said = |prompt: &str, response: &str| EvalResponse {
            prompt: prompt.into(),
            response: response.into(),
            reward: 0.0,
        };
        let of = |responses| Evaluation { mean_reward: 0.0, std_reward: 0.0, num_prompts: 1, responses };
        let before = of(vec![said("p", "p1"), said("q", "q1"), said("p", "p2")]);
        let after = of(vec![said("p", "P1"), said("p", "P2"), said("r", "R1")]);
        let side = |response: Option<&EvalResponse>| response.map_or("-".to_owned(), |r| r.response.clone());
        let met: Vec<(String, String)> =
            pairs(Some(&before), Some(&after)).iter().map(|pair| (side(pair.before), side(pair.after))).collect();
        let expected = [("p1", "P1"), ("q1", "-"), ("p2", "P2"), ("-", "R1")];
        assert_eq!(met, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }
}
