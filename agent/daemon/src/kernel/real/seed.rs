//! Telling dm-clone that what was never written is here already.
//!
//! A discard that reaches a clone sets the bits of the regions that it covers whole,
//! and nothing else where nothing is passed down (drivers/md/dm-clone-target.c,
//! `process_deferred_discards` and `complete_discard_bio`): the very thing that makes
//! a guest's discard dangerous is what is wanted here. So the clone itself is told,
//! as it stands over its real devices: no other table, nothing that a death in the
//! middle could leave behind but devices that wait and a clone that still takes
//! discards, and nobody can send it any.
//!
//! A clone that was made to refuse discards takes none again before its table was
//! loaded anew: with the limit at 0 its granularity is 0 as well, and no other limit is
//! a multiple of that (seen on 6.12; block/blk-sysfs.c,
//! `queue_max_discard_sectors_store`). So the very same table is loaded, in the one
//! order in which that is safe: everything committed, suspended, loaded, resumed.
//!
//! What must be kept away is a copy of such a region that is on its way (a bit that is
//! set lets writes through at once, and the copy would land on top): so the handle
//! waits, background copying is off, and nothing is being copied.

use std::{
    thread,
    time::{Duration, Instant},
};

use dmlocal_model::{
    name::{DmName, Role},
    plan,
    seeding::{AllocationMap, Run},
    table::{CloneStatus, Table, Target},
    volume::Record,
};

use super::{RealKernel, StepError};
use crate::kernel::{
    Kernel as _,
    block::{self, Discards},
    dm::Udev,
};

/// Longest wait for the I/O in flight before the handle waits.
pub(super) const QUIET: Duration = Duration::from_secs(1);

/// Longest wait for copies that consumers' writes have begun, once the handle waits.
const DRAINED: Duration = Duration::from_millis(250);

/// After this time consumers go on, and the rest is told in another pause.
const PAUSE: Duration = Duration::from_millis(50);

/// How much longer than a pause they go on before the next.
const REST: u32 = 8;

/// How often the clone is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(250);

/// After this time what is left of the map is copied.
const ENOUGH: Duration = Duration::from_secs(20);

/// How often a handle is resumed that does not.
const RESUMES: u32 = 5;

impl RealKernel {
    /// Marks what was never written, and commits that.
    pub(super) fn seed(&self, record: &Record, map: &AllocationMap) -> Result<(), StepError> {
        // Which device the pool is, is known from here on.
        self.pool_usage(&record.pool)?;
        let (_, pool, _) = self.thin(record)?;
        if !pool.zeroes {
            return Err(StepError::Refused("the thin pool does not zero new blocks".to_owned()));
        }
        let clone = plan::dm_name(record, Role::Clone);
        let handle = plan::dm_name(record, Role::Handle);
        let below = self
            .device(record, Role::Clone)?
            .ok_or_else(|| StepError::Refused("there is no clone".to_owned()))?;
        // A clone that passes discards down would drop what consumers have written.
        let status = self.dm.status_text(&clone)?;
        if !status.split_ascii_whitespace().any(|word| word == "no_discard_passdown") {
            return Err(StepError::Refused(format!("{clone} passes discards down")));
        }
        let discards = Discards::open(below.number)?;
        let region = map.region.bytes();
        let mut runs = map.unwritten.runs();
        let end = Instant::now() + ENOUGH;
        loop {
            let began = Instant::now();
            runs = self.in_a_pause(&handle, &clone, &discards, region, runs)?;
            if runs.is_empty() || Instant::now() > end {
                break;
            }
            self.rest(&clone, began.elapsed() * REST)?;
        }
        self.here_for_good(&clone).map(drop)
    }

    /// Lets consumers go on for so long. A clone that can commit no more must be seen by
    /// those who stop its consumers, and they wait for this.
    fn rest(&self, clone: &DmName, long: Duration) -> Result<(), StepError> {
        let end = Instant::now() + long;
        loop {
            match self.dm.clone_status(clone)? {
                CloneStatus::Working { read_only: false, .. } => {}
                status => return Err(StepError::Refused(format!("it rested: {status:?}"))),
            }
            match end.checked_duration_since(Instant::now()) {
                Some(left) => thread::sleep(left.min(LOOK)),
                None => return Ok(()),
            }
        }
    }

    /// Lets consumers wait, marks as many runs as there is time for, and lets them go
    /// on, whatever came of it. Returns the rest.
    fn in_a_pause<'a>(
        &self,
        handle: &DmName,
        clone: &DmName,
        discards: &Discards,
        region: u64,
        runs: &'a [Run],
    ) -> Result<&'a [Run], StepError> {
        let top = self.dm.device(handle)?.is_some_and(|device| device.has_live);
        let _pause = self.pauses.begin()?;
        if top {
            self.dm.suspend(handle, QUIET)?;
        }
        let marked = self.reload(clone).and_then(|()| mark(discards, region, runs));
        let blocked = block::block_discards(discards.device());
        let resumed = if top { self.resume_surely(handle) } else { Ok(()) };
        resumed?;
        blocked?;
        marked
    }

    /// Lets the clone take discards again, by its own table.
    fn reload(&self, clone: &DmName) -> Result<(), StepError> {
        self.nothing_is_copied(clone)?;
        let live = self.dm.device(clone)?.filter(|device| !device.suspended);
        let table = live
            .and_then(|device| device.table)
            .filter(|table| matches!(table.target, Target::Clone { .. }))
            .ok_or_else(|| StepError::Refused(format!("{clone} is not as it should be")))?;
        // The new table reads what is on the disk; a commit that fails while the old
        // one is suspended would tell nobody.
        let before = self.here_for_good(clone)?;
        self.dm.suspend(clone, QUIET)?;
        if let Err(error) = self.dm.set(clone, &table, Udev::Hidden, QUIET) {
            // The old table is as good as it was.
            self.resume_surely(clone)?;
            return Err(error.into());
        }
        match self.dm.clone_status(clone)? {
            CloneStatus::Working { hydrated, read_only: false, .. } if hydrated >= before => Ok(()),
            status => {
                // Better no answer than an old one.
                let error = Table::whole(table.length, Target::Error);
                self.dm.set(clone, &error, Udev::Hidden, QUIET)?;
                Err(StepError::Refused(format!("{before} regions were here, now {status:?}")))
            }
        }
    }

    /// Commits twice, as for the floor: the first answer may be ahead of its own
    /// commit.
    pub(super) fn here_for_good(&self, clone: &DmName) -> Result<u64, StepError> {
        let first = self.dm.commit_clone(clone)?;
        match (first, self.dm.commit_clone(clone)?) {
            (
                CloneStatus::Working { hydrated, read_only: false, .. },
                CloneStatus::Working { read_only: false, .. },
            ) => Ok(hydrated),
            (_, status) => Err(StepError::Refused(format!("not committed: {status:?}"))),
        }
    }

    /// Nobody can begin another copy: the handle waits, and background copying is off.
    pub(super) fn nothing_is_copied(&self, clone: &DmName) -> Result<(), StepError> {
        let end = Instant::now() + DRAINED;
        loop {
            match self.dm.clone_status(clone)? {
                CloneStatus::Working { hydrating: 0, enabled: false, read_only: false, .. } => {
                    return Ok(());
                }
                CloneStatus::Working { enabled: false, read_only: false, .. }
                    if Instant::now() < end =>
                {
                    thread::sleep(Duration::from_millis(1));
                }
                status => {
                    return Err(StepError::TimedOut(format!("something is copied: {status:?}")));
                }
            }
        }
    }

    pub(super) fn resume_surely(&self, handle: &DmName) -> Result<(), StepError> {
        let mut outcome = self.dm.resume(handle);
        for _ in 1..RESUMES {
            if outcome.is_ok() {
                break;
            }
            outcome = self.dm.resume(handle);
        }
        Ok(outcome?)
    }
}

/// Marks as many runs as there is time for; returns the rest.
fn mark<'a>(discards: &Discards, region: u64, mut runs: &'a [Run]) -> Result<&'a [Run], StepError> {
    let end = Instant::now() + PAUSE;
    while let Some((run, rest)) = runs.split_first() {
        discards.send(run.first * region, run.count * region)?;
        runs = rest;
        if Instant::now() > end {
            break;
        }
    }
    Ok(runs)
}
