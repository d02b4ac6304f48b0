//! Snapshots and what is made of them, with a failure or the process's death at
//! every single action, and what bad requests get.

use dmlocal_model::volume::Origin;

use super::{
    telling::{Tale, Told, at_once},
    *,
};

fn snap(nth: u128) -> VolumeId {
    VolumeId::new(Uuid::from_u128(0x5eed << 64 | nth))
}

fn made(nth: u128) -> VolumeId {
    VolumeId::new(Uuid::from_u128(0xbeef << 64 | nth))
}

impl Pair {
    fn read_of(&self, node: usize, id: VolumeId, region: usize) -> Io<u64> {
        let record = self.services[node].volumes.view(id).unwrap().record;
        locked(&self.world).read_handle(node, &record, region)
    }

    /// Makes a volume at another node, as dmlocalctl does.
    async fn make_between(
        &self,
        (from, to): (usize, usize),
        id: VolumeId,
        origin: Origin,
        grant: u128,
    ) -> Result<View, ServiceError> {
        let grant = Uuid::from_u128(grant);
        let (node, endpoint) = (format!("n{to}"), format!("https://n{to}"));
        let borrower = Borrower { grant, node, endpoint };
        let granted = self.services[from].grant_of(id, origin, borrower, "nqn".into()).await?;
        let received = self.services[to].receive(offer(&granted.record, from), "").await;
        if received.is_err() {
            self.services[from].revoke(id, grant, None).await?;
        }
        received
    }

    async fn until_gone(&self, what: &str, is_there: impl Fn(&Self) -> bool) {
        let waited = timeout(PATIENCE, async {
            while is_there(self) {
                locked(&self.world).hydrate();
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        waited.await.unwrap_or_else(|_| panic!("{what} stays"));
    }
}

/// The volume holds 100 and more, then 200 in region 0; the snapshot is of before.
/// How far it got is counted in `done`.
async fn copies(pair: &Pair, done: &Mutex<u64>) -> Told {
    let [a, b] = &pair.services[..] else { panic!("two agents") };
    let reached = |step| *done.lock().unwrap() = step;
    a.create(pair.id, VOLUME_BYTES, "").await?;
    a.attach(pair.id, None).await?;
    for region in 0..REGIONS {
        assert_eq!(pair.write(0, region, 100 + region as u64), Io::Done(()));
    }
    reached(1);
    let taken = a.take_snapshot(snap(1), pair.id).await?;
    reached(2);
    let again = a.take_snapshot(snap(1), pair.id).await?;
    assert_eq!(again.record, taken.record, "a repeated call takes no other");
    assert_eq!(pair.write(0, 0, 200), Io::Done(()));
    reached(3);

    a.create_of(made(1), Origin::Snapshot(snap(1)), "").await?;
    a.create_of(made(1), Origin::Snapshot(snap(1)), "").await?;
    a.attach(made(1), None).await?;
    assert_eq!(pair.read_of(0, made(1), 0), Io::Done(100));
    a.create_of(made(2), Origin::Volume(pair.id), "").await?;
    a.attach(made(2), None).await?;
    assert_eq!(pair.read_of(0, made(2), 0), Io::Done(200), "as the volume is now");

    let here = pair.make_between((0, 1), made(3), Origin::Snapshot(snap(1)), 31).await?;
    assert!(!here.record.attached, "nobody has asked for it");
    b.attach(made(3), None).await?;
    assert_eq!(pair.read_of(1, made(3), 0), Io::Done(100), "at once");
    let refused = a.delete_snapshot(snap(1), None, false).await;
    if a.volumes.reader(snap(1)).is_some() {
        assert_eq!(one(refused), "SNAPSHOT_IN_USE");
    }
    a.detach(pair.id).await?;
    a.revert(pair.id, snap(1)).await?;
    reached(4);
    a.delete_snapshot(snap(1), None, true).await?;
    reached(5);
    pair.until_gone("the snapshot", |_| a.volumes.snapshot(snap(1)).is_some()).await;
    Ok(())
}

async fn judge_copies(pair: &Pair, done: u64) {
    let [a, b] = &pair.services[..] else { panic!("two agents") };
    // Whatever was left in the air is ended as an operator would.
    if b.volumes
        .view(made(3))
        .is_some_and(|v| v.record.receiving().is_some_and(|receiving| !receiving.stage.is_taken()))
    {
        let _ = b.abort(made(3)).await;
    }
    if b.volumes.view(made(3)).is_none() && a.volumes.view(made(3)).is_some() {
        let _ = a.abort(made(3)).await;
    }
    pair.until_gone("a copy for a grant", |_| a.volumes.view(made(3)).is_some()).await;
    let at_rest = |view: Option<View>| view.is_none() || is_local(view.as_ref());
    pair.until_gone("what is under way", |_| {
        !at_rest(b.volumes.view(made(3)))
            || !at_rest(a.volumes.view(pair.id))
            || !at_rest(a.volumes.view(made(1)))
            || !at_rest(a.volumes.view(made(2)))
    })
    .await;

    for (node, id, first) in [(0, made(1), 100), (0, made(2), 200), (1, made(3), 100)] {
        let service = &pair.services[node];
        if service.volumes.view(id).is_none() {
            continue;
        }
        service.attach(id, None).await.unwrap();
        for region in 0..REGIONS {
            let wanted = if region == 0 { first } else { 100 + region as u64 };
            assert_eq!(pair.read_of(node, id, region), Io::Done(wanted), "{id} {region}");
        }
        service.detach(id).await.unwrap();
        service.delete(id).await.unwrap();
    }
    if done >= 1 {
        a.attach(pair.id, None).await.unwrap();
        let reverted = pair.read(0, 0) == Io::Done(100);
        assert!(done != 3 || pair.read(0, 0) == Io::Done(200) || reverted);
        assert!(done < 4 || reverted, "the revert was answered");
        for region in 1..REGIONS {
            assert_eq!(pair.read(0, region), Io::Done(100 + region as u64), "region {region}");
        }
    }
    if a.volumes.view(pair.id).is_some() {
        a.detach(pair.id).await.unwrap();
        a.delete(pair.id).await.unwrap();
    }
    pair.until_gone("what is half-made", |_| {
        a.volumes.snapshot(snap(1)).is_some_and(|view| view.record.phase != Phase::Local)
    })
    .await;
    assert!(done != 2 && done != 3 || a.volumes.snapshot(snap(1)).is_some(), "it was answered");
    // It outlives its volume.
    a.delete_snapshot(snap(1), None, false).await.unwrap();
    a.delete_snapshot(snap(1), None, false).await.unwrap();
    for node in 0..2 {
        assert!(locked(&pair.world).is_clean(node), "something is left at {node}");
    }
}

const COPIES: Tale = Tale { nodes: 2, actions: 40, step: 1 };

#[test]
fn snapshots_end_well_wherever_the_process_dies() {
    COPIES.with_a_death(at_once, copies, judge_copies);
}

#[test]
fn snapshots_end_well_whatever_fails() {
    COPIES.with_a_failure(at_once, copies, judge_copies);
}

#[test]
fn bad_requests_about_snapshots_change_nothing() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        let (id, other) = (pair.id, made(9));
        let of = |nth| Origin::Snapshot(snap(nth));
        assert_eq!(one(a.take_snapshot(snap(1), id).await), "VOLUME_NOT_FOUND");
        assert_eq!(one(a.create_of(other, of(1), "").await), "SNAPSHOT_NOT_FOUND");
        assert_eq!(one(a.create_of(other, Origin::Volume(id), "").await), "VOLUME_NOT_FOUND");
        assert_eq!(one(a.create_of(id, Origin::Volume(id), "").await), "VOLUME_EXISTS");
        a.delete_snapshot(snap(1), None, false).await.unwrap();
        assert!(locked(&world).is_clean(0) && a.volumes.views().is_empty());

        a.create(id, VOLUME_BYTES / 2, "").await.unwrap();
        a.create(other, VOLUME_BYTES, "").await.unwrap();
        a.attach(id, None).await.unwrap();
        let taken = a.take_snapshot(snap(1), id).await.unwrap().record;
        assert_eq!(one(a.take_snapshot(snap(1), other).await), "SNAPSHOT_EXISTS");
        a.take_snapshot(snap(2), other).await.unwrap();
        assert_eq!(one(a.create_of(other, of(1), "").await), "VOLUME_EXISTS");
        assert_eq!(one(a.create_of(made(1), of(1), "elsewhere").await), "POOL_NOT_FOUND");
        assert_eq!(one(a.revert(id, snap(1)).await), "VOLUME_ATTACHED");
        a.detach(id).await.unwrap();
        assert_eq!(one(a.revert(id, snap(2)).await), "SNAPSHOT_OF_ANOTHER");
        assert_eq!(one(a.revert(id, snap(3)).await), "SNAPSHOT_NOT_FOUND");
        let stale = Which { generation: Some(dmlocal_model::name::Generation(7)), ..id.into() };
        assert_eq!(one(a.revert(stale, snap(1)).await), "GENERATION_STALE");
        // A snapshot is no volume, whoever asks.
        let as_volume = snap(1);
        assert_eq!(one(a.attach(as_volume, None).await), "VOLUME_NOT_FOUND");
        assert_eq!(one(a.extend(as_volume, VOLUME_BYTES).await), "VOLUME_NOT_FOUND");
        a.delete(as_volume).await.unwrap();
        assert_eq!(a.volumes.snapshot(snap(1)).unwrap().record, taken);
        // Nor does a late call hit a later one of its id.
        let earlier = Some(Uuid::from_u128(77));
        a.delete_snapshot(snap(1), earlier, false).await.unwrap();
        assert!(a.volumes.snapshot(snap(1)).is_some());

        // Grown since: the size stays, and what it has grown by is blank again.
        a.extend(id, VOLUME_BYTES).await.unwrap();
        a.attach(id, None).await.unwrap();
        assert_eq!(pair.write(0, 0, 5), Io::Done(()));
        assert_eq!(pair.write(0, REGIONS - 1, 6), Io::Done(()));
        a.detach(id).await.unwrap();
        let reverted = a.revert(id, snap(1)).await.unwrap().record;
        assert_eq!(reverted.size.bytes(), VOLUME_BYTES);
        a.attach(id, None).await.unwrap();
        assert_eq!((pair.read(0, 0), pair.read(0, REGIONS - 1)), (Io::Done(0), Io::Done(0)));

        // What has gone to another node is not here to be copied.
        assert_eq!(pair.write(0, 0, 7), Io::Done(()));
        pair.begin_move(true).await.unwrap();
        a.take_snapshot(snap(4), id).await.unwrap();
        assert_eq!(one(b.take_snapshot(snap(5), id).await), "VOLUME_MOVING", "it is held");
        a.detach(id).await.unwrap();
        assert_eq!(one(a.revert(id, snap(1)).await), "VOLUME_PUBLISHED");
        b.switch(id, false).await.unwrap();
        assert_eq!(one(a.take_snapshot(snap(6), id).await), "VOLUME_FENCED");
        assert_eq!(one(a.create_of(made(2), Origin::Volume(id), "").await), "VOLUME_FENCED");
        assert_eq!(one(b.revert(id, snap(1)).await), "VOLUME_MOVING");
        pair.until(1, is_local).await;
        b.take_snapshot(snap(5), id).await.unwrap();
        b.detach(id).await.unwrap();
        assert_eq!(one(b.revert(id, snap(1)).await), "SNAPSHOT_NOT_FOUND", "it stayed behind");
        pair.until(0, |view| view.is_none()).await;
        // What was taken there is still of use there.
        a.create_of(made(2), of(1), "").await.unwrap();
        assert_eq!(one(a.create(made(2), VOLUME_BYTES / 2, "").await), "VOLUME_EXISTS");
        let to = |node: &str| Borrower {
            grant: Uuid::from_u128(91),
            node: node.into(),
            endpoint: "https://x".into(),
        };
        let granted = a.grant_of(made(3), of(1), to("n0"), "nqn".into()).await;
        assert_eq!(one(granted), "MOVE_TO_SELF");
        let granted = a.grant_of(made(3), of(9), to("n1"), "nqn".into()).await;
        assert_eq!(one(granted), "SNAPSHOT_NOT_FOUND");
        a.grant_of(made(3), of(1), to("n1"), "nqn".into()).await.unwrap();
        assert_eq!(one(a.attach(made(3), None).await), "VOLUME_PUBLISHED");
        assert_eq!(one(a.delete_snapshot(snap(1), None, false).await), "SNAPSHOT_IN_USE");
        a.delete_snapshot(snap(1), None, true).await.unwrap();
        assert_eq!(one(a.create_of(made(4), of(1), "").await), "SNAPSHOT_NOT_FOUND");
        assert_eq!(one(a.take_snapshot(snap(1), other).await), "SNAPSHOT_EXISTS");
        a.abort(made(3)).await.unwrap();
        pair.until_gone("the snapshot", |_| a.volumes.snapshot(snap(1)).is_some()).await;
        let granted = a.grant_of(made(3), of(2), to("n1"), "nqn".into()).await;
        assert_eq!(one(granted), "GRANT_UNKNOWN", "a grant is never given twice");

        for volume in [made(2), other] {
            a.delete(volume).await.unwrap();
        }
        for nth in [2, 4] {
            a.delete_snapshot(snap(nth), None, false).await.unwrap();
        }
        b.delete(id).await.unwrap();
        b.delete_snapshot(snap(5), None, false).await.unwrap();
        assert!(locked(&world).is_clean(0) && locked(&world).is_clean(1));
    });
}
