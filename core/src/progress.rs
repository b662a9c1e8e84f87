//! What a long phase tells whoever watches it, and how it is asked to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Receives the progress of a phase: `done` of `total` units (responses, rows).
pub trait Progress: Send + Sync {
    fn advance(&self, phase: &'static str, done: usize, total: usize);
}

/// Nobody watches.
pub struct Unwatched;

impl Progress for Unwatched {
    fn advance(&self, _phase: &'static str, _done: usize, _total: usize) {}
}

/// A request to stop that long phases look at between their units of work.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    pub fn raise(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// # Errors
    /// [`Error::Interrupted`] once it was raised.
    pub fn check(&self) -> Result<()> {
        if self.is_raised() { Err(Error::Interrupted) } else { Ok(()) }
    }
}
