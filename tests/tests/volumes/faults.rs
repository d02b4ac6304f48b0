//! Moves during which agents are killed, nodes lose power and cables are pulled.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use crate::bed::{Bed, LATER, SOON, Volume, ctl, kill_agent, until};

pub fn agents_killed_around_the_switch_go_on(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    let writer = volume.write(a, "")?;
    volume.start_move(a, b, "--hold --wait")?;
    volume.slow_down(b)?;
    for node in [a, b] {
        kill_agent(node)?;
        volume.wait_for(b, "held", SOON)?;
        volume.wait_for(a, "published", SOON)?;
        writer.progress()?;
    }
    writer.stop(a)?;
    volume.carry_state(a, b)?;

    // While it switches: the source first, so that the destination waits for it.
    a.exec(&["systemctl", "kill", "--signal", "STOP", "dmlocald"])?.ok()?;
    let switch = b.spawn(&["dmlocalctl", "volume", "switch", &volume.id])?;
    let writer = volume.write(b, "--rate 4")?;
    kill_agent(b)?;
    ensure!(!writer.has_written(), "a write was acknowledged before the source was fenced");
    kill_agent(a)?;
    // Whether it was lost or answered does not matter.
    let _ = switch.wait(LATER)?;
    writer.wait_for_first_write()?;
    volume.wait_for(b, "hydrating", SOON)?;
    volume.finish_move(a, b)?;
    writer.stop(b)?;
    volume.verify(b)?;
    volume.delete(b)
}

pub fn agents_killed_while_copying_go_on(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.move_slowly(a, b)?;
    let writer = volume.write(b, "--rate 4")?;
    for node in [a, b] {
        kill_agent(node)?;
        writer.progress()?;
        let seen = volume.status(b)?.context("the volume is gone")?;
        ensure!(seen["state"] == "hydrating", "{seen}");
    }
    volume.speed_up(b)?;
    // From the last regions on, as often as it gets up.
    let done = until("the volume to arrive", LATER, || {
        let seen = volume.status(b)?.context("the volume is gone")?;
        writer.check()?;
        if seen["state"] == "local" {
            return Ok(Ok(seen));
        }
        if seen["percent"].as_f64().is_some_and(|percent| percent > 90.0) {
            kill_agent(b)?;
        }
        Ok(Err(seen.to_string()))
    })?;
    ensure!(done["attached"] == true, "{done}");
    volume.wait_until_gone(a)?;
    writer.progress()?;
    writer.stop(b)?;
    volume.verify(b)?;
    volume.delete(b)
}

pub fn agents_killed_while_parting_go_on(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.move_slowly(a, b)?;
    let writer = volume.write(b, "--rate 4")?;
    // As long as somebody has it open, the source's logical volume cannot go.
    let path = format!("lvs --noheadings -o lv_path -S 'lv_name=~{}' @dmlocal", volume.id);
    let stays = format!("exec 3<$({path}); echo open; exec sleep infinity");
    let user = a.spawn(&["sh", "-c", &stays])?;
    user.wait_for_text("open", SOON)?;
    a.exec(&["systemctl", "kill", "--signal", "STOP", "dmlocald"])?.ok()?;
    volume.speed_up(b)?;
    // Everything is there, and the source does not answer.
    volume.wait_for(b, "collapsing", LATER)?;
    kill_agent(b)?;
    volume.wait_for(b, "collapsing", SOON)?;
    writer.progress()?;
    kill_agent(a)?;
    volume.wait_for(a, "releasing", SOON)?;
    kill_agent(a)?;
    volume.wait_for(a, "releasing", SOON)?;
    writer.progress()?;
    user.kill();
    volume.finish_move(a, b)?;
    writer.stop(b)?;
    volume.verify(b)?;
    volume.delete(b)
}

pub fn a_destination_that_lost_power_goes_on_copying(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.move_slowly(a, b)?;
    let writer = volume.write(b, "--durable --rate 4")?;
    writer.progress()?;
    b.kill()?;
    writer.lost();
    b.start()?;
    // The handle comes first, the connection to the source a moment later.
    let back = volume.wait_until(b, "the handle to be back", LATER, |seen| {
        seen["device_path"] == volume.device.as_str() && seen["state"] == "hydrating"
    })?;
    ensure!(back["attached"] == true, "{back}");
    // Every byte is right with a part of them still at the source.
    volume.verify(b)?;
    let writer = volume.write(b, "--rate 4")?;
    writer.progress()?;
    volume.finish_move(a, b)?;
    writer.stop(b)?;
    volume.verify(b)?;
    volume.delete(b)
}

pub fn a_source_that_lost_power_is_waited_for(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.move_slowly(a, b)?;
    let writer = volume.write(b, "--rate 4")?;
    writer.progress()?;
    a.kill()?;
    let stalled = volume.wait_for(b, "stalled", LATER)?;
    ensure!(stalled["stalled_since_s"].is_u64(), "{stalled}");
    writer.check()?;
    a.start()?;
    volume.wait_for(b, "hydrating", LATER)?;
    writer.progress()?;
    volume.finish_move(a, b)?;
    writer.stop(b)?;
    volume.verify(b)?;
    volume.delete(b)
}

pub fn a_source_behind_a_pulled_cable_is_waited_for(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.move_slowly(a, b)?;
    let writer = volume.write(b, "--rate 4")?;
    writer.progress()?;
    a.set_link(false)?;
    // Long enough for every timeout of the transport's.
    let away = Duration::from_secs(30);
    let pulled = SystemTime::now().duration_since(UNIX_EPOCH)?;
    volume.wait_until(b, "a long stall", LATER, |seen| {
        let long =
            SystemTime::now().duration_since(UNIX_EPOCH).is_ok_and(|now| now > pulled + away);
        seen["state"] == "stalled" && long
    })?;
    writer.check()?;
    a.set_link(true)?;
    volume.wait_for(b, "hydrating", LATER)?;
    writer.progress()?;
    // The agents find each other again, too.
    ctl(b, "--endpoint https://node-a:7450 status")?;
    volume.finish_move(a, b)?;
    writer.stop(b)?;
    volume.verify(b)?;
    volume.delete(b)
}
