//! The Volumes service.

use dmlocal_model::name::Generation;
use dmlocal_proto::v1;
use tonic::{Request, Response, Status, async_trait};

use super::{
    Face,
    auth::{Caller, Role},
    convert,
    status::status,
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
        let view =
            self.service.create(id, request.size_bytes, &request.pool).await.map_err(status)?;
        Ok(Response::new(convert::volume(&view)))
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let id = convert::volume_id(&request.into_inner().id).map_err(status)?;
        self.service.delete(id).await.map_err(status)?;
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
        let id = convert::volume_id(&request.id).map_err(status)?;
        let view = self.service.extend(id, request.size_bytes).await.map_err(status)?;
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
        let view = self.service.attach(id, generation).await.map_err(status)?;
        Ok(Response::new(convert::volume(&view)))
    }

    async fn detach(
        &self,
        request: Request<v1::DetachVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let id = convert::volume_id(&request.into_inner().id).map_err(status)?;
        let view = self.service.detach(id).await.map_err(status)?;
        Ok(Response::new(convert::volume(&view)))
    }
}
