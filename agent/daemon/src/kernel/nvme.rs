//! Imports: the kernel's NVMe/TCP initiator.
//!
//! Connecting is a line of options written to `/dev/nvme-fabrics`, which is all
//! that nvme-cli does; everything else is read from sysfs. A namespace is found
//! by the NQN of its subsystem and its own UUID, never by a name or number that
//! may meanwhile belong to another.
//!
//! With native multipath the block device is the subsystem's (`nvme0n1`, below
//! `class/nvme-subsystem`), and what is below a controller (`nvme0c0n1`) is
//! hidden; without, the namespace is the controller's.

#[cfg(test)]
mod test;

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    net::IpAddr,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use dmlocal_model::units::{DevNo, Sectors};
use nix::errno::Errno;
use uuid::Uuid;

use super::{
    dm::{describe, interruptible},
    nvmet::MODEL,
};

/// Where sysfs is, but for tests.
pub const SYS: &str = "/sys";

const FABRICS: &str = "/dev/nvme-fabrics";

/// How long to wait between two attempts after a loss, in seconds. The kernel's
/// 10 would keep a guest waiting that long for a node that rebooted.
const RECONNECT_DELAY_S: u32 = 2;

/// How long a silent peer is believed to be there, in seconds: the kernel's own
/// default (`NVME_DEFAULT_KATO`).
const KEEP_ALIVE_S: u32 = 5;

/// Queues for I/O. Each is a TCP connection, with buffers and a worker on both
/// sides; the traffic of one import is one sequential copy and what the guest
/// reads meanwhile, and the kernel's default is one per CPU.
const IO_QUEUES: u32 = 2;

/// How often sysfs is looked at while a namespace comes or goes.
const POLL: Duration = Duration::from_millis(10);

/// How long a controller that came too late may take to go.
const LATE: Duration = Duration::from_secs(30);

/// A peer's export, as seen from here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    /// The subsystem's NQN.
    pub nqn: String,
    /// The namespace's UUID.
    pub uuid: Uuid,
    /// Where the peer listens.
    pub address: IpAddr,
    /// Where the peer listens.
    pub port: u16,
    /// Who we are.
    pub host_nqn: String,
    /// Who we are; the kernel wants one and the same for each host NQN.
    pub host_id: Uuid,
}

/// A connection to a subsystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controller {
    /// Its name, such as `nvme0`.
    pub name: String,
    /// Its state, such as `live` or `connecting`
    /// (drivers/nvme/host/sysfs.c, `nvme_sysfs_show_state`).
    pub state: String,
}

/// What there is of an import.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Seen {
    /// All controllers of the subsystem.
    pub controllers: Vec<Controller>,
    /// The number of the namespace's block device.
    pub namespace: Option<DevNo>,
    /// The name of the namespace's block device.
    pub namespace_name: Option<String>,
    /// Its size.
    pub size: Option<Sectors>,
    /// Whether a controller is live, so that requests go through now.
    pub live: bool,
}

/// Looks for the import.
pub fn observe(import: &Import) -> io::Result<Seen> {
    observe_in(Path::new(SYS), import)
}

fn observe_in(sys: &Path, import: &Import) -> io::Result<Seen> {
    let mut seen = Seen::default();
    let mut parents = Vec::new();
    for controller in controllers(sys, &import.nqn)? {
        let path = sys.join("class/nvme").join(&controller);
        // One that goes meanwhile has no state any more.
        if let Some(state) = attribute(&path.join("state"))? {
            seen.live |= state == "live";
            seen.controllers.push(Controller { name: controller, state });
        }
        parents.push(path);
    }
    for subsystem in entries(&sys.join("class/nvme-subsystem"))? {
        let path = sys.join("class/nvme-subsystem").join(subsystem);
        if attribute(&path.join("subsysnqn"))?.as_deref() == Some(import.nqn.as_str()) {
            parents.push(path);
        }
    }
    for parent in parents {
        for name in entries(&parent)? {
            if is_namespace(&name)
                && let Some(number) = namespace(&parent.join(&name), import.uuid)?
            {
                let size = attribute(&parent.join(&name).join("size"))?;
                seen.size = size.and_then(|size| size.parse().ok()).map(Sectors);
                (seen.namespace, seen.namespace_name) = (Some(number), Some(name));
                return Ok(seen);
            }
        }
    }
    Ok(seen)
}

/// The names of all controllers of a subsystem.
fn controllers(sys: &Path, nqn: &str) -> io::Result<Vec<String>> {
    let class = sys.join("class/nvme");
    let mut found = Vec::new();
    for name in entries(&class)? {
        if attribute(&class.join(&name).join("subsysnqn"))?.as_deref() == Some(nqn) {
            found.push(name);
        }
    }
    Ok(found)
}

/// The NQNs of all subsystems that a dmlocal exports and this node is connected to.
pub fn ours() -> io::Result<Vec<String>> {
    let class = Path::new(SYS).join("class/nvme");
    let mut found = Vec::new();
    for name in entries(&class)? {
        let of = |what: &str| attribute(&class.join(&name).join(what));
        if of("model")?.as_deref() == Some(MODEL) {
            found.extend(of("subsysnqn")?);
        }
    }
    Ok(found)
}

/// The device number, if this is the block device of the namespace.
fn namespace(path: &Path, uuid: Uuid) -> io::Result<Option<DevNo>> {
    let Some(found) = attribute(&path.join("uuid"))? else { return Ok(None) };
    if Uuid::try_parse(&found) != Ok(uuid) {
        return Ok(None);
    }
    Ok(attribute(&path.join("dev"))?.and_then(|number| number.parse().ok()))
}

/// `nvme<n>n<m>`: not the hidden `nvme<n>c<c>n<m>`, not a partition.
fn is_namespace(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    name.strip_prefix("nvme")
        .and_then(|rest| rest.split_once('n'))
        .is_some_and(|(subsystem, namespace)| digits(subsystem) && digits(namespace))
}

/// The names in a directory; none if it does not exist or goes meanwhile.
fn entries(path: &Path) -> io::Result<Vec<String>> {
    let list = match fs::read_dir(path) {
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        list => list.map_err(|error| at("list", path, error))?,
    };
    let mut names = Vec::new();
    for entry in list {
        match entry {
            Ok(entry) => names.extend(entry.file_name().into_string()),
            Err(error) if is_gone(&error) => break,
            Err(error) => return Err(at("list", path, error)),
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn attribute(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(at("read", path, error)),
    }
}

/// Absent, or removed while it was read.
fn is_gone(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO | Errno::ENOTDIR))
}

/// Connects, unless a controller is there already, and waits for the block
/// device.
///
/// A controller that loses its peer tries to reconnect for ever, and requests
/// wait meanwhile; only [`disconnect`] ends that.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] if the peer does not answer or the namespace does
/// not appear before the deadline. A controller that was made stays, and so may
/// be found by the next attempt, unless it is [`unwanted`] by then.
pub fn connect(import: &Import, deadline: Duration) -> io::Result<()> {
    let end = Instant::now() + deadline;
    if controllers(Path::new(SYS), &import.nqn)?.is_empty() {
        let options = options(import)?;
        let (nqn, abandoned) = (import.nqn.clone(), import.nqn.clone());
        pending().insert(nqn.clone(), true);
        let written = interruptible(
            deadline,
            move || {
                let file = OpenOptions::new().read(true).write(true).open(FABRICS)?;
                // One write: the kernel takes it for all the options, and the
                // controller exists when it returns. std's would repeat an
                // interrupted one.
                nix::unistd::write(&file, options.as_bytes()).map_err(io::Error::from)
            },
            // Nobody waits for this controller any more. The next attempt may use it;
            // but when the move is over, it would try to reconnect for ever.
            move |late| {
                let wanted = pending().remove(&abandoned);
                if late.is_ok() && wanted == Some(false) {
                    let _ = disconnect(&abandoned, LATE);
                }
            },
        );
        if !written.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut) {
            pending().remove(&nqn);
        }
        match written {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(Errno::EALREADY as i32) => {}
            Err(error) => return Err(describe("connect to", &nqn, error)),
        }
    }
    loop {
        let seen = observe(import)?;
        if seen.namespace.is_some() {
            return Ok(());
        }
        if Instant::now() >= end {
            let text = format!("{} does not show namespace {}", import.nqn, import.uuid);
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        thread::sleep(POLL);
    }
}

/// Asks the peer what its namespaces are like now, and waits until the import has at
/// least this size. The peer tells by itself when one grows; its word may be lost.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] if it is smaller at the deadline.
pub fn rescan(import: &Import, at_least: Sectors, deadline: Duration) -> io::Result<()> {
    let end = Instant::now() + deadline;
    for name in controllers(Path::new(SYS), &import.nqn)? {
        // Only queues the work (drivers/nvme/host/sysfs.c, `nvme_sysfs_rescan`).
        let path = Path::new(SYS).join("class/nvme").join(name).join("rescan_controller");
        match fs::write(&path, "1") {
            Err(error) if !is_gone(&error) => return Err(at("write", &path, error)),
            Err(_) | Ok(()) => {}
        }
    }
    loop {
        let seen = observe(import)?;
        if seen.size.is_some_and(|size| size >= at_least) {
            return Ok(());
        }
        if Instant::now() >= end {
            let text = format!("{} has {:?}, not {at_least}", import.nqn, seen.size);
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        thread::sleep(POLL);
    }
}

/// Connections that are being made, by NQN, and whether they are still wanted.
fn pending() -> MutexGuard<'static, BTreeMap<String, bool>> {
    static PENDING: Mutex<BTreeMap<String, bool>> = Mutex::new(BTreeMap::new());
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The move is over: a connection that is still being made goes at once.
pub fn unwanted(nqn: &str) {
    if let Some(wanted) = pending().get_mut(nqn) {
        *wanted = false;
    }
}

/// The options of one connection (drivers/nvme/host/fabrics.c, `opt_tokens`).
/// Failing fast (`fast_io_fail_tmo`) is off by default and stays so.
fn options(import: &Import) -> io::Result<String> {
    for text in [&import.nqn, &import.host_nqn] {
        // A comma would begin an option of the peer's choice.
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic() && b != b',') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("`{text}` is no NQN")));
        }
    }
    Ok(format!(
        "transport=tcp,traddr={},trsvcid={},nqn={},hostnqn={},hostid={},nr_io_queues={IO_QUEUES},\
         reconnect_delay={RECONNECT_DELAY_S},ctrl_loss_tmo=-1,keep_alive_tmo={KEEP_ALIVE_S}",
        import.address,
        import.port,
        import.nqn,
        import.host_nqn,
        import.host_id.hyphenated()
    ))
}

/// Deletes every controller of the subsystem. Requests that wait for it fail.
/// None is success.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] if one is still there at the deadline; it may go
/// later.
pub fn disconnect(nqn: &str, deadline: Duration) -> io::Result<()> {
    disconnect_in(Path::new(SYS), nqn, deadline)
}

fn disconnect_in(sys: &Path, nqn: &str, deadline: Duration) -> io::Result<()> {
    let end = Instant::now() + deadline;
    for name in controllers(sys, nqn)? {
        let path = sys.join("class/nvme").join(&name);
        let left = end.saturating_duration_since(Instant::now());
        let nqn = nqn.to_owned();
        interruptible(left, move || delete(&path, &nqn), |_| {})
            .map_err(|error| describe("disconnect", &name, error))?;
    }
    while !controllers(sys, nqn)?.is_empty() {
        if Instant::now() >= end {
            let text = format!("a controller of {nqn} is still there");
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// Deletes the controller at this path if it is one of this subsystem.
fn delete(path: &Path, nqn: &str) -> io::Result<()> {
    // Opened first, then checked: if the name went to another controller before
    // the check, it is not deleted; if after, the file is the old one's and the
    // write fails.
    let file = match OpenOptions::new().write(true).open(path.join("delete_controller")) {
        Err(error) if is_gone(&error) => return Ok(()),
        file => file?,
    };
    if attribute(&path.join("subsysnqn"))?.as_deref() != Some(nqn) {
        return Ok(());
    }
    match (&file).write_all(b"1") {
        Err(error) if is_gone(&error) => Ok(()),
        done => done,
    }
}

fn at(verb: &str, path: &Path, error: io::Error) -> io::Error {
    describe(verb, &path.display().to_string(), error)
}
