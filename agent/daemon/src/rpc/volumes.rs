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
        let view = whole(async move { service.create(id, size, &pool).await }).await?;
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
        Ok(Response::new(convert::volume(&view)))
    }

    async fn list(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let volumes = self.service.volumes.views().iter().map(convert::volume).collect();
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
}
