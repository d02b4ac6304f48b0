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

use crate::bed::{Bed, LATER, SOON, Volume, Writer};

/// What the writer does of a volume that is too large to be filled.
const SOME: &str = "--blank --first 4096";

pub fn a_guest_goes_wherever_nova_takes_it(bed: &Bed) -> Result<()> {
    let mut nova = Nova::start(bed)?;
    let (a, b) = (bed.a(), bed.b());
    let volume = nova.volume(a, true)?;
    let server = nova.text(&json!({ "do": "boot", "host": a.name(), "volumes": [volume.id] }))?;
    let mut guest = Guest { server, volume, writer: None };
    guest.run(a)?;

    // Live, there and back.
    guest.migrate_live(&mut nova, a, b)?;
    guest.migrate_live(&mut nova, b, a)?;

    // Live, and given up when both nodes had it.
    nova.begin(&guest, b)?;
    guest.volume.wait_for(b, "held", SOON)?;
    guest.progress()?;
    nova.order(&json!({ "do": "abort_live_migration", "server": guest.server }))?;
    nova.ended(&guest, &["cancelled"])?;
    guest.stays(&mut nova, a, b)?;

    // Live, to a node whose agent is away.
    b.exec(&["systemctl", "stop", "dmlocald"])?.ok()?;
    let order = json!({ "do": "live_migrate", "server": guest.server, "to": b.name() });
    nova.says(&order, &["failed", "error"])?;
    b.exec(&["systemctl", "start", "dmlocald"])?.ok()?;
    nova.order(&json!({ "do": "wait_for_pools" }))?;
    guest.progress()?;
    // What Nova has reserved in vain goes when it starts the instance anew.
    guest.stop(a)?;
    nova.says(&json!({ "do": "reboot", "server": guest.server }), &["ACTIVE"])?;
    guest.run(a)?;
    guest.stays(&mut nova, a, b)?;

    // Live, and what is left of it at the destination keeps Nova from rolling it back.
    nova.begin(&guest, b)?;
    guest.volume.wait_for(b, "held", SOON)?;
    let keep = format!("exec sleep 600 <{}", guest.volume.device);
    let left = b.spawn(&["sh", "-c", &keep])?;
    nova.decide(&guest, "failed")?;
    nova.ended(&guest, &["failed", "error"])?;
    left.kill();
    nova.attached(&guest, &[a, b])?;
    guest.progress()?;
    // Nova now takes the attachment here for a left-over. The guest is not cut off.
    nova.says(&json!({ "do": "reboot", "server": guest.server }), &["ACTIVE"])?;
    nova.attached(&guest, &[a, b])?;
    guest.progress()?;
    guest.migrate_live(&mut nova, a, b)?;
    let order = json!({ "do": "delete_attachment", "volume": guest.volume.id, "host": a.name() });
    nova.order(&order)?;
    nova.attached(&guest, &[b])?;

    // Cold, and back.
    guest.stop(b)?;
    let order = json!({ "do": "migrate", "server": guest.server, "to": a.name() });
    nova.says(&order, &["VERIFY_RESIZE"])?;
    guest.go_on(b, a)?;
    guest.stop(a)?;
    nova.says(&json!({ "do": "revert", "server": guest.server }), &["ACTIVE"])?;
    guest.go_on(a, b)?;

    // Shelved here, unshelved there.
    guest.stop(b)?;
    nova.says(&json!({ "do": "shelve", "server": guest.server }), &["SHELVED_OFFLOADED"])?;
    let order = json!({ "do": "unshelve", "server": guest.server, "to": a.name() });
    nova.says(&order, &["ACTIVE"])?;
    guest.go_on(b, a)?;

    guest.stop(a)?;
    guest.volume.verify(a)?;
    guest.volume.forget_writer(a)?;
    guest.volume.forget_writer(b)?;
    nova.order(&json!({ "do": "delete", "server": guest.server }))?;
    nova.delete(&guest.volume)
}

pub fn an_instance_is_evacuated_once_its_node_is_back(bed: &Bed) -> Result<()> {
    let mut nova = Nova::start(bed)?;
    let (a, b) = (bed.a(), bed.b());
    let volume = nova.volume(a, true)?;
    let server = nova.text(&json!({ "do": "boot", "host": a.name(), "volumes": [volume.id] }))?;
    let mut guest = Guest { server, volume, writer: None };
    let writer = guest.volume.write(a, &format!("--durable {SOME}"))?;
    writer.progress()?;
    a.kill()?;
    writer.lost();
    nova.order(&json!({ "do": "kill_compute", "host": a.name() }))?;

    let evacuate = json!({ "do": "evacuate", "server": guest.server, "to": b.name() });
    nova.says(&evacuate, &["ERROR"])?;
    ensure!(guest.volume.status(b)?.is_none(), "it is opened without its data");
    // Nor is it replaced by a blank one on the word of an operator.
    nova.order(&json!({ "do": "declare_dead", "nodes": [a.name()] }))?;
    nova.order(&json!({ "do": "wait_for_pools", "nodes": [b.name()] }))?;
    nova.says(&evacuate, &["ERROR"])?;
    ensure!(guest.volume.status(b)?.is_none(), "it is opened without its data");

    a.start()?;
    nova.order(&json!({ "do": "declare_dead", "nodes": [] }))?;
    nova.order(&json!({ "do": "wait_for_pools", "nodes": [a.name(), b.name()] }))?;
    nova.says(&evacuate, &["ACTIVE"])?;
    guest.go_on(a, b)?;
    nova.order(&json!({ "do": "revive_compute", "host": a.name() }))?;
    nova.attached(&guest, &[b])?;
    guest.progress()?;
    guest.stop(b)?;

    // A volume more, and less.
    let more = nova.volume(a, false)?;
    let attach = json!({ "do": "attach", "server": guest.server, "volume": more.id });
    nova.order(&attach)?;
    let writer = more.write(b, SOME)?;
    writer.progress()?;
    writer.stop(b)?;
    more.wait_for(b, "local", LATER)?;
    more.wait_until_gone(a)?;
    nova.order(&json!({ "do": "detach", "server": guest.server, "volume": more.id }))?;
    nova.order(&attach)?;
    more.verify(b)?;
    more.forget_writer(b)?;

    guest.volume.verify(b)?;
    guest.volume.forget_writer(a)?;
    guest.volume.forget_writer(b)?;
    nova.order(&json!({ "do": "delete", "server": guest.server }))?;
    nova.delete(&more)?;
    nova.delete(&guest.volume)
}

pub fn a_used_volume_changes_while_its_guest_goes_on(bed: &Bed) -> Result<()> {
    let mut nova = Nova::start(bed)?;
    let (a, b) = (bed.a(), bed.b());
    let volume = nova.volume(a, true)?;
    let server = nova.text(&json!({ "do": "boot", "host": a.name(), "volumes": [volume.id] }))?;
    let mut guest = Guest { server, volume, writer: None };
    guest.run(a)?;
    // Of a type that names no node: what has left a node that its type names cannot grow.
    let order = json!({ "do": "volume", "node": "dmlocal" });
    let mut more = Volume::known(&nova.text(&order)?)?;
    nova.order(&json!({ "do": "attach", "server": guest.server, "volume": more.id }))?;
    more.wait_until(a, "it to be here", LATER, |seen| seen["state"] == "local")?;
    let writer = more.write(a, SOME)?;
    writer.progress()?;

    // A snapshot.
    let snapshot = nova.text(&json!({ "do": "snapshot", "volume": more.id }))?;
    nova.order(&json!({ "do": "delete_snapshot", "snapshot": snapshot }))?;
    writer.progress()?;

    // An operator sends it elsewhere, and the hypervisor copies it.
    writer.stop(a)?;
    let order = json!({ "do": "begin_to_send", "volume": more.id, "node": b.name() });
    let told = nova.order(&order)?;
    let [host, old, new] = [0, 1, 2].map(|index| told[index].as_str().unwrap_or_default());
    ensure!(host == a.name() && old == more.device && new != old, "{told}");
    let copy = format!("dd if={old} of={new} bs=1M conv=sparse,notrunc,fsync iflag=direct");
    a.exec_with(&["sh", "-c", &copy], b"", LATER)?.ok()?;
    new.clone_into(&mut more.device);
    let id = nova.text(&json!({ "do": "sent", "volume": more.id }))?;
    let sent = Volume::known(&id)?;
    ensure!(sent.device == more.device, "{} is not {}", sent.device, more.device);
    sent.wait_for(a, "remote", SOON)?;
    more.verify(a)?;
    let writer = more.write(a, SOME)?;
    writer.progress()?;

    // The guest follows it.
    nova.begin(&guest, b)?;
    sent.wait_for(b, "held", SOON)?;
    guest.stop(a)?;
    writer.stop(a)?;
    for volume in [&guest.volume, &more] {
        volume.carry_state(a, b)?;
    }
    let writer = more.write(b, SOME)?;
    writer.wait_for_first_write()?;
    guest.run(b)?;
    nova.decide(&guest, "done")?;
    nova.ended(&guest, &["completed"])?;
    for volume in [&guest.volume, &sent] {
        volume.wait_for(b, "local", LATER)?;
        volume.wait_until_gone(a)?;
    }
    writer.progress()?;

    // It grows below its user.
    nova.order(&json!({ "do": "grow", "volume": more.id, "size": 2 }))?;
    let size = b.exec(&["blockdev", "--getsize64", &more.device])?.ok()?;
    ensure!(size == (2_u64 << 30).to_string(), "{size} bytes");
    writer.progress()?;
    writer.stop(b)?;
    guest.stop(b)?;
    for volume in [&guest.volume, &more] {
        volume.verify(b)?;
        volume.forget_writer(a)?;
        volume.forget_writer(b)?;
    }
    nova.order(&json!({ "do": "delete", "server": guest.server }))?;
    nova.delete(&more)?;
    nova.delete(&guest.volume)
}

pub fn a_hundred_volumes_come_and_go_at_once(bed: &Bed) -> Result<()> {
    // Volumes of Cinder's have a GiB at least, and nothing is written to these.
    for node in [bed.a(), bed.b()] {
        let disk = node.add_disk("room", 120 << 30)?;
        let script = format!(
            r##"set -e
            vgextend --quiet --yes dmlocal {disk}
            lvextend --quiet --size 110g dmlocal/pool
            sed -i 's#^devices = \["#&{disk}", "#' /etc/dmlocal/dmlocald.toml
            dmlocald check-config
            systemctl restart dmlocald"##
        );
        node.shell(&script)?.ok()?;
    }
    let mut nova = Nova::start(bed)?;
    let moved = nova.order(&json!({ "do": "many", "count": 100 }))?;
    // The scheduler does not know where they are going to be attached.
    ensure!(moved.as_u64() > Some(0), "{moved} were brought to another node");
    Ok(())
}

/// An instance, and the writer that stands in for it.
struct Guest {
    server: String,
    volume: Volume,
    writer: Option<Writer>,
}

impl Guest {
    fn run(&mut self, on: &Node) -> Result<()> {
        self.writer = Some(self.volume.write(on, SOME)?);
        self.progress()
    }

    fn progress(&self) -> Result<()> {
        self.writer.as_ref().context("nobody writes")?.progress()
    }

    fn stop(&mut self, on: &Node) -> Result<()> {
        self.writer.take().context("nobody writes")?.stop(on).map(drop)
    }

    /// Reads what it has written before, and writes more.
    fn go_on(&mut self, from: &Node, to: &Node) -> Result<()> {
        self.volume.carry_state(from, to)?;
        self.volume.verify(to)?;
        self.run(to)?;
        self.volume.wait_until_alone(to)
    }

    /// Moves with Nova, in the middle of what Nova does.
    fn migrate_live(&mut self, nova: &mut Nova, from: &Node, to: &Node) -> Result<()> {
        nova.begin(self, to)?;
        self.progress()?;
        self.stop(from)?;
        self.volume.carry_state(from, to)?;
        let writer = self.volume.write(to, SOME)?;
        writer.wait_for_first_write()?;
        self.writer = Some(writer);
        nova.decide(self, "done")?;
        nova.ended(self, &["completed"])?;
        self.progress()?;
        self.volume.wait_until_alone(to)?;
        let home = nova.text(&json!({ "do": "home", "volume": self.volume.id }))?;
        ensure!(home == format!("fleet@dmlocal#{}", to.name()), "Cinder believes it on {home}");
        Ok(())
    }

    /// Has not moved: nothing is left at the destination.
    fn stays(&self, nova: &mut Nova, on: &Node, destination: &Node) -> Result<()> {
        self.volume.wait_until_gone(destination)?;
        self.volume.wait_for(on, "local", LATER)?;
        nova.attached(self, &[on])?;
        self.progress()
    }
}

/// Nova, Cinder and what they need, as processes of one that takes orders.
struct Nova {
    process: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    folder: TempDir,
}

impl Nova {
    /// Starts everything; returns when a compute runs for each node.
    fn start(bed: &Bed) -> Result<Nova> {
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

    fn order(&mut self, order: &Value) -> Result<Value> {
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

    fn text(&mut self, order: &Value) -> Result<String> {
        let answer = self.order(order)?;
        Ok(answer.as_str().with_context(|| answer.to_string())?.to_owned())
    }

    /// Expects one of these answers.
    fn says(&mut self, order: &Value, expected: &[&str]) -> Result<()> {
        let answer = self.text(order)?;
        ensure!(expected.contains(&answer.as_str()), "{order}: {answer}");
        Ok(())
    }

    fn volume(&mut self, on: &Node, bootable: bool) -> Result<Volume> {
        let order = json!({ "do": "volume", "node": on.name(), "bootable": bootable });
        Volume::known(&self.text(&order)?)
    }

    fn delete(&mut self, volume: &Volume) -> Result<()> {
        self.order(&json!({ "do": "delete_volume", "volume": volume.id })).map(drop)
    }

    /// Begins a live migration; returns when the guest is about to move.
    fn begin(&mut self, guest: &Guest, to: &Node) -> Result<()> {
        self.order(&json!({ "do": "hold", "server": guest.server }))?;
        let order = json!({ "do": "begin_live_migration", "server": guest.server,
            "to": to.name() });
        self.order(&order)?;
        self.order(&json!({ "do": "meet", "server": guest.server })).map(drop)
    }

    fn decide(&mut self, guest: &Guest, outcome: &str) -> Result<()> {
        let order = json!({ "do": "decide", "server": guest.server, "outcome": outcome });
        self.order(&order).map(drop)
    }

    fn ended(&mut self, guest: &Guest, expected: &[&str]) -> Result<()> {
        self.says(&json!({ "do": "end_of_migration", "server": guest.server }), expected)
    }

    /// Cinder has attachments of its volume on these nodes.
    fn attached(&mut self, guest: &Guest, nodes: &[&Node]) -> Result<()> {
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
