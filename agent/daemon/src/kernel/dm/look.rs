//! What is there: devices, tables, and what targets say of themselves.

use std::io;

use devicemapper::{DevId, DmFlags, DmOptions};
use dmlocal_model::{
    name::{DM_UUID_PREFIX, DmName, refuser},
    table::{CloneStatus, Table, Target},
    units::{DevNo, Sectors},
};

use super::{
    Dm, dm_name, dm_uuid,
    error::{context, is_absent, plain},
};

/// A target type and its version.
pub type TargetVersion = (String, (u32, u32, u32));

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
    /// The live table.
    pub table: Option<Table>,
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
        self.has_live && !self.suspended && self.table.as_ref() == Some(table)
    }
}

impl Dm {
    /// Every target type that is loaded now, with its version. Modules are loaded
    /// by whoever asks for them first; this asks for none.
    pub fn targets(&self) -> io::Result<Vec<TargetVersion>> {
        let versions = self.control.list_versions().map_err(|error| plain(&error))?;
        Ok(versions.into_iter().map(|(kind, a, b, c)| (kind, (a, b, c))).collect())
    }

    /// Every device of a volume, which its DM UUID tells.
    pub fn ours(&self) -> io::Result<Vec<Device>> {
        let mut devices = Vec::new();
        for (name, _, _) in self.control.list_devices().map_err(|error| plain(&error))? {
            let info = match self.control.device_info(&DevId::Name(&name)) {
                Ok(info) => info,
                Err(error) if is_absent(&error) => continue,
                Err(error) => return Err(context("look at", &name.to_string(), &error)),
            };
            let Some(uuid) = info.uuid().map(ToString::to_string) else { continue };
            if uuid.starts_with(DM_UUID_PREFIX) && uuid != refuser().uuid {
                devices.extend(self.lookup(&uuid)?);
            }
        }
        Ok(devices)
    }

    /// The device of this identity.
    ///
    /// A handle of another copy of the volume has the same name and another UUID:
    /// it is not this one.
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
                if uuid.starts_with(DM_UUID_PREFIX) {
                    return Ok(None);
                }
                let text = format!("{name} exists and is not ours: its DM UUID is `{uuid}`");
                Err(io::Error::new(io::ErrorKind::AlreadyExists, text))
            }
        }
    }

    /// The device of this name, whichever copy it is of; none if it is not ours.
    pub fn by_name(&self, name: &str) -> io::Result<Option<Device>> {
        match self.control.device_info(&DevId::Name(&dm_name(name)?)) {
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(context("look at", name, &error)),
            Ok(info) => match info.uuid().map(ToString::to_string) {
                Some(uuid) if uuid.starts_with(DM_UUID_PREFIX) => self.lookup(&uuid),
                Some(_) | None => Ok(None),
            },
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

    pub(super) fn lookup(&self, uuid: &str) -> io::Result<Option<Device>> {
        let owned = dm_uuid(uuid)?;
        let flags = DmFlags::DM_STATUS_TABLE | DmFlags::DM_NOFLUSH;
        let options = DmOptions::default().set_flags(flags);
        match self.control.table_status(&DevId::Uuid(owned.as_ref()), options) {
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(context("read the table of", uuid, &error)),
            Ok((info, lines)) => {
                let flags = info.flags();
                let has_live = flags.contains(DmFlags::DM_ACTIVE_PRESENT);
                let read_only = flags.contains(DmFlags::DM_READONLY);
                let targets = lines.iter().map(|(_, length, kind, params)| {
                    let target = match Target::parse(kind, params, self.refuser.number) {
                        Target::Queue { path } if !read_only => Target::WritableQueue { path },
                        target => target,
                    };
                    (Sectors(*length), target)
                });
                Ok(Some(Device {
                    name: info.name().map(ToString::to_string).unwrap_or_default(),
                    uuid: uuid.to_owned(),
                    number: devno(info.device()),
                    open_count: u32::try_from(info.open_count()).unwrap_or(0),
                    suspended: flags.contains(DmFlags::DM_SUSPEND),
                    table: Table::of(if has_live { targets.collect() } else { Vec::new() }),
                    has_live,
                    has_inactive: flags.contains(DmFlags::DM_INACTIVE_PRESENT),
                    leaving: flags.contains(DmFlags::DM_DEFERRED_REMOVE),
                }))
            }
        }
    }

    /// Type and parameters of the one target of any device, ours or not.
    ///
    /// # Errors
    /// Also for a device with no target, or with several.
    pub fn table_text_of(&self, uuid: &str) -> io::Result<(String, String)> {
        let owned = dm_uuid(uuid)?;
        let flags = DmFlags::DM_STATUS_TABLE | DmFlags::DM_NOFLUSH;
        let options = DmOptions::default().set_flags(flags);
        let (_, lines) = self
            .control
            .table_status(&DevId::Uuid(owned.as_ref()), options)
            .map_err(|error| context("read the table of", uuid, &error))?;
        let mut lines = lines.into_iter();
        match (lines.next(), lines.next()) {
            (Some((_, _, kind, params)), None) => Ok((kind, params)),
            (_, _) => Err(io::Error::other(format!("{uuid} has not one target"))),
        }
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

    /// What each target of the device says of itself.
    pub fn status_texts(&self, name: &DmName) -> io::Result<Vec<String>> {
        self.statuses(&name.uuid, DmFlags::DM_NOFLUSH)
    }

    /// What the first target of any device, ours or not, says of itself.
    pub fn status_text_of(&self, uuid: &str) -> io::Result<String> {
        self.status(uuid, DmFlags::DM_NOFLUSH)
    }

    fn status(&self, uuid: &str, flags: DmFlags) -> io::Result<String> {
        match self.statuses(uuid, flags)?.into_iter().next() {
            Some(status) => Ok(status),
            None => Err(io::Error::new(io::ErrorKind::NotFound, format!("{uuid} has no table"))),
        }
    }

    fn statuses(&self, uuid: &str, flags: DmFlags) -> io::Result<Vec<String>> {
        let owned = dm_uuid(uuid)?;
        let options = DmOptions::default().set_flags(flags);
        let (_, lines) = self
            .control
            .table_status(&DevId::Uuid(owned.as_ref()), options)
            .map_err(|error| context("read the status of", uuid, &error))?;
        Ok(lines.into_iter().map(|(_, _, _, params)| params).collect())
    }
}

/// Whether a multipath status line says that this path has failed: the path is
/// followed by `F` (drivers/md/dm-mpath.c, `multipath_status`).
pub(crate) fn path_failed(status: &str, path: DevNo) -> bool {
    let path = path.to_string();
    let words: Vec<&str> = status.split_ascii_whitespace().collect();
    words.windows(2).any(|pair| pair == [path.as_str(), "F"])
}

fn devno(device: devicemapper::Device) -> DevNo {
    DevNo { major: device.major, minor: device.minor }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_failed_path_is_told_from_an_active_one() {
        let failed = "2 0 1 0 1 1 E 0 1 0 259:1 F 1";
        let path = |minor| DevNo { major: 259, minor };
        assert!(path_failed(failed, path(1)));
        assert!(!path_failed(failed, path(2)));
        assert!(!path_failed("2 0 1 0 1 1 A 0 1 0 259:1 A 0", path(1)));
    }
}
