//! Device-mapper, by ioctl.
//!
//! ```text
//! set     nothing ──create──▶ no table ──load──▶ inactive table ──RESUME──▶ live
//!         live ──load──▶ live + inactive ──RESUME (suspend, swap, resume)──▶ live
//! ```
//!
//! Devices are found by their DM UUID, never by name alone, and nothing whose
//! UUID is not the asked one is ever changed. The `devicemapper` crate does the
//! ioctls except RESUME and REMOVE: for those it waits without bound for udev,
//! which starts two processes in its rules meanwhile. Ours give udev no cookie to
//! complete and so cannot hang on a stuck udevd.
//!
//! Suspending always skips the freezing of file systems and requeues instead of
//! waiting where a target can (SKIP_LOCKFS, NOFLUSH), and runs on a thread that a
//! signal interrupts at a deadline; the kernel then rolls back (drivers/md/dm.c,
//! `__dm_suspend`). What it cannot interrupt is dm-clone waiting for its own
//! copies: hydration must be off and drained before a clone is suspended.
//!
//! `raw` and `interrupt` hold the `unsafe` that this takes: two header-only ioctls
//! and one signal handler that does nothing.

mod error;
mod interrupt;
mod link;
mod look;
mod raw;

use std::{
    fs::File,
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use devicemapper::{DM, DevId, DmFlags, DmOptions};
use dmlocal_model::{
    name::{DmName, refuser},
    table::{Table, Target},
    units::{DevNo, Sectors},
};

pub(super) use self::{error::describe, interrupt::interruptible, look::path_failed};
use self::{
    error::{context, plain, with_undo},
    link::{link, unlink},
};
pub use self::{
    link::Udev,
    look::{Device, TargetVersion},
};
use super::block;

/// How often a RESUME is repeated on a device that a failed swap left suspended.
const RESUMES: u32 = 5;

/// How long a removal is repeated while something (udev, mostly) holds the
/// device open for a moment.
const REMOVE_PATIENCE: Duration = Duration::from_secs(5);

/// The first pause between attempts; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Length of the refuser: 512 PiB, more than any volume, and less than what a device
/// can be long in bytes.
const REFUSER: Sectors = Sectors(1 << 50);

/// What udev is told when a table is set, in the high half of the uevent's
/// `DM_COOKIE` (`DM_UDEV_FLAGS_SHIFT` of libdm/libdevmapper.h): a real activation
/// (`DM_UDEV_PRIMARY_SOURCE_FLAG`), for which neither device-mapper's own rules
/// (`DM_UDEV_DISABLE_DM_RULES_FLAG`, 1) nor any others (`…_SUBSYSTEM_…` 2,
/// `…_DISK_…` 4, `…_OTHER_…` 8) do anything. The low half, which names a
/// semaphore to wait for, stays zero. The udev rules of dmlocal know this value
/// and start no process to decode it.
const HIDDEN: u32 = (0x0001 | 0x0002 | 0x0004 | 0x0008 | 0x0040) << 16;

/// No flags: udev goes by what it noted when the table was set.
const NO_COOKIE: u32 = 0;

/// How to remove a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remove {
    /// At once; a device that stays open is an error of the kind
    /// [`io::ErrorKind::ResourceBusy`].
    Now,
    /// As soon as its last user closes it.
    Deferred,
}

/// The control device. All methods may be called from several threads: each is a
/// sequence of ioctls that the kernel serialises per device.
#[derive(Clone)]
pub struct Dm {
    control: Arc<DM>,
    refuser: Arc<Refuser>,
}

/// The device that fails every request.
struct Refuser {
    number: DevNo,
    /// Kept open, so that nobody removes it and its number stays its own.
    _open: Option<File>,
}

impl Dm {
    /// Opens `/dev/mapper/control`. A [`Target::ReadOnly`] can neither be loaded nor
    /// recognised without the node's refuser.
    pub fn open() -> io::Result<Self> {
        let control = Arc::new(DM::new().map_err(|error| plain(&error))?);
        let nothing = Refuser { number: DevNo { major: 0, minor: 0 }, _open: None };
        Ok(Self { control, refuser: Arc::new(nothing) })
    }

    /// The same, and makes the node's refuser if it is not there.
    pub fn with_refuser() -> io::Result<Self> {
        let making = Self::open()?;
        let (name, table) = (refuser(), Table::whole(REFUSER, Target::Error));
        making.set(&name, &table, Udev::Hidden, REMOVE_PATIENCE)?;
        let number = making.by_uuid(&name.uuid)?.ok_or(io::ErrorKind::NotFound)?;
        let open = block::open(number)?;
        // Opened first: now it cannot become another one.
        if !making.lookup(&name.uuid)?.is_some_and(|now| now.number == number && now.serves(&table))
        {
            return Err(io::Error::other(format!("{name} is somebody else's")));
        }
        Ok(Self { refuser: Arc::new(Refuser { number, _open: Some(open) }), ..making })
    }

    /// Creates the device with this table, or swaps the table of a live one in a
    /// single ioctl. A device that already serves this very table is left alone,
    /// but for what a crash may have left beside it.
    ///
    /// A [`Target::Queue`] is loaded read-only: nothing may ever write to a source, but
    /// through a [`Target::WritableQueue`]. If one already has this path and the kernel
    /// has given the path up, the path is taken up again.
    ///
    /// A [`Target::Hold`] lets go of the writes it holds as soon as a swap begins, into
    /// the device below and whatever the new table is, and holds nothing more even
    /// if the swap fails (drivers/md/dm-delay.c has `presuspend` without its undo).
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`]: the I/O in flight did not end before the
    /// deadline; the old table is live. After any error no inactive table is left
    /// and the device is not suspended, or the error says so.
    pub fn set(
        &self,
        name: &DmName,
        table: &Table,
        udev: Udev,
        deadline: Duration,
    ) -> io::Result<()> {
        let found = self.device(name)?;
        let created = found.is_none();
        match found {
            None => self.create(name)?,
            Some(device) if device.serves(table) => {
                if device.has_inactive {
                    self.clear(name)?;
                }
                self.reinstate(name, table)?;
                return link(name, device.number, udev);
            }
            Some(_) => {}
        }
        if let Err(error) = self.load(name, table) {
            let undone =
                if created { self.remove(name, Remove::Now) } else { self.clear_if_there(name) };
            return Err(with_undo(error, undone));
        }
        self.swap(name, table, deadline)?;
        // The number is read again: the device is ours by UUID, not by memory.
        match self.by_uuid(&name.uuid)? {
            Some(number) => link(name, number, udev),
            None => Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("{name} was removed while its table was set"),
            )),
        }
    }

    fn create(&self, name: &DmName) -> io::Result<()> {
        let uuid = dm_uuid(&name.uuid)?;
        let created = self.control.device_create(
            &dm_name(&name.name)?,
            Some(uuid.as_ref()),
            DmOptions::default(),
        );
        created.map(drop).map_err(|error| context("create", &name.name, &error))
    }

    fn load(&self, name: &DmName, table: &Table) -> io::Result<()> {
        let read_only = matches!(table.target, Target::Queue { .. } | Target::Lost);
        let flags = if read_only { DmFlags::DM_READONLY } else { DmFlags::empty() };
        let line = |(start, length, target): (Sectors, Sectors, &Target)| {
            (start.0, length.0, target.kind().to_owned(), target.params(self.refuser.number))
        };
        let lines: Vec<_> = table.lines().into_iter().map(line).collect();
        let uuid = dm_uuid(&name.uuid)?;
        self.control
            .table_load(&DevId::Uuid(uuid.as_ref()), &lines, DmOptions::default().set_flags(flags))
            .map(drop)
            .map_err(|error| context(&format!("load `{lines:?}` into"), &name.name, &error))
    }

    /// Makes the loaded table live.
    fn swap(&self, name: &DmName, table: &Table, deadline: Duration) -> io::Result<()> {
        let resumed = self.resume_within(name, deadline);
        let Err(error) = resumed else { return Ok(()) };
        let error = describe("swap the table of", &name.name, error);
        // A swap that fails after the implied suspend leaves the device suspended
        // and the new table gone (drivers/md/dm-ioctl.c, `do_resume`): the guest
        // waits until somebody resumes it.
        for _ in 0..RESUMES {
            match self.lookup(&name.uuid) {
                Err(undo) => return Err(with_undo(error, Err(undo))),
                Ok(Some(device)) if device.serves(table) && !device.has_inactive => {
                    return Ok(());
                }
                Ok(Some(device)) if device.suspended && device.has_live => {
                    if device.has_inactive
                        && let Err(undo) = self.clear(name)
                    {
                        return Err(with_undo(error, Err(undo)));
                    }
                    if self.resume_within(name, deadline).is_ok() {
                        break;
                    }
                }
                Ok(_) => break,
            }
        }
        Err(with_undo(error, self.settled(name)))
    }

    /// Whether the device is as a failed swap must leave it.
    fn settled(&self, name: &DmName) -> io::Result<()> {
        match self.lookup(&name.uuid)? {
            Some(device) if device.suspended && device.has_live => {
                Err(io::Error::other(format!("{name} stays suspended")))
            }
            Some(device) if device.has_inactive => self.clear(name),
            Some(_) | None => Ok(()),
        }
    }

    fn clear_if_there(&self, name: &DmName) -> io::Result<()> {
        match self.lookup(&name.uuid)? {
            Some(device) if device.has_inactive => self.clear(name),
            Some(_) | None => Ok(()),
        }
    }

    fn clear(&self, name: &DmName) -> io::Result<()> {
        let uuid = dm_uuid(&name.uuid)?;
        let cleared = self.control.table_clear(&DevId::Uuid(uuid.as_ref()));
        cleared
            .map(drop)
            .map_err(|error| context("clear the inactive table of", &name.name, &error))
    }

    /// A path that failed once is not tried again until somebody says so
    /// (drivers/md/dm-mpath.c, `reinstate_path`): there is no multipathd here.
    fn reinstate(&self, name: &DmName, table: &Table) -> io::Result<()> {
        let (Target::Queue { path: Some(path) } | Target::WritableQueue { path: Some(path) }) =
            &table.target
        else {
            return Ok(());
        };
        if path_failed(&self.status_text(name)?, *path) {
            self.message(name, &format!("reinstate_path {path}"))?;
        }
        Ok(())
    }

    /// RESUME. With an inactive table this is suspend, swap and resume in one.
    fn resume_within(&self, name: &DmName, deadline: Duration) -> io::Result<()> {
        let control = Arc::clone(&self.control);
        let uuid = name.uuid.clone();
        let flags = DmFlags::DM_SKIP_LOCKFS | DmFlags::DM_NOFLUSH;
        interruptible(deadline, move || raw::resume(&control, &uuid, flags.bits(), HIDDEN), |_| {})
    }

    /// Makes I/O wait. A device that is suspended already stays so.
    ///
    /// Its death in between is nobody's: whoever suspends must know the way back.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`]: the I/O in flight did not end before the
    /// deadline; the device is as it was.
    pub fn suspend(&self, name: &DmName, deadline: Duration) -> io::Result<()> {
        let uuid = dm_uuid(&name.uuid)?;
        let flags = DmFlags::DM_SUSPEND | DmFlags::DM_SKIP_LOCKFS | DmFlags::DM_NOFLUSH;
        let (control, again) = (Arc::clone(&self.control), Arc::clone(&self.control));
        let text = name.uuid.clone();
        interruptible(
            deadline,
            move || {
                control
                    .device_suspend(
                        &DevId::Uuid(uuid.as_ref()),
                        DmOptions::default().set_flags(flags),
                    )
                    .map(drop)
                    .map_err(|error| plain(&error))
            },
            // The caller was told that it failed, so nobody else would resume it.
            move |result| {
                if result.is_ok() {
                    let _ = raw::resume(&again, &text, 0, NO_COOKIE);
                }
            },
        )
        .map_err(|error| describe("suspend", &name.name, error))
    }

    /// Lets I/O go on with the live table. A left-over inactive table is dropped,
    /// because the kernel would make it live.
    pub fn resume(&self, name: &DmName) -> io::Result<()> {
        self.clear_if_there(name)?;
        raw::resume(&self.control, &name.uuid, 0, NO_COOKIE)
            .map_err(|error| describe("resume", &name.name, error))
    }

    /// Sends a message to the device's first target.
    pub fn message(&self, name: &DmName, text: &str) -> io::Result<()> {
        let uuid = dm_uuid(&name.uuid)?;
        self.control
            .target_msg(&DevId::Uuid(uuid.as_ref()), None, text)
            .map(drop)
            .map_err(|error| context(&format!("send `{text}` to"), &name.name, &error))
    }

    /// A handle, and its link, which a process may have died before it made.
    pub fn linked_device(&self, name: &DmName) -> io::Result<Option<Device>> {
        let found = self.device(name)?;
        if let Some(device) = &found
            && device.has_live
            && !device.leaving
        {
            link(name, device.number, Udev::Linked)?;
        }
        Ok(found)
    }

    /// Removes the device. One that does not exist is removed.
    ///
    /// Removing a clone waits in the kernel, uninterruptibly, for the copies it
    /// has in flight: a stuck source must be made to fail first.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] if it stays open.
    pub fn remove(&self, name: &DmName, how: Remove) -> io::Result<()> {
        let Some(device) = self.device(name)? else {
            // A link that is left over; not that of another copy's handle.
            return match self.by_name(&name.name)? {
                Some(_) => Ok(()),
                None => unlink(name).map(drop),
            };
        };
        // First the link, then the device: a link that outlives its device would
        // soon lead to another one.
        let linked = unlink(name)?;
        self.remove_open(name, how).map_err(|error| {
            let udev = if linked { Udev::Linked } else { Udev::Hidden };
            with_undo(error, link(name, device.number, udev))
        })
    }

    fn remove_open(&self, name: &DmName, how: Remove) -> io::Result<()> {
        let flags = match how {
            Remove::Now => DmFlags::empty(),
            Remove::Deferred => DmFlags::DM_DEFERRED_REMOVE,
        };
        let end = Instant::now() + REMOVE_PATIENCE;
        let mut pause = FIRST_PAUSE;
        loop {
            match raw::remove(&self.control, &name.uuid, flags.bits(), NO_COOKIE) {
                Err(error)
                    if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end =>
                {
                    thread::sleep(pause);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                removed => {
                    return removed.map_err(|error| describe("remove", &name.name, error));
                }
            }
        }
    }
}

fn dm_name(text: &str) -> io::Result<devicemapper::DmNameBuf> {
    devicemapper::DmNameBuf::new(text.to_owned()).map_err(|error| plain(&error))
}

fn dm_uuid(text: &str) -> io::Result<devicemapper::DmUuidBuf> {
    devicemapper::DmUuidBuf::new(text.to_owned()).map_err(|error| plain(&error))
}
