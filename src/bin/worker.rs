//! `worker --join HOST:PORT`: a worker started by hand or by a scheduler.

fn main() -> ! {
    echelon::programs::worker()
}
