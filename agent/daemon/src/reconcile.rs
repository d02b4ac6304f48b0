//! Makes what is there agree with what the journal says, one copy of a volume at a
//! time.
//!
//! ```text
//! request ── admit ── journal ─┐
//! start-up ────────────────────┼─► converge: look ─► plan::next ─► act ─► journal ─┐
//! tick, nudge ─────────────────┘      ▲                                            │
//!                                     └────────────────────────────────────────────┘
//! ```
//!
//! One task tends each copy, and one lock per copy lets only one thing happen to
//! it at a time; a copy whose device is stuck holds up no other. A node may have
//! two copies of one volume: one that was handed over and is still read, and one
//! that comes back through it.
//! Readers never wait: they see the last published [`View`].

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant, SystemTime},
};

use dmlocal_model::{
    admit::{Claim, CopyRequest, Evidence, Refusal},
    name::{Generation, Role, VolumeId},
    plan::{self, Call, Device, Next, Seen, Step, Wait},
    schedule,
    units::Sectors,
    volume::{Event, Failure, LentStage, Origin, ReceivingStage, Record, Tombstone},
};
use tokio::{
    sync::{Notify, broadcast, watch},
    task::{JoinError, JoinHandle},
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};
use uuid::Uuid;

use crate::{
    activity::{self, Activity, Verdict},
    config::Config,
    describe::describe,
    hydrations::Hydrations,
    kernel::{Kernel, PoolFacts, PoolUsage, StepError},
    peers::{Peer, PeerError, Peers},
    progress::Progress,
    pushes,
    source_map::Asked,
    store::{Store, StoreError},
};

/// More actions than this without a rest mean that acting changes nothing.
const MAX_ACTIONS: usize = 100;

/// How often a held handle is asked whether a write waits in it.
const HELD_POLL: Duration = Duration::from_millis(10);

/// How often everything about a held volume is looked at.
const HELD_LOOK: Duration = Duration::from_millis(if cfg!(test) { 20 } else { 1000 });

/// How often what waits for another node or for an operator is looked at.
const WAITING_LOOK: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 5000 });

/// How often a copy is looked at; a clone that fails must be noticed within a
/// second.
const COPY_LOOK: Duration = Duration::from_millis(if cfg!(test) { 5 } else { 250 });

/// How long after a failure the same is tried again.
const RETRY: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 1000 });

/// What went wrong: one variant per kind of answer.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The request cannot be granted; nothing was changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// An argument is not of its form.
    #[error("{field}: {problem}")]
    Argument {
        /// Which.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The id is not a lower-case UUID.
    #[error("{0}")]
    Id(String),
    /// LVM or the kernel did not do something.
    #[error("{step}: {source}")]
    Step {
        /// What was to be done.
        step: String,
        /// Why it was not.
        source: StepError,
    },
    /// The other node did not do something.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The fenced source has another size.
    #[error("the source has {source_bytes} bytes, this copy {here}")]
    SizeMismatch {
        /// Bytes at the source.
        source_bytes: u64,
        /// Bytes here.
        here: u64,
    },
    /// The journal cannot be written.
    #[error(transparent)]
    Journal(#[from] StoreError),
    /// A defect.
    #[error("{0}")]
    Internal(String),
    /// Undoing what a failed request had begun failed as well.
    #[error("{cause}; undoing it failed too: {undo}")]
    Undo {
        /// The first failure.
        cause: Box<ServiceError>,
        /// The second.
        undo: Box<ServiceError>,
    },
}

impl ServiceError {
    /// The step that failed, where it was one.
    pub fn step(&self) -> Option<&str> {
        match self {
            Self::Step { step, .. } => Some(step),
            Self::Undo { cause, .. } => cause.step(),
            Self::Refused(_)
            | Self::Argument { .. }
            | Self::Id(_)
            | Self::Peer(_)
            | Self::SizeMismatch { .. }
            | Self::Journal(_)
            | Self::Internal(_) => None,
        }
    }
}

impl From<JoinError> for ServiceError {
    fn from(error: JoinError) -> Self {
        Self::Internal(format!("a task ended early: {error}"))
    }
}

/// Where converging came to rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// Nothing is to be done until a request comes.
    Settled,
    /// Something else must happen first.
    Wait(Wait),
    /// The volume has left this node.
    Gone,
}

/// What readers see of a volume.
#[derive(Debug, Clone)]
pub struct View {
    /// What the journal says.
    pub record: Record,
    /// What was there at the last look.
    pub seen: Option<Seen>,
    /// Why it is as it is, for people.
    pub detail: String,
    /// Bytes copied per second.
    pub rate: Option<u64>,
    /// Since when the source has been silent.
    pub stalled_since: Option<SystemTime>,
}

/// A copy of a volume: which volume, and in which generation the copy came to be.
pub type Copy = (VolumeId, Generation);

/// A copy's place in memory.
#[derive(Debug)]
pub struct Slot {
    id: VolumeId,
    generation: Generation,
    work: tokio::sync::Mutex<Work>,
    view: watch::Sender<Option<View>>,
    nudge: Arc<Notify>,
}

/// What only the holder of a volume's lock may see or change.
#[derive(Debug, Default)]
pub struct Work {
    /// What the journal says; none before creation and after the end.
    pub record: Option<Record>,
    progress: Progress,
    rest: Option<Rest>,
    detail: String,
    /// Why the pool's logical volumes could not be activated at the last try.
    inactive: Option<String>,
    left: bool,
    /// Ask no other node now.
    silent: bool,
    /// A request waits for this copy to be made of another.
    asked: bool,
    /// It holds that one's lock as well.
    steady: bool,
    activity: Activity,
    attempt: Option<Attempt>,
    source_map: Asked,
}

impl Work {
    /// Whether a request has left it half-made of another copy.
    pub fn is_half_made(&self) -> bool {
        self.record.as_ref().is_some_and(|record| record.lineage.template.is_some())
    }

    /// Whether a request waits for it to be made, perhaps without its lock.
    pub const fn is_asked(&self) -> bool {
        self.asked
    }

    /// A request waits for it to be made, or does so no more.
    pub const fn ask(&mut self, asked: bool) {
        self.asked = asked;
    }

    /// Why the volume is as it is, for people.
    pub fn detail(&self) -> &str {
        &self.detail
    }
}

/// A connection to a source, tried beside everything else: the volume's lock is
/// not held meanwhile.
#[derive(Debug)]
struct Attempt {
    task: JoinHandle<()>,
    /// Not again before.
    until: Instant,
}

impl Attempt {
    fn is_recent(&self) -> bool {
        !self.task.is_finished() || Instant::now() < self.until
    }
}

/// A node's volumes.
pub struct Volumes {
    /// The configuration.
    pub config: Config,
    /// The journal.
    pub store: Store,
    /// The kernel and LVM.
    pub kernel: Arc<dyn Kernel>,
    /// Other nodes.
    pub peers: Arc<dyn Peers>,
    slots: Mutex<BTreeMap<Copy, Arc<Slot>>>,
    changes: broadcast::Sender<VolumeId>,
    pools: Mutex<BTreeMap<String, PoolFacts>>,
    hydrations: Hydrations,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Volumes {
    /// Opens the journal's records; nothing is touched yet.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub fn open(
        config: Config,
        store: Store,
        kernel: Arc<dyn Kernel>,
        peers: Arc<dyn Peers>,
    ) -> Result<Arc<Self>, ServiceError> {
        let records = store.records()?;
        let (changes, _) = broadcast::channel(256);
        let volumes = Self {
            hydrations: Hydrations::new(&config.hydration),
            config,
            store,
            kernel,
            peers,
            slots: Mutex::default(),
            changes,
            pools: Mutex::default(),
        };
        let mut slots = BTreeMap::new();
        for record in records {
            let copy = (record.id, record.made_in);
            let slot = Slot::new(copy);
            slot.view.send_replace(Some(View::new(&record)));
            slot.work
                .try_lock()
                .map_err(|error| ServiceError::Internal(error.to_string()))?
                .record = Some(record.clone());
            slots.insert(copy, Arc::new(slot));
        }
        *locked(&volumes.slots) = slots;
        Ok(Arc::new(volumes))
    }

    /// Recovery: consumers first whom a process has left waiting, because LVM may take
    /// long; then exports, so that other nodes' copies go on; everything else after
    /// that, and without waiting for any peer.
    ///
    /// # Errors
    /// Never for one volume's sake; each goes on trying by itself.
    pub async fn recover(self: &Arc<Self>) -> Result<(), ServiceError> {
        let slots: Vec<_> = locked(&self.slots).values().cloned().collect();
        for slot in &slots {
            self.let_go_on(slot).await?;
        }
        let kernel = Arc::clone(&self.kernel);
        if let Err(error) = tokio::task::spawn_blocking(move || kernel.activate(None)).await? {
            warn!(%error, "not all logical volumes could be activated");
        }
        let (sources, others): (Vec<_>, Vec<_>) = slots.into_iter().partition(|slot| {
            slot.view.borrow().as_ref().is_some_and(|view| view.record.lent().is_some())
        });
        for slot in &sources {
            let mut work = slot.work.lock().await;
            // A peer may be booting and waiting for this node: its task asks later.
            work.silent = true;
            if let Err(error) = self.converge(slot, &mut work).await {
                warn!(volume = %slot.id, step = error.step(), %error, "not yet recovered");
            }
            work.silent = false;
        }
        for slot in sources.into_iter().chain(others) {
            slot.nudge.notify_one();
            tokio::spawn(Arc::clone(self).tend(slot));
        }
        Ok(())
    }

    /// What waits for a process that has died goes on. Whatever keeps it from that is
    /// found again by the copy's own task.
    async fn let_go_on(&self, slot: &Slot) -> Result<(), ServiceError> {
        let record = slot.work.lock().await.record.clone();
        let Some(record) = record.filter(plan::may_be_left_waiting) else { return Ok(()) };
        let kernel = Arc::clone(&self.kernel);
        let gone_on = tokio::task::spawn_blocking(move || {
            // The clone, its discards, the handle; what fails is not tried for ever.
            for _ in 0..4 {
                let Some(step) = plan::left_waiting(&record, &kernel.look(&record)?) else { break };
                info!(volume = %record.id, ?step, "goes on");
                kernel.apply(&record, &step)?;
            }
            Ok::<_, StepError>(())
        });
        if let Err(error) = gone_on.await? {
            warn!(volume = %slot.id, %error, "what was left waiting does not go on yet");
        }
        Ok(())
    }

    /// The slot of a copy, made if it is absent.
    fn slot(self: &Arc<Self>, copy: Copy) -> Arc<Slot> {
        let mut slots = locked(&self.slots);
        if let Some(slot) = slots.get(&copy) {
            return Arc::clone(slot);
        }
        let slot = Arc::new(Slot::new(copy));
        slots.insert(copy, Arc::clone(&slot));
        tokio::spawn(Arc::clone(self).tend(Arc::clone(&slot)));
        slot
    }

    /// Runs `work` with the copy's lock held, on the slot that is current.
    pub async fn with<T>(
        self: &Arc<Self>,
        copy: Copy,
        work: impl AsyncFnOnce(&Slot, &mut Work) -> T,
    ) -> T {
        loop {
            let slot = self.slot(copy);
            let mut guard = slot.work.lock().await;
            if guard.left {
                continue;
            }
            return self.working(&slot, &mut guard, work).await;
        }
    }

    /// The same for the copy that calls mean which name no generation: the newest,
    /// or the first of a volume that is not here.
    pub async fn with_newest<T>(
        self: &Arc<Self>,
        id: VolumeId,
        work: impl AsyncFnOnce(&Slot, &mut Work) -> T,
    ) -> T {
        loop {
            let newest = self.view(id).map_or(Generation::FIRST, |view| view.record.made_in);
            let slot = self.slot((id, newest));
            let mut guard = slot.work.lock().await;
            // It may have gone, or another come, while the lock was waited for.
            let now = self.view(id).map_or(Generation::FIRST, |view| view.record.made_in);
            if guard.left || now != newest {
                if guard.record.is_none() && !guard.left {
                    self.leave(&slot, &mut guard);
                }
                continue;
            }
            return self.working(&slot, &mut guard, work).await;
        }
    }

    async fn working<T>(
        &self,
        slot: &Slot,
        guard: &mut Work,
        work: impl AsyncFnOnce(&Slot, &mut Work) -> T,
    ) -> T {
        let outcome = work(slot, guard).await;
        if guard.record.is_none() {
            self.leave(slot, guard);
        }
        slot.nudge.notify_one();
        outcome
    }

    /// Takes an empty slot out of the map; its task ends.
    fn leave(&self, slot: &Slot, work: &mut Work) {
        work.left = true;
        self.hydrations.place(slot.copy(), None, 0, Instant::now());
        locked(&self.slots).remove(&slot.copy());
    }

    /// What readers see of a volume's newest copy.
    pub fn view(&self, id: VolumeId) -> Option<View> {
        self.copies(id).pop()
    }

    /// What readers see of a volume's copies, the oldest first.
    pub fn copies(&self, id: VolumeId) -> Vec<View> {
        let of_volume = (id, Generation::FIRST)..=(id, Generation(u64::MAX));
        let slots: Vec<_> =
            locked(&self.slots).range(of_volume).map(|(_, slot)| Arc::clone(slot)).collect();
        slots.iter().filter_map(|slot| slot.view.borrow().clone()).collect()
    }

    /// What readers see of a snapshot.
    pub fn snapshot(&self, id: VolumeId) -> Option<View> {
        self.view_of((id, Generation::SNAPSHOT))
    }

    /// What readers see of one copy.
    pub fn view_of(&self, copy: Copy) -> Option<View> {
        let slot = locked(&self.slots).get(&copy).cloned();
        slot.and_then(|slot| slot.view.borrow().clone())
    }

    /// A copy for whose sake a snapshot must stay.
    pub fn reader(&self, snapshot: VolumeId) -> Option<VolumeId> {
        let views = self.views();
        let reads = |view: &&View| view.record.reads(snapshot);
        views.iter().find(reads).map(|view| view.record.id)
    }

    /// A snapshot that waits for its readers looks whether this was the last.
    fn tell_snapshot(&self, changed: &Record) {
        let Some(Origin::Snapshot(id)) = changed.lineage.made_of else { return };
        if let Some(slot) = locked(&self.slots).get(&(id, Generation::SNAPSHOT)) {
            slot.nudge.notify_one();
        }
    }

    /// Runs `work` with two copies' locks held. They are taken in the order of their
    /// names, so that no two requests wait for each other.
    pub async fn with_both<T>(
        self: &Arc<Self>,
        one: Copy,
        other: Copy,
        work: impl AsyncFnOnce((&Slot, &mut Work), (&Slot, &mut Work)) -> T,
    ) -> T {
        debug_assert_ne!(one, other, "a lock that is held already");
        if one < other {
            self.with(one, async |slot, held| {
                self.with(other, async |second, below| work((slot, held), (second, below)).await)
                    .await
            })
            .await
        } else {
            self.with(other, async |second, below| {
                self.with(one, async |slot, held| work((slot, held), (second, below)).await).await
            })
            .await
        }
    }

    /// What readers see of every copy and snapshot, sorted by id and generation.
    pub fn views(&self) -> Vec<View> {
        let slots: Vec<_> = locked(&self.slots).values().cloned().collect();
        slots.iter().filter_map(|slot| slot.view.borrow().clone()).collect()
    }

    /// The ids of volumes as they change.
    pub fn changes(&self) -> broadcast::Receiver<VolumeId> {
        self.changes.subscribe()
    }

    /// A pool's facts from memory, or from LVM when they are not there yet or
    /// `fresh` ones are asked for.
    ///
    /// # Errors
    /// LVM cannot be asked, or the pool is not there.
    pub async fn pool_facts(
        &self,
        name: &str,
        fresh: bool,
    ) -> Result<Option<PoolFacts>, ServiceError> {
        if !fresh && let Some(facts) = locked(&self.pools).get(name) {
            return Ok(Some(facts.clone()));
        }
        let (kernel, owned) = (Arc::clone(&self.kernel), name.to_owned());
        let facts =
            tokio::task::spawn_blocking(move || kernel.pool(&owned)).await?.map_err(|source| {
                ServiceError::Step { step: format!("look at pool {name}"), source }
            })?;
        let mut pools = locked(&self.pools);
        match &facts {
            Some(facts) => pools.insert(name.to_owned(), facts.clone()),
            None => pools.remove(name),
        };
        Ok(facts)
    }

    async fn tend(self: Arc<Self>, slot: Arc<Slot>) {
        let mut next_look = Instant::now();
        loop {
            let (rest, is_offered, is_starved) = {
                let work = slot.work.lock().await;
                let is_offered = work.record.as_ref().is_some_and(is_offered_with_hold);
                (work.rest, is_offered, work.progress.pushes.is_starved())
            };
            let pause = match rest {
                Some(Rest::Settled) => None,
                Some(Rest::Wait(Wait::Switch)) => Some(HELD_POLL),
                Some(Rest::Wait(Wait::Hydration)) if is_starved => Some(pushes::LOOK),
                Some(Rest::Wait(Wait::Hydration | Wait::Source | Wait::Lost | Wait::Map)) => {
                    Some(COPY_LOOK)
                }
                Some(Rest::Wait(Wait::Remote)) => Some(RETRY),
                Some(Rest::Wait(Wait::Pool)) => Some(RETRY * 2),
                Some(Rest::Wait(Wait::Peer)) if is_offered => Some(activity::LOOK),
                Some(Rest::Wait(Wait::Operator | Wait::Peer | Wait::Readers | Wait::Request)) => {
                    Some(WAITING_LOOK)
                }
                None => Some(RETRY),
                Some(Rest::Gone) => return,
            };
            let nudged = match pause {
                None => {
                    slot.nudge.notified().await;
                    true
                }
                Some(pause) => timeout(pause, slot.nudge.notified()).await.is_ok(),
            };
            let mut work = slot.work.lock().await;
            if work.left {
                return;
            }
            let Some(record) = work.record.clone() else {
                // Made by a request that has not admitted anything.
                self.leave(&slot, &mut work);
                return;
            };
            if rest == Some(Rest::Wait(Wait::Switch)) && !nudged && Instant::now() < next_look {
                let stage = record.receiving().map(|receiving| receiving.stage);
                if stage == Some(ReceivingStage::Refused) {
                    // Whatever waits, waits for an operator.
                    continue;
                }
                let (kernel, record) = (Arc::clone(&self.kernel), record.clone());
                let held = tokio::task::spawn_blocking(move || kernel.held(&record)).await;
                if matches!(held, Ok(Ok(0))) {
                    continue;
                }
            }
            if rest == Some(Rest::Wait(Wait::Peer))
                && is_offered
                && !nudged
                && Instant::now() < next_look
            {
                if let Err(error) = self.look_for_writes(&mut work).await {
                    debug!(volume = %slot.id, %error, "writes cannot be counted");
                }
                continue;
            }
            let pause = if is_offered { WAITING_LOOK } else { HELD_LOOK };
            next_look = Instant::now() + pause;
            if rest == Some(Rest::Wait(Wait::Pool)) {
                let (kernel, pool) = (Arc::clone(&self.kernel), record.pool.clone());
                let activated = tokio::task::spawn_blocking(move || kernel.activate(Some(&pool)));
                // Told only where the volume still waits after this.
                let why = match activated.await {
                    Ok(Ok(())) => "their volume group is active without them".to_owned(),
                    Ok(Err(error)) => error.to_string(),
                    Err(error) => error.to_string(),
                };
                work.inactive = Some(why);
            }
            if is_offered && let Err(error) = self.look_for_writes(&mut work).await {
                debug!(volume = %slot.id, %error, "writes cannot be counted");
            }
            let before = work.detail.clone();
            if let Err(error) = self.converge(&slot, &mut work).await
                && work.detail != before
            {
                warn!(volume = %slot.id, step = error.step(), %error, "will be tried again");
            }
            if work.rest == Some(Rest::Wait(Wait::Pool)) && work.detail != before {
                warn!(volume = %slot.id, why = work.detail, "the pool is still away");
            }
            if work.record.is_none() {
                self.leave(&slot, &mut work);
                return;
            }
            if work.rest.is_none() {
                // A failure is not tried again at once, however it was woken.
                drop(work);
                sleep(RETRY).await;
            }
        }
    }

    /// The same for a copy that is made of another, whose lock is held as well.
    ///
    /// # Errors
    /// The first action that failed.
    pub async fn converge_asked(
        self: &Arc<Self>,
        slot: &Slot,
        work: &mut Work,
    ) -> Result<Rest, ServiceError> {
        let asked = std::mem::replace(&mut work.asked, true);
        work.steady = true;
        let outcome = self.converge(slot, work).await;
        (work.asked, work.steady) = (asked, false);
        outcome
    }

    /// Acts until nothing more can be done now.
    ///
    /// # Errors
    /// The first action that failed; the same call tries it again.
    pub async fn converge(
        self: &Arc<Self>,
        slot: &Slot,
        work: &mut Work,
    ) -> Result<Rest, ServiceError> {
        let outcome = self.converging(slot, work).await;
        match &outcome {
            Ok(rest) => {
                work.rest = Some(*rest);
                let inactive = work.inactive.as_deref();
                let detail = work.record.as_ref();
                let detail = detail.map(|r| describe(r, *rest, &work.progress, inactive));
                work.detail = detail.unwrap_or_default();
            }
            Err(error) => {
                work.rest = None;
                work.detail = error.to_string();
            }
        }
        self.publish(slot, work, None);
        outcome
    }

    async fn converging(
        self: &Arc<Self>,
        slot: &Slot,
        work: &mut Work,
    ) -> Result<Rest, ServiceError> {
        for _ in 0..MAX_ACTIONS {
            let Some(record) = work.record.clone() else { return Ok(Rest::Gone) };
            if !plan::needs_source(&record)
                && let Some(attempt) = work.attempt.take()
            {
                // What it makes must be there to be taken down.
                attempt.task.await?;
            }
            let seen = self.look(&record, work).await?;
            self.publish(slot, work, Some(seen.clone()));
            let next = plan::next(&record, &seen);
            debug!(volume = %slot.id, ?next, "next");
            match next {
                Next::Do(steps) if plan::is_attempt(&record, &steps) => {
                    work.attempt = steps.into_iter().next().map(|step| self.attempt(&record, step));
                }
                Next::Do(steps) => {
                    let loads = steps.iter().any(is_armed_load);
                    match self.apply_all(&record, steps, work).await.1 {
                        // Its metadata is not what the journal knows: nothing but
                        // an operator can say what is here.
                        Err(ServiceError::Step { source: StepError::Refused(why), .. })
                            if loads =>
                        {
                            let failure = Failure { why, boot: seen.boot };
                            self.journal(slot, work, Event::Failed(failure)).await?;
                        }
                        outcome => outcome?,
                    }
                }
                Next::DoThen(step @ Step::Seed(_), event) => {
                    if let Err(error) = self.apply(&record, step, work).await {
                        // Never the move's failure: what cannot be marked is copied.
                        warn!(volume = %record.id, %error, "what was never written is not marked");
                        work.source_map.failed_here();
                        return Ok(Rest::Wait(Wait::Map));
                    }
                    work.progress.restart();
                    self.journal(slot, work, event).await?;
                }
                Next::DoThen(step, event) => {
                    self.apply(&record, step, work).await?;
                    self.journal(slot, work, event).await?;
                }
                Next::Allocate(steps) => {
                    let (event, outcome) = self.apply_all(&record, steps, work).await;
                    if let Some(event) = event {
                        self.journal(slot, work, event).await?;
                    }
                    outcome?;
                }
                Next::JournalFloor => {
                    let kernel = Arc::clone(&self.kernel);
                    let floor = tokio::task::spawn_blocking(move || kernel.committed(&record))
                        .await?
                        .map_err(|source| ServiceError::Step { step: "commit".into(), source })?;
                    self.journal(slot, work, Event::Floor(floor)).await?;
                }
                Next::Journal(event) => self.journal(slot, work, event).await?,
                Next::AskForMap => {
                    if let Some(receiving) = record.receiving() {
                        let (peer, claim) = source_of(&record, receiving);
                        let (peers, nudge) = (Arc::clone(&self.peers), Arc::clone(&slot.nudge));
                        let question = (peer, record.id, claim, receiving.region);
                        work.source_map.ask(peers, nudge, question);
                    }
                }
                Next::Ask(_) | Next::AskThenForget(_) if work.silent => {
                    return Ok(Rest::Wait(Wait::Peer));
                }
                Next::Ask(call) => {
                    let event = self.ask(slot, work, &record, call).await?;
                    if record.clone().after(event.clone()).as_ref() == Ok(&record) {
                        // The source's agent answers although the source does not yet.
                        return Ok(Rest::Wait(Wait::Source));
                    }
                    self.journal(slot, work, event).await?;
                }
                Next::AskThenForget(call) => {
                    self.take_leave(&record, call).await?;
                    self.forget(slot, work, &record).await?;
                }
                Next::Wait(wait) => return Ok(Rest::Wait(wait)),
                Next::Settled => return Ok(Rest::Settled),
                Next::Forget(steps) => {
                    for step in steps {
                        self.apply(&record, step, work).await?;
                    }
                    self.forget(slot, work, &record).await?;
                }
            }
        }
        Err(ServiceError::Internal("acting changes nothing".into()))
    }

    /// Everything that is there for a copy.
    ///
    /// # Errors
    /// Something cannot be asked.
    pub async fn look(&self, record: &Record, work: &mut Work) -> Result<Seen, ServiceError> {
        let (kernel, owned) = (Arc::clone(&self.kernel), record.clone());
        let hydrating = record.receiving().is_some_and(|r| r.stage == ReceivingStage::Hydrating);
        let (seen, usage) = tokio::task::spawn_blocking(move || {
            // A pool that cannot be asked counts as full.
            let full = |_| PoolUsage { data: 1.0, metadata: 1.0, zeroes: false };
            let usage = hydrating.then(|| kernel.pool_usage(&owned.pool).unwrap_or_else(full));
            (kernel.look(&owned), usage)
        })
        .await?;
        let copy = (record.id, record.made_in);
        let mut seen = seen.map_err(|source| {
            // Whoever cannot be looked at takes nobody's place.
            self.hydrations.place(copy, None, 0, Instant::now());
            ServiceError::Step { step: "look".into(), source }
        })?;
        let high = self.config.pool(&record.pool).map_or(100.0, |pool| pool.high_water_percent);
        let is_high = usage.is_some_and(|usage| usage.scarcest() * 100.0 >= high);
        seen.map = work.source_map.map();
        seen.connecting = work.attempt.as_ref().is_some_and(Attempt::is_recent);
        (seen.asked, seen.steady) = (work.asked, work.steady);
        seen.read = record.taken().is_some() && self.reader(record.id).is_some();
        let now = Instant::now();
        let share = work.progress.observe(record, &mut seen, is_high, now);
        let place = self.hydrations.place(copy, share.candidate, share.copied, now);
        work.progress.place(&mut seen, place, self.hydrations.is_spent(), now);
        seen.push = work.progress.pushes.due(now, self.hydrations.push_percent());
        Ok(seen)
    }

    /// Notes whether a source that is offered was written. Returns whether anybody can
    /// write it at all.
    async fn look_for_writes(&self, work: &mut Work) -> Result<bool, ServiceError> {
        let record = work.record.clone().filter(is_offered_with_hold);
        let written = match record {
            None => None,
            Some(record) => {
                let kernel = Arc::clone(&self.kernel);
                tokio::task::spawn_blocking(move || kernel.written(&record))
                    .await?
                    .map_err(|source| ServiceError::Step { step: "look".into(), source })?
            }
        };
        match written {
            Some(written) => work.activity.saw(written, Instant::now()),
            None => work.activity = Activity::default(),
        }
        Ok(written.is_some())
    }

    /// What speaks for it that the guest has left this source; takes up to
    /// 100 ms where it has only just written.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub async fn evidence(&self, work: &mut Work) -> Result<Evidence, ServiceError> {
        let mut open = self.look_for_writes(work).await?;
        // What that look found may have been written before the question.
        let asked = Instant::now();
        while open {
            match work.activity.verdict(asked, Instant::now()) {
                Verdict::Quiet => break,
                Verdict::Writing => return Ok(Evidence::Writing),
                Verdict::Wait => sleep(activity::CLOSE_LOOK).await,
            }
            open = self.look_for_writes(work).await?;
        }
        Ok(Evidence::Quiet)
    }

    /// Waits for the outcome of a step that nobody waits for otherwise.
    pub async fn await_attempt(&self, work: &mut Work) {
        if let Some(attempt) = &mut work.attempt {
            // What became of it shows in the next look.
            let _ = (&mut attempt.task).await;
        }
    }

    /// Begins a step that nobody waits for; the next look finds its outcome.
    fn attempt(&self, record: &Record, step: Step) -> Attempt {
        let (kernel, record) = (Arc::clone(&self.kernel), record.clone());
        let task = tokio::task::spawn_blocking(move || {
            if let Err(error) = kernel.apply(&record, &step) {
                debug!(volume = %record.id, step = name_of(&step), %error, "not yet");
            }
        });
        Attempt { task, until: Instant::now() + RETRY * 2 }
    }

    async fn apply(
        &self,
        record: &Record,
        step: Step,
        work: &mut Work,
    ) -> Result<Option<Event>, ServiceError> {
        let (kernel, owned, acted) = (Arc::clone(&self.kernel), record.clone(), step.clone());
        let began = Instant::now();
        let outcome = tokio::task::spawn_blocking(move || kernel.apply(&owned, &acted)).await?;
        debug!(volume = %record.id, ?step, ?outcome, "step");
        match &step {
            Step::Tune { threshold, batch } if outcome.is_ok() => {
                work.progress.tuned = Some((*threshold, *batch));
            }
            Step::LoadClone { .. } | Step::Seed(_) => work.progress.tuned = None,
            Step::Push { how, .. } => {
                let (percent, took) = (self.hydrations.push_percent(), began.elapsed());
                work.progress.pushes.pushed(*how, took, percent, Instant::now());
            }
            Step::OpenHandle(_) => work.progress.cache_dropped = false,
            Step::DropCache(_) => work.progress.cache_dropped = outcome.is_ok(),
            Step::Set(Role::Export, _) => work.progress.announced = false,
            Step::Announce(_) => work.progress.announced = outcome.is_ok(),
            // Counted down rather than asked for again: LVM is slow to answer, and
            // refuses by itself what does not fit.
            Step::Allocate { meta: Some(meta), .. } | Step::Fork { meta, .. } => {
                if let Some(facts) = locked(&self.pools).get_mut(&record.pool) {
                    facts.free_outside = facts.free_outside.saturating_sub(*meta);
                }
            }
            _ => {}
        }
        if let (Step::Fork { of, .. }, Err(StepError::TimedOut(why) | StepError::Busy(why))) =
            (&step, &outcome)
        {
            let id = of.moving.as_ref().map_or(record.id, |moving| moving.id);
            return Err(Refusal::VolumeBusy { id, why: why.clone() }.into());
        }
        if let (Step::Allocate { .. } | Step::Fork { .. }, Err(StepError::Failed(why))) =
            (&step, &outcome)
            && !matches!(self.pool_facts(&record.pool, true).await, Ok(Some(_)))
        {
            return Err(Refusal::PoolMissing { pool: record.pool.clone(), why: why.clone() }.into());
        }
        outcome.map_err(|source| match source {
            StepError::NoRoom(_) => {
                Refusal::NoRoom { pool: record.pool.clone(), needed: record.size.bytes(), free: 0 }
                    .into()
            }
            source => ServiceError::Step { step: name_of(&step), source },
        })
    }

    /// All at the same time. Returns the event that the first yields, and the
    /// first failure once all have ended.
    async fn apply_all(
        &self,
        record: &Record,
        steps: Vec<Step>,
        work: &mut Work,
    ) -> (Option<Event>, Result<(), ServiceError>) {
        // Steps that go together have no effect on `work`; the first may.
        let mut steps = steps.into_iter();
        let first = steps.next();
        let others: Vec<_> = steps
            .map(|step| {
                let (kernel, record) = (Arc::clone(&self.kernel), record.clone());
                tokio::task::spawn_blocking(move || {
                    kernel
                        .apply(&record, &step)
                        .map_err(|source| ServiceError::Step { step: name_of(&step), source })
                })
            })
            .collect();
        let (event, mut outcome) = match first {
            Some(step) => match self.apply(record, step, work).await {
                Ok(event) => (event, Ok(())),
                Err(error) => (None, Err(error)),
            },
            None => (None, Ok(())),
        };
        for other in others {
            let ended = other.await.map_err(ServiceError::from).flatten();
            if outcome.is_ok() {
                outcome = ended.map(drop);
            }
        }
        (event, outcome)
    }

    /// Journals an event and only then believes it.
    pub async fn journal(
        &self,
        slot: &Slot,
        work: &mut Work,
        event: Event,
    ) -> Result<(), ServiceError> {
        let Some(record) = work.record.clone() else { return Ok(()) };
        let stones = record.stone_of(&event).into_iter().collect();
        info!(volume = %record.id, ?event, "journal");
        if matches!(event, Event::Seeded | Event::SeedingSkipped) {
            work.source_map.forget();
        }
        let fenced = matches!(event, Event::SourceFenced | Event::Forked { .. });
        let mut after =
            record.after(event).map_err(|error| ServiceError::Internal(error.to_string()))?;
        if fenced {
            let turns = self
                .views()
                .into_iter()
                .filter_map(|view| view.record.receiving().map(|receiving| receiving.turn));
            after.set_turn(schedule::next_turn(turns));
        }
        self.put(slot, work, after, stones).await
    }

    /// Journals a record.
    pub async fn put(
        &self,
        slot: &Slot,
        work: &mut Work,
        record: Record,
        stones: Vec<Tombstone>,
    ) -> Result<(), ServiceError> {
        self.store_put(&record, &stones)?;
        self.tell_snapshot(&record);
        work.record = Some(record);
        self.publish(slot, work, None);
        Ok(())
    }

    fn store_put(&self, record: &Record, stones: &[Tombstone]) -> Result<(), StoreError> {
        tokio::task::block_in_place(|| self.store.put(record, stones))
    }

    async fn forget(
        &self,
        slot: &Slot,
        work: &mut Work,
        record: &Record,
    ) -> Result<(), ServiceError> {
        info!(volume = %record.id, "gone");
        let stones = record.epitaphs();
        tokio::task::block_in_place(|| self.store.forget(record.id, record.made_in, &stones))?;
        work.record = None;
        self.publish(slot, work, None);
        self.tell_snapshot(record);
        Ok(())
    }

    /// Asks the other node; the answer is an event.
    async fn ask(
        &self,
        slot: &Slot,
        work: &mut Work,
        record: &Record,
        call: Call,
    ) -> Result<Event, ServiceError> {
        let boot = self.kernel.boot();
        match (call, record.receiving(), &record.lent_before) {
            (Call::Fence, Some(receiving), _) => {
                let (peer, claim) = source_of(record, receiving);
                match self.peers.fence(&peer, record.id, &claim, receiving.forced).await {
                    Ok(size) if size == receiving.length.bytes() => Ok(Event::SourceFenced),
                    // It grew while it was held: nothing is kept here yet.
                    Ok(size) if size > receiving.length.bytes() && receiving.source.hold => {
                        Ok(Event::SourceGrew(Sectors::from_bytes(size)))
                    }
                    Ok(size) => Err(ServiceError::SizeMismatch {
                        source_bytes: size,
                        here: receiving.length.bytes(),
                    }),
                    Err(error) if has_lost_power(&error) => Ok(record.source_lost_power(boot)),
                    Err(error) if has_taken_back(&error) => Ok(Event::ReturnAsked),
                    // Any other refusal says nothing about what will be: asked again.
                    Err(error) if ends_the_grant(&error) => {
                        self.journal(slot, work, Event::SourceRefused).await?;
                        Err(error.into())
                    }
                    Err(error) => Err(error.into()),
                }
            }
            (Call::Serve, Some(receiving), _) => {
                let (peer, claim) = source_of(record, receiving);
                let refused = Event::SourceRefused;
                match self.peers.serve(&peer, record.id, &claim, receiving.forced).await {
                    Ok(size) if size == record.size.bytes() => Ok(Event::SourceServes(boot)),
                    Ok(size) if size > record.size.bytes() && receiving.source.hold => {
                        Ok(Event::SourceGrew(Sectors::from_bytes(size)))
                    }
                    Ok(size) => Err(ServiceError::SizeMismatch {
                        source_bytes: size,
                        here: record.size.bytes(),
                    }),
                    Err(error) if has_lost_power(&error) => Ok(record.source_lost_power(boot)),
                    Err(error) if has_taken_back(&error) => Ok(Event::ReturnAsked),
                    Err(error)
                        if ends_the_grant(&error)
                            && record.clone().after(refused.clone()).is_ok() =>
                    {
                        self.journal(slot, work, refused).await?;
                        Err(error.into())
                    }
                    Err(error) => Err(error.into()),
                }
            }
            (Call::Copy, Some(receiving), _) => {
                let nothing = || ServiceError::Internal("it is made of nothing".into());
                let request = CopyRequest::of(record).ok_or_else(nothing)?;
                let (peer, _) = source_of(record, receiving);
                match self.peers.copy(&peer, &request).await? {
                    (export, size) if size == receiving.length.bytes() => {
                        Ok(Event::CopyGranted(export))
                    }
                    (_, size) => Err(ServiceError::SizeMismatch {
                        source_bytes: size,
                        here: receiving.length.bytes(),
                    }),
                }
            }
            (Call::Release, Some(_), _) => {
                self.take_leave(record, call).await.map(|()| Event::SourceReleased)
            }
            (Call::QueryGrant, _, None) => Ok(Event::Confirmed(boot)),
            (Call::QueryGrant, _, Some(borrower)) => {
                let claim = Claim {
                    grant: borrower.grant,
                    incarnation: record.incarnation,
                    generation: record.generation,
                    session: 0,
                };
                match self.peers.query(&Peer::from(borrower), record.id, &claim).await?.taken {
                    false => Ok(Event::Confirmed(boot)),
                    true => {
                        Err(Refusal::VolumeFenced { id: record.id, node: borrower.node.clone() }
                            .into())
                    }
                }
            }
            (call, ..) => {
                let phase = &record.phase;
                Err(ServiceError::Internal(format!("{call:?} makes no sense in {phase:?}")))
            }
        }
    }

    /// Tells the source that its grant is not used, or that its copy is not needed
    /// any more.
    async fn take_leave(&self, record: &Record, call: Call) -> Result<(), ServiceError> {
        let Some(receiving) = record.receiving() else { return Ok(()) };
        let (peer, claim) = source_of(record, receiving);
        let answer = match call {
            Call::Release => self.peers.release(&peer, record.id, &claim).await,
            Call::Return => self.peers.give_back(&peer, record.id, &claim).await,
            Call::Fence | Call::Serve | Call::Copy | Call::Revoke | Call::QueryGrant => {
                self.peers.revoke(&peer, record.id, &claim).await
            }
        };
        match answer {
            Ok(()) => Ok(()),
            // Where a volume has gone back to is known for sure, or not at all.
            Err(error) if is_over(&error) && call != Call::Return => {
                info!(volume = %record.id, %error, "the source has no such grant any more");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn publish(&self, slot: &Slot, work: &Work, seen: Option<Seen>) {
        let view = work.record.as_ref().map(|record| {
            let seen = seen.or_else(|| slot.view.borrow().as_ref().and_then(|v| v.seen.clone()));
            View {
                record: record.clone(),
                seen,
                detail: work.detail.clone(),
                rate: work.progress.rate(),
                stalled_since: work.progress.stalled_since(),
            }
        });
        slot.view.send_replace(view);
        // Nobody listening is fine.
        let _ = self.changes.send(slot.id);
    }

    /// The handle of a volume, with or without a record.
    ///
    /// # Errors
    /// Device-mapper cannot be asked.
    pub async fn handle(&self, id: VolumeId) -> Result<Option<Device>, ServiceError> {
        let kernel = Arc::clone(&self.kernel);
        tokio::task::spawn_blocking(move || kernel.handle(id))
            .await?
            .map_err(|source| ServiceError::Step { step: "look".into(), source })
    }

    /// Journals that a grant which was never given is spent.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub fn bury(&self, stone: &Tombstone) -> Result<(), ServiceError> {
        Ok(tokio::task::block_in_place(|| self.store.bury(stone))?)
    }

    /// The tombstone of a grant.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub fn tombstone(&self, grant: Uuid) -> Result<Option<Tombstone>, ServiceError> {
        Ok(tokio::task::block_in_place(|| self.store.tombstone(grant))?)
    }
}

impl Slot {
    const fn copy(&self) -> Copy {
        (self.id, self.generation)
    }

    fn new((id, generation): Copy) -> Self {
        Self {
            id,
            generation,
            work: tokio::sync::Mutex::default(),
            view: watch::Sender::new(None),
            nudge: Arc::default(),
        }
    }
}

impl View {
    fn new(record: &Record) -> Self {
        Self {
            record: record.clone(),
            seen: None,
            detail: String::new(),
            rate: None,
            stalled_since: None,
        }
    }
}

/// Whether a volume may be written here until its borrower asks for the fence.
fn is_offered_with_hold(record: &Record) -> bool {
    record.lent().is_some_and(|lent| lent.hold && lent.stage == LentStage::Published)
}

fn source_of(record: &Record, receiving: &dmlocal_model::volume::Receiving) -> (Peer, Claim) {
    let source = &receiving.source;
    let peer = Peer { node: source.node.clone(), endpoint: source.endpoint.clone() };
    let claim = Claim {
        grant: source.grant,
        incarnation: record.incarnation,
        generation: source.generation,
        session: receiving.remote.as_ref().map_or(0, |remote| remote.session),
    };
    (peer, claim)
}

/// The other side knows of no such grant: there is nothing left to end.
fn is_over(error: &PeerError) -> bool {
    matches!(error, PeerError::Refused { reason, .. }
        if reason == "GRANT_UNKNOWN" || reason == "VOLUME_NOT_FOUND")
}

/// The source will never fence under this grant.
fn ends_the_grant(error: &PeerError) -> bool {
    matches!(error, PeerError::Refused { reason, .. }
        if reason == "GRANT_UNKNOWN" || reason == "GENERATION_STALE")
}

/// The source has lost power since this node's consumers were let in.
fn has_lost_power(error: &PeerError) -> bool {
    matches!(error, PeerError::Refused { reason, .. } if reason == "SESSION_STALE")
}

/// The source is the volume again, and nobody writes from here any more.
fn has_taken_back(error: &PeerError) -> bool {
    matches!(error, PeerError::Refused { reason, .. } if reason == "GRANT_RETURNED")
}

/// Whether a step loads a clone that may hold data already.
const fn is_armed_load(step: &Step) -> bool {
    matches!(step, Step::LoadClone { floor: Some(_), .. })
}

/// The step's name without its arguments.
fn name_of(step: &Step) -> String {
    let text = format!("{step:?}");
    text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
}
