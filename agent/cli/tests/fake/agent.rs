//! An agent without volumes, kernel or disk: it answers what a test tells it to
//! and notes every call. Each one runs on a thread of its own and can break off
//! all its connections in the middle of a call.

use std::{
    collections::{HashMap, VecDeque},
    future::pending,
    path::{Path, PathBuf},
    pin::Pin,
    process::{Command, Output},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

use dmlocal_proto::v1::{
    moves_server::{Moves, MovesServer},
    nodes_server::{Nodes, NodesServer},
    snapshots_server::{Snapshots, SnapshotsServer},
    volumes_server::{Volumes, VolumesServer},
    *,
};
use serde_json::Value;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::Notify,
};
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{TcpListenerStream, UnixListenerStream},
};
use tonic::{
    Code, Request, Response, Status,
    transport::{Certificate, Identity, Server, ServerTlsConfig},
};
use tonic_types::{ErrorDetails, StatusExt as _};

/// The volume that every fake agent knows.
pub(crate) const ID: &str = "6e1f2a52-6c57-4a7b-9d3a-0f4dd1f0c001";
/// A volume that no fake agent knows.
pub(crate) const OTHER: &str = "0b8f5a9e-53cc-4b8b-8f0e-9b1f3c2d4e5f";
/// The device of [`ID`].
pub(crate) const DEVICE: &str = "/dev/mapper/dmlocal-6e1f2a52-6c57-4a7b-9d3a-0f4dd1f0c001";

/// Time between two changes that Watch reports: longer than a terminal needs to
/// be redrawn.
const CHANGE_INTERVAL: Duration = Duration::from_millis(600);

/// How an agent treats one kind of call.
#[derive(Clone, Debug, Default)]
pub(crate) enum Treat {
    /// Answers.
    #[default]
    Accept,
    /// Refuses with a reason.
    Refuse(&'static str),
    /// Refuses like something that is no dmlocald.
    RefuseBare(Code),
    /// Breaks off the connection.
    BreakOff,
    /// Never answers.
    Hang,
}

/// What a test tells an agent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Manners {
    pub(crate) grant: Treat,
    pub(crate) receive: Treat,
    pub(crate) revoke: Treat,
    /// The volume as successive calls of Get see it; the last one stays.
    pub(crate) states: Vec<Volume>,
    /// What Watch reports before it falls silent.
    pub(crate) changes: Vec<WatchResponse>,
}

/// The calls of all agents of a test, in order.
pub(crate) type Log = Arc<Mutex<Vec<String>>>;

#[derive(Clone)]
struct Agent {
    name: String,
    manners: Manners,
    states: Arc<Mutex<VecDeque<Volume>>>,
    log: Log,
    stop: Arc<Notify>,
}

/// A running fake agent.
pub(crate) struct Fake {
    pub(crate) endpoint: String,
}

/// Starts an agent on a unix socket in `dir`.
pub(crate) fn unix(dir: &Path, name: &str, log: &Log, manners: Manners) -> Fake {
    let path = dir.join(format!("{name}.sock"));
    let endpoint = format!("unix://{}", path.display());
    start(name, log, manners, move || Listener::Unix(UnixListener::bind(path).unwrap()));
    Fake { endpoint }
}

/// Starts an agent on a TCP port of the loopback interface, with mutual TLS from
/// `ROLE.pem` and `ROLE.key` in `pki`.
pub(crate) fn tls(pki: &Path, role: &str, log: &Log) -> Fake {
    let read = |name: String| std::fs::read(pki.join(name)).unwrap();
    let config = ServerTlsConfig::new()
        .identity(Identity::from_pem(read(format!("{role}.pem")), read(format!("{role}.key"))))
        .client_ca_root(Certificate::from_pem(read("ca.pem".into())));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    start("node-a", log, Manners::default(), move || {
        Listener::Tls(TcpListener::from_std(listener).unwrap(), config)
    });
    Fake { endpoint: format!("https://127.0.0.1:{port}") }
}

enum Listener {
    Unix(UnixListener),
    Tls(TcpListener, ServerTlsConfig),
}

fn start(
    name: &str,
    log: &Log,
    manners: Manners,
    bind: impl FnOnce() -> Listener + Send + 'static,
) {
    let agent = Agent {
        name: name.into(),
        states: Arc::new(Mutex::new(manners.states.iter().cloned().collect())),
        manners,
        log: Arc::clone(log),
        stop: Arc::default(),
    };
    let (bound, ready) = mpsc::channel();
    thread::spawn(move || {
        // Dropping the runtime drops every connection: that is how one breaks.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = bind();
            bound.send(()).unwrap();
            let stop = Arc::clone(&agent.stop);
            let mut server = Server::builder();
            if let Listener::Tls(_, config) = &listener {
                server = server.tls_config(config.clone()).unwrap();
            }
            let router = server
                .add_service(NodesServer::new(agent.clone()))
                .add_service(VolumesServer::new(agent.clone()))
                .add_service(SnapshotsServer::new(agent.clone()))
                .add_service(MovesServer::new(agent));
            let serving = async {
                match listener {
                    Listener::Unix(unix) => {
                        router.serve_with_incoming(UnixListenerStream::new(unix)).await
                    }
                    Listener::Tls(tcp, _) => {
                        router.serve_with_incoming(TcpListenerStream::new(tcp)).await
                    }
                }
            };
            tokio::select! {
                served = serving => served.unwrap(),
                () = stop.notified() => {}
            }
        });
    });
    ready.recv().unwrap();
}

/// An error as dmlocald makes it.
pub(crate) fn refusal(code: Code, reason: &str, text: &str) -> Status {
    let metadata = HashMap::from([("volume".to_owned(), ID.to_owned())]);
    let details = ErrorDetails::with_error_info(reason, dmlocal_proto::ERROR_DOMAIN, metadata);
    Status::with_error_details(code, text, details)
}

/// The volume [`ID`] in some state.
pub(crate) fn volume(state: VolumeState) -> Volume {
    Volume {
        id: ID.into(),
        size_bytes: 64 << 20,
        state: state.into(),
        attached: true,
        device_path: Some(DEVICE.into()),
        generation: 1,
        pool: "fast".into(),
        logical_block_size: 512,
        ..Volume::default()
    }
}

impl Agent {
    fn note(&self, call: impl AsRef<str>) {
        self.log.lock().unwrap().push(format!("{} {}", self.name, call.as_ref()));
    }

    async fn treat<T>(&self, treat: &Treat, answer: T) -> Result<Response<T>, Status> {
        match treat {
            Treat::Accept => Ok(Response::new(answer)),
            Treat::Refuse(reason) => {
                Err(refusal(Code::FailedPrecondition, reason, "the agent refuses"))
            }
            Treat::RefuseBare(code) => Err(Status::new(*code, "no such thing")),
            Treat::BreakOff => {
                self.stop.notify_one();
                pending().await
            }
            Treat::Hang => pending().await,
        }
    }

    fn known(&self, id: &str) -> Result<Volume, Status> {
        if id != ID {
            return Err(refusal(Code::NotFound, "VOLUME_NOT_FOUND", "volume not found"));
        }
        let mut states = self.states.lock().unwrap();
        let next = if states.len() > 1 { states.pop_front() } else { states.front().cloned() };
        Ok(next.unwrap_or_else(|| volume(VolumeState::Local)))
    }
}

#[tonic::async_trait]
impl Nodes for Agent {
    async fn get_node(&self, _: Request<GetNodeRequest>) -> Result<Response<Node>, Status> {
        self.note("GetNode");
        Ok(Response::new(Node {
            name: self.name.clone(),
            version: "0.1.0".into(),
            kernel: "6.12.0".into(),
            targets: vec!["clone 1.0.1".into()],
            warnings: vec!["a warning".into()],
            endpoint: format!("https://{}:7000", self.name),
            host_nqn: format!("nqn.host.{}", self.name),
            ..Node::default()
        }))
    }

    async fn list_pools(
        &self,
        _: Request<ListPoolsRequest>,
    ) -> Result<Response<ListPoolsResponse>, Status> {
        let pool = Pool { name: "fast".into(), present: true, ..Pool::default() };
        Ok(Response::new(ListPoolsResponse { pools: vec![pool] }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.note(format!("Watch {}", request.into_inner().id));
        let changes = tokio_stream::iter(self.manners.changes.clone()).then(|change| async {
            tokio::time::sleep(CHANGE_INTERVAL).await;
            Ok(change)
        });
        Ok(Response::new(Box::pin(changes.chain(tokio_stream::pending()))))
    }
}

#[tonic::async_trait]
impl Volumes for Agent {
    async fn create(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let ask = request.into_inner();
        let source = ask.source.as_ref().map_or_else(String::new, of);
        self.note(format!("Create {} {} {}{source}", ask.id, ask.size_bytes, ask.pool));
        Ok(Response::new(Volume { id: ask.id, size_bytes: ask.size_bytes, ..Volume::default() }))
    }

    async fn delete(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        self.note(format!("Delete {}", request.into_inner().id));
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn get(&self, request: Request<GetVolumeRequest>) -> Result<Response<Volume>, Status> {
        self.known(&request.into_inner().id).map(Response::new)
    }

    async fn list(
        &self,
        _: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let volumes = vec![volume(VolumeState::Local), volume(VolumeState::Hydrating)];
        Ok(Response::new(ListVolumesResponse { volumes }))
    }

    async fn extend(
        &self,
        request: Request<ExtendVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let ask = request.into_inner();
        self.note(format!("Extend {} {}", ask.id, ask.size_bytes));
        self.known(&ask.id).map(Response::new)
    }

    async fn attach(
        &self,
        request: Request<AttachVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let ask = request.into_inner();
        self.note(format!("Attach {} {:?}", ask.id, ask.generation));
        self.known(&ask.id).map(Response::new)
    }

    async fn detach(
        &self,
        request: Request<DetachVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        self.note(format!("Detach {}", request.get_ref().id));
        self.known(&request.into_inner().id).map(Response::new)
    }

    async fn revert(
        &self,
        request: Request<RevertVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let ask = request.into_inner();
        self.note(format!("Revert {} {} {:?}", ask.id, ask.snapshot_id, ask.generation));
        self.known(&ask.id).map(Response::new)
    }
}

/// What a volume is to be made of.
fn of(source: &Origin) -> String {
    match (&source.snapshot_id, &source.volume_id) {
        (Some(id), None) => format!(" of snapshot {id}"),
        (None, Some(id)) => format!(" of volume {id}"),
        other => panic!("{other:?}"),
    }
}

#[tonic::async_trait]
impl Snapshots for Agent {
    async fn create(
        &self,
        request: Request<CreateSnapshotRequest>,
    ) -> Result<Response<Snapshot>, Status> {
        let ask = request.into_inner();
        self.note(format!("Snapshot {} of {}", ask.id, ask.volume_id));
        let (id, volume_id) = (ask.id, ask.volume_id);
        Ok(Response::new(Snapshot { id, volume_id, ..Snapshot::default() }))
    }

    async fn delete(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        let ask = request.into_inner();
        self.note(format!("DeleteSnapshot {} {} {:?}", ask.id, ask.defer, ask.incarnation));
        Ok(Response::new(DeleteSnapshotResponse {}))
    }

    async fn get(&self, _: Request<GetSnapshotRequest>) -> Result<Response<Snapshot>, Status> {
        Err(refusal(Code::NotFound, "SNAPSHOT_NOT_FOUND", "snapshot not found"))
    }

    async fn list(
        &self,
        _: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        let snapshot = Snapshot {
            id: OTHER.into(),
            volume_id: ID.into(),
            size_bytes: 64 << 20,
            state: SnapshotState::Available.into(),
            pool: "fast".into(),
            read_by: vec![ID.into()],
            ..Snapshot::default()
        };
        Ok(Response::new(ListSnapshotsResponse { snapshots: vec![snapshot] }))
    }
}

#[tonic::async_trait]
impl Moves for Agent {
    async fn grant(&self, request: Request<GrantRequest>) -> Result<Response<Grant>, Status> {
        let ask = request.into_inner();
        let source = ask.source.as_ref().map_or_else(String::new, of);
        self.note(format!(
            "Grant {} {} {} {} {}{source}",
            ask.id, ask.node, ask.host_nqn, ask.endpoint, ask.hold
        ));
        let grant = Grant {
            id: ask.grant_id,
            volume_id: ask.id,
            source_node: self.name.clone(),
            node: ask.node,
            hold: ask.hold,
            begins: ask.source.is_some(),
            source: ask.source,
            ..Grant::default()
        };
        self.treat(&self.manners.grant, grant).await
    }

    async fn receive(&self, request: Request<ReceiveRequest>) -> Result<Response<Volume>, Status> {
        let ask = request.into_inner();
        let grant = ask.grant.unwrap_or_default();
        let mode = match ReceiveMode::try_from(ask.mode).unwrap() {
            ReceiveMode::Unspecified => String::new(),
            mode => format!(" {}", mode.as_str_name()),
        };
        self.note(format!("Receive {} from {}{mode}", grant.volume_id, grant.source_node));
        let state = if grant.hold { VolumeState::Held } else { VolumeState::Hydrating };
        self.treat(&self.manners.receive, volume(state)).await
    }

    async fn switch(&self, request: Request<SwitchRequest>) -> Result<Response<Volume>, Status> {
        let force = if request.get_ref().force { " by force" } else { "" };
        self.note(format!("Switch {}{force}", request.get_ref().id));
        self.known(&request.into_inner().id).map(Response::new)
    }

    async fn localize(
        &self,
        request: Request<LocalizeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let ask = request.into_inner();
        self.note(format!("Localize {} {:?}", ask.id, ask.pool));
        self.known(&ask.id).map(Response::new)
    }

    async fn serve(&self, _: Request<ServeRequest>) -> Result<Response<ServeResponse>, Status> {
        Err(Status::unimplemented("not dmlocalctl's business"))
    }

    async fn reclaim(
        &self,
        request: Request<ReclaimRequest>,
    ) -> Result<Response<ReclaimResponse>, Status> {
        let ask = request.into_inner();
        self.note(format!("Reclaim {} {} {}", ask.volume_id, ask.grant_id, ask.generation));
        Ok(Response::new(ReclaimResponse {}))
    }

    async fn abort(
        &self,
        request: Request<AbortRequest>,
    ) -> Result<Response<AbortResponse>, Status> {
        self.note(format!("Abort {}", request.into_inner().id));
        Ok(Response::new(AbortResponse {}))
    }

    async fn pause_hydration(
        &self,
        request: Request<PauseHydrationRequest>,
    ) -> Result<Response<Volume>, Status> {
        self.note(format!("Pause {}", request.get_ref().id));
        self.known(&request.into_inner().id).map(Response::new)
    }

    async fn resume_hydration(
        &self,
        request: Request<ResumeHydrationRequest>,
    ) -> Result<Response<Volume>, Status> {
        self.note(format!("Resume {}", request.get_ref().id));
        self.known(&request.into_inner().id).map(Response::new)
    }

    async fn tune_hydration(
        &self,
        request: Request<TuneHydrationRequest>,
    ) -> Result<Response<Volume>, Status> {
        let ask = request.into_inner();
        self.note(format!(
            "Tune {} {:?} {:?} {:?} {:?}",
            ask.id, ask.rate_bytes_per_s, ask.threshold, ask.batch, ask.priority
        ));
        self.known(&ask.id).map(Response::new)
    }

    async fn forget_source(
        &self,
        request: Request<ForgetSourceRequest>,
    ) -> Result<Response<ForgetSourceResponse>, Status> {
        let ask = request.into_inner();
        self.note(format!("ForgetSource {} {}", ask.id, ask.accept_data_loss));
        let volume = self.known(&ask.id)?;
        Ok(Response::new(ForgetSourceResponse {
            volume: Some(volume),
            bytes_lost: 3 << 20,
            regions_lost: 48,
        }))
    }

    async fn guest_left(
        &self,
        request: Request<GuestLeftRequest>,
    ) -> Result<Response<GuestLeftResponse>, Status> {
        let id = request.into_inner().id;
        self.note(format!("GuestLeft {id}"));
        self.known(&id).map(|_| Response::new(GuestLeftResponse {}))
    }

    async fn hasten(&self, _: Request<HastenRequest>) -> Result<Response<HastenResponse>, Status> {
        Err(Status::unimplemented("not dmlocalctl's business"))
    }

    async fn fence(&self, _: Request<FenceRequest>) -> Result<Response<FenceResponse>, Status> {
        Err(Status::unimplemented("not dmlocalctl's business"))
    }

    async fn release(
        &self,
        _: Request<ReleaseRequest>,
    ) -> Result<Response<ReleaseResponse>, Status> {
        Err(Status::unimplemented("not dmlocalctl's business"))
    }

    async fn revoke(
        &self,
        request: Request<RevokeRequest>,
    ) -> Result<Response<RevokeResponse>, Status> {
        self.note(format!("Revoke {}", request.into_inner().volume_id));
        self.treat(&self.manners.revoke, RevokeResponse {}).await
    }

    async fn get_allocation(
        &self,
        _: Request<GetAllocationRequest>,
    ) -> Result<Response<Allocation>, Status> {
        Err(Status::unimplemented("not dmlocalctl's business"))
    }

    async fn grant_copy(&self, _: Request<GrantCopyRequest>) -> Result<Response<Grant>, Status> {
        Err(Status::unimplemented("not dmlocalctl's business"))
    }

    async fn query_grant(
        &self,
        _: Request<QueryGrantRequest>,
    ) -> Result<Response<QueryGrantResponse>, Status> {
        Err(Status::unimplemented("not dmlocalctl's business"))
    }
}

/// dmlocalctl, unaware of the caller's environment.
pub(crate) fn dmlocalctl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dmlocalctl"));
    for name in ["DMLOCAL_ENDPOINT", "DMLOCAL_CA", "DMLOCAL_CERT", "DMLOCAL_KEY"] {
        command.env_remove(name);
    }
    command
}

/// What one run of dmlocalctl did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Ran {
        Ran {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    /// Standard output as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        serde_json::from_str(&self.out).unwrap()
    }

    /// The error object of JSON mode; nothing else may have been printed.
    #[track_caller]
    pub(crate) fn failure(&self) -> Value {
        assert_eq!((self.code, self.out.as_str()), (Some(1), ""), "{self:?}");
        assert_eq!(self.err.lines().count(), 1, "{self:?}");
        serde_json::from_str(&self.err).unwrap()
    }
}

/// Runs dmlocalctl against an endpoint.
pub(crate) fn run(endpoint: &str, args: &[&str]) -> Ran {
    dmlocalctl().arg("--endpoint").arg(endpoint).args(args).output().unwrap().into()
}

/// Runs `dmlocalctl pki` and returns the directory it wrote to.
pub(crate) fn pki(dir: &Path, name: &str, args: &[&str]) -> PathBuf {
    let out = dir.join(name);
    let ran: Ran =
        dmlocalctl().arg("pki").args(args).arg("--out").arg(&out).output().unwrap().into();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    out
}
