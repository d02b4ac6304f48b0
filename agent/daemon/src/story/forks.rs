//! A snapshot of a volume that is still hydrating, with a failure or the process's death
//! at every single action, and what bad requests get.

use dmlocal_model::{admit, volume::Origin};

use crate::kernel::PoolFacts;

use super::{
    telling::{Tale, Told},
    *,
};

fn snap(nth: u128) -> VolumeId {
    VolumeId::new(Uuid::from_u128(0x5eed << 64 | nth))
}

fn made() -> VolumeId {
    VolumeId::new(Uuid::from_u128(0xbeef << 64 | 1))
}

impl Pair {
    fn snapshot(&self, node: usize, nth: u128) -> Option<View> {
        self.services[node].volumes.snapshot(snap(nth))
    }

    async fn until_snapshot(&self, nth: u128, wanted: impl Fn(Option<&View>) -> bool) {
        let waited = timeout(PATIENCE, async {
            while !wanted(self.snapshot(1, nth).as_ref()) {
                locked(&self.world).hydrate();
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        let view = self.snapshot(1, nth);
        waited.await.unwrap_or_else(|_| panic!("the snapshot came to rest at {view:#?}"));
    }

    /// What a region of the snapshot holds once it is whole.
    async fn region_of_snapshot(&self, region: usize) -> Io<u64> {
        let b = &self.services[1];
        b.create_of(made(), Origin::Snapshot(snap(1)), "").await.unwrap();
        b.attach(made(), None).await.unwrap();
        let record = b.volumes.view(made()).unwrap().record;
        locked(&self.world).read_handle(1, &record, region)
    }
}

/// The volume is written at both nodes and hydrates at the second: 100 and more, and 200
/// in region 0.
async fn arriving(pair: &Pair) {
    let [a, b] = &pair.services[..] else { panic!("two agents") };
    a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
    a.attach(pair.id, None).await.unwrap();
    for region in 0..REGIONS {
        assert_eq!(pair.write(0, region, 100 + region as u64), Io::Done(()));
    }
    pair.begin_move(true).await.unwrap();
    b.switch(pair.id, false).await.unwrap();
    pair.write_in_time(1, 0, 200).await;
}

/// How far it got is counted in `done`.
async fn forked(pair: &Pair, done: &Mutex<u64>) -> Told {
    let b = &pair.services[1];
    let taken = b.take_snapshot(snap(1), pair.id).await?.record;
    *done.lock().unwrap() = 1;
    let again = b.take_snapshot(snap(1), pair.id).await?.record;
    assert_eq!(again.incarnation, taken.incarnation, "a repeated call takes no other");
    pair.write_in_time(1, 0, 300).await;
    pair.write_in_time(1, 1, 301).await;
    pair.until_snapshot(1, is_local).await;
    Ok(())
}

async fn judge_forked(pair: &Pair, done: u64) {
    assert!(!locked(&pair.world).kept_waiting, "a guest waited for LVM");
    let [a, b] = &pair.services[..] else { panic!("two agents") };
    pair.until(1, is_local).await;
    pair.until(0, |view| view.is_none()).await;
    pair.until_snapshot(1, |view| view.is_none() || is_local(view)).await;
    assert!(done == 0 || pair.snapshot(1, 1).is_some(), "it was answered");
    if pair.snapshot(1, 1).is_some() {
        for region in 0..REGIONS {
            let wanted = if region == 0 { 200 } else { 100 + region as u64 };
            let found = pair.region_of_snapshot(region).await;
            assert_eq!(found, Io::Done(wanted), "region {region}");
        }
        b.detach(made()).await.unwrap();
        b.delete(made()).await.unwrap();
        b.delete_snapshot(snap(1), None, false).await.unwrap();
    }
    for region in 2..REGIONS {
        assert_eq!(pair.read(1, region), Io::Done(100 + region as u64));
    }
    b.detach(pair.id).await.unwrap();
    b.delete(pair.id).await.unwrap();
    let left = timeout(PATIENCE, async {
        while a.volumes.view(snap(1)).is_some() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    left.await.unwrap();
    for node in 0..2 {
        assert!(locked(&pair.world).is_clean(node), "something is left at {node}");
    }
}

const FORKS: Tale = Tale { nodes: 2, actions: 40, step: 1 };

#[test]
fn snapshots_of_what_hydrates_end_well_wherever_the_process_dies() {
    FORKS.with_a_death(arriving, forked, judge_forked);
}

#[test]
fn snapshots_of_what_hydrates_end_well_whatever_fails() {
    FORKS.with_a_failure(arriving, forked, judge_forked);
}

#[test]
fn a_snapshot_that_is_not_whole_is_of_no_use_yet_and_may_go_all_the_same() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        arriving(&pair).await;

        locked(&world).network = false;
        let away = b.take_snapshot(snap(1), pair.id).await;
        assert_eq!(one(away), "SOURCE_AWAY");
        assert!(pair.snapshot(1, 1).is_none(), "nothing has begun");
        locked(&world).network = true;

        // Only the borrower gets a copy of what was fenced for it, and only with its grant.
        let (volume, claim) = {
            let record = pair.view(1).unwrap().record;
            let source = &record.receiving().unwrap().source;
            let (grant, generation) = (source.grant, source.generation);
            let incarnation = record.incarnation;
            (record.id, Claim { grant, incarnation, generation, session: 0 })
        };
        let grant = Uuid::from_u128(55);
        let request = CopyRequest { id: snap(9), incarnation: grant, grant, volume, claim };
        let stranger = a.grant_copy(request.clone(), Some("n9")).await;
        assert_eq!(one(stranger), "GRANT_UNKNOWN");
        let claim = Claim { grant: Uuid::from_u128(56), ..request.claim.clone() };
        let other = a.grant_copy(CopyRequest { claim, ..request.clone() }, Some("n1")).await;
        assert_eq!(one(other), "GRANT_UNKNOWN");
        let claim = Claim { generation: Generation(9), ..request.claim.clone() };
        let stale = a.grant_copy(CopyRequest { claim, ..request.clone() }, Some("n1")).await;
        assert_eq!(one(stale), "GENERATION_STALE");
        assert!(a.volumes.view(snap(9)).is_none());
        // A request that comes after its own end makes nothing. Whoever has borrowed
        // nothing leaves nothing behind.
        let ended = Claim { grant, incarnation: grant, generation: Generation(1), session: 0 };
        assert_eq!(one(a.release(snap(9), &ended, Some("n9")).await), "GRANT_UNKNOWN");
        assert_eq!(a.volumes.tombstone(grant).unwrap(), None);
        assert_eq!(one(a.release(snap(9), &ended, Some("n1")).await), "GRANT_UNKNOWN");
        assert_eq!(one(a.grant_copy(request, Some("n1")).await), "GRANT_UNKNOWN");

        let taken = b.take_snapshot(snap(1), pair.id).await.unwrap().record;
        assert!(taken.receiving().is_some_and(|r| r.stage == ReceivingStage::Hydrating));
        assert_eq!(one(b.take_snapshot(snap(1), made()).await), "SNAPSHOT_EXISTS");
        let of = Origin::Snapshot(snap(1));
        assert_eq!(one(b.create_of(made(), of, "").await), "VOLUME_MOVING");
        // It does not keep the volume from anything, nor the volume it.
        b.detach(pair.id).await.unwrap();
        b.delete(pair.id).await.unwrap();
        pair.until(0, |view| view.is_none()).await;
        assert!(a.volumes.view(snap(1)).is_some(), "the snapshot reads it");
        // Without its source it goes here at once, and there later.
        locked(&world).network = false;
        b.delete_snapshot(snap(1), None, false).await.unwrap();
        b.delete_snapshot(snap(1), None, false).await.unwrap();
        assert!(locked(&world).is_clean(1));
        assert_eq!(b.provisioned("pool"), 0, "nothing of it is left here");
        locked(&world).network = true;
        pair.until_snapshot(1, |view| view.is_none()).await;
        let left = timeout(PATIENCE, async {
            while a.volumes.view(snap(1)).is_some() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        left.await.unwrap();
        assert!(locked(&world).is_clean(0));
    });
}

#[test]
fn nobody_waits_at_a_volume_for_what_its_source_does() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        arriving(&pair).await;

        // What it is taken of changes meanwhile: it is begun anew.
        let gate = pair.peers.copied.lock().await;
        let taking = {
            let (b, id) = (Arc::clone(b), pair.id);
            tokio::spawn(async move { b.take_snapshot(snap(1), id).await })
        };
        let again = {
            let (b, id) = (Arc::clone(b), pair.id);
            tokio::spawn(async move { b.take_snapshot(snap(1), id).await })
        };
        let copied = timeout(PATIENCE, async {
            while a.volumes.view(snap(1)).is_none() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        copied.await.unwrap();
        let grant = a.volumes.view(snap(1)).unwrap().record.lent().unwrap().to.grant;
        let larger = VOLUME_BYTES + REGION_BYTES;
        timeout(PATIENCE, b.extend(pair.id, larger)).await.expect("it is locked").unwrap();
        drop(gate);
        let taken = taking.await.unwrap().unwrap().record;
        assert_eq!(taken.size.bytes(), larger);
        assert_ne!(taken.receiving().unwrap().source.grant, grant, "of two moments");
        let second = again.await.unwrap().unwrap().record;
        assert_eq!(second.incarnation, taken.incarnation, "two requests, two snapshots");
    });
}

#[test]
fn a_snapshot_whose_own_metadata_is_lost_is_not_answered_and_goes() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        arriving(&pair).await;
        // There is something to lose.
        locked(&world).hydrate();
        locked(&world).hydrate();
        locked(&world).spoiled = true;
        assert_eq!(one(b.take_snapshot(snap(1), pair.id).await), "VOLUME_FAILED");
        assert!(pair.snapshot(1, 1).is_none());
        let left = timeout(PATIENCE, async {
            while a.volumes.view(snap(1)).is_some() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        left.await.unwrap();
        pair.until(1, is_local).await;
    });
}

fn many_ports(node: usize) -> Config {
    let mut config = config(node, 4);
    config.export.as_mut().unwrap().ports.last = 4500;
    config
}

#[test]
fn a_source_needs_no_room_for_its_copies_and_makes_only_so_many() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        // No pool is larger than the one volume.
        let change = |kernel: &mut FakeKernel| {
            let size = VOLUME_BYTES * if kernel.node == 0 { 1 } else { 4 };
            kernel.pool = Some(PoolFacts { size, ..roomy_pool() });
        };
        let pair = Pair::open_as(Arc::clone(&world), directory.path(), many_ports, change).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        arriving(&pair).await;
        let other = made();
        let full = a.create(other, VOLUME_BYTES, "").await;
        assert_eq!(one(full), "NO_ROOM", "the source is as full as it may be");

        let change = Change { paused: Some(true), ..Change::default() };
        b.tune(pair.id, change).await.unwrap();
        let taken = b.take_snapshot(snap(1), pair.id).await.unwrap().record;
        assert_eq!(a.provisioned("pool"), VOLUME_BYTES, "nobody writes its copy");
        assert!(taken.tuning.paused, "whoever pauses a volume means its snapshots, too");
        let change = Change { paused: Some(false), ..Change::default() };
        assert!(!b.tune(snap(1), change).await.unwrap().record.tuning.paused);

        let record = pair.view(1).unwrap().record;
        let Source { grant, generation, .. } = record.receiving().unwrap().source.clone();
        let incarnation = record.incarnation;
        let claim = Claim { grant, incarnation, generation, session: 0 };
        let ask = |nth: u128| {
            let (id, grant) = (snap(100 + nth), Uuid::from_u128(100 + nth));
            let request = CopyRequest {
                id,
                incarnation: grant,
                grant,
                volume: pair.id,
                claim: claim.clone(),
            };
            async move { a.grant_copy(request, Some("n1")).await }
        };
        for nth in 1..admit::MAX_COPIES as u128 {
            ask(nth).await.unwrap();
        }
        assert_eq!(one(ask(99).await), "COPIES_EXHAUSTED");
        ask(1).await.unwrap();
    });
}
