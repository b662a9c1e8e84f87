//! The object store between real processes: its invariants, OS-1 to OS-10 of `echelon_core::store`.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use echelon_core::role::Role;
use echelon_core::store::{
    Fate, ObjectId, PacketSocket, Refusal, SegmentWriter, Store, StoreAddress, StoreConfig, StoreError, StoreServer,
};
use std::os::fd::AsFd;
use tch::{Device, Kind, Tensor};

const PATIENCE: Duration = Duration::from_secs(30);

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Another process of the host, which is this test program running one test once more. Killed when dropped.
struct Other {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Other {
    fn start(test: &str, part: &str, address: Option<&StoreAddress>) -> Other {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env("ECHELON_TEST_PART", part)
            .env("ECHELON_TEST_STORE", serde_json::to_string(&address).unwrap())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Other { child, lines }
    }

    /// Waits until it says a line that begins with `word`; returns the rest of the line.
    fn says(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "it ended without saying `{word}`");
            // The test harness may have begun the line.
            if let Some(at) = line.find(word) {
                return line[at + word.len()..].trim().to_string();
            }
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// What this process is to do when it is another's.
fn part() -> Option<(String, Option<Store>)> {
    let part = std::env::var("ECHELON_TEST_PART").ok()?;
    let address: Option<StoreAddress> = serde_json::from_str(&std::env::var("ECHELON_TEST_STORE").unwrap()).unwrap();
    let store = address.map(|address| Store::connect(&address, "other process").unwrap());
    Some((part, store))
}

fn sleep_for_ever() -> ! {
    std::thread::sleep(Duration::from_secs(120));
    panic!("nobody killed this process");
}

fn server(capacity_bytes: u64) -> (StoreServer, Store) {
    let server = StoreServer::start(StoreConfig::new(capacity_bytes)).unwrap();
    let store = Store::connect(server.address(), "test").unwrap();
    (server, store)
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = soon();
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// `numel` numbers; every fourth page of them is another.
fn numbers(numel: i64) -> Tensor {
    Tensor::arange(numel, (Kind::Float, Device::Cpu)).sin()
}

fn id(step: u64) -> ObjectId {
    ObjectId::batch("rollout", 0, step)
}

/// An object that takes `pages` whole pages.
fn put_pages(store: &Store, step: u64, pages: i64) -> Result<echelon_core::store::Object, StoreError> {
    store.put(&id(step), &[("x", &Tensor::zeros([pages * 4096 - 1024], (Kind::Uint8, Device::Cpu)))], &[])
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, StoreError>) -> Refusal {
    match result {
        Err(StoreError::Refused(refusal)) => refusal,
        other => panic!("expected a refusal, found {other:?}"),
    }
}

#[test]
fn a_batch_comes_back_as_it_was_put() {
    let (_server, store) = server(1 << 20);
    let tokens = Tensor::from_slice2(&[[1i64, -2, 3], [4, 5, 1 << 40]]);
    let mask = Tensor::from_slice(&[true, false, true]);
    let logprobs = numbers(12).view([3, 4]).transpose(0, 1);
    let none = Tensor::zeros([0, 7], (Kind::Float, Device::Cpu));
    let half = numbers(5).to_kind(Kind::BFloat16);
    let tensors = [("mask", &mask), ("tokens", &tokens), ("logprobs", &logprobs), ("none", &none), ("half", &half)];
    let put = store.put(&id(1), &tensors, &[("policy_version", "7")]).unwrap();
    let got = store.get(&id(1)).unwrap();
    for (name, tensor) in tensors {
        let found = got.tensor(name).unwrap();
        assert_eq!((found.kind(), found.size()), (tensor.kind(), tensor.size()), "{name}");
        assert!(found.equal(tensor), "{name}");
        assert!(found.numel() == 0 || (got.holds(&found) && !got.holds(tensor)), "{name} is no copy");
    }
    assert_eq!((got.metadata("policy_version"), got.metadata("x")), (Some("7"), None));
    assert_eq!(put.bytes(), got.bytes());
    let parsed = safetensors::SafeTensors::deserialize(got.bytes()).unwrap();
    assert_eq!(parsed.len(), 5);
    assert!(got.tensor("other").unwrap_err().to_string().contains("tokens"), "the error lists the tensors");
}

/// OS-2: of the child's pages of the object none is its own, and each is counted half, for two processes have it.
#[test]
fn another_process_maps_the_same_pages() {
    const NUMEL: i64 = 4 << 20;
    let id = ObjectId::weights(Role::Actor, 3);
    if let Some((_, store)) = part() {
        let object = store.unwrap().get(&id).unwrap();
        let tensor = object.tensor("w").unwrap();
        assert!(object.holds(&tensor) && tensor.equal(&numbers(NUMEL)));
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let at = format!("{:x}-", object.bytes().as_ptr() as usize);
        let field = |name: &str| -> u64 {
            let line = smaps.lines().skip_while(|line| !line.starts_with(&at)).find_map(|line| line.strip_prefix(name));
            line.expect("the map is listed").trim().trim_end_matches(" kB").parse().unwrap()
        };
        let [rss, pss, clean, dirty] = ["Rss:", "Pss:", "Private_Clean:", "Private_Dirty:"].map(field);
        println!("counted {rss} {pss} {}", clean + dirty);
        return;
    }
    let (server, store) = server(64 << 20);
    let object = store.put(&id, &[("w", &numbers(NUMEL))], &[]).unwrap();
    // Touched here as well, so that both processes have mapped every page.
    assert!(object.tensor("w").unwrap().equal(&numbers(NUMEL)));
    let mut other = Other::start("another_process_maps_the_same_pages", "map", Some(server.address()));
    let counted = other.says("counted");
    let kilobytes: Vec<i64> = counted.split(' ').map(|number| number.parse().unwrap()).collect();
    let whole = NUMEL * 4 / 1024;
    assert!(kilobytes[0] >= whole && kilobytes[1] <= whole * 6 / 10 && kilobytes[2] <= whole / 100, "{counted}");
    assert!(other.child.wait().unwrap().success());
}

/// OS-5.
#[test]
fn a_killed_client_gives_its_references_back() {
    if let Some((_, store)) = part() {
        let store = store.unwrap();
        let _held = [store.get(&id(1)).unwrap(), store.get(&id(1)).unwrap()];
        let _writing = store.create(&id(9), 8192).unwrap();
        println!("holding");
        sleep_for_ever();
    }
    let (server, store) = server(8 * 4096);
    drop(put_pages(&store, 1, 4).unwrap());
    assert_eq!(store.report().unwrap().num_held, 0);
    let mut other = Other::start("a_killed_client_gives_its_references_back", "hold", Some(server.address()));
    other.says("holding");
    let report = store.report().unwrap();
    assert_eq!((report.num_objects, report.num_held, report.used_bytes), (2, 2, 6 * 4096));
    // OS-6: what it holds is not evicted, and the error says that it is it.
    let text = refused(put_pages(&store, 2, 5)).to_string();
    let pid = other.child.id().to_string();
    assert!(text.contains("other process") && text.contains(&pid) && text.contains("20480 more bytes"), "{text}");
    let text = refused(store.wait_for(&id(9), Duration::from_millis(1))).to_string();
    assert!(text.contains("still bringing it") && text.contains(&pid), "{text}");
    other.kill();
    until("the references come back", || store.report().unwrap().num_held == 0);
    let _object = put_pages(&store, 2, 5).unwrap();
    assert_eq!(refused(store.get(&id(9))), Refusal::Unknown { id: id(9), fate: Fate::NeverPut });
    assert_eq!(refused(store.get(&id(1))), Refusal::Unknown { id: id(1), fate: Fate::Evicted });
}

/// OS-3, OS-8.
#[test]
fn a_killed_server_leaves_nothing_but_what_is_mapped() {
    if let Some((part, _)) = part() {
        assert_eq!(part, "serve");
        let (server, store) = server(64 << 20);
        let _object = store.put(&id(1), &[("x", &numbers(1 << 20))], &[]).unwrap();
        println!("serving {}", serde_json::to_string(server.address()).unwrap());
        sleep_for_ever();
    }
    let files = || std::fs::read_dir("/dev/shm").map_or(0, Iterator::count);
    let before = files();
    let mut other = Other::start("a_killed_server_leaves_nothing_but_what_is_mapped", "serve", None);
    let address: StoreAddress = serde_json::from_str(&other.says("serving")).unwrap();
    let store = Store::connect(&address, "test").unwrap();
    let object = store.get(&id(1)).unwrap();
    let listed = || std::fs::read_to_string("/proc/net/unix").unwrap().contains(&address.socket);
    assert!(listed());
    other.kill();
    assert!(object.tensor("x").unwrap().equal(&numbers(1 << 20)), "it stays mapped");
    let begun = Instant::now();
    let error = store.get(&id(1)).unwrap_err();
    assert!(matches!(error, StoreError::Server { .. }), "{error}");
    assert!(error.to_string().contains("is gone or does not answer"), "{error}");
    assert!(Store::connect(&address, "late").is_err());
    drop(object);
    assert!(begun.elapsed() < Duration::from_secs(5), "nobody waits for the dead");
    assert!(!listed(), "the socket went with its process");
    assert_eq!(files(), before);
}

/// OS-6.
#[test]
fn room_is_made_from_what_nobody_holds_oldest_first() {
    let (_server, store) = server(6 * 4096);
    for step in 1..=3 {
        drop(put_pages(&store, step, 2).unwrap());
    }
    // Used again, so now 2 is the one that was let go first.
    drop(store.get(&id(1)).unwrap());
    let held = put_pages(&store, 4, 2).unwrap();
    assert_eq!(refused(store.get(&id(2))), Refusal::Unknown { id: id(2), fate: Fate::Evicted });
    drop((store.get(&id(3)).unwrap(), store.get(&id(1)).unwrap()));
    // 6 pages and 2 held: nothing is evicted in vain.
    let Refusal::Full { room, .. } = refused(put_pages(&store, 5, 5)) else { panic!() };
    assert_eq!((room.wanted, room.used, room.capacity, room.free_able), (5 * 4096, 6 * 4096, 6 * 4096, 4 * 4096));
    assert_eq!(store.report().unwrap().num_objects, 3);
    let _both = put_pages(&store, 5, 4).unwrap();
    let report = store.report().unwrap();
    assert_eq!((report.num_objects, report.num_held, report.num_evicted), (2, 2, 3));
    drop(held);
}

/// A tensor holds its object: no eviction while one lives, wherever it went.
#[test]
fn tensors_hold_their_object() {
    let (_server, store) = server(4 * 4096);
    let tensor = put_pages(&store, 1, 3).unwrap().tensor("x").unwrap();
    let view = tensor.narrow(0, 5, 3);
    drop(tensor);
    refused(put_pages(&store, 2, 2));
    std::thread::spawn(move || drop(view)).join().unwrap();
    drop(put_pages(&store, 2, 2).unwrap());
}

#[test]
fn an_id_is_used_once_and_removed_for_all() {
    let (_server, store) = server(1 << 20);
    let first = put_pages(&store, 1, 1).unwrap();
    assert!(matches!(refused(put_pages(&store, 1, 1)), Refusal::Exists { .. }));
    store.remove(&id(1)).unwrap();
    assert_eq!(refused(store.get(&id(1))), Refusal::Unknown { id: id(1), fate: Fate::Removed });
    assert_eq!(refused(store.remove(&id(7))), Refusal::Unknown { id: id(7), fate: Fate::NeverPut });
    assert_eq!(store.report().unwrap().used_bytes, 4096, "its holder keeps it");
    assert!(first.tensor("x").is_ok());
    drop(first);
    until("it goes with its last reference", || store.report().unwrap().used_bytes == 0);
    let long = ObjectId::batch(&"x".repeat(5000), 0, 1);
    refused(store.get(&long));
    refused(store.create(&long, 8));
    // A writer that gives up leaves room and id.
    drop(store.create(&id(2), 1 << 20).unwrap());
    drop(store.create(&id(2), 1 << 20).unwrap());
}

/// OS-6: what was handed over waits for its reader, and goes with it.
#[test]
fn what_is_handed_over_is_taken_once() {
    let (_server, store) = server(4 * 4096);
    let tensor = numbers(1000);
    let hand_over = |step| store.write(&id(step), &[("x", &tensor)], &[]).unwrap().hand_over();
    hand_over(1).unwrap();
    hand_over(2).unwrap();
    assert!(matches!(refused(store.write(&id(3), &[("x", &tensor)], &[])), Refusal::Full { .. }), "nothing is evicted");
    let taken = store.take(&id(1)).unwrap();
    assert_eq!(taken.tensor("x").unwrap(), tensor);
    for gone in [store.take(&id(1)), store.get(&id(1))] {
        assert!(matches!(refused(gone), Refusal::Unknown { fate: Fate::Removed, .. }), "nobody else gets it");
    }
    let kept = taken.tensor("x").unwrap();
    drop(taken);
    assert_eq!(store.report().unwrap().num_held, 2, "a tensor holds it");
    drop(kept);
    assert_eq!(store.report().unwrap().num_objects, 1);
    store.remove(&id(2)).unwrap();
    assert_eq!(store.report().unwrap().used_bytes, 0, "what is never taken can be removed");
}

#[test]
fn an_object_is_waited_for_until_a_deadline() {
    let (server, store) = server(1 << 20);
    let begun = Instant::now();
    let text = refused(store.wait_for(&id(1), Duration::from_millis(50))).to_string();
    assert!(begun.elapsed() >= Duration::from_millis(50) && text.contains("never put"), "{text}");
    let address = server.address().clone();
    let late =
        std::thread::spawn(move || Store::connect(&address, "late").unwrap().wait_for(&id(1), PATIENCE).unwrap());
    until("it waits", || store.report().unwrap().num_connections == 2);
    let put = put_pages(&store, 1, 1).unwrap();
    assert_eq!(late.join().unwrap().bytes(), put.bytes());
}

/// OS-7: threads and processes ask at once; one brings it, and all have it.
#[test]
fn of_many_who_miss_an_object_one_fetches_it() {
    let fetch = |store: &Store, fetched: &AtomicUsize| {
        let object = store.get_or_fetch(&id(1), PATIENCE, |claim| {
            fetched.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(100));
            let bytes = safetensors(&[1, 2, 3]);
            let mut writer = claim.allocate(bytes.len())?;
            writer.bytes().copy_from_slice(&bytes);
            Ok(writer)
        });
        assert!(object.unwrap().tensor("x").unwrap().equal(&Tensor::from_slice(&[1u8, 2, 3])));
    };
    let fetched = AtomicUsize::new(0);
    if let Some((_, store)) = part() {
        fetch(&store.unwrap(), &fetched);
        println!("fetched {}", fetched.load(Ordering::SeqCst));
        return;
    }
    let (server, store) = server(1 << 20);
    let name = "of_many_who_miss_an_object_one_fetches_it";
    let mut others = [0; 2].map(|_| Other::start(name, "fetch", Some(server.address())));
    std::thread::scope(|scope| {
        (0..6).for_each(|_| drop(scope.spawn(|| fetch(&store, &fetched))));
    });
    let elsewhere: usize = others.iter_mut().map(|other| other.says("fetched").parse::<usize>().unwrap()).sum();
    assert_eq!(fetched.load(Ordering::SeqCst) + elsewhere, 1);
}

/// OS-7: who fails or dies passes the claim on.
#[test]
fn a_failed_fetch_is_the_next_ones_turn() {
    if let Some((_, store)) = part() {
        let _never = store.unwrap().get_or_fetch(&id(1), PATIENCE, |claim| {
            let _writer = claim.allocate(100)?;
            println!("fetching");
            sleep_for_ever();
        });
        return;
    }
    let (server, store) = server(1 << 20);
    let error = store.get_or_fetch(&id(1), PATIENCE, |_| Err("the other host is gone".into())).unwrap_err();
    assert!(error.to_string().contains("the other host is gone"), "{error}");
    let mut other = Other::start("a_failed_fetch_is_the_next_ones_turn", "fetch", Some(server.address()));
    other.says("fetching");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            store.get_or_fetch(&id(1), PATIENCE, |claim| {
                let bytes = safetensors(&[7]);
                let mut writer = claim.allocate(bytes.len())?;
                writer.bytes().copy_from_slice(&bytes);
                Ok(writer)
            })
        });
        other.kill();
        assert_eq!(waiting.join().unwrap().unwrap().names(), ["x"]);
    });
}

fn safetensors(bytes: &[u8]) -> Vec<u8> {
    let n = bytes.len();
    let header = format!(r#"{{"x":{{"dtype":"U8","shape":[{n}],"data_offsets":[0,{n}]}}}}"#);
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), bytes].concat()
}

/// OS-4. The second half speaks the protocol by hand, as a client would that skips the checks of its own side.
#[test]
fn damaged_objects_are_errors_on_both_sides() {
    let (server, store) = server(1 << 20);
    let mut writer = store.create(&id(1), 64).unwrap();
    writer.bytes().fill(0xff);
    assert!(matches!(writer.finish().unwrap_err(), StoreError::Damaged { .. }));
    assert_eq!(store.report().unwrap().num_objects, 0);

    let bad_bool = safetensors(&[1, 2]);
    let bad_bool = String::from_utf8(bad_bool).unwrap().replace(r#""U8","#, r#""BOOL","#);
    let mut bad_bool = bad_bool.into_bytes();
    let header = bad_bool.len() as u64 - 8 - 2;
    bad_bool[..8].copy_from_slice(&header.to_le_bytes());
    let socket = greeted(server.address());
    for (step, bytes) in [(2, vec![0xff; 64]), (3, bad_bool)] {
        let mut segment = SegmentWriter::create("hostile", bytes.len()).unwrap();
        segment.bytes().copy_from_slice(&bytes);
        let segment = segment.seal().unwrap();
        let name = serde_json::to_string(&id(step)).unwrap();
        ask(&socket, &format!(r#"{{"Reserve":{{"id":{name},"bytes":{}}}}}"#, bytes.len()), None, "Done");
        ask(&socket, &format!(r#"{{"Commit":{{"id":{name},"hand_over":false}}}}"#), Some(segment.as_fd()), "Done");
    }
    assert!(matches!(store.get(&id(2)).unwrap_err(), StoreError::Damaged { .. }));
    let error = store.get(&id(3)).unwrap().tensor("x").unwrap_err().to_string();
    assert!(error.contains("neither 0 nor 1"), "{error}");

    // OS-1: memory that could change, or that is of another size than was reserved, is not taken.
    let live = SegmentWriter::create("live", 4096).unwrap().share().unwrap();
    let name = serde_json::to_string(&id(4)).unwrap();
    ask(&socket, &format!(r#"{{"Reserve":{{"id":{name},"bytes":4096}}}}"#), None, "Done");
    let commit = format!(r#"{{"Commit":{{"id":{name},"hand_over":false}}}}"#);
    ask(&socket, &commit, Some(live.segment().as_fd()), "not sealed");
    ask(&socket, &commit, None, "no memory came with it");
    let small = SegmentWriter::create("small", 1).unwrap().seal().unwrap();
    ask(&socket, &commit, Some(small.as_fd()), "NotReserved");
}

/// A connection that has said the token.
fn greeted(address: &StoreAddress) -> PacketSocket {
    let socket = PacketSocket::connect(&address.socket, soon()).unwrap();
    let token = serde_json::to_string(&address.token).unwrap();
    ask(&socket, &format!(r#"{{"Hello":{{"version":2,"token":{token},"name":"hostile"}}}}"#), None, "Done");
    socket
}

#[track_caller]
fn ask(socket: &PacketSocket, message: &str, fd: Option<std::os::fd::BorrowedFd>, expected: &str) {
    socket.send(message.as_bytes(), fd, soon()).unwrap();
    let mut buffer = [0; 8192];
    let packet = socket.receive(&mut buffer, soon()).unwrap();
    let answer = String::from_utf8_lossy(&buffer[..packet.len]);
    assert!(answer.contains(expected), "{message}: {answer}");
}

/// OS-9.
#[test]
fn strangers_and_bad_clients_cost_little_and_hang_nobody() {
    let (server, store) = server(1 << 20);
    let address = server.address();
    let connect = || PacketSocket::connect(&address.socket, soon()).unwrap();
    let gone = |socket: &PacketSocket| {
        until("it is let go", || match socket.try_receive(&mut [0; 8192]) {
            Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
            Ok(_) => false,
        });
    };
    let silent: Vec<PacketSocket> = (0..200).map(|_| connect()).collect();
    let object = put_pages(&store, 1, 1).unwrap();
    assert_eq!(Store::connect(address, "honest").unwrap().get(&id(1)).unwrap().bytes(), object.bytes());
    let report = store.report().unwrap();
    assert!(report.num_connections <= 64 + 4, "{report:?}");
    gone(&silent[0]);

    let token = serde_json::to_string(&address.token).unwrap();
    let hello = |token: &str, version: u32, name: &str| {
        format!(r#"{{"Hello":{{"version":{version},"token":{token},"name":"{name}"}}}}"#).into_bytes()
    };
    let wrong = format!("\"{}\"", "0".repeat(64));
    let long_name = "n".repeat(100);
    for message in [
        hello(&wrong, 2, "x"),
        hello("\"\"", 2, "x"),
        hello(&token, 1, "x"),
        hello(&token, 2, &long_name),
        br#""Report""#.to_vec(),
        vec![0; 8000],
        vec![b'['; 100_000],
    ] {
        let socket = connect();
        socket.send(&message, None, soon()).unwrap();
        gone(&socket);
    }
    // In, and misbehaving: letting go of what it does not hold; asking on without taking its answers.
    let name = serde_json::to_string(&id(1)).unwrap();
    let socket = greeted(address);
    socket.send(format!(r#"{{"Release":{{"id":{name}}}}}"#).as_bytes(), None, soon()).unwrap();
    gone(&socket);
    let socket = greeted(address);
    let flood = format!(r#"{{"Get":{{"id":{name},"wait_ms":0,"claim":false,"take":false}}}}"#);
    until("the flood ends", || socket.send(flood.as_bytes(), None, soon()).is_err());
    drop(socket);

    drop(object);
    until("nothing is held", || store.report().unwrap().num_held == 0);
    let mut wrong = serde_json::to_value(address).unwrap();
    wrong["token"] = "0".into();
    let error = Store::connect(&serde_json::from_value(wrong).unwrap(), "wrong").unwrap_err().to_string();
    assert!(error.contains("the token is not this run's"), "{error}");
}

/// The token never shows where addresses are printed.
#[test]
fn a_printed_address_keeps_the_secret() {
    let (server, _store) = server(4096);
    let secret = serde_json::to_value(server.address()).unwrap()["token"].as_str().unwrap().to_string();
    assert_eq!(secret.len(), 64);
    assert!(!format!("{:?}", server.address()).contains(&secret));
}

/// Many threads use one client at once: each call has a connection to itself, and none is left over.
#[test]
fn threads_share_a_client() {
    let (_server, store) = server(1 << 20);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let store = &store;
            scope.spawn(move || {
                for step in 0..20 {
                    let object = put_pages(store, thread * 100 + step, 1).unwrap();
                    assert_eq!(store.get(object.id()).unwrap().bytes(), object.bytes());
                }
            });
        }
    });
    until("all is let go", || store.report().unwrap().num_held == 0);
    assert!(store.report().unwrap().num_connections <= 9);
}
