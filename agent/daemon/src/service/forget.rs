//! Giving up a source that is lost for ever, and deleting what such a source still
//! has when it comes back.

use std::sync::Arc;

use dmlocal_model::{
    admit::{Admitted, Claim, Which},
    forget::{self, GrantFate, Lost},
    name::VolumeId,
    table::CloneStatus,
    volume::{LentStage, Record},
};
use tracing::warn;
use uuid::Uuid;

use super::Service;
use crate::{
    peers::Peer,
    reconcile::{ServiceError, Slot, View, Work},
};

/// What was given up.
#[derive(Debug)]
pub struct Forgotten {
    /// The volume as it is now; none when it has left this node with that.
    pub view: Option<View>,
    /// What is nowhere any more.
    pub lost: Lost,
}

impl Service {
    /// Gives up the source of a volume. What is lost with it is in the answer; a
    /// source that still answers is told rather than forgotten, where it has
    /// nothing any more that this node lacks.
    ///
    /// # Errors
    /// See [`forget::may_forget`].
    pub async fn forget_source(&self, which: impl Into<Which>) -> Result<Forgotten, ServiceError> {
        let which = which.into();
        self.volumes
            .with_newest(which.id, async |slot, work| {
                which.of(work.record.as_ref())?;
                // What is in its way does not matter here; an attempt to reach the source
                // that is under way does.
                let _ = self.volumes.converge(slot, work).await;
                self.volumes.await_attempt(work).await;
                let _ = self.volumes.converge(slot, work).await;
                let Some(record) = work.record.clone() else {
                    return Ok(Forgotten { view: None, lost: Lost::default() });
                };
                let seen = self.volumes.look(&record, work).await?;
                let alive = forget::is_alive(&seen);
                forget::may_forget(&record, alive)?;
                // Regions that are here in memory only would be lost with the next
                // power cut, when nobody has them any more.
                let committed = match forget::loses(&record) {
                    true => self.committed(&record).await?,
                    false => 0,
                };
                // That may have taken long enough for the source to come back.
                let alive = forget::is_alive(&self.volumes.look(&record, work).await?);
                if let Admitted::Journal(record) = forget::forget_source(&record, alive, committed)?
                {
                    warn!(volume = %record.id, committed, "the source is given up");
                    self.volumes.put(slot, work, *record, Vec::new()).await?;
                }
                let given_up = Lost::of_move(&record);
                if let Err(error) = self.volumes.converge(slot, work).await {
                    // It goes on by itself.
                    warn!(volume = %which.id, step = error.step(), %error, "not yet taken down");
                }
                let view = work.record.as_ref().and_then(|_| self.volumes.view(which.id));
                let lost = given_up.or_else(|| view.as_ref().and_then(lost)).unwrap_or_default();
                Ok(Forgotten { view, lost })
            })
            .await
    }

    async fn committed(&self, record: &Record) -> Result<u64, ServiceError> {
        let (kernel, record) = (Arc::clone(&self.volumes.kernel), record.clone());
        tokio::task::spawn_blocking(move || kernel.committed(&record))
            .await?
            .map_err(|source| ServiceError::Step { step: "commit".into(), source })
    }

    /// Deletes a fenced copy if its borrower says that it reads it no more; whether
    /// it did.
    pub(super) async fn delete_fenced(
        &self,
        slot: &Slot,
        work: &mut Work,
    ) -> Result<bool, ServiceError> {
        let Some(record) = work.record.clone() else { return Ok(false) };
        if !self.fate_of_fenced(&record).await.released {
            return Ok(false);
        }
        if let Admitted::Journal(record) = forget::delete_fenced(&record, true)? {
            self.volumes.put(slot, work, *record, Vec::new()).await?;
        }
        Ok(true)
    }

    /// What became of a fenced copy's grant, as its borrower says; without an answer
    /// it stays what it is.
    pub(super) async fn fate_of_fenced(&self, record: &Record) -> GrantFate {
        let Some(lent) = record.lent().filter(|lent| lent.stage == LentStage::Fenced) else {
            return GrantFate::default();
        };
        let claim = Claim {
            grant: lent.to.grant,
            incarnation: record.incarnation,
            generation: record.generation,
            session: 0,
        };
        let fate = self.volumes.peers.query(&Peer::from(&lent.to), record.id, &claim).await;
        fate.unwrap_or_default()
    }

    /// What this node knows of a grant that was given to it.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub fn grant_fate(&self, id: VolumeId, grant: Uuid) -> Result<GrantFate, ServiceError> {
        let mut copies = self.volumes.copies(id);
        copies.extend(self.volumes.snapshot(id));
        let stone = self.volumes.tombstone(grant)?;
        Ok(forget::fate(copies.iter().map(|view| &view.record), stone.as_ref(), grant))
    }
}

/// What is missing for ever of a volume whose source was given up.
pub fn lost(view: &View) -> Option<Lost> {
    let receiving = view.record.receiving().filter(|_| view.record.is_damaged())?;
    let hydrated = match view.seen.as_ref().and_then(|seen| seen.clone_status.as_ref()) {
        Some(CloneStatus::Working { hydrated, .. }) => *hydrated,
        Some(CloneStatus::Failed) | None => receiving.floor,
    };
    Some(Lost::of(receiving, hydrated))
}
