//! The actor's new weights on their way to the generators, after every step.
//!
//! In one process nothing moves: the generator computes on the actor's own tensors. On one host trainers write into memory
//! that generators map ([`shared`]). Elsewhere buckets are broadcast ([`broadcast`]). Trainers hold flat shards of layer
//! units, generators tensor-parallel slices of parameters; weights are resharded, and converted to the generators' dtype,
//! bucket by bucket on their way.
//!
//! * **WS-1** Both sides derive what goes where from shapes alone ([`SyncPlan`]): no layout travels.
//! * **WS-2** What a generator holds is, bit for bit, the actor's exported weights in the generator's dtype, for every
//!   number of trainers, ZeRO stage, number of replicas and tensor-parallel size.
//! * **WS-3** Beside its shard or slices a process holds at most buckets of a fixed size, two per peer: never a model.
//! * **WS-4** Every bucket carries its policy version and a sum per unit, made while it is copied or sent, on both sides. Where
//!   they differ the receiver fails with bucket, unit, trainer and both sums.
//! * **WS-5** Weights that arrived in part are not sampled with, until a whole sync has succeeded.
//! * **WS-6** A generator gives out the version that it is asked for, or refuses.
//! * **WS-7** As many bytes are sent as the plan says: each element once per tensor-parallel rank that holds it, to all
//!   replicas together.
//! * **WS-8** Through shared memory each trainer writes its part once, for all generators of the host. A parameter whose
//!   slice lies in one trainer's part is computed on where it was written; others are copied together.
//!
//! Tests: `tests.rs` here.

pub mod broadcast;
mod checksum;
mod destination;
mod held;
mod pack;
mod plan;
pub mod shared;

#[cfg(test)]
mod tests;

pub use checksum::Checksum;
pub use plan::{BUCKET_BYTES, SyncConfig, SyncPlan};

/// What one sync did, seen from one process.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SyncReport {
    pub version: u64,
    /// Of weights, written or received; a broadcast to several replicas counts once.
    pub bytes: usize,
    pub seconds: f64,
    /// All sums of the sync added up: over all trainers it equals that over the ranks of one replica.
    pub checksum: u64,
}

/// What is said of a message or a place in shared memory that does not hold what its sum says.
fn damaged(what: std::fmt::Arguments, unit: &str, trainer: usize, (sent, found): (u64, u64)) -> echelon_core::Error {
    echelon_core::Error::Refused(format!(
        "weight sync: {what}, unit `{unit}` from trainer {trainer}: arrived with checksum {found:016x}, was sent with \
         {sent:016x}: publish again, and look at memory and network of both machines if it happens twice"
    ))
}
