//! The recipe's tables of devices, and of which roles they have.

use std::net::SocketAddr;

use echelon_core::device::DeviceChoice;
use echelon_core::role::Role;
use echelon_schema::{Auto, NewPath, Rules, above, above_to, at_least, between, table};

use crate::cluster::DeviceKind;
use crate::tier::Tier;

table! {
    /// Which devices there are.
    pub struct Devices {
        /// Kind of device; `auto` is CUDA where it works.
        pub device: DeviceChoice = DeviceChoice::Auto;
        /// How roles share devices; `auto` goes by the actor's size.
        pub tier: Auto<Tier> = Auto::Auto;
        /// Machines.
        pub nodes: usize = 1, in between(1.0, 100_000.0);
        /// GPUs of each machine; `auto` counts them.
        pub gpus_per_node: Auto<usize> = Auto::Auto, in between(1.0, 1024.0);
        /// Kind of GPU that `--plan` plans for: H200, H100-80GB, A100-80GB ...; unset, this machine's, else H100-80GB.
        pub gpu: Option<String> = None;
        /// Host memory of each machine that plans count on; `auto` is this machine's where it works itself, else 2 TB.
        pub host_memory_gib: Auto<f64> = Auto::Auto, in above(0.0);
        /// Devices in use; on CPU the number of worker processes.
        pub workers: Auto<usize> = Auto::Auto, in between(1.0, 1_000_000.0);
        /// Address at which workers that others start join, such as 0.0.0.0:7401; without it they are started on this
        /// machine.
        pub listen: Option<SocketAddr> = None;
        /// File in which the driver writes, for this user alone, what such workers authenticate with, and which it removes
        /// at the end. Default: one in the folder for temporary files.
        pub credentials: Option<NewPath> = None;
        /// Seconds that workers have to join.
        pub join_timeout_s: f64 = 120.0, in above_to(0.0, 604_800.0);
        /// Unlike machines, instead of `nodes`, `gpus_per_node` and `gpu`: devices are counted through the pools in order.
        pub node_pool: Vec<NodePool> = Vec::new();
    }
}

table! {
    /// Machines of one kind.
    pub struct NodePool {
        /// Machines of the pool.
        pub nodes: usize = 1, in between(1.0, 100_000.0);
        /// GPUs of each.
        pub gpus_per_node: usize, in between(1.0, 1024.0);
        /// Their kind, as in `placement.gpu`.
        pub gpu: String;
        /// Host memory of each; `auto` is 2 TB.
        pub host_memory_gib: Auto<f64> = Auto::Auto, in above(0.0);
    }
}

table! {
    /// Which devices do what.
    pub struct Placement {
        inline devices: Devices;
        /// The actor, by hand.
        pub actor: RolePlacement = RolePlacement::default();
        /// The critic, by hand.
        pub critic: RolePlacement = RolePlacement::default();
        /// The reward model, by hand.
        pub reward: RolePlacement = RolePlacement::default();
        /// The reference, by hand.
        pub reference: RolePlacement = RolePlacement::default();
        /// The generator, by hand.
        pub generator: RolePlacement = RolePlacement::default();
    }
}

table! {
    /// Devices of one role; without either key the planner decides.
    pub struct RolePlacement {
        /// Device numbers, counted through all machines from 0.
        pub devices: Option<Vec<usize>> = None, in at_least(0.0);
        /// Take turns with this role on its devices.
        pub colocate_with: Option<Role> = None;
    }
}

impl Devices {
    /// Rules between its keys, as `[placement]` has them.
    pub fn check(&self, rules: &mut Rules) {
        check_pools(self, rules);
        if self.credentials.is_some() && self.listen.is_none() {
            let message = "`placement.credentials` is for workers that others start".to_string();
            rules.broken(&["placement.credentials"], message, "say where they join: `listen = \"HOST:PORT\"`");
        }
        let Auto::Fixed(workers) = self.workers else { return };
        if let Auto::Fixed(gpus) = self.gpus_per_node
            && self.device != DeviceChoice::Cpu
            && workers > self.nodes * gpus
        {
            let message = format!("{workers} workers do not fit on {} x {gpus} GPUs", self.nodes);
            rules.broken(&["placement.workers"], message, "one worker runs on one GPU");
        } else if !workers.is_multiple_of(self.nodes) {
            let message = format!("{workers} workers are no equal share of {} nodes", self.nodes);
            let next = workers.next_multiple_of(self.nodes);
            rules.broken(&["placement.workers", "placement.nodes"], message, format!("`workers = {next}` is one"));
        }
    }

    /// Devices in use, where the recipe says so.
    pub fn count(&self) -> Option<usize> {
        if !self.node_pool.is_empty() {
            return Some(self.node_pool.iter().map(|pool| pool.nodes * pool.gpus_per_node).sum());
        }
        let gpus = self.gpus_per_node.fixed().filter(|_| self.device != DeviceChoice::Cpu);
        self.workers.fixed().or(gpus.map(|gpus| gpus * self.nodes))
    }

    /// Machines.
    pub fn num_nodes(&self) -> usize {
        match &self.node_pool[..] {
            [] => self.nodes,
            pools => pools.iter().map(|pool| pool.nodes).sum(),
        }
    }
}

fn check_pools(devices: &Devices, rules: &mut Rules) {
    check_gpu("placement.gpu", devices.gpu.as_deref(), rules);
    for (index, pool) in devices.node_pool.iter().enumerate() {
        check_gpu(&format!("placement.node_pool.{index}.gpu"), Some(&pool.gpu), rules);
    }
    if devices.node_pool.is_empty() {
        return;
    }
    for key in ["nodes", "gpus_per_node", "gpu", "host_memory_gib", "workers"] {
        let key = format!("placement.{key}");
        let unset = key == "placement.nodes" && devices.nodes == 1; // as a resolved recipe writes it
        let auto = rules.has(&key)
            && match &key["placement.".len()..] {
                "gpus_per_node" => devices.gpus_per_node == Auto::Auto,
                "host_memory_gib" => devices.host_memory_gib == Auto::Auto,
                "workers" => devices.workers == Auto::Auto,
                _ => false,
            };
        if rules.has(&key) && !unset && !auto {
            let message = format!("`{key}` beside [[placement.node_pool]]: the pools say which devices there are");
            rules.broken(&[&key], message, "keep one of both");
        }
    }
    if devices.device == DeviceChoice::Cpu {
        let message = "[[placement.node_pool]] declares GPUs, and `placement.device` is \"cpu\"".to_string();
        rules.broken(&["placement.device"], message, "delete one of both");
    }
}

fn check_gpu(key: &str, gpu: Option<&str>, rules: &mut Rules) {
    if let Some(Err(error)) = gpu.map(DeviceKind::named) {
        rules.broken(&[key], format!("`{key}`: {error}"), "");
    }
}

impl Placement {
    /// Rules between the roles' keys.
    pub fn check(&self, rules: &mut Rules) {
        let roles = [
            ("actor", Role::Actor, &self.actor),
            ("critic", Role::Critic, &self.critic),
            ("reward", Role::Reward, &self.reward),
            ("reference", Role::Reference, &self.reference),
            ("generator", Role::Generator, &self.generator),
        ];
        for (name, role, hand) in roles {
            let key = |field: &str| format!("placement.{name}.{field}");
            if hand.colocate_with == Some(role) {
                let message = format!("[placement.{name}] is colocated with itself");
                rules.broken(&[&key("colocate_with")], message, "");
            }
            let back = roles.iter().find(|(_, other, _)| hand.colocate_with == Some(*other));
            if let Some((other, _, _)) =
                back.filter(|(_, other, back)| back.colocate_with == Some(role) && *other != role)
            {
                let message = format!("[placement.{name}] and [placement.{other}] are colocated with each other");
                rules.broken(&[&key("colocate_with")], message, "give one of them `devices`");
            }
            if hand.colocate_with.is_some() && hand.devices.is_some() {
                let message = format!("[placement.{name}] has `devices` and `colocate_with`");
                rules.broken(&[&key("colocate_with")], message, "keep one: colocated roles share devices");
            }
            check_device_list(name, hand.devices.as_deref(), self.devices.count(), rules);
        }
    }
}

fn check_device_list(role: &str, devices: Option<&[usize]>, count: Option<usize>, rules: &mut Rules) {
    let Some(devices) = devices else { return };
    let key = format!("placement.{role}.devices");
    if devices.is_empty() {
        let help = "delete the key to leave the choice to the planner";
        rules.broken(&[&key], format!("[placement.{role}] has no devices"), help);
    }
    let count = count.unwrap_or(usize::MAX);
    if let Some(device) = devices.iter().find(|device| **device >= count) {
        let message = format!("device {device} in [placement.{role}] does not exist: there are {count}");
        rules.broken(&[&key], message, "devices are counted from 0 through all machines");
    }
    if let Some(device) = repeated(devices) {
        rules.broken(&[&key], format!("device {device} stands twice in [placement.{role}]"), "");
    }
}

fn repeated(devices: &[usize]) -> Option<usize> {
    devices.iter().enumerate().find(|(index, device)| devices[..*index].contains(device)).map(|(_, device)| *device)
}
