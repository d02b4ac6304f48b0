//! Cinder on a node of its own, which attaches volumes itself: images and backups.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dmlocal_testbed::{Node, Running, controller};
use serde_json::{Value, json};

use crate::bed::{Bed, SOON, Volume, ctl, kill_agent, until};

/// The instance whose volume it is.
const GUEST: &str = "0d9a5f1e-6b7c-4c6e-8a35-2f1f0c9d7e44";

/// How long anything of Cinder's may take: all of it is emulated.
const PATIENCE: Duration = Duration::from_secs(300);

/// What the writer does of a volume, or of the image of one: the rest stays blank.
const SOME: &str = "--blank --first 2048";

/// What tells the content of an image from others.
const SEED: u64 = 77;

/// Where Cinder keeps what it writes, on its node.
const FOLDER: &str = "/root/controller";

pub fn a_controller_copies_images_into_volumes_and_back(bed: &Bed) -> Result<()> {
    let mut cinder = Cinder::start(bed)?;
    let c = bed.c();
    let (content, raw) = (Volume::filled("content", SEED), format!("{FOLDER}/image.raw"));
    let fill = format!(
        "set -e
        cd {FOLDER}
        truncate --size 1G content
        dmlocal-writer run --device content --state /root/content.state --seed {SEED} {SOME} \
            --count 200
        head --bytes 32M content >{raw}
        rm content"
    );
    c.shell(&fill)?.ok()?;
    let image = cinder.id(&json!({ "do": "image", "path": raw, "form": "raw" }))?;

    // The agent dies while the controller copies: the data goes on without it.
    cinder.begin(&json!({ "do": "create", "imageRef": image }))?;
    let (id, home) = visited(bed, "")?;
    home.set_link(false)?;
    let outcome = kill_agent(c);
    let was_copying = !cinder.has_answered();
    home.set_link(true)?;
    outcome?;
    ensure!(was_copying, "it was copied before the agent was killed");
    let created = cinder.answer()?;
    ensure!(created["status"] == "available" && created["id"] == id.as_str(), "{created}");
    let volume = Volume::filled(&id, SEED);
    nothing_is_left_of_a_visit(c)?;

    // A guest finds the image in it, and writes.
    let attachment = cinder.attach(&volume, home)?;
    content.copy_state(c, &volume, home)?;
    volume.write(home, &format!("{SOME} --count 100"))?.wait(PATIENCE)?;
    volume.verify(home)?;
    cinder.detach(&attachment)?;

    // Its content becomes an image in another form, and that a volume.
    let upload = json!({ "do": "upload", "volume": id, "form": "qcow2" });
    let made = cinder.order(&upload)?;
    ensure!(made["status"] == "available", "{made}");
    nothing_is_left_of_a_visit(c)?;
    let of_volume = made["id"].as_str().context("no id")?.to_owned();
    let (second, second_home) = cinder.create(bed, json!({ "imageRef": of_volume }))?;
    let second = Volume::filled(&second, SEED);
    let attachment = cinder.attach(&second, second_home)?;
    volume.copy_state(home, &second, second_home)?;
    second.verify(second_home)?;
    cinder.detach(&attachment)?;

    for (volume, on) in [(&content, c), (&volume, home), (&second, second_home)] {
        volume.forget_writer(on)?;
    }
    cinder.delete(&volume)?;
    cinder.delete(&second)?;
    for image in [image, of_volume] {
        cinder.order(&json!({ "do": "delete_image", "image": image }))?;
    }
    cinder.end()
}

pub fn a_controller_backs_a_volume_up_and_copies_it(bed: &Bed) -> Result<()> {
    let mut cinder = Cinder::start(bed)?;
    let (id, home) = cinder.create(bed, json!({}))?;
    let volume = Volume::known(&id)?;
    let attachment = cinder.attach(&volume, home)?;
    volume.write(home, &format!("{SOME} --count 200"))?.wait(PATIENCE)?;
    let backup = cinder.order(&json!({ "do": "backup", "volume": id, "force": true }))?;
    ensure!(backup["status"] == "available", "{backup}");
    nothing_is_left_of_a_visit(bed.c())?;
    // The guest goes on meanwhile; what it writes now is not in the backup.
    let (restored, restored_home) = cinder.create(bed, json!({}))?;
    let restored = Volume::filled(&restored, u64::from_str_radix(&id[..8], 16)?);
    volume.copy_state(home, &restored, restored_home)?;
    volume.write(home, &format!("{SOME} --count 50"))?.wait(PATIENCE)?;
    volume.verify(home)?;
    let order = json!({ "do": "restore", "backup": backup["id"], "volume": restored.id });
    let done = cinder.order(&order)?;
    ensure!(done["status"] == "available", "{done}");
    nothing_is_left_of_a_visit(bed.c())?;
    let attached = cinder.attach(&restored, restored_home)?;
    restored.verify(restored_home)?;
    cinder.detach(&attached)?;
    cinder.detach(&attachment)?;

    // Cinder copies the volume to the other pool, byte by byte.
    let other = if home.name() == bed.a().name() { bed.b() } else { bed.a() };
    let order = json!({ "do": "copy", "volume": id, "node": other.name() });
    let copied = cinder.order(&order)?;
    let host = format!("fleet@dmlocal#{}", other.name());
    ensure!(copied["status"] == "success" && copied["host"] == host.as_str(), "{copied}");
    nothing_is_left_of_a_visit(bed.c())?;
    volume.wait_until_gone(home)?;
    let new = copied["id"].as_str().context("no id")?;
    let mut copied = Volume::known(&id)?;
    copied.device = Volume::known(new)?.device;
    let attachment = cinder.attach(&copied, other)?;
    copied.carry_state(home, other)?;
    copied.verify(other)?;
    cinder.detach(&attachment)?;
    cinder.order(&json!({ "do": "delete_backup", "backup": backup["id"] }))?;
    for (volume, on) in [(&copied, other), (&restored, restored_home)] {
        volume.forget_writer(on)?;
        cinder.delete(volume)?;
    }
    cinder.end()
}

/// Waits until the controller visits a volume; tells which, and where it is at home.
fn visited<'a>(bed: &'a Bed, besides: &str) -> Result<(String, &'a Node)> {
    let seen = until("the controller's visit", PATIENCE, || {
        let volumes = ctl(bed.c(), "status")?;
        let visit = volumes.as_array().into_iter().flatten().find(|one| {
            one["state"] == "remote" && one["attached"] == true && one["id"] != besides
        });
        Ok(visit.cloned().ok_or_else(|| volumes.to_string()))
    })?;
    let id = seen["id"].as_str().context("no id")?.to_owned();
    Ok((id, of_name(bed, seen["source_node"].as_str())?))
}

/// The node that has a pool and that name.
fn of_name<'a>(bed: &'a Bed, name: Option<&str>) -> Result<&'a Node> {
    let nodes = [bed.a(), bed.b()];
    nodes.into_iter().find(|node| Some(node.name().as_str()) == name).context("it is nowhere")
}

fn nothing_is_left_of_a_visit(on: &Node) -> Result<()> {
    until("the visit to end", SOON, || {
        let volumes = ctl(on, "status")?;
        let none = volumes.as_array().is_some_and(Vec::is_empty);
        Ok(if none { Ok(()) } else { Err(volumes.to_string()) })
    })
}

/// Cinder's services on the third node, whose agent has no pool meanwhile.
struct Cinder<'a> {
    node: &'a Node,
    running: Option<Running>,
    heard: usize,
}

impl<'a> Cinder<'a> {
    /// Starts them; returns when the scheduler knows both pools.
    fn start(bed: &'a Bed) -> Result<Cinder<'a>> {
        let node = bed.c();
        controller::install(node)?;
        let prepare = format!(
            "set -e
            rm -rf {FOLDER}
            mkdir {FOLDER}
            cp /etc/dmlocal/pki/ca.pem /etc/dmlocal/pki/driver.* {FOLDER}
            touch {FOLDER}/orders
            cp /etc/dmlocal/dmlocald.toml {FOLDER}
            sed -i '/^\\[\\[pool\\]\\]/,$d' /etc/dmlocal/dmlocald.toml
            systemctl restart dmlocald"
        );
        node.shell(&prepare)?.ok()?;
        let mut cinder = Cinder { node, running: None, heard: 0 };
        let python = controller::PYTHON;
        // Orders come in a file: whoever runs a program on a node tells it once what to read.
        let mut line = format!(
            "cd {}; tail -n +1 -f {FOLDER}/orders | PYTHONDONTWRITEBYTECODE=1 \
             {python} -m cinder_dmlocal.tests.controller {FOLDER}",
            controller::DRIVER
        );
        for node in [bed.a(), bed.b(), bed.c()] {
            line += &format!(" {0}={0}:7450", node.name());
        }
        cinder.running = Some(node.spawn(&["sh", "-c", &line])?);
        let up = cinder.answer()?;
        ensure!(up["pools"].as_array().map_or(0, Vec::len) == 2, "{up}");
        Ok(cinder)
    }

    fn begin(&self, order: &Value) -> Result<()> {
        let append = format!("cat >>{FOLDER}/orders");
        let line = format!("{order}\n");
        self.node.exec_with(&["sh", "-c", &append], line.as_bytes(), SOON)?.ok().map(drop)
    }

    fn has_answered(&self) -> bool {
        let told = self.running.as_ref().map_or_else(String::new, Running::stdout);
        told.lines().count() > self.heard
    }

    fn answer(&mut self) -> Result<Value> {
        let running = self.running.as_ref().context("Cinder has ended")?;
        let heard = self.heard;
        let line = until("Cinder to answer", PATIENCE, || {
            let told = running.stdout();
            if running.has_ended() {
                bail!("Cinder has ended: {}", running.stderr());
            }
            let whole = told.rfind('\n').map_or("", |end| &told[..end]);
            Ok(whole.lines().nth(heard).map(str::to_owned).ok_or(told.clone()))
        })?;
        self.heard += 1;
        let answer: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
        ensure!(answer["error"].is_null(), "{answer}");
        Ok(answer)
    }

    fn order(&mut self, order: &Value) -> Result<Value> {
        self.begin(order)?;
        self.answer().with_context(|| order.to_string())
    }

    fn id(&mut self, order: &Value) -> Result<String> {
        Ok(self.order(order)?["id"].as_str().context("no id")?.to_owned())
    }

    /// Creates a volume; tells its id and where it is.
    fn create(&mut self, bed: &'a Bed, mut what: Value) -> Result<(String, &'a Node)> {
        what["do"] = "create".into();
        let created = self.order(&what)?;
        ensure!(created["status"] == "available", "{created}");
        let host = created["host"].as_str().and_then(|host| host.strip_prefix("fleet@dmlocal#"));
        let id = created["id"].as_str().context("no id")?.to_owned();
        Ok((id, of_name(bed, host)?))
    }

    /// Attaches a volume to the guest; the attachment's id is the answer.
    fn attach(&mut self, volume: &Volume, host: &Node) -> Result<String> {
        let order = json!({ "do": "attach", "volume": volume.id, "instance": GUEST,
            "host": host.name() });
        let attached = self.order(&order)?;
        ensure!(attached["path"] == volume.device.as_str(), "{attached}");
        Ok(attached["id"].as_str().context("no id")?.to_owned())
    }

    fn detach(&mut self, attachment: &str) -> Result<()> {
        let answer = self.order(&json!({ "do": "detach", "attachment": attachment }))?;
        ensure!(answer["status"] == 200, "{attachment} stays: {answer}");
        Ok(())
    }

    fn delete(&mut self, volume: &Volume) -> Result<()> {
        let deleted = self.order(&json!({ "do": "delete", "volume": volume.id }))?;
        ensure!(deleted["status"] == "gone", "{deleted}");
        Ok(())
    }

    /// Ends them, and gives the node its pool back.
    fn end(mut self) -> Result<()> {
        drop(self.running.take());
        let restore = format!(
            "set -e
            mv {FOLDER}/dmlocald.toml /etc/dmlocal/dmlocald.toml
            rm -rf {FOLDER}
            systemctl restart dmlocald"
        );
        self.node.shell(&restore)?.ok()?;
        until("the agent to be back", SOON, || {
            let shown = self.node.exec(&["dmlocalctl", "node", "show"])?;
            Ok(if shown.success() { Ok(()) } else { Err(shown.stderr) })
        })
    }
}
