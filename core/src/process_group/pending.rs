//! Operations in flight: handles that own their tensors, and waits that end when a rank makes no progress.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tch::Tensor;

use super::standing::StallWatch;
use super::{Peers, ProcessGroup, nccl};
use crate::collective::ffi;
use crate::error::{Error, Result};
use crate::shim::torch_error;

pub(super) enum Work {
    /// A group of one has nothing to wait for.
    Done,
    Gloo(cxx::UniquePtr<ffi::PendingWork>),
    Nccl(nccl::Enqueued),
}

impl Work {
    /// False when the time is up.
    fn wait(&self, up_to: Duration) -> Result<bool> {
        match self {
            Work::Done => Ok(true),
            Work::Gloo(work) => Ok(work.wait(up_to.as_millis() as i64).map_err(torch_error)?),
            Work::Nccl(work) => work.wait(up_to),
        }
    }
}

/// An operation in flight; it keeps its tensors until it is waited for or dropped.
#[must_use = "the tensors are not whole before `wait`"]
pub struct Pending {
    group: ProcessGroup,
    work: Work,
    operation: String,
    sequence: u64,
    _kept: Vec<Tensor>,
}

impl Pending {
    pub(super) fn new(group: ProcessGroup, work: Work, operation: &str, sequence: u64, kept: Vec<Tensor>) -> Pending {
        Pending { group, work, operation: operation.into(), sequence, _kept: kept }
    }

    /// Waits until this rank's part is done.
    ///
    /// # Errors
    /// A rank is gone, or makes no progress for [`Patience::progress`] while this one waits: it is named, and the group
    /// is given up on every rank.
    ///
    /// [`Patience::progress`]: super::Patience::progress
    pub fn wait(self) -> Result<()> {
        let Some(peers) = &self.group.inner.peers else { return Ok(()) };
        let outcome = self.wait_watching(peers);
        match &outcome {
            Ok(()) => drop(self.group.inner.journal.in_flight.fetch_sub(1, Ordering::Relaxed)),
            Err(error) => {
                peers.leave(&error.to_string());
                // Its threads should be done with the tensors before somebody takes their memory.
                for _ in 0..20 {
                    if !matches!(self.work.wait(StallWatch::INTERVAL), Ok(false)) {
                        break;
                    }
                }
            }
        }
        outcome
    }

    fn wait_watching(&self, peers: &Peers) -> Result<()> {
        let mut watch = StallWatch::new(&self.group, &peers.generation, peers.patience.progress, self.sequence);
        loop {
            match self.work.wait(StallWatch::INTERVAL) {
                Ok(true) => return Ok(()),
                Ok(false) => watch.look(&self.operation)?,
                Err(cause) => return Err(self.explain(peers, &watch, cause)),
            }
        }
    }

    /// The first failure of the group, where this one only follows from it; else this one, and who is gone.
    fn explain(&self, peers: &Peers, watch: &StallWatch, cause: Error) -> Error {
        let place = self.group.place_of(&self.operation, self.sequence);
        let told = |reason: &str| Error::Refused(format!("{place} was ended: {reason}"));
        if let Some(reason) = peers.given_up().or_else(|| peers.generation.failure()) {
            return told(&reason);
        }
        let gone = watch.find_gone();
        if let Some(reason) = peers.generation.failure() {
            return told(&reason);
        }
        let context = if gone.is_empty() { place } else { format!("{place}: {}", gone.join(", ")) };
        Error::other(context, cause)
    }
}

/// What [`ProcessGroup::start_reduce_scatter`] and [`ProcessGroup::start_all_to_all`] receive.
#[must_use = "the parts are not here before they are waited for"]
pub struct Parts {
    pending: Pending,
    received: Tensor,
    size: i64,
}

impl Parts {
    pub(super) fn new(pending: Pending, received: Tensor, size: i64) -> Parts {
        Parts { pending, received, size }
    }

    /// The ranks' parts, one after the other.
    ///
    /// # Errors
    /// As of [`Pending::wait`].
    pub fn parts(self) -> Result<Tensor> {
        self.pending.wait()?;
        Ok(self.received)
    }

    /// This rank's part of the sum over ranks, added up in the order of ranks.
    ///
    /// # Errors
    /// As of [`Pending::wait`].
    pub fn sum(self) -> Result<Tensor> {
        self.pending.wait()?;
        let _guard = tch::no_grad_guard();
        let length = self.received.size()[0] / self.size;
        let mut total = self.received.narrow(0, 0, length);
        for rank in 1..self.size {
            let _ = total.f_add_(&self.received.narrow(0, rank * length, length))?;
        }
        Ok(total)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{MeetingPoint, Patience};
    use super::*;

    /// An operation may complete just when a look at it ends without: that is no failure.
    #[test]
    fn a_look_that_ends_as_the_operation_completes_is_not_its_failure() {
        const TRIES: u64 = 1500;
        let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
        let rank = |rank: usize| {
            let patience = Patience::default();
            let point = MeetingPoint::join("127.0.0.1", point.port(), patience).unwrap();
            let group = ProcessGroup::join(&point, "looks", (rank, 2), "127.0.0.1", patience).unwrap();
            let number = Tensor::from_slice(&[0.0f64]);
            for look in 0..TRIES {
                if rank == 1 {
                    // From well before to well after the end of the other rank's look, in small steps.
                    std::thread::sleep(Duration::from_micros(500 + look % 100 * 8));
                }
                let pending = group.start_all_reduce_sum("look", &number).unwrap();
                while !pending.work.wait(Duration::from_millis(1)).unwrap() {}
                pending.wait().unwrap();
            }
        };
        std::thread::scope(|scope| {
            let rank = &rank;
            let ranks = [0, 1].map(|number| scope.spawn(move || rank(number)));
            ranks.into_iter().for_each(|rank| rank.join().unwrap());
        });
    }
}
