//! The terminal: a header, a progress bar inside each long phase, one line per step that stays, and a summary.
//!
//! Where standard output is no terminal, the same lines come plain and whole, and a long phase writes a line now and then.
//! On a terminal a line never wraps: the least important fields of a step are left out until the rest fits.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use console::{measure_text_width, truncate_str};
use echelon_core::leads::Lead;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::{Metrics, duration_text, fixed};

/// Shows a run while it goes. Cheap to use from the driver; a [`Phase`] may be advanced from any thread.
pub struct Terminal {
    screen: Arc<Screen>,
    total_steps: u64,
    pace: Mutex<Pace>,
}

/// Where a [`Terminal`] writes and what it may use; [`TerminalOptions::detect`] asks the environment.
pub struct TerminalOptions {
    /// Columns of the terminal at the time of the call; None writes plain lines, whole and without bars.
    pub width: Box<dyn Fn() -> Option<usize> + Send + Sync>,
    /// Whether escape sequences for colour may be written.
    pub color: bool,
    /// Time since some fixed moment.
    pub clock: Box<dyn Fn() -> Duration + Send + Sync>,
    /// Receives every line.
    pub out: Box<dyn Write + Send>,
    /// Where bars are drawn when there is a width.
    pub bars: ProgressDrawTarget,
}

impl TerminalOptions {
    /// Standard output: bars and width when it is a terminal, colour unless `NO_COLOR` is set or `TERM` is `dumb`.
    pub fn detect() -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let is_terminal = std::io::stdout().is_terminal() && !dumb;
        let start = Instant::now();
        Self {
            width: Box::new(move || is_terminal.then(|| usize::from(console::Term::stdout().size().1).max(20))),
            color: is_terminal && !set("NO_COLOR"),
            clock: Box::new(move || start.elapsed()),
            out: Box::new(std::io::stdout()),
            bars: ProgressDrawTarget::stdout(),
        }
    }
}

impl Terminal {
    /// A terminal on standard output for a run that ends after step `total_steps`.
    pub fn new(total_steps: u64) -> Self {
        Self::with_options(total_steps, TerminalOptions::detect())
    }

    /// A terminal with its surroundings given: for tests, and to write elsewhere.
    pub fn with_options(total_steps: u64, options: TerminalOptions) -> Self {
        let TerminalOptions { width, color, clock, out, bars } = options;
        let bars = MultiProgress::with_draw_target(if width().is_some() { bars } else { ProgressDrawTarget::hidden() });
        let screen = Arc::new(Screen { width, color, clock, out: Mutex::new(out), bars });
        Self { screen, total_steps, pace: Mutex::default() }
    }

    /// The run's first lines: a title, then one line per `(name, value)`, values in one column, long ones wrapped.
    pub fn header(&self, title: &str, rows: &[(&str, String)]) {
        let screen = &self.screen;
        screen.print(&screen.bold(title));
        screen.print_rows(rows);
        screen.print("");
    }

    /// Starts a long phase of `total_units` (responses, say; 0 when unknown). It ends when the handle is dropped.
    pub fn phase(&self, name: &str, total_units: u64) -> Phase {
        Phase::start(Arc::clone(&self.screen), name, total_units)
    }

    /// The line of a finished step.
    pub fn step(&self, line: &StepLine) {
        let eta_s = {
            let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
            pace.finish_step((self.screen.clock)().as_secs_f64(), line.seconds);
            pace.seconds_per_step() * self.total_steps.saturating_sub(line.step) as f64
        };
        self.screen.print(&line.render(self.total_steps, eta_s, &self.screen));
    }

    /// A line of news between the steps, wrapped on a terminal.
    pub fn note(&self, text: &str) {
        let width = (self.screen.width)().unwrap_or(usize::MAX);
        for line in wrap(text, width) {
            self.screen.print(&self.screen.dim(&line));
        }
    }

    /// The run's last lines.
    pub fn summary(&self, outcome: &Summary) {
        let screen = &self.screen;
        screen.print("");
        screen.print(&screen.bold(&format!("done: {} steps in {}", outcome.steps, duration_text(outcome.seconds))));
        screen.print_rows(&outcome.rows());
    }
}

/// How a run ended, for [`Terminal::summary`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Steps of this run, those before a resume included.
    pub steps: u64,
    /// Wall-clock seconds of this program.
    pub seconds: f64,
    /// Held-out prompts behind the two rewards.
    pub num_prompts: usize,
    /// Mean and standard deviation of the held-out rewards before training.
    pub reward_before: Option<(f64, f64)>,
    /// The same after training.
    pub reward_after: Option<(f64, f64)>,
    /// Divergence of the last steps from the reference, when there is one.
    pub kl: Option<f64>,
    /// `report.html`.
    pub report: Option<PathBuf>,
    /// Folder of the trained model.
    pub model: Option<PathBuf>,
    /// Folder of the event files.
    pub tensorboard: Option<PathBuf>,
}

impl Summary {
    fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = Vec::new();
        if let (Some((before, spread)), Some((after, _))) = (self.reward_before, self.reward_after) {
            let mut text =
                format!("{} -> {} on {} held-out prompts", fixed(before, 3), fixed(after, 3), self.num_prompts);
            let _ = write!(text, " ({:+.3}", after - before); // writing to a String cannot fail
            if spread > 0.0 {
                let _ = write!(text, ", {:+.1} std of the start", (after - before) / spread);
            }
            rows.push(("reward", text + ")"));
        }
        let path = |path: &PathBuf| path.display().to_string();
        rows.extend(self.kl.map(|kl| ("kl", fixed(kl, 4))));
        rows.extend(self.model.as_ref().map(|folder| ("model", path(folder))));
        rows.extend(self.report.as_ref().map(|file| ("report", path(file))));
        rows.extend(
            self.tensorboard.as_ref().map(|folder| ("curves", format!("tensorboard --logdir {}", path(folder)))),
        );
        rows
    }
}

/// The line of one step: `step  12/100  reward 0.412 ±0.31  kl 0.0031  …  8.9s (gen 3.1 …)  410 tok/s  eta 13m05s`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepLine {
    /// The step, from 1.
    pub step: u64,
    /// Its wall-clock seconds.
    pub seconds: f64,
    /// Seconds by phase, shown in parentheses: `("gen", 3.1)`.
    pub phases: Vec<(String, f64)>,
    /// Tokens per second of the step.
    pub tokens_per_second: Option<f64>,
    /// Labels and values, the most important first: a narrow terminal drops them from the end.
    pub fields: Vec<(String, String)>,
}

impl StepLine {
    /// The line of a step from its metrics, which `leads` lead; what was not measured is left out.
    pub fn of(step: u64, metrics: &Metrics, leads: &[Lead]) -> Self {
        let get = |name: &str| metrics.get(name).filter(|value| value.is_finite());
        let shown = |name: &str, digits| get(name).map(|value| fixed(value, digits));
        let fields = leads.iter().filter_map(|lead| {
            let first = shown(lead.metric, lead.digits);
            let value = match (first, lead.second) {
                (Some(first), Some((sign, metric, digits))) => match shown(metric, digits) {
                    Some(second) => format!("{first}{sign}{second}"),
                    None => first,
                },
                (None, Some((_, metric, _))) => shown(metric, lead.digits)?,
                (first, None) => first?,
            };
            Some((lead.label.to_owned(), value))
        });
        let timing = |(label, name): (&str, &str)| Some((label.to_owned(), get(&format!("train/timing/{name}"))?));
        Self {
            step,
            seconds: get("train/timing/step_total").unwrap_or(f64::NAN),
            phases: [("gen", "generation"), ("score", "make_experience"), ("train", "ppo_train")]
                .into_iter()
                .filter_map(timing)
                .collect(),
            tokens_per_second: get("perf/tokens_per_second"),
            fields: fields.collect(),
        }
    }

    /// The line in as many columns as the screen has, without its least important parts where it would wrap.
    fn render(&self, total_steps: u64, eta_s: f64, screen: &Screen) -> String {
        let width = (screen.width)().unwrap_or(usize::MAX);
        let detail =
            |fields: usize, phases: bool, speed: bool| self.compose(total_steps, eta_s, fields, phases, speed, screen);
        let all = self.fields.len();
        let candidates = [(all, true, true), (all, false, true)]
            .into_iter()
            .chain((1..all).rev().map(|fields| (fields, false, true)))
            .chain([(1.min(all), false, false)]);
        let mut line = String::new();
        for (fields, phases, speed) in candidates {
            line = detail(fields, phases, speed);
            if measure_text_width(&line) <= width {
                return line;
            }
        }
        truncate_str(&line, width, "").into_owned()
    }

    fn compose(&self, total: u64, eta_s: f64, fields: usize, phases: bool, speed: bool, screen: &Screen) -> String {
        let digits = total.to_string().len();
        let mut line = format!("{} {}", screen.dim("step"), screen.bold(&format!("{:>digits$}/{total}", self.step)));
        let mut push = |label: &str, value: &str| {
            let _ = write!(line, "  {} {value}", screen.dim(label)); // writing to a String cannot fail
        };
        for (label, value) in &self.fields[..fields] {
            let value = if label == "reward" { screen.accent(value) } else { value.clone() };
            push(label, &value);
        }
        if speed {
            let mut seconds = duration_text(self.seconds);
            if phases && !self.phases.is_empty() {
                let parts: Vec<String> =
                    self.phases.iter().map(|(name, s)| format!("{name} {}", fixed(*s, 1))).collect();
                seconds += &format!(" ({})", parts.join(" "));
            }
            line += &format!("  {}", screen.dim(&seconds));
            if let Some(rate) = self.tokens_per_second {
                line += &format!("  {}", screen.dim(&format!("{} tok/s", fixed(rate, 0))));
            }
        }
        if self.step < total {
            let _ = write!(line, "  {} {}", screen.dim("eta"), duration_text(eta_s));
        }
        line
    }
}

/// Mean time of the last steps, evaluations and checkpoints between them included.
#[derive(Debug, Default)]
struct Pace {
    last_end_s: Option<f64>,
    recent_s: VecDeque<f64>,
}

impl Pace {
    const STEPS: usize = 10;

    fn finish_step(&mut self, now_s: f64, step_s: f64) {
        let between_ends = self.last_end_s.replace(now_s).map(|end| now_s - end);
        self.recent_s.push_back(between_ends.unwrap_or(step_s));
        if self.recent_s.len() > Self::STEPS {
            self.recent_s.pop_front();
        }
    }

    fn seconds_per_step(&self) -> f64 {
        self.recent_s.iter().sum::<f64>() / self.recent_s.len() as f64
    }
}

/// A long phase that is under way: a bar on a terminal, else a line every half minute. Dropping it ends it.
pub struct Phase {
    screen: Arc<Screen>,
    name: String,
    total_units: u64,
    bar: ProgressBar,
    units: AtomicU64,
    start: Duration,
    next_line_s: AtomicU64,
}

impl Phase {
    const PLAIN_LINE_EVERY_S: u64 = 30;

    fn start(screen: Arc<Screen>, name: &str, total_units: u64) -> Self {
        let bar = if (screen.width)().is_some() {
            let bar = ProgressBar::new(total_units).with_style(bar_style(total_units, screen.color));
            let bar = screen.bars.add(bar.with_prefix(name.to_owned()));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        } else {
            ProgressBar::hidden()
        };
        let start = (screen.clock)();
        let next_line_s = AtomicU64::new(Self::PLAIN_LINE_EVERY_S);
        Self { screen, name: name.into(), total_units, bar, units: AtomicU64::new(0), start, next_line_s }
    }

    /// `units` more are done. A few atomic operations: call it as often as it happens.
    pub fn advance(&self, units: u64) {
        let done = self.units.fetch_add(units, Ordering::Relaxed) + units;
        self.bar.inc(units);
        if self.bar.is_hidden() {
            self.write_plain_line(done);
        }
    }

    fn write_plain_line(&self, done: u64) {
        let elapsed_s = (self.screen.clock)().saturating_sub(self.start).as_secs();
        let due_s = self.next_line_s.load(Ordering::Relaxed);
        let next_s = elapsed_s + Self::PLAIN_LINE_EVERY_S;
        let claim = || self.next_line_s.compare_exchange(due_s, next_s, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if elapsed_s < due_s || !claim() {
            return;
        }
        let total = if self.total_units > 0 { format!("/{}", self.total_units) } else { String::new() };
        self.screen.print(&format!("  {}: {done}{total}, {}", self.name, duration_text(elapsed_s as f64)));
    }
}

impl Drop for Phase {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        self.screen.bars.remove(&self.bar);
    }
}

fn bar_style(total_units: u64, color: bool) -> ProgressStyle {
    let template = match (total_units, color) {
        (0, _) => "  {prefix:10} {pos}  {elapsed}",
        (_, true) => "  {prefix:10} {wide_bar:.cyan/dim} {pos:>4}/{len:4} {elapsed:>5}",
        (_, false) => "  {prefix:10} {wide_bar} {pos:>4}/{len:4} {elapsed:>5}",
    };
    let elapsed = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        let _ = out.write_str(&duration_text(state.elapsed().as_secs_f64()));
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .with_key("elapsed", elapsed)
        .progress_chars("━━─")
}

/// Where lines go: they are written above the bars that are on the screen.
struct Screen {
    width: Box<dyn Fn() -> Option<usize> + Send + Sync>,
    color: bool,
    clock: Box<dyn Fn() -> Duration + Send + Sync>,
    out: Mutex<Box<dyn Write + Send>>,
    bars: MultiProgress,
}

impl Screen {
    /// Writes one line. Nobody reading it any more (a closed pipe) is no reason to stop a run.
    fn print(&self, line: &str) {
        self.bars.suspend(|| {
            let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        });
    }

    fn print_rows(&self, rows: &[(&str, String)]) {
        let name_width = rows.iter().map(|(name, _)| measure_text_width(name)).max().unwrap_or(0);
        let width = (self.width)().unwrap_or(usize::MAX);
        for (name, value) in rows {
            let padding = " ".repeat(name_width - measure_text_width(name));
            let mut label = self.dim(&format!("  {name}{padding}"));
            for line in wrap(value, width.saturating_sub(name_width + 4).max(20)) {
                self.print(&format!("{label}  {line}"));
                label = " ".repeat(name_width + 2);
            }
        }
    }

    fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }

    fn dim(&self, text: &str) -> String {
        self.paint("2", text)
    }

    fn accent(&self, text: &str) -> String {
        self.paint("36", text)
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }
}

/// `text` in lines of at most `width` columns, broken at spaces; a longer word keeps a line of its own.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.lines() {
        let mut line = String::new();
        for word in paragraph.split(' ') {
            if !line.is_empty() && measure_text_width(&line) + 1 + measure_text_width(word) > width {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        lines.push(line);
    }
    if lines.is_empty() { vec![String::new()] } else { lines }
}

#[cfg(test)]
mod tests {
    use echelon_algorithms::Algorithm;
    use echelon_algorithms::ppo::Ppo;

    use super::*;

    /// Keeps what was written, and a clock that a test moves.
    #[derive(Clone, Default)]
    struct Probe {
        written: Arc<Mutex<Vec<u8>>>,
        now_ms: Arc<AtomicU64>,
    }

    impl Write for Probe {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Probe {
        fn terminal(&self, total_steps: u64, width: Option<usize>, color: bool) -> Terminal {
            let now_ms = Arc::clone(&self.now_ms);
            let options = TerminalOptions {
                width: Box::new(move || width),
                color,
                clock: Box::new(move || Duration::from_millis(now_ms.load(Ordering::Relaxed))),
                out: Box::new(self.clone()),
                bars: ProgressDrawTarget::hidden(),
            };
            Terminal::with_options(total_steps, options)
        }

        fn wait(&self, seconds: u64) {
            self.now_ms.fetch_add(seconds * 1000, Ordering::Relaxed);
        }

        fn text(&self) -> String {
            String::from_utf8(self.written.lock().unwrap().clone()).unwrap()
        }
    }

    fn ppo_metrics() -> Metrics {
        let mut metrics = Metrics::new();
        metrics.set("train/reward", 0.412).set("train/reward_std", 0.311).set("train/kl", 0.0031);
        metrics.set("train/response_length", 17.2).set("train/ppo_clip_ratio", 0.021);
        metrics.set("train/policy_loss", -0.0112).set("train/critic_loss", 0.231);
        metrics.set("train/timing/step_total", 8.9).set("train/timing/generation", 3.1);
        metrics.set("train/timing/make_experience", 2.0).set("train/timing/ppo_train", 3.6);
        metrics.set("perf/tokens_per_second", 410.4);
        metrics
    }

    #[test]
    fn a_plain_step_line_is_whole() {
        let probe = Probe::default();
        probe.terminal(100, None, false).step(&StepLine::of(12, &ppo_metrics(), Ppo::LEADS));
        assert_eq!(
            probe.text(),
            "step  12/100  reward 0.412 ±0.31  kl 0.0031  len 17.2  clip 0.02  loss -0.011/0.23  \
             8.9s (gen 3.1 score 2.0 train 3.6)  410 tok/s  eta 13m03s\n"
        );
    }

    #[test]
    fn a_step_line_fits_any_width_and_keeps_the_reward_longest() {
        for width in 20..160 {
            let probe = Probe::default();
            probe.terminal(100, Some(width), true).step(&StepLine::of(12, &ppo_metrics(), Ppo::LEADS));
            let text = probe.text();
            let line = text.trim_end_matches('\n');
            assert!(measure_text_width(line) <= width, "{width}: {line}");
            assert!(width < 40 || console::strip_ansi_codes(line).contains("reward 0.412"), "{width}: {line}");
        }
        let probe = Probe::default();
        probe.terminal(100, Some(80), false).step(&StepLine::of(12, &ppo_metrics(), Ppo::LEADS));
        assert_eq!(probe.text(), "step  12/100  reward 0.412 ±0.31  kl 0.0031  8.9s  410 tok/s  eta 13m03s\n");
    }

    #[test]
    fn what_was_not_measured_is_left_out() {
        let probe = Probe::default();
        let mut metrics = Metrics::new();
        metrics.set("train/reward", 1.0).set("train/kl", f64::NAN).set("train/timing/step_total", 2.0);
        probe.terminal(3, None, false).step(&StepLine::of(3, &metrics, Ppo::LEADS));
        assert_eq!(probe.text(), "step 3/3  reward 1.000  2.0s\n");
    }

    #[test]
    fn the_eta_counts_the_time_between_steps() {
        let probe = Probe::default();
        let terminal = probe.terminal(4, None, false);
        let first = StepLine { step: 1, seconds: 10.0, ..StepLine::default() };
        terminal.step(&first); // 3 x 10 s
        probe.wait(30); // the step and an evaluation
        terminal.step(&StepLine { step: 2, fields: vec![("loss".into(), "0.5".into())], ..first }); // 2 x mean(10, 30)
        let text = probe.text();
        assert_eq!(text, "step 1/4  10s  eta 30s\nstep 2/4  loss 0.5  10s  eta 40s\n");
    }

    #[test]
    fn colour_only_where_allowed() {
        let (plain, coloured) = (Probe::default(), Probe::default());
        plain.terminal(9, Some(100), false).step(&StepLine::of(1, &ppo_metrics(), Ppo::LEADS));
        coloured.terminal(9, Some(100), true).step(&StepLine::of(1, &ppo_metrics(), Ppo::LEADS));
        assert!(!plain.text().contains('\x1b'));
        assert!(coloured.text().contains("\x1b[36m0.412"));
        assert_eq!(console::strip_ansi_codes(&coloured.text()), plain.text());
    }

    #[test]
    fn a_plain_phase_writes_a_line_every_half_minute() {
        let probe = Probe::default();
        let terminal = probe.terminal(9, None, false);
        let phase = terminal.phase("generate", 64);
        for _ in 0..8 {
            probe.wait(10);
            phase.advance(4);
        }
        drop(phase);
        assert_eq!(probe.text(), "  generate: 12/64, 30s\n  generate: 24/64, 1m00s\n");
    }

    #[test]
    fn a_phase_can_be_advanced_from_several_threads() {
        fn assert_send_sync<T: Send + Sync>(_: &T) {}
        let probe = Probe::default();
        let phase = probe.terminal(9, None, false).phase("score", 4000);
        assert_send_sync(&phase);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| phase.advance(1)));
            }
        });
        assert_eq!(phase.units.load(Ordering::Relaxed), 4000);
    }

    #[test]
    fn a_header_aligns_its_values_and_wraps_long_ones() {
        let probe = Probe::default();
        let rows =
            [("model", "SmolLM2-135M".to_owned()), ("batch", "64 prompts x 4 samples = 256 responses".to_owned())];
        probe.terminal(9, Some(40), false).header("echelon", &rows);
        let text = probe.text();
        assert_eq!(
            text,
            "echelon\n  model  SmolLM2-135M\n  batch  64 prompts x 4 samples = 256\n         responses\n\n"
        );
    }

    #[test]
    fn the_summary_tells_the_gain_and_where_to_look() {
        let probe = Probe::default();
        let outcome = Summary {
            steps: 100,
            seconds: 890.0,
            num_prompts: 200,
            reward_before: Some((0.2, 0.25)),
            reward_after: Some((0.7, 0.2)),
            kl: Some(0.031),
            report: Some("runs/quickstart/report.html".into()),
            tensorboard: Some("runs/quickstart/tensorboard".into()),
            model: None,
        };
        probe.terminal(100, Some(80), false).summary(&outcome);
        assert_eq!(
            probe.text(),
            "\ndone: 100 steps in 14m50s\n\
             \x20 reward  0.200 -> 0.700 on 200 held-out prompts (+0.500, +2.0 std of the start)\n\
             \x20 kl      0.0310\n\
             \x20 report  runs/quickstart/report.html\n\
             \x20 curves  tensorboard --logdir runs/quickstart/tensorboard\n"
        );
    }
}
