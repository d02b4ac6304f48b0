//! A snapshot of a volume that is still hydrating.

use super::{Fault, Metadata, NONE, REGIONS, World};
use crate::{
    name::Role,
    plan,
    table::{Table, Target},
    units::DevNo,
    volume::{Event, Record, Template},
};

impl World {
    /// The metadata LV first; then copying is off, consumers wait, what was begun has
    /// landed, everything is committed and the clone waits as well, while data and
    /// metadata are copied. Each may be the last thing that a process does, and whatever
    /// else fails on the way, the way back is gone.
    pub(super) fn fork(
        &mut self,
        node: usize,
        record: &Record,
        of: &Template,
        bytes: u64,
    ) -> Result<Event, Fault> {
        let moving = of.moving.as_ref().ok_or_else(|| Fault::Mismatch("it is whole".into()))?;
        let name = |role| moving.dm_name(role).uuid;
        let (clone, handle) = (name(Role::Clone), name(Role::Handle));
        let (data_name, meta_name) = plan::lv_names(record);
        if self.nodes[node].lvs.contains_key(&data_name) {
            return Err(Fault::Mismatch("it is of another moment".into()));
        }
        let meta = self.make_lv(node, &meta_name, bytes, [0; REGIONS], NONE)?;
        let below = self.nodes[node].mapped.get(&clone).and_then(|below| below.live.as_ref());
        let Some(Target::Clone { meta: from, dest, .. }) = below.map(|table| &table.target) else {
            return Err(Fault::Mismatch("no clone".into()));
        };
        let (from, dest, number) = (*from, *dest, self.nodes[node].mapped[&clone].number);
        let top = self.nodes[node].mapped.get(&handle);
        let linear = |table: &Table| matches!(table.target, Target::Linear { .. });
        if top.is_some_and(|top| !top.live.as_ref().is_some_and(linear)) {
            return Err(Fault::Mismatch("the handle is not as it should be".into()));
        }
        let top = top.map(|top| top.number);
        let taken = match self.torn {
            true => self.two_moments(node, record, of, &clone, (number, from, dest)),
            false => self
                .quiet(node, &clone, &handle, top)
                .map(|()| {
                    if !self.uncommitted {
                        self.commit_clone(node, number, from, dest)
                    }
                })
                .and_then(|()| self.change(node, &clone, |clone| clone.suspended = true))
                .and_then(|()| self.snapshot_lv(node, &data_name, of))
                .and_then(|data| self.copy_metadata(node, from, &meta_name).map(|()| data)),
        };
        if taken == Err(Fault::Crash) {
            return Err(Fault::Crash);
        }
        // What has failed is over; a crash may still come.
        self.resume_twice(node, &clone)?;
        if top.is_some() {
            self.resume_twice(node, &handle)?;
        }
        let data = taken?;
        let Metadata::Clone(bits) = self.nodes[node].lvs[&meta_name].metadata else {
            return Err(Fault::Mismatch("no clone metadata".into()));
        };
        let floor = bits.iter().filter(|bit| **bit).count() as u64;
        if let Some(meta) = self.nodes[node].lvs.get_mut(&meta_name).filter(|_| self.spoiled) {
            meta.metadata = Metadata::Garbage;
        }
        Ok(Event::Forked { data, meta, floor })
    }

    /// Copying is off, consumers wait, and nothing is on its way.
    fn quiet(
        &mut self,
        node: usize,
        clone: &str,
        handle: &str,
        top: Option<DevNo>,
    ) -> Result<(), Fault> {
        self.change(node, clone, |clone| clone.hydrating = false)?;
        if let Some(top) = top {
            if self.hangs_below(node, top) {
                return Err(Fault::Refused(format!("{handle}: no end in sight")));
            }
            self.change(node, handle, |handle| handle.suspended = true)?;
        }
        self.act()?;
        self.land(node, clone);
        Ok(())
    }

    fn copy_metadata(&mut self, node: usize, from: DevNo, to: &str) -> Result<(), Fault> {
        self.act()?;
        let metadata = self.lv_by(node, from).map(|(_, lv)| lv.metadata.clone());
        let metadata = metadata.ok_or_else(|| Fault::Refused("no metadata".into()))?;
        if let Some(lv) = self.nodes[node].lvs.get_mut(to) {
            lv.metadata = metadata;
        }
        Ok(())
    }

    /// Whether a handle waits, over a clone that works, or that clone.
    pub(super) fn waits_for_nobody(&self, node: usize) -> bool {
        let mapped = &self.nodes[node].mapped;
        let is_clone = |below: &super::Mapped| {
            matches!(&below.live, Some(Table { target: Target::Clone { .. }, .. }))
        };
        mapped.values().filter(|device| device.suspended).any(|device| {
            let below = match &device.live {
                Some(Table { target: Target::Linear { device, .. }, .. }) => Some(*device),
                _ => None,
            };
            is_clone(device)
                || mapped.values().any(|other| Some(other.number) == below && is_clone(other))
        })
    }

    fn resume_twice(&mut self, node: usize, name: &str) -> Result<(), Fault> {
        match self.resume(node, name) {
            Err(Fault::Refused(_)) => self.resume(node, name),
            outcome => outcome,
        }
    }

    /// The data first and then, while everything goes on, what is known to be there.
    fn two_moments(
        &mut self,
        node: usize,
        record: &Record,
        of: &Template,
        clone: &str,
        (number, from, dest): (DevNo, DevNo, DevNo),
    ) -> Result<String, Fault> {
        let (data_name, meta_name) = plan::lv_names(record);
        let data = self.snapshot_lv(node, &data_name, of)?;
        self.change(node, clone, |clone| clone.hydrating = true)?;
        self.hydrate();
        self.hydrate();
        self.commit_clone(node, number, from, dest);
        self.copy_metadata(node, from, &meta_name)?;
        Ok(data)
    }

    /// What a copy reads, whose clone is built or not: of each region what is here, or
    /// nothing where it is not.
    pub fn here(&self, node: usize, record: &Record) -> Option<[Option<u64>; REGIONS]> {
        let (data, meta) = plan::lv_names(record);
        let (data, meta) = (self.nodes[node].lvs.get(&data)?, self.nodes[node].lvs.get(&meta)?);
        let Metadata::Clone(bits) = meta.metadata else { return None };
        let length = record.receiving()?.length;
        Some(std::array::from_fn(|region| {
            let below = (region as u64) * super::REGION.0 < length.0;
            (bits[region] || !below).then_some(data.now[region])
        }))
    }
}
