//! The Debian root that nodes run, with a dm-clone module built for its kernel.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, bail};

use crate::host;
use crate::image::{remove, script};

/// The Debian release that nodes run: the first whose kernel has NVMe over TLS.
const SUITE: &str = "trixie";

/// What a node has installed beyond the essential. QEMU is there for guests
/// inside a node.
const PACKAGES: &[&str] = &[
    "cpio",
    "cryptsetup-bin",
    "dbus",
    "dmsetup",
    "e2fsprogs",
    "fio",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "klibc-utils",
    "kmod",
    "ktls-utils",
    "linux-image-cloud-amd64",
    "lvm2",
    "nvme-cli",
    "procps",
    "qemu-system-x86",
    "qemu-utils",
    "systemd",
    "systemd-sysv",
    "thin-provisioning-tools",
    "udev",
    "util-linux",
];

/// What it takes to build a module for that kernel.
const MODULE_PACKAGES: &[&str] =
    &["gcc", "linux-headers-cloud-amd64", "linux-source", "make", "xz-utils"];

/// Left out of both roots: nobody reads documentation there.
const LEFT_OUT: &[&str] = &["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"];

const AFTER_PACKAGES: &str = include_str!("../image/after-packages.sh");
const BUILD_DM_CLONE: &str = include_str!("../image/build-dm-clone.sh");
const MAKE_INITRD: &str = include_str!("../image/make-initrd.sh");
const INIT: &str = include_str!("../image/bed-init.sh");

/// Everything that decides what is made here.
pub(crate) const RECIPE: [&str; 5] =
    [include_str!("debian.rs"), AFTER_PACKAGES, BUILD_DM_CLONE, MAKE_INITRD, INIT];

/// A Debian root with dm-clone, and its kernel.
pub(crate) fn make(at: &Path) -> Result<()> {
    let mirror = mirror()?;
    let (rootfs, builder) = (at.join("rootfs"), at.join("builder"));
    let after = script(at, "after-packages", AFTER_PACKAGES)?;
    // Installing packages keeps one processor busy.
    thread::scope(|scope| {
        let module = scope.spawn(|| make_module(&builder, &mirror));
        let root = debootstrap(&rootfs, PACKAGES, &mirror, Some(&after));
        root.and(module.join().unwrap_or_else(|_| bail!("building the module panicked")))
    })?;

    let kernel = only_entry(&rootfs.join("usr/lib/modules"))?;
    if only_entry(&builder.join("usr/lib/modules"))? != kernel {
        bail!("the module was not built for the node's kernel, {kernel}");
    }
    let modules = rootfs.join("usr/lib/modules").join(&kernel).join("updates");
    fs::create_dir_all(&modules).context("creating a directory for the module")?;
    fs::copy(builder.join("dm-clone.ko"), modules.join("dm-clone.ko")).context("the module")?;
    host::output(Command::new("chroot").arg(&rootfs).args(["depmod", &kernel]))?;
    remove(&builder)?;
    script(&rootfs, "bed-init", INIT)?;
    script(&rootfs, "make-initrd", MAKE_INITRD)?;
    host::output(Command::new("chroot").arg(&rootfs).arg("/make-initrd"))?;
    fs::rename(rootfs.join("initrd.img"), at.join("initrd.img")).context("the initial RAM disk")?;
    fs::copy(rootfs.join(format!("boot/vmlinuz-{kernel}")), at.join("vmlinuz"))
        .context("vmlinuz")?;
    Ok(())
}

/// A root of its own to build the module in: no node needs a compiler.
fn make_module(builder: &Path, mirror: &str) -> Result<()> {
    debootstrap(builder, MODULE_PACKAGES, mirror, None)?;
    script(builder, "build-dm-clone", BUILD_DM_CLONE)?;
    let mut build = Command::new("chroot");
    build.arg(builder).arg("/build-dm-clone");
    host::logged(&mut build, &builder.with_file_name("dm-clone.log"))
}

fn debootstrap(root: &Path, packages: &[&str], mirror: &str, hook: Option<&Path>) -> Result<()> {
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=minbase", "--aptopt=Acquire::Languages \"none\""]);
    command.args(LEFT_OUT.iter().map(|path| format!("--dpkgopt=path-exclude={path}")));
    command.args(hook.map(|path| format!("--customize-hook='{}' \"$1\"", path.display())));
    // Debian's initial RAM disk is not used, and takes long to make.
    command.env("INITRD", "No");
    command.arg(format!("--include={}", packages.join(",")));
    command.arg(SUITE).arg(root).arg(mirror);
    host::logged(&mut command, &root.with_extension("log"))
}

/// The archive to install nodes from: the first of the machine's own sources
/// that has the release.
fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("DMLOCAL_DEBIAN_MIRROR") {
        return Ok(mirror);
    }
    let targets = host::output(&mut host::command(&[
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
    ]))?;
    let mut archives: Vec<&str> = targets.lines().map(|line| line.trim_end_matches('/')).collect();
    archives.dedup();
    archives.into_iter().find(|archive| has_suite(archive)).map(str::to_owned).with_context(|| {
        format!("no APT source of this machine has Debian {SUITE}: set DMLOCAL_DEBIAN_MIRROR")
    })
}

fn has_suite(archive: &str) -> bool {
    let Ok(directory) = tempfile::tempdir() else { return false };
    let release = format!("{archive}/dists/{SUITE}/InRelease");
    let mut fetch = host::command(&["/usr/lib/apt/apt-helper", "download-file", &release]);
    host::output(fetch.arg(directory.path().join("InRelease"))).is_ok()
}

fn only_entry(directory: &Path) -> Result<String> {
    let entries: Vec<_> = fs::read_dir(directory)
        .with_context(|| format!("reading {}", directory.display()))?
        .collect::<Result<_, _>>()?;
    match entries.as_slice() {
        [entry] => Ok(entry.file_name().to_string_lossy().into_owned()),
        _ => bail!("{} holds {} entries instead of one", directory.display(), entries.len()),
    }
}
