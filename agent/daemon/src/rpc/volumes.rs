//! The Volumes service.

use std::sync::Arc;

use dmlocal_model::name::Generation;
use dmlocal_proto::v1;
use tonic::{Request, Response, Status, async_trait};

use super::{
    Face,
    auth::{Caller, Role},
    convert,
    status::status,
    whole,
};
use crate::reconcile::ServiceError;

const ROLES: [Role; 2] = [Role::Driver, Role::Operator];

#[async_trait]
impl v1::volumes_server::Volumes for Face {
    async fn create(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let id = convert::volume_id(&request.id).map_err(status)?;
        let service = Arc::clone(&self.service);
        let (size, pool) = (request.size_bytes, request.pool);
        let view = match request.source {
            None => whole(async move { service.create(id, size, &pool).await }).await?,
            Some(_) if size != 0 => {
                let problem = "must be 0: it is the source's".into();
                return Err(status(ServiceError::Argument { field: "size_bytes", problem }));
            }
            Some(source) => {
                let origin = convert::origin("source", source).map_err(status)?;
                whole(async move { service.create_of(id, origin, &pool).await }).await?
            }
        };
        Ok(Response::new(convert::volume(&view)))
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let which = convert::which(&request.id, request.generation, request.incarnation.as_deref())
            .map_err(status)?;
        let service = Arc::clone(&self.service);
        whole(async move { service.delete(which).await }).await?;
        Ok(Response::new(v1::DeleteVolumeResponse {}))
    }

    async fn get(
        &self,
        request: Request<v1::GetVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let id = convert::volume_id(&request.into_inner().id).map_err(status)?;
        let view = self
            .service
            .volumes
            .view(id)
            .ok_or_else(|| status(dmlocal_model::admit::Refusal::VolumeNotFound(id).into()))?;
        let views = self.service.measured(vec![view]).await;
        match views.first() {
            Some(view) => Ok(Response::new(convert::volume(view))),
            None => Err(status(ServiceError::Internal("the view is gone".into()))),
        }
    }

    async fn list(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let mut views = self.service.volumes.views();
        views.retain(|view| view.record.taken().is_none());
        let views = self.service.measured(views).await;
        let volumes = views.iter().map(convert::volume).collect();
        Ok(Response::new(v1::ListVolumesResponse { volumes }))
    }

    async fn extend(
        &self,
        request: Request<v1::ExtendVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let which = convert::which(&request.id, request.generation, request.incarnation.as_deref())
            .map_err(status)?;
        let service = Arc::clone(&self.service);
        let size = request.size_bytes;
        let view = whole(async move { service.extend(which, size).await }).await?;
        Ok(Response::new(convert::volume(&view)))
    }

    async fn attach(
        &self,
        request: Request<v1::AttachVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let id = convert::volume_id(&request.id).map_err(status)?;
        let generation = request.generation.map(Generation);
        let service = Arc::clone(&self.service);
        let view = whole(async move { service.attach(id, generation).await }).await?;
        Ok(Response::new(convert::volume(&view)))
    }

    async fn detach(
        &self,
        request: Request<v1::DetachVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let which = convert::which(&request.id, request.generation, request.incarnation.as_deref())
            .map_err(status)?;
        let service = Arc::clone(&self.service);
        let view = whole(async move { service.detach(which).await }).await?;
        Ok(Response::new(convert::volume(&view)))
    }

    async fn revert(
        &self,
        request: Request<v1::RevertVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let which = convert::which(&request.id, request.generation, request.incarnation.as_deref())
            .map_err(status)?;
        let snapshot = convert::volume_id(&request.snapshot_id).map_err(status)?;
        let service = Arc::clone(&self.service);
        let view = whole(async move { service.revert(which, snapshot).await }).await?;
        Ok(Response::new(convert::volume(&view)))
    }
}
