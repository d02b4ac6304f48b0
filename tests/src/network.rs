//! The segment that nodes share: a bridge in a network namespace of its own.
//!
//! ```text
//! namespace dmlocal-NAME, without any way out
//!   segment      bridge, 10.77.0.1/24: programs on the host join here
//!     net-a      tap: net0 of node-a, 10.77.0.11
//!     net-b      tap: net0 of node-b, 10.77.0.12
//!   bed-a        tap: bed0 of node-a; both ends have link-local addresses, so
//!   bed-b        nodes fresh from one snapshot can be told apart
//! ```

use std::net::{SocketAddrV6, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use std::{fs::File, thread};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::{host, wire};

/// A network namespace with the bridge in it.
#[derive(Clone, Debug)]
pub struct Network {
    namespace: String,
}

impl Network {
    /// The network of that name, which may not exist (yet).
    pub fn named(namespace: &str) -> Network {
        Network { namespace: namespace.to_owned() }
    }

    /// Makes the namespace and the bridge.
    pub fn create(&self) -> Result<()> {
        ip(&["netns", "add", &self.namespace])?;
        self.ip(&["link", "set", "lo", "up"])?;
        self.ip(&["link", "add", "segment", "type", "bridge"])?;
        self.ip(&["address", "add", "10.77.0.1/24", "dev", "segment"])?;
        self.ip(&["link", "set", "segment", "up"])
    }

    /// Adds the two taps of the node with that letter.
    pub fn add_node(&self, letter: char) -> Result<()> {
        let (net, bed) = (segment_tap(letter), bed_tap(letter));
        for tap in [&net, &bed] {
            self.ip(&["tuntap", "add", "dev", tap, "mode", "tap"])?;
            self.ip(&["link", "set", tap, "addrgenmode", "none"])?;
        }
        self.ip(&["link", "set", &net, "master", "segment", "up"])?;
        self.ip(&["address", "add", "fe80::2/64", "dev", &bed, "nodad"])?;
        self.ip(&["link", "set", &bed, "up"])
    }

    /// Removes the namespace and everything in it; one that is gone is no error.
    pub fn remove(&self) -> Result<()> {
        if self.handle().exists() {
            ip(&["netns", "delete", &self.namespace])?;
        }
        Ok(())
    }

    /// A command that runs inside the namespace, as 10.77.0.1.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, program]);
        command
    }

    /// Connects to what listens on bed0 of the node with that letter.
    pub(crate) fn connect(&self, letter: char, limit: Duration) -> Result<TcpStream> {
        // A thread of its own joins the namespace, so that no other notices; the
        // socket stays in the namespace it was made in.
        let connect = || -> Result<TcpStream> {
            let namespace = File::open(self.handle()).context("opening the namespace")?;
            setns(namespace, CloneFlags::CLONE_NEWNET).context("joining the namespace")?;
            let tap = nix::net::if_::if_nametoindex(bed_tap(letter).as_str())?;
            let address = SocketAddrV6::new("fe80::1".parse()?, wire::PORT, 0, tap);
            Ok(TcpStream::connect_timeout(&address.into(), limit)?)
        };
        thread::scope(|scope| scope.spawn(connect).join())
            .map_err(|_| anyhow!("connecting to node-{letter} panicked"))?
    }

    fn handle(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.namespace)
    }

    fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-netns", &self.namespace], arguments].concat())
    }
}

/// The tap that net0 of a node hangs on.
pub(crate) fn segment_tap(letter: char) -> String {
    format!("net-{letter}")
}

/// The tap that bed0 of a node hangs on.
pub(crate) fn bed_tap(letter: char) -> String {
    format!("bed-{letter}")
}

fn ip(arguments: &[&str]) -> Result<()> {
    host::output(Command::new("ip").args(arguments)).map(drop)
}
