//! A cluster to play with and to script. It stays up between commands.

use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Subcommand, ValueEnum};
use dmlocal_testbed::{Cluster, Node, Options, controller};

use crate::run;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Which cluster, where there are several
    #[arg(long, global = true, value_name = "NAME", default_value = "vm")]
    cluster: String,
    #[command(subcommand)]
    order: Option<Order>,
}

#[derive(Subcommand)]
enum Order {
    /// Builds dmlocal and starts nodes that run it
    Up {
        /// How many nodes, at most eight: node-a, node-b and so on
        #[arg(long, default_value_t = 2)]
        nodes: usize,
        /// Takes the programs as they were last built
        #[arg(long)]
        no_build: bool,
    },
    /// Puts freshly built programs on the nodes and restarts dmlocald
    Install {
        /// Takes the programs as they were last built
        #[arg(long)]
        no_build: bool,
    },
    /// Runs a command on a node; ends with its status
    Exec {
        /// Which node: node-a or just a
        node: String,
        /// The program and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Gives a node Python with Cinder and the driver: /srv/cinder, /srv/driver
    Cinder {
        /// Which node
        node: String,
    },
    /// Cuts a node's power
    Kill {
        /// Which node
        node: String,
    },
    /// Gives a node power again and waits until it is up
    Start {
        /// Which node
        node: String,
    },
    /// Plugs or unplugs a node's network cable
    Link {
        /// Which node
        node: String,
        /// The cable's new state
        state: Link,
    },
    /// Takes everything down
    Down,
}

#[derive(Clone, Copy, ValueEnum)]
enum Link {
    Up,
    Down,
}

pub(crate) fn run(arguments: Arguments) -> Result<ExitCode> {
    run::become_root()?;
    let name = arguments.cluster.as_str();
    let Some(order) = arguments.order else {
        return shell(&Cluster::open(name)?);
    };
    match order {
        Order::Up { nodes, no_build } => up(name, nodes, !no_build)?,
        Order::Install { no_build } => {
            let cluster = Cluster::open(name)?;
            if !no_build {
                run::build_for_nodes()?;
            }
            cluster.install()?;
        }
        Order::Exec { node, command } => {
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            return exec(Cluster::open(name)?.node(&node)?, &command);
        }
        Order::Cinder { node } => controller::install(Cluster::open(name)?.node(&node)?)?,
        Order::Kill { node } => Cluster::open(name)?.node(&node)?.kill()?,
        Order::Start { node } => Cluster::open(name)?.node(&node)?.start()?,
        Order::Link { node, state } => {
            Cluster::open(name)?.node(&node)?.set_link(matches!(state, Link::Up))?;
        }
        Order::Down => Cluster::open(name)?.take_down()?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up(name: &str, nodes: usize, build: bool) -> Result<()> {
    if Cluster::open(name).is_ok() {
        bail!("a cluster is up already: `cargo xtask vm down` takes it down");
    }
    if build {
        run::build_for_nodes()?;
    }
    let started = Instant::now();
    let cluster = Cluster::start(&Options { nodes, name: Some(name.to_owned()), dmlocal: false })?;
    // Where dmlocald does not start, somebody wants to see why.
    cluster.install().context("the nodes are up, but")?;
    println!("up after {:.1} s:", started.elapsed().as_secs_f64());
    for node in cluster.nodes() {
        println!("  {}  https://{}:7450  {}", node.name(), node.name(), node.address());
    }
    println!(
        "\n\
         cargo xtask vm                                a shell on the nodes\n\
         cargo xtask vm exec node-a -- dmlocalctl status\n\
         cargo xtask vm kill|start node-a              cut its power, give it back\n\
         cargo xtask vm link node-a down|up            its network cable\n\
         cargo xtask vm install                        after a change of the source\n\
         cargo xtask vm down"
    );
    Ok(())
}

fn exec(node: &Node, command: &[&str]) -> Result<ExitCode> {
    let running = node.spawn(command)?;
    let status = running.stream_to(&mut io::stdout(), &mut io::stderr())?;
    Ok(u8::try_from(status.code()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Reads lines and has a node's shell run them, each by itself.
fn shell(cluster: &Cluster) -> Result<ExitCode> {
    let prompts = io::stdin().is_terminal();
    let mut node = &cluster.nodes()[0];
    if prompts {
        println!(
            "Lines run by themselves, as root. {} alone changes the node.",
            cluster.names().join(" or ")
        );
    }
    let mut last = ExitCode::SUCCESS;
    loop {
        if prompts {
            print!("{}# ", node.name());
            io::stdout().flush()?;
        }
        let mut line = String::new();
        if io::stdin().lock().read_line(&mut line)? == 0 {
            return Ok(last);
        }
        match line.trim() {
            "" => {}
            "exit" => return Ok(last),
            line => match cluster.nodes().iter().find(|node| node.name() == line) {
                Some(named) => node = named,
                None => last = exec(node, &["sh", "-c", line])?,
            },
        }
    }
}
