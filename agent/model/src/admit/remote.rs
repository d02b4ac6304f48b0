//! Whether a volume may be used here while its data stays where it is.

use uuid::Uuid;

use super::{
    Admitted, Claim, Evidence, Offer, PoolRoom, Refusal, claimed, journal, not_failed, receivable,
    received,
};
use crate::{
    hydration,
    plan::Device,
    units::Sectors,
    volume::{Event, Fate, Lent, LentStage, Phase, ReceivingStage, Record, Remote, Tombstone},
};

/// Receives a volume without room for it: what is written here goes to the source.
/// `stays` if a caller wants it so, rather than for want of room.
///
/// # Errors
/// As for [`super::receive`], but for the pool's part; the source does not have
/// everything itself; or the volume begins here, so that it is nowhere else.
pub fn receive_remote(
    existing: Option<&Record>,
    elder: Option<&Record>,
    offer: Offer,
    stays: bool,
    handle: Option<&Device>,
    this_node: &str,
    spent: Option<&Tombstone>,
) -> Result<Admitted, Refusal> {
    if let Some(done) = receivable(existing, elder, &offer, handle, this_node, spent)? {
        return Ok(done);
    }
    // What was made for this grant alone is no volume that could go back.
    if offer.begins {
        let range = "local, for a volume that begins here".to_owned();
        return Err(Refusal::SettingOutOfRange { setting: "mode", range });
    }
    // A copy that reads through another one keeps what is written apart from it.
    if offer.source.depth > 1 {
        return Err(Refusal::ChainTooDeep { depth: offer.source.depth, limit: 1 });
    }
    let (size, block) = (offer.size, offer.logical_block_size);
    if size == 0 || block == 0 || !size.is_multiple_of(u64::from(block)) {
        return Err(Refusal::SizeInvalid { size, block });
    }
    let mut record = received(offer, String::new(), Sectors(0), ReceivingStage::Linking);
    if let Phase::Receiving(receiving) = &mut record.phase {
        receiving.remote = Some(Remote::new(stays));
    }
    Ok(Admitted::Journal(Box::new(record)))
}

/// Makes a copy here of a volume that is used here and is elsewhere. `limit` is the
/// largest size, in bytes, of which this node makes copies.
///
/// # Errors
/// It is not served yet, is on its way out, has failed, is too large, or the pool does
/// not fit.
pub fn localize(record: &Record, pool: &PoolRoom, limit: Option<u64>) -> Result<Admitted, Refusal> {
    let Some((receiving, _)) = record.receiving().and_then(|r| Some((r, r.remote.as_ref()?)))
    else {
        return match &record.phase {
            // It has a copy, or is getting one, already.
            Phase::Local | Phase::Receiving(_) | Phase::Relaying(_) => Ok(Admitted::Already),
            Phase::Reverting(_) => Err(Refusal::VolumeReverting(record.id)),
            Phase::Creating | Phase::Deleting | Phase::Lent(_) => {
                Err(Refusal::VolumeMoving(record.id))
            }
        };
    };
    not_failed(record.id, receiving)?;
    match receiving.stage {
        ReceivingStage::Remote => {}
        ReceivingStage::Localizing | ReceivingStage::Building | ReceivingStage::Settling => {
            return Ok(Admitted::Already);
        }
        _ => return Err(Refusal::VolumeMoving(record.id)),
    }
    let size = record.size.bytes();
    if let Some(limit) = limit.filter(|limit| size > *limit) {
        return Err(Refusal::AlwaysRemote { size, limit });
    }
    if pool.logical_block_size != record.logical_block_size {
        return Err(Refusal::LogicalBlockSize {
            pool: pool.logical_block_size,
            volume: record.logical_block_size,
        });
    }
    pool.check_size(size)?;
    let region = hydration::region_size(size, pool.chunk);
    pool.check_room(size, hydration::metadata_bytes(record.size, region))?;
    journal(record, Event::LocalizeAsked { pool: pool.name.clone(), region })
}

/// The grant's holder asks that nobody here writes any more, and to be let write here
/// itself.
///
/// # Errors
/// The grant is not open here, names another generation, or is of a copy that was made
/// for it alone; what consumers of this session wrote may have been lost; this node
/// does not have everything itself; or the guest is plainly still running here.
pub fn serve(
    record: &Record,
    claim: &Claim,
    evidence: Evidence,
    boot: Uuid,
) -> Result<Admitted, Refusal> {
    let lent = claimed(record, claim)?;
    if record.lineage.passing {
        return Err(Refusal::GrantUnknown(claim.grant));
    }
    if let Some(receiving) = record.receiving() {
        return Err(Refusal::ChainTooDeep { depth: receiving.source.depth + 1, limit: 1 });
    }
    match lent.stage {
        LentStage::Published if evidence == Evidence::Writing => {
            return Err(Refusal::SourceActive(record.id));
        }
        LentStage::Published | LentStage::Yielding | LentStage::Serving => {}
        LentStage::Fencing | LentStage::Fenced | LentStage::Releasing => {
            return Err(Refusal::GrantFenced(claim.grant));
        }
        LentStage::Revoking => return Err(Refusal::GrantUnknown(claim.grant)),
        LentStage::Reclaiming => return Err(Refusal::GrantReturned(claim.grant)),
    }
    if is_current(lent, claim, boot)? {
        return Ok(Admitted::Already);
    }
    journal(record, Event::ServeAsked { session: claim.session, boot })
}

/// [`super::fence`] of a grant whose holder was let write here.
///
/// # Errors
/// As there; and what consumers of this session wrote may have been lost.
pub fn fence_served(
    record: &Record,
    lent: &Lent,
    claim: &Claim,
    boot: Uuid,
) -> Result<Admitted, Refusal> {
    if lent.stage == LentStage::Reclaiming {
        return Err(Refusal::GrantReturned(claim.grant));
    }
    let current = is_current(lent, claim, boot)?;
    match lent.stage {
        LentStage::Serving if current => journal(record, Event::FenceAsked),
        // What it waits for makes safe whatever came in an earlier session of this boot.
        LentStage::Fencing if lent.served_in == Some(boot) => Ok(Admitted::Already),
        LentStage::Serving | LentStage::Fencing => {
            // Nobody is left who could miss what was lost.
            let asked = Event::ServeAsked { session: claim.session, boot };
            let rebooted = (lent.stage == LentStage::Fencing).then_some(Event::Rebooted);
            let moving = |_| Refusal::VolumeMoving(record.id);
            let mut renewed = record.clone();
            for event in rebooted.into_iter().chain([asked]) {
                renewed = renewed.after(event).map_err(moving)?;
            }
            journal(&renewed, Event::FenceAsked)
        }
        LentStage::Published
        | LentStage::Fenced
        | LentStage::Releasing
        | LentStage::Revoking
        | LentStage::Yielding
        | LentStage::Reclaiming => Err(Refusal::GrantUnknown(claim.grant)),
    }
}

/// Whether the claim is of the session that is served, in this boot; not, if it is of a
/// later one.
fn is_current(lent: &Lent, claim: &Claim, boot: Uuid) -> Result<bool, Refusal> {
    match claim.session.cmp(&lent.session) {
        std::cmp::Ordering::Greater => Ok(false),
        std::cmp::Ordering::Equal if lent.served_in == Some(boot) => Ok(true),
        std::cmp::Ordering::Equal | std::cmp::Ordering::Less => {
            Err(Refusal::SessionStale(claim.grant))
        }
    }
}

/// The grant's holder has no use for the volume any more, or is gone: this copy is it
/// again. Whatever the holder was told is done is here, so that nothing is lost with it.
///
/// # Errors
/// The grant is not open here, names another generation, or its holder has never been
/// let write here.
pub fn reclaim(record: &Record, claim: &Claim, boot: Uuid) -> Result<Admitted, Refusal> {
    let lent = claimed(record, claim)?;
    match lent.stage {
        LentStage::Serving | LentStage::Reclaiming => journal(record, Event::ReturnAsked),
        // A fence that this node's power has ended, and with it the borrower's use.
        LentStage::Fencing if lent.served_in.is_some_and(|served| served != boot) => {
            let moving = |_| Refusal::VolumeMoving(record.id);
            journal(&record.clone().after(Event::Rebooted).map_err(moving)?, Event::ReturnAsked)
        }
        LentStage::Fencing | LentStage::Fenced | LentStage::Releasing => {
            Err(Refusal::GrantFenced(claim.grant))
        }
        LentStage::Published | LentStage::Revoking | LentStage::Yielding => {
            Err(Refusal::GrantUnknown(claim.grant))
        }
    }
}

/// What the holder of a grant hears that this node knows nothing of: if it has ended by
/// the volume's return, that it is over for good.
pub fn of_what_is_over(refusal: Refusal, stone: Option<&Tombstone>) -> Refusal {
    match (&refusal, stone) {
        (Refusal::GrantUnknown(grant), Some(stone))
            if stone.grant == *grant && stone.fate == Fate::Returned =>
        {
            Refusal::GrantReturned(*grant)
        }
        _ => refusal,
    }
}

/// Whether a copy is here, or on its way, that this node may change.
pub(crate) fn not_remote(record: &Record) -> Result<(), Refusal> {
    match record.receiving() {
        Some(receiving) if receiving.remote.is_some() && receiving.stage.is_taken() => {
            Err(Refusal::VolumeRemote { id: record.id, node: receiving.source.node.clone() })
        }
        Some(_) | None => Ok(()),
    }
}
