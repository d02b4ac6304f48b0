//! Exports: the kernel's NVMe target, through configfs.
//!
//! ```text
//! hosts/<host nqn>
//! subsystems/<nqn>/attr_{allow_any_host,serial,model}
//!                 /namespaces/1/{device_path,device_uuid,device_nguid,enable}
//!                 /allowed_hosts/<host nqn>  ──▶ hosts/<host nqn>
//! ports/<tcp port>/addr_*
//!                 /subsystems/<nqn>          ──▶ subsystems/<nqn>   last up, first down
//! ```
//!
//! Every export has a port of its own. An initiator that reconnects to a port
//! that is open while its subsystem is not linked is told never to try again, and
//! gives the controller up although it was told to try for ever
//! (drivers/nvme/host/fabrics.c, `nvmf_should_reconnect`). With the link made
//! last and removed first, it meets a closed port instead, and goes on trying.
//!
//! A subsystem has room for one controller: both ends of its range of controller ids
//! are the port's number, which no other subsystem has. The kernel gives an id back
//! only when every request of its controller has ended (drivers/nvme/target/core.c,
//! `nvmet_ctrl_free`), so after a lost path nothing of the old connection is still on
//! its way when a new one is let in, to land on top of what comes later.
//!
//! An attribute is written only if it says something else: the kernel refuses
//! writes to a live port or namespace even of the same value. The namespace's
//! identifiers are ours, never the kernel's random ones, because an initiator
//! drops a namespace whose identifiers changed.

#[cfg(test)]
mod test;
mod tree;

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use dmlocal_model::name::NQN_PREFIX;
use uuid::Uuid;

use self::tree::{Configfs, Tree};
use super::dm::describe;

/// Where configfs has the target.
pub const ROOT: &str = "/sys/kernel/config/nvmet";

/// What makes a subsystem ours; the initiator's udev rules match it too.
pub const MODEL: &str = "dmlocal";

/// The only namespace of a subsystem.
const NAMESPACE: &str = "1";

/// `NVMET_SN_MAX_SIZE` (drivers/nvme/target/nvmet.h).
const SERIAL_MAX: usize = 20;

/// One block device, offered to one host on one TCP port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// The subsystem's NQN; starts with [`NQN_PREFIX`].
    pub nqn: String,
    /// The subsystem's serial number; at most 20 characters.
    pub serial: String,
    /// The namespace's UUID.
    pub uuid: Uuid,
    /// The namespace's NGUID.
    pub nguid: Uuid,
    /// The node of the device.
    pub device: PathBuf,
    /// The only host that may connect.
    pub host_nqn: String,
    /// Where to listen.
    pub address: IpAddr,
    /// Where to listen; also the number of the nvmet port.
    pub port: u16,
}

/// How much of an export exists, and whether it is as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Seen {
    /// The subsystem exists.
    pub subsystem: bool,
    /// The namespace is enabled.
    pub enabled: bool,
    /// What the namespace stands on, whether enabled or not.
    pub device: Option<PathBuf>,
    /// The host may connect.
    pub host_allowed: bool,
    /// The port exists and offers the subsystem.
    pub linked: bool,
    /// Every attribute, address and identifier is the export's.
    pub exact: bool,
}

impl Seen {
    /// Whether a host can connect and finds what it expects.
    pub fn serves(&self) -> bool {
        self.subsystem && self.enabled && self.host_allowed && self.linked && self.exact
    }
}

/// The NVMe target.
///
/// Calls for different exports may run side by side; calls for one may not.
pub struct Nvmet {
    root: PathBuf,
    tree: Box<dyn Tree>,
}

impl Nvmet {
    /// The target below this directory ([`ROOT`], but for tests). Nothing is read
    /// yet; the `nvmet-tcp` module must be loaded before the first export.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), tree: Box::new(Configfs) }
    }

    fn subsystem(&self, nqn: &str) -> PathBuf {
        self.root.join("subsystems").join(nqn)
    }

    fn namespace(&self, nqn: &str) -> PathBuf {
        self.subsystem(nqn).join("namespaces").join(NAMESPACE)
    }

    fn host(&self, nqn: &str) -> PathBuf {
        self.root.join("hosts").join(nqn)
    }

    fn port(&self, port: &str) -> PathBuf {
        self.root.join("ports").join(port)
    }

    /// What is there of an export.
    pub fn observe(&self, export: &Export) -> io::Result<Seen> {
        check(export)?;
        let subsystem = self.subsystem(&export.nqn);
        let mut seen = Seen {
            subsystem: self.value(&subsystem.join("attr_model"))?.is_some(),
            ..Seen::default()
        };
        if !seen.subsystem {
            return Ok(seen);
        }
        let namespace = self.namespace(&export.nqn);
        seen.enabled = self.value(&namespace.join("enable"))?.as_deref() == Some("1");
        seen.device = self.value(&namespace.join("device_path"))?.map(PathBuf::from);
        let allowed = self.names(&subsystem.join("allowed_hosts"))?;
        seen.host_allowed = allowed.contains(&export.host_nqn);
        let port = self.port(&export.port.to_string());
        seen.linked = self.names(&port.join("subsystems"))?.contains(&export.nqn);
        seen.exact = allowed.len() <= 1
            && self.differing(&subsystem, &subsystem_attributes(export))?.is_empty()
            && self.differing(&namespace, &namespace_attributes(export)?)?.is_empty()
            && self.differing(&port, &port_attributes(export))?.is_empty();
        Ok(seen)
    }

    /// Offers the device, whatever half of it is there already.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] if the port serves another subsystem, or the
    /// TCP port is taken.
    pub fn publish(&self, export: &Export) -> io::Result<()> {
        check(export)?;
        let seen = self.observe(export)?;
        if seen.serves() {
            return Ok(());
        }
        let port = self.port(&export.port.to_string());
        let linked = self.names(&port.join("subsystems"))?;
        if let Some(other) = linked.iter().find(|nqn| **nqn != export.nqn) {
            let text = format!("port {} serves {other}", export.port);
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        // What is linked but not right is taken down first: a host must never
        // meet half an export behind an open port.
        self.unlink_ports(&export.nqn)?;

        let subsystem = self.subsystem(&export.nqn);
        self.ensure(&subsystem)?;
        self.write_differing(&subsystem, &subsystem_attributes(export))?;

        let namespace = self.namespace(&export.nqn);
        self.ensure(&namespace)?;
        let attributes = namespace_attributes(export)?;
        if !self.differing(&namespace, &attributes)?.is_empty() {
            self.set(&namespace.join("enable"), "0")?;
            self.write_differing(&namespace, &attributes)?;
        }
        self.set(&namespace.join("enable"), "1")?;

        let host = self.host(&export.host_nqn);
        self.ensure(&host)?;
        let allowed = subsystem.join("allowed_hosts");
        for other in self.names(&allowed)? {
            if other != export.host_nqn {
                self.unlink(&allowed.join(other))?;
            }
        }
        self.ensure_link(&host, &allowed.join(&export.host_nqn))?;

        self.ensure(&port)?;
        self.write_differing(&port, &port_attributes(export))?;
        self.ensure_link(&subsystem, &port.join("subsystems").join(&export.nqn))
    }

    /// Tells connected hosts of the size that the exported device has now
    /// (drivers/nvme/target/configfs.c, `nvmet_ns_revalidate_size_store`).
    ///
    /// # Errors
    /// It is not exported.
    pub fn revalidate(&self, nqn: &str) -> io::Result<()> {
        check_nqn(nqn)?;
        let path = self.namespace(nqn).join("revalidate_size");
        // It cannot be read.
        self.tree.write(&path, "1").map_err(|error| at("write", &path, error))
    }

    /// Withdraws the export, whatever half of it is there. One that does not
    /// exist is withdrawn. When this returns, no request of the host is in flight.
    pub fn unpublish(&self, export: &Export) -> io::Result<()> {
        check(export)?;
        self.unpublish_by_nqn(&export.nqn)?;
        // A publish that was cut off may have left these without a link to find
        // them by: a port of this number that serves nobody and is for no other
        // address.
        let port = self.port(&export.port.to_string());
        let mut ours = self.names(&port.join("subsystems"))?.is_empty();
        for attribute in port_attributes(export) {
            if matches!(attribute.name, "addr_traddr" | "addr_trsvcid") {
                let found = self.value(&port.join(attribute.name))?;
                ours &= found.is_some_and(|found| found.is_empty() || attribute.is(&found));
            }
        }
        if ours {
            self.remove(&port)?;
        }
        self.remove_idle_host(&export.host_nqn)
    }

    /// Withdraws whatever is offered under this NQN.
    pub fn unpublish_by_nqn(&self, nqn: &str) -> io::Result<()> {
        check_nqn(nqn)?;
        for port in self.unlink_ports(nqn)? {
            if self.names(&port.join("subsystems"))?.is_empty() {
                self.remove(&port)?;
            }
        }
        let subsystem = self.subsystem(nqn);
        let allowed = subsystem.join("allowed_hosts");
        let hosts = self.names(&allowed)?;
        for host in &hosts {
            self.unlink(&allowed.join(host))?;
        }
        let namespaces = subsystem.join("namespaces");
        for namespace in self.names(&namespaces)? {
            // Removing an enabled namespace disables it.
            self.remove(&namespaces.join(namespace))?;
        }
        self.remove(&subsystem)?;
        for host in &hosts {
            self.remove_idle_host(host)?;
        }
        Ok(())
    }

    /// The NQN of every subsystem that dmlocal made. One whose making was cut off
    /// before it got its model is not among them; its maker knows its NQN.
    pub fn ours(&self) -> io::Result<Vec<String>> {
        let mut ours = Vec::new();
        for nqn in self.names(&self.root.join("subsystems"))? {
            let model = self.value(&self.subsystem(&nqn).join("attr_model"))?;
            if nqn.starts_with(NQN_PREFIX) && model.as_deref() == Some(MODEL) {
                ours.push(nqn);
            }
        }
        Ok(ours)
    }

    /// Removes the subsystem from every port; returns the ports that had it.
    fn unlink_ports(&self, nqn: &str) -> io::Result<Vec<PathBuf>> {
        let mut had = Vec::new();
        for port in self.names(&self.root.join("ports"))? {
            let port = self.port(&port);
            if self.names(&port.join("subsystems"))?.iter().any(|linked| linked == nqn) {
                self.unlink(&port.join("subsystems").join(nqn))?;
                had.push(port);
            }
        }
        Ok(had)
    }

    /// Removes a host that no subsystem allows.
    fn remove_idle_host(&self, host: &str) -> io::Result<()> {
        for nqn in self.names(&self.root.join("subsystems"))? {
            let allowed = self.names(&self.subsystem(&nqn).join("allowed_hosts"))?;
            if allowed.iter().any(|allowed| allowed == host) {
                return Ok(());
            }
        }
        match self.remove(&self.host(host)) {
            // Somebody allowed it again in between.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(()),
            done => done,
        }
    }

    fn value(&self, path: &Path) -> io::Result<Option<String>> {
        match self.tree.read(path) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) if absent(&error) => Ok(None),
            Err(error) => Err(at("read", path, error)),
        }
    }

    /// Empty if the directory does not exist.
    fn names(&self, path: &Path) -> io::Result<Vec<String>> {
        match self.tree.list(path) {
            Ok(names) => Ok(names),
            Err(error) if absent(&error) => Ok(Vec::new()),
            Err(error) => Err(at("list", path, error)),
        }
    }

    fn differing<'a>(
        &self,
        directory: &Path,
        attributes: &'a [Attribute],
    ) -> io::Result<Vec<&'a Attribute>> {
        let mut differing = Vec::new();
        for attribute in attributes {
            match self.value(&directory.join(attribute.name))? {
                Some(found) if attribute.is(&found) => {}
                // Kernels before 4.20 or so do not have every attribute; what is
                // missing shows when it is written.
                Some(_) | None => differing.push(attribute),
            }
        }
        Ok(differing)
    }

    fn write_differing(&self, directory: &Path, attributes: &[Attribute]) -> io::Result<()> {
        for attribute in self.differing(directory, attributes)? {
            let path = directory.join(attribute.name);
            self.tree
                .write(&path, &attribute.value)
                .map_err(|error| at(&format!("write `{}` to", attribute.value), &path, error))?;
        }
        Ok(())
    }

    fn set(&self, path: &Path, value: &str) -> io::Result<()> {
        if self.value(path)?.as_deref() == Some(value) {
            return Ok(());
        }
        self.tree
            .write(path, value)
            .map_err(|error| at(&format!("write `{value}` to"), path, error))
    }

    fn ensure(&self, path: &Path) -> io::Result<()> {
        match self.tree.make(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(at("make", path, error))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn ensure_link(&self, target: &Path, path: &Path) -> io::Result<()> {
        match self.tree.link(target, path) {
            // configfs names a link after its target: it cannot lead elsewhere.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(at("link", path, error))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        match self.tree.unlink(path) {
            Err(error) if !absent(&error) => Err(at("unlink", path, error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match self.tree.remove(path) {
            Err(error) if !absent(&error) => Err(at("remove", path, error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

struct Attribute {
    name: &'static str,
    value: String,
}

impl Attribute {
    fn new(name: &'static str, value: impl Into<String>) -> Self {
        Self { name, value: value.into() }
    }

    fn is(&self, found: &str) -> bool {
        // The kernel prints UUIDs in its own case.
        found.eq_ignore_ascii_case(&self.value)
    }
}

fn subsystem_attributes(export: &Export) -> [Attribute; 5] {
    // In this order: the kernel keeps the lower end from passing the upper one.
    [
        Attribute::new("attr_allow_any_host", "0"),
        Attribute::new("attr_model", MODEL),
        Attribute::new("attr_serial", &export.serial),
        Attribute::new("attr_cntlid_min", export.port.to_string()),
        Attribute::new("attr_cntlid_max", export.port.to_string()),
    ]
}

fn namespace_attributes(export: &Export) -> io::Result<[Attribute; 4]> {
    let device = export.device.to_str().ok_or_else(|| invalid("the device's path"))?;
    Ok([
        Attribute::new("device_path", device),
        Attribute::new("device_uuid", export.uuid.hyphenated().to_string()),
        Attribute::new("device_nguid", export.nguid.hyphenated().to_string()),
        // The page cache of this node must not hide what the device holds.
        Attribute::new("buffered_io", "0"),
    ])
}

fn port_attributes(export: &Export) -> [Attribute; 4] {
    let family = if export.address.is_ipv4() { "ipv4" } else { "ipv6" };
    [
        Attribute::new("addr_trtype", "tcp"),
        Attribute::new("addr_adrfam", family),
        Attribute::new("addr_traddr", export.address.to_string()),
        Attribute::new("addr_trsvcid", export.port.to_string()),
    ]
}

fn check(export: &Export) -> io::Result<()> {
    check_nqn(&export.nqn)?;
    check_path_segment(&export.host_nqn, "the host NQN")?;
    let serial = &export.serial;
    if serial.is_empty()
        || serial.len() > SERIAL_MAX
        || !serial.bytes().all(|byte| byte.is_ascii_alphanumeric())
    {
        return Err(invalid("the serial number"));
    }
    if export.port == 0 {
        return Err(invalid("port 0"));
    }
    Ok(())
}

/// An NQN of ours: anything else could lead out of the directory, or to somebody
/// else's subsystem.
fn check_nqn(nqn: &str) -> io::Result<()> {
    match nqn.strip_prefix(NQN_PREFIX) {
        Some(rest) if !rest.is_empty() => check_path_segment(nqn, "the NQN"),
        _ => Err(invalid("the NQN")),
    }
}

/// At most 223 bytes (`NVMF_NQN_SIZE`) and a plain file name.
fn check_path_segment(text: &str, what: &str) -> io::Result<()> {
    let plain = text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b',');
    if text.is_empty() || text.len() > 223 || text.starts_with('.') || !plain {
        return Err(invalid(what));
    }
    Ok(())
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{what} is not one that can be exported"))
}

fn absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

fn at(verb: &str, path: &Path, error: io::Error) -> io::Error {
    describe(verb, &path.display().to_string(), error)
}
