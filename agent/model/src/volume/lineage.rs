//! What a copy's content began with: nothing, a snapshot, or another volume.
//!
//! ```text
//! volume ──taken──► snapshot ──made of──► volume, on the same node: Creating ► Local
//!                       │
//!                       └─────made of──► copy for one grant: Lent ► gone
//!                                          └─ received elsewhere as any volume is
//!
//! volume that hydrates ──taken──► snapshot that is received as well, from a copy for
//!                                 its own grant, of what the volume's source has fenced
//! ```
//!
//! A snapshot is a record like a volume's, of a generation that nobody may ever
//! write. All of these are thin snapshots in LVM and independent of what they were
//! made of: that one may change, move or go.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{LentStage, Phase, ReceivingStage, Record};
use crate::{
    name::{DmName, Generation, Role, VolumeId},
    units::Sectors,
};

/// What a copy is and what its content began with.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lineage {
    /// What this is a snapshot of; none for a volume.
    pub taken: Option<Taken>,
    /// What the volume was made of, carried along by moves; none for one that began
    /// blank.
    pub made_of: Option<Origin>,
    /// What the data LV is to be made a thin snapshot of; none once it is made.
    pub template: Option<Template>,
    /// Whether this copy was made for the grant that it is lent under, and goes when
    /// that is withdrawn: it never was a volume of this node's.
    pub passing: bool,
    /// How often the data LV was replaced by another; part of its name.
    pub revision: u32,
}

/// Of what, and when, a snapshot was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Taken {
    /// The volume.
    pub volume: VolumeId,
    /// Which volume of that id.
    pub incarnation: Uuid,
    /// When it was asked for, in seconds since the epoch; for people only.
    pub at: u64,
    /// Whether it is to go as soon as nobody reads it any more.
    pub deferred: bool,
}

/// What a volume was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A snapshot.
    Snapshot(VolumeId),
    /// A volume, as it was at that moment.
    Volume(VolumeId),
}

/// A logical volume that another is made a thin snapshot of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// Its device-mapper UUID, by which it is checked.
    pub data: String,
    /// Its name, which is what LVM takes.
    pub name: String,
    /// What belongs to it while some of its content is still at another node: none for
    /// one that is whole.
    pub moving: Option<Moving>,
}

/// A volume on its way to this node, of which a snapshot is taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Moving {
    /// The volume.
    pub id: VolumeId,
    /// Its generation: part of the names of its devices.
    pub generation: Generation,
    /// The device-mapper UUID of its clone metadata LV.
    pub meta: String,
    /// The grant by which it reads its source.
    pub grant: Uuid,
    /// Generation of the source's copy.
    pub lent_in: Generation,
}

impl Moving {
    /// Name of a device of the volume.
    pub fn dm_name(&self, role: Role) -> DmName {
        DmName::new(self.id, self.generation, role)
    }
}

/// A volume on its way back to a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revert {
    /// The snapshot.
    pub snapshot: VolumeId,
    /// Its logical volume.
    pub template: Template,
    /// Its size.
    pub size: Sectors,
    /// How far it is.
    pub stage: RevertStage,
}

/// How far a revert is. The record names the old data LV until the new one exists,
/// and the new one from then on: that one change of the journal is the revert.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RevertStage {
    /// The new data LV is being made beside the old one.
    Making,
    /// Given up: the old data LV stays, the new one goes.
    Undoing,
    /// The new data LV is the volume's; the old one, of this device-mapper UUID, goes.
    Retiring(String),
}

impl Record {
    /// What this is a snapshot of; none for a volume.
    pub const fn taken(&self) -> Option<&Taken> {
        self.lineage.taken.as_ref()
    }

    /// Whether the snapshot must stay for this copy's sake: something is being made
    /// of it, or another node is copying what was.
    pub fn reads(&self, snapshot: VolumeId) -> bool {
        let made_of = self.lineage.made_of == Some(Origin::Snapshot(snapshot));
        match &self.phase {
            Phase::Creating => made_of && self.lineage.template.is_some(),
            Phase::Lent(_) => made_of && self.lineage.passing,
            Phase::Reverting(revert) => {
                revert.snapshot == snapshot && revert.stage == RevertStage::Making
            }
            Phase::Local | Phase::Receiving(_) | Phase::Relaying(_) | Phase::Deleting => false,
        }
    }
}

impl Record {
    /// Whether this is a copy that was made of a volume for a node which reads it, and
    /// which nobody ever writes any more.
    pub fn is_read_by(&self, node: &str, volume: VolumeId) -> bool {
        self.lineage.made_of == Some(Origin::Volume(volume))
            && self.is_only_read()
            && self.lent().is_some_and(|lent| lent.to.node == node)
    }

    fn is_only_read(&self) -> bool {
        let Phase::Lent(lent) = &self.phase else { return false };
        self.lineage.passing && matches!(lent.stage, LentStage::Fenced | LentStage::Releasing)
    }

    /// Whether it may come to take all of its size here. What is only read, and what has
    /// nothing left here, never does.
    pub fn is_promised(&self) -> bool {
        let stage = self.receiving().map(|receiving| receiving.stage);
        !self.is_only_read() && stage != Some(ReceivingStage::Discarded)
    }
}

impl Generation {
    /// The generation of every snapshot: nobody ever had the right to write it.
    pub const SNAPSHOT: Self = Self(0);
}
