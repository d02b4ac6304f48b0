//! Volumes that are used here while their data stays where it is.

use std::sync::Arc;

use dmlocal_model::{
    admit::{self, Claim, Offer, Refusal, Which},
    name::VolumeId,
    volume::{Event, Fate, LentStage, ReceivingStage, Record},
};
use tracing::{debug, info};
use uuid::Uuid;

use super::{RECEIVE_TARGETS, Room, Service, borrowed_by};
use crate::{
    config::WhenFull,
    peers::Peer,
    reconcile::{ServiceError, View},
};

/// What is needed before a volume can be used here without a copy.
const REMOTE_TARGETS: [&str; 4] = ["delay", "error", "multipath", "linear"];

/// Where the data of a received volume is going to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Here, if the configuration says so and there is room.
    Auto,
    /// Here.
    Local,
    /// At the source.
    Remote,
}

impl Service {
    /// Receives a volume and attaches it; its data comes here, or stays where it is.
    ///
    /// # Errors
    /// See [`admit::receive`] and [`admit::receive_remote`]; what was begun is undone.
    pub async fn receive_as(
        &self,
        offer: Offer,
        pool: &str,
        mode: Mode,
    ) -> Result<View, ServiceError> {
        let config = &self.volumes.config;
        let rule = &config.receive;
        let limit = rule.always_remote_above_bytes.filter(|limit| offer.size > *limit);
        // What begins with its grant is nowhere yet where it could stay.
        let mode = if mode == Mode::Auto && offer.begins { Mode::Local } else { mode };
        match (mode, limit) {
            (Mode::Remote, _) => self.receive_remote(offer, true).await,
            (Mode::Local, Some(limit)) => {
                Err(Refusal::AlwaysRemote { size: offer.size, limit }.into())
            }
            (Mode::Local, None) => self.receive(offer, pool).await,
            (Mode::Auto, Some(_)) => self.receive_remote(offer, false).await,
            // There is nothing else that it could mean here.
            (Mode::Auto, None) if config.pools.is_empty() && pool.is_empty() => {
                self.receive_remote(offer, false).await
            }
            (Mode::Auto, None) => match self.receive(offer.clone(), pool).await {
                Err(ServiceError::Refused(refusal @ Refusal::NoRoom { .. }))
                    if rule.when_full == WhenFull::Remote
                        && self.volumes.view(offer.id).is_none() =>
                {
                    info!(volume = %offer.id, %refusal, "used remotely instead");
                    self.receive_remote(offer, false).await
                }
                outcome => outcome,
            },
        }
    }

    async fn receive_remote(&self, offer: Offer, stays: bool) -> Result<View, ServiceError> {
        self.needs(&REMOTE_TARGETS)?;
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
                    .change(id, slot, work, Room::None, |known| {
                        admit::receive_remote(
                            known.record,
                            elder.as_ref(),
                            offer.clone(),
                            stays,
                            known.handle.as_ref(),
                            &node,
                            spent.as_ref(),
                        )
                    })
                    .await?;
                let peers = Arc::clone(&self.volumes.peers);
                tokio::spawn(async move { peers.prepare(&peer).await });
                let outcome = self.volumes.converge(slot, work).await;
                self.undo(slot, work, begun, outcome, Event::AbortAsked).await
            })
            .await
    }

    /// Makes a copy here of a volume that is used here and is elsewhere.
    ///
    /// # Errors
    /// See [`admit::localize`]; what was begun is undone.
    pub async fn localize(
        &self,
        which: impl Into<Which>,
        pool: &str,
    ) -> Result<View, ServiceError> {
        let which = which.into();
        let pool = self.pool_name(pool)?;
        self.needs(&RECEIVE_TARGETS)?;
        let limit = self.volumes.config.receive.always_remote_above_bytes;
        self.volumes
            .with_newest(which.id, async |slot, work| {
                which.of(work.record.as_ref())?;
                let begun = self
                    .change(which.id, slot, work, Room::In(&pool), |known| {
                        admit::localize(which.of(known.record)?, known.room()?, limit)
                    })
                    .await?;
                let outcome = self.volumes.converge(slot, work).await;
                self.undo(slot, work, begun, outcome, Event::LocalizeDropped).await
            })
            .await
    }

    /// Makes copies of the volumes that are remote only for want of room, as far as
    /// there is room now.
    pub async fn localize_what_fits(&self) {
        let rule = &self.volumes.config.receive;
        if !rule.localize_by_itself || self.volumes.config.pools.is_empty() {
            return;
        }
        for View { record, .. } in self.volumes.views() {
            let wants = record.receiving().is_some_and(|receiving| {
                receiving.stage == ReceivingStage::Remote
                    && receiving.failure.is_none()
                    && receiving.remote.as_ref().is_some_and(|remote| !remote.stays)
            });
            let limit = rule.always_remote_above_bytes;
            if !wants || limit.is_some_and(|limit| record.size.bytes() > limit) {
                continue;
            }
            match self.localize(record.id, "").await {
                Ok(_) => info!(volume = %record.id, "there is room for a copy now"),
                Err(error) => debug!(volume = %record.id, %error, "still remote"),
            }
        }
    }

    /// Ends writing here and takes what the grant's holder writes. `force` says that
    /// the guest has left, whatever is seen here. Returns the size in bytes.
    ///
    /// # Errors
    /// See [`admit::serve`].
    pub async fn serve(
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
                    admit::serve(record, claim, evidence, boot)
                })
                .await?;
                self.arrived(slot, work).await?;
                let record = work.record.as_ref().ok_or(Refusal::GrantUnknown(claim.grant))?;
                match record.lent().map(|lent| lent.stage) {
                    Some(LentStage::Serving) => Ok(record.size.bytes()),
                    stage => Err(ServiceError::Internal(format!("not served: {stage:?}"))),
                }
            })
            .await
            .map_err(|error| self.of_what_is_over(error, claim.grant))
    }

    /// What a grant's holder hears instead of that nobody knows the grant.
    pub(super) fn of_what_is_over(&self, error: ServiceError, grant: Uuid) -> ServiceError {
        let ServiceError::Refused(refusal) = error else { return error };
        match self.volumes.tombstone(grant) {
            Ok(stone) => admit::of_what_is_over(refusal, stone.as_ref()).into(),
            Err(error) => error,
        }
    }

    /// Takes the right to write back from the grant's holder, which has no use for the
    /// volume any more; or is gone, on the word of whoever asks.
    ///
    /// # Errors
    /// See [`admit::reclaim`].
    pub async fn reclaim(
        &self,
        id: VolumeId,
        claim: &Claim,
        caller: Option<&str>,
    ) -> Result<(), ServiceError> {
        let boot = self.volumes.kernel.boot();
        self.volumes
            .with(self.lent_under(id, claim.grant, claim.generation), async |slot, work| {
                let open = |record: &Record| {
                    record.lent().is_some_and(|lent| lent.to.grant == claim.grant)
                };
                let stone = self.volumes.tombstone(claim.grant)?;
                let over =
                    stone.is_some_and(|stone| stone.volume == id && stone.fate == Fate::Returned);
                if over && !work.record.as_ref().is_some_and(open) {
                    return Ok(());
                }
                self.change(id, slot, work, Room::None, |known| {
                    let record = known.record.ok_or(Refusal::GrantUnknown(claim.grant))?;
                    borrowed_by(record, claim.grant, caller)?;
                    admit::reclaim(record, claim, boot)
                })
                .await?;
                // The holder waits, so that whoever attaches it here next finds it open.
                self.arrived(slot, work).await.map(|_| ())
            })
            .await
    }
}
