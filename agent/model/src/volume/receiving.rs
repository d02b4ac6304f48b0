//! The destination's side of a grant.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Event, ExportName, Remote};
use crate::{name::Generation, seeding::Seeding, units::Sectors};

/// The destination's side of a grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receiving {
    /// Where the data comes from, as the source granted it.
    pub source: Source,
    /// LVM's UUID of the clone metadata LV, once it exists.
    pub meta: Option<String>,
    /// How much is copied: the size of the volume when it was granted. What it has
    /// grown since lies in the data LV alone.
    pub length: Sectors,
    /// Region size of the copy; 0 while there is none.
    pub region: Sectors,
    /// Regions that are known to be here for good: an armed load that finds
    /// fewer has the wrong metadata.
    pub floor: u64,
    /// Whether an operator has said that the source is lost for ever: nothing is
    /// read from it any more, and it is told nothing.
    pub forgotten: bool,
    /// Its turn among the copies of this node: they come in the order in which their
    /// sources were fenced. 0 before that.
    pub turn: u64,
    /// Whether what the source never wrote is known to be here.
    pub seeding: Seeding,
    /// How far the copy is.
    pub stage: ReceivingStage,
    /// The source has grown before it was fenced: the clone is made anew, and the
    /// handle holds until it is, although the source may be fenced by then.
    pub rebuild: Option<Rebuild>,
    /// Whether a caller has said that the guest has left the source, whatever the
    /// source sees.
    pub forced: bool,
    /// What is known of consumers that write at the source; none where they write
    /// here.
    pub remote: Option<Remote>,
    /// Why nothing more may be done until the node has rebooted.
    pub failure: Option<Failure>,
}

/// What a grant tells its receiver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The grant.
    pub grant: Uuid,
    /// The node that holds the data.
    pub node: String,
    /// URL of its agent.
    pub endpoint: String,
    /// Generation of its copy.
    pub generation: Generation,
    /// Whether the source stays writable until it is fenced.
    pub hold: bool,
    /// How many copies are read through, the source's included: 1 for a source
    /// that has everything itself.
    pub depth: u32,
    /// How to connect.
    pub export: ExportName,
}

/// How far a copy is at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReceivingStage {
    /// Of a snapshot of a volume that hydrates: the volume's source is to make a copy of
    /// what it has fenced, and may have.
    Requesting,
    /// It has. The data LV and the clone metadata are being made of the volume's.
    Forking,
    /// The LVs are being made.
    Allocating,
    /// They exist; the metadata may hold anything.
    Zeroing,
    /// The metadata starts with zeros, or holds a clone that nobody has used.
    Assembling,
    /// Readable. Writes wait, because the source may still be written.
    Held,
    /// The source has been asked for the fence; the answer is not known.
    Switching,
    /// The source has answered that it will not fence under this grant. Nothing
    /// written here was or will be acknowledged.
    Refused,
    /// The source is fenced: writable, copying.
    Hydrating,
    /// Everything is here, committed twice: only the data LV counts now. A
    /// clone is never built again.
    Collapsing,
    /// The handle stands on the data LV and is flushed: the clone goes, and the
    /// source is told to let go.
    Parting,
    /// Given up before anything was written; being taken down.
    Aborting,
    /// Nothing of it is left here; the source is to be told.
    Withdrawing,
    /// On its way out, on a caller's word, although not everything was here.
    Discarding,
    /// Nothing of it is left here; the source is to be told that its copy may go
    /// as well.
    Discarded,
    /// The source is being connected to; no copy is going to be made.
    Linking,
    /// What consumers write goes to the source, which nobody else writes.
    Remote,
    /// The same while the LVs of a copy are made, and the metadata is zeroed.
    Localizing,
    /// The same; the metadata starts with zeros, or holds a clone that nobody has
    /// used.
    Building,
    /// The same; what was made of a copy is taken down.
    Clearing,
    /// A clone that nobody has used is ready, and writes wait: the source is asked to
    /// take none any more.
    Settling,
    /// Nobody uses it here any more: everything is taken down, and the source is told
    /// that it is the volume again.
    Returning,
}

/// How far an unused clone is on its way to another size. Nothing is kept here
/// before the fence, so nothing is lost with it; whatever is read meanwhile comes
/// from the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rebuild {
    /// The LVs are grown, and the old clone gives way.
    Emptying,
    /// The metadata starts with zeros, or holds a clone that nobody has used.
    Emptied,
}

impl ReceivingStage {
    /// Whether the source has answered that it is fenced: this copy is the
    /// volume, and may be handed on.
    pub const fn is_owner(self) -> bool {
        matches!(self, Self::Hydrating | Self::Collapsing | Self::Parting)
    }

    /// Whether the source has been asked for the fence, and may have answered.
    pub const fn is_taken(self) -> bool {
        match self {
            Self::Switching
            | Self::Hydrating
            | Self::Collapsing
            | Self::Parting
            | Self::Discarding
            | Self::Discarded
            | Self::Remote
            | Self::Localizing
            | Self::Building
            | Self::Clearing
            | Self::Settling
            | Self::Returning
            | Self::Requesting
            | Self::Forking => true,
            Self::Allocating
            | Self::Zeroing
            | Self::Assembling
            | Self::Linking
            | Self::Held
            | Self::Refused
            | Self::Aborting
            | Self::Withdrawing => false,
        }
    }
}

/// Something that only a reboot or an operator can end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// What happened.
    pub why: String,
    /// The boot in which it happened: consumers of that boot may have seen
    /// blocks go back in time, those of a later one have lost power anyway.
    pub boot: Uuid,
}

impl Receiving {
    /// Where an event leads: the data LV's UUID, where it tells one, and whether
    /// it can happen here at all. The end of the move is the record's business.
    pub(super) fn after(&mut self, event: Event) -> (Option<String>, Option<()>) {
        use ReceivingStage as S;
        if self.remote.is_some() {
            return self.after_remote(event);
        }
        let mut made = None;
        self.stage = match (self.stage, event) {
            (S::Allocating, Event::Allocated { data, meta: Some(meta) }) => {
                made = Some(data);
                self.meta = Some(meta);
                S::Zeroing
            }
            (S::Requesting, Event::CopyGranted(export)) => {
                self.source.export = export;
                S::Forking
            }
            (S::Forking, Event::Forked { data, meta, floor }) => {
                made = Some(data);
                self.meta = Some(meta);
                self.floor = floor;
                S::Hydrating
            }
            (S::Zeroing, Event::Zeroed) => S::Assembling,
            (S::Assembling, Event::Armed) if self.source.hold => S::Held,
            (S::Assembling, Event::Armed) => S::Switching,
            (stage @ (S::Held | S::Switching), Event::SourceGrew(size)) if size > self.length => {
                self.length = size;
                self.rebuild = Some(Rebuild::Emptying);
                stage
            }
            (stage @ (S::Held | S::Refused | S::Hydrating), Event::Zeroed)
                if self.rebuild.is_some() =>
            {
                self.rebuild = Some(Rebuild::Emptied);
                stage
            }
            (stage @ (S::Held | S::Refused | S::Hydrating), Event::Armed)
                if self.rebuild == Some(Rebuild::Emptied) =>
            {
                self.rebuild = None;
                stage
            }
            (S::Held | S::Refused | S::Switching, Event::SwitchAsked) => S::Switching,
            (S::Switching, Event::SourceFenced) => S::Hydrating,
            (S::Switching, Event::SourceRefused) if self.source.hold => S::Refused,
            // Nobody was given the device.
            (S::Switching, Event::SourceRefused) => S::Aborting,
            (S::Hydrating, Event::Floor(floor)) => {
                self.floor = self.floor.max(floor);
                S::Hydrating
            }
            (S::Hydrating, Event::Seeded) => {
                self.seeding = Seeding::Done;
                S::Hydrating
            }
            (S::Hydrating, Event::SeedingSkipped) => {
                self.seeding = Seeding::Skipped;
                S::Hydrating
            }
            (S::Hydrating, Event::Committed) => S::Collapsing,
            (S::Collapsing, Event::Collapsed) => S::Parting,
            (S::Parting, Event::MetaRetired) => {
                self.meta = None;
                S::Parting
            }
            (
                S::Allocating | S::Zeroing | S::Assembling | S::Held | S::Refused | S::Aborting,
                Event::AbortAsked,
            ) => {
                // Nothing of it is needed any more, whatever it was.
                self.failure = None;
                self.rebuild = None;
                S::Aborting
            }
            // The source's answer, whatever it is and whenever it comes, opens nothing
            // any more.
            (S::Switching, Event::SwitchGivenUp) => {
                self.failure = None;
                self.rebuild = None;
                S::Aborting
            }
            (S::Aborting, Event::Retired) => S::Withdrawing,
            (
                S::Requesting
                | S::Forking
                | S::Hydrating
                | S::Collapsing
                | S::Parting
                | S::Discarding,
                Event::DeleteAsked,
            ) => {
                self.failure = None;
                S::Discarding
            }
            (S::Discarding, Event::Retired) => S::Discarded,
            (
                stage @ (S::Hydrating
                | S::Collapsing
                | S::Parting
                | S::Withdrawing
                | S::Discarding
                | S::Discarded),
                Event::SourceForgotten,
            ) => {
                self.forgotten = true;
                stage
            }
            (
                stage @ (S::Held | S::Refused | S::Switching | S::Hydrating),
                Event::Failed(failure),
            ) => {
                self.failure = Some(failure);
                stage
            }
            (stage, Event::Rebooted) => {
                self.failure = None;
                stage
            }
            _ => return (None, None),
        };
        (made, Some(()))
    }
}
