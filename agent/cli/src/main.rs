//! Operates dmlocald from the command line.
//!
//! ```text
//!   args → commands → client → the agent's gRPC
//!             │
//!             ├→ moving   grant at the source, receive at the destination
//!             ├→ copying  a volume made of something, here or the same way
//!             ├→ snapshots
//!             ├→ watch    live status
//!             ├→ pki      certificates, without any agent
//!             └→ output   tables, JSON, bars
//! ```
//!
//! What it does not do: it knows nothing of device-mapper, LVM or NVMe and
//! decides nothing about volumes. Beyond converting and printing, the only flow
//! in it is the first half of a move, because nobody else talks to both nodes
//! for an operator.

mod args;
mod client;
mod commands;
mod copying;
mod error;
mod hook;
mod moving;
mod output;
mod pki;
mod size;
mod snapshots;
mod watch;

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser as _, error::ErrorKind};

use crate::{
    args::{Cli, Output},
    error::{Failure, reason},
};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse_usage(&error),
    };
    match commands::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::failure(cli.global.output, &failure);
            ExitCode::FAILURE
        }
    }
}

/// Reports what clap says about the command line: help and version are no
/// errors, everything else has exit code 2.
fn refuse_usage(error: &clap::Error) -> ExitCode {
    let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if !asked_for && wants_json(std::env::args_os()) {
        let text = error.render().to_string();
        let text = text.trim().trim_start_matches("error: ");
        output::failure(Output::Json, &Failure::new(reason::USAGE, text));
    } else {
        // Nothing is left to report to if this fails.
        let _ = error.print();
    }
    if asked_for { ExitCode::SUCCESS } else { ExitCode::from(2) }
}

/// Looks for `--output json` in a command line that does not parse.
fn wants_json(args: impl Iterator<Item = OsString>) -> bool {
    let args: Vec<OsString> = args.take_while(|arg| arg != "--").collect();
    args.iter().any(|arg| arg == "--output=json")
        || args.windows(2).any(|pair| pair[0] == "--output" && pair[1] == "json")
}

#[cfg(test)]
mod test {
    use super::wants_json;

    #[test]
    fn json_is_recognised_in_a_command_line_that_does_not_parse() {
        let table: [(&[&str], bool); 6] = [
            (&["dmlocalctl", "--output", "json", "nonsense"], true),
            (&["dmlocalctl", "nonsense", "--output=json"], true),
            (&["dmlocalctl", "--output", "table"], false),
            (&["dmlocalctl", "json"], false),
            (&["dmlocalctl", "--output"], false),
            (&["dmlocalctl", "--", "--output=json"], false),
        ];
        for (args, json) in table {
            assert_eq!(wants_json(args.iter().map(Into::into)), json, "{args:?}");
        }
    }
}
