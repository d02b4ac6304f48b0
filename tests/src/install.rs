//! dmlocal on a node: programs, configuration, certificates.
//!
//! Programs change all the time, so they are no part of the image.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::cluster::Node;
use crate::host;

/// A throw-away authority and what it issued: a directory per node for its
/// agent, and one for each client.
pub(crate) struct Certificates {
    directory: TempDir,
}

impl Certificates {
    /// Has `dmlocalctl` make them; `None` while there is no such program.
    pub(crate) fn make(nodes: &[Node]) -> Result<Option<Certificates>> {
        let program = host::binaries().join("dmlocalctl");
        let pki = |arguments: &[&str]| {
            host::output(host::command(&[program.as_os_str()]).arg("pki").args(arguments))
        };
        if pki(&["--help"]).is_err() {
            eprintln!("no certificates: {} cannot make them", program.display());
            return Ok(None);
        }
        let directory = tempfile::tempdir().context("creating a directory for certificates")?;
        let at = |name: &str| directory.path().join(name).display().to_string();
        let authority = at("authority");
        pki(&["init", "--out", &authority])?;
        for role in ["operator", "driver"] {
            pki(&["issue", "--ca-dir", &authority, "--role", role, "--out", &at(role)])?;
        }
        for node in nodes {
            let (name, address) = (node.name(), node.address());
            let of = ["--role", "agent", "--node", &name, "--address", &address];
            pki(&[&["issue", "--ca-dir", &authority], &of[..], &["--out", &at(&name)]].concat())?;
        }
        Ok(Some(Certificates { directory }))
    }

    fn put(&self, node: &Node, pki: &Path) -> Result<()> {
        let from = self.directory.path();
        copy(&from.join("authority/ca.pem"), &pki.join("ca.pem"))?;
        for (directory, role) in
            [(node.name().as_str(), "agent"), ("operator", "operator"), ("driver", "driver")]
        {
            for extension in ["pem", "key"] {
                let file = format!("{role}.{extension}");
                copy(&from.join(directory).join(&file), &pki.join(&file))?;
            }
        }
        Ok(())
    }
}

/// Where each kind of file of `agent/dist` belongs.
fn place_of(name: &str) -> Result<&'static str> {
    match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("service" | "socket" | "slice" | "target") => Ok("usr/lib/systemd/system"),
        Some("rules") => Ok("usr/lib/udev/rules.d"),
        _ => bail!("the bed does not know where agent/dist/{name} belongs"),
    }
}

fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() { files.extend(files_below(&path)?) } else { files.push(path) }
    }
    Ok(files)
}

/// The configuration of dmlocald on a node.
fn configuration(node: &Node) -> String {
    let (name, address) = (node.name(), node.address());
    format!(
        r#"node = "{name}"

[listen]
unix = "/run/dmlocal/agent.sock"
tcp = "0.0.0.0:7450"
advertise = "https://{name}:7450"

[tls]
ca = "/etc/dmlocal/pki/ca.pem"
cert = "/etc/dmlocal/pki/agent.pem"
key = "/etc/dmlocal/pki/agent.key"

[export]
address = "{address}"
ports = "4420-4519"

[[pool]]
name = "local"
volume_group = "dmlocal"
thin_pool = "pool"
devices = ["/dev/disk/by-id/virtio-pool"]
"#
    )
}

/// Puts everything on a node and starts dmlocald, once more if it runs already.
pub(crate) fn install(node: &Node, certificates: Option<&Certificates>) -> Result<()> {
    let stage = tempfile::tempdir().context("creating a stage")?;
    let to = |path: &str| stage.path().join(path);
    for (program, place) in [
        ("dmlocald", "usr/sbin/dmlocald"),
        ("dmlocalctl", "usr/bin/dmlocalctl"),
        ("dmlocal-writer", "usr/bin/dmlocal-writer"),
    ] {
        let program = host::binaries().join(program);
        if program.exists() {
            copy(&program, &to(place))?;
        }
    }
    for file in files_below(&host::repository().join("agent/dist"))? {
        let name = file.file_name().and_then(|name| name.to_str()).context("a strange name")?;
        copy(&file, &to(place_of(name)?).join(name))?;
    }
    let etc = to("etc/dmlocal");
    fs::create_dir_all(&etc).context("creating a directory")?;
    fs::write(etc.join("dmlocald.toml"), configuration(node)).context("writing dmlocald.toml")?;
    if let Some(certificates) = certificates {
        certificates.put(node, &etc.join("pki"))?;
    }
    let tar = host::command(&["tar", "--create", "--owner=0", "--group=0", "--directory"])
        .arg(stage.path())
        .arg(".")
        .output()
        .context("packing what to install")?
        .stdout;
    node.exec_with(&["sh", "-c", UNPACK], &tar, std::time::Duration::from_secs(120))?
        .ok()
        .context("installing dmlocal")
        .map(drop)
}

/// Unpacks what is piped in. Reloading systemd takes seconds under emulation: it
/// finds a new unit by itself, and only one that has changed has to be reloaded.
const UNPACK: &str = "
    unit=/usr/lib/systemd/system/dmlocald.service
    if test -e $unit; then
        systemctl stop --quiet dmlocald
        old=$(cat $unit)
    fi
    tar --extract --touch --keep-directory-symlink --no-overwrite-dir --directory / || exit
    udevadm control --reload
    test -e $unit || exit 0
    test \"${old-$(cat $unit)}\" = \"$(cat $unit)\" || systemctl daemon-reload
    mkdir -p /etc/systemd/system/multi-user.target.wants
    ln -sf $unit /etc/systemd/system/multi-user.target.wants/
    if ! systemctl start dmlocald; then
        systemctl status --full --no-pager dmlocald >&2
        exit 1
    fi
    sync --file-system /";

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(directory) = to.parent() {
        fs::create_dir_all(directory).context("creating a directory")?;
    }
    fs::copy(from, to).with_context(|| format!("copying {}", from.display())).map(drop)
}
