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
//! This module holds the `unsafe` of the daemon: two header-only ioctls and one
//! signal handler that does nothing.

use std::{
    fs, io,
    os::unix::thread::JoinHandleExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, Once, PoisonError,
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

use devicemapper::{DM, DevId, DmError, DmFlags, DmOptions, errors};
use dmlocal_model::{
    name::{DM_UUID_PREFIX, DmName},
    table::{CloneStatus, Table, Target},
    units::{DevNo, Sectors},
};
use nix::{
    errno::Errno,
    sys::{
        pthread::pthread_kill,
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    },
};

/// How often a RESUME is repeated on a device that a failed swap left suspended.
const RESUMES: u32 = 5;

/// How long a removal is repeated while something (udev, mostly) holds the
/// device open for a moment.
const REMOVE_PATIENCE: Duration = Duration::from_secs(5);

/// How long an interrupted call may still take before it is left alone.
const INTERRUPT_PATIENCE: Duration = Duration::from_secs(10);

/// The first pause between attempts; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Where handles are linked.
const MAPPER: &str = "/dev/mapper";

/// Whether a device has a link in `/dev/mapper`.
///
/// udev has no part in it: a late event of a removed device would take the link
/// away from a new one of the same name. The link is made when the table is set
/// and removed before the device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Udev {
    /// A layer: no link.
    Hidden,
    /// The handle: `/dev/mapper/<name>` leads to it when `set` returns.
    Linked,
}

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

/// A target type and its version.
pub type TargetVersion = (String, (u32, u32, u32));

/// How to remove a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remove {
    /// At once; a device that stays open is an error of the kind
    /// [`io::ErrorKind::ResourceBusy`].
    Now,
    /// As soon as its last user closes it.
    Deferred,
}

/// What the kernel says of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its DM UUID.
    pub uuid: String,
    /// Its number, until it is removed.
    pub number: DevNo,
    /// Who has it open; a table that stands on it counts as one.
    pub open_count: u32,
    /// Whether I/O waits.
    pub suspended: bool,
    /// The live table's targets, in order; each with its own length.
    pub tables: Vec<Table>,
    /// Whether there is a live table at all.
    pub has_live: bool,
    /// Whether a table is loaded that is not live.
    pub has_inactive: bool,
    /// Whether it goes as soon as its last user does.
    pub leaving: bool,
}

impl Device {
    /// Whether exactly this table is live and serves I/O.
    pub fn serves(&self, table: &Table) -> bool {
        self.has_live && !self.suspended && self.tables.as_slice() == std::slice::from_ref(table)
    }
}

/// The control device. All methods may be called from several threads: each is a
/// sequence of ioctls that the kernel serialises per device.
#[derive(Clone)]
pub struct Dm {
    control: Arc<DM>,
}

impl Dm {
    /// Opens `/dev/mapper/control`.
    pub fn open() -> io::Result<Self> {
        let control = DM::new().map_err(|error| plain(&error))?;
        Ok(Self { control: Arc::new(control) })
    }

    /// Every target type that is loaded now, with its version. Modules are loaded
    /// by whoever asks for them first; this asks for none.
    pub fn targets(&self) -> io::Result<Vec<TargetVersion>> {
        let versions = self.control.list_versions().map_err(|error| plain(&error))?;
        Ok(versions.into_iter().map(|(kind, a, b, c)| (kind, (a, b, c))).collect())
    }

    /// Every device whose DM UUID says that it is ours.
    pub fn ours(&self) -> io::Result<Vec<Device>> {
        let mut devices = Vec::new();
        for (name, _, _) in self.control.list_devices().map_err(|error| plain(&error))? {
            let info = match self.control.device_info(&DevId::Name(&name)) {
                Ok(info) => info,
                Err(error) if is_absent(&error) => continue,
                Err(error) => return Err(context("look at", &name.to_string(), &error)),
            };
            let Some(uuid) = info.uuid().map(ToString::to_string) else { continue };
            if uuid.starts_with(DM_UUID_PREFIX) {
                devices.extend(self.lookup(&uuid)?);
            }
        }
        Ok(devices)
    }

    /// The device of this identity.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] if its name belongs to a device that is
    /// not ours, or its UUID to one of another name.
    pub fn device(&self, name: &DmName) -> io::Result<Option<Device>> {
        if let Some(device) = self.lookup(&name.uuid)? {
            if device.name == name.name {
                return Ok(Some(device));
            }
            let text = format!("device {} has the DM UUID of {name}", device.name);
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        let by_name = dm_name(&name.name)?;
        match self.control.device_info(&DevId::Name(&by_name)) {
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(context("look at", &name.name, &error)),
            Ok(info) => {
                let uuid = info.uuid().map(ToString::to_string).unwrap_or_default();
                if uuid == name.uuid {
                    // Made between the two look-ups.
                    return self.lookup(&name.uuid);
                }
                let text = format!("{name} exists and is not ours: its DM UUID is `{uuid}`");
                Err(io::Error::new(io::ErrorKind::AlreadyExists, text))
            }
        }
    }

    /// The number of any device, ours or not, by its DM UUID.
    pub fn by_uuid(&self, uuid: &str) -> io::Result<Option<DevNo>> {
        match self.control.device_info(&DevId::Uuid(dm_uuid(uuid)?.as_ref())) {
            Ok(info) => Ok(Some(devno(info.device()))),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(context("look at", uuid, &error)),
        }
    }

    fn lookup(&self, uuid: &str) -> io::Result<Option<Device>> {
        let owned = dm_uuid(uuid)?;
        let flags = DmFlags::DM_STATUS_TABLE | DmFlags::DM_NOFLUSH;
        let options = DmOptions::default().set_flags(flags);
        match self.control.table_status(&DevId::Uuid(owned.as_ref()), options) {
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(context("read the table of", uuid, &error)),
            Ok((info, lines)) => {
                let flags = info.flags();
                let has_live = flags.contains(DmFlags::DM_ACTIVE_PRESENT);
                let tables = lines.iter().map(|(_, length, kind, params)| Table {
                    length: Sectors(*length),
                    target: Target::parse(kind, params),
                });
                Ok(Some(Device {
                    name: info.name().map(ToString::to_string).unwrap_or_default(),
                    uuid: uuid.to_owned(),
                    number: devno(info.device()),
                    open_count: u32::try_from(info.open_count()).unwrap_or(0),
                    suspended: flags.contains(DmFlags::DM_SUSPEND),
                    tables: if has_live { tables.collect() } else { Vec::new() },
                    has_live,
                    has_inactive: flags.contains(DmFlags::DM_INACTIVE_PRESENT),
                    leaving: flags.contains(DmFlags::DM_DEFERRED_REMOVE),
                }))
            }
        }
    }

    /// Creates the device with this table, or swaps the table of a live one in a
    /// single ioctl. A device that already serves this very table is left alone,
    /// but for what a crash may have left beside it.
    ///
    /// A [`Target::Queue`] is loaded read-only: nothing may ever write to a
    /// source. If it already has this path and the kernel has given the path up,
    /// the path is taken up again.
    ///
    /// A [`Target::Hold`] lets go of what it holds as soon as a swap begins, into
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
        let target = &table.target;
        let read_only = matches!(target, Target::Queue { .. });
        let flags = if read_only { DmFlags::DM_READONLY } else { DmFlags::empty() };
        let line = (0, table.length.0, target.kind().to_owned(), target.params());
        let uuid = dm_uuid(&name.uuid)?;
        self.control
            .table_load(
                &DevId::Uuid(uuid.as_ref()),
                std::slice::from_ref(&line),
                DmOptions::default().set_flags(flags),
            )
            .map(drop)
            .map_err(|error| {
                let what = format!("load `{} {} {} {}` into", line.0, line.1, line.2, line.3);
                context(&what, &name.name, &error)
            })
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
        let Target::Queue { path: Some(path) } = &table.target else { return Ok(()) };
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

    /// What dm-clone says of itself. Never commits its metadata, so never waits
    /// for the destination.
    pub fn clone_status(&self, name: &DmName) -> io::Result<CloneStatus> {
        self.status_text(name).map(|text| CloneStatus::parse(&text))
    }

    /// Makes dm-clone commit its metadata, then reads its status: what is
    /// hydrated in it is hydrated for good. Waits for the destination's flush.
    pub fn commit_clone(&self, name: &DmName) -> io::Result<CloneStatus> {
        // Without NOFLUSH the status commits (drivers/md/dm-clone-target.c,
        // `clone_status`).
        self.status(&name.uuid, DmFlags::empty()).map(|text| CloneStatus::parse(&text))
    }

    /// What the device's first target says of itself.
    pub fn status_text(&self, name: &DmName) -> io::Result<String> {
        self.status_text_of(&name.uuid)
    }

    /// What the first target of any device, ours or not, says of itself.
    pub fn status_text_of(&self, uuid: &str) -> io::Result<String> {
        self.status(uuid, DmFlags::DM_NOFLUSH)
    }

    fn status(&self, uuid: &str, flags: DmFlags) -> io::Result<String> {
        let owned = dm_uuid(uuid)?;
        let options = DmOptions::default().set_flags(flags);
        let (_, lines) = self
            .control
            .table_status(&DevId::Uuid(owned.as_ref()), options)
            .map_err(|error| context("read the status of", uuid, &error))?;
        match lines.into_iter().next() {
            Some((_, _, _, params)) => Ok(params),
            None => Err(io::Error::new(io::ErrorKind::NotFound, format!("{uuid} has no table"))),
        }
    }

    /// Removes the device. One that does not exist is removed.
    ///
    /// Removing a clone waits in the kernel, uninterruptibly, for the copies it
    /// has in flight: a stuck source must be made to fail first.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] if it stays open.
    pub fn remove(&self, name: &DmName, how: Remove) -> io::Result<()> {
        let device = self.device(name)?;
        // First the link, then the device: a link that outlives its device would
        // soon lead to another one.
        let linked = unlink(Path::new(MAPPER), name)
            .map_err(|error| describe("unlink", &name.path(), error))?;
        let Some(device) = device else { return Ok(()) };
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

/// Whether a multipath status line says that this path has failed: the path is
/// followed by `F` (drivers/md/dm-mpath.c, `multipath_status`).
pub(super) fn path_failed(status: &str, path: DevNo) -> bool {
    let path = path.to_string();
    let words: Vec<&str> = status.split_ascii_whitespace().collect();
    words.windows(2).any(|pair| pair == [path.as_str(), "F"])
}

/// Makes `/dev/mapper/<name>` of a handle.
fn link(name: &DmName, number: DevNo, udev: Udev) -> io::Result<()> {
    match udev {
        Udev::Hidden => Ok(()),
        Udev::Linked => link_in(Path::new(MAPPER), name, number)
            .map_err(|error| describe("link", &name.path(), error)),
    }
}

fn link_in(mapper: &Path, name: &DmName, number: DevNo) -> io::Result<()> {
    let path = mapper.join(&name.name);
    let target = node(number);
    match fs::read_link(&path) {
        Ok(found) if found == target => return Ok(()),
        // A link to another device, or a node of libdm's making: what it names is
        // gone or has this name no longer.
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {}
        Err(error) => return Err(error),
    }
    let fresh = mapper.join(format!(".{}", name.name));
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    std::os::unix::fs::symlink(&target, &fresh)?;
    fs::rename(&fresh, &path)
}

fn node(number: DevNo) -> PathBuf {
    PathBuf::from(format!("../dm-{}", number.minor))
}

/// Removes the link; whether there was one.
fn unlink(mapper: &Path, name: &DmName) -> io::Result<bool> {
    match fs::remove_file(mapper.join(&name.name)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn devno(device: devicemapper::Device) -> DevNo {
    DevNo { major: device.major, minor: device.minor }
}

fn dm_name(text: &str) -> io::Result<devicemapper::DmNameBuf> {
    devicemapper::DmNameBuf::new(text.to_owned()).map_err(|error| plain(&error))
}

fn dm_uuid(text: &str) -> io::Result<devicemapper::DmUuidBuf> {
    devicemapper::DmUuidBuf::new(text.to_owned()).map_err(|error| plain(&error))
}

fn is_absent(error: &DmError) -> bool {
    matches!(error, DmError::Core(errors::Error::Ioctl(_, _, _, errno)) if **errno == Errno::ENXIO)
}

/// The error without the crate's dump of two ioctl headers.
fn plain(error: &DmError) -> io::Error {
    match error {
        DmError::Core(errors::Error::Ioctl(_, _, _, errno)) => io::Error::from(**errno),
        DmError::Core(errors::Error::InvalidArgument(text)) => {
            io::Error::new(io::ErrorKind::InvalidInput, text.clone())
        }
        DmError::Core(_) | DmError::Dm(..) => io::Error::other(error.to_string()),
    }
}

fn context(verb: &str, what: &str, error: &DmError) -> io::Error {
    describe(verb, what, plain(error))
}

/// Keeps the kind and says what was attempted.
pub(super) fn describe(verb: &str, what: &str, error: io::Error) -> io::Error {
    let kind = match error.raw_os_error().map(Errno::from_raw) {
        // The kernel's "no such device" is our "not found".
        Some(Errno::ENXIO | Errno::ENODEV) => io::ErrorKind::NotFound,
        _ => error.kind(),
    };
    io::Error::new(kind, format!("{verb} {what}: {error}"))
}

fn with_undo(error: io::Error, undone: io::Result<()>) -> io::Error {
    match undone {
        Ok(()) => error,
        Err(undo) => {
            io::Error::new(error.kind(), format!("{error}; undoing it failed too: {undo}"))
        }
    }
}

/// Runs a blocking call on a thread of its own and interrupts it by a signal at
/// the deadline, again and again until it returns.
///
/// A call that even then does not return for [`INTERRUPT_PATIENCE`] is left alone;
/// when it ends after all, `late` gets its result, to undo what nobody expects.
///
/// # Errors
/// The call's own, and [`io::ErrorKind::TimedOut`] if it was interrupted or left.
pub(super) fn interruptible<T: Send + 'static>(
    deadline: Duration,
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
    late: impl FnOnce(io::Result<T>) + Send + 'static,
) -> io::Result<T> {
    catch_interrupts()?;
    let (sender, receiver) = channel();
    // Whether the caller has gone; decided under the lock, so that a result goes
    // either to the caller or to `late`.
    let left = Arc::new(Mutex::new(false));
    let abandoned = Arc::clone(&left);
    let thread = thread::Builder::new().name("interruptible".to_owned()).spawn(move || {
        // Only our signal may end the call early, and it must be able to.
        let mut others = SigSet::all();
        others.remove(INTERRUPT);
        let masked = others.thread_set_mask();
        let result = match masked {
            Ok(()) => call(),
            Err(errno) => Err(errno.into()),
        };
        let abandoned = abandoned.lock().unwrap_or_else(PoisonError::into_inner);
        if *abandoned {
            drop(abandoned);
            late(result);
        } else {
            // The caller has not left, so it still listens.
            let _ = sender.send(result);
        }
    })?;

    match receiver.recv_timeout(deadline) {
        Ok(result) => return result,
        Err(RecvTimeoutError::Disconnected) => return Err(io::Error::other("the call panicked")),
        Err(RecvTimeoutError::Timeout) => {}
    }
    let end = Instant::now() + INTERRUPT_PATIENCE;
    let mut pause = FIRST_PAUSE;
    while Instant::now() < end {
        // The thread is not joined, so its id is still its own.
        pthread_kill(thread.as_pthread_t(), INTERRUPT)?;
        match receiver.recv_timeout(pause) {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("interrupted after {deadline:?}"),
                ));
            }
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(io::Error::other("the call panicked"));
            }
            Err(RecvTimeoutError::Timeout) => pause = (pause * 2).min(LONGEST_PAUSE),
        }
    }
    let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
    if let Ok(result) = receiver.try_recv() {
        return result;
    }
    *left = true;
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        format!("neither ended within {deadline:?} nor could be interrupted; it goes on"),
    ))
}

/// The signal that interrupts a call; its handler does nothing.
const INTERRUPT: Signal = Signal::SIGUSR1;

extern "C" fn ignore(_: libc::c_int) {}

fn catch_interrupts() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        // No SA_RESTART: a system call that the signal interrupts must return.
        let action = SigAction::new(SigHandler::Handler(ignore), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, so it is async-signal-safe, and it
        // replaces the default action, which would end the process.
        result = unsafe { sigaction(INTERRUPT, &action) }.map(drop);
    });
    Ok(result?)
}

/// The two ioctls that the crate would wait in for udev.
mod raw {
    use std::os::fd::AsRawFd as _;

    use super::{DM, Errno, io};

    const NAME_LEN: usize = 128;
    const UUID_LEN: usize = 129;

    /// `struct dm_ioctl` of include/uapi/linux/dm-ioctl.h.
    #[repr(C)]
    pub(super) struct Header {
        version: [u32; 3],
        data_size: u32,
        data_start: u32,
        target_count: u32,
        open_count: i32,
        flags: u32,
        event_nr: u32,
        padding: u32,
        dev: u64,
        name: [u8; NAME_LEN],
        uuid: [u8; UUID_LEN],
        data: [u8; 7],
    }

    /// `DM_IOCTL`.
    const MAGIC: u8 = 0xfd;
    /// `DM_DEV_REMOVE_CMD`.
    const REMOVE: u8 = 4;
    /// `DM_DEV_SUSPEND_CMD`; without `DM_SUSPEND_FLAG` it is RESUME.
    const SUSPEND: u8 = 6;

    nix::ioctl_readwrite!(dev_remove, MAGIC, REMOVE, Header);
    nix::ioctl_readwrite!(dev_suspend, MAGIC, SUSPEND, Header);

    fn header(uuid: &str, flags: u32, event_nr: u32) -> io::Result<Header> {
        let mut header = Header {
            version: [4, 0, 0],
            data_size: 0,
            data_start: 0,
            target_count: 0,
            open_count: 0,
            flags,
            event_nr,
            padding: 0,
            dev: 0,
            name: [0; NAME_LEN],
            uuid: [0; UUID_LEN],
            data: [0; 7],
        };
        let size = u32::try_from(size_of::<Header>()).map_err(io::Error::other)?;
        (header.data_size, header.data_start) = (size, size);
        // One byte stays zero: the kernel wants the end inside the field.
        match header.uuid[..UUID_LEN - 1].get_mut(..uuid.len()) {
            Some(field) if !uuid.is_empty() => field.copy_from_slice(uuid.as_bytes()),
            _ => return Err(Errno::EINVAL.into()),
        }
        Ok(header)
    }

    pub(super) fn resume(control: &DM, uuid: &str, flags: u32, event_nr: u32) -> io::Result<()> {
        let mut header = header(uuid, flags, event_nr)?;
        // SAFETY: the descriptor is the control device, open as long as `control`
        // lives; the header has the kernel's layout and says its own size, past
        // which the kernel neither reads nor writes.
        unsafe { dev_suspend(control.as_raw_fd(), &raw mut header) }?;
        Ok(())
    }

    pub(super) fn remove(control: &DM, uuid: &str, flags: u32, event_nr: u32) -> io::Result<()> {
        let mut header = header(uuid, flags, event_nr)?;
        // SAFETY: as in `resume`.
        match unsafe { dev_remove(control.as_raw_fd(), &raw mut header) } {
            // Gone is what was asked for.
            Ok(_) | Err(Errno::ENXIO) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    #[cfg(test)]
    mod test {
        use super::*;

        #[test]
        fn the_header_has_the_kernels_layout() {
            assert_eq!(size_of::<Header>(), 312);
            assert_eq!(std::mem::offset_of!(Header, dev), 40);
            assert_eq!(std::mem::offset_of!(Header, name), 48);
            assert_eq!(std::mem::offset_of!(Header, uuid), 176);
            assert_eq!(std::mem::offset_of!(Header, data), 305);
        }

        #[test]
        fn a_uuid_that_does_not_fit_is_refused() {
            assert!(header(&"x".repeat(128), 0, 0).is_ok());
            assert!(header(&"x".repeat(129), 0, 0).is_err());
            assert!(header("", 0, 0).is_err());
        }
    }
}

#[cfg(test)]
mod test {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_call_that_ends_in_time_returns_its_result() {
        let long = Duration::from_secs(20);
        assert_eq!(interruptible(long, || Ok(7), |_| {}).unwrap(), 7);
        let failed = interruptible(long, || Err::<(), _>(Errno::ENOSPC.into()), |_| {});
        assert_eq!(failed.unwrap_err().raw_os_error(), Some(Errno::ENOSPC as i32));
    }

    #[test]
    fn a_stuck_call_is_interrupted_at_the_deadline() {
        let (reader, _writer) = UnixStream::pair().unwrap();
        let before = Instant::now();
        let result = interruptible(
            Duration::from_millis(100),
            move || {
                // std's read retries; this is one system call.
                nix::unistd::read(&reader, &mut [0]).map_err(io::Error::from)
            },
            |_| {},
        );
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let took = before.elapsed();
        assert!(took >= Duration::from_millis(100) && took < Duration::from_secs(5), "{took:?}");
    }

    #[test]
    fn a_failed_path_is_told_from_an_active_one() {
        let failed = "2 0 1 0 1 1 E 0 1 0 259:1 F 1";
        let path = |minor| DevNo { major: 259, minor };
        assert!(path_failed(failed, path(1)));
        assert!(!path_failed(failed, path(2)));
        assert!(!path_failed("2 0 1 0 1 1 A 0 1 0 259:1 A 0", path(1)));
    }

    #[test]
    fn a_link_is_made_once_and_replaces_what_names_another_device() {
        let directory = tempfile::tempdir().unwrap();
        let name = DmName { name: "dmlocal-x".to_owned(), uuid: "DMLOCAL-x".to_owned() };
        let link = directory.path().join("dmlocal-x");
        for minor in [3, 3, 4] {
            link_in(directory.path(), &name, DevNo { major: 253, minor }).unwrap();
            assert_eq!(fs::read_link(&link).unwrap(), PathBuf::from(format!("../dm-{minor}")));
        }
        fs::remove_file(&link).unwrap();
        fs::write(&link, "a node").unwrap();
        link_in(directory.path(), &name, DevNo { major: 253, minor: 5 }).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), PathBuf::from("../dm-5"));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn errors_keep_their_kind_and_say_what_was_done() {
        let busy = describe("remove", "x", Errno::EBUSY.into());
        assert_eq!(busy.kind(), io::ErrorKind::ResourceBusy);
        assert!(busy.to_string().starts_with("remove x: "), "{busy}");
        assert_eq!(describe("a", "b", Errno::ENXIO.into()).kind(), io::ErrorKind::NotFound);
    }
}
