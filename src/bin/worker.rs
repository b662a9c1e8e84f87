//! `worker --join HOST:PORT`: a worker started by hand or by a scheduler.

use std::process::ExitCode;

use echelon::{program, worker};

fn main() -> ExitCode {
    program::main(|| worker::main(&worker::arguments()))
}
