//! What Nova does with instances whose volumes are on nodes.

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::Node;
use serde_json::json;

use crate::bed::{Bed, LATER, SOON, Volume, ctl};
use crate::cloud::{Guest, Nova, SOME};

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
    are_only_on(b, a, [&guest.volume, &sent])?;
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

pub fn a_guest_returns_before_its_volume_has_arrived(bed: &Bed) -> Result<()> {
    let mut nova = Nova::start(bed)?;
    let (a, b) = (bed.a(), bed.b());
    let volume = nova.volume(a, true)?;
    let server = nova.text(&json!({ "do": "boot", "host": a.name(), "volumes": [volume.id] }))?;
    let mut guest = Guest { server, volume, writer: None };
    // What it does not write again is left to be copied.
    guest.volume.write(a, "--blank --first 131072 --count 4000")?.wait(LATER)?;
    guest.run(a)?;

    nova.begin(&guest, b)?;
    guest.volume.wait_for(b, "held", SOON)?;
    guest.volume.slow_down(b)?;
    guest.migrates(&mut nova, a, b)?;

    // Back, and given up when both nodes had it.
    nova.begin(&guest, a)?;
    guest.volume.wait_for(a, "held", SOON)?;
    is_far_from_whole(&guest.volume, b)?;
    nova.order(&json!({ "do": "abort_live_migration", "server": guest.server }))?;
    nova.ended(&guest, &["cancelled"])?;
    nova.attached(&guest, &[b])?;
    guest.progress()?;

    // Back for good, from where it lacks most of what it has left here.
    nova.begin(&guest, a)?;
    guest.volume.wait_for(a, "held", SOON)?;
    is_far_from_whole(&guest.volume, b)?;
    guest.migrates(&mut nova, b, a)?;
    guest.volume.speed_up(b)?;
    guest.arrives(&mut nova, a)?;
    guest.stop(a)?;
    guest.volume.verify(a)?;
    guest.volume.forget_writer(a)?;
    guest.volume.forget_writer(b)?;
    nova.order(&json!({ "do": "delete", "server": guest.server }))?;
    nova.delete(&guest.volume)
}

fn are_only_on(home: &Node, other: &Node, volumes: [&Volume; 2]) -> Result<()> {
    for volume in volumes {
        volume.wait_for(home, "local", LATER)?;
        volume.wait_until_gone(other)?;
    }
    Ok(())
}

fn is_far_from_whole(volume: &Volume, on: &Node) -> Result<()> {
    let seen = volume.status(on)?.context("it has left")?;
    ensure!(seen["percent"].as_f64().is_some_and(|percent| percent < 90.0), "{seen}");
    Ok(())
}

pub fn a_guest_stays_where_its_volumes_cannot_follow(bed: &Bed) -> Result<()> {
    let mut nova = Nova::start(bed)?;
    let (a, b) = (bed.a(), bed.b());
    let (volume, more) = (nova.volume(a, true)?, nova.volume(a, false)?);
    let order = json!({ "do": "boot", "host": a.name(), "volumes": [volume.id, more.id] });
    let mut guest = Guest { server: nova.text(&order)?, volume, writer: None };
    guest.run(a)?;
    let writer = more.write(a, SOME)?;
    let migrate = json!({ "do": "live_migrate", "server": guest.server, "to": b.name() });

    // There is room for the first volume, and none for the second.
    let free = ctl(b, "pool list")?[0]["free_bytes"].as_u64().context("no free_bytes")?;
    let filler = Volume::create(b, u32::try_from((free >> 20).saturating_sub(1536))?)?;
    nova.says(&migrate, &["failed", "error"])?;
    are_only_on(a, b, [&guest.volume, &more])?;
    guest.progress()?;
    writer.progress()?;
    let reserved = nova.order(&json!({ "do": "attached", "volume": more.id }))?;
    ensure!(reserved == json!([a.name(), "reserved"]), "{reserved}");
    filler.delete(b)?;

    // There is room, and the hypervisor there does not take the guest.
    nova.order(&json!({ "do": "fail", "event": "await", "host": b.name() }))?;
    nova.says(&migrate, &["failed", "error"])?;
    are_only_on(a, b, [&guest.volume, &more])?;
    guest.progress()?;
    writer.progress()?;

    // What Nova has reserved in vain goes when it starts the instance anew.
    guest.stop(a)?;
    writer.stop(a)?;
    nova.says(&json!({ "do": "reboot", "server": guest.server }), &["ACTIVE"])?;
    guest.run(a)?;
    let writer = more.write(a, SOME)?;
    nova.attached(&guest, &[a])?;

    // What is connected already is connected again, and stays while it is used.
    nova.order(&json!({ "do": "connect_again", "volume": guest.volume.id }))?;
    guest.progress()?;
    let told = nova.order(&json!({ "do": "force_detach", "volume": guest.volume.id }))?;
    ensure!(told == 500, "a volume in use is detached by force: {told}");
    guest.stays(&mut nova, a, b)?;

    // Another size on another host, for good.
    guest.stop(a)?;
    writer.stop(a)?;
    let resize = json!({ "do": "resize", "server": guest.server, "flavor": "2" });
    nova.says(&resize, &["VERIFY_RESIZE"])?;
    more.carry_state(a, b)?;
    more.verify(b)?;
    let writer = more.write(b, SOME)?;
    guest.volume.carry_state(a, b)?;
    guest.volume.verify(b)?;
    guest.run(b)?;
    nova.says(&json!({ "do": "confirm", "server": guest.server }), &["ACTIVE"])?;
    are_only_on(b, a, [&guest.volume, &more])?;
    nova.attached(&guest, &[b])?;

    // Nobody writes any more, and an operator detaches by force.
    guest.stop(b)?;
    writer.stop(b)?;
    for volume in [&guest.volume, &more] {
        volume.verify(b)?;
        volume.forget_writer(a)?;
        volume.forget_writer(b)?;
    }
    let told = nova.order(&json!({ "do": "force_detach", "volume": more.id }))?;
    ensure!(told == 202, "it stays: {told}");
    let left = nova.order(&json!({ "do": "attached", "volume": more.id }))?;
    ensure!(left == json!([]), "{left}");
    nova.order(&json!({ "do": "delete", "server": guest.server }))?;
    nova.delete(&more)?;
    nova.delete(&guest.volume)
}
