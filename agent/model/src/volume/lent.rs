//! The source's side of a grant.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Event, ExportName};

/// Whom a grant was given to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Borrower {
    /// The grant.
    pub grant: Uuid,
    /// Name of the node.
    pub node: String,
    /// URL of its agent.
    pub endpoint: String,
}

/// The source's side of a grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lent {
    /// Who may read, by which grant.
    pub to: Borrower,
    /// NQN by which the borrower connects.
    pub host_nqn: String,
    /// Whether the volume stays writable here until the fence is asked for;
    /// otherwise it is closed from the start.
    pub hold: bool,
    /// What is exported.
    pub export: ExportName,
    /// How far the hand-over is.
    pub stage: LentStage,
}

impl Lent {
    /// Whether consumers here may still write.
    pub fn is_held(&self) -> bool {
        self.hold && self.stage == LentStage::Published
    }
}

/// How far a hand-over is at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LentStage {
    /// The peer may read; this node may still write, if the grant is held.
    Published,
    /// The peer asked for the fence: writing ends.
    Fencing,
    /// Nobody on this node can write; everything acknowledged is on stable
    /// storage. Only a release ends this.
    Fenced,
    /// The grant was withdrawn before it was fenced.
    Revoking,
    /// The peer has everything; this copy goes.
    Releasing,
}

impl LentStage {
    /// Whether nobody on this node may write any more, or soon.
    pub const fn is_closed(self) -> bool {
        match self {
            Self::Fencing | Self::Fenced | Self::Releasing => true,
            Self::Published | Self::Revoking => false,
        }
    }

    /// Where an event leads; `None` when it cannot happen here. The end of a
    /// revocation is the record's business.
    pub(super) const fn after(self, event: &Event) -> Option<Self> {
        Some(match (self, event) {
            (Self::Published | Self::Fencing, Event::FenceAsked) => Self::Fencing,
            (Self::Fencing, Event::Fenced) => Self::Fenced,
            (Self::Fenced, Event::FenceAsked | Event::Fenced) => Self::Fenced,
            (Self::Published | Self::Revoking, Event::RevokeAsked) => Self::Revoking,
            (Self::Fenced | Self::Releasing, Event::ReleaseAsked) => Self::Releasing,
            _ => return None,
        })
    }
}
