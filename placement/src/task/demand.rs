//! What tasks and roles ask for, and what nodes have.

use std::fmt;

/// A fraction of a CPU or a GPU is counted in these: sums of fractions must come out even.
pub(super) const UNITS: u64 = 10_000;
/// Beyond what any node has; keeps sums far from overflow.
const MOST: f64 = 1e6;

/// What a task or a role needs while it runs. Fractions are allowed; of GPUs, above one, only whole ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    pub num_cpus: f64,
    pub num_gpus: f64,
}

impl Demand {
    /// One CPU.
    pub const CPU: Demand = Demand::cpus(1.0);
    /// Nothing: for what waits for others, such as a server.
    pub const NONE: Demand = Demand::cpus(0.0);

    pub const fn cpus(num_cpus: f64) -> Demand {
        Demand { num_cpus, num_gpus: 0.0 }
    }

    pub const fn gpus(num_gpus: f64) -> Demand {
        Demand { num_cpus: 0.0, num_gpus }
    }

    /// In whole units, rounded up to the next: nothing but 0 costs nothing.
    ///
    /// # Errors
    /// In words: a number that is negative or not finite, or a fraction of several GPUs.
    pub(super) fn units(self) -> Result<Units, String> {
        let units = |name: &str, number: f64| {
            let wanted = number.is_finite() && (0.0..=MOST).contains(&number);
            // Rounding up must not make 0.3 (0.299…) a unit more.
            let scaled = (number * UNITS as f64 - 1e-6).ceil();
            if wanted { Ok(scaled as u64) } else { Err(format!("{name} = {number} must be from 0 to {MOST}")) }
        };
        let (cpus, gpus) = (units("num_cpus", self.num_cpus)?, units("num_gpus", self.num_gpus)?);
        if gpus > UNITS && !gpus.is_multiple_of(UNITS) {
            let message = "above one, GPUs are whole: ask for a fraction of one, or for a whole number";
            return Err(format!("num_gpus = {}: {message}", self.num_gpus));
        }
        Ok(Units { cpus, gpus })
    }
}

impl fmt::Display for Demand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cpus and {} gpus", self.num_cpus, self.num_gpus)
    }
}

/// A demand in [`UNITS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Units {
    pub cpus: u64,
    pub gpus: u64,
}

impl Units {
    pub fn demand(self) -> Demand {
        let shown = |units: u64| units as f64 / UNITS as f64;
        Demand { num_cpus: shown(self.cpus), num_gpus: shown(self.gpus) }
    }
}

/// What a node has for tasks and roles.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeConfig {
    /// Its host name, for messages; nodes are told apart by it.
    pub name: String,
    pub num_cpus: f64,
    pub num_gpus: usize,
    /// Tasks that may run at once, whatever little they demand.
    pub slots: usize,
}

impl NodeConfig {
    pub fn new(name: impl Into<String>, num_cpus: f64, num_gpus: usize) -> NodeConfig {
        let slots = 64 + num_cpus.clamp(0.0, MOST).ceil() as usize;
        NodeConfig { name: name.into(), num_cpus, num_gpus, slots }
    }

    /// The host of this process, with the CPUs that it may use and `num_gpus`.
    pub fn of_this_host(num_gpus: usize) -> NodeConfig {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        NodeConfig::new(crate::control::protocol::host_name(), cpus as f64, num_gpus)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_add_up() {
        let tenth = Demand::cpus(0.1).units().unwrap();
        assert_eq!(10 * tenth.cpus, Demand::CPU.units().unwrap().cpus);
        assert_eq!(Demand::cpus(0.3).units().unwrap().cpus, 3000);
        assert_eq!(Demand::cpus(1e-9).units().unwrap().cpus, 1, "not for nothing");
        assert_eq!(Demand::NONE.units().unwrap(), Units { cpus: 0, gpus: 0 });
        assert_eq!(Demand { num_cpus: 0.5, num_gpus: 2.0 }.units().unwrap().demand().num_gpus, 2.0);
    }

    #[test]
    fn demands_that_mean_nothing_are_refused() {
        for (demand, words) in [
            (Demand::cpus(-1.0), "num_cpus = -1 must be from 0"),
            (Demand::cpus(f64::NAN), "num_cpus = NaN"),
            (Demand::gpus(f64::INFINITY), "num_gpus = inf"),
            (Demand::gpus(1.5), "above one, GPUs are whole"),
        ] {
            let error = demand.units().unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
