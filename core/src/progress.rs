//! What a long phase tells whoever watches it, and how it is asked to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Receives the progress of a phase: `done` of `total` units (responses, rows).
pub trait Progress: Send + Sync {
    fn advance(&self, phase: &str, done: usize, total: usize);
}

/// Nobody watches.
pub struct Unwatched;

impl Progress for Unwatched {
    fn advance(&self, _phase: &str, _done: usize, _total: usize) {}
}

/// A request to stop that long phases look at between their units of work.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<Flags>);

#[derive(Default)]
struct Flags {
    raised: AtomicBool,
    deferred: AtomicBool,
}

/// While it lives, phases are not stopped; the request stays raised for whoever asks after it.
#[must_use]
pub struct Deferred(Interrupt);

impl Drop for Deferred {
    fn drop(&mut self) {
        self.0.0.deferred.store(false, Ordering::SeqCst);
    }
}

impl Interrupt {
    pub fn raise(&self) {
        self.0.raised.store(true, Ordering::SeqCst);
    }

    pub fn is_raised(&self) -> bool {
        self.0.raised.load(Ordering::SeqCst)
    }

    /// For work that must be finished once it was begun.
    pub fn defer(&self) -> Deferred {
        self.0.deferred.store(true, Ordering::SeqCst);
        Deferred(self.clone())
    }

    /// # Errors
    /// [`Error::Interrupted`] once it was raised, unless it is deferred.
    pub fn check(&self) -> Result<()> {
        let deferred = self.0.deferred.load(Ordering::SeqCst);
        if self.is_raised() && !deferred { Err(Error::Interrupted) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deferred_interrupt_stops_nothing_until_it_is_due() {
        let interrupt = Interrupt::default();
        assert!(interrupt.check().is_ok());
        let deferred = interrupt.defer();
        interrupt.raise();
        assert!(interrupt.is_raised() && interrupt.check().is_ok());
        drop(deferred);
        assert!(matches!(interrupt.check(), Err(Error::Interrupted)));
    }
}
