//! The control plane over real sockets: who gets in, what a call ends in, and what becomes of a worker that does not.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use echelon_placement::control::server::ControlConfig;
use echelon_placement::control::{
    Call, ControlError, ControlServer, Credentials, Hello, Limits, LocalOutput, RefusalKind, RemoteWorker, Rendezvous,
    RunAuthority, Session, build_of_this_program, join, rendezvous,
};
use echelon_placement::launch::{LocalWorkers, SpawnConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const SOON: Duration = Duration::from_secs(5);

/// A run of `num_workers` on a port that the system chose.
struct Run {
    authority: RunAuthority,
    server: ControlServer,
    limits: Limits,
}

impl Run {
    async fn start(num_workers: u32, limits: Limits, output: Option<Arc<dyn LocalOutput>>) -> Run {
        let authority = RunAuthority::new().unwrap();
        let server = ControlServer::start(config(num_workers, &limits, output), &authority).await.unwrap();
        Run { authority, server, limits }
    }

    fn address(&self) -> String {
        self.server.address().to_string()
    }

    async fn join(&self, hello: Hello) -> Result<Session, ControlError> {
        let credentials = self.authority.worker(None).unwrap();
        join(&self.address(), &credentials, hello, self.limits.clone(), SOON, None).await
    }

    /// A worker in this process that serves the test verbs.
    async fn worker(&self, rank: u32) -> RemoteWorker {
        let session = self.join(Hello::of_this_process(rank, 0, 0, "cpu")).await.unwrap();
        tokio::spawn(serve(session));
        self.server.worker(rank).unwrap()
    }
}

fn config(num_workers: u32, limits: &Limits, output: Option<Arc<dyn LocalOutput>>) -> ControlConfig {
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    ControlConfig { listen, num_workers, build: build_of_this_program(), limits: limits.clone(), output }
}

/// A worker's loop, one call at a time: `echo`, `sleep` (body: milliseconds) and `fail`.
async fn serve(mut session: Session) -> Result<(), ControlError> {
    let progress = session.progress();
    while let Some(Call { verb, sequence, body, reply, .. }) = session.next().await? {
        progress.set("serving", sequence, 7, 0);
        match verb.as_str() {
            "echo" => reply.send(Ok(body)),
            "sleep" => {
                let millis = String::from_utf8_lossy(&body).parse().unwrap();
                tokio::time::sleep(Duration::from_millis(millis)).await;
                reply.send(Ok(body));
            }
            "drop" => drop(reply),
            verb => reply.send(Err(format!("no verb {verb}"))),
        }
    }
    Ok(())
}

/// Times short enough for a test.
fn brisk() -> Limits {
    let millis = Duration::from_millis;
    Limits { heartbeat: millis(50), silence: millis(500), probe: millis(300), ..Limits::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_joins_and_answers() {
    let run = Run::start(1, brisk(), None).await;
    let worker = run.worker(0).await;
    assert_eq!(worker.call("echo", Bytes::from_static(b"hi"), SOON).await.unwrap(), "hi");
    let error = worker.call("leap", Bytes::new(), SOON).await.unwrap_err();
    assert!(matches!(error, ControlError::Worker { .. }), "{error}");
    assert!(error.to_string().contains("rank 0 at 127.0.0.1") && error.to_string().ends_with("leap: no verb leap"));
    let error = worker.call("drop", Bytes::new(), SOON).await.unwrap_err().to_string();
    assert!(error.contains("dropped the call"), "{error}");
    tokio::time::sleep(Duration::from_millis(150)).await;
    let heartbeat = worker.heartbeat();
    assert_eq!((heartbeat.operation.as_str(), heartbeat.sequence, heartbeat.micro_batch), ("serving", 3, 7));
    let mut roster = run.server.roster();
    run.server.finish("done", SOON).await;
    assert!(roster.borrow_and_update().workers.is_empty() && roster.borrow().losses.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_to_one_worker_keep_their_order_and_workers_run_in_parallel() {
    let run = Run::start(2, brisk(), None).await;
    let session = run.join(Hello::of_this_process(0, 2, 0, "cpu")).await.unwrap();
    let order = tokio::spawn(async move {
        let (mut session, mut seen) = (session, Vec::new());
        while seen.len() < 40 {
            let call = session.next().await.unwrap().unwrap();
            seen.push((call.sequence, call.body.len()));
            call.reply.send(Ok(Bytes::new()));
        }
        (session, seen)
    });
    let worker = run.server.worker(0).unwrap();
    // Large and small bodies by turns: a small one must not overtake.
    let sizes: Vec<usize> = (0..40).map(|i| if i % 2 == 0 { 700_000 + i } else { i }).collect();
    let calls = sizes.iter().map(|size| worker.call("put", Bytes::from(vec![1; *size]), SOON));
    for answer in futures_in_order(calls).await {
        answer.unwrap();
    }
    let (_session, seen) = order.await.unwrap();
    assert_eq!(seen, sizes.into_iter().enumerate().map(|(i, size)| (i as u64 + 1, size)).collect::<Vec<_>>());

    let run = Run::start(2, brisk(), None).await;
    let (one, other) = (run.worker(0).await, run.worker(1).await);
    let begun = Instant::now();
    let nap = || Bytes::from_static(b"2000");
    let (a, b) = tokio::join!(one.call("sleep", nap(), SOON), other.call("sleep", nap(), SOON));
    assert!(a.is_ok() && b.is_ok() && begun.elapsed() < Duration::from_millis(3900), "{:?}", begun.elapsed());
}

/// Polls all at once; each is begun in order.
async fn futures_in_order<F: Future + Send>(futures: impl Iterator<Item = F>) -> Vec<F::Output>
where
    F::Output: Send,
{
    let mut futures: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|cx| {
        for (future, output) in &mut futures {
            if output.is_none()
                && let std::task::Poll::Ready(ready) = future.as_mut().poll(cx)
            {
                *output = Some(ready);
            }
        }
        let done = futures.iter().all(|(_, output)| output.is_some());
        if done { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    futures.into_iter().filter_map(|(_, output)| output).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_body_passes_both_ways_and_heartbeats_go_on() {
    let run = Run::start(1, brisk(), None).await;
    let worker = run.worker(0).await;
    let body = Bytes::from((0..64 << 20).map(|i: u32| (i ^ (i >> 11)) as u8).collect::<Vec<u8>>());
    let begun = Instant::now();
    let answer = worker.call("echo", body.clone(), SOON).await.unwrap();
    assert!(answer == body, "64 MiB came back changed");
    println!("64 MiB there and back in {:?}", begun.elapsed());
    assert!(worker.loss().is_none());
    let limits = Limits { body_bytes: 1000, ..brisk() };
    let run = Run::start(1, limits, None).await;
    let worker = run.worker(0).await;
    let error = worker.call("echo", Bytes::from(vec![0; 1001]), SOON).await.unwrap_err();
    assert!(matches!(error, ControlError::TooLarge { bytes: 1001, limit: 1000, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_ends_at_its_deadline_and_a_full_queue_refuses() {
    let run = Run::start(1, Limits { calls: 4, queued_bytes: 10 << 20, ..brisk() }, None).await;
    let worker = run.worker(0).await;
    let begun = Instant::now();
    let error = worker.call("sleep", Bytes::from_static(b"600"), Duration::from_millis(200)).await.unwrap_err();
    assert!(matches!(error, ControlError::Deadline { .. }) && begun.elapsed() < Duration::from_millis(590), "{error}");
    assert!(error.to_string().contains("sleep: no answer within 0.2 s; it is at serving 1"), "{error}");
    // The caller gave up: its slot is free again although the work goes on, and the worker still answers in order.
    assert_eq!(worker.call("echo", Bytes::from_static(b"later"), SOON).await.unwrap(), "later");
    let naps = (0..6).map(|_| worker.call("sleep", Bytes::from_static(b"50"), SOON));
    let answers = futures_in_order(naps).await;
    let refused: Vec<_> = answers.iter().filter(|answer| matches!(answer, Err(ControlError::Busy { .. }))).collect();
    assert_eq!(refused.len(), 2, "{answers:?}");
    let big = (0..2).map(|_| worker.call("echo", Bytes::from(vec![0; 6 << 20]), SOON));
    let answers = futures_in_order(big).await;
    assert!(answers[0].is_ok() && matches!(answers[1], Err(ControlError::Busy { .. })), "more bytes than may wait");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_certificate_of_the_run_gets_nothing() {
    let run = Run::start(1, brisk(), None).await;
    let other = RunAuthority::new().unwrap().worker(None).unwrap();
    let hello = Hello::of_this_process(0, 1, 0, "cpu");
    let error = join(&run.address(), &other, hello.clone(), brisk(), SOON, None).await.err().unwrap();
    assert!(matches!(error, ControlError::OtherRun { .. }), "{error}");
    assert!(error.to_string().contains("is not of the run"), "{error}");
    assert_eq!(bytes_without_certificate(run.server.address()).await, 0);
    assert!(run.server.roster().borrow().workers.is_empty());
    let certified = run.authority.worker(Some(1)).unwrap();
    let error = join(&run.address(), &certified, hello, brisk(), SOON, None).await.err().unwrap().to_string();
    assert!(error.contains("its certificate is for another rank"), "{error}");
}

/// Bytes of application data that the server sends to a TLS client without a certificate.
async fn bytes_without_certificate(address: SocketAddr) -> usize {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    #[derive(Debug)]
    struct Anybody;
    impl ServerCertVerifier for Anybody {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    }

    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("driver.echelon").unwrap();
    let Ok(mut stream) = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, stream).await else { return 0 };
    let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    let mut bytes = Vec::new();
    let _ = tokio::time::timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("the server closes it");
    bytes.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_cannot_belong_to_the_run_are_told_why() {
    let cases: [(RefusalKind, &str, Spoil); 4] = [
        (RefusalKind::OtherBuild, "start all of them from one program file", |hello| hello.build = "0.1.0+beef".into()),
        (RefusalKind::OtherBuild, "protocol 9 against 1", |hello| hello.protocol = 9),
        (RefusalKind::RankOutOfRange, "ranks of this run are 0 to 1, not 2", |hello| hello.rank = 2),
        (RefusalKind::OtherWorldSize, "one of 8 workers, the driver wants 2", |hello| hello.num_workers = 8),
    ];
    for (kind, words, spoil) in cases {
        let run = Run::start(2, brisk(), None).await;
        let mut hello = Hello::of_this_process(1, 2, 0, "cpu");
        spoil(&mut hello);
        let error = run.join(hello).await.err().unwrap();
        assert!(matches!(error, ControlError::Refused { .. }) && error.to_string().contains(words), "{error}");
        let error = rendezvous(&run.server, Rendezvous::STARTED_HERE, |_| {}).await.err().unwrap();
        let ControlError::Misconfigured { kind: found, reason } = &error else { panic!("{error}") };
        assert!(*found == kind && reason.contains("127.0.0.1:") && reason.contains(words), "{reason}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_living_workers_of_one_rank_are_an_error_for_both_ends() {
    let run = Run::start(2, brisk(), None).await;
    let first = run.worker(1).await;
    let begun = Instant::now();
    let error = run.join(Hello::of_this_process(1, 2, 0, "cpu")).await.err().unwrap().to_string();
    assert!(error.contains("two workers claim rank 1") && error.contains("give every worker its own rank"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let error = rendezvous(&run.server, Rendezvous::STARTED_HERE, |_| {}).await.err().unwrap();
    assert!(matches!(error, ControlError::Misconfigured { kind: RefusalKind::RankTaken, .. }), "{error}");
    assert_eq!(first.call("echo", Bytes::from_static(b"still"), SOON).await.unwrap(), "still");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_incarnation_wins_and_a_stale_one_stays_out() {
    let run = Run::start(1, brisk(), None).await;
    let old_hello = Hello::of_this_process(0, 1, 0, "cpu");
    let old = run.join(old_hello.clone()).await.unwrap();
    let handle = run.server.worker(0).unwrap();
    let pending = tokio::spawn(async move { handle.call("sleep", Bytes::from_static(b"60000"), SOON).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    // The scheduler has restarted the job: no question of who is right.
    let new = run.join(Hello::of_this_process(0, 1, 1, "cpu")).await.unwrap();
    tokio::spawn(serve(new));
    let error = pending.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("sleep: lost: replaced by a newer incarnation"), "{error}");
    let mut old = old;
    let dismissed = loop {
        match old.next().await {
            Ok(Some(call)) => drop(call),
            end => break end.err().unwrap().to_string(),
        }
    };
    assert!(dismissed.contains("replaced by a newer incarnation"), "{dismissed}");
    let error = run.join(old_hello).await.err().unwrap().to_string();
    assert!(error.contains("a newer incarnation has had this rank: end this process"), "{error}");
    let worker = run.server.worker(0).unwrap();
    assert_eq!((worker.hello().attempt, worker.call("echo", Bytes::new(), SOON).await.unwrap().len()), (1, 0));
    assert!(run.server.roster().borrow().losses.is_empty(), "a replacement is no loss");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_leaves_says_why() {
    let run = Run::start(1, brisk(), None).await;
    let session = run.join(Hello::of_this_process(0, 1, 0, "cpu")).await.unwrap();
    let worker = run.server.worker(0).unwrap();
    session.leave("terminated by its scheduler").await;
    let loss = tokio::time::timeout(SOON, run.server.first_loss()).await.unwrap().to_string();
    assert!(loss.contains("rank 0") && loss.contains("it left: terminated by its scheduler"), "{loss}");
    assert!(worker.call("echo", Bytes::new(), SOON).await.unwrap_err().to_string().contains("it left"));
}

#[tokio::test]
async fn a_port_in_use_says_so() {
    let run = Run::start(1, brisk(), None).await;
    let mut second = config(1, &brisk(), None);
    second.listen = run.server.address();
    let error = ControlServer::start(second, &run.authority).await.err().unwrap().to_string();
    assert!(error.contains(&run.address()) && error.contains("another program has the port"), "{error}");
}

#[tokio::test]
async fn a_driver_that_is_not_there_is_reported_in_time() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let credentials = RunAuthority::new().unwrap().worker(None).unwrap();
    let hello = Hello::of_this_process(0, 1, 0, "cpu");
    let patience = Duration::from_millis(500);
    let begun = Instant::now();
    let error = join(&address, &credentials, hello, brisk(), patience, None).await.err().unwrap();
    assert!(matches!(error, ControlError::Unreachable { .. }) && error.to_string().contains(&address), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_ranks_are_named_now_and_then_and_at_the_end() {
    let run = Run::start(5, brisk(), None).await;
    let _two = run.worker(2).await;
    let rules = Rendezvous { timeout: Duration::from_millis(500), remind: Duration::from_millis(200) };
    let mut reminders = Vec::new();
    let error = rendezvous(&run.server, rules, |line| reminders.push(line.to_string())).await.err().unwrap();
    assert_eq!(reminders.len(), 2, "{reminders:?}");
    assert!(reminders[0].contains("1 of 5 workers have joined") && reminders[0].ends_with("missing ranks 0, 1, 3, 4"));
    assert!(
        error.to_string().contains("4 of 5 workers did not join") && error.to_string().contains("0.5 s"),
        "{error}"
    );
    for rank in [0, 1, 3, 4] {
        run.worker(rank).await;
    }
    let workers = rendezvous(&run.server, rules, |_| {}).await.unwrap();
    assert_eq!(workers.iter().map(RemoteWorker::rank).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
}

/// Makes an honest Hello a wrong one.
type Spoil = fn(&mut Hello);

/// Workers in processes of their own: this test program, as [`worker_process`].
fn start_workers(authority: &RunAuthority, address: &str, num_workers: u32, mode: &str) -> LocalWorkers {
    let config = SpawnConfig {
        program: std::env::current_exe().unwrap(),
        args: ["worker_process", "--exact", "--ignored", "--nocapture"].map(Into::into).to_vec(),
        variables: vec![("ECHELON_TEST_DRIVER".into(), address.into()), ("ECHELON_TEST_MODE".into(), mode.into())],
        num_workers,
        devices: Vec::new(),
        threads: 2,
        on_line: Arc::new(|_, _| {}),
    };
    LocalWorkers::start(&config, |rank| authority.worker(Some(rank))).unwrap()
}

/// Not a test: what [`start_workers`] starts.
#[test]
#[ignore = "a process that other tests start"]
fn worker_process() {
    let Ok(driver) = std::env::var("ECHELON_TEST_DRIVER") else { return };
    let mode = std::env::var("ECHELON_TEST_MODE").unwrap();
    if mode == "fail" {
        eprintln!("this worker cannot start");
        std::process::exit(4);
    }
    let credentials = Credentials::receive(std::io::stdin()).unwrap();
    let rank = echelon_placement::launch::place().unwrap().rank;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let hello = Hello::of_this_process(rank, 0, 0, "cpu");
        let session = join(&driver, &credentials, hello, brisk(), SOON, None).await.unwrap();
        eprintln!("rank {rank} has joined");
        let _ = serve(session).await;
    });
}

/// A run whose workers are processes of this host.
async fn run_of_processes(num_workers: u32, limits: Limits) -> (Run, LocalWorkers, Vec<RemoteWorker>) {
    // The server wants to know the processes, which want to know the address.
    let output = Arc::new(Later::default());
    let run = Run::start(num_workers, limits, Some(output.clone())).await;
    let processes = start_workers(&run.authority, &run.address(), num_workers, "serve");
    output.0.set(processes.output()).ok().unwrap();
    let workers = rendezvous(&run.server, Rendezvous::STARTED_HERE, |_| {}).await.unwrap();
    (run, processes, workers)
}

#[derive(Default)]
struct Later(std::sync::OnceLock<Arc<dyn LocalOutput>>);

impl LocalOutput for Later {
    fn report(&self, rank: u32, pid: u32) -> Option<(Vec<String>, Option<String>)> {
        self.0.get()?.report(rank, pid)
    }

    fn ended(&self) -> Option<ControlError> {
        self.0.get()?.ended()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_worker_is_an_error_with_all_that_is_known() {
    let (run, processes, workers) = run_of_processes(2, brisk()).await;
    let victim = workers[1].clone();
    let call = tokio::spawn(async move { victim.call("sleep", Bytes::from_static(b"60000"), SOON).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let begun = Instant::now();
    processes.kill(1);
    let error = call.await.unwrap().unwrap_err().to_string();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    for words in ["rank 1 at 127.0.0.1:", "sleep: lost: its process was killed by signal 9", "rank 1 has joined"] {
        assert!(error.contains(words), "{words}: {error}");
    }
    assert!(matches!(run.server.first_loss().await, ControlError::Lost { .. }));
    assert_eq!(workers[0].call("echo", Bytes::from_static(b"x"), SOON).await.unwrap(), "x");
    let error = workers[1].call("echo", Bytes::new(), SOON).await.unwrap_err();
    assert!(matches!(error, ControlError::Lost { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_worker_is_noticed_and_costs_no_memory() {
    let limits = Limits { silence: Duration::from_secs(1), queued_bytes: 16 << 20, ..brisk() };
    let (run, processes, workers) = run_of_processes(1, limits).await;
    let pid = processes.pid(0).unwrap() as i32;
    // SAFETY: a signal to our own child.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGSTOP) }, 0);
    let begun = Instant::now();
    let body = Bytes::from(vec![0; 1 << 20]);
    let calls = (0..64).map(|_| workers[0].call("echo", body.clone(), SOON));
    let answers = futures_in_order(calls).await;
    let (refused, lost): (Vec<_>, Vec<_>) =
        answers.iter().partition(|answer| matches!(answer, Err(ControlError::Busy { .. })));
    assert!(refused.len() >= 40 && !lost.is_empty(), "{} refused", refused.len());
    let waited = begun.elapsed();
    assert!(waited > Duration::from_millis(900) && waited < Duration::from_millis(8000), "{waited:?}");
    let error = run.server.first_loss().await.to_string();
    assert!(error.contains("no heartbeat for ") && error.contains("frozen"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_takes_the_rank_of_a_frozen_worker() {
    let limits = Limits { silence: Duration::from_secs(60), ..brisk() };
    let (run, processes, workers) = run_of_processes(1, limits).await;
    // SAFETY: a signal to our own child.
    assert_eq!(unsafe { libc::kill(processes.pid(0).unwrap() as i32, libc::SIGSTOP) }, 0);
    let begun = Instant::now();
    let successor = run.worker(0).await;
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_eq!(successor.call("echo", Bytes::from_static(b"new"), SOON).await.unwrap(), "new");
    let error = workers[0].call("echo", Bytes::new(), SOON).await.unwrap_err().to_string();
    assert!(error.contains("replaced by a newer incarnation"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_ends_before_it_joins_is_reported_at_once() {
    let output = Arc::new(Later::default());
    let run = Run::start(1, brisk(), Some(output.clone())).await;
    let processes = start_workers(&run.authority, &run.address(), 1, "fail");
    output.0.set(processes.output()).ok().unwrap();
    let begun = Instant::now();
    let error = rendezvous(&run.server, Rendezvous::STARTED_HERE, |_| {}).await.err().unwrap().to_string();
    assert!(error.contains("rank 0") && error.contains("exit code 4") && error.contains("cannot start"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(8));
}

/// Not a test: a driver whose memory and sockets are its own, for [`strangers_cost_little_and_are_gone_soon`].
#[test]
#[ignore = "a process that another test starts"]
fn driver_process() {
    let Ok(folder) = std::env::var("ECHELON_TEST_FOLDER").map(PathBuf::from) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let authority = RunAuthority::new().unwrap();
        let server = ControlServer::start(config(3, &Limits::default(), None), &authority).await.unwrap();
        let workers = std::env::var("ECHELON_TEST_WORKERS")
            .is_ok()
            .then(|| start_workers(&authority, &server.address().to_string(), 1, "serve"));
        let pid = workers.as_ref().and_then(|workers| workers.pid(0)).unwrap_or(0);
        std::fs::write(folder.join("worker"), pid.to_string()).unwrap();
        authority.worker(None).unwrap().write(&folder.join("join.pem")).unwrap();
        std::fs::write(folder.join("address.part"), server.address().to_string()).unwrap();
        std::fs::rename(folder.join("address.part"), folder.join("address")).unwrap();
        tokio::time::sleep(Duration::from_secs(60)).await;
    });
}

/// Ends its process and its folder with the test.
struct Driver {
    process: std::process::Child,
    folder: PathBuf,
    address: String,
}

impl Driver {
    async fn start(name: &str, variables: &[(&str, &str)]) -> Driver {
        let folder = tempfile::Builder::new().prefix(&format!("echelon-control-{name}-")).tempdir().unwrap().keep();
        let process = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["driver_process", "--exact", "--ignored", "--nocapture"])
            .env("ECHELON_TEST_FOLDER", &folder)
            .envs(variables.iter().copied())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut driver = Driver { process, folder, address: String::new() };
        let begun = Instant::now();
        while driver.address.is_empty() {
            assert!(begun.elapsed() < SOON, "the driver does not start");
            tokio::time::sleep(Duration::from_millis(10)).await;
            driver.address = std::fs::read_to_string(driver.folder.join("address")).unwrap_or_default();
        }
        driver
    }

    /// Resident now and at the highest, KiB.
    fn memory_kib(&self) -> (u64, u64) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        (field("VmRSS:"), field("VmHWM:"))
    }

    fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap().count()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_die_with_a_driver_that_is_killed() {
    let driver = Driver::start("killed", &[("ECHELON_TEST_WORKERS", "1")]).await;
    let worker: u32 = std::fs::read_to_string(driver.folder.join("worker")).unwrap().parse().unwrap();
    let alive = || {
        let status = std::fs::read_to_string(format!("/proc/{worker}/stat")).unwrap_or_default();
        status.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
    };
    assert!(alive(), "worker {worker} runs");
    // Frozen, it cannot notice anything itself: the kernel must end it.
    // SAFETY: a signal to a process that this test caused.
    assert_eq!(unsafe { libc::kill(worker as i32, libc::SIGSTOP) }, 0);
    drop(driver);
    let begun = Instant::now();
    while alive() {
        assert!(begun.elapsed() < SOON, "worker {worker} outlives its driver");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Connects and sends `bytes`; the connection stays open.
async fn stranger(address: &str, bytes: &[u8]) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let _ = stream.write_all(bytes).await;
    Some(stream)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_cost_little_and_are_gone_soon() {
    let driver = Driver::start("strangers", &[]).await;
    let credentials = Credentials::read(&driver.folder.join("join.pem")).unwrap();
    let enter = |rank| {
        let hello = Hello::of_this_process(rank, 3, 0, "cpu");
        join(&driver.address, &credentials, hello, Limits::default(), SOON, None)
    };
    let _first = enter(0).await.unwrap();
    let (before_kib, files_before) = (driver.memory_kib().0, driver.open_files());
    let begun = Instant::now();
    let stalled_hello = [&[0x16, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3][..], &[7; 4000]].concat();
    let attacks: [&[u8]; 8] = [
        b"",
        b"",
        b"GET / HTTP/1.1\r\nhost: driver\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x00\x00\x00\x00\x00\x01",
        &[0xff; 64],
        &[0x16, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff],
        &[0x16],
        &stalled_hello,
    ];
    let mut open = Vec::new();
    for number in 0..2400 {
        open.push(stranger(&driver.address, attacks[number % attacks.len()]).await);
    }
    println!("2,400 strangers connected after {:?}", begun.elapsed());
    let joining = Instant::now();
    let second = enter(1).await.unwrap();
    let joined = joining.elapsed();
    assert!(joined < Duration::from_secs(1), "an honest worker joined after {joined:?}");
    // And while more come.
    let more = tokio::spawn({
        let address = driver.address.clone();
        async move {
            let mut open = Vec::new();
            for _ in 0..1500 {
                open.push(stranger(&address, &[0x16]).await);
            }
            open
        }
    });
    let joining = Instant::now();
    let third = enter(2).await.unwrap();
    println!("joined beside them after {joined:?}, while they came after {:?}", joining.elapsed());
    assert!(joining.elapsed() < Duration::from_secs(1), "{:?}", joining.elapsed());
    let more = more.await.unwrap();
    let ended = Instant::now();
    while driver.open_files() > files_before + 2 {
        assert!(ended.elapsed() < Duration::from_secs(5), "{} files after 5 s", driver.open_files());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let grown = (driver.memory_kib().1.saturating_sub(before_kib)) / 1024;
    println!("all gone after {:?}; at most {grown} MiB more than before", ended.elapsed());
    assert!(grown <= 32, "{grown} MiB");
    assert!(second.num_workers() == 3 && third.num_workers() == 3);
    drop((open, more));
}
