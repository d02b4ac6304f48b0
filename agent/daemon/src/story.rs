//! Two agents in one process over a simulated kernel: the demo's story with a
//! failure or the process's death at every single action, and what bad requests
//! get.

mod forks;
mod pushes;
mod remote;
mod snapshots;
mod switching;
mod telling;

use std::{
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use dmlocal_model::{
    admit::{Change, Claim, CopyRequest, Offer, Refusal, Which},
    forget::GrantFate,
    name::{Generation, VolumeId},
    plan::Seen,
    seeding::{AllocationMap, Seeding},
    sim::{Io, REGION_BYTES, REGIONS, VOLUME_BYTES, World},
    table::CloneStatus,
    units::Sectors,
    volume::{Borrower, ExportName, LentStage, Phase, ReceivingStage, Source},
};
use tokio::{sync::Notify, time::timeout};
use uuid::Uuid;

use self::telling::{Tale, Told, at_once, copy_journals};

use crate::{
    config::Config,
    kernel::fake::{FakeKernel, every_target, locked, roomy_pool},
    peers::{Peer, PeerError, Peers},
    reconcile::{ServiceError, View, Volumes},
    service::{Service, bytes_left},
    store::Store,
};

/// Longer than anything takes here; what waits longer waits for ever.
const PATIENCE: Duration = Duration::from_secs(20);

/// Calls go straight to the other agent, as long as there is a network.
struct Direct {
    world: Arc<Mutex<World>>,
    /// What a source has copied is told only once this is free.
    copied: tokio::sync::Mutex<()>,
    services: OnceLock<Vec<Arc<Service>>>,
}

impl Direct {
    fn at(&self, peer: &Peer) -> Result<&Service, PeerError> {
        if !locked(&self.world).network {
            let why = "the network is away".to_owned();
            return Err(PeerError::Unreachable { node: peer.node.clone(), why });
        }
        Ok(&self.services.get().unwrap()[number(&peer.node)])
    }
}

fn refused<T>(peer: &Peer, outcome: Result<T, ServiceError>) -> Result<T, PeerError> {
    outcome.map_err(|error| match error {
        ServiceError::Refused(refusal) => PeerError::Refused {
            node: peer.node.clone(),
            reason: refusal.reason().to_owned(),
            message: refusal.to_string(),
        },
        error => PeerError::Unreachable { node: peer.node.clone(), why: error.to_string() },
    })
}

fn number(name: &str) -> usize {
    name[1..].parse().unwrap()
}

#[async_trait]
impl Peers for Direct {
    async fn prepare(&self, _: &Peer) {}

    async fn fence(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
        force: bool,
    ) -> Result<u64, PeerError> {
        refused(peer, self.at(peer)?.fence(volume, claim, force, None).await)
    }

    async fn hasten(&self, peer: &Peer, volume: VolumeId, grant: Uuid) -> Result<(), PeerError> {
        refused(peer, self.at(peer)?.hasten(volume, grant, None).await)
    }

    async fn allocation(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
        region: Sectors,
    ) -> Result<AllocationMap, PeerError> {
        refused(peer, self.at(peer)?.allocation(volume, claim, region, None).await)
    }

    async fn copy(
        &self,
        peer: &Peer,
        request: &CopyRequest,
    ) -> Result<(ExportName, u64), PeerError> {
        let granted = refused(peer, self.at(peer)?.grant_copy(request.clone(), None).await)?;
        let export = granted.record.lent().unwrap().export.clone();
        drop(self.copied.lock().await);
        Ok((export, granted.record.size.bytes()))
    }

    async fn serve(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
        force: bool,
    ) -> Result<u64, PeerError> {
        refused(peer, self.at(peer)?.serve(volume, claim, force, None).await)
    }

    async fn give_back(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
    ) -> Result<(), PeerError> {
        refused(peer, self.at(peer)?.reclaim(volume, claim, None).await)
    }

    async fn release(&self, peer: &Peer, volume: VolumeId, claim: &Claim) -> Result<(), PeerError> {
        refused(peer, self.at(peer)?.release(volume, claim, None).await)
    }

    async fn revoke(&self, peer: &Peer, volume: VolumeId, claim: &Claim) -> Result<(), PeerError> {
        // No agent withdraws what it has not borrowed.
        let there = self.at(peer)?;
        let view =
            there.volumes.copies(volume).into_iter().find(|view| view.record.lent().is_some());
        let borrower = view.and_then(|view| Some(view.record.lent()?.to.node.clone()));
        refused(peer, there.revoke(volume, claim.grant, borrower.as_deref()).await)
    }

    async fn query(
        &self,
        peer: &Peer,
        volume: VolumeId,
        claim: &Claim,
    ) -> Result<GrantFate, PeerError> {
        refused(peer, self.at(peer)?.grant_fate(volume, claim.grant))
    }
}

/// What the story never writes.
const NEVER: usize = 1;

/// Two agents on the journals of a directory.
struct Pair {
    world: Arc<Mutex<World>>,
    died: Arc<Notify>,
    services: Vec<Arc<Service>>,
    peers: Arc<Direct>,
    id: VolumeId,
}

fn config(node: usize, max_chain: u32) -> Config {
    Config::parse(&format!(
        r#"
        node = "n{node}"
        max_chain = {max_chain}
        [hydration]
        at_once = 1
        [export]
        address = "127.0.0.1"
        ports = "4420-4421"
        [[pool]]
        name = "pool"
        volume_group = "vg"
        thin_pool = "tp"
        devices = ["/dev/x"]
        "#
    ))
    .unwrap()
}

impl Pair {
    async fn open(world: Arc<Mutex<World>>, directory: &std::path::Path) -> Self {
        Self::open_with(world, directory, 4, |_| {}).await
    }

    async fn open_with(
        world: Arc<Mutex<World>>,
        directory: &std::path::Path,
        max_chain: u32,
        change: impl Fn(&mut FakeKernel),
    ) -> Self {
        Self::open_as(world, directory, |node| config(node, max_chain), change).await
    }

    async fn open_as(
        world: Arc<Mutex<World>>,
        directory: &std::path::Path,
        config: impl Fn(usize) -> Config,
        change: impl Fn(&mut FakeKernel),
    ) -> Self {
        let died = Arc::new(Notify::new());
        let peers = Arc::new(Direct {
            world: Arc::clone(&world),
            copied: tokio::sync::Mutex::default(),
            services: OnceLock::new(),
        });
        let mut services = Vec::new();
        let nodes = locked(&world).nodes.len();
        for node in 0..nodes {
            let config = config(node);
            let store = Store::open(&directory.join(format!("n{node}")), &config.node).unwrap();
            let mut kernel = FakeKernel {
                world: Arc::clone(&world),
                node,
                died: Arc::clone(&died),
                pool: Some(roomy_pool()),
                targets: every_target(),
            };
            change(&mut kernel);
            let peers: Arc<dyn Peers> = Arc::<Direct>::clone(&peers);
            let volumes = Volumes::open(config, store, Arc::new(kernel), peers).unwrap();
            services.push(Arc::new(Service::new(volumes).await.unwrap()));
        }
        let direct = peers;
        assert!(direct.services.set(services.clone()).is_ok());
        for service in &services {
            service.volumes.recover().await.unwrap();
        }
        let id = "11111111-2222-4333-8444-555555555555".parse().unwrap();
        Self { world, died, services, peers: direct, id }
    }

    fn view(&self, node: usize) -> Option<View> {
        self.services[node].volumes.view(self.id)
    }

    fn write(&self, node: usize, region: usize, value: u64) -> Io<()> {
        let record = self.view(node).unwrap().record;
        locked(&self.world).write_handle(node, &record, region, value)
    }

    fn read(&self, node: usize, region: usize) -> Io<u64> {
        let record = self.view(node).unwrap().record;
        locked(&self.world).read_handle(node, &record, region)
    }

    async fn begin_move(&self, hold: bool) -> Result<View, ServiceError> {
        self.move_between(0, 1, 7, hold).await
    }

    async fn move_between(
        &self,
        from: usize,
        to: usize,
        grant: u128,
        hold: bool,
    ) -> Result<View, ServiceError> {
        let grant = Uuid::from_u128(grant);
        let (node, endpoint) = (format!("n{to}"), format!("https://n{to}"));
        let borrower = Borrower { grant, node, endpoint };
        let granted = self.services[from].grant(self.id, borrower, "nqn".into(), hold).await?;
        let received = self.services[to].receive(offer(&granted.record, from), "").await;
        if received.is_err() {
            self.services[from].revoke(self.id, grant, None).await?;
        }
        received
    }

    /// Waits, without copying anything, until a node says this of the volume.
    async fn until_said(&self, node: usize, is_said: impl Fn(&str) -> bool) {
        let said = || self.view(node).map(|view| view.detail).unwrap_or_default();
        let waited = timeout(PATIENCE, async {
            while !is_said(&said()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        waited.await.unwrap_or_else(|_| panic!("node {node} says `{}`", said()));
    }

    /// Waits, without copying anything, until what was never written counts as being
    /// at a node.
    async fn until_marked(&self, node: usize) {
        let marked = |record: &dmlocal_model::volume::Record| {
            record.receiving().is_some_and(|receiving| receiving.seeding == Seeding::Done)
        };
        let waited = timeout(PATIENCE, async {
            while !self.view(node).is_some_and(|view| marked(&view.record)) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        waited.await.unwrap();
    }

    /// A write that may have to wait while what was never written is marked.
    async fn write_in_time(&self, node: usize, region: usize, value: u64) {
        let waited = timeout(PATIENCE, async {
            loop {
                match self.write(node, region, value) {
                    Io::Waits => tokio::time::sleep(Duration::from_millis(2)).await,
                    io => break io,
                }
            }
        });
        assert_eq!(waited.await, Ok(Io::Done(())));
    }

    /// Waits until a node has no other copy but the newest.
    async fn until_alone(&self, node: usize) {
        let volumes = &self.services[node].volumes;
        let waited = timeout(PATIENCE, async {
            while volumes.copies(self.id).len() > 1 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        waited.await.unwrap_or_else(|_| panic!("{:#?}", volumes.copies(self.id)));
    }

    /// Waits until a node's view is as wanted, hydrating meanwhile.
    async fn until(&self, node: usize, wanted: impl Fn(Option<&View>) -> bool) {
        let waited = timeout(PATIENCE, async {
            while !wanted(self.view(node).as_ref()) {
                locked(&self.world).hydrate();
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        let view = self.view(node);
        waited.await.unwrap_or_else(|_| panic!("node {node} came to rest at {view:#?}"));
    }
}

fn offer(record: &dmlocal_model::volume::Record, from: usize) -> Offer {
    let lent = record.lent().unwrap();
    Offer {
        id: record.id,
        incarnation: record.incarnation,
        size: record.size.bytes(),
        logical_block_size: record.logical_block_size,
        made_of: record.lineage.made_of,
        begins: record.lineage.passing,
        source: Source {
            grant: lent.to.grant,
            node: format!("n{from}"),
            endpoint: format!("https://n{from}"),
            generation: record.generation,
            hold: lent.hold,
            depth: record.receiving().map_or(1, |receiving| receiving.source.depth + 1),
            export: lent.export.clone(),
        },
    }
}

fn is_local(view: Option<&View>) -> bool {
    view.is_some_and(|view| view.record.phase == Phase::Local)
}

/// The demo's story. Calls are repeated as callers do; what was acknowledged is
/// counted in `written`.
async fn story(pair: &Pair, written: &Mutex<u64>) -> Told {
    let [a, b] = &pair.services[..] else { panic!("two agents") };
    a.create(pair.id, VOLUME_BYTES, "").await?;
    a.attach(pair.id, None).await?;
    for region in (0..REGIONS).filter(|region| *region != NEVER) {
        assert_eq!(pair.write(0, region, 100 + region as u64), Io::Done(()));
    }
    *written.lock().unwrap() = 1;
    pair.begin_move(true).await?;
    assert_eq!(pair.read(1, 0), Io::Done(100));
    b.switch(pair.id, false).await?;
    pair.write_in_time(1, 2, 200).await;
    *written.lock().unwrap() = 2;
    assert_eq!(pair.write(0, 2, 300), Io::Failed, "the source is fenced");
    pair.until(1, is_local).await;
    pair.until(0, |view| view.is_none()).await;
    Ok(())
}

/// Everything is at one place and as it was written.
async fn judge(pair: &Pair, written: u64) {
    let [a, b] = &pair.services[..] else { panic!("two agents") };
    let id = pair.id;
    // Whatever was left in the air is ended as an operator would.
    if pair.view(1).is_some_and(|v| v.record.receiving().is_some_and(|r| !r.stage.is_taken())) {
        let _ = b.abort(id).await;
    }
    if pair.view(1).is_none() && pair.view(0).is_some_and(|view| view.record.lent().is_some()) {
        let _ = a.abort(id).await;
    }
    let home = if pair.view(1).is_some() { 1 } else { 0 };
    if home == 0 && pair.view(0).is_none() {
        assert_eq!(written, 0, "the only copy is gone");
        return;
    }
    pair.until(home, is_local).await;
    pair.until(1 - home, |view| view.is_none()).await;
    let generation = pair.view(home).unwrap().record.generation;
    pair.services[home].attach(id, Some(generation)).await.unwrap();
    for region in 0..REGIONS {
        let wanted = match written {
            0 => 0,
            2 if region == 2 => 200,
            _ if region == NEVER => 0,
            _ => 100 + region as u64,
        };
        assert_eq!(pair.read(home, region), Io::Done(wanted), "region {region}");
    }
    assert!(locked(&pair.world).is_clean(1 - home), "something is left at the other node");
    pair.services[home].detach(id).await.unwrap();
    pair.services[home].delete(id).await.unwrap();
    assert!(locked(&pair.world).is_clean(home), "something is left after deletion");
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

const STORY: Tale = Tale { nodes: 2, actions: 40, step: 1 };

#[test]
fn the_story_ends_well_wherever_the_process_dies() {
    STORY.with_a_death(at_once, story, judge);
}

#[test]
fn the_story_ends_well_whatever_fails() {
    STORY.with_a_failure(at_once, story, judge);
}

fn one<T: std::fmt::Debug>(outcome: Result<T, ServiceError>) -> String {
    match outcome.unwrap_err() {
        ServiceError::Refused(refusal) => refusal.reason().to_owned(),
        ServiceError::Peer(PeerError::Refused { reason, .. }) => reason,
        error => panic!("{error} is not a refusal"),
    }
}

#[test]
fn bad_requests_are_refused_with_a_reason_and_change_nothing() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        let id = pair.id;
        let to = |node: &str, grant| Borrower {
            grant: Uuid::from_u128(grant),
            node: node.into(),
            endpoint: "https://x".into(),
        };

        assert_eq!(one(a.attach(id, None).await), "VOLUME_NOT_FOUND");
        assert_eq!(one(a.create(id, 0, "").await), "SIZE_INVALID");
        assert_eq!(one(a.create(id, 1000, "").await), "SIZE_INVALID");
        assert_eq!(one(a.create(id, 1 << 40, "").await), "NO_ROOM");
        assert_eq!(one(a.create(id, VOLUME_BYTES, "other").await), "POOL_NOT_FOUND");
        assert!(locked(&world).is_clean(0) && a.volumes.views().is_empty());

        a.create(id, VOLUME_BYTES, "").await.unwrap();
        a.create(id, VOLUME_BYTES, "").await.unwrap();
        assert_eq!(one(a.create(id, 2 * VOLUME_BYTES, "").await), "VOLUME_EXISTS");
        assert_eq!(one(a.extend(id, 512).await), "SIZE_SMALLER");
        assert_eq!(one(a.switch(id, false).await), "VOLUME_NOT_HELD");
        assert_eq!(one(a.abort(id).await), "VOLUME_NOT_HELD");
        assert_eq!(
            one(a.tune(id, dmlocal_model::admit::Change::default()).await),
            "VOLUME_NOT_HYDRATING"
        );
        let wrong = dmlocal_model::name::Generation(9);
        assert_eq!(one(a.attach(id, Some(wrong)).await), "GENERATION_STALE");
        assert_eq!(one(a.grant(id, to("n0", 1), "nqn".into(), true).await), "MOVE_TO_SELF");

        // A call that was meant for an earlier copy, or for an earlier volume of
        // that id, comes too late.
        let stale = Which { generation: Some(wrong), ..Which::from(id) };
        assert_eq!(one(a.delete(stale).await), "GENERATION_STALE");
        assert_eq!(one(a.detach(stale).await), "GENERATION_STALE");
        assert_eq!(one(a.extend(stale, 2 * VOLUME_BYTES).await), "GENERATION_STALE");
        let earlier = Which { incarnation: Some(Uuid::from_u128(5)), ..Which::from(id) };
        assert_eq!(one(a.extend(earlier, 2 * VOLUME_BYTES).await), "VOLUME_NOT_FOUND");
        a.delete(earlier).await.unwrap();
        assert!(a.volumes.view(id).is_some(), "a late delete took a later volume");

        a.attach(id, None).await.unwrap();
        assert_eq!(one(a.delete(id).await), "VOLUME_ATTACHED");
        assert_eq!(one(a.grant(id, to("n1", 2), "nqn".into(), false).await), "VOLUME_ATTACHED");

        let held = pair.begin_move(true).await.unwrap();
        assert_eq!(one(a.delete(id).await), "VOLUME_PUBLISHED");
        assert_eq!(one(a.extend(id, VOLUME_BYTES / 2).await), "SIZE_SMALLER");
        assert_eq!(one(a.grant(id, to("n2", 3), "nqn".into(), true).await), "VOLUME_MOVING");
        assert_eq!(one(a.grant(id, to("n2", 7), "nqn".into(), true).await), "GRANT_EXISTS");
        assert_eq!(one(b.grant(id, to("n0", 4), "nqn".into(), true).await), "VOLUME_MOVING");
        assert_eq!(one(b.delete(id).await), "VOLUME_MOVING");
        let claim = Claim {
            grant: Uuid::from_u128(7),
            incarnation: held.record.incarnation,
            generation: dmlocal_model::name::Generation(1),
            session: 0,
        };
        let stranger = Claim { grant: Uuid::from_u128(99), ..claim.clone() };
        assert_eq!(one(a.fence(id, &stranger, false, Some("n1")).await), "GRANT_UNKNOWN");
        assert_eq!(one(a.fence(id, &claim, false, Some("n2")).await), "GRANT_UNKNOWN");
        assert_eq!(one(a.release(id, &claim, Some("n1")).await), "GRANT_UNKNOWN");
        let stale = Claim { generation: dmlocal_model::name::Generation(2), ..claim.clone() };
        assert_eq!(one(a.fence(id, &stale, false, Some("n1")).await), "GENERATION_STALE");
        assert_eq!(pair.write(0, 0, 5), Io::Done(()), "the source is still open");

        b.switch(id, false).await.unwrap();
        assert_eq!(one(b.abort(id).await), "GRANT_FENCED");
        assert_eq!(one(a.abort(id).await), "GRANT_FENCED");
        assert_eq!(one(a.attach(id, None).await), "VOLUME_FENCED");
        pair.until(1, is_local).await;
        pair.until(0, |view| view.is_none()).await;
        // A delayed repetition of what is over does nothing and does not complain.
        a.release(id, &claim, Some("n1")).await.unwrap();
        assert_eq!(one(a.fence(id, &claim, false, Some("n1")).await), "GRANT_UNKNOWN");
        assert_eq!(pair.read(1, 0), Io::Done(5));
        b.detach(id).await.unwrap();
        b.delete(id).await.unwrap();
        b.delete(id).await.unwrap();
        assert!(locked(&world).is_clean(0) && locked(&world).is_clean(1));
    });
}

#[test]
fn the_first_write_at_a_held_destination_switches_over() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let pair = Pair::open(Arc::new(Mutex::new(World::new(2))), directory.path()).await;
        let a = &pair.services[0];
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        a.attach(pair.id, None).await.unwrap();
        pair.begin_move(true).await.unwrap();
        assert_eq!(pair.write(1, 1, 42), Io::Waits, "not before the source has answered");
        pair.until(1, is_local).await;
        assert_eq!(pair.read(1, 1), Io::Done(42));
    });
}

#[test]
fn an_old_user_of_the_handle_keeps_a_new_copy_away() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let pair = Pair::open(Arc::new(Mutex::new(World::new(2))), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        let attached = a.attach(pair.id, None).await.unwrap();
        locked(&pair.world).set_users(0, &attached.record, 1);
        assert_eq!(one(a.detach(pair.id).await), "HANDLE_IN_USE");
        pair.begin_move(true).await.unwrap();
        b.switch(pair.id, false).await.unwrap();
        pair.until(0, |view| view.is_none()).await;
        assert_eq!(one(a.create(pair.id, VOLUME_BYTES, "").await), "HANDLE_IN_USE");
        locked(&pair.world).set_users(0, &attached.record, 0);
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
    });
}

#[test]
fn what_a_node_lacks_is_named_before_anything_changes() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open_with(Arc::clone(&world), directory.path(), 4, |kernel| {
            if kernel.node == 1 {
                kernel.targets.retain(|target| !target.starts_with("clone "));
                kernel.pool = None;
            }
        })
        .await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        assert_eq!(one(pair.begin_move(true).await), "TARGET_MISSING");
        assert_eq!(one(b.create(pair.id, VOLUME_BYTES, "").await), "POOL_MISSING");
        assert!(is_local(pair.view(0).as_ref()), "the grant was withdrawn");
        assert!(locked(&world).is_clean(1));
    });
}

#[test]
fn blocks_of_another_size_are_refused_and_the_grant_withdrawn() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open_with(Arc::clone(&world), directory.path(), 4, |kernel| {
            if kernel.node == 1
                && let Some(pool) = &mut kernel.pool
            {
                pool.logical_block_size = 4096;
            }
        })
        .await;
        pair.services[0].create(pair.id, VOLUME_BYTES, "").await.unwrap();
        let refusal = pair.begin_move(true).await.unwrap_err();
        assert!(matches!(
            refusal,
            ServiceError::Refused(Refusal::LogicalBlockSize { pool: 4096, volume: 512 })
        ));
        assert!(is_local(pair.view(0).as_ref()) && locked(&world).is_clean(1));
    });
}

#[test]
fn a_full_pool_refuses_the_move_and_the_source_goes_on() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open_with(Arc::clone(&world), directory.path(), 4, |kernel| {
            if kernel.node == 1
                && let Some(pool) = &mut kernel.pool
            {
                pool.used = pool.size - VOLUME_BYTES / 2;
            }
        })
        .await;
        pair.services[0].create(pair.id, VOLUME_BYTES, "").await.unwrap();
        pair.services[0].attach(pair.id, None).await.unwrap();
        assert_eq!(one(pair.begin_move(true).await), "NO_ROOM");
        assert_eq!(pair.write(0, 0, 1), Io::Done(()));
        assert!(pair.view(1).is_none_or(|view| {
            view.record.receiving().is_none_or(|r| r.stage == ReceivingStage::Aborting)
        }));
    });
}

#[test]
fn a_clone_whose_metadata_is_lost_fails_and_is_never_begun_anew() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let world = Arc::new(Mutex::new(World::new(2)));
    runtime().block_on(async {
        let pair = Pair::open(Arc::clone(&world), first.path()).await;
        pair.services[0].create(pair.id, VOLUME_BYTES, "").await.unwrap();
        pair.services[0].attach(pair.id, None).await.unwrap();
        assert_eq!(pair.write(0, 1, 6), Io::Done(()));
        pair.begin_move(true).await.unwrap();
        pair.services[1].switch(pair.id, false).await.unwrap();
        assert_eq!(pair.write(1, 0, 7), Io::Done(()));
    });
    locked(&world).power_cut(1);
    locked(&world).lose_metadata(1);
    runtime().block_on(async {
        copy_journals(first.path(), second.path());
        let pair = Pair::open(Arc::clone(&world), second.path()).await;
        pair.until(1, |view| {
            let receiving = view.and_then(|view| view.record.receiving());
            receiving.is_some_and(|receiving| receiving.failure.is_some())
        })
        .await;
        assert_eq!(one(pair.services[1].attach(pair.id, None).await), "VOLUME_FAILED");
        assert_eq!(pair.read(1, 0), Io::Failed, "a handle over who knows what");
        assert!(pair.view(0).is_some(), "the source is kept");
    });
}

/// A volume that moves on before it has arrived, and comes back to where it was.
async fn chain(pair: &Pair, written: &Mutex<u64>) -> Told {
    let [a, b, c] = &pair.services[..] else { panic!("three agents") };
    a.create(pair.id, VOLUME_BYTES, "").await?;
    a.attach(pair.id, None).await?;
    for region in 0..REGIONS {
        assert_eq!(pair.write(0, region, 100 + region as u64), Io::Done(()));
    }
    *written.lock().unwrap() = 1;
    pair.move_between(0, 1, 7, true).await?;
    b.switch(pair.id, false).await?;
    pair.write_in_time(1, 2, 200).await;
    *written.lock().unwrap() = 2;
    pair.move_between(1, 2, 8, true).await?;
    assert_eq!(pair.read(2, 2), Io::Done(200), "through two nodes");
    c.switch(pair.id, false).await?;
    assert_eq!(pair.write(2, 3, 300), Io::Done(()));
    *written.lock().unwrap() = 3;
    assert_eq!(pair.write(1, 3, 301), Io::Failed, "the middle is fenced");
    // The handle at A is still there: nothing may come back below it.
    a.detach(pair.id).await?;
    pair.move_between(2, 0, 9, true).await?;
    a.switch(pair.id, false).await?;
    assert_eq!(pair.read(0, 0), Io::Done(100), "round all three");
    assert_eq!(pair.write(0, 0, 400), Io::Done(()));
    *written.lock().unwrap() = 4;
    pair.until(0, is_local).await;
    pair.until(1, |view| view.is_none()).await;
    pair.until(2, |view| view.is_none()).await;
    pair.until_alone(0).await;
    Ok(())
}

async fn judge_chain(pair: &Pair, written: u64) {
    // Whatever was left in the air is ended as an operator would.
    for service in &pair.services {
        let newest = service.volumes.view(pair.id).map(|view| view.record);
        if newest.is_some_and(|r| r.receiving().is_some_and(|r| !r.stage.is_taken())) {
            let _ = service.abort(pair.id).await;
        }
    }
    for service in &pair.services {
        let newest = service.volumes.view(pair.id).map(|view| view.record);
        let Some(lent) = newest.as_ref().and_then(|record| record.lent()) else { continue };
        let there = pair.services[number(&lent.to.node)].volumes.copies(pair.id);
        let grant = lent.to.grant;
        if !there.iter().any(|view| view.record.has_taken(grant)) {
            let _ = service.abort(pair.id).await;
        }
    }
    let generation = |node: usize| pair.view(node).map(|view| view.record.generation);
    let Some(home) =
        (0..3).filter(|node| generation(*node).is_some()).max_by_key(|n| generation(*n))
    else {
        assert_eq!(written, 0, "the only copy is gone");
        return;
    };
    pair.until(home, is_local).await;
    pair.until_alone(home).await;
    for other in (0..3).filter(|node| *node != home) {
        pair.until(other, |view| view.is_none()).await;
        assert!(locked(&pair.world).is_clean(other), "something is left at {other}");
    }
    pair.services[home].attach(pair.id, generation(home)).await.unwrap();
    for region in 0..REGIONS {
        let wanted = match (written, region) {
            (0, _) => 0,
            (4, 0) => 400,
            (3.., 3) => 300,
            (2.., 2) => 200,
            _ => 100 + region as u64,
        };
        assert_eq!(pair.read(home, region), Io::Done(wanted), "region {region}");
    }
    pair.services[home].detach(pair.id).await.unwrap();
    pair.services[home].delete(pair.id).await.unwrap();
    assert!(locked(&pair.world).is_clean(home), "something is left after deletion");
}

const CHAIN: Tale = Tale { nodes: 3, actions: 80, step: 3 };

#[test]
fn a_chain_that_returns_ends_well_wherever_the_process_dies() {
    CHAIN.with_a_death(at_once, chain, judge_chain);
}

#[test]
fn a_chain_that_returns_ends_well_whatever_fails() {
    CHAIN.with_a_failure(at_once, chain, judge_chain);
}

#[test]
fn a_chain_has_a_limit() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(3)));
        let pair = Pair::open_with(world, directory.path(), 2, |_| {}).await;
        pair.services[0].create(pair.id, VOLUME_BYTES, "").await.unwrap();
        pair.services[0].attach(pair.id, None).await.unwrap();
        assert_eq!(pair.write(0, 1, 6), Io::Done(()));
        pair.services[0].detach(pair.id).await.unwrap();
        pair.move_between(0, 1, 7, false).await.unwrap();
        pair.services[1].detach(pair.id).await.unwrap();
        pair.move_between(1, 2, 8, false).await.unwrap();
        pair.services[2].detach(pair.id).await.unwrap();
        // The third node may receive, not pass on.
        assert_eq!(one(pair.move_between(2, 0, 9, false).await), "CHAIN_TOO_DEEP");
        pair.until(2, is_local).await;
        pair.move_between(2, 0, 9, false).await.unwrap();
    });
}

#[test]
fn a_volume_grows_while_it_is_copied_and_takes_that_along() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(3)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b, c] = &pair.services[..] else { panic!("three agents") };
        let half = VOLUME_BYTES / 2;
        a.create(pair.id, half, "").await.unwrap();
        a.attach(pair.id, None).await.unwrap();
        assert_eq!(pair.write(0, 0, 10), Io::Done(()));
        pair.begin_move(true).await.unwrap();
        assert_eq!(one(b.extend(pair.id, VOLUME_BYTES).await), "VOLUME_MOVING", "it is held");
        b.switch(pair.id, false).await.unwrap();
        assert_eq!(pair.write(1, 3, 1), Io::Failed, "behind the end");
        b.extend(pair.id, half + REGION_BYTES).await.unwrap();
        b.extend(pair.id, VOLUME_BYTES).await.unwrap();
        assert_eq!(one(b.extend(pair.id, half).await), "SIZE_SMALLER");
        assert_eq!(pair.read(1, 3), Io::Done(0), "what it grew by is not blank");
        assert_eq!(pair.write(1, 3, 13), Io::Done(()));
        pair.move_between(1, 2, 8, true).await.unwrap();
        assert_eq!((pair.read(2, 0), pair.read(2, 3)), (Io::Done(10), Io::Done(13)));
        c.switch(pair.id, false).await.unwrap();
        pair.until(2, is_local).await;
        pair.until(1, |view| view.is_none()).await;
        assert_eq!((pair.read(2, 0), pair.read(2, 3)), (Io::Done(10), Io::Done(13)));
        assert_eq!(pair.view(2).unwrap().record.size.bytes(), VOLUME_BYTES);
    });
}

#[test]
fn copies_wait_for_their_turn_and_say_so() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let first = Pair::open(Arc::clone(&world), directory.path()).await;
        let second = Pair {
            world: Arc::clone(&world),
            died: Arc::clone(&first.died),
            services: first.services.clone(),
            peers: Arc::clone(&first.peers),
            id: "22222222-2222-4333-8444-555555555555".parse().unwrap(),
        };
        let [a, b] = &first.services[..] else { panic!("two agents") };
        for (pair, grant) in [(&first, 7), (&second, 8)] {
            a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
            a.attach(pair.id, None).await.unwrap();
            assert_eq!(pair.write(0, 1, 6), Io::Done(()));
            pair.move_between(0, 1, grant, true).await.unwrap();
            b.switch(pair.id, false).await.unwrap();
        }
        let waits = |said: &str| said == "copying waits: 1 other is before it";
        let runs = |said: &str| said.is_empty();
        first.until_said(1, runs).await;
        second.until_said(1, waits).await;
        assert_eq!(second.write(1, 0, 5), Io::Done(()), "it is usable all the same");

        let change = |priority| Change { priority: Some(priority), ..Change::default() };
        assert_eq!(one(b.tune(second.id, change(101)).await), "SETTING_OUT_OF_RANGE");
        b.tune(second.id, change(100)).await.unwrap();
        first.until_said(1, waits).await;
        second.until_said(1, runs).await;
        let pause = Change { paused: Some(true), ..Change::default() };
        b.tune(second.id, pause).await.unwrap();
        first.until_said(1, runs).await;
        second.until_said(1, |said| said == "paused").await;
        first.until(1, is_local).await;
        let resume = Change { paused: Some(false), ..Change::default() };
        b.tune(second.id, resume).await.unwrap();
        second.until(1, is_local).await;
        assert_eq!(second.read(1, 0), Io::Done(5));
    });
}

#[test]
fn a_copy_without_its_source_says_since_when_and_how_much_is_there() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let pair = Pair::open(Arc::new(Mutex::new(World::new(2))), directory.path()).await;
        half_way(&pair).await;
        locked(&pair.world).network = false;
        let end = format!("Z, {} bytes still there", VOLUME_BYTES - REGION_BYTES);
        let begin = "stalled: source n0 unreachable since 20";
        pair.until_said(1, |said| said.starts_with(begin) && said.ends_with(&end)).await;
        assert!(pair.view(1).unwrap().seen.is_some_and(|seen| !is_copying(&seen)));
        locked(&pair.world).network = true;
        pair.until_said(1, str::is_empty).await;
        pair.until(1, is_local).await;
    });
}

fn is_copying(seen: &Seen) -> bool {
    matches!(seen.clone_status, Some(CloneStatus::Working { enabled: true, .. }))
}

/// A volume that is copied as far as its second region, which its consumer wrote.
async fn half_way(pair: &Pair) {
    let [a, b, ..] = &pair.services[..] else { panic!("two agents") };
    a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
    a.attach(pair.id, None).await.unwrap();
    for region in 0..REGIONS {
        assert_eq!(pair.write(0, region, 10), Io::Done(()));
    }
    assert_eq!(one(a.forget_source(pair.id).await), "VOLUME_NOT_HYDRATING");
    pair.begin_move(true).await.unwrap();
    assert_eq!(one(b.forget_source(pair.id).await), "SOURCE_NOT_FENCED", "it is held");
    b.switch(pair.id, false).await.unwrap();
    assert_eq!(pair.write(1, 1, 11), Io::Done(()));
}

#[test]
fn a_source_that_is_given_up_takes_what_only_it_had_along_and_nothing_else() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(3)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        half_way(&pair).await;
        let [a, b, c] = &pair.services[..] else { panic!("three agents") };
        assert_eq!(one(b.forget_source(pair.id).await), "SOURCE_ALIVE");
        pair.move_between(1, 2, 8, true).await.unwrap();
        locked(&world).network = false;
        assert_eq!(one(b.forget_source(pair.id).await), "VOLUME_PUBLISHED", "others read it");
        locked(&world).network = true;
        c.abort(pair.id).await.unwrap();
        pair.until(2, |view| view.is_none()).await;

        locked(&world).network = false;
        let earlier = Which { generation: Some(Generation(1)), ..Which::from(pair.id) };
        assert_eq!(one(b.forget_source(earlier).await), "GENERATION_STALE");
        let forgotten = b.forget_source(pair.id).await.unwrap();
        assert_eq!(forgotten.lost.regions, REGIONS as u64 - 1);
        assert_eq!(forgotten.lost.bytes, VOLUME_BYTES - REGION_BYTES);
        let again = b.forget_source(pair.id).await.unwrap();
        assert_eq!(again.lost, forgotten.lost);
        // Not before it is cut off does what waits for it fail.
        pair.until(1, |_| pair.read(1, 0) == Io::Failed).await;
        assert_eq!(pair.read(1, 1), Io::Done(11));

        // What was on its way stays where it is, whether the source is back or not.
        locked(&world).network = true;
        pair.until(1, |_| true).await;
        assert_eq!(pair.read(1, 0), Io::Failed, "read from a source that was given up");
        assert_eq!(one(pair.move_between(1, 2, 9, true).await), "REGIONS_LOST");
        assert_eq!(one(a.attach(pair.id, None).await), "VOLUME_FENCED");
        for region in (0..REGIONS).filter(|region| *region != 1) {
            assert_eq!(pair.write(1, region, 20 + region as u64), Io::Done(()));
        }
        pair.until(1, is_local).await;
        assert_eq!((pair.read(1, 0), pair.read(1, 1)), (Io::Done(20), Io::Done(11)));
        assert_eq!(b.forget_source(pair.id).await.unwrap().lost.regions, 0);

        // The source's copy is the operator's to delete, and nobody else's to open.
        assert!(pair.view(0).is_some_and(|view| view.record.lent().is_some()));
        a.delete(pair.id).await.unwrap();
        pair.until(0, |view| view.is_none()).await;
        assert!(locked(&world).is_clean(0) && locked(&world).is_clean(2));
    });
}

#[test]
fn what_was_never_written_is_not_lost_with_its_source() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        a.attach(pair.id, None).await.unwrap();
        assert_eq!(pair.write(0, 0, 10), Io::Done(()));
        pair.begin_move(true).await.unwrap();
        b.switch(pair.id, false).await.unwrap();
        pair.until_marked(1).await;
        locked(&world).network = false;
        let forgotten = b.forget_source(pair.id).await.unwrap();
        assert_eq!(forgotten.lost.regions, 1);
        pair.until(1, |_| pair.read(1, 0) == Io::Failed).await;
        assert_eq!(pair.read(1, 3), Io::Done(0));
    });
}

#[test]
fn a_source_that_has_nothing_more_to_give_is_given_up_without_a_loss() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        half_way(&pair).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        assert_eq!(one(a.delete(pair.id).await), "VOLUME_FENCED", "it is still read");
        for region in 0..REGIONS {
            assert_eq!(pair.write(1, region, 30 + region as u64), Io::Done(()));
        }
        locked(&world).network = false;
        pair.until(1, |view| {
            let receiving = view.and_then(|view| view.record.receiving());
            receiving.is_some_and(|receiving| receiving.stage == ReceivingStage::Parting)
        })
        .await;
        assert_eq!(one(a.delete(pair.id).await), "VOLUME_FENCED", "nobody has said otherwise");
        let forgotten = b.forget_source(pair.id).await.unwrap();
        assert_eq!(forgotten.lost.regions, 0);
        pair.until(1, is_local).await;
        assert_eq!(pair.read(1, 3), Io::Done(33));

        // Deleted there, it may still be deleted here.
        b.detach(pair.id).await.unwrap();
        b.delete(pair.id).await.unwrap();
        locked(&world).network = true;
        a.delete(pair.id).await.unwrap();
        pair.until(0, |view| view.is_none()).await;
        assert!(locked(&world).is_clean(0) && locked(&world).is_clean(1));
    });
}

#[test]
fn what_was_deleted_here_waits_for_no_lost_source() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        half_way(&pair).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        locked(&world).network = false;
        b.detach(pair.id).await.unwrap();
        b.delete(pair.id).await.unwrap();
        assert!(pair.view(1).is_some(), "the source is to be told");
        let forgotten = b.forget_source(pair.id).await.unwrap();
        assert!(forgotten.view.is_none() && forgotten.lost.regions == 0);
        locked(&world).network = true;
        a.delete(pair.id).await.unwrap();
        pair.until(0, |view| view.is_none()).await;
        assert!(locked(&world).is_clean(0) && locked(&world).is_clean(1));
    });
}

#[test]
fn a_held_volume_grows_at_its_source_and_the_destination_follows() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        let half = VOLUME_BYTES / 2;
        a.create(pair.id, half, "").await.unwrap();
        a.attach(pair.id, None).await.unwrap();
        assert_eq!(pair.write(0, 1, 11), Io::Done(()));
        pair.begin_move(true).await.unwrap();
        a.extend(pair.id, half + REGION_BYTES).await.unwrap();
        assert_eq!(pair.write(0, 2, 12), Io::Done(()));
        let follows = |size: u64| {
            move |view: Option<&View>| {
                let record = view.map(|view| &view.record);
                record.is_some_and(|record| {
                    let receiving = record.receiving();
                    record.size.bytes() == size && receiving.is_some_and(|r| r.rebuild.is_none())
                })
            }
        };
        pair.until(1, follows(half + REGION_BYTES)).await;
        assert_eq!(pair.read(1, 2), Io::Done(12), "the destination has not followed");
        assert_eq!(pair.write(1, 3, 1), Io::Failed, "behind the end");

        // Once more, and the switch at once: the fence tells the size.
        a.extend(pair.id, VOLUME_BYTES).await.unwrap();
        assert_eq!(pair.write(0, 3, 13), Io::Done(()));
        b.switch(pair.id, false).await.unwrap();
        assert_eq!(one(a.extend(pair.id, VOLUME_BYTES).await), "VOLUME_FENCED");
        pair.until(1, is_local).await;
        for (region, value) in [(0, 0), (1, 11), (2, 12), (3, 13)] {
            assert_eq!(pair.read(1, region), Io::Done(value));
        }
        assert_eq!(pair.view(1).unwrap().record.size.bytes(), VOLUME_BYTES);
        a.detach(pair.id).await.ok();
        pair.until(0, |view| view.is_none()).await;
    });
}

#[test]
fn a_volume_is_deleted_before_it_has_arrived_and_the_source_lets_go() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        a.attach(pair.id, None).await.unwrap();
        assert_eq!(pair.write(0, 1, 6), Io::Done(()));
        pair.begin_move(true).await.unwrap();
        assert_eq!(one(b.delete(pair.id).await), "VOLUME_MOVING", "it is held");
        b.switch(pair.id, false).await.unwrap();
        assert_eq!(one(b.delete(pair.id).await), "VOLUME_ATTACHED");
        b.detach(pair.id).await.unwrap();
        b.delete(pair.id).await.unwrap();
        pair.until(1, |view| view.is_none()).await;
        a.detach(pair.id).await.ok();
        pair.until(0, |view| view.is_none()).await;
        b.delete(pair.id).await.unwrap();
        assert!(locked(&world).is_clean(0) && locked(&world).is_clean(1));
    });
}

/// A guest at the source that writes until it is told to stop, or fails.
struct Busy {
    stop: Arc<std::sync::atomic::AtomicBool>,
    thread: std::thread::JoinHandle<u64>,
}

impl Busy {
    fn start(pair: &Pair) -> Self {
        use std::sync::atomic::{AtomicBool, Ordering};
        let (stop, world) = (Arc::new(AtomicBool::new(false)), Arc::clone(&pair.world));
        let record = pair.view(0).unwrap().record;
        locked(&world).set_users(0, &record, 1);
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut value = 1000;
            while !told.load(Ordering::Relaxed) {
                if locked(&world).write_handle(0, &record, 0, value + 1) != Io::Done(()) {
                    return 0;
                }
                value += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
            value
        });
        Self { stop, thread }
    }

    /// Whether it meets an error by its own next write.
    fn meets_an_error(self) -> bool {
        let patience = std::time::Instant::now() + Duration::from_secs(10);
        while !self.thread.is_finished() && std::time::Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.stop() == 0
    }

    /// The last value that was acknowledged; 0 for a guest that met an error.
    fn stop(self) -> u64 {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

#[test]
fn a_source_is_not_fenced_while_its_guest_writes() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        a.attach(pair.id, None).await.unwrap();
        let guest = Busy::start(&pair);
        pair.begin_move(true).await.unwrap();
        // Whatever it was that wrote at the destination, it was not the guest.
        assert_eq!(pair.write(1, 1, 7), Io::Waits);
        for _ in 0..3 {
            assert_eq!(one(b.switch(pair.id, false).await), "SOURCE_ACTIVE");
        }
        let (held, lent) = (pair.view(1).unwrap().record, pair.view(0).unwrap().record);
        assert_eq!(held.receiving().unwrap().stage, ReceivingStage::Switching);
        assert_eq!(lent.lent().unwrap().stage, LentStage::Published);
        assert!(locked(&world).released.is_empty(), "a held write was acknowledged");
        // Once it has stopped, the switch goes on by itself.
        let last = guest.stop();
        assert!(last > 1000, "the guest was cut off");
        pair.until(1, |view| view.unwrap().record.receiving().unwrap().stage.is_owner()).await;
        assert_eq!(pair.read(1, 0), Io::Done(last));
        pair.until(1, |_| locked(&world).released == [(1, 1, 7)]).await;
    });
}

#[test]
fn a_source_is_fenced_at_once_when_its_guest_has_only_just_stopped() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        a.attach(pair.id, None).await.unwrap();
        pair.begin_move(true).await.unwrap();
        let guest = Busy::start(&pair);
        tokio::time::sleep(Duration::from_millis(60)).await;
        // It stays open, as QEMU leaves it.
        let last = guest.stop();
        b.switch(pair.id, false).await.unwrap();
        assert_eq!(pair.read(1, 0), Io::Done(last));
    });
}

#[test]
fn a_source_is_fenced_on_somebodys_word_although_it_is_written() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        a.attach(pair.id, None).await.unwrap();
        let guest = Busy::start(&pair);
        pair.begin_move(true).await.unwrap();
        assert_eq!(one(b.switch(pair.id, false).await), "SOURCE_ACTIVE");
        b.switch(pair.id, true).await.unwrap();
        assert!(pair.view(1).unwrap().record.receiving().unwrap().stage.is_owner());
        assert!(guest.meets_an_error(), "two nodes write");
    });
}

#[test]
fn a_guest_that_is_said_to_have_left_hastens_the_switch_and_nothing_else() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        assert_eq!(one(a.guest_left(pair.id).await), "VOLUME_NOT_FOUND");
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        a.attach(pair.id, None).await.unwrap();
        assert_eq!(pair.write(0, 0, 7), Io::Done(()));
        a.guest_left(pair.id).await.unwrap();
        pair.begin_move(true).await.unwrap();
        // Early, or a lie: somebody has the handle open.
        let record = pair.view(0).unwrap().record;
        locked(&world).set_users(0, &record, 1);
        a.guest_left(pair.id).await.unwrap();
        // At the destination nothing is concluded.
        b.guest_left(pair.id).await.unwrap();
        let grant = record.lent().unwrap().to.grant;
        assert_eq!(one(b.hasten(pair.id, grant, Some("n2")).await), "GRANT_UNKNOWN");
        assert_eq!(one(b.hasten(pair.id, Uuid::from_u128(5), Some("n0")).await), "GRANT_UNKNOWN");
        let stage = || pair.view(1).unwrap().record.receiving().unwrap().stage;
        assert_eq!(stage(), ReceivingStage::Held);
        locked(&world).set_users(0, &record, 0);
        a.guest_left(pair.id).await.unwrap();
        a.guest_left(pair.id).await.unwrap();
        pair.until(1, is_local).await;
        pair.until(0, |view| view.is_none()).await;
        assert_eq!(one(b.hasten(pair.id, grant, Some("n0")).await), "GRANT_UNKNOWN", "late");
    });
}

/// What was never written neither travels nor takes room, whoever writes meanwhile.
#[test]
fn only_what_was_written_travels() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        a.attach(pair.id, None).await.unwrap();
        assert_eq!(pair.write(0, 1, 6), Io::Done(()));
        let allocated = |view: View| view.seen.unwrap().allocated.unwrap().bytes();
        pair.begin_move(true).await.unwrap();
        b.switch(pair.id, false).await.unwrap();
        assert_eq!(pair.write(1, 3, 7), Io::Done(()), "before the source has told anything");
        // What is left is what was written.
        pair.until_marked(1).await;
        assert_eq!(bytes_left(&pair.view(1).unwrap()), Some(REGION_BYTES));
        pair.until(1, is_local).await;
        let read: Vec<_> = (0..REGIONS).map(|region| pair.read(1, region)).collect();
        assert_eq!(read, [Io::Done(0), Io::Done(6), Io::Done(0), Io::Done(7)]);
        assert_eq!(allocated(pair.view(1).unwrap()), 2 * REGION_BYTES);
    });
}
