//! Telling a story again and again, each time with something going wrong one action
//! later.

use super::*;

/// How a story ended.
pub(super) type Told = Result<(), ServiceError>;

/// How a story is told.
pub(super) struct Tale {
    /// How many nodes there are.
    pub nodes: usize,
    /// With fewer actions it is not the story.
    pub actions: usize,
    /// After how many more actions something goes wrong the next time.
    pub step: usize,
}

/// Nothing comes before the story.
pub(super) async fn at_once(_: &Pair) {}

impl Tale {
    /// The process dies before an action, and another one finds the journals. Nothing goes
    /// wrong in what comes before; the story notes how far it got, and that is judged.
    pub(super) fn with_a_death(
        &self,
        before: impl AsyncFn(&Pair),
        story: impl AsyncFn(&Pair, &Mutex<u64>) -> Told,
        judge: impl AsyncFn(&Pair, u64),
    ) {
        for actions in (0..).step_by(self.step) {
            let directory = tempfile::tempdir().unwrap();
            let world = Arc::new(Mutex::new(World::new(self.nodes)));
            let done = Mutex::new(0);
            let first = runtime();
            let ended = first.block_on(async {
                let pair = Pair::open(Arc::clone(&world), directory.path()).await;
                before(&pair).await;
                locked(&world).fuse = Some(actions);
                tokio::select! {
                    outcome = story(&pair, &done) => {
                        outcome.unwrap();
                        true
                    }
                    () = pair.died.notified() => false,
                }
            });
            // All agents stop where they are; what they have journalled is what another
            // start finds.
            first.shutdown_background();
            if ended {
                return assert!(
                    actions > self.actions,
                    "{actions} actions are too few to be the story"
                );
            }
            let image = tempfile::tempdir().unwrap();
            copy_journals(directory.path(), image.path());
            locked(&world).fuse = None;
            let done = *done.lock().unwrap();
            runtime().block_on(async {
                let pair = Pair::open(world, image.path()).await;
                judge(&pair, done).await;
            });
        }
    }

    /// The same with an action that fails.
    pub(super) fn with_a_failure(
        &self,
        before: impl AsyncFn(&Pair),
        story: impl AsyncFn(&Pair, &Mutex<u64>) -> Told,
        judge: impl AsyncFn(&Pair, u64),
    ) {
        for actions in (0..).step_by(self.step) {
            let directory = tempfile::tempdir().unwrap();
            let world = Arc::new(Mutex::new(World::new(self.nodes)));
            let done = Mutex::new(0);
            let ended = runtime().block_on(async {
                let pair = Pair::open(Arc::clone(&world), directory.path()).await;
                before(&pair).await;
                locked(&world).fault = Some(actions);
                let _ = story(&pair, &done).await;
                let untouched = locked(&world).fault.take().is_some();
                let done = *done.lock().unwrap();
                judge(&pair, done).await;
                untouched
            });
            if ended {
                return assert!(
                    actions > self.actions,
                    "{actions} actions are too few to be the story"
                );
            }
        }
    }
}

/// What a later process finds of the journals; the earlier one may still have
/// them open.
pub(super) fn copy_journals(from: &std::path::Path, to: &std::path::Path) {
    for node in ["n0", "n1", "n2"] {
        if !from.join(node).exists() {
            continue;
        }
        std::fs::create_dir(to.join(node)).unwrap();
        let file = format!("{node}/journal.redb");
        std::fs::copy(from.join(&file), to.join(&file)).unwrap();
    }
}
