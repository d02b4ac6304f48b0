//! Requests about snapshots, and about volumes that are made of something. What is
//! made of another copy holds that one's lock as well, so that it neither changes
//! hands nor goes meanwhile.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dmlocal_model::{
    admit::{self, CopyRequest, GrantRequest, Made, Refusal, SnapshotRequest, Which},
    name::{Generation, VolumeId},
    plan::Wait,
    volume::{Borrower, Event, Origin, ReceivingStage, Record},
};
use tokio::time::sleep;
use uuid::Uuid;

use super::{Begun, GRANT_TARGETS, Granted, Room, Service, left_over};
use crate::{
    peers::PeerError,
    reconcile::{Copy, Rest, ServiceError, Slot, View, Work},
};

/// How often it is seen whether another request about a snapshot has ended.
const AGAIN: Duration = Duration::from_millis(20);

/// How far a snapshot has got while its volume was held.
enum Taking {
    /// It is made.
    Done(Box<View>),
    /// The volume's source is to be asked first, and nobody waits at the volume for what
    /// another node does.
    Fork,
    /// Another request is about the same.
    Again,
}

/// Where an origin is on this node, whether it is there or not.
fn copy_of(service: &Service, origin: Origin) -> Copy {
    match origin {
        Origin::Snapshot(id) => (id, Generation::SNAPSHOT),
        Origin::Volume(id) => service.home(id),
    }
}

/// Room in the source's pool; a source that is not here is refused before room is
/// asked for.
fn beside(source: &Work) -> Option<String> {
    source.record.as_ref().map(|record| record.pool.clone())
}

fn is_discarded(work: &Work) -> bool {
    let stage = work.record.as_ref().and_then(Record::receiving).map(|receiving| receiving.stage);
    stage == Some(ReceivingStage::Discarded)
}

fn is_at(record: &Record, stage: ReceivingStage) -> bool {
    record.receiving().is_some_and(|receiving| receiving.stage == stage)
}

/// Whether what was made is what was asked for: the caller would take an answer for the
/// deed.
fn is_usable(work: &Work, rest: Rest) -> Result<Rest, ServiceError> {
    let Some(record) = &work.record else { return Ok(rest) };
    let failure = record.receiving().and_then(|receiving| receiving.failure.as_ref());
    let why = match (failure, rest) {
        (Some(failure), _) => failure.why.clone(),
        (None, Rest::Wait(Wait::Operator | Wait::Pool)) => work.detail().to_owned(),
        (None, _) => return Ok(rest),
    };
    Err(Refusal::VolumeFailed { id: record.id, why }.into())
}

impl Service {
    /// The copy of a volume that calls mean which name no generation.
    fn home(&self, id: VolumeId) -> Copy {
        (id, self.volumes.view(id).map_or(Generation::FIRST, |view| view.record.made_in))
    }

    /// Takes a snapshot.
    ///
    /// # Errors
    /// See [`admit::take_snapshot`]; what was begun is undone.
    pub async fn take_snapshot(
        &self,
        id: VolumeId,
        volume: VolumeId,
    ) -> Result<View, ServiceError> {
        let first = self.taking(id, volume).await;
        match &first {
            // It has arrived, or grown, while its source was asked.
            Err(ServiceError::Refused(Refusal::VolumeMoving(of))) if *of == volume => {
                self.taking(id, volume).await
            }
            _ => first,
        }
    }

    async fn taking(&self, id: VolumeId, volume: VolumeId) -> Result<View, ServiceError> {
        let boot = self.volumes.kernel.boot();
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let at = since.map_or(0, |since| since.as_secs());
        let (incarnation, grant) = (Uuid::new_v4(), Uuid::new_v4());
        let request = SnapshotRequest { id, volume, incarnation, grant, at };
        let copy = (id, Generation::SNAPSHOT);
        loop {
            self.nobody_asks(copy).await?;
            let begun = self
                .volumes
                .with_both(copy, self.home(volume), async |(slot, work), (_, source)| {
                    if work.is_asked() {
                        return Ok(Taking::Again);
                    }
                    if let (None, Some(record)) = (&work.record, source.record.clone()) {
                        let seen = self.volumes.look(&record, source).await?;
                        admit::reachable(&record, &seen)?;
                    }
                    let pool = beside(source);
                    let room = pool.as_deref().map_or(Room::None, Room::In);
                    let begun = self
                        .change(id, slot, work, room, |known| {
                            let source = source.record.as_ref();
                            let room = known.room.as_ref();
                            admit::take_snapshot(known.record, &request, source, room, boot)
                        })
                        .await?;
                    let requests = |record| is_at(record, ReceivingStage::Requesting);
                    if begun.0 && work.record.as_ref().is_some_and(requests) {
                        work.ask(true);
                        return Ok(Taking::Fork);
                    }
                    let outcome = self.volumes.converge_asked(slot, work).await;
                    let view = self.undo(slot, work, begun, outcome, Event::DeleteAsked).await?;
                    Ok::<_, ServiceError>(Taking::Done(Box::new(view)))
                })
                .await?;
            match begun {
                Taking::Again => {}
                Taking::Fork => return self.fork(&request).await,
                Taking::Done(view) => return Ok(*view),
            }
        }
    }

    /// Goes on with a snapshot of a volume that hydrates. Its source is asked under the
    /// snapshot's own lock; the volume's is taken only for as long as that is made which
    /// must be of one moment, and then it must be what it was.
    async fn fork(&self, request: &SnapshotRequest) -> Result<View, ServiceError> {
        let (id, copy) = (request.id, (request.id, Generation::SNAPSHOT));
        let gone = || ServiceError::from(Refusal::SnapshotNotFound(id));
        let ours = |work: &Work| {
            let record = work.record.as_ref();
            record.is_some_and(|record| record.incarnation == request.incarnation)
        };
        let granted = self
            .volumes
            .with(copy, async |slot, work| match ours(work) {
                true => self.volumes.converge(slot, work).await.map(drop),
                false => Err(gone()),
            })
            .await;
        let forked = match granted {
            // It is taken back: nobody goes on asking.
            Err(ServiceError::Peer(PeerError::Unreachable { node, .. })) => {
                Err(Refusal::SourceAway { id: request.volume, node }.into())
            }
            Err(error) => Err(error),
            Ok(()) => {
                self.volumes
                    .with_both(copy, self.home(request.volume), async |(slot, work), (_, of)| {
                        // Somebody may have deleted it.
                        let Some(record) = work
                            .record
                            .as_ref()
                            .filter(|record| ours(work) && is_at(record, ReceivingStage::Forking))
                        else {
                            return Err(gone());
                        };
                        admit::still(record, of.record.as_ref())?;
                        self.volumes.converge_asked(slot, work).await
                    })
                    .await
            }
        };
        self.volumes
            .with(copy, async |slot, work| {
                if !ours(work) {
                    return Err(forked.err().unwrap_or_else(gone));
                }
                work.ask(false);
                let outcome = forked.and_then(|rest| is_usable(work, rest));
                match self.undo(slot, work, Begun(true), outcome, Event::DeleteAsked).await {
                    // Nothing is left here; the source hears of it when it can.
                    Err(ServiceError::Undo { cause, undo })
                        if matches!(*undo, ServiceError::Peer(_)) && is_discarded(work) =>
                    {
                        Err(*cause)
                    }
                    outcome => outcome,
                }
            })
            .await
    }

    /// What is half-made has been taken away, and nobody waits for it to be made: a
    /// request that comes while another is under way has that one's outcome.
    async fn nobody_asks(&self, copy: Copy) -> Result<(), ServiceError> {
        loop {
            let is_asked = self
                .volumes
                .with(copy, async |slot, work| match work.is_asked() {
                    true => Ok(true),
                    false => self.begin_anew(slot, work).await.map(|()| false),
                })
                .await?;
            if !is_asked {
                return Ok(());
            }
            sleep(AGAIN).await;
        }
    }

    /// Deletes a snapshot; one that is not there is deleted already. Whoever names
    /// an incarnation means that snapshot and none that got its id later.
    ///
    /// # Errors
    /// See [`admit::delete_snapshot`].
    pub async fn delete_snapshot(
        &self,
        id: VolumeId,
        incarnation: Option<Uuid>,
        defer: bool,
    ) -> Result<(), ServiceError> {
        self.volumes
            .with((id, Generation::SNAPSHOT), async |slot, work| {
                let meant = work.record.as_ref().map(|record| record.incarnation);
                if meant.is_none() || incarnation.is_some_and(|named| Some(named) != meant) {
                    return Ok(());
                }
                let reader = self.volumes.reader(id);
                self.change(id, slot, work, Room::None, |known| {
                    let record = known.record.ok_or(Refusal::SnapshotNotFound(id))?;
                    admit::delete_snapshot(record, reader, defer)
                })
                .await?;
                match self.volumes.converge(slot, work).await {
                    // Nothing is left here; the source hears of it when it can.
                    Err(ServiceError::Peer(_)) if is_discarded(work) => Ok(()),
                    outcome => outcome.map(|_| ()),
                }
            })
            .await
    }

    /// Makes a copy of a volume that is fenced for a peer, for a snapshot there.
    ///
    /// # Errors
    /// See [`admit::grant_copy`]; what was begun is undone.
    pub async fn grant_copy(
        &self,
        request: CopyRequest,
        caller: Option<&str>,
    ) -> Result<Granted, ServiceError> {
        self.needs(&GRANT_TARGETS)?;
        let id = request.id;
        if id == request.volume {
            return Err(Refusal::VolumeExists { id, field: "source" }.into());
        }
        let claim = &request.claim;
        let volume = self.lent_under(request.volume, claim.grant, claim.generation);
        // Before anything of anybody's is waited for or asked.
        let view = self.volumes.view_of(volume);
        admit::lent_to(view.as_ref().map(|view| &view.record), claim, caller)?;
        self.volumes
            .with_both((id, Generation::FIRST), volume, async |(slot, work), (_, source)| {
                admit::lent_to(source.record.as_ref(), claim, caller)?;
                self.begin_anew(slot, work).await?;
                let spent = self.volumes.tombstone(request.grant)?;
                let pool = beside(source);
                let room = pool.as_deref().map_or(Room::None, Room::In);
                let begun = self
                    .change(id, slot, work, room, |known| {
                        if known.record.is_none() {
                            let lent = admit::lent_to(source.record.as_ref(), claim, caller)?;
                            self.one_more_copy(id, request.volume, &lent.to.node)?;
                        }
                        // Under the lock of placements, as for any export.
                        let export = self.new_export();
                        let (volume, spent) = (source.record.as_ref(), spent.as_ref());
                        let room = known.room.as_ref();
                        let existing = known.record;
                        admit::grant_copy(existing, &request, volume, caller, export, room, spent)
                    })
                    .await?;
                let outcome = self.volumes.converge_asked(slot, work).await;
                self.undo(slot, work, begun, outcome, Event::ReleaseAsked).await?;
                let record = work.record.clone().ok_or(Refusal::GrantUnknown(request.grant))?;
                Ok(Granted { record })
            })
            .await
    }

    /// Whether a borrower may have another copy of what was fenced for it: their ids are
    /// its own choice, and each takes a port.
    fn one_more_copy(&self, id: VolumeId, volume: VolumeId, node: &str) -> Result<(), Refusal> {
        if !self.volumes.copies(id).is_empty() {
            return Err(Refusal::VolumeExists { id, field: "generation" });
        }
        let views = self.volumes.views();
        let records = views.iter().map(|view| &view.record);
        match records.filter(|record| record.is_read_by(node, volume)).count() {
            0..admit::MAX_COPIES => Ok(()),
            _ => Err(Refusal::CopiesExhausted { id: volume, limit: admit::MAX_COPIES }),
        }
    }

    /// What is known of a snapshot.
    ///
    /// # Errors
    /// There is none.
    pub fn snapshot(&self, id: VolumeId) -> Result<View, ServiceError> {
        Ok(self.volumes.snapshot(id).ok_or(Refusal::SnapshotNotFound(id))?)
    }

    /// Every snapshot of this node, sorted by id.
    pub fn snapshots(&self) -> Vec<View> {
        let mut views = self.volumes.views();
        views.retain(|view| view.record.taken().is_some());
        views
    }

    /// Makes a volume of a snapshot, or of a volume as it is now, in its pool.
    ///
    /// # Errors
    /// See [`admit::create_of`]; what was begun is undone.
    pub async fn create_of(
        &self,
        id: VolumeId,
        origin: Origin,
        pool: &str,
    ) -> Result<View, ServiceError> {
        let named = if pool.is_empty() { None } else { Some(self.pool_name(pool)?) };
        let boot = self.volumes.kernel.boot();
        let (copy, source) = self.apart(id, origin)?;
        self.volumes
            .with_both(copy, source, async |(slot, work), (_, source)| {
                self.begin_anew(slot, work).await?;
                let pool = beside(source).map(|pool| named.clone().unwrap_or(pool));
                let room = pool.as_deref().map_or(Room::None, Room::In);
                let begun = self
                    .change(id, slot, work, room, |known| {
                        if known.handle.is_some() && known.record.is_none() {
                            return Err(left_over(id));
                        }
                        let made = Made { origin, record: source.record.as_ref() };
                        let (room, new) = (known.room.as_ref(), Uuid::new_v4());
                        admit::create_of(known.record, id, made, room, new, boot)
                    })
                    .await?;
                let outcome = self.volumes.converge_asked(slot, work).await;
                self.undo(slot, work, begun, outcome, Event::DeleteAsked).await
            })
            .await
    }

    /// Makes a copy of a snapshot, or of a volume as it is now, for a peer that is to
    /// receive it under this id.
    ///
    /// # Errors
    /// See [`admit::grant_of`]; what was begun is undone.
    pub async fn grant_of(
        &self,
        id: VolumeId,
        origin: Origin,
        to: Borrower,
        host_nqn: String,
    ) -> Result<Granted, ServiceError> {
        self.needs(&GRANT_TARGETS)?;
        let boot = self.volumes.kernel.boot();
        let node = self.volumes.config.node.clone();
        let (copy, source) = self.apart(id, origin)?;
        self.volumes
            .with_both(copy, source, async |(slot, work), (_, source)| {
                self.begin_anew(slot, work).await?;
                let spent = self.volumes.tombstone(to.grant)?.is_some();
                let pool = beside(source);
                let room = pool.as_deref().map_or(Room::None, Room::In);
                let begun = self
                    .change(id, slot, work, room, |known| {
                        let made = Made { origin, record: source.record.as_ref() };
                        let request = GrantRequest {
                            to: to.clone(),
                            host_nqn: host_nqn.clone(),
                            hold: false,
                            // Under the lock of placements, which `change` holds for
                            // the room's sake: ports are given out one at a time.
                            export: self.new_export(),
                            max_depth: self.volumes.config.max_chain,
                        };
                        let (room, new) = (known.room.as_ref(), Uuid::new_v4());
                        admit::grant_of(
                            known.record,
                            id,
                            made,
                            request,
                            room,
                            new,
                            &node,
                            boot,
                            spent,
                        )
                    })
                    .await?;
                let outcome = self.volumes.converge_asked(slot, work).await;
                self.undo(slot, work, begun, outcome, Event::RevokeAsked).await?;
                let record = work.record.clone().ok_or(Refusal::VolumeNotFound(id))?;
                Ok(Granted { record })
            })
            .await
    }

    /// Takes away what an interrupted request has left half-made.
    async fn begin_anew(&self, slot: &Slot, work: &mut Work) -> Result<(), ServiceError> {
        if work.is_half_made() {
            self.volumes.converge(slot, work).await?;
        }
        Ok(())
    }

    /// The places of a volume and of what it is made of, which are two.
    fn apart(&self, id: VolumeId, origin: Origin) -> Result<(Copy, Copy), Refusal> {
        if origin == Origin::Volume(id) {
            return Err(Refusal::VolumeExists { id, field: "source" });
        }
        Ok((self.home(id), copy_of(self, origin)))
    }

    /// Takes a volume back to a snapshot.
    ///
    /// # Errors
    /// See [`admit::revert`]; a new data LV that cannot be made leaves the volume as
    /// it was.
    pub async fn revert(
        &self,
        which: impl Into<Which>,
        snapshot: VolumeId,
    ) -> Result<View, ServiceError> {
        let which = which.into();
        let (id, boot) = (which.id, self.volumes.kernel.boot());
        self.volumes
            .with_both(
                self.home(id),
                (snapshot, Generation::SNAPSHOT),
                async |(slot, work), (_, of)| {
                    let begun = self
                        .change(id, slot, work, Room::None, |known| {
                            let record = which.of(known.record)?;
                            let (handle, of) = (known.handle.as_ref(), of.record.as_ref());
                            admit::revert(record, of, snapshot, handle, boot)
                        })
                        .await?;
                    let outcome = self.arrived(slot, work).await;
                    self.undo(slot, work, begun, outcome, Event::RevertGivenUp).await
                },
            )
            .await
    }
}
