//! Python, with what the Cinder driver needs and is tested with.
//!
//! It is a virtual environment in the cache, made anew when the pinned packages or the
//! host's Python change. Packages come from wherever pip is configured to take them.
//! Programs in it are started by `python -m`: their scripts know only where it was made.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::host;
use crate::image::artefact;

/// Debian's Python. One that somebody has put before it in PATH may lack `venv`.
const PYTHON: &str = "/usr/bin/python3";

/// Where the pinned packages of older releases of Cinder are.
const RELEASES: &str = "releases";

/// Makes the environment of the driver's tests, unless it is there. Meant to run while the
/// project is built.
pub fn prepare() -> Result<()> {
    environment("python", &["requirements.txt"]).map(drop)
}

/// Python in the driver's folder, in which the agents' interface has been generated.
pub fn in_driver() -> Result<Command> {
    ready(&environment("python", &["requirements.txt"])?)
}

/// The same, beside the services that the driver's tests start.
pub fn in_services() -> Result<Command> {
    ready(&environment("services", &["services/requirements.txt", "requirements.txt"])?)
}

/// The same with an older release of Cinder: one of [`releases`].
pub fn in_release(release: &str) -> Result<Command> {
    ready(&environment("python", &[&format!("{RELEASES}/{release}.txt")])?)
}

/// The older releases of Cinder that the driver is tested with, by their major versions.
pub fn releases() -> Result<Vec<String>> {
    let listed = fs::read_dir(folder().join(RELEASES)).context("listing Cinder's releases")?;
    let mut names = Vec::new();
    for entry in listed {
        let path = entry.context("listing Cinder's releases")?.path();
        names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

fn ready(environment: &Path) -> Result<Command> {
    host::output(python(environment).args(["setup.py", "generate"]))
        .context("generating the agents' interface")?;
    Ok(python(environment))
}

/// Installs packages, or looks for them.
pub(crate) fn pip() -> Result<Command> {
    let mut pip = python(&environment("python", &["requirements.txt"])?);
    pip.args(["-m", "pip"]);
    Ok(pip)
}

fn python(environment: &Path) -> Command {
    let mut command = Command::new(environment.join("bin/python"));
    command.current_dir(folder()).env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

/// The driver's folder.
pub(crate) fn folder() -> PathBuf {
    host::repository().join("cinder-driver")
}

/// An environment with the packages that the first of the files pins; it refers to the others.
fn environment(kind: &str, files: &[&str]) -> Result<PathBuf> {
    let pins = files.iter().map(|file| {
        let path = folder().join(file);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    });
    let pins: String = pins.collect::<Result<_>>()?;
    let version = host::output(&mut host::command(&[PYTHON, "-VV"]))?;
    artefact(kind, &[&pins, &version], |at| {
        host::output(Command::new(PYTHON).args(["-m", "venv"]).arg(at))?;
        let mut install = python(at);
        install.args(["-m", "pip", "install", "--quiet", "--no-input", "--requirement", files[0]]);
        host::logged(&mut install, &at.join("pip.log"))
    })
}
