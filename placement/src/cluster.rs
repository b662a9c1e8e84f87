//! The machines that a plan is made for: nodes, their devices, and the links between them.
//!
//! A cluster is found by probing this node ([`Cluster::discover`]), or declared so that a plan can be made with no device present. Devices are
//! numbered through all nodes from 0, in order.

mod discover;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use discover::{DeviceFacts, DiscoverError, Discovery, NodeFacts};

/// Host memory of a node that nobody has told of.
pub const ASSUMED_HOST_BYTES: u64 = 2_000_000_000_000;

const GIB: f64 = (1u64 << 30) as f64;

/// Nodes with their devices, also of unlike kinds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// The kinds that [`Node::devices`] refers to.
    pub kinds: Vec<DeviceKind>,
    pub nodes: Vec<Node>,
    /// What one device sends to a device of another node.
    pub between_nodes: Link,
}

/// One host and its devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Per device, the index of its kind in [`Cluster::kinds`].
    pub devices: Vec<usize>,
    /// What one device sends to another of this node.
    pub within: Link,
    /// Host memory that roles may use, in bytes, shared by the node's devices.
    pub host_memory_bytes: u64,
}

/// A device model and its rated speeds; what part of them is reached is in [`crate::rates::Rates`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceKind {
    pub name: String,
    /// Memory of the device in bytes, as the driver reports it.
    pub memory_bytes: u64,
    /// Bytes that the runtime takes before any tensor: context, kernels, communication library.
    pub reserved_bytes: u64,
    /// Dense bf16 matmul FLOP/s.
    pub bf16_flops_per_s: f64,
    /// f32 FLOP/s without TF32.
    pub f32_flops_per_s: f64,
    /// Bytes/s of the device's memory.
    pub memory_bytes_per_s: f64,
    /// Bytes/s between device and host memory, one way.
    pub host_link_bytes_per_s: f64,
    /// The device's memory is its share of host memory: moving something "to the host" frees nothing (CPU workers).
    pub shares_host_memory: bool,
}

/// One device's rate into a link, one way.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    pub bytes_per_s: f64,
    pub latency_s: f64,
}

/// Why a cluster could not be described.
#[derive(Debug, Error, PartialEq)]
pub enum ClusterError {
    #[error("unknown device kind `{name}`: the known ones are {known}")]
    UnknownKind { name: String, known: String },
    #[error("`{name}` may be {kinds}: say which")]
    SeveralKinds { name: String, kinds: String },
    #[error("a cluster of {nodes} nodes with {devices} devices each has no device: both must be at least 1")]
    Empty { nodes: usize, devices: usize },
}

impl Cluster {
    /// `nodes` nodes of `devices` devices of a known kind (see [`DeviceKind::known`]).
    ///
    /// # Errors
    /// A kind that is not known, or no device at all.
    pub fn of(nodes: usize, devices: usize, kind: &str) -> Result<Cluster, ClusterError> {
        let found = DeviceKind::named(kind)?;
        let links = KNOWN.iter().find(|known| known.name == found.name).map_or((25.0, 12.5), |known| known.links_gb);
        Cluster::uniform(nodes, devices, found, links.0 * 1e9, links.1 * 1e9)
    }

    /// `nodes` nodes of `devices` devices of `kind`, links in bytes/s. Host memory is [`ASSUMED_HOST_BYTES`] a node.
    ///
    /// # Errors
    /// No device at all.
    pub fn uniform(
        nodes: usize,
        devices: usize,
        kind: DeviceKind,
        within_bytes_per_s: f64,
        between_bytes_per_s: f64,
    ) -> Result<Cluster, ClusterError> {
        if nodes == 0 || devices == 0 {
            return Err(ClusterError::Empty { nodes, devices });
        }
        let node = Node {
            devices: vec![0; devices],
            within: Link { bytes_per_s: within_bytes_per_s, latency_s: 10e-6 },
            host_memory_bytes: ASSUMED_HOST_BYTES,
        };
        let between_nodes = Link { bytes_per_s: between_bytes_per_s, latency_s: 25e-6 };
        Ok(Cluster { kinds: vec![kind], nodes: vec![node; nodes], between_nodes })
    }

    /// One host whose `threads` and `memory_bytes` are divided among `workers` CPU processes.
    ///
    /// # Errors
    /// No worker.
    pub fn cpu(workers: usize, threads: usize, memory_bytes: u64) -> Result<Cluster, ClusterError> {
        if workers == 0 {
            return Err(ClusterError::Empty { nodes: 1, devices: 0 });
        }
        let kind = DeviceKind::cpu(threads as f64 / workers as f64, memory_bytes / workers as u64);
        let node = Node {
            devices: vec![0; workers],
            // Gloo between two processes of one host: an all-reduce of 64 MB in 0.08 s, an all-gather in 0.14 s.
            within: Link { bytes_per_s: 0.5e9, latency_s: 150e-6 },
            host_memory_bytes: memory_bytes,
        };
        let between_nodes = Link { bytes_per_s: 0.5e9, latency_s: 300e-6 };
        Ok(Cluster { kinds: vec![kind], nodes: vec![node], between_nodes })
    }

    /// `nodes` nodes like this one's first, each with its first `devices` devices; None where it has fewer.
    pub fn repeated(&self, nodes: usize, devices: usize) -> Option<Cluster> {
        let first = self.nodes.first().filter(|node| (1..=node.devices.len()).contains(&devices))?;
        let node = Node { devices: first.devices[..devices].to_vec(), ..first.clone() };
        Some(Cluster { nodes: vec![node; nodes], ..self.clone() })
    }

    /// This cluster with so much host memory in every node; CPU workers have their shares of it.
    #[must_use]
    pub fn with_host_memory(mut self, bytes: u64) -> Cluster {
        for node in &mut self.nodes {
            node.host_memory_bytes = bytes;
            for &kind in &node.devices {
                let kind = &mut self.kinds[kind];
                if kind.shares_host_memory {
                    kind.memory_bytes = bytes / node.devices.len() as u64;
                }
            }
        }
        self
    }

    /// This cluster and the nodes of another after its own; the slower link between nodes holds for all.
    pub fn joined(mut self, other: Cluster) -> Cluster {
        let renamed: Vec<usize> = other.kinds.into_iter().map(|kind| self.index_of(kind)).collect();
        self.nodes.extend(other.nodes.into_iter().map(|mut node| {
            node.devices.iter_mut().for_each(|kind| *kind = renamed[*kind]);
            node
        }));
        self.between_nodes = self.between_nodes.slower(other.between_nodes);
        self
    }

    fn index_of(&mut self, kind: DeviceKind) -> usize {
        self.kinds.iter().position(|known| *known == kind).unwrap_or_else(|| {
            self.kinds.push(kind);
            self.kinds.len() - 1
        })
    }

    pub fn num_devices(&self) -> usize {
        self.nodes.iter().map(|node| node.devices.len()).sum()
    }

    /// The node of a device and its place there, by its number through all nodes.
    pub fn locate(&self, device: usize) -> Option<(usize, usize)> {
        let mut first = 0;
        for (index, node) in self.nodes.iter().enumerate() {
            if device < first + node.devices.len() {
                return Some((index, device - first));
            }
            first += node.devices.len();
        }
        None
    }

    /// Whether any device is more than a share of host memory.
    pub fn has_accelerators(&self) -> bool {
        self.nodes.iter().flat_map(|node| &node.devices).any(|&kind| !self.kinds[kind].shares_host_memory)
    }

    /// Such as "2 nodes of 8 x H100-80GB + 1 node of 4 x L40S".
    pub fn describe(&self) -> String {
        let mut parts: Vec<(String, usize)> = Vec::new();
        for node in &self.nodes {
            let devices = self.describe_node(node);
            match parts.last_mut().filter(|(last, _)| *last == devices) {
                Some((_, count)) => *count += 1,
                None => parts.push((devices, 1)),
            }
        }
        let shown = |(devices, count): &(String, usize)| match count {
            1 => format!("1 node of {devices}"),
            count => format!("{count} nodes of {devices}"),
        };
        parts.iter().map(shown).collect::<Vec<_>>().join(" + ")
    }

    fn describe_node(&self, node: &Node) -> String {
        let mut counts = vec![0; self.kinds.len()];
        node.devices.iter().for_each(|&kind| counts[kind] += 1);
        let shown = counts.iter().zip(&self.kinds).filter(|(count, _)| **count > 0);
        shown.map(|(count, kind)| format!("{count} x {}", kind.name)).collect::<Vec<_>>().join(" and ")
    }
}

impl Link {
    /// The worse of both in each respect.
    pub fn slower(self, other: Link) -> Link {
        Link { bytes_per_s: self.bytes_per_s.min(other.bytes_per_s), latency_s: self.latency_s.max(other.latency_s) }
    }
}

impl DeviceKind {
    /// A kind as a person names it: by its name here, or by so much of its beginning as only one has ("H100").
    ///
    /// # Errors
    /// No kind or several begin so.
    pub fn named(name: &str) -> Result<DeviceKind, ClusterError> {
        let begins = |known: &&Known| {
            known.name.get(..name.len()).is_some_and(|start| !name.is_empty() && start.eq_ignore_ascii_case(name))
        };
        let names =
            |kinds: &mut dyn Iterator<Item = &Known>| kinds.map(|known| known.name).collect::<Vec<_>>().join(", ");
        match (DeviceKind::known(name), KNOWN.iter().filter(begins).count()) {
            (Some(kind), _) => Ok(kind),
            (None, 0) => Err(ClusterError::UnknownKind { name: name.into(), known: names(&mut KNOWN.iter()) }),
            (None, 1) => Ok(KNOWN.iter().find(begins).expect("counted").kind()),
            (None, _) => {
                Err(ClusterError::SeveralKinds { name: name.into(), kinds: names(&mut KNOWN.iter().filter(begins)) })
            }
        }
    }

    /// A kind by its name here ("H100-80GB"), or by what NVML calls it ("NVIDIA H100 80GB HBM3").
    pub fn known(name: &str) -> Option<DeviceKind> {
        let words: Vec<&str> = name.split(|char: char| !char.is_ascii_alphanumeric()).collect();
        let has = |word: &str| words.iter().any(|other| other.eq_ignore_ascii_case(word));
        let by_words = |known: &&Known| known.name.split('-').all(has);
        let exact = KNOWN.iter().find(|known| known.name.eq_ignore_ascii_case(name));
        exact.or_else(|| KNOWN.iter().find(by_words)).map(Known::kind)
    }

    /// A worker process with its share of a host: about 100 GFLOP/s in f32 and 5 GB/s of memory traffic per thread
    /// (measured with SmolLM2-135M on 2 threads), bf16 at half the f32 rate without AMX.
    pub fn cpu(threads: f64, memory_bytes: u64) -> DeviceKind {
        DeviceKind {
            name: "cpu".into(),
            memory_bytes,
            reserved_bytes: 200 << 20,
            bf16_flops_per_s: 50e9 * threads,
            f32_flops_per_s: 100e9 * threads,
            memory_bytes_per_s: 5e9 * threads,
            host_link_bytes_per_s: 5e9 * threads,
            shares_host_memory: true,
        }
    }

    /// Bytes that tensors may take when `fraction` of the memory is planned for.
    pub fn usable_bytes(&self, fraction: f64) -> u64 {
        ((self.memory_bytes as f64 * fraction) as u64).saturating_sub(self.reserved_bytes)
    }
}

/// A row of the table of known kinds.
struct Known {
    name: &'static str,
    memory_gib: f64,
    bf16_tflops: f64,
    f32_tflops: f64,
    memory_gb_per_s: f64,
    host_link_gb_per_s: f64,
    /// Per device and direction: within a node, between nodes.
    links_gb: (f64, f64),
}

impl Known {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            name: self.name.into(),
            memory_bytes: (self.memory_gib * GIB) as u64,
            reserved_bytes: crate::ledger::runtime_bytes(),
            bf16_flops_per_s: self.bf16_tflops * 1e12,
            f32_flops_per_s: self.f32_tflops * 1e12,
            memory_bytes_per_s: self.memory_gb_per_s * 1e9,
            host_link_bytes_per_s: self.host_link_gb_per_s * 1e9,
            shares_host_memory: false,
        }
    }
}

/// NVIDIA's data sheets: memory as the driver reports it, dense bf16 tensor-core rate, plain f32 rate, memory bandwidth,
/// PCIe one way at what copies reach, NVLink (PCIe for L40S, L4) and a usual network per device.
const KNOWN: [Known; 7] = [
    known("H200", 139.8, [989.0, 67.0], 4800.0, 50.0, (450.0, 50.0)),
    known("H100-80GB", 79.1, [989.0, 67.0], 3350.0, 50.0, (450.0, 50.0)),
    known("A100-80GB", 79.1, [312.0, 19.5], 2039.0, 25.0, (300.0, 25.0)),
    known("A100-40GB", 39.4, [312.0, 19.5], 1555.0, 25.0, (300.0, 12.5)),
    known("L40S", 44.4, [362.0, 91.6], 864.0, 25.0, (25.0, 12.5)),
    known("A10", 22.0, [125.0, 31.2], 600.0, 25.0, (25.0, 6.0)),
    known("L4", 22.0, [121.0, 30.3], 300.0, 25.0, (25.0, 6.0)),
];

const fn known(
    name: &'static str,
    memory_gib: f64,
    [bf16_tflops, f32_tflops]: [f64; 2],
    memory_gb_per_s: f64,
    host_link_gb_per_s: f64,
    links_gb: (f64, f64),
) -> Known {
    Known { name, memory_gib, bf16_tflops, f32_tflops, memory_gb_per_s, host_link_gb_per_s, links_gb }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_numbered_through_all_nodes() {
        let cluster = Cluster::of(2, 8, "h100-80gb").unwrap().joined(Cluster::of(1, 4, "L40S").unwrap());
        assert_eq!(cluster.num_devices(), 20);
        assert_eq!(cluster.locate(7), Some((0, 7)));
        assert_eq!(cluster.locate(8), Some((1, 0)));
        assert_eq!(cluster.locate(19), Some((2, 3)));
        assert_eq!(cluster.locate(20), None);
        assert_eq!(cluster.describe(), "2 nodes of 8 x H100-80GB + 1 node of 4 x L40S");
        assert_eq!(cluster.between_nodes.bytes_per_s, 12.5e9);
    }

    #[test]
    fn kinds_are_found_by_the_drivers_names() {
        for (name, kind) in [
            ("NVIDIA H100 80GB HBM3", "H100-80GB"),
            ("NVIDIA H200", "H200"),
            ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
            ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
            ("NVIDIA L40S", "L40S"),
            ("NVIDIA L4", "L4"),
            ("NVIDIA A10", "A10"),
        ] {
            assert_eq!(DeviceKind::known(name).map(|found| found.name).as_deref(), Some(kind), "{name}");
        }
        assert_eq!(DeviceKind::named("h100").unwrap().name, "H100-80GB");
        assert_eq!((DeviceKind::known("NVIDIA L40"), DeviceKind::known("NVIDIA A100-PCIE-30GB")), (None, None));
        let error = Cluster::of(1, 8, "A100").unwrap_err().to_string();
        assert_eq!(error, "`A100` may be A100-80GB, A100-40GB: say which");
        let error = Cluster::of(1, 8, "TPU").unwrap_err().to_string();
        assert!(error.starts_with("unknown device kind `TPU`: the known ones are H200, H100-80GB"), "{error}");
        assert!(Cluster::of(0, 8, "H200").is_err() && Cluster::cpu(0, 2, 1).is_err());
    }

    #[test]
    fn joining_equal_nodes_keeps_one_kind() {
        let one = Cluster::of(1, 8, "H200").unwrap();
        assert_eq!(one.clone().joined(one), Cluster::of(2, 8, "H200").unwrap());
    }

    #[test]
    fn a_node_that_was_found_stands_for_others_like_it() {
        let found = Cluster::of(1, 8, "H200").unwrap();
        assert_eq!(found.repeated(4, 8), Some(Cluster::of(4, 8, "H200").unwrap()));
        assert_eq!(found.repeated(1, 2), Some(Cluster::of(1, 2, "H200").unwrap()));
        assert_eq!((found.repeated(1, 9), found.repeated(1, 0)), (None, None));
    }

    #[test]
    fn a_host_is_divided_among_its_workers() {
        let cluster = Cluster::cpu(4, 8, 64 << 30).unwrap();
        assert_eq!(cluster.kinds[0].memory_bytes, 16 << 30);
        assert_eq!(cluster.kinds[0].f32_flops_per_s, 200e9);
        assert_eq!(cluster.clone().with_host_memory(32 << 30), Cluster::cpu(4, 8, 32 << 30).unwrap());
        assert!(!cluster.has_accelerators());
    }
}
