//! What it costs to bring SmolLM2-135M's weights (f32, random) from a trainer to a generator in another process: through
//! shared memory beside a plain copy of as many bytes, and by broadcast beside a bare Gloo broadcast of as many. In one
//! process nothing is copied. Prints one JSON object; what is compared takes turns, so that what else the machine does
//! meets both.
//!
//! ```text
//! target/debug/examples/weight_sync_bench [ROUNDS [BUCKET_MIB]]
//! ```

use std::collections::HashMap;
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::role::Role;
use echelon_core::shape::{ModelShape, ParamShape, TensorParallelAxis, UnitShape};
use echelon_core::store::{LiveSegment, PacketListener, PacketSocket};
use echelon_core::zero::{OptimizerConfig, Sharding, TrainingState};
use echelon_placement::weight_sync::broadcast::{BroadcastReceiver, BroadcastSender, SyncPlace, join_lanes};
use echelon_placement::weight_sync::shared::{SharedReceiver, SharedSender};
use echelon_placement::weight_sync::{BUCKET_BYTES, SyncConfig, SyncPlan};
use serde_json::{Value, json};
use tch::kind::FLOAT_CPU;
use tch::{Device, Kind, Tensor};

type Outcome<T> = Result<T, Box<dyn Error>>;

const HOST: &str = "127.0.0.1";

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => trainer(9, BUCKET_BYTES),
        [rounds] => trainer(rounds.parse()?, BUCKET_BYTES),
        [rounds, mib] => trainer(rounds.parse()?, mib.parse::<usize>()? << 20),
        ["generator", port, socket, rounds, bucket] => {
            generator(port.parse()?, socket, rounds.parse()?, bucket.parse()?)
        }
        _ => Err("usage: weight_sync_bench [ROUNDS [BUCKET_MIB]]".into()),
    }
}

/// SmolLM2-135M.
fn shape() -> ModelShape {
    use TensorParallelAxis::{Columns, KeyValueRows, Replicated, Rows};
    let (hidden, kv, ffn, vocabulary) = (576, 192, 1536, 49_152);
    let param = |name: String, shape: &[i64], axis| ParamShape { name, shape: shape.into(), axis, trainable: true };
    let embedding = param("embedding".into(), &[vocabulary, hidden], Rows);
    let mut units = vec![UnitShape { name: "embedding".into(), params: vec![embedding] }];
    for layer in 0..30 {
        let named = |name: &str, shape: &[i64], axis| param(format!("{layer}.{name}"), shape, axis);
        let params = vec![
            named("input norm", &[hidden], Replicated),
            named("q", &[hidden, hidden], Rows),
            named("k", &[kv, hidden], KeyValueRows),
            named("v", &[kv, hidden], KeyValueRows),
            named("o", &[hidden, hidden], Columns),
            named("norm", &[hidden], Replicated),
            named("gate", &[ffn, hidden], Rows),
            named("up", &[ffn, hidden], Rows),
            named("down", &[hidden, ffn], Columns),
        ];
        units.push(UnitShape { name: format!("layer {layer}"), params });
    }
    units.push(UnitShape { name: "head".into(), params: vec![param("last norm".into(), &[hidden], Replicated)] });
    ModelShape {
        units,
        hidden_size: hidden,
        num_layers: 30,
        num_heads: 9,
        num_kv_heads: 3,
        head_dim: 64,
        intermediate_size: ffn,
        vocab_size: vocabulary,
    }
}

fn plan(bucket_bytes: usize) -> Outcome<SyncPlan> {
    Ok(SyncPlan::new(&shape(), SyncConfig { bucket_bytes, ..SyncConfig::new(1, 1, 1, Kind::Float) })?)
}

fn bare_group(at: &MeetingPoint, rank: usize) -> Outcome<ProcessGroup> {
    Ok(ProcessGroup::join(at, "bare", (rank, 2), HOST, Patience::default())?)
}

fn bytes() -> i64 {
    4 * shape().num_params()
}

/// Measures; starts the generator's process.
fn trainer(rounds: usize, bucket: usize) -> Outcome<()> {
    let shape = shape();
    let sizes: HashMap<String, Vec<i64>> =
        shape.units.iter().flat_map(|unit| &unit.params).map(|p| (p.name.clone(), p.shape.clone())).collect();
    let optimizer = OptimizerConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.0, max_grad_norm: 0.0 };
    let load = &mut |name: &str| Ok(Tensor::randn(sizes[name].as_slice(), FLOAT_CPU));
    let state = TrainingState::new(Role::Actor, &shape, optimizer, FLOAT_CPU, &Sharding::whole(), load)?;
    let point = MeetingPoint::serve(HOST, 0)?;
    let name = format!("weight-sync-bench-{}", std::process::id());
    let listener = PacketListener::bind(&name)?;
    let mut generator = start_generator(point.port(), &name, rounds, bucket)?;
    let mut shared = SharedSender::new(plan(bucket)?, 0)?;
    let socket = listener.accept(Instant::now() + Duration::from_secs(30))?;
    let segment = shared.writer().segment().as_fd();
    socket.send(b"weights", Some(segment), Instant::now() + Duration::from_secs(30))?;
    let lanes = join_lanes(&point, "bench", &plan(bucket)?, SyncPlace::Trainer(0), HOST, Patience::default())?;
    let mut lanes = BroadcastSender::new(plan(bucket)?, lanes)?;
    let bare = bare_group(&point, 0)?;

    let mut lines = BufReader::new(generator.0.stdout.take().expect("piped")).lines();
    let mut received = || lines.next().unwrap_or_else(|| Err(std::io::ErrorKind::UnexpectedEof.into()));
    let from = vec![1u8; bytes() as usize];
    let mut to = vec![2u8; bytes() as usize];
    let whole = Tensor::zeros([bytes()], (Kind::Uint8, Device::Cpu));
    let mut measured: HashMap<&str, Vec<f64>> = HashMap::new();
    for round in 0..=rounds as u64 {
        let version = round + 1;
        let mut note = |what, begun: Instant| {
            if round > 0 {
                measured.entry(what).or_default().push(begun.elapsed().as_secs_f64()); // the first round warms up
            }
        };
        let begun = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
        note("memcpy", begun);

        bare.barrier("shared memory")?;
        let begun = Instant::now();
        shared.publish(&state, version)?;
        note("shared publish", begun);
        received()?;
        note("shared", begun);

        bare.barrier("broadcast")?;
        let begun = Instant::now();
        lanes.publish(&state, version)?;
        received()?;
        note("broadcast", begun);

        bare.barrier("bare broadcast")?;
        let begun = Instant::now();
        bare.broadcast("bare broadcast", &whole, 0)?;
        received()?;
        note("bare", begun);
    }
    println!("{}", serde_json::to_string_pretty(&report(rounds, bucket, &measured))?);
    let ended = generator.0.wait()?;
    if ended.success() { Ok(()) } else { Err(format!("the generator's process: {ended}").into()) }
}

fn start_generator(port: u16, socket: &str, rounds: usize, bucket: usize) -> Outcome<Reaped> {
    let arguments = ["generator", &port.to_string(), socket, &rounds.to_string(), &bucket.to_string()];
    Ok(Reaped(Command::new(std::env::current_exe()?).args(arguments).stdout(Stdio::piped()).spawn()?))
}

/// Medians, and ratios by rounds.
fn report(rounds: usize, bucket: usize, measured: &HashMap<&str, Vec<f64>>) -> serde_json::Value {
    let median = |what: &str| {
        let mut seconds = measured[what].clone();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    };
    // By rounds: what is compared ran one after the other.
    let ratio = |of: &str, to: &str| {
        let mut ratios: Vec<f64> = measured[of].iter().zip(&measured[to]).map(|(of, to)| of / to).collect();
        ratios.sort_by(f64::total_cmp);
        ratios[ratios.len() / 2]
    };
    let rate = |what: &str| bytes() as f64 / median(what) / 1e9;
    json!({
        "machine": machine(),
        "model": "SmolLM2-135M, float32, 1 trainer, 1 generator",
        "bytes": bytes(),
        "rounds": rounds,
        "bucket_bytes": bucket,
        "in_process": {"bytes_copied": 0},
        "memcpy": {"seconds": median("memcpy"), "gb_per_s": rate("memcpy")},
        "shared_memory": {
            "publish_s": median("shared publish"),
            "until_received_s": median("shared"),
            "gb_per_s": rate("shared"),
            "of_memcpy_rate": ratio("memcpy", "shared"),
        },
        "broadcast": {
            "until_received_s": median("broadcast"),
            "gb_per_s": rate("broadcast"),
            "bare_gloo_s": median("bare"),
            "of_bare_rate": ratio("bare", "broadcast"),
        },
    })
}

/// Receives as the trainer sends, and says when it has.
fn generator(port: u16, socket: &str, rounds: usize, bucket: usize) -> Outcome<()> {
    let patience = Patience::default();
    let socket = PacketSocket::connect(socket, Instant::now() + patience.join)?;
    let mut message = [0; 16];
    let segment = socket.receive(&mut message, Instant::now() + patience.join)?.fd.ok_or("no segment came")?;
    let map = LiveSegment::from_fd(segment)?.map()?;
    let mut shared = SharedReceiver::new(plan(bucket)?, 0, vec![map], patience.progress)?;
    let point = MeetingPoint::join(HOST, port, patience)?;
    let place = SyncPlace::Generator { replica: 0, tp_rank: 0 };
    let lanes = join_lanes(&point, "bench", &plan(bucket)?, place, HOST, patience)?;
    let mut lanes = BroadcastReceiver::new(plan(bucket)?, 0, lanes, Device::Cpu)?;
    let bare = bare_group(&point, 1)?;
    let whole = Tensor::ones([bytes()], (Kind::Uint8, Device::Cpu));
    let say = || {
        println!();
        std::io::stdout().flush()
    };
    for version in 1..=rounds as u64 + 1 {
        bare.barrier("shared memory")?;
        shared.receive(version)?;
        say()?;
        bare.barrier("broadcast")?;
        lanes.receive(version)?;
        say()?;
        bare.barrier("bare broadcast")?;
        bare.broadcast("bare broadcast", &whole, 0)?;
        say()?;
    }
    for (name, tensor) in lanes.tensors() {
        if shared.tensors()[name] != *tensor {
            return Err(format!("`{name}` differs between shared memory and broadcast").into());
        }
    }
    Ok(())
}

/// A process that does not outlive this one's failure.
struct Reaped(std::process::Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn machine() -> Value {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    json!({"cpu": model, "threads": std::thread::available_parallelism().map_or(0, usize::from)})
}
