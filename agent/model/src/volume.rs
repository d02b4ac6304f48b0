//! What the journal says of a volume on one node, and how that may change.
//!
//! ```text
//! Creating ──────────────► Local ◄────────────────────────┐
//!                          │   ▲ revoked                  │
//!                 granted  ▼   │                          │ source released
//!                        Lent: Published ─► Fencing ─► Fenced ─► Releasing ─► gone
//!                                  └► Revoking ◄──┴──────┘
//!
//! Receiving: Allocating ─► Zeroing ─► Assembling ─┬► Held ─┬► Switching ─► Hydrating
//!                 │           │           │       └► cold ─┘                  ▼
//!                 └───────────┴───────────┴─► Aborting ◄ Held, Refused,  Collapsing
//!                                                 ▼        Switching          ▼
//!                                            Withdrawing ─► gone           Parting ─► Local
//!            Hydrating, Collapsing, Parting ─► Discarding ─► Discarded ─► gone
//!
//! Receiving without a copy of its own, where what is written goes to the source:
//!
//!            Linking ─┬► Held ─┬► Switching ─► Remote ─► Returning ─► gone
//!               │     └► cold ─┘               │    ▲
//!            Aborting                          ▼    └──────────────┐
//!                                   Localizing ─► Building ─► Clearing
//!                                                    ▼
//!                                                 Settling ─► Hydrating
//!
//! Lent, to a borrower that keeps no copy: Published ─► Yielding ─► Serving ─┬► Fencing
//!                                                       Local ◄─ Reclaiming ◄┘
//!
//! Snapshot of a volume that is Hydrating: Requesting ─┬► Forking ─┬► Hydrating
//!                                                     └───────────┴► Discarding
//!
//! Relaying: a copy that is received and lent at once; each side goes its own way
//!           until one of them ends (► Lent, ► Receiving) or both do (► gone).
//!
//! Local ► Reverting: Making ─► Retiring ─► Local, on the snapshot's content
//!                       └────► Undoing ──► Local, as it was
//! ```
//!
//! The record is the intent: it is written before anything is done, and
//! [`crate::plan`] derives every action from it and from what is really there.
//! Nothing here refuses or allows a request of a caller; that is
//! [`crate::admit`]'s work.

mod export;
mod lent;
mod lineage;
mod receiving;
mod remote;
#[cfg(test)]
mod test;
mod tombstone;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use self::{
    export::ExportName,
    lent::{Borrower, Lent, LentStage},
    lineage::{Lineage, Moving, Origin, Revert, RevertStage, Taken, Template},
    receiving::{Failure, Rebuild, Receiving, ReceivingStage, Source},
    remote::Remote,
    tombstone::{Fate, Tombstone},
};
use crate::{
    hydration::Tuning,
    name::{Generation, VolumeId},
    units::Sectors,
};

/// Everything the journal holds of one volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// What callers name.
    pub id: VolumeId,
    /// Chosen at creation and carried along: tells this volume from a later one
    /// with the same id.
    pub incarnation: Uuid,
    /// Pool on this node; empty for a volume of which nothing is here.
    pub pool: String,
    /// Size of the volume.
    pub size: Sectors,
    /// Logical block size in bytes; the same on every node.
    pub logical_block_size: u32,
    /// Counts hand-overs of the right to write.
    pub generation: Generation,
    /// The generation in which this copy came to be: its key in the journal, and part
    /// of its logical volumes' names. A copy whose right to write went to a borrower
    /// that kept none, and came back, has a later generation.
    pub made_in: Generation,
    /// Whether a consumer on this node wants the handle.
    pub attached: bool,
    /// LVM's UUID of the data LV, once it exists.
    pub data: Option<String>,
    /// The size that the data LV is being grown to.
    pub growing: Option<Sectors>,
    /// The grant through which this copy came here.
    pub came_by: Option<Uuid>,
    /// The last grant given for this copy that may be in use, to ask after a reboot.
    pub lent_before: Option<Borrower>,
    /// The boot in which it was confirmed that the borrower took nothing.
    pub confirmed_in: Option<Uuid>,
    /// Settings of the copy.
    pub tuning: Tuning,
    /// What its content began with.
    pub lineage: Lineage,
    /// Where the volume stands.
    pub phase: Phase,
}

/// Where a volume stands on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The data LV is being made.
    Creating,
    /// All data is here and nobody else has a claim.
    Local,
    /// Offered to a peer, or being handed over to it.
    Lent(Lent),
    /// Being built from a peer's export, or copying from it.
    Receiving(Box<Receiving>),
    /// Copying from one peer, and offered or handed over to another.
    Relaying(Box<Relay>),
    /// Going back to a snapshot.
    Reverting(Box<Revert>),
    /// On its way out, on a caller's word.
    Deleting,
}

/// The middle of a chain of moves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relay {
    /// Where the data comes from.
    pub receiving: Receiving,
    /// Where it goes on to.
    pub lent: Lent,
}

/// Something that has happened and is to be journalled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The LVs exist.
    Allocated {
        /// UUID of the data LV.
        data: String,
        /// UUID of the clone metadata LV.
        meta: Option<String>,
    },
    /// The source has made a copy of what it has fenced, and exports it so.
    CopyGranted(ExportName),
    /// A snapshot of a copy that is still on its way was taken, together with what that
    /// copy knows to be here.
    Forked {
        /// UUID of the data LV.
        data: String,
        /// UUID of the clone metadata LV.
        meta: String,
        /// Regions that are here for good.
        floor: u64,
    },
    /// The data LV has its new size.
    Grown,
    /// The source is larger than what is received: it grew before the fence.
    SourceGrew(Sectors),
    /// The start of the clone metadata is zero.
    Zeroed,
    /// The clone is complete and may be handed out.
    Armed,
    /// The source must be fenced.
    SwitchAsked,
    /// The source answered that it is fenced and flushed.
    SourceFenced,
    /// The source answered that it will not fence under this grant.
    SourceRefused,
    /// The source answered that it is fenced, and takes what is written here, in this
    /// boot of this node.
    SourceServes(Uuid),
    /// The source has lost power since it was asked, before consumers were let in.
    SessionLost,
    /// A copy is to be made here.
    LocalizeAsked {
        /// The pool.
        pool: String,
        /// Region size of the copy.
        region: Sectors,
    },
    /// The copy cannot be made.
    LocalizeDropped,
    /// So many regions are here for good.
    Floor(u64),
    /// What the source never wrote counts as being here, and that is committed.
    Seeded,
    /// Nothing is known of what the source never wrote, or it cannot be used.
    SeedingSkipped,
    /// Every region is here and committed.
    Committed,
    /// The handle is on the data LV and flushed.
    Collapsed,
    /// The source has let go.
    SourceReleased,
    /// An operator says that the source is lost for ever.
    SourceForgotten,
    /// The clone metadata LV is gone.
    MetaRetired,
    /// The move is given up.
    AbortAsked,
    /// The same while the source may have been fenced for it.
    SwitchGivenUp,
    /// Nothing of the given-up move is left here.
    Retired,
    /// The copy cannot go on in this boot.
    Failed(Failure),
    /// A later boot begins.
    Rebooted,
    /// The grant's holder asks for the fence.
    FenceAsked,
    /// The grant's holder asks for the fence, and to be let write here.
    ServeAsked {
        /// Which time its consumers are let in.
        session: u64,
        /// The boot of this node in which they are.
        boot: Uuid,
    },
    /// The volume goes back: at the borrower because nobody uses it there any more,
    /// at the lender because the borrower says so.
    ReturnAsked,
    /// Nobody else can write any more, and everything is flushed, in this boot.
    Reclaimed(Uuid),
    /// Nobody can write here and everything is flushed.
    Fenced,
    /// The grant is withdrawn.
    RevokeAsked,
    /// The borrower will never take the volume, whatever it has asked for.
    Untaken,
    /// Nothing of the export is left.
    Revoked,
    /// The grant's holder needs this copy no more.
    ReleaseAsked,
    /// The borrower took nothing, as of this boot.
    Confirmed(Uuid),
    /// A caller wants the volume gone.
    DeleteAsked,
    /// A caller wants the volume to be what this snapshot is, of this size.
    RevertAsked {
        /// The snapshot.
        snapshot: VolumeId,
        /// Its logical volume.
        template: Template,
        /// Its size.
        size: Sectors,
    },
    /// The new data LV could not be made.
    RevertGivenUp,
}

/// An event that cannot happen where the volume stands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} cannot follow {phase:?}")]
pub struct IllegalTransition {
    phase: Box<Phase>,
    event: Box<Event>,
}

impl Record {
    /// The only place where a phase changes. An event may be repeated (a crash
    /// came between the act and the journal), never skipped.
    ///
    /// # Errors
    /// Returns [`IllegalTransition`] and changes nothing.
    pub fn after(mut self, event: Event) -> Result<Self, IllegalTransition> {
        let illegal = IllegalTransition {
            phase: Box::new(self.phase.clone()),
            event: Box::new(event.clone()),
        };
        match (&mut self.phase, event) {
            (Phase::Creating, Event::Allocated { data, meta: None }) => {
                self.data = Some(data);
                self.lineage.template = None;
                self.phase = Phase::Local;
            }
            (Phase::Lent(_), Event::Allocated { data, meta: None })
                if self.lineage.template.is_some() =>
            {
                self.data = Some(data);
                self.lineage.template = None;
            }
            (Phase::Local, Event::RevertAsked { snapshot, template, size }) => {
                let stage = RevertStage::Making;
                self.phase = Phase::Reverting(Box::new(Revert { snapshot, template, size, stage }));
            }
            (Phase::Reverting(revert), Event::Allocated { data, meta: None })
                if revert.stage == RevertStage::Making =>
            {
                let Some(old) = self.data.replace(data) else { return Err(illegal) };
                revert.stage = RevertStage::Retiring(old);
                self.lineage.revision = self.lineage.revision.saturating_add(1);
                // A volume never shrinks: what it has grown by since is blank again.
                let wanted = self.growing.unwrap_or(self.size);
                self.growing = (wanted > revert.size).then_some(wanted);
                self.size = revert.size;
            }
            (Phase::Reverting(revert), Event::RevertGivenUp)
                if matches!(revert.stage, RevertStage::Making | RevertStage::Undoing) =>
            {
                revert.stage = RevertStage::Undoing;
            }
            (Phase::Reverting(revert), Event::Retired) if revert.stage != RevertStage::Making => {
                self.phase = Phase::Local;
            }
            (Phase::Creating | Phase::Local | Phase::Deleting, Event::DeleteAsked) => {
                self.phase = Phase::Deleting;
            }
            (
                Phase::Local | Phase::Lent(_) | Phase::Receiving(_) | Phase::Relaying(_),
                Event::Grown,
            ) => {
                if let Some(size) = self.growing.take() {
                    self.size = size;
                }
            }
            (
                Phase::Local | Phase::Lent(_) | Phase::Receiving(_) | Phase::Relaying(_),
                Event::Confirmed(boot),
            ) => {
                self.confirmed_in = Some(boot);
            }
            (Phase::Lent(lent), Event::Revoked) if lent.stage == LentStage::Revoking => {
                self.phase = if self.lineage.passing { Phase::Deleting } else { Phase::Local };
            }
            (Phase::Lent(lent), Event::Reclaimed(_)) if lent.stage == LentStage::Reclaiming => {
                // The borrower's was one more than this copy's.
                self.generation = self.generation.next().next();
                // Whatever is left there can write nothing any more, also after a boot.
                (self.attached, self.lent_before) = (false, None);
                self.phase = Phase::Local;
            }
            (Phase::Lent(lent), event) => {
                lent.after(&event).ok_or(illegal)?;
                if matches!(lent.stage, LentStage::Fencing | LentStage::Yielding) {
                    // The answer tells the size; what has not grown by then does not.
                    self.growing = None;
                }
            }
            (Phase::Receiving(receiving), Event::SourceReleased)
                if receiving.stage == ReceivingStage::Parting =>
            {
                self.phase = Phase::Local;
            }
            (Phase::Receiving(receiving), event @ Event::SourceGrew(size)) => {
                receiving.after(event).1.ok_or(illegal)?;
                self.size = size;
            }
            (Phase::Receiving(receiving), Event::LocalizeAsked { pool, region })
                if receiving.stage == ReceivingStage::Remote && receiving.failure.is_none() =>
            {
                receiving.stage = ReceivingStage::Localizing;
                receiving.region = region;
                self.pool = pool;
            }
            (Phase::Receiving(receiving), Event::Retired)
                if matches!(
                    receiving.stage,
                    ReceivingStage::Clearing | ReceivingStage::Returning
                ) =>
            {
                if receiving.stage == ReceivingStage::Clearing {
                    receiving.stage = ReceivingStage::Remote;
                }
                receiving.meta = None;
                self.data = None;
                self.pool = String::new();
            }
            (Phase::Receiving(receiving), event) => {
                let (data, done) = receiving.after(event);
                if data.is_some() {
                    self.lineage.template = None;
                }
                self.data = data.or(self.data);
                done.ok_or(illegal)?;
            }
            (Phase::Relaying(relay), event) => {
                let (receiving, lent) = (&mut relay.receiving, &mut relay.lent);
                match event {
                    Event::Revoked if lent.stage == LentStage::Revoking => {
                        self.phase = Phase::Receiving(Box::new(receiving.clone()));
                    }
                    Event::SourceReleased
                        if receiving.stage == ReceivingStage::Parting
                            && lent.stage != LentStage::Releasing =>
                    {
                        self.phase = Phase::Lent(lent.clone());
                    }
                    // The next holder has everything: both sides end.
                    Event::Retired if lent.stage == LentStage::Releasing => {
                        receiving.stage = ReceivingStage::Discarded;
                    }
                    // What is lent is nobody's to delete, whatever it still lacks.
                    Event::FenceAsked
                    | Event::Fenced
                    | Event::RevokeAsked
                    | Event::Untaken
                    | Event::Revoked
                    | Event::ReleaseAsked
                    | Event::ServeAsked { .. }
                    | Event::ReturnAsked
                    | Event::Reclaimed(_)
                    | Event::DeleteAsked => {
                        lent.after(&event).ok_or(illegal)?;
                        if lent.stage == LentStage::Fencing {
                            self.growing = None;
                        }
                    }
                    event => receiving.after(event).1.ok_or(illegal)?,
                }
            }
            _ => return Err(illegal),
        }
        Ok(self)
    }

    /// Gives a copy its turn among those of its node.
    pub fn set_turn(&mut self, turn: u64) {
        match &mut self.phase {
            Phase::Receiving(receiving) => receiving.turn = turn,
            Phase::Relaying(relay) => relay.receiving.turn = turn,
            Phase::Creating
            | Phase::Local
            | Phase::Lent(_)
            | Phase::Reverting(_)
            | Phase::Deleting => {}
        }
    }

    /// The source's side of a grant, where there is one.
    pub fn lent(&self) -> Option<&Lent> {
        match &self.phase {
            Phase::Lent(lent) => Some(lent),
            Phase::Relaying(relay) => Some(&relay.lent),
            Phase::Creating
            | Phase::Local
            | Phase::Receiving(_)
            | Phase::Reverting(_)
            | Phase::Deleting => None,
        }
    }

    /// The destination's side of a grant, where there is one.
    pub fn receiving(&self) -> Option<&Receiving> {
        match &self.phase {
            Phase::Receiving(receiving) => Some(receiving),
            Phase::Relaying(relay) => Some(&relay.receiving),
            Phase::Creating
            | Phase::Local
            | Phase::Lent(_)
            | Phase::Reverting(_)
            | Phase::Deleting => None,
        }
    }

    /// Whether this node has taken the right to write by `grant`, or may have:
    /// from the moment at which the source is asked for the fence.
    pub fn has_taken(&self, grant: Uuid) -> bool {
        match &self.phase {
            Phase::Receiving(receiving) => {
                receiving.source.grant == grant && receiving.stage.is_taken()
            }
            Phase::Creating
            | Phase::Local
            | Phase::Lent(_)
            | Phase::Relaying(_)
            | Phase::Reverting(_)
            | Phase::Deleting => self.came_by == Some(grant),
        }
    }

    /// Whether this node took the volume by `grant` and reads the source's copy no
    /// more, nor will tell it so by itself: the source's copy may go.
    pub fn has_done_with(&self, grant: Uuid) -> bool {
        match self.receiving() {
            Some(receiving) if receiving.source.grant == grant => {
                receiving.forgotten && receiving.stage.is_taken()
            }
            Some(_) | None => self.came_by == Some(grant),
        }
    }

    /// Whether regions were lost with a forgotten source and may still be missing.
    pub fn is_damaged(&self) -> bool {
        self.receiving().is_some_and(|r| r.forgotten && r.stage == ReceivingStage::Hydrating)
    }

    /// Whether the handle may stand on the data LV as far as earlier grants are
    /// concerned: after a reboot, a volume that was once lent stays closed
    /// until somebody has confirmed that the borrower took nothing.
    pub fn is_confirmed(&self, boot: Uuid) -> bool {
        self.lent_before.is_none() || self.confirmed_in == Some(boot)
    }
}
