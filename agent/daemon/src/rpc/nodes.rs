//! The Nodes service.

use std::{collections::BTreeMap, sync::Arc};

use dmlocal_model::name::NQN_PREFIX;
use dmlocal_proto::{API_VERSION, OLDEST_API_VERSION, v1};
use tokio::sync::{broadcast::error::RecvError, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, async_trait};

use super::{
    Answers, Face,
    auth::{Caller, Role},
    convert,
    status::status,
};
use crate::{
    reconcile::{Copy, Volumes},
    store::JOURNAL_VERSION,
};

const ANY: [Role; 3] = [Role::Driver, Role::Agent, Role::Operator];
const ROLES: [Role; 2] = [Role::Driver, Role::Operator];

/// Changes that a slow watcher may lag behind before it is made to wait.
const WATCH_BUFFER: usize = 64;

#[async_trait]
impl v1::nodes_server::Nodes for Face {
    async fn get_node(
        &self,
        request: Request<v1::GetNodeRequest>,
    ) -> Result<Response<v1::Node>, Status> {
        let caller = Caller::of(&request)?;
        caller.must_be(&ANY)?;
        // A host NQN opens what was exported to that host: it is nobody's business
        // but that of those who place volumes.
        let trusted = caller.must_be(&ROLES).is_ok();
        let volumes = &self.service.volumes;
        let config = &volumes.config;
        Ok(Response::new(v1::Node {
            name: config.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            api_version: API_VERSION,
            oldest_api_version: OLDEST_API_VERSION,
            journal_version: JOURNAL_VERSION,
            kernel: volumes.kernel.release(),
            targets: self.service.targets.clone(),
            warnings: if trusted { self.service.warnings().await } else { Vec::new() },
            pools: config.pools.iter().map(|pool| pool.name.clone()).collect(),
            endpoint: config.listen.advertise.clone().unwrap_or_default(),
            host_nqn: if trusted {
                format!("{NQN_PREFIX}{}", volumes.store.host())
            } else {
                String::new()
            },
        }))
    }

    async fn list_pools(
        &self,
        request: Request<v1::ListPoolsRequest>,
    ) -> Result<Response<v1::ListPoolsResponse>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let mut pools = Vec::new();
        for pool in &self.service.volumes.config.pools {
            let facts = self.service.volumes.pool_facts(&pool.name, true).await.map_err(status)?;
            let provisioned_bytes = self.service.provisioned(&pool.name);
            pools.push(v1::Pool {
                name: pool.name.clone(),
                volume_group: pool.volume_group.clone(),
                thin_pool: pool.thin_pool.clone(),
                size_bytes: facts.as_ref().map_or(0, |facts| facts.size),
                used_bytes: facts.as_ref().map_or(0, |facts| facts.used),
                provisioned_bytes,
                free_bytes: facts
                    .as_ref()
                    .map_or(0, |facts| self.service.free(&pool.name, facts, pool.overprovisioning)),
                chunk_size_bytes: facts.as_ref().map_or(0, |facts| facts.chunk),
                logical_block_size: facts.as_ref().map_or(0, |facts| facts.logical_block_size),
                present: facts.is_some(),
            });
        }
        Ok(Response::new(v1::ListPoolsResponse { pools }))
    }

    type WatchStream = Answers<v1::WatchResponse>;

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let id = request.into_inner().id;
        let only = match id.as_str() {
            "" => None,
            id => {
                let id = convert::volume_id(id).map_err(status)?;
                if self.service.volumes.view(id).is_none() {
                    let refusal = dmlocal_model::admit::Refusal::VolumeNotFound(id);
                    return Err(status(refusal.into()));
                }
                Some(id)
            }
        };
        let (sender, receiver) = mpsc::channel(WATCH_BUFFER);
        let volumes = Arc::clone(&self.service.volumes);
        tokio::spawn(async move { watch(&volumes, only, sender).await });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Sends what has changed since it was last sent, until nobody listens.
async fn watch(
    volumes: &Arc<Volumes>,
    only: Option<dmlocal_model::name::VolumeId>,
    sender: mpsc::Sender<Result<v1::WatchResponse, Status>>,
) {
    let mut changes = volumes.changes();
    let mut sent: BTreeMap<Copy, v1::Volume> = BTreeMap::new();
    loop {
        let now: BTreeMap<Copy, v1::Volume> = volumes
            .views()
            .iter()
            .filter(|view| view.record.taken().is_none())
            .filter(|view| only.is_none_or(|only| view.record.id == only))
            .map(|view| ((view.record.id, view.record.made_in), convert::volume(view)))
            .collect();
        let gone: Vec<v1::Volume> = sent
            .iter()
            .filter(|(copy, _)| !now.contains_key(copy))
            .map(|(_, volume)| volume.clone())
            .collect();
        let changed: Vec<v1::Volume> = now
            .iter()
            .filter(|(copy, volume)| sent.get(copy) != Some(volume))
            .map(|(_, volume)| volume.clone())
            .collect();
        let news = gone
            .into_iter()
            .map(|volume| (volume, true))
            .chain(changed.into_iter().map(|volume| (volume, false)));
        for (volume, gone) in news {
            let answer = v1::WatchResponse { volume: Some(volume), gone };
            if sender.send(Ok(answer)).await.is_err() {
                return;
            }
        }
        sent = now;
        tokio::select! {
            () = sender.closed() => return,
            // Having missed some is the same as having seen one: all are
            // compared again.
            change = changes.recv() => {
                if matches!(change, Err(RecvError::Closed)) {
                    return;
                }
            }
        }
        while changes.try_recv().is_ok() {}
    }
}
