//! The story that `cargo xtask demo` tells: a volume moves while it is written.
//!
//! Whatever differs from what it says ends it with an error.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, Result, bail, ensure};
use dmlocal_testbed::{Cluster, Node, Options, Running};
use serde_json::Value;

use crate::run;

/// Size of the volume in MiB.
const MIB: u64 = 128;

/// How long any single part of the story may take.
const LIMIT: Duration = Duration::from_secs(180);

/// Where the writer keeps what it wrote.
const STATE: &str = "/root/demo.state";

/// The writer works for as long as this file is there.
const GO: &str = "/root/demo.go";

const SEED: &str = "2026";

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Takes the programs as they were last built
    #[arg(long)]
    no_build: bool,
}

/// Builds everything, boots two nodes and tells the story.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    run::become_root()?;
    if !arguments.no_build {
        run::build_for_nodes()?;
    }
    let cluster = run::part("two nodes boot", || Cluster::start(&Options::default()))?;
    Story::new(&cluster)?.tell()
}

/// A volume, and the nodes that it is on.
struct Story<'a> {
    id: String,
    device: String,
    a: &'a Node,
    b: &'a Node,
    began: Instant,
}

impl<'a> Story<'a> {
    fn new(cluster: &'a Cluster) -> Result<Story<'a>> {
        let id = fs::read_to_string("/proc/sys/kernel/random/uuid").context("drawing an id")?;
        let id = id.trim().to_owned();
        let device = format!("/dev/mapper/dmlocal-{id}");
        let (a, b) = (cluster.node("a")?, cluster.node("b")?);
        Ok(Story { id, device, a, b, began: Instant::now() })
    }

    fn tell(&self) -> Result<()> {
        let (a, b, id, device) = (self.a, self.b, &self.id, &self.device);
        println!();
        self.ctl(a, &format!("volume create {id} --size {MIB}MiB"))?;
        self.ctl(a, &format!("volume attach {id}"))?;
        self.say(&format!("node-a has volume {id}, {MIB} MiB"));
        a.exec_with(&["dmlocal-writer", "fill", "--device", device, "--seed", SEED], b"", LIMIT)?
            .ok()?;
        self.say("every block of it is written, and each tells who wrote it, where and when");
        let writer = self.write(a)?;
        self.say("a writer writes on node-a, and remembers what was acknowledged");

        let asked = Instant::now();
        let order = "--from https://node-a:7450 --to https://node-b:7450 --hold --wait";
        let held = self.ctl(b, &format!("volume move {id} {order}"))?;
        ensure!(held["state"] == "held", "it should be held: {held}");
        self.say(&format!("node-b has it, readable, after {}", passed(asked)));
        ensure!(!writer.has_ended(), "the writer ended: {}", writer.stderr());
        self.stop(writer, a)?;
        self.carry_state()?;
        let before = self.checksum(a, device)?;
        ensure!(self.checksum(b, device)? == before, "node-b reads other data than node-a");
        self.say(&format!("the writer stopped on node-a; checksum {before} on both nodes"));

        let asked = Instant::now();
        let usable = self.ctl(b, &format!("volume switch {id}"))?;
        let after = passed(asked);
        ensure!(usable["state"] == "hydrating", "it should be hydrating: {usable}");
        let percent = usable["percent"].as_f64().context("no percent")?;
        ensure!(percent < 10.0, "it was copied before it was usable: {usable}");
        self.say(&format!("switched: node-b writes after {after}, with {percent:.0} % copied"));
        let writer = self.write(b)?;
        let printed = self.first_write(&writer)?;
        self.say(&format!("the writer goes on on node-b: {printed}"));

        let from = Instant::now();
        self.watch_it_fill()?;
        self.say(&format!("everything is on node-b after another {}", passed(from)));
        self.wait_until_gone()?;
        self.say("node-a has let go: VOLUME_NOT_FOUND");
        let last = self.stop(writer, b)?;
        self.say(&format!("the writer never noticed: {last}"));

        let table = b.exec(&["dmsetup", "table", device])?.ok()?;
        let mut words = table.split_whitespace().skip(2);
        let (target, below) = (words.next(), words.next().and_then(|dev| dev.split(':').nth(1)));
        ensure!(target == Some("linear"), "the handle should be linear: {table}");
        let below = format!("/dev/dm-{}", below.context("the handle is on nothing")?);
        let verify = ["dmlocal-writer", "verify", "--device", device, "--state", STATE];
        let right = b.exec_with(&verify, b"", LIMIT)?.ok()?;
        self.say(&format!("each is as it was acknowledged: {right}"));
        let sum = self.checksum(b, device)?;
        ensure!(self.checksum(b, &below)? == sum, "handle and logical volume differ");
        self.say(&format!("checksum {sum} of the handle and of the logical volume below it"));
        self.ctl(b, &format!("volume detach {id}"))?;
        self.ctl(b, &format!("volume delete {id}"))?;
        self.say("the end");
        Ok(())
    }

    fn say(&self, what: &str) {
        println!("{:6.1} s  {what}", self.began.elapsed().as_secs_f64());
    }

    fn ctl(&self, node: &Node, line: &str) -> Result<Value> {
        let fixed = ["dmlocalctl", "--output", "json"];
        let argv: Vec<&str> = fixed.into_iter().chain(line.split_whitespace()).collect();
        serde_json::from_str(&node.exec(&argv)?.ok()?).with_context(|| format!("reading `{line}`"))
    }

    fn status(&self) -> Result<Value> {
        Ok(self.ctl(self.b, &format!("status {}", self.id))?[0].clone())
    }

    fn write(&self, on: &Node) -> Result<Running> {
        on.exec(&["touch", GO])?.ok()?;
        let line = format!(
            "dmlocal-writer run --device {} --state {STATE} --seed {SEED} \
             --until-file-gone {GO} --rate 50",
            self.device
        );
        let writer = on.spawn(&line.split_whitespace().collect::<Vec<_>>())?;
        writer.wait_for_text("requests", LIMIT)?;
        Ok(writer)
    }

    fn checksum(&self, on: &Node, device: &str) -> Result<String> {
        let sum = on.exec_with(&["cksum", device], b"", LIMIT)?.ok()?;
        sum.split_whitespace().next().map(ToOwned::to_owned).context("no checksum")
    }

    fn first_write(&self, writer: &Running) -> Result<String> {
        writer.wait_for_text("first write after", LIMIT)?;
        let text = writer.stdout();
        let line = text.lines().find(|line| line.starts_with("first write"));
        line.map(ToOwned::to_owned).context("the writer has not written")
    }

    fn stop(&self, writer: Running, on: &Node) -> Result<String> {
        on.exec(&["rm", GO])?.ok()?;
        let text = writer.wait(LIMIT)?.ok()?;
        text.lines().last().map(ToOwned::to_owned).context("the writer said nothing")
    }

    fn carry_state(&self) -> Result<()> {
        let state = self.a.exec(&["base64", STATE])?.ok()?;
        let unpack = ["sh", "-c", &format!("base64 --decode >{STATE}")];
        self.b.exec_with(&unpack, state.as_bytes(), LIMIT)?.ok().map(drop)
    }

    /// Draws a bar on a terminal, a line for each state and each tenth otherwise.
    fn watch_it_fill(&self) -> Result<()> {
        const WIDTH: usize = 40;
        let (redraws, from) = (io::stdout().is_terminal(), Instant::now());
        let mut told = None;
        loop {
            let volume = self.status()?;
            let state = volume["state"].as_str().context("no state")?.to_owned();
            let percent = volume["percent"].as_f64().unwrap_or(100.0);
            #[expect(clippy::cast_possible_truncation, reason = "a share to show")]
            #[expect(clippy::cast_sign_loss, reason = "a share to show")]
            let share = percent.clamp(0.0, 100.0) as usize;
            let full = share * WIDTH / 100;
            let bar = "#".repeat(full) + &".".repeat(WIDTH - full);
            let now = Some((state.clone(), share / 10));
            if redraws {
                print!("\r          [{bar}] {share:3} % {state:<12}");
            } else if told != now {
                println!("          [{bar}] {share:3} % {state}");
            }
            io::stdout().flush()?;
            told = now;
            let done = state == "local";
            if done && redraws {
                println!();
            }
            match state.as_str() {
                "local" => return Ok(()),
                "hydrating" | "collapsing" => {}
                _ => bail!("it should not be {state}: {volume}"),
            }
            ensure!(from.elapsed() < LIMIT, "it does not arrive: {volume}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn wait_until_gone(&self) -> Result<()> {
        let from = Instant::now();
        loop {
            let shown = self.a.exec(&["dmlocalctl", "volume", "show", &self.id])?;
            if !shown.success() {
                ensure!(shown.stderr.contains("VOLUME_NOT_FOUND"), "node-a: {}", shown.stderr);
                return Ok(());
            }
            ensure!(from.elapsed() < LIMIT, "node-a does not let go: {}", shown.stdout);
        }
    }
}

/// The time since then, for people.
fn passed(since: Instant) -> String {
    format!("{} ms", since.elapsed().as_millis())
}
