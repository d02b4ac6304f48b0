//! Nodes with names on one segment, from start to take-down, and dmlocal on them.
//!
//! A cluster is a directory below the target directory, so that a later program
//! finds it again. One whose owner died without taking it down is taken down by
//! whoever starts the next.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{process, thread};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::guest::{Output, Running};
use crate::image::Image;
use crate::network::Network;
use crate::qemu::{self, Machine};
use crate::{host, install};

/// How long a command inside a node may take unless told otherwise: everything
/// there is emulated, and shares its processors with the other nodes.
const LIMIT: Duration = Duration::from_secs(120);

/// The letters that nodes are named after.
const LETTERS: [char; 8] = ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'];

/// What kind of cluster to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many nodes: `node-a`, `node-b` and so on, at most eight.
    pub nodes: usize,
    /// What to call it. Without a name, one is made up and the cluster ends with
    /// this program; with one, [`Cluster::open`] finds it.
    pub name: Option<String>,
    /// Whether to install dmlocal and start it.
    pub dmlocal: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { nodes: 2, name: None, dmlocal: true }
    }
}

/// Several nodes on one segment. Dropping it takes everything down, unless it
/// was given a name.
#[derive(Debug)]
pub struct Cluster {
    directory: PathBuf,
    state: State,
    network: Network,
    nodes: Vec<Node>,
    /// Whether this value started it, and takes it down; not one that only looks.
    goes_with_this: bool,
}

/// What is written down about a cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    namespace: String,
    nodes: usize,
    /// The process that takes it down, and when that was started. None for a
    /// cluster that stays.
    owner: Option<(i32, String)>,
}

impl Cluster {
    /// Starts a cluster; returns when all its nodes answer and dmlocal runs on them.
    pub fn start(options: &Options) -> Result<Cluster> {
        if !(1..=LETTERS.len()).contains(&options.nodes) {
            bail!("a cluster has 1 to {} nodes, not {}", LETTERS.len(), options.nodes);
        }
        sweep()?;
        let image = Image::ensure(&host::binaries().join("dmlocal-guest"))?;
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = options.name.clone().unwrap_or_else(|| format!("{}-{number}", process::id()));
        let directory = directory_of(&name);
        fs::create_dir_all(parent()).context("creating the directory of clusters")?;
        fs::create_dir(&directory)
            .with_context(|| format!("creating {}: is it up already?", directory.display()))?;
        let this = i32::try_from(process::id())?;
        let owner = match options.name {
            Some(_) => None,
            None => Some((this, qemu::birth(this).context("this process has no birth")?)),
        };
        // Names of namespaces are shared by all checkouts on the machine.
        let namespace = format!("dmlocal-{name}-{}", process::id());
        let state = State { namespace, nodes: options.nodes, owner };
        fs::write(directory.join("cluster.json"), serde_json::to_vec(&state)?)
            .context("noting the cluster")?;
        let mut cluster = Cluster::with(directory, state);
        cluster.goes_with_this = true;
        match cluster.bring_up(&image, options) {
            Ok(()) => Ok(cluster),
            Err(error) => {
                let console = cluster
                    .nodes
                    .iter()
                    .map(|node| host::tail(&node.console()))
                    .collect::<Vec<_>>();
                cluster.take_down()?;
                Err(error.context(console.join("\n")))
            }
        }
    }

    /// Starts a cluster for as long as a scenario takes. Of one that fails, the
    /// consoles and journals of the nodes are kept.
    pub fn run(options: &Options, scenario: impl Fn(&Cluster) -> Result<()>) -> Result<()> {
        loop {
            let cluster = Cluster::start(options)?;
            let result = scenario(&cluster);
            if result.is_err() {
                if let Some(why) = cluster.emulator_failed() {
                    eprintln!("once more on new nodes: {why}");
                    continue;
                }
                if let Err(error) = cluster.keep_logs() {
                    eprintln!("no logs: {error:#}");
                }
            }
            return result;
        }
    }

    /// What the emulator did to a node, when it was not the node's own doing.
    ///
    /// Linux changes its own code under running processors by way of a breakpoint
    /// (`text_poke_bp`). QEMU's multi-threaded emulation can run the breakpoint out
    /// of a stale translation after the kernel has done with it, and the kernel
    /// stops with this very Oops; on a real processor it cannot happen.
    pub fn emulator_failed(&self) -> Option<String> {
        self.nodes.iter().find_map(|node| {
            let console = fs::read(node.console()).ok()?;
            let fell = String::from_utf8_lossy(&console).contains("Oops: int3: 0000");
            (fell && node.is_emulated())
                .then(|| format!("QEMU ran a stale breakpoint on {} (Oops: int3)", node.name()))
        })
    }

    /// A cluster that was started with that name, by this program or another.
    pub fn open(name: &str) -> Result<Cluster> {
        let directory = directory_of(name);
        let state = fs::read(directory.join("cluster.json"))
            .map_err(|_| anyhow!("no cluster `{name}` is up"))?;
        let state = serde_json::from_slice(&state).context("reading cluster.json")?;
        Ok(Cluster::with(directory, state))
    }

    fn with(directory: PathBuf, state: State) -> Cluster {
        let network = Network::named(&state.namespace);
        let nodes = LETTERS[..state.nodes]
            .iter()
            .map(|&letter| Node::new(&directory.join(node_name(letter)), letter, &network))
            .collect();
        Cluster { directory, state, network, nodes, goes_with_this: false }
    }

    fn bring_up(&mut self, image: &Image, options: &Options) -> Result<()> {
        let stays = self.state.owner.is_none();
        self.network.create()?;
        for node in &self.nodes {
            self.network.add_node(node.letter)?;
        }
        self.each(|node| {
            fs::create_dir(node.machine.directory()).context("creating its directory")?;
            image.make_disks(node.machine.directory())?;
            node.machine.set_up(image.boot(), stays)?;
            node.machine.start(Some(&image.memory()))?;
            node.take_identity()
        })?;
        if options.dmlocal { self.install() } else { Ok(()) }
    }

    /// Puts the programs, their configuration and fresh certificates on every
    /// node and starts dmlocald there, once more if it runs already.
    pub fn install(&self) -> Result<()> {
        let certificates = install::Certificates::make(&self.nodes)?;
        self.each(|node| install::install(node, certificates.as_ref()))
    }

    /// Does the same on all nodes at once.
    pub fn each(&self, act: impl Fn(&Node) -> Result<()> + Sync) -> Result<()> {
        let act = &act;
        thread::scope(|scope| {
            let running: Vec<_> =
                self.nodes.iter().map(|node| (node, scope.spawn(move || act(node)))).collect();
            for (node, thread) in running {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("it panicked")))
                    .with_context(|| node.name())?;
            }
            Ok(())
        })
    }

    /// The node of that name; a letter will do.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.name() == name || node.letter.to_string() == name)
            .with_context(|| format!("there is no node `{name}`, only {}", self.names().join(", ")))
    }

    /// All nodes, in order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Their names.
    pub fn names(&self) -> Vec<String> {
        self.nodes.iter().map(Node::name).collect()
    }

    /// A program on the host that can reach the nodes, and nothing else.
    pub fn host_command(&self, program: &str) -> Command {
        self.network.command(program)
    }

    /// Cuts the power of all nodes and leaves nothing of the cluster.
    pub fn take_down(&mut self) -> Result<()> {
        for node in &self.nodes {
            node.kill()?;
        }
        self.network.remove()?;
        fs::remove_dir_all(&self.directory).context("removing the cluster's directory")
    }

    /// Keeps what tells why a scenario failed.
    fn keep_logs(&self) -> Result<()> {
        let kept = host::target().join("vm-logs").join(&self.state.namespace);
        fs::create_dir_all(&kept).context("creating a directory for logs")?;
        for node in &self.nodes {
            fs::copy(node.console(), kept.join(format!("{}.console", node.name())))
                .context("keeping a console")?;
            let journal = node.exec_with(&["journalctl", "--boot"], b"", Duration::from_secs(20));
            let journal = journal.and_then(Output::ok).unwrap_or_else(|error| format!("{error:#}"));
            fs::write(kept.join(format!("{}.journal", node.name())), journal)
                .context("keeping a journal")?;
        }
        eprintln!("logs of the nodes: {}", kept.display());
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.goes_with_this || self.state.owner.is_none() || !self.directory.exists() {
            return;
        }
        let kept = if thread::panicking() { self.keep_logs() } else { Ok(()) };
        if let Err(error) = kept.and_then(|()| self.take_down()) {
            eprintln!("taking down {}: {error:#}", self.state.namespace);
        }
    }
}

/// A virtual machine with a name.
#[derive(Clone, Debug)]
pub struct Node {
    letter: char,
    machine: Machine,
    network: Network,
}

impl Node {
    pub(crate) fn new(directory: &Path, letter: char, network: &Network) -> Node {
        let machine = Machine::new(directory, letter, network);
        Node { letter, machine, network: network.clone() }
    }

    /// `node-a` and so on.
    pub fn name(&self) -> String {
        node_name(self.letter)
    }

    /// Its address on the segment.
    pub fn address(&self) -> String {
        format!("10.77.0.{}", 11 + self.letter as u32 - 'a' as u32)
    }

    /// The virtual machine that it is.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The file that its console is written to.
    pub fn console(&self) -> PathBuf {
        self.machine.directory().join("console.log")
    }

    fn is_emulated(&self) -> bool {
        let answer = self.machine.qmp("query-kvm", &serde_json::json!({}));
        answer.is_ok_and(|answer| answer["enabled"] == false)
    }

    /// Runs a program to its end.
    pub fn exec(&self, argv: &[&str]) -> Result<Output> {
        self.exec_with(argv, b"", LIMIT)
    }

    /// Runs a line of shell to its end.
    pub fn shell(&self, line: &str) -> Result<Output> {
        self.exec(&["sh", "-c", line])
    }

    /// Runs a program to its end with something to read and a time limit.
    pub fn exec_with(&self, argv: &[&str], stdin: &[u8], limit: Duration) -> Result<Output> {
        self.spawn_with(argv, stdin)?.wait(limit)
    }

    /// Starts a program that goes on while others run.
    pub fn spawn(&self, argv: &[&str]) -> Result<Running> {
        self.spawn_with(argv, b"")
    }

    fn spawn_with(&self, argv: &[&str], stdin: &[u8]) -> Result<Running> {
        let started = host::wait_for("the node to answer", Duration::from_secs(20), || {
            if !self.machine.is_running() {
                bail!("{} has no power", self.name());
            }
            Ok(self.network.connect(self.letter, Duration::from_secs(2)).ok())
        });
        let machine = self.machine.clone();
        Running::start(started?, argv, stdin, move || machine.is_running())
            .with_context(|| self.name())
    }

    /// Waits until it answers and has started whatever it starts at boot.
    pub fn wait_until_up(&self, limit: Duration) -> Result<()> {
        host::wait_for("the node to answer", limit, || {
            if !self.machine.is_running() {
                let log = host::tail(&self.machine.directory().join("qemu.log"));
                bail!("{} has no power: {log}", self.name());
            }
            Ok(self.network.connect(self.letter, Duration::from_secs(2)).ok())
        })?;
        let started = ["systemctl", "is-system-running", "--wait"];
        let state = self.exec_with(&started, b"", limit)?.stdout;
        match state.trim() {
            "running" | "degraded" => Ok(()),
            other => bail!("{} is {other}", self.name()),
        }
    }

    /// Cuts its power. What was not flushed from its caches is lost.
    pub fn kill(&self) -> Result<()> {
        self.machine.kill()
    }

    /// Gives it power again: it boots from its disks. Returns when it is up.
    pub fn start(&self) -> Result<()> {
        self.machine.start(None)?;
        self.wait_until_up(Duration::from_secs(180))
    }

    /// Shuts it down in good order and boots it again. Returns when it is up.
    pub fn reboot(&self) -> Result<()> {
        const BOOT: [&str; 2] = ["cat", "/proc/sys/kernel/random/boot_id"];
        let before = self.exec(&BOOT)?.ok()?;
        // It may be gone before it has answered.
        let _ = self.exec(&["systemctl", "reboot", "--no-block"]);
        host::wait_for("the reboot", Duration::from_secs(180), || {
            let Ok(connection) = self.network.connect(self.letter, Duration::from_secs(2)) else {
                return Ok(None);
            };
            drop(connection);
            let now = self.exec_with(&BOOT, b"", Duration::from_secs(5)).and_then(Output::ok);
            Ok(now.ok().filter(|now| *now != before))
        })?;
        self.wait_until_up(Duration::from_secs(180))
    }

    /// Plugs or unplugs its cable to the segment.
    pub fn set_link(&self, up: bool) -> Result<()> {
        self.machine.set_link(up)
    }

    /// Adds an empty disk and returns its path inside the node.
    pub fn add_disk(&self, serial: &str, bytes: u64) -> Result<String> {
        self.machine.add_disk(serial, bytes)?;
        let path = format!("/dev/disk/by-id/virtio-{serial}");
        self.exec(&["udevadm", "wait", "--timeout=60", &path])?.ok()?;
        Ok(path)
    }

    /// Writes a file; its directory must exist.
    pub fn write(&self, path: &str, text: &[u8]) -> Result<()> {
        self.exec_with(&["dd", "status=none", &format!("of={path}")], text, LIMIT)?.ok().map(drop)
    }

    fn take_identity(&self) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        let machine_id = format!("{:032x}", 0xd310_ca10_0000_0000_u64 + self.letter as u64);
        self.exec(&[
            "/usr/lib/bed/identity",
            &self.name(),
            &self.address(),
            &self.machine.mac(),
            &machine_id,
            &format!("{now:.3}"),
        ])?
        .ok()
        .map(drop)
    }
}

fn node_name(letter: char) -> String {
    format!("node-{letter}")
}

fn parent() -> PathBuf {
    host::target().join("vm")
}

fn directory_of(name: &str) -> PathBuf {
    parent().join(name)
}

/// Takes down clusters whose owners are gone.
fn sweep() -> Result<()> {
    for entry in fs::read_dir(parent()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(mut cluster) = Cluster::open(&name) else { continue };
        let abandoned = match &cluster.state.owner {
            Some((process, born)) => qemu::birth(*process).as_ref() != Some(born),
            None => false,
        };
        if abandoned {
            cluster.take_down().with_context(|| format!("taking down the abandoned {name}"))?;
        }
    }
    Ok(())
}
