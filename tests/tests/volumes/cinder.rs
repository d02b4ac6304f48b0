//! Cinder itself, in one process on the host, and the agents on the nodes.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::python;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bed::{Bed, LATER, SOON, Volume, until};

/// The instance whose volume it is.
const GUEST: &str = "5b4d4f8e-0c52-4a3f-9d1c-6f7a1f1f2b3c";

/// What the writer does of a volume that is too large to be filled.
const SOME: &str = "--blank --first 4096";

pub fn a_volume_follows_its_guest_through_cinder(bed: &Bed) -> Result<()> {
    let mut cinder = Cinder::start(bed)?;
    let created = cinder.order(&json!({ "do": "create" }))?;
    ensure!(created["status"] == "available", "{created}");
    let volume = Volume::known(created["id"].as_str().context("no id")?)?;
    let (source, target) = match created["host"].as_str() {
        Some("fleet@dmlocal#node-a") => (bed.a(), bed.b()),
        Some("fleet@dmlocal#node-b") => (bed.b(), bed.a()),
        _ => anyhow::bail!("it is nowhere: {created}"),
    };

    let at_source = cinder.attach(&volume, &source.name())?;
    let writer = volume.write(source, SOME)?;
    writer.progress()?;

    // A live migration that is given up.
    let at_target = cinder.attach(&volume, &target.name())?;
    volume.wait_for(target, "held", SOON)?;
    writer.progress()?;
    ensure!(cinder.detach(&at_target)? == 200, "the roll-back is refused");
    volume.wait_until_gone(target)?;
    volume.wait_for(source, "local", SOON)?;
    writer.progress()?;

    // Somebody has the wrong attachment deleted: the guest goes on.
    ensure!(cinder.detach(&at_source)? >= 500, "a live guest is cut off");
    writer.progress()?;

    // A live migration that succeeds. Its guest reads before it writes.
    cinder.attach(&volume, &target.name())?;
    writer.stop(source)?;
    volume.carry_state(source, target)?;
    ensure!(cinder.detach(&at_source)? == 200, "the source is not let go");
    volume.wait_until(target, "the switch", SOON, |seen| seen["state"] != "held")?;
    volume.verify(target)?;
    let writer = volume.write(target, SOME)?;
    writer.progress()?;
    volume.wait_for(target, "local", LATER)?;
    volume.wait_until_gone(source)?;
    let host = format!("fleet@dmlocal#{}", target.name());
    until("Cinder to know where it is", SOON, || {
        let order = json!({ "do": "wait", "volume": volume.id, "states": ["in-use"] });
        let seen = cinder.order(&order)?;
        Ok(if seen["host"] == host.as_str() { Ok(()) } else { Err(seen.to_string()) })
    })?;
    writer.stop(target)?;
    volume.verify(target)?;
    volume.forget_writer(target)?;

    let attachments = cinder.attachments(&volume)?;
    for attachment in &attachments {
        ensure!(cinder.detach(attachment)? == 200, "{attachment} stays");
    }
    let deleted = cinder.order(&json!({ "do": "delete", "volume": volume.id }))?;
    ensure!(deleted["status"] == "gone", "{deleted}");
    Ok(())
}

/// Cinder's services.
struct Cinder {
    process: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    folder: TempDir,
}

impl Cinder {
    /// Starts them; returns when the scheduler knows every node.
    fn start(bed: &Bed) -> Result<Cinder> {
        let folder = tempfile::tempdir()?;
        for file in ["ca.pem", "driver.pem", "driver.key"] {
            let content = bed.a().exec(&["cat", &format!("/etc/dmlocal/pki/{file}")])?.ok()?;
            fs::write(folder.path().join(file), content + "\n")?;
        }
        let python = python::in_driver()?;
        let program = python.get_program().to_str().context("a strange path")?;
        let mut command = bed.host_command(program);
        command.args(["-m", "cinder_dmlocal.tests.whole"]).arg(folder.path());
        for node in [bed.a(), bed.b()] {
            command.arg(format!("{}={}:7450", node.name(), node.address()));
        }
        if let Some(directory) = python.get_current_dir() {
            command.current_dir(directory);
        }
        let log = fs::File::create(folder.path().join("stderr"))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut process = command.spawn().context("starting Cinder")?;
        let answers = BufReader::new(process.stdout.take().context("no answers")?);
        let orders = process.stdin.take();
        let mut cinder = Cinder { process, orders, answers, folder };
        let up = cinder.answer()?;
        ensure!(up["pools"].as_array().is_some_and(|pools| pools.len() == 2), "{up}");
        Ok(cinder)
    }

    fn order(&mut self, order: &Value) -> Result<Value> {
        let orders = self.orders.as_mut().context("Cinder has ended")?;
        writeln!(orders, "{order}")?;
        let answer = self.answer()?;
        ensure!(answer["error"].is_null(), "{order}: {answer}");
        Ok(answer)
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let log = self.folder.path().join("stderr");
        serde_json::from_str(&line)
            .with_context(|| format!("`{line}`: {}", fs::read_to_string(log).unwrap_or_default()))
    }

    /// Attaches as a live migration does; the attachment's id is the answer.
    fn attach(&mut self, volume: &Volume, host: &str) -> Result<String> {
        let order = json!({ "do": "attach", "volume": volume.id, "instance": GUEST, "host": host });
        let attached = self.order(&order)?;
        ensure!(attached["path"] == volume.device.as_str(), "{attached}");
        Ok(attached["id"].as_str().context("no id")?.to_owned())
    }

    /// Deletes an attachment; the API's status is the answer.
    fn detach(&mut self, attachment: &str) -> Result<u64> {
        let answer = self.order(&json!({ "do": "detach", "attachment": attachment }))?;
        answer["status"].as_u64().context("no status")
    }

    fn attachments(&mut self, volume: &Volume) -> Result<Vec<String>> {
        let path = format!("/attachments?volume_id={}", volume.id);
        let answer = self.order(&json!({ "do": "call", "method": "GET", "path": path }))?;
        let attachments = answer["body"]["attachments"].as_array().context("no attachments")?;
        Ok(attachments.iter().filter_map(|one| Some(one["id"].as_str()?.to_owned())).collect())
    }
}

impl Drop for Cinder {
    fn drop(&mut self) {
        // It ends with its orders.
        self.orders.take();
        let _ = self.process.wait();
    }
}
