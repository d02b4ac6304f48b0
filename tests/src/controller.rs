//! Cinder on a node: a disk with Python's packages, and the driver as it is now.
//!
//! ```text
//! cinder-KEY/   disk.raw      bin/python3, etc/, lib/python3.N/site-packages
//! ```
//!
//! The disk is plugged into nodes that ask for it, so that no other pays for it. It is a
//! virtual environment for the Python that nodes have anyway, with the packages that the
//! driver is tested with, and Glance; they were compiled beforehand, because that takes
//! minutes under emulation.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cluster::Node;
use crate::image::{artefact, debian, link_rootfs, remove};
use crate::{host, python};

/// Python with Cinder, inside a node.
pub const PYTHON: &str = "/srv/cinder/bin/python3";

/// The folder with the driver's package, inside a node.
pub const DRIVER: &str = "/srv/driver";

const PLACE: &str = "srv/cinder";

/// Packages that no node needs: they check and generate code; and zstd, a choice of
/// backups, for which there is no wheel for every Python.
const LEFT_OUT: &[&str] =
    &["ast-serialize", "grpcio-tools", "librt", "mypy", "mypy-extensions", "ruff", "zstd"];

/// Packages beyond those: Glance, what serves it, and what a later Python lacks.
const ADDED: &str = include_str!("../image/controller.txt");

/// Kinds of wheels that run on nodes.
const PLATFORMS: &[&str] =
    &["manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"];

const RECIPE: &str = include_str!("controller.rs");

/// Gives a node Python with Cinder, and the driver; once more if it has them already.
pub fn install(node: &Node) -> Result<()> {
    let directory = format!("/{PLACE}");
    if !node.exec(&["mountpoint", "--quiet", &directory])?.success() {
        let device = "/dev/disk/by-id/virtio-cinder";
        if !node.exec(&["test", "-e", device])?.success() {
            node.machine().lend_disk("cinder", &ensure()?.join("disk.raw"))?;
        }
        let mount = format!(
            "mkdir -p {directory} && udevadm wait --timeout=60 {device} &&
             mount -o ro,noatime {device} {directory}"
        );
        node.shell(&mount)?.ok()?;
    }
    // Once this has answered, the interface to the agents has been generated.
    python::in_driver()?;
    let tar = host::command(&["tar", "--create", "--owner=0", "--group=0", "--directory"])
        .arg(python::folder())
        .args(["--exclude=__pycache__", "cinder_dmlocal"])
        .output()
        .context("packing the driver")?
        .stdout;
    let unpack =
        format!("rm -rf {DRIVER} && mkdir {DRIVER} && tar --extract --touch --directory {DRIVER}");
    let unpacked = node.exec_with(&["sh", "-c", &unpack], &tar, Duration::from_secs(120))?;
    unpacked.ok().context("installing the driver").map(drop)
}

/// Has the disk made, unless it is there.
fn ensure() -> Result<PathBuf> {
    let debian = debian()?;
    let pins = fs::read_to_string(python::folder().join("requirements.txt"))
        .context("reading the pinned packages")?;
    let wanted: String = pins
        .lines()
        .filter(|pin| !LEFT_OUT.contains(&pin.split("==").next().unwrap_or(pin)))
        .flat_map(|pin| [pin, "\n"])
        .chain([ADDED])
        .collect();
    let recipe = [RECIPE, &wanted, &debian.display().to_string()];
    artefact("cinder", &recipe, |at| make(at, &debian, &wanted))
}

fn make(at: &Path, debian: &Path, pins: &str) -> Result<()> {
    let rootfs = link_rootfs(debian, at)?;
    let version = "import sys; print('%d.%d' % sys.version_info[:2])";
    let version = in_root(&rootfs, &["python3", "-c", version])?;
    let version = version.trim();

    let environment = rootfs.join(PLACE);
    let packages = format!("lib/python{version}/site-packages");
    let list = at.join("packages.txt");
    fs::write(&list, pins).context("writing what to install")?;
    let mut install = python::pip()?;
    install.args(["install", "--quiet", "--no-input", "--no-deps", "--no-compile"]);
    // What would be built here would be built for the wrong Python; but this has nothing
    // to be compiled, and no wheel.
    install.args(["--only-binary=:all:", "--no-binary=simplegeneric"]);
    install.args(["--implementation=cp", "--python-version", version]);
    install.args(PLATFORMS.iter().map(|platform| format!("--platform={platform}")));
    install.arg("--target").arg(environment.join(&packages)).arg("--requirement").arg(&list);
    host::logged(&mut install, &at.join("pip.log"))?;

    // What pip does by itself for an environment of its own Python.
    fs::rename(environment.join(&packages).join("etc"), environment.join("etc"))
        .context("moving the configuration files")?;
    remove(&environment.join(&packages).join("bin"))?;
    fs::create_dir(environment.join("bin")).context("creating a directory")?;
    symlink("/usr/bin/python3", environment.join("bin/python3")).context("linking Python")?;
    fs::write(environment.join("pyvenv.cfg"), "home = /usr/bin\n").context("pyvenv.cfg")?;
    let compile = ["python3", "-m", "compileall", "-q", "-j", "0"];
    let whatever_the_time = ["--invalidation-mode", "unchecked-hash"];
    let all = format!("/{PLACE}/{packages}");
    in_root(&rootfs, &[&compile[..], &whatever_the_time, &[&all]].concat())
        .context("compiling the packages")?;

    host::output(
        Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"])
            .args([&environment, &at.join("disk.raw")])
            .arg("2G"),
    )?;
    remove(&rootfs)
}

fn in_root(rootfs: &Path, argv: &[&str]) -> Result<String> {
    host::output(Command::new("chroot").arg(rootfs).args(argv))
}
