//! The workers of a run: one device thread of this process, or worker processes that join over the network.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use echelon_core::Error;
use echelon_core::process_group::MeetingPoint;
use echelon_core::progress::{Interrupt, Progress};
use echelon_core::role::{Role, WorkerGroup};
use echelon_models::tokenizer::Tokenizer;
use echelon_placement::control::{
    ControlConfig, ControlError, ControlServer, Limits, LocalOutput, Rendezvous, RunAuthority, rendezvous,
};
use echelon_placement::launch::spawn::available_threads;
use echelon_placement::launch::{LocalWorkers, SpawnConfig};
use echelon_placement::remote::{DEADLINE, RemoteRank, relay};
use echelon_placement::{Worker, start_worker};
use futures_util::future::try_join_all;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::assignment::{Assignment, HostPlan};
use crate::host::DeviceRoles;
use crate::layout::Layout;
use crate::program::Failure;
use crate::seat::{Seat, Watched};
use crate::worker::BUILD;

/// How long workers have to end after the run.
const FAREWELL: Duration = Duration::from_secs(10);
/// After a call has failed: how long the loss of a worker, which may be the cause, has to become known.
const AFTERMATH: Duration = Duration::from_secs(2);

/// Who works for this run.
pub enum Crew {
    /// One device thread.
    Here { worker: Worker<DeviceRoles>, ended: JoinHandle<()> },
    /// A process per device.
    Processes(Processes),
}

/// The control plane's own runtime, which may be dropped anywhere.
struct ControlRuntime(Option<Runtime>);

impl ControlRuntime {
    fn start() -> Result<ControlRuntime, Failure> {
        echelon_placement::control::runtime().map(|runtime| ControlRuntime(Some(runtime))).map_err(Failure::other)
    }

    fn handle(&self) -> &Runtime {
        self.0.as_ref().expect("there until it is dropped")
    }
}

impl Drop for ControlRuntime {
    fn drop(&mut self) {
        self.0.take().map(Runtime::shutdown_background);
    }
}

pub struct Processes {
    ranks: Vec<RemoteRank>,
    server: ControlServer,
    local: Option<LocalWorkers>,
    relaying: JoinHandle<()>,
    runtime: ControlRuntime,
    /// Served as long as the run: ranks tell each other through it how far they are.
    _meeting: MeetingPoint,
}

/// How worker processes come to be.
pub struct Joining {
    /// Where they join; without it they are started here.
    pub listen: Option<SocketAddr>,
    pub patience: Duration,
    /// Told what workers write, and who is missing.
    pub say: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Crew {
    /// The one-device crew: a thread of this process.
    ///
    /// # Errors
    /// The actor cannot be loaded.
    pub async fn here(
        plan: HostPlan,
        layout: Layout,
        tokenizer: Arc<Tokenizer>,
        interrupt: Interrupt,
        progress: Arc<dyn Progress>,
    ) -> echelon_core::Result<Crew> {
        let build = move || {
            let seat = Seat::take(0, layout, None, &Watched::default())?;
            plan.build(seat, tokenizer, interrupt, progress)
        };
        let (worker, ended) = start_worker("device 0", build).await?;
        Ok(Crew::Here { worker, ended })
    }

    /// Worker processes, each with its assignment; `assignment` gives that of worker 0.
    ///
    /// # Errors
    /// [`Failure::Worker`] with who did not come or what it said; [`Failure::Input`] where a model cannot be loaded.
    pub async fn of_processes(
        assignment: Assignment,
        joining: &Joining,
        progress: Arc<dyn Progress>,
    ) -> Result<Crew, Failure> {
        let runtime = ControlRuntime::start()?;
        let host = joining.listen.map_or("127.0.0.1".to_string(), |address| address.ip().to_string());
        let meeting = MeetingPoint::serve(&host, 0)?;
        let count = assignment.layout.num_workers as u32;
        let (server, local, workers) = runtime
            .handle()
            .spawn(gather(count, joining.listen, joining.patience, joining.say.clone()))
            .await
            .map_err(Failure::other)?
            .map_err(|error| Failure::Worker(error.to_string()))?;
        let ranks: Vec<RemoteRank> = workers.into_iter().map(RemoteRank).collect();
        let relaying = tokio::spawn(relay(ranks[0].0.clone(), progress));
        let mut crew = Processes { ranks, server, local, relaying, runtime, _meeting: meeting };
        match crew.assign(assignment).await {
            Ok(()) => Ok(Crew::Processes(crew)),
            Err(error) => {
                let failure = match error.root() {
                    Error::WorkerGone(_) => error.into(),
                    _ => Failure::input(error),
                };
                let failure = crew.explain(failure).await;
                crew.finish("it could not begin").await;
                Err(failure)
            }
        }
    }

    /// A role's handle: the endpoints of its workers in the order of its ranks.
    pub fn group<E: ?Sized>(
        &self,
        layout: &Layout,
        role: Role,
        here: fn(Worker<DeviceRoles>) -> Arc<E>,
        there: fn(RemoteRank) -> Arc<E>,
    ) -> WorkerGroup<E> {
        let group = layout.group(role);
        let endpoint = |&number: &usize| match self {
            Crew::Here { worker, .. } => here(worker.clone()),
            Crew::Processes(crew) => there(crew.ranks[number].clone()),
        };
        WorkerGroup::new(role, group.workers.iter().map(endpoint).collect()).tensor_parallel(group.tensor_parallel)
    }

    /// The failure, or the loss of a worker that caused it: its peers' calls fail too, and often sooner.
    pub async fn explain(&self, failure: Failure) -> Failure {
        match self {
            Crew::Here { .. } => failure,
            Crew::Processes(crew) => crew.explain(failure).await,
        }
    }

    /// Lets the workers go and waits until they have.
    pub async fn finish(self) {
        match self {
            Crew::Here { worker, ended } => {
                worker.stop();
                let _ = ended.await;
            }
            Crew::Processes(crew) => crew.finish("the run is over").await,
        }
    }
}

impl Processes {
    /// All at once: they meet while they build.
    async fn assign(&mut self, assignment: Assignment) -> echelon_core::Result<()> {
        let port = self._meeting.port();
        let builds = self.ranks.iter().enumerate().map(|(worker, rank)| {
            let assignment = Assignment { worker, meeting_port: Some(port), ..assignment.clone() };
            async move { rank.ask::<Assignment, ()>(&assignment, DEADLINE).await }
        });
        try_join_all(builds).await.map(|_| ())
    }

    async fn explain(&self, failure: Failure) -> Failure {
        if matches!(failure, Failure::Interrupted(_) | Failure::Worker(_)) {
            return failure;
        }
        match tokio::time::timeout(AFTERMATH, self.server.first_loss()).await {
            Ok(loss) => Failure::Worker(loss.to_string()),
            Err(_) => failure,
        }
    }

    async fn finish(self, reason: &'static str) {
        let Processes { ranks, server, local, relaying, runtime, _meeting } = self;
        drop(ranks);
        relaying.abort();
        let _ = runtime.handle().spawn(server.finish(reason, FAREWELL)).await;
        if let Some(local) = local {
            let _ = tokio::task::spawn_blocking(move || local.wait(FAREWELL)).await; // those that stay are killed
        }
        drop(runtime);
    }
}

type Gathered = (ControlServer, Option<LocalWorkers>, Vec<echelon_placement::control::RemoteWorker>);

/// Listens, starts the workers where nobody else does, and waits for all.
async fn gather(
    num_workers: u32,
    listen: Option<SocketAddr>,
    patience: Duration,
    say: Arc<dyn Fn(&str) + Send + Sync>,
) -> Result<Gathered, GatherError> {
    let authority = RunAuthority::new()?;
    let output = Arc::new(StartedHere::default());
    let config = ControlConfig {
        listen: listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0))),
        num_workers,
        build: BUILD.into(),
        limits: Limits::default(),
        output: Some(output.clone()),
    };
    let server = ControlServer::start(config, &authority).await?;
    let (local, rules) = match listen {
        Some(_) => {
            let file = credentials_file();
            authority.worker(None)?.write(&file)?;
            say(&format!(
                "waiting for {num_workers} workers: start each with RANK=0..{} worker --join {} --credentials {}",
                num_workers - 1,
                server.address(),
                file.display()
            ));
            (None, Rendezvous::by_scheduler(patience))
        }
        None => {
            let told = say.clone();
            let spawn = SpawnConfig {
                program: std::env::current_exe().map_err(GatherError::Program)?,
                args: vec!["--join".into(), server.address().to_string().into()],
                variables: Vec::new(),
                num_workers,
                threads: available_threads(),
                on_line: Arc::new(move |rank, line| told(&format!("worker {rank}: {line}"))),
            };
            let local = LocalWorkers::start(&spawn, |rank| authority.worker(Some(rank)))?;
            let _ = output.0.set(local.output());
            (Some(local), Rendezvous::STARTED_HERE)
        }
    };
    let workers = rendezvous(&server, rules, |line| say(line)).await?;
    Ok((server, local, workers))
}

/// Where workers that others start find this run's secrets, for this user alone.
fn credentials_file() -> std::path::PathBuf {
    std::env::temp_dir().join(format!("echelon-{}.credentials", std::process::id()))
}

#[derive(Debug, thiserror::Error)]
enum GatherError {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Spawn(#[from] echelon_placement::launch::SpawnError),
    #[error("this program's own file: {0}")]
    Program(std::io::Error),
}

/// What is known of the processes started here; they come after the server that asks.
#[derive(Default)]
struct StartedHere(OnceLock<Arc<dyn LocalOutput>>);

impl LocalOutput for StartedHere {
    fn report(&self, rank: u32, pid: u32) -> Option<(Vec<String>, Option<String>)> {
        self.0.get()?.report(rank, pid)
    }

    fn ended(&self) -> Option<ControlError> {
        self.0.get()?.ended()
    }
}
