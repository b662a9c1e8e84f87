//! Stateless work: tasks that return futures, placed where there is room for what they demand.
//!
//! A task is a closure, which runs on this node, or a call of a named [`Function`], which runs on any. Roles that hold
//! devices [reserve](Tasks::reserve) what they demand in the same books.
//!
//! What holds:
//! * **TK-1** Never more in use than there is: on no node do tasks and reservations together hold more than its CPUs, more
//!   than one whole of any GPU, or more than its slots. What a task was granted comes back once, however it ends.
//! * **TK-2** Local first: a task runs on its own node when that has room for it now and nothing waits there; else on the
//!   fitting node with the shortest expected wait. When a node is idle, what waits longest elsewhere moves to it.
//! * **TK-3** A demand that no node can ever meet is refused at once, with the demand and every node's total.
//! * **TK-4** No queue grows without bound: over [`TasksConfig::waiting`] tasks or
//!   [`TasksConfig::waiting_bytes`] of arguments, one more is refused.
//! * **TK-5** Nothing starves: at most [`OVERTAKES`] younger tasks of its node begin before a waiting one; then the node
//!   keeps its room free for it.
//! * **TK-6** A task whose handle is dropped before it begins never runs. One that has begun runs to its end, and holds what
//!   it was granted until then.
//! * **TK-7** A panic ends its task with an error that names it, and nothing else.
//! * **TK-8** A call is stateless: it may run more than once. Calls of a lost node run again elsewhere, alone and at most
//!   [`ATTEMPTS`] times; then the error names task, node and cause.
//! * **TK-9** A task never waits for another: its CPU would stand idle, and the last two would wait for ever.
//! * **TK-10** Results over rows come in row order, and the error is the first row's, whichever part ended first.
//!
//! Deliberately absent: state (that is what workers are for), priorities, and placement by where the arguments lie.
//!
//! Reading order: [`demand`] (what is asked for), [`books`](self::books) (what is in use), [`schedule`](self::schedule)
//! (who runs where and when, as plain data), [`handle`] (the future), [`tasks`](self::tasks) (threads and callers),
//! [`function`] (what may leave the process), [`remote`](self::remote) and [`server`] (both ends of that), [`rows`].

mod books;
pub mod demand;
mod error;
pub mod function;
pub mod handle;
mod pool;
mod remote;
pub mod rows;
mod schedule;
pub mod server;
mod tasks;
mod wire;

pub use books::Devices;
pub use demand::{Demand, NodeConfig};
pub use error::TaskError;
pub use function::{Function, Functions};
pub use handle::TaskHandle;
pub use rows::RowTasks;
pub use schedule::{NodeReport, OVERTAKES};
pub use server::TaskServer;
pub use tasks::{Reservation, Tasks, TasksConfig, gpus_of_this_task};

/// How often a call is begun before the loss of its node is its caller's.
pub const ATTEMPTS: u32 = 3;
