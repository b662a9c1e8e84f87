//! What tasks cost: empty ones on this node, from one submitter and with 64 in flight, and calls over a second process.
//! Prints one JSON object.
//!
//! ```text
//! target/debug/examples/task_bench
//! ```

use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use echelon_placement::control::server::ControlConfig;
use echelon_placement::control::{
    ControlServer, Credentials, Hello, Limits, Rendezvous, RunAuthority, build_of_this_program, join, rendezvous,
};
use echelon_placement::launch::{LocalWorkers, SpawnConfig};
use echelon_placement::task::{
    Demand, Function, Functions, NodeConfig, TaskError, TaskHandle, TaskServer, Tasks, TasksConfig,
};
use serde_json::{Value, json};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const MINUTE: Duration = Duration::from_secs(60);
const EMPTY: Function<(), ()> = Function::new("empty", |()| Ok(()));

fn functions() -> Functions {
    Functions::default().with(&EMPTY)
}

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().collect();
    let runtime = echelon_placement::control::runtime()?;
    if let [_, mode, driver] = &args[..]
        && mode == "worker"
    {
        return runtime.block_on(worker(driver));
    }
    let cpus = std::thread::available_parallelism()?.get();
    let own = Tasks::start(TasksConfig::new(NodeConfig::of_this_host(0)))?;
    let here = {
        let tasks = own.clone();
        let submit = move || tasks.try_run("empty", Demand::CPU, || Ok(()));
        json!({ "blocking_submitter": blocking(&submit, 200_000)?, "async": runtime.block_on(all_ways(submit, 200_000))? })
    };
    let there = runtime.block_on(async { tokio::spawn(other_process(cpus)).await })??;
    let report = json!({ "cpus": cpus, "empty_tasks_on_this_node": here, "empty_calls_in_a_second_process": there });
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}

/// A plain thread that submits and waits.
fn blocking(submit: &impl Fn() -> Result<TaskHandle<()>, TaskError>, count: usize) -> Outcome<Value> {
    let mut times = Vec::new();
    for _ in 0..count / 10 {
        let begun = Instant::now();
        submit()?.wait(MINUTE)?;
        times.push(begun.elapsed());
    }
    let begun = Instant::now();
    let mut handles = std::collections::VecDeque::new();
    for _ in 0..count {
        if handles.len() == 8192 {
            handles.pop_front().map(|handle: TaskHandle<()>| handle.wait(MINUTE)).transpose()?;
        }
        handles.push_back(submit()?);
    }
    handles.into_iter().try_for_each(|handle| handle.wait(MINUTE))?;
    let per_s = count as f64 / begun.elapsed().as_secs_f64();
    Ok(json!({ "one_in_flight": rate(&mut times), "as_many_as_may_wait": { "tasks_per_s": per_s.round() } }))
}

/// Tasks of an event loop that submit and await.
async fn all_ways(
    submit: impl Fn() -> Result<TaskHandle<()>, TaskError> + Clone + Send + 'static,
    count: usize,
) -> Outcome<Value> {
    let mut report = json!({});
    for in_flight in [1, 64] {
        let begun = Instant::now();
        let each = count / if in_flight == 1 { 10 } else { in_flight };
        let submitters: Vec<_> = (0..in_flight)
            .map(|_| {
                let submit = submit.clone();
                tokio::spawn(async move {
                    let mut times = Vec::with_capacity(each);
                    for _ in 0..each {
                        let begun = Instant::now();
                        submit()?.await?;
                        times.push(begun.elapsed());
                    }
                    Outcome::Ok(times)
                })
            })
            .collect();
        let mut times = Vec::new();
        for submitter in submitters {
            times.extend(submitter.await??);
        }
        let per_s = times.len() as f64 / begun.elapsed().as_secs_f64();
        let mut measured = rate(&mut times);
        measured["tasks_per_s"] = json!(per_s.round());
        report[format!("{in_flight}_in_flight")] = measured;
    }
    Ok(report)
}

/// A second process, which is a node with all CPUs; the driver's has none.
async fn other_process(cpus: usize) -> Outcome<Value> {
    let authority = RunAuthority::new()?;
    let config = ControlConfig {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        num_workers: 1,
        build: build_of_this_program(),
        limits: Limits::default(),
        output: None,
    };
    let server = ControlServer::start(config, &authority).await?;
    let spawn = SpawnConfig {
        program: std::env::current_exe()?,
        args: ["worker".into(), server.address().to_string().into()].to_vec(),
        variables: Vec::new(),
        num_workers: 1,
        devices: Vec::new(),
        threads: cpus,
        on_line: Arc::new(|_, line| eprintln!("{line}")),
    };
    let _processes = LocalWorkers::start(&spawn, |_| authority.worker(None))?;
    let worker = rendezvous(&server, Rendezvous::STARTED_HERE, |_| {}).await?.remove(0);
    let own = NodeConfig::new("driver", 0.0, 0);
    let tasks = Tasks::start(TasksConfig { functions: functions(), ..TasksConfig::new(own) })?;
    tasks.add_worker(&NodeConfig::new("worker", cpus as f64, 0), worker)?;
    let submit = {
        let tasks = tasks.clone();
        move || tasks.try_call(&EMPTY, Demand::CPU, &())
    };
    let ways = all_ways(submit, 200_000).await?;
    let count = 200_000;
    let begun = Instant::now();
    let mut handles = std::collections::VecDeque::new();
    for _ in 0..count {
        if handles.len() == 8192 {
            let oldest: Option<TaskHandle<()>> = handles.pop_front();
            if let Some(oldest) = oldest {
                oldest.await?;
            }
        }
        handles.push_back(tasks.try_call(&EMPTY, Demand::CPU, &())?);
    }
    for handle in handles {
        handle.await?;
    }
    let per_s = count as f64 / begun.elapsed().as_secs_f64();
    server.finish("measured", Duration::from_secs(5)).await;
    Ok(
        json!({ "encrypted": true, "async": ways, "one_submitter_as_many_as_may_wait": { "tasks_per_s": per_s.round() } }),
    )
}

/// Serves tasks until the driver ends the run.
async fn worker(driver: &str) -> Outcome<()> {
    let credentials = Credentials::receive(std::io::stdin())?;
    let hello = Hello::of_this_process(0, 1, 0, "cpu");
    let server = Arc::new(TaskServer::start(functions())?);
    let mut session = join(driver, &credentials, hello, Limits::default(), MINUTE, Some(server)).await?;
    while session.next().await?.is_some() {}
    Ok(())
}

fn rate(times: &mut [Duration]) -> Value {
    times.sort();
    let per_s = times.len() as f64 / times.iter().sum::<Duration>().as_secs_f64();
    let at = |share: f64| (times[((times.len() - 1) as f64 * share) as usize].as_nanos() as f64 / 100.0).round() / 10.0;
    json!({ "tasks_per_s": per_s.round(), "latency_us": { "p50": at(0.5), "p99": at(0.99) } })
}
