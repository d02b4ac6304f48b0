//! The command line, as docs/cli.md describes it.
//!
//! Parsing refuses what can never be right (exit code 2). Ids are the exception:
//! a malformed one is reported like the daemon does, with a reason and exit code
//! 1, so that callers see one behaviour whichever side notices.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::{
    client::Endpoint,
    error::{Failure, reason},
    size,
};

/// Operates dmlocald: volumes on node-local disks that move between nodes
/// lazily.
#[derive(Debug, Parser)]
#[command(name = "dmlocalctl", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub(crate) global: Global,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags that every command takes, before or after its name.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// The agent to talk to: unix:///PATH or https://HOST:PORT
    #[arg(
        long,
        global = true,
        env = "DMLOCAL_ENDPOINT",
        hide_env_values = true,
        value_name = "ENDPOINT",
        default_value = "unix:///run/dmlocal/agent.sock"
    )]
    pub(crate) endpoint: Endpoint,
    /// Certificate of the CA, for https [default: /etc/dmlocal/pki/ca.pem]
    #[arg(long, global = true, env = "DMLOCAL_CA", hide_env_values = true, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// Own certificate, for https [default: /etc/dmlocal/pki/operator.pem]
    #[arg(long, global = true, env = "DMLOCAL_CERT", hide_env_values = true, value_name = "FILE")]
    pub(crate) cert: Option<PathBuf>,
    /// Own private key, for https [default: /etc/dmlocal/pki/operator.key]
    #[arg(long, global = true, env = "DMLOCAL_KEY", hide_env_values = true, value_name = "FILE")]
    pub(crate) key: Option<PathBuf>,
    /// How to print: a table for people, JSON for programs
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value_t = Output::Table)]
    pub(crate) output: Output,
    /// How long an answer may take
    #[arg(
        long,
        global = true,
        value_name = "SECONDS",
        default_value_t = 120,
        value_parser = clap::value_parser!(u64).range(1..=86_400)
    )]
    pub(crate) timeout: u64,
}

impl Global {
    /// How long an answer may take.
    pub(crate) fn deadline(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

/// How results and errors are printed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Output {
    /// Aligned columns.
    Table,
    /// The proto's field names as keys.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show how volumes stand on a node
    Status {
        /// Only this volume
        id: Option<String>,
        /// Go on showing changes until interrupted
        #[arg(long)]
        watch: bool,
    },
    /// Pools: where space comes from
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Volumes and their moves
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Snapshots; they stay on the node where they are taken
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Background copying of a moved volume; ask its destination
    #[command(subcommand)]
    Hydration(HydrationCommand),
    /// The node itself
    #[command(subcommand)]
    Node(NodeCommand),
    /// What hypervisors call when something happens to a guest
    #[command(subcommand)]
    Hook(HookCommand),
    /// Certificates for small installations
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages into a directory
    Man {
        /// The directory; made if it is not there
        dir: PathBuf,
    },
}

/// `pool …`
#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// List the pools with their capacities
    List,
}

/// Which volume a command means, for callers whose commands may be late.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// The volume
    pub(crate) id: String,
    /// Refuse unless the volume has this generation
    #[arg(long, value_name = "N")]
    pub(crate) generation: Option<u64>,
    /// Refuse unless it is this volume and not a later one of its id
    #[arg(long, value_name = "UUID")]
    pub(crate) incarnation: Option<String>,
}

/// `volume …`
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume: blank, or with the content of a snapshot or volume
    #[command(group = ArgGroup::new("content").required(true).multiple(false))]
    Create {
        /// A lower-case UUID of the caller's choice
        id: String,
        /// A blank one: bytes, or a number with KiB, MiB, GiB or TiB
        #[arg(long, value_parser = size::parse, group = "content")]
        size: Option<u64>,
        /// One with the content and size of this snapshot
        #[arg(long, value_name = "SNAP", group = "content")]
        from_snapshot: Option<String>,
        /// One with the content and size of this volume, as it is now
        #[arg(long, value_name = "ID", group = "content")]
        from_volume: Option<String>,
        /// The agent of the node that has the snapshot or volume; the node where the
        /// new volume is to be, if absent
        #[arg(long, value_name = "ENDPOINT", conflicts_with = "size")]
        from: Option<Endpoint>,
        /// The pool; the node's only or first one if absent
        #[arg(long, default_value = "", hide_default_value = true)]
        pool: String,
    },
    /// List the volumes of the node
    List,
    /// Show everything about one volume
    Show {
        /// The volume
        id: String,
    },
    /// Delete a volume that is neither attached nor published nor moving
    Delete(Which),
    /// Grow a volume, attached or not
    Extend {
        /// The volume
        #[command(flatten)]
        which: Which,
        /// The new size: bytes, or a number with KiB, MiB, GiB or TiB
        #[arg(long, value_parser = size::parse)]
        size: u64,
    },
    /// Make the volume's device and print its path
    Attach {
        /// The volume
        id: String,
        /// Refuse unless the volume has this generation; confirms opening a
        /// volume that was published before a reboot
        #[arg(long)]
        generation: Option<u64>,
    },
    /// Remove the volume's device
    Detach(Which),
    /// Move a volume to another node and print its device's path there
    Move {
        /// The volume
        id: String,
        /// The agent of the node that has the volume
        #[arg(long, value_name = "ENDPOINT")]
        from: Endpoint,
        /// The agent of the node that is to have it
        #[arg(long, value_name = "ENDPOINT")]
        to: Endpoint,
        /// Keep the source writable until `volume switch`
        #[arg(long)]
        hold: bool,
        /// Return when everything is copied (with --hold: when it is held), or when
        /// it is remote
        #[arg(long)]
        wait: bool,
        /// Leave the data at the source until `volume localize`
        #[arg(long, conflicts_with_all = ["local", "pool"])]
        remote: bool,
        /// Copy the data, whatever the destination's configuration says
        #[arg(long)]
        local: bool,
        /// The destination's pool; its only or first one if absent
        #[arg(long, default_value = "", hide_default_value = true)]
        pool: String,
    },
    /// The guest has moved: fence the source, start copying; ask the destination
    Switch {
        /// The volume
        #[command(flatten)]
        which: Which,
        /// The guest has left the source, although it is still written there
        #[arg(long)]
        force: bool,
    },
    /// Copy a remote volume to the node that uses it; ask that node
    Localize {
        /// The volume
        #[command(flatten)]
        which: Which,
        /// The pool; the node's only or first one if absent
        #[arg(long, default_value = "", hide_default_value = true)]
        pool: String,
    },
    /// Give a held move up; ask the destination
    Abort(Which),
    /// Give up a source that is lost, with what was only there; ask the destination
    ForgetSource {
        /// The volume
        #[command(flatten)]
        which: Which,
        /// What was only at the source is lost
        #[arg(long, required = true)]
        i_accept_data_loss: bool,
    },
    /// Take a remote volume back from a node that is lost; ask the node that has its data
    Reclaim {
        /// The volume
        id: String,
        /// The node that used it: whatever still runs there gets errors
        #[arg(long, value_name = "NODE")]
        from: String,
    },
    /// Take a detached volume back to a snapshot
    Revert {
        /// The volume
        #[command(flatten)]
        which: Which,
        /// A snapshot of it on the same node
        #[arg(long, value_name = "SNAP")]
        snapshot: String,
    },
}

/// `snapshot …`
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Take a snapshot of a volume, attached or not
    Create {
        /// A lower-case UUID of the caller's choice
        id: String,
        /// The volume
        #[arg(long, value_name = "ID")]
        volume: String,
    },
    /// List the snapshots of the node
    List,
    /// Delete a snapshot that nothing reads any more
    Delete {
        /// The snapshot
        id: String,
        /// Wait for those that still read it, instead of refusing
        #[arg(long)]
        defer: bool,
        /// Delete nothing unless it is this snapshot and not a later one of its id
        #[arg(long, value_name = "UUID")]
        incarnation: Option<String>,
    },
}

/// `hydration …`
#[derive(Debug, Subcommand)]
pub(crate) enum HydrationCommand {
    /// Stop copying in the background
    Pause {
        /// The volume
        id: String,
    },
    /// Go on copying in the background
    Resume {
        /// The volume
        id: String,
    },
    /// Change how fast to copy
    #[command(group = ArgGroup::new("settings").required(true).multiple(true))]
    Set {
        /// The volume
        id: String,
        /// Bytes per second, KiB to TiB allowed; 0 is no limit
        #[arg(long, value_name = "BYTES_PER_S", value_parser = size::parse, group = "settings")]
        rate: Option<u64>,
        /// Regions copied at the same time
        #[arg(long, value_name = "N", group = "settings")]
        threshold: Option<u32>,
        /// Contiguous regions copied as one
        #[arg(long, value_name = "N", group = "settings")]
        batch: Option<u32>,
        /// Copy before others with less, -100 to 100
        #[arg(long, value_name = "N", group = "settings", allow_negative_numbers = true)]
        priority: Option<i32>,
    },
}

/// `node …`
#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Show kernel, targets, pools, versions and warnings
    Show,
}

/// `hook …`
#[derive(Debug, Subcommand)]
pub(crate) enum HookCommand {
    /// As libvirt calls its hook for QEMU, with the domain's XML on standard input
    Libvirt(HookArguments),
}

/// What libvirt says: any word may be `-` for none, and later versions may say more.
#[derive(Debug, Args)]
pub(crate) struct HookArguments {
    /// The guest's name
    #[arg(allow_hyphen_values = true)]
    pub(crate) guest: String,
    /// What happens, as `release`
    #[arg(allow_hyphen_values = true)]
    pub(crate) operation: String,
    /// Which part of it, as `end`
    #[arg(allow_hyphen_values = true)]
    pub(crate) sub_operation: String,
    /// More about it, as `migrated`
    #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
    pub(crate) extra: Vec<String>,
}

/// `pki …`
#[derive(Debug, Subcommand)]
pub(crate) enum PkiCommand {
    /// Make a certificate authority: ca.pem and ca.key
    Init {
        /// The directory; made if it is not there
        #[arg(long, value_name = "DIR", default_value = ".")]
        out: PathBuf,
        /// The CA's common name
        #[arg(long, value_name = "NAME", default_value = "dmlocal CA", value_parser = common_name)]
        name: String,
    },
    /// Issue a certificate: ROLE.pem, ROLE.key and a copy of ca.pem
    Issue {
        /// Where ca.pem and ca.key are
        #[arg(long, value_name = "DIR", default_value = ".")]
        ca_dir: PathBuf,
        /// What the holder may do
        #[arg(long, value_enum)]
        role: Role,
        /// The node the holder speaks for; agents need it
        #[arg(long, value_name = "NAME", value_parser = host_name, required_if_eq("role", "agent"))]
        node: Option<String>,
        /// An IP address under which the holder is reached; may be repeated
        #[arg(long = "address", value_name = "IP")]
        addresses: Vec<IpAddr>,
        /// A further host name of the holder; may be repeated
        #[arg(long, value_name = "NAME", value_parser = host_name)]
        dns: Vec<String>,
        /// How long the certificate holds
        #[arg(
            long,
            value_name = "N",
            default_value_t = 825,
            value_parser = clap::value_parser!(u32).range(1..=3650)
        )]
        days: u32,
        /// The directory to write to; made if it is not there
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

/// What the holder of a certificate may do.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Role {
    /// The Cinder driver.
    Driver,
    /// A node's dmlocald.
    Agent,
    /// A person administrating over TCP.
    Operator,
}

impl Role {
    /// The word in file names and in the certificate.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Role::Driver => "driver",
            Role::Agent => "agent",
            Role::Operator => "operator",
        }
    }
}

/// Refuses an id that is not a lower-case UUID with hyphens.
pub(crate) fn check_id(id: &str) -> Result<(), Failure> {
    match uuid::Uuid::try_parse(id) {
        Ok(parsed) if parsed.hyphenated().to_string() == id => Ok(()),
        Ok(_) | Err(_) => {
            Err(Failure::new(reason::ID_INVALID, format!("{id:?} is not a lower-case UUID"))
                .with("field", "id"))
        }
    }
}

fn common_name(text: &str) -> Result<String, &'static str> {
    if text.is_empty() || text.len() > 64 || text.chars().any(char::is_control) {
        return Err("a common name has 1 to 64 bytes and no control characters");
    }
    Ok(text.to_owned())
}

fn host_name(text: &str) -> Result<String, &'static str> {
    let fits = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    if text.len() > 253 || !text.split('.').all(fits) {
        return Err("a host name has letters, digits, '-' and '_', in parts joined by '.'");
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod test {
    use clap::CommandFactory as _;

    use super::{Cli, check_id, host_name};

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_id_is_a_lower_case_uuid_with_hyphens() {
        assert_eq!(check_id("6e1f2a52-6c57-4a7b-9d3a-0f4dd1f0c001"), Ok(()));
        let table = [
            "",
            "x",
            "6E1F2A52-6C57-4A7B-9D3A-0F4DD1F0C001",
            "6e1f2a526c574a7b9d3a0f4dd1f0c001",
            "{6e1f2a52-6c57-4a7b-9d3a-0f4dd1f0c001}",
            "6e1f2a52-6c57-4a7b-9d3a-0f4dd1f0c00",
            "6e1f2a52-6c57-4a7b-9d3a-0f4dd1f0c001\n",
            "../../../../../../../../../../../../",
        ];
        for id in table {
            let refused = check_id(id).unwrap_err();
            assert_eq!(refused.reason, "ID_INVALID", "{id}");
        }
    }

    #[test]
    fn a_host_name_fits_into_a_urn() {
        for name in ["node-a", "a.b.example", "host_1", "N"] {
            assert!(host_name(name).is_ok(), "{name}");
        }
        for name in ["", ".", "a.", "a b", "a/b", "a:b", "ä", &"a".repeat(64), &"a.".repeat(127)] {
            assert!(host_name(name).is_err(), "{name}");
        }
    }
}
