//! Volumes that are used on one node while their data is on another.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::Node;

use crate::bed::{Bed, LATER, SOON, Volume, ctl, kill_agent, refused, until};

/// Uses b's part of a move that has begun: the data stays at a.
fn borrow<'a>(bed: &'a Bed, volume: &Volume, flags: &str) -> Result<(&'a Node, &'a Node)> {
    let (a, b) = (bed.a(), bed.b());
    let held = volume.start_move(a, b, &format!("--hold --wait {flags}"))?;
    ensure!(held["state"] == "held", "{held}");
    ctl(b, &format!("volume switch {}", volume.id))?;
    let used = volume.wait_for(b, "remote", SOON)?;
    ensure!(used["source_node"] == "node-a" && used["percent"].is_null(), "{used}");
    ensure!(used["bytes_left"] == used["size_bytes"] && used["pool"] == "", "{used}");
    Ok((a, b))
}

/// A volume that was written at a, where its data is, and is used at b now.
fn used_at_b(bed: &Bed) -> Result<Volume> {
    let volume = Volume::create_full(bed.a(), 32)?;
    volume.write(bed.a(), "--count 50")?.stop(bed.a())?;
    volume.carry_state(bed.a(), bed.b())?;
    borrow(bed, &volume, "--remote")?;
    Ok(volume)
}

pub fn a_volume_is_written_elsewhere_and_comes_home(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    let writer = volume.write(a, "")?;
    let held = volume.start_move(a, b, "--hold --wait --remote")?;
    ensure!(held["state"] == "held" && held["device_path"] == volume.device.as_str(), "{held}");
    writer.progress()?;
    writer.stop(a)?;
    volume.carry_state(a, b)?;
    volume.verify(b)?;
    ensure!(volume.status(b)?.is_some_and(|seen| seen["state"] == "held"), "reading is no signal");

    // The first write asks for it.
    let writer = volume.write(b, "")?;
    writer.wait_for_first_write()?;
    volume.wait_for(b, "remote", SOON)?;
    let fenced = volume.status(a)?.context("the source has no such volume")?;
    ensure!(fenced["state"] == "fenced" && fenced["peer_node"] == "node-b", "{fenced}");
    let write = format!("oflag=direct if=/dev/zero bs=4096 count=1 of={}", volume.device);
    let dd: Vec<&str> = ["dd"].into_iter().chain(write.split_whitespace()).collect();
    ensure!(!a.exec(&dd)?.success(), "the fenced source takes writes");
    for node in [a, b] {
        kill_agent(node)?;
        writer.progress()?;
    }
    refused(b, &format!("volume extend {} --size 64MiB", volume.id), "VOLUME_REMOTE")?;
    refused(b, &format!("volume delete {}", volume.id), "VOLUME_REMOTE")?;
    refused(a, &format!("volume attach {}", volume.id), "VOLUME_FENCED")?;
    writer.stop(b)?;
    volume.verify(b)?;
    let lvs = b.shell("lvs --noheadings -o lv_name @dmlocal")?.ok()?;
    ensure!(lvs.is_empty(), "something is kept at the other node: {lvs}");

    ctl(b, &format!("volume detach {}", volume.id))?;
    volume.wait_until_gone(b)?;
    let home = volume.wait_for(a, "local", SOON)?;
    ensure!(home["generation"] == 3 && home["attached"] == false, "{home}");
    volume.carry_state(b, a)?;
    ctl(a, &format!("volume attach {}", volume.id))?;
    volume.verify(a)?;
    let writer = volume.write(a, "")?;
    writer.progress()?;
    writer.stop(a)?;
    volume.verify(a)?;

    // What has come home is a volume like any other.
    volume.start_move(a, b, "--hold --wait")?;
    volume.carry_state(a, b)?;
    ctl(b, &format!("volume switch {}", volume.id))?;
    volume.finish_move(a, b)?;
    volume.verify(b)?;
    volume.delete(b)
}

pub fn a_remote_volume_is_localized_under_load(bed: &Bed) -> Result<()> {
    let volume = used_at_b(bed)?;
    let (a, b) = (bed.a(), bed.b());
    // It goes on with what it knows, and has the device open all the time.
    let writer = volume.write(b, "")?;
    writer.progress()?;
    let localized = ctl(b, &format!("volume localize {}", volume.id))?;
    ensure!(localized["generation"] == 2, "{localized}");
    writer.progress()?;
    for node in [a, b] {
        kill_agent(node)?;
        writer.progress()?;
    }
    volume.finish_move(a, b)?;
    writer.progress()?;
    writer.stop(b)?;
    volume.verify(b)?;
    let table = b.exec(&["dmsetup", "table", &volume.device])?.ok()?;
    ensure!(table.contains("linear") && table.lines().count() == 1, "{table}");
    volume.delete(b)
}

pub fn a_remote_volume_moves_on_once_it_is_being_copied(bed: &Bed) -> Result<()> {
    let volume = used_at_b(bed)?;
    let (a, b) = (bed.a(), bed.b());
    let writer = volume.write(b, "")?;
    writer.progress()?;
    refused(b, &volume.move_line(b, a, "--hold"), "VOLUME_REMOTE")?;
    ctl(b, &format!("volume localize {}", volume.id))?;
    // As Cinder's driver does it when a guest migrates: at once.
    ctl(a, &format!("volume detach {}", volume.id))?;
    volume.start_move(b, a, "--hold --wait")?;
    writer.progress()?;
    writer.stop(b)?;
    volume.carry_state(b, a)?;
    let writer = volume.write(a, "")?;
    writer.wait_for_first_write()?;
    volume.wait_for(a, "local", LATER)?;
    volume.wait_until_gone(b)?;
    volume.wait_until_alone(a)?;
    writer.stop(a)?;
    volume.verify(a)?;
    volume.delete(a)
}

pub fn a_remote_volume_waits_for_a_pulled_cable(bed: &Bed) -> Result<()> {
    let volume = used_at_b(bed)?;
    let (a, b) = (bed.a(), bed.b());
    let writer = volume.write(b, "")?;
    writer.progress()?;
    a.set_link(false)?;
    volume.wait_until(b, "the source to be missed", LATER, |seen| {
        seen["stalled_since_s"].is_u64() && seen["state"] == "remote"
    })?;
    // That nothing fails is no event that could be awaited: a while without one is.
    thread::sleep(Duration::from_secs(15));
    writer.check()?;
    a.set_link(true)?;
    writer.progress()?;
    volume.wait_until(b, "the source to be back", LATER, |seen| {
        seen["stalled_since_s"].is_null() && seen["state"] == "remote"
    })?;
    writer.stop(b)?;
    volume.verify(b)?;
    volume.delete_at_home(a, b)
}

pub fn a_remote_volume_stops_with_the_power_of_its_source(bed: &Bed) -> Result<()> {
    let volume = used_at_b(bed)?;
    let (a, b) = (bed.a(), bed.b());
    let writer = volume.write(b, "--durable")?;
    writer.progress()?;
    a.kill()?;
    volume
        .wait_until(b, "the source to be missed", LATER, |seen| seen["stalled_since_s"].is_u64())?;
    writer.check()?;
    a.start()?;
    until("the volume to fail", LATER, || {
        let seen = volume.status(b)?.context("the volume is gone")?;
        let told = seen["detail"].as_str().is_some_and(|why| why.contains("lost power"));
        Ok(if seen["state"] == "failed" && told { Ok(()) } else { Err(seen.to_string()) })
    })?;
    // It was told that its requests failed, and is gone.
    writer.lost();
    until("the volume to go home", LATER, || {
        let detached = b.exec(&["dmlocalctl", "volume", "detach", &volume.id])?;
        Ok(if detached.success() { Ok(()) } else { Err(detached.stderr) })
    })?;
    volume.wait_until_gone(b)?;
    volume.wait_for(a, "local", LATER)?;
    volume.carry_state(b, a)?;
    ctl(a, &format!("volume attach {}", volume.id))?;
    // What was flushed is there.
    volume.verify(a)?;
    volume.delete(a)
}

pub fn a_remote_volume_outlives_the_power_of_its_user(bed: &Bed) -> Result<()> {
    let volume = used_at_b(bed)?;
    let (a, b) = (bed.a(), bed.b());
    let writer = volume.write(b, "--durable")?;
    writer.progress()?;
    b.kill()?;
    writer.lost();
    b.start()?;
    volume.wait_until(b, "the handle to be back", LATER, |seen| {
        seen["device_path"] == volume.device.as_str() && seen["state"] == "remote"
    })?;
    volume.verify(b)?;
    let writer = volume.write(b, "")?;
    writer.progress()?;
    writer.stop(b)?;
    volume.verify(b)?;
    volume.delete_at_home(a, b)
}

pub fn a_remote_volume_is_taken_back_from_a_lost_node(bed: &Bed) -> Result<()> {
    let volume = used_at_b(bed)?;
    let (a, b) = (bed.a(), bed.b());
    let lost = volume.write(b, "")?;
    lost.progress()?;
    b.set_link(false)?;
    refused(a, &format!("volume attach {}", volume.id), "VOLUME_FENCED")?;
    refused(a, &format!("volume reclaim {} --from node-c", volume.id), "GRANT_UNKNOWN")?;
    let back = ctl(a, &format!("volume reclaim {} --from node-b", volume.id))?;
    ensure!(back["state"] == "local" && back["generation"] == 3, "{back}");
    ctl(a, &format!("volume attach {}", volume.id))?;
    volume.copy_state(b, &volume, a)?;
    volume.verify(a)?;
    let writer = volume.write(a, "")?;
    writer.progress()?;

    // Whoever still waits there reads and writes nothing any more.
    lost.check()?;
    b.set_link(true)?;
    volume.wait_until_gone(b)?;
    until("whoever waited to hear of it", SOON, || {
        Ok(match lost.check() {
            Ok(()) => Err("it waits".to_owned()),
            Err(_) => Ok(()),
        })
    })?;
    lost.lost();
    writer.progress()?;
    writer.stop(a)?;
    volume.verify(a)?;
    volume.forget_writer(b)?;
    volume.start_move(a, b, "--hold --wait")?;
    volume.carry_state(a, b)?;
    ctl(b, &format!("volume switch {}", volume.id))?;
    volume.finish_move(a, b)?;
    volume.verify(b)?;
    volume.delete(b)
}

pub fn a_full_pool_makes_a_move_remote_and_room_makes_it_local(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.write(a, "--count 50")?.stop(a)?;
    volume.carry_state(a, b)?;
    let free = ctl(b, "pool list")?[0]["free_bytes"].as_u64().context("no free_bytes")?;
    let filler = Volume::create(b, u32::try_from((free >> 20).saturating_sub(16))?)?;
    refused(b, &volume.move_line(a, b, "--hold --local"), "NO_ROOM")?;
    refused(b, &volume.move_line(a, b, "--hold"), "NO_ROOM")?;
    b.shell(
        "set -e
        cp /etc/dmlocal/dmlocald.toml /root/dmlocald.toml
        printf '\n[receive]\nwhen_full = \"remote\"\n' >>/etc/dmlocal/dmlocald.toml
        dmlocald check-config
        systemctl restart dmlocald",
    )?
    .ok()?;
    let outcome = (|| {
        borrow(bed, &volume, "")?;
        let writer = volume.write(b, "")?;
        writer.progress()?;
        refused(b, &format!("volume localize {}", volume.id), "NO_ROOM")?;
        filler.delete(b)?;
        volume.finish_move(a, b)?;
        writer.progress()?;
        writer.stop(b)?;
        volume.verify(b)
    })();
    b.shell("mv /root/dmlocald.toml /etc/dmlocal/dmlocald.toml; systemctl restart dmlocald")?
        .ok()?;
    outcome?;
    until("the agent to be back", SOON, || {
        let shown = b.exec(&["dmlocalctl", "node", "show"])?;
        Ok(if shown.success() { Ok(()) } else { Err(shown.stderr) })
    })?;
    volume.delete(b)
}
