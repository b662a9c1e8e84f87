//! `gpu-check`: one program for the first hour with a real GPU.
//!
//! Steps in order of worth ([`STEPS`]), each in a process of its own with a deadline ([`child`]), each with a verdict. A step
//! that fails, crashes or hangs costs its deadline and no more, and the rest goes on. What was found goes to the terminal at
//! once, and after every step into `gpu-check.json` and `gpu-check.html` ([`verdict`], [`page`]): what ends the check early
//! loses nothing that was found.

pub mod child;
pub mod verdict;

mod page;
mod place;

mod device;
mod learning;
mod numbers;
mod same;

mod models;
mod peer;
mod speed;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use self::child::End;
use self::models::{HALF_BILLION, ONE_AND_A_HALF_BILLION};
use self::place::{Place, SCRATCH};
use self::verdict::{Findings, Outcome, Report, Verdict};
use crate::options::{Options, Usage};
use crate::program::{Failure, write_whole};

/// The command line. `--step NAME --found FILE` is what a step's process is begun with.
pub const USAGE: Usage = Usage {
    text: "usage: gpu-check [--out DIR] [--only NAME,NAME] [--peer PYTHON] [--tiny] [--deadline-scale X]
  --out DIR             where gpu-check.json and gpu-check.html go (runs/gpu-check, or the next free name)
  --only NAME,NAME      these steps alone, after `device` (docs/gpu.md names them)
  --peer PYTHON         measure transformers beside it, with this Python (PyTorch and transformers)
  --tiny                small models and few repeats: verdicts without meaningful speeds
  --deadline-scale X    every deadline, and the 8 minutes of all, times X (1)",
    values: &["out", "only", "peer", "deadline-scale", "step", "found"],
    flags: &["tiny"],
    words: &[],
};

/// What all steps may take together.
const TOTAL_S: f64 = 480.0;

/// A part of the check.
pub struct Step {
    /// As `--only` and the page name it.
    pub name: &'static str,
    pub title: &'static str,
    /// For the reader of the page.
    pub meaning: &'static str,
    pub deadline_s: f64,
    run: fn(&Place) -> Result<Findings, Failure>,
}

/// In order of worth.
pub const STEPS: [Step; 17] = [
    Step {
        name: DEVICE,
        title: "Device found",
        meaning: "Driver, card, memory, who else is on it; libtorch's CUDA libraries load and add numbers.",
        deadline_s: 35.0,
        run: device::find,
    },
    Step {
        name: "log-probs",
        title: "Log-probs against the CPU's",
        meaning: "Real and random weights: float32 without TF32 and bfloat16, gradients, and the engine beside scoring.",
        deadline_s: 30.0,
        run: numbers::logprobs,
    },
    Step {
        name: "quickstart",
        title: "The quickstart learns",
        meaning: "`ppo recipes/quickstart.toml` on the device: the reward on held-out prompts rises.",
        deadline_s: 50.0,
        run: learning::quickstart,
    },
    Step {
        name: "zero",
        title: "ZeRO 0 and 3 on one rank",
        meaning: "The same PPO steps under both: equal metrics. One rank divides nothing: the layout is tried, not gathers.",
        deadline_s: 30.0,
        run: same::zero,
    },
    Step {
        name: "nccl",
        title: "NCCL, a group of one",
        meaning: "The library loads, connects and runs every collective that training uses, on one device.",
        deadline_s: 15.0,
        run: device::nccl,
    },
    Step {
        name: "offload",
        title: "Optimizer state in host memory",
        meaning: "The same PPO steps with `adam_offload` and without: equal metrics.",
        deadline_s: 25.0,
        run: same::offload,
    },
    Step {
        name: "node-reuse",
        title: "Node reuse",
        meaning: "The same PPO steps with state that leaves the device while the generator works: equal metrics.",
        deadline_s: 25.0,
        run: same::node_reuse,
    },
    Step {
        name: "memory",
        title: "Memory against the ledger",
        meaning: "What the quickstart's phases took on the device, as its allocator counts, beside what the planner counts on.",
        deadline_s: 25.0,
        run: learning::memory,
    },
    Step {
        name: "deterministic",
        title: "The same again, bit for bit",
        meaning: "Two runs with `train.deterministic = true`: equal metrics, samples and weights.",
        deadline_s: 45.0,
        run: learning::deterministic,
    },
    Step {
        name: "rates",
        title: "What the device can do",
        meaning: "Copy bandwidth and matmul rates as libtorch reaches them here: what the parts below are parts of.",
        deadline_s: 20.0,
        run: speed::rates,
    },
    Step {
        name: "decode-0.5b",
        title: "Decoding, 0.5 billion parameters",
        meaning: "Decoding must read all weights and the cache once a step: that many bytes a second, as a part of the copy bandwidth.",
        deadline_s: 25.0,
        run: |place| speed::decode(place, HALF_BILLION),
    },
    Step {
        name: "decode-1.5b",
        title: "Decoding, 1.5 billion parameters",
        meaning: "The same with a larger model.",
        deadline_s: 30.0,
        run: |place| speed::decode(place, ONE_AND_A_HALF_BILLION),
    },
    Step {
        name: "passes-0.5b",
        title: "Prefill and training, 0.5 billion parameters",
        meaning: "Useful operations a second as a part of the bfloat16 matmul rate; recomputation does not count.",
        deadline_s: 25.0,
        run: |place| speed::passes(place, HALF_BILLION),
    },
    Step {
        name: "passes-1.5b",
        title: "Prefill and training, 1.5 billion parameters",
        meaning: "The same with a larger model.",
        deadline_s: 30.0,
        run: |place| speed::passes(place, ONE_AND_A_HALF_BILLION),
    },
    Step {
        name: "ppo-step",
        title: "A PPO step, 0.5 billion parameters",
        meaning: "`ppo` with actor, critic and reference of that size, random weights from a file, and its memory beside the ledger.",
        deadline_s: 45.0,
        run: learning::ppo_step,
    },
    Step {
        name: "hand-over",
        title: "Weight hand-over",
        meaning: "Trained state to pinned host memory and back, as node reuse moves it. A generator on the same device shares the actor's weights: nothing is handed over there.",
        deadline_s: 10.0,
        run: speed::hand_over,
    },
    Step {
        name: "launches",
        title: "Host time by layer",
        meaning: "A model so narrow that the device waits for the host: seconds of a decoding step and of a micro-batch by layer, in launches of this machine. Launches are not counted: that needs a profiler.",
        deadline_s: 15.0,
        run: speed::launches,
    },
];

/// The last step, where a Python is named.
pub const PEER: Step = Step {
    name: "peer",
    title: "Beside transformers",
    meaning: "The same decoding, prefill and training by transformers in turns with ours; above 1 is in our favour.",
    deadline_s: 75.0,
    run: peer::peer,
};

const DEVICE: &str = "device";

/// A measurement that needs libtorch set up in another way, in a process of step `rates`.
const TF32: &str = "tf32";

/// What tests of deadlines ask for: a step that never ends.
const HANG: &str = "hang";

impl Step {
    pub fn find(name: &str) -> Option<&'static Step> {
        static LAST: Step = PEER;
        STEPS.iter().chain([&LAST]).find(|step| step.name == name)
    }
}

/// All of it.
///
/// # Errors
/// [`Failure::Input`] for the command line, [`Failure::Worker`] (exit code 3) without a device, [`Failure::Other`] where a
/// step was not passed.
pub fn main(options: &Options) -> Result<(), Failure> {
    if let Some(step) = options.get("step") {
        return one_step(step, options);
    }
    let scale: f64 = options.number("deadline-scale", 1.0, "a number above 0")?;
    if !(scale.is_finite() && scale > 0.0) {
        return Err(Failure::Input(format!("--deadline-scale: expected a number above 0, found `{scale}`")));
    }
    let steps = wanted(options)?;
    let out = folder(options.get("out"))?;
    let mut check = Check::begin(out, options, scale)?;
    for step in steps {
        check.run(step)?;
    }
    check.finish()
}

/// A step's own process.
fn one_step(name: &str, options: &Options) -> Result<(), Failure> {
    let place = Place {
        out: options.required("out")?.into(),
        tiny: options.flag("tiny"),
        peer: options.get("peer").map(str::to_owned),
    };
    let found = match name {
        TF32 => speed::tf32_rate(&place)?,
        HANG => loop {
            std::thread::sleep(Duration::from_secs(1));
        },
        name => {
            let step = Step::find(name).ok_or_else(|| Failure::Input(format!("there is no step `{name}`")))?;
            (step.run)(&place)?
        }
    };
    let text = serde_json::to_string(&found).map_err(Failure::other)?;
    write_whole(Path::new(options.required("found")?), &text)
}

/// The steps of `--only`, else all; the device's always.
fn wanted(options: &Options) -> Result<Vec<&'static Step>, Failure> {
    let peer = options.get("peer").is_some().then_some(PEER.name);
    let Some(only) = options.get("only") else {
        let names = STEPS.iter().map(|step| step.name).chain(peer);
        return Ok(names.filter_map(Step::find).collect());
    };
    let named: Vec<&str> = only.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    if let Some(unknown) = named.iter().find(|name| Step::find(name).is_none()) {
        let names: Vec<&str> = STEPS.iter().map(|step| step.name).chain([PEER.name]).collect();
        return Err(Failure::Input(format!("--only: there is no step `{unknown}`, but {}", names.join(", "))));
    }
    let names = STEPS.iter().map(|step| step.name).chain([PEER.name]);
    Ok(names.filter(|name| *name == DEVICE || named.contains(name)).filter_map(Step::find).collect())
}

/// The folder given, which must be empty, or the first of `runs/gpu-check`, `runs/gpu-check-2` … that is.
fn folder(given: Option<&str>) -> Result<PathBuf, Failure> {
    let is_free =
        |folder: &Path| std::fs::read_dir(folder).map_or(!folder.exists(), |mut files| files.next().is_none());
    let folder = match given {
        Some(given) if !is_free(Path::new(given)) => {
            return Err(Failure::Input(format!("--out {given} is not empty: name another folder")));
        }
        Some(given) => PathBuf::from(given),
        None => {
            let usual = "runs/gpu-check";
            let mut others = (2..).map(|number| PathBuf::from(format!("{usual}-{number}")));
            let first = PathBuf::from(usual);
            if is_free(&first) { first } else { others.find(|folder| is_free(folder)).expect("numbers do not end") }
        }
    };
    let logs = folder.join("logs");
    std::fs::create_dir_all(&logs).map_err(|error| Failure::Input(format!("--out {}: {error}", folder.display())))?;
    std::fs::canonicalize(&folder).map_err(Failure::other)
}

/// The check under way.
struct Check {
    out: PathBuf,
    begun: Instant,
    scale: f64,
    /// What every step's process is told.
    passed_on: Vec<String>,
    report: Report,
    /// Why no step can do anything.
    hopeless: Option<String>,
}

impl Check {
    fn begin(out: PathBuf, options: &Options, scale: f64) -> Result<Check, Failure> {
        let mut passed_on = vec!["--out".to_owned(), out.display().to_string()];
        if options.flag("tiny") {
            passed_on.push("--tiny".into());
        }
        if let Some(python) = options.get("peer") {
            passed_on.extend(["--peer".into(), python.into()]);
        }
        let report = Report {
            program: "gpu-check".into(),
            build: env!("ECHELON_BUILD").into(),
            begun: said("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
            host: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
            device: None,
            stand_in: false,
            tiny: options.flag("tiny"),
            seconds: 0.0,
            steps: Vec::new(),
        };
        println!("gpu-check into {}", out.display());
        Ok(Check { out, begun: Instant::now(), scale, passed_on, report, hopeless: None })
    }

    fn run(&mut self, step: &Step) -> Result<(), Failure> {
        let deadline_s = step.deadline_s * self.scale;
        let left_s = TOTAL_S * self.scale - self.begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        let (verdict, why, found) = if let Some(reason) = &self.hopeless {
            (Verdict::Skipped, Some(reason.clone()), Findings::default())
        } else if left_s < deadline_s {
            let why =
                format!("{left_s:.0} s are left of {:.0}, and this may take {deadline_s:.0}", TOTAL_S * self.scale);
            (Verdict::Skipped, Some(why), Findings::default())
        } else {
            self.in_a_process(step.name, Duration::from_secs_f64(deadline_s))
        };
        if step.name == DEVICE {
            self.report.stand_in = found.stand_in;
            let name = found.found.iter().find(|finding| finding.what == device::DEVICE_NAME);
            self.report.device = name.map(verdict::Finding::shown);
            self.hopeless = (verdict != Verdict::Passed).then(|| "no device".to_owned());
        }
        let outcome = Outcome {
            step: step.name.into(),
            title: step.title.into(),
            verdict,
            why,
            seconds: begun.elapsed().as_secs_f64(),
            deadline_s,
            found: found.found,
        };
        self.say(&outcome);
        self.report.steps.push(outcome);
        self.write()
    }

    /// This program once more, for one step.
    fn in_a_process(&self, name: &str, deadline: Duration) -> (Verdict, Option<String>, Findings) {
        let file = self.out.join("logs").join(format!("{name}.json"));
        let log = file.with_extension("log");
        let end = place::this_program().and_then(|mut command| {
            command.args(["--step", name, "--found"]).arg(&file).args(&self.passed_on);
            // TF32 is off unless a step asks for it.
            command.env_remove("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE").env_remove("NVIDIA_TF32_OVERRIDE");
            child::run(command, &log, deadline)
        });
        let found = std::fs::read(&file).ok().and_then(|text| serde_json::from_slice::<Findings>(&text).ok());
        let _ = std::fs::remove_file(&file);
        let said = String::from_utf8_lossy(&std::fs::read(&log).unwrap_or_default()).into_owned();
        verdict_of(end, found, &said, deadline)
    }

    /// A step's lines on the terminal: its verdict, and what was measured or does not hold.
    fn say(&self, outcome: &Outcome) {
        let why = outcome.why.as_ref().map_or(String::new(), |why| format!(": {why}"));
        println!("{:9} {:14} {:5.1} s{why}", outcome.verdict.name(), outcome.step, outcome.seconds);
        let is_shown = |finding: &&verdict::Finding| !finding.value.is_null() && !self.report.stand_in;
        let is_speed = |finding: &&verdict::Finding| finding.bound.as_deref() == Some("measured");
        for finding in outcome.found.iter().filter(is_shown).filter(is_speed) {
            println!("            {}: {}", finding.what, finding.shown());
        }
    }

    fn write(&mut self) -> Result<(), Failure> {
        self.report.seconds = self.begun.elapsed().as_secs_f64();
        let json = serde_json::to_string_pretty(&self.report).map_err(Failure::other)?;
        write_whole(&self.out.join("gpu-check.json"), &(json + "\n"))?;
        write_whole(&self.out.join("gpu-check.html"), &page::page(&self.report))
    }

    fn finish(mut self) -> Result<(), Failure> {
        let _ = std::fs::remove_dir_all(self.out.join(SCRATCH));
        self.write()?;
        let stand_in = if self.report.stand_in { " (on a stand-in: no GPU, and no speeds)" } else { "" };
        println!("{} in {:.0} s{stand_in}", self.report.in_words(), self.report.seconds);
        println!("the page: {}", self.out.join("gpu-check.html").display());
        let device = self.report.steps.first().filter(|_| self.hopeless.is_some());
        if let Some(why) = device.and_then(|device| device.why.as_ref()) {
            return Err(Failure::Worker(format!("no device to check: {why}")));
        }
        if self.report.is_good() { Ok(()) } else { Err(Failure::Other("some steps were not passed".into())) }
    }
}

/// From how a step's process ended, what it found and what it said.
fn verdict_of(
    end: std::io::Result<End>,
    found: Option<Findings>,
    said: &str,
    deadline: Duration,
) -> (Verdict, Option<String>, Findings) {
    let failed = |why: String| (Verdict::Failed, Some(why), Findings::default());
    let cause = || child::cause(said).map_or(String::new(), |cause| format!(": {cause}"));
    match (end, found) {
        (Err(error), _) => failed(format!("its process could not be started: {error}")),
        (Ok(End::Deadline), _) => {
            let why = format!("it had not ended after {:.0} s{}", deadline.as_secs_f64(), cause());
            (Verdict::TimedOut, Some(why), Findings::default())
        }
        (Ok(End::Signal(signal)), _) => failed(format!("its process was ended by signal {signal}{}", cause())),
        (Ok(End::Code(0)), Some(found)) => match (&found.skipped, found.broken()) {
            (Some(reason), _) => (Verdict::Skipped, Some(reason.clone()), found),
            (None, Some(broken)) => (Verdict::Failed, Some(broken), found),
            (None, None) => (Verdict::Passed, None, found),
        },
        (Ok(End::Code(code)), _) => failed(
            child::cause(said).unwrap_or_else(|| format!("its process ended with exit code {code} and said nothing")),
        ),
    }
}

/// One line of an ordinary program; empty where it is missing.
fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map_or(String::new(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadlines_of_all_steps_fit_together() {
        let sum: f64 = STEPS.iter().map(|step| step.deadline_s).sum();
        assert!(sum <= TOTAL_S, "{sum}");
    }

    #[test]
    fn a_process_that_crashes_or_hangs_is_told_in_a_line() {
        let of = |end, said| {
            let (verdict, why, _) = verdict_of(Ok(end), None, said, Duration::from_secs(7));
            (verdict, why.unwrap())
        };
        assert_eq!(of(End::Deadline, ""), (Verdict::TimedOut, "it had not ended after 7 s".into()));
        let crash = "its process was ended by signal 11: stand-in: the host touched device memory";
        assert_eq!(of(End::Signal(11), "stand-in: the host touched device memory"), (Verdict::Failed, crash.into()));
        assert_eq!(of(End::Code(2), "error: no room\n"), (Verdict::Failed, "no room".into()));
        assert_eq!(of(End::Code(9), "").1, "its process ended with exit code 9 and said nothing");
    }
}
