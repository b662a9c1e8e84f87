//! The free devices by classes of equal nodes, and the slices that a group may take of them.
//!
//! In a small cluster (any with up to eight devices) a group may take every set of devices. In a larger one it is a part
//! of one node, a number of whole equal nodes, or all nodes of several unlike classes: a group that took parts of several
//! nodes would run at the slowest link and leave nothing whole to the others. Equal nodes are interchangeable, so that a
//! thousand of them cost no more than their number.

use std::ops::RangeInclusive;

use super::estimate::Slice;
use crate::cluster::{Cluster, DeviceKind, Link};

/// Nodes with equal free devices.
#[derive(Clone, Debug)]
pub(super) struct NodeClass {
    /// Kind and number of the free devices of a node.
    pub kinds: Vec<(usize, usize)>,
    within: Link,
    /// Host memory of one device.
    host_share: u64,
    /// Which nodes these are.
    pub nodes: Vec<usize>,
}

impl NodeClass {
    pub fn devices(&self) -> usize {
        self.kinds.iter().map(|(_, count)| count).sum()
    }
}

/// What a group takes.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Pick {
    /// In a small cluster: so many devices of each kind of every node.
    Spread { take: Vec<Vec<usize>> },
    /// So many devices of each kind of one node of a class, not all.
    Part { class: usize, take: Vec<usize> },
    /// Whole nodes of a class.
    Whole { class: usize, nodes: usize },
    /// Every node of these classes, at least two.
    Mixed { classes: Vec<usize> },
    /// The devices that the recipe names for the group.
    Hand,
}

#[derive(Debug)]
pub(super) struct Inventory<'a> {
    pub cluster: &'a Cluster,
    pub classes: Vec<NodeClass>,
    memory_fraction: f64,
    /// Every pick and what it is worth.
    pub picks: Vec<(Pick, Slice)>,
}

/// Clusters with at most so many different slices are searched slice by slice.
pub(super) const EVERY_SLICE: usize = 256;

/// Members of a slice: a class's link and host share, device kinds, and nodes that look like this.
struct Member<'a> {
    class: &'a NodeClass,
    kinds: Vec<(usize, usize)>,
    nodes: usize,
}

impl Member<'_> {
    /// All nodes of a class.
    fn whole(class: &NodeClass) -> Member<'_> {
        Member { class, kinds: class.kinds.clone(), nodes: class.nodes.len() }
    }
}

impl<'a> Inventory<'a> {
    /// All devices together are the only pick.
    pub fn whole(cluster: &'a Cluster, memory_fraction: f64) -> Inventory<'a> {
        let mut inventory = Inventory::new(cluster, &[], memory_fraction, 0);
        inventory.picks.retain(|(_, slice)| slice.devices == cluster.num_devices());
        inventory
    }

    /// Of the devices not in `taken`, by their numbers; every slice may be picked where there are at most `every_slice`.
    pub fn new(cluster: &'a Cluster, taken: &[usize], memory_fraction: f64, every_slice: usize) -> Inventory<'a> {
        let mut inventory = Inventory::unpicked(cluster, taken, memory_fraction);
        if inventory.num_slices() <= every_slice {
            inventory.separate_nodes();
            inventory.picks = inventory.every_slice();
        } else {
            inventory.picks = inventory.regular_picks();
        }
        inventory
    }

    fn unpicked(cluster: &'a Cluster, taken: &[usize], memory_fraction: f64) -> Inventory<'a> {
        let mut is_taken = vec![false; cluster.num_devices()];
        taken.iter().for_each(|&device| is_taken[device] = true);
        let mut inventory = Inventory { cluster, classes: Vec::new(), memory_fraction, picks: Vec::new() };
        let mut first = 0;
        for (index, node) in cluster.nodes.iter().enumerate() {
            let free = node.devices.iter().zip(&is_taken[first..]).filter(|(_, taken)| !**taken);
            let kinds = counted(free.map(|(kind, _)| *kind));
            first += node.devices.len();
            inventory.add_node(index, kinds);
        }
        inventory
    }

    fn add_node(&mut self, index: usize, kinds: Vec<(usize, usize)>) {
        let node = &self.cluster.nodes[index];
        if kinds.is_empty() {
            return;
        }
        let host_share = node.host_memory_bytes / node.devices.len() as u64;
        let same = |class: &&mut NodeClass| {
            class.kinds == kinds && class.within == node.within && class.host_share == host_share
        };
        match self.classes.iter_mut().find(same) {
            Some(class) => class.nodes.push(index),
            None => self.classes.push(NodeClass { kinds, within: node.within, host_share, nodes: vec![index] }),
        }
    }

    /// Different sets of devices, the empty one among them.
    fn num_slices(&self) -> usize {
        let of_node = |class: &NodeClass| class.kinds.iter().map(|(_, count)| count + 1).product::<usize>();
        let of_class = |class: &NodeClass| of_node(class).saturating_pow(class.nodes.len() as u32);
        self.classes.iter().map(of_class).fold(1, usize::saturating_mul)
    }

    /// Makes every node a class of its own, in the order of the nodes.
    fn separate_nodes(&mut self) {
        let alone = |class: &NodeClass| {
            let class = class.clone();
            class.nodes.clone().into_iter().map(move |node| NodeClass { nodes: vec![node], ..class.clone() })
        };
        self.classes = self.classes.iter().flat_map(alone).collect();
        self.classes.sort_by_key(|class| class.nodes[0]);
    }

    fn every_slice(&self) -> Vec<(Pick, Slice)> {
        let mut takes = vec![Vec::new()];
        for class in &self.classes {
            let mut longer = Vec::new();
            for take in &takes {
                for part in parts(&class.kinds, 0..=class.devices()) {
                    longer.push([take.as_slice(), &[part]].concat());
                }
            }
            takes = longer;
        }
        takes.retain(|take| take.iter().flatten().any(|count| *count > 0));
        // Smaller ones first, so that they can make larger ones needless.
        takes.sort_by_key(|take| take.iter().flatten().sum::<usize>());
        let slice = |take: &Vec<Vec<usize>>| {
            let used = self.classes.iter().zip(take).filter(|(_, part)| part.iter().any(|count| *count > 0));
            let member = |(class, part): (_, &Vec<usize>)| Member { class, kinds: some_of(class, part), nodes: 1 };
            self.slice(&used.map(member).collect::<Vec<_>>())
        };
        takes.into_iter().map(|take| (slice(&take), take)).map(|(slice, take)| (Pick::Spread { take }, slice)).collect()
    }

    pub fn free_devices(&self) -> usize {
        self.classes.iter().map(|class| class.devices() * class.nodes.len()).sum()
    }

    /// Most devices of one node: an engine cannot be larger.
    pub fn largest_node(&self) -> usize {
        self.cluster.nodes.iter().map(|node| node.devices.len()).max().unwrap_or(0)
    }

    fn regular_picks(&self) -> Vec<(Pick, Slice)> {
        let mut picks = Vec::new();
        for (index, class) in self.classes.iter().enumerate() {
            for take in parts(&class.kinds, 1..=class.devices() - 1) {
                let kinds = some_of(class, &take);
                let slice = self.slice(&[Member { class, kinds, nodes: 1 }]);
                picks.push((Pick::Part { class: index, take }, slice));
            }
            for nodes in 1..=class.nodes.len() {
                let slice = self.slice(&[Member { class, kinds: class.kinds.clone(), nodes }]);
                picks.push((Pick::Whole { class: index, nodes }, slice));
            }
        }
        for classes in mixtures(self.classes.len()) {
            let member = |&index: &usize| Member::whole(&self.classes[index]);
            let slice = self.slice(&classes.iter().map(member).collect::<Vec<_>>());
            picks.push((Pick::Mixed { classes }, slice));
        }
        picks
    }

    /// What devices named by hand are worth.
    pub fn hand_slice(&self, devices: &[usize]) -> Slice {
        let mut by_node: Vec<(usize, Vec<usize>)> = Vec::new();
        for &device in devices {
            let (node, place) = self.cluster.locate(device).expect("checked against the cluster");
            let kind = self.cluster.nodes[node].devices[place];
            match by_node.iter_mut().find(|(known, _)| *known == node) {
                Some((_, kinds)) => kinds.push(kind),
                None => by_node.push((node, vec![kind])),
            }
        }
        let class = |(node, _): &(usize, Vec<usize>)| {
            let node = &self.cluster.nodes[*node];
            let host_share = node.host_memory_bytes / node.devices.len() as u64;
            NodeClass { kinds: Vec::new(), within: node.within, host_share, nodes: Vec::new() }
        };
        let classes: Vec<NodeClass> = by_node.iter().map(class).collect();
        let pairs = classes.iter().zip(&by_node);
        let members =
            pairs.map(|(class, (_, kinds))| Member { class, kinds: counted(kinds.iter().copied()), nodes: 1 });
        self.slice(&members.collect::<Vec<_>>())
    }

    fn slice(&self, members: &[Member]) -> Slice {
        let kinds = || members.iter().flat_map(|member| &member.kinds).filter(|(_, count)| *count > 0);
        let slowest = |speed: fn(&DeviceKind) -> f64| {
            kinds().map(|(kind, _)| speed(&self.cluster.kinds[*kind])).fold(f64::INFINITY, f64::min)
        };
        let on_node = |member: &Member| member.kinds.iter().map(|(_, count)| count).sum::<usize>();
        let within =
            members.iter().map(|member| member.class.within).reduce(Link::slower).expect("a slice has devices");
        let nodes: usize = members.iter().map(|member| member.nodes).sum();
        let usable = |kind: usize| self.cluster.kinds[kind].usable_bytes(self.memory_fraction);
        let host_share = members.iter().map(|member| member.class.host_share).min().unwrap_or(0);
        Slice {
            devices: members.iter().map(|member| on_node(member) * member.nodes).sum(),
            per_node: members.iter().map(on_node).fold(0, greatest_common_divisor),
            usable_bytes: kinds().map(|(kind, _)| usable(*kind)).min().unwrap_or(0),
            usable_host_bytes: (host_share as f64 * self.memory_fraction) as u64,
            bf16_flops_per_s: slowest(|kind| kind.bf16_flops_per_s),
            f32_flops_per_s: slowest(|kind| kind.f32_flops_per_s),
            memory_bytes_per_s: slowest(|kind| kind.memory_bytes_per_s),
            host_link_bytes_per_s: slowest(|kind| kind.host_link_bytes_per_s),
            shares_host_memory: kinds().any(|(kind, _)| self.cluster.kinds[*kind].shares_host_memory),
            link: if nodes == 1 { within } else { within.slower(self.cluster.between_nodes) },
            within,
        }
    }
}

/// Kinds with their numbers, in the order of the kinds.
fn counted(kinds: impl Iterator<Item = usize>) -> Vec<(usize, usize)> {
    let mut counts: Vec<(usize, usize)> = Vec::new();
    for kind in kinds {
        match counts.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, count)) => *count += 1,
            None => counts.push((kind, 1)),
        }
    }
    counts.sort_unstable();
    counts
}

/// So many of each kind of a node's devices.
fn some_of(class: &NodeClass, take: &[usize]) -> Vec<(usize, usize)> {
    class.kinds.iter().zip(take).map(|((kind, _), count)| (*kind, *count)).collect()
}

/// Every way to take `wanted` of a node's devices, by kind.
fn parts(kinds: &[(usize, usize)], wanted: RangeInclusive<usize>) -> Vec<Vec<usize>> {
    let mut parts = vec![Vec::new()];
    for (_, count) in kinds {
        let with = |part: &Vec<usize>| (0..=*count).map(|take| [part.as_slice(), &[take]].concat()).collect::<Vec<_>>();
        parts = parts.iter().flat_map(with).collect();
    }
    parts.retain(|part| wanted.contains(&part.iter().sum::<usize>()));
    parts
}

/// Sets of at least two of `classes` classes; of more than six only the set of all.
fn mixtures(classes: usize) -> Vec<Vec<usize>> {
    if classes > 6 {
        return vec![(0..classes).collect()];
    }
    let members = |bits: usize| (0..classes).filter(|class| bits >> class & 1 == 1).collect::<Vec<_>>();
    (0..1usize << classes).map(members).filter(|set| set.len() > 1).collect()
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}
