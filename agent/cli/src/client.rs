//! Connections to agents: a unix socket, or https with mutual TLS. There is no
//! plaintext TCP.
//!
//! A call that fails says one thing more than its reason: whether the agent has
//! *answered*. Without an answer nobody knows whether the call took effect, and
//! a caller must not act as if it had not.

use std::{
    error::Error as StdError,
    fmt, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use dmlocal_proto::v1::{
    GetNodeRequest, Node, moves_client::MovesClient, nodes_client::NodesClient,
    snapshots_client::SnapshotsClient, volumes_client::VolumesClient,
};
use tonic::{
    Code, Response, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Identity, Uri},
};
use tonic_types::StatusExt as _;

use crate::{
    args::Global,
    error::{Failure, chain, reason},
};

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// After how much silence a waiting call asks whether the agent is there.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// How long the agent may take to say that it is.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(30);

const DEFAULT_CA: &str = "/etc/dmlocal/pki/ca.pem";
const DEFAULT_CERTIFICATE: &str = "/etc/dmlocal/pki/operator.pem";
const DEFAULT_KEY: &str = "/etc/dmlocal/pki/operator.key";

/// Where an agent listens.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Endpoint {
    /// A socket on this machine.
    Unix(PathBuf),
    /// A URL without path, reached with mutual TLS.
    Https(String),
}

impl FromStr for Endpoint {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Endpoint, Self::Err> {
        if let Some(path) = text.strip_prefix("unix://") {
            if !path.starts_with('/') {
                return Err("the path of a unix:// endpoint is absolute: unix:///PATH");
            }
            return Ok(Endpoint::Unix(path.into()));
        }
        let malformed = "write unix:///PATH or https://HOST:PORT";
        let uri: Uri = text.parse().map_err(|_| malformed)?;
        match (uri.scheme_str(), uri.port_u16(), uri.path(), uri.query()) {
            (Some("https"), Some(_), "/", None) => {
                Ok(Endpoint::Https(text.trim_end_matches('/').to_owned()))
            }
            _ => Err(malformed),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Unix(path) => write!(f, "unix://{}", path.display()),
            Endpoint::Https(uri) => f.write_str(uri),
        }
    }
}

/// A call that failed.
#[derive(Clone, Debug)]
pub(crate) struct CallError {
    /// What to report.
    pub(crate) failure: Failure,
    /// True when the agent has refused the call; false when nobody knows what
    /// became of it.
    pub(crate) answered: bool,
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Failure {
        error.failure
    }
}

/// A connection to one agent.
#[derive(Clone, Debug)]
pub(crate) struct Agent {
    endpoint: Endpoint,
    deadline: Duration,
    channel: Channel,
    /// What the agent has said about its node when the connection was made.
    greeting: Option<Node>,
}

impl Agent {
    /// Connects to an agent with the TLS files that the flags name.
    pub(crate) async fn connect(endpoint: &Endpoint, global: &Global) -> Result<Agent, Failure> {
        let unreachable = |text: String| {
            Failure::new(reason::ENDPOINT_UNREACHABLE, format!("cannot reach {endpoint}: {text}"))
                .with("endpoint", endpoint.to_string())
        };
        let mut builder = tonic::transport::Endpoint::from_shared(endpoint.to_string())
            .map_err(|error| unreachable(chain(&error)))?;
        if let Endpoint::Https(_) = endpoint {
            builder = builder.tls_config(tls(global)?).map_err(|error| {
                Failure::new(reason::TLS_FILES, format!("the TLS files: {}", chain(&error)))
            })?;
        }
        let builder = builder
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
        // The builder's timeout ends with the TCP connection; a peer that never
        // answers the TLS greeting needs this one.
        let channel = match tokio::time::timeout(CONNECT_TIMEOUT, builder.connect()).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) if is_tls(&error) => return Err(no_trust(endpoint, &chain(&error))),
            Ok(Err(error)) => return Err(unreachable(chain(&error))),
            Err(_) => {
                let text = format!("no answer within {} s", CONNECT_TIMEOUT.as_secs());
                return Err(unreachable(text));
            }
        };
        let deadline = global.deadline();
        let mut agent = Agent { endpoint: endpoint.clone(), deadline, channel, greeting: None };
        if let Endpoint::Https(_) = endpoint {
            agent.greet().await?;
        }
        Ok(agent)
    }

    /// Makes sure that the agent accepts our certificate. In TLS 1.3 it says so,
    /// or not, after the connection has come about for us, and what it says is
    /// lost when it closes the connection with our first call unread. Hence that
    /// call is one that changes nothing.
    async fn greet(&mut self) -> Result<(), Failure> {
        match self.node().await {
            Ok(node) => self.greeting = Some(node),
            Err(error) if error.answered => {}
            Err(CallError { failure, .. }) => {
                return Err(match failure.reason.as_str() {
                    reason::CONNECTION_LOST => no_trust(&self.endpoint, &failure.message),
                    _ => failure,
                });
            }
        }
        Ok(())
    }

    /// The agent's Nodes service.
    pub(crate) fn nodes(&self) -> NodesClient<Channel> {
        NodesClient::new(self.channel.clone())
    }

    /// The agent's Volumes service.
    pub(crate) fn volumes(&self) -> VolumesClient<Channel> {
        VolumesClient::new(self.channel.clone())
    }

    /// The agent's Moves service.
    pub(crate) fn moves(&self) -> MovesClient<Channel> {
        MovesClient::new(self.channel.clone())
    }

    /// The agent's Snapshots service.
    pub(crate) fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }

    /// What the node says about itself.
    pub(crate) async fn node(&self) -> Result<Node, CallError> {
        if let Some(node) = &self.greeting {
            return Ok(node.clone());
        }
        self.ask(self.nodes().get_node(GetNodeRequest {})).await
    }

    /// How long an answer may take.
    pub(crate) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Waits for the answer to a call, within the deadline.
    pub(crate) async fn ask<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CallError> {
        match tokio::time::timeout(self.deadline, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.explain(&status)),
            Err(_) => {
                let text = format!(
                    "no answer from {} within {} s",
                    self.endpoint,
                    self.deadline.as_secs()
                );
                let failure = Failure::new(reason::DEADLINE_EXCEEDED, text)
                    .with("endpoint", self.endpoint.to_string());
                Err(CallError { failure, answered: false })
            }
        }
    }

    /// Tells an agent's refusal from a call that was lost.
    pub(crate) fn explain(&self, status: &Status) -> CallError {
        if let Some(info) = status.get_details_error_info() {
            let failure = Failure {
                reason: info.reason,
                message: status.message().to_owned(),
                metadata: info.metadata.into_iter().collect(),
            };
            return CallError { failure, answered: true };
        }
        let endpoint = self.endpoint.to_string();
        // A status that was made here, not received, has the cause as its source.
        if let Some(cause) = status.source() {
            let failure = if is_tls(cause) {
                no_trust(&self.endpoint, &chain(cause))
            } else {
                let text = format!("lost the connection to {endpoint}: {}", chain(cause));
                Failure::new(reason::CONNECTION_LOST, text).with("endpoint", endpoint)
            };
            return CallError { failure, answered: false };
        }
        let failure = Failure::new(
            reason::ANSWER_WITHOUT_REASON,
            format!("{endpoint} answered {:?}: {}", status.code(), status.message()),
        )
        .with("endpoint", endpoint)
        .with("code", format!("{:?}", status.code()));
        CallError { failure, answered: is_refusal(status.code()) }
    }
}

fn no_trust(endpoint: &Endpoint, text: &str) -> Failure {
    let text = format!("{endpoint} and this side do not accept each other's certificates: {text}");
    Failure::new(reason::TLS_REFUSED, text).with("endpoint", endpoint.to_string())
}

/// Whether a status without a reason can only come from the agent. The other
/// codes are also made by what lies between here and there.
fn is_refusal(code: Code) -> bool {
    match code {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Unauthenticated => true,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => false,
    }
}

/// Whether an error comes from the TLS library: it reports its errors as
/// invalid data.
fn is_tls(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(cause) = next {
        match cause.downcast_ref::<io::Error>() {
            Some(io) if io.kind() == io::ErrorKind::InvalidData => return true,
            _ => next = cause.source(),
        }
    }
    false
}

/// The TLS side of the flags.
fn tls(global: &Global) -> Result<ClientTlsConfig, Failure> {
    let read = |given: &Option<PathBuf>, default: &str| {
        let path = given.as_deref().unwrap_or(Path::new(default));
        fs::read(path).map_err(|error| {
            let path = path.display().to_string();
            Failure::new(reason::TLS_FILES, format!("{path}: {error}")).with("path", path)
        })
    };
    let ca = Certificate::from_pem(read(&global.ca, DEFAULT_CA)?);
    let certificate = read(&global.cert, DEFAULT_CERTIFICATE)?;
    let key = read(&global.key, DEFAULT_KEY)?;
    Ok(ClientTlsConfig::new().ca_certificate(ca).identity(Identity::from_pem(certificate, key)))
}

#[cfg(test)]
mod test {
    use super::Endpoint;

    #[test]
    fn an_endpoint_is_a_unix_socket_or_an_https_url_with_a_port() {
        for text in ["unix:///run/dmlocal/agent.sock", "https://a:1", "https://[::1]:7000"] {
            let endpoint: Result<Endpoint, _> = text.parse();
            assert_eq!(endpoint.map(|e| e.to_string()).as_deref(), Ok(text));
        }
        assert_eq!("https://a:1/".parse(), Ok(Endpoint::Https("https://a:1".into())));
    }

    #[test]
    fn plaintext_tcp_and_everything_else_is_no_endpoint() {
        let table = [
            "",
            "http://a:1",
            "https://a",
            "https://a:1/path",
            "https://a:1?q",
            "unix://relative",
            "/run/agent.sock",
            "a:1",
            "https://a:99999",
        ];
        for text in table {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }
}
