//! What devices this node has, from the driver's management library (NVML), which is loaded at run time.

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use super::{Cluster, DeviceKind, KNOWN, Link, Node};

/// What a search for devices found.
#[derive(Clone, Debug, PartialEq)]
pub enum Discovery {
    Found {
        /// One node.
        cluster: Cluster,
        /// Sentences on devices whose figures are guesses.
        notes: Vec<String>,
    },
    /// No driver, or a driver without a device: the node computes on its CPU.
    NoDevice { reason: String },
}

/// What NVML tells of a node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeFacts {
    pub devices: Vec<DeviceFacts>,
    pub host_memory_bytes: u64,
}

/// What NVML tells of a device.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceFacts {
    /// Such as "NVIDIA H100 80GB HBM3".
    pub name: String,
    /// Of the device, or of its first slice where it is in MIG mode.
    pub memory_bytes: u64,
    /// What other processes hold of it.
    pub taken_bytes: u64,
    /// It is divided into slices, of which a process sees one.
    pub is_sliced: bool,
    /// NVLinks that are up.
    pub nvlinks: u32,
}

/// NVLinks that a device may have.
const MAX_NVLINKS: u32 = 18;

impl Cluster {
    /// The devices of this node.
    ///
    /// # Errors
    /// A driver is there and does not answer as it should: the device and NVML's message.
    pub fn discover() -> Result<Discovery, DiscoverError> {
        let nvml = match Nvml::init() {
            Ok(nvml) => nvml,
            Err(NvmlError::LibloadingError(error)) => {
                return Ok(Discovery::NoDevice { reason: format!("no NVIDIA driver: {error}") });
            }
            Err(error @ (NvmlError::DriverNotLoaded | NvmlError::LibraryNotFound | NvmlError::NoPermission)) => {
                return Ok(Discovery::NoDevice { reason: format!("the NVIDIA driver does not run here: {error}") });
            }
            Err(source @ NvmlError::LibRmVersionMismatch) => {
                let reason = format!("{source}: it was updated; reboot, or reload its kernel modules");
                return Err(DiscoverError { what: "starting NVML".into(), reason });
            }
            Err(source) => return Err(DiscoverError { what: "starting NVML".into(), reason: source.to_string() }),
        };
        let facts = NodeFacts { devices: read_devices(&nvml)?, host_memory_bytes: echelon_core::store::total() };
        Ok(Discovery::of(&facts))
    }
}

/// NVML's refusal.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[error("finding devices: {what}: {reason}")]
pub struct DiscoverError {
    what: String,
    reason: String,
}

impl Discovery {
    /// The node that these facts describe: rates by kind where the kind is known, memory as the driver reports it.
    pub fn of(facts: &NodeFacts) -> Discovery {
        if facts.devices.is_empty() {
            return Discovery::NoDevice { reason: "the NVIDIA driver reports no device".into() };
        }
        let mut notes = Vec::new();
        let mut node = Cluster { kinds: Vec::new(), nodes: Vec::new(), between_nodes: FAST };
        let (mut devices, mut within) = (Vec::new(), FAST);
        // Of sliced devices a process sees one slice, whatever there is beside it.
        let seen = if facts.devices.iter().any(|device| device.is_sliced) { 1 } else { facts.devices.len() };
        for (index, device) in facts.devices.iter().take(seen).enumerate() {
            notes.extend(notes_on(index, device));
            let (kind, links_gb) = known_or_guessed(device, index, &mut notes);
            // Without NVLink devices of a node reach each other through the host.
            let within_gb = if device.nvlinks > 0 { links_gb.0 } else { kind.host_link_bytes_per_s / 1e9 };
            within = within.slower(Link { bytes_per_s: within_gb * 1e9, latency_s: 10e-6 });
            node.between_nodes = node.between_nodes.slower(Link { bytes_per_s: links_gb.1 * 1e9, latency_s: 25e-6 });
            devices.push(node.index_of(kind));
        }
        node.nodes.push(Node { devices, within, host_memory_bytes: facts.host_memory_bytes });
        Discovery::Found { cluster: node, notes }
    }
}

/// What the slower of two links is found with.
const FAST: Link = Link { bytes_per_s: f64::INFINITY, latency_s: 0.0 };

/// A device's kind and its links in GB/s, within a node and between nodes.
fn known_or_guessed(device: &DeviceFacts, index: usize, notes: &mut Vec<String>) -> (DeviceKind, (f64, f64)) {
    let known = DeviceKind::known(&device.name);
    let kind = known.clone().unwrap_or_else(|| {
        let slowest = KNOWN.last().expect("the table has rows").kind();
        notes.push(format!(
            "device {index} (`{}`) is of no known kind: its speed is planned as {}'s; calibrate the rates with a run",
            device.name, slowest.name
        ));
        DeviceKind { name: device.name.clone(), ..slowest }
    });
    let row = KNOWN.iter().find(|row| row.name == kind.name).or(KNOWN.last()).expect("the table has rows");
    (DeviceKind { memory_bytes: device.memory_bytes - device.others_bytes(), ..kind }, row.links_gb)
}

impl DeviceFacts {
    /// What others hold, where it is more than the driver itself takes.
    fn others_bytes(&self) -> u64 {
        if self.taken_bytes > DRIVERS_OWN { self.taken_bytes.min(self.memory_bytes) } else { 0 }
    }
}

/// What a device may show as taken that nobody uses.
const DRIVERS_OWN: u64 = 1 << 30;

fn notes_on(index: usize, device: &DeviceFacts) -> Vec<String> {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let mut notes = Vec::new();
    if device.others_bytes() > 0 {
        notes.push(format!(
            "device {index} (`{}`) is in use by others: {:.1} of {:.1} GiB are taken, and plans count on the rest; nvidia-smi \
             names the processes",
            device.name,
            gib(device.others_bytes()),
            gib(device.memory_bytes)
        ));
    }
    if device.is_sliced {
        notes.push(format!(
            "device {index} (`{}`) is in MIG mode: a process sees one slice of it, of {:.1} GiB, and slices cannot be connected by \
             NCCL: give each run one slice (CUDA_VISIBLE_DEVICES=MIG-...), or turn MIG off",
            device.name,
            gib(device.memory_bytes)
        ));
    }
    notes
}

fn read_devices(nvml: &Nvml) -> Result<Vec<DeviceFacts>, DiscoverError> {
    let failed = |what: String| move |error: NvmlError| DiscoverError { what, reason: error.to_string() };
    let count = nvml.device_count().map_err(failed("counting devices".into()))?;
    let read = |index: u32| {
        let of = |what: &str| failed(format!("device {index}: {what}"));
        let device = nvml.device_by_index(index).map_err(of("opening it"))?;
        let is_up = |link: &u32| device.link_wrapper_for(*link).is_active().unwrap_or(false);
        let is_sliced = device.mig_mode().is_ok_and(|mode| mode.current != 0);
        let slice = is_sliced.then(|| device.mig_device_by_index(0).and_then(|slice| slice.memory_info()));
        let whole = device.memory_info();
        let memory = slice.and_then(Result::ok).map_or(whole, Ok).map_err(of("its memory"))?;
        Ok(DeviceFacts {
            name: device.name().map_err(of("its name"))?,
            memory_bytes: memory.total,
            taken_bytes: memory.used,
            is_sliced,
            nvlinks: (0..MAX_NVLINKS).filter(is_up).count() as u32,
        })
    };
    (0..count).map(read).collect()
}
