//! The threads that run the tasks of this node.
//!
//! A thread takes what may begin, runs it, and takes again; it sleeps when nothing may begin. One sleeper at a time is woken,
//! and wakes the next if there is more: a burst of small tasks costs few wake-ups.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::demand::NodeConfig;
use super::schedule::Entry;
use super::tasks::{Core, OWN, Queued, State, run_all};

/// Threads beyond the node's CPUs end after so long without work: they are for tasks that demand less than one.
const IDLE: Duration = Duration::from_secs(5);

/// Who is there.
pub(super) struct Pool {
    /// One per CPU stays; as many as there are slots may run.
    lasting: usize,
    most: usize,
    threads: usize,
    idle: usize,
    /// Sleepers that were woken, and threads that were started, and have not looked for work yet.
    waking: usize,
}

impl Pool {
    pub fn new(node: &NodeConfig) -> Pool {
        let most = node.slots.max(1);
        let lasting = (node.num_cpus.ceil() as usize).clamp(1, most);
        Pool { lasting, most, threads: 0, idle: 0, waking: 0 }
    }
}

impl Core {
    /// Sees to it that somebody looks for work if there is any; whether a sleeper has to be notified.
    pub fn rouse(self: &Arc<Core>, state: &mut State) -> bool {
        let State { schedule, pool, .. } = state;
        if pool.waking > 0 || !schedule.can_start(OWN) {
            return false;
        }
        if pool.idle > 0 {
            pool.waking += 1;
            return true;
        }
        if pool.threads < pool.most
            && let Err(error) = self.start_thread(state)
        {
            tracing::warn!(%error, "no more threads for tasks"); // those that are there will come to it
        }
        false
    }

    /// Starts a thread, which looks for work.
    pub fn start_thread(self: &Arc<Core>, state: &mut State) -> std::io::Result<()> {
        let core = self.clone();
        let named = std::thread::Builder::new().name(format!("task-{}", state.pool.threads));
        named.spawn(move || core.work())?;
        state.pool.threads += 1;
        state.pool.waking += 1;
        Ok(())
    }

    /// A thread's life.
    fn work(self: &Arc<Core>) {
        let (mut batch, mut dead) = (Vec::new(), Vec::new());
        let mut ended = None;
        let mut last: Option<Queued> = None;
        let mut looks = false;
        let mut state = self.lock();
        loop {
            if !std::mem::replace(&mut looks, true) {
                state.pool.waking = state.pool.waking.saturating_sub(1);
            }
            if let Some((started, ran, ran_ns)) = ended.take() {
                state.schedule.end(started, ran, ran_ns, 0);
            }
            let started = if state.closed { None } else { state.schedule.start(OWN, &mut batch, &mut dead) };
            if let Some(started) = started {
                let wakes = self.rouse(&mut state);
                drop(state);
                if wakes {
                    self.wake.notify_one();
                }
                settle(&mut last, &mut dead);
                let begun = Instant::now();
                let (ran, queued) = run_all(&mut batch, started.gpus(), self);
                ended = Some((started, ran, begun.elapsed().as_nanos() as u64));
                last = queued;
                state = self.lock();
                continue;
            }
            if last.is_some() || !dead.is_empty() {
                drop(state);
                settle(&mut last, &mut dead);
                state = self.lock();
                continue;
            }
            if state.closed {
                state.pool.threads -= 1;
                return;
            }
            state.pool.idle += 1;
            let (woken, slept) = self.wake.wait_timeout(state, IDLE).expect("never held over a panic");
            state = woken;
            state.pool.idle -= 1;
            if slept.timed_out() && state.pool.waking == 0 && state.pool.threads > state.pool.lasting {
                state.pool.threads -= 1;
                return;
            }
            looks = false;
        }
    }
}

/// Delivers the value of the last task, and lets go of what was cancelled; neither may hold the lock.
fn settle(last: &mut Option<Queued>, dead: &mut Vec<Entry<Queued>>) {
    // What a closure has captured may panic when it is dropped; that is no reason for this thread to end.
    let settled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        if let Some(last) = last.take() {
            last.deliver();
        }
        dead.clear();
    }));
    if settled.is_err() {
        tracing::error!("what a task had captured panicked when it was dropped");
    }
}
