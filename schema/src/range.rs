//! The values a number may take, and what is said of one outside.

/// The values a number may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    min: f64,
    max: f64,
    above: bool,
    below: bool,
}

impl Range {
    /// Every finite number.
    pub const ANY: Range = Range { min: f64::NEG_INFINITY, max: f64::INFINITY, above: false, below: false };

    /// Whether `value` is inside; NaN and infinities never are.
    pub fn contains(&self, value: f64) -> bool {
        let low = if self.above { value > self.min } else { value >= self.min };
        let high = if self.below { value < self.max } else { value <= self.max };
        value.is_finite() && low && high
    }

    /// The range in words, or nothing when every number is allowed.
    pub fn words(&self) -> String {
        let low = if self.above { "above" } else { "at least" };
        let high = if self.below { "below" } else { "at most" };
        match (self.min.is_finite(), self.max.is_finite()) {
            (false, false) => String::new(),
            (true, false) => format!("{low} {}", self.min),
            (false, true) => format!("{high} {}", self.max),
            (true, true) => format!("{low} {} and {high} {}", self.min, self.max),
        }
    }
}

/// `min` and more.
pub const fn at_least(min: f64) -> Range {
    Range { min, ..Range::ANY }
}

/// Most rows or tokens of anything: what is computed of them stays a number.
pub const MOST: f64 = 1e9;

/// More than `min`.
pub const fn above(min: f64) -> Range {
    Range { min, above: true, ..Range::ANY }
}

/// `min` to `max`, both included.
pub const fn between(min: f64, max: f64) -> Range {
    Range { min, max, ..Range::ANY }
}

/// More than `min`, up to and with `max`.
pub const fn above_to(min: f64, max: f64) -> Range {
    Range { min, max, above: true, below: false }
}

/// `min` and more, but less than `max`.
pub const fn from_below(min: f64, max: f64) -> Range {
    Range { min, max, above: false, below: true }
}
