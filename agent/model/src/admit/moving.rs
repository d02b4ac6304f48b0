//! Requests about a snapshot of a volume that is still on its way to this node.
//!
//! What the volume lacks here is at its source, fenced. The source makes a copy of that
//! for the snapshot's own grant, fenced from the start; here the data and what is known
//! to be here are made copies of at one moment. From then on the snapshot is a received
//! copy like any other, and neither it nor the volume needs the other.

use uuid::Uuid;

use super::{
    Admitted, Claim, PoolRoom, Refusal, SnapshotRequest, claimed, not_failed,
    snapshots::{self, Needed},
};
use crate::{
    forget, hydration,
    name::{Generation, VolumeId},
    plan::{self, Seen},
    seeding::Seeding,
    volume::{
        Borrower, ExportName, Lent, LentStage, Lineage, Moving, Origin, Phase, Receiving,
        ReceivingStage, Record, Source, Taken, Template, Tombstone,
    },
};

/// Whether a snapshot of this volume lacks something, so that its source has a part in
/// it.
pub(super) fn is_moving(record: &Record) -> bool {
    matches!(&record.phase, Phase::Receiving(receiving)
        if receiving.stage == ReceivingStage::Hydrating && receiving.remote.is_none())
}

/// Whether the source of a volume that hydrates can be read, of which a snapshot is to be
/// taken: without it nothing would come of that for a long time.
///
/// # Errors
/// It cannot.
pub fn reachable(record: &Record, seen: &Seen) -> Result<(), Refusal> {
    match record.receiving() {
        Some(receiving) if is_moving(record) && !receiving.forgotten && !forget::is_alive(seen) => {
            let (id, node) = (record.id, receiving.source.node.clone());
            Err(Refusal::SourceAway { id, node })
        }
        Some(_) | None => Ok(()),
    }
}

/// What a snapshot of a volume that hydrates is made of. Nobody else reads it: what
/// another node reads through it is what this one lacks as well.
fn moving(record: &Record) -> Result<(&Receiving, Template), Refusal> {
    let refusal = || Refusal::VolumeMoving(record.id);
    let Phase::Receiving(receiving) = &record.phase else { return Err(refusal()) };
    not_failed(record.id, receiving)?;
    if receiving.forgotten {
        let (id, node) = (record.id, receiving.source.node.clone());
        return Err(Refusal::RegionsLost { id, node });
    }
    if !is_moving(record) || receiving.rebuild.is_some() || record.growing.is_some() {
        return Err(refusal());
    }
    let (Some(data), Some(meta)) = (record.data.clone(), receiving.meta.clone()) else {
        return Err(refusal());
    };
    let Source { grant, generation: lent_in, .. } = receiving.source;
    let moving = Moving { id: record.id, generation: record.generation, meta, grant, lent_in };
    let name = plan::lv_names(record).0;
    Ok((receiving, Template { data, name, moving: Some(moving) }))
}

/// Begins a snapshot of a volume that hydrates. The right to read its source is given to
/// nobody yet; what it is made of is kept as it is until that is done.
pub(super) fn fork(
    request: &SnapshotRequest,
    volume: &Record,
    taken: Taken,
    room: Option<&PoolRoom>,
) -> Result<Admitted, Refusal> {
    let (receiving, template) = moving(volume)?;
    let meta = hydration::metadata_bytes(volume.size, receiving.region);
    let grant = request.grant;
    // What was never written at the source may be marked at the volume only after this
    // moment; then all of it is copied here.
    let seeding = match receiving.seeding {
        Seeding::Done => Seeding::Done,
        Seeding::Wanted | Seeding::Skipped => Seeding::Skipped,
    };
    let phase = Phase::Receiving(Box::new(Receiving {
        source: Source {
            grant,
            node: receiving.source.node.clone(),
            endpoint: receiving.source.endpoint.clone(),
            generation: Generation::FIRST,
            hold: false,
            depth: 1,
            export: ExportName::unknown(grant),
        },
        meta: None,
        length: receiving.length,
        region: receiving.region,
        floor: 0,
        forgotten: false,
        turn: 0,
        seeding,
        stage: ReceivingStage::Requesting,
        rebuild: None,
        forced: false,
        remote: None,
        failure: None,
    }));
    let lineage = Lineage { taken: Some(taken), template: Some(template), ..Lineage::default() };
    let (id, incarnation) = (request.id, request.incarnation);
    let generation = Generation::SNAPSHOT;
    let needed = Needed { data: volume.size.bytes(), meta };
    let admitted =
        snapshots::made(id, incarnation, generation, volume, lineage, phase, room, needed)?;
    Ok(match admitted {
        Admitted::Already => Admitted::Already,
        Admitted::Journal(record) => {
            // Whoever lets the volume wait for its bytes means what is copied again, too.
            let tuning = volume.tuning.clone();
            Admitted::Journal(Box::new(Record { came_by: Some(grant), tuning, ..*record }))
        }
    })
}

/// Whether a volume is still what a snapshot of it was begun of: its source has been asked
/// meanwhile, and nobody held the volume.
///
/// # Errors
/// It is not, or it is not on its way here any more.
pub fn still(snapshot: &Record, volume: Option<&Record>) -> Result<(), Refusal> {
    let of = snapshot.taken().ok_or(Refusal::SnapshotNotFound(snapshot.id))?;
    let volume = volume.ok_or(Refusal::VolumeNotFound(of.volume))?;
    let (receiving, template) = moving(volume)?;
    let same = snapshot.lineage.template.as_ref() == Some(&template)
        && (volume.incarnation, volume.size) == (of.incarnation, snapshot.size)
        && snapshot.receiving().is_some_and(|own| own.length == receiving.length);
    if same { Ok(()) } else { Err(Refusal::VolumeMoving(volume.id)) }
}

/// What a borrower asks of what was fenced for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyRequest {
    /// Id of the copy: the snapshot's.
    pub id: VolumeId,
    /// Incarnation of the copy: the snapshot's.
    pub incarnation: Uuid,
    /// The grant under which the copy is lent; never the volume's.
    pub grant: Uuid,
    /// The volume.
    pub volume: VolumeId,
    /// By what the borrower reads the volume.
    pub claim: Claim,
}

impl CopyRequest {
    /// What the source is asked for, for a snapshot that has begun.
    pub fn of(snapshot: &Record) -> Option<Self> {
        let moving = snapshot.lineage.template.as_ref()?.moving.as_ref()?;
        let claim = Claim {
            grant: moving.grant,
            incarnation: snapshot.taken()?.incarnation,
            generation: moving.lent_in,
            session: 0,
        };
        Some(Self {
            id: snapshot.id,
            incarnation: snapshot.incarnation,
            grant: snapshot.receiving()?.source.grant,
            volume: moving.id,
            claim,
        })
    }
}

/// Most copies that a source has at a time of one volume that it has fenced.
pub const MAX_COPIES: usize = 16;

/// The caller's own grant of a volume.
///
/// # Errors
/// It has none, or the volume is of another generation.
pub fn lent_to<'a>(
    volume: Option<&'a Record>,
    claim: &Claim,
    caller: Option<&str>,
) -> Result<&'a Lent, Refusal> {
    let unknown = || Refusal::GrantUnknown(claim.grant);
    let lent = claimed(volume.ok_or_else(unknown)?, claim)?;
    match caller.is_none_or(|caller| caller == lent.to.node) {
        true => Ok(lent),
        false => Err(unknown()),
    }
}

/// At the source: makes a copy of a volume that was fenced for the caller, for a
/// snapshot there. It is fenced as well, because nobody ever writes it, and goes when it
/// is released.
///
/// # Errors
/// The volume is not fenced for the caller, or not all of it is here; the grant was used
/// before; or the id is taken.
pub fn grant_copy(
    existing: Option<&Record>,
    request: &CopyRequest,
    volume: Option<&Record>,
    caller: Option<&str>,
    export: Option<ExportName>,
    room: Option<&PoolRoom>,
    spent: Option<&Tombstone>,
) -> Result<Admitted, Refusal> {
    let (id, grant) = (request.id, request.grant);
    let unknown = Refusal::GrantUnknown(request.claim.grant);
    let to = lent_to(volume, &request.claim, caller)?;
    let volume = volume.ok_or_else(|| unknown.clone())?;
    let origin = Origin::Volume(volume.id);
    if let Some(existing) = existing {
        let lent = existing.lent().filter(|lent| lent.to.grant == grant);
        let same = existing.lineage.made_of == Some(origin)
            && existing.incarnation == request.incarnation
            && lent.is_some_and(|lent| lent.stage == LentStage::Fenced);
        return match same {
            true => Ok(Admitted::Already),
            false => Err(Refusal::VolumeExists { id, field: "grant" }),
        };
    }
    // After what exists: nobody but its holder ends what is open.
    if spent.is_some() {
        return Err(Refusal::GrantUnknown(grant));
    }
    match (&volume.phase, to.stage) {
        (Phase::Lent(_), LentStage::Fenced) => {}
        // Some of it is at a third node.
        (Phase::Relaying(_), LentStage::Fenced) => {
            return Err(Refusal::VolumeMoving(volume.id));
        }
        // Before, it may still be written; after, it may be gone.
        (_, _) => return Err(unknown),
    }
    let template = snapshots::of_data(volume).ok_or(Refusal::VolumeMoving(volume.id))?;
    let lineage = Lineage {
        made_of: Some(origin),
        template: Some(template),
        passing: true,
        ..Lineage::default()
    };
    let phase = Phase::Lent(Lent {
        to: Borrower { grant, ..to.to.clone() },
        host_nqn: to.host_nqn.clone(),
        hold: false,
        export: export.ok_or(Refusal::PortsExhausted)?,
        stage: LentStage::Fenced,
        session: 0,
        served_in: None,
    });
    let (incarnation, generation) = (request.incarnation, Generation::FIRST);
    // Neither it nor the volume is ever written here again.
    let needed = Needed { data: 0, meta: 0 };
    snapshots::made(id, incarnation, generation, volume, lineage, phase, room, needed)
}

/// What a borrower's word that it needs a grant no more means where no such grant is
/// open: a request for it may still come, and must find it spent.
pub fn never_granted(volume: VolumeId, claim: &Claim) -> Tombstone {
    use crate::volume::Fate;
    let Claim { grant, incarnation, .. } = *claim;
    Tombstone { volume, incarnation, grant, fate: Fate::Released }
}
