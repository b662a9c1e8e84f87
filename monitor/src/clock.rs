//! Where a run's seconds go: its start, the phases of its steps, what is named beside them, and the rest.

use std::time::Instant;

use super::Metrics;

/// Accounts for all of a run's time up to its last step: `perf/start_s`, and per step its phases, what was named
/// ([`RunClock::name`]) and `perf/overhead_s`.
#[derive(Debug)]
pub struct RunClock {
    /// Age of the process when the first step began, until it is told.
    start_s: Option<f64>,
    /// When the last step was recorded, or the first began.
    since: Instant,
    /// Metrics with a name of their own since then.
    named: Vec<(&'static str, f64)>,
}

impl RunClock {
    /// Call when the first step begins.
    pub fn start() -> RunClock {
        RunClock { start_s: process_age(), since: Instant::now(), named: Vec::new() }
    }

    /// Seconds that belong to no phase of a step and yet have a name, such as `perf/evaluation_s`: a metric of the next
    /// step that is recorded.
    pub fn name(&mut self, metric: &'static str, seconds: f64) {
        self.named.push((metric, seconds));
    }

    /// Call when a step's metrics are complete; its phases took `phases_s`.
    pub fn record(&mut self, metrics: &mut Metrics, phases_s: f64) {
        let now = Instant::now();
        let elapsed = (now - self.since).as_secs_f64();
        self.since = now;
        if let Some(start_s) = self.start_s.take() {
            metrics.set("perf/start_s", start_s);
        }
        let mut named_s = 0.0;
        for (metric, seconds) in self.named.drain(..) {
            named_s += seconds;
            let before = metrics.get(metric).unwrap_or(0.0);
            metrics.set(metric, before + seconds);
        }
        metrics.set("perf/overhead_s", (elapsed - phases_s - named_s).max(0.0));
    }
}

/// Seconds since this process was started, its libraries' loading included.
pub fn process_age() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let begun: f64 = stat.rsplit(')').next()?.split_whitespace().nth(19)?.parse().ok()?;
    let uptime: f64 = std::fs::read_to_string("/proc/uptime").ok()?.split_whitespace().next()?.parse().ok()?;
    // SAFETY: asks for a constant of the system.
    Some(uptime - begun / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_second_has_a_name() {
        let mut clock = RunClock::start();
        clock.since -= Duration::from_secs(10);
        clock.name("perf/evaluation_s", 2.0);
        clock.name("perf/evaluation_s", 1.0);
        let mut first = Metrics::new();
        clock.record(&mut first, 6.0);
        assert_eq!(first.get("perf/evaluation_s"), Some(3.0));
        assert!((first.get("perf/overhead_s").unwrap() - 1.0).abs() < 0.5);
        let age = first.get("perf/start_s").unwrap();
        assert!((0.0..3600.0).contains(&age), "{age}");

        let mut second = Metrics::new();
        clock.record(&mut second, 0.0);
        assert_eq!((second.get("perf/start_s"), second.get("perf/evaluation_s")), (None, None));
        assert!(second.get("perf/overhead_s").unwrap() < 0.5);
    }
}
