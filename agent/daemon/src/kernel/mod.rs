//! The seam between what dmlocal decides and what the kernel and LVM do.
//!
//! [`Kernel`] has two verbs: look at one volume, and apply one step to it.
//! [`real`] does it; `fake` simulates it and stops between any two actions;
//! `agree` leads both through one story. `on_node` checks on a real kernel what
//! both rely on.

#[cfg(test)]
mod agree;
pub mod block;
pub mod dm;
pub mod exec;
#[cfg(test)]
pub mod fake;
pub mod lvm;
pub mod nvme;
pub mod nvmet;
#[cfg(test)]
mod on_node;
pub mod real;
mod thin;

use std::net::IpAddr;

use dmlocal_model::{
    name::VolumeId,
    plan::{Device, Seen, Step},
    seeding::Unwritten,
    units::Sectors,
    volume::{Event, Record},
};
use uuid::Uuid;

/// Why a step was not done: one variant per thing that is done about it.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// Somebody holds the device open.
    #[error("{0} is in use")]
    Busy(String),
    /// The pool has no room for it.
    #[error("no room in the pool: {0}")]
    NoRoom(String),
    /// A check that must hold before the step did not.
    #[error("refused: {0}")]
    Refused(String),
    /// It did not end in time; whether it will is not known.
    #[error("no end in sight: {0}")]
    TimedOut(String),
    /// Anything else that LVM or the kernel said.
    #[error("{0}")]
    Failed(String),
}

/// What a pool is at this moment.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolFacts {
    /// Bytes of the thin pool's data.
    pub size: u64,
    /// Bytes of it in use.
    pub used: u64,
    /// Bytes in the group outside the thin pool.
    pub free_outside: u64,
    /// Bytes of an allocation unit.
    pub chunk: u64,
    /// Bytes of a logical block.
    pub logical_block_size: u32,
    /// Whether new chunks are zeroed before they are handed out.
    pub zeroes: bool,
    /// Whether a full pool fails writes at once rather than after a minute.
    pub errors_when_full: bool,
}

/// What a thin pool itself says at a moment: shares in use, 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PoolUsage {
    /// Of its data blocks.
    pub data: f64,
    /// Of its own metadata.
    pub metadata: f64,
    /// Whether new chunks are zeroed before they are handed out.
    pub zeroes: bool,
}

impl PoolUsage {
    /// Of what is scarcer.
    pub const fn scarcest(self) -> f64 {
        self.data.max(self.metadata)
    }
}

/// How much was written through a handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Writes, discards and flushes that have ended since the device was made.
    pub done: u64,
    /// Writes that have not ended.
    pub under_way: u64,
}

/// The kernel and LVM, as far as dmlocal uses them. Calls block; they are made
/// from blocking tasks.
pub trait Kernel: Send + Sync + 'static {
    /// Identity of this boot (`/proc/sys/kernel/random/boot_id`).
    fn boot(&self) -> Uuid;

    /// Release of the kernel.
    fn release(&self) -> String;

    /// Device-mapper targets, loaded if need be, as `name major.minor.patch`.
    ///
    /// # Errors
    /// Device-mapper cannot be asked.
    fn targets(&self) -> Result<Vec<String>, StepError>;

    /// Makes the pools' logical volumes active, and the thin pools themselves;
    /// of one pool, or of all.
    ///
    /// # Errors
    /// LVM refuses.
    fn activate(&self, pool: Option<&str>) -> Result<(), StepError>;

    /// A pool's facts; `None` when it is not there.
    ///
    /// # Errors
    /// LVM cannot be asked.
    fn pool(&self, name: &str) -> Result<Option<PoolFacts>, StepError>;

    /// What a pool is like at this moment, without asking LVM.
    ///
    /// # Errors
    /// The pool is not active.
    fn pool_usage(&self, name: &str) -> Result<PoolUsage, StepError>;

    /// Whether nobody listens on a TCP port.
    fn port_is_free(&self, address: IpAddr, port: u16) -> bool;

    /// Names of all devices and exports of ours, whether the journal knows them
    /// or not; a handle that goes with its last user is not among them.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    fn ours(&self) -> Result<Vec<String>, StepError>;

    /// Everything that is there for a volume. `connecting`, `resting`, `push`, `tuned`,
    /// `cache_dropped`, `announced` and `map` are the caller's to fill in.
    ///
    /// # Errors
    /// Something cannot be asked.
    fn look(&self, record: &Record) -> Result<Seen, StepError>;

    /// The handle of a volume, whether there is a record or not.
    ///
    /// # Errors
    /// Device-mapper cannot be asked.
    fn handle(&self, id: VolumeId) -> Result<Option<Device>, StepError>;

    /// Writes that wait in the handle; cheap.
    ///
    /// # Errors
    /// Device-mapper cannot be asked.
    fn held(&self, record: &Record) -> Result<u64, StepError>;

    /// How much was written through the handle; `None` when nobody has it open.
    /// Cheap.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    fn written(&self, record: &Record) -> Result<Option<Written>, StepError>;

    /// Does one step; doing it again is harmless. The event is what an
    /// allocation yields.
    ///
    /// # Errors
    /// The step was not, or not wholly, done.
    fn apply(&self, record: &Record, step: &Step) -> Result<Option<Event>, StepError>;

    /// How much a volume takes in its thin pool; cheap. None where that is not known.
    fn allocated(&self, record: &Record) -> Option<Sectors>;

    /// What of a volume was certainly never written, in regions of this size. The
    /// volume must be fenced.
    ///
    /// # Errors
    /// Nothing certain is known, for whatever reason.
    fn allocation(&self, record: &Record, region: Sectors) -> Result<Unwritten, StepError>;

    /// Commits the clone's metadata; returns how many regions are here for good.
    ///
    /// # Errors
    /// It cannot be committed.
    fn committed(&self, record: &Record) -> Result<u64, StepError>;
}
