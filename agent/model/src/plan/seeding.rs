//! What the source never wrote is marked as being here, before copying begins.
//!
//! The map exists only since the fence, so consumers may already write: marking
//! takes nothing back of what they wrote, because it only ever says that a region is
//! here, and writes nothing.

use super::{Next, Plan, Step, Wait};
use crate::{
    seeding::{Seeding, SourceMap},
    volume::{Event, Receiving, ReceivingStage},
};

impl Plan<'_> {
    /// A used clone of a copy that consumers may write is gone only after a reboot. What
    /// they wrote and did not flush may be on the data LV all the same, below regions
    /// that are read from the source again: to mark those now would bring it back
    /// after it was seen to be lost. So nothing is marked any more.
    pub(super) fn unseeded_before_a_reboot(receiving: &Receiving) -> Option<Next> {
        let was_open = receiving.stage == ReceivingStage::Hydrating;
        let unseeded = receiving.seeding == Seeding::Wanted;
        (was_open && unseeded).then_some(Next::Journal(Event::SeedingSkipped))
    }

    /// What must happen before copying may begin; none when it may.
    pub(super) fn seeding(&self, receiving: &Receiving) -> Option<Next> {
        match receiving.seeding {
            Seeding::Wanted => {}
            Seeding::Done | Seeding::Skipped => return None,
        }
        Some(match &self.seen.map {
            SourceMap::Unasked => Next::AskForMap,
            SourceMap::Asked => Next::Wait(Wait::Map),
            SourceMap::Known(map) if !map.is_of(self.record) => {
                Next::Journal(Event::SeedingSkipped)
            }
            SourceMap::Known(map) if map.unwritten.runs().is_empty() => {
                Next::Journal(Event::Seeded)
            }
            SourceMap::Known(map) => Next::DoThen(Step::Seed(map.clone()), Event::Seeded),
            SourceMap::Missing => Next::Journal(Event::SeedingSkipped),
        })
    }
}
