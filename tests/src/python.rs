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

/// Python in the driver's folder, in which the agents' interface has been generated.
pub fn in_driver() -> Result<Command> {
    let environment = environment()?;
    host::output(python(&environment).args(["setup.py", "generate"]))
        .context("generating the agents' interface")?;
    Ok(python(&environment))
}

/// Installs packages, or looks for them.
pub(crate) fn pip() -> Result<Command> {
    let mut pip = python(&environment()?);
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

fn environment() -> Result<PathBuf> {
    let pins = folder().join("requirements.txt");
    let text = fs::read_to_string(&pins).with_context(|| format!("reading {}", pins.display()))?;
    let version = host::output(&mut host::command(&[PYTHON, "-VV"]))?;
    artefact("python", &[&text, &version], |at| {
        host::output(Command::new(PYTHON).args(["-m", "venv"]).arg(at))?;
        let mut install = python(at);
        install.args(["-m", "pip", "install", "--quiet", "--no-input", "--requirement"]).arg(&pins);
        host::logged(&mut install, &at.join("pip.log"))
    })
}
