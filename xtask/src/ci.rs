//! What a change must pass.

use anyhow::Result;
use dmlocal_testbed::{packages, python};

use crate::{run, tidy};

/// Tells the scenarios how many of them are to run.
const EXTENT: &str = "DMLOCAL_SCENARIOS";

#[derive(clap::Args)]
pub(crate) struct TestArguments {
    /// Leaves out the scenarios, which run in virtual machines
    #[arg(long)]
    no_vm: bool,
    /// Runs only the tests with this in their names
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Runs more scenarios: what a change has to pass
    #[arg(long, conflicts_with = "no_vm")]
    long: bool,
    /// Runs every scenario, also those that wait for long timeouts, and the Cinder driver
    /// in OpenStack's real services, with Tempest
    #[arg(long, conflicts_with_all = ["no_vm", "long"])]
    full: bool,
}

#[derive(clap::Args)]
pub(crate) struct CiArguments {
    /// Leaves the tests to `cargo xtask test`
    #[arg(long)]
    no_test: bool,
}

pub(crate) fn test(arguments: &TestArguments) -> Result<()> {
    if !arguments.no_vm {
        run::become_root()?;
    }
    packages::ensure(packages::BUILDING)?;
    if !arguments.no_vm {
        // Before the others are built: all of it at once keeps every processor busy.
        run::build_with_tests()?;
    }
    let only: Vec<&str> = arguments.only.as_deref().into_iter().collect();
    run::cargo(&[&["test", "--release", "--workspace", "--"], &only[..]].concat(), &[])?;
    let named: Vec<&str> = only.iter().flat_map(|name| ["-k", name]).collect();
    let driver = ["unittest", "discover", "--buffer", "-t", ".", "-s", "cinder_dmlocal/tests"];
    run::python(&[&driver[..], &named].concat())?;
    if arguments.full {
        for release in python::releases()? {
            run::python_of(&release, &[&driver[..], &named].concat())?;
        }
    }
    let whole = ["unittest", "--buffer", "cinder_dmlocal.tests.check_whole"];
    run::python(&[&whole[..], &named].concat())?;
    if arguments.no_vm {
        return Ok(());
    }
    if arguments.full {
        run::python_in_services(&[&["services"], &named[..]].concat())?;
    }
    // Of the whole workspace: one package alone would have its dependencies built
    // anew, with fewer features.
    let scenarios = ["test", "--release", "--no-fail-fast", "--workspace"];
    let of = ["--test", "scenarios", "--test", "volumes", "--"];
    // One after another: two clusters at once would only slow each other down.
    let one_by_one = ["--ignored", "--test-threads", "1"];
    let extent: &[_] = match (arguments.long, arguments.full) {
        (_, true) => &[(EXTENT, "full")],
        (true, _) => &[(EXTENT, "long")],
        _ => &[],
    };
    run::cargo(&[&scenarios[..], &of, &one_by_one, &only].concat(), extent)
}

pub(crate) fn ci(arguments: &CiArguments) -> Result<()> {
    packages::ensure(packages::BUILDING)?;
    run::cargo(&["fmt", "--all", "--check"], &[])?;
    let targets = ["clippy", "--release", "--workspace", "--all-targets", "--quiet"];
    run::cargo(&[&targets[..], &["--", "--deny", "warnings"]].concat(), &[])?;
    run::part("tidy", tidy::check)?;
    run::python(&["ruff", "format", "--check", "--quiet", "."])?;
    run::python(&["ruff", "check", "--quiet", "."])?;
    run::python(&["mypy"])?;
    let documentation = ["doc", "--release", "--workspace", "--no-deps", "--quiet"];
    run::cargo(&documentation, &[("RUSTDOCFLAGS", "--deny warnings")])?;
    if arguments.no_test {
        return Ok(());
    }
    test(&TestArguments { no_vm: false, only: None, long: true, full: false })
}
