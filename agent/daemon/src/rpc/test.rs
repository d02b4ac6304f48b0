//! The interface from outside, over TCP with mutual TLS: who may call what, and
//! what an agent gets that holds no grant. The kernel behind it is simulated.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use dmlocal_model::{
    admit::Claim,
    forget::GrantFate,
    name::{Generation, VolumeId},
    sim::{REGION, REGIONS, VOLUME_BYTES, World},
    units::Sectors,
    volume::Borrower,
};
use prost::Message as _;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use tokio::sync::{Notify, watch};
use tonic::{
    Code, Request, Status,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, ClientTlsConfig, Endpoint},
};
use tonic_prost::ProstCodec;
use tonic_types::StatusExt as _;
use uuid::Uuid;

use super::*;
use crate::{
    config::Tls,
    kernel::fake::{FakeKernel, every_target, roomy_pool},
    peers::{Peer, PeerError, Peers as _, TlsPeers},
    reconcile::Volumes,
    store::Store,
};

/// Longest wait for an answer that must come.
const PATIENCE: Duration = Duration::from_secs(20);

const DRIVER: &str = "urn:dmlocal:role:driver";
const AGENT: &str = "urn:dmlocal:role:agent";
const OPERATOR: &str = "urn:dmlocal:role:operator";

/// Who may call what; every method of the interface has its line.
const MATRIX: &[(&str, &[&str])] = &[
    ("Nodes/GetNode", &[DRIVER, AGENT, OPERATOR]),
    ("Nodes/ListPools", &[DRIVER, OPERATOR]),
    ("Nodes/Watch", &[DRIVER, OPERATOR]),
    ("Volumes/Create", &[DRIVER, OPERATOR]),
    ("Volumes/Delete", &[DRIVER, OPERATOR]),
    ("Volumes/Get", &[DRIVER, OPERATOR]),
    ("Volumes/List", &[DRIVER, OPERATOR]),
    ("Volumes/Extend", &[DRIVER, OPERATOR]),
    ("Volumes/Attach", &[DRIVER, OPERATOR]),
    ("Volumes/Detach", &[DRIVER, OPERATOR]),
    ("Volumes/Revert", &[DRIVER, OPERATOR]),
    ("Snapshots/Create", &[DRIVER, OPERATOR]),
    ("Snapshots/Delete", &[DRIVER, OPERATOR]),
    ("Snapshots/Get", &[DRIVER, OPERATOR]),
    ("Snapshots/List", &[DRIVER, OPERATOR]),
    ("Moves/Grant", &[DRIVER, OPERATOR]),
    ("Moves/Receive", &[DRIVER, OPERATOR]),
    ("Moves/Switch", &[DRIVER, OPERATOR]),
    ("Moves/Localize", &[DRIVER, OPERATOR]),
    ("Moves/Abort", &[DRIVER, OPERATOR]),
    ("Moves/PauseHydration", &[DRIVER, OPERATOR]),
    ("Moves/ResumeHydration", &[DRIVER, OPERATOR]),
    ("Moves/TuneHydration", &[DRIVER, OPERATOR]),
    ("Moves/ForgetSource", &[OPERATOR]),
    ("Moves/GuestLeft", &[DRIVER, OPERATOR]),
    ("Moves/Hasten", &[AGENT]),
    ("Moves/Fence", &[AGENT]),
    ("Moves/GetAllocation", &[AGENT]),
    ("Moves/GrantCopy", &[AGENT]),
    ("Moves/Serve", &[AGENT]),
    ("Moves/Reclaim", &[DRIVER, AGENT, OPERATOR]),
    ("Moves/Release", &[AGENT]),
    ("Moves/Revoke", &[DRIVER, AGENT, OPERATOR]),
    ("Moves/QueryGrant", &[AGENT, OPERATOR]),
];

/// A certificate authority for one test.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate with these SAN URIs, for node-a's name, and its key.
    fn issue(&self, uris: &[&str]) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["node-a".to_owned()]).unwrap();
        let uris = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap()));
        params.subject_alt_names.extend(uris);
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// The same as files.
    fn files(&self, directory: &Path, uris: &[&str]) -> Tls {
        let name = Uuid::new_v4();
        let [ca, cert, key] = ["ca", "cert", "key"].map(|f| directory.join(format!("{name}.{f}")));
        let (certificate, secret) = self.issue(uris);
        fs::write(&ca, &self.pem).unwrap();
        fs::write(&cert, certificate).unwrap();
        fs::write(&key, secret).unwrap();
        Tls { ca, cert, key }
    }
}

/// node-a's daemon, listening.
struct Daemon {
    service: Arc<Service>,
    address: SocketAddr,
    authority: Authority,
    directory: tempfile::TempDir,
    _stop: watch::Sender<bool>,
}

impl Daemon {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let tls = authority.files(directory.path(), &[AGENT, "urn:dmlocal:node:node-a"]);
        // Free at this moment.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let mut config = Config::parse(
            r#"
            node = "node-a"
            [export]
            address = "127.0.0.1"
            [[pool]]
            name = "pool"
            volume_group = "vg"
            thin_pool = "tp"
            devices = ["/dev/x"]
            "#,
        )
        .unwrap();
        config.listen.tcp = Some(address);
        config.listen.unix = directory.path().join("run/agent.sock");
        config.listen.advertise = Some(format!("https://{address}"));
        let peers = TlsPeers::new(Some(&tls)).unwrap();
        config.tls = Some(tls);
        let kernel = FakeKernel {
            world: Arc::new(Mutex::new(World::new(1))),
            node: 0,
            died: Arc::new(Notify::new()),
            pool: Some(roomy_pool()),
            targets: every_target(),
        };
        let store = Store::open(&directory.path().join("state"), "node-a").unwrap();
        let volumes =
            Volumes::open(config.clone(), store, Arc::new(kernel), Arc::new(peers)).unwrap();
        let service = Arc::new(Service::new(volumes).await.unwrap());
        let (stop, stopping) = watch::channel(false);
        let (ready, listening) = tokio::sync::oneshot::channel();
        let served = Arc::clone(&service);
        tokio::spawn(async move {
            serve(served, &config, move || ready.send(()).unwrap(), stopping).await.unwrap();
        });
        listening.await.unwrap();
        Self { service, address, authority, directory, _stop: stop }
    }

    async fn connect(&self, authority: &Authority, uris: &[&str]) -> Channel {
        let (certificate, key) = authority.issue(uris);
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.authority.pem))
            .identity(Identity::from_pem(certificate, key))
            .domain_name("node-a");
        self.channel(tls)
    }

    fn channel(&self, tls: ClientTlsConfig) -> Channel {
        let endpoint = Endpoint::from_shared(format!("https://{}", self.address)).unwrap();
        endpoint.tls_config(tls).unwrap().timeout(PATIENCE).connect_lazy()
    }

    /// node-a as the agent of that name sees it.
    fn peers_of(&self, node: &str) -> TlsPeers {
        let uri = format!("urn:dmlocal:node:{node}");
        TlsPeers::new(Some(&self.authority.files(self.directory.path(), &[AGENT, &uri]))).unwrap()
    }

    fn peer(&self) -> Peer {
        Peer { node: "node-a".to_owned(), endpoint: format!("https://{}", self.address) }
    }
}

/// Calls a method with an empty message.
async fn call(channel: &Channel, method: &str) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = PathAndQuery::try_from(format!("/dmlocal.v1.{method}")).unwrap();
    // The answer to an ordinary call is a stream of one.
    let codec = ProstCodec::<(), ()>::default();
    let mut answers = grpc.server_streaming(Request::new(()), path, codec).await?.into_inner();
    answers.message().await.map(|_| ())
}

fn reason(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_may_do_what_its_certificate_says_and_no_more() {
    let daemon = Daemon::start().await;
    let described = prost_types::FileDescriptorSet::decode(DESCRIPTORS).unwrap();
    let services = described.file.iter().filter(|file| file.package() == "dmlocal.v1");
    let mut methods: Vec<String> = services
        .flat_map(|file| &file.service)
        .flat_map(|s| s.method.iter().map(|m| format!("{}/{}", s.name(), m.name())))
        .collect();
    let matrix: BTreeMap<&str, &[&str]> = MATRIX.iter().copied().collect();
    methods.sort();
    assert!(methods.iter().eq(matrix.keys()), "who may call {methods:?}?");

    let own = &daemon.authority;
    for role in [DRIVER, AGENT, OPERATOR, "urn:dmlocal:role:admin", "urn:other:role:operator"] {
        let channel = daemon.connect(own, &[role, "urn:dmlocal:node:node-b"]).await;
        for (method, roles) in &matrix {
            // A call that waits for changes has been let in.
            let limit = Duration::from_millis(if *method == "Nodes/Watch" { 300 } else { 20_000 });
            let outcome = tokio::time::timeout(limit, call(&channel, method)).await;
            let outcome = outcome.unwrap_or(Ok(()));
            let forbidden = outcome.is_err_and(|s| reason(&s) == "ROLE_FORBIDDEN");
            assert_eq!(forbidden, !roles.contains(&role), "{method} by {role}");
        }
    }
    let nameless = daemon.connect(own, &[AGENT]).await;
    let status = call(&nameless, "Moves/Fence").await.unwrap_err();
    assert_eq!(reason(&status), "ROLE_FORBIDDEN", "an agent of no node");
    assert!(daemon.service.volumes.views().is_empty(), "something was changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_heard_without_a_certificate_of_the_authority() {
    let daemon = Daemon::start().await;
    let method = "Nodes/GetNode";
    let known = daemon.connect(&daemon.authority, &[OPERATOR]).await;
    call(&known, method).await.unwrap();
    // The connection ends before anything of dmlocal answers.
    let unheard = |outcome: Result<(), Status>| {
        let status = outcome.unwrap_err();
        assert!(reason(&status).is_empty() && status.code() != Code::PermissionDenied, "{status}");
    };
    let strange = daemon.connect(&Authority::new(), &[OPERATOR]).await;
    unheard(call(&strange, method).await);
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(&daemon.authority.pem))
        .domain_name("node-a");
    let nobody = daemon.channel(tls);
    unheard(call(&nobody, method).await);
    let plain = Endpoint::from_shared(format!("http://{}", daemon.address)).unwrap();
    let plain = plain.timeout(PATIENCE).connect_lazy();
    unheard(call(&plain, method).await);
}

/// What anybody with a certificate may ask without knowing dmlocal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_reflection_answer() {
    let daemon = Daemon::start().await;
    let channel = daemon.connect(&daemon.authority, &[AGENT]).await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    for service in ["", "dmlocal.v1.Nodes", "dmlocal.v1.Volumes", "dmlocal.v1.Moves"] {
        let ask = tonic_health::pb::HealthCheckRequest { service: service.to_owned() };
        let answer = health.check(ask).await.unwrap().into_inner();
        assert_eq!(answer.status(), tonic_health::ServingStatus::Serving.into(), "{service}");
    }
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(channel);
    let answers = reflection.server_reflection_info(tokio_stream::iter([ask])).await;
    let answer = answers.unwrap().into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(listed)) = answer.message_response else {
        panic!("{answer:?}")
    };
    assert!(listed.service.iter().any(|service| service.name == "dmlocal.v1.Moves"), "{listed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_without_the_grant_changes_nothing() {
    let daemon = Daemon::start().await;
    let id = VolumeId::new(Uuid::new_v4());
    daemon.service.create(id, VOLUME_BYTES, "").await.unwrap();
    let grant = Uuid::new_v4();
    let to =
        Borrower { grant, node: "node-b".to_owned(), endpoint: "https://node-b:7450".to_owned() };
    let granted = daemon.service.grant(id, to, "nqn.host".to_owned(), true).await.unwrap();
    let right = Claim {
        grant,
        incarnation: granted.record.incarnation,
        generation: granted.record.generation,
        session: 0,
    };
    let node_a = daemon.peer();
    let refused = |outcome: Result<(), PeerError>| match outcome {
        Err(PeerError::Refused { reason, .. }) => reason,
        outcome => panic!("{outcome:?}"),
    };
    let stranger = daemon.peers_of("node-c");
    let owner = daemon.peers_of("node-b");
    let invented = Claim { grant: Uuid::new_v4(), ..right.clone() };
    for (peers, claim) in [(&stranger, &right), (&stranger, &invented), (&owner, &invented)] {
        let fenced = peers.fence(&node_a, id, claim, false).await.map(drop);
        assert_eq!(refused(fenced), "GRANT_UNKNOWN");
        assert_eq!(refused(peers.release(&node_a, id, claim).await), "GRANT_UNKNOWN");
        let told = peers.allocation(&node_a, id, claim, REGION).await.map(drop);
        assert_eq!(refused(told), "GRANT_UNKNOWN");
        assert_eq!(refused(peers.revoke(&node_a, id, claim).await), "GRANT_UNKNOWN");
    }
    let stale = Claim { generation: Generation(2), ..right.clone() };
    assert_eq!(
        refused(owner.fence(&node_a, id, &stale, false).await.map(drop)),
        "GENERATION_STALE"
    );
    let other = Claim { incarnation: Uuid::new_v4(), ..right.clone() };
    assert_eq!(refused(owner.fence(&node_a, id, &other, false).await.map(drop)), "GRANT_UNKNOWN");
    assert_eq!(refused(owner.release(&node_a, id, &right).await), "GRANT_UNKNOWN", "not fenced");
    assert_eq!(daemon.service.volumes.view(id).unwrap().record, granted.record);

    let early = owner.allocation(&node_a, id, &right, REGION).await.map(drop);
    assert_eq!(refused(early), "ALLOCATION_UNKNOWN", "not final");
    assert_eq!(owner.fence(&node_a, id, &right, false).await.unwrap(), VOLUME_BYTES);
    let odd = owner.allocation(&node_a, id, &right, Sectors(24)).await.map(drop);
    assert_eq!(refused(odd), "ARGUMENT_INVALID");
    let map = owner.allocation(&node_a, id, &right, REGION).await.unwrap();
    assert_eq!((map.grant, map.generation), (right.grant, right.generation));
    assert_eq!((map.length.bytes(), map.unwritten.regions()), (VOLUME_BYTES, REGIONS as u64));
    // The borrower may still say that it will never take it; callers may not.
    let revoked = daemon.service.revoke(id, grant, None).await;
    assert!(revoked.unwrap_err().to_string().contains("fenced"), "a caller undid a fence");
    owner.release(&node_a, id, &right).await.unwrap();
    // The answer is that it may go; it goes by itself.
    let gone = async {
        while daemon.service.volumes.view(id).is_some() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_is_believed_only_under_its_own_name() {
    let daemon = Daemon::start().await;
    // node-a's certificate answers where node-z is expected.
    let impostor = Peer { node: "node-z".to_owned(), ..daemon.peer() };
    let claim = Claim {
        grant: Uuid::new_v4(),
        incarnation: Uuid::new_v4(),
        generation: Generation::FIRST,
        session: 0,
    };
    let id = VolumeId::new(Uuid::new_v4());
    let answer = daemon.peers_of("node-b").query(&impostor, id, &claim).await;
    assert!(matches!(answer, Err(PeerError::Unreachable { .. })), "{answer:?}");
    let answer = daemon.peers_of("node-b").query(&daemon.peer(), id, &claim).await;
    assert_eq!(answer, Ok(GrantFate::default()));
}
