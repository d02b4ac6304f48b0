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
    /// Which time the consumers of a borrower without a copy were let in to write
    /// here; 0 before the first.
    pub session: u64,
    /// The boot of this node in which they were. In a later one what they had not
    /// flushed may be lost, and they must not go on as if it were not. None once
    /// everything they wrote is on stable storage for good.
    pub served_in: Option<Uuid>,
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
    /// storage. A release ends this, or the word of a borrower that will never take
    /// the volume.
    Fenced,
    /// The grant is withdrawn: nothing was written under it, nor will be.
    Revoking,
    /// The peer has everything; this copy goes.
    Releasing,
    /// The peer asked for the fence and will write here, through the export: nobody
    /// on this node may, any more.
    Yielding,
    /// Only the peer writes, through the export, and keeps nothing itself.
    Serving,
    /// The peer has given the right to write back: the export goes, then this copy is
    /// the volume again.
    Reclaiming,
}

impl Lent {
    /// Follows an event; `None`, and nothing changed, when it cannot happen here. The
    /// end of a revocation and of a return are the record's business.
    pub(super) fn after(&mut self, event: &Event) -> Option<()> {
        if *event == Event::Rebooted {
            // What the borrower had not flushed before the power went is known by
            // nobody: it must hear of it before anything is called fenced.
            let unflushed = self.stage == LentStage::Fencing && self.served_in.is_some();
            self.stage = unflushed.then_some(LentStage::Serving)?;
            return Some(());
        }
        if *event == Event::Untaken && self.session != 0 {
            // Its consumers wrote here: it has been the one to write.
            return None;
        }
        let stage = self.stage.after(event)?;
        match event {
            Event::ServeAsked { session, boot } => {
                (self.session, self.served_in) = (*session, Some(*boot));
            }
            Event::Fenced if stage == LentStage::Fenced => self.served_in = None,
            _ => {}
        }
        self.stage = stage;
        Some(())
    }
}

impl LentStage {
    /// Whether nobody on this node may write any more, or soon.
    pub const fn is_closed(self) -> bool {
        match self {
            Self::Fencing
            | Self::Fenced
            | Self::Releasing
            | Self::Yielding
            | Self::Serving
            | Self::Reclaiming => true,
            Self::Published | Self::Revoking => false,
        }
    }

    /// Where an event leads; `None` when it cannot happen here.
    const fn after(self, event: &Event) -> Option<Self> {
        Some(match (self, event) {
            (Self::Published | Self::Fencing | Self::Serving, Event::FenceAsked) => Self::Fencing,
            (Self::Fencing, Event::Fenced) => Self::Fenced,
            (Self::Fenced, Event::FenceAsked | Event::Fenced) => Self::Fenced,
            (Self::Published | Self::Revoking, Event::RevokeAsked) => Self::Revoking,
            // Nobody else is going to write: what was closed may open again.
            (Self::Fencing | Self::Fenced, Event::Untaken) => Self::Revoking,
            (Self::Fenced | Self::Releasing, Event::ReleaseAsked) => Self::Releasing,
            // One way only: once the export refuses writes again, it never takes any.
            (Self::Published | Self::Yielding, Event::ServeAsked { .. }) => Self::Yielding,
            (Self::Yielding, Event::Fenced) => Self::Serving,
            (Self::Serving, Event::ServeAsked { .. }) => Self::Serving,
            (Self::Serving | Self::Reclaiming, Event::ReturnAsked) => Self::Reclaiming,
            _ => return None,
        })
    }
}
