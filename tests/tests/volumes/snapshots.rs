//! Snapshots, and volumes that are made of them, here and elsewhere.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use dmlocal_testbed::Node;
use serde_json::Value;

use crate::bed::{
    Bed, LATER, SOON, Volume, ctl, kill_agent, kill_agent_once_suspended, refused, until,
};

pub fn new_id() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned())
}

fn listed(on: &Node, id: &str) -> Result<Option<Value>> {
    let all = ctl(on, "snapshot list")?;
    Ok(all.as_array().and_then(|all| all.iter().find(|one| one["id"] == id)).cloned())
}

fn wait_until_gone(on: &Node, snapshot: &str) -> Result<()> {
    until("the snapshot to go", SOON, || {
        Ok(listed(on, snapshot)?.map_or(Ok(()), |left| Err(left.to_string())))
    })
}

/// A sum over everything that a volume holds.
pub fn sum(on: &Node, id: &str) -> Result<String> {
    let device = format!("/dev/mapper/dmlocal-{id}");
    on.shell(&format!("dd if={device} bs=1M iflag=direct status=none | cksum"))?.ok()
}

pub fn drop_volume(on: &Node, id: &str) -> Result<()> {
    ctl(on, &format!("volume detach {id}"))?;
    ctl(on, &format!("volume delete {id}")).map(drop)
}

pub fn a_snapshot_is_of_one_moment_and_a_volume_goes_back_to_it(bed: &Bed) -> Result<()> {
    let a = bed.a();
    let volume = Volume::create_full(a, 32)?;
    volume.write(a, "--count 100")?.stop(a)?;
    let (quiet, torn) = (new_id()?, new_id()?);
    let before = sum(a, &volume.id)?;
    let take = format!("snapshot create {quiet} --volume {}", volume.id);
    let taken = ctl(a, &take)?;
    ensure!(taken["state"] == "available" && taken["volume_id"] == volume.id.as_str(), "{taken}");
    ensure!(ctl(a, &take)?["incarnation"] == taken["incarnation"], "a second one was taken");

    // While it is written: whatever was acknowledged before is in it, and what was
    // in flight below the handle is there as a whole or not at all.
    let writer = volume.write(a, "")?;
    writer.progress()?;
    // The state is copied first: what it says is settled was acknowledged.
    let state = format!("/root/{}.state", volume.id);
    a.shell(&format!("cp {state} /root/torn.state"))?.ok()?;
    ctl(a, &format!("snapshot create {torn} --volume {}", volume.id))?;
    // And again behind it: what was begun later cannot be in it.
    a.shell(&format!("cp {state} /root/later.state"))?.ok()?;
    writer.progress()?;
    writer.stop(a)?;
    volume.verify(a)?;
    let of_torn = new_id()?;
    ctl(a, &format!("volume create {of_torn} --from-snapshot {torn}"))?;
    ctl(a, &format!("volume attach {of_torn}"))?;
    a.exec(&[
        "dmlocal-writer",
        "verify",
        "--device",
        &format!("/dev/mapper/dmlocal-{of_torn}"),
        "--state",
        "/root/torn.state",
        "--until",
        "/root/later.state",
    ])?
    .ok()
    .context("the snapshot of a volume that is written")?;
    drop_volume(a, &of_torn)?;
    a.shell("rm /root/torn.state /root/later.state")?.ok()?;
    ctl(a, &format!("snapshot delete {torn}"))?;

    // Without a copy, in the same pool, and alive at once.
    let made = new_id()?;
    let create = format!("volume create {made} --from-snapshot {quiet}");
    let local = ctl(a, &create)?;
    ensure!(local["state"] == "local" && local["attached"] == false, "{local}");
    ensure!(local["source"]["snapshot_id"] == quiet.as_str(), "{local}");
    ctl(a, &create)?;
    ctl(a, &format!("volume attach {made}"))?;
    ensure!(sum(a, &made)? == before, "the volume from the snapshot holds other data");
    ensure!(sum(a, &volume.id)? != before, "the writer has written nothing");

    let revert = format!("volume revert {} --snapshot {quiet}", volume.id);
    refused(a, &revert, "VOLUME_ATTACHED")?;
    ctl(a, &format!("volume detach {}", volume.id))?;
    refused(a, &format!("volume revert {made} --snapshot {quiet}"), "VOLUME_ATTACHED")?;
    ctl(a, &format!("volume extend {} --size 48MiB", volume.id))?;
    kill_agent(a)?;
    let reverted = ctl(a, &revert)?;
    ensure!(reverted["size_bytes"] == 48 << 20, "{reverted}");
    ctl(a, &format!("volume attach {}", volume.id))?;
    let first = format!("dd if={} bs=1M count=32 iflag=direct status=none | cksum", volume.device);
    ensure!(a.shell(&first)?.ok()? == before, "the volume did not go back");
    let rest =
        format!("cmp --bytes 16777216 --ignore-initial 33554432:0 {} /dev/zero", volume.device);
    a.shell(&rest)?.ok().context("what it has grown by is not blank")?;
    ctl(a, &format!("volume detach {made}"))?;
    refused(a, &format!("volume revert {made} --snapshot {quiet}"), "SNAPSHOT_OF_ANOTHER")?;

    // It outlives its volume, and power.
    volume.delete(a)?;
    a.kill()?;
    a.start()?;
    ensure!(listed(a, &quiet)?.is_some_and(|one| one["state"] == "available"));
    ctl(a, &format!("volume attach {made}"))?;
    ensure!(sum(a, &made)? == before, "power was cut");
    drop_volume(a, &made)?;
    ctl(a, &format!("snapshot delete {quiet}"))?;
    ctl(a, &format!("snapshot delete {quiet}"))?;
    Ok(())
}

pub fn a_volume_is_made_of_a_snapshot_on_another_node(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    // So large that copying is not over before it can be slowed down.
    let volume = Volume::create_full(a, 96)?;
    volume.write(a, "--count 100")?.stop(a)?;
    let before = sum(a, &volume.id)?;
    let (snapshot, first, second) = (new_id()?, new_id()?, new_id()?);
    ctl(a, &format!("snapshot create {snapshot} --volume {}", volume.id))?;
    let make = |id: &str| {
        format!("volume create {id} --from-snapshot {snapshot} --from https://node-a:7450")
    };
    let made = ctl(b, &make(&first))?;
    ensure!(made["state"] == "hydrating" && made["attached"] == false, "{made}");
    let slow = format!("hydration set {first} --rate 256KiB --threshold 1 --batch 1");
    ctl(b, &slow)?;
    // Repeating it makes nothing new.
    ctl(b, &make(&first))?;
    refused(
        b,
        &format!("volume create {first} --from-snapshot {second} --from https://node-a:7450"),
        "VOLUME_EXISTS",
    )?;
    // Several may read at once, and what it is of goes on.
    ctl(b, &make(&second))?;
    let seen = listed(a, &snapshot)?.context("the snapshot is gone")?;
    ensure!(seen["read_by"].as_array().is_some_and(|by| !by.is_empty()), "{seen}");
    ctl(b, &format!("volume attach {first}"))?;
    let writer = volume.write(a, "")?;
    ensure!(sum(b, &first)? == before, "before it has arrived");
    let hydrating = ctl(b, &format!("status {first}"))?;
    ensure!(hydrating[0]["state"] == "hydrating", "too fast to see anything: {hydrating}");
    refused(a, &format!("snapshot delete {snapshot}"), "SNAPSHOT_IN_USE")?;
    let deferred = format!("snapshot delete {snapshot} --defer");
    ctl(a, &deferred)?;
    ctl(a, &deferred)?;
    refused(b, &make(&new_id()?), "SNAPSHOT_NOT_FOUND")?;
    for node in [a, b] {
        kill_agent(node)?;
    }
    ensure!(listed(a, &snapshot)?.is_some_and(|one| one["state"] == "deleting"));
    ctl(b, &format!("hydration set {first} --rate 0 --threshold 128 --batch 16"))?;
    wait_until_gone(a, &snapshot)?;
    for id in [&first, &second] {
        until("the volume to be local", SOON, || {
            let now = ctl(b, &format!("status {id}"))?;
            Ok(if now[0]["state"] == "local" { Ok(()) } else { Err(now.to_string()) })
        })?;
        ctl(b, &format!("volume attach {id}"))?;
        ensure!(sum(b, id)? == before, "it has arrived with other data");
        drop_volume(b, id)?;
    }
    writer.stop(a)?;
    volume.verify(a)?;

    // Of the volume itself, as it is now.
    let copy = new_id()?;
    let line =
        format!("volume create {copy} --from-volume {} --from https://node-a:7450", volume.id);
    let before = sum(a, &volume.id)?;
    ctl(b, &line)?;
    ctl(b, &format!("volume attach {copy}"))?;
    ensure!(sum(b, &copy)? == before, "the copy of the volume holds other data");
    ctl(b, &format!("volume detach {copy}"))?;
    ctl(b, &format!("volume delete {copy}"))?;
    volume.delete(a)
}

fn available(on: &Node, snapshot: &str) -> Result<()> {
    until("the snapshot to be whole", LATER, || match listed(on, snapshot)? {
        Some(one) if one["state"] == "available" => Ok(Ok(())),
        seen => Ok(Err(format!("{seen:?}"))),
    })
}

pub fn a_snapshot_of_a_hydrating_volume_is_of_its_moment(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 64)?;
    volume.write(a, "--count 100")?.stop(a)?;
    volume.move_slowly(a, b)?;
    volume.carry_state(a, b)?;
    let writer = volume.write(b, "--rate 50")?;
    writer.progress()?;
    let (snapshot, doomed, killed) = (new_id()?, new_id()?, new_id()?);
    let take = |snapshot: &str| format!("snapshot create {snapshot} --volume {}", volume.id);
    // What the state says is settled before was acknowledged, and what was begun after it
    // cannot be in it.
    let state = format!("/root/{}.state", volume.id);
    b.shell(&format!("cp {state} /root/moment.state"))?.ok()?;
    let taken = ctl(b, &take(&snapshot))?;
    b.shell(&format!("cp {state} /root/later.state"))?.ok()?;
    ensure!(taken["state"] == "hydrating" && taken["source_node"] == "node-a", "{taken}");
    let again = ctl(b, &take(&snapshot))?;
    ensure!(again["incarnation"] == taken["incarnation"], "a second one was taken: {again}");
    ensure!(volume.status(b)?.is_some_and(|seen| seen["state"] == "hydrating"), "too fast");
    writer.progress()?;

    // One that is not whole goes all the same, and one whose agent dies over it is made
    // or is not.
    ctl(b, &take(&doomed))?;
    let made = new_id()?;
    let of = |snapshot: &str| format!("volume create {made} --from-snapshot {snapshot}");
    refused(b, &of(&doomed), "VOLUME_MOVING")?;
    ctl(b, &format!("snapshot delete {doomed}"))?;
    wait_until_gone(b, &doomed)?;
    let clones = b.shell("dmsetup ls --target clone")?.ok()?;
    let clone = clones.split_whitespace().find(|name| name.contains(&volume.id));
    let clone = clone.context("no clone")?;
    let order = format!("dmlocalctl {}", take(&killed));
    let answer = kill_agent_once_suspended(b, clone, &order)?;
    writer.progress()?;
    until("what was half-made to go", SOON, || match listed(b, &killed)? {
        Some(one) if one["state"] == "creating" || one["state"] == "deleting" => {
            Ok(Err(one.to_string()))
        }
        None if answer.success() => bail!("it was answered, and is not there"),
        _ => Ok(Ok(())),
    })?;
    ctl(b, &take(&killed))?;
    kill_agent(a)?;
    writer.progress()?;
    available(b, &killed)?;
    ctl(b, &format!("snapshot delete {killed}"))?;

    available(b, &snapshot)?;
    writer.progress()?;
    ctl(b, &of(&snapshot))?;
    ctl(b, &format!("volume attach {made}"))?;
    let device = format!("/dev/mapper/dmlocal-{made}");
    let (moment, later) = ("/root/moment.state", "/root/later.state");
    let verify =
        ["dmlocal-writer", "verify", "--device", &device, "--state", moment, "--until", later];
    b.exec(&verify)?.ok().context("the snapshot of a volume that hydrates")?;
    drop_volume(b, &made)?;
    b.shell(&format!("rm {moment} {later}"))?.ok()?;
    ctl(b, &format!("snapshot delete {snapshot}"))?;
    volume.finish_move(a, b)?;
    writer.progress()?;
    writer.stop(b)?;
    volume.verify(b)?;
    volume.delete(b)
}
