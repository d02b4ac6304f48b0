//! Letting a clone copy although its consumers keep it busy.
//!
//! dm-clone's worker begins to copy only in a moment at which no request is on its way
//! through the clone (drivers/md/dm-clone-target.c, `do_hydration`), and it looks for
//! such a moment once a second, after copies, and when a message comes. So it is sent
//! messages, one after the other: that costs consumers nothing, and soon one comes in a
//! gap that they leave. Where they leave none, the handle waits for a moment, and the
//! message comes then. What it begins is as much as its threshold says.

use std::{
    thread,
    time::{Duration, Instant},
};

use dmlocal_model::{
    name::{DmName, Role},
    plan::{self, Push},
    table::CloneStatus,
    volume::Record,
};

use super::{RealKernel, StepError};
use crate::pushes::GAP;

/// Longest wait for the requests that are on their way; then consumers simply go on.
const QUIET: Duration = Duration::from_millis(100);

/// Longest wait for the worker once there are none.
const MOMENT: Duration = Duration::from_millis(5);

impl RealKernel {
    pub(super) fn push(&self, record: &Record, threshold: u32, how: Push) -> Result<(), StepError> {
        let clone = plan::dm_name(record, Role::Clone);
        let handle = plan::dm_name(record, Role::Handle);
        let wake = format!("hydration_threshold {threshold}");
        let end = Instant::now() + GAP;
        while self.is_idle(&clone)? {
            if Instant::now() >= end {
                return match how {
                    Push::Gap => Ok(()),
                    Push::Drain => self.drain(&clone, &handle, &wake),
                };
            }
            self.dm.message(&clone, &wake)?;
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    fn drain(&self, clone: &DmName, handle: &DmName, wake: &str) -> Result<(), StepError> {
        let open = self.dm.device(handle)?.filter(|top| top.has_live && !top.suspended);
        if open.is_none() {
            return Ok(());
        }
        let _pause = self.pauses.begin()?;
        if self.dm.suspend(handle, QUIET).is_err() {
            return Ok(());
        }
        let begun = self.dm.message(clone, wake).and_then(|()| self.begins(clone));
        self.resume_surely(handle)?;
        Ok(begun?)
    }

    /// Whether it copies nothing, although it may and there is something left.
    fn is_idle(&self, clone: &DmName) -> std::io::Result<bool> {
        Ok(match self.dm.clone_status(clone)? {
            CloneStatus::Working { hydrated, total, hydrating, enabled, read_only } => {
                enabled && !read_only && hydrating == 0 && hydrated < total
            }
            CloneStatus::Failed => false,
        })
    }

    fn begins(&self, clone: &DmName) -> std::io::Result<()> {
        let end = Instant::now() + MOMENT;
        while self.is_idle(clone)? && Instant::now() < end {
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}
