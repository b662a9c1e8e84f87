//! What is in use on one node.

use super::demand::{NodeConfig, UNITS, Units};

/// GPUs of a node, by their number there; almost always none or one.
pub type Devices = Vec<usize>;

/// A node's totals, and what tasks and reservations hold of them.
#[derive(Debug)]
pub(super) struct Books {
    cpus: u64,
    cpus_in_use: u64,
    /// Of each GPU, what is in use.
    gpus_in_use: Vec<u64>,
    slots: usize,
    slots_in_use: usize,
    reserved: Reserved,
}

/// What roles hold, and tasks cannot wait for.
#[derive(Debug)]
struct Reserved {
    cpus: u64,
    gpus: Vec<u64>,
}

/// What was granted, to be given back once.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(super) struct Grant {
    pub units: Units,
    pub gpus: Devices,
}

impl Books {
    pub fn new(config: &NodeConfig, total: Units) -> Books {
        Books {
            cpus: total.cpus,
            cpus_in_use: 0,
            gpus_in_use: vec![0; config.num_gpus],
            slots: config.slots.max(1),
            slots_in_use: 0,
            reserved: Reserved { cpus: 0, gpus: vec![0; config.num_gpus] },
        }
    }

    /// Whether the node has room for a task now.
    pub fn fits(&self, units: Units) -> bool {
        self.slots_in_use < self.slots
            && self.cpus_in_use + units.cpus <= self.cpus
            && fits_gpus(&self.gpus_in_use, units.gpus)
    }

    /// Whether it has once all tasks have ended; roles stay.
    pub fn fits_ever(&self, units: Units) -> bool {
        self.reserved.cpus + units.cpus <= self.cpus && fits_gpus(&self.reserved.gpus, units.gpus)
    }

    /// For a task, if there is room.
    pub fn grant(&mut self, units: Units) -> Option<Grant> {
        if !self.fits(units) {
            return None;
        }
        let gpus = choose(&self.gpus_in_use, units.gpus)?;
        self.slots_in_use += 1;
        self.cpus_in_use += units.cpus;
        add(&mut self.gpus_in_use, &gpus, units.gpus);
        Some(Grant { units, gpus })
    }

    pub fn give_back(&mut self, grant: &Grant) {
        self.slots_in_use -= 1;
        self.cpus_in_use -= grant.units.cpus;
        subtract(&mut self.gpus_in_use, &grant.gpus, grant.units.gpus);
    }

    /// For a role, if there is room; it takes no slot.
    pub fn reserve(&mut self, units: Units) -> Option<Grant> {
        if self.cpus_in_use + units.cpus > self.cpus {
            return None;
        }
        let gpus = choose(&self.gpus_in_use, units.gpus)?;
        self.cpus_in_use += units.cpus;
        self.reserved.cpus += units.cpus;
        add(&mut self.gpus_in_use, &gpus, units.gpus);
        add(&mut self.reserved.gpus, &gpus, units.gpus);
        Some(Grant { units, gpus })
    }

    pub fn give_back_reserved(&mut self, grant: &Grant) {
        self.cpus_in_use -= grant.units.cpus;
        self.reserved.cpus -= grant.units.cpus;
        subtract(&mut self.gpus_in_use, &grant.gpus, grant.units.gpus);
        subtract(&mut self.reserved.gpus, &grant.gpus, grant.units.gpus);
    }

    /// All that was granted and reserved is void.
    pub fn clear(&mut self) {
        self.reserved = Reserved { cpus: 0, gpus: vec![0; self.gpus_in_use.len()] };
        self.gpus_in_use.fill(0);
        (self.cpus_in_use, self.slots_in_use) = (0, 0);
    }

    pub fn total(&self) -> Units {
        Units { cpus: self.cpus, gpus: self.gpus_in_use.len() as u64 * UNITS }
    }

    pub fn in_use(&self) -> Units {
        Units { cpus: self.cpus_in_use, gpus: self.gpus_in_use.iter().sum() }
    }

    pub fn reserved(&self) -> Units {
        Units { cpus: self.reserved.cpus, gpus: self.reserved.gpus.iter().sum() }
    }

    pub fn running(&self) -> usize {
        self.slots_in_use
    }

    /// The part of the whole node that a task takes: how much longer the node is busy for each of its seconds.
    pub fn share(&self, units: Units) -> f64 {
        let share = |part: u64, whole: u64| if part == 0 { 0.0 } else { part as f64 / whole.max(1) as f64 };
        let total = self.total();
        share(units.cpus, total.cpus).max(share(units.gpus, total.gpus)).max(1.0 / self.slots as f64).min(1.0)
    }

    /// Tasks like this that may run at once.
    pub fn abreast(&self, units: Units) -> usize {
        (1.0 / self.share(units)) as usize
    }
}

fn fits_gpus(in_use: &[u64], wanted: u64) -> bool {
    match wanted {
        0 => true,
        part if part < UNITS => in_use.iter().any(|used| used + part <= UNITS),
        whole => in_use.iter().filter(|used| **used == 0).count() as u64 >= whole / UNITS,
    }
}

/// A fraction goes where the least is left that will do, so that whole GPUs stay whole.
fn choose(in_use: &[u64], wanted: u64) -> Option<Devices> {
    let devices: Devices = match wanted {
        0 => return Some(Devices::new()),
        part if part < UNITS => {
            let fitting = in_use.iter().enumerate().filter(|(_, used)| **used + part <= UNITS);
            fitting
                .max_by_key(|(index, used)| (**used, usize::MAX - index))
                .map(|(index, _)| index)
                .into_iter()
                .collect()
        }
        whole => {
            let free = in_use.iter().enumerate().filter(|(_, used)| **used == 0).map(|(index, _)| index);
            free.take((whole / UNITS) as usize).collect()
        }
    };
    (devices.len() as u64 == wanted.div_ceil(UNITS)).then_some(devices)
}

fn add(in_use: &mut [u64], gpus: &[usize], wanted: u64) {
    gpus.iter().for_each(|gpu| in_use[*gpu] += wanted.min(UNITS));
}

fn subtract(in_use: &mut [u64], gpus: &[usize], wanted: u64) {
    gpus.iter().for_each(|gpu| in_use[*gpu] -= wanted.min(UNITS));
}

#[cfg(test)]
mod tests {
    use super::super::demand::Demand;
    use super::*;

    fn books(num_cpus: f64, num_gpus: usize) -> Books {
        Books::new(&NodeConfig::new("node", num_cpus, num_gpus), Demand::cpus(num_cpus).units().unwrap())
    }

    fn units(num_cpus: f64, num_gpus: f64) -> Units {
        Demand { num_cpus, num_gpus }.units().unwrap()
    }

    #[test]
    fn a_fraction_is_of_one_gpu_and_leaves_whole_ones_whole() {
        let mut books = books(4.0, 2);
        let first = books.grant(units(0.0, 0.4)).unwrap();
        let second = books.grant(units(0.0, 0.4)).unwrap();
        assert_eq!((&first.gpus, &second.gpus), (&vec![0], &vec![0]));
        let third = books.grant(units(0.0, 0.3)).unwrap();
        assert_eq!(third.gpus, [1], "0.2 of the first is left");
        assert!(!books.fits(units(0.0, 0.8)), "0.9 is free in all, and nowhere 0.8");
        assert!(books.fits(units(0.0, 0.7)) && !books.fits(units(0.0, 1.0)));
        books.give_back(&third);
        assert_eq!(books.grant(units(0.0, 1.0)).unwrap().gpus, [1]);
    }

    #[test]
    fn what_roles_hold_cannot_be_waited_for() {
        let mut books = books(2.0, 2);
        let role = books.reserve(units(1.0, 1.0)).unwrap();
        let task = books.grant(units(1.0, 1.0)).unwrap();
        assert!(!books.fits(units(0.5, 0.0)) && books.fits_ever(units(1.0, 1.0)));
        assert!(!books.fits_ever(units(1.5, 0.0)) && !books.fits_ever(units(0.0, 2.0)));
        books.give_back(&task);
        books.give_back_reserved(&role);
        assert!(books.fits(units(2.0, 2.0)));
        assert_eq!(books.in_use(), units(0.0, 0.0));
    }

    #[test]
    fn slots_limit_what_demands_nothing() {
        let config = NodeConfig { slots: 2, ..NodeConfig::new("node", 1.0, 0) };
        let mut books = Books::new(&config, units(1.0, 0.0));
        let nothing = units(0.0, 0.0);
        let grants = [books.grant(nothing).unwrap(), books.grant(nothing).unwrap()];
        assert!(books.grant(nothing).is_none());
        books.give_back(&grants[0]);
        assert!(books.fits(nothing));
        assert_eq!((books.share(nothing), books.abreast(nothing)), (0.5, 2));
    }
}
