//! The search: for every partition of the roles and every choice within its groups, the fastest way to give the groups
//! devices.
//!
//! A step takes the sum of what the groups do alone (generation, sync), the longest scoring and the longest training of
//! any group. Groups cost independently of each other, so options are made once per group and choice; a branch and bound
//! then hands out devices. Its bound knows how many devices the groups still to come need at least for any scoring or
//! training time. Nothing is skipped but what cannot be better.

use std::collections::HashMap;
use std::rc::Rc;

use echelon_core::role::Role;

use super::Reject;
use super::estimate::{GroupConfig, Problem};
use super::inventory::{Inventory, Pick};
use crate::tier::RoleSet;

/// Smaller slices that a slice is compared with.
const NEAREST: usize = 16;

/// Roles that share devices.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Group {
    pub roles: RoleSet,
    /// Devices that the recipe names, else the planner's choice.
    pub hand: Option<Vec<usize>>,
}

/// Groups with their choices, before they have devices.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Structure {
    pub groups: Vec<Group>,
    pub configs: Vec<GroupConfig>,
}

impl Structure {
    /// The same groups, the same choice for the main role and the same engines: what is left makes no plan of another
    /// kind.
    pub fn resembles(&self, other: &Structure, main: Option<Role>) -> bool {
        self.groups == other.groups && self.main_choice(main) == other.main_choice(main)
    }

    /// The main role's stage and offload, the tensor-parallel size.
    fn main_choice(&self, main: Option<Role>) -> (u8, bool, usize) {
        let of =
            |role: Role| self.groups.iter().position(|group| group.roles.contains(role)).map(|at| &self.configs[at]);
        let choice = |main: Role| of(main).map(|config| (config.stages[main as usize], config.offloads[main as usize]));
        let (stage, offload) = main.and_then(choice).unwrap_or((0, false));
        (stage, offload, of(Role::Generator).map_or(1, |config| config.tensor_parallel))
    }
}

/// The fastest way to give a structure devices.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub structure: Structure,
    pub seconds: f64,
    /// Per group: what it takes, and for a part of a node which one.
    pub places: Vec<(Pick, Seat)>,
}

/// Which node a part of a node is on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Seat {
    /// A whole node so far, or whole nodes.
    Fresh,
    /// The node that was broken into as the n-th, in the order of the groups.
    Shared(usize),
}

/// The best structure and the best that is of another kind, and how many there were.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub best: Option<Found>,
    pub runner_up: Option<Found>,
    /// Structures looked at, and those whose groups fit somewhere, each by itself.
    pub considered: usize,
    pub fitting: usize,
}

/// One way to place one group: what it takes and how long it then works.
#[derive(Clone, Debug)]
struct Opt {
    pick: usize,
    /// Devices taken from the free ones.
    devices: usize,
    fixed: f64,
    score: f64,
    train: f64,
}

impl Opt {
    /// Seconds of a step that had only this group.
    fn alone(&self) -> f64 {
        self.fixed + self.score + self.train
    }
}

type Options = Rc<Vec<Opt>>;

/// Searches all structures of these partitions.
pub(super) fn search(
    problem: &Problem,
    inventory: &Inventory,
    partitions: &[Vec<Group>],
    sizes: &[usize],
    use_all: bool,
) -> Outcome {
    let main = problem.workload.main_role();
    let mut tables = HashMap::new();
    let mut outcome = Outcome::default();
    let mut candidates = Vec::new();
    for groups in partitions {
        let per_group: Vec<Vec<(GroupConfig, Options)>> = groups
            .iter()
            .map(|group| {
                let configs = GroupConfig::all(problem, group.roles, sizes);
                let with = |config| {
                    let (options, differs) = options(problem, inventory, group, config, use_all, &mut tables);
                    differs.then_some((config, options))
                };
                configs.into_iter().filter_map(with).collect()
            })
            .collect();
        for (configs, options) in product(&per_group) {
            outcome.considered += 1;
            if options.iter().all(|options| !options.is_empty()) {
                outcome.fitting += 1;
                let structure = Structure { groups: groups.clone(), configs };
                candidates.push((lower_bound(&options), structure, options));
            }
        }
    }
    candidates.sort_by(|a, b| a.0.total_cmp(&b.0));
    for (bound, structure, options) in candidates {
        let beats = |found: &Option<Found>| found.as_ref().map_or(f64::INFINITY, |found| found.seconds);
        if bound >= beats(&outcome.runner_up) {
            break;
        }
        let like_best = outcome.best.as_ref().is_some_and(|best| best.structure.resembles(&structure, main));
        let cutoff = beats(if like_best { &outcome.best } else { &outcome.runner_up });
        if let Some((seconds, places)) = Branch::new(inventory, &options, use_all, cutoff).run() {
            outcome.keep(Found { structure, seconds, places }, main);
        }
    }
    outcome
}

impl Outcome {
    /// Takes a structure that is faster than the runner-up, or than the best if it resembles that.
    fn keep(&mut self, found: Found, main: Option<Role>) {
        let faster = self.best.as_ref().is_none_or(|best| found.seconds < best.seconds);
        let like_best = self.best.as_ref().is_some_and(|best| best.structure.resembles(&found.structure, main));
        if faster {
            let before = self.best.replace(found);
            if !like_best {
                self.runner_up = before;
            }
        } else if !like_best {
            self.runner_up = Some(found);
        }
    }
}

/// Every combination of one entry per group.
fn product(per_group: &[Vec<(GroupConfig, Options)>]) -> Vec<(Vec<GroupConfig>, Vec<Options>)> {
    let mut all = vec![(Vec::new(), Vec::new())];
    for choices in per_group {
        let mut longer = Vec::with_capacity(all.len() * choices.len());
        for (configs, options) in &all {
            for (config, group_options) in choices {
                let (mut configs, mut options) = (Vec::clone(configs), Vec::clone(options));
                configs.push(*config);
                options.push(group_options.clone());
                longer.push((configs, options));
            }
        }
        all = longer;
    }
    all
}

/// With whether the choice is one at all: not the same as a plainer one wherever the group is put.
type Tables = HashMap<(Group, GroupConfig), (Options, bool)>;

fn options(
    problem: &Problem,
    inventory: &Inventory,
    group: &Group,
    config: GroupConfig,
    use_all: bool,
    tables: &mut Tables,
) -> (Options, bool) {
    if let Some(known) = tables.get(&(group.clone(), config)) {
        return known.clone();
    }
    let (mut options, mut differs) = (Vec::new(), false);
    let mut add = |pick: usize, devices: usize, slice: &_| {
        let cost = problem.cost(group.roles, slice, &config);
        differs |= cost != Err(Reject::Redundant);
        if let Ok(cost) = cost {
            let option = Opt { pick, devices, fixed: cost.fixed(), score: cost.score, train: cost.train() };
            // With every device in use a smaller slice is not better for leaving some to others. The nearest slices
            // are those that can make this one needless; looking at all would take longer than it saves.
            if use_all || !options.iter().rev().take(NEAREST).any(|kept| dominates(inventory, kept, &option)) {
                options.push(option);
            }
        }
    };
    match &group.hand {
        Some(devices) => add(usize::MAX, 0, &inventory.hand_slice(devices)),
        None => {
            for (index, (_, slice)) in inventory.picks.iter().enumerate() {
                add(index, slice.devices, slice);
            }
        }
    }
    options.sort_by(|a, b| a.alone().total_cmp(&b.alone()));
    let known = (Rc::new(options), differs);
    tables.insert((group.clone(), config), known.clone());
    known
}

/// Whether `a` takes a part of what `b` takes and is nowhere slower.
fn dominates(inventory: &Inventory, a: &Opt, b: &Opt) -> bool {
    if a.fixed > b.fixed || a.score > b.score || a.train > b.train {
        return false;
    }
    use Pick::{Mixed, Part, Spread, Whole};
    match (&inventory.picks[a.pick].0, &inventory.picks[b.pick].0) {
        (Spread { take }, Spread { take: more }) => {
            take.iter().flatten().zip(more.iter().flatten()).all(|(a, b)| a <= b)
        }
        (Part { class: x, take }, Part { class: y, take: more }) => {
            x == y && take.iter().zip(more).all(|(a, b)| a <= b)
        }
        (Part { class: x, .. }, Whole { class: y, .. }) => x == y,
        (Whole { class: x, nodes }, Whole { class: y, nodes: more }) => x == y && nodes <= more,
        (Part { class, .. } | Whole { class, .. }, Mixed { classes }) => classes.contains(class),
        (Mixed { classes: few }, Mixed { classes: many }) => few.iter().all(|class| many.contains(class)),
        _ => false,
    }
}

/// Of a structure whose groups need not share the devices.
fn lower_bound(options: &[Options]) -> f64 {
    let least = |of: fn(&Opt) -> f64| options.iter().map(move |o| o.iter().map(of).fold(f64::INFINITY, f64::min));
    least(|o| o.fixed).sum::<f64>() + least(|o| o.score).fold(0.0, f64::max) + least(|o| o.train).fold(0.0, f64::max)
}

/// The devices that groups need for a time: pairs (time, devices), times rising and devices falling.
type Steps = Vec<(f64, usize)>;

/// Branch and bound over the groups of one structure, the most promising option first.
struct Branch<'a> {
    inventory: &'a Inventory<'a>,
    /// Groups in the order in which they are placed; those with work that nothing hides come first.
    order: Vec<usize>,
    options: Vec<&'a [Opt]>,
    /// Per depth, of the groups from there on: least fixed time, and least devices for a scoring or training time.
    fixed: Vec<f64>,
    score: Vec<Steps>,
    train: Vec<Steps>,
    use_all: bool,
    state: State,
    best: f64,
    best_places: Option<Vec<(usize, Seat)>>,
}

/// What is free, and what the groups so far take.
#[derive(Clone, Debug, Default)]
struct State {
    whole: Vec<usize>,
    /// In a small cluster: what is left of each kind of every node.
    left: Vec<Vec<usize>>,
    /// Nodes broken into: class and what is left of each kind.
    shared: Vec<(usize, Vec<usize>)>,
    free: usize,
    places: Vec<(usize, Seat)>,
}

impl<'a> Branch<'a> {
    fn new(inventory: &'a Inventory, options: &'a [Options], use_all: bool, cutoff: f64) -> Branch<'a> {
        let mut order: Vec<usize> = (0..options.len()).collect();
        let work = |group: usize, of: fn(&Opt) -> f64| options[group].iter().map(of).fold(0.0, f64::max);
        order.sort_by(|&a, &b| {
            let by = |of| work(b, of).total_cmp(&work(a, of));
            by(|o: &Opt| o.fixed).then(by(|o: &Opt| o.train)).then(by(|o: &Opt| o.score))
        });
        let ordered: Vec<&[Opt]> = order.iter().map(|group| options[*group].as_slice()).collect();
        let least = |options: &[Opt]| options.iter().map(|o| o.fixed).fold(f64::INFINITY, f64::min);
        let suffixes = || (0..=ordered.len()).map(|depth| &ordered[depth..]);
        let state = State {
            whole: inventory.classes.iter().map(|class| class.nodes.len()).collect(),
            left: inventory.classes.iter().map(|class| class.kinds.iter().map(|(_, count)| *count).collect()).collect(),
            free: inventory.free_devices(),
            ..State::default()
        };
        Branch {
            fixed: suffixes().map(|rest| rest.iter().map(|options| least(options)).sum()).collect(),
            score: suffixes().map(|rest| steps(rest, |o| o.score)).collect(),
            train: suffixes().map(|rest| steps(rest, |o| o.train)).collect(),
            inventory,
            order,
            options: ordered,
            use_all,
            state,
            best: cutoff,
            best_places: None,
        }
    }

    /// Seconds and, per group in the structure's order, what it takes; None when nothing beats the cutoff.
    fn run(mut self) -> Option<(f64, Vec<(Pick, Seat)>)> {
        self.place(0, [0.0; 3]);
        let places = self.best_places?;
        let pick = |index: usize| self.inventory.picks.get(index).map_or(Pick::Hand, |(pick, _)| pick.clone());
        let mut by_group: Vec<(usize, (Pick, Seat))> =
            self.order.iter().zip(places).map(|(group, (index, seat))| (*group, (pick(index), seat))).collect();
        // Seats count broken nodes in the order of placing: renumber them in the order of the groups.
        by_group = renumbered(by_group);
        Some((self.best, by_group.into_iter().map(|(_, place)| place).collect()))
    }

    /// Places the group at `depth` and those after it; `so_far` is fixed, scoring and training time of those before.
    fn place(&mut self, depth: usize, so_far: [f64; 3]) {
        let Some(&group) = self.options.get(depth) else {
            let seconds: f64 = so_far.iter().sum();
            if seconds < self.best && !(self.use_all && self.state.free > 0) {
                self.best = seconds;
                self.best_places = Some(self.state.places.clone());
            }
            return;
        };
        let [fixed, score, train] = so_far;
        let last = depth + 1 == self.options.len();
        let mut promising: Vec<(f64, &Opt, [f64; 3])> = Vec::new();
        for option in group {
            // Options are sorted by their own time, which no other group can shorten.
            if fixed + self.fixed[depth + 1] + option.alone() >= self.best {
                break;
            }
            if option.devices > self.state.free || (last && self.use_all && option.devices < self.state.free) {
                continue;
            }
            let with = [fixed + option.fixed, score.max(option.score), train.max(option.train)];
            let bound = self.bound(depth + 1, with, self.state.free - option.devices);
            if bound < self.best {
                promising.push((bound, option, with));
            }
        }
        promising.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (bound, option, with) in promising {
            if bound < self.best {
                self.take(option, depth, with);
            }
        }
    }

    /// No completion from `depth` on with `free` devices takes less.
    fn bound(&self, depth: usize, [fixed, score, train]: [f64; 3], free: usize) -> f64 {
        let score = score.max(within(&self.score[depth], free));
        let train = train.max(within(&self.train[depth], free));
        fixed + self.fixed[depth] + score + train
    }

    /// Goes on with every way to take what the option takes.
    fn take(&mut self, option: &Opt, depth: usize, with: [f64; 3]) {
        let Some((pick, _)) = self.inventory.picks.get(option.pick) else {
            return self.seat(option, Seat::Fresh, depth, with);
        };
        match pick {
            Pick::Hand => {}
            Pick::Whole { class, nodes } => {
                if self.state.whole[*class] >= *nodes {
                    self.state.whole[*class] -= nodes;
                    self.seat(option, Seat::Fresh, depth, with);
                    self.state.whole[*class] += nodes;
                }
            }
            Pick::Mixed { classes } => {
                let all = |class: &usize| self.inventory.classes[*class].nodes.len();
                if classes.iter().all(|class| self.state.whole[*class] == all(class)) {
                    classes.iter().for_each(|class| self.state.whole[*class] = 0);
                    self.seat(option, Seat::Fresh, depth, with);
                    classes.iter().for_each(|class| self.state.whole[*class] = all(class));
                }
            }
            Pick::Spread { take } => {
                let mut pairs = self.state.left.iter().flatten().zip(take.iter().flatten());
                if pairs.all(|(left, take)| left >= take) {
                    self.spread(take, |left, take| *left -= take);
                    self.seat(option, Seat::Fresh, depth, with);
                    self.spread(take, |left, take| *left += take);
                }
            }
            Pick::Part { class, take } => self.take_part(option, (*class, take), depth, with),
        }
    }

    fn spread(&mut self, take: &[Vec<usize>], change: fn(&mut usize, usize)) {
        let pairs = self.state.left.iter_mut().flatten().zip(take.iter().flatten());
        pairs.for_each(|(left, take)| change(left, *take));
    }

    fn take_part(&mut self, option: &Opt, (class, take): (usize, &[usize]), depth: usize, with: [f64; 3]) {
        let fits = |left: &[usize]| left.iter().zip(take).all(|(left, take)| left >= take);
        for node in 0..self.state.shared.len() {
            let (of, left) = &self.state.shared[node];
            if *of == class && fits(left) {
                let before = left.clone();
                self.state.shared[node].1.iter_mut().zip(take).for_each(|(left, take)| *left -= take);
                self.seat(option, Seat::Shared(node), depth, with);
                self.state.shared[node].1 = before;
            }
        }
        if self.state.whole[class] > 0 {
            let kinds = &self.inventory.classes[class].kinds;
            let left = kinds.iter().zip(take).map(|((_, count), take)| count - take).collect();
            self.state.whole[class] -= 1;
            self.state.shared.push((class, left));
            self.seat(option, Seat::Shared(self.state.shared.len() - 1), depth, with);
            self.state.shared.pop();
            self.state.whole[class] += 1;
        }
    }

    fn seat(&mut self, option: &Opt, seat: Seat, depth: usize, with: [f64; 3]) {
        self.state.free -= option.devices;
        self.state.places.push((option.pick, seat));
        self.place(depth + 1, with);
        self.state.places.pop();
        self.state.free += option.devices;
    }
}

/// Sorted by group, with broken nodes numbered as the groups come to them.
fn renumbered(mut by_group: Vec<(usize, (Pick, Seat))>) -> Vec<(usize, (Pick, Seat))> {
    by_group.sort_by_key(|(group, _)| *group);
    let mut seen: Vec<usize> = Vec::new();
    for (_, (_, seat)) in &mut by_group {
        if let Seat::Shared(node) = seat {
            let known = seen.iter().position(|other| other == node);
            *node = known.unwrap_or_else(|| {
                seen.push(*node);
                seen.len() - 1
            });
        }
    }
    by_group
}

/// Least devices of all groups for every time that can matter.
fn steps(groups: &[&[Opt]], of: fn(&Opt) -> f64) -> Steps {
    let staircases: Vec<Steps> = groups.iter().map(|options| staircase(options, of)).collect();
    let mut times: Vec<f64> = staircases.iter().flatten().map(|(time, _)| *time).collect();
    times.sort_by(f64::total_cmp);
    times.dedup();
    let mut at = vec![0; staircases.len()];
    let mut steps = Vec::new();
    for time in times {
        let mut devices = 0usize;
        for (at, staircase) in at.iter_mut().zip(&staircases) {
            while staircase.get(*at).is_some_and(|(other, _)| *other <= time) {
                *at += 1;
            }
            let needed = if *at == 0 { usize::MAX } else { staircase[*at - 1].1 };
            devices = devices.saturating_add(needed);
        }
        if devices < usize::MAX {
            steps.push((time, devices));
        }
    }
    steps
}

/// Least devices of one group for a time.
fn staircase(options: &[Opt], of: fn(&Opt) -> f64) -> Steps {
    let mut points: Steps = options.iter().map(|option| (of(option), option.devices)).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut least = usize::MAX;
    points.retain(|(_, devices)| {
        let better = *devices < least;
        least = least.min(*devices);
        better
    });
    points
}

/// The least time for which `free` devices suffice; infinite when none does.
fn within(steps: &Steps, free: usize) -> f64 {
    match steps.get(steps.partition_point(|(_, devices)| *devices > free)) {
        Some((time, _)) => *time,
        None if steps.is_empty() => 0.0,
        None => f64::INFINITY,
    }
}
