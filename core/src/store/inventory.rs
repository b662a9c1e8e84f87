//! What a store holds and who holds it: the server's state, apart from its sockets.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::id::ObjectId;
use super::protocol::{Fate, Refusal, Room, StoreReport};
use super::segment::Segment;

/// How many objects that went are remembered, to tell what became of them.
const REMEMBERED: usize = 4096;

/// A connection, by its number.
pub(super) type Client = u64;

pub(super) struct Inventory {
    capacity_bytes: u64,
    max_objects: usize,
    used_bytes: u64,
    entries: HashMap<ObjectId, Entry>,
    /// Objects that nobody holds, by when they were let go, and their bytes together.
    idle: BTreeMap<u64, ObjectId>,
    idle_bytes: u64,
    clock: u64,
    names: HashMap<Client, String>,
    gone: VecDeque<(ObjectId, Fate)>,
    num_evicted: u64,
}

struct Entry {
    /// Taken from the capacity: whole pages.
    bytes: u64,
    by: String,
    state: State,
}

enum State {
    /// A client brings it; `len` once it has reserved room.
    Writing { by: Client, len: Option<u64> },
    Ready {
        segment: Segment,
        /// Nobody, when it is on its way to its reader, or idle.
        holders: HashMap<Client, u32>,
        /// Its key in `idle`, when it may be evicted.
        idle_since: Option<u64>,
        /// It goes with its last holder, and nobody new gets it.
        removed: bool,
    },
}

impl State {
    /// Whether `client` has reserved `bytes` for it.
    fn is_reserved(&self, client: Client, bytes: u64) -> bool {
        matches!(self, State::Writing { by, len: Some(len) } if *by == client && *len == bytes)
    }
}

/// What a client that wants an object is told.
pub(super) enum Found<'a> {
    Ready(&'a Segment),
    /// Somebody is bringing it.
    Writing {
        by: String,
    },
    Absent(Fate),
}

impl Inventory {
    pub(super) fn new(capacity_bytes: u64, max_objects: usize) -> Inventory {
        Inventory {
            capacity_bytes,
            max_objects,
            used_bytes: 0,
            entries: HashMap::new(),
            idle: BTreeMap::new(),
            idle_bytes: 0,
            clock: 0,
            names: HashMap::new(),
            gone: VecDeque::new(),
            num_evicted: 0,
        }
    }

    pub(super) fn join(&mut self, client: Client, name: String) {
        self.names.insert(client, name);
    }

    /// Everything of a client that is gone: its references, and what it was bringing. True when something was let go that
    /// others may be waiting for.
    pub(super) fn leave(&mut self, client: Client) -> bool {
        self.names.remove(&client);
        let held = |entry: &Entry| match &entry.state {
            State::Writing { by, .. } => *by == client,
            State::Ready { holders, .. } => holders.contains_key(&client),
        };
        let ids: Vec<ObjectId> =
            self.entries.iter().filter(|(_, entry)| held(entry)).map(|(id, _)| id.clone()).collect();
        let mut abandoned = false;
        for id in ids {
            match &mut self.entries.get_mut(&id).expect("listed above").state {
                State::Writing { .. } => {
                    self.drop_entry(&id);
                    abandoned = true;
                }
                State::Ready { holders, .. } => {
                    holders.remove(&client);
                    self.rest(&id);
                }
            }
        }
        abandoned
    }

    /// Makes `client` the one to bring an absent object.
    pub(super) fn claim(&mut self, client: Client, id: &ObjectId) -> Result<(), Refusal> {
        self.reserve_bytes(client, id, 0, None)
    }

    /// Room for `len` bytes of an object that `client` brings, made by evicting what nobody holds.
    pub(super) fn reserve(&mut self, client: Client, id: &ObjectId, len: u64) -> Result<(), Refusal> {
        let bytes = len.checked_next_multiple_of(page_bytes()).unwrap_or(u64::MAX);
        self.reserve_bytes(client, id, bytes, Some(len))
    }

    fn reserve_bytes(&mut self, client: Client, id: &ObjectId, bytes: u64, len: Option<u64>) -> Result<(), Refusal> {
        let by = self.name(client);
        match self.entries.get(id) {
            None => {}
            Some(Entry { state: State::Writing { by: writer, len: None }, .. }) if *writer == client => {}
            Some(Entry { state: State::Writing { .. }, by, .. }) => {
                return Err(Refusal::BeingWritten { id: id.clone(), by: by.clone() });
            }
            Some(Entry { by, .. }) => return Err(Refusal::Exists { id: id.clone(), by: by.clone() }),
        }
        self.make_room(id, &by, bytes)?;
        self.used_bytes += bytes;
        self.entries.insert(id.clone(), Entry { bytes, by, state: State::Writing { by: client, len } });
        Ok(())
    }

    /// Evicts, least recently let go first, until `bytes` more fit. Evicts nothing when that cannot be reached.
    fn make_room(&mut self, id: &ObjectId, by: &str, bytes: u64) -> Result<(), Refusal> {
        let held_bytes = self.used_bytes - self.idle_bytes;
        if held_bytes.saturating_add(bytes) > self.capacity_bytes {
            let room = Room {
                wanted: bytes,
                used: self.used_bytes,
                capacity: self.capacity_bytes,
                free_able: self.idle_bytes,
                holders: self.biggest_holders(),
            };
            return Err(Refusal::Full { id: id.clone(), by: by.into(), room: Box::new(room) });
        }
        let added = usize::from(!self.entries.contains_key(id));
        if self.entries.len() - self.idle.len() + added > self.max_objects {
            return Err(Refusal::TooMany { id: id.clone(), by: by.into(), max: self.max_objects });
        }
        while self.used_bytes + bytes > self.capacity_bytes || self.entries.len() + added > self.max_objects {
            let (_, oldest) = self.idle.first_key_value().expect("what is not held is idle, and that was counted");
            let oldest = oldest.clone();
            self.drop_entry(&oldest);
            self.num_evicted += 1;
            self.remember(oldest, Fate::Evicted);
        }
        Ok(())
    }

    /// The clients with the most bytes, for people: at most four.
    fn biggest_holders(&self) -> String {
        let mut bytes: HashMap<Client, u64> = HashMap::new();
        for entry in self.entries.values() {
            match &entry.state {
                State::Writing { by, .. } => *bytes.entry(*by).or_default() += entry.bytes,
                State::Ready { holders, .. } => {
                    holders.keys().for_each(|client| *bytes.entry(*client).or_default() += entry.bytes);
                }
            }
        }
        let mut bytes: Vec<(u64, String)> =
            bytes.into_iter().map(|(client, bytes)| (bytes, self.name(client))).collect();
        bytes.sort_unstable_by(|a, b| b.cmp(a));
        let listed: Vec<String> = bytes.iter().take(4).map(|(bytes, name)| format!("{name} ({bytes} bytes)")).collect();
        if listed.is_empty() { "nobody".into() } else { listed.join(", ") }
    }

    /// Takes in the memory of an object that `client` reserved room for, and gives it the first reference; with `hand_over`
    /// nobody, and the object waits for its reader.
    pub(super) fn commit(
        &mut self,
        client: Client,
        id: &ObjectId,
        segment: Segment,
        hand_over: bool,
    ) -> Result<(), Refusal> {
        let by = self.name(client);
        match self.entries.get_mut(id).map(|entry| &mut entry.state) {
            Some(state) if state.is_reserved(client, segment.len as u64) => {
                let holders = if hand_over { HashMap::new() } else { HashMap::from([(client, 1)]) };
                *state = State::Ready { segment, holders, idle_since: None, removed: false };
                Ok(())
            }
            _ => Err(Refusal::NotReserved { id: id.clone(), by }),
        }
    }

    /// Gives up what `client` was bringing. False when it was bringing no such object.
    pub(super) fn abandon(&mut self, client: Client, id: &ObjectId) -> bool {
        let writes =
            matches!(self.entries.get(id), Some(Entry { state: State::Writing { by, .. }, .. }) if *by == client);
        if writes {
            self.drop_entry(id);
        }
        writes
    }

    /// The object, with one more reference for `client` when it is there. With `take` it goes with its last reference.
    pub(super) fn get(&mut self, client: Client, id: &ObjectId, take: bool) -> Found<'_> {
        // Looked up twice, because a borrow that may be returned would last for the whole function.
        match self.entries.get(id) {
            None => return Found::Absent(self.fate(id)),
            Some(Entry { state: State::Writing { .. }, by, .. }) => return Found::Writing { by: by.clone() },
            Some(Entry { state: State::Ready { removed: true, .. }, .. }) => return Found::Absent(Fate::Removed),
            Some(_) => {}
        }
        let entry = self.entries.get_mut(id).expect("seen above");
        let State::Ready { segment, holders, idle_since, removed } = &mut entry.state else {
            unreachable!("seen above")
        };
        *removed |= take;
        if let Some(since) = idle_since.take() {
            self.idle.remove(&since);
            self.idle_bytes -= entry.bytes;
        }
        *holders.entry(client).or_default() += 1;
        Found::Ready(segment)
    }

    /// One reference of `client` less. False when it has none.
    pub(super) fn release(&mut self, client: Client, id: &ObjectId) -> bool {
        let Some(Entry { state: State::Ready { holders, .. }, .. }) = self.entries.get_mut(id) else { return false };
        let Some(count) = holders.get_mut(&client) else { return false };
        *count -= 1;
        if *count == 0 {
            holders.remove(&client);
            self.rest(id);
        }
        true
    }

    /// Lets an object go with its last reference.
    pub(super) fn remove(&mut self, id: &ObjectId) -> Result<(), Refusal> {
        match self.entries.get_mut(id) {
            Some(Entry { state: State::Ready { removed, holders, .. }, .. }) if !*removed => {
                *removed = true;
                if holders.is_empty() {
                    self.drop_entry(id);
                }
                self.remember(id.clone(), Fate::Removed);
                Ok(())
            }
            Some(Entry { state: State::Writing { .. }, by, .. }) => {
                Err(Refusal::BeingWritten { id: id.clone(), by: by.clone() })
            }
            _ => Err(Refusal::Unknown { id: id.clone(), fate: self.fate(id) }),
        }
    }

    /// After a reference went: an object that nobody holds may be evicted, or goes now if it was removed.
    fn rest(&mut self, id: &ObjectId) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let State::Ready { holders, idle_since, removed, .. } = &mut entry.state else { return };
        if !holders.is_empty() {
            return;
        }
        if *removed {
            return self.drop_entry(id);
        }
        self.clock += 1;
        *idle_since = Some(self.clock);
        self.idle_bytes += entry.bytes;
        self.idle.insert(self.clock, id.clone());
    }

    fn drop_entry(&mut self, id: &ObjectId) {
        let entry = self.entries.remove(id).expect("an entry that was looked up");
        self.used_bytes -= entry.bytes;
        if let State::Ready { idle_since: Some(since), .. } = entry.state {
            self.idle.remove(&since);
            self.idle_bytes -= entry.bytes;
        }
    }

    fn remember(&mut self, id: ObjectId, fate: Fate) {
        if self.gone.len() == REMEMBERED {
            self.gone.pop_front();
        }
        self.gone.push_back((id, fate));
    }

    pub(super) fn fate(&self, id: &ObjectId) -> Fate {
        self.gone.iter().rev().find(|(gone, _)| gone == id).map_or(Fate::NeverPut, |(_, fate)| *fate)
    }

    pub(super) fn name(&self, client: Client) -> String {
        self.names.get(&client).cloned().unwrap_or_else(|| "a client that is gone".into())
    }

    pub(super) fn report(&self, num_connections: usize) -> StoreReport {
        StoreReport {
            capacity_bytes: self.capacity_bytes,
            used_bytes: self.used_bytes,
            num_objects: self.entries.len(),
            num_held: self.entries.len() - self.idle.len(),
            num_connections,
            num_evicted: self.num_evicted,
        }
    }
}

fn page_bytes() -> u64 {
    rustix::param::page_size() as u64
}
