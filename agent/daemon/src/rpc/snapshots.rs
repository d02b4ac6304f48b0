//! The Snapshots service.

use std::sync::Arc;

use dmlocal_proto::v1;
use tonic::{Request, Response, Status, async_trait};

use super::{
    Face,
    auth::{Caller, Role},
    convert,
    status::status,
    whole,
};
use crate::reconcile::{ServiceError, View};

const ROLES: [Role; 2] = [Role::Driver, Role::Operator];

impl Face {
    fn shown_snapshot(&self, view: &View) -> Result<Response<v1::Snapshot>, Status> {
        let shown = convert::snapshot(view, &self.service.volumes.views());
        let missing = || status(ServiceError::Internal("this is no snapshot".into()));
        Ok(Response::new(shown.ok_or_else(missing)?))
    }
}

#[async_trait]
impl v1::snapshots_server::Snapshots for Face {
    async fn create(
        &self,
        request: Request<v1::CreateSnapshotRequest>,
    ) -> Result<Response<v1::Snapshot>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let id = convert::volume_id(&request.id).map_err(status)?;
        let volume = convert::volume_id(&request.volume_id).map_err(status)?;
        let service = Arc::clone(&self.service);
        let view = whole(async move { service.take_snapshot(id, volume).await }).await?;
        self.shown_snapshot(&view)
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteSnapshotRequest>,
    ) -> Result<Response<v1::DeleteSnapshotResponse>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let id = convert::volume_id(&request.id).map_err(status)?;
        let incarnation = request.incarnation.as_deref();
        let incarnation = incarnation.map(|text| convert::uuid("incarnation", text));
        let incarnation = incarnation.transpose().map_err(status)?;
        let service = Arc::clone(&self.service);
        let defer = request.defer;
        whole(async move { service.delete_snapshot(id, incarnation, defer).await }).await?;
        Ok(Response::new(v1::DeleteSnapshotResponse {}))
    }

    async fn get(
        &self,
        request: Request<v1::GetSnapshotRequest>,
    ) -> Result<Response<v1::Snapshot>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let id = convert::volume_id(&request.into_inner().id).map_err(status)?;
        self.shown_snapshot(&self.service.snapshot(id).map_err(status)?)
    }

    async fn list(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let all = self.service.volumes.views();
        let snapshots = self.service.snapshots();
        let snapshots = snapshots.iter().filter_map(|view| convert::snapshot(view, &all));
        Ok(Response::new(v1::ListSnapshotsResponse { snapshots: snapshots.collect() }))
    }
}
