//! What the host needs, installed through its own package manager.

use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;

use crate::host;

/// What it takes to build the workspace.
pub const BUILDING: &[&str] = &["clang", "libclang-dev", "libdevmapper-dev", "pkg-config"];

/// What it takes, beyond that, to test the Cinder driver.
pub const DRIVER: &[&str] = &["python3", "python3-venv"];

/// What it takes, beyond that, to test it with the services around it.
pub const SERVICES: &[&str] = &["mariadb-client-core", "mariadb-server-core", "rabbitmq-server"];

/// What it takes, beyond that, to run nodes.
pub const NODES: &[&str] = &[
    "binutils",
    "debian-archive-keyring",
    "e2fsprogs",
    "iproute2",
    "mmdebstrap",
    "qemu-system-x86",
    "qemu-utils",
    "xz-utils",
];

/// Installs those of the packages that dpkg misses. Asks the network for
/// nothing when it misses none.
pub fn ensure(packages: &[&str]) -> Result<()> {
    let mut missing: Vec<String> =
        packages.iter().filter(|name| !is_installed(name)).map(ToString::to_string).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("installing {}", missing.join(" "));
    run_as_root(&["apt-get", "update", "--quiet=2"])?;
    // Debian's QEMU packages refuse to mix versions, and an image tool left from
    // elsewhere would keep the system emulator out.
    if missing.iter().any(|name| name == "qemu-system-x86") {
        missing.retain(|name| name != "qemu-utils");
        missing.push(format!("qemu-utils={}", candidate("qemu-system-x86")?));
    }
    let mut argv = vec![
        "apt-get",
        "install",
        "--quiet=2",
        "--yes",
        "--no-install-recommends",
        "--allow-downgrades",
    ];
    argv.extend(missing.iter().map(String::as_str));
    run_as_root(&argv)
}

fn is_installed(name: &str) -> bool {
    let query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", name];
    host::output(&mut host::command(&query)).is_ok_and(|status| status == "installed")
}

fn candidate(name: &str) -> Result<String> {
    let policy = host::output(&mut host::command(&["apt-cache", "policy", name]))?;
    policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))
        .map(str::to_owned)
        .with_context(|| format!("no package source offers {name}"))
}

fn run_as_root(argv: &[&str]) -> Result<()> {
    let mut command = Command::new("sudo");
    if Uid::effective().is_root() {
        command = Command::new("env");
    }
    // In that runlevel a package starts no daemon when it is installed. Where systemd runs
    // it does all the same: on ports that no test uses.
    command.args(["DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1"]).args(argv);
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}
