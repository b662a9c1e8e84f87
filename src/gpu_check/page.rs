//! `gpu-check.html`: the check on one page, in the style of a run's report. Self-contained.

use std::fmt::Write as _;

use super::Step;
use super::verdict::{Finding, Outcome, Report, Verdict};
use echelon_monitor::{STYLE as REPORT_STYLE, escape};

/// Beside the run report's style.
const STYLE: &str = "\
.step { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; margin: 0 0 .8rem; padding: .8rem 1rem; }
.step h3 { font-size: 1rem; color: var(--text); margin: 0; }
.step p { margin: .2rem 0 .5rem; color: var(--muted); font-size: .9rem; max-width: 60rem; }
.step p.why { color: var(--down); }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
td { padding: .2rem .6rem .2rem 0; border-top: 1px solid var(--rule); vertical-align: top; overflow-wrap: anywhere; }
td:first-child { width: 46%; color: var(--muted); } td:last-child { width: 22%; color: var(--muted); }
.banner { border: 2px solid var(--down); border-radius: 8px; padding: .6rem 1rem; max-width: 46rem; }
";

/// The whole page.
pub fn page(report: &Report) -> String {
    let device = report.device.as_deref().unwrap_or("no device");
    let title = if report.stand_in { format!("a stand-in for {device}") } else { device.to_owned() };
    let steps: String = report.steps.iter().map(step).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}: GPU check</title>\n<style>\n{css}{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <p class=\"kind\">GPU check</p>\n<h1>{title}</h1>\n<p class=\"lead\">{lead}</p>\n{banner}{tiles}\
         <h2>Steps</h2>\n<p class=\"hint\">In order of worth, each in a process of its own with a deadline. A step's bounds \
         and their reasons: docs/gpu.md.</p>\n{steps}\
         <footer>Made by Echelon's gpu-check, build {build}, on {host}, begun {begun}. The same in \
         <code>gpu-check.json</code>; what each step's process said in <code>logs/</code>.</footer>\n\
         </main>\n</body>\n</html>\n",
        title = escape(&title),
        css = REPORT_STYLE,
        lead = escape(&lead(report)),
        banner = banner(report),
        tiles = tiles(report),
        build = escape(&report.build),
        host = escape(&report.host),
        begun = escape(&report.begun),
    )
}

fn lead(report: &Report) -> String {
    let size = if report.tiny { " with tiny models" } else { "" };
    format!("{} steps{size} in {:.0} seconds: {}.", report.steps.len(), report.seconds, report.in_words())
}

fn banner(report: &Report) -> &'static str {
    if !report.stand_in {
        return "";
    }
    "<p class=\"banner\"><b>This was a stand-in for CUDA on a CPU, no GPU.</b> It shows that the programs' GPU path runs to \
     its end and gives the CPU's numbers. CUDA's own numerics and every speed are not shown: none was measured.</p>\n"
}

fn tiles(report: &Report) -> String {
    let mut tiles = String::from("<dl class=\"tiles\">\n");
    for verdict in [Verdict::Passed, Verdict::Failed, Verdict::TimedOut, Verdict::Skipped] {
        let _ = writeln!(tiles, "<div><dt>{}</dt><dd>{}</dd></div>", verdict.name(), report.count(verdict));
    }
    tiles + "</dl>\n"
}

fn step(outcome: &Outcome) -> String {
    let class = match outcome.verdict {
        Verdict::Passed => "up",
        Verdict::Failed | Verdict::TimedOut => "down",
        Verdict::Skipped => "",
    };
    let why = outcome.why.as_ref().map_or(String::new(), |why| format!("<p class=\"why\">{}</p>\n", escape(why)));
    let meaning = Step::find(&outcome.step).map_or("", |step| step.meaning);
    let rows: String = outcome.found.iter().map(row).collect();
    let table = if rows.is_empty() { rows } else { format!("<table>\n{rows}</table>\n") };
    format!(
        "<section class=\"step\" id=\"{name}\"><h3>{title} ({name})<span class=\"{class}\">{verdict} · {seconds:.1} s of \
         {deadline:.0}</span></h3>\n<p>{meaning}</p>\n{why}{table}</section>\n",
        name = escape(&outcome.step),
        title = escape(&outcome.title),
        verdict = outcome.verdict.name(),
        seconds = outcome.seconds,
        deadline = outcome.deadline_s,
        meaning = escape(meaning),
    )
}

fn row(finding: &Finding) -> String {
    let class = match finding.holds {
        Some(false) => " class=\"down\"",
        _ => "",
    };
    format!(
        "<tr><td>{}</td><td{class}>{}</td><td>{}</td></tr>\n",
        escape(&finding.what),
        escape(&finding.shown()),
        escape(finding.bound.as_deref().unwrap_or_default())
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu_check::STEPS;
    use crate::gpu_check::verdict::Findings;

    const HOSTILE: &str = "</section><script>alert(1)</script> & \"x\"";

    fn report(stand_in: bool) -> Report {
        let mut findings = Findings::new(stand_in);
        findings.speed("copy", 4000.0, "GB/s");
        findings.at_most(HOSTILE, 1.0, 0.5, "");
        let outcome = |step: &Step| Outcome {
            step: step.name.into(),
            title: step.title.into(),
            verdict: Verdict::Failed,
            why: findings.broken(),
            seconds: 1.0,
            deadline_s: step.deadline_s,
            found: findings.found.clone(),
        };
        Report {
            program: "gpu-check".into(),
            build: "1".into(),
            begun: "now".into(),
            host: HOSTILE.into(),
            device: Some("NVIDIA H200".into()),
            stand_in,
            tiny: false,
            seconds: 9.0,
            steps: STEPS.iter().map(outcome).collect(),
        }
    }

    #[test]
    fn every_step_is_on_the_page_and_no_text_becomes_markup() {
        let page = page(&report(false));
        for step in STEPS {
            assert!(page.contains(&format!("id=\"{}\"", step.name)), "{}", step.name);
        }
        assert!(!page.contains("<script") && page.contains("4000 GB/s") && !page.contains("banner\">"));
        for forbidden in ["http:", "https:", "src=", "<link", "@import", "url("] {
            assert!(!page.contains(forbidden), "{forbidden}");
        }
    }

    #[test]
    fn a_stand_in_is_named_and_has_no_speeds() {
        let page = page(&report(true));
        assert!(page.contains("<title>a stand-in for NVIDIA H200: GPU check</title>"));
        assert!(page.contains("no GPU") && page.contains("not measured") && !page.contains("4000 GB/s"));
    }
}
