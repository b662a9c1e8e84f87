use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;

use super::super::demand::UNITS;
use super::*;

/// A task that can be cancelled.
struct Job {
    number: usize,
    cancelled: Rc<Cell<bool>>,
    portable: bool,
}

impl Work for Job {
    fn is_cancelled(&self) -> bool {
        self.cancelled.get()
    }

    fn portable_bytes(&self) -> Option<usize> {
        self.portable.then_some(100)
    }

    fn is_alone(&self) -> bool {
        false
    }
}

fn job(number: usize) -> Job {
    Job { number, cancelled: Rc::default(), portable: true }
}

fn units(num_cpus: f64, num_gpus: f64) -> Units {
    Demand { num_cpus, num_gpus }.units().unwrap()
}

fn schedule(nodes: &[(&str, f64, usize)]) -> Schedule<Job> {
    let configs = nodes.iter().map(|(name, cpus, gpus)| NodeConfig::new(*name, *cpus, *gpus));
    let configs: Vec<_> = configs.collect();
    let mut schedule = Schedule::new(&configs[0]).unwrap();
    for config in &configs[1..] {
        schedule.add_node(config).unwrap();
    }
    schedule
}

/// Submits on node 0 and begins what can begin there; where it went.
fn submit(
    schedule: &mut Schedule<Job>,
    name: &'static str,
    demand: Units,
    number: usize,
) -> Option<(NodeId, Vec<Started>)> {
    let node = schedule.place(0, demand, true)?;
    schedule.enqueue(node, (name, demand, 0), job(number));
    Some((node, begin(schedule, node).into_iter().map(|(started, _)| started).collect()))
}

fn begin(schedule: &mut Schedule<Job>, node: NodeId) -> Vec<(Started, Vec<usize>)> {
    let (mut all, mut batch) = (Vec::new(), Vec::new());
    while let Some(started) = schedule.start(node, &mut batch, &mut Vec::new()) {
        all.push((started, batch.drain(..).map(|entry| entry.work.number).collect()));
    }
    all
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }
}

#[test]
fn local_first_then_the_shortest_wait() {
    // TK-2
    let mut schedule = schedule(&[("own", 1.0, 0), ("b", 2.0, 0), ("c", 2.0, 1)]);
    let cpu = units(1.0, 0.0);
    let place = |schedule: &mut Schedule<Job>, name, demand| submit(schedule, name, demand, 0).unwrap();
    assert_eq!(place(&mut schedule, "x", units(0.0, 1.0)).0, 2, "only c has a GPU");
    assert_eq!(place(&mut schedule, "x", cpu).0, 0, "own has room");
    let next = [(); 4].map(|()| place(&mut schedule, "x", cpu).0);
    assert_eq!(next, [1, 1, 2, 2], "b is less busy than c; then only c has room");
    // All are full. A task never seen counts 1 ms: so much waits on own, 1 ms on b, 2 ms on c, and the way there counts.
    assert_eq!(place(&mut schedule, "x", cpu).0, 0);
    assert_eq!(place(&mut schedule, "x", cpu).0, 1, "two on own take 2 ms, two on b and the way 1.2 ms");
    assert_eq!(schedule.place(0, units(3.0, 0.0), true), None, "TK-3");
    assert_eq!(schedule.place(0, units(2.0, 0.0), false), None, "a closure does not leave");
    assert_eq!(schedule.place(1, units(2.0, 0.0), false), Some(1));
}

#[test]
fn slow_nodes_and_slow_tasks_are_learned() {
    let mut schedule = schedule(&[("own", 1.0, 0), ("slow", 1.0, 0), ("quick", 1.0, 0)]);
    let cpu = units(1.0, 0.0);
    for (node, seconds) in [(0, 4.0), (1, 10.0), (2, 1.0)] {
        schedule.enqueue(node, ("x", cpu, 0), job(0));
        let (started, _) = begin(&mut schedule, node).remove(0);
        schedule.end(started, 1, (seconds * 1e9) as u64, 200_000);
    }
    // One runs on each: what waits behind it takes 4, 10 and 1 s.
    let mut running = Vec::new();
    for node in 0..3 {
        schedule.enqueue(node, ("x", cpu, 0), job(0));
        running.extend(begin(&mut schedule, node));
    }
    let order: Vec<_> = (0..5).map(|number| submit(&mut schedule, "x", cpu, number).unwrap().0).collect();
    assert_eq!(order, [2, 2, 2, 0, 2], "1, 2, 3, then 4 s on own at a tie with 4 s and the way");
    let reports = schedule.reports();
    assert!((reports[1].backlog_s - 10.0).abs() < 1e-6 && reports[2].waiting == 4, "{reports:?}");
}

#[test]
fn a_large_demand_is_overtaken_only_so_often() {
    // TK-5
    let mut schedule = schedule(&[("own", 2.0, 0)]);
    let (one, two) = (units(1.0, 0.0), units(2.0, 0.0));
    schedule.enqueue(0, ("small", one, 0), job(0));
    let mut running: VecDeque<_> = begin(&mut schedule, 0).into();
    schedule.enqueue(0, ("large", two, 0), job(1));
    let mut begun = Vec::new();
    for number in 2..1000 {
        schedule.enqueue(0, ("small", one, 0), job(number));
        running.extend(begin(&mut schedule, 0));
        if running.len() == 2 || number % 3 == 0 {
            let (started, numbers) = running.pop_front().unwrap();
            begun.extend(numbers);
            schedule.end(started, 1, 10_000_000, 0);
            running.extend(begin(&mut schedule, 0));
        }
    }
    let place = begun.iter().position(|number| *number == 1).expect("the large one ran");
    assert!(place <= OVERTAKES as usize + 1, "after {place} others");
    assert!(place > 10, "it was overtaken while room was left");
}

#[test]
fn short_tasks_share_a_grant_and_long_ones_do_not() {
    let mut schedule = schedule(&[("own", 2.0, 0)]);
    let cpu = units(1.0, 0.0);
    for (name, ns) in [("short", 1_000), ("long", 50_000_000)] {
        schedule.enqueue(0, (name, cpu, 0), job(0));
        let (started, _) = begin(&mut schedule, 0).remove(0);
        schedule.end(started, 1, ns, 0);
    }
    for number in 0..100 {
        schedule.enqueue(0, ("short", cpu, 0), job(number));
    }
    schedule.enqueue(0, ("other", cpu, 0), job(100));
    let sizes: Vec<_> = begin(&mut schedule, 0).into_iter().map(|(started, batch)| (started, batch.len())).collect();
    assert_eq!(sizes.iter().map(|(_, size)| *size).collect::<Vec<_>>(), [50, 25], "half of what waits, for two CPUs");
    for (started, size) in sizes {
        schedule.end(started, size, 1_000 * size as u64, 0);
    }
    let mut all: Vec<_> = (0..100).map(|number| ("long", number)).collect();
    all.truncate(4);
    schedule.drain();
    schedule.add_node(&NodeConfig::new("own", 2.0, 0)).unwrap();
    all.iter().for_each(|(name, number)| schedule.enqueue(0, (name, cpu, 0), job(*number)));
    assert!(begin(&mut schedule, 0).iter().all(|(_, batch)| batch.len() == 1));
}

#[test]
fn an_idle_node_takes_what_waits_elsewhere() {
    let mut schedule = schedule(&[("own", 1.0, 0), ("b", 1.0, 0)]);
    let cpu = units(1.0, 0.0);
    schedule.enqueue(1, ("x", cpu, 0), job(0));
    let (busy, _) = begin(&mut schedule, 1).remove(0);
    schedule.enqueue(1, ("x", cpu, 0), Job { portable: false, ..job(1) });
    assert!(begin(&mut schedule, 0).is_empty(), "a closure stays where it was submitted");
    schedule.enqueue(1, ("y", cpu, 0), job(2));
    let moved = begin(&mut schedule, 0);
    assert_eq!((moved[0].1.as_slice(), moved[0].0.node), (&[2][..], 0));
    for (started, _) in moved {
        schedule.end(started, 1, 1, 0);
    }
    schedule.end(busy, 1, 1, 0);
    assert_eq!(begin(&mut schedule, 1)[0].1, [1]);
    assert!(schedule.reports()[0].in_use == Demand::NONE && schedule.waiting() == 0);
}

/// What the test knows of a task that waits.
struct Waiting {
    node: NodeId,
    sequence: u64,
    demand: Units,
    overtaken: u64,
    cancelled: Rc<Cell<bool>>,
}

/// Everything at random, against a tally that shares nothing with the books.
struct Trial {
    schedule: Schedule<Job>,
    configs: Vec<NodeConfig>,
    alive: Vec<bool>,
    waiting: HashMap<usize, Waiting>,
    /// With the node, in which of its lives, and what its tasks demand.
    running: Vec<(Started, Units, u64)>,
    held: Vec<(Held, Units, u64)>,
    lives: Vec<u64>,
    begun: usize,
    gone: usize,
}

impl Trial {
    fn new(random: &mut Random) -> Trial {
        let count = 1 + random.below(4);
        let configs: Vec<_> = (0..count)
            .map(|index| {
                let slots = 1 + random.below(12);
                let (cpus, gpus) = (1.0 + random.below(16) as f64 / 2.0, random.below(3));
                NodeConfig { slots, ..NodeConfig::new(format!("node{index}"), cpus, gpus) }
            })
            .collect();
        let mut schedule = Schedule::new(&configs[0]).unwrap();
        for config in &configs[1..] {
            schedule.add_node(config).unwrap();
        }
        let (alive, lives) = (vec![true; count], vec![0; count]);
        let (waiting, running, held) = Default::default();
        Trial { schedule, configs, alive, waiting, running, held, lives, begun: 0, gone: 0 }
    }

    /// Of the tasks and roles on each node that lives.
    fn check(&self) {
        for (node, config) in self.configs.iter().enumerate() {
            let here = |on: NodeId, life: u64| on == node && life == self.lives[node];
            let tasks = self.running.iter().filter(|(started, _, life)| here(started.node, *life));
            let roles = self.held.iter().filter(|(held, _, life)| here(held.node, *life));
            let tasks: Vec<_> = tasks.map(|(started, units, _)| (*units, started.gpus().clone())).collect();
            assert!(tasks.len() <= config.slots, "slots");
            let all = tasks.into_iter().chain(roles.map(|(held, units, _)| (*units, held.gpus().clone())));
            let (mut cpus, mut gpus) = (0, vec![0; config.num_gpus]);
            for (units, devices) in all {
                cpus += units.cpus;
                assert_eq!(devices.len() as u64, units.gpus.div_ceil(UNITS));
                devices.iter().for_each(|device| gpus[*device] += units.gpus.min(UNITS));
            }
            assert!(cpus as f64 <= config.num_cpus * UNITS as f64, "{cpus} of {} cpus", config.num_cpus);
            assert!(gpus.iter().all(|used| *used <= UNITS), "{gpus:?}");
            let report = &self.schedule.reports()[node];
            assert_eq!(report.waiting, self.waiting.values().filter(|waiting| waiting.node == node).count());
            assert_eq!((report.in_use.num_cpus * UNITS as f64).round() as u64, cpus);
        }
    }

    fn submit(&mut self, number: usize, random: &mut Random) {
        let gpus = [0.0, 0.0, 0.0, 0.3, 0.5, 1.0, 2.0][random.below(7)];
        let demand = units(random.below(13) as f64 / 4.0, gpus);
        let name = ["a", "b", "c"][random.below(3)];
        let cancelled = Rc::new(Cell::new(false));
        let job = Job { number, cancelled: cancelled.clone(), portable: random.below(4) > 0 };
        match self.schedule.place(0, demand, job.portable) {
            None => self.gone += 1,
            Some(node) => {
                self.check_place(node, demand, job.portable);
                self.schedule.enqueue(node, (name, demand, 0), job);
                let sequence = self.schedule.next - 1;
                self.waiting.insert(number, Waiting { node, sequence, demand, overtaken: 0, cancelled });
            }
        }
    }

    /// TK-2, from reports: no fitting node has a shorter wait.
    fn check_place(&self, chosen: NodeId, demand: Units, portable: bool) {
        let reports = self.schedule.reports();
        let wait = |node: NodeId| {
            let way_ns = if node == 0 { 0 } else { self.schedule.nodes[node].way_ns };
            let idle = reports[node].waiting == 0 && self.schedule.nodes[node].books.fits(demand);
            way_ns + if idle { 0 } else { (reports[node].backlog_s * 1e9).round() as u64 }
        };
        assert!(self.alive[chosen] && (portable || chosen == 0));
        for node in (0..reports.len()).filter(|node| portable && self.alive[*node]) {
            let fits = self.schedule.nodes[node].books.fits_ever(demand);
            assert!(!fits || wait(chosen) <= wait(node), "{chosen} rather than {node}: {reports:?}");
        }
    }

    fn begin(&mut self, node: NodeId) {
        let (mut batch, mut dead) = (Vec::new(), Vec::new());
        let started = self.schedule.start(node, &mut batch, &mut dead);
        for entry in dead {
            let waiting = self.waiting.remove(&entry.work.number).unwrap();
            assert!(waiting.cancelled.get());
            self.gone += 1;
        }
        let Some(started) = started else { return assert!(batch.is_empty()) };
        let demand = batch[0].units;
        for entry in batch {
            let mine = self.waiting.remove(&entry.work.number).unwrap();
            assert!(mine.demand == demand && (mine.node == node || entry.work.portable));
            for other in self.waiting.values_mut().filter(|other| other.node == node && mine.node == node) {
                other.overtaken += u64::from(other.sequence < mine.sequence && !other.cancelled.get());
                assert!(other.overtaken <= OVERTAKES, "TK-5");
            }
            self.begun += 1;
        }
        self.running.push((started, demand, self.lives[node]));
    }

    fn end(&mut self, index: usize, random: &mut Random) {
        let (started, ..) = self.running.swap_remove(index);
        let way_ns = if started.node == 0 { 0 } else { random.below(300_000) as u64 };
        self.schedule.end(started, random.below(3), random.below(20_000_000) as u64, way_ns);
    }

    fn lose(&mut self, node: NodeId) {
        self.alive[node] = false;
        self.lives[node] += 1;
        let out = self.schedule.lose(node);
        self.place_again(out);
    }

    fn place_again(&mut self, entries: Vec<Entry<Job>>) {
        for entry in entries {
            let number = entry.work.number;
            match self.schedule.place(entry.own, entry.units, entry.work.portable) {
                None => {
                    self.waiting.remove(&number).unwrap();
                    self.gone += 1;
                }
                Some(node) => {
                    let waiting = self.waiting.get_mut(&number).unwrap();
                    (waiting.node, waiting.overtaken) = (node, 0);
                    self.schedule.insert(node, entry);
                }
            }
        }
    }

    fn step(&mut self, number: usize, random: &mut Random) {
        let node = random.below(self.configs.len());
        match random.below(20) {
            0..7 => self.submit(number, random),
            7..12 => self.begin(node),
            12..16 if !self.running.is_empty() => self.end(random.below(self.running.len()), random),
            16 => {
                let any = self.waiting.values().find(|waiting| !waiting.cancelled.get());
                any.iter().for_each(|waiting| waiting.cancelled.set(true));
            }
            17 => {
                let wanted = units(random.below(4) as f64 / 2.0, random.below(2) as f64);
                if let Some(held) = self.schedule.reserve(Some(node), wanted) {
                    let out = self.schedule.evict(node);
                    self.place_again(out);
                    self.held.push((held, wanted, self.lives[node]));
                }
            }
            18 if !self.held.is_empty() => {
                let (held, ..) = self.held.swap_remove(random.below(self.held.len()));
                self.schedule.end_reservation(&held);
            }
            19 if node > 0 && random.below(8) == 0 => match self.alive[node] {
                true => self.lose(node),
                false => {
                    self.schedule.add_node(&self.configs[node]).unwrap();
                    self.alive[node] = true;
                }
            },
            _ => {}
        }
    }

    fn sweep(&mut self) {
        for entry in self.schedule.sweep() {
            self.waiting.remove(&entry.work.number).unwrap();
            self.gone += 1;
        }
    }
}

#[test]
fn whatever_happens_no_more_is_in_use_than_there_is_and_nothing_is_forgotten() {
    // TK-1, TK-2, TK-5
    for seed in 0..60 {
        let random = &mut Random(seed);
        let mut trial = Trial::new(random);
        let mut submitted = 0;
        for number in 0..800 {
            let before = trial.waiting.len() + trial.gone + trial.begun;
            trial.step(number, random);
            submitted += trial.waiting.len() + trial.gone + trial.begun - before;
            trial.check();
            if number % 100 == 99 {
                trial.sweep();
                trial.check();
            }
        }
        // Everything ends, and all that can begin does.
        while let Some((held, ..)) = trial.held.pop() {
            trial.schedule.end_reservation(&held);
        }
        for round in 0.. {
            assert!(round < 10_000, "seed {seed}: {} tasks wait for ever", trial.waiting.len());
            for node in 0..trial.configs.len() {
                (0..20).for_each(|_| trial.begin(node));
                trial.check();
            }
            if trial.running.is_empty() && trial.waiting.is_empty() {
                break;
            }
            (0..trial.running.len().min(3)).for_each(|_| trial.end(0, random));
        }
        assert_eq!(trial.gone + trial.begun, submitted, "seed {seed}: each once");
        for report in trial.schedule.reports() {
            assert!(report.in_use == Demand::NONE && report.running == 0 && report.backlog_s == 0.0, "{report:?}");
        }
    }
}
