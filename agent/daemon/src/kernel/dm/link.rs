//! The handle's link in `/dev/mapper`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use dmlocal_model::{name::DmName, units::DevNo};
use nix::errno::Errno;

use super::error::describe;

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

/// Makes `/dev/mapper/<name>` of a handle.
pub(super) fn link(name: &DmName, number: DevNo, udev: Udev) -> io::Result<()> {
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
pub(super) fn unlink(name: &DmName) -> io::Result<bool> {
    match fs::remove_file(Path::new(MAPPER).join(&name.name)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(describe("unlink", &name.path(), error)),
    }
}

#[cfg(test)]
mod test {
    use super::*;

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
}
