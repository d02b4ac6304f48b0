//! What the journal keeps of a grant when the record that it belonged to is gone, or
//! stands for something else.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Event, Phase, ReceivingStage, Record};
use crate::name::VolumeId;

/// What became of a grant whose record is gone. Kept for ever: a delayed call
/// may come at any time, and clocks prove nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tombstone {
    /// The volume.
    pub volume: VolumeId,
    /// Which volume of that id.
    pub incarnation: Uuid,
    /// The grant.
    pub grant: Uuid,
    /// How it ended on this node.
    pub fate: Fate,
}

/// How a grant ended on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// This node was the source and has let go.
    Released,
    /// This node was the source and withdrew the grant.
    Revoked,
    /// This node was the destination and gave up unwritten.
    Aborted,
    /// This node was the destination and took the volume; it has gone on since.
    Taken,
    /// The destination wrote at the source for a while, and gave the volume back.
    Returned,
}

impl Record {
    /// What an event leaves in the journal of a grant that ends with it.
    pub fn stone_of(&self, event: &Event) -> Option<Tombstone> {
        let fate = match event {
            Event::Revoked => Fate::Revoked,
            Event::Reclaimed(_) => Fate::Returned,
            _ => return None,
        };
        let grant = self.lent()?.to.grant;
        Some(Tombstone { volume: self.id, incarnation: self.incarnation, grant, fate })
    }

    /// What is left in the journal when the record goes.
    pub fn epitaphs(&self) -> Vec<Tombstone> {
        let stone =
            |grant, fate| Tombstone { volume: self.id, incarnation: self.incarnation, grant, fate };
        let arrival = match &self.phase {
            Phase::Receiving(receiving) if receiving.stage == ReceivingStage::Returning => {
                Some(stone(receiving.source.grant, Fate::Returned))
            }
            Phase::Receiving(receiving) if !receiving.stage.is_taken() => {
                Some(stone(receiving.source.grant, Fate::Aborted))
            }
            Phase::Receiving(_)
            | Phase::Creating
            | Phase::Local
            | Phase::Lent(_)
            | Phase::Relaying(_)
            | Phase::Reverting(_)
            | Phase::Deleting => self.came_by.map(|grant| stone(grant, Fate::Taken)),
        };
        let departure = self.lent().map(|lent| stone(lent.to.grant, Fate::Released));
        arrival.into_iter().chain(departure).collect()
    }
}
