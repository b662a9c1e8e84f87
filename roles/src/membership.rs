//! A worker's membership in a run: which worker it is, and the process groups that it is a member of.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::zero::{Sharding, ZeroStage};

use echelon_placement::layout::{Layout, RoleGroup};

/// Where the workers of a run meet, and at which address others reach this one.
#[derive(Clone, Debug)]
pub struct Meeting {
    pub host: String,
    pub port: u16,
    pub own_address: String,
}

/// A worker's number and its groups. Clones share them.
#[derive(Clone)]
pub struct Membership {
    pub worker: usize,
    pub layout: Arc<Layout>,
    /// By their workers.
    groups: Arc<BTreeMap<Vec<usize>, ProcessGroup>>,
    watched: Watched,
    /// Where they met; none where it is alone.
    met: Option<Arc<Met>>,
}

struct Met {
    point: MeetingPoint,
    own_address: String,
    /// Who takes part in a publication of weights can do so through memory.
    shares_memory: bool,
}

/// Process groups whose standing a heartbeat tells; filled when the membership is taken.
pub type Watched = Arc<Mutex<Vec<ProcessGroup>>>;

impl Membership {
    /// Joins every group of this worker, while the others join theirs. All go through the groups in one order, so that
    /// nobody waits in a circle.
    ///
    /// # Errors
    /// Not every worker comes.
    pub fn take(
        worker: usize,
        layout: Layout,
        meeting: Option<&Meeting>,
        watched: &Watched,
    ) -> echelon_core::Result<Membership> {
        let (mut groups, mut met) = (BTreeMap::new(), None);
        let mine = layout.companies().into_iter().filter(|workers| workers.contains(&worker));
        if let Some(meeting) = meeting {
            let patience = Patience::default();
            let point = MeetingPoint::join(&meeting.host, meeting.port, patience)?;
            for workers in mine {
                let rank = workers.iter().position(|&member| member == worker).expect("a member");
                let name = format!("workers {}", numbers(&workers));
                let place = (rank, workers.len());
                let group = ProcessGroup::join(&point, &name, place, &meeting.own_address, patience)?;
                watched.lock().expect("never held over a panic").push(group.clone());
                groups.insert(workers, group);
            }
            let shares_memory = match groups.get(&layout.publishers()) {
                Some(publishers) => see_each_other(publishers, &surroundings())?,
                None => false,
            };
            let own_address = meeting.own_address.clone();
            met = Some(Arc::new(Met { point, own_address, shares_memory }));
        }
        let (layout, groups, watched) = (Arc::new(layout), Arc::new(groups), watched.clone());
        Ok(Membership { worker, layout, groups, watched, met })
    }

    /// Joins further groups where the workers met.
    ///
    /// # Panics
    /// This worker is alone.
    pub fn join_at<T>(
        &self,
        join: impl FnOnce(&MeetingPoint, &str, Patience) -> echelon_core::Result<T>,
    ) -> echelon_core::Result<T> {
        let Met { point, own_address, .. } = &**self.met.as_ref().expect("a worker among several");
        join(point, own_address, Patience::default())
    }

    /// Whether actor and generators can share memory, whoever started them.
    pub fn shares_memory(&self) -> bool {
        self.met.as_ref().is_some_and(|met| met.shares_memory)
    }

    /// The group of these workers, one of which this is.
    ///
    /// # Panics
    /// They are no company of the layout.
    pub fn group(&self, workers: &[usize]) -> ProcessGroup {
        if let [only] = workers {
            assert_eq!(*only, self.worker, "a group of one is its member's own");
            let solo = ProcessGroup::solo();
            self.watched.lock().expect("never held over a panic").push(solo.clone());
            return solo;
        }
        self.groups.get(workers).unwrap_or_else(|| panic!("workers {} meet nowhere", numbers(workers))).clone()
    }

    /// How a role's model is divided over its ranks.
    pub fn sharding(&self, role: &RoleGroup) -> Sharding {
        let stage = ZeroStage::from_number(role.zero_stage).expect("a stage that the planner or the recipe allows");
        Sharding { group: self.group(&role.workers), stage, offload: role.adam_offload }
    }

    /// This worker's rank among those of a role.
    pub fn rank_in(&self, role: &RoleGroup) -> Option<usize> {
        role.workers.iter().position(|&worker| worker == self.worker)
    }

    /// Whether this worker is the one of the run.
    pub fn is_alone(&self) -> bool {
        self.layout.num_workers == 1
    }
}

fn numbers(workers: &[usize]) -> String {
    workers.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

/// What processes must have in common to open each other's memory under /proc: kernel, PID namespace and user.
fn surroundings() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    // SAFETY: a system call without arguments.
    let user = unsafe { libc::geteuid() };
    format!("{} {} {user}", boot.trim(), namespace.display())
}

/// Whether all ranks of a group have the same.
fn see_each_other(group: &ProcessGroup, own: &str) -> echelon_core::Result<bool> {
    let all = group.gather_bytes("tell where it runs", own.as_bytes())?;
    Ok(all.iter().all(|other| other == own.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_memory_where_all_see_each_other() {
        let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
        let ask = |rank: usize, own: [String; 2]| {
            let patience = Patience::default();
            let point = MeetingPoint::join("127.0.0.1", point.port(), patience).unwrap();
            let group = ProcessGroup::join(&point, "seats", (rank, 2), "127.0.0.1", patience).unwrap();
            own.map(|own| see_each_other(&group, &own).unwrap())
        };
        let ask_of = &ask;
        std::thread::scope(|scope| {
            let [first, second] =
                [0, 1].map(|rank| scope.spawn(move || ask_of(rank, [surroundings(), format!("host {rank}")])));
            assert_eq!([first.join().unwrap(), second.join().unwrap()], [[true, false]; 2]);
        });
        assert!(surroundings().contains("pid:["), "{}", surroundings());
    }
}
