//! Asking a source what was never written, beside everything else.
//!
//! Nothing waits for the answer but copying, and that not for ever: a source that has
//! no map, or does not say in a few attempts, is copied whole. None of this is
//! journalled; a later process asks again.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use dmlocal_model::{admit::Claim, name::VolumeId, seeding::SourceMap, units::Sectors};
use tokio::{sync::Notify, time::sleep};
use tracing::info;

use crate::peers::{Peer, PeerError, Peers};

/// After so many attempts without an answer, and after so many that could not be used
/// here, everything is copied.
const ATTEMPTS: u32 = 3;

/// The pause between two attempts.
const RETRY: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 1000 });

/// What this process knows of one copy's source.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    map: Arc<Mutex<SourceMap>>,
    failed_here: u32,
}

impl Asked {
    /// What is known now.
    pub fn map(&self) -> SourceMap {
        self.map.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, map: SourceMap) {
        *self.map.lock().unwrap_or_else(PoisonError::into_inner) = map;
    }

    /// Begins to ask; `nudge` tells of the answer.
    pub fn ask(
        &self,
        peers: Arc<dyn Peers>,
        nudge: Arc<Notify>,
        (peer, volume, claim, region): (Peer, VolumeId, Claim, Sectors),
    ) {
        self.set(SourceMap::Asked);
        let asked = self.clone();
        tokio::spawn(async move {
            let mut known = SourceMap::Missing;
            for _ in 0..ATTEMPTS {
                match peers.allocation(&peer, volume, &claim, region).await {
                    Ok(map) => {
                        info!(%volume, unwritten = ?map.unwritten, "the source has told its map");
                        known = SourceMap::Known(Arc::new(map));
                        break;
                    }
                    Err(error @ PeerError::Refused { .. }) => {
                        info!(%volume, %error, "everything is copied");
                        break;
                    }
                    Err(error) => info!(%volume, %error, "the source does not tell its map"),
                }
                sleep(RETRY).await;
            }
            asked.set(known);
            nudge.notify_one();
        });
    }

    /// The map could not be used; after some times it counts as missing.
    pub fn failed_here(&mut self) {
        self.failed_here += 1;
        if self.failed_here >= ATTEMPTS {
            self.set(SourceMap::Missing);
        }
    }

    /// It has been used, or never will be.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}
