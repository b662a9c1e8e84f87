//! Which task runs where, and when: plain data, without threads or clocks of its own, so that it can be tried by itself.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::books::{Books, Devices, Grant};
use super::demand::{Demand, NodeConfig, Units};

/// Younger tasks that may begin before a waiting one (TK-5).
pub const OVERTAKES: u64 = 64;

/// Most tasks that run one after the other under one grant.
const BATCH: usize = 64;
/// They are expected to take no longer than this together: what is longer gains nothing from company.
const BATCH_NS: u64 = 2_000_000;
/// Bytes of their arguments.
const BATCH_BYTES: usize = 256 << 10;
/// Kinds of tasks among which batches are looked for.
const BATCH_LANES: usize = 8;
/// Lanes that are kept although nothing waits in them.
const IDLE_LANES: usize = 64;
/// What a task takes that has never run.
const UNKNOWN_NS: u64 = 1_000_000;
/// The way to another node and back before it was measured.
const WAY_NS: u64 = 200_000;

/// What is scheduled.
pub(super) trait Work {
    /// Its caller has gone: it will not run.
    fn is_cancelled(&self) -> bool;
    /// Bytes that go with it to another node; none when it cannot leave its own.
    fn portable_bytes(&self) -> Option<usize>;
    /// It shares no grant with others.
    fn is_alone(&self) -> bool;
}

/// A node, by the order in which it was added; number 0 is the one of this process.
pub(super) type NodeId = usize;

/// A task that waits.
pub(super) struct Entry<W> {
    pub name: &'static str,
    pub units: Units,
    /// Where it was submitted.
    pub own: NodeId,
    /// In the order of submission, over all nodes.
    pub sequence: u64,
    pub work: W,
    /// Expected, as it was added to its node's backlog.
    charged_ns: u64,
    /// [`Lane::passes`] when it came.
    since: u64,
}

/// Tasks that have begun, one after the other, under one grant.
#[must_use]
pub(super) struct Started {
    pub node: NodeId,
    pub name: &'static str,
    grant: Grant,
    /// Of the node's life: a node that was lost has forgotten its grants.
    life: u64,
    charged_ns: u64,
}

impl Started {
    pub fn gpus(&self) -> &Devices {
        &self.grant.gpus
    }
}

/// What a role holds of a node.
#[must_use]
pub(super) struct Held {
    pub node: NodeId,
    life: u64,
    grant: Grant,
}

impl Held {
    pub fn gpus(&self) -> &Devices {
        &self.grant.gpus
    }
}

/// A node as it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeReport {
    pub name: String,
    /// Lost nodes are listed, but take nothing.
    pub alive: bool,
    pub total: Demand,
    /// By tasks and roles together.
    pub in_use: Demand,
    /// By roles.
    pub reserved: Demand,
    pub running: usize,
    pub waiting: usize,
    /// Expected until all that waits and runs there has ended.
    pub backlog_s: f64,
}

pub(super) struct Schedule<W> {
    nodes: Vec<Node<W>>,
    next: u64,
    /// Over all nodes, for those that have not run a task of that name.
    means: Means,
}

struct Node<W> {
    name: String,
    alive: bool,
    life: u64,
    books: Books,
    lanes: HashMap<Kind, Lane<W>>,
    /// The oldest of each lane that has any, by sequence.
    heads: BTreeMap<u64, Kind>,
    waiting: usize,
    backlog_ns: u64,
    means: Means,
    way_ns: u64,
}

/// Tasks that may share a grant.
type Kind = (Units, &'static str);

struct Lane<W> {
    queue: VecDeque<Entry<W>>,
    /// How often a younger task has begun before one of these.
    passes: u64,
}

impl<W> Lane<W> {
    /// How many younger tasks may still begin before its oldest.
    fn patience(&self) -> u64 {
        let passed = self.queue.front().map_or(0, |head| self.passes - head.since);
        OVERTAKES.saturating_sub(passed)
    }
}

/// Running averages of seconds by name, in ns.
#[derive(Default)]
struct Means(HashMap<&'static str, u64>);

impl Means {
    fn record(&mut self, name: &'static str, ns: u64) {
        let mean = self.0.entry(name).or_insert(ns);
        *mean = mean.saturating_mul(7).saturating_add(ns) / 8;
    }

    fn get(&self, name: &str) -> Option<u64> {
        self.0.get(name).copied()
    }
}

impl<W: Work> Schedule<W> {
    /// With the node of this process.
    ///
    /// # Errors
    /// In words: totals that mean nothing.
    pub fn new(own: &NodeConfig) -> Result<Schedule<W>, String> {
        let mut schedule = Schedule { nodes: Vec::new(), next: 0, means: Means::default() };
        schedule.add_node(own)?;
        Ok(schedule)
    }

    /// Adds a node, or brings back one that was lost; one that lives stays as it is.
    ///
    /// # Errors
    /// In words: totals that mean nothing.
    pub fn add_node(&mut self, config: &NodeConfig) -> Result<NodeId, String> {
        let total = Demand::cpus(config.num_cpus).units()?;
        let books = Books::new(config, total);
        if let Some(known) = self.find(&config.name) {
            let node = &mut self.nodes[known];
            if !node.alive {
                (node.books, node.alive) = (books, true);
            }
            return Ok(known);
        }
        self.nodes.push(Node {
            name: config.name.clone(),
            alive: true,
            life: 0,
            books,
            lanes: HashMap::new(),
            heads: BTreeMap::new(),
            waiting: 0,
            backlog_ns: 0,
            means: Means::default(),
            way_ns: if self.nodes.is_empty() { 0 } else { WAY_NS },
        });
        Ok(self.nodes.len() - 1)
    }

    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.nodes.iter().position(|node| node.name == name)
    }

    pub fn name(&self, node: NodeId) -> &str {
        &self.nodes[node].name
    }

    /// The node for a task that was submitted on `own` (TK-2); none when none ever fits (TK-3).
    pub fn place(&self, own: NodeId, units: Units, portable: bool) -> Option<NodeId> {
        let home = &self.nodes[own];
        if home.has_room(units) {
            return Some(own);
        }
        if !portable {
            return (home.alive && home.books.fits_ever(units)).then_some(own);
        }
        let fitting = self.nodes.iter().enumerate().filter(|(_, node)| node.alive && node.books.fits_ever(units));
        let least = fitting.min_by_key(|(id, node)| (node.wait_ns(units), node.backlog_ns, *id != own, *id));
        least.map(|(id, _)| id)
    }

    /// Lets a task wait on a node.
    pub fn enqueue(&mut self, node: NodeId, (name, units, own): (&'static str, Units, NodeId), work: W) {
        let sequence = self.next;
        self.next += 1;
        self.insert(node, Entry { name, units, own, sequence, work, charged_ns: 0, since: 0 });
    }

    /// Lets a task that was begun, or waited elsewhere, wait on a node; older ones still go first.
    pub fn insert(&mut self, node: NodeId, mut entry: Entry<W>) {
        let expected_ns = self.expected_ns(node, entry.name).unwrap_or(UNKNOWN_NS);
        let node = &mut self.nodes[node];
        entry.charged_ns = (expected_ns as f64 * node.books.share(entry.units)) as u64;
        node.backlog_ns += entry.charged_ns;
        node.waiting += 1;
        let kind = (entry.units, entry.name);
        let lane = node.lanes.entry(kind).or_insert_with(|| Lane { queue: VecDeque::new(), passes: 0 });
        entry.since = lane.passes;
        let at = match lane.queue.back() {
            Some(last) if last.sequence > entry.sequence => {
                lane.queue.partition_point(|waiting| waiting.sequence < entry.sequence)
            }
            _ => lane.queue.len(),
        };
        if let Some(next) = lane.queue.get(at) {
            entry.since = entry.since.min(next.since);
        }
        if at == 0 {
            if let Some(head) = lane.queue.front() {
                node.heads.remove(&head.sequence);
            }
            node.heads.insert(entry.sequence, kind);
        }
        lane.queue.insert(at, entry);
    }

    /// Begins what may begin on a node: puts one task, or several short ones of a kind, into `batch`. Those whose callers
    /// have gone come out in `dead`.
    pub fn start(&mut self, id: NodeId, batch: &mut Vec<Entry<W>>, dead: &mut Vec<Entry<W>>) -> Option<Started> {
        let Some(kind) = self.nodes[id].next(dead) else { return self.fetch(id, batch, dead) };
        let expected_ns = self.expected_ns(id, kind.1);
        self.nodes[id].take(kind, expected_ns, batch);
        self.nodes[id].begin(id, batch)
    }

    /// Whether [`Schedule::start`] would find something that waits on this node.
    pub fn can_start(&self, id: NodeId) -> bool {
        let node = &self.nodes[id];
        for kind in node.heads.values() {
            let lane = &node.lanes[kind];
            if node.books.fits(kind.0) {
                return true;
            }
            if lane.patience() == 0 {
                return false;
            }
        }
        false
    }

    /// An idle node takes the oldest that waits where the wait is longest.
    fn fetch(&mut self, id: NodeId, batch: &mut Vec<Entry<W>>, dead: &mut Vec<Entry<W>>) -> Option<Started> {
        let node = &self.nodes[id];
        if self.nodes.len() == 1 || !node.alive || node.waiting > 0 {
            return None;
        }
        let others = self.nodes.iter().enumerate().filter(|(other, _)| *other != id);
        let busiest = others.filter(|(_, other)| other.waiting > 0).max_by_key(|(_, other)| other.backlog_ns)?.0;
        let way_ns = node.way_ns;
        self.nodes[busiest].drop_cancelled_heads(dead);
        let (node, other) = (&self.nodes[id], &self.nodes[busiest]);
        if other.backlog_ns <= way_ns {
            return None;
        }
        let movable = |kind: &&Kind| {
            let head = other.lanes[*kind].queue.front();
            node.books.fits(kind.0) && head.is_some_and(|head| head.work.portable_bytes().is_some())
        };
        let kind = *other.heads.values().find(movable)?;
        let mut entry = self.nodes[busiest].pop(kind).expect("a head is there");
        self.nodes[busiest].backlog_ns -= entry.charged_ns;
        let expected_ns = self.expected_ns(id, entry.name).unwrap_or(UNKNOWN_NS);
        let node = &mut self.nodes[id];
        entry.charged_ns = (expected_ns as f64 * node.books.share(entry.units)) as u64;
        node.backlog_ns += entry.charged_ns;
        batch.push(entry);
        node.begin(id, batch)
    }

    /// What began has ended: `count` tasks ran, in `ran_ns` together; the way there and back took `way_ns`.
    pub fn end(&mut self, started: Started, count: usize, ran_ns: u64, way_ns: u64) {
        let node = &mut self.nodes[started.node];
        if node.life != started.life {
            return;
        }
        node.books.give_back(&started.grant);
        node.backlog_ns -= started.charged_ns;
        if count > 0 {
            let each = ran_ns / count as u64;
            node.means.record(started.name, each);
            self.means.record(started.name, each);
            node.way_ns = (7 * node.way_ns + way_ns) / 8;
        }
    }

    /// Takes what a role demands, on `node` or on the first where it fits now.
    pub fn reserve(&mut self, node: Option<NodeId>, units: Units) -> Option<Held> {
        let candidates = node.map_or(0..self.nodes.len(), |node| node..node + 1);
        candidates.into_iter().find_map(|id| {
            let node = &mut self.nodes[id];
            let grant = if node.alive { node.books.reserve(units) } else { None }?;
            Some(Held { node: id, life: node.life, grant })
        })
    }

    pub fn end_reservation(&mut self, held: &Held) {
        let node = &mut self.nodes[held.node];
        if node.life == held.life {
            node.books.give_back_reserved(&held.grant);
        }
    }

    /// Takes out what waits on a node and can never begin there.
    pub fn evict(&mut self, id: NodeId) -> Vec<Entry<W>> {
        let node = &mut self.nodes[id];
        let alive = node.alive;
        let hopeless: Vec<Kind> =
            node.lanes.keys().filter(|kind| !(alive && node.books.fits_ever(kind.0))).copied().collect();
        let mut out = Vec::new();
        for kind in hopeless {
            while let Some(entry) = node.pop(kind) {
                node.backlog_ns -= entry.charged_ns;
                out.push(entry);
            }
        }
        out.sort_by_key(|entry| entry.sequence);
        out
    }

    /// A node is gone, with all that it was granted; what waited for it is given back.
    pub fn lose(&mut self, id: NodeId) -> Vec<Entry<W>> {
        self.nodes[id].alive = false;
        let out = self.evict(id);
        let node = &mut self.nodes[id];
        node.life += 1;
        node.backlog_ns = 0;
        node.books.clear();
        out
    }

    /// Takes out everything whose caller has gone.
    pub fn sweep(&mut self) -> Vec<Entry<W>> {
        let mut dead = Vec::new();
        for node in &mut self.nodes {
            let Node { lanes, heads, waiting, backlog_ns, .. } = node;
            heads.clear();
            for (kind, lane) in lanes {
                for entry in std::mem::take(&mut lane.queue) {
                    if entry.work.is_cancelled() {
                        *waiting -= 1;
                        *backlog_ns -= entry.charged_ns;
                        dead.push(entry);
                    } else {
                        lane.queue.push_back(entry);
                    }
                }
                heads.extend(lane.queue.front().map(|head| (head.sequence, *kind)));
            }
        }
        dead
    }

    /// Everything that waits, anywhere.
    pub fn drain(&mut self) -> Vec<Entry<W>> {
        (0..self.nodes.len()).flat_map(|id| self.lose(id)).collect()
    }

    pub fn waiting(&self) -> usize {
        self.nodes.iter().map(|node| node.waiting).sum()
    }

    pub fn is_alive(&self, id: NodeId) -> bool {
        self.nodes[id].alive
    }

    pub fn reports(&self) -> Vec<NodeReport> {
        self.nodes.iter().map(Node::report).collect()
    }

    fn expected_ns(&self, node: NodeId, name: &str) -> Option<u64> {
        self.nodes[node].means.get(name).or_else(|| self.means.get(name))
    }
}

impl<W: Work> Node<W> {
    fn has_room(&self, units: Units) -> bool {
        self.alive && self.waiting == 0 && self.books.fits(units)
    }

    /// Expected until a task would begin there.
    fn wait_ns(&self, units: Units) -> u64 {
        self.way_ns + if self.has_room(units) { 0 } else { self.backlog_ns }
    }

    /// The kind of the oldest that fits, unless an older one has been passed too often.
    fn next(&mut self, dead: &mut Vec<Entry<W>>) -> Option<Kind> {
        self.drop_cancelled_heads(dead);
        for kind in self.heads.values() {
            if self.books.fits(kind.0) {
                return Some(*kind);
            }
            if self.lanes[kind].patience() == 0 {
                return None;
            }
        }
        None
    }

    fn drop_cancelled_heads(&mut self, dead: &mut Vec<Entry<W>>) {
        let cancelled = |node: &Self| {
            let is_cancelled =
                |kind: &&Kind| node.lanes[*kind].queue.front().is_some_and(|head| head.work.is_cancelled());
            node.heads.values().find(is_cancelled).copied()
        };
        while let Some(kind) = cancelled(self) {
            let entry = self.pop(kind).expect("a head is there");
            self.backlog_ns -= entry.charged_ns;
            dead.push(entry);
        }
    }

    /// Takes the oldest of a kind and, when they are short, some that follow it; counts whom they overtake.
    fn take(&mut self, kind: Kind, expected_ns: Option<u64>, batch: &mut Vec<Entry<W>>) {
        let first = self.pop(kind).expect("a head is there");
        let oldest = first.sequence;
        let most = match expected_ns {
            Some(expected_ns) if !first.work.is_alone() && self.heads.len() <= BATCH_LANES => {
                let waiting = 1 + self.lanes.get(&kind).map_or(0, |lane| lane.queue.len());
                let fair = waiting.div_ceil(self.books.abreast(kind.0));
                fair.min(BATCH).min((BATCH_NS / expected_ns.max(1)) as usize).max(1)
            }
            _ => 1,
        };
        let mut bytes = first.work.portable_bytes().unwrap_or(0);
        batch.push(first);
        self.overtake(kind, oldest);
        while batch.len() < most {
            let Some(next) = self.lanes.get(&kind).and_then(|lane| lane.queue.front()) else { break };
            bytes += next.work.portable_bytes().unwrap_or(0);
            let sequence = next.sequence;
            if next.work.is_alone()
                || next.work.is_cancelled()
                || bytes > BATCH_BYTES
                || !self.may_overtake(kind, sequence)
            {
                break;
            }
            batch.extend(self.pop(kind));
            self.overtake(kind, sequence);
        }
    }

    fn may_overtake(&self, kind: Kind, sequence: u64) -> bool {
        self.heads.range(..sequence).all(|(_, older)| *older == kind || self.lanes[older].patience() > 0)
    }

    fn overtake(&mut self, kind: Kind, sequence: u64) {
        for older in self.heads.range(..sequence).map(|(_, older)| older).filter(|older| **older != kind) {
            self.lanes.get_mut(older).expect("a head has a lane").passes += 1;
        }
    }

    /// Takes the oldest of a kind out of the queue; it stays in the backlog.
    fn pop(&mut self, kind: Kind) -> Option<Entry<W>> {
        let lane = self.lanes.get_mut(&kind)?;
        let entry = lane.queue.pop_front()?;
        self.waiting -= 1;
        self.heads.remove(&entry.sequence);
        if let Some(head) = lane.queue.front() {
            self.heads.insert(head.sequence, kind);
        } else if self.lanes.len() > IDLE_LANES {
            self.lanes.remove(&kind);
        }
        Some(entry)
    }

    /// Grants what the tasks of `batch` demand: all the same.
    fn begin(&mut self, id: NodeId, batch: &[Entry<W>]) -> Option<Started> {
        let first = batch.first()?;
        let grant = self.books.grant(first.units).expect("it was found to fit");
        let charged_ns = batch.iter().map(|entry| entry.charged_ns).sum();
        Some(Started { node: id, name: first.name, grant, life: self.life, charged_ns })
    }

    fn report(&self) -> NodeReport {
        NodeReport {
            name: self.name.clone(),
            alive: self.alive,
            total: self.books.total().demand(),
            in_use: self.books.in_use().demand(),
            reserved: self.books.reserved().demand(),
            running: self.books.running(),
            waiting: self.waiting,
            backlog_s: self.backlog_ns as f64 * 1e-9,
        }
    }
}

#[cfg(test)]
mod tests;
