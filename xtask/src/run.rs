//! Runs other programs, and says so.

use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use dmlocal_testbed::{packages, python};
use nix::unistd::Uid;

/// Does one part of a longer task and tells how long it took.
pub(crate) fn part<T>(name: &str, act: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {name}");
    let started = Instant::now();
    let result = act().with_context(|| name.to_owned())?;
    eprintln!("==> {name}: {:.1} s", started.elapsed().as_secs_f64());
    Ok(result)
}

/// Runs `cargo` with those arguments and variables in the root of the checkout.
pub(crate) fn cargo(arguments: &[&str], variables: &[(&str, &str)]) -> Result<()> {
    let shown = format!("cargo {}", arguments.join(" "));
    part(&shown, || {
        let mut command = dmlocal_testbed::cargo();
        let status = command.args(arguments).envs(variables.iter().copied()).status();
        let status = status.context("starting cargo")?;
        if !status.success() {
            bail!("{status}");
        }
        Ok(())
    })
}

/// What Python's unittest ends with where no test has the name that was asked for (3.12 on).
const NO_TESTS: i32 = 5;

/// Runs a module of Python's in the Cinder driver's folder.
pub(crate) fn python(module: &[&str]) -> Result<()> {
    started(&format!("python -m {}", module.join(" ")), &[], python::in_driver, module)
}

/// The same with an older release of Cinder.
pub(crate) fn python_of(release: &str, module: &[&str]) -> Result<()> {
    let shown = format!("python -m {} with Cinder {release}", module.join(" "));
    started(&shown, &[], || python::in_release(release), module)
}

/// The same, beside the services that the driver's tests start.
pub(crate) fn python_in_services(module: &[&str]) -> Result<()> {
    let shown = format!("python -m {}", module.join(" "));
    started(&shown, packages::SERVICES, python::in_services, module)
}

fn started(
    shown: &str,
    more: &[&str],
    python: impl FnOnce() -> Result<Command>,
    module: &[&str],
) -> Result<()> {
    part(shown, || {
        packages::ensure(&[packages::DRIVER, more].concat())?;
        let status = python()?.arg("-m").args(module).status().context("starting Python")?;
        let has_none = module.contains(&"-k") && status.code() == Some(NO_TESTS);
        if !status.success() && !has_none {
            bail!("{status}");
        }
        Ok(())
    })
}

/// Builds what goes onto nodes, and installs what that takes.
pub(crate) fn build_for_nodes() -> Result<()> {
    build(&["--bins"])
}

/// Builds what goes onto nodes and the tests with it, so that both agree on every
/// dependency's features and build each once. What Python's tests need comes meanwhile.
pub(crate) fn build_with_tests() -> Result<()> {
    packages::ensure(packages::DRIVER)?;
    thread::scope(|scope| {
        let environment = scope.spawn(dmlocal_testbed::python::prepare);
        let built = build(&["--bins", "--tests"]);
        match environment.join() {
            Ok(prepared) => built.and(prepared),
            Err(_) => bail!("preparing Python panicked"),
        }
    })
}

fn build(targets: &[&str]) -> Result<()> {
    packages::ensure(&[packages::BUILDING, packages::NODES].concat())?;
    thread::scope(|scope| {
        let base = scope.spawn(dmlocal_testbed::image::prepare);
        let arguments = ["build", "--release", "--workspace", "--quiet"];
        let built = cargo(&[&arguments, targets].concat(), &[]);
        match base.join() {
            Ok(prepared) => built.and(prepared),
            Err(_) => bail!("preparing the nodes' system panicked"),
        }
    })
}

/// Namespaces and bridges are root's: begins again under sudo when somebody
/// else runs this.
pub(crate) fn become_root() -> Result<()> {
    if Uid::effective().is_root() {
        return Ok(());
    }
    let kept = ["PATH", "HOME", "CARGO", "CARGO_HOME", "RUSTUP_HOME", "XDG_CACHE_HOME", "CI"]
        .into_iter()
        .chain(
            env::vars()
                .map(|(name, _)| name)
                .filter(|name| name.starts_with("DMLOCAL_") || name.starts_with("PIP_"))
                .collect::<Vec<_>>()
                .iter()
                .map(String::as_str),
        )
        .filter_map(|name| Some(format!("{name}={}", env::var(name).ok()?)))
        .collect::<Vec<_>>();
    let this = env::current_exe().context("which program this is")?;
    let failed =
        Command::new("sudo").arg("env").args(kept).arg(this).args(env::args_os().skip(1)).exec();
    Err(failed).context("starting sudo")
}
