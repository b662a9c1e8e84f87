//! What the driver reports becomes a cluster that can be planned for.

use echelon_placement::cluster::{Cluster, DeviceFacts, DeviceKind, Discovery, NodeFacts};

fn devices(name: &str, memory_mib: u64, nvlinks: u32, count: usize) -> Vec<DeviceFacts> {
    let memory_bytes = memory_mib << 20;
    vec![DeviceFacts { name: name.into(), memory_bytes, taken_bytes: 600 << 20, is_sliced: false, nvlinks }; count]
}

fn found(devices: Vec<DeviceFacts>) -> (Cluster, Vec<String>) {
    match Discovery::of(&NodeFacts { devices, host_memory_bytes: 2 << 40 }) {
        Discovery::Found { cluster, notes } => (cluster, notes),
        Discovery::NoDevice { reason } => panic!("{reason}"),
    }
}

/// As `nvidia-smi` reports them on an HGX board.
#[test]
fn a_board_of_linked_devices() {
    let (cluster, notes) = found(devices("NVIDIA H100 80GB HBM3", 81559, 18, 8));
    assert_eq!(cluster.describe(), "1 node of 8 x H100-80GB");
    assert_eq!(cluster.kinds[0].memory_bytes, 81559 << 20);
    assert_eq!(cluster.kinds[0].bf16_flops_per_s, DeviceKind::known("H100-80GB").unwrap().bf16_flops_per_s);
    assert_eq!(cluster.nodes[0].within.bytes_per_s, 450e9);
    assert_eq!((cluster.nodes[0].host_memory_bytes, notes.len()), (2 << 40, 0));
}

#[test]
fn what_others_hold_is_not_planned_with_and_slices_are_told() {
    let mut devices = devices("NVIDIA H100 80GB HBM3", 81559, 18, 2);
    devices[1].taken_bytes = 40 << 30;
    let (cluster, notes) = found(devices.clone());
    let memory: Vec<u64> = cluster.kinds.iter().map(|kind| kind.memory_bytes).collect();
    assert_eq!(memory, [81559 << 20, (81559 << 20) - (40 << 30)]);
    assert!(
        matches!(&notes[..], [note] if note.starts_with("device 1") && note.contains("40.0 of 79.6 GiB")),
        "{notes:?}"
    );
    devices[1] = DeviceFacts { taken_bytes: 0, is_sliced: true, ..devices[0].clone() };
    devices.swap(0, 1);
    let (cluster, notes) = found(devices);
    assert_eq!(cluster.num_devices(), 1, "a process sees one slice");
    assert!(matches!(&notes[..], [note] if note.contains("MIG mode")), "{notes:?}");
}

#[test]
fn devices_without_links_talk_through_the_host() {
    let (cluster, _) = found(devices("NVIDIA A100-SXM4-40GB", 40960, 0, 2));
    assert_eq!(cluster.nodes[0].within.bytes_per_s, 25e9);
    let (linked, _) = found(devices("NVIDIA A100-SXM4-40GB", 40960, 12, 2));
    assert_eq!(linked.nodes[0].within.bytes_per_s, 300e9);
}

#[test]
fn unlike_devices_keep_their_kinds_and_the_slowest_link_holds() {
    let mut mixed = devices("NVIDIA H200", 143771, 18, 1);
    mixed.extend(devices("NVIDIA L40S", 46068, 0, 1));
    let (cluster, _) = found(mixed);
    assert_eq!(cluster.describe(), "1 node of 1 x H200 and 1 x L40S");
    assert_eq!(cluster.nodes[0].devices, [0, 1]);
    assert_eq!(cluster.nodes[0].within.bytes_per_s, 25e9);
    assert_eq!(cluster.between_nodes.bytes_per_s, 12.5e9);
}

#[test]
fn an_unknown_kind_is_planned_with_care_and_said() {
    let (cluster, notes) = found(devices("NVIDIA Z9000", 98304, 0, 1));
    assert_eq!(cluster.describe(), "1 node of 1 x NVIDIA Z9000");
    assert_eq!(cluster.kinds[0].memory_bytes, 98304 << 20);
    assert!(notes[0].starts_with("device 0 (`NVIDIA Z9000`) is of no known kind: its speed is planned as L4's"));
}

#[test]
fn this_node_is_searched_without_a_failure() {
    match Cluster::discover().unwrap() {
        Discovery::Found { cluster, .. } => assert!(cluster.num_devices() > 0 && cluster.has_accelerators()),
        Discovery::NoDevice { reason } => assert!(reason.contains("NVIDIA driver"), "{reason}"),
    }
    let none = Discovery::of(&NodeFacts { devices: Vec::new(), host_memory_bytes: 1 });
    assert_eq!(none, Discovery::NoDevice { reason: "the NVIDIA driver reports no device".into() });
}
