//! What to do next for one volume: a pure function of what the journal says and
//! what is there.
//!
//! [`next`] looks at everything anew each time and names only what may be done
//! now; the caller does it, journals the event that follows, and asks again.
//! So there is no plan that could be half done: a crash at any point is the
//! same as being asked again, and start-up is the same code as every other
//! moment. What must not happen twice (zeroing, removing) is guarded by the
//! journalled stage, not by what is found.
//!
//! What this module refuses to do: decide on the word of one look that data is
//! elsewhere, build a clone once the journal says that everything is here, or
//! put a writable handle over a clone before the source has answered.

mod remote;
mod seeding;
mod waiting;

use std::sync::Arc;

use uuid::Uuid;

pub use self::waiting::{left_waiting, may_be_left_waiting};
use crate::{
    hydration,
    name::{self, DmName, Role},
    seeding::{AllocationMap, Seeding, SourceMap},
    table::{CloneStatus, Table, Target},
    units::{DevNo, Sectors},
    volume::{
        Event, ExportName, Failure, Lent, LentStage, Phase, Rebuild, Receiving, ReceivingStage,
        Record, Relay, Revert, RevertStage, Template,
    },
};

/// What is there for one volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Which boot this is.
    pub boot: Uuid,
    /// The data LV, when it is active.
    pub data: Option<Lv>,
    /// The clone metadata LV, when it is active.
    pub meta: Option<Lv>,
    /// The handle.
    pub handle: Option<Device>,
    /// The clone of the record's generation.
    pub clone: Option<Device>,
    /// The way to the source of the record's generation.
    pub src: Option<Device>,
    /// What the peer reads, of the record's generation.
    pub export: Option<Device>,
    /// What the clone says of itself.
    pub clone_status: Option<CloneStatus>,
    /// Whether the clone refuses discards.
    pub discards_blocked: bool,
    /// Writes that wait in the handle.
    pub held: u64,
    /// The export as nvmet has it.
    pub published: Presence,
    /// The import as the initiator has it.
    pub import: Import,
    /// Whether the source's path has failed although it may be back.
    pub path_failed: bool,
    /// Whether a connection to the source is being tried, or was a moment ago.
    pub connecting: bool,
    /// Whether copying must rest for its byte rate or for the pool's sake.
    pub resting: bool,
    /// Whether it is time to push a copy that consumers keep from going on, and how.
    pub push: Option<Push>,
    /// Of a snapshot: whether another copy on this node still needs it.
    pub read: bool,
    /// Whether a request waits for this copy to be made.
    pub asked: bool,
    /// Whether it keeps what this is to be made of as it is.
    pub steady: bool,
    /// The settings that the clone was last given, when that is known.
    pub tuned: Option<(u32, u32)>,
    /// Whether the handle's page cache is known to have been dropped since
    /// consumers may write.
    pub cache_dropped: bool,
    /// Whether the borrower is known to have been told of the export's size.
    pub announced: bool,
    /// What the source says was never written.
    pub map: SourceMap,
    /// How much of the data LV its thin pool has given out; none if it is not thin.
    pub allocated: Option<Sectors>,
}

/// A logical volume that is active.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lv {
    /// Its device number now.
    pub device: DevNo,
    /// Its size.
    pub length: Sectors,
}

/// A device-mapper device of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its device number now.
    pub number: DevNo,
    /// The live table; none before the first was loaded, and for a table that
    /// is not one target over everything.
    pub table: Option<Table>,
    /// Whether it is suspended.
    pub suspended: bool,
    /// How often it is open.
    pub open_count: u32,
    /// Whether it goes as soon as its last user does.
    pub leaving: bool,
}

/// How much of a thing is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Nothing.
    Absent,
    /// Something, not all.
    Partial,
    /// All, as wanted.
    Complete,
}

/// An NVMe connection to a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Import {
    /// Whether any controller for the export exists.
    pub connected: bool,
    /// The namespace's block device, found by its UUID.
    pub namespace: Option<DevNo>,
    /// Its size, as the initiator knows it.
    pub size: Option<Sectors>,
    /// Whether a controller is live: requests are answered, not queued.
    pub live: bool,
}

/// How a copy is pushed that consumers keep from going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Push {
    /// It is woken again and again for a moment, and begins in a gap that consumers leave.
    Gap,
    /// The same, and where there was no gap, consumers wait until it has begun.
    Drain,
}

/// One idempotent action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make the data LV, and the metadata LV of this size in bytes.
    Allocate {
        /// Size of the data LV in bytes.
        data: u64,
        /// Size of the metadata LV in bytes; none for a volume that is not
        /// received.
        meta: Option<u64>,
        /// What the data LV is to be a thin snapshot of; none for a blank one.
        of: Option<Template>,
    },
    /// Make the data LV a thin snapshot of one that is still hydrating, and the metadata
    /// LV a copy of its clone metadata, both of one moment: nothing is being copied, the
    /// metadata is committed, and consumers wait meanwhile. Their wait is bounded, and
    /// ends whatever comes of it. Yields `Event::Forked`.
    Fork {
        /// What it is to be a snapshot of.
        of: Template,
        /// Size of the metadata LV in bytes.
        meta: u64,
    },
    /// Grow the data LV; what is as large already stays.
    Grow {
        /// Its new size.
        to: Sectors,
        /// New size of the metadata LV in bytes, where there is one to grow.
        meta: Option<u64>,
    },
    /// Zero the start of the metadata LV and remove it; absent is success.
    RetireMeta,
    /// The same, and remove the data LV; absent is success.
    RetireAll,
    /// Remove a data LV that is not, or not any more, the volume's; absent is success.
    RetireData {
        /// Its name.
        name: String,
        /// Its device-mapper UUID; none for one that may or may not have been made.
        uuid: Option<String>,
    },
    /// Zero the first block of the metadata LV; refused while it is in use.
    ZeroMeta(DevNo),
    /// Give the device this table, making it if it is absent.
    Set(Role, Table),
    /// Load the clone; armed ones must show dm-clone's magic number and at
    /// least this many hydrated regions.
    LoadClone {
        /// The table.
        table: Table,
        /// Regions that must be there; none for a clone that was never used.
        floor: Option<u64>,
    },
    /// Remove the device; absent is success.
    Remove(Role),
    /// Remove the device as soon as its last user is gone.
    RemoveDeferred(Role),
    /// Suspend the handle: consumers must not go on.
    SuspendHandle,
    /// Resume the device.
    Resume(Role),
    /// Let consumers write: drop what is clean in the handle's page cache, give
    /// it this table, and drop that again.
    OpenHandle(Table),
    /// Give a handle that holds writes back this larger table; refused while a write
    /// waits in it, because a swap lets it go.
    GrowHeld(Table),
    /// Drop what is clean in the page cache of this device.
    DropCache(DevNo),
    /// Make the clone refuse discards.
    BlockDiscards(DevNo),
    /// Turn background copying on or off.
    Hydrate(bool),
    /// Mark what the source never wrote as being here, and commit that, while the
    /// handle waits. Refused while anything is being copied.
    Seed(Arc<AllocationMap>),
    /// Tell the clone how much to copy at once.
    Tune {
        /// Regions at the same time.
        threshold: u32,
        /// Contiguous regions as one.
        batch: u32,
    },
    /// Where nothing is being copied although it may be, have the clone begin: it begins
    /// nothing while consumers have requests on their way.
    Push {
        /// Regions that are copied then, as the clone was last told.
        threshold: u32,
        /// Whether consumers may be made to wait for that.
        how: Push,
    },
    /// Commit the clone's metadata and check twice, before and after, that every
    /// region is here and that it can still be written.
    Commit,
    /// Use the source's path again.
    ReinstatePath(DevNo),
    /// Publish the export device to the borrower.
    Publish {
        /// Identity of the export.
        export: ExportName,
        /// Who may connect.
        host_nqn: String,
    },
    /// Tell the borrower that the export may have another size.
    Announce(ExportName),
    /// Ask the source for the size of what is imported, until it is at least this.
    Rescan {
        /// Identity of the export.
        export: ExportName,
        /// What it must have.
        at_least: Sectors,
    },
    /// Take the export down, the port first.
    Unpublish {
        /// Identity of the export.
        export: ExportName,
        /// Who could connect.
        host_nqn: String,
    },
    /// Connect to the source. From [`ReceivingStage::Held`] on nothing waits for
    /// the outcome, because consumers need the rest whether it answers or not.
    Connect(ExportName),
    /// Drop the connection to the source.
    Disconnect(ExportName),
    /// The same, after telling the way to the source to fail what it queues.
    CutSource(ExportName),
    /// Let the clone, then the handle, fail every request: what was held back
    /// is refused rather than acknowledged.
    Seal(Table),
    /// Write the handle's page cache back, then let it fail every request.
    FenceHandle(Table),
    /// Flush the data LV to stable storage.
    Flush(DevNo),
}

/// A question to the other node's agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// To the source: fence.
    Fence,
    /// To the source: fence, and take what is written here.
    Serve,
    /// To the source: it is the volume again.
    Return,
    /// To the source: make a copy of what is fenced, for a snapshot.
    Copy,
    /// To the source: let go.
    Release,
    /// To the source: withdraw the grant.
    Revoke,
    /// To the last borrower: did you take it?
    QueryGrant,
}

/// Why nothing is to be done now although the volume is not at rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// The consumer's first write, or a call.
    Switch,
    /// The source's map of what was never written.
    Map,
    /// Copying goes on in the kernel.
    Hydration,
    /// Nothing but room for a copy, or the end of its use here.
    Remote,
    /// The source does not answer.
    Source,
    /// Consumers, to rewrite what was lost with the source.
    Lost,
    /// An operator or a reboot.
    Operator,
    /// The pool's logical volumes are not active.
    Pool,
    /// The peer's fence or release.
    Peer,
    /// Those that still read a snapshot which is to go.
    Readers,
    /// The request for which it is made.
    Request,
}

/// The answer of [`next`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Do all of these, in any order or at the same time.
    Do(Vec<Step>),
    /// Do this, then journal that it is done.
    DoThen(Step, Event),
    /// Do all of these at the same time; the first is `Step::Allocate` or `Step::Fork`,
    /// and the event that it yields is to be journalled even if another fails.
    Allocate(Vec<Step>),
    /// Commit the clone's metadata and journal how many regions are here for
    /// good.
    JournalFloor,
    /// Journal this.
    Journal(Event),
    /// Ask the other node and journal its answer.
    Ask(Call),
    /// Ask the source what was never written; nothing waits for the answer but
    /// copying.
    AskForMap,
    /// Ask the other node; once it has answered, the record may go.
    AskThenForget(Call),
    /// Nothing now; look again on any change.
    Wait(Wait),
    /// Nothing at all.
    Settled,
    /// Do these one after the other, then remove the record and leave its
    /// tombstones.
    Forget(Vec<Step>),
}

/// What to do next.
pub fn next(record: &Record, seen: &Seen) -> Next {
    let plan = Plan { record, seen };
    match &record.phase {
        Phase::Creating => plan.creating(),
        Phase::Local => plan.local(),
        Phase::Lent(lent) => plan.lent(lent),
        Phase::Receiving(receiving) => plan.receiving(receiving),
        Phase::Relaying(relay) => plan.relaying(relay),
        Phase::Reverting(revert) => plan.reverting(revert),
        Phase::Deleting if seen.handle.is_some() => Next::Do(vec![Step::Remove(Role::Handle)]),
        Phase::Deleting => Next::Forget(vec![Step::RetireAll]),
    }
}

/// Whether nothing waits for the outcome of these steps: a connection to the
/// source of a copy that consumers may use already.
pub fn is_attempt(record: &Record, steps: &[Step]) -> bool {
    needs_source(record) && matches!(steps, [Step::Connect(_)])
}

/// Whether a connection to the source is still wanted by consumers. Where it is
/// not, an attempt must have ended before anything is taken down.
pub fn needs_source(record: &Record) -> bool {
    use ReceivingStage as S;
    if record.receiving().is_some_and(|receiving| receiving.forgotten) {
        return false;
    }
    let parting = record.lent().is_some_and(|lent| lent.stage == LentStage::Releasing);
    let in_use = record.receiving().is_some_and(|receiving| match receiving.stage {
        S::Held
        | S::Switching
        | S::Refused
        | S::Hydrating
        | S::Remote
        | S::Localizing
        | S::Building
        | S::Clearing
        | S::Settling => true,
        S::Requesting
        | S::Forking
        | S::Linking
        | S::Returning
        | S::Allocating
        | S::Zeroing
        | S::Assembling
        | S::Collapsing
        | S::Parting
        | S::Aborting
        | S::Withdrawing
        | S::Discarding
        | S::Discarded => false,
    });
    in_use && !parting
}

/// Names of the LVs of a record, data first.
pub fn lv_names(record: &Record) -> (String, String) {
    let data = name::data_lv(record.id, record.made_in, record.lineage.revision);
    (data, name::meta_lv(record.id, record.made_in))
}

/// Name of the data LV that a record's `Step::Allocate` makes.
pub fn made_lv(record: &Record) -> String {
    match &record.phase {
        Phase::Reverting(_) => replacement(record, 1),
        Phase::Creating
        | Phase::Local
        | Phase::Lent(_)
        | Phase::Receiving(_)
        | Phase::Relaying(_)
        | Phase::Deleting => lv_names(record).0,
    }
}

/// Name of the data LV so many replacements after the present one.
fn replacement(record: &Record, by: i32) -> String {
    let revision = record.lineage.revision.saturating_add_signed(by);
    name::data_lv(record.id, record.made_in, revision)
}

/// Name of a device of a record.
pub fn dm_name(record: &Record, role: Role) -> DmName {
    DmName::new(record.id, record.generation, role)
}

struct Plan<'a> {
    record: &'a Record,
    seen: &'a Seen,
}

/// What a peer may do with a window on a device.
const fn read_only(device: DevNo, offset: Sectors) -> Target {
    Target::ReadOnly { device, offset }
}

fn one(step: Step) -> Next {
    Next::Do(vec![step])
}

impl Plan<'_> {
    fn table(&self, target: Target) -> Table {
        Table::whole(self.record.size, target)
    }

    /// A table of what lies below the handle while it is copied.
    fn copied(receiving: &Receiving, target: Target) -> Table {
        Table::whole(receiving.length, target)
    }

    /// Windows on the clone and, where the volume has grown since, on the data LV.
    fn over_clone(
        &self,
        receiving: &Receiving,
        clone: DevNo,
        data: DevNo,
        window: impl Fn(DevNo, Sectors) -> Target,
    ) -> Table {
        let at = receiving.length;
        let tail = (self.record.size > at).then(|| (at, window(data, at)));
        Table { length: self.record.size, target: window(clone, Sectors(0)), tail }
    }

    fn on_data(&self, data: &Lv) -> Table {
        self.table(Target::Linear { device: data.device, offset: Sectors(0) })
    }

    /// Brings the handle to `table` if somebody wants it, and away otherwise;
    /// `None` when it is as it should be.
    fn handle(&self, table: &Table, open: impl FnOnce(Table) -> Step) -> Option<Next> {
        match &self.seen.handle {
            Some(_) if !self.record.attached => Some(one(Step::Remove(Role::Handle))),
            Some(handle) if handle.table.as_ref() != Some(table) => Some(one(open(table.clone()))),
            Some(handle) if handle.suspended => Some(one(Step::Resume(Role::Handle))),
            None if self.record.attached => Some(one(open(table.clone()))),
            Some(_) | None => None,
        }
    }

    fn set_handle(table: Table) -> Step {
        Step::Set(Role::Handle, table)
    }

    /// What is made of another copy is of the moment at which it was asked for, or
    /// is not made at all: whoever died over it has told nobody that it exists.
    fn creating(&self) -> Next {
        if self.record.lineage.template.is_some() && !self.seen.asked {
            return Next::Journal(match self.record.lent() {
                Some(_) => Event::RevokeAsked,
                None => Event::DeleteAsked,
            });
        }
        let of = self.record.lineage.template.clone();
        let data = self.record.size.bytes();
        Next::Allocate(vec![Step::Allocate { data, meta: None, of }])
    }

    /// The new data LV beside the old one; once it is journalled as the volume's, the
    /// old one goes.
    fn reverting(&self, revert: &Revert) -> Next {
        let retired = |name, uuid| Next::DoThen(Step::RetireData { name, uuid }, Event::Retired);
        match &revert.stage {
            RevertStage::Making => {
                let (data, of) = (revert.size.bytes(), Some(revert.template.clone()));
                Next::Allocate(vec![Step::Allocate { data, meta: None, of }])
            }
            RevertStage::Undoing => retired(replacement(self.record, 1), None),
            RevertStage::Retiring(old) => retired(replacement(self.record, -1), Some(old.clone())),
        }
    }

    fn local(&self) -> Next {
        if self.record.taken().is_some_and(|taken| taken.deferred) {
            return match self.seen.read {
                true => Next::Wait(Wait::Readers),
                false => Next::Journal(Event::DeleteAsked),
            };
        }
        let Some(data) = &self.seen.data else { return Next::Wait(Wait::Pool) };
        self.grown().or_else(|| self.own_handle(data)).unwrap_or(Next::Settled)
    }

    /// A growth that was begun.
    fn grown(&self) -> Option<Next> {
        let to = self.record.growing?;
        Some(Next::DoThen(Step::Grow { to, meta: None }, Event::Grown))
    }

    /// The handle of a volume that this node may write.
    fn own_handle(&self, data: &Lv) -> Option<Next> {
        self.top(&self.on_data(data), Self::set_handle)
    }

    /// The handle of a copy that is the volume: as `table` says, unless it was
    /// handed over, or nobody has confirmed since the last boot that it was not.
    fn top(&self, table: &Table, open: impl FnOnce(Table) -> Step) -> Option<Next> {
        if self.record.lent().is_some_and(|lent| lent.stage.is_closed()) {
            return self.fenced_handle();
        }
        if self.record.attached && !self.record.is_confirmed(self.seen.boot) {
            return Some(Next::Ask(Call::QueryGrant));
        }
        self.handle(table, open)
    }

    fn lent(&self, lent: &Lent) -> Next {
        if self.record.lineage.template.is_some() {
            return match lent.stage {
                // Nothing was exported yet.
                LentStage::Revoking => Next::Journal(Event::Revoked),
                LentStage::Releasing => self.releasing(lent),
                // For a snapshot elsewhere: nobody there was told that it exists.
                LentStage::Fenced if !self.seen.asked => Next::Journal(Event::ReleaseAsked),
                LentStage::Published
                | LentStage::Fencing
                | LentStage::Fenced
                | LentStage::Yielding
                | LentStage::Serving
                | LentStage::Reclaiming => self.creating(),
            };
        }
        let data = match (&self.seen.data, lent.stage) {
            // What is on its way out may be half gone already.
            (_, LentStage::Releasing) => return self.releasing(lent),
            (_, LentStage::Reclaiming) => return self.reclaiming(lent),
            (Some(data), _) => data,
            (None, _) => return Next::Wait(Wait::Pool),
        };
        self.grown()
            .or_else(|| {
                let export = self.table(read_only(data.device, Sectors(0)));
                self.handed_over(lent, data.device, export)
            })
            .or_else(|| self.own_handle(data))
            .unwrap_or(Next::Wait(Wait::Peer))
    }

    /// What the borrower needs of the volume here; `None` when it has it. A flush
    /// of `below` brings everything to stable storage.
    fn handed_over(&self, lent: &Lent, below: DevNo, export: Table) -> Option<Next> {
        match lent.stage {
            LentStage::Published => self.exported(lent, export),
            LentStage::Fencing if lent.served_in.is_some_and(|boot| boot != self.seen.boot) => {
                Some(Next::Journal(Event::Rebooted))
            }
            LentStage::Fencing | LentStage::Yielding => Some(
                self.fenced_handle()
                    .or_else(|| self.exported(lent, export))
                    .unwrap_or(Next::DoThen(Step::Flush(below), Event::Fenced)),
            ),
            LentStage::Fenced => self.fenced_handle().or_else(|| self.exported(lent, export)),
            LentStage::Revoking => {
                Some(self.unexported(lent).unwrap_or(Next::Journal(Event::Revoked)))
            }
            LentStage::Serving => self.served(lent),
            LentStage::Releasing | LentStage::Reclaiming => None,
        }
    }

    /// The middle of a chain: the source's side below, the borrower's above.
    fn relaying(&self, relay: &Relay) -> Next {
        let Relay { receiving, lent } = relay;
        if receiving.stage == ReceivingStage::Discarded || lent.stage != LentStage::Releasing {
            return self.receiving(receiving);
        }
        self.fenced_handle()
            .or_else(|| self.unexported(lent))
            .or_else(|| self.handle_leaving())
            .or_else(|| self.dismantled(receiving))
            .unwrap_or(Next::DoThen(Step::RetireAll, Event::Retired))
    }

    fn releasing(&self, lent: &Lent) -> Next {
        self.fenced_handle()
            .or_else(|| self.unexported(lent))
            .or_else(|| self.handle_leaving())
            .unwrap_or(Next::Forget(vec![Step::RetireAll]))
    }

    /// The device below the export, then the export. The former is only ever
    /// reloaded: what the borrower is connected to stays.
    fn exported(&self, lent: &Lent, table: Table) -> Option<Next> {
        let live = self.seen.export.as_ref().and_then(|device| device.table.as_ref());
        if live != Some(&table) {
            return Some(one(Step::Set(Role::Export, table)));
        }
        let export = lent.export.clone();
        if self.seen.published != Presence::Complete {
            return Some(one(Step::Publish { export, host_nqn: lent.host_nqn.clone() }));
        }
        (!self.seen.announced).then(|| one(Step::Announce(export)))
    }

    fn unexported(&self, lent: &Lent) -> Option<Next> {
        if self.seen.published != Presence::Absent {
            return Some(one(Step::Unpublish {
                export: lent.export.clone(),
                host_nqn: lent.host_nqn.clone(),
            }));
        }
        self.seen.export.as_ref().map(|_| one(Step::Remove(Role::Export)))
    }

    /// A handle that fails every request, for as long as somebody holds it;
    /// it is never made anew.
    fn fenced_handle(&self) -> Option<Next> {
        let handle = self.seen.handle.as_ref()?;
        let table = self.table(Target::Error);
        if handle.table.as_ref() != Some(&table) || handle.suspended {
            return Some(one(Step::FenceHandle(table)));
        }
        let stays = self.record.attached || handle.open_count > 0;
        (!stays).then(|| one(Step::Remove(Role::Handle)))
    }

    /// A handle that nobody new may use goes with its last user.
    fn handle_leaving(&self) -> Option<Next> {
        let handle = self.seen.handle.as_ref()?;
        (!handle.leaving).then(|| one(Step::RemoveDeferred(Role::Handle)))
    }

    fn receiving(&self, receiving: &Receiving) -> Next {
        use ReceivingStage as S;
        if let Some(remote) = &receiving.remote {
            return self.remote(receiving, remote);
        }
        if let Some(failure) = &receiving.failure {
            return self.failed(failure);
        }
        match receiving.stage {
            S::Requesting | S::Forking if !self.seen.asked => Next::Journal(Event::DeleteAsked),
            S::Requesting => Next::Ask(Call::Copy),
            S::Forking if !self.seen.steady => Next::Wait(Wait::Request),
            S::Forking => self.forking(receiving),
            S::Allocating => self.allocating(receiving),
            S::Aborting => self.aborting(receiving),
            S::Withdrawing | S::Discarded if receiving.forgotten => Next::Forget(Vec::new()),
            S::Withdrawing => Next::AskThenForget(Call::Revoke),
            S::Discarding if self.seen.handle.is_some() => one(Step::Remove(Role::Handle)),
            S::Discarding => {
                self.dismantled(receiving).unwrap_or(Next::DoThen(Step::RetireAll, Event::Retired))
            }
            S::Discarded => Next::AskThenForget(Call::Release),
            // Of a volume without a copy here only.
            S::Linking
            | S::Remote
            | S::Localizing
            | S::Building
            | S::Clearing
            | S::Settling
            | S::Returning => Next::Wait(Wait::Operator),
            stage @ (S::Zeroing
            | S::Assembling
            | S::Held
            | S::Switching
            | S::Refused
            | S::Hydrating
            | S::Collapsing
            | S::Parting) => {
                let Some(data) = &self.seen.data else { return Next::Wait(Wait::Pool) };
                if let Some(next) = self.grown() {
                    return next;
                }
                match stage {
                    S::Collapsing => self
                        .top(&self.on_data(data), Self::set_handle)
                        .or_else(|| {
                            self.handed_on(
                                data.device,
                                self.table(read_only(data.device, Sectors(0))),
                            )
                        })
                        .unwrap_or(Next::DoThen(Step::Flush(data.device), Event::Collapsed)),
                    S::Parting => self.parting(receiving, data),
                    _ => match &self.seen.meta {
                        None => Next::Wait(Wait::Pool),
                        Some(meta) => self.above_meta(receiving, data, meta),
                    },
                }
            }
        }
    }

    /// As [`Plan::handed_over`], for a copy that may or may not be lent.
    fn handed_on(&self, below: DevNo, export: Table) -> Option<Next> {
        self.record.lent().and_then(|lent| self.handed_over(lent, below, export))
    }

    fn failed(&self, failure: &Failure) -> Next {
        if failure.boot != self.seen.boot {
            return Next::Journal(Event::Rebooted);
        }
        match self.running_handle() {
            true => one(Step::SuspendHandle),
            false => Next::Wait(Wait::Operator),
        }
    }

    /// Whether consumers can write through the handle. One that holds writes back
    /// must not be suspended: that would let them go.
    fn running_handle(&self) -> bool {
        let holds = |table: &Table| matches!(table.target, Target::Hold { .. });
        self.seen
            .handle
            .as_ref()
            .is_some_and(|handle| !handle.suspended && !handle.table.as_ref().is_some_and(holds))
    }

    fn allocating(&self, receiving: &Receiving) -> Next {
        let meta = hydration::metadata_bytes(self.record.size, receiving.region);
        let mut steps =
            vec![Step::Allocate { data: self.record.size.bytes(), meta: Some(meta), of: None }];
        if !self.seen.import.connected {
            steps.push(Step::Connect(receiving.source.export.clone()));
        }
        Next::Allocate(steps)
    }

    /// A snapshot of what is still hydrating is of the moment at which it was asked for,
    /// as every copy is; what it lacks is at the source for its sake by now.
    fn forking(&self, receiving: &Receiving) -> Next {
        let Some(of) = self.record.lineage.template.clone() else {
            return Next::Wait(Wait::Operator);
        };
        let meta = hydration::metadata_bytes(self.record.size, receiving.region);
        Next::Allocate(vec![Step::Fork { of, meta }])
    }

    fn above_meta(&self, receiving: &Receiving, data: &Lv, meta: &Lv) -> Next {
        use ReceivingStage as S;
        if receiving.stage == S::Zeroing {
            return Next::DoThen(Step::ZeroMeta(meta.device), Event::Zeroed);
        }
        if let Some(rebuild) = receiving.rebuild {
            // Also because it may refuse: then there is nothing to follow.
            if receiving.stage == S::Switching {
                return Next::Ask(Call::Fence);
            }
            return self.rebuilding(receiving, data, meta, rebuild);
        }
        if receiving.forgotten
            && let Some(next) = self.given_up(receiving)
        {
            return next;
        }
        let armed = receiving.stage != S::Assembling;
        if !armed && self.seen.import.namespace.is_none() {
            return one(Step::Connect(receiving.source.export.clone()));
        }
        let clone = match self.clone_built(receiving, data, meta, armed) {
            Ok(clone) => clone,
            Err(next) => return *next,
        };
        if !armed {
            return Next::Journal(Event::Armed);
        }
        if let Some(next) = self.failed_clone() {
            return next;
        }
        // First, because a request that waits for the source keeps tables from
        // being swapped.
        if !receiving.forgotten
            && let Some(next) = self.source_reached(receiving)
        {
            return next;
        }
        let stacked = match receiving.stage {
            S::Hydrating => {
                let window = |device, offset| Target::Linear { device, offset };
                let table = self.over_clone(receiving, clone.number, data.device, window);
                let export = self.over_clone(receiving, clone.number, data.device, read_only);
                self.top(&table, Step::OpenHandle).or_else(|| self.handed_on(clone.number, export))
            }
            _ => self.held_handle(clone.number, false),
        };
        if let Some(next) = stacked {
            return next;
        }
        match receiving.stage {
            S::Held | S::Switching
                if self.seen.import.size.is_some_and(|size| size > receiving.length) =>
            {
                let size = self.seen.import.size.unwrap_or(receiving.length);
                Next::Journal(Event::SourceGrew(size))
            }
            S::Held if self.seen.held > 0 => Next::Journal(Event::SwitchAsked),
            S::Held | S::Refused => Next::Wait(Wait::Switch),
            S::Switching => Next::Ask(Call::Fence),
            _ => self.hydrating(receiving),
        }
    }

    /// The handle of a copy whose source may still be written. A swap lets go of what
    /// it holds: so it grows only while what is below fails every write, and no write
    /// waits; otherwise when it is opened.
    fn held_handle(&self, below: DevNo, may_grow: bool) -> Option<Next> {
        // The copy is built, and so is its way to the source.
        let source = self.seen.src.as_ref()?.number;
        let length = self.record.receiving().map_or(self.record.size, |r| r.length);
        let block = Sectors::from_bytes(u64::from(self.record.logical_block_size));
        let wanted = Table::held(length, below, source, block);
        let live = self.seen.handle.as_ref().and_then(|handle| handle.table.as_ref());
        match live {
            Some(live)
                if self.record.attached
                    && live.target == wanted.target
                    && live.length < wanted.length =>
            {
                (may_grow && self.seen.held == 0).then(|| one(Step::GrowHeld(wanted)))
            }
            // What it is cannot be told, and a swap might let writes go.
            Some(Table { target: Target::Foreign { .. }, .. }) if self.record.attached => {
                Some(Next::Wait(Wait::Operator))
            }
            _ => self.handle(&wanted, Self::set_handle),
        }
    }

    /// The source has grown while it was held: the LVs grow, and a clone of the new
    /// size takes the place of the unused one. Meanwhile what stands in its place
    /// reads from the source and fails every write, so that nothing which the handle
    /// lets go of by mistake is acknowledged.
    fn rebuilding(&self, receiving: &Receiving, data: &Lv, meta: &Lv, rebuild: Rebuild) -> Next {
        let length = receiving.length;
        if let Some(next) = self.source_reached(receiving) {
            return next;
        }
        let import = &self.seen.import;
        if !import.live || import.namespace.is_none() {
            return Next::Wait(Wait::Source);
        }
        if import.size.is_none_or(|size| size < length) {
            let export = receiving.source.export.clone();
            return one(Step::Rescan { export, at_least: length });
        }
        if rebuild == Rebuild::Emptied {
            return match self.clone_built(receiving, data, meta, false) {
                Ok(_) => Next::Journal(Event::Armed),
                Err(next) => *next,
            };
        }
        let meta_bytes = hydration::metadata_bytes(length, receiving.region);
        if data.length < length || meta.length.bytes() < meta_bytes {
            return one(Step::Grow { to: length, meta: Some(meta_bytes) });
        }
        let src = match self.src_built(receiving, false) {
            Ok(src) => src,
            Err(next) => return *next,
        };
        if let Some(clone) = &self.seen.clone
            && clone.table.is_some()
        {
            let through = Self::copied(receiving, read_only(src.number, Sectors(0)));
            if clone.table.as_ref() != Some(&through) {
                return one(Step::Set(Role::Clone, through));
            }
            if clone.suspended {
                return one(Step::Resume(Role::Clone));
            }
            if let Some(next) = self.held_handle(clone.number, true) {
                return next;
            }
        }
        Next::DoThen(Step::ZeroMeta(meta.device), Event::Zeroed)
    }

    /// The clone on its metadata, its destination and its source, refusing
    /// discards; or what must be done first.
    fn clone_built(
        &self,
        receiving: &Receiving,
        data: &Lv,
        meta: &Lv,
        armed: bool,
    ) -> Result<&Device, Box<Next>> {
        self.clone_over(receiving, data, meta, armed, false)
    }

    /// The way to the source, that takes writes or does not; or what must be done
    /// first.
    fn src_built(&self, receiving: &Receiving, writable: bool) -> Result<&Device, Box<Next>> {
        let namespace = self.seen.import.namespace;
        let source = match receiving.forgotten {
            true => Target::Lost,
            false => Self::way(namespace, writable),
        };
        let wanted = Self::copied(receiving, source);
        let Some(src) = &self.seen.src else {
            return Err(Box::new(one(Step::Set(Role::Src, wanted))));
        };
        let stays = match &src.table {
            None => false,
            Some(table) if receiving.forgotten => *table == wanted,
            // A source that is away keeps the path it had, and takes what it took: its
            // requests wait there.
            Some(_) if namespace.is_none() => true,
            Some(table) => table.target == wanted.target && table.length >= receiving.length,
        };
        if !stays {
            return Err(Box::new(one(Step::Set(Role::Src, wanted))));
        }
        Ok(src)
    }

    /// As [`Plan::clone_built`], over a way to the source that takes writes or not.
    fn clone_over(
        &self,
        receiving: &Receiving,
        data: &Lv,
        meta: &Lv,
        armed: bool,
        writable: bool,
    ) -> Result<&Device, Box<Next>> {
        let src = self.src_built(receiving, writable)?;
        let target = Target::Clone {
            meta: meta.device,
            dest: data.device,
            src: src.number,
            region: receiving.region,
        };
        let table = Self::copied(receiving, target);
        let clone = match &self.seen.clone {
            Some(clone) if clone.table.as_ref() == Some(&table) => clone,
            // What has stood in for a clone that is made anew.
            Some(Device {
                table: Some(Table { target: Target::ReadOnly { device, .. }, .. }),
                ..
            }) if receiving.rebuild == Some(Rebuild::Emptied) && *device == src.number => {
                return Err(Box::new(one(Step::LoadClone { table, floor: None })));
            }
            // Another live table on it would be a second instance of the
            // metadata, or somebody else's work.
            Some(Device { table: Some(_), .. }) => {
                return Err(Box::new(Next::Wait(Wait::Operator)));
            }
            Some(Device { table: None, .. }) | None => {
                if armed && let Some(next) = Self::unseeded_before_a_reboot(receiving) {
                    return Err(Box::new(next));
                }
                let floor = armed.then_some(receiving.floor);
                return Err(Box::new(one(Step::LoadClone { table, floor })));
            }
        };
        if clone.suspended {
            return Err(Box::new(one(Step::Resume(Role::Clone))));
        }
        if !self.seen.discards_blocked {
            return Err(Box::new(one(Step::BlockDiscards(clone.number))));
        }
        Ok(clone)
    }

    /// Nothing more comes from a source that is given up: copying ends, because
    /// dm-clone would try regions that fail for ever, and what waits for it fails.
    fn given_up(&self, receiving: &Receiving) -> Option<Next> {
        if matches!(self.seen.clone_status, Some(CloneStatus::Working { enabled: true, .. })) {
            return Some(one(Step::Hydrate(false)));
        }
        self.source_cut(receiving)
    }

    fn failed_clone(&self) -> Option<Next> {
        let why = match self.seen.clone_status.as_ref()? {
            CloneStatus::Working { read_only: false, .. } => return None,
            CloneStatus::Working { read_only: true, .. } => {
                "dm-clone can no longer write its metadata"
            }
            CloneStatus::Failed => "dm-clone failed",
        };
        // Known first, because suspending may have to wait for the source.
        Some(Next::Journal(Event::Failed(Failure { why: why.to_owned(), boot: self.seen.boot })))
    }

    /// A connection to the source whose path is in use, or the attempt.
    fn source_reached(&self, receiving: &Receiving) -> Option<Next> {
        let import = &self.seen.import;
        if !import.connected {
            let attempt = || one(Step::Connect(receiving.source.export.clone()));
            return (!self.seen.connecting).then(attempt);
        }
        match import.namespace {
            Some(namespace) if import.live && self.seen.path_failed => {
                Some(one(Step::ReinstatePath(namespace)))
            }
            _ => None,
        }
    }

    /// Whether reads wait while the source is away.
    fn src_queues(&self) -> bool {
        let table = self.seen.src.as_ref().and_then(|src| src.table.as_ref());
        table.is_some_and(Table::is_queue)
    }

    fn hydrating(&self, receiving: &Receiving) -> Next {
        let Some(CloneStatus::Working { hydrated, total, enabled, .. }) = self.seen.clone_status
        else {
            return Next::Wait(Wait::Operator);
        };
        let import = &self.seen.import;
        let reachable = import.live && import.namespace.is_some() && !self.seen.path_failed;
        let tuning = &self.record.tuning;
        // Once another node has taken over, what is copied here is copied twice.
        let closed = self.record.lent().is_some_and(|lent| lent.stage.is_closed());
        let seeded = receiving.seeding != Seeding::Wanted;
        let wanted = reachable
            && seeded
            && !tuning.paused
            && !self.seen.resting
            && !closed
            && !receiving.forgotten;
        if enabled && !wanted {
            return one(Step::Hydrate(false));
        }
        if hydrated < total && !reachable && !receiving.forgotten {
            return Next::Wait(Wait::Source);
        }
        // What was read before the fence may have stayed in the page cache.
        if let Some(handle) = &self.seen.handle
            && !self.seen.cache_dropped
        {
            return one(Step::DropCache(handle.number));
        }
        if hydrated == total {
            return Next::DoThen(Step::Commit, Event::Committed);
        }
        if receiving.forgotten {
            return Next::Wait(Wait::Lost);
        }
        if closed {
            return Next::Wait(Wait::Peer);
        }
        if let Some(next) = self.seeding(receiving) {
            return next;
        }
        if self.seen.tuned != Some((tuning.threshold, tuning.batch)) {
            return one(Step::Tune { threshold: tuning.threshold, batch: tuning.batch });
        }
        if wanted && !enabled {
            return one(Step::Hydrate(true));
        }
        if hydrated.saturating_sub(receiving.floor) >= total.div_ceil(8) {
            return Next::JournalFloor;
        }
        if let Some(how) = self.seen.push {
            return one(Step::Push { threshold: tuning.threshold, how });
        }
        Next::Wait(Wait::Hydration)
    }

    fn parting(&self, receiving: &Receiving, data: &Lv) -> Next {
        let above = self.top(&self.on_data(data), Self::set_handle).or_else(|| {
            self.handed_on(data.device, self.table(read_only(data.device, Sectors(0))))
        });
        if let Some(next) = above {
            return next;
        }
        if self.seen.clone.is_some() {
            return one(Step::Remove(Role::Clone));
        }
        if self.seen.src.is_some() {
            return one(Step::Remove(Role::Src));
        }
        if self.seen.import.connected {
            return one(Step::Disconnect(receiving.source.export.clone()));
        }
        if receiving.meta.is_some() {
            return Next::DoThen(Step::RetireMeta, Event::MetaRetired);
        }
        if receiving.forgotten {
            return Next::Journal(Event::SourceReleased);
        }
        Next::Ask(Call::Release)
    }

    fn aborting(&self, receiving: &Receiving) -> Next {
        self.sealed(receiving)
            .or_else(|| self.dismantled(receiving))
            .or_else(|| self.handle_leaving())
            .unwrap_or_else(|| self.retired())
    }

    /// Nothing waits for the source any more, and nothing comes from it.
    fn source_cut(&self, receiving: &Receiving) -> Option<Next> {
        let open = self.seen.import.connected || self.src_queues();
        open.then(|| one(Step::CutSource(receiving.source.export.clone())))
    }

    /// Everything between the data LV and the source is gone.
    fn dismantled(&self, receiving: &Receiving) -> Option<Next> {
        let gone = |there: &Option<Device>, role| there.as_ref().map(|_| one(Step::Remove(role)));
        self.source_cut(receiving)
            .or_else(|| gone(&self.seen.clone, Role::Clone))
            .or_else(|| gone(&self.seen.src, Role::Src))
    }
}
