//! Giving up a source that is lost for ever, and what is left of one that comes back
//! after all.
//!
//! A source is given up only by an operator. Before it has said that it is fenced,
//! that means to give up the move: whoever waits to write here fails, and a source
//! that comes back after all hears that it is the volume. Afterwards this node's copy
//! is the volume, whatever it lacks. Nothing is invented for what it lacks: reads of it
//! fail until it is rewritten. The source's copy stays fenced for ever; it goes when
//! somebody deletes it, and the node that has the volume says that it reads it no more.

use crate::{
    admit::{Admitted, Refusal, journal, not_failed, not_remote},
    hydration,
    plan::Seen,
    volume::{Event, Fate, LentStage, Phase, Receiving, ReceivingStage, Record, Tombstone},
};

/// What is lost with a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lost {
    /// Regions that are nowhere else.
    pub regions: u64,
    /// The same in bytes.
    pub bytes: u64,
}

impl Lost {
    /// What is lost when so many regions are here.
    pub fn of(receiving: &Receiving, hydrated: u64) -> Self {
        let total = hydration::regions(receiving.length, receiving.region);
        let regions = total.saturating_sub(hydrated);
        let bytes = regions.saturating_mul(receiving.region.bytes());
        Self { regions, bytes: bytes.min(receiving.length.bytes()) }
    }

    /// What is lost with a source that has not said that it is fenced: everything,
    /// unless it comes back.
    pub fn of_move(record: &Record) -> Option<Self> {
        let receiving = record.receiving()?;
        let switching = receiving.stage == ReceivingStage::Switching;
        switching.then(|| Self::of(receiving, 0))
    }
}

/// Whether the source's data can be read at this moment.
pub fn is_alive(seen: &Seen) -> bool {
    seen.import.live && seen.import.namespace.is_some() && !seen.path_failed
}

/// Whether regions would be lost, so that those that are here must be made to stay
/// before the source is given up.
pub fn loses(record: &Record) -> bool {
    record.lent().is_none_or(|lent| lent.stage != LentStage::Releasing)
        && record.receiving().is_some_and(|receiving| {
            receiving.stage == ReceivingStage::Hydrating && !receiving.forgotten
        })
}

/// Whether the source may be given up.
///
/// # Errors
/// The volume did not come from anywhere, its source has not said that it is fenced,
/// the source's data can still be read, a third node reads through this one, or there
/// is no copy here.
pub fn may_forget(record: &Record, alive: bool) -> Result<(), Refusal> {
    use ReceivingStage as S;
    let Some(receiving) = record.receiving() else {
        return match record.came_by {
            // All of it is here.
            Some(_) if record.phase == Phase::Local => Ok(()),
            Some(_) | None => Err(Refusal::VolumeNotHydrating(record.id)),
        };
    };
    // Nothing would be left: all of it is there.
    not_remote(record)?;
    match receiving.stage {
        S::Allocating
        | S::Linking
        | S::Zeroing
        | S::Assembling
        | S::Held
        | S::Refused
        | S::Aborting => Err(Refusal::SourceNotFenced(record.id)),
        S::Switching => match alive {
            true => Err(Refusal::SourceAlive { node: receiving.source.node.clone() }),
            false => Ok(()),
        },
        S::Requesting
        | S::Forking
        | S::Remote
        | S::Localizing
        | S::Building
        | S::Clearing
        | S::Settling
        | S::Returning => Err(Refusal::VolumeMoving(record.id)),
        S::Collapsing | S::Parting | S::Withdrawing | S::Discarding | S::Discarded => Ok(()),
        S::Hydrating if receiving.forgotten => Ok(()),
        // Fenced, but nothing of it is here yet.
        S::Hydrating if receiving.rebuild.is_some() => Err(Refusal::SourceNotFenced(record.id)),
        S::Hydrating => {
            not_failed(record.id, receiving)?;
            if let Some(lent) = record.lent() {
                let (id, node) = (record.id, lent.to.node.clone());
                match lent.stage {
                    LentStage::Published | LentStage::Revoking => {
                        return Err(Refusal::VolumePublished { id, node });
                    }
                    LentStage::Fencing
                    | LentStage::Fenced
                    | LentStage::Yielding
                    | LentStage::Serving
                    | LentStage::Reclaiming => {
                        return Err(Refusal::VolumeFenced { id, node });
                    }
                    // The next holder has everything.
                    LentStage::Releasing => {}
                }
            }
            match alive {
                true => Err(Refusal::SourceAlive { node: receiving.source.node.clone() }),
                false => Ok(()),
            }
        }
    }
}

/// Gives the source up. `committed` regions are here for good; it counts only where
/// [`loses`] says so.
///
/// # Errors
/// See [`may_forget`].
pub fn forget_source(record: &Record, alive: bool, committed: u64) -> Result<Admitted, Refusal> {
    may_forget(record, alive)?;
    let Some(receiving) = record.receiving() else { return Ok(Admitted::Already) };
    if receiving.forgotten {
        return Ok(Admitted::Already);
    }
    if receiving.stage == ReceivingStage::Switching {
        // Nothing is here, and whether the source still has a writer is not known.
        return journal(record, Event::SwitchGivenUp);
    }
    if !loses(record) {
        return journal(record, Event::SourceForgotten);
    }
    match journal(record, Event::Floor(committed))? {
        Admitted::Already => journal(record, Event::SourceForgotten),
        Admitted::Journal(floored) => journal(&floored, Event::SourceForgotten),
    }
}

/// What a node can say of a grant that was once given to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GrantFate {
    /// It took the right to write, or asked for it.
    pub taken: bool,
    /// It took it, and the source's copy may go.
    pub released: bool,
    /// It gave up unwritten, and will never take it.
    pub given_up: bool,
}

/// What became of a grant, as the node knows that it was given to: by its copies of
/// the volume, and by the grant's tombstone.
pub fn fate<'a>(
    copies: impl IntoIterator<Item = &'a Record>,
    stone: Option<&Tombstone>,
    grant: uuid::Uuid,
) -> GrantFate {
    let buried = stone.is_some_and(|stone| stone.fate == Fate::Taken);
    let given_up = stone.is_some_and(|stone| stone.fate == Fate::Aborted);
    let mut fate = GrantFate { taken: buried, released: buried, given_up };
    for copy in copies {
        fate.taken |= copy.has_taken(grant);
        fate.released |= copy.has_done_with(grant);
    }
    fate
}

/// Deletes a fenced copy that its borrower has forgotten: what a release would have
/// brought. Its handle, which fails every request, goes with its last user.
///
/// # Errors
/// Its borrower may still read it.
pub fn delete_fenced(record: &Record, released: bool) -> Result<Admitted, Refusal> {
    let (Phase::Lent(_) | Phase::Relaying(_), Some(lent)) = (&record.phase, record.lent()) else {
        return Err(Refusal::VolumeMoving(record.id));
    };
    if !released || !matches!(lent.stage, LentStage::Fenced | LentStage::Releasing) {
        return Err(Refusal::VolumeFenced { id: record.id, node: lent.to.node.clone() });
    }
    journal(record, Event::ReleaseAsked)
}
