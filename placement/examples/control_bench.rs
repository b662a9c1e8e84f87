//! What the control plane costs: calls in process, to a device thread and between processes (encrypted), bodies, and the joining of many
//! workers. Prints one JSON object.
//!
//! ```text
//! target/debug/examples/control_bench [--joining 128]
//! ```

use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use echelon_core::message::{Message, decode, encode};
use echelon_core::shared_message::SharedMessages;
use echelon_core::store::{Store, StoreConfig, StoreServer};
use echelon_placement::control::server::ControlConfig;
use echelon_placement::control::{
    Call, ControlServer, Credentials, Hello, Limits, RemoteWorker, Rendezvous, RunAuthority, Session,
    build_of_this_program, join, rendezvous,
};
use echelon_placement::launch::{LocalWorkers, SpawnConfig};
use echelon_placement::start_worker;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const MINUTE: Duration = Duration::from_secs(60);

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().collect();
    let runtime = echelon_placement::control::runtime()?;
    if let [_, mode, driver, count] = &args[..]
        && mode == "simulate"
    {
        return runtime.block_on(simulate(driver.clone(), count.parse()?));
    }
    let joining = match &args[1..] {
        [] => 128,
        [flag, count] if flag == "--joining" => count.parse()?,
        _ => return Err("usage: control_bench [--joining WORKERS]".into()),
    };
    let measured = runtime.block_on(async move { tokio::spawn(measure(joining)).await })??;
    println!("{}", serde_json::to_string_pretty(&measured)?);
    Ok(())
}

async fn measure(joining: u32) -> Outcome<Value> {
    let in_process = in_process().await?;
    let device_thread = to_a_device_thread().await?;
    let (server, _processes, joined) = start(1, 1).await?;
    let worker = &rendezvous(&server, Rendezvous::STARTED_HERE, |_| {}).await?[0];
    let one_process_s = joined.elapsed().as_secs_f64();
    let between = between_processes(worker).await?;
    let bodies = bodies(worker).await?;
    let batches = batches(worker).await?;
    server.finish("measured", Duration::from_secs(5)).await;
    let (server, _processes, joined) = start(joining, joining).await?;
    rendezvous(&server, Rendezvous::STARTED_HERE, |_| {}).await?;
    let join_s = joined.elapsed().as_secs_f64();
    server.finish("measured", Duration::from_secs(5)).await;
    Ok(json!({
        "cpus": std::thread::available_parallelism()?.get(),
        "encrypted": true,
        "mailbox_call_us": in_process,
        "device_thread_call_us": device_thread,
        "process_call": between,
        "bodies": bodies,
        "batch_there_and_back": batches,
        "start_of_one_worker_process_to_joined_s": one_process_s,
        "joining_workers": joining,
        "start_of_their_process_to_all_joined_s": join_s,
    }))
}

/// A driver, and one process that plays `simulated` workers.
async fn start(num_workers: u32, simulated: u32) -> Outcome<(ControlServer, LocalWorkers, Instant)> {
    let authority = RunAuthority::new()?;
    let config = ControlConfig {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        num_workers,
        build: build_of_this_program(),
        limits: Limits::default(),
        output: None,
    };
    let server = ControlServer::start(config, &authority).await?;
    let (address, count) = (server.address().to_string(), simulated.to_string());
    let spawn = SpawnConfig {
        program: std::env::current_exe()?,
        args: ["simulate".into(), address.into(), count.into()].to_vec(),
        variables: Vec::new(),
        num_workers: 1,
        devices: Vec::new(),
        threads: 2,
        on_line: Arc::new(|_, line| eprintln!("{line}")),
    };
    let begun = Instant::now();
    let processes = LocalWorkers::start(&spawn, |_| authority.worker(None))?;
    Ok((server, processes, begun))
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

/// Answers a store's address by connecting to it, a tensor with itself, and every other call with the length of its body.
async fn serve(mut session: Session) -> Outcome<()> {
    let mut shared = None;
    while let Some(Call { verb, body, reply, .. }) = session.next().await? {
        let answer = match (verb.as_str(), &shared) {
            ("store", _) => {
                let store = Store::connect(&serde_json::from_slice(&body)?, "second process")?;
                shared = Some(SharedMessages::new(store, 0, 0));
                Bytes::new()
            }
            (Tensor::KIND, None) => encode(&decode::<Tensor>(&body)?).into(),
            (Tensor::KIND, Some(shared)) => shared.encode(&shared.decode::<Tensor>(&body)?).into(),
            _ => Bytes::copy_from_slice(&body.len().to_be_bytes()),
        };
        reply.send(Ok(answer));
    }
    Ok(())
}

/// An actor that answers at once.
struct Echo;

impl Actor for Echo {
    type Msg = (u64, RpcReplyPort<u64>);
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<Self::Msg>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        (number, reply): Self::Msg,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        Ok(reply.send(number)?)
    }
}

async fn in_process() -> Outcome<Value> {
    let (actor, _) = Actor::spawn(None, Echo, ()).await?;
    let mut times = Vec::new();
    for number in 0..60_000u64 {
        let begun = Instant::now();
        ractor::call!(actor, |reply| (number, reply))?;
        times.push(begun.elapsed());
    }
    actor.stop(None);
    Ok(percentiles(&mut times[10_000..]))
}

/// To a device thread and back, through its worker's mailbox.
async fn to_a_device_thread() -> Outcome<Value> {
    let (worker, ended) = start_worker("device 0", || Ok(0u64)).await?;
    let mut times = Vec::new();
    for _ in 0..25_000 {
        let begun = Instant::now();
        worker
            .run(|count| {
                *count += 1;
                Ok(*count)
            })
            .await?;
        times.push(begun.elapsed());
    }
    worker.stop();
    ended.await?;
    Ok(percentiles(&mut times[5_000..]))
}

async fn between_processes(worker: &RemoteWorker) -> Outcome<Value> {
    let mut times = Vec::new();
    for _ in 0..25_000 {
        let begun = Instant::now();
        worker.call("echo", Bytes::from_static(b"12345678"), MINUTE).await?;
        times.push(begun.elapsed());
    }
    let mut report = json!({ "one_in_flight_us": percentiles(&mut times[5_000..]) });
    for in_flight in [8, 64, 200] {
        let (per_s, mut times) = pipelined(worker, in_flight, 300_000 / in_flight).await?;
        report[format!("{in_flight}_in_flight")] =
            json!({ "calls_per_s": per_s.round(), "us": percentiles(&mut times) });
    }
    Ok(report)
}

async fn pipelined(worker: &RemoteWorker, in_flight: usize, each: usize) -> Outcome<(f64, Vec<Duration>)> {
    let begun = Instant::now();
    let callers: Vec<_> = (0..in_flight)
        .map(|_| {
            let worker = worker.clone();
            tokio::spawn(async move {
                let mut times = Vec::with_capacity(each);
                for _ in 0..each {
                    let begun = Instant::now();
                    worker.call("echo", Bytes::from_static(b"12345678"), MINUTE).await?;
                    times.push(begun.elapsed());
                }
                Outcome::Ok(times)
            })
        })
        .collect();
    let mut times = Vec::new();
    for caller in callers {
        times.extend(caller.await??);
    }
    Ok((times.len() as f64 / begun.elapsed().as_secs_f64(), times))
}

async fn bodies(worker: &RemoteWorker) -> Outcome<Value> {
    let mut report = json!({});
    for (mib, calls) in [(1usize, 200), (8, 30), (64, 5)] {
        let body = Bytes::from(vec![7; mib << 20]);
        let begun = Instant::now();
        for _ in 0..calls {
            worker.call("put", body.clone(), MINUTE).await?;
        }
        let mib_per_s = (mib * calls) as f64 / begun.elapsed().as_secs_f64();
        report[format!("{mib}_mib")] = json!({ "mib_per_s": mib_per_s.round() });
    }
    Ok(report)
}

/// Microseconds for a batch there and back, from tensor to tensor: over the stream, then by the host's store.
async fn batches(worker: &RemoteWorker) -> Outcome<Value> {
    let server = StoreServer::start(StoreConfig::new(1 << 30))?;
    let mut report = json!({});
    let mut shared = None;
    for way in ["stream", "store"] {
        if way == "store" {
            worker.call("store", serde_json::to_vec(server.address())?.into(), MINUTE).await?;
            shared = Some(SharedMessages::new(Store::connect(server.address(), "driver")?, 0, 0));
        }
        for (kib, calls) in [(16, 300), (64, 300), (256, 200), (1024, 100), (8192, 30), (65536, 5)] {
            let tensor = Tensor::ones([kib << 8], (Kind::Float, Device::Cpu));
            let mut times = Vec::new();
            for _ in 0..calls {
                let begun = Instant::now();
                let body = shared.as_ref().map_or_else(|| encode(&tensor), |shared| shared.encode(&tensor));
                let answer = worker.call(Tensor::KIND, body.into(), MINUTE).await?;
                let back: Tensor = match &shared {
                    Some(shared) => shared.decode(&answer)?,
                    None => decode(&answer)?,
                };
                times.push(begun.elapsed());
                assert_eq!(back.size(), tensor.size());
            }
            report[way][format!("{kib}_kib_us")] = percentiles(&mut times);
        }
    }
    Ok(report)
}

fn percentiles(times: &mut [Duration]) -> Value {
    times.sort();
    let at = |share: f64| (times[((times.len() - 1) as f64 * share) as usize].as_nanos() as f64 / 100.0).round() / 10.0;
    json!({ "p50": at(0.5), "p90": at(0.9), "p99": at(0.99) })
}
