//! Requests: admit, journal, converge, and undo what a failed one had begun.

mod forget;
mod remote;
mod snapshots;

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use dmlocal_model::{
    admit::{
        self, Admitted, Change, Claim, Evidence, GrantRequest, Offer, PoolRoom, Refusal, Which,
    },
    hydration,
    name::{DmName, Generation, NQN_PREFIX, Role, VolumeId},
    plan::{self, Device, Wait},
    seeding::AllocationMap,
    table::CloneStatus,
    units::Sectors,
    volume::{Borrower, Event, ExportName, LentStage, ReceivingStage, Record, Tombstone},
};
use tokio::sync::Mutex;
use uuid::Uuid;

pub use self::{
    forget::{Forgotten, lost},
    remote::Mode,
};
use crate::{
    kernel::{PoolFacts, StepError},
    peers::Peer,
    reconcile::{Copy, Rest, ServiceError, Slot, View, Volumes, Work},
};

/// What is needed before a volume can be received.
const RECEIVE_TARGETS: [&str; 4] = ["clone", "delay", "multipath", "linear"];

/// What is needed before a volume can be offered.
const GRANT_TARGETS: [&str; 3] = ["delay", "error", "linear"];

/// Room outside the thin pool below which LVM is asked again, in bytes.
const SCARCE: u64 = 64 << 20;

/// Longest wait for what volumes take in their pools.
const MEASURE: Duration = Duration::from_secs(1);

/// A node's interface in its own words.
pub struct Service {
    /// The volumes.
    pub volumes: Arc<Volumes>,
    /// One placement at a time, so that no room is promised twice.
    placement: Mutex<()>,
    /// Device-mapper targets of this kernel, as `name major.minor.patch`.
    pub targets: Vec<String>,
    /// The port that was given out last: one that is free again may still be tried
    /// by a peer that has not heard of it.
    last_port: AtomicU16,
}

/// A grant and the volume it is for.
#[derive(Debug, Clone)]
pub struct Granted {
    /// The record at the source.
    pub record: Record,
}

/// Where room must be.
enum Room<'a> {
    /// No matter.
    None,
    /// In this pool, before there is a record.
    In(&'a str),
    /// In the record's pool.
    OfRecord,
}

/// Whether this request has begun something; a repeated one has not, and must
/// undo nothing when it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Begun(bool);

/// What an admission may look at.
struct Known<'a> {
    record: Option<&'a Record>,
    handle: Option<Device>,
    room: Option<PoolRoom>,
}

impl Known<'_> {
    fn record(&self, id: VolumeId) -> Result<&Record, Refusal> {
        self.record.ok_or(Refusal::VolumeNotFound(id))
    }

    fn room(&self) -> Result<&PoolRoom, Refusal> {
        self.room.as_ref().ok_or_else(|| Refusal::PoolNotFound(String::new()))
    }
}

impl Service {
    /// Asks the kernel for its targets once.
    ///
    /// # Errors
    /// Device-mapper cannot be asked.
    pub async fn new(volumes: Arc<Volumes>) -> Result<Self, ServiceError> {
        let kernel = Arc::clone(&volumes.kernel);
        let targets = tokio::task::spawn_blocking(move || kernel.targets())
            .await?
            .map_err(|source| ServiceError::Step { step: "targets".into(), source })?;
        Ok(Self { volumes, placement: Mutex::default(), targets, last_port: AtomicU16::new(0) })
    }

    /// Creates a blank volume.
    ///
    /// # Errors
    /// See [`admit::create`]; what was begun is undone.
    pub async fn create(&self, id: VolumeId, size: u64, pool: &str) -> Result<View, ServiceError> {
        let pool = self.pool_name(pool)?;
        self.volumes
            .with_newest(id, async |slot, work| {
                let begun = self
                    .change(id, slot, work, Room::In(&pool), |known| {
                        if known.handle.is_some() && known.record.is_none() {
                            return Err(left_over(id));
                        }
                        admit::create(known.record, id, size, known.room()?, Uuid::new_v4())
                    })
                    .await?;
                let outcome = self.volumes.converge(slot, work).await;
                self.undo(slot, work, begun, outcome, Event::DeleteAsked).await
            })
            .await
    }

    /// Deletes a volume; one that is not there is deleted already. A fenced copy goes
    /// when its borrower says that it reads it no more.
    ///
    /// # Errors
    /// See [`admit::delete`].
    pub async fn delete(&self, which: impl Into<Which>) -> Result<(), ServiceError> {
        let which = which.into();
        // A forgotten copy may stand beside a newer one.
        let copies = self.volumes.copies(which.id);
        let named = copies
            .iter()
            .find(|view| which.generation == Some(view.record.generation))
            .map(|view| view.record.made_in);
        let delete = async |slot: &Slot, work: &mut Work| self.deleting(which, slot, work).await;
        match named {
            Some(made_in) => self.volumes.with((which.id, made_in), delete).await,
            None => self.volumes.with_newest(which.id, delete).await,
        }
    }

    async fn deleting(
        &self,
        which: Which,
        slot: &Slot,
        work: &mut Work,
    ) -> Result<(), ServiceError> {
        if let Err(Refusal::VolumeNotFound(_)) = which.of(work.record.as_ref()) {
            return Ok(());
        }
        which.of(work.record.as_ref())?;
        if self.delete_fenced(slot, work).await? {
            return self.volumes.converge(slot, work).await.map(|_| ());
        }
        self.change(which.id, slot, work, Room::None, |known| {
            admit::delete(which.of(known.record)?, known.handle.as_ref())
        })
        .await?;
        let outcome = self.volumes.converge(slot, work).await;
        let here = |r: &Record| r.receiving().is_none_or(|r| r.stage != ReceivingStage::Discarded);
        match outcome {
            // Nothing is left here; the source hears of it when it can.
            Err(ServiceError::Peer(_)) if !work.record.as_ref().is_some_and(here) => Ok(()),
            outcome => outcome.map(|_| ()),
        }
    }

    /// Grows a volume.
    ///
    /// # Errors
    /// See [`admit::extend`].
    pub async fn extend(&self, which: impl Into<Which>, size: u64) -> Result<View, ServiceError> {
        let which = which.into();
        let id = which.id;
        self.volumes
            .with_newest(id, async |slot, work| {
                which.of(work.record.as_ref())?;
                self.change(id, slot, work, Room::OfRecord, |known| {
                    admit::extend(which.of(known.record)?, size, known.room()?)
                })
                .await?;
                let outcome = self.arrived(slot, work).await;
                if let Err(cause) = outcome {
                    // The LV may or may not have grown; a volume is as large as
                    // its record says.
                    if let Some(record) = work.record.clone().filter(|r| r.growing.is_some()) {
                        let shrunk = Record { growing: None, ..record };
                        self.volumes.put(slot, work, shrunk, Vec::new()).await?;
                    }
                    return Err(cause);
                }
                self.shown(id)
            })
            .await
    }

    /// Makes the handle exist.
    ///
    /// # Errors
    /// See [`admit::attach`].
    pub async fn attach(
        &self,
        id: VolumeId,
        generation: Option<Generation>,
    ) -> Result<View, ServiceError> {
        let boot = self.volumes.kernel.boot();
        self.volumes
            .with_newest(id, async |slot, work| {
                let before = work.record.clone();
                self.change(id, slot, work, Room::None, |known| {
                    admit::attach(known.record(id)?, generation, known.handle.as_ref(), boot)
                })
                .await?;
                let outcome = self.arrived(slot, work).await;
                self.restore(slot, work, outcome, before).await?;
                self.shown(id)
            })
            .await
    }

    /// Removes the handle.
    ///
    /// # Errors
    /// See [`admit::detach`].
    pub async fn detach(&self, which: impl Into<Which>) -> Result<View, ServiceError> {
        let which = which.into();
        let id = which.id;
        self.volumes
            .with_newest(id, async |slot, work| {
                let before = work.record.clone();
                let last = self.volumes.view(id);
                self.change(id, slot, work, Room::None, |known| {
                    admit::detach(which.of(known.record)?, known.handle.as_ref())
                })
                .await?;
                let outcome = self.volumes.converge(slot, work).await;
                // Once the handle is gone, whatever else failed is tried again.
                let handle = self.volumes.handle(id).await?;
                if handle.is_some_and(|handle| !handle.leaving) {
                    let cause = match outcome {
                        Err(ServiceError::Step { source: StepError::Busy(path), .. }) => {
                            Refusal::HandleInUse { path }.into()
                        }
                        Err(cause) => cause,
                        Ok(_) => {
                            let why = work.detail().to_owned();
                            Refusal::VolumeFailed { id, why }.into()
                        }
                    };
                    self.restore(slot, work, Err(cause), before).await?;
                }
                match (&work.record, last) {
                    // It has gone back to where its data is.
                    (None, Some(last)) => {
                        let record = Record { attached: false, ..last.record };
                        Ok(View { record, seen: None, ..last })
                    }
                    _ => self.shown(id),
                }
            })
            .await
    }

    /// Offers a volume to a peer.
    ///
    /// # Errors
    /// See [`admit::grant`]; what was begun is undone.
    pub async fn grant(
        &self,
        id: VolumeId,
        to: Borrower,
        host_nqn: String,
        hold: bool,
    ) -> Result<Granted, ServiceError> {
        self.needs(&GRANT_TARGETS)?;
        let boot = self.volumes.kernel.boot();
        let node = self.volumes.config.node.clone();
        self.volumes
            .with_newest(id, async |slot, work| {
                let spent = self.volumes.tombstone(to.grant)?;
                // Ports are given out under this lock, and to the journal.
                let placing = self.placement.lock().await;
                let export = self.new_export();
                let max_depth = self.volumes.config.max_chain;
                let request = GrantRequest { to, host_nqn, hold, export, max_depth };
                let begun = self
                    .change(id, slot, work, Room::None, |known| {
                        let request = request.clone();
                        admit::grant(known.record(id)?, request, &node, boot, spent.as_ref())
                    })
                    .await?;
                drop(placing);
                let outcome = self.volumes.converge(slot, work).await;
                self.undo(slot, work, begun, outcome, Event::RevokeAsked).await?;
                let record = work.record.clone().ok_or(Refusal::VolumeNotFound(id))?;
                Ok(Granted { record })
            })
            .await
    }

    /// Receives a volume and attaches it.
    ///
    /// # Errors
    /// See [`admit::receive`]; what was begun is undone.
    pub async fn receive(&self, offer: Offer, pool: &str) -> Result<View, ServiceError> {
        self.needs(&RECEIVE_TARGETS)?;
        let pool = self.pool_name(pool)?;
        let id = offer.id;
        let copy = (id, offer.source.generation.next());
        let node = self.volumes.config.node.clone();
        let peer =
            Peer { node: offer.source.node.clone(), endpoint: offer.source.endpoint.clone() };
        self.volumes
            .with(copy, async |slot, work| {
                let spent = self.volumes.tombstone(offer.source.grant)?;
                let mut others = self.volumes.copies(id).into_iter().map(|view| view.record);
                let elder = others.rfind(|record| record.made_in != copy.1);
                let begun = self
                    .change(id, slot, work, Room::In(&pool), |known| {
                        let handle = known.handle.as_ref();
                        admit::receive(
                            known.record,
                            elder.as_ref(),
                            offer.clone(),
                            known.room()?,
                            handle,
                            &node,
                            spent.as_ref(),
                        )
                    })
                    .await?;
                // The fence comes soon: the connection can be made meanwhile.
                let peers = Arc::clone(&self.volumes.peers);
                tokio::spawn(async move { peers.prepare(&peer).await });
                let outcome = self.volumes.converge(slot, work).await;
                self.undo(slot, work, begun, outcome, Event::AbortAsked).await
            })
            .await
    }

    /// The guest has moved here: fence the source, then hydrate. `force` says so
    /// whatever the source sees.
    ///
    /// # Errors
    /// See [`admit::switch`]; when the source does not answer, or is still being
    /// written, the switch goes on by itself as soon as it can.
    pub async fn switch(&self, which: impl Into<Which>, force: bool) -> Result<View, ServiceError> {
        let which = which.into();
        let id = which.id;
        self.volumes
            .with_newest(id, async |slot, work| {
                self.change(id, slot, work, Room::None, |known| {
                    admit::switch(which.of(known.record)?, force)
                })
                .await?;
                self.volumes.converge(slot, work).await?;
                self.shown(id)
            })
            .await
    }

    /// A hypervisor says that a guest has been migrated away from here. Where that is
    /// what a held move waits for, its destination is told; a handle that is open
    /// says otherwise, and is believed.
    ///
    /// # Errors
    /// There is no such volume, or the destination cannot be told; nothing is lost
    /// by that, because the guest's first write there says the same.
    pub async fn guest_left(&self, id: VolumeId) -> Result<(), ServiceError> {
        let view = self.volumes.view(id).ok_or(Refusal::VolumeNotFound(id))?;
        let to = match view.record.lent() {
            Some(lent) if lent.hold && lent.stage == LentStage::Published => lent.to.clone(),
            Some(_) | None => return Ok(()),
        };
        if self.volumes.handle(id).await?.is_some_and(|handle| handle.open_count > 0) {
            return Ok(());
        }
        // Not under the volume's lock: the destination asks for the fence meanwhile.
        self.volumes.peers.hasten(&Peer::from(&to), id, to.grant).await.map_err(Into::into)
    }

    /// The source says that nobody uses it any more: a held copy switches. One that
    /// is anything else does not change.
    ///
    /// # Errors
    /// No copy was received from the caller under that grant.
    pub async fn hasten(
        &self,
        id: VolumeId,
        grant: Uuid,
        caller: Option<&str>,
    ) -> Result<(), ServiceError> {
        self.volumes
            .with_newest(id, async |slot, work| {
                let unknown = Refusal::GrantUnknown(grant);
                let receiving = work.record.as_ref().and_then(Record::receiving);
                let receiving = receiving.ok_or_else(|| unknown.clone())?;
                let source = &receiving.source;
                if source.grant != grant || caller.is_some_and(|caller| caller != source.node) {
                    return Err(unknown.into());
                }
                if receiving.stage == ReceivingStage::Held && receiving.failure.is_none() {
                    self.change(id, slot, work, Room::None, |known| {
                        admit::switch(known.record(id)?, false)
                    })
                    .await?;
                }
                // What follows is this node's own business, and asks the caller.
                Ok(())
            })
            .await
    }

    /// Gives a move up.
    ///
    /// # Errors
    /// See [`admit::abort`].
    pub async fn abort(&self, which: impl Into<Which>) -> Result<(), ServiceError> {
        let which = which.into();
        self.volumes
            .with_newest(which.id, async |slot, work| {
                let record = which.of(work.record.as_ref())?.clone();
                let kernel = Arc::clone(&self.volumes.kernel);
                // Nobody else acts while the lock is held: what is counted here
                // is what the decision stands on, and whatever comes later
                // fails instead of being acknowledged.
                let held = tokio::task::spawn_blocking(move || kernel.held(&record))
                    .await?
                    .map_err(|source| ServiceError::Step { step: "look".into(), source })?;
                // A borrower that forgot to say so may have given up long ago.
                let given_up = self.fate_of_fenced(which.of(work.record.as_ref())?).await.given_up;
                self.change(which.id, slot, work, Room::None, |known| {
                    admit::abort_told(which.of(known.record)?, held, given_up)
                })
                .await?;
                self.volumes.converge(slot, work).await.map(|_| ())
            })
            .await
    }

    /// Changes how a volume is copied, or a snapshot.
    ///
    /// # Errors
    /// See [`admit::tune`].
    pub async fn tune(&self, id: VolumeId, change: Change) -> Result<View, ServiceError> {
        let tune = async |slot: &Slot, work: &mut Work| {
            self.change(id, slot, work, Room::None, |known| admit::tune(known.record(id)?, change))
                .await?;
            self.volumes.converge(slot, work).await?;
            let copy = work.record.as_ref().map(|record| (record.id, record.made_in));
            let view = copy.and_then(|copy| self.volumes.view_of(copy));
            Ok(view.ok_or(Refusal::VolumeNotFound(id))?)
        };
        match (self.volumes.view(id), self.volumes.snapshot(id)) {
            (None, Some(_)) => self.volumes.with((id, Generation::SNAPSHOT), tune).await,
            _ => self.volumes.with_newest(id, tune).await,
        }
    }

    /// What speaks for it that the guest has left: somebody's word, or what is seen.
    async fn said_or_seen(&self, force: bool, work: &mut Work) -> Result<Evidence, ServiceError> {
        match force {
            true => Ok(Evidence::Word),
            false => self.volumes.evidence(work).await,
        }
    }

    /// Ends writing here, for the grant's holder. Returns the size in bytes.
    ///
    /// # Errors
    /// See [`admit::fence`].
    pub async fn fence(
        &self,
        id: VolumeId,
        claim: &Claim,
        force: bool,
        caller: Option<&str>,
    ) -> Result<u64, ServiceError> {
        let boot = self.volumes.kernel.boot();
        self.volumes
            .with(self.lent_under(id, claim.grant, claim.generation), async |slot, work| {
                if let Some(record) = &work.record {
                    borrowed_by(record, claim.grant, caller)?;
                }
                let evidence = self.said_or_seen(force, work).await?;
                self.change(id, slot, work, Room::None, |known| {
                    let record = known.record.ok_or(Refusal::GrantUnknown(claim.grant))?;
                    borrowed_by(record, claim.grant, caller)?;
                    admit::fence(record, claim, evidence, boot)
                })
                .await?;
                self.arrived(slot, work).await?;
                let record = work.record.as_ref().ok_or(Refusal::GrantUnknown(claim.grant))?;
                match record.lent().map(|lent| lent.stage) {
                    Some(LentStage::Fenced | LentStage::Releasing) => Ok(record.size.bytes()),
                    stage => Err(ServiceError::Internal(format!("not fenced: {stage:?}"))),
                }
            })
            .await
            .map_err(|error| self.of_what_is_over(error, claim.grant))
    }

    /// What was never written here, for the grant's holder.
    ///
    /// # Errors
    /// See [`admit::allocation`]; whatever else keeps it from being known is a
    /// refusal as well.
    pub async fn allocation(
        &self,
        id: VolumeId,
        claim: &Claim,
        region: Sectors,
        caller: Option<&str>,
    ) -> Result<AllocationMap, ServiceError> {
        // Under the lock: the copy neither goes nor changes hands meanwhile.
        self.volumes
            .with(self.lent_under(id, claim.grant, claim.generation), async |_, work| {
                let record = work.record.clone().ok_or(Refusal::GrantUnknown(claim.grant))?;
                borrowed_by(&record, claim.grant, caller)?;
                admit::allocation(&record, claim)?;
                let (length, incarnation) = (record.size, record.incarnation);
                let kernel = Arc::clone(&self.volumes.kernel);
                let asked = tokio::task::spawn_blocking(move || kernel.allocation(&record, region));
                let unwritten = asked
                    .await?
                    .map_err(|error| Refusal::AllocationUnknown { id, why: error.to_string() })?;
                let Claim { grant, generation, .. } = *claim;
                Ok(AllocationMap { grant, incarnation, generation, length, region, unwritten })
            })
            .await
    }

    /// Lets this copy go, for the grant's holder.
    ///
    /// # Errors
    /// See [`admit::release`].
    pub async fn release(
        &self,
        id: VolumeId,
        claim: &Claim,
        caller: Option<&str>,
    ) -> Result<(), ServiceError> {
        self.volumes
            .with(self.lent_under(id, claim.grant, claim.generation), async |slot, work| {
                let stone = self.volumes.tombstone(claim.grant)?;
                if is_done(&stone, id, work) {
                    return Ok(());
                }
                // Where there is a copy, whoever lacks its grant changes nothing.
                if stone.is_none() && work.record.is_none() && self.may_ask_for_copies(caller) {
                    self.volumes.bury(&admit::never_granted(id, claim))?;
                }
                self.change(id, slot, work, Room::None, |known| {
                    let record = known.record.ok_or(Refusal::GrantUnknown(claim.grant))?;
                    borrowed_by(record, claim.grant, caller)?;
                    admit::release(record, claim)
                })
                .await?;
                // What follows is this node's own business, and may take long: a
                // chain is let go from its end.
                Ok(())
            })
            .await
    }

    /// Withdraws a grant that is not fenced, or that its borrower will never use.
    ///
    /// # Errors
    /// See [`admit::revoke`].
    pub async fn revoke(
        &self,
        id: VolumeId,
        grant: Uuid,
        caller: Option<&str>,
    ) -> Result<(), ServiceError> {
        let stone = self.volumes.tombstone(grant)?;
        self.volumes
            .with(self.lent_under(id, grant, Generation::FIRST), async |slot, work| {
                if is_done(&stone, id, work) {
                    return Ok(());
                }
                self.change(id, slot, work, Room::None, |known| {
                    let record = known.record.ok_or(Refusal::GrantUnknown(grant))?;
                    borrowed_by(record, grant, caller)?;
                    admit::revoke(record, grant, caller.is_some())
                })
                .await?;
                self.volumes.converge(slot, work).await.map(|_| ())
            })
            .await
    }

    /// Whether a request for a copy may come that has to find its grant spent: only of
    /// what is fenced for its sender, which was so before the request began.
    fn may_ask_for_copies(&self, caller: Option<&str>) -> bool {
        self.volumes.views().iter().filter_map(|view| view.record.lent()).any(|lent| {
            lent.stage == LentStage::Fenced && caller.is_none_or(|caller| caller == lent.to.node)
        })
    }

    /// The copy that was lent under a grant; without one, whichever copy the
    /// caller believes in.
    fn lent_under(&self, id: VolumeId, grant: Uuid, believed: Generation) -> Copy {
        let mut copies = self.volumes.copies(id).into_iter().map(|view| view.record);
        let lent = copies.find(|r| r.lent().is_some_and(|lent| lent.to.grant == grant));
        (id, lent.map_or(believed, |record| record.made_in))
    }

    /// What readers see, with what each volume takes in its pool now: nothing else
    /// happens when that changes.
    pub async fn measured(&self, views: Vec<View>) -> Vec<View> {
        let (kernel, known) = (Arc::clone(&self.volumes.kernel), views.clone());
        let measured = tokio::task::spawn_blocking(move || {
            let mut views = views;
            for view in &mut views {
                if let Some(seen) = &mut view.seen {
                    seen.allocated = kernel.allocated(&view.record);
                }
            }
            views
        });
        // A pool that is stuck holds up no reader.
        match tokio::time::timeout(MEASURE, measured).await {
            Ok(Ok(views)) => views,
            Ok(Err(_)) | Err(_) => known,
        }
    }

    /// Room in a pool as it stands; `fresh` asks LVM whatever is known already.
    ///
    /// # Errors
    /// The pool is not configured, not there, or not fit for use.
    pub async fn room(&self, name: &str, fresh: bool) -> Result<PoolRoom, ServiceError> {
        let config =
            self.volumes.config.pool(name).ok_or_else(|| Refusal::PoolNotFound(name.to_owned()))?;
        let missing =
            |why: &str| Refusal::PoolMissing { pool: config.name.clone(), why: why.into() };
        let mut known = None;
        let rounds = if fresh { &[true][..] } else { &[false, true] };
        for fresh in rounds.iter().copied() {
            let facts = self
                .volumes
                .pool_facts(&config.name, fresh)
                .await
                .map_err(|error| missing(&error.to_string()))?;
            let (kernel, pool) = (Arc::clone(&self.volumes.kernel), config.name.clone());
            let usage = tokio::task::spawn_blocking(move || kernel.pool_usage(&pool)).await?;
            known = facts.zip(usage.ok());
            // What was counted down may have been given back since.
            if known.as_ref().is_some_and(|(facts, _)| facts.free_outside >= SCARCE) {
                break;
            }
        }
        let (mut facts, usage) =
            known.ok_or_else(|| missing("its volume group or thin pool is not there"))?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a share of a size is not larger than the size, nor negative"
        )]
        {
            facts.used = (facts.size as f64 * usage.data) as u64;
        }
        if !usage.zeroes {
            return Err(missing("the thin pool does not zero new blocks").into());
        }
        let free = self.free(&config.name, &facts, config.overprovisioning);
        Ok(PoolRoom {
            name: config.name.clone(),
            logical_block_size: facts.logical_block_size,
            chunk: facts.chunk,
            free,
            free_outside: facts.free_outside,
        })
    }

    /// Bytes promised to volumes of a pool.
    pub fn provisioned(&self, pool: &str) -> u64 {
        self.volumes
            .views()
            .iter()
            .filter(|view| view.record.pool == pool && view.record.is_promised())
            .map(|view| view.record.growing.unwrap_or(view.record.size).bytes())
            .sum()
    }

    /// Bytes that may still be promised: what overprovisioning leaves, and never
    /// what copies under way are going to fill.
    pub fn free(&self, pool: &str, facts: &PoolFacts, overprovisioning: f64) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a pool's size times at most 100 is far below 2^63, and positive"
        )]
        let promised = (facts.size as f64 * overprovisioning) as u64;
        let unpromised = promised.saturating_sub(self.provisioned(pool));
        let coming: u64 = self
            .volumes
            .views()
            .iter()
            .filter(|view| view.record.pool == pool)
            .filter_map(bytes_left)
            .sum();
        let unused = facts.size.saturating_sub(facts.used).saturating_sub(coming);
        unpromised.min(unused)
    }

    /// What an operator should know.
    pub async fn warnings(&self) -> Vec<String> {
        let mut warnings: Vec<String> = RECEIVE_TARGETS
            .iter()
            .chain(&GRANT_TARGETS)
            .filter_map(|target| self.needs(&[target]).err())
            .map(|refusal| refusal.to_string())
            .collect();
        warnings.dedup();
        let config = &self.volumes.config;
        if config.tls.is_none() || config.export.is_none() || config.listen.advertise.is_none() {
            warnings.push(
                "volumes cannot be moved: [tls], [export] or listen.advertise is missing".into(),
            );
        }
        for pool in &config.pools {
            let name = &pool.name;
            let (kernel, pool) = (Arc::clone(&self.volumes.kernel), name.clone());
            let usage = tokio::task::spawn_blocking(move || kernel.pool_usage(&pool)).await;
            let Ok(Ok(usage)) = usage else {
                warnings.push(format!("pool {name}: volume group or thin pool is missing"));
                continue;
            };
            match self.volumes.pool_facts(name, false).await {
                Ok(Some(facts)) => {
                    if !usage.zeroes {
                        warnings.push(format!("pool {name}: new blocks are not zeroed"));
                    }
                    if !facts.errors_when_full {
                        warnings.push(format!("pool {name}: when full, writes hang for a minute"));
                    }
                    if usage.scarcest() >= 0.9 {
                        warnings.push(format!("pool {name}: more than 90 % is in use"));
                    }
                }
                Ok(None) => {
                    warnings.push(format!("pool {name}: volume group or thin pool is missing"));
                }
                Err(error) => warnings.push(format!("pool {name}: {error}")),
            }
        }
        let kernel = Arc::clone(&self.volumes.kernel);
        match tokio::task::spawn_blocking(move || kernel.ours()).await {
            Ok(Ok(names)) => {
                let known = self.known_names();
                let strays = names.into_iter().filter(|name| !known.contains(name));
                warnings.extend(strays.map(|name| format!("{name} is in no journal entry")));
            }
            Ok(Err(error)) => warnings.push(error.to_string()),
            Err(error) => warnings.push(error.to_string()),
        }
        warnings
    }

    /// Names of the devices and exports that the journal accounts for.
    fn known_names(&self) -> BTreeSet<String> {
        let mut known = BTreeSet::new();
        for View { record, .. } in self.volumes.views() {
            for role in [Role::Handle, Role::Clone, Role::Src, Role::Export] {
                known.insert(plan::dm_name(&record, role).name);
            }
            known.extend(record.lent().map(|lent| lent.export.subsystem_nqn.clone()));
        }
        known
    }

    fn pool_name(&self, name: &str) -> Result<String, Refusal> {
        let pool = self.volumes.config.pool(name);
        Ok(pool.ok_or_else(|| Refusal::PoolNotFound(name.to_owned()))?.name.clone())
    }

    fn needs(&self, targets: &[&str]) -> Result<(), Refusal> {
        let has =
            |target: &str| self.targets.iter().any(|found| found.split(' ').next() == Some(target));
        match targets.iter().find(|target| !has(target)) {
            Some(target) => Err(Refusal::TargetMissing((*target).to_owned())),
            None => Ok(()),
        }
    }

    /// Identity and port of an export that is new; `None` when every port is
    /// taken or exporting is not configured.
    fn new_export(&self) -> Option<ExportName> {
        let export = self.volumes.config.export.as_ref()?;
        let taken: Vec<u16> = self
            .volumes
            .views()
            .iter()
            .filter_map(|view| view.record.lent().map(|lent| lent.export.port))
            .collect();
        let (first, last) = (export.ports.first, export.ports.last);
        let after = self.last_port.load(Ordering::Relaxed).clamp(first, last);
        // Another target's port, or anybody's, is not ours to use.
        let kernel = &self.volumes.kernel;
        let is_free =
            |port: &u16| !taken.contains(port) && kernel.port_is_free(export.address, *port);
        let port = (after..=last).skip(1).chain(first..=after).find(is_free)?;
        self.last_port.store(port, Ordering::Relaxed);
        Some(ExportName {
            subsystem_nqn: format!("{NQN_PREFIX}{}", Uuid::new_v4()),
            namespace_uuid: Uuid::new_v4(),
            namespace_nguid: Uuid::new_v4(),
            address: export.address.to_string(),
            port,
        })
    }

    /// Admits and journals; converging is the caller's next step.
    async fn change(
        &self,
        id: VolumeId,
        slot: &Slot,
        work: &mut Work,
        room: Room<'_>,
        admit: impl Fn(&Known<'_>) -> Result<Admitted, Refusal>,
    ) -> Result<Begun, ServiceError> {
        let handle = self.volumes.handle(id).await?;
        let pool = match room {
            Room::None => None,
            Room::In(pool) => Some(pool.to_owned()),
            Room::OfRecord => work.record.as_ref().map(|record| record.pool.clone()),
        };
        let placing = match &pool {
            Some(_) => Some(self.placement.lock().await),
            None => None,
        };
        let record = work.record.clone();
        let mut known = Known { record: record.as_ref(), handle, room: None };
        if let Some(pool) = &pool {
            known.room = Some(self.room(pool, false).await?);
        }
        let mut admitted = admit(&known);
        if let (Some(pool), Err(Refusal::NoRoom { .. })) = (&pool, &admitted) {
            // Somebody may have made room meanwhile.
            known.room = Some(self.room(pool, true).await?);
            admitted = admit(&known);
        }
        let admitted = admitted?;
        let begun = match admitted {
            Admitted::Already => Begun(false),
            Admitted::Journal(record) => {
                self.volumes.put(slot, work, *record, Vec::new()).await?;
                Begun(true)
            }
        };
        drop(placing);
        Ok(begun)
    }

    /// After a failed creation, grant or receive: takes away what was begun.
    async fn undo(
        &self,
        slot: &Slot,
        work: &mut Work,
        begun: Begun,
        outcome: Result<Rest, ServiceError>,
        event: Event,
    ) -> Result<View, ServiceError> {
        let Err(cause) = outcome else {
            let copy = work.record.as_ref().map(|record| (record.id, record.made_in));
            let view = copy.and_then(|copy| self.volumes.view_of(copy));
            return view.ok_or_else(|| ServiceError::Internal("the volume is gone".into()));
        };
        let undoable =
            work.record.clone().is_some_and(|record| record.after(event.clone()).is_ok());
        if !begun.0 || !undoable {
            // Not this request's work, or too late: it goes on by itself.
            return Err(cause);
        }
        let undone = async {
            self.volumes.journal(slot, work, event).await?;
            self.volumes.converge(slot, work).await
        };
        match undone.await {
            Ok(_) => Err(cause),
            Err(undo) => Err(ServiceError::Undo { cause: Box::new(cause), undo: Box::new(undo) }),
        }
    }

    /// After a failed attachment or detachment: says again what was said before.
    async fn restore(
        &self,
        slot: &Slot,
        work: &mut Work,
        outcome: Result<Rest, ServiceError>,
        before: Option<Record>,
    ) -> Result<(), ServiceError> {
        let Err(cause) = outcome else { return Ok(()) };
        let (Some(before), Some(now)) = (before, work.record.clone()) else { return Err(cause) };
        if now.attached != before.attached {
            let restored = Record { attached: before.attached, ..now };
            self.volumes.put(slot, work, restored, Vec::new()).await?;
            if let Err(undo) = self.volumes.converge(slot, work).await {
                return Err(ServiceError::Undo { cause: Box::new(cause), undo: Box::new(undo) });
            }
        }
        Err(cause)
    }

    /// Converges; a pool that is away, or devices that only an operator can put
    /// right, are a refusal here, because the caller would take an answer for the
    /// deed.
    async fn arrived(&self, slot: &Slot, work: &mut Work) -> Result<Rest, ServiceError> {
        match (self.volumes.converge(slot, work).await?, &work.record) {
            (Rest::Wait(Wait::Pool), Some(record)) => Err(Refusal::PoolMissing {
                pool: record.pool.clone(),
                why: "its logical volumes are not active".to_owned(),
            }
            .into()),
            (Rest::Wait(Wait::Operator), Some(record)) => {
                let id = record.id;
                let why = work.detail().to_owned();
                Err(Refusal::VolumeFailed { id, why }.into())
            }
            (rest, _) => Ok(rest),
        }
    }

    fn shown(&self, id: VolumeId) -> Result<View, ServiceError> {
        Ok(self.volumes.view(id).ok_or(Refusal::VolumeNotFound(id))?)
    }
}

/// Bytes that are still only at the source.
pub fn bytes_left(view: &View) -> Option<u64> {
    let receiving = view.record.receiving()?;
    let size = receiving.length;
    let status = view.seen.as_ref().and_then(|seen| seen.clone_status.as_ref());
    use dmlocal_model::volume::ReceivingStage as S;
    if receiving.remote.is_some() {
        return Some(size.bytes());
    }
    Some(match (receiving.stage, status) {
        (S::Collapsing | S::Parting | S::Discarding | S::Discarded, _) => 0,
        (_, Some(CloneStatus::Working { hydrated, total, .. })) => total
            .saturating_sub(*hydrated)
            .saturating_mul(receiving.region.bytes())
            .min(size.bytes()),
        (_, Some(CloneStatus::Failed) | None) => {
            let missing =
                hydration::regions(size, receiving.region).saturating_sub(receiving.floor);
            missing.saturating_mul(receiving.region.bytes()).min(size.bytes())
        }
    })
}

fn left_over(id: VolumeId) -> Refusal {
    Refusal::HandleInUse { path: DmName::new(id, Generation::FIRST, Role::Handle).path() }
}

/// A peer's agent may act on a grant only if it was given to its own node.
fn borrowed_by(record: &Record, grant: Uuid, caller: Option<&str>) -> Result<(), Refusal> {
    let Some(caller) = caller else { return Ok(()) };
    match record.lent() {
        Some(lent) if lent.to.grant == grant && lent.to.node == caller => Ok(()),
        Some(_) | None => Err(Refusal::GrantUnknown(grant)),
    }
}

/// A repeated call for something that is over.
fn is_done(stone: &Option<Tombstone>, id: VolumeId, work: &Work) -> bool {
    use dmlocal_model::volume::Fate;
    let over = stone.as_ref().is_some_and(|stone| {
        stone.volume == id && matches!(stone.fate, Fate::Released | Fate::Revoked)
    });
    let open = work
        .record
        .as_ref()
        .and_then(Record::lent)
        .zip(stone.as_ref())
        .is_some_and(|(lent, stone)| lent.to.grant == stone.grant);
    over && !open
}
