//! The gRPC face: who may call, conversion, and nothing else.

mod auth;
mod convert;
mod moves;
mod nodes;
mod snapshots;
mod status;
#[cfg(test)]
mod test;
mod volumes;

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::Path,
    pin::Pin,
    sync::Arc,
};

use dmlocal_proto::{DESCRIPTORS, v1};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::{
    Stream,
    wrappers::{TcpListenerStream, UnixListenerStream},
};
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig, server::Router};

use crate::{config::Config, reconcile::ServiceError, service::Service};

/// Messages are small; a large one is a mistake or an attack.
const MAX_MESSAGE: usize = 1 << 20;

/// A node's interface as gRPC services.
#[derive(Clone)]
struct Face {
    service: Arc<Service>,
}

/// Runs a change in a task of its own: a caller that hangs up ends only its own
/// waiting, never a change half-way.
async fn whole<T: Send + 'static>(
    change: impl Future<Output = Result<T, ServiceError>> + Send + 'static,
) -> Result<T, tonic::Status> {
    match tokio::spawn(change).await {
        Ok(outcome) => outcome.map_err(status::status),
        Err(error) => Err(status::status(error.into())),
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, tonic::Status>> + Send>>;

async fn router(service: &Arc<Service>, mut server: Server) -> anyhow::Result<Router> {
    let face = Face { service: Arc::clone(service) };
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<v1::nodes_server::NodesServer<Face>>().await;
    health.set_serving::<v1::volumes_server::VolumesServer<Face>>().await;
    health.set_serving::<v1::moves_server::MovesServer<Face>>().await;
    health.set_serving::<v1::snapshots_server::SnapshotsServer<Face>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .build_v1()?;
    Ok(server
        .add_service(health_service)
        .add_service(reflection)
        .add_service(v1::nodes_server::NodesServer::new(face.clone()))
        .add_service(
            v1::volumes_server::VolumesServer::new(face.clone())
                .max_decoding_message_size(MAX_MESSAGE),
        )
        .add_service(
            v1::snapshots_server::SnapshotsServer::new(face.clone())
                .max_decoding_message_size(MAX_MESSAGE),
        )
        .add_service(
            v1::moves_server::MovesServer::new(face).max_decoding_message_size(MAX_MESSAGE),
        ))
}

/// Listens on the unix socket, which only root may open.
fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        // One that is there already is somebody else's, and stays as it is: the
        // socket's own mode keeps others out as well.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    // A socket of an earlier process; the journal's lock shows it is gone.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves until `stop`; `ready` is called once every listener is open.
///
/// # Errors
/// A listener cannot be opened or a certificate not be read.
pub async fn serve(
    service: Arc<Service>,
    config: &Config,
    ready: impl FnOnce(),
    stop: tokio::sync::watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let stopped = |mut stop: tokio::sync::watch::Receiver<bool>| async move {
        // A sender that is gone means the same.
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let unix = UnixListenerStream::new(listen_unix(&config.listen.unix)?);
    let local = router(&service, Server::builder())
        .await?
        .serve_with_incoming_shutdown(unix, stopped(stop.clone()));
    let remote = match (&config.listen.tcp, &config.tls) {
        (Some(address), Some(files)) => {
            let tls = ServerTlsConfig::new()
                .identity(Identity::from_pem(fs::read(&files.cert)?, fs::read(&files.key)?))
                .client_ca_root(Certificate::from_pem(fs::read(&files.ca)?));
            let tcp = TcpListenerStream::new(TcpListener::bind(address).await?);
            let server = Server::builder().tls_config(tls)?;
            Some(router(&service, server).await?.serve_with_incoming_shutdown(tcp, stopped(stop)))
        }
        (None, _) | (_, None) => None,
    };
    ready();
    match remote {
        Some(remote) => {
            tokio::try_join!(local, remote)?;
        }
        None => local.await?,
    }
    Ok(())
}
