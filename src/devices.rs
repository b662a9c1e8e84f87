//! What a recipe means for the devices of this machine.

use std::path::Path;

use echelon_core::compute::{Compute, ComputeDtype};
use echelon_core::device;
use echelon_core::weight_layout::WeightLayout;
use echelon_core::zero::PassConfig;
use echelon_placement::control::Credentials;
use echelon_placement::devices::Devices;
use echelon_placement::launch::Place;
use tch::Device;

use crate::node;
use crate::program::Failure;
use echelon_roles::models::Held;

/// The device and dtype that a recipe asks for, and a warning where the device is not what the hardware suggests. A worker
/// among several of its host has its `place`, which names its device. Weights lie plainly: the driver decides otherwise, and
/// tells its workers.
pub fn held(compute: &Compute, devices: &Devices, place: Option<&Place>) -> Result<(Held, Option<String>), Failure> {
    let mut chosen = device::choose(devices.device).map_err(Failure::input)?;
    if let (Device::Cuda(_), Some(place)) = (chosen.device, place) {
        let visible = tch::Cuda::device_count() as u32;
        chosen.device = Device::Cuda(place.device_index(visible).map_err(Failure::input)? as usize);
    }
    let on_cpu = chosen.device == Device::Cpu;
    let usual = if on_cpu { ComputeDtype::Float32 } else { ComputeDtype::Bfloat16 };
    let kind = compute.dtype.fixed().unwrap_or(usual).kind();
    let pass = PassConfig {
        device: chosen.device,
        tokens_per_micro_batch: compute.tokens_per_micro_batch as i64,
        activation_checkpointing: compute.activation_checkpointing,
    };
    let deterministic = on_cpu || compute.deterministic.fixed().unwrap_or(false);
    Ok((Held { kind, pass, weight_layout: WeightLayout::Plain, deterministic }, chosen.warning))
}

/// Device, dtype and threads, for a run's first lines; of a GPU also whether its results can be had again.
pub fn device_line(held: Held) -> String {
    let line = format!("{}, {:?}, {} threads", device_name(held.pass.device), held.kind, tch::get_num_threads());
    match (held.pass.device, held.deterministic) {
        (Device::Cpu, _) => line,
        (_, true) => format!("{line}, deterministic"),
        (_, false) => format!("{line}, not deterministic"),
    }
}

/// A device as a person knows it: of a GPU its model.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cpu => "Cpu".into(),
        gpu => node::gpus().map_or_else(|| format!("{gpu:?}"), |here| format!("{gpu:?} ({})", here.kinds[0].name)),
    }
}

/// How many workers a run has, with what else must be so before any is started.
///
/// # Errors
/// [`Failure::Input`]: hardware that is not here, a place to join or for credentials that cannot be used.
pub fn num_workers(devices: &Devices, held: Held) -> Result<usize, Failure> {
    let on_cpu = held.pass.device == Device::Cpu;
    let workers = if on_cpu { devices.workers.fixed() } else { devices.count() }.unwrap_or(1);
    let gpus = devices.count().filter(|_| devices.workers.fixed().is_none()).unwrap_or(0);
    if on_cpu && gpus > 0 {
        let key = if devices.node_pool.is_empty() { "placement.gpus_per_node" } else { "[[placement.node_pool]]" };
        return Err(Failure::Input(format!(
            "{key}: the recipe is for {gpus} GPUs, and this machine has none that work: --plan resolves it, \
             and placement.workers = N with device = \"cpu\" runs it on N worker processes"
        )));
    }
    let visible = device::num_visible();
    if !on_cpu && devices.listen.is_none() && devices.num_nodes() == 1 && workers > visible {
        let key = if devices.workers.fixed().is_some() { "placement.workers" } else { "placement.gpus_per_node" };
        let list = std::env::var("CUDA_VISIBLE_DEVICES").map(|list| format!(" (CUDA_VISIBLE_DEVICES is `{list}`)"));
        return Err(Failure::Input(format!(
            "{key}: {workers} workers need a GPU each, and CUDA shows {visible}{}: set {key} = {visible}, or show more",
            list.unwrap_or_default()
        )));
    }
    if devices.num_nodes() > 1 && devices.listen.is_none() {
        return Err(Failure::Input(format!(
            "[placement] has {} nodes: workers of other machines are started there: say where they join, such as \
             placement.listen = \"0.0.0.0:7401\"",
            devices.num_nodes()
        )));
    }
    if let Some(file) = &devices.credentials {
        check_credentials(&file.0)?;
    }
    if let Some(address) = devices.listen {
        // Before anything is started: the address is this machine's, and free.
        std::net::TcpListener::bind(address).map_err(|error| {
            Failure::Input(format!(
                "placement.listen: cannot listen at {address}: {error}; give an address of this machine and a free port \
                 (port 0 finds one)"
            ))
        })?;
    }
    Ok(workers)
}

/// Refuses a place for credentials where something else is, or where nothing can be.
///
/// # Errors
/// [`Failure::Input`], with the key.
fn check_credentials(file: &Path) -> Result<(), Failure> {
    let refuse = |why: &str| Err(Failure::Input(format!("placement.credentials: {}: {why}", file.display())));
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    if folder.is_some_and(|folder| !folder.is_dir()) {
        return refuse("its folder is not there");
    }
    match file.exists() && Credentials::read(file).is_err() {
        true => refuse("there is something else; name a file that is not there"),
        false => Ok(()),
    }
}
