//! Memory that the processes of one host share.

mod memory;
pub mod packet;
pub mod segment;

pub use packet::{PacketListener, PacketSocket};
pub use segment::{LiveMap, LiveSegment, LiveWriter, Segment, SegmentError, SegmentMap, SegmentWriter};
