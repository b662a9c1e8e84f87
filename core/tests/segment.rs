//! Segments, within one process and from one process to another: docs of `store::segment`.

use std::io::{Error, ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use echelon_core::store::{
    LiveSegment, PacketListener, PacketSocket, Segment, SegmentError, SegmentMap, SegmentWriter,
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// This test program once more, running only the test `name` in the part of the other process.
fn other_process(name: &str, socket: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("ECHELON_TEST_SOCKET", socket)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The socket's name when this is the other process.
fn in_other_process() -> Option<String> {
    std::env::var("ECHELON_TEST_SOCKET").ok()
}

fn unique(name: &str) -> String {
    format!("echelon-test-{name}-{}", std::process::id())
}

fn receive(socket: &PacketSocket) -> OwnedFd {
    let packet = socket.receive(&mut [0; 64], soon()).unwrap();
    packet.fd.expect("a descriptor")
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

fn sealed(bytes: &[u8]) -> Segment {
    let mut writer = SegmentWriter::create("test", bytes.len()).unwrap();
    writer.bytes().copy_from_slice(bytes);
    writer.seal().unwrap()
}

#[test]
fn sealed_bytes_arrive_in_another_process_and_outlive_their_writer() {
    const LEN: usize = 3_000_001;
    if let Some(name) = in_other_process() {
        let socket = PacketSocket::connect(&name, soon()).unwrap();
        let map = Segment::from_fd(receive(&socket)).unwrap().map().unwrap();
        // The writer has closed and unmapped everything when it says so.
        socket.receive(&mut [0; 64], soon()).unwrap();
        assert!(map[..] == pattern(LEN));
        println!("same bytes");
        return;
    }
    let name = unique("sealed");
    let listener = PacketListener::bind(&name).unwrap();
    let mut child = other_process("sealed_bytes_arrive_in_another_process_and_outlive_their_writer", &name);
    let socket = listener.accept(soon()).unwrap();
    assert_eq!(socket.peer().unwrap().pid as u32, child.id());
    let segment = sealed(&pattern(LEN));
    socket.send(b"segment", Some(segment.as_fd()), soon()).unwrap();
    drop(segment);
    socket.send(b"it is yours", None, soon()).unwrap();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success() && said.contains("same bytes"), "{said}");
}

/// What the writer writes after the other process mapped the segment shows there: both have the same physical pages.
#[test]
fn a_live_segment_shows_later_writes_in_another_process() {
    const LEN: usize = 1 << 20;
    if let Some(name) = in_other_process() {
        let socket = PacketSocket::connect(&name, soon()).unwrap();
        let segment = LiveSegment::from_fd(receive(&socket)).unwrap();
        let map = segment.map().unwrap();
        assert_eq!((map.num_bytes(), map.word(0), map.word(LEN - 8)), (LEN, 0, 0));
        socket.send(b"mapped", None, soon()).unwrap();
        while map.word(0) != 7 {
            assert!(Instant::now() < soon());
            std::thread::yield_now();
        }
        // SAFETY: the map has this many bytes; version 7 says that the writer is done.
        let bytes = unsafe { std::slice::from_raw_parts(map.as_ptr(), map.num_bytes()) };
        assert!(bytes[8..] == pattern(LEN)[8..]);
        println!("seen");
        return;
    }
    let name = unique("live");
    let listener = PacketListener::bind(&name).unwrap();
    let mut child = other_process("a_live_segment_shows_later_writes_in_another_process", &name);
    let mut writer = SegmentWriter::create("live", LEN).unwrap().share().unwrap();
    let socket = listener.accept(soon()).unwrap();
    socket.send(b"segment", Some(writer.segment().as_fd()), soon()).unwrap();
    socket.receive(&mut [0; 64], soon()).unwrap();
    writer.bytes()[8..].copy_from_slice(&pattern(LEN)[8..]);
    writer.set_word(0, 7);
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success() && said.contains("seen"), "{said}");
}

#[test]
fn nobody_writes_to_what_is_sealed_or_shared() {
    let segment = sealed(b"for ever");
    let live = SegmentWriter::create("live", 8).unwrap().share().unwrap();
    for fd in [segment.as_fd(), live.segment().as_fd()] {
        // SAFETY: never dereferenced, and refused.
        let map = unsafe { memmap2::MmapOptions::new().len(8).map_mut(&fd) };
        assert_eq!(map.err().map(|error| error.kind()), Some(ErrorKind::PermissionDenied));
        assert!(rustix::fs::ftruncate(fd, 0).is_err());
        assert!(rustix::io::pwrite(fd, b"x", 0).is_err());
    }
    assert_eq!(&segment.map().unwrap()[..], b"for ever");
}

#[test]
fn what_could_change_under_a_reader_is_refused() {
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let unsealed = || rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    let live = SegmentWriter::create("live", 8).unwrap().share().unwrap();
    let live_fd = live.segment().as_fd().try_clone_to_owned().unwrap();
    for fd in [OwnedFd::from(file), unsealed(), live_fd] {
        assert!(matches!(Segment::from_fd(fd), Err(SegmentError::Foreign(_))));
    }
    let sealed_fd = sealed(b"x").as_fd().try_clone_to_owned().unwrap();
    assert!(matches!(LiveSegment::from_fd(sealed_fd), Err(SegmentError::Foreign(_))), "it has no writer");
    assert!(matches!(LiveSegment::from_fd(unsealed()), Err(SegmentError::Foreign(_))));
}

#[test]
fn too_little_memory_is_an_error_with_the_numbers() {
    let error = SegmentWriter::create("weights of actor", 1 << 46).unwrap_err();
    let SegmentError::NoMemory { needed, available, .. } = &error else { panic!("{error}") };
    assert!(*needed == 1 << 46 && *available < 1 << 46);
    let text = error.to_string();
    assert!(text.contains("weights of actor") && text.contains("70368744177664 bytes needed"), "{text}");
    assert!(SegmentWriter::create("nothing", 0).is_err());
}

/// The limit is set in another process, for it can never be taken back.
#[test]
fn a_limit_of_this_process_is_an_error_and_no_signal() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    if in_other_process().is_some() {
        setrlimit(Resource::Fsize, Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) }).unwrap();
        let error = SegmentWriter::create("batch", (1 << 20) + 1).unwrap_err().to_string();
        assert!(error.contains("1048577 bytes needed, 1048576 bytes available (`ulimit -f`)"), "{error}");
        SegmentWriter::create("batch", 1 << 20).unwrap();
        return;
    }
    let child = other_process("a_limit_of_this_process_is_an_error_and_no_signal", "none");
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn messages_are_whole_or_refused() {
    let (a, b) = PacketSocket::pair().unwrap();
    a.send(b"one", None, soon()).unwrap();
    a.send(&[7; 100], None, soon()).unwrap();
    let mut buffer = [0; 64];
    assert_eq!(b.receive(&mut buffer, soon()).unwrap().len, 3);
    let kind = |error: Error| error.kind();
    assert_eq!(b.try_receive(&mut buffer).map_err(kind).unwrap_err(), ErrorKind::InvalidData);
    assert_eq!(b.try_receive(&mut buffer).map_err(kind).unwrap_err(), ErrorKind::WouldBlock);
    let begun = Instant::now();
    let deadline = begun + Duration::from_millis(20);
    assert_eq!(b.receive(&mut buffer, deadline).map_err(kind).unwrap_err(), ErrorKind::TimedOut);
    assert!(begun.elapsed() >= Duration::from_millis(20));
    drop(a);
    assert_eq!(b.receive(&mut buffer, soon()).map_err(kind).unwrap_err(), ErrorKind::UnexpectedEof);
    assert!(PacketSocket::connect(&unique("nobody"), soon()).is_err());
}

#[test]
fn maps_are_shared_between_threads() {
    fn shared<T: Send + Sync + 'static>() {}
    shared::<SegmentMap>();
    shared::<Segment>();
    shared::<PacketSocket>();
}
