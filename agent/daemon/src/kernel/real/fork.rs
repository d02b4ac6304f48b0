//! A snapshot of a volume that is still hydrating: its data, and what is known to be of
//! it here, at one moment.
//!
//! The data is a thin snapshot, which lvm2 takes; the clone metadata is thick, and its
//! bytes are copied. In between nothing may change either of them. So copying is off
//! (dm-clone's metadata does not say which copies are on their way), consumers wait at
//! the handle, copies that their writes have begun have ended, and everything is
//! committed: a commit flushes the data before it says that it is here
//! (drivers/md/dm-clone-metadata.c, `dm_clone_metadata_pre_commit`). Then the clone is
//! suspended as well, which keeps its worker from its metadata.
//!
//! lvm2 runs meanwhile, and suspends the origin by itself, which is below all that waits
//! and has nothing in flight. It is told which devices to look at, and ours are not
//! among them. This process's turn is waited for before anybody waits for it; a lock
//! that another process holds is not waited for at all. An lvm2 that is slow is not
//! waited for either: consumers go on, and what it makes after that is of another moment
//! and is taken away. What it made in time is looked at when consumers have gone on.
//!
//! A process that dies in between leaves a handle and a clone that wait; the next one
//! resumes both before it asks anything of LVM.

use std::{
    thread,
    time::{Duration, Instant},
};

use dmlocal_model::{
    name::{DmName, Role},
    plan,
    table::{CloneStatus, Table, Target},
    volume::{Event, Record, Template},
};
use tracing::debug;

use super::{RealKernel, StepError, lv_uuid, seed::QUIET};
use crate::kernel::block;

/// Longest wait for lvm2, while consumers wait.
const TAKEN: Duration = Duration::from_secs(5);

/// Longest wait for copies that were begun, while consumers go on.
const SETTLED: Duration = Duration::from_secs(1);

fn refused(why: impl Into<String>) -> StepError {
    StepError::Refused(why.into())
}

impl RealKernel {
    /// Makes the logical volumes of such a snapshot.
    pub(super) fn fork(
        &self,
        record: &Record,
        of: &Template,
        bytes: u64,
    ) -> Result<Event, StepError> {
        let moving = of.moving.as_ref().ok_or_else(|| refused("all of it is here"))?;
        let (clone, handle) = (moving.dm_name(Role::Clone), moving.dm_name(Role::Handle));
        let origin = lv_uuid(&of.data)?;
        let (data_name, meta_name) = plan::lv_names(record);
        let vg = self.vg(&record.pool)?;
        // It would be of another moment.
        if vg.lvs()?.iter().any(|lv| lv.name == data_name) {
            return Err(refused(format!("{data_name} is there already")));
        }
        let made = vg.create(None, Some((&meta_name, bytes)), &[])?;
        let meta = made.first().ok_or_else(|| refused("the metadata LV was not made"))?.dm_uuid();
        let gone = |what: &str| refused(format!("{what} is not there"));
        let to = self.lv(Some(&meta))?.ok_or_else(|| gone("the new metadata"))?;
        let from = self.lv(Some(&moving.meta))?.ok_or_else(|| gone("the volume's metadata"))?;
        let data = self.lv(Some(&of.data))?.ok_or_else(|| gone("the volume's data"))?;
        if to.length < from.length {
            return Err(refused("the new metadata LV is smaller than the volume's"));
        }
        let below = self.dm.device(&clone)?.and_then(|device| device.table);
        match below.map(|table| table.target) {
            Some(Target::Clone { meta, dest, .. })
                if (meta, dest) == (from.device, data.device) => {}
            other => return Err(refused(format!("{clone} is {other:?}"))),
        }
        let top = self.dm.device(&handle)?.filter(|device| device.has_live);
        // A suspension would let go of what is held back.
        let opened = |table: &Table| matches!(table.target, Target::Linear { .. });
        if top.as_ref().is_some_and(|top| !top.table.as_ref().is_some_and(opened)) {
            return Err(refused(format!("{handle} is not open yet")));
        }
        self.dm.message(&clone, "disable_hydration")?;
        self.settle(&clone)?;
        let mut begun = None;
        let pause = self.pauses.begin()?;
        let began = Instant::now();
        if top.is_some() {
            self.dm.suspend(&handle, QUIET)?;
        }
        let taken = self
            .nothing_is_copied(&clone)
            .and_then(|()| self.here_for_good(&clone))
            .and_then(|floor| {
                self.dm.suspend(&clone, QUIET)?;
                let end = Instant::now() + TAKEN;
                let lvm2 = begun.insert(vg.begin_snapshot(&data_name, &of.name)?);
                block::copy(from.device, to.device, from.length.bytes())?;
                lvm2.ended_within(end.saturating_duration_since(Instant::now()))?;
                Ok(floor)
            });
        // Whatever came of it, and the clone first: nothing waits below a handle that
        // goes on.
        let below = self.resume_surely(&clone);
        let above = if top.is_some() { self.resume_surely(&handle) } else { Ok(()) };
        debug!(volume = %moving.id, waited = ?began.elapsed(), "consumers go on");
        drop(pause);
        if let Some(lvm2) = begun {
            lvm2.ended();
        }
        above?;
        below?;
        let floor = taken?;
        let data = vg.begun(&data_name, &origin)?.dm_uuid();
        Ok(Event::Forked { data, meta, floor })
    }

    /// Waits for background copies, so that consumers need not; what their own writes
    /// begin may never end before they wait.
    fn settle(&self, clone: &DmName) -> Result<(), StepError> {
        let end = Instant::now() + SETTLED;
        loop {
            match self.dm.clone_status(clone)? {
                CloneStatus::Working { hydrating, .. } if hydrating > 0 && Instant::now() < end => {
                    thread::sleep(Duration::from_millis(5));
                }
                _ => return Ok(()),
            }
        }
    }
}
