//! What a step found, and what becomes of it: findings with their bounds, verdicts, and `gpu-check.json`.

use serde::{Deserialize, Serialize};

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Passed,
    Failed,
    TimedOut,
    Skipped,
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Passed => "passed",
            Verdict::Failed => "failed",
            Verdict::TimedOut => "timed out",
            Verdict::Skipped => "skipped",
        }
    }
}

/// One thing that a step saw: a number or a word, and where there is one the bound that it must keep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    pub what: String,
    /// A number, a text, or null where it was not measured.
    pub value: serde_json::Value,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub unit: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<String>,
    /// None where nothing was asked of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holds: Option<bool>,
}

/// What a step's process hands to the program that started it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Findings {
    pub found: Vec<Finding>,
    /// Why there was nothing to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// The device is a stand-in: speeds mean nothing and are left out.
    #[serde(default)]
    pub stand_in: bool,
}

impl Findings {
    pub fn new(stand_in: bool) -> Findings {
        Findings { stand_in, ..Findings::default() }
    }

    pub fn skipped(reason: impl Into<String>) -> Findings {
        Findings { skipped: Some(reason.into()), ..Findings::default() }
    }

    fn push(
        &mut self,
        what: String,
        value: impl Into<serde_json::Value>,
        unit: &str,
        bound: Option<String>,
        holds: Option<bool>,
    ) {
        self.found.push(Finding { what, value: value.into(), unit: unit.into(), bound, holds });
    }

    /// Something to know.
    pub fn tell(&mut self, what: impl Into<String>, value: impl Into<serde_json::Value>, unit: &str) {
        self.push(what.into(), value, unit, None, None);
    }

    pub fn at_most(&mut self, what: impl Into<String>, value: f64, bound: f64, unit: &str) {
        self.push(what.into(), value, unit, Some(format!("at most {bound:.3e}")), Some(value <= bound));
    }

    pub fn at_least(&mut self, what: impl Into<String>, value: f64, bound: f64, unit: &str) {
        self.push(what.into(), value, unit, Some(format!("at least {bound}")), Some(value >= bound));
    }

    /// A condition in words.
    pub fn holds(&mut self, what: impl Into<String>, value: impl Into<serde_json::Value>, bound: &str, holds: bool) {
        self.push(what.into(), value, "", Some(bound.into()), Some(holds));
    }

    /// A speed, which must be a number above 0; a stand-in's is not kept, and may be lost in its noise.
    pub fn speed(&mut self, what: impl Into<String>, value: f64, unit: &str) {
        let sound = value.is_finite() && (value > 0.0 || self.stand_in);
        let value = if self.stand_in || !sound { serde_json::Value::Null } else { value.into() };
        self.push(what.into(), value, unit, Some("measured".into()), Some(sound));
    }

    /// The first thing that does not hold, as the cause of a failed step.
    pub fn broken(&self) -> Option<String> {
        let finding = self.found.iter().find(|finding| finding.holds == Some(false))?;
        let bound = finding.bound.as_deref().unwrap_or_default();
        Some(format!("{}: {}, expected {bound}", finding.what, finding.shown()))
    }

    /// The number of that name.
    pub fn number(&self, what: &str) -> Option<f64> {
        self.found.iter().find(|finding| finding.what == what)?.value.as_f64()
    }
}

impl Finding {
    /// The value with its unit, for people.
    pub fn shown(&self) -> String {
        let value = match &self.value {
            serde_json::Value::Number(number) => in_digits(number.as_f64().unwrap_or(f64::NAN)),
            serde_json::Value::String(text) => text.clone(),
            serde_json::Value::Null => return "not measured".into(),
            other => other.to_string(),
        };
        if self.unit.is_empty() { value } else { format!("{value} {}", self.unit) }
    }
}

/// Four digits; whole numbers whole.
fn in_digits(value: f64) -> String {
    if value == value.trunc() && value.abs() < 1e9 {
        return format!("{value:.0}");
    }
    match value.abs() {
        size if !(1e-3..1e6).contains(&size) => format!("{value:.3e}"),
        size if size >= 100.0 => format!("{value:.1}"),
        _ => format!("{value:.4}"),
    }
}

/// A step as the page and the JSON tell it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    pub step: String,
    pub title: String,
    pub verdict: Verdict,
    /// Why it was not passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    pub seconds: f64,
    pub deadline_s: f64,
    pub found: Vec<Finding>,
}

/// `gpu-check.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub program: String,
    pub build: String,
    pub begun: String,
    pub host: String,
    /// The device's name, where one was found.
    pub device: Option<String>,
    pub stand_in: bool,
    pub tiny: bool,
    pub seconds: f64,
    pub steps: Vec<Outcome>,
}

impl Report {
    pub fn count(&self, verdict: Verdict) -> usize {
        self.steps.iter().filter(|step| step.verdict == verdict).count()
    }

    /// Such as `9 passed, 1 failed, 2 skipped`.
    pub fn in_words(&self) -> String {
        let all = [Verdict::Passed, Verdict::Failed, Verdict::TimedOut, Verdict::Skipped];
        let some = all.into_iter().map(|verdict| (self.count(verdict), verdict)).filter(|(count, _)| *count > 0);
        some.map(|(count, verdict)| format!("{count} {}", verdict.name())).collect::<Vec<_>>().join(", ")
    }

    pub fn is_good(&self) -> bool {
        self.count(Verdict::Failed) + self.count(Verdict::TimedOut) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_hold_is_the_cause() {
        let mut findings = Findings::new(false);
        findings.at_most("difference", 1e-6, 1e-4, "");
        assert_eq!(findings.broken(), None);
        findings.at_most("another", 0.25, 1e-4, "nats");
        assert_eq!(findings.broken().unwrap(), "another: 0.2500 nats, expected at most 1.000e-4");
        let mut findings = Findings::new(false);
        findings.at_most("difference", f64::NAN, 1e-4, "");
        assert!(findings.broken().is_some(), "NaN keeps no bound");
    }

    #[test]
    fn a_stand_in_has_no_speed() {
        let mut findings = Findings::new(true);
        findings.speed("copy", 12.0, "GB/s");
        assert_eq!((findings.broken(), findings.number("copy")), (None, None));
        findings.speed("copy", f64::NAN, "GB/s");
        assert_eq!(findings.broken().unwrap(), "copy: not measured, expected measured");
    }
}
