//! A received volume of which no copy is kept: what consumers write goes to the source.
//!
//! A write that the source has acknowledged may still be in its caches when it loses
//! power. Its consumers, on another node, have lost none: if they went on, and flushed,
//! they would be told that everything is safe. So each time that consumers are let in
//! is a session, which ends with the power of either node: with this node's, the
//! consumers have gone as well, and the next session begins; with the source's, they
//! must be stopped. The source journals which session it serves, and in which boot.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Event, Failure, Receiving, ReceivingStage, Record};

/// What is known of consumers that write at the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remote {
    /// Which time consumers are let in, from 1.
    pub session: u64,
    /// The boot of this node in which they were; none until the source has answered.
    pub served_in: Option<Uuid>,
    /// Whether it stays remote until a caller says otherwise.
    pub stays: bool,
}

impl Remote {
    /// Before anybody was let in.
    pub const fn new(stays: bool) -> Self {
        Self { session: 1, served_in: None, stays }
    }

    /// Whoever was let in is gone.
    const fn anew(&mut self) {
        self.session = self.session.saturating_add(1);
        self.served_in = None;
    }
}

impl Record {
    /// What the source's word means that it has lost power since this session began:
    /// nothing where nobody was let in yet, and otherwise the end of it.
    pub fn source_lost_power(&self, boot: Uuid) -> Event {
        let remote = self.receiving().and_then(|receiving| receiving.remote.as_ref());
        if remote.is_none_or(|remote| remote.served_in.is_none()) {
            return Event::SessionLost;
        }
        let why = "the source lost power, and perhaps the last writes: whoever uses the volume \
                   must be stopped, and the volume detached";
        Event::Failed(Failure { why: why.to_owned(), boot })
    }

    /// The node on which everything is, where it is not this one.
    pub fn written_at(&self) -> Option<&str> {
        let receiving = self.receiving()?;
        let there = receiving.remote.is_some() && receiving.stage.is_taken();
        there.then_some(receiving.source.node.as_str())
    }
}

impl ReceivingStage {
    /// Whether what consumers write goes to the source.
    pub const fn writes_there(self) -> bool {
        matches!(self, Self::Remote | Self::Localizing | Self::Building | Self::Clearing)
    }
}

impl Receiving {
    /// As [`Receiving::after`], while there is no copy.
    pub(super) fn after_remote(&mut self, event: Event) -> (Option<String>, Option<()>) {
        use ReceivingStage as S;
        let Some(remote) = &mut self.remote else { return (None, None) };
        let first = remote.session == 1 && remote.served_in.is_none();
        let mut made = None;
        self.stage = match (self.stage, event) {
            (S::Linking, Event::Armed) if self.source.hold => S::Held,
            (S::Linking, Event::Armed) => S::Switching,
            (S::Held | S::Refused | S::Switching, Event::SwitchAsked) => S::Switching,
            (S::Switching, Event::SourceGrew(size)) if size > self.length => {
                self.length = size;
                S::Switching
            }
            (S::Switching, Event::SourceServes(boot)) => {
                remote.served_in = Some(boot);
                S::Remote
            }
            (stage, Event::SourceServes(boot)) if stage.writes_there() => {
                remote.served_in = Some(boot);
                stage
            }
            // Its consumers have not been stopped yet, and need not be.
            (S::Settling, Event::SourceServes(boot)) if remote.served_in == Some(boot) => {
                S::Settling
            }
            // Whoever waits for the answer has written nothing in this session.
            (stage @ (S::Switching | S::Settling), Event::SessionLost) => {
                remote.anew();
                stage
            }
            (stage, Event::SessionLost) if stage.writes_there() => {
                remote.anew();
                stage
            }
            // A source that has fenced does not refuse.
            (S::Switching, Event::SourceRefused) if first && self.source.hold => S::Refused,
            (S::Switching, Event::SourceRefused) if first => S::Aborting,
            (S::Linking | S::Held | S::Refused | S::Aborting, Event::AbortAsked) => {
                self.failure = None;
                S::Aborting
            }
            (S::Aborting, Event::Retired) => S::Withdrawing,
            (S::Localizing, Event::Allocated { data, meta: Some(meta) }) => {
                made = Some(data);
                self.meta = Some(meta);
                S::Localizing
            }
            (S::Localizing, Event::Zeroed) if self.meta.is_some() => S::Building,
            (S::Building, Event::Armed) => S::Settling,
            (S::Localizing | S::Building | S::Clearing, Event::LocalizeDropped) => S::Clearing,
            (S::Settling, Event::SourceFenced) => {
                self.remote = None;
                S::Hydrating
            }
            (S::Withdrawing, Event::SourceForgotten) => {
                self.forgotten = true;
                S::Withdrawing
            }
            (S::Returning, Event::ReturnAsked) => S::Returning,
            (stage, Event::ReturnAsked)
                if stage.writes_there() || matches!(stage, S::Switching | S::Settling) =>
            {
                self.failure = None;
                S::Returning
            }
            (
                stage @ (S::Held
                | S::Refused
                | S::Switching
                | S::Remote
                | S::Localizing
                | S::Building
                | S::Clearing
                | S::Settling),
                Event::Failed(failure),
            ) => {
                self.failure = Some(failure);
                stage
            }
            (stage, Event::Rebooted) => {
                self.failure = None;
                if remote.served_in.is_some() {
                    remote.anew();
                }
                stage
            }
            _ => return (None, None),
        };
        (made, Some(()))
    }
}
