//! Walks by number: each seed is one walk, the same on every machine.
//!
//! `DMLOCAL_SEED=N cargo test -p dmlocal-model seeds` walks one of them alone and
//! tells what it does; `DMLOCAL_SEEDS=N` changes how many are walked.
//!
//! A walk that never fails proves nothing, so each rule is broken once on purpose:
//! a [`Sabotage`] that is not caught within a few thousand seeds is a test that
//! fails.

use std::{
    cell::Cell,
    env,
    panic::{self, AssertUnwindSafe, catch_unwind},
    sync::{Mutex, PoisonError},
    thread,
    time::Instant,
};

use proptest::{
    collection::vec,
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use super::{Cluster, Op, SMALL, any_op};
use crate::{
    name::Role,
    plan::{self, Call, Next, Step, Wait},
    table::{Table, Target},
    units::Sectors,
    volume::{Event, LentStage, Phase, ReceivingStage, Record},
};

/// Walks of a run.
const SEEDS: u64 = if cfg!(debug_assertions) { 1_000 } else { 10_000 };

/// Walks within which a broken rule must show.
const PATIENCE: u64 = 100_000;

/// A rule that is broken on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sabotage {
    /// The fence answers without having closed the source's handle.
    FenceLeavesTheHandle,
    /// The fence answers without having flushed.
    FenceDoesNotFlush,
    /// The destination opens without having asked for the fence.
    OpensUnasked,
    /// A held handle lets writes through.
    HoldsNothing,
    /// A held handle answers a flush although the source has not flushed.
    AnswersFlushesItself,
    /// A handle that has let go of its writes is flushed at the source only. The walks
    /// hardly ever come there; a story does.
    FlushesTheSourceAlone,
    /// The source is told to let go while copying goes on.
    ReleasesEarly,
    /// The handle goes to the data LV before everything is there.
    CollapsesEarly,
    /// Clone metadata is zeroed again after it was handed out.
    ZeroesAgain,
    /// An abort lets go of the writes that it holds.
    SealsTheWrongWay,
    /// What the source has grown by while it was held is left out.
    ForgetsTheGrowth,
    /// A source is given up while regions that are here are in memory only.
    ForgetsWhatIsNotCommitted,
    /// What was lost with a source reads as if it had been blank.
    InventsWhatIsLost,
    /// A fenced copy is deleted without a word from its borrower.
    DeletesUnasked,
    /// The source is fenced although its guest plainly runs.
    CutsOffTheGuest,
    /// A snapshot is taken of a copy that was handed over.
    SnapshotsWhatIsFenced,
    /// A snapshot of what is still hydrating knows more to be here than it holds.
    ForksAtTwoMoments,
    /// It knows less to be here than was acknowledged.
    ForksWhatIsNotCommitted,
    /// A revert removes the old data before the new is journalled.
    RevertsRemovingFirst,
    /// What was never written is asked for while the source is still written.
    MapsBeforeTheFence,
    /// A copy that lacks something says what is not allocated in it.
    MapsARelay,
    /// Regions count as being here while their copies are on the way.
    SeedsWhileCopying,
    /// A map is used for whatever comes after it.
    KeepsAMap,
    /// Regions count as being here over what a lost power has left in them.
    SeedsAfterACut,
    /// A borrower writes at the source before that has closed its handle.
    ServesUnfenced,
    /// A volume that returns is opened while its export is still there.
    ReopensUnclosed,
    /// A copy is begun while the source still takes writes.
    LocalizesEarly,
    /// Consumers go on although the source has lost power under them.
    GoesOnWithoutItsSource,
    /// A fence is undone for somebody else than its borrower.
    UndoesAnyFence,
}

impl Sabotage {
    const ALL: [Self; 28] = [
        Self::FenceLeavesTheHandle,
        Self::FenceDoesNotFlush,
        Self::OpensUnasked,
        Self::HoldsNothing,
        Self::AnswersFlushesItself,
        Self::ReleasesEarly,
        Self::CollapsesEarly,
        Self::ZeroesAgain,
        Self::SealsTheWrongWay,
        Self::ForgetsTheGrowth,
        Self::ForgetsWhatIsNotCommitted,
        Self::InventsWhatIsLost,
        Self::DeletesUnasked,
        Self::CutsOffTheGuest,
        Self::SnapshotsWhatIsFenced,
        Self::ForksAtTwoMoments,
        Self::ForksWhatIsNotCommitted,
        Self::RevertsRemovingFirst,
        Self::MapsBeforeTheFence,
        Self::MapsARelay,
        Self::SeedsWhileCopying,
        Self::KeepsAMap,
        Self::SeedsAfterACut,
        Self::ServesUnfenced,
        Self::ReopensUnclosed,
        Self::LocalizesEarly,
        Self::GoesOnWithoutItsSource,
        Self::UndoesAnyFence,
    ];

    /// A walk that trips over it, where random ones seldom do.
    fn led(self) -> Vec<Op> {
        use Op::*;
        // A write of node 1 has left for the source when the power goes.
        let late = [
            Write(0, 0),
            Write(0, 1),
            Borrow(0, 1, true),
            Switch(1, false),
            Write(1, 0),
            Network(false),
            Write(1, 1),
            PowerCut(1),
            Network(true),
            Tend(1),
        ];
        let then = match self {
            Self::ReopensUnclosed => {
                vec![Detach(0), Detach(1), Attach(0, true), Write(0, 1), Hydrate, Hydrate, Hydrate]
            }
            Self::LocalizesEarly => {
                vec![Localize(1), Tend(1), Hydrate, Hydrate, Hydrate, Read(1, 1)]
            }
            Self::GoesOnWithoutItsSource => {
                vec![Write(1, 0), PowerCut(0), Tend(0), Tend(1), Tend(1), Flush(1)]
            }
            Self::FenceLeavesTheHandle
            | Self::FenceDoesNotFlush
            | Self::OpensUnasked
            | Self::HoldsNothing
            | Self::ReleasesEarly
            | Self::CollapsesEarly
            | Self::ZeroesAgain
            | Self::SealsTheWrongWay
            | Self::ForgetsTheGrowth
            | Self::AnswersFlushesItself
            | Self::ForgetsWhatIsNotCommitted
            | Self::InventsWhatIsLost
            | Self::DeletesUnasked
            | Self::CutsOffTheGuest
            | Self::SnapshotsWhatIsFenced
            | Self::ForksAtTwoMoments
            | Self::ForksWhatIsNotCommitted
            | Self::RevertsRemovingFirst
            | Self::FlushesTheSourceAlone
            | Self::MapsBeforeTheFence
            | Self::MapsARelay
            | Self::SeedsWhileCopying
            | Self::KeepsAMap
            | Self::SeedsAfterACut
            | Self::ServesUnfenced
            | Self::UndoesAnyFence => return Vec::new(),
        };
        late.into_iter().chain(then).collect()
    }

    /// What is done instead.
    pub(super) fn instead(self, next: Next, record: &Record) -> Next {
        let lent_stage = record.lent().map(|lent| lent.stage);
        let fencing = lent_stage == Some(LentStage::Fencing);
        let settling = record.receiving().is_some_and(|r| r.stage == ReceivingStage::Settling);
        match (self, next) {
            (Self::FenceLeavesTheHandle, Next::Do(steps))
                if matches!(steps.as_slice(), [Step::FenceHandle(_)]) =>
            {
                if fencing {
                    Next::Journal(Event::Fenced)
                } else {
                    Next::Wait(Wait::Peer)
                }
            }
            (Self::FenceDoesNotFlush, Next::DoThen(Step::Flush(_), Event::Fenced)) => {
                Next::Journal(Event::Fenced)
            }
            (Self::ForgetsTheGrowth, Next::Journal(Event::SourceGrew(_))) => {
                let switching = record.receiving().map(|receiving| receiving.stage);
                match switching {
                    Some(ReceivingStage::Switching) => Next::Ask(Call::Fence),
                    _ => Next::Wait(Wait::Switch),
                }
            }
            (Self::OpensUnasked, Next::Ask(Call::Fence)) => Next::Journal(Event::SourceFenced),
            (Self::HoldsNothing, Next::Do(steps)) => match steps.as_slice() {
                [
                    Step::Set(
                        Role::Handle,
                        table @ Table { target: Target::Hold { device, .. }, .. },
                    ),
                ] => {
                    let target = Target::Linear { device: *device, offset: Sectors(0) };
                    Next::DoThen(
                        Step::Set(Role::Handle, Table::whole(table.length, target)),
                        Event::SwitchAsked,
                    )
                }
                _ => Next::Do(steps),
            },
            (Self::InventsWhatIsLost, Next::Wait(Wait::Lost)) => Next::Journal(Event::Committed),
            (Self::CollapsesEarly, Next::Wait(Wait::Hydration)) => Next::Journal(Event::Committed),
            (Self::ZeroesAgain, Next::Do(steps)) => match steps.as_slice() {
                [Step::LoadClone { table, floor: Some(_) }] => match table.target {
                    Target::Clone { meta, .. } => Next::Do(vec![
                        Step::ZeroMeta(meta),
                        Step::LoadClone { table: table.clone(), floor: None },
                    ]),
                    _ => Next::Do(steps),
                },
                _ => Next::Do(steps),
            },
            (Self::RevertsRemovingFirst, Next::Allocate(mut steps))
                if matches!(record.phase, Phase::Reverting(_)) =>
            {
                let (name, _) = plan::lv_names(record);
                steps.insert(0, Step::RetireData { name, uuid: record.data.clone() });
                Next::Allocate(steps)
            }
            (Self::SealsTheWrongWay, Next::Do(steps)) => match steps.as_slice() {
                [Step::Seal(table)] => Next::Do(vec![
                    Step::Set(Role::Handle, table.clone()),
                    Step::Seal(table.clone()),
                ]),
                _ => Next::Do(steps),
            },
            (Self::ServesUnfenced, Next::Do(steps)) => match (lent_stage, steps.as_slice()) {
                (Some(LentStage::Yielding), [Step::FenceHandle(_)]) => Next::Journal(Event::Fenced),
                (Some(LentStage::Serving), [Step::FenceHandle(_)]) => Next::Wait(Wait::Peer),
                _ => Next::Do(steps),
            },
            (Self::ReopensUnclosed, Next::Do(steps)) => match (lent_stage, steps.as_slice()) {
                (Some(LentStage::Reclaiming), [Step::Unpublish { .. }]) => {
                    let boot = record.lent().and_then(|lent| lent.served_in);
                    Next::Journal(Event::Reclaimed(boot.unwrap_or_default()))
                }
                _ => Next::Do(steps),
            },
            (Self::LocalizesEarly, Next::Ask(Call::Fence)) if settling => {
                Next::Journal(Event::SourceFenced)
            }
            (_, next) => next,
        }
    }
}

fn ops_of(seed: u64) -> Vec<Op> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    vec(any_op(), 1..80).new_tree(&mut runner).map(|tree| tree.current()).unwrap_or_default()
}

/// Walks; what the oracle says is the error.
fn walk(ops: &[Op], sabotage: Option<Sabotage>) -> Result<(), String> {
    let walked = catch_unwind(AssertUnwindSafe(|| {
        let mut cluster = Cluster::new();
        cluster.sabotage = sabotage;
        let _ = cluster.create(0);
        let _ = cluster.attach(0, false);
        // What was never written is hardly ever copied: half of the walks are of a
        // volume that is full.
        if ops.len().is_multiple_of(2) {
            (0..SMALL).for_each(|region| cluster.write(0, region));
        }
        // In some, consumers never let a clone copy by itself.
        cluster.world.busy = ops.len().is_multiple_of(3);
        for op in ops {
            cluster.run(op);
        }
        // What was done wrong shows in what is left of it.
        cluster.sabotage = None;
        cluster.heal();
        cluster.judge();
    }));
    walked.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
    })
}

/// The walk without whatever it fails without as well.
fn shrunk(mut ops: Vec<Op>) -> Vec<Op> {
    let mut at = ops.len();
    while at > 0 {
        at -= 1;
        let mut fewer = ops.clone();
        fewer.remove(at);
        if walk(&fewer, None).is_err() {
            ops = fewer;
        }
    }
    ops
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

#[test]
fn whatever_happens_the_last_acknowledged_write_is_read() {
    let seeds = match number("DMLOCAL_SEED") {
        Some(one) => {
            println!("{:#?}", ops_of(one));
            one..one + 1
        }
        None => 0..number("DMLOCAL_SEEDS").unwrap_or(SEEDS),
    };
    let (count, started) = (seeds.end - seeds.start, Instant::now());
    for seed in seeds {
        let ops = ops_of(seed);
        if let Err(why) = walk(&ops, None) {
            panic!("seed {seed}: {why}\nfor short: {:#?}", shrunk(ops));
        }
    }
    println!("{count} seeds in {:.1} s", started.elapsed().as_secs_f64());
}

/// What the oracle says of lost and stale data, and of two writers; a copy that can
/// never be whole has lost its source. A walk that trips over its own sabotage
/// proves nothing.
const NOTICED: [&str; 12] = [
    "was lost, and yet reads",
    "more is lost than was said",
    "an LV that the journal knows is gone",
    "under an old generation was done",
    "a flush was acknowledged of what a power cut had taken",
    "no way to rest",
    "is stale",
    "under an old generation",
    "another volume's past shows",
    "the only copy is gone",
    "two live instances of one metadata",
    "a guest that was running was cut off",
];

thread_local! {
    /// Whether panics of this thread are expected and need not be told.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

#[test]
fn every_rule_that_is_broken_is_noticed() {
    // Thousands of walks end in a panic here, and telling one takes longer than to walk.
    let told = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !QUIET.get() {
            told(info);
        }
    }));
    let rest = Mutex::new(Sabotage::ALL.into_iter());
    let next = || rest.lock().unwrap_or_else(PoisonError::into_inner).next();
    let notice = || {
        QUIET.set(true);
        let mut unnoticed = Vec::new();
        while let Some(sabotage) = next() {
            let led = sabotage.led();
            assert_eq!(walk(&led, None), Ok(()), "{sabotage:?} is not what shows");
            let led = (!led.is_empty()).then_some(led);
            let random = (0..PATIENCE).map(|seed| (seed, ops_of(seed)));
            let noticed =
                led.into_iter().map(|led| (0, led)).chain(random).find_map(|(seed, ops)| {
                    let why = walk(&ops, Some(sabotage)).err()?;
                    NOTICED.iter().any(|text| why.contains(text)).then_some((seed, why))
                });
            match noticed {
                Some((seed, why)) => {
                    println!("{sabotage:?}: seed {seed}: {}", why.lines().next().unwrap_or(""));
                }
                None => unnoticed.push(sabotage),
            }
        }
        unnoticed
    };
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let unnoticed: Vec<Sabotage> = thread::scope(|scope| {
        let workers: Vec<_> = (0..processors).map(|_| scope.spawn(notice)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    assert!(unnoticed.is_empty(), "not noticed: {unnoticed:?}");
}
