//! The Moves service.

use std::sync::Arc;

use dmlocal_model::{
    admit::{Change, Claim},
    volume::Borrower,
};
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

impl Face {
    async fn tuned(&self, id: &str, change: Change) -> Result<Response<v1::Volume>, Status> {
        let id = convert::volume_id(id).map_err(status)?;
        let service = Arc::clone(&self.service);
        let view = whole(async move { service.tune(id, change).await }).await?;
        Ok(Response::new(convert::volume(&view)))
    }
}

#[async_trait]
impl v1::moves_server::Moves for Face {
    async fn grant(
        &self,
        request: Request<v1::GrantRequest>,
    ) -> Result<Response<v1::Grant>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let id = convert::volume_id(&request.id).map_err(status)?;
        let to = Borrower {
            grant: convert::uuid("grant_id", &request.grant_id).map_err(status)?,
            node: convert::word("node", &request.node).map_err(status)?,
            endpoint: convert::endpoint("endpoint", &request.endpoint).map_err(status)?,
        };
        let host_nqn = convert::word("host_nqn", &request.host_nqn).map_err(status)?;
        let config = &self.service.volumes.config;
        let Some(endpoint) = &config.listen.advertise else {
            return Err(status(ServiceError::Argument {
                field: "listen.advertise",
                problem: "is not configured here: no other node could reach this one".into(),
            }));
        };
        let service = Arc::clone(&self.service);
        let hold = request.hold;
        let granted = match request.source {
            None => whole(async move { service.grant(id, to, host_nqn, hold).await }).await?,
            Some(_) if hold => {
                let problem = "must be false: nobody writes what is new".into();
                return Err(status(ServiceError::Argument { field: "hold", problem }));
            }
            Some(source) => {
                let origin = convert::origin("source", source).map_err(status)?;
                whole(async move { service.grant_of(id, origin, to, host_nqn).await }).await?
            }
        };
        let grant = convert::grant(&granted.record, &config.node, endpoint)
            .ok_or_else(|| status(ServiceError::Internal("the grant is gone".into())))?;
        Ok(Response::new(grant))
    }

    async fn receive(
        &self,
        request: Request<v1::ReceiveRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let grant = request.grant.ok_or_else(|| {
            status(ServiceError::Argument { field: "grant", problem: "is missing".into() })
        })?;
        let node = &self.service.volumes.config.node;
        let offer = convert::offer(grant, node).map_err(status)?;
        let service = Arc::clone(&self.service);
        let mode = convert::mode(request.mode).map_err(status)?;
        let view =
            whole(async move { service.receive_as(offer, &request.pool, mode).await }).await?;
        Ok(Response::new(convert::volume(&view)))
    }

    async fn localize(
        &self,
        request: Request<v1::LocalizeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let which = convert::which(&request.id, request.generation, request.incarnation.as_deref())
            .map_err(status)?;
        let service = Arc::clone(&self.service);
        let view = whole(async move { service.localize(which, &request.pool).await }).await?;
        Ok(Response::new(convert::volume(&view)))
    }

    async fn switch(
        &self,
        request: Request<v1::SwitchRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let which = convert::which(&request.id, request.generation, request.incarnation.as_deref())
            .map_err(status)?;
        let service = Arc::clone(&self.service);
        let view = whole(async move { service.switch(which, request.force).await }).await?;
        Ok(Response::new(convert::volume(&view)))
    }

    async fn abort(
        &self,
        request: Request<v1::AbortRequest>,
    ) -> Result<Response<v1::AbortResponse>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let which = convert::which(&request.id, request.generation, request.incarnation.as_deref())
            .map_err(status)?;
        let service = Arc::clone(&self.service);
        whole(async move { service.abort(which).await }).await?;
        Ok(Response::new(v1::AbortResponse {}))
    }

    async fn pause_hydration(
        &self,
        request: Request<v1::PauseHydrationRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let change = Change { paused: Some(true), ..Change::default() };
        self.tuned(&request.into_inner().id, change).await
    }

    async fn resume_hydration(
        &self,
        request: Request<v1::ResumeHydrationRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let change = Change { paused: Some(false), ..Change::default() };
        self.tuned(&request.into_inner().id, change).await
    }

    async fn tune_hydration(
        &self,
        request: Request<v1::TuneHydrationRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let request = request.into_inner();
        let change = Change {
            paused: None,
            rate: request.rate_bytes_per_s,
            threshold: request.threshold,
            batch: request.batch,
            priority: request.priority,
        };
        self.tuned(&request.id, change).await
    }

    async fn forget_source(
        &self,
        request: Request<v1::ForgetSourceRequest>,
    ) -> Result<Response<v1::ForgetSourceResponse>, Status> {
        Caller::of(&request)?.must_be(&[Role::Operator])?;
        let request = request.into_inner();
        let which = convert::which(&request.id, request.generation, request.incarnation.as_deref())
            .map_err(status)?;
        if !request.accept_data_loss {
            return Err(status(ServiceError::Argument {
                field: "accept_data_loss",
                problem: "must be true: what is only at the source is lost".into(),
            }));
        }
        let service = Arc::clone(&self.service);
        let forgotten = whole(async move { service.forget_source(which).await }).await?;
        Ok(Response::new(convert::forgotten(&forgotten)))
    }

    async fn guest_left(
        &self,
        request: Request<v1::GuestLeftRequest>,
    ) -> Result<Response<v1::GuestLeftResponse>, Status> {
        Caller::of(&request)?.must_be(&ROLES)?;
        let id = convert::volume_id(&request.into_inner().id).map_err(status)?;
        let service = Arc::clone(&self.service);
        whole(async move { service.guest_left(id).await }).await?;
        Ok(Response::new(v1::GuestLeftResponse {}))
    }

    async fn hasten(
        &self,
        request: Request<v1::HastenRequest>,
    ) -> Result<Response<v1::HastenResponse>, Status> {
        let caller = Caller::of(&request)?;
        let node = caller.acting_for(&[])?;
        let request = request.into_inner();
        let id = convert::volume_id(&request.volume_id).map_err(status)?;
        let grant = convert::uuid("grant_id", &request.grant_id).map_err(status)?;
        let service = Arc::clone(&self.service);
        whole(async move { service.hasten(id, grant, node.as_deref()).await }).await?;
        Ok(Response::new(v1::HastenResponse {}))
    }

    async fn fence(
        &self,
        request: Request<v1::FenceRequest>,
    ) -> Result<Response<v1::FenceResponse>, Status> {
        let caller = Caller::of(&request)?;
        let node = caller.acting_for(&[])?;
        let request = request.into_inner();
        let id = convert::volume_id(&request.volume_id).map_err(status)?;
        let claim = convert::claim(&request.grant_id, &request.incarnation, request.generation)
            .map_err(status)?;
        let claim = Claim { session: request.session, ..claim };
        let service = Arc::clone(&self.service);
        let size_bytes =
            whole(async move { service.fence(id, &claim, request.force, node.as_deref()).await })
                .await?;
        Ok(Response::new(v1::FenceResponse { size_bytes }))
    }

    async fn get_allocation(
        &self,
        request: Request<v1::GetAllocationRequest>,
    ) -> Result<Response<v1::Allocation>, Status> {
        let caller = Caller::of(&request)?;
        let node = caller.acting_for(&[])?;
        let request = request.into_inner();
        let id = convert::volume_id(&request.volume_id).map_err(status)?;
        let claim = convert::claim(&request.grant_id, &request.incarnation, request.generation)
            .map_err(status)?;
        let region = convert::region(request.region_bytes).map_err(status)?;
        let service = Arc::clone(&self.service);
        let map =
            whole(async move { service.allocation(id, &claim, region, node.as_deref()).await })
                .await?;
        Ok(Response::new(convert::allocation(&map)))
    }

    async fn grant_copy(
        &self,
        request: Request<v1::GrantCopyRequest>,
    ) -> Result<Response<v1::Grant>, Status> {
        let caller = Caller::of(&request)?;
        let node = caller.acting_for(&[])?;
        let request = convert::copy_request(&request.into_inner()).map_err(status)?;
        let config = &self.service.volumes.config;
        let Some(endpoint) = &config.listen.advertise else {
            return Err(status(ServiceError::Internal("this node has no address".into())));
        };
        let service = Arc::clone(&self.service);
        let granted =
            whole(async move { service.grant_copy(request, node.as_deref()).await }).await?;
        let grant = convert::grant(&granted.record, &config.node, endpoint)
            .ok_or_else(|| status(ServiceError::Internal("the grant is gone".into())))?;
        Ok(Response::new(grant))
    }

    async fn serve(
        &self,
        request: Request<v1::ServeRequest>,
    ) -> Result<Response<v1::ServeResponse>, Status> {
        let caller = Caller::of(&request)?;
        let node = caller.acting_for(&[])?;
        let request = request.into_inner();
        let id = convert::volume_id(&request.volume_id).map_err(status)?;
        let claim = convert::claim(&request.grant_id, &request.incarnation, request.generation)
            .map_err(status)?;
        let claim = Claim { session: request.session, ..claim };
        let service = Arc::clone(&self.service);
        let size_bytes =
            whole(async move { service.serve(id, &claim, request.force, node.as_deref()).await })
                .await?;
        Ok(Response::new(v1::ServeResponse { size_bytes }))
    }

    async fn reclaim(
        &self,
        request: Request<v1::ReclaimRequest>,
    ) -> Result<Response<v1::ReclaimResponse>, Status> {
        let caller = Caller::of(&request)?;
        let node = caller.acting_for(&ROLES)?;
        let request = request.into_inner();
        let id = convert::volume_id(&request.volume_id).map_err(status)?;
        let claim = convert::claim(&request.grant_id, &request.incarnation, request.generation)
            .map_err(status)?;
        let service = Arc::clone(&self.service);
        whole(async move { service.reclaim(id, &claim, node.as_deref()).await }).await?;
        Ok(Response::new(v1::ReclaimResponse {}))
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        let caller = Caller::of(&request)?;
        let node = caller.acting_for(&[])?;
        let request = request.into_inner();
        let id = convert::volume_id(&request.volume_id).map_err(status)?;
        let claim = convert::claim(&request.grant_id, &request.incarnation, request.generation)
            .map_err(status)?;
        let service = Arc::clone(&self.service);
        whole(async move { service.release(id, &claim, node.as_deref()).await }).await?;
        Ok(Response::new(v1::ReleaseResponse {}))
    }

    async fn revoke(
        &self,
        request: Request<v1::RevokeRequest>,
    ) -> Result<Response<v1::RevokeResponse>, Status> {
        let caller = Caller::of(&request)?;
        let node = caller.acting_for(&ROLES)?;
        let request = request.into_inner();
        let id = convert::volume_id(&request.volume_id).map_err(status)?;
        let grant = convert::uuid("grant_id", &request.grant_id).map_err(status)?;
        let service = Arc::clone(&self.service);
        whole(async move { service.revoke(id, grant, node.as_deref()).await }).await?;
        Ok(Response::new(v1::RevokeResponse {}))
    }

    async fn query_grant(
        &self,
        request: Request<v1::QueryGrantRequest>,
    ) -> Result<Response<v1::QueryGrantResponse>, Status> {
        Caller::of(&request)?.must_be(&[Role::Agent, Role::Operator])?;
        let request = request.into_inner();
        let id = convert::volume_id(&request.volume_id).map_err(status)?;
        let grant = convert::uuid("grant_id", &request.grant_id).map_err(status)?;
        let fate = self.service.grant_fate(id, grant).map_err(status)?;
        let answer = v1::QueryGrantResponse {
            taken: fate.taken,
            released: fate.released,
            given_up: fate.given_up,
        };
        Ok(Response::new(answer))
    }
}
