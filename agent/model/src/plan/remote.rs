//! The part of the plan in which a volume is used on one node and its only copy is on
//! another: the borrower's side, and the lender's.
//!
//! ```text
//! borrower: handle (linear, or a hold) ─► src (a queue that takes writes) ─► NVMe
//! lender:   nvmet ─► export (linear instead of one that refuses writes) ─► data LV
//! ```
//!
//! What this part refuses to do: let a write through before the source has answered
//! in this boot that it takes writes from here alone; let consumers go on whose source
//! has lost power; keep anything here while the source may still be written; open the
//! source's own handle while its export exists.

use super::{Call, Device, Next, Plan, Step, Wait, one};
use crate::{
    hydration,
    name::Role,
    table::{Table, Target},
    units::Sectors,
    volume::{Event, Lent, Receiving, ReceivingStage, Remote},
};

impl Plan<'_> {
    /// A received volume whose writes go, or are going to go, to the source.
    pub(super) fn remote(&self, receiving: &Receiving, remote: &Remote) -> Next {
        use ReceivingStage as S;
        match receiving.stage {
            S::Aborting => return self.aborting(receiving),
            S::Withdrawing if receiving.forgotten => return Next::Forget(Vec::new()),
            S::Withdrawing => return Next::AskThenForget(Call::Revoke),
            S::Returning => return self.returning(receiving),
            _ => {}
        }
        if let Some(failure) = &receiving.failure {
            if failure.boot != self.seen.boot {
                return Next::Journal(Event::Rebooted);
            }
            return self.cut_off(receiving);
        }
        let writes_there = receiving.stage.writes_there();
        // Consumers of an earlier boot are gone; whoever comes now must not write
        // before the source knows of them.
        if (writes_there || receiving.stage == S::Settling)
            && remote.served_in.is_some_and(|boot| boot != self.seen.boot)
        {
            return Next::Journal(Event::Rebooted);
        }
        if receiving.stage == S::Linking && self.seen.import.namespace.is_none() {
            return one(Step::Connect(receiving.source.export.clone()));
        }
        if receiving.stage == S::Settling {
            return self.settling(receiving);
        }
        let import = &self.seen.import;
        // The source may have grown until it was fenced.
        if import.live && import.size.is_some_and(|size| size < receiving.length) {
            let export = receiving.source.export.clone();
            return one(Step::Rescan { export, at_least: receiving.length });
        }
        let src = match self.src_built(receiving, true) {
            Ok(src) => src,
            Err(next) => return *next,
        };
        if receiving.stage == S::Linking {
            return Next::Journal(Event::Armed);
        }
        if let Some(next) = self.source_reached(receiving) {
            return next;
        }
        let served = writes_there && remote.served_in.is_some();
        let through = self.table(Target::Linear { device: src.number, offset: Sectors(0) });
        // Requests that wait for a source keep the handle from being swapped or removed,
        // and the source may wait to be asked.
        let hangs = self.seen.handle.as_ref().is_some_and(|handle| match self.record.attached {
            true => handle.table.as_ref() != Some(&through),
            false => handle.open_count > 0,
        });
        if served && hangs && !self.source_answers() {
            return Next::Ask(Call::Serve);
        }
        let stacked = if served {
            self.handle(&through, Step::OpenHandle)
        } else {
            self.held_handle(src.number, false)
        };
        if let Some(next) = stacked {
            return next;
        }
        match receiving.stage {
            S::Held if self.seen.held > 0 => Next::Journal(Event::SwitchAsked),
            S::Held | S::Refused => Next::Wait(Wait::Switch),
            S::Switching => Next::Ask(Call::Serve),
            // Nobody uses it here any more, and nobody can.
            _ if !self.record.attached && receiving.stage == S::Remote => {
                Next::Journal(Event::ReturnAsked)
            }
            _ if !served => Next::Ask(Call::Serve),
            // The source may have lost power: its agent knows.
            _ if !self.source_answers() => Next::Ask(Call::Serve),
            S::Localizing => self.localizing(receiving),
            S::Building => self.building(receiving),
            S::Clearing => self
                .gone(&self.seen.clone, Role::Clone)
                .unwrap_or(Next::DoThen(Step::RetireAll, Event::Retired)),
            _ => match &self.seen.handle {
                Some(handle) if !self.seen.cache_dropped => one(Step::DropCache(handle.number)),
                Some(_) | None => Next::Wait(Wait::Remote),
            },
        }
    }

    /// Whether requests to the source are answered, rather than queued.
    pub(super) fn source_answers(&self) -> bool {
        let import = &self.seen.import;
        import.live && import.namespace.is_some() && !self.seen.path_failed
    }

    fn gone(&self, there: &Option<Device>, role: Role) -> Option<Next> {
        there.as_ref().map(|_| one(Step::Remove(role)))
    }

    fn localizing(&self, receiving: &Receiving) -> Next {
        if receiving.meta.is_none() {
            let meta = hydration::metadata_bytes(self.record.size, receiving.region);
            let data = self.record.size.bytes();
            return Next::Allocate(vec![Step::Allocate { data, meta: Some(meta), of: None }]);
        }
        match (&self.seen.data, &self.seen.meta) {
            (Some(_), Some(meta)) => Next::DoThen(Step::ZeroMeta(meta.device), Event::Zeroed),
            _ => Next::Wait(Wait::Pool),
        }
    }

    fn building(&self, receiving: &Receiving) -> Next {
        let (Some(data), Some(meta)) = (&self.seen.data, &self.seen.meta) else {
            return Next::Wait(Wait::Pool);
        };
        match self.clone_over(receiving, data, meta, false, true) {
            // From here on writes wait for the source's answer.
            Ok(_) => Next::Journal(Event::Armed),
            Err(next) => *next,
        }
    }

    /// The hold drains what is on its way to the source, which then flushes it, and
    /// answers that its export takes no more. Nothing is kept here before that.
    fn settling(&self, receiving: &Receiving) -> Next {
        let (Some(data), Some(meta)) = (&self.seen.data, &self.seen.meta) else {
            return Next::Wait(Wait::Pool);
        };
        let through = self.writes_to(&self.seen.src);
        // While the handle is on it, the way to the source takes writes.
        let clone = match self.clone_over(receiving, data, meta, true, through) {
            Ok(clone) => clone,
            Err(next) => return *next,
        };
        if let Some(next) = self.source_reached(receiving) {
            return next;
        }
        // As above: what hangs keeps the handle from being swapped.
        if through && !self.source_answers() {
            return Next::Ask(Call::Serve);
        }
        self.held_handle(clone.number, false).unwrap_or(Next::Ask(Call::Fence))
    }

    /// Whether writes through the handle lead to this device. A hold over a clone
    /// leads there with flushes only.
    fn writes_to(&self, below: &Option<Device>) -> bool {
        let table = self.seen.handle.as_ref().and_then(|handle| handle.table.as_ref());
        let Some((table, below)) = table.zip(below.as_ref()) else { return false };
        match table.target {
            Target::Linear { device, .. } | Target::Hold { device, .. } => device == below.number,
            Target::Error
            | Target::ReadOnly { .. }
            | Target::Queue { .. }
            | Target::WritableQueue { .. }
            | Target::Lost
            | Target::Clone { .. }
            | Target::Foreign { .. } => false,
        }
    }

    /// The source has lost power: nobody knows what of the last writes it has kept, so
    /// whoever wrote them must not go on. Every request fails until the handle is gone.
    fn cut_off(&self, receiving: &Receiving) -> Next {
        if let Some(next) = self.sealed(receiving) {
            return next;
        }
        match &self.seen.handle {
            Some(_) if !self.record.attached => one(Step::Remove(Role::Handle)),
            None if !self.record.attached => Next::Journal(Event::ReturnAsked),
            Some(_) | None => Next::Wait(Wait::Operator),
        }
    }

    fn returning(&self, receiving: &Receiving) -> Next {
        match &self.seen.handle {
            // The source has taken the volume back below somebody.
            Some(handle) if handle.open_count > 0 => {
                if let Some(next) = self.sealed(receiving) {
                    return next;
                }
            }
            Some(_) => return one(Step::Remove(Role::Handle)),
            None => {}
        }
        if let Some(next) = self.dismantled(receiving).or_else(|| self.handle_leaving()) {
            return next;
        }
        if !self.record.pool.is_empty() {
            return Next::DoThen(Step::RetireAll, Event::Retired);
        }
        Next::AskThenForget(Call::Return)
    }

    /// What a borrower without a copy needs of the volume here; `None` when it has it.
    pub(super) fn served(&self, lent: &Lent) -> Option<Next> {
        let Some(data) = &self.seen.data else { return Some(Next::Wait(Wait::Pool)) };
        if let Some(next) = self.fenced_handle() {
            return Some(next);
        }
        if lent.served_in != Some(self.seen.boot) {
            // What the borrower wrote last may be lost: it hears of that by asking.
            return self.unexported(lent);
        }
        self.exported(lent, self.on_data(data))
    }

    /// The export goes, which waits for every write that is on its way; then what
    /// was written is flushed; then this copy is the volume again.
    pub(super) fn reclaiming(&self, lent: &Lent) -> Next {
        let Some(data) = &self.seen.data else { return Next::Wait(Wait::Pool) };
        self.fenced_handle()
            .or_else(|| self.unexported(lent))
            .or_else(|| self.handle_leaving())
            .unwrap_or(Next::DoThen(Step::Flush(data.device), Event::Reclaimed(self.seen.boot)))
    }

    /// A source that takes writes, as a table.
    pub(super) const fn way(path: Option<crate::units::DevNo>, writable: bool) -> Target {
        if writable { Target::WritableQueue { path } } else { Target::Queue { path } }
    }

    /// Everything above the source fails every request; `None` when it does.
    pub(super) fn sealed(&self, receiving: &Receiving) -> Option<Next> {
        // Requests that wait for a source would keep the seal from closing.
        if let Some(next) = self.source_cut(receiving) {
            return Some(next);
        }
        let error = self.table(Target::Error);
        let open = |device: &Option<Device>| {
            device.as_ref().is_some_and(|device| device.table.as_ref() != Some(&error))
        };
        let closed = !open(&self.seen.clone) && !open(&self.seen.handle);
        (!closed).then(|| one(Step::Seal(error)))
    }

    /// Nothing of a received copy is left in the pool, where it had one.
    pub(super) fn retired(&self) -> Next {
        match self.record.pool.is_empty() {
            true => Next::Journal(Event::Retired),
            false => Next::DoThen(Step::RetireAll, Event::Retired),
        }
    }
}

impl Table {
    /// Whether this is the way to a source.
    pub const fn is_queue(&self) -> bool {
        matches!(self.target, Target::Queue { .. } | Target::WritableQueue { .. })
    }
}
