//! Charts as inline SVG: lines over steps, and two distributions side by side.
//!
//! Colours come from the page's style sheet by class, so that a chart follows light and dark.

use std::fmt::Write as _;

use super::fixed;

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 176.0;
const LEFT: f64 = 48.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 24.0;
const MAX_POINTS: usize = 600;

/// One line of a chart.
pub(super) struct Series<'a> {
    /// The metric's name.
    pub name: &'a str,
    /// `(step, value)` in ascending steps; a value that is not finite leaves a gap.
    pub points: &'a [(f64, f64)],
}

/// A chart of one or more series over the same steps; None when no value is finite.
///
/// A single series with at least 20 points gets a second, stronger line: the mean of the last `window` steps.
pub(super) fn line_chart(series: &[Series], window: usize) -> Option<String> {
    let points = || series.iter().flat_map(|series| series.points.iter().copied());
    let finite = || points().filter(|(_, value)| value.is_finite());
    let (low, high) = bounds(finite().map(|(_, value)| value))?;
    let (first, last) = bounds(points().map(|(step, _)| step))?;
    let ticks = nice_ticks(low, high);
    let frame = Frame { x: (first, last), y: (ticks[0].min(low), ticks[ticks.len() - 1].max(high)) };
    let label: Vec<String> = series.iter().map(|series| escape(series.name)).collect();
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{} over steps\" \
         data-first=\"{first}\" data-last=\"{last}\" data-left=\"{LEFT}\" data-right=\"{}\">",
        label.join(", "),
        WIDTH - RIGHT,
    );
    push_axes(&mut svg, &frame, &ticks, "step");
    let smooth = series.len() == 1 && finite().count() >= 20;
    for (index, series) in series.iter().enumerate() {
        let class = if smooth { "raw s0".to_owned() } else { format!("line s{}", index % 6) };
        push_path(&mut svg, &frame, &thinned(series.points), &class);
        if smooth {
            push_path(&mut svg, &frame, &thinned(&trailing_mean(series.points, window)), "line s0");
        }
    }
    let _ = write!(svg, "<line class=\"cursor\" y1=\"{TOP}\" y2=\"{}\"/></svg>", HEIGHT - BOTTOM);
    Some(svg)
}

/// How often values fall into each of some equal bins, `before` and `after` beside each other; None without values.
pub(super) fn distribution_chart(before: &[f64], after: &[f64]) -> Option<String> {
    const BINS: usize = 14;
    let (low, high) = bounds(before.iter().chain(after).copied().filter(|value| value.is_finite()))?;
    let width = if high > low { (high - low) / BINS as f64 } else { 1.0 };
    let shares = |values: &[f64]| -> Vec<f64> {
        let mut shares = vec![0.0; BINS];
        for value in values.iter().filter(|value| value.is_finite()) {
            shares[(((value - low) / width) as usize).min(BINS - 1)] += 100.0 / values.len() as f64;
        }
        shares
    };
    let columns = [shares(before), shares(after)];
    let top = columns.iter().flatten().copied().fold(0.0, f64::max);
    let ticks = nice_ticks(0.0, top);
    let frame = Frame { x: (low, low + width * BINS as f64), y: (0.0, ticks[ticks.len() - 1].max(top)) };
    let mut svg =
        format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"share of responses by reward\">");
    push_axes(&mut svg, &frame, &ticks, "reward");
    let bar = (frame.px(low + width) - frame.px(low)) / 2.0 - 1.0;
    for (column, shares) in columns.iter().enumerate() {
        for (bin, &share) in shares.iter().enumerate().filter(|(_, share)| **share > 0.0) {
            let x = frame.px(low + width * bin as f64) + column as f64 * (bar + 0.5) + 0.5;
            let y = frame.py(share);
            let height = frame.py(0.0) - y;
            let _ = write!(
                svg,
                "<rect class=\"b{column}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{bar:.1}\" height=\"{height:.1}\"/>"
            );
        }
    }
    svg += "</svg>";
    Some(svg)
}

/// A number with up to `digits` significant digits (whole parts stay whole) and no trailing zeros.
pub(super) fn significant(value: f64, digits: i32) -> String {
    let magnitude = value.abs();
    if !value.is_finite() || value == 0.0 || !(1e-4..1e6).contains(&magnitude) {
        return fixed(value, 0);
    }
    let decimals = (digits - 1 - magnitude.log10().floor() as i32).max(0) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Maps steps and values to the drawing.
struct Frame {
    x: (f64, f64),
    y: (f64, f64),
}

impl Frame {
    fn px(&self, x: f64) -> f64 {
        LEFT + position(x, self.x) * (WIDTH - LEFT - RIGHT)
    }

    fn py(&self, y: f64) -> f64 {
        HEIGHT - BOTTOM - position(y, self.y) * (HEIGHT - TOP - BOTTOM)
    }
}

/// Where `value` lies between the ends, 0 to 1; the middle when they are equal.
fn position(value: f64, (low, high): (f64, f64)) -> f64 {
    if high > low { (value - low) / (high - low) } else { 0.5 }
}

fn bounds(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |range, value| match range {
        None => Some((value, value)),
        Some((low, high)) => Some((f64::min(low, value), f64::max(high, value))),
    })
}

/// Three to six round numbers that span `low..high`.
fn nice_ticks(low: f64, high: f64) -> Vec<f64> {
    let span = high - low;
    if span <= low.abs().max(high.abs()) * 1e-9 {
        return vec![low];
    }
    let rough = span / 4.0;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|unit| unit * power).find(|step| *step >= rough).unwrap_or(rough);
    let (first, last) = ((low / step).floor() as i64, (high / step).ceil() as i64);
    (first..=last).map(|index| index as f64 * step).collect()
}

fn push_axes(svg: &mut String, frame: &Frame, ticks: &[f64], unit: &str) {
    let (left, right) = (LEFT, WIDTH - RIGHT);
    let spacing = ticks.get(1).map_or(0.0, |second| second - ticks[0]);
    for tick in ticks {
        let y = frame.py(*tick);
        let (label, below) = (tick_label(*tick, spacing), y + 3.5);
        // Writing to a String cannot fail, here and below.
        let _ = write!(svg, "<line class=\"grid\" x1=\"{left}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>");
        let _ = write!(svg, "<text x=\"{}\" y=\"{below:.1}\" text-anchor=\"end\">{label}</text>", left - 6.0);
    }
    let (base, (first, last)) = (HEIGHT - 7.0, frame.x);
    let _ = write!(svg, "<text x=\"{left}\" y=\"{base}\">{}</text>", significant(first, 4));
    let _ = write!(svg, "<text x=\"{right}\" y=\"{base}\" text-anchor=\"end\">{unit} {}</text>", significant(last, 4));
}

/// A tick with as many decimals as tell it from its neighbours at `spacing`.
fn tick_label(tick: f64, spacing: f64) -> String {
    if !(1e-4..1e5).contains(&spacing) {
        return significant(tick, 4);
    }
    let decimals = (-spacing.log10().floor()).max(0.0) as usize;
    format!("{:.decimals$}", tick + 0.0) // + 0.0: no minus before zero
}

fn push_path(svg: &mut String, frame: &Frame, points: &[(f64, f64)], class: &str) {
    let mut path = String::new();
    let mut pen_down = false;
    for (index, &(step, value)) in points.iter().enumerate() {
        if value.is_finite() {
            let _ = write!(path, "{}{:.1} {:.1}", if pen_down { 'L' } else { 'M' }, frame.px(step), frame.py(value));
            let alone = !pen_down && points.get(index + 1).is_none_or(|(_, next)| !next.is_finite());
            if alone {
                path += "h0"; // a round line cap makes a dot of it
            }
        }
        pen_down = value.is_finite();
    }
    let _ = write!(svg, "<path class=\"{class}\" d=\"{path}\"/>");
}

/// The mean of the finite values among the last `window` points, at each point.
fn trailing_mean(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let mean = |end: usize| {
        let recent = &points[(end + 1).saturating_sub(window)..=end];
        mean_of(recent.iter().map(|(_, value)| *value))
    };
    points.iter().enumerate().map(|(end, (step, _))| (*step, mean(end))).collect()
}

/// The mean of the finite values; NaN without any.
pub(super) fn mean_of(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) =
        values.filter(|value| value.is_finite()).fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    sum / count
}

/// At most some hundred points: of each group the lowest and the highest stay, so that no peak is lost.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    let group = points.len().div_ceil(MAX_POINTS / 2);
    let ends = |points: &[(f64, f64)]| {
        let finite = || points.iter().enumerate().filter(|(_, (_, value))| value.is_finite());
        let low = finite().min_by(|a, b| a.1.1.total_cmp(&b.1.1)).map(|(index, _)| index);
        let high = finite().max_by(|a, b| a.1.1.total_cmp(&b.1.1)).map(|(index, _)| index);
        match (low, high) {
            (Some(low), Some(high)) if low != high => {
                vec![points[low.min(high)], points[low.max(high)]]
            }
            (Some(only), _) => vec![points[only]],
            _ => vec![points[0]],
        }
    };
    points.chunks(group).flat_map(ends).collect()
}

/// `text` for HTML content and quoted attributes.
pub fn escape(text: &str) -> String {
    let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    escaped.replace('"', "&quot;").replace('\'', "&#39;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_span_the_values() {
        assert_eq!(nice_ticks(0.03, 0.91), [0.0, 0.5, 1.0]);
        assert_eq!(nice_ticks(-2.0, 5.9), [-2.0, 0.0, 2.0, 4.0, 6.0]);
        assert_eq!(nice_ticks(3.0, 3.0), [3.0]);
        for (low, high) in [(1e-9, 3e-9), (-1e6, 7e8), (0.999, 1.001), (-5.0, -4.0)] {
            let (ticks, slack) = (nice_ticks(low, high), (high - low) * 1e-9);
            assert!((3..=7).contains(&ticks.len()), "{ticks:?}");
            assert!(ticks[0] <= low + slack && ticks[ticks.len() - 1] >= high - slack, "{ticks:?}");
        }
    }

    #[test]
    fn tick_labels_differ_and_show_no_negative_zero() {
        assert_eq!([1.0001, 1.0002].map(|tick| tick_label(tick, 1e-4)), ["1.0001", "1.0002"]);
        assert_eq!([-0.0, 0.5].map(|tick| tick_label(tick, 0.5)), ["0.0", "0.5"]);
        assert_eq!(tick_label(200.0, 50.0), "200");
    }

    #[test]
    fn four_significant_digits() {
        let cases = [
            (0.412345, "0.4123"),
            (123456.7, "123457"),
            (-0.5, "-0.5"),
            (1e-7, "1.0e-7"),
            (0.0, "0"),
            (410.46, "410.5"),
        ];
        for (value, text) in cases {
            assert_eq!(significant(value, 4), text);
        }
    }

    #[test]
    fn a_gap_breaks_the_line_and_a_lone_point_becomes_a_dot() {
        let points = [(1.0, 0.0), (2.0, f64::NAN), (3.0, 1.0), (4.0, 0.5)];
        let svg = line_chart(&[Series { name: "a<b", points: &points }], 5).unwrap();
        assert!(svg.contains("d=\"M48.0 152.0h0M249.3 10.0L350.0 81.0\""), "{svg}");
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b"));
        assert!(line_chart(&[Series { name: "a", points: &[(1.0, f64::NAN)] }], 5).is_none());
    }

    #[test]
    fn thinning_keeps_the_peaks_and_the_order() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|i| (f64::from(i), (f64::from(i) * 0.01).sin())).collect();
        points[7_777].1 = 50.0;
        points[1_234].1 = -50.0;
        let kept = thinned(&points);
        assert!(kept.len() <= MAX_POINTS);
        assert!(kept.contains(&(7_777.0, 50.0)) && kept.contains(&(1_234.0, -50.0)));
        assert!(kept.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn the_trailing_mean_equals_a_plain_loop() {
        let points: Vec<(f64, f64)> = (0..40).map(|i| (f64::from(i), f64::from(i * i % 7))).collect();
        for (end, (_, mean)) in trailing_mean(&points, 5).into_iter().enumerate() {
            let (mut sum, mut count) = (0.0, 0.0);
            for (_, value) in points.iter().take(end + 1).rev().take(5) {
                sum += value;
                count += 1.0;
            }
            assert!((mean - sum / count).abs() < 1e-12);
        }
    }
}
