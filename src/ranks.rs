//! The ranks of a run: one device thread each, which meet, divide the training state, and share this machine's cores.

use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::zero::{Sharding, ZeroStage};

use crate::program::Failure;
use crate::recipe::{Compute, Devices};

const LOOPBACK: &str = "127.0.0.1";

/// How a run is divided.
pub struct Ranks {
    pub count: usize,
    stage: ZeroStage,
    offload: bool,
    meeting: Option<MeetingPoint>,
}

/// One rank's place in a run; crosses to its device thread.
#[derive(Clone, Copy, Debug)]
pub struct Seat {
    pub rank: usize,
    count: usize,
    stage: ZeroStage,
    offload: bool,
    port: u16,
    threads: Option<i32>,
}

impl Ranks {
    /// As many ranks as `placement.workers` says, one where it says nothing.
    ///
    /// # Errors
    /// [`Failure::Other`] when the ranks' meeting point cannot be served.
    pub fn plan(compute: &Compute, devices: &Devices) -> Result<Ranks, Failure> {
        let count = devices.workers.fixed().unwrap_or(1);
        // Dividing what the optimizer keeps costs nothing; dividing gradients and parameters costs traffic.
        let stage =
            compute.zero_stage.fixed().map_or(Some(ZeroStage::One), |stage| ZeroStage::from_number(stage as u8));
        let stage = stage.expect("a stage that the recipe's range allows");
        let meeting = (count > 1).then(|| MeetingPoint::serve(LOOPBACK, 0)).transpose()?;
        Ok(Ranks { count, stage, offload: compute.adam_offload, meeting })
    }

    /// The ranks' places, in order.
    pub fn seats(&self) -> Vec<Seat> {
        let threads = (self.count > 1).then(|| (tch::get_num_threads() / self.count as i32).max(1));
        let port = self.meeting.as_ref().map_or(0, MeetingPoint::port);
        let seat = |rank| Seat { rank, count: self.count, stage: self.stage, offload: self.offload, port, threads };
        (0..self.count).map(seat).collect()
    }
}

impl Seat {
    /// Takes the place: call on the rank's own thread, while all others do.
    ///
    /// # Errors
    /// Not every rank comes.
    pub fn take(&self) -> echelon_core::Result<Sharding> {
        if let Some(threads) = self.threads {
            tch::set_num_threads(threads);
        }
        let group = if self.count == 1 {
            ProcessGroup::solo()
        } else {
            let patience = Patience::default();
            let meeting = MeetingPoint::join(LOOPBACK, self.port, patience)?;
            ProcessGroup::join(&meeting, "ranks", (self.rank, self.count), LOOPBACK, patience)?
        };
        Ok(Sharding { group, stage: self.stage, offload: self.offload })
    }

    /// Whether this rank is the one of the run.
    pub fn is_alone(&self) -> bool {
        self.count == 1
    }
}
