//! How fast the object store is on this machine, as one JSON object.
//!
//! `target/debug/examples/store_bench [FOLDER]`: the weights of FOLDER's `model.safetensors`, or 538 MB of
//! numbers of the size of SmolLM2-135M in f32. A second process maps what the first one puts.

use std::error::Error;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use echelon_core::store::{ObjectId, SegmentWriter, Store, StoreAddress, StoreConfig, StoreServer};
use serde_json::json;
use tch::{Device, Kind, Tensor};

const PATIENCE: Duration = Duration::from_secs(120);

/// 30 layers of 576 hidden, 1,536 intermediate, 9 and 3 heads of 64, 49,152 tokens, tied.
const SMOLLM2: (i64, i64, i64, i64, i64) = (30, 576, 1536, 192, 49_152);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let argument = std::env::args().nth(1);
    if argument.as_deref() == Some("--second-process") {
        return second_process();
    }
    let server = StoreServer::start(StoreConfig::new(4 << 30))?;
    let store = Store::connect(server.address(), "first process")?;
    let mut other = start_other(server.address())?;

    let (id, put_s, len) = put_model(&store, argument.map(PathBuf::from).as_deref())?;
    // The median of several: the first mapping also starts the other process's libtorch.
    let mapped: Vec<serde_json::Value> = (0..7).map(|_| ask(&mut other, &id)).collect::<Result<_>>()?;
    let of = |key: &str| median(mapped.iter().filter_map(|answer| answer[key].as_f64()).collect());
    let usable_ms = of("usable_ms");
    let (touch_first_ms, num_tensors) = (mapped[0]["touch_ms"].clone(), mapped[0]["num_tensors"].clone());
    store.remove(&id)?;

    let rates = write_rates(len)?;
    let (put_us, get_us) = small_objects(&store)?;
    let batch_ms = batches(&store, &mut other)?;
    let report = json!({
        "machine": machine(),
        "model_bytes": len, "num_tensors": num_tensors,
        "map_into_second_process_ms": round(usable_ms), "first_map_there_ms": mapped[0]["usable_ms"], "first_touch_of_all_pages_there_ms": touch_first_ms,
        "put_s": round(put_s), "put_bytes_per_s": (len as f64 / put_s).round(),
        "write": rates,
        "small_put_us_p50": round(put_us), "small_get_us_p50": round(get_us),
        "batch_5mb_round_trip_ms_p50": round(batch_ms),
    });
    println!("{report:#}");
    drop(other);
    Ok(())
}

struct Other {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn start_other(address: &StoreAddress) -> Result<Other> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("--second-process")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let answers = BufReader::new(child.stdout.take().ok_or("no output")?);
    let mut other = Other { child, answers };
    say(&mut other, &serde_json::to_string(address)?)?;
    Ok(other)
}

fn say(other: &mut Other, line: &str) -> Result<()> {
    writeln!(other.child.stdin.as_mut().ok_or("no input")?, "{line}")?;
    Ok(())
}

fn ask(other: &mut Other, id: &ObjectId) -> Result<serde_json::Value> {
    say(other, &serde_json::to_string(id)?)?;
    let mut line = String::new();
    other.answers.read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

/// For each id: maps the object until every tensor of it can be used; of a batch, puts an answer of the same size.
fn second_process() -> Result<()> {
    let mut lines = std::io::stdin().lines();
    let address: StoreAddress = serde_json::from_str(&lines.next().ok_or("no address")??)?;
    let store = Store::connect(&address, "second process")?;
    let mut answers = Vec::new();
    for line in lines {
        let id: ObjectId = serde_json::from_str(&line?)?;
        let begun = Instant::now();
        let object = store.wait_for(&id, PATIENCE)?;
        let tensors: Vec<Tensor> =
            object.names().iter().map(|name| object.tensor(name)).collect::<std::result::Result<_, _>>()?;
        let usable_ms = ms(begun);
        if let ObjectId::Batch { rank, number, .. } = id {
            let named: Vec<(&str, &Tensor)> = object.names().iter().map(String::as_str).zip(&tensors).collect();
            answers.clear();
            answers.push(store.put(&ObjectId::batch("answer", rank, number), &named, &[])?);
        }
        let begun = Instant::now();
        black_box(object.bytes().iter().step_by(4096).map(|byte| u64::from(*byte)).sum::<u64>());
        println!("{}", json!({"usable_ms": usable_ms, "touch_ms": round(ms(begun)), "num_tensors": tensors.len()}));
    }
    Ok(())
}

/// The model's id, the seconds to put it and its bytes.
fn put_model(store: &Store, folder: Option<&Path>) -> Result<(ObjectId, f64, usize)> {
    if let Some(folder) = folder {
        let path = folder.join("model.safetensors");
        // Read once, so that the disk is not measured.
        let len = std::fs::read(&path)?.len();
        let begun = Instant::now();
        let id = ObjectId::model_file(&path)?;
        store.get_or_fetch(&id, PATIENCE, |claim| {
            let mut writer = claim.allocate(len)?;
            std::fs::File::open(&path)?.read_exact(writer.bytes())?;
            Ok(writer)
        })?;
        return Ok((id, begun.elapsed().as_secs_f64(), len));
    }
    let (layers, hidden, intermediate, key_value, vocabulary) = SMOLLM2;
    let random = |shape: &[i64]| Tensor::rand(shape, (Kind::Float, Device::Cpu));
    let mut tensors = vec![("embed".to_string(), random(&[vocabulary, hidden])), ("norm".into(), random(&[hidden]))];
    for layer in 0..layers {
        let shapes = [
            ("q", vec![hidden, hidden]),
            ("k", vec![key_value, hidden]),
            ("v", vec![key_value, hidden]),
            ("o", vec![hidden, hidden]),
            ("gate", vec![intermediate, hidden]),
            ("up", vec![intermediate, hidden]),
            ("down", vec![hidden, intermediate]),
            ("norm_1", vec![hidden]),
            ("norm_2", vec![hidden]),
        ];
        tensors.extend(shapes.into_iter().map(|(name, shape)| (format!("layers.{layer}.{name}"), random(&shape))));
    }
    let named: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let id = ObjectId::weights(echelon_core::role::Role::Actor, 1);
    let begun = Instant::now();
    let object = store.put(&id, &named, &[])?;
    Ok((id, begun.elapsed().as_secs_f64(), object.bytes().len()))
}

/// Copying into a segment whose pages were touched, against the same copy between this process's own buffers.
fn write_rates(len: usize) -> Result<serde_json::Value> {
    let from = vec![1u8; len];
    let mut own = vec![2u8; len];
    let mut live = SegmentWriter::create("bench", len)?.share()?;
    live.bytes().fill(2);
    let (mut memcpy, mut shared) = (Vec::new(), Vec::new());
    // In turns, so that what else the machine does meets both.
    for _ in 0..7 {
        let begun = Instant::now();
        black_box(&mut own).copy_from_slice(black_box(&from));
        memcpy.push(len as f64 / begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        black_box(live.bytes()).copy_from_slice(black_box(&from));
        shared.push(len as f64 / begun.elapsed().as_secs_f64());
    }
    let begun = Instant::now();
    drop(SegmentWriter::create("fresh", len)?);
    let fresh_s = begun.elapsed().as_secs_f64();
    let (memcpy, shared) = (median(memcpy), median(shared));
    Ok(json!({
        "memcpy_bytes_per_s": memcpy.round(), "into_live_segment_bytes_per_s": shared.round(),
        "ratio": round(shared / memcpy), "taking_fresh_memory_s": round(fresh_s),
    }))
}

/// Microseconds to put and to get an object of 1 KiB, medians.
fn small_objects(store: &Store) -> Result<(f64, f64)> {
    let tensor = Tensor::zeros([256], (Kind::Float, Device::Cpu));
    let (mut puts, mut gets) = (Vec::new(), Vec::new());
    for step in 0..2000 {
        let id = ObjectId::batch("small", 0, step);
        let begun = Instant::now();
        let put = store.put(&id, &[("x", &tensor)], &[])?;
        puts.push(ms(begun) * 1e3);
        let begun = Instant::now();
        drop(black_box(store.get(&id)?.tensor("x")?));
        gets.push(ms(begun) * 1e3);
        drop(put);
    }
    Ok((median(puts), median(gets)))
}

/// Milliseconds from a batch of 5 MB here to the answer of the same size from the second process, usable here: median.
fn batches(store: &Store, other: &mut Other) -> Result<f64> {
    let tokens = Tensor::zeros([64, 1024], (Kind::Int64, Device::Cpu));
    let values: Vec<Tensor> = (0..17).map(|_| Tensor::rand([64, 1024], (Kind::Float, Device::Cpu))).collect();
    let names: Vec<String> = (0..values.len()).map(|i| format!("x{i}")).collect();
    let mut named: Vec<(&str, &Tensor)> = names.iter().map(String::as_str).zip(&values).collect();
    named.push(("tokens", &tokens));
    let mut times = Vec::new();
    for step in 0..50 {
        let begun = Instant::now();
        let id = ObjectId::batch("rollout", 0, step);
        let _batch = store.put(&id, &named, &[])?;
        say(other, &serde_json::to_string(&id)?)?;
        let answer = store.wait_for(&ObjectId::batch("answer", 0, step), PATIENCE)?;
        for name in answer.names() {
            drop(black_box(answer.tensor(name)?));
        }
        times.push(ms(begun));
        let mut line = String::new();
        other.answers.read_line(&mut line)?;
    }
    Ok(median(times))
}

fn machine() -> serde_json::Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1).map(String::from));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = read("/proc/loadavg").split(' ').next().unwrap_or_default().to_string();
    json!({"cpu": cpu, "cores": cores, "kernel": read("/proc/sys/kernel/osrelease").trim(), "load_before": load,
           "shared_memory_huge_pages": read("/sys/kernel/mm/transparent_hugepage/shmem_enabled").trim()})
}

fn ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
