//! The workers of a run: one device thread of this process, or worker processes that join over the network and end with
//! it, as it ends with the first of them that is lost (AR-23).

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use echelon_core::Error;
use echelon_core::memory::MemoryReport;
use echelon_core::process_group::MeetingPoint;
use echelon_core::progress::{Interrupt, Progress};
use echelon_core::role::Role;
use echelon_core::shared_message::{SHARED_FROM, SharedMessages};
use echelon_core::store::{Store, StoreConfig, StoreServer, available};
use echelon_core::verb::{Calls, Endpoint, MatmulRate, Memory, Rank, Request, Serve, Verb, WorkerGroup};
use echelon_models::tokenizer::Tokenizer;
use echelon_placement::control::protocol::host_name;
use echelon_placement::control::{
    ControlConfig, ControlError, ControlServer, Credentials, Limits, LocalOutput, RemoteWorker, Rendezvous,
    RunAuthority, rendezvous,
};
use echelon_placement::launch::spawn::available_threads;
use echelon_placement::launch::{LocalWorkers, SpawnConfig};
use echelon_placement::remote::{DEADLINE, RemoteRank, relay};
use echelon_placement::task::{NodeConfig, Reservation};
use echelon_placement::{Worker, start_worker};
use futures_util::future::{join_all, try_join_all};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::assignment::{Assignment, Built, INTERRUPT};
use crate::node;
use crate::program::{BEFORE_THE_FIRST_STEP, BUILD, Failure};
use echelon_placement::layout::Layout;
use echelon_roles::device_roles::DeviceRoles;
use echelon_roles::membership::{Membership, Watched};
use echelon_roles::plan::RankPlan;

/// How long workers have to end after the run; and after a failure, when one may never hear of it.
const FAREWELL: Duration = Duration::from_secs(10);
const ABANDONED: Duration = Duration::from_secs(1);
/// After a call has failed: how long the loss of a worker, which may be the cause, has to become known.
const AFTERMATH: Duration = Duration::from_secs(2);

/// The part of the memory that is there at the start which batches on their way may take.
const STORE_SHARE: u64 = 4;

/// Who works for this run.
pub enum Workers {
    /// One device thread.
    Here { worker: Worker<DeviceRoles>, ended: JoinHandle<()>, _held: Reservation },
    /// A process per device.
    Processes(Box<Processes>),
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
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

pub struct Processes {
    ranks: Vec<RemoteRank>,
    server: ControlServer,
    local: Option<LocalWorkers>,
    relaying: JoinHandle<()>,
    interrupting: JoinHandle<()>,
    listening: JoinHandle<()>,
    runtime: ControlRuntime,
    /// Served as long as the run: ranks tell each other through it how far they are.
    meeting: MeetingPoint,
    /// Where batches lie on their way to and from workers of this host.
    store: Option<StoreServer>,
    /// For workers that others start.
    _secret: Option<Arc<SecretFile>>,
    /// What local workers write on their way out is nothing new.
    muted: Arc<AtomicBool>,
    /// What the roles hold of their nodes.
    held: Vec<Reservation>,
}

/// The credentials of workers that others start, for this user alone; gone with the run, unless somebody else has written
/// there since.
struct SecretFile {
    path: PathBuf,
    written: OnceLock<String>,
}

impl SecretFile {
    fn new(wanted: Option<PathBuf>) -> SecretFile {
        let own = || std::env::temp_dir().join(format!("echelon-{}.credentials", std::process::id()));
        SecretFile { path: wanted.unwrap_or_else(own), written: OnceLock::new() }
    }

    fn write(&self, credentials: &Credentials) -> Result<(), ControlError> {
        credentials.write(&self.path)?;
        let _ = self.written.set(credentials.text());
        Ok(())
    }
}

impl Drop for SecretFile {
    fn drop(&mut self) {
        let found = std::fs::read_to_string(&self.path).ok();
        if found.is_some() && found.as_ref() == self.written.get() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// How a run ends, for its workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Done,
    Interrupted,
    Failed,
}

impl End {
    pub fn of(failure: &Failure) -> End {
        if matches!(failure, Failure::Interrupted(_)) { End::Interrupted } else { End::Failed }
    }
}

/// How worker processes come to be.
#[derive(Clone)]
pub struct Joining {
    /// Where they join; without it they are started here.
    pub listen: Option<SocketAddr>,
    /// Where they find what they authenticate with.
    pub credentials: Option<PathBuf>,
    pub patience: Duration,
    /// Told what workers write, and who is missing.
    pub say: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Workers {
    /// The one-device workers: a thread of this process.
    ///
    /// # Errors
    /// The actor cannot be loaded.
    pub async fn here(
        plan: RankPlan,
        layout: Layout,
        tokenizer: Arc<Tokenizer>,
        interrupt: Interrupt,
        progress: Arc<dyn Progress>,
    ) -> echelon_core::Result<Workers> {
        let held = node::reserve(&layout.roles_of(0), None, plan.on_gpu())?;
        let build = move || {
            let seat = Membership::take(0, layout, None, &Watched::default())?;
            plan.build(seat, tokenizer, interrupt, progress)
        };
        let (worker, ended) = start_worker("device 0", build).await?;
        Ok(Workers::Here { worker, ended, _held: held })
    }

    /// Worker processes, each with its assignment; `assignment` gives that of worker 0.
    ///
    /// # Errors
    /// [`Failure::Worker`] with who did not come or what it said; [`Failure::Input`] where a model cannot be loaded.
    pub async fn of_processes(
        assignment: Assignment,
        joining: &Joining,
        (interrupt, progress): (Interrupt, Arc<dyn Progress>),
    ) -> Result<Workers, Failure> {
        let runtime = ControlRuntime::start()?;
        let host = joining.listen.map_or("127.0.0.1".to_string(), |address| address.ip().to_string());
        let meeting = MeetingPoint::serve(&host, 0)?;
        let secret = joining.listen.map(|_| Arc::new(SecretFile::new(joining.credentials.clone())));
        let muted = Arc::new(AtomicBool::new(false));
        let gathering = gather(assignment.spec.layout.clone(), joining.clone(), (secret.clone(), muted.clone()));
        let mut gathering = runtime.handle().spawn(gathering);
        let (server, local, workers) = tokio::select! {
            gathered = &mut gathering => gathered.map_err(Failure::other)??,
            () = raised(&interrupt) => {
                gathering.abort(); // with the workers that were started
                let _ended = gathering.await;
                return Err(Failure::Interrupted(BEFORE_THE_FIRST_STEP.into()));
            }
        };
        let ranks: Vec<RemoteRank> = workers.into_iter().map(|worker| RemoteRank { worker, shared: None }).collect();
        let relaying = tokio::spawn(relay(ranks[0].worker.clone(), progress));
        let workers = ranks.iter().map(|rank| rank.worker.clone()).collect();
        let interrupting = tokio::spawn(pass_on(interrupt, workers));
        let workers = ranks.iter().map(|rank| rank.worker.clone()).collect();
        let listening = tokio::spawn(tell_of_silence(workers, joining.say.clone()));
        let store = StoreServer::start(StoreConfig::new(available().0 / STORE_SHARE));
        let store = store.inspect_err(|error| (joining.say)(&format!("batches go over the network: {error}"))).ok();
        let mut workers = Processes {
            ranks,
            server,
            local,
            relaying,
            interrupting,
            listening,
            runtime,
            meeting,
            store,
            _secret: secret,
            muted,
            held: Vec::new(),
        };
        match workers.assign(assignment).await {
            Ok(()) => Ok(Workers::Processes(Box::new(workers))),
            Err(error) => {
                let failure = match error.root() {
                    Error::WorkerGone(_) => error.into(),
                    _ => Failure::input(error),
                };
                Err(Workers::Processes(Box::new(workers)).give_up(failure).await)
            }
        }
    }

    /// A role's handle: the endpoints of its workers in the order of its ranks.
    pub fn group(&self, layout: &Layout, role: Role, calls: &Calls) -> WorkerGroup {
        let group = layout.group(role);
        let endpoint = |&number: &usize| -> Arc<dyn Rank> {
            match self {
                Workers::Here { worker, .. } => Arc::new(worker.clone()),
                Workers::Processes(workers) => Arc::new(workers.ranks[number].clone()),
            }
        };
        let ranks = group.workers.iter().map(endpoint).collect();
        WorkerGroup::new(role, ranks, calls.clone()).tensor_parallel(group.tensor_parallel)
    }

    /// Asks every worker, whatever its roles.
    async fn ask_all<V: Verb>(&self, verb: V) -> echelon_core::Result<Vec<V::Reply>>
    where
        DeviceRoles: Serve<V>,
    {
        let request = || Request::of_worker(verb.clone());
        match self {
            Workers::Here { worker, .. } => Ok(vec![worker.call(request()).await?]),
            Workers::Processes(workers) => try_join_all(workers.ranks.iter().map(|rank| rank.call(request()))).await,
        }
    }

    /// What every worker was metered at since it was last asked.
    ///
    /// # Errors
    /// A worker that is gone.
    pub async fn memory(&self) -> echelon_core::Result<Vec<MemoryReport>> {
        self.ask_all(Memory).await
    }

    /// Floating-point operations per second that the devices reach together in large matrix products.
    ///
    /// # Errors
    /// A worker that is gone.
    pub async fn matmul_rate(&self) -> echelon_core::Result<f64> {
        Ok(self.ask_all(MatmulRate).await?.into_iter().sum())
    }

    /// The failure, or the loss of a worker that caused it: its peers' calls fail too, and often sooner.
    pub async fn explain(&self, failure: Failure) -> Failure {
        match self {
            Workers::Here { .. } => failure,
            Workers::Processes(workers) => workers.explain(failure).await,
        }
    }

    /// Ends a run that did not begin; the failure, or what caused it.
    pub async fn give_up(self, failure: Failure) -> Failure {
        let failure = self.explain(failure).await;
        self.finish(End::of(&failure)).await;
        failure
    }

    /// Lets the workers go and waits until they have.
    pub async fn finish(self, end: End) {
        match self {
            Workers::Here { worker, ended, .. } => {
                worker.stop();
                let _ = ended.await;
            }
            Workers::Processes(workers) => workers.finish(end).await,
        }
    }
}

impl Processes {
    /// All at once: they meet while they build.
    async fn assign(&mut self, assignment: Assignment) -> echelon_core::Result<()> {
        let (meeting_port, address) =
            (Some(self.meeting.port()), self.store.as_ref().map(|store| store.address().clone()));
        let builds = self.ranks.iter().enumerate().map(|(worker, rank)| {
            let host = &rank.worker.hello().host;
            let on_its_host = self.ranks.iter().filter(|other| other.worker.hello().host == *host).count() as u32;
            let places = Assignment { worker, on_its_host, meeting_port, ..assignment.clone() };
            let assignment = Assignment { store: address.clone(), ..places };
            async move { rank.ask::<Assignment, Built>(&assignment, DEADLINE).await }
        });
        let built = try_join_all(builds).await?;
        self.enter_nodes(&assignment.spec.layout, &built)?;
        let Some(address) = address else { return Ok(()) };
        let store = Store::connect(&address, "driver").map_err(|error| Error::other("the driver", error))?;
        for ((rank, built), number) in self.ranks.iter_mut().zip(built).zip(0..) {
            rank.shared =
                built.shares_memory.then(|| Arc::new(SharedMessages::new(store.clone(), number, SHARED_FROM)));
        }
        Ok(())
    }

    /// Enters the workers' nodes into the books of tasks: what they have, and what their roles hold of it.
    fn enter_nodes(&mut self, layout: &Layout, built: &[Built]) -> echelon_core::Result<()> {
        let (tasks, own) = (node::tasks()?, host_name());
        let _within = self.runtime.handle().enter();
        for ((number, rank), built) in self.ranks.iter().enumerate().zip(built) {
            let host = &rank.worker.hello().host;
            if *host != own {
                let config = NodeConfig::new(host.clone(), built.num_cpus as f64, built.num_gpus);
                tasks.add_worker(&config, rank.worker.clone())?;
            }
            self.held.push(node::reserve(&layout.roles_of(number), Some(host), built.holds_gpu)?);
        }
        Ok(())
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

    async fn finish(self, end: End) {
        let patience = if end == End::Done { FAREWELL } else { ABANDONED };
        let Processes { ranks, server, local, runtime, .. } = self;
        self.muted.store(end != End::Done, Ordering::Relaxed);
        drop(ranks);
        self.relaying.abort();
        self.interrupting.abort();
        self.listening.abort();
        let farewell = async move {
            match end {
                End::Failed => server.fail("the run failed, and the driver's last lines say why", patience).await,
                End::Interrupted => server.fail("the run was interrupted at the driver", patience).await,
                End::Done => server.finish("the run is over", patience).await,
            }
        };
        let _ = runtime.handle().spawn(farewell).await;
        if let Some(local) = local {
            let _ = tokio::task::spawn_blocking(move || local.wait(patience)).await; // those that stay are killed
        }
    }
}

/// Until an interrupt may stop something.
async fn raised(interrupt: &Interrupt) {
    const LOOK: Duration = Duration::from_millis(50);
    while interrupt.check().is_ok() {
        tokio::time::sleep(LOOK).await;
    }
}

/// Tells the workers of an interrupt, once it may stop something.
async fn pass_on(interrupt: Interrupt, workers: Vec<RemoteWorker>) {
    raised(&interrupt).await;
    let told = workers.iter().map(|worker| worker.call(INTERRUPT, Bytes::new(), FAREWELL));
    for lost in join_all(told).await.into_iter().filter_map(Result::err) {
        tracing::debug!("{lost}"); // the call that it stops says so too
    }
}

/// Says what the workers are at when none that was asked for something makes progress: nobody waits before a silent terminal.
async fn tell_of_silence(workers: Vec<RemoteWorker>, say: Arc<dyn Fn(&str) + Send + Sync>) {
    let mut told = Duration::ZERO;
    let mut idle_at = vec![Instant::now(); workers.len()];
    loop {
        tokio::time::sleep(LOOK_FOR_SILENCE).await;
        for (_, idle_at) in workers.iter().zip(&mut idle_at).filter(|(worker, _)| !worker.is_busy()) {
            *idle_at = Instant::now();
        }
        let busy: Vec<(&RemoteWorker, &Instant)> =
            workers.iter().zip(&idle_at).filter(|(worker, _)| worker.is_busy()).collect();
        let silence = |(worker, idle_at): &(&RemoteWorker, &Instant)| worker.heartbeat().since.max(**idle_at).elapsed();
        let silent_for = busy.iter().map(silence).min().unwrap_or_default();
        if silent_for < told {
            told = Duration::ZERO; // there was progress
        }
        if silent_for >= SILENCE.max(2 * told) {
            told = silent_for;
            let standings: Vec<_> =
                busy.iter().map(|(worker, _)| format!("rank {} at {}", worker.rank(), worker.heartbeat())).collect();
            say(&format!("no progress for {} s: {}", silent_for.as_secs(), standings.join("; ")));
        }
    }
}

/// How long no worker makes progress before the terminal says so; again after twice as long.
const SILENCE: Duration = Duration::from_secs(30);
const LOOK_FOR_SILENCE: Duration = Duration::from_secs(1);

type Gathered = (ControlServer, Option<LocalWorkers>, Vec<RemoteWorker>);

/// Listens, starts the workers where nobody else does, and waits for all.
async fn gather(
    layout: Layout,
    joining: Joining,
    (secret, muted): (Option<Arc<SecretFile>>, Arc<AtomicBool>),
) -> Result<Gathered, GatherError> {
    let num_workers = layout.num_workers as u32;
    let Joining { listen, patience, say, .. } = joining;
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
    let (local, rules) = match secret {
        Some(file) => {
            file.write(&authority.worker(None)?)?;
            say(&how_to_join(&layout, server.address(), &file.path));
            (None, Rendezvous::by_scheduler(patience))
        }
        None => {
            let told = say.clone();
            let spawn = SpawnConfig {
                program: std::env::current_exe().map_err(GatherError::Program)?,
                args: vec!["--join".into(), server.address().to_string().into()],
                variables: Vec::new(),
                num_workers,
                devices: layout.devices,
                threads: available_threads(),
                on_line: Arc::new(move |rank, line| {
                    if !muted.load(Ordering::Relaxed) {
                        told(&format!("worker {rank}: {line}"));
                    }
                }),
            };
            let local = LocalWorkers::start(&spawn, |rank| authority.worker(Some(rank)))?;
            let _ = output.0.set(local.output());
            (Some(local), Rendezvous::STARTED_HERE)
        }
    };
    match rendezvous(&server, rules, |line| say(line)).await {
        Ok(workers) => Ok((server, local, workers)),
        Err(error) => {
            server.fail(&error.to_string(), ABANDONED).await; // those who came hear what the run waited for
            Err(error.into())
        }
    }
}

/// What a person, or a script, does now.
fn how_to_join(layout: &Layout, address: SocketAddr, secret: &Path) -> String {
    let (port, num_workers) = (address.port(), layout.num_workers);
    let host = if address.ip().is_unspecified() { host_name() } else { address.ip().to_string() };
    let devices = layout.chosen_devices().map(|devices| {
        format!(", which are devices {devices}, counted through all hosts: LOCAL_RANK is a device's number on its own")
    });
    format!(
        "waiting for {num_workers} workers{}, for each rank R from 0: RANK=R WORLD_SIZE={num_workers} LOCAL_RANK=(its \
         number on its host) worker --join {host}:{port} --credentials {}; other hosts need a copy of that file",
        devices.unwrap_or_default(),
        secret.display()
    )
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

impl From<GatherError> for Failure {
    fn from(error: GatherError) -> Failure {
        match error {
            GatherError::Control(ControlError::Listen { .. }) => Failure::Input(format!("placement.listen: {error}")),
            GatherError::Control(ControlError::Credentials { .. }) => {
                Failure::Input(format!("placement.credentials: {error}"))
            }
            GatherError::Control(_) => Failure::Worker(error.to_string()),
            GatherError::Spawn(_) | GatherError::Program(_) => Failure::Other(error.to_string()),
        }
    }
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
