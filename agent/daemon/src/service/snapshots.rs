//! Requests about snapshots, and about volumes that are made of something. What is
//! made of another copy holds that one's lock as well, so that it neither changes
//! hands nor goes meanwhile.

use std::time::{SystemTime, UNIX_EPOCH};

use dmlocal_model::{
    admit::{self, CopyRequest, GrantRequest, Made, Refusal, SnapshotRequest, Which},
    name::{Generation, VolumeId},
    volume::{Borrower, Event, Origin, ReceivingStage, Record},
};
use uuid::Uuid;

use super::{GRANT_TARGETS, Granted, Room, Service, left_over};
use crate::reconcile::{Copy, ServiceError, Slot, View, Work};

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
        let boot = self.volumes.kernel.boot();
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let at = since.map_or(0, |since| since.as_secs());
        let (incarnation, grant) = (Uuid::new_v4(), Uuid::new_v4());
        let request = SnapshotRequest { id, volume, incarnation, grant, at };
        self.volumes
            .with_both(
                (id, Generation::SNAPSHOT),
                self.home(volume),
                async |(slot, work), (_, source)| {
                    self.begin_anew(slot, work).await?;
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
                    let outcome = self.volumes.converge_asked(slot, work).await;
                    self.undo(slot, work, begun, outcome, Event::DeleteAsked).await
                },
            )
            .await
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
        self.volumes
            .with_both((id, Generation::FIRST), volume, async |(slot, work), (_, source)| {
                self.begin_anew(slot, work).await?;
                let spent = self.volumes.tombstone(request.grant)?;
                let pool = beside(source);
                let room = pool.as_deref().map_or(Room::None, Room::In);
                let begun = self
                    .change(id, slot, work, room, |known| {
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
