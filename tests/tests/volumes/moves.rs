//! Moves that nothing disturbs, and what must not happen during one.

use anyhow::{Context, Result, ensure};

use crate::bed::{Bed, LATER, SOON, Volume, ctl, kill_agent, refusal, refused, until};

pub fn a_volume_moves_while_it_is_written(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    let writer = volume.write(a, "")?;
    writer.progress()?;

    let held = volume.start_move(a, b, "--hold --wait")?;
    ensure!(held["state"] == "held" && held["attached"] == true, "{held}");
    ensure!(held["device_path"] == volume.device.as_str(), "{held}");
    ensure!(held["source_node"] == "node-a", "{held}");
    let published = volume.status(a)?.context("the source has no such volume")?;
    ensure!(published["state"] == "published", "{published}");
    ensure!(published["peer_node"] == "node-b", "{published}");
    writer.progress()?;
    writer.stop(a)?;
    volume.carry_state(a, b)?;
    volume.slow_down(b)?;

    let usable = ctl(b, &format!("volume switch {}", volume.id))?;
    ensure!(usable["state"] == "hydrating", "{usable}");
    ensure!(usable["generation"] == published["generation"].as_u64().unwrap_or(0) + 1, "{usable}");
    ensure!(usable["percent"].as_f64().is_some_and(|percent| percent < 50.0), "{usable}");
    let writer = volume.write(b, "--rate 8")?;
    writer.wait_for_first_write()?;
    writer.progress()?;
    volume.finish_move(a, b)?;
    refused(a, &format!("volume show {}", volume.id), "VOLUME_NOT_FOUND")?;
    writer.progress()?;
    writer.stop(b)?;
    volume.verify(b)?;
    let table = b.exec(&["dmsetup", "table", &volume.device])?.ok()?;
    ensure!(table.contains("linear") && table.lines().count() == 1, "{table}");
    volume.delete(b)
}

pub fn writes_overlap_with_copying(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.move_slowly(a, b)?;
    let writer = volume.write(b, "--rate 8")?;
    let percent = || -> Result<f64> {
        let seen = volume.status(b)?.context("the volume is gone")?;
        seen["percent"].as_f64().with_context(|| format!("no percent in {seen}"))
    };
    writer.progress()?;
    let before = percent()?;
    // Copying goes on while it is written, and is not over before it was written.
    until("copying to go on", LATER, || {
        writer.check()?;
        let now = percent()?;
        Ok(if now > before + 5.0 { Ok(()) } else { Err(format!("{now} %")) })
    })?;
    writer.progress()?;
    let state = volume.status(b)?.context("the volume is gone")?;
    ensure!(state["state"] == "hydrating", "{state}");
    volume.finish_move(a, b)?;
    writer.progress()?;
    writer.stop(b)?;
    volume.verify(b)?;
    volume.delete(b)
}

pub fn the_first_write_at_the_destination_switches_over(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.write(a, "--count 100")?.stop(a)?;
    volume.start_move(a, b, "--hold --wait")?;
    volume.slow_down(b)?;
    volume.carry_state(a, b)?;
    // Reading is no signal.
    volume.verify(b)?;
    ensure!(volume.status(b)?.is_some_and(|seen| seen["state"] == "held"));

    let writer = volume.write(b, "")?;
    writer.wait_for_first_write()?;
    volume.wait_for(b, "hydrating", SOON)?;
    let fenced = volume.status(a)?.context("the source has no such volume")?;
    ensure!(fenced["state"] == "fenced", "{fenced}");
    let write = format!("oflag=direct if=/dev/zero bs=4096 count=1 of={}", volume.device);
    let dd: Vec<&str> = ["dd"].into_iter().chain(write.split_whitespace()).collect();
    ensure!(!a.exec(&dd)?.success(), "the fenced source takes writes");
    volume.finish_move(a, b)?;
    writer.stop(b)?;
    volume.verify(b)?;
    volume.delete(b)
}

pub fn a_source_that_is_still_written_is_not_fenced(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    let writer = volume.write(a, "")?;
    writer.progress()?;
    volume.start_move(a, b, "--hold --wait")?;
    // Not the guest: a flush, as a QEMU sends that waits for its guest.
    b.exec(&["sync", &volume.device])?.ok()?;
    let held = volume.status(b)?.context("the destination has no such volume")?;
    ensure!(held["state"] == "held" && held["held_writes"] == 0, "{held}");
    writer.progress()?;
    let switch = format!("volume switch {}", volume.id);
    refused(b, &switch, "SOURCE_ACTIVE")?;
    for _ in 0..3 {
        writer.progress()?;
    }
    let held = volume.status(b)?.context("the destination has no such volume")?;
    ensure!(held["state"] == "held", "{held}");
    let published = volume.status(a)?.context("the source has no such volume")?;
    ensure!(published["state"] == "published", "{published}");
    // Once it is not written any more, the switch goes on by itself.
    writer.stop(a)?;
    volume.carry_state(a, b)?;
    volume.wait_until(b, "the switch", SOON, |seen| seen["state"] != "held")?;
    volume.finish_move(a, b)?;
    volume.verify(b)?;
    // Somebody's word goes before what the source sees, which then meets errors.
    volume.start_move(b, a, "--hold --wait")?;
    let stubborn = volume.write(b, "")?;
    stubborn.wait_for_first_write()?;
    refused(a, &switch, "SOURCE_ACTIVE")?;
    ctl(a, &format!("{switch} --force"))?;
    until("the writer to be cut off", SOON, || {
        Ok(if stubborn.check().is_err() { Ok(()) } else { Err(String::new()) })
    })?;
    stubborn.lost();
    volume.carry_state(b, a)?;
    volume.finish_move(b, a)?;
    volume.verify(a)?;
    volume.delete(a)
}

pub fn a_detached_volume_moves_cold_and_an_attached_one_does_not(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.write(a, "--count 200")?.stop(a)?;
    refused(b, &volume.move_line(a, b, ""), "VOLUME_ATTACHED")?;
    ensure!(volume.status(b)?.is_none(), "a refused move left something behind");
    volume.verify(a)?;

    ctl(a, &format!("volume detach {}", volume.id))?;
    volume.carry_state(a, b)?;
    let usable = volume.start_move(a, b, "")?;
    ensure!(usable["device_path"] == volume.device.as_str(), "{usable}");
    let writer = volume.write(b, "")?;
    volume.finish_move(a, b)?;
    writer.stop(b)?;
    volume.verify(b)?;
    volume.delete(b)
}

pub fn an_aborted_move_leaves_the_source_writing(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    let writer = volume.write(a, "")?;
    // The second time as if the first had never been.
    for _ in 0..2 {
        volume.start_move(a, b, "--hold --wait")?;
        ctl(b, &format!("volume abort {}", volume.id))?;
        volume.wait_until_gone(b)?;
        let local = volume.wait_for(a, "local", SOON)?;
        ensure!(local["attached"] == true && local["generation"] == 1, "{local}");
        writer.progress()?;
    }
    writer.stop(a)?;
    volume.verify(a)?;
    volume.delete(a)
}

pub fn a_write_that_waits_at_the_destination_forbids_an_abort(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.write(a, "--count 50")?.stop(a)?;
    volume.carry_state(a, b)?;
    volume.start_move(a, b, "--hold --wait")?;
    a.exec(&["systemctl", "stop", "dmlocald"])?.ok()?;
    let writer = volume.write(b, "")?;
    volume.wait_until(b, "the write to wait", SOON, |seen| {
        seen["held_writes"].as_u64().is_some_and(|count| count > 0)
    })?;
    let reason = refusal(b, &format!("--timeout 20 volume abort {}", volume.id))?;
    let right = ["WRITTEN_AT_DESTINATION", "GRANT_FENCED"];
    ensure!(right.contains(&reason.as_str()), "refused with {reason}");
    ensure!(!writer.has_written(), "a write was acknowledged before the source was fenced");
    a.exec(&["systemctl", "start", "dmlocald"])?.ok()?;
    writer.wait_for_first_write()?;
    volume.finish_move(a, b)?;
    writer.stop(b)?;
    volume.verify(b)?;
    volume.delete(b)
}

pub fn discards_are_refused_until_everything_is_here(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.write(a, "--count 50")?.stop(a)?;
    volume.carry_state(a, b)?;
    volume.move_slowly(a, b)?;
    let device = &volume.device;
    let limit =
        format!("cat /sys/block/$(basename $(readlink -f {device}))/queue/discard_max_bytes");
    let discard = format!("blkdiscard --offset 4194304 --length 1048576 {device}");
    ensure!(b.shell(&limit)?.ok()? == "0", "the handle advertises discards");
    ensure!(!b.shell(&discard)?.success(), "a discard was taken");
    volume.verify(b)?;
    volume.finish_move(a, b)?;
    volume.verify(b)?;
    ensure!(b.shell(&limit)?.ok()? != "0", "the handle never takes discards again");
    b.shell(&discard)?.ok()?;
    let zeros = format!("cmp --bytes 1048576 --ignore-initial 4194304:0 {device} /dev/zero");
    b.shell(&zeros)?.ok()?;
    volume.delete(b)
}

pub fn what_a_page_cache_holds_at_the_source_arrives(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create(a, 32)?;
    // Through the page cache, and not closed: closing would write it back.
    let writes = format!(
        "dd if=/dev/urandom of=/root/data bs=1M count=8 status=none
        sync /root/data
        exec 3<>{}
        cat /root/data >&3
        echo written
        exec sleep infinity",
        volume.device
    );
    let user = a.spawn(&["sh", "-c", &writes])?;
    user.wait_for_text("written", SOON)?;
    let dirty = a.shell("awk '/^Dirty/ {print $2}' /proc/meminfo")?.ok()?;
    ensure!(dirty.parse::<u64>()? >= 4096, "it was written back already: {dirty} KiB are dirty");
    let sum = a.shell("head --bytes 8M /root/data | cksum")?.ok()?;
    volume.start_move(a, b, "--hold --wait")?;
    ctl(b, &format!("volume switch {}", volume.id))?;
    let arrived = b.shell(&format!("head --bytes 8M {} | cksum", volume.device))?.ok()?;
    ensure!(sum == arrived, "{sum} was written, {arrived} arrived");
    user.kill();
    a.shell("rm /root/data")?.ok()?;
    volume.finish_move(a, b)?;
    volume.delete(b)
}

pub fn two_volumes_pass_each_other(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let (there, back) = (Volume::create_full(a, 32)?, Volume::create_full(b, 32)?);
    there.start_move(a, b, "--hold")?;
    back.start_move(b, a, "--hold")?;
    there.slow_down(b)?;
    back.slow_down(a)?;
    let (one, two) = (there.write(b, "")?, back.write(a, "")?);
    one.wait_for_first_write()?;
    two.wait_for_first_write()?;
    there.finish_move(a, b)?;
    back.finish_move(b, a)?;
    one.stop(b)?;
    two.stop(a)?;
    there.verify(b)?;
    back.verify(a)?;
    there.delete(b)?;
    back.delete(a)
}

pub fn a_volume_does_not_return_below_an_open_old_handle(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.write(a, "--count 50")?.stop(a)?;
    volume.carry_state(a, b)?;
    let stays = format!("exec 3<{}; echo open; exec sleep infinity", volume.device);
    let user = a.spawn(&["sh", "-c", &stays])?;
    user.wait_for_text("open", SOON)?;

    volume.start_move(a, b, "--hold --wait")?;
    let writer = volume.write(b, "")?;
    volume.finish_move(a, b)?;
    refused(b, &volume.move_line(b, a, "--hold"), "HANDLE_IN_USE")?;
    let local = volume.wait_for(b, "local", SOON)?;
    ensure!(local["peer_node"].is_null(), "{local}");
    ensure!(volume.status(a)?.is_none(), "a refused move left something behind");
    writer.progress()?;
    writer.stop(b)?;

    user.kill();
    until("the old handle to go", SOON, || {
        let ours = "grep DMLOCAL- | grep -v DMLOCAL-refuser";
        let left = a.shell(&format!("dmsetup info -c --noheadings -o uuid | {ours}"))?;
        Ok(if left.success() { Err(left.stdout) } else { Ok(()) })
    })?;
    volume.start_move(b, a, "--hold --wait")?;
    volume.carry_state(b, a)?;
    let writer = volume.write(a, "")?;
    volume.finish_move(b, a)?;
    writer.stop(a)?;
    volume.verify(a)?;
    let back = volume.status(a)?.context("the volume is not there")?;
    ensure!(back["generation"] == 3, "{back}");
    volume.delete(a)
}

pub fn no_host_looks_into_a_volume(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    // What a guest would have made in its disk; this host's udev sees none of it.
    let inside = format!(
        "set -e
        quiet='activation {{ udev_sync = 0 udev_rules = 0 }}'
        truncate --size 24M /root/guest.img
        udevadm control --stop-exec-queue
        loop=$(losetup --show --find /root/guest.img)
        vgcreate --quiet --config \"$quiet\" guest $loop
        lvcreate --quiet --config \"$quiet\" --activate n --zero n --size 8M --name inner guest
        losetup --detach $loop
        udevadm control --start-exec-queue
        udevadm settle
        dd if=/root/guest.img of={} bs=1M oflag=direct status=none
        rm /root/guest.img",
        volume.device
    );
    a.shell(&inside)?.ok()?;
    volume.move_slowly(a, b)?;
    for node in [a, b] {
        // What a device sends when it appears and when somebody has written it.
        for action in ["add", "change"] {
            let trigger = ["udevadm", "trigger", "--subsystem-match=block", "--action", action];
            node.exec(&trigger)?.ok()?;
        }
        node.exec(&["udevadm", "settle"])?.ok()?;
        // What dmlocald asks of LVM.
        Volume::create(node, 16)?.delete(node)?;
    }
    let looks = "dmsetup ls | grep guest; ls /run/lvm/vgs_online | grep guest; ls /dev/guest
        systemctl list-units --all --plain --no-legend 'lvm-activate-*' | grep guest
        lsblk --noheadings --output NAME,FSTYPE /dev/mapper/dmlocal-* | grep LVM2; true";
    for node in [a, b] {
        let seen = node.shell(looks)?.ok()?;
        ensure!(seen.is_empty(), "{} looks into the volume:\n{seen}", node.name());
    }
    volume.finish_move(a, b)?;
    volume.delete(b)
}

pub fn a_volume_returns_before_it_has_arrived(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.write(a, "--count 50")?.stop(a)?;
    volume.carry_state(a, b)?;
    volume.move_slowly(a, b)?;
    let writer = volume.write(b, "--rate 8")?;
    writer.progress()?;

    // What was handed over keeps its device until somebody lets go of it.
    refused(b, &volume.move_line(b, a, "--hold"), "HANDLE_IN_USE")?;
    ctl(a, &format!("volume detach {}", volume.id))?;
    volume.start_move(b, a, "--hold --wait")?;
    writer.progress()?;
    writer.stop(b)?;
    volume.carry_state(b, a)?;
    // What b lacks comes from a's own old copy, by way of b.
    volume.verify(a)?;
    volume.slow_down(a)?;
    let writer = volume.write(a, "--rate 8")?;
    writer.wait_for_first_write()?;
    let middle = volume.status(b)?.context("the middle of the chain is gone")?;
    ensure!(middle["state"] == "fenced" && middle["peer_node"] == "node-a", "{middle}");
    let copies = ctl(a, "status")?;
    let states: Vec<_> = copies.as_array().into_iter().flatten().map(|c| &c["state"]).collect();
    ensure!(states == ["fenced", "hydrating"], "{copies}");

    for node in [b, a] {
        kill_agent(node)?;
        writer.progress()?;
    }
    volume.finish_move(b, a)?;
    volume.wait_until_alone(a)?;
    writer.progress()?;
    writer.stop(a)?;
    volume.verify(a)?;
    let back = volume.status(a)?.context("the volume is not there")?;
    ensure!(back["generation"] == 3 && back["state"] == "local", "{back}");
    volume.delete(a)
}

pub fn a_held_volume_grows_at_its_source(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    let device = &volume.device;
    volume.start_move(a, b, "--hold --wait")?;
    let writer = volume.write(a, "--rate 20")?;
    let user = b.spawn(&["sh", "-c", &format!("exec 3<{device}; echo open; sleep infinity")])?;
    user.wait_for_text("open", SOON)?;
    let grow = |mib: u64| ctl(a, &format!("volume extend {} --size {mib}MiB", volume.id));
    let put = |at: u64| {
        a.shell(&format!(
            "dd if=/dev/urandom of=/root/tail bs=1M count=8 status=none
            dd if=/root/tail of={device} bs=1M seek={at} oflag=direct status=none"
        ))
    };
    let sum = |at: u64| {
        format!("dd if={device} bs=1M skip={at} count=8 iflag=direct status=none | cksum")
    };
    // The other side follows by itself, and those who have it open see it.
    for mib in [48, 64] {
        let extended = grow(mib)?;
        ensure!(extended["size_bytes"] == mib << 20, "{extended}");
        put(mib - 8)?.ok()?;
        let size = (mib << 20).to_string();
        until("the held handle to grow", SOON, || {
            let seen = b.exec(&["blockdev", "--getsize64", device])?.ok()?;
            Ok(if seen == size { Ok(()) } else { Err(seen) })
        })?;
        let (there, here) = (a.shell(&sum(mib - 8))?.ok()?, b.shell(&sum(mib - 8))?.ok()?);
        ensure!(there == here, "the destination reads other data in what has grown");
    }
    let table = b.exec(&["dmsetup", "table", device])?.ok()?;
    ensure!(table.contains(" delay "), "it holds no more: {table}");
    writer.check()?;
    // Switched before the other side can have followed: the fence tells the size.
    grow(80)?;
    put(72)?.ok()?;
    writer.stop(a)?;
    volume.carry_state(a, b)?;
    let before =
        a.shell(&format!("dd if={device} bs=1M iflag=direct status=none | cksum"))?.ok()?;
    ctl(b, &format!("volume switch {}", volume.id))?;
    volume.verify(b)?;
    kill_agent(b)?;
    user.kill();
    volume.finish_move(a, b)?;
    let after = b.shell(&format!("dd if={device} bs=1M iflag=direct status=none | cksum"))?.ok()?;
    ensure!(before == after, "what has grown arrived with other data: {before}, {after}");
    a.shell("rm /root/tail")?.ok()?;
    volume.delete(b)
}

pub fn a_volume_grows_while_it_is_copied(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.write(a, "--count 50")?.stop(a)?;
    volume.carry_state(a, b)?;
    volume.move_slowly(a, b)?;
    let device = &volume.device;
    // It goes on with what it knows, and has the device open all the time.
    let writer = volume.write(b, "--rate 4")?;
    let extended = ctl(b, &format!("volume extend {} --size 48MiB", volume.id))?;
    ensure!(extended["size_bytes"] == 48 << 20 && extended["state"] == "hydrating", "{extended}");
    let tail = format!(
        "dd if=/dev/urandom of=/root/tail bs=1M count=8 status=none
        dd if=/root/tail of={device} bs=1M seek=36 oflag=direct status=none"
    );
    b.shell(&tail)?.ok()?;
    let right = format!("cmp --bytes 8388608 --ignore-initial 0:37748736 /root/tail {device}");
    b.shell(&right)?.ok()?;

    ctl(b, &format!("volume extend {} --size 64MiB", volume.id))?;
    refused(b, &format!("volume extend {} --size 48MiB", volume.id), "SIZE_SMALLER")?;
    kill_agent(b)?;
    writer.progress()?;
    let table = b.exec(&["dmsetup", "table", device])?.ok()?;
    ensure!(table.lines().count() == 2, "one window on the clone, one on the rest: {table}");
    b.shell(&right)?.ok()?;
    let blank = format!("cmp --bytes 20971520 --ignore-initial 46137344:0 {device} /dev/zero");
    b.shell(&blank)?.ok()?;
    // What it has grown by moves on with the rest.
    writer.stop(b)?;
    ctl(a, &format!("volume detach {}", volume.id))?;
    volume.start_move(b, a, "--hold --wait")?;
    volume.carry_state(b, a)?;
    let sum = format!("dd if={device} bs=1M iflag=direct status=none | cksum");
    let before = b.shell(&sum)?.ok()?;
    ensure!(a.shell(&sum)?.ok()? == before, "it reads other data at node-a");
    ctl(a, &format!("volume switch {}", volume.id))?;
    volume.finish_move(b, a)?;
    ensure!(a.shell(&sum)?.ok()? == before, "it has other data at node-a");
    volume.verify(a)?;
    let size = a.exec(&["blockdev", "--getsize64", device])?.ok()?;
    ensure!(size == (64 << 20).to_string(), "the handle has {size} bytes");
    b.shell("rm /root/tail")?.ok()?;
    volume.wait_until_alone(a)?;
    volume.delete(a)
}

pub fn a_volume_is_deleted_before_it_has_arrived(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.move_slowly(a, b)?;
    let delete = format!("volume delete {}", volume.id);
    refused(b, &delete, "VOLUME_ATTACHED")?;
    ctl(b, &format!("volume detach {}", volume.id))?;
    a.exec(&["systemctl", "stop", "dmlocald"])?.ok()?;
    // Nothing waits for a source that is not there.
    ctl(b, &delete)?;
    let left = b.shell("lvs --noheadings -o lv_name @dmlocal")?.ok()?;
    ensure!(left.is_empty(), "still at the destination: {left}");
    a.exec(&["systemctl", "start", "dmlocald"])?.ok()?;
    volume.wait_until_gone(b)?;
    volume.wait_until_gone(a)
}
