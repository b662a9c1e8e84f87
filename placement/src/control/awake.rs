//! Keeps a control thread polling for a moment after a message, where it would sleep: a bare exchange over TCP between two
//! processes takes 71 µs where each sleeps, and 10 µs where each polls (a virtual machine, docs/log.md).

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Longer than a call that is answered at once, and nothing beside one that computes.
pub(crate) const MOMENT: Duration = Duration::from_micros(100);

static START: LazyLock<Instant> = LazyLock::new(Instant::now);
/// In nanoseconds from [`START`].
static UNTIL: AtomicU64 = AtomicU64::new(0);
static BEGINS: Notify = Notify::const_new();

/// A call or an answer has come or gone: another may follow at once.
pub(crate) fn stay_awake() {
    UNTIL.store((START.elapsed() + MOMENT).as_nanos() as u64, Ordering::Relaxed);
    BEGINS.notify_waiters();
}

/// Runs on every runtime of [`runtime`](super::runtime).
pub(super) async fn keep_awake() {
    loop {
        let begins = BEGINS.notified();
        tokio::pin!(begins);
        begins.as_mut().enable();
        while (START.elapsed().as_nanos() as u64) < UNTIL.load(Ordering::Relaxed) {
            tokio::task::yield_now().await; // looks after sockets without waiting for them
        }
        begins.await;
    }
}
