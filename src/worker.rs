//! `worker --join HOST:PORT`: one device's roles, asked over the control plane until the run is over.

use std::net::{ToSocketAddrs, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use echelon_core::for_each_verb;
use echelon_core::message::{Message, decode, encode, error_to_text};
use echelon_core::process_group::Standing;
use echelon_core::progress::{Interrupt, Interrupts};
use echelon_core::shared_message::{SHARED_FROM, SharedMessages};
use echelon_core::store::{Store, StoreAddress};
use echelon_core::verb::{self, Verb};
use echelon_models::tokenizer::Tokenizer;
use echelon_placement::control::{Beside, Call, ControlError, Credentials, Hello, Limits, Session, join};
use echelon_placement::launch::spawn::{available_threads, threads_per_worker};
use echelon_placement::launch::{Place, place};
use echelon_placement::remote::{InHeartbeats, serve};
use echelon_placement::task::TaskServer;
use echelon_placement::{Worker, start_worker};

use crate::assignment::{Assignment, Built, INTERRUPT};
use crate::node;
use crate::program::{self, BUILD, Failure};
use crate::rank_plan::rank_plan;
use echelon_roles::device_roles::DeviceRoles;
use echelon_roles::membership::{Meeting, Membership, Watched};

const USAGE: &str = "usage: worker --join HOST:PORT [--credentials FILE] [--join-timeout-s S]\n\
     its rank comes from the launcher's environment (RANK, or what torchrun, Slurm, MPI and Kubernetes set); the \
     driver writes the credentials' file (placement.credentials), which is waited for; without the option they come \
     over stdin";

/// How often a heartbeat's operation is looked up.
const LOOK: Duration = Duration::from_millis(250);

/// How to join.
#[derive(Debug, PartialEq)]
struct Joining {
    driver: String,
    credentials: Option<PathBuf>,
    patience: Duration,
}

/// Whether these arguments, without the program's name, are a worker's.
fn is_asked(arguments: &[String]) -> bool {
    arguments.iter().any(|argument| argument == "--join" || argument.starts_with("--join="))
}

/// A program that drives, and that its own driver starts as its workers.
pub fn or_driver(drive: impl FnOnce() -> Result<(), Failure>) -> ! {
    let arguments = arguments();
    program::main(|| if is_asked(&arguments) { main(&arguments) } else { drive() })
}

/// The program, from its arguments to the end of the run.
///
/// # Errors
/// [`Failure::Input`]: arguments, environment or credentials; [`Failure::Worker`]: the driver refused this worker or is
/// gone.
pub fn main(arguments: &[String]) -> Result<(), Failure> {
    if arguments.iter().any(|argument| argument == "--help" || argument == "-h") {
        println!("{USAGE}");
        return Ok(());
    }
    let joining = Joining::read(arguments)?;
    let place = place().map_err(Failure::input)?;
    let credentials = match &joining.credentials {
        Some(file) => wait_for(file, joining.patience, None)?,
        None => Credentials::receive(std::io::stdin())
            .map_err(|error| Failure::Input(format!("credentials over stdin: {error}\n{USAGE}")))?,
    };
    let runtime = echelon_placement::control::runtime().map_err(Failure::other)?;
    let outcome = runtime.block_on(async { tokio::spawn(work(joining, place, credentials)).await });
    runtime.shutdown_background();
    outcome.map_err(Failure::other)?
}

/// The driver's credentials, once they are there: a scheduler may start this worker before the driver has written them, and
/// beside those of a driver that was killed.
fn wait_for(file: &Path, patience: Duration, stale: Option<&Credentials>) -> Result<Credentials, Failure> {
    let begun = Instant::now();
    let is_stale =
        || stale.is_some_and(|stale| Credentials::read(file).is_ok_and(|found| found.text() == stale.text()));
    let missing = || !file.exists() || is_stale();
    if missing() {
        let anew = if stale.is_some() { " anew: those there are another run's" } else { "" };
        eprintln!("waiting for {}, which the driver writes{anew}", file.display());
    }
    while missing() && begun.elapsed() < patience {
        std::thread::sleep(LOOK);
    }
    let (name, waited) = (file.display(), patience.as_secs_f64());
    if is_stale() {
        return Err(Failure::Input(format!(
            "{name}: is of another run than the driver's, and was not written anew within {waited} s: was its driver \
             killed? remove it"
        )));
    }
    if !file.exists() {
        let message = "does the driver run, and see this folder?";
        return Err(Failure::Input(format!("{name}: is not there after {waited} s: {message}")));
    }
    if file.is_dir() {
        let message = "is a folder: give the file that the driver wrote (placement.credentials)";
        return Err(Failure::Input(format!("{name}: {message}")));
    }
    Credentials::read(file).map_err(Failure::input)
}

impl Joining {
    fn read(arguments: &[String]) -> Result<Joining, Failure> {
        let wrong = |message: String| Failure::Input(format!("{message}\n{USAGE}"));
        let (mut driver, mut credentials, mut patience) = (None, None, Duration::from_secs(600));
        let mut given = arguments.iter();
        while let Some(argument) = given.next() {
            let (name, attached) = argument.split_once('=').map_or((argument.as_str(), None), |(n, v)| (n, Some(v)));
            let value = attached.map(str::to_owned).or_else(|| given.next().cloned());
            let value = value.ok_or_else(|| wrong(format!("{name} needs a value")))?;
            match name {
                "--join" => driver = Some(value),
                "--credentials" => credentials = Some(value.into()),
                "--join-timeout-s" => {
                    let seconds: f64 = value.parse().ok().filter(|s| *s > 0.0 && *s <= 604_800.0).ok_or_else(|| {
                        wrong(format!("--join-timeout-s is `{value}`, expected seconds above 0, a week at most"))
                    })?;
                    patience = Duration::from_secs_f64(seconds);
                }
                _ => return Err(wrong(format!("unknown option `{argument}`"))),
            }
        }
        let driver = driver.ok_or_else(|| wrong("--join HOST:PORT is missing".into()))?;
        if driver.rsplit_once(':').is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err()) {
            return Err(wrong(format!("--join is `{driver}`, expected HOST:PORT such as 10.0.0.1:7401")));
        }
        Ok(Joining { driver, credentials, patience })
    }
}

async fn work(joining: Joining, place: Place, credentials: Credentials) -> Result<(), Failure> {
    let hello = Hello {
        build: BUILD.into(),
        ..Hello::of_this_process(place.rank, place.world_size, place.attempt, "not chosen yet")
    };
    let tasks = TaskServer::start(node::functions()).map_err(Failure::other)?;
    let interrupts = Arc::new(Interrupts::default());
    let beside = Arc::new(BesideDevice { tasks, interrupts: interrupts.clone() });
    let mut session = enter(&joining, credentials, hello, beside).await?;
    let watched = Watched::default();
    let watching = tokio::spawn(watch(watched.clone(), session.progress()));
    let mut worker: Option<(Worker<DeviceRoles>, Option<Arc<SharedMessages>>)> = None;
    let ended = loop {
        match session.next().await {
            Ok(Some(call)) if call.verb == Assignment::KIND => {
                let built = build(&call.body, (&joining, &place, &session, &watched)).await;
                let answer = built.map(|(roles, shared, built)| {
                    worker = Some((roles, shared));
                    built
                });
                let failed = answer.is_err();
                call.reply.send(answer.map(|built| Bytes::from(encode(&built))).map_err(|error| error_to_text(&error)));
                if failed {
                    continue; // the driver lets this worker go
                }
            }
            Ok(Some(call)) => match &worker {
                Some((worker, shared)) => answer(worker, call, shared.as_ref(), interrupts.of_new_call()),
                None => call.reply.send(Err(format!("`{}` before `{}`", call.verb, Assignment::KIND))),
            },
            Ok(None) => break Ok(()),
            Err(error) => break Err(refused(error)),
        }
    };
    watching.abort();
    // Without a driver nothing is worth finishing: the process ends with whatever its device is at.
    ended
}

/// Joins the driver's run. Credentials of another run in a file may be what a killed driver left: new ones are waited for.
async fn enter(
    joining: &Joining,
    mut credentials: Credentials,
    hello: Hello,
    beside: Arc<BesideDevice>,
) -> Result<Session, Failure> {
    let begun = Instant::now();
    loop {
        let left = joining.patience.saturating_sub(begun.elapsed());
        let (limits, beside) = (Limits::default(), beside.clone() as Arc<dyn Beside>);
        let session = join(&joining.driver, &credentials, hello.clone(), limits, left, Some(beside)).await;
        match (session, &joining.credentials) {
            (Err(ControlError::OtherRun { .. }), Some(file)) => {
                credentials = tokio::task::block_in_place(|| wait_for(file, left, Some(&credentials)))?;
            }
            (session, _) => return session.map_err(refused),
        }
    }
}

/// What a worker answers while its device is at work.
struct BesideDevice {
    tasks: TaskServer,
    interrupts: Arc<Interrupts>,
}

impl Beside for BesideDevice {
    fn offer(&self, call: Call) -> Option<Call> {
        if call.verb != INTERRUPT {
            return self.tasks.offer(call);
        }
        self.interrupts.raise_all();
        call.reply.send(Ok(Bytes::new()));
        None
    }
}

fn refused(error: ControlError) -> Failure {
    Failure::Worker(error.to_string())
}

async fn build(
    body: &[u8],
    (joining, place, session, watched): (&Joining, &Place, &Session, &Watched),
) -> echelon_core::Result<(Worker<DeviceRoles>, Option<Arc<SharedMessages>>, Built)> {
    let assignment: Assignment = decode(body)?;
    let refused = |error: Failure| echelon_core::Error::Refused(error.to_string());
    let tokenizer = Tokenizer::load(&assignment.spec.tokenizer_folder());
    let (plan, warning) = rank_plan(&assignment.spec, Some(place)).map_err(refused)?;
    warning.iter().for_each(|warning| eprintln!("warning: {warning}"));
    let tokenizer = Arc::new(tokenizer.map_err(|error| echelon_core::Error::other("tokenizer", error))?);
    let meeting = assignment.meeting_port.map(|port| meeting(&joining.driver, port)).transpose()?;
    let (number, layout) = (assignment.worker, assignment.spec.layout);
    let sharing = place.local_world_size.unwrap_or(assignment.on_its_host);
    let store = assignment.store.and_then(|address| reach(&address, number));
    let plan = plan.sharing(store.clone());
    let shared = store.map(|store| SharedMessages::new(store, number as u32, SHARED_FROM));
    let holds_gpu = plan.on_gpu();
    let (watched, progress) = (watched.clone(), Arc::new(InHeartbeats(session.progress())));
    let build = move || {
        // Workers of one host share its CPUs, unless somebody has said otherwise.
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            tch::set_num_threads(threads_per_worker(available_threads(), sharing) as i32);
        }
        let seat = Membership::take(number, layout, meeting.as_ref(), &watched)?;
        plan.build(seat, tokenizer, Interrupt::default(), progress)
    };
    let built =
        Built { shares_memory: shared.is_some(), num_cpus: available_threads(), num_gpus: node::num_gpus(), holds_gpu };
    Ok((start_worker(&format!("device {number}"), build).await?.0, shared.map(Arc::new), built))
}

/// The driver's store, where this worker is on its host.
fn reach(address: &StoreAddress, worker: usize) -> Option<Store> {
    let reached = Store::connect(address, &format!("worker {worker}"));
    reached.inspect_err(|error| tracing::debug!("{error}; batches go over the network")).ok()
}

/// The other workers reach this one at the address from which it reaches the driver.
fn meeting(driver: &str, port: u16) -> echelon_core::Result<Meeting> {
    let failed = |error: std::io::Error| echelon_core::Error::other(format!("the driver's address {driver}"), error);
    let (host, _) = driver.rsplit_once(':').expect("checked with the arguments");
    let address = driver.to_socket_addrs().map_err(failed)?.next();
    let address = address.ok_or_else(|| failed(std::io::ErrorKind::AddrNotAvailable.into()))?;
    let any: std::net::IpAddr = if address.is_ipv4() { [0u8; 4].into() } else { [0u8; 16].into() };
    // Connecting a datagram socket sends nothing; it chooses the interface.
    let socket = UdpSocket::bind((any, 0)).map_err(failed)?;
    socket.connect(address).map_err(failed)?;
    let own_address = socket.local_addr().map_err(failed)?.ip().to_string();
    Ok(Meeting { host: host.trim_matches(['[', ']']).into(), port, own_address })
}

/// Hands a call to the device thread by the name of its verb.
fn answer(worker: &Worker<DeviceRoles>, call: Call, shared: Option<&Arc<SharedMessages>>, interrupt: Interrupt) {
    let begin = move |roles: &mut DeviceRoles| roles.interrupt = interrupt;
    macro_rules! by_name {
        ($($verb:ident),*) => {
            match call.verb.as_str() {
                $(verb::$verb::NAME => serve::<_, verb::$verb>(worker, call, shared, begin),)*
                other => {
                    let unknown = format!("no verb is called `{other}`");
                    call.reply.send(Err(unknown));
                }
            }
        };
    }
    for_each_verb!(by_name);
}

/// Keeps the heartbeat's operation that of the group that has done most lately.
async fn watch(watched: Watched, progress: echelon_placement::control::Progress) {
    let mut last: Vec<Standing> = Vec::new();
    loop {
        tokio::time::sleep(LOOK).await;
        let standings: Vec<_> =
            watched.lock().expect("never held over a panic").iter().map(|group| group.standing()).collect();
        let moved = standings.iter().enumerate().find(|(at, now)| last.get(*at) != Some(now));
        if let Some((_, now)) = moved {
            progress.set(&now.operation, now.sequence, now.micro_batch, now.work);
        }
        last = standings;
    }
}

/// As the `worker` program's arguments give it.
pub fn arguments() -> Vec<String> {
    std::env::args().skip(1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &[&str]) -> Result<Joining, Failure> {
        Joining::read(&arguments.iter().map(|a| a.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn arguments_are_read_and_wrong_ones_are_named() {
        let joining = read(&["--join=10.0.0.1:7401", "--credentials", "secret", "--join-timeout-s", "30"]).unwrap();
        let (credentials, patience) = (Some("secret".into()), Duration::from_secs(30));
        assert_eq!(joining, Joining { driver: "10.0.0.1:7401".into(), credentials, patience });
        for (wrong, named) in [
            (&["--join"][..], "--join needs a value"),
            (&["--join", "somewhere"], "`somewhere`"),
            (&["--join", ":1"], "`:1`"),
            (&["--credentials", "x"], "--join HOST:PORT is missing"),
            (&["--join", "a:1", "--join-timeout-s", "-1"], "`-1`"),
            (&["--join", "a:1", "--join-timeout-s", "1e30"], "`1e30`"),
            (&["--jion", "a:1"], "--jion"),
        ] {
            let error = read(wrong).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("usage: worker"), "{wrong:?}: {error}");
        }
    }

    #[test]
    fn a_worker_tells_others_the_address_it_has_towards_the_driver() {
        let meeting = meeting("127.0.0.1:7401", 9).unwrap();
        assert_eq!((meeting.host.as_str(), meeting.port, meeting.own_address.as_str()), ("127.0.0.1", 9, "127.0.0.1"));
    }
}
