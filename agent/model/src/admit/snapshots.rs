//! Requests about snapshots, and about volumes that are made of something.

use uuid::Uuid;

use super::{
    Admitted, GrantRequest, PoolRoom, Refusal, at_rest, grant, journal, moving, not_failed,
    not_remote,
};
use crate::{
    hydration::Tuning,
    name::{Generation, VolumeId},
    plan::{self, Device},
    units::Sectors,
    volume::{
        Event, Lent, LentStage, Lineage, Origin, Phase, ReceivingStage, Record, RevertStage, Taken,
        Template,
    },
};

/// Whether this volume's data LV is the volume, now and all of it, and so may be
/// made a thin snapshot of. What is attached may be written meanwhile: LVM suspends
/// the data LV below the handle, so that the snapshot is of one moment.
///
/// # Errors
/// Another node has the right to write, or may have; something is still missing
/// here; or it is going back to a snapshot.
pub fn template(record: &Record, boot: Uuid) -> Result<Template, Refusal> {
    let id = record.id;
    if let Some(lent) = record.lent() {
        let node = lent.to.node.clone();
        match lent.stage {
            LentStage::Fencing
            | LentStage::Fenced
            | LentStage::Releasing
            | LentStage::Yielding
            | LentStage::Serving
            | LentStage::Reclaiming => {
                return Err(Refusal::VolumeFenced { id, node });
            }
            LentStage::Published | LentStage::Revoking if record.lineage.passing => {
                return Err(Refusal::VolumePublished { id, node });
            }
            LentStage::Published | LentStage::Revoking => {}
        }
    }
    not_remote(record)?;
    if let Some(receiving) = record.receiving() {
        not_failed(id, receiving)?;
        // Before, some of it is at the source only.
        if receiving.stage != ReceivingStage::Parting {
            return Err(Refusal::VolumeMoving(id));
        }
    }
    match &record.phase {
        Phase::Local | Phase::Lent(_) | Phase::Receiving(_) | Phase::Relaying(_) => {}
        Phase::Creating | Phase::Reverting(_) | Phase::Deleting => at_rest(record)?,
    }
    confirmed(record, boot)?;
    of_data(record).ok_or(Refusal::VolumeMoving(id))
}

/// The data LV of a snapshot that new copies may be made of.
///
/// # Errors
/// It is not there yet, not all of it, or it is on its way out.
pub fn snapshot_template(record: &Record) -> Result<Template, Refusal> {
    let stage = record.receiving().map(|receiving| receiving.stage);
    let whole = record.phase == Phase::Local || stage == Some(ReceivingStage::Parting);
    let arriving = stage.is_some_and(ReceivingStage::is_owner);
    if record.taken().is_some() && arriving && !whole {
        return Err(Refusal::VolumeMoving(record.id));
    }
    let usable = whole && record.taken().is_some_and(|taken| !taken.deferred);
    let template = usable.then(|| of_data(record)).flatten();
    template.ok_or(Refusal::SnapshotNotFound(record.id))
}

pub(super) fn of_data(record: &Record) -> Option<Template> {
    let data = record.data.clone()?;
    Some(Template { data, name: plan::lv_names(record).0, moving: None })
}

fn confirmed(record: &Record, boot: Uuid) -> Result<(), Refusal> {
    match &record.lent_before {
        Some(borrower) if !record.is_confirmed(boot) => Err(Refusal::ConfirmationRequired {
            id: record.id,
            node: borrower.node.clone(),
            generation: record.generation,
        }),
        Some(_) | None => Ok(()),
    }
}

/// A snapshot that is to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// Its id.
    pub id: VolumeId,
    /// Of which volume.
    pub volume: VolumeId,
    /// Its own incarnation, if it is new.
    pub incarnation: Uuid,
    /// The grant by which it reads what it lacks, if it is new and the volume is still on
    /// its way here.
    pub grant: Uuid,
    /// Seconds since the epoch.
    pub at: u64,
}

/// Takes a snapshot of the volume whose record this is.
///
/// # Errors
/// The id is taken by another volume's snapshot, or see [`template`]. Of a volume that
/// hydrates: it has failed, has lost its source for ever, or is read by another node.
pub fn take_snapshot(
    existing: Option<&Record>,
    request: &SnapshotRequest,
    volume: Option<&Record>,
    room: Option<&PoolRoom>,
    boot: Uuid,
) -> Result<Admitted, Refusal> {
    let id = request.id;
    if let Some(existing) = existing {
        let of = existing.taken().ok_or(Refusal::SnapshotNotFound(id))?;
        let field = match () {
            () if of.volume != request.volume => "volume_id",
            () if volume.is_some_and(|volume| volume.incarnation != of.incarnation) => {
                "incarnation"
            }
            () if of.deferred || is_going(existing) => "state",
            // Nobody was told that it exists.
            () if existing.lineage.template.is_some() => "state",
            () => return Ok(Admitted::Already),
        };
        return Err(Refusal::SnapshotExists { id, field });
    }
    let volume = volume.ok_or(Refusal::VolumeNotFound(request.volume))?;
    let taken = Taken {
        volume: volume.id,
        incarnation: volume.incarnation,
        at: request.at,
        deferred: false,
    };
    if moving::is_moving(volume) {
        confirmed(volume, boot)?;
        return moving::fork(request, volume, taken, room);
    }
    let template = template(volume, boot)?;
    let lineage = Lineage { taken: Some(taken), template: Some(template), ..Lineage::default() };
    let (new, generation) = (request.incarnation, Generation::SNAPSHOT);
    made(id, new, generation, volume, lineage, Phase::Creating, room, Needed::all_of(volume))
}

/// Whether a snapshot is on its way out.
fn is_going(snapshot: &Record) -> bool {
    use ReceivingStage as S;
    let stage = snapshot.receiving().map(|receiving| receiving.stage);
    snapshot.phase == Phase::Deleting || matches!(stage, Some(S::Discarding | S::Discarded))
}

/// Bytes that a copy may come to take in its pool.
pub(super) struct Needed {
    /// Of data: every block of it may be written again.
    pub data: u64,
    /// Of clone metadata.
    pub meta: u64,
}

impl Needed {
    fn all_of(source: &Record) -> Self {
        Self { data: source.size.bytes(), meta: 0 }
    }
}

/// A copy of `source`'s content, all of it, in the same pool.
#[expect(clippy::too_many_arguments, reason = "what every copy is told by")]
pub(super) fn made(
    id: VolumeId,
    incarnation: Uuid,
    generation: Generation,
    source: &Record,
    lineage: Lineage,
    phase: Phase,
    room: Option<&PoolRoom>,
    needed: Needed,
) -> Result<Admitted, Refusal> {
    let room = room.ok_or_else(|| Refusal::PoolNotFound(source.pool.clone()))?;
    room.check_room(needed.data, needed.meta)?;
    Ok(Admitted::Journal(Box::new(Record {
        id,
        incarnation,
        pool: source.pool.clone(),
        size: source.size,
        logical_block_size: source.logical_block_size,
        generation,
        made_in: generation,
        attached: false,
        data: None,
        growing: None,
        came_by: None,
        lent_before: None,
        confirmed_in: None,
        tuning: Tuning::default(),
        lineage,
        phase,
    })))
}

/// What a volume is to be made of: a snapshot or a volume, and its record if it is
/// here.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Which.
    pub origin: Origin,
    /// Its record.
    pub record: Option<&'a Record>,
}

impl Source<'_> {
    fn found(&self, boot: Uuid) -> Result<(&Record, Template), Refusal> {
        match (self.origin, self.record) {
            (Origin::Snapshot(_), Some(record)) => Ok((record, snapshot_template(record)?)),
            (Origin::Volume(_), Some(record)) => Ok((record, template(record, boot)?)),
            (Origin::Snapshot(id), None) => Err(Refusal::SnapshotNotFound(id)),
            (Origin::Volume(id), None) => Err(Refusal::VolumeNotFound(id)),
        }
    }
}

/// Makes a volume of a snapshot, or of another volume as it is now, on the same node.
///
/// # Errors
/// The id is taken by something else, or there is no such source to make it of.
pub fn create_of(
    existing: Option<&Record>,
    id: VolumeId,
    source: Source<'_>,
    room: Option<&PoolRoom>,
    incarnation: Uuid,
    boot: Uuid,
) -> Result<Admitted, Refusal> {
    if let Some(existing) = existing {
        let field = match () {
            () if existing.lineage.made_of != Some(source.origin) => "source",
            () if existing.phase == Phase::Deleting || existing.lineage.passing => "state",
            () => return Ok(Admitted::Already),
        };
        return Err(Refusal::VolumeExists { id, field });
    }
    let (record, template) = source.found(boot)?;
    if let Some(room) = room
        && room.name != record.pool
    {
        return Err(Refusal::PoolOfSource { pool: record.pool.clone() });
    }
    let lineage =
        Lineage { made_of: Some(source.origin), template: Some(template), ..Lineage::default() };
    made(
        id,
        incarnation,
        Generation::FIRST,
        record,
        lineage,
        Phase::Creating,
        room,
        Needed::all_of(record),
    )
}

/// The same for one peer that is to receive it: a copy that exists for this grant
/// alone, and that never was a volume here.
///
/// # Errors
/// See [`create_of`] and [`grant`].
#[expect(clippy::too_many_arguments, reason = "what both creation and grant need")]
pub fn grant_of(
    existing: Option<&Record>,
    id: VolumeId,
    source: Source<'_>,
    request: GrantRequest,
    room: Option<&PoolRoom>,
    incarnation: Uuid,
    this_node: &str,
    boot: Uuid,
    spent: bool,
) -> Result<Admitted, Refusal> {
    let id_of_grant = request.to.grant;
    if request.to.node == this_node {
        return Err(Refusal::MoveToSelf(this_node.to_owned()));
    }
    if let Some(existing) = existing {
        let same = existing.lent().is_some_and(|lent| lent.to.grant == id_of_grant);
        return match () {
            () if existing.lineage.made_of != Some(source.origin) => {
                Err(Refusal::VolumeExists { id, field: "source" })
            }
            () if !existing.lineage.passing => Err(Refusal::VolumeExists { id, field: "state" }),
            () if !same => Err(Refusal::VolumeMoving(id)),
            () => grant(existing, request, this_node, boot, None),
        };
    }
    if spent {
        return Err(Refusal::GrantUnknown(id_of_grant));
    }
    let (record, template) = source.found(boot)?;
    let lineage = Lineage {
        made_of: Some(source.origin),
        template: Some(template),
        passing: true,
        ..Lineage::default()
    };
    let lent = Lent {
        to: request.to,
        host_nqn: request.host_nqn,
        hold: false,
        export: request.export.ok_or(Refusal::PortsExhausted)?,
        stage: LentStage::Published,
        session: 0,
        served_in: None,
    };
    made(
        id,
        incarnation,
        Generation::FIRST,
        record,
        lineage,
        Phase::Lent(lent),
        room,
        Needed::all_of(record),
    )
}

/// Deletes a snapshot, at once or, if `defer`, as soon as nothing reads it.
///
/// # Errors
/// A copy on this node still reads it, and it is not to be deferred.
pub fn delete_snapshot(
    record: &Record,
    reader: Option<VolumeId>,
    defer: bool,
) -> Result<Admitted, Refusal> {
    let Some(taken) = record.taken() else { return Err(Refusal::SnapshotNotFound(record.id)) };
    match reader {
        _ if is_going(record) || taken.deferred => Ok(Admitted::Already),
        Some(_) if defer => {
            let taken = Some(Taken { deferred: true, ..taken.clone() });
            let lineage = Lineage { taken, ..record.lineage.clone() };
            Ok(Admitted::Journal(Box::new(Record { lineage, ..record.clone() })))
        }
        Some(by) => Err(Refusal::SnapshotInUse { id: record.id, by }),
        None => journal(record, Event::DeleteAsked),
    }
}

/// Takes a volume back to a snapshot that was taken of it here. A volume that has
/// grown since keeps its size; what it has grown by is blank again.
///
/// # Errors
/// It is attached, moving or not confirmed since a reboot, or the snapshot is not
/// one of it.
pub fn revert(
    record: &Record,
    snapshot: Option<&Record>,
    id: VolumeId,
    handle: Option<&Device>,
    boot: Uuid,
) -> Result<Admitted, Refusal> {
    if let Phase::Reverting(revert) = &record.phase
        && revert.snapshot == id
        && revert.stage != RevertStage::Undoing
    {
        return Ok(Admitted::Already);
    }
    at_rest(record)?;
    if record.attached || handle.is_some() {
        return Err(Refusal::VolumeAttached(record.id));
    }
    confirmed(record, boot)?;
    let snapshot = snapshot.ok_or(Refusal::SnapshotNotFound(id))?;
    let template = snapshot_template(snapshot)?;
    let size: Sectors = snapshot.size;
    let of = snapshot.taken().ok_or(Refusal::SnapshotNotFound(id))?;
    if of.volume != record.id || of.incarnation != record.incarnation {
        return Err(Refusal::SnapshotOfAnother { id, volume: of.volume });
    }
    if snapshot.pool != record.pool {
        return Err(Refusal::PoolOfSource { pool: snapshot.pool.clone() });
    }
    journal(record, Event::RevertAsked { snapshot: id, template, size })
}
