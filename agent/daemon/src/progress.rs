//! What is known of a copy between two looks: rate, rest, and since when the
//! source has been silent. None of it is journalled; all of it is made anew
//! after a restart.

use std::{
    collections::VecDeque,
    time::{Duration, Instant, SystemTime},
};

use dmlocal_model::{
    forget,
    plan::Seen,
    schedule::{Candidate, Place},
    seeding::Seeding,
    table::CloneStatus,
    volume::{ReceivingStage, Record},
};

use crate::pushes::Pushes;

/// Time over which the rate is averaged.
const WINDOW: Duration = Duration::from_secs(5);

/// How long a copy may have its turn without a new region.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Progress of one volume's copy.
#[derive(Debug, Default)]
pub struct Progress {
    samples: VecDeque<(Instant, u64)>,
    /// Settings that the clone was last given by this process.
    pub tuned: Option<(u32, u32)>,
    /// Whether this process has dropped the handle's page cache since consumers
    /// may write.
    pub cache_dropped: bool,
    /// Whether this process has told the borrower of the export's size.
    pub announced: bool,
    budget: Option<Budget>,
    stalled_since: Option<SystemTime>,
    bytes_left: u64,
    pause: Option<Pause>,
    /// Since when it has had its turn without a new region.
    idle_since: Option<Instant>,
    /// How often it has had its turn in vain since its last new region.
    passes: u32,
    /// Whether consumers keep it from going on.
    pub pushes: Pushes,
}

/// Why copying must not go on at this moment, although it could.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// The pool is above its high-water mark.
    Pool,
    /// Its own byte rate is used up.
    Rate,
    /// The byte rate of the node is used up.
    NodeRate,
    /// Others come first.
    Turn {
        /// How many.
        before: usize,
    },
}

/// What a look at a copy means for the others of the node.
#[derive(Debug, Default)]
pub struct Share {
    /// The copy, if it could run.
    pub candidate: Option<Candidate>,
    /// Bytes that it has copied since the last look.
    pub copied: u64,
}

#[derive(Debug)]
struct Budget {
    rate: u64,
    since: Instant,
    copied_before: u64,
}

impl Progress {
    /// Takes a look into account, and tells it whether copying must rest for the
    /// copy's own sake.
    pub fn observe(
        &mut self,
        record: &Record,
        seen: &mut Seen,
        pool_is_high: bool,
        now: Instant,
    ) -> Share {
        seen.tuned = self.tuned;
        seen.cache_dropped = self.cache_dropped;
        seen.announced = self.announced;
        let there = record
            .receiving()
            .is_some_and(|r| r.remote.is_some() && r.stage.writes_there() && r.failure.is_none());
        let hydrating =
            record.receiving().filter(|receiving| receiving.stage == ReceivingStage::Hydrating);
        let (Some(receiving), Some(CloneStatus::Working { hydrated, total, .. })) =
            (hydrating, &seen.clone_status)
        else {
            let silent = there && (!seen.import.live || seen.path_failed);
            let stalled_since = silent.then(|| self.stalled_since.unwrap_or_else(SystemTime::now));
            let Self { tuned, cache_dropped, announced, .. } = *self;
            *self = Self { tuned, cache_dropped, announced, stalled_since, ..Self::default() };
            self.bytes_left = if there { record.size.bytes() } else { 0 };
            return Share::default();
        };
        let here = hydrated.saturating_mul(receiving.region.bytes());
        let copied = self.samples.back().map_or(0, |(_, before)| here.saturating_sub(*before));
        if copied > 0 {
            (self.idle_since, self.passes) = (None, 0);
        }
        self.bytes_left = forget::Lost::of(receiving, *hydrated).bytes;
        self.samples.push_back((now, here));
        while self.samples.len() > 2 && self.samples[1].0 + WINDOW < now {
            self.samples.pop_front();
        }
        let over_budget = self.over_budget(record.tuning.rate, here, now);
        self.pause = match (pool_is_high, over_budget) {
            (true, _) => Some(Pause::Pool),
            (false, true) => Some(Pause::Rate),
            (false, false) => None,
        };
        seen.resting = self.pause.is_some();
        let silent =
            hydrated < total && !receiving.forgotten && (!seen.import.live || seen.path_failed);
        self.stalled_since = silent.then(|| self.stalled_since.unwrap_or_else(SystemTime::now));
        let closed = record.lent().is_some_and(|lent| lent.stage.is_closed());
        let could = hydrated < total
            && forget::is_alive(seen)
            && !receiving.forgotten
            && receiving.failure.is_none()
            && receiving.seeding != Seeding::Wanted
            && !(record.tuning.paused || closed || seen.resting);
        let candidate = could.then(|| Candidate {
            source: receiving.source.node.clone(),
            priority: record.tuning.priority,
            passes: self.passes,
            turn: receiving.turn,
        });
        Share { candidate, copied }
    }

    /// Tells a look the copy's place among those of the node, and whether the node's
    /// byte rate is used up.
    pub fn place(&mut self, seen: &mut Seen, place: Option<Place>, is_spent: bool, now: Instant) {
        self.pause = match (self.pause, place) {
            (None, Some(Place::Waits { before })) => Some(Pause::Turn { before }),
            (None, Some(Place::Runs)) if is_spent => Some(Pause::NodeRate),
            (pause, _) => pause,
        };
        seen.resting = self.pause.is_some();
        let may_copy = place == Some(Place::Runs) && !seen.resting;
        match seen.clone_status {
            Some(CloneStatus::Working { enabled: true, hydrating, .. }) if may_copy => {
                self.pushes.observe(true, hydrating > 0);
            }
            _ => self.pushes.observe(false, false),
        }
        if !may_copy {
            self.idle_since = None;
        } else if *self.idle_since.get_or_insert(now) + PATIENCE <= now {
            // The others first.
            (self.idle_since, self.passes) = (None, self.passes.saturating_add(1));
        }
    }

    /// What counts as being here without having been copied is neither part of the rate
    /// nor spent.
    pub fn restart(&mut self) {
        self.samples.clear();
        self.budget = None;
    }

    fn over_budget(&mut self, rate: u64, here: u64, now: Instant) -> bool {
        if rate == 0 {
            self.budget = None;
            return false;
        }
        // A budget is spent over a few seconds, so that a pause earns nothing.
        let fresh = match &self.budget {
            Some(budget) => budget.rate != rate || budget.since + 2 * WINDOW < now,
            None => true,
        };
        if fresh {
            let over = self.budget.as_ref().is_some_and(|budget| {
                budget.rate == rate
                    && here.saturating_sub(budget.copied_before) > budget.earned(now)
            });
            if !over {
                self.budget = Some(Budget { rate, since: now, copied_before: here });
            }
        }
        self.budget
            .as_ref()
            .is_some_and(|budget| here.saturating_sub(budget.copied_before) > budget.earned(now))
    }

    /// Bytes per second over the last seconds.
    pub fn rate(&self) -> Option<u64> {
        let (first, last) = (self.samples.front()?, self.samples.back()?);
        let elapsed = last.0.duration_since(first.0).as_millis();
        if elapsed == 0 {
            return None;
        }
        let copied = u128::from(last.1.saturating_sub(first.1));
        u64::try_from(copied * 1000 / elapsed).ok()
    }

    /// Why copying was told not to go on at the last look.
    pub const fn pause(&self) -> Option<Pause> {
        self.pause
    }

    /// Bytes that were still only at the source at the last look.
    pub const fn bytes_left(&self) -> u64 {
        self.bytes_left
    }

    /// Since when the source has been silent.
    pub const fn stalled_since(&self) -> Option<SystemTime> {
        self.stalled_since
    }
}

impl Budget {
    fn earned(&self, now: Instant) -> u64 {
        let elapsed = now.duration_since(self.since).as_millis();
        u64::try_from(u128::from(self.rate) * elapsed / 1000).unwrap_or(u64::MAX)
    }
}
