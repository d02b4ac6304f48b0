//! Questions to other nodes' agents, each with a deadline.

use std::{collections::BTreeMap, net::IpAddr, sync::Mutex, time::Duration};

use async_trait::async_trait;
use dmlocal_model::{
    admit::{Claim, CopyRequest},
    forget::GrantFate,
    name::{Generation, VolumeId, is_nqn},
    seeding::{AllocationMap, Unwritten},
    units::Sectors,
    volume::{Borrower, ExportName},
};
use dmlocal_proto::v1;
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_types::StatusExt as _;

use uuid::Uuid;

use crate::config::Tls;

/// Longest wait for a connection to a peer.
const CONNECT: Duration = Duration::from_secs(5);

/// Longest wait for a peer's answer: a fence writes the page cache back first.
const ANSWER: Duration = Duration::from_secs(60);

/// Longest wait for a copy at a source, for which a caller waits.
const COPY: Duration = Duration::from_secs(20);

/// Why a peer did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// No answer: whether it was done is not known.
    #[error("{node} does not answer: {why}")]
    Unreachable {
        /// The peer.
        node: String,
        /// What was seen.
        why: String,
    },
    /// It answered, and will not.
    #[error("{node}: {message}")]
    Refused {
        /// The peer.
        node: String,
        /// Its stable reason.
        reason: String,
        /// Its words.
        message: String,
    },
}

/// A peer and where its agent listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its node name; its certificate must carry it.
    pub node: String,
    /// URL of its agent.
    pub endpoint: String,
}

impl From<&Borrower> for Peer {
    fn from(borrower: &Borrower) -> Self {
        Self { node: borrower.node.clone(), endpoint: borrower.endpoint.clone() }
    }
}

/// What one agent asks of another. Repeating a question is harmless.
#[async_trait]
pub trait Peers: Send + Sync + 'static {
    /// Opens a connection ahead of time; failure shows when it is used.
    async fn prepare(&self, peer: &Peer);

    /// Nobody there writes any more; the answer is the volume's size in bytes. `force`
    /// says that the guest has left, whatever is seen there.
    async fn fence(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
        force: bool,
    ) -> Result<u64, PeerError>;

    /// Nobody uses the source any more: the destination need not wait for a write.
    async fn hasten(&self, peer: &Peer, volume: VolumeId, grant: Uuid) -> Result<(), PeerError>;

    /// What was never written to the fenced volume there, in regions of this size.
    async fn allocation(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
        region: Sectors,
    ) -> Result<AllocationMap, PeerError>;

    /// What is fenced there is copied for a snapshot here: how that copy is exported,
    /// and its size in bytes.
    async fn copy(
        &self,
        peer: &Peer,
        request: &CopyRequest,
    ) -> Result<(ExportName, u64), PeerError>;

    /// Nobody there writes any more, and what is written here is taken there; the
    /// answer is the volume's size in bytes. `force` as for a fence.
    async fn serve(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
        force: bool,
    ) -> Result<u64, PeerError>;

    /// The copy there is the volume again.
    async fn give_back(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
    ) -> Result<(), PeerError>;

    /// The copy there may go.
    async fn release(&self, peer: &Peer, volume: VolumeId, claim: &Claim) -> Result<(), PeerError>;

    /// The grant is given back unused.
    async fn revoke(&self, peer: &Peer, volume: VolumeId, claim: &Claim) -> Result<(), PeerError>;

    /// What became of the grant at the peer.
    async fn query(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
    ) -> Result<GrantFate, PeerError>;
}

/// Peers over gRPC with mutual TLS.
#[derive(Debug)]
pub struct TlsPeers {
    tls: Option<ClientTlsConfig>,
    channels: Mutex<BTreeMap<(String, String), Channel>>,
}

impl TlsPeers {
    /// Reads the certificates.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn new(files: Option<&Tls>) -> std::io::Result<Self> {
        let tls = files
            .map(|files| {
                Ok::<_, std::io::Error>(
                    ClientTlsConfig::new()
                        .ca_certificate(Certificate::from_pem(std::fs::read(&files.ca)?))
                        .identity(Identity::from_pem(
                            std::fs::read(&files.cert)?,
                            std::fs::read(&files.key)?,
                        )),
                )
            })
            .transpose()?;
        Ok(Self { tls, channels: Mutex::default() })
    }

    fn moves(&self, peer: &Peer) -> Result<v1::moves_client::MovesClient<Channel>, PeerError> {
        Ok(v1::moves_client::MovesClient::new(self.channel(peer)?))
    }

    fn channel(&self, peer: &Peer) -> Result<Channel, PeerError> {
        let unreachable = |why: String| PeerError::Unreachable { node: peer.node.clone(), why };
        let key = (peer.node.clone(), peer.endpoint.clone());
        let mut channels = self.channels.lock().unwrap_or_else(|lock| lock.into_inner());
        if let Some(channel) = channels.get(&key) {
            return Ok(channel.clone());
        }
        let tls = self.tls.clone().ok_or_else(|| unreachable("no [tls] is configured".into()))?;
        // The certificate must be the node's own, whatever the URL says.
        let channel = Endpoint::from_shared(peer.endpoint.clone())
            .and_then(|endpoint| endpoint.tls_config(tls.domain_name(&peer.node)))
            .map_err(|error| unreachable(error.to_string()))?
            .connect_timeout(CONNECT)
            .timeout(ANSWER)
            .connect_lazy();
        channels.insert(key, channel.clone());
        Ok(channel)
    }

    /// A connection that failed once is made anew.
    fn outcome<T>(
        &self,
        peer: &Peer,
        answer: Result<tonic::Response<T>, Status>,
    ) -> Result<T, PeerError> {
        let status = match answer {
            Ok(response) => return Ok(response.into_inner()),
            Err(status) => status,
        };
        let node = peer.node.clone();
        let message = status.message().to_owned();
        if let Some(info) = status.get_error_details().error_info()
            && !matches!(status.code(), Code::Unavailable | Code::Internal | Code::Unknown)
        {
            return Err(PeerError::Refused { node, reason: info.reason.clone(), message });
        }
        let key = (peer.node.clone(), peer.endpoint.clone());
        self.channels.lock().unwrap_or_else(|lock| lock.into_inner()).remove(&key);
        Err(PeerError::Unreachable { node, why: message })
    }
}

#[async_trait]
impl Peers for TlsPeers {
    async fn prepare(&self, peer: &Peer) {
        if let Ok(channel) = self.channel(peer) {
            // Any call opens the connection; this one asks for nothing.
            let mut nodes = v1::nodes_client::NodesClient::new(channel);
            let _ = nodes.get_node(v1::GetNodeRequest {}).await;
        }
    }

    async fn fence(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
        force: bool,
    ) -> Result<u64, PeerError> {
        let request = v1::FenceRequest {
            volume_id: volume.to_string(),
            grant_id: claim.grant.to_string(),
            incarnation: claim.incarnation.to_string(),
            generation: claim.generation.0,
            force,
            session: claim.session,
        };
        let answer = self.moves(peer)?.fence(request).await;
        Ok(self.outcome(peer, answer)?.size_bytes)
    }

    async fn hasten(&self, peer: &Peer, volume: VolumeId, grant: Uuid) -> Result<(), PeerError> {
        let request =
            v1::HastenRequest { volume_id: volume.to_string(), grant_id: grant.to_string() };
        let answer = self.moves(peer)?.hasten(request).await;
        self.outcome(peer, answer).map(|_| ())
    }

    async fn allocation(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
        region: Sectors,
    ) -> Result<AllocationMap, PeerError> {
        let request = v1::GetAllocationRequest {
            volume_id: volume.to_string(),
            grant_id: claim.grant.to_string(),
            incarnation: claim.incarnation.to_string(),
            generation: claim.generation.0,
            region_bytes: region.bytes(),
        };
        let answer = self.moves(peer)?.get_allocation(request).await;
        let answer = self.outcome(peer, answer)?;
        map_of(&answer).ok_or_else(|| PeerError::Refused {
            node: peer.node.clone(),
            reason: "ALLOCATION_UNKNOWN".to_owned(),
            message: "its map is malformed".to_owned(),
        })
    }

    async fn copy(
        &self,
        peer: &Peer,
        request: &CopyRequest,
    ) -> Result<(ExportName, u64), PeerError> {
        let claim = &request.claim;
        let mut asked = tonic::Request::new(v1::GrantCopyRequest {
            id: request.id.to_string(),
            incarnation: request.incarnation.to_string(),
            grant_id: request.grant.to_string(),
            volume_id: request.volume.to_string(),
            volume_grant_id: claim.grant.to_string(),
            volume_incarnation: claim.incarnation.to_string(),
            volume_generation: claim.generation.0,
        });
        asked.set_timeout(COPY);
        let answer = self.moves(peer)?.grant_copy(asked).await;
        let answer = self.outcome(peer, answer)?;
        export_of(&answer).map(|export| (export, answer.size_bytes)).ok_or_else(|| {
            let why = "its answer is malformed".to_owned();
            PeerError::Unreachable { node: peer.node.clone(), why }
        })
    }

    async fn serve(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
        force: bool,
    ) -> Result<u64, PeerError> {
        let request = v1::ServeRequest {
            volume_id: volume.to_string(),
            grant_id: claim.grant.to_string(),
            incarnation: claim.incarnation.to_string(),
            generation: claim.generation.0,
            session: claim.session,
            force,
        };
        let answer = self.moves(peer)?.serve(request).await;
        Ok(self.outcome(peer, answer)?.size_bytes)
    }

    async fn give_back(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
    ) -> Result<(), PeerError> {
        let request = v1::ReclaimRequest {
            volume_id: volume.to_string(),
            grant_id: claim.grant.to_string(),
            incarnation: claim.incarnation.to_string(),
            generation: claim.generation.0,
        };
        let answer = self.moves(peer)?.reclaim(request).await;
        self.outcome(peer, answer).map(|_| ())
    }

    async fn release(&self, peer: &Peer, volume: VolumeId, claim: &Claim) -> Result<(), PeerError> {
        let request = v1::ReleaseRequest {
            volume_id: volume.to_string(),
            grant_id: claim.grant.to_string(),
            incarnation: claim.incarnation.to_string(),
            generation: claim.generation.0,
        };
        let answer = self.moves(peer)?.release(request).await;
        self.outcome(peer, answer).map(|_| ())
    }

    async fn revoke(&self, peer: &Peer, volume: VolumeId, claim: &Claim) -> Result<(), PeerError> {
        let request =
            v1::RevokeRequest { volume_id: volume.to_string(), grant_id: claim.grant.to_string() };
        let answer = self.moves(peer)?.revoke(request).await;
        self.outcome(peer, answer).map(|_| ())
    }

    async fn query(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
    ) -> Result<GrantFate, PeerError> {
        let request = v1::QueryGrantRequest {
            volume_id: volume.to_string(),
            grant_id: claim.grant.to_string(),
        };
        let answer = self.moves(peer)?.query_grant(request).await;
        let v1::QueryGrantResponse { taken, released, given_up } = self.outcome(peer, answer)?;
        Ok(GrantFate { taken, released, given_up })
    }
}

/// How a source exports what it has granted; none if it is malformed.
fn export_of(answer: &v1::Grant) -> Option<ExportName> {
    answer.address.parse::<IpAddr>().ok()?;
    Some(ExportName {
        // It ends up in the kernel's option strings, and names what is disconnected.
        subsystem_nqn: Some(answer.subsystem_nqn.clone()).filter(|nqn| is_nqn(nqn))?,
        namespace_uuid: answer.namespace_uuid.parse().ok()?,
        namespace_nguid: answer.namespace_nguid.parse().ok()?,
        address: answer.address.clone(),
        port: u16::try_from(answer.port).ok().filter(|port| *port > 0)?,
    })
}

/// What a source says of its copy; none if it is malformed.
fn map_of(answer: &v1::Allocation) -> Option<AllocationMap> {
    let (length, region) =
        (Sectors::from_bytes(answer.size_bytes), Sectors::from_bytes(answer.region_bytes));
    Some(AllocationMap {
        grant: answer.grant_id.parse().ok()?,
        incarnation: answer.incarnation.parse().ok()?,
        generation: Generation(answer.generation),
        length,
        region,
        unwritten: Unwritten::of_words(&answer.unwritten, length, region)?,
    })
}
