//! What each command does.

use std::{fs, path::Path};

use clap::CommandFactory as _;

use crate::{
    args::{Cli, Command, Global, Output, PkiCommand},
    error::{Failure, reason},
    output, pki,
};

/// Runs one command to its end.
pub(crate) fn run(cli: &Cli) -> Result<(), Failure> {
    match &cli.command {
        Command::Pki(command) => certificates(&cli.global, command),
        Command::Completions { shell } => completions(*shell),
        Command::Man { dir } => man(dir),
        _ => Err(Failure::new(reason::INTERNAL, "not built yet")),
    }
}

fn certificates(global: &Global, command: &PkiCommand) -> Result<(), Failure> {
    let written = match command {
        PkiCommand::Init { out, name } => pki::init(out, name)?,
        PkiCommand::Issue { ca_dir, role, node, addresses, dns, days, out } => {
            let subject = pki::Subject {
                role: *role,
                node: node.clone(),
                addresses: addresses.clone(),
                dns: dns.clone(),
                days: *days,
            };
            pki::issue(ca_dir, out, &subject)?
        }
    };
    match global.output {
        Output::Json => output::print_json(&written)?,
        Output::Table => output::print(&format!(
            "certificate {}\nkey {}\n",
            written.certificate.display(),
            written.key.display()
        ))?,
    };
    Ok(())
}

fn completions(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "dmlocalctl", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(())
}

fn man(dir: &Path) -> Result<(), Failure> {
    fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(Cli::command(), dir)).map_err(
        |error| Failure::new(reason::OUTPUT_FAILED, format!("writing {}: {error}", dir.display())),
    )
}
