//! What a long phase tells whoever watches it, and how it is asked to stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

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

/// The requests to stop of a worker's calls: one that is raised reaches the calls that are there, and none that comes later.
#[derive(Default)]
pub struct Interrupts(Mutex<Vec<Weak<Flags>>>);

impl Interrupts {
    pub fn of_new_call(&self) -> Interrupt {
        let interrupt = Interrupt::default();
        let mut calls = self.calls();
        calls.retain(|call| call.strong_count() > 0);
        calls.push(Arc::downgrade(&interrupt.0));
        interrupt
    }

    pub fn raise_all(&self) {
        self.calls().iter().filter_map(Weak::upgrade).for_each(|call| Interrupt(call).raise());
    }

    fn calls(&self) -> MutexGuard<'_, Vec<Weak<Flags>>> {
        self.0.lock().expect("never held over a panic")
    }
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
    fn calls_that_come_later_are_not_interrupted() {
        let calls = Interrupts::default();
        let [first, second] = [calls.of_new_call(), calls.of_new_call()];
        calls.raise_all();
        let third = calls.of_new_call();
        assert!(first.is_raised() && second.is_raised() && !third.is_raised());
        drop((first, second));
        let _fourth = calls.of_new_call();
        assert_eq!(calls.calls().len(), 2, "what is over is forgotten");
    }

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
