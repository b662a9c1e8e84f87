//! What the device is, whose it is besides, and whether NCCL works on it.

use echelon_core::process_group::{nccl_alone, nccl_version};
use echelon_core::shim;
use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use tch::{Device, Kind, Tensor};

use super::place::{Place, is_stand_in};
use super::verdict::Findings;
use crate::program::Failure;

const GIB: f64 = (1u64 << 30) as f64;

/// Free memory that the check's largest step needs, about: a 1.5B model that learns.
const WANTED_GIB: f64 = 32.0;

/// Step `device`: the driver's and libtorch's own words, and a first sum on the device.
pub fn find(place: &Place) -> Result<Findings, Failure> {
    let device = place.device()?;
    let mut findings = Findings::new(is_stand_in());
    let nvml = Nvml::init().map_err(|error| error.to_string());
    if let Err(why) = nvml.as_ref().map_err(String::clone).and_then(|nvml| tell_device(nvml, &mut findings)) {
        findings.tell("NVML, the driver's management library", format!("does not tell all: {why}"), "");
    }
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_else(|_| "not set".into());
    findings.tell("CUDA_VISIBLE_DEVICES", visible, "");
    findings.tell("devices that libtorch sees", tch::Cuda::device_count(), "");
    for line in build_lines(&shim::torch_build()) {
        findings.tell("libtorch", line, "");
    }
    findings.tell("NCCL", nccl_version().unwrap_or_else(|error| error.to_string()), "");
    let sum = sum_on(device)?;
    findings.holds("a sum on the device", sum, "499500", sum == 499_500.0);
    Ok(findings)
}

/// The parts of libtorch's description that speak of CUDA.
fn build_lines(text: &str) -> Vec<String> {
    let speaks = |part: &&str| ["CUDA Runtime", "CuDNN", "stand-in"].iter().any(|word| part.contains(word));
    let parts = text.lines().flat_map(|line| line.split(" - ")).map(str::trim).filter(speaks);
    let built = text.split([',', ' ']).filter(|word| word.starts_with("CUDA_VERSION="));
    parts.chain(built).map(|part| part.chars().take(160).collect()).collect()
}

fn sum_on(device: Device) -> Result<f64, Failure> {
    let numbers = Tensor::f_arange(1000, (Kind::Double, device)).map_err(Failure::other)?;
    numbers.f_sum(Kind::Double).and_then(|sum| sum.f_double_value(&[])).map_err(Failure::other)
}

fn tell_driver(nvml: &Nvml, findings: &mut Findings) {
    let driver = nvml.sys_driver_version().unwrap_or_else(|error| not_told(&error));
    findings.tell("driver", driver, "");
    if let Ok(version) = nvml.sys_cuda_driver_version() {
        findings.tell("newest CUDA that the driver serves", format!("{}.{}", version / 1000, version % 1000 / 10), "");
    }
}

/// Older drivers lack functions.
fn not_told(error: &NvmlError) -> String {
    match error {
        NvmlError::FailedToLoadSymbol(_) => "not told: this driver has no such function".into(),
        error => format!("not told: {error}"),
    }
}

/// Of the first device that NVML lists; its numbering may differ from CUDA's where several are visible.
fn tell_device(nvml: &Nvml, findings: &mut Findings) -> Result<(), String> {
    let failed = |what: &'static str| move |error| format!("{what}: {error}");
    tell_driver(nvml, findings);
    findings.tell("devices that NVML lists", nvml.device_count().map_err(failed("counting devices"))?, "");
    let device = nvml.device_by_index(0).map_err(failed("device 0"))?;
    findings.tell(DEVICE_NAME, device.name().map_err(failed("its name"))?, "");
    let memory = device.memory_info().map_err(failed("its memory"))?;
    findings.tell("memory", memory.total as f64 / GIB, "GiB");
    findings.tell("memory free", memory.free as f64 / GIB, "GiB");
    if !findings.stand_in && (memory.free as f64) < WANTED_GIB * GIB {
        findings.tell("warning", format!("the larger steps want some {WANTED_GIB} GiB free and may fail for room"), "");
    }
    if let Ok(capability) = device.cuda_compute_capability() {
        findings.tell("compute capability", format!("{}.{}", capability.major, capability.minor), "");
    }
    let mig = match device.mig_mode() {
        Ok(mode) if mode.current == 0 => "off".into(),
        Ok(_) => "on: this is a slice of a card, and speeds are the slice's".into(),
        Err(error) => not_told(&error),
    };
    findings.tell("MIG", mig, "");
    findings.tell("others on the card", others(&device), "");
    Ok(())
}

/// The finding that the page takes the device's name from.
pub const DEVICE_NAME: &str = "device";

/// Processes that compute on the card, without this one.
fn others(device: &nvml_wrapper::Device) -> String {
    let processes = match device.running_compute_processes() {
        Ok(processes) => processes,
        Err(error) => return not_told(&error),
    };
    let line = |process: &nvml_wrapper::struct_wrappers::device::ProcessInfo| {
        let memory = match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => format!("{:.1} GiB", bytes as f64 / GIB),
            UsedGpuMemory::Unavailable => "an unknown amount".into(),
        };
        format!("process {} with {memory}", process.pid)
    };
    let others: Vec<String> = processes.iter().filter(|process| process.pid != std::process::id()).map(line).collect();
    if others.is_empty() { "nobody".into() } else { others.join(", ") }
}

/// Step `nccl`: every collective of a group of one.
pub fn nccl(place: &Place) -> Result<Findings, Failure> {
    let (device, mut findings) = place.open()?;
    let Device::Cuda(index) = device else { unreachable!("a CUDA device was asked for") };
    for operation in nccl_alone(index)? {
        findings.holds(operation, "gave back what it was given", "the same numbers", true);
    }
    findings.tell("not shown", "anything between two devices: this group has one", "");
    Ok(findings)
}
