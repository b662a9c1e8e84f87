//! A driver with many simulated workers: real encrypted streams from one other process, no model. Runs steps of PPO's calls
//! and prints one JSON object.
//!
//! ```text
//! target/debug/examples/control_scale [--workers 1000 --steps 20]
//! ```

use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use echelon_placement::control::server::ControlConfig;
use echelon_placement::control::{
    Call, ControlServer, Credentials, Hello, Limits, RemoteWorker, Rendezvous, RunAuthority, Session,
    build_of_this_program, join, rendezvous,
};
use echelon_placement::launch::{LocalWorkers, SpawnConfig};
use serde_json::{Value, json};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const MINUTE: Duration = Duration::from_secs(60);

/// The calls of a step, with the bytes that go to a rank and come back: 4 responses of 512 tokens, ids as i64, numbers as
/// f32.
const STEP: [(&str, usize, usize); 5] = [
    ("generate", 2 << 10, 24 << 10),
    ("logprobs", 16 << 10, 8 << 10),
    ("values", 16 << 10, 8 << 10),
    ("update actor", 40 << 10, 200),
    ("update critic", 40 << 10, 200),
];

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().collect();
    let runtime = echelon_placement::control::runtime()?;
    if let [_, mode, driver, count] = &args[..]
        && mode == "simulate"
    {
        return runtime.block_on(simulate(driver.clone(), count.parse()?));
    }
    let (mut workers, mut steps) = (1000, 20);
    for pair in args[1..].chunks(2) {
        match pair {
            [flag, number] if flag == "--workers" => workers = number.parse()?,
            [flag, number] if flag == "--steps" => steps = number.parse()?,
            _ => return Err("usage: control_scale [--workers N] [--steps N]".into()),
        }
    }
    let report = runtime.block_on(async move { tokio::spawn(drive(workers, steps)).await })??;
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}

async fn drive(num_workers: u32, steps: usize) -> Outcome<Value> {
    let authority = RunAuthority::new()?;
    let config = ControlConfig {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        num_workers,
        build: build_of_this_program(),
        limits: Limits::default(),
        output: None,
    };
    let server = ControlServer::start(config, &authority).await?;
    let resident_alone = resident_mib()?;
    let begun = Instant::now();
    let _processes = start(&authority, &server, num_workers)?;
    let rules = Rendezvous { remind: Duration::from_secs(5), ..Rendezvous::by_scheduler(2 * MINUTE) };
    let workers = rendezvous(&server, rules, |line| eprintln!("{line}")).await?;
    let join_s = begun.elapsed().as_secs_f64();
    let resident_joined = resident_mib()?;
    let mut step_s = Vec::new();
    for _ in 0..steps {
        let begun = Instant::now();
        for (verb, sent, _) in STEP {
            ask_all(&workers, verb, sent).await?;
        }
        step_s.push(begun.elapsed().as_secs_f64());
    }
    step_s.sort_by(f64::total_cmp);
    let losses = server.roster().borrow().losses.len();
    let resident_end = resident_mib()?;
    server.finish("measured", Duration::from_secs(10)).await;
    let moved: usize = STEP.iter().map(|(_, sent, received)| sent + received).sum();
    Ok(json!({
        "workers": num_workers,
        "encrypted": true,
        "cpus": std::thread::available_parallelism()?.get(),
        "start_of_their_process_to_all_joined_s": join_s,
        "steps": steps,
        "calls_per_step": STEP.len() * num_workers as usize,
        "mib_per_step": (moved * num_workers as usize) as f64 / (1 << 20) as f64,
        "step_s": { "p50": step_s[steps / 2], "max": step_s[steps - 1] },
        "losses": losses,
        "driver_resident_mib": { "alone": resident_alone, "joined": resident_joined, "after_the_steps": resident_end },
    }))
}

fn start(authority: &RunAuthority, server: &ControlServer, count: u32) -> Outcome<LocalWorkers> {
    let spawn = SpawnConfig {
        program: std::env::current_exe()?,
        args: ["simulate".into(), server.address().to_string().into(), count.to_string().into()].to_vec(),
        variables: Vec::new(),
        num_workers: 1,
        devices: Vec::new(),
        threads: 2,
        on_line: Arc::new(|_, line| eprintln!("{line}")),
    };
    Ok(LocalWorkers::start(&spawn, |_| authority.worker(None))?)
}

/// One verb on every rank at once.
async fn ask_all(workers: &[RemoteWorker], verb: &'static str, bytes: usize) -> Outcome<()> {
    let body = Bytes::from(vec![1; bytes]);
    let calls: Vec<_> = workers
        .iter()
        .map(|worker| {
            let (worker, body) = (worker.clone(), body.clone());
            tokio::spawn(async move { worker.call(verb, body, MINUTE).await })
        })
        .collect();
    for call in calls {
        call.await??;
    }
    Ok(())
}

/// Plays workers 0 to `count`: each has a connection of its own.
async fn simulate(driver: String, count: u32) -> Outcome<()> {
    let credentials = Credentials::receive(std::io::stdin())?;
    let workers: Vec<_> = (0..count)
        .map(|rank| {
            let (driver, credentials) = (driver.clone(), credentials.clone());
            tokio::spawn(async move {
                let hello = Hello::of_this_process(rank, count, 0, "simulated");
                serve(join(&driver, &credentials, hello, Limits::default(), MINUTE, None).await?).await
            })
        })
        .collect();
    for worker in workers {
        worker.await??;
    }
    Ok(())
}

/// Answers every call of a step with as many bytes as a model would.
async fn serve(mut session: Session) -> Outcome<()> {
    static ZEROS: [u8; 24 << 10] = [0; 24 << 10];
    let progress = session.progress();
    while let Some(Call { verb, sequence, reply, .. }) = session.next().await? {
        let answer = STEP.iter().find(|(name, ..)| *name == verb);
        let (name, _, received) = answer.ok_or_else(|| format!("no verb {verb}"))?;
        progress.set(name, sequence, 0, 0);
        reply.send(Ok(Bytes::from_static(&ZEROS[..*received])));
    }
    Ok(())
}

fn resident_mib() -> Outcome<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).ok_or("no VmRSS")?;
    let kib: f64 = line.split_whitespace().nth(1).ok_or("no VmRSS")?.parse()?;
    Ok((kib / 102.4).round() / 10.0)
}
