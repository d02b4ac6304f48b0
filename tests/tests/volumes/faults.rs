//! Moves during which agents are killed, nodes lose power and cables are pulled.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::{Node, Running};

use crate::bed::{Bed, LATER, SOON, Volume, ctl, kill_agent, kill_agents_during, until};

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

pub fn agents_killed_while_a_volume_arrives_go_on(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    let writer = volume.write(a, "")?;
    // Killed as soon as it is known there, which is another moment each time.
    let killed_on_the_way = |flags: &str| -> Result<()> {
        let line = "dmlocalctl ".to_owned() + &volume.move_line(a, b, flags);
        let order = b.spawn(&line.split_whitespace().collect::<Vec<_>>())?;
        until("the volume to be on its way", SOON, || {
            Ok(volume.status(b)?.ok_or_else(|| "not there".to_owned()).map(drop))
        })?;
        kill_agent(b)?;
        // Its caller may or may not have had the answer.
        order.wait(LATER).map(drop)
    };
    for _ in 0..2 {
        killed_on_the_way("--hold")?;
        volume.wait_for(b, "held", SOON)?;
        writer.progress()?;
        ctl(b, &format!("volume abort {}", volume.id))?;
        volume.wait_until_gone(b)?;
        volume.wait_for(a, "local", SOON)?;
    }
    writer.stop(a)?;
    volume.carry_state(a, b)?;
    ctl(a, &format!("volume detach {}", volume.id))?;
    killed_on_the_way("")?;
    let writer = volume.write(b, "--rate 4")?;
    writer.wait_for_first_write()?;
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
        // Asked to stop, they leave everything as it is just the same.
        node.exec(&["systemctl", "restart", "dmlocald"])?.ok()?;
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
    let stays = format!("exec 3<$(echo $({path})); echo open; exec sleep infinity");
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

pub fn a_destination_boots_while_its_source_is_away(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.move_slowly(a, b)?;
    let writer = volume.write(b, "--count 50")?;
    writer.stop(b)?;
    a.kill()?;
    volume.wait_for(b, "stalled", LATER)?;
    b.reboot()?;
    // The device is there although what it lacks is not.
    volume.wait_until(b, "the handle", LATER, |seen| {
        seen["device_path"] == volume.device.as_str() && seen["state"] == "stalled"
    })?;
    let attached = ctl(b, &format!("volume attach {}", volume.id))?;
    ensure!(attached["device_path"] == volume.device.as_str(), "{attached}");
    a.start()?;
    volume.wait_for(b, "hydrating", LATER)?;
    volume.verify(b)?;
    volume.finish_move(a, b)?;
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
    volume.wait_until(b, "why", SOON, |seen| {
        let detail = seen["detail"].as_str().unwrap_or_default();
        detail.starts_with("stalled: source node-a unreachable since 2")
            && detail.ends_with(" bytes still there")
    })?;
    // dm-clone would not tell that it cannot go on: it is told to stop.
    let clone = b.shell("dmsetup status --noflush --target clone")?.ok()?;
    ensure!(clone.contains(" no_hydration "), "{clone}");
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

/// What fio writes into a volume, and reads again: every block carries a checksum.
fn fio(volume: &Volume, flags: &str) -> Vec<String> {
    let line = format!(
        "fio --name=check --filename={} --direct=1 --ioengine=libaio --iodepth=4 \
         --rw=randwrite --bs=4k --size=2m --randseed=7 --verify=crc32c --verify_fatal=1 \
         --verify_state_save=0 --status-interval=1 {flags}",
        volume.device
    );
    line.split_whitespace().map(str::to_owned).collect()
}

pub fn fio_verifies_while_agents_are_killed(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    // Full, because what was never written is at the destination at once.
    let volume = Volume::create_full(a, 32)?;
    let run = |on: &Node, flags: &str| -> Result<()> {
        let argv = fio(&volume, flags);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        on.exec(&argv)?.ok().map(drop)
    };
    // Writes everything once, at a pace that leaves time to kill, and then reads it.
    let begin = |on: &Node| -> Result<Running> {
        let argv = fio(&volume, "--rate_iops=40");
        on.spawn(&argv.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let kill_both = |at_work: Running| -> Result<()> {
        at_work.wait_for_text("write: IOPS", SOON)?;
        kill_agents_during(&at_work, [a, b])?;
        at_work.wait(LATER)?.ok().map(drop)
    };

    volume.start_move(a, b, "--hold --wait")?;
    volume.slow_down(b)?;
    kill_both(begin(a)?)?;
    volume.wait_for(b, "held", SOON)?;

    // Its first write at the destination waits for the source's agent.
    a.exec(&["systemctl", "kill", "--signal", "STOP", "dmlocald"])?.ok()?;
    run(b, "--verify_only")?;
    let at_work = begin(b)?;
    let switch = b.spawn(&["dmlocalctl", "volume", "switch", &volume.id])?;
    kill_agent(b)?;
    kill_agent(a)?;
    // Whether its caller had the answer does not matter.
    let _ = switch.wait(LATER)?;
    at_work.wait(LATER)?.ok()?;

    volume.wait_for(b, "hydrating", SOON)?;
    kill_both(begin(b)?)?;

    a.exec(&["systemctl", "kill", "--signal", "STOP", "dmlocald"])?.ok()?;
    volume.speed_up(b)?;
    volume.wait_for(b, "collapsing", LATER)?;
    kill_both(begin(b)?)?;
    volume.finish_move(a, b)?;
    run(b, "--verify_only")?;
    volume.delete(b)
}
