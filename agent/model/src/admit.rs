//! Whether a request may be granted, and what the journal then says: pure, and
//! complete before anything is changed.

mod moving;
mod remote;
mod snapshots;

use uuid::Uuid;

pub(crate) use self::remote::not_remote;
pub use self::{
    moving::{CopyRequest, MAX_COPIES, grant_copy, lent_to, never_granted, reachable, still},
    remote::{fence_served, localize, of_what_is_over, receive_remote, reclaim, serve},
    snapshots::{
        SnapshotRequest, Source as Made, create_of, delete_snapshot, grant_of, revert,
        snapshot_template, take_snapshot, template,
    },
};
use crate::{
    hydration::{self, MAX_BATCH, MAX_THRESHOLD, Tuning},
    name::{Generation, VolumeId},
    plan::Device,
    schedule::PRIORITIES,
    seeding::Seeding,
    units::Sectors,
    volume::{
        Borrower, Event, ExportName, IllegalTransition, Lent, LentStage, Lineage, Origin, Phase,
        Receiving, ReceivingStage, Record, Relay, Source, Tombstone,
    },
};

/// Why a request is refused: one variant, and one stable reason, per thing that
/// a caller does about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such volume here.
    #[error("volume {0} not found")]
    VolumeNotFound(VolumeId),
    /// The id is taken by something else.
    #[error("volume {id} exists with a different {field}")]
    VolumeExists {
        /// The volume.
        id: VolumeId,
        /// What differs.
        field: &'static str,
    },
    /// Zero, or not whole blocks.
    #[error("size {size} is not a positive multiple of the logical block size {block}")]
    SizeInvalid {
        /// Bytes asked for.
        size: u64,
        /// Bytes in a logical block.
        block: u32,
    },
    /// An extension that would shrink.
    #[error("size {wanted} is below the present {present}")]
    SizeSmaller {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes now.
        present: u64,
    },
    /// The pool's blocks are not the volume's.
    #[error("the pool's logical block is {pool} bytes, the volume's {volume}")]
    LogicalBlockSize {
        /// Bytes in the pool's block.
        pool: u32,
        /// Bytes in the volume's block.
        volume: u32,
    },
    /// The pool cannot hold it.
    #[error("pool {pool} has room for {free} bytes, {needed} are needed")]
    NoRoom {
        /// The pool.
        pool: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes that may still be placed.
        free: u64,
    },
    /// The handle is wanted here.
    #[error("volume {0} is attached")]
    VolumeAttached(VolumeId),
    /// A peer may read it.
    #[error("volume {id} is published to {node}")]
    VolumePublished {
        /// The volume.
        id: VolumeId,
        /// The peer.
        node: String,
    },
    /// Another node has the right to write.
    #[error("volume {id} is fenced: {node} has taken it over")]
    VolumeFenced {
        /// The volume.
        id: VolumeId,
        /// The peer.
        node: String,
    },
    /// A move is under way.
    #[error("volume {0} is being moved")]
    VolumeMoving(VolumeId),
    /// Only a held volume can be switched or aborted.
    #[error("volume {0} is not held")]
    VolumeNotHeld(VolumeId),
    /// Nothing is being copied.
    #[error("volume {0} is not hydrating")]
    VolumeNotHydrating(VolumeId),
    /// Something needs an operator first.
    #[error("volume {id} has failed: {why}")]
    VolumeFailed {
        /// The volume.
        id: VolumeId,
        /// What happened.
        why: String,
    },
    /// Source and destination are one node.
    #[error("node {0} cannot move a volume to itself")]
    MoveToSelf(String),
    /// The caller knows an older or a newer copy.
    #[error("generation is {present}, not {named}")]
    GenerationStale {
        /// Generation here.
        present: Generation,
        /// Generation in the request.
        named: Generation,
    },
    /// No such grant is open here for this caller.
    #[error("grant {0} is not open here")]
    GrantUnknown(Uuid),
    /// The grant's id was used for something else.
    #[error("grant {grant} exists with a different {field}")]
    GrantExists {
        /// The grant.
        grant: Uuid,
        /// What differs.
        field: &'static str,
    },
    /// The source is fenced, or may be: there is no way back.
    #[error("grant {0} is fenced: the move can only go on")]
    GrantFenced(Uuid),
    /// Somebody has written at the destination.
    #[error("{count} writes wait at the destination")]
    WrittenAtDestination {
        /// How many.
        count: u64,
    },
    /// The peer's interface is too new or too old.
    #[error("the peer speaks interface versions {oldest} to {newest}, this node {ours}")]
    PeerVersion {
        /// Its oldest.
        oldest: u32,
        /// Its newest.
        newest: u32,
        /// What this node speaks, as text.
        ours: String,
    },
    /// No pool of that name is configured.
    #[error("pool `{0}` is not configured")]
    PoolNotFound(String),
    /// The pool is configured but not there, or not fit for use.
    #[error("pool `{pool}`: {why}")]
    PoolMissing {
        /// The pool.
        pool: String,
        /// What is wrong.
        why: String,
    },
    /// An old user still holds the handle.
    #[error("{path} is open or left over from an earlier copy")]
    HandleInUse {
        /// The handle.
        path: String,
    },
    /// A once lent volume after a reboot.
    #[error(
        "volume {id} was lent to {node} and must be confirmed after a reboot: name generation {generation}"
    )]
    ConfirmationRequired {
        /// The volume.
        id: VolumeId,
        /// The last borrower.
        node: String,
        /// Generation here.
        generation: Generation,
    },
    /// A setting is outside its range.
    #[error("{setting} must be {range}")]
    SettingOutOfRange {
        /// Which.
        setting: &'static str,
        /// What it may be.
        range: String,
    },
    /// Too many copies would be read through.
    #[error("the volume is read through {depth} nodes already; at most {limit} are allowed")]
    ChainTooDeep {
        /// How many.
        depth: u32,
        /// How many may be.
        limit: u32,
    },
    /// The source still answers.
    #[error("source {node} answers: nothing is lost as long as it does")]
    SourceAlive {
        /// The source.
        node: String,
    },
    /// What was to be of one moment could not be made in the time for which consumers are
    /// let wait. Nothing is left of it.
    #[error("volume {id} did not come to rest in time: {why}")]
    VolumeBusy {
        /// The volume.
        id: VolumeId,
        /// What took too long.
        why: String,
    },
    /// The borrower has as many copies of what is fenced for it as it may have.
    #[error("{limit} copies of volume {id} are being read for snapshots")]
    CopiesExhausted {
        /// The volume.
        id: VolumeId,
        /// How many there may be.
        limit: usize,
    },
    /// What is still missing is at a source that cannot be read.
    #[error("volume {id} lacks what is on {node}, which does not answer")]
    SourceAway {
        /// The volume.
        id: VolumeId,
        /// Its source.
        node: String,
    },
    /// The source has not said that it is fenced.
    #[error("volume {0} has nothing here yet: its source is not fenced, or was a moment ago")]
    SourceNotFenced(VolumeId),
    /// Regions are missing for ever.
    #[error("volume {id} lacks regions that were lost with {node}: they must be rewritten first")]
    RegionsLost {
        /// The volume.
        id: VolumeId,
        /// The source that was forgotten.
        node: String,
    },
    /// A guest that is to have left still writes here.
    #[error("volume {0} is still being written at its source")]
    SourceActive(VolumeId),
    /// What is written here goes to the source.
    #[error("volume {id} is used here, its data is on {node}")]
    VolumeRemote {
        /// The volume.
        id: VolumeId,
        /// Where its data is.
        node: String,
    },
    /// Volumes of this size are never copied to this node.
    #[error("volumes above {limit} bytes stay remote on this node; this one has {size}")]
    AlwaysRemote {
        /// Bytes of the volume.
        size: u64,
        /// Bytes that a copy here may have.
        limit: u64,
    },
    /// This node has lost power since the borrower's consumers were let in.
    #[error("what was written under grant {0} before this node lost power may be lost")]
    SessionStale(Uuid),
    /// The volume was taken back from the grant's holder, or given back.
    #[error("grant {0} is over: its source is the volume again")]
    GrantReturned(Uuid),
    /// No port is free for another export.
    #[error("no port is free for another export")]
    PortsExhausted,
    /// No such snapshot here, or none that is still to be used.
    #[error("snapshot {0} not found")]
    SnapshotNotFound(VolumeId),
    /// The snapshot's id is taken by something else.
    #[error("snapshot {id} exists with a different {field}")]
    SnapshotExists {
        /// The snapshot.
        id: VolumeId,
        /// What differs.
        field: &'static str,
    },
    /// A copy that was made of it has not arrived.
    #[error("snapshot {id} is still read: volume {by} is on its way from it")]
    SnapshotInUse {
        /// The snapshot.
        id: VolumeId,
        /// The volume that is made of it.
        by: VolumeId,
    },
    /// Only a snapshot of the volume itself can be gone back to.
    #[error("snapshot {id} is of volume {volume}, or of an earlier volume of that id")]
    SnapshotOfAnother {
        /// The snapshot.
        id: VolumeId,
        /// What it is of.
        volume: VolumeId,
    },
    /// Thin snapshots are in the pool of what they are made of.
    #[error("what it is made of is in pool `{pool}`, and so is it on this node")]
    PoolOfSource {
        /// The pool.
        pool: String,
    },
    /// It goes back to a snapshot.
    #[error("volume {0} is being taken back to a snapshot")]
    VolumeReverting(VolumeId),
    /// The kernel lacks a device-mapper target.
    #[error("the kernel has no device-mapper target `{0}`")]
    TargetMissing(String),
    /// Nothing certain is known of what was never written to a volume.
    #[error("volume {id}: what was never written is not known: {why}")]
    AllocationUnknown {
        /// The volume.
        id: VolumeId,
        /// Why not.
        why: String,
    },
}

impl Refusal {
    /// The stable word for programs.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::VolumeNotFound(_) => "VOLUME_NOT_FOUND",
            Self::VolumeExists { .. } => "VOLUME_EXISTS",
            Self::SizeInvalid { .. } => "SIZE_INVALID",
            Self::SizeSmaller { .. } => "SIZE_SMALLER",
            Self::LogicalBlockSize { .. } => "LOGICAL_BLOCK_SIZE",
            Self::NoRoom { .. } => "NO_ROOM",
            Self::VolumeAttached(_) => "VOLUME_ATTACHED",
            Self::VolumePublished { .. } => "VOLUME_PUBLISHED",
            Self::VolumeFenced { .. } => "VOLUME_FENCED",
            Self::VolumeMoving(_) => "VOLUME_MOVING",
            Self::VolumeNotHeld(_) => "VOLUME_NOT_HELD",
            Self::VolumeNotHydrating(_) => "VOLUME_NOT_HYDRATING",
            Self::VolumeFailed { .. } => "VOLUME_FAILED",
            Self::MoveToSelf(_) => "MOVE_TO_SELF",
            Self::GenerationStale { .. } => "GENERATION_STALE",
            Self::GrantUnknown(_) => "GRANT_UNKNOWN",
            Self::GrantExists { .. } => "GRANT_EXISTS",
            Self::GrantFenced(_) => "GRANT_FENCED",
            Self::WrittenAtDestination { .. } => "WRITTEN_AT_DESTINATION",
            Self::PeerVersion { .. } => "PEER_VERSION",
            Self::PoolNotFound(_) => "POOL_NOT_FOUND",
            Self::PoolMissing { .. } => "POOL_MISSING",
            Self::HandleInUse { .. } => "HANDLE_IN_USE",
            Self::ConfirmationRequired { .. } => "CONFIRMATION_REQUIRED",
            Self::SettingOutOfRange { .. } => "SETTING_OUT_OF_RANGE",
            Self::ChainTooDeep { .. } => "CHAIN_TOO_DEEP",
            Self::SourceAlive { .. } => "SOURCE_ALIVE",
            Self::SourceAway { .. } => "SOURCE_AWAY",
            Self::VolumeBusy { .. } => "VOLUME_BUSY",
            Self::CopiesExhausted { .. } => "COPIES_EXHAUSTED",
            Self::SourceNotFenced(_) => "SOURCE_NOT_FENCED",
            Self::RegionsLost { .. } => "REGIONS_LOST",
            Self::SourceActive(_) => "SOURCE_ACTIVE",
            Self::VolumeRemote { .. } => "VOLUME_REMOTE",
            Self::AlwaysRemote { .. } => "ALWAYS_REMOTE",
            Self::SessionStale(_) => "SESSION_STALE",
            Self::GrantReturned(_) => "GRANT_RETURNED",
            Self::PortsExhausted => "PORTS_EXHAUSTED",
            Self::SnapshotNotFound(_) => "SNAPSHOT_NOT_FOUND",
            Self::SnapshotExists { .. } => "SNAPSHOT_EXISTS",
            Self::SnapshotInUse { .. } => "SNAPSHOT_IN_USE",
            Self::SnapshotOfAnother { .. } => "SNAPSHOT_OF_ANOTHER",
            Self::PoolOfSource { .. } => "POOL_OF_SOURCE",
            Self::VolumeReverting(_) => "VOLUME_REVERTING",
            Self::TargetMissing(_) => "TARGET_MISSING",
            Self::AllocationUnknown { .. } => "ALLOCATION_UNKNOWN",
        }
    }
}

/// What an admitted request changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admitted {
    /// Nothing: it has been done before.
    Already,
    /// The journal says this from now on.
    Journal(Box<Record>),
}

/// What admission must know of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolRoom {
    /// Its name.
    pub name: String,
    /// Logical block size of volumes made there.
    pub logical_block_size: u32,
    /// Allocation unit of the thin pool in bytes.
    pub chunk: u64,
    /// Bytes of volumes that may still be placed.
    pub free: u64,
    /// Bytes free outside the thin pool, for clone metadata.
    pub free_outside: u64,
}

impl PoolRoom {
    fn check_size(&self, size: u64) -> Result<(), Refusal> {
        let block = self.logical_block_size;
        if size == 0 || !size.is_multiple_of(u64::from(block)) {
            return Err(Refusal::SizeInvalid { size, block });
        }
        Ok(())
    }

    fn check_room(&self, needed: u64, outside: u64) -> Result<(), Refusal> {
        let refusal = |needed, free| Refusal::NoRoom { pool: self.name.clone(), needed, free };
        if needed > self.free {
            return Err(refusal(needed, self.free));
        }
        if outside > self.free_outside {
            return Err(refusal(outside, self.free_outside));
        }
        Ok(())
    }
}

/// Which volume a caller means: a delayed call must not hit what came later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Which {
    /// Its id.
    pub id: VolumeId,
    /// Generation of the copy, where the caller names it.
    pub generation: Option<Generation>,
    /// Which volume of that id, where the caller names it.
    pub incarnation: Option<Uuid>,
}

impl From<VolumeId> for Which {
    fn from(id: VolumeId) -> Self {
        Self { id, generation: None, incarnation: None }
    }
}

impl Which {
    /// The record, if it is the one that is meant.
    ///
    /// # Errors
    /// There is none, it is another volume's, or another generation's.
    pub fn of<'a>(&self, record: Option<&'a Record>) -> Result<&'a Record, Refusal> {
        let not_found = Refusal::VolumeNotFound(self.id);
        let record = record.ok_or_else(|| not_found.clone())?;
        match (self.incarnation, self.generation) {
            (Some(incarnation), _) if incarnation != record.incarnation => Err(not_found),
            (_, Some(named)) if named != record.generation => {
                Err(Refusal::GenerationStale { present: record.generation, named })
            }
            _ => Ok(record),
        }
    }
}

/// Creates a blank volume.
///
/// # Errors
/// The id is taken with another size or pool, the size is not whole blocks, or
/// the pool has no room.
pub fn create(
    existing: Option<&Record>,
    id: VolumeId,
    size: u64,
    pool: &PoolRoom,
    incarnation: Uuid,
) -> Result<Admitted, Refusal> {
    if let Some(existing) = existing {
        return match () {
            () if existing.size.bytes() != size => {
                Err(Refusal::VolumeExists { id, field: "size_bytes" })
            }
            () if existing.pool != pool.name => Err(Refusal::VolumeExists { id, field: "pool" }),
            () if existing.phase == Phase::Deleting => {
                Err(Refusal::VolumeExists { id, field: "state" })
            }
            () if existing.lineage.made_of.is_some() => {
                Err(Refusal::VolumeExists { id, field: "source" })
            }
            () => Ok(Admitted::Already),
        };
    }
    pool.check_size(size)?;
    pool.check_room(size, 0)?;
    Ok(Admitted::Journal(Box::new(Record {
        id,
        incarnation,
        pool: pool.name.clone(),
        size: Sectors::from_bytes(size),
        logical_block_size: pool.logical_block_size,
        generation: Generation::FIRST,
        made_in: Generation::FIRST,
        attached: false,
        data: None,
        growing: None,
        came_by: None,
        lent_before: None,
        confirmed_in: None,
        tuning: Tuning::default(),
        lineage: Lineage::default(),
        phase: Phase::Creating,
    })))
}

/// Deletes a volume.
///
/// # Errors
/// It is attached, published or moving.
pub fn delete(record: &Record, handle: Option<&Device>) -> Result<Admitted, Refusal> {
    not_remote(record)?;
    match &record.phase {
        Phase::Deleting => return Ok(Admitted::Already),
        Phase::Receiving(receiving) => match receiving.stage {
            // Nobody else writes it any more: it is this node's to delete, failed or not.
            stage if stage.is_owner() => {}
            ReceivingStage::Discarding | ReceivingStage::Discarded => {
                return Ok(Admitted::Already);
            }
            _ => at_rest(record)?,
        },
        _ => at_rest(record)?,
    }
    if record.attached || handle.is_some_and(|handle| handle.open_count > 0) {
        return Err(Refusal::VolumeAttached(record.id));
    }
    journal(record, Event::DeleteAsked)
}

/// Grows a volume. While it is held elsewhere it grows here, where it is written,
/// and the other side follows.
///
/// # Errors
/// It is moving, would shrink, or finds no room.
pub fn extend(record: &Record, size: u64, pool: &PoolRoom) -> Result<Admitted, Refusal> {
    not_remote(record)?;
    match &record.phase {
        // It is this node's alone already; what it grows by is not copied.
        Phase::Receiving(receiving) if receiving.stage.is_owner() => {
            not_failed(record.id, receiving)?;
        }
        Phase::Lent(lent) if lent.is_held() => {}
        Phase::Relaying(relay) if relay.lent.is_held() && relay.receiving.stage.is_owner() => {
            not_failed(record.id, &relay.receiving)?;
        }
        _ => at_rest(record)?,
    }
    pool.check_size(size)?;
    let present = record.growing.unwrap_or(record.size).bytes();
    if size < present {
        return Err(Refusal::SizeSmaller { wanted: size, present });
    }
    if size == present {
        return Ok(Admitted::Already);
    }
    pool.check_room(size - present, 0)?;
    Ok(Admitted::Journal(Box::new(Record {
        growing: Some(Sectors::from_bytes(size)),
        ..record.clone()
    })))
}

/// Makes the handle exist.
///
/// # Errors
/// Another node has the right to write, the generation is another, an old
/// handle is still there, or a reboot asks for a confirmation.
pub fn attach(
    record: &Record,
    generation: Option<Generation>,
    handle: Option<&Device>,
    boot: Uuid,
) -> Result<Admitted, Refusal> {
    if let Some(named) = generation
        && named != record.generation
    {
        return Err(Refusal::GenerationStale { present: record.generation, named });
    }
    match record.phase {
        Phase::Creating | Phase::Deleting => return Err(Refusal::VolumeNotFound(record.id)),
        Phase::Reverting(_) => return Err(Refusal::VolumeReverting(record.id)),
        Phase::Local | Phase::Lent(_) | Phase::Receiving(_) | Phase::Relaying(_) => {}
    }
    if let Some(lent) = record.lent() {
        let (id, node) = (record.id, lent.to.node.clone());
        match lent.stage {
            LentStage::Published if !lent.hold => {
                return Err(Refusal::VolumePublished { id, node });
            }
            LentStage::Published | LentStage::Revoking => {}
            LentStage::Fencing
            | LentStage::Fenced
            | LentStage::Releasing
            | LentStage::Yielding
            | LentStage::Serving
            | LentStage::Reclaiming => {
                return Err(Refusal::VolumeFenced { id, node });
            }
        }
    }
    let mut writable_here = true;
    if let Some(receiving) = record.receiving() {
        not_failed(record.id, receiving)?;
        if is_leaving(receiving.stage) {
            return Err(Refusal::VolumeMoving(record.id));
        }
        writable_here = receiving.stage.is_owner();
    }
    let mut wanted = record.clone();
    wanted.attached = true;
    if writable_here && !record.is_confirmed(boot) {
        match (&record.lent_before, generation) {
            (Some(borrower), None) => {
                return Err(Refusal::ConfirmationRequired {
                    id: record.id,
                    node: borrower.node.clone(),
                    generation: record.generation,
                });
            }
            (Some(_) | None, _) => wanted.confirmed_in = Some(boot),
        }
    }
    if !record.attached {
        free_handle(record.id, handle)?;
    }
    Ok(if wanted == *record { Admitted::Already } else { Admitted::Journal(Box::new(wanted)) })
}

/// Removes the handle.
///
/// # Errors
/// Somebody holds it open.
pub fn detach(record: &Record, handle: Option<&Device>) -> Result<Admitted, Refusal> {
    if handle.is_some_and(|handle| handle.open_count > 0 && !handle.leaving) {
        return Err(Refusal::HandleInUse {
            path: crate::plan::dm_name(record, crate::name::Role::Handle).path(),
        });
    }
    // One whose source has lost power ends with its use here.
    if let Some(receiving) = record.receiving().filter(|receiving| receiving.remote.is_none()) {
        not_failed(record.id, receiving)?;
    }
    if !record.attached {
        return Ok(Admitted::Already);
    }
    Ok(Admitted::Journal(Box::new(Record { attached: false, ..record.clone() })))
}

/// A request to offer a volume to a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrantRequest {
    /// Who may receive.
    pub to: Borrower,
    /// NQN by which it connects.
    pub host_nqn: String,
    /// Whether this node goes on writing until it is fenced.
    pub hold: bool,
    /// The export, for a grant that is new.
    pub export: Option<ExportName>,
    /// Through how many nodes a volume may be read.
    pub max_depth: u32,
}

/// Offers the volume to one peer.
///
/// # Errors
/// It is attached although the move is not held, it is moving already, the peer
/// is this node, or the grant's id stands for something else.
pub fn grant(
    record: &Record,
    request: GrantRequest,
    this_node: &str,
    boot: Uuid,
    spent: Option<&Tombstone>,
) -> Result<Admitted, Refusal> {
    let grant = request.to.grant;
    if request.to.node == this_node {
        return Err(Refusal::MoveToSelf(this_node.to_owned()));
    }
    if let Some(lent) = record.lent()
        && lent.to.grant == grant
    {
        let field = match () {
            () if lent.to.node != request.to.node => "node",
            () if lent.to.endpoint != request.to.endpoint => "endpoint",
            () if lent.host_nqn != request.host_nqn => "host_nqn",
            () if lent.hold != request.hold => "hold",
            () => return Ok(Admitted::Already),
        };
        return Err(Refusal::GrantExists { grant, field });
    }
    if spent.is_some() {
        return Err(Refusal::GrantUnknown(grant));
    }
    if let Some(lent) = record.lent()
        && matches!(lent.stage, LentStage::Published | LentStage::Revoking)
    {
        return Err(Refusal::VolumeMoving(record.id));
    }
    not_remote(record)?;
    match &record.phase {
        Phase::Receiving(receiving) if receiving.stage.is_owner() => {
            not_failed(record.id, receiving)?;
            if record.is_damaged() {
                // What fails here would be waited for there.
                let node = receiving.source.node.clone();
                return Err(Refusal::RegionsLost { id: record.id, node });
            }
            let depth = receiving.source.depth;
            if depth >= request.max_depth {
                return Err(Refusal::ChainTooDeep { depth, limit: request.max_depth });
            }
        }
        _ => at_rest(record)?,
    }
    if !request.hold && record.attached {
        return Err(Refusal::VolumeAttached(record.id));
    }
    if !record.is_confirmed(boot)
        && let Some(borrower) = &record.lent_before
    {
        return Err(Refusal::ConfirmationRequired {
            id: record.id,
            node: borrower.node.clone(),
            generation: record.generation,
        });
    }
    let export = request.export.ok_or(Refusal::PortsExhausted)?;
    let lent_before = Some(request.to.clone());
    let lent = Lent {
        to: request.to,
        host_nqn: request.host_nqn,
        hold: request.hold,
        export,
        stage: LentStage::Published,
        session: 0,
        served_in: None,
    };
    let phase = match record.receiving() {
        Some(receiving) => Phase::Relaying(Box::new(Relay { receiving: receiving.clone(), lent })),
        None => Phase::Lent(lent),
    };
    Ok(Admitted::Journal(Box::new(Record {
        lent_before,
        confirmed_in: Some(boot),
        phase,
        ..record.clone()
    })))
}

/// What a grant says of the volume that is to be received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The volume.
    pub id: VolumeId,
    /// Which volume of that id.
    pub incarnation: Uuid,
    /// Its size in bytes.
    pub size: u64,
    /// Its logical block size in bytes.
    pub logical_block_size: u32,
    /// What it was made of.
    pub made_of: Option<Origin>,
    /// Whether it was made for this grant: it begins here, and detached.
    pub begins: bool,
    /// Where it comes from.
    pub source: Source,
}

/// Receives a volume. `elder` is another copy of it on this node: one that was
/// handed over and is not needed any more only once the volume that returns is
/// whole.
///
/// # Errors
/// The id is taken here, an old handle is still there, the grant is spent, or
/// the pool does not fit.
pub fn receive(
    existing: Option<&Record>,
    elder: Option<&Record>,
    offer: Offer,
    pool: &PoolRoom,
    handle: Option<&Device>,
    this_node: &str,
    spent: Option<&Tombstone>,
) -> Result<Admitted, Refusal> {
    if let Some(done) = receivable(existing, elder, &offer, handle, this_node, spent)? {
        return Ok(done);
    }
    if pool.logical_block_size != offer.logical_block_size {
        return Err(Refusal::LogicalBlockSize {
            pool: pool.logical_block_size,
            volume: offer.logical_block_size,
        });
    }
    pool.check_size(offer.size)?;
    let size = Sectors::from_bytes(offer.size);
    let region = hydration::region_size(offer.size, pool.chunk);
    pool.check_room(offer.size, hydration::metadata_bytes(size, region))?;
    let (stage, pool) = (ReceivingStage::Allocating, pool.name.clone());
    Ok(Admitted::Journal(Box::new(received(offer, pool, region, stage))))
}

/// What is journalled of a volume that is to be received.
fn received(offer: Offer, pool: String, region: Sectors, stage: ReceivingStage) -> Record {
    let size = Sectors::from_bytes(offer.size);
    let generation = offer.source.generation.next();
    Record {
        id: offer.id,
        incarnation: offer.incarnation,
        pool,
        size,
        logical_block_size: offer.logical_block_size,
        generation,
        made_in: generation,
        // One that is new with this move was not asked to be attached.
        attached: !offer.begins,
        data: None,
        growing: None,
        came_by: Some(offer.source.grant),
        lent_before: None,
        confirmed_in: None,
        tuning: Tuning::default(),
        lineage: Lineage { made_of: offer.made_of, ..Lineage::default() },
        phase: Phase::Receiving(Box::new(Receiving {
            source: offer.source,
            meta: None,
            length: size,
            region,
            floor: 0,
            forgotten: false,
            turn: 0,
            seeding: Seeding::Wanted,
            stage,
            rebuild: None,
            forced: false,
            remote: None,
            failure: None,
        })),
    }
}

/// What does not depend on where the data is going to be: the answer to a repeated
/// request, or whether there is anything against it.
fn receivable(
    existing: Option<&Record>,
    elder: Option<&Record>,
    offer: &Offer,
    handle: Option<&Device>,
    this_node: &str,
    spent: Option<&Tombstone>,
) -> Result<Option<Admitted>, Refusal> {
    let grant = offer.source.grant;
    if offer.source.node == this_node {
        return Err(Refusal::MoveToSelf(this_node.to_owned()));
    }
    if let Some(existing) = existing {
        return match existing.receiving() {
            Some(receiving) if receiving.source == offer.source => match receiving.stage {
                stage if is_leaving(stage) => Err(Refusal::GrantUnknown(grant)),
                _ => Ok(Some(Admitted::Already)),
            },
            None if existing.came_by == Some(grant) => Ok(Some(Admitted::Already)),
            Some(receiving) if receiving.source.grant == grant => {
                Err(Refusal::GrantExists { grant, field: "grant" })
            }
            Some(_) => Err(Refusal::VolumeMoving(existing.id)),
            None => Err(Refusal::VolumeExists { id: existing.id, field: "grant" }),
        };
    }
    if spent.is_some() {
        return Err(Refusal::GrantUnknown(grant));
    }
    if let Some(elder) = elder {
        let passed_on = elder
            .lent()
            .is_some_and(|lent| matches!(lent.stage, LentStage::Fenced | LentStage::Releasing));
        if !passed_on || elder.incarnation != offer.incarnation {
            return Err(Refusal::VolumeExists { id: elder.id, field: "grant" });
        }
        if elder.generation > offer.source.generation {
            let (present, named) = (elder.generation, offer.source.generation);
            return Err(Refusal::GenerationStale { present, named });
        }
    }
    free_handle(offer.id, handle)?;
    Ok(None)
}

/// The guest has moved: fence the source. `force` says that the caller knows it to
/// have left, whatever the source sees.
///
/// # Errors
/// The volume is not held.
pub fn switch(record: &Record, force: bool) -> Result<Admitted, Refusal> {
    let Some(receiving) = record.receiving() else {
        // The whole move may be over by the time the call is repeated.
        return Err(Refusal::VolumeNotHeld(record.id));
    };
    not_failed(record.id, receiving)?;
    match receiving.stage {
        ReceivingStage::Held | ReceivingStage::Refused | ReceivingStage::Switching
            if receiving.source.hold =>
        {
            let mut wanted = record.clone();
            if let Phase::Receiving(receiving) = &mut wanted.phase {
                receiving.forced |= force;
            }
            match journal(&wanted, Event::SwitchAsked)? {
                Admitted::Already if wanted != *record => Ok(Admitted::Journal(Box::new(wanted))),
                admitted => Ok(admitted),
            }
        }
        ReceivingStage::Hydrating
        | ReceivingStage::Collapsing
        | ReceivingStage::Parting
        | ReceivingStage::Remote
        | ReceivingStage::Localizing
        | ReceivingStage::Building
        | ReceivingStage::Clearing
        | ReceivingStage::Settling
            if receiving.source.hold =>
        {
            Ok(Admitted::Already)
        }
        _ => Err(Refusal::VolumeNotHeld(record.id)),
    }
}

/// Gives a move up: at the destination before anything was written, at the
/// source before it is fenced.
///
/// # Errors
/// It is too late, or writes wait at the destination.
pub fn abort(record: &Record, held_writes: u64) -> Result<Admitted, Refusal> {
    abort_told(record, held_writes, false)
}

/// The same when the borrower has said that it gave up.
///
/// # Errors
/// See [`abort`].
pub fn abort_told(record: &Record, held_writes: u64, given_up: bool) -> Result<Admitted, Refusal> {
    match &record.phase {
        Phase::Lent(lent) => revoke(record, lent.to.grant, given_up),
        Phase::Relaying(relay) => revoke(record, relay.lent.to.grant, given_up),
        Phase::Receiving(receiving) => match receiving.stage {
            ReceivingStage::Held if held_writes > 0 && receiving.failure.is_none() => {
                Err(Refusal::WrittenAtDestination { count: held_writes })
            }
            ReceivingStage::Allocating
            | ReceivingStage::Zeroing
            | ReceivingStage::Assembling
            | ReceivingStage::Held
            | ReceivingStage::Refused
            | ReceivingStage::Linking
            | ReceivingStage::Aborting => journal(record, Event::AbortAsked),
            ReceivingStage::Withdrawing => Ok(Admitted::Already),
            ReceivingStage::Switching if receiving.remote.is_none() => match held_writes {
                0 => journal(record, Event::SwitchGivenUp),
                count => Err(Refusal::WrittenAtDestination { count }),
            },
            ReceivingStage::Requesting
            | ReceivingStage::Forking
            | ReceivingStage::Switching
            | ReceivingStage::Hydrating
            | ReceivingStage::Collapsing
            | ReceivingStage::Parting
            | ReceivingStage::Discarding
            | ReceivingStage::Discarded
            | ReceivingStage::Remote
            | ReceivingStage::Localizing
            | ReceivingStage::Building
            | ReceivingStage::Clearing
            | ReceivingStage::Settling
            | ReceivingStage::Returning => Err(Refusal::GrantFenced(receiving.source.grant)),
        },
        Phase::Creating | Phase::Local | Phase::Reverting(_) | Phase::Deleting => {
            Err(Refusal::VolumeNotHeld(record.id))
        }
    }
}

/// Settings to change; what is absent stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Change {
    /// Stop or go on.
    pub paused: Option<bool>,
    /// Bytes per second.
    pub rate: Option<u64>,
    /// Regions at the same time.
    pub threshold: Option<u32>,
    /// Contiguous regions as one.
    pub batch: Option<u32>,
    /// Before whom.
    pub priority: Option<i32>,
}

/// Changes how a volume is copied.
///
/// # Errors
/// Nothing is being copied, or a setting is outside its range.
pub fn tune(record: &Record, change: Change) -> Result<Admitted, Refusal> {
    let range = |setting, value: Option<u32>, max| match value {
        Some(value) if value == 0 || value > max => {
            Err(Refusal::SettingOutOfRange { setting, range: format!("1 to {max}") })
        }
        _ => Ok(()),
    };
    range("threshold", change.threshold, MAX_THRESHOLD)?;
    range("batch", change.batch, MAX_BATCH)?;
    if change.priority.is_some_and(|priority| !PRIORITIES.contains(&priority)) {
        let range = format!("{} to {}", PRIORITIES.start(), PRIORITIES.end());
        return Err(Refusal::SettingOutOfRange { setting: "priority", range });
    }
    match record.receiving().map(|receiving| receiving.stage) {
        Some(
            ReceivingStage::Held
            | ReceivingStage::Refused
            | ReceivingStage::Switching
            | ReceivingStage::Hydrating,
        ) if !record.is_damaged()
            && record.receiving().is_some_and(|receiving| receiving.remote.is_none()) => {}
        _ => return Err(Refusal::VolumeNotHydrating(record.id)),
    }
    let mut wanted = record.clone();
    let tuning = &mut wanted.tuning;
    tuning.paused = change.paused.unwrap_or(tuning.paused);
    tuning.rate = change.rate.unwrap_or(tuning.rate);
    tuning.threshold = change.threshold.unwrap_or(tuning.threshold);
    tuning.batch = change.batch.unwrap_or(tuning.batch);
    tuning.priority = change.priority.unwrap_or(tuning.priority);
    Ok(if wanted == *record { Admitted::Already } else { Admitted::Journal(Box::new(wanted)) })
}

/// Who names a grant in a call from a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The grant.
    pub grant: Uuid,
    /// Which volume of that id.
    pub incarnation: Uuid,
    /// Generation of the copy here, as the peer knows it.
    pub generation: Generation,
    /// Which time consumers of a borrower without a copy were let in; 0 for one that
    /// has a copy.
    pub session: u64,
}

fn claimed<'a>(record: &'a Record, claim: &Claim) -> Result<&'a Lent, Refusal> {
    let lent = record
        .lent()
        .filter(|lent| lent.to.grant == claim.grant && record.incarnation == claim.incarnation)
        .ok_or(Refusal::GrantUnknown(claim.grant))?;
    if claim.generation != record.generation {
        return Err(Refusal::GenerationStale {
            present: record.generation,
            named: claim.generation,
        });
    }
    Ok(lent)
}

/// What speaks for it that the guest has left a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evidence {
    /// Nobody has the handle open, or nothing is written through it.
    Quiet,
    /// Nothing: the handle is written.
    Writing,
    /// A caller at the destination says that it has, on their own responsibility.
    Word,
}

/// The grant's holder asks that nobody here writes any more.
///
/// # Errors
/// The grant is not open here, or names another generation; or the guest is plainly
/// still running here.
pub fn fence(
    record: &Record,
    claim: &Claim,
    evidence: Evidence,
    boot: Uuid,
) -> Result<Admitted, Refusal> {
    let lent = claimed(record, claim)?;
    if lent.served_in.is_some() {
        return fence_served(record, lent, claim, boot);
    }
    match lent.stage {
        LentStage::Published if evidence == Evidence::Writing => {
            Err(Refusal::SourceActive(record.id))
        }
        LentStage::Published | LentStage::Fencing | LentStage::Fenced => {
            journal(record, Event::FenceAsked)
        }
        LentStage::Revoking | LentStage::Yielding | LentStage::Serving | LentStage::Reclaiming => {
            Err(Refusal::GrantUnknown(claim.grant))
        }
        LentStage::Releasing => Ok(Admitted::Already),
    }
}

/// The grant's holder asks what was never written here: only once that is final,
/// and only of a copy that has everything itself. What a relaying copy lacks was
/// written elsewhere, although nothing of it is allocated here.
///
/// # Errors
/// The grant is not open here, names another generation, is not fenced, or there is
/// no such map.
pub fn allocation(record: &Record, claim: &Claim) -> Result<(), Refusal> {
    let unknown =
        |why: &str| Err(Refusal::AllocationUnknown { id: record.id, why: why.to_owned() });
    match (claimed(record, claim)?.stage, &record.phase) {
        (LentStage::Fenced, Phase::Lent(_)) => Ok(()),
        (LentStage::Fenced, _) => unknown("its data is still on the way to this node"),
        (
            LentStage::Published | LentStage::Fencing | LentStage::Yielding | LentStage::Serving,
            _,
        ) => unknown("it is still written"),
        (LentStage::Revoking | LentStage::Releasing | LentStage::Reclaiming, _) => {
            Err(Refusal::GrantUnknown(claim.grant))
        }
    }
}

/// The grant's holder has everything.
///
/// # Errors
/// The grant is not open here, names another generation, or is not fenced.
pub fn release(record: &Record, claim: &Claim) -> Result<Admitted, Refusal> {
    match claimed(record, claim)?.stage {
        LentStage::Fenced | LentStage::Releasing => journal(record, Event::ReleaseAsked),
        LentStage::Published
        | LentStage::Fencing
        | LentStage::Revoking
        | LentStage::Yielding
        | LentStage::Serving
        | LentStage::Reclaiming => Err(Refusal::GrantUnknown(claim.grant)),
    }
}

/// The grant is withdrawn. This and [`fence`] are one compare-and-set on the
/// grant in this journal: whichever is journalled first, the other is refused.
///
/// But the borrower's own word counts after the fence as well: it withdraws only
/// once its journal says that it will never take the volume, so that nothing was
/// written under the grant, and nothing will be.
///
/// # Errors
/// The grant is not open here, or is fenced and the borrower has not said so.
pub fn revoke(record: &Record, grant: Uuid, by_borrower: bool) -> Result<Admitted, Refusal> {
    let lent =
        record.lent().filter(|lent| lent.to.grant == grant).ok_or(Refusal::GrantUnknown(grant))?;
    match lent.stage {
        LentStage::Published | LentStage::Revoking => journal(record, Event::RevokeAsked),
        // One that wrote here, through the export, gives the volume back instead.
        LentStage::Fencing | LentStage::Fenced if by_borrower && lent.session == 0 => {
            journal(record, Event::Untaken)
        }
        LentStage::Fencing
        | LentStage::Fenced
        | LentStage::Releasing
        | LentStage::Yielding
        | LentStage::Serving
        | LentStage::Reclaiming => Err(Refusal::GrantFenced(grant)),
    }
}

pub(crate) fn journal(record: &Record, event: Event) -> Result<Admitted, Refusal> {
    match record.clone().after(event) {
        Ok(after) if after == *record => Ok(Admitted::Already),
        Ok(after) => Ok(Admitted::Journal(Box::new(after))),
        Err(IllegalTransition { .. }) => Err(Refusal::VolumeMoving(record.id)),
    }
}

/// Neither lent nor being received nor on its way in or out.
fn at_rest(record: &Record) -> Result<(), Refusal> {
    match &record.phase {
        Phase::Local => Ok(()),
        Phase::Creating | Phase::Deleting => Err(Refusal::VolumeMoving(record.id)),
        Phase::Reverting(_) => Err(Refusal::VolumeReverting(record.id)),
        Phase::Lent(_) | Phase::Relaying(_) => {
            let Some(lent) = record.lent() else { return Err(Refusal::VolumeMoving(record.id)) };
            let (id, node) = (record.id, lent.to.node.clone());
            Err(match lent.stage {
                LentStage::Published | LentStage::Revoking => Refusal::VolumePublished { id, node },
                LentStage::Fencing
                | LentStage::Fenced
                | LentStage::Releasing
                | LentStage::Yielding
                | LentStage::Serving
                | LentStage::Reclaiming => Refusal::VolumeFenced { id, node },
            })
        }
        Phase::Receiving(receiving) => {
            not_failed(record.id, receiving)?;
            Err(Refusal::VolumeMoving(record.id))
        }
    }
}

/// Whether a received copy is being taken down.
const fn is_leaving(stage: ReceivingStage) -> bool {
    use ReceivingStage as S;
    matches!(stage, S::Aborting | S::Withdrawing | S::Discarding | S::Discarded | S::Returning)
}

pub(crate) fn not_failed(id: VolumeId, receiving: &Receiving) -> Result<(), Refusal> {
    match &receiving.failure {
        Some(failure) => Err(Refusal::VolumeFailed { id, why: failure.why.clone() }),
        None => Ok(()),
    }
}

fn free_handle(id: VolumeId, handle: Option<&Device>) -> Result<(), Refusal> {
    match handle {
        Some(_) => Err(Refusal::HandleInUse {
            path: crate::name::DmName::new(id, Generation::FIRST, crate::name::Role::Handle).path(),
        }),
        None => Ok(()),
    }
}
