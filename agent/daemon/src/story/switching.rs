//! A switch that is given up while nobody can say whether the source is fenced.

use super::*;

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
async fn fence(pair: &Pair) {
    let record = pair.view(0).unwrap().record;
    let claim = Claim {
        grant: record.lent().unwrap().to.grant,
        incarnation: record.incarnation,
        generation: record.generation,
        session: 0,
    };
    pair.services[0].fence(pair.id, &claim, true, None).await.unwrap();
    assert_eq!(pair.write(0, 0, 11), Io::Failed, "the source is fenced");
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
                fence(&pair).await;
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
        fence(&pair).await;
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
