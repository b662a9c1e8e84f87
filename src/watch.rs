//! Progress of the device's phases as bars on the terminal.

use std::sync::{Arc, Mutex};

use echelon_core::progress::Progress;

use echelon_monitor::{Phase, Terminal};

/// Shows one bar at a time: the phase that advanced last.
pub struct Watch {
    terminal: Arc<Terminal>,
    current: Mutex<Option<Shown>>,
}

struct Shown {
    name: String,
    done: usize,
    total: usize,
    bar: Phase,
}

impl Watch {
    pub fn new(terminal: Arc<Terminal>) -> Watch {
        Watch { terminal, current: Mutex::new(None) }
    }

    /// Takes the bar away: before a line is printed, and at the end.
    pub fn clear(&self) {
        self.current.lock().expect("never held over a panic").take();
    }
}

impl Progress for Watch {
    fn advance(&self, phase: &str, done: usize, total: usize) {
        let mut current = self.current.lock().expect("never held over a panic");
        let same =
            current.as_ref().is_some_and(|shown| shown.name == phase && shown.total == total && shown.done < done);
        if !same {
            *current = None; // ends the former bar before the next begins
            *current =
                Some(Shown { name: phase.into(), done: 0, total, bar: self.terminal.phase(phase, total as u64) });
        }
        let shown = current.as_mut().expect("set above");
        shown.bar.advance((done - shown.done) as u64);
        shown.done = done;
        if done == total {
            *current = None;
        }
    }
}
