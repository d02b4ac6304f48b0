//! Consumers that keep a clone from copying, and the push that it gets.

use super::{Fault, World};
use crate::{
    name::Role,
    plan,
    table::{Table, Target},
    units::DevNo,
    volume::Record,
};

impl World {
    /// Suspends the handle, lets the clone begin a copy, and resumes the handle: each
    /// may be the last thing that a process does. Nothing while something is copied, where
    /// clones copy by themselves, or where what is on its way has no end.
    pub(super) fn push(&mut self, node: usize, record: &Record) -> Result<(), Fault> {
        let (clone, handle) =
            (plan::dm_name(record, Role::Clone).uuid, plan::dm_name(record, Role::Handle).uuid);
        if !self.busy {
            return Ok(());
        }
        self.act()?;
        let Some(src) = self.idle_source(node, &clone) else { return Ok(()) };
        if let Some(mapped) = self.nodes[node].mapped.get_mut(&clone) {
            mapped.pushed = true;
        }
        let Some(top) = self.nodes[node].mapped.get(&handle).map(|top| top.number) else {
            self.begin(node, &clone, src);
            return Ok(());
        };
        if self.hangs_below(node, top) {
            return Ok(());
        }
        self.change(node, &handle, |top| top.suspended = true)?;
        let begun = self.act().map(|()| self.begin(node, &clone, src));
        if begun == Err(Fault::Crash) {
            return begun;
        }
        // What fails once does not fail again.
        match self.resume(node, &handle) {
            Err(Fault::Refused(_)) => self.resume(node, &handle),
            resumed => resumed,
        }
    }

    /// What a clone would copy from that copies nothing, although it may.
    fn idle_source(&self, node: usize, clone: &str) -> Option<DevNo> {
        let mapped = self.nodes[node].mapped.get(clone)?;
        let idle = mapped.hydrating && !mapped.suspended && mapped.copying.is_none();
        match mapped.live {
            Some(Table { target: Target::Clone { src, .. }, .. }) if idle => Some(src),
            _ => None,
        }
    }
}
