//! Nova and Cinder as real services on the host, and the agents on the nodes.
//!
//! Nova believes that it runs guests; a writer that knows what it has written stands in
//! for one, on whichever node Nova says. In a live migration it is stopped and goes on
//! exactly where the guest would move.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::{Node, packages, python};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bed::{Bed, LATER, Volume, Writer};

/// What the writer does of a volume that is too large to be filled.
pub const SOME: &str = "--blank --first 4096";

/// An instance, and the writer that stands in for it.
pub struct Guest {
    pub server: String,
    pub volume: Volume,
    pub writer: Option<Writer>,
}

impl Guest {
    /// Begins to write, or goes on.
    pub fn run(&mut self, on: &Node) -> Result<()> {
        self.writer = Some(self.volume.write(on, SOME)?);
        self.progress()
    }

    /// Waits until it has written some more.
    pub fn progress(&self) -> Result<()> {
        self.writer.as_ref().context("nobody writes")?.progress()
    }

    /// Ends its writing; fails if anything was wrong so far.
    pub fn stop(&mut self, on: &Node) -> Result<()> {
        self.writer.take().context("nobody writes")?.stop(on).map(drop)
    }

    /// Reads what it has written before, and writes more.
    pub fn go_on(&mut self, from: &Node, to: &Node) -> Result<()> {
        self.volume.carry_state(from, to)?;
        self.volume.verify(to)?;
        self.run(to)?;
        self.volume.wait_until_alone(to)
    }

    /// Moves with Nova, in the middle of what Nova does.
    pub fn migrate_live(&mut self, nova: &mut Nova, from: &Node, to: &Node) -> Result<()> {
        nova.begin(self, to)?;
        self.migrates(nova, from, to)?;
        self.arrives(nova, to)
    }

    /// Moves when Nova has begun to, and Nova is told.
    pub fn migrates(&mut self, nova: &mut Nova, from: &Node, to: &Node) -> Result<()> {
        self.progress()?;
        self.stop(from)?;
        self.volume.carry_state(from, to)?;
        let writer = self.volume.write(to, SOME)?;
        writer.wait_for_first_write()?;
        self.writer = Some(writer);
        nova.decide(self, "done")?;
        nova.ended(self, &["completed"])?;
        self.progress()
    }

    /// Its volume comes after it, and Cinder knows.
    pub fn arrives(&self, nova: &mut Nova, to: &Node) -> Result<()> {
        self.volume.wait_until_alone(to)?;
        let home = nova.text(&json!({ "do": "home", "volume": self.volume.id }))?;
        ensure!(home == format!("fleet@dmlocal#{}", to.name()), "Cinder believes it on {home}");
        Ok(())
    }

    /// Has not moved: nothing is left at the destination.
    pub fn stays(&self, nova: &mut Nova, on: &Node, destination: &Node) -> Result<()> {
        self.volume.wait_until_gone(destination)?;
        self.volume.wait_for(on, "local", LATER)?;
        nova.attached(self, &[on])?;
        self.progress()
    }
}

/// Nova, Cinder and what they need, as processes of one that takes orders.
pub struct Nova {
    process: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    folder: TempDir,
}

impl Nova {
    /// Starts everything; returns when a compute runs for each node.
    pub fn start(bed: &Bed) -> Result<Nova> {
        packages::ensure(packages::SERVICES)?;
        let folder = tempfile::Builder::new().prefix("dmlocal-nova-").tempdir()?;
        for file in ["ca.pem", "driver.pem", "driver.key"] {
            let content = bed.a().exec(&["cat", &format!("/etc/dmlocal/pki/{file}")])?.ok()?;
            fs::write(folder.path().join(file), content + "\n")?;
        }
        let python = python::in_services()?;
        let program = python.get_program().to_str().context("a strange path")?;
        let mut command = bed.host_command(program);
        command.args(["-m", "services.nova_orders"]).arg(folder.path());
        for node in [bed.a(), bed.b()] {
            command.arg(format!("{}={}:7450", node.name(), node.address()));
        }
        if let Some(directory) = python.get_current_dir() {
            command.current_dir(directory);
        }
        let log = fs::File::create(folder.path().join("stderr"))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut process = command.spawn().context("starting Nova")?;
        let answers = BufReader::new(process.stdout.take().context("no answers")?);
        let orders = process.stdin.take();
        let mut nova = Nova { process, orders, answers, folder };
        nova.answer()?;
        Ok(nova)
    }

    /// The answer to an order.
    pub fn order(&mut self, order: &Value) -> Result<Value> {
        let orders = self.orders.as_mut().context("Nova has ended")?;
        writeln!(orders, "{order}")?;
        self.answer().with_context(|| order.to_string())
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let log = self.folder.path().join("stderr");
        let answer: Value = serde_json::from_str(&line).with_context(|| {
            format!("`{line}`: {}", fs::read_to_string(log).unwrap_or_default())
        })?;
        ensure!(answer["error"].is_null(), "{answer}");
        Ok(answer["is"].clone())
    }

    /// The answer to an order that has a text for one.
    pub fn text(&mut self, order: &Value) -> Result<String> {
        let answer = self.order(order)?;
        Ok(answer.as_str().with_context(|| answer.to_string())?.to_owned())
    }

    /// Expects one of these answers.
    pub fn says(&mut self, order: &Value, expected: &[&str]) -> Result<()> {
        let answer = self.text(order)?;
        ensure!(expected.contains(&answer.as_str()), "{order}: {answer}");
        Ok(())
    }

    /// Creates a volume on a node.
    pub fn volume(&mut self, on: &Node, bootable: bool) -> Result<Volume> {
        let order = json!({ "do": "volume", "node": on.name(), "bootable": bootable });
        Volume::known(&self.text(&order)?)
    }

    /// Deletes one that is not attached, or is about to be detached.
    pub fn delete(&mut self, volume: &Volume) -> Result<()> {
        self.order(&json!({ "do": "delete_volume", "volume": volume.id })).map(drop)
    }

    /// Begins a live migration; returns when the guest is about to move.
    pub fn begin(&mut self, guest: &Guest, to: &Node) -> Result<()> {
        self.order(&json!({ "do": "hold", "server": guest.server }))?;
        let order = json!({ "do": "begin_live_migration", "server": guest.server,
            "to": to.name() });
        self.order(&order)?;
        self.order(&json!({ "do": "meet", "server": guest.server })).map(drop)
    }

    /// Says what has come of a live migration that waits for it.
    pub fn decide(&mut self, guest: &Guest, outcome: &str) -> Result<()> {
        let order = json!({ "do": "decide", "server": guest.server, "outcome": outcome });
        self.order(&order).map(drop)
    }

    /// Waits for its end, and expects one of these.
    pub fn ended(&mut self, guest: &Guest, expected: &[&str]) -> Result<()> {
        self.says(&json!({ "do": "end_of_migration", "server": guest.server }), expected)
    }

    /// Cinder has attachments of its volume on these nodes.
    pub fn attached(&mut self, guest: &Guest, nodes: &[&Node]) -> Result<()> {
        let answer = self.order(&json!({ "do": "attached", "volume": guest.volume.id }))?;
        let expected: Vec<String> = nodes.iter().map(|node| node.name()).collect();
        ensure!(answer == json!(expected), "attached to {answer}, not to {expected:?}");
        Ok(())
    }
}

impl Drop for Nova {
    fn drop(&mut self) {
        // They end with their orders.
        self.orders.take();
        let _ = self.process.wait();
    }
}
