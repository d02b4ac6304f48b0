//! Copies that consumers keep from going on.

use super::*;

#[test]
fn a_copy_whose_consumers_never_rest_arrives_all_the_same() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let pair = Pair::open(Arc::new(Mutex::new(World::new(2))), directory.path()).await;
        half_way(&pair).await;
        locked(&pair.world).busy = true;
        pair.until(1, is_local).await;
        for region in 0..REGIONS {
            let there = if region == 1 { 11 } else { 10 };
            assert_eq!(pair.read(1, region), Io::Done(there), "region {region}");
        }
    });
}

#[test]
fn consumers_that_need_not_wait_are_not_made_to() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let config = |node| {
            let mut config = config(node, 4);
            config.hydration.push_percent = 0;
            config
        };
        let world = Arc::new(Mutex::new(World::new(2)));
        let pair = Pair::open_as(world, directory.path(), config, |_| {}).await;
        half_way(&pair).await;
        locked(&pair.world).busy = true;
        let here = |pair: &Pair| pair.view(1).and_then(|view| view.seen).map(|s| s.clone_status);
        tokio::time::sleep(Duration::from_millis(100)).await;
        let before = here(&pair);
        for _ in 0..20 {
            locked(&pair.world).hydrate();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(here(&pair), before, "something was copied");
        locked(&pair.world).busy = false;
        pair.until(1, is_local).await;
    });
}
