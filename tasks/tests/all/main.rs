//! Data and rewards as their callers meet them: real files, servers on the loopback interface, child processes.

mod command;
mod data;
mod order;
mod sentiment;
mod url;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use echelon_tasks::reward::RewardRequest;

/// A folder of a test's own, gone with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("tasks-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// `count` requests that differ: prompt `p0`, response ` r0`, label `0` and so on.
fn requests(count: usize) -> Vec<RewardRequest> {
    let request = |index: usize| RewardRequest {
        prompt: format!("p{index}"),
        response: format!(" r{index}"),
        label: (index % 3 != 2).then(|| index.to_string()),
        num_response_tokens: index,
        finished: true,
    };
    (0..count).map(request).collect()
}
