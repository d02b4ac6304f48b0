//! Everything there is to do with the checkout, as one program.
//!
//! It is built before anything else and installs what the rest needs, so it
//! depends on nothing but Rust itself.

mod bench;
mod ci;
mod demo;
mod run;
mod tidy;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, tests and tries out dmlocal")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Moves a volume between two virtual machines while it is written
    Demo(demo::Arguments),
    /// Runs every test there is
    Test(ci::TestArguments),
    /// Runs everything that a change must pass
    Ci(ci::CiArguments),
    /// Measures in virtual machines, as ratios within one run
    Bench(bench::Arguments),
    /// Checks the conventions that no other tool knows
    Tidy,
    /// A cluster of virtual machines to play with and to script
    Vm(vm::Arguments),
}

fn main() -> ExitCode {
    match run_task(Arguments::parse().task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_task(task: Task) -> Result<ExitCode> {
    match task {
        Task::Demo(arguments) => demo::run(&arguments)?,
        Task::Bench(arguments) => bench::run(&arguments)?,
        Task::Test(arguments) => ci::test(&arguments)?,
        Task::Ci(arguments) => ci::ci(&arguments)?,
        Task::Tidy => tidy::check()?,
        Task::Vm(arguments) => return vm::run(arguments),
    }
    Ok(ExitCode::SUCCESS)
}
