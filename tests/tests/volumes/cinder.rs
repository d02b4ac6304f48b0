//! Cinder itself, in one process on the host, and the agents on the nodes.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::{Node, python};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bed::{Bed, LATER, SOON, Volume, until};

/// The instance whose volume it is.
const GUEST: &str = "5b4d4f8e-0c52-4a3f-9d1c-6f7a1f1f2b3c";

/// What the writer does of a volume that is too large to be filled.
const SOME: &str = "--blank --first 4096";

pub fn a_volume_follows_its_guest_through_cinder(bed: &Bed) -> Result<()> {
    let mut cinder = Cinder::start(bed)?;
    let (volume, source, target) = cinder.create(bed)?;
    let at_source = cinder.attach(&volume, &source.name())?;
    let writer = volume.write(source, SOME)?;
    writer.progress()?;

    // A live migration that is given up.
    let at_target = cinder.attach(&volume, &target.name())?;
    volume.wait_for(target, "held", SOON)?;
    writer.progress()?;
    cinder.detach(&at_target)?;
    volume.wait_until_gone(target)?;
    volume.wait_for(source, "local", SOON)?;
    writer.progress()?;

    // Somebody has the wrong attachment deleted: the guest goes on.
    cinder.refused(&json!({ "do": "detach", "attachment": at_source }))?;
    writer.progress()?;

    // A live migration that succeeds. Its guest reads before it writes.
    cinder.attach(&volume, &target.name())?;
    writer.stop(source)?;
    volume.carry_state(source, target)?;
    cinder.detach(&at_source)?;
    volume.wait_until(target, "the switch", SOON, |seen| seen["state"] != "held")?;
    volume.verify(target)?;
    let writer = volume.write(target, SOME)?;
    writer.progress()?;
    volume.wait_for(target, "local", LATER)?;
    volume.wait_until_gone(source)?;
    cinder.knows_it_on(&volume, target)?;
    writer.stop(target)?;
    volume.verify(target)?;
    cinder.delete(&volume, target)
}

pub fn a_guest_whose_destination_fails_migrates_later(bed: &Bed) -> Result<()> {
    let mut cinder = Cinder::start(bed)?;
    let (volume, source, target) = cinder.create(bed)?;
    let at_source = cinder.attach(&volume, &source.name())?;
    let writer = volume.write(source, SOME)?;
    writer.progress()?;

    target.exec(&["systemctl", "stop", "dmlocald"])?.ok()?;
    let order = json!({ "do": "attach", "volume": volume.id, "instance": GUEST,
        "host": target.name() });
    cinder.refused(&order)?;
    target.exec(&["systemctl", "start", "dmlocald"])?.ok()?;
    volume.wait_for(source, "local", SOON)?;
    ensure!(volume.status(target)?.is_none(), "something of it is at the destination");
    let left: Vec<String> =
        cinder.attachments(&volume)?.into_iter().filter(|id| *id != at_source).collect();
    ensure!(left.len() == 1, "Nova finds {left:?}");
    writer.progress()?;

    cinder.attach(&volume, &target.name())?;
    writer.stop(source)?;
    volume.carry_state(source, target)?;
    let writer = volume.write(target, SOME)?;
    writer.wait_for_first_write()?;
    // A hard reboot of the instance has what was left deleted, wherever it is by then.
    cinder.detach(&left[0])?;
    cinder.detach(&at_source)?;
    writer.progress()?;
    volume.wait_for(target, "local", LATER)?;
    volume.wait_until_gone(source)?;
    writer.stop(target)?;
    volume.verify(target)?;
    cinder.delete(&volume, target)
}

pub fn an_evacuated_volume_waits_for_its_node(bed: &Bed) -> Result<()> {
    let mut cinder = Cinder::start(bed)?;
    let (volume, source, target) = cinder.create(bed)?;
    let at_source = cinder.attach(&volume, &source.name())?;
    let writer = volume.write(source, &format!("--durable {SOME}"))?;
    writer.progress()?;
    source.kill()?;
    writer.lost();

    // Nova gives up the dead host's attachment, and the data must not go with it.
    let order = json!({ "do": "reserve", "volume": volume.id, "instance": GUEST });
    let reserved = cinder.order(&order)?["id"].as_str().context("no id")?.to_owned();
    cinder.detach(&at_source)?;
    let connect = json!({ "do": "connect", "attachment": reserved, "host": target.name() });
    cinder.refused(&connect)?;
    ensure!(volume.status(target)?.is_none(), "it is opened without its data");
    // Nor is it replaced by a blank one on the word of an operator.
    cinder.restart(bed, &[source])?;
    cinder.refused(&connect)?;
    ensure!(volume.status(target)?.is_none(), "it is opened without its data");

    source.start()?;
    cinder.restart(bed, &[])?;
    let connected = cinder.order(&connect)?;
    ensure!(connected["path"] == volume.device.as_str(), "{connected}");
    volume.carry_state(source, target)?;
    volume.verify(target)?;
    let writer = volume.write(target, SOME)?;
    writer.progress()?;
    volume.wait_for(target, "local", LATER)?;
    volume.wait_until_gone(source)?;
    cinder.knows_it_on(&volume, target)?;
    writer.stop(target)?;
    volume.verify(target)?;
    volume.forget_writer(source)?;
    cinder.delete(&volume, target)
}

/// Cinder's services.
struct Cinder {
    folder: TempDir,
    running: Option<Services>,
}

/// The process that they are in; it ends with its orders.
struct Services {
    process: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Cinder {
    /// Starts them; returns when the scheduler knows every node.
    fn start(bed: &Bed) -> Result<Cinder> {
        let folder = tempfile::tempdir()?;
        for file in ["ca.pem", "driver.pem", "driver.key"] {
            let content = bed.a().exec(&["cat", &format!("/etc/dmlocal/pki/{file}")])?.ok()?;
            fs::write(folder.path().join(file), content + "\n")?;
        }
        let mut cinder = Cinder { folder, running: None };
        cinder.restart(bed, &[])?;
        Ok(cinder)
    }

    /// Ends them and starts them anew, with these nodes declared dead.
    fn restart(&mut self, bed: &Bed, dead: &[&Node]) -> Result<()> {
        self.end();
        let python = python::in_driver()?;
        let program = python.get_program().to_str().context("a strange path")?;
        let mut command = bed.host_command(program);
        command.args(["-m", "cinder_dmlocal.tests.whole"]).arg(self.folder.path());
        let is_dead = |node: &Node| dead.iter().any(|one| one.name() == node.name());
        let nodes = [bed.a(), bed.b()];
        for node in nodes {
            let endpoint =
                if is_dead(node) { String::new() } else { format!("{}:7450", node.address()) };
            command.arg(format!("{}={endpoint}", node.name()));
        }
        if let Some(directory) = python.get_current_dir() {
            command.current_dir(directory);
        }
        let log = fs::File::create(self.folder.path().join("stderr"))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut process = command.spawn().context("starting Cinder")?;
        let answers = BufReader::new(process.stdout.take().context("no answers")?);
        let orders = process.stdin.take().context("no orders")?;
        self.running = Some(Services { process, orders, answers });
        let up = self.answer()?;
        let pools = up["pools"].as_array().map_or(0, Vec::len);
        ensure!(pools == nodes.len() - dead.len(), "{up}");
        Ok(())
    }

    fn end(&mut self) {
        if let Some(Services { mut process, orders, .. }) = self.running.take() {
            drop(orders);
            let _ = process.wait();
        }
    }

    fn order(&mut self, order: &Value) -> Result<Value> {
        let running = self.running.as_mut().context("Cinder has ended")?;
        writeln!(running.orders, "{order}")?;
        let answer = self.answer()?;
        ensure!(answer["error"].is_null(), "{order}: {answer}");
        Ok(answer)
    }

    /// Expects the API to answer an order with an error.
    fn refused(&mut self, order: &Value) -> Result<()> {
        let answer = self.order(order)?;
        ensure!(answer["status"].as_u64() >= Some(400), "{order} was granted: {answer}");
        Ok(())
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.running.as_mut().context("Cinder has ended")?.answers.read_line(&mut line)?;
        let log = self.folder.path().join("stderr");
        serde_json::from_str(&line)
            .with_context(|| format!("`{line}`: {}", fs::read_to_string(log).unwrap_or_default()))
    }

    /// Creates a volume; the node that has it is the source, and the other the target.
    fn create<'a>(&mut self, bed: &'a Bed) -> Result<(Volume, &'a Node, &'a Node)> {
        let created = self.order(&json!({ "do": "create" }))?;
        ensure!(created["status"] == "available", "{created}");
        let volume = Volume::known(created["id"].as_str().context("no id")?)?;
        match created["host"].as_str() {
            Some("fleet@dmlocal#node-a") => Ok((volume, bed.a(), bed.b())),
            Some("fleet@dmlocal#node-b") => Ok((volume, bed.b(), bed.a())),
            _ => anyhow::bail!("it is nowhere: {created}"),
        }
    }

    /// Attaches as a live migration does; the attachment's id is the answer.
    fn attach(&mut self, volume: &Volume, host: &str) -> Result<String> {
        let order = json!({ "do": "attach", "volume": volume.id, "instance": GUEST, "host": host });
        let attached = self.order(&order)?;
        ensure!(attached["path"] == volume.device.as_str(), "{attached}");
        Ok(attached["id"].as_str().context("no id")?.to_owned())
    }

    /// Deletes an attachment.
    fn detach(&mut self, attachment: &str) -> Result<()> {
        let answer = self.order(&json!({ "do": "detach", "attachment": attachment }))?;
        ensure!(answer["status"] == 200, "{attachment} stays: {answer}");
        Ok(())
    }

    fn attachments(&mut self, volume: &Volume) -> Result<Vec<String>> {
        let path = format!("/attachments?volume_id={}", volume.id);
        let answer = self.order(&json!({ "do": "call", "method": "GET", "path": path }))?;
        let attachments = answer["body"]["attachments"].as_array().context("no attachments")?;
        Ok(attachments.iter().filter_map(|one| Some(one["id"].as_str()?.to_owned())).collect())
    }

    /// Waits until Cinder's record of a volume that is used names that node.
    fn knows_it_on(&mut self, volume: &Volume, node: &Node) -> Result<()> {
        let host = format!("fleet@dmlocal#{}", node.name());
        until("Cinder to know where it is", SOON, || {
            let order = json!({ "do": "wait", "volume": volume.id, "states": ["in-use"] });
            let seen = self.order(&order)?;
            Ok(if seen["host"] == host.as_str() { Ok(()) } else { Err(seen.to_string()) })
        })
    }

    /// Ends every attachment, and the volume.
    fn delete(&mut self, volume: &Volume, on: &Node) -> Result<()> {
        volume.forget_writer(on)?;
        for attachment in self.attachments(volume)? {
            self.detach(&attachment)?;
        }
        let deleted = self.order(&json!({ "do": "delete", "volume": volume.id }))?;
        ensure!(deleted["status"] == "gone", "{deleted}");
        Ok(())
    }
}

impl Drop for Cinder {
    fn drop(&mut self) {
        self.end();
    }
}
