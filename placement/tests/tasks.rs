//! Tasks as their callers meet them: in this process, and over real worker processes.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use echelon_core::Error;
use echelon_placement::control::server::ControlConfig;
use echelon_placement::control::{
    ControlServer, Credentials, Hello, Limits, RemoteWorker, Rendezvous, RunAuthority, build_of_this_program, join,
    rendezvous,
};
use echelon_placement::launch::{LocalWorkers, SpawnConfig};
use echelon_placement::start_worker;
use echelon_placement::task::{
    Demand, Function, Functions, NodeConfig, TaskError, TaskServer, Tasks, TasksConfig, gpus_of_this_task,
};

const SOON: Duration = Duration::from_secs(20);

fn tasks_of(num_cpus: f64, num_gpus: usize) -> Tasks {
    Tasks::start(TasksConfig::new(NodeConfig::new("here", num_cpus, num_gpus))).unwrap()
}

/// Nothing is held on any node that lives.
fn assert_nothing_in_use(tasks: &Tasks) {
    for node in tasks.nodes().iter().filter(|node| node.alive) {
        assert!(node.in_use == Demand::NONE && node.running == 0 && node.waiting == 0, "{node:?}");
    }
}

/// Runs until it is told to go on; says when it has begun.
fn hold_a_cpu(tasks: &Tasks) -> (mpsc::Sender<()>, echelon_placement::task::TaskHandle<()>) {
    let (go_on, wait) = mpsc::channel::<()>();
    let (begun, has_begun) = mpsc::channel();
    let holding = move || {
        begun.send(()).unwrap();
        wait.recv_timeout(SOON).map_err(|error| Error::other("holding a cpu", error))
    };
    let handle = tasks.try_run("hold", Demand::CPU, holding).unwrap();
    has_begun.recv_timeout(SOON).unwrap();
    (go_on, handle)
}

#[tokio::test]
async fn tasks_run_at_once_where_there_is_room_and_in_order_where_there_is_not() {
    let tasks = tasks_of(2.0, 0);
    // Neither can end before the other has begun.
    let barrier = Arc::new(Barrier::new(2));
    let pair = [1, 2].map(|number| {
        let barrier = barrier.clone();
        tasks.try_run("meet", Demand::CPU, move || {
            barrier.wait();
            Ok(number)
        })
    });
    for (handle, number) in pair.into_iter().zip([1, 2]) {
        assert_eq!(handle.unwrap().within(SOON).await.unwrap(), number);
    }
    let tasks = tasks_of(1.0, 0);
    let order = Arc::new(Mutex::new(Vec::new()));
    let handles: Vec<_> = (0..500)
        .map(|number| {
            let order = order.clone();
            let note = move || {
                order.lock().unwrap().push(number);
                Ok(())
            };
            tasks.try_run("note", Demand::CPU, note).unwrap()
        })
        .collect();
    for handle in handles {
        handle.within(SOON).await.unwrap();
    }
    assert_eq!(*order.lock().unwrap(), (0..500).collect::<Vec<_>>());
    assert_nothing_in_use(&tasks);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_to_one_worker_keep_their_order_and_workers_run_in_parallel() {
    let (one, _) = start_worker("one", || Ok(Vec::new())).await.unwrap();
    let (other, _) = start_worker("other", || Ok(Vec::new())).await.unwrap();
    let barrier = Arc::new(Barrier::new(2));
    let both = (0..30).map(|number| {
        let call = |worker: &echelon_placement::Worker<Vec<i32>>| {
            let (worker, barrier) = (worker.clone(), barrier.clone());
            async move {
                // Each waits within its worker for the other's: in turns, neither would end.
                let work = move |seen: &mut Vec<i32>| {
                    barrier.wait();
                    seen.push(number);
                    Ok(seen.clone())
                };
                worker.run(work).await.unwrap()
            }
        };
        (call(&one), call(&other))
    });
    for (number, (first, second)) in both.enumerate() {
        let (first, second) = tokio::time::timeout(SOON, async { tokio::join!(first, second) }).await.unwrap();
        assert!(first == second && first == (0..=number as i32).collect::<Vec<_>>());
    }
}

/// SplitMix64.
fn random(state: &mut u64, limit: u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) % limit
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_no_more_runs_than_fits_however_tasks_end() {
    // TK-1, TK-6, TK-7. Counted by the tasks themselves, in quarters of a CPU and tenths of a GPU.
    let tasks = tasks_of(3.0, 2);
    let cpus = Arc::new(AtomicI64::new(0));
    let gpus: Arc<[AtomicI64; 2]> = Arc::default();
    let state = &mut 7;
    let mut handles = Vec::new();
    for _ in 0..2000 {
        let quarters = random(state, 13) as i64;
        let tenths = [0, 0, 3, 5, 10, 20][random(state, 6) as usize];
        let demand = Demand { num_cpus: quarters as f64 / 4.0, num_gpus: tenths as f64 / 10.0 };
        let (ending, naps) = (random(state, 8), random(state, 3));
        let (cpus, gpus) = (cpus.clone(), gpus.clone());
        let work = move || {
            let mine = gpus_of_this_task();
            assert_eq!(mine.len(), (tenths as usize).div_ceil(10), "{tenths} tenths");
            let used = cpus.fetch_add(quarters, Ordering::SeqCst) + quarters;
            let each = tenths.min(10);
            let of_gpus = mine.iter().map(|gpu| gpus[*gpu].fetch_add(each, Ordering::SeqCst) + each).max();
            std::thread::sleep(Duration::from_micros(100 * naps));
            for gpu in &mine {
                gpus[*gpu].fetch_sub(each, Ordering::SeqCst);
            }
            cpus.fetch_sub(quarters, Ordering::SeqCst);
            match ending {
                0 => Err(Error::Refused("no".into())),
                1 => std::panic::resume_unwind(Box::new("of the test, and without a backtrace")),
                _ => Ok((used, of_gpus.unwrap_or(0))),
            }
        };
        let handle = tasks.try_run("load", demand, work).unwrap();
        if ending > 5 { drop(handle) } else { handles.push((ending, handle)) }
    }
    for (ending, handle) in handles {
        match (ending, handle.within(SOON).await) {
            (0, Err(TaskError::Failed { .. })) | (1, Err(TaskError::Panicked { .. })) => {}
            (_, Ok((used, of_gpu))) => assert!(used <= 12 && of_gpu <= 10, "{used} quarters, {of_gpu} tenths"),
            (_, Err(error)) => panic!("{error}"),
        }
    }
    // Those whose handles were dropped may still run.
    let begun = Instant::now();
    while tasks.nodes()[0].running + tasks.nodes()[0].waiting > 0 {
        assert!(begun.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_nothing_in_use(&tasks);
}

#[tokio::test]
async fn what_nobody_can_give_is_refused_with_the_numbers() {
    // TK-3
    let tasks = tasks_of(2.0, 1);
    let refused = |demand| tasks.try_run("big", demand, || Ok(())).err().unwrap().to_string();
    let error = refused(Demand { num_cpus: 2.5, num_gpus: 1.0 });
    for words in ["task big demands 2.5 cpus and 1 gpus", "node here has 2 cpus and 1 gpus", "lower what it demands"] {
        assert!(error.contains(words), "{words}: {error}");
    }
    assert!(refused(Demand::gpus(2.0)).contains("demands 0 cpus and 2 gpus"));
    assert!(refused(Demand::cpus(-1.0)).contains("task big: num_cpus = -1 must be"));
    assert_nothing_in_use(&tasks);
}

#[test]
fn a_panic_and_an_error_name_the_task_and_harm_no_other() {
    // TK-7; and waiting works outside of any event loop.
    let tasks = tasks_of(1.0, 0);
    let panics = tasks.try_run::<()>("rules", Demand::CPU, || panic!("row 7 is odd")).unwrap();
    let fails = tasks.try_run::<()>("rules", Demand::CPU, || Err(Error::Refused("no label".into()))).unwrap();
    let works = tasks.try_run("rules", Demand::CPU, || Ok(7)).unwrap();
    assert_eq!(panics.wait(SOON).unwrap_err().to_string(), "task rules on node here panicked: row 7 is odd");
    assert_eq!(fails.wait(SOON).unwrap_err().to_string(), "task rules on node here: no label");
    assert_eq!(works.wait(SOON).unwrap(), 7);
    assert_nothing_in_use(&tasks);
}

#[test]
fn a_dropped_handle_cancels_what_has_not_begun() {
    // TK-6
    let tasks = Tasks::start(TasksConfig { waiting: 4, ..TasksConfig::new(NodeConfig::new("here", 1.0, 0)) }).unwrap();
    let (go_on, held) = hold_a_cpu(&tasks);
    let ran = Arc::new(AtomicUsize::new(0));
    let count = |amount| {
        let ran = ran.clone();
        tasks.try_run("count", Demand::CPU, move || Ok(ran.fetch_add(amount, Ordering::SeqCst)))
    };
    let waits = count(1).unwrap();
    let error = waits.wait(Duration::from_millis(20)).unwrap_err().to_string();
    assert!(error.contains("task count: no value within 0.02 s; it had not begun, and is cancelled"), "{error}");
    // What is cancelled takes no room for long: more can come than may wait.
    for _ in 0..100 {
        drop(count(10).unwrap());
    }
    let last = count(100).unwrap();
    go_on.send(()).unwrap();
    last.wait(SOON).unwrap();
    held.wait(SOON).unwrap();
    assert_eq!(ran.load(Ordering::SeqCst), 100);
    // One that has begun runs on, and holds its CPU.
    let (go_on, held) = hold_a_cpu(&tasks);
    let error = held.wait(Duration::from_millis(20)).unwrap_err().to_string();
    assert!(error.contains("it runs, and holds its resources until it ends"), "{error}");
    assert_eq!(tasks.nodes()[0].in_use, Demand::CPU);
    go_on.send(()).unwrap();
    count(0).unwrap().wait(SOON).unwrap();
    assert_nothing_in_use(&tasks);
}

#[tokio::test]
async fn a_full_queue_refuses() {
    // TK-4
    let config = TasksConfig { waiting: 3, waiting_bytes: 4096, ..TasksConfig::new(NodeConfig::new("here", 1.0, 0)) };
    let tasks = Tasks::start(TasksConfig { functions: functions(), ..config }).unwrap();
    let (go_on, held) = hold_a_cpu(&tasks);
    let waiting = [1, 2].map(|_| tasks.try_run("wait", Demand::CPU, || Ok(())).unwrap());
    let error = tasks.try_run("wait", Demand::CPU, || Ok(())).err().unwrap();
    assert_eq!(error.to_string(), "task wait: refused: 3 tasks wait or run already; await some of them first");
    go_on.send(()).unwrap();
    held.within(SOON).await.unwrap();
    for handle in waiting {
        handle.within(SOON).await.unwrap();
    }
    let (go_on, held) = hold_a_cpu(&tasks);
    let text = |bytes: usize| "a".repeat(bytes - 2); // JSON puts quotes around it
    let large = text(3000);
    let first = tasks.try_call(&ECHO, Demand::CPU, &large).unwrap();
    let error = tasks.try_call(&ECHO, Demand::CPU, &large).err().unwrap().to_string();
    assert!(error.contains("4096 bytes of arguments may wait, 3000 more are too many"), "{error}");
    let error = tasks.try_call(&ECHO, Demand::CPU, &text(5000)).err().unwrap().to_string();
    assert!(error.contains("its arguments of 5000 bytes are over the limit of 4096"), "{error}");
    go_on.send(()).unwrap();
    assert_eq!(first.within(SOON).await.unwrap(), large);
    held.within(SOON).await.unwrap();
    assert_nothing_in_use(&tasks);
}

#[test]
fn a_task_may_not_wait_for_another() {
    // TK-9: on one CPU it would wait for ever.
    let tasks = tasks_of(1.0, 0);
    let inner = tasks.clone();
    let outer = tasks.try_run("outer", Demand::CPU, move || {
        let handle = inner.try_run("inner", Demand::CPU, || Ok(1))?;
        Ok(handle.wait(SOON).unwrap_err().to_string())
    });
    let error = outer.unwrap().wait(SOON).unwrap();
    assert!(error.starts_with("task inner: a task may not wait for another: return first"), "{error}");
}

#[test]
fn when_the_last_handle_goes_so_does_what_waits() {
    let tasks = tasks_of(1.0, 0);
    let (go_on, held) = hold_a_cpu(&tasks);
    let waits = tasks.try_run("wait", Demand::CPU, || Ok(())).unwrap();
    drop(tasks);
    assert_eq!(waits.wait(SOON).unwrap_err().to_string(), "task wait: the scheduler has stopped");
    go_on.send(()).unwrap();
    held.wait(SOON).unwrap();
}

#[test]
fn roles_and_tasks_share_the_books() {
    let tasks = tasks_of(2.0, 2);
    let actor = tasks.reserve("actor", Some("here"), Demand { num_cpus: 1.0, num_gpus: 1.0 }).unwrap();
    assert_eq!((actor.node(), actor.gpus().as_slice()), ("here", &[0][..]));
    let seen = tasks.try_run("see", Demand::gpus(1.0), || Ok(gpus_of_this_task())).unwrap();
    assert_eq!(seen.wait(SOON).unwrap(), [1]);
    let error = tasks.try_run("see", Demand::gpus(2.0), || Ok(())).err().unwrap().to_string();
    assert!(error.contains("node here has 2 cpus and 2 gpus, of which roles hold 1 cpus and 1 gpus"), "{error}");
    let error = tasks.reserve("critic", None, Demand::gpus(2.0)).err().unwrap();
    assert!(matches!(error, TaskError::Taken { .. }), "{error}");
    assert!(error.to_string().contains("role critic demands 0 cpus and 2 gpus, which is not free on any node"));
    let error = tasks.reserve("critic", Some("here"), Demand::gpus(3.0)).err().unwrap();
    assert!(matches!(error, TaskError::Impossible { .. }), "{error}");
    let error = tasks.reserve("critic", Some("there"), Demand::gpus(1.0)).err().unwrap();
    assert!(matches!(error, TaskError::Impossible { .. }), "{error}");
    // What waits for what a role takes would wait for ever.
    let (go_on, held) = hold_a_cpu(&tasks);
    let waits = tasks.try_run("wide", Demand { num_cpus: 1.0, num_gpus: 1.0 }, || Ok(())).unwrap();
    let critic = tasks.reserve("critic", None, Demand::gpus(1.0)).unwrap();
    let error = waits.wait(SOON).unwrap_err().to_string();
    assert!(error.contains("task wide") && error.contains("role critic holds its resources"), "{error}");
    drop((actor, critic));
    go_on.send(()).unwrap();
    held.wait(SOON).unwrap();
    assert_nothing_in_use(&tasks);
    tasks.try_run("wide", Demand { num_cpus: 2.0, num_gpus: 2.0 }, || Ok(())).unwrap().wait(SOON).unwrap();
}

#[tokio::test]
async fn rows_come_back_in_order_and_the_first_error_is_the_first_rows() {
    // TK-10
    let tasks = tasks_of(2.0, 0);
    let squares = |rows: std::ops::Range<usize>| Ok(rows.map(|row| row * row).collect::<Vec<_>>());
    for (num_rows, least) in [(0, 1), (1, 1), (7, 3), (1000, 16)] {
        let rows = tasks.over_rows(("squares", Demand::CPU), num_rows, least, squares).unwrap();
        let expected: Vec<_> = (0..num_rows).map(|row| row * row).collect();
        assert_eq!(rows.gather().await.unwrap(), expected);
        assert_eq!(
            tasks.over_rows(("squares", Demand::CPU), num_rows, least, squares).unwrap().wait(SOON).unwrap(),
            expected
        );
    }
    for _ in 0..20 {
        let work = |rows: std::ops::Range<usize>| {
            // Later parts fail sooner.
            std::thread::sleep(Duration::from_micros(500 - rows.start as u64));
            match rows.clone().find(|row| row % 100 == 50) {
                Some(row) => Err(Error::Refused(format!("row {row}"))),
                None => Ok(vec![(); rows.len()]),
            }
        };
        let error = tasks.over_rows(("odd", Demand::CPU), 400, 10, work).unwrap().gather().await.unwrap_err();
        assert_eq!(error.into_cause().to_string(), "row 50");
    }
    let error =
        tasks.over_rows(("short", Demand::CPU), 4, 9, |_| Ok(vec![1])).unwrap().gather().await.unwrap_err().to_string();
    assert!(error.ends_with("4 rows gave 1 results"), "{error}");
}

const ADD: Function<(i64, i64), i64> = Function::new("add", |(a, b)| Ok(a + b));
const ECHO: Function<String, String> = Function::new("echo", Ok);
/// Sleeps for some milliseconds and says in which process, and with which GPUs.
const NAP: Function<u64, (u32, Vec<usize>)> = Function::new("nap", |millis| {
    std::thread::sleep(Duration::from_millis(millis));
    Ok((std::process::id(), gpus_of_this_task()))
});
const ODD: Function<i64, i64> = Function::new("odd", |number| match number {
    0 => panic!("zero is even"),
    number if number % 2 == 0 => Err(Error::Refused(format!("{number} is even"))),
    number => Ok(number),
});
/// The same, under a name whose tasks are not known to be short.
const LONG_NAP: Function<u64, u32> = Function::new("long nap", |millis| {
    std::thread::sleep(Duration::from_millis(millis));
    Ok(std::process::id())
});
/// Ends the process it runs in.
const POISON: Function<(), ()> = Function::new("poison", |()| {
    // SAFETY: a signal to this very process.
    unsafe { libc::kill(std::process::id() as i32, libc::SIGKILL) };
    std::thread::sleep(SOON);
    Ok(())
});

fn functions() -> Functions {
    Functions::default().with(&ADD).with(&ECHO).with(&NAP).with(&LONG_NAP).with(&ODD).with(&POISON)
}

/// Not a test: a worker process. Its loop serves one long call at a time; tasks run beside it.
#[test]
#[ignore = "a process that other tests start"]
fn worker_process() {
    let Ok(driver) = std::env::var("ECHELON_TEST_DRIVER") else { return };
    let credentials = Credentials::receive(std::io::stdin()).unwrap();
    let rank = echelon_placement::launch::place().unwrap().rank;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let hello = Hello::of_this_process(rank, 0, 0, "cpu");
        let server = Arc::new(TaskServer::start(functions()).unwrap());
        let mut session = join(&driver, &credentials, hello, brisk(), SOON, Some(server)).await.unwrap();
        while let Ok(Some(call)) = session.next().await {
            tokio::time::sleep(Duration::from_millis(call.body.len() as u64)).await;
            call.reply.send(Ok(Bytes::new()));
        }
    });
}

fn brisk() -> Limits {
    Limits { heartbeat: Duration::from_millis(50), silence: Duration::from_secs(5), ..Limits::default() }
}

/// A driver with worker processes of this host, each as a node of its own: "node-RANK".
struct Cluster {
    tasks: Tasks,
    processes: LocalWorkers,
    workers: Vec<RemoteWorker>,
    _server: ControlServer,
}

impl Cluster {
    /// The driver's node and those of the workers, each with CPUs and GPUs.
    async fn start((num_cpus, num_gpus): (f64, usize), nodes: &[(f64, usize)]) -> Cluster {
        let authority = RunAuthority::new().unwrap();
        let num_workers = nodes.len() as u32;
        let config = ControlConfig {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            num_workers,
            build: build_of_this_program(),
            limits: brisk(),
            output: None,
        };
        let server = ControlServer::start(config, &authority).await.unwrap();
        let spawn = SpawnConfig {
            program: std::env::current_exe().unwrap(),
            args: ["worker_process", "--exact", "--ignored", "--nocapture"].map(Into::into).to_vec(),
            variables: vec![("ECHELON_TEST_DRIVER".into(), server.address().to_string().into())],
            num_workers,
            devices: Vec::new(),
            threads: 2,
            on_line: Arc::new(|_, _| {}),
        };
        let processes = LocalWorkers::start(&spawn, |rank| authority.worker(Some(rank))).unwrap();
        let workers = rendezvous(&server, Rendezvous::STARTED_HERE, |_| {}).await.unwrap();
        let own = NodeConfig::new("driver", num_cpus, num_gpus);
        let tasks = Tasks::start(TasksConfig { functions: functions(), ..TasksConfig::new(own) }).unwrap();
        for (worker, (cpus, gpus)) in workers.iter().zip(nodes) {
            let node = NodeConfig::new(format!("node-{}", worker.rank()), *cpus, *gpus);
            tasks.add_worker(&node, worker.clone()).unwrap();
        }
        Cluster { tasks, processes, workers, _server: server }
    }

    fn pid(&self, rank: u32) -> u32 {
        self.processes.pid(rank).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_runs_here_when_there_is_room_and_else_where_the_wait_is_shortest() {
    // TK-2, over real processes.
    let cluster = Cluster::start((1.0, 0), &[(1.0, 0), (1.0, 2)]).await;
    let tasks = &cluster.tasks;
    let nap = |millis, demand| tasks.try_call(&NAP, demand, &millis).unwrap();
    assert_eq!(nap(0, Demand::CPU).within(SOON).await.unwrap().0, std::process::id(), "local first");
    let on_gpus = nap(0, Demand::gpus(2.0)).within(SOON).await.unwrap();
    assert_eq!(on_gpus, (cluster.pid(1), vec![0, 1]), "only there are GPUs, and it is told which it has");
    let (go_on, held) = hold_a_cpu(tasks);
    let [first, second] = [(); 2].map(|()| tasks.try_call(&LONG_NAP, Demand::CPU, &300).unwrap());
    let mut ran = [first.within(SOON).await.unwrap(), second.within(SOON).await.unwrap()];
    let mut expected = [cluster.pid(0), cluster.pid(1)];
    ran.sort_unstable();
    expected.sort_unstable();
    assert_eq!(ran, expected, "each on a node of its own");
    go_on.send(()).unwrap();
    held.within(SOON).await.unwrap();
    assert_nothing_in_use(tasks);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_on_another_node_give_values_errors_and_panics_beside_a_busy_device() {
    let cluster = Cluster::start((0.0, 0), &[(2.0, 0)]).await;
    let tasks = &cluster.tasks;
    // The worker's own loop is busy all the while.
    let worker = cluster.workers[0].clone();
    let busy = tokio::spawn(async move { worker.call("forward", Bytes::from(vec![0; 3000]), SOON).await });
    let mut sums = Vec::new();
    for number in 0..3000 {
        sums.push(tasks.try_call(&ADD, Demand::CPU, &(number, 1)).unwrap());
    }
    for (number, sum) in sums.into_iter().enumerate() {
        assert_eq!(sum.within(SOON).await.unwrap(), number as i64 + 1);
    }
    let call = |number: i64| tasks.try_call(&ODD, Demand::CPU, &number).unwrap();
    let (value, error, panic) = (call(3), call(4), call(0));
    assert_eq!(value.within(SOON).await.unwrap(), 3);
    assert_eq!(error.within(SOON).await.unwrap_err().to_string(), "task odd on node node-0: 4 is even");
    assert_eq!(panic.within(SOON).await.unwrap_err().to_string(), "task odd on node node-0 panicked: zero is even");
    let large: String = (0..3 << 20).map(|i: u32| char::from((i ^ (i >> 9)) as u8 % 64 + b'0')).collect();
    assert!(tasks.try_call(&ECHO, Demand::CPU, &large).unwrap().within(SOON).await.unwrap() == large);
    assert!(!busy.is_finished(), "the device was busy all the while");
    assert_nothing_in_use(tasks);
    let unknown: Function<(), ()> = Function::new("unheard", |()| Ok(()));
    let error = tasks.try_call(&unknown, Demand::CPU, &()).err().unwrap().to_string();
    assert!(error.contains("task unheard: this process knows no function of that name; it knows add, echo"), "{error}");
    busy.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_worker_was_at_runs_again_elsewhere() {
    // TK-8
    let cluster = Cluster::start((0.0, 0), &[(2.0, 0), (2.0, 0)]).await;
    let tasks = &cluster.tasks;
    let naps: Vec<_> = (0..6).map(|_| tasks.try_call(&NAP, Demand::CPU, &600).unwrap()).collect();
    let running: Vec<_> = tasks.nodes().iter().map(|node| node.running).collect();
    assert_eq!(running, [0, 2, 2]);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let survivor = cluster.pid(1);
    cluster.processes.kill(0);
    let mut ran = Vec::new();
    for nap in naps {
        ran.push(nap.within(SOON).await.unwrap().0);
    }
    assert!(ran.iter().filter(|pid| **pid == survivor).count() >= 4, "{ran:?} on {survivor}");
    let nodes = tasks.nodes();
    assert!(!nodes[1].alive && nodes[2].alive);
    assert_nothing_in_use(tasks);
    assert_eq!(tasks.try_call(&NAP, Demand::CPU, &0).unwrap().within(SOON).await.unwrap().0, survivor);
    // With the last node the rest is an error that says so.
    let last = tasks.try_call(&NAP, Demand::CPU, &5000).unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    cluster.processes.kill(1);
    let error = last.within(SOON).await.unwrap_err().to_string();
    for words in ["task nap on node node-1: lost after 1 attempts", "node node-1 is lost", "demands 1 cpus"] {
        assert!(error.contains(words), "{words}: {error}");
    }
    let error = tasks.try_call(&NAP, Demand::CPU, &0).err().unwrap().to_string();
    assert!(error.contains("which no node can ever give") && error.contains("node node-0 is lost"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_kills_its_workers_is_given_up_and_takes_no_innocent_along() {
    // TK-8
    let cluster = Cluster::start((0.0, 0), &[(1.0, 0), (1.0, 0), (1.0, 0), (1.0, 0)]).await;
    let tasks = &cluster.tasks;
    let warm: Vec<_> = (0..8).map(|number| tasks.try_call(&ADD, Demand::CPU, &(number, 0)).unwrap()).collect();
    for handle in warm {
        handle.within(SOON).await.unwrap();
    }
    let poison = tasks.try_call(&POISON, Demand::CPU, &()).unwrap();
    let innocent: Vec<_> = (0..200).map(|number| tasks.try_call(&ADD, Demand::CPU, &(number, 1)).unwrap()).collect();
    let error = poison.within(SOON).await.unwrap_err().to_string();
    assert!(error.contains("task poison on node node-") && error.contains("lost after 3 attempts"), "{error}");
    for (number, handle) in innocent.into_iter().enumerate() {
        assert_eq!(handle.within(SOON).await.unwrap(), number as i64 + 1);
    }
    assert_eq!(tasks.nodes().iter().filter(|node| node.alive).count(), 2, "the driver's and one more");
    assert_nothing_in_use(tasks);
}
