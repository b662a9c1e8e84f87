//! Step `peer`: the same work by transformers and by us, in turns on the same device in the same minute.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};
use tch::Kind;

use super::child::dies_with_us;
use super::models::{HALF_BILLION, Shape, TINY, frozen, learning};
use super::place::Place;
use super::speed::{forward_backward, generate, held, prefill_work, rows_of, training_work, wait_for, write_config};
use super::verdict::Findings;
use crate::program::{Failure, failed};

const SCRIPT: &str = include_str!("peer.py");

/// Turns after a first, of which the fastest counts on both sides.
const TURNS: usize = 3;

/// Step `peer`.
pub fn peer(place: &Place) -> Result<Findings, Failure> {
    let Some(python) = &place.peer else {
        return Ok(Findings::skipped("no --peer PYTHON was given (one that has PyTorch and transformers)"));
    };
    let (device, mut findings) = place.open()?;
    let shape = place.size(HALF_BILLION, TINY);
    // On a stand-in the peer has no device that PyTorch knows: it shows that the script runs.
    let theirs = if findings.stand_in { "cpu" } else { "cuda" };
    let mut peer = Peer::start(python, place, shape, theirs)?;
    findings.tell("peer", peer.versions.clone(), "");
    findings.tell(
        "work",
        format!("{} model in bfloat16, random weights, in turns; seconds of the fastest of {TURNS}", shape.name),
        "",
    );
    let model = frozen(&shape.config(), (Kind::BFloat16, device), device)?;
    let (prompt, new) = place.size((128, 64), (8, 4));
    for batch in place.size(vec![1, 16, 64], vec![1, 4]) {
        let job = json!({"work": "decode", "batch": batch, "prompt": prompt, "new": new});
        let what = format!("decode, batch {batch}, {prompt} + {new} tokens");
        in_turns(&what, &mut peer, &job, &mut findings, || generate(&model, shape, (batch, prompt, new)).map(drop))?;
    }
    let (batch, prompt) = prefill_work(place);
    let job = json!({"work": "prefill", "batch": batch, "prompt": prompt});
    let what = format!("prefill, {batch} prompts of {prompt} tokens");
    in_turns(&what, &mut peer, &job, &mut findings, || generate(&model, shape, (batch, prompt, 1)).map(drop))?;
    drop(model);
    let (rows, length) = training_work(place);
    let mut policy = learning(&shape.config(), held(device))?;
    let tokens = rows_of(shape, (rows, length));
    let job = json!({"work": "train", "rows": rows, "length": length});
    let what = format!("forward and backward, {rows} rows of {length} tokens");
    in_turns(&what, &mut peer, &job, &mut findings, || {
        forward_backward(&mut policy, &tokens)?;
        wait_for(device);
        Ok(())
    })?;
    Ok(findings)
}

fn in_turns(
    what: &str,
    peer: &mut Peer,
    job: &Value,
    findings: &mut Findings,
    mut ours: impl FnMut() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let (mut here, mut there) = (f64::INFINITY, f64::INFINITY);
    for turn in 0..=TURNS {
        let begun = Instant::now();
        ours()?;
        let seconds = begun.elapsed().as_secs_f64();
        let their_seconds = peer.seconds(job)?;
        if turn > 0 {
            (here, there) = (here.min(seconds), there.min(their_seconds));
        }
    }
    findings.speed(format!("{what}: ours"), here, "s");
    findings.speed(format!("{what}: transformers"), there, "s");
    findings.speed(format!("{what}: theirs over ours"), there / here, "");
    Ok(())
}

/// The script at work in a process of its own.
struct Peer {
    process: Child,
    jobs: ChildStdin,
    answers: BufReader<ChildStdout>,
    versions: String,
}

impl Peer {
    fn start(python: &str, place: &Place, shape: Shape, device: &str) -> Result<Peer, Failure> {
        let folder = place.scratch("peer")?;
        let script = folder.join("peer.py");
        std::fs::write(&script, SCRIPT).map_err(|error| failed(&script, error))?;
        let config = write_config(shape, &folder)?;
        let mut command = Command::new(python);
        command.arg(&script).arg(&config).args([device, "bfloat16"]).env("HF_HUB_OFFLINE", "1");
        if device == "cpu" {
            command.env_remove("LD_PRELOAD").env_remove("LD_LIBRARY_PATH"); // the stand-in's
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        dies_with_us(&mut command);
        let mut process = command.spawn().map_err(|error| Failure::Input(format!("--peer {python}: {error}")))?;
        let jobs = process.stdin.take().expect("piped");
        let answers = BufReader::new(process.stdout.take().expect("piped"));
        let mut peer = Peer { process, jobs, answers, versions: String::new() };
        let hello = peer.answer()?;
        let version = |name: &str| hello[name].as_str().unwrap_or("?").to_owned();
        peer.versions = format!("transformers {}, PyTorch {}", version("transformers"), version("torch"));
        Ok(peer)
    }

    fn seconds(&mut self, job: &Value) -> Result<f64, Failure> {
        writeln!(self.jobs, "{job}").map_err(|error| Failure::Other(format!("the peer is gone: {error}")))?;
        self.answer()?["seconds"].as_f64().ok_or_else(|| Failure::Other("the peer told no seconds".into()))
    }

    /// What the script says next; its own complaint stands above it in the step's log.
    fn answer(&mut self) -> Result<Value, Failure> {
        let mut line = String::new();
        self.answers.read_line(&mut line).map_err(Failure::other)?;
        if line.is_empty() {
            let ended = self.process.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
            return Err(Failure::Other(format!("the peer ended with {ended}: its message stands in the step's log")));
        }
        serde_json::from_str(&line).map_err(|error| Failure::Other(format!("the peer said `{}`: {error}", line.trim())))
    }
}
