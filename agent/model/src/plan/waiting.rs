//! What a process that died may have left waiting, and the next resumes before
//! anything else.

use super::{Seen, Step};
use crate::{
    name::Role,
    table::{CloneStatus, Target},
    volume::{ReceivingStage, Record},
};

/// Whether a process may have died while this volume's consumers waited for it.
pub fn may_be_left_waiting(record: &Record) -> bool {
    record.receiving().is_some_and(|receiving| {
        receiving.stage == ReceivingStage::Hydrating
            && receiving.failure.is_none()
            && receiving.remote.is_none()
    })
}

/// The way back out of a pause in which a volume that hydrates was looked at or told
/// something ([`Step::Fork`], [`Step::Seed`]). It needs neither LVM nor the source. The
/// clone comes first and refuses discards before anybody can send it one; what is not as
/// such a pause leaves it is left to the planner.
pub fn left_waiting(record: &Record, seen: &Seen) -> Option<Step> {
    if !may_be_left_waiting(record) {
        return None;
    }
    let works =
        |status: &CloneStatus| matches!(status, CloneStatus::Working { read_only: false, .. });
    let clone = seen.clone.as_ref().filter(|_| seen.clone_status.as_ref().is_some_and(works))?;
    if clone.suspended {
        return Some(Step::Resume(Role::Clone));
    }
    let handle = seen.handle.as_ref().filter(|handle| handle.suspended)?;
    let on_clone = handle.table.as_ref().is_some_and(
        |table| matches!(table.target, Target::Linear { device, .. } if device == clone.number),
    );
    match seen.discards_blocked {
        _ if !on_clone => None,
        false => Some(Step::BlockDiscards(clone.number)),
        true => Some(Step::Resume(Role::Handle)),
    }
}
