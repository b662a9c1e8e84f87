//! `worker --join HOST:PORT`: a worker started by hand or by a scheduler.

use echelon::{program, worker};

fn main() -> ! {
    program::main(|| worker::main(&worker::arguments()))
}
