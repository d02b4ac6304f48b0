//! Volumes that are used on one node while their data is on another.

use dmlocal_model::volume::Origin;

use super::{
    telling::{Tale, Told, at_once},
    *,
};
use crate::{
    config::{Receive, WhenFull},
    service::Mode,
};

/// Moves the volume to node 1 and leaves its data at node 0.
async fn borrow(pair: &Pair, grant: u128, hold: bool, mode: Mode) -> Result<View, ServiceError> {
    let grant = Uuid::from_u128(grant);
    let borrower = Borrower { grant, node: "n1".into(), endpoint: "https://n1".into() };
    let granted = pair.services[0].grant(pair.id, borrower, "nqn".into(), hold).await?;
    let received = pair.services[1].receive_as(offer(&granted.record, 0), "", mode).await;
    if received.is_err() {
        pair.services[0].revoke(pair.id, grant, None).await?;
    }
    received
}

fn stage(view: Option<&View>) -> Option<ReceivingStage> {
    Some(view?.record.receiving()?.stage)
}

/// Used elsewhere and back home, elsewhere again, and copied there in the end. What
/// was acknowledged is counted in `written`.
async fn story(pair: &Pair, written: &Mutex<u64>) -> Told {
    let [a, b] = &pair.services[..] else { panic!("two agents") };
    let id = pair.id;
    a.create(id, VOLUME_BYTES, "").await?;
    a.attach(id, None).await?;
    for region in 0..REGIONS {
        assert_eq!(pair.write(0, region, 100 + region as u64), Io::Done(()));
    }
    *written.lock().unwrap() = 1;
    borrow(pair, 7, true, Mode::Remote).await?;
    assert_eq!(pair.read(1, 0), Io::Done(100));
    b.switch(id, false).await?;
    assert_eq!(pair.write(1, 2, 200), Io::Done(()));
    *written.lock().unwrap() = 2;
    assert_eq!(pair.write(0, 2, 300), Io::Failed, "the source is fenced");
    a.detach(id).await?;
    assert!(!b.detach(id).await?.record.attached);
    pair.until(1, |view| view.is_none()).await;
    pair.until(0, is_local).await;
    let home = a.attach(id, None).await?;
    assert_eq!(home.record.generation, dmlocal_model::name::Generation(3));
    assert_eq!(pair.read(0, 2), Io::Done(200));
    borrow(pair, 8, true, Mode::Remote).await?;
    b.switch(id, false).await?;
    assert_eq!(pair.write(1, 3, 300), Io::Done(()));
    *written.lock().unwrap() = 3;
    let localized = b.localize(id, "").await?;
    assert_eq!(stage(Some(&localized)), Some(ReceivingStage::Hydrating));
    assert_eq!(pair.read(1, 3), Io::Done(300));
    assert_eq!(pair.write(1, 0, 400), Io::Done(()));
    *written.lock().unwrap() = 4;
    pair.until(1, is_local).await;
    pair.until(0, |view| view.is_none()).await;
    Ok(())
}

/// Everything is at one place and as it was written.
async fn judge(pair: &Pair, written: u64) {
    let [a, b] = &pair.services[..] else { panic!("two agents") };
    let id = pair.id;
    if pair.view(1).is_some_and(|v| v.record.receiving().is_some_and(|r| !r.stage.is_taken())) {
        let _ = b.abort(id).await;
    }
    if pair.view(1).is_none() && pair.view(0).is_some_and(|view| view.record.lent().is_some()) {
        let _ = a.abort(id).await;
    }
    // Whatever is on its way comes to where it can be left; what nobody uses goes home.
    let comes_to_rest = |view: Option<&View>| {
        let is_used = view.is_some_and(|view| view.record.attached);
        is_local(view) || stage(view).is_none_or(|at| is_used && at == ReceivingStage::Remote)
    };
    pair.until(1, comes_to_rest).await;
    if stage(pair.view(1).as_ref()) == Some(ReceivingStage::Remote) {
        b.localize(id, "").await.unwrap();
        pair.until(1, is_local).await;
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
        let wanted = match (region, written) {
            (_, 0) => 0,
            (2, 2..) => 200,
            (3, 3..) => 300,
            (0, 4..) => 400,
            _ => 100 + region as u64,
        };
        assert_eq!(pair.read(home, region), Io::Done(wanted), "region {region}");
    }
    assert!(locked(&pair.world).is_clean(1 - home), "something is left at the other node");
    pair.services[home].detach(id).await.unwrap();
    pair.services[home].delete(id).await.unwrap();
    assert!(locked(&pair.world).is_clean(home), "something is left after deletion");
}

const ELSEWHERE: Tale = Tale { nodes: 2, actions: 60, step: 1 };

#[test]
fn a_volume_is_used_elsewhere_and_ends_well_wherever_the_process_dies() {
    ELSEWHERE.with_a_death(at_once, story, judge);
}

#[test]
fn a_volume_is_used_elsewhere_and_ends_well_whatever_fails() {
    ELSEWHERE.with_a_failure(at_once, story, judge);
}

#[test]
fn the_first_write_at_a_remote_destination_switches_over() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let pair = Pair::open(Arc::new(Mutex::new(World::new(2))), directory.path()).await;
        let a = &pair.services[0];
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        a.attach(pair.id, None).await.unwrap();
        borrow(&pair, 7, true, Mode::Remote).await.unwrap();
        assert_eq!(pair.write(1, 1, 42), Io::Waits, "not before the source has answered");
        pair.until(1, |view| stage(view) == Some(ReceivingStage::Remote)).await;
        pair.until(1, |_| pair.read(1, 1) == Io::Done(42)).await;
        assert_eq!(pair.write(0, 0, 1), Io::Failed);
    });
}

#[test]
fn what_is_used_elsewhere_is_changed_by_nobody_here() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        let id = pair.id;
        a.create(id, VOLUME_BYTES / 2, "").await.unwrap();
        assert!(a.localize(id, "").await.is_ok(), "it is here");
        borrow(&pair, 7, true, Mode::Remote).await.unwrap();
        assert_eq!(one(b.localize(id, "").await), "VOLUME_MOVING", "held");
        b.abort(id).await.unwrap();
        pair.until(0, is_local).await;
        assert!(locked(&world).is_clean(1));

        borrow(&pair, 8, false, Mode::Remote).await.unwrap();
        let before = (pair.view(0).unwrap().record, pair.view(1).unwrap().record);
        assert_eq!(one(b.extend(id, VOLUME_BYTES).await), "VOLUME_REMOTE");
        assert_eq!(one(b.delete(id).await), "VOLUME_REMOTE");
        assert_eq!(one(b.forget_source(id).await), "VOLUME_REMOTE");
        let snapshot = "11111111-2222-4333-8444-666666666666".parse().unwrap();
        assert_eq!(one(b.take_snapshot(snapshot, id).await), "VOLUME_REMOTE");
        assert_eq!(one(a.take_snapshot(snapshot, id).await), "VOLUME_FENCED");
        assert_eq!(one(b.abort(id).await), "GRANT_FENCED");
        assert_eq!(one(a.abort(id).await), "GRANT_FENCED");
        assert_eq!(one(a.delete(id).await), "VOLUME_FENCED");
        assert_eq!(one(a.extend(id, VOLUME_BYTES).await), "VOLUME_FENCED");
        assert_eq!(one(a.attach(id, None).await), "VOLUME_FENCED");
        assert_eq!(one(b.localize(id, "other").await), "POOL_NOT_FOUND");
        let to =
            Borrower { grant: Uuid::from_u128(9), node: "n0".into(), endpoint: "https://x".into() };
        assert_eq!(one(b.grant(id, to, "nqn".into(), true).await), "VOLUME_REMOTE");
        let claim = Claim {
            grant: Uuid::from_u128(8),
            incarnation: before.0.incarnation,
            generation: before.0.generation,
            session: 1,
        };
        assert_eq!(one(a.release(id, &claim, Some("n1")).await), "GRANT_UNKNOWN");
        let stranger = Claim { grant: Uuid::from_u128(99), ..claim.clone() };
        assert_eq!(one(a.serve(id, &stranger, false, Some("n1")).await), "GRANT_UNKNOWN");
        assert_eq!(one(a.serve(id, &claim, false, Some("n2")).await), "GRANT_UNKNOWN");
        assert_eq!(one(a.reclaim(id, &claim, Some("n2")).await), "GRANT_UNKNOWN");
        let late = Claim { session: 0, ..claim.clone() };
        assert_eq!(one(a.serve(id, &late, false, Some("n1")).await), "SESSION_STALE");
        assert_eq!(one(a.fence(id, &late, false, Some("n1")).await), "SESSION_STALE");
        assert_eq!(a.serve(id, &claim, false, Some("n1")).await.unwrap(), VOLUME_BYTES / 2);
        b.switch(id, false).await.unwrap_err();
        assert_eq!(before, (pair.view(0).unwrap().record, pair.view(1).unwrap().record));

        // What was never written would be here at once.
        assert_eq!(pair.write(1, 0, 6), Io::Done(()));
        b.localize(id, "").await.unwrap();
        b.localize(id, "").await.unwrap();
        // A call that comes late opens nothing again.
        assert_eq!(one(a.serve(id, &claim, false, Some("n1")).await), "GRANT_FENCED");
        assert_eq!(one(a.reclaim(id, &claim, Some("n1")).await), "GRANT_FENCED");
        pair.until(1, is_local).await;
        b.localize(id, "").await.unwrap();
        assert_eq!(one(a.reclaim(id, &claim, Some("n1")).await), "GRANT_UNKNOWN");
    });
}

/// Its user is gone, as far as anybody can tell.
#[test]
fn a_volume_is_taken_back_from_whoever_used_it_elsewhere() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        let id = pair.id;
        a.create(id, VOLUME_BYTES, "").await.unwrap();
        let lent = borrow(&pair, 7, false, Mode::Remote).await.unwrap();
        assert_eq!(pair.write(1, 1, 42), Io::Done(()));
        let claim = Claim {
            grant: Uuid::from_u128(7),
            incarnation: lent.record.incarnation,
            generation: pair.view(0).unwrap().record.generation,
            session: 0,
        };
        let stranger = Claim { grant: Uuid::from_u128(99), ..claim.clone() };
        assert_eq!(one(a.reclaim(id, &stranger, None).await), "GRANT_UNKNOWN");
        locked(&world).set_users(1, &lent.record, 1);
        a.reclaim(id, &claim, None).await.unwrap();
        a.reclaim(id, &claim, None).await.unwrap();
        a.attach(id, None).await.unwrap();
        assert_eq!(pair.read(0, 1), Io::Done(42));
        assert_eq!(pair.write(0, 1, 43), Io::Done(()));

        // Whoever still has it open there reads and writes nothing any more.
        pair.until(1, |view| view.is_none()).await;
        assert_eq!(locked(&world).write_handle(1, &lent.record, 1, 44), Io::Failed);
        assert_eq!(pair.read(0, 1), Io::Done(43));
        locked(&world).set_users(1, &lent.record, 0);
        assert!(locked(&world).is_clean(1));
        assert_eq!(one(a.serve(id, &claim, true, Some("n1")).await), "GRANT_RETURNED");
        assert_eq!(one(a.fence(id, &claim, true, Some("n1")).await), "GRANT_RETURNED");

        // It may go there again.
        borrow(&pair, 8, true, Mode::Remote).await.unwrap();
        b.switch(id, false).await.unwrap();
        assert_eq!(pair.read(1, 1), Io::Done(43));
    });
}

fn with(node: usize, receive: Receive) -> Config {
    Config { receive, ..config(node, 4) }
}

#[test]
fn a_node_without_any_pool_uses_volumes_remotely() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let bare = |node| match node {
            1 => Config { pools: Vec::new(), ..config(node, 4) },
            _ => config(node, 4),
        };
        let pair = Pair::open_as(Arc::clone(&world), directory.path(), bare, |kernel| {
            if kernel.node == 1 {
                kernel.targets.retain(|target| !target.starts_with("clone "));
                kernel.pool = None;
            }
        })
        .await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        let used = borrow(&pair, 7, false, Mode::Auto).await.unwrap();
        assert!(used.record.pool.is_empty());
        assert_eq!(pair.write(1, 1, 42), Io::Done(()));
        b.localize_what_fits().await;
        assert_eq!(one(b.localize(pair.id, "").await), "POOL_NOT_FOUND");
        b.detach(pair.id).await.unwrap();
        assert!(locked(&world).is_clean(1));
        pair.until(0, is_local).await;
        a.attach(pair.id, None).await.unwrap();
        assert_eq!(pair.read(0, 1), Io::Done(42));
    });
}

#[test]
fn without_room_a_volume_is_remote_until_there_is_some() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let world = Arc::new(Mutex::new(World::new(2)));
    let when_full =
        |node| with(node, Receive { when_full: WhenFull::Remote, ..Receive::default() });
    runtime().block_on(async {
        let pair = Pair::open_as(Arc::clone(&world), first.path(), when_full, |kernel| {
            if kernel.node == 1
                && let Some(pool) = &mut kernel.pool
            {
                pool.used = pool.size - VOLUME_BYTES / 2;
            }
        })
        .await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        assert_eq!(one(borrow(&pair, 6, false, Mode::Local).await), "NO_ROOM");
        pair.until(0, is_local).await;
        borrow(&pair, 7, false, Mode::Auto).await.unwrap();
        assert_eq!(pair.write(1, 1, 42), Io::Done(()));
        b.localize_what_fits().await;
        assert_eq!(stage(pair.view(1).as_ref()), Some(ReceivingStage::Remote));
        assert_eq!(one(b.localize(pair.id, "").await), "NO_ROOM");
    });
    runtime().block_on(async {
        copy_journals(first.path(), second.path());
        let pair = Pair::open_as(Arc::clone(&world), second.path(), when_full, |_| {}).await;
        let b = &pair.services[1];
        b.localize_what_fits().await;
        pair.until(1, is_local).await;
        assert_eq!(pair.read(1, 1), Io::Done(42));
        // The others were never written, neither there nor from here.
        let allocated = pair.view(1).unwrap().seen.unwrap().allocated.unwrap();
        assert_eq!(allocated.bytes(), REGION_BYTES);
        pair.until(0, |view| view.is_none()).await;
    });
}

#[test]
fn large_volumes_stay_remote() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let limit = Some(VOLUME_BYTES - 1);
        let small =
            |node| with(node, Receive { always_remote_above_bytes: limit, ..Receive::default() });
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open_as(world, directory.path(), small, |_| {}).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        assert_eq!(one(borrow(&pair, 6, false, Mode::Local).await), "ALWAYS_REMOTE");
        pair.until(0, is_local).await;
        borrow(&pair, 7, false, Mode::Auto).await.unwrap();
        b.localize_what_fits().await;
        assert_eq!(one(b.localize(pair.id, "").await), "ALWAYS_REMOTE");
        assert_eq!(stage(pair.view(1).as_ref()), Some(ReceivingStage::Remote));
    });
}

#[test]
fn a_source_is_not_served_while_its_guest_writes() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        a.attach(pair.id, None).await.unwrap();
        let guest = Busy::start(&pair);
        borrow(&pair, 7, true, Mode::Remote).await.unwrap();
        assert_eq!(pair.write(1, 1, 7), Io::Waits);
        assert_eq!(one(b.switch(pair.id, false).await), "SOURCE_ACTIVE");
        assert_eq!(stage(pair.view(1).as_ref()), Some(ReceivingStage::Switching));
        let lent = pair.view(0).unwrap().record;
        assert_eq!(lent.lent().unwrap().stage, LentStage::Published);
        assert!(locked(&world).released.is_empty(), "a held write was acknowledged");
        // Once it has stopped, the switch goes on by itself.
        let last = guest.stop();
        assert!(last > 1000, "the guest was cut off");
        pair.until(1, |view| stage(view) == Some(ReceivingStage::Remote)).await;
        assert_eq!(pair.read(1, 0), Io::Done(last));
        pair.until(1, |_| locked(&world).released == [(1, 1, 7)]).await;
        assert_eq!(pair.read(1, 1), Io::Done(7));
    });
}

/// It is nowhere yet where it could stay, and would have no home to go back to.
#[test]
fn what_begins_on_another_node_is_never_remote_there() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let limit = Some(VOLUME_BYTES - 1);
        let small =
            |node| with(node, Receive { always_remote_above_bytes: limit, ..Receive::default() });
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open_as(Arc::clone(&world), directory.path(), small, |_| {}).await;
        let [a, b] = &pair.services[..] else { panic!("two agents") };
        a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
        let made = "11111111-2222-4333-8444-666666666666".parse().unwrap();
        let (grant, origin) = (Uuid::from_u128(7), Origin::Volume(pair.id));
        let to = Borrower { grant, node: "n1".into(), endpoint: "https://n1".into() };
        let granted = a.grant_of(made, origin, to, "nqn".into()).await.unwrap();
        for (mode, reason) in [
            (Mode::Remote, "SETTING_OUT_OF_RANGE"),
            (Mode::Auto, "ALWAYS_REMOTE"),
            (Mode::Local, "ALWAYS_REMOTE"),
        ] {
            assert_eq!(one(b.receive_as(offer(&granted.record, 0), "", mode).await), reason);
        }
        let claim = Claim {
            grant,
            incarnation: granted.record.incarnation,
            generation: granted.record.generation,
            session: 1,
        };
        assert_eq!(one(a.serve(made, &claim, false, Some("n1")).await), "GRANT_UNKNOWN");
        a.abort(made).await.unwrap();
        assert!(locked(&world).is_clean(1));
    });
}
