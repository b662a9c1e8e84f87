//! Who this process is in its job, from the environment that its launcher made. No launcher's library is needed.
//!
//! The order is the important part, most explicit first: torchrun inside srun sets RANK and SLURM_PROCID, and only RANK is
//! right; mpirun inside a batch script inherits the script's SLURM_PROCID; a shell of salloc has a job but no step.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

/// Who started this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    Torchrun,
    /// Somebody who set RANK, WORLD_SIZE and LOCAL_RANK: this project's driver, or a script.
    Variables,
    OpenMpi,
    /// MPICH, Intel MPI, Cray PALS.
    Hydra,
    Mvapich,
    Slurm,
    LeaderWorkerSet,
    Kubeflow,
    IndexedJob,
    /// Nobody: one process on its own.
    Alone,
}

/// What a rank counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Process,
    /// A pod: see [`Place::of_device`].
    Pod,
}

/// This process's place in its job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub launcher: Launcher,
    pub unit: Unit,
    pub rank: u32,
    /// Processes (or pods) of the job.
    pub world_size: u32,
    /// Among those of this host.
    pub local_rank: u32,
    pub local_world_size: Option<u32>,
    pub node_rank: Option<u32>,
    /// Host of rank 0, where the launcher tells.
    pub master: Option<String>,
    /// Of the launcher's own rendezvous: taken, never ours to listen on.
    pub master_port: Option<u16>,
    /// How often the launcher has restarted the job.
    pub attempt: u32,
    /// The same for all processes of the job.
    pub job: Option<String>,
}

/// An environment that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvironmentError {
    #[error("{launcher} started this process, but {variable} is not set; {advice}")]
    Unset { launcher: Launcher, variable: &'static str, advice: &'static str },
    #[error("{set} without {unset}: set RANK, WORLD_SIZE and LOCAL_RANK (the device's number on its host), or none")]
    Incomplete { set: String, unset: String },
    #[error("{variable}={value}: expected {expected}")]
    Value { variable: String, value: String, expected: &'static str },
    #[error("{launcher}: rank {rank} is not below the world size {world_size}; ranks count from 0")]
    Rank { launcher: Launcher, rank: u32, world_size: u32 },
    #[error("local rank {local_rank}, but {visible} devices are visible; start one process per device")]
    Device { local_rank: u32, visible: u32 },
}

/// The place of this process.
///
/// # Errors
/// A launcher's variables contradict each other, or one of them is missing.
pub fn place() -> Result<Place, EnvironmentError> {
    let variables: HashMap<String, String> = std::env::vars_os()
        .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    place_in(&variables)
}

/// The place that the given environment describes.
///
/// # Errors
/// As [`place`].
pub fn place_in(variables: &HashMap<String, String>) -> Result<Place, EnvironmentError> {
    let environment = Environment(variables);
    let readers = [Environment::torchrun, Environment::mpi, Environment::slurm, Environment::kubernetes];
    for read in readers {
        if let Some(place) = read(&environment)? {
            return place.checked();
        }
    }
    environment.check_alone()?;
    Ok(environment.place(Launcher::Alone, 0, 1, 0))
}

impl Place {
    /// Rank of a device, where every process or pod has `devices` of them.
    pub fn of_device(&self, device: u32, devices: u32) -> u32 {
        match self.unit {
            Unit::Process => self.rank,
            Unit::Pod => self.rank * devices + device,
        }
    }

    /// Index of this process's device among the visible ones. A launcher that binds devices shows each process one.
    ///
    /// # Errors
    /// There are fewer devices than processes on this host.
    pub fn device_index(&self, visible: u32) -> Result<u32, EnvironmentError> {
        match visible {
            1 => Ok(0),
            visible if self.local_rank < visible => Ok(self.local_rank),
            visible => Err(EnvironmentError::Device { local_rank: self.local_rank, visible }),
        }
    }

    fn checked(self) -> Result<Place, EnvironmentError> {
        let Place { launcher, rank, world_size, .. } = self;
        if rank < world_size { Ok(self) } else { Err(EnvironmentError::Rank { launcher, rank, world_size }) }
    }
}

/// Variables that tell a process its place: what this process starts must not inherit them.
pub fn names_a_place(variable: &str) -> bool {
    const NAMES: &str = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE \
        MASTER_ADDR MASTER_PORT JOB_COMPLETION_INDEX NNODES SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_STEP_ID \
        SLURM_STEP_NUM_TASKS";
    const PREFIXES: [&str; 9] =
        ["TORCHELASTIC_", "PET_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MV2_COMM_WORLD_", "PALS_", "LWS_", "MPI_LOCAL"];
    NAMES.split(' ').any(|name| name == variable) || PREFIXES.iter().any(|prefix| variable.starts_with(prefix))
}

struct Environment<'a>(&'a HashMap<String, String>);

impl Environment<'_> {
    /// torchrun, or whoever keeps its contract. All three variables are demanded: Kubeflow sets RANK and WORLD_SIZE per
    /// pod, without LOCAL_RANK.
    fn torchrun(&self) -> Result<Option<Place>, EnvironmentError> {
        if !["RANK", "WORLD_SIZE", "LOCAL_RANK"].iter().all(|variable| self.get(variable).is_some()) {
            return Ok(None);
        }
        let elastic = self.get("TORCHELASTIC_RUN_ID").is_some();
        let launcher = if elastic { Launcher::Torchrun } else { Launcher::Variables };
        let place = self.place(
            launcher,
            self.need(launcher, "RANK")?,
            self.need(launcher, "WORLD_SIZE")?,
            self.need(launcher, "LOCAL_RANK")?,
        );
        Ok(Some(Place {
            local_world_size: self.number("LOCAL_WORLD_SIZE")?,
            node_rank: self.number("GROUP_RANK")?,
            master_port: self.number("MASTER_PORT")?,
            attempt: self.number("TORCHELASTIC_RESTART_COUNT")?.unwrap_or(0),
            job: self.get("TORCHELASTIC_RUN_ID"),
            ..place
        }))
    }

    /// Nobody's process has no rank: a part of torchrun's contract is somebody's mistake.
    fn check_alone(&self) -> Result<(), EnvironmentError> {
        let (set, unset): (Vec<&str>, Vec<&str>) =
            ["RANK", "WORLD_SIZE", "LOCAL_RANK"].into_iter().partition(|variable| self.get(variable).is_some());
        match set[..] {
            [] => Ok(()),
            _ => Err(EnvironmentError::Incomplete { set: set.join(" and "), unset: unset.join(" and ") }),
        }
    }

    fn mpi(&self) -> Result<Option<Place>, EnvironmentError> {
        const OPEN: [&str; 4] = ["RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"];
        for (launcher, prefix) in [(Launcher::OpenMpi, "OMPI_COMM_WORLD_"), (Launcher::Mvapich, "MV2_COMM_WORLD_")] {
            let [rank, size, local_rank, local_size] = OPEN.map(|name| self.number(&format!("{prefix}{name}")));
            if let (Some(rank), Some(size)) = (rank?, size?) {
                let place = self.place(launcher, rank, size, local_rank?.unwrap_or(0));
                return Ok(Some(Place { local_world_size: local_size?, job: self.mpi_job(), ..place }));
            }
        }
        // srun with a PMI plug-in sets these too: then Slurm's own are the better ones.
        let under_srun = self.get("SLURM_PROCID").is_some() && self.get("SLURM_STEP_ID").is_some();
        let (rank, size) = (self.number("PMI_RANK")?, self.number("PMI_SIZE")?);
        if let (Some(rank), Some(size), false) = (rank, size, under_srun) {
            let local_rank = self.first(&["MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"])?;
            let advice = "start it with Hydra, Intel MPI or PALS, or set LOCAL_RANK, RANK and WORLD_SIZE yourself";
            let launcher = Launcher::Hydra;
            let variable = "MPI_LOCALRANKID";
            let local_rank = local_rank.ok_or(EnvironmentError::Unset { launcher, variable, advice })?;
            let place = self.place(launcher, rank, size, local_rank);
            let local_world_size = self.first(&["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"])?;
            return Ok(Some(Place { local_world_size, job: self.mpi_job(), ..place }));
        }
        Ok(None)
    }

    /// A task of srun: a step is demanded, for a shell of salloc has only a job.
    fn slurm(&self) -> Result<Option<Place>, EnvironmentError> {
        if self.get("SLURM_PROCID").is_none() || self.get("SLURM_STEP_ID").is_none() {
            return Ok(None);
        }
        let launcher = Launcher::Slurm;
        let world_size = match self.number("SLURM_STEP_NUM_TASKS")? {
            Some(tasks) => tasks,
            None => self.need(launcher, "SLURM_NTASKS")?,
        };
        let (rank, local_rank) = (self.need(launcher, "SLURM_PROCID")?, self.need(launcher, "SLURM_LOCALID")?);
        let place = self.place(launcher, rank, world_size, local_rank);
        let nodes = self.get("SLURM_STEP_NODELIST").or_else(|| self.get("SLURM_JOB_NODELIST"));
        let first = match (&place.master, nodes) {
            (None, Some(nodes)) => Some(first_host(&nodes)?),
            (master, _) => master.clone(),
        };
        Ok(Some(Place {
            master: first,
            node_rank: self.number("SLURM_NODEID")?,
            attempt: self.number("SLURM_RESTART_COUNT")?.unwrap_or(0),
            job: self.get("SLURM_JOB_ID"),
            ..place
        }))
    }

    /// A pod of LeaderWorkerSet, Kubeflow's training operator, or an Indexed Job.
    fn kubernetes(&self) -> Result<Option<Place>, EnvironmentError> {
        let advice = "put the number of pods there (for an Indexed Job: spec.completions)";
        let need = |launcher, variable| {
            self.number::<u32>(variable)?.ok_or(EnvironmentError::Unset { launcher, variable, advice })
        };
        let (launcher, rank, size, master) = if let Some(rank) = self.number("LWS_WORKER_INDEX")? {
            let launcher = Launcher::LeaderWorkerSet;
            (launcher, rank, need(launcher, "LWS_GROUP_SIZE")?, self.get("LWS_LEADER_ADDRESS"))
        } else if let Some(rank) = self.number("PET_NODE_RANK")? {
            let launcher = Launcher::Kubeflow;
            (launcher, rank, need(launcher, "PET_NNODES")?, self.get("PET_MASTER_ADDR"))
        } else if let Some(rank) = self.number("JOB_COMPLETION_INDEX")? {
            (Launcher::IndexedJob, rank, need(Launcher::IndexedJob, "NNODES")?, None)
        } else {
            return Ok(None);
        };
        let place = self.place(launcher, rank, size, 0);
        Ok(Some(Place {
            unit: Unit::Pod,
            node_rank: Some(rank),
            local_world_size: Some(1),
            master: master.or(place.master),
            master_port: self.number("PET_MASTER_PORT")?.or(place.master_port),
            attempt: self.number("JOBSET_RESTART_ATTEMPT")?.unwrap_or(0),
            job: self.get("JOBSET_NAME").or_else(|| self.get("JOB_NAME")),
            ..place
        }))
    }

    fn place(&self, launcher: Launcher, rank: u32, world_size: u32, local_rank: u32) -> Place {
        Place {
            launcher,
            unit: Unit::Process,
            rank,
            world_size,
            local_rank,
            local_world_size: None,
            node_rank: None,
            master: self.get("MASTER_ADDR"),
            master_port: self.number("MASTER_PORT").ok().flatten(),
            attempt: 0,
            job: None,
        }
    }

    fn mpi_job(&self) -> Option<String> {
        ["SLURM_JOB_ID", "PMIX_NAMESPACE", "PBS_JOBID"].iter().find_map(|variable| self.get(variable))
    }

    fn first(&self, variables: &[&str]) -> Result<Option<u32>, EnvironmentError> {
        let set = variables.iter().find(|variable| self.get(variable).is_some());
        set.map_or(Ok(None), |variable| self.number(variable))
    }

    fn need(&self, launcher: Launcher, variable: &'static str) -> Result<u32, EnvironmentError> {
        let advice = "pass its environment on to this process";
        self.number(variable)?.ok_or(EnvironmentError::Unset { launcher, variable, advice })
    }

    fn number<T: FromStr>(&self, variable: &str) -> Result<Option<T>, EnvironmentError> {
        let Some(value) = self.get(variable) else { return Ok(None) };
        let expected = "a number";
        value.parse().map(Some).map_err(|_| EnvironmentError::Value { variable: variable.into(), value, expected })
    }

    /// Empty is unset.
    fn get(&self, variable: &str) -> Option<String> {
        self.0.get(variable).map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
    }
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Launcher::Torchrun => "torchrun",
            Launcher::Variables => "RANK, WORLD_SIZE and LOCAL_RANK",
            Launcher::OpenMpi => "Open MPI",
            Launcher::Hydra => "an MPI of the MPICH family",
            Launcher::Mvapich => "MVAPICH",
            Launcher::Slurm => "Slurm",
            Launcher::LeaderWorkerSet => "LeaderWorkerSet",
            Launcher::Kubeflow => "Kubeflow",
            Launcher::IndexedJob => "a Kubernetes Indexed Job",
            Launcher::Alone => "nobody",
        })
    }
}

/// The first of the hosts of a Slurm node list, which `scontrol show hostnames` prints: `gpu[001-003,7],r[1-2]n[08-09]`.
///
/// # Errors
/// Brackets or ranges that make no sense, or more than 65,536 hosts.
fn first_host(list: &str) -> Result<String, EnvironmentError> {
    let wrong = |expected| EnvironmentError::Value { variable: "node list".into(), value: list.into(), expected };
    let (mut first, mut count) = (None, 0);
    for part in split_outside_brackets(list).ok_or_else(|| wrong("brackets in pairs"))? {
        let (host, hosts) = hosts(part).map_err(wrong)?;
        if host.is_empty() {
            return Err(wrong("no empty host name"));
        }
        count += hosts;
        first.get_or_insert(host);
    }
    if count > HOSTS { Err(wrong("at most 65,536 hosts")) } else { first.ok_or_else(|| wrong("no empty host name")) }
}

/// More hosts than any cluster has.
const HOSTS: usize = 1 << 16;

fn split_outside_brackets(list: &str) -> Option<Vec<&str>> {
    let (mut depth, mut begin, mut parts) = (0i32, 0, Vec::new());
    for (at, char) in list.char_indices() {
        match char {
            '[' => depth += 1,
            ']' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&list[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
        if !(0..=1).contains(&depth) {
            return None;
        }
    }
    parts.push(&list[begin..]);
    (depth == 0).then_some(parts)
}

/// The first of the names that a part of a node list stands for, and how many there are.
fn hosts(part: &str) -> Result<(String, usize), &'static str> {
    let Some((before, rest)) = part.split_once('[') else { return Ok((part.into(), 1)) };
    let (ranges, after) = rest.split_once(']').ok_or("brackets in pairs")?;
    let (mut lowest, mut count) = (None, 0);
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |digits: &str| digits.parse::<usize>().map_err(|_| "numbers in brackets");
        let (number, last) = (number(first)?, number(last)?);
        if last < number || last - number >= HOSTS {
            return Err("ranges that rise, to at most 65,536 hosts");
        }
        count += last - number + 1;
        lowest.get_or_insert(format!("{number:0width$}", width = first.len()));
    }
    let (after, times) = hosts(after)?;
    Ok((before.to_string() + &lowest.unwrap_or_default() + &after, count.saturating_mul(times)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An environment of `NAME=value` words. torchrun's was recorded; the others are what their launchers document.
    fn recorded(lines: &str) -> Result<Place, EnvironmentError> {
        let pairs = lines.split_whitespace().filter_map(|line| line.split_once('='));
        place_in(&pairs.map(|(key, value)| (key.into(), value.into())).collect())
    }

    /// `torchrun --no-python --standalone --nproc-per-node 2 env` of PyTorch 2.11, rank 1.
    const TORCHRUN: &str = "GROUP_RANK=0 GROUP_WORLD_SIZE=1 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=localhost \
        MASTER_PORT=45759 OMP_NUM_THREADS=1 RANK=1 ROLE_RANK=1 ROLE_WORLD_SIZE=2 TORCHELASTIC_MAX_RESTARTS=0 \
        TORCHELASTIC_RESTART_COUNT=0 TORCHELASTIC_RUN_ID=bc76bc01-46d3-4920-8153-10fa36be2d63 \
        TORCHELASTIC_USE_AGENT_STORE=True TORCH_NCCL_ASYNC_ERROR_HANDLING=1 WORLD_SIZE=2";

    /// Task 5 of `srun --ntasks=8 --ntasks-per-node=4`, with the PMI plug-in's variables, as Slurm documents them.
    const SRUN: &str = "SLURM_JOB_ID=77 SLURM_JOB_NODELIST=gpu[09-12] SLURM_STEP_ID=0 SLURM_STEP_NODELIST=gpu[11-12] \
        SLURM_PROCID=5 SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=8 SLURM_LOCALID=1 SLURM_NODEID=1 PMI_RANK=5 PMI_SIZE=8 \
        SLURM_LAUNCH_NODE_IPADDR=10.0.0.1";

    #[test]
    fn torchrun_tells_all() {
        let place = recorded(TORCHRUN).unwrap();
        assert_eq!((place.launcher, place.rank, place.world_size, place.local_rank), (Launcher::Torchrun, 1, 2, 1));
        assert_eq!((place.local_world_size, place.node_rank, place.master_port), (Some(2), Some(0), Some(45759)));
        assert_eq!(place.master.as_deref(), Some("localhost"));
    }

    #[test]
    fn torchrun_inside_srun_is_torchrun() {
        let place = recorded(&format!("{SRUN} {TORCHRUN} TORCHELASTIC_RESTART_COUNT=2")).unwrap();
        assert_eq!((place.launcher, place.rank, place.attempt), (Launcher::Torchrun, 1, 2));
    }

    #[test]
    fn srun_names_the_first_host_of_the_step() {
        let place = recorded(SRUN).unwrap();
        assert_eq!((place.launcher, place.rank, place.world_size, place.local_rank), (Launcher::Slurm, 5, 8, 1));
        assert_eq!(
            (place.master.as_deref(), place.node_rank, place.job.as_deref()),
            (Some("gpu11"), Some(1), Some("77"))
        );
        let shell = "SLURM_JOB_ID=77 SLURM_JOB_NODELIST=gpu[09-12] SLURM_NTASKS=8";
        assert_eq!(recorded(shell).unwrap().launcher, Launcher::Alone, "a shell of salloc is no task");
    }

    #[test]
    fn mpirun_inside_a_batch_script_is_mpirun() {
        let place = recorded(
            "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 \
             SLURM_PROCID=0 SLURM_STEP_ID=4294967291 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_JOB_ID=7",
        );
        let place = place.unwrap();
        assert_eq!((place.launcher, place.rank, place.world_size, place.local_rank), (Launcher::OpenMpi, 3, 4, 1));
        let place = recorded("PMI_RANK=2 PMI_SIZE=4 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2").unwrap();
        assert_eq!((place.launcher, place.rank, place.local_world_size), (Launcher::Hydra, 2, Some(2)));
        let place = recorded("MV2_COMM_WORLD_RANK=1 MV2_COMM_WORLD_SIZE=2 MV2_COMM_WORLD_LOCAL_RANK=1").unwrap();
        assert_eq!((place.launcher, place.local_rank), (Launcher::Mvapich, 1));
    }

    #[test]
    fn pods_are_counted_as_pods() {
        let job = recorded("JOB_COMPLETION_INDEX=2 NNODES=4 MASTER_ADDR=job-0.svc").unwrap();
        assert_eq!((job.launcher, job.unit, job.rank, job.world_size), (Launcher::IndexedJob, Unit::Pod, 2, 4));
        assert_eq!((job.of_device(3, 8), recorded(TORCHRUN).unwrap().of_device(3, 8)), (19, 1));
        let set = recorded("LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2 LWS_LEADER_ADDRESS=leader.svc").unwrap();
        assert_eq!((set.launcher, set.master.as_deref()), (Launcher::LeaderWorkerSet, Some("leader.svc")));
        // RANK and WORLD_SIZE are per pod here, and LOCAL_RANK is not set.
        let operator = recorded(
            "RANK=1 WORLD_SIZE=2 MASTER_ADDR=job-master-0 MASTER_PORT=23456 PET_NODE_RANK=1 PET_NNODES=2 \
             PET_MASTER_ADDR=job-master-0 PET_MASTER_PORT=23456 PET_NPROC_PER_NODE=auto",
        );
        let operator = operator.unwrap();
        assert_eq!((operator.launcher, operator.rank, operator.master_port), (Launcher::Kubeflow, 1, Some(23456)));
    }

    #[test]
    fn alone_just_works() {
        let place = recorded("HOME=/home/me").unwrap();
        assert_eq!((place.launcher, place.rank, place.world_size), (Launcher::Alone, 0, 1));
    }

    #[test]
    fn nonsense_is_named() {
        let error = |lines| recorded(lines).unwrap_err().to_string();
        assert!(error("RANK=8 WORLD_SIZE=8 LOCAL_RANK=0").contains("rank 8 is not below the world size 8"));
        assert_eq!(error("RANK=x WORLD_SIZE=8 LOCAL_RANK=0"), "RANK=x: expected a number");
        assert!(error("RANK=1 WORLD_SIZE=8").starts_with("RANK and WORLD_SIZE without LOCAL_RANK"));
        assert!(error("JOB_COMPLETION_INDEX=0").contains("NNODES is not set; put the number of pods there"));
        assert!(error("SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_NTASKS=1").contains("SLURM_LOCALID"));
        assert!(
            error("SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_STEP_NODELIST=a[")
                .contains("a[")
        );
    }

    #[test]
    fn a_process_finds_its_device() {
        let place = recorded(TORCHRUN).unwrap();
        assert_eq!((place.device_index(1), place.device_index(8)), (Ok(0), Ok(1)));
        assert!(place.device_index(0).is_err());
        let third = Place { local_rank: 3, ..place };
        assert!(third.device_index(2).unwrap_err().to_string().contains("2 devices are visible"));
    }

    #[test]
    fn a_node_list_has_a_first_host() {
        for (list, first) in [
            ("gpu[001-003,7],login1", "gpu001"),
            ("gpu[7,001-003]", "gpu7"),
            ("login1,gpu[1-2]", "login1"),
            ("r[1-2]n[08-09]", "r1n08"),
            ("a[0-9999]b[1-6]", "a0b1"),
        ] {
            assert_eq!(first_host(list).unwrap(), first, "{list}");
        }
        for wrong in ["", "a[", "a]", "a[3-1]", "a[x]", "a[1-99999999]", "a,,b", "a[0-9999]b[0-9999]"] {
            assert!(first_host(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn children_do_not_inherit_a_place() {
        for line in format!("{TORCHRUN} PET_NNODES=2 SLURM_PROCID=1 PMI_RANK=0").split_whitespace() {
            let (variable, _) = line.split_once('=').unwrap();
            let kept = ["OMP_NUM_THREADS", "TORCH_NCCL_ASYNC_ERROR_HANDLING"].contains(&variable);
            assert_eq!(!names_a_place(variable), kept, "{variable}");
        }
    }
}
