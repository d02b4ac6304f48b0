//! The two ioctls in which the `devicemapper` crate would wait for udev.

use std::{io, os::fd::AsRawFd as _};

use devicemapper::DM;
use nix::errno::Errno;

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
