//! How ranks find each other: a store that one of them serves, and the generations of a group that meets there.
//!
//! Under its name a group keeps in the store:
//!
//! * `NAME/generation`: counts the groups that met under this name before. A group that failed, or that a rank has left, is
//!   over: whoever joins next joins the next generation, and reads none of its keys.
//! * `NAME/GENERATION/joined/RANK`: how many workers claimed the rank.
//! * `NAME/GENERATION/present`: how many ranks wait for the others; the generation meets when all are there.
//! * `NAME/GENERATION/standing/RANK`: how far a rank is, every second. `NAME/GENERATION/failure`: why the first rank gave up.
//! * `NAME/GENERATION/connecting/RANK` and `connected/RANK`: how far a rank's GPU is with its connections to the others'.
//! * whatever c10d's Gloo keeps for itself, under the prefix `NAME/GENERATION`.
//!
//! A process of another program, such as a PyTorch one, joins by the same steps: read `generation` (add 0), add 1 to
//! `joined/RANK` and to `present`, and make a `ProcessGroupGloo` over the store with that prefix.

use std::net::TcpListener;
use std::os::fd::IntoRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::collective::ffi;
use crate::error::{Error, Result};
use crate::shim::torch_error;

/// How long ranks wait for each other.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For all ranks to join.
    pub join: Duration,
    /// For a rank that others wait for and that makes no progress.
    pub progress: Duration,
    /// Between two reminders of who has not joined yet (a warning of `tracing`).
    pub remind: Duration,
}

impl Default for Patience {
    /// For workers that we start.
    fn default() -> Patience {
        let half_a_minute = Duration::from_secs(30);
        Patience { join: half_a_minute, progress: half_a_minute, remind: half_a_minute }
    }
}

impl Patience {
    /// For workers that a scheduler starts, when it has room for them.
    pub fn scheduled() -> Patience {
        Patience { join: Duration::from_secs(600), ..Patience::default() }
    }
}

/// Where ranks meet before they are a group: a key-value store over TCP that one of them serves. Clones share one connection,
/// on which a rank that waits keeps others waiting: ranks that are threads of one process each open their own.
#[derive(Clone)]
pub struct MeetingPoint {
    pub(super) store: Arc<cxx::UniquePtr<ffi::MeetingStore>>,
    host: String,
}

impl MeetingPoint {
    /// Serves the store on `host`; port 0 takes a free one.
    ///
    /// # Errors
    /// The port is in use, or the host is not this machine's.
    pub fn serve(host: &str, port: u16) -> Result<MeetingPoint> {
        let failed = |error| Error::other(format!("serving the meeting point {host}:{port}"), error);
        let listener = TcpListener::bind((host, port)).map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        MeetingPoint::open(host, port, Some(listener), Duration::from_secs(10))
    }

    /// Connects to the store that another rank serves.
    ///
    /// # Errors
    /// Nobody answers there within `patience.join`.
    pub fn join(host: &str, port: u16, patience: Patience) -> Result<MeetingPoint> {
        MeetingPoint::open(host, port, None, patience.join)
    }

    fn open(host: &str, port: u16, listener: Option<TcpListener>, timeout: Duration) -> Result<MeetingPoint> {
        let serves = listener.is_some();
        let listener = listener.map_or(-1, IntoRawFd::into_raw_fd); // c10d closes it
        let store = ffi::meet_at(host, port, listener, milliseconds(timeout)).map_err(|error| {
            let what = if serves { "serving the meeting point" } else { "connecting to the meeting point" };
            Error::other(format!("{what} {host}:{port}"), torch_error(error))
        })?;
        Ok(MeetingPoint { store: Arc::new(store), host: host.into() })
    }

    pub fn port(&self) -> u16 {
        self.store.port()
    }

    /// Leaves a word for whoever asks for `key`.
    ///
    /// # Errors
    /// The store is gone.
    pub fn tell(&self, key: &str, word: &str) -> Result<()> {
        let what = || format!("telling `{key}` at {}", self.address());
        self.store.set(key, word.as_bytes()).map_err(|error| Error::other(what(), torch_error(error)))
    }

    /// The word that another rank tells under `key`, once it has.
    ///
    /// # Errors
    /// Nobody tells it within `patience.join`.
    pub fn hear(&self, key: &str, patience: Patience) -> Result<String> {
        let what = || format!("waiting for `{key}` at {}", self.address());
        let word = self.store.get(key, milliseconds(patience.join));
        let word = word.map_err(|error| Error::other(what(), torch_error(error)))?;
        String::from_utf8(word).map_err(|error| Error::other(what(), error))
    }

    fn address(&self) -> String {
        format!("{}:{}", self.host, self.port())
    }
}

/// A rank's seat in one generation of a group.
pub(super) struct Seat<'a> {
    pub at: &'a MeetingPoint,
    pub name: &'a str,
    pub rank: usize,
    pub size: usize,
    pub patience: Patience,
}

/// A generation of the group `name` at a meeting point.
#[derive(Clone)]
pub(super) struct Generation {
    store: Arc<cxx::UniquePtr<ffi::MeetingStore>>,
    name: String,
    number: i64,
}

impl Generation {
    /// What all its keys begin with.
    pub fn prefix(&self) -> String {
        format!("{}/{}", self.name, self.number)
    }

    pub fn key(&self, what: &str) -> String {
        format!("{}/{}/{what}", self.name, self.number)
    }

    pub fn store(&self) -> &ffi::MeetingStore {
        &self.store
    }

    fn is_over(&self) -> std::result::Result<bool, cxx::Exception> {
        Ok(self.store.add(&format!("{}/generation", self.name), 0)? > self.number)
    }

    /// Whoever joins from now on joins the next generation. Without a store there is none to join.
    pub fn end(&self, rank: usize) {
        let _ = self.store.advance(&format!("{}/generation", self.name), self.number);
        let _ = self.store.remove(&self.key(&format!("joined/{rank}")));
        let _ = self.store.remove(&self.key(&format!("standing/{rank}")));
    }

    /// Says why this generation is given up; the first to say so is heard.
    pub fn report_failure(&self, reason: &str) {
        let key = self.key("failure");
        if !self.store.has(&key).unwrap_or(true) {
            let _ = self.store.set(&key, reason.as_bytes());
        }
    }

    /// Says that this rank's GPU begins to connect with the others'.
    pub fn tell_connecting(&self, rank: usize) {
        let _ = self.store.set(&self.key(&format!("connecting/{rank}")), b"");
    }

    /// Says that it has.
    pub fn tell_connected(&self, rank: usize) {
        let _ = self.store.set(&self.key(&format!("connected/{rank}")), b"");
    }

    /// Whose GPUs the others wait for: those that have not begun to connect; where all have, those that are not through.
    pub fn unconnected(&self, size: usize, waited: Duration) -> String {
        let silent = |what: &str| -> Vec<usize> {
            let key = |rank: &usize| self.key(&format!("{what}/{rank}"));
            (0..size).filter(|rank| !self.store.has(&key(rank)).unwrap_or(true)).collect()
        };
        let (absent, unfinished, waited) = (silent("connecting"), silent("connected"), waited.as_secs());
        match absent.is_empty() {
            true => format!(
                "GPUs do not connect within {waited} s: {} not through; NCCL_DEBUG=INFO says what NCCL tries",
                name_ranks(&unfinished)
            ),
            false => format!("GPUs do not connect within {waited} s: {} did not begin to", name_ranks(&absent)),
        }
    }

    /// Why the first rank gave this generation up, where one did.
    pub fn failure(&self) -> Option<String> {
        let key = self.key("failure");
        let told = self.store.has(&key).ok()?.then(|| self.store.get(&key, 1000).ok())??;
        String::from_utf8(told).ok()
    }
}

impl Seat<'_> {
    /// Waits until every rank of a generation is present.
    ///
    /// # Errors
    /// Not within `patience.join`: the missing ranks, or that another worker sits here.
    pub fn meet(&self) -> Result<Generation> {
        let begun = Instant::now();
        loop {
            if let Some(met) = self.meet_now(begun)? {
                return Ok(met);
            }
        }
    }

    /// None when the generation ended while this rank waited.
    fn meet_now(&self, begun: Instant) -> Result<Option<Generation>> {
        let failed = |error| self.failed(error);
        let store = &self.at.store;
        let number = store.add(&format!("{}/generation", self.name), 0).map_err(failed)?;
        let generation = Generation { store: store.clone(), name: self.name.into(), number };
        let claims = store.add(&generation.key(&format!("joined/{}", self.rank)), 1).map_err(failed)?;
        if claims > 1 {
            return self.wait_for_seat(&generation, begun);
        }
        let (size, present) = (self.size as i64, generation.key("present"));
        store.add(&present, 1).map_err(failed)?;
        let mut reminded = Instant::now();
        let mut pause = Duration::from_millis(2);
        while store.add(&present, 0).map_err(failed)? < size {
            if generation.is_over().map_err(failed)? {
                return Ok(None);
            }
            if begun.elapsed() > self.patience.join {
                // Who has left can not have met: the last one may be coming just now.
                if store.add(&present, -1).map_err(failed)? + 1 < size {
                    let missing = self.missing(&generation)?;
                    generation.end(self.rank);
                    return Err(self.refused(&missing));
                }
                store.add(&present, 1).map_err(failed)?;
            }
            if reminded.elapsed() >= self.patience.remind {
                reminded = Instant::now();
                let missing = self.missing(&generation)?;
                let (group, waited) = (self.name, begun.elapsed().as_secs());
                tracing::warn!(group, missing, "waiting for {missing} of {} since {waited} s", self.size);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        Ok(Some(generation))
    }

    /// Waits until every rank has connected to every other: one that left before that, as a rank does that refuses what
    /// comes next, would break the connecting of those that are still at it. Where one fails, the others' operations say so.
    pub fn all_connected(&self, generation: &Generation) -> Result<()> {
        let failed = |error| self.failed(error);
        let (store, connected, begun) = (&self.at.store, generation.key("connected"), Instant::now());
        store.add(&connected, 1).map_err(failed)?;
        let mut pause = Duration::from_micros(200);
        while store.add(&connected, 0).map_err(failed)? < self.size as i64 {
            if generation.is_over().map_err(failed)? || begun.elapsed() > self.patience.join {
                break;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
        Ok(())
    }

    /// The worker that sits here may be this one's predecessor: then its group fails, and the next generation begins.
    fn wait_for_seat(&self, generation: &Generation, begun: Instant) -> Result<Option<Generation>> {
        while !generation.is_over().map_err(|error| self.failed(error))? {
            if begun.elapsed() > self.patience.join {
                return Err(Error::Refused(format!(
                    "two workers claim rank {} of group `{}` at {}: give each its own rank",
                    self.rank,
                    self.name,
                    self.at.address()
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(None)
    }

    fn refused(&self, missing: &str) -> Error {
        Error::Refused(format!(
            "rank {} of group `{}` waits for {missing} of {} since {} s: start them, with {} as meeting point",
            self.rank,
            self.name,
            self.size,
            self.patience.join.as_secs(),
            self.at.address()
        ))
    }

    /// Ranks without a key yet, as `rank 1` or `ranks 1, 3`.
    fn missing(&self, generation: &Generation) -> Result<String> {
        let mut missing = Vec::new();
        for rank in 0..self.size {
            let joined = generation.key(&format!("joined/{rank}"));
            if !self.at.store.has(&joined).map_err(|error| self.failed(error))? {
                missing.push(rank);
            }
        }
        Ok(name_ranks(&missing))
    }

    pub fn failed(&self, error: cxx::Exception) -> Error {
        let context =
            format!("rank {} of {} joining group `{}` at {}", self.rank, self.size, self.name, self.at.address());
        Error::other(context, torch_error(error))
    }
}

/// `rank 1`, or `ranks 1, 3`; of many, the first and how many more.
fn name_ranks(ranks: &[usize]) -> String {
    const SHOWN: usize = 16;
    let shown: Vec<String> = ranks.iter().take(SHOWN).map(usize::to_string).collect();
    match ranks.len() {
        1 => format!("rank {}", shown[0]),
        many if many > SHOWN => format!("ranks {} and {} more", shown.join(", "), many - SHOWN),
        _ => format!("ranks {}", shown.join(", ")),
    }
}

pub(super) fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
