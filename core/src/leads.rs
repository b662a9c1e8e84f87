//! Which statistics a person sees first: an algorithm says it, the monitor shows it.

/// A number that a person sees in a step's line.
#[derive(Clone, Copy, Debug)]
pub struct Lead {
    pub label: &'static str,
    pub metric: &'static str,
    /// After the point.
    pub digits: usize,
    /// A second number after a sign: what, of which metric, with how many digits.
    pub second: Option<(&'static str, &'static str, usize)>,
}

impl Lead {
    pub const fn new(label: &'static str, metric: &'static str, digits: usize) -> Lead {
        Lead { label, metric, digits, second: None }
    }

    /// Such as `0.412 ±0.31`.
    #[must_use]
    pub const fn with(self, sign: &'static str, metric: &'static str, digits: usize) -> Lead {
        Lead { second: Some((sign, metric, digits)), ..self }
    }
}

/// What the report of a run shows first: metrics with their titles.
#[derive(Clone, Copy, Debug)]
pub struct ReportLeads {
    /// Numbers at the top: means of the last steps.
    pub tiles: &'static [(&'static str, &'static str)],
    /// Curves, one chart for each title.
    pub charts: &'static [(&'static str, &'static [&'static str])],
}
