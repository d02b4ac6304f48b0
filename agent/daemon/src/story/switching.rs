//! A switch that is given up while nobody can say whether the source is fenced.

use super::{
    telling::{Tale, Told},
    *,
};

/// Held at node 1, with a source that has had everything written once.
async fn held(pair: &Pair) {
    let [a, ..] = &pair.services[..] else { panic!("two agents") };
    a.create(pair.id, VOLUME_BYTES, "").await.unwrap();
    a.attach(pair.id, None).await.unwrap();
    for region in 0..REGIONS {
        assert_eq!(pair.write(0, region, 10), Io::Done(()));
    }
    pair.begin_move(true).await.unwrap();
}

/// The fence arrives, and its answer does not.
async fn fence(pair: &Pair) -> Told {
    let record = pair.view(0).unwrap().record;
    let claim = Claim {
        grant: record.lent().unwrap().to.grant,
        incarnation: record.incarnation,
        generation: record.generation,
        session: 0,
    };
    pair.services[0].fence(pair.id, &claim, true, None).await?;
    assert_eq!(pair.write(0, 0, 11), Io::Failed, "the source is fenced");
    Ok(())
}

fn stage(pair: &Pair) -> ReceivingStage {
    pair.view(1).unwrap().record.receiving().unwrap().stage
}

#[test]
fn a_switch_is_given_up_and_the_source_is_the_volume_again() {
    for is_fenced in [false, true] {
        runtime().block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let world = Arc::new(Mutex::new(World::new(2)));
            let pair = Pair::open(Arc::clone(&world), directory.path()).await;
            held(&pair).await;
            let [a, b] = &pair.services[..] else { panic!("two agents") };
            if is_fenced {
                fence(&pair).await.unwrap();
                assert_eq!(one(a.abort(pair.id).await), "GRANT_FENCED");
            }
            locked(&world).network = false;
            b.switch(pair.id, false).await.unwrap_err();
            assert_eq!(stage(&pair), ReceivingStage::Switching);
            // It is told as soon as it can be told.
            let _ = b.abort(pair.id).await;
            pair.until(1, |_| stage(&pair) == ReceivingStage::Withdrawing).await;
            locked(&world).network = true;
            pair.until(1, |view| view.is_none()).await;
            pair.until(0, is_local).await;
            let write = |value| Io::Done(()) == pair.write(0, 0, value);
            pair.until(0, |_| write(12)).await;
            assert_eq!((pair.read(0, 0), pair.read(0, 1)), (Io::Done(12), Io::Done(10)));
            // The same volume moves again.
            pair.move_between(0, 1, 8, true).await.unwrap();
            b.switch(pair.id, false).await.unwrap();
            assert_eq!(pair.read(1, 0), Io::Done(12));
        });
    }
}

#[test]
fn what_waits_for_a_lost_source_fails_when_that_is_given_up() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open(Arc::clone(&world), directory.path()).await;
        held(&pair).await;
        fence(&pair).await.unwrap();
        let [_, b] = &pair.services[..] else { panic!("two agents") };
        locked(&world).network = false;
        assert_eq!(pair.write(1, 0, 20), Io::Waits);
        b.switch(pair.id, false).await.unwrap_err();
        assert_eq!(one(b.abort(pair.id).await), "WRITTEN_AT_DESTINATION");
        let given_up = b.forget_source(pair.id).await.unwrap();
        assert_eq!(given_up.lost.regions, REGIONS as u64);
        pair.until(1, |_| stage(&pair) == ReceivingStage::Withdrawing).await;
        assert!(locked(&world).released.is_empty(), "a write was acknowledged");
        // Lost for ever or not: one that comes back is the volume.
        locked(&world).network = true;
        pair.until(1, |view| view.is_none()).await;
        pair.until(0, is_local).await;
        assert_eq!(pair.read(0, 0), Io::Done(10));
    });
}

const GIVEN_UP: Tale = Tale { nodes: 2, actions: 10, step: 1 };

/// The switch is given up, and the source hears of it later.
async fn given_up(pair: &Pair, done: &Mutex<u64>) -> Told {
    let b = &pair.services[1];
    fence(pair).await?;
    locked(&pair.world).network = false;
    b.switch(pair.id, false).await.unwrap_err();
    // Whoever gives up tries again.
    let _ = b.abort(pair.id).await;
    let _ = b.abort(pair.id).await;
    locked(&pair.world).network = true;
    pair.until(1, |view| view.is_none()).await;
    pair.until(0, is_local).await;
    *done.lock().unwrap() = 1;
    Ok(())
}

/// Either the source is the volume again or the destination is, and nothing is lost.
async fn judge_given_up(pair: &Pair, done: u64) {
    locked(&pair.world).network = true;
    let here = pair.view(1);
    let taken = here.and_then(|view| view.record.receiving().map(|r| r.stage.is_taken()));
    if taken == Some(false) {
        let _ = pair.services[1].abort(pair.id).await;
    }
    pair.until(1, |view| view.is_none() || is_local(view)).await;
    let home = usize::from(pair.view(1).is_some());
    assert!(done == 0 || home == 0, "it was given up");
    if home == 0 && pair.view(0).is_some_and(|view| view.record.lent().is_some()) {
        let _ = pair.services[0].abort(pair.id).await;
    }
    pair.until(home, is_local).await;
    pair.until(1 - home, |view| view.is_none()).await;
    let generation = pair.view(home).unwrap().record.generation;
    pair.services[home].attach(pair.id, Some(generation)).await.unwrap();
    for region in 0..REGIONS {
        assert_eq!(pair.read(home, region), Io::Done(10), "region {region}");
    }
    assert_eq!(pair.write(home, 0, 30), Io::Done(()));
    assert!(locked(&pair.world).is_clean(1 - home), "something is left at the other node");
    pair.services[home].detach(pair.id).await.unwrap();
    pair.services[home].delete(pair.id).await.unwrap();
    assert!(locked(&pair.world).is_clean(home), "something is left after deletion");
}

#[test]
fn a_switch_is_given_up_and_ends_well_wherever_the_process_dies() {
    GIVEN_UP.with_a_death(held, given_up, judge_given_up);
}

#[test]
fn a_switch_is_given_up_and_ends_well_whatever_fails() {
    GIVEN_UP.with_a_failure(held, given_up, judge_given_up);
}
