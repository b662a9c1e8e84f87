//! A PyTorch process is a rank like any other: same store, same prefix, same wire.
//!
//! Runs where a Python with PyTorch is at hand: `ECHELON_PYTHON` names it, or plain `python3` has it.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use tch::{Kind, Tensor};

const LOOPBACK: &str = "127.0.0.1";
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python_peer.py");

/// A Python that has PyTorch; one that was named has to.
fn python() -> Option<String> {
    let named = std::env::var("ECHELON_PYTHON").ok();
    let python = named.clone().unwrap_or_else(|| "python3".into());
    let imports = Command::new(&python).args(["-c", "import torch.distributed"]).output();
    let found = imports.is_ok_and(|output| output.status.success());
    assert!(found || named.is_none(), "ECHELON_PYTHON={python} has no PyTorch");
    found.then_some(python)
}

/// Ends the process when the test does, however that is.
struct Peer(Option<Child>);

impl Peer {
    fn finish(mut self) -> String {
        let output = self.0.take().unwrap().wait_with_output().unwrap();
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{stderr}");
        stdout.into_owned()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
}

/// What one rank does; python_peer.py does the same as the last one.
fn take_part(group: &ProcessGroup) {
    let (rank, size) = (group.rank(), group.size());
    let of_rank = |rank: usize| [rank as f64 + 0.5, -(rank as f64), 3.0];
    for kind in [Kind::Float, Kind::BFloat16] {
        let mine = Tensor::from_slice(&of_rank(rank)).to_kind(kind);

        let total = mine.copy();
        group.all_reduce_sum("sum", &total).unwrap();
        let ranks: f64 = (0..size).map(|rank| rank as f64).sum();
        assert_eq!(values(&total), [ranks + 0.5 * size as f64, -ranks, 3.0 * size as f64], "{kind:?}");

        let gathered = Tensor::zeros([3 * size as i64], (kind, tch::Device::Cpu));
        group.start_all_gather("gather", &gathered, &mine).unwrap().wait().unwrap();
        assert_eq!(values(&gathered), (0..size).flat_map(of_rank).collect::<Vec<_>>(), "{kind:?}");

        let parts: Vec<f64> = (0..size).map(|to| 10.0 * rank as f64 + to as f64).collect();
        let exchanged = group.all_to_all("exchange", &Tensor::from_slice(&parts).to_kind(kind)).unwrap();
        let expected: Vec<f64> = (0..size).map(|from| 10.0 * from as f64 + rank as f64).collect();
        assert_eq!(values(&exchanged), expected, "{kind:?}");

        for root in [0, size - 1] {
            let sent = mine.copy();
            group.broadcast("broadcast", &sent, root).unwrap();
            assert_eq!(values(&sent), of_rank(root), "{kind:?} from {root}");
        }

        if rank == 0 {
            let received = mine.zeros_like();
            group.recv("take", &received, size - 1, 7).unwrap();
            assert_eq!(values(&received), of_rank(size - 1), "{kind:?}");
            group.send("hand over", &mine, size - 1, 8).unwrap();
        }
    }
    group.barrier("end").unwrap();
}

#[test]
fn a_pytorch_process_is_a_rank_like_any_other() {
    let Some(python) = python() else {
        eprintln!("not run: no Python with PyTorch; name one with ECHELON_PYTHON");
        return;
    };
    let point = MeetingPoint::serve(LOOPBACK, 0).unwrap();
    let (size, port) = (3, point.port().to_string());
    let arguments = [SCRIPT, LOOPBACK, &port, "with python", "2", "3"];
    let child = Command::new(python).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let peer = Peer(Some(child));
    // Importing PyTorch takes a while on a busy machine.
    let patience = Patience { join: Duration::from_secs(120), ..Patience::default() };
    std::thread::scope(|scope| {
        for rank in 0..size - 1 {
            let port = point.port();
            scope.spawn(move || {
                let point = MeetingPoint::join(LOOPBACK, port, patience).unwrap();
                take_part(&ProcessGroup::join(&point, "with python", (rank, size), LOOPBACK, patience).unwrap());
            });
        }
    });
    assert_eq!(peer.finish().trim(), "ok");
}
