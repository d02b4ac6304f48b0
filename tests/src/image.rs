//! What nodes start from, made once and kept.
//!
//! ```text
//! debian-KEY/   rootfs/, vmlinuz, initrd.img         packages and dm-clone
//! node-KEY/     root.raw, root.qcow2, pool.qcow2,    an idle node: its disks,
//!               memory                               and its memory
//! ```
//!
//! A key is a hash of everything the artefact depends on. An artefact is made
//! under another name and renamed when it is whole, by one maker at a time.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use crate::network::Network;
use crate::qemu::{self, Boot};
use crate::{cluster, debian, host};

const NETWORK: &str = include_str!("../image/bed-network.sh");
const IDENTITY: &str = include_str!("../image/bed-identity.sh");
const IDLE: &str = include_str!("../image/idle.sh");
const RECIPE: &str = include_str!("image.rs");
const GUEST: [&str; 2] = [include_str!("bin/dmlocal-guest.rs"), include_str!("wire.rs")];
const MACHINE: &str = include_str!("qemu.rs");

/// An idle node, ready to be started any number of times.
#[derive(Clone, Debug)]
pub struct Image {
    node: PathBuf,
    boot: Boot,
}

/// Makes what takes longest and needs nothing of this project's own, unless it is
/// there. Meant to run while the project is built.
pub fn prepare() -> Result<()> {
    debian().map(drop)
}

/// The system that nodes run.
pub(crate) fn debian() -> Result<PathBuf> {
    artefact("debian", &debian::RECIPE, debian::make)
}

impl Image {
    /// The image for this host and this source, made now if it is not there yet.
    /// `guest` is the program that runs commands inside nodes.
    pub fn ensure(guest: &Path) -> Result<Image> {
        let debian = debian()?;
        let boot = Boot { acceleration: qemu::acceleration(&debian)?, kernel: debian.clone() };
        let version = qemu::version()?;
        let accelerated = format!("{:?}", boot.acceleration);
        let debian_name = debian.display().to_string();
        let mut recipe = vec![RECIPE, IDLE, NETWORK, IDENTITY, MACHINE, &version, &accelerated];
        recipe.extend(GUEST);
        recipe.push(&debian_name);
        let node = artefact("node", &recipe, |at| make_node(at, &boot, guest))?;
        Ok(Image { node, boot })
    }

    /// How a machine with this image boots.
    pub fn boot(&self) -> &Boot {
        &self.boot
    }

    /// The memory of the idle node.
    pub fn memory(&self) -> PathBuf {
        self.node.join("memory")
    }

    /// Makes the disks of a new node: what it writes is its own.
    pub fn make_disks(&self, directory: &Path) -> Result<()> {
        for disk in ["root.qcow2", "pool.qcow2"] {
            overlay(&self.node.join(disk), "qcow2", &directory.join(disk))?;
        }
        Ok(())
    }
}

/// Finds an artefact, or has it made.
pub(crate) fn artefact(
    kind: &str,
    recipe: &[&str],
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let mut key = DefaultHasher::new();
    recipe.hash(&mut key);
    let cache = host::cache()?;
    let artefact = cache.join(format!("{kind}-{:016x}", key.finish()));
    if artefact.exists() {
        return Ok(artefact);
    }
    let lock = File::create(cache.join(format!("{kind}.lock"))).context("creating a lock")?;
    let _held = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("waiting for another maker")?;
    if artefact.exists() {
        return Ok(artefact);
    }
    eprintln!("making {} (once)", artefact.display());
    let started = Instant::now();
    let unfinished = cache.join(format!("{kind}.unfinished"));
    remove(&unfinished)?;
    fs::create_dir(&unfinished).context("creating the artefact's directory")?;
    make(&unfinished).with_context(|| format!("making {}", artefact.display()))?;
    fs::rename(&unfinished, &artefact).context("naming the artefact")?;
    eprintln!("made {} in {:.0} s", artefact.display(), started.elapsed().as_secs_f64());
    Ok(artefact)
}

pub(crate) fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", directory.display()))
        }
        _ => Ok(()),
    }
}

/// An idle node: boots it once, readies it, and keeps its disks and memory.
fn make_node(at: &Path, boot: &Boot, guest: &Path) -> Result<()> {
    make_root(at, boot, guest)?;
    overlay(Path::new("root.raw"), "raw", &at.join("root.qcow2"))?;
    qemu_img(&["create", "-q", "-f", "qcow2", "pool.qcow2", "8G"], at)?;

    let network = Network::named(&format!("dmlocal-image-{}", std::process::id()));
    let result = boot_and_save(at, boot, &network);
    let removed = network.remove();
    result.with_context(|| host::tail(&at.join("console.log")))?;
    removed
}

fn boot_and_save(at: &Path, boot: &Boot, network: &Network) -> Result<()> {
    network.create()?;
    network.add_node('a')?;
    let node = cluster::Node::new(at, 'a', network);
    node.machine().set_up(boot, false)?;
    node.machine().start(None)?;
    let saved = (|| {
        node.wait_until_up(Duration::from_secs(180))?;
        node.exec_with(&["sh"], IDLE.as_bytes(), Duration::from_secs(120))?.ok()?;
        node.machine().save(Path::new("memory"))
    })();
    node.machine().kill()?;
    saved
}

fn make_root(at: &Path, boot: &Boot, guest: &Path) -> Result<()> {
    let rootfs = link_rootfs(&boot.kernel, at)?;
    let bed = rootfs.join("usr/lib/bed");
    fs::create_dir(&bed).context("creating the bed's directory")?;
    script(&bed, "network", NETWORK)?;
    script(&bed, "identity", IDENTITY)?;
    fs::copy(guest, bed.join("dmlocal-guest"))
        .with_context(|| format!("copying {}: has it been built?", guest.display()))?;
    host::output(
        Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-L", "root", "-m", "0", "-J", "size=16", "-d"])
            .args([&rootfs, &at.join("root.raw")])
            .arg("4G"),
    )?;
    remove(&rootfs)
}

/// A root to add something to. Links instead of copies: only what is added is new.
pub(crate) fn link_rootfs(debian: &Path, at: &Path) -> Result<PathBuf> {
    let (from, to) = (debian.join("rootfs"), at.join("rootfs"));
    host::output(Command::new("cp").args(["--archive", "--link"]).args([&from, &to]))?;
    Ok(to)
}

/// Lays an empty disk over another, which it never writes to.
fn overlay(below: &Path, format: &str, disk: &Path) -> Result<()> {
    let below = below.display().to_string();
    let name = disk.file_name().and_then(|name| name.to_str()).context("a disk without a name")?;
    qemu_img(
        &["create", "-q", "-f", "qcow2", "-F", format, "-b", &below, name],
        disk.parent().unwrap_or(Path::new(".")),
    )
}

fn qemu_img(arguments: &[&str], directory: &Path) -> Result<()> {
    host::output(Command::new("qemu-img").args(arguments).current_dir(directory)).map(drop)
}

pub(crate) fn script(directory: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let path = directory.join(name);
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).context("making it runnable")?;
    Ok(path)
}
