//! dmlocald: owns a node's device-mapper stacks, exports and journal.

mod activity;
mod config;
mod describe;
mod hydrations;
mod kernel;
mod peers;
mod progress;
mod pushes;
mod reconcile;
mod rpc;
mod service;
mod source_map;
mod store;
#[cfg(test)]
mod story;
mod when;

use std::{cell::Cell, path::PathBuf, sync::Arc};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, span::EnteredSpan, warn};
use tracing_subscriber::EnvFilter;

use crate::{
    config::Config, kernel::real::RealKernel, peers::TlsPeers, reconcile::Volumes,
    service::Service, store::Store,
};

thread_local! {
    /// What every line of this thread's belongs to.
    static SPAN: Cell<Option<EnteredSpan>> = const { Cell::new(None) };
}

/// How often it is seen whether there is room for copies of remote volumes now.
const LOCALIZE: std::time::Duration = std::time::Duration::from_secs(10);

/// Longest wait, when the agent is stopped, for consumers that wait for it.
const GO_ON: std::time::Duration = std::time::Duration::from_secs(10);

/// Makes node-local disks movable volumes.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The configuration file.
    #[arg(long, global = true, default_value = config::DEFAULT_PATH)]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check the configuration file and exit.
    CheckConfig,
    /// Let everything fail that waits for a source, and drop the connections: for
    /// a machine that goes down, once nobody uses its volumes any more.
    CutSources,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(Command::CutSources) = args.command {
        return Ok(kernel::real::cut_sources()?);
    }
    let config = Config::load(&args.config)
        .with_context(|| format!("configuration {}", args.config.display()))?;
    if let Some(Command::CheckConfig) = args.command {
        println!("{}: ok", args.config.display());
        return Ok(());
    }
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_env("DMLOCALD_LOG").unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .init();
    let span = tracing::info_span!("agent", node = %config.node);
    let of_every_thread = span.clone();
    // Two workers: the work is waiting, and memory counts on a hypervisor.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_keep_alive(std::time::Duration::from_secs(2))
        // For as long as the thread lives: whatever it logs is this node's.
        .on_thread_start(move || SPAN.set(Some(of_every_thread.clone().entered())))
        .on_thread_stop(|| drop(SPAN.take()))
        .enable_all()
        .build()?;
    let _entered = span.entered();
    let outcome = runtime.block_on(run(config));
    // A call that hangs in the kernel keeps nobody from leaving.
    runtime.shutdown_background();
    outcome
}

async fn run(config: Config) -> anyhow::Result<()> {
    let store = Store::open(&config.state, &config.node)?;
    let kernel = Arc::new(RealKernel::new(&config, store.host())?);
    let peers = Arc::new(TlsPeers::new(config.tls.as_ref()).context("[tls]")?);
    let volumes = Volumes::open(config.clone(), store, Arc::<RealKernel>::clone(&kernel), peers)?;
    let service = Arc::new(Service::new(Arc::clone(&volumes)).await?);
    volumes.recover().await?;
    for warning in service.warnings().await {
        warn!("{warning}");
    }

    let localizing = Arc::clone(&service);
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(LOCALIZE).await;
            localizing.localize_what_fits().await;
        }
    });

    let (stop, stopping) = tokio::sync::watch::channel(false);
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let leaving = Arc::clone(&kernel);
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} }
        info!("stopping; devices and exports stay as they are");
        stop.send_replace(true);
        // Open streams would keep the servers waiting; nothing is lost by
        // ending them, because the journal is ahead of every act.
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        let_go(&leaving).await;
        std::process::exit(0);
    });
    let ready = || {
        info!("ready");
        if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
            warn!(%error, "systemd was not told");
        }
    };
    let outcome = rpc::serve(service, &config, ready, stopping).await;
    let_go(&kernel).await;
    outcome
}

/// Nobody waits for a process that has left.
async fn let_go(kernel: &Arc<RealKernel>) {
    let kernel = Arc::clone(kernel);
    let gone_on = tokio::task::spawn_blocking(move || kernel.let_go(GO_ON)).await;
    if !matches!(gone_on, Ok(true)) {
        warn!("somebody's writes wait until the agent runs again");
    }
}
