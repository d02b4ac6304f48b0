//! Moves of volumes of which most was never written.

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::Node;

use crate::bed::{Bed, LATER, SOON, Volume, ctl, kill_agent, until};
use crate::snapshots::{drop_volume, new_id, sum};

const MIB: u64 = 1 << 20;

/// Size of these volumes in MiB, and how many of their first blocks are written at
/// the source (16 MiB) and at the destination (24 MiB).
const SIZE: u32 = 256;
const AT_SOURCE: &str = "--blank --first 4096 --count 700";
const AT_DESTINATION: &str = "--first 6144 --rate 20";

/// Prints the block of the pool's metadata snapshot, `-` for none.
const SNAPSHOT: &str = "dmsetup status --noflush dmlocal-pool-tpool | awk '{print $7}'";

fn allocated(volume: &Volume, on: &Node) -> Result<u64> {
    let seen = volume.status(on)?.context("the volume is not there")?;
    seen["allocated_bytes"].as_u64().with_context(|| format!("nothing is allocated in {seen}"))
}

/// A volume with some data, and how much of it is allocated.
fn some_data(on: &Node) -> Result<(Volume, u64)> {
    let volume = Volume::create(on, SIZE)?;
    volume.write(on, AT_SOURCE)?.wait(LATER)?;
    let allocated = allocated(&volume, on)?;
    ensure!((8 * MIB..=16 * MIB).contains(&allocated), "{allocated} bytes are allocated");
    Ok((volume, allocated))
}

/// Waits until only what was allocated is left to be copied, or not even that.
fn seeded(volume: &Volume, on: &Node, allocated: u64) -> Result<()> {
    let what = "what was never written to count as being here";
    let seen = volume.wait_until(on, what, SOON, |seen| {
        seen["state"] == "local"
            || seen["bytes_left"].as_u64().is_some_and(|left| left <= allocated)
    })?;
    let all = seen["state"] == "local";
    ensure!(all || seen["percent"].as_f64().is_some_and(|percent| percent >= 90.0), "{seen}");
    Ok(())
}

fn no_snapshot_is_left(on: &Node) -> Result<()> {
    let held = on.shell(SNAPSHOT)?.ok()?;
    ensure!(held.trim() == "-", "{}: the pool's metadata snapshot is {held}", on.name());
    Ok(())
}

pub fn only_what_was_written_travels_below_a_running_writer(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let (volume, before) = some_data(a)?;
    volume.start_move(a, b, "--hold --wait")?;
    volume.slow_down(b)?;
    volume.carry_state(a, b)?;
    // The first write is the signal, and writing goes on all the time.
    let writer = volume.write(b, AT_DESTINATION)?;
    writer.wait_for_first_write()?;
    seeded(&volume, b, before)?;
    writer.progress()?;
    no_snapshot_is_left(a)?;
    volume.finish_move(a, b)?;
    writer.progress()?;
    println!("     the writer: {}", writer.stop(b)?.lines().last().unwrap_or_default());
    volume.verify(b)?;
    let after = allocated(&volume, b)?;
    ensure!(after <= 24 * MIB, "{before} bytes were allocated, {after} are now");
    volume.delete(b)
}

pub fn only_what_was_written_travels_cold_and_back(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let (volume, before) = some_data(a)?;
    ctl(a, &format!("volume detach {}", volume.id))?;
    volume.carry_state(a, b)?;
    volume.start_move(a, b, "")?;
    volume.finish_move(a, b)?;
    volume.verify(b)?;
    let after = allocated(&volume, b)?;
    ensure!(after <= before, "{before} bytes were allocated, {after} are now");

    // What never travelled is not allocated there either, and need not travel back.
    volume.start_move(b, a, "--hold --wait")?;
    volume.slow_down(a)?;
    ctl(a, &format!("volume switch {}", volume.id))?;
    seeded(&volume, a, after)?;
    volume.carry_state(b, a)?;
    volume.finish_move(b, a)?;
    volume.verify(a)?;
    ensure!(allocated(&volume, a)? <= after, "more is allocated after the way back");
    volume.delete(a)
}

pub fn agents_killed_while_marking_what_was_never_written_go_on(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let (volume, before) = some_data(a)?;
    volume.start_move(a, b, "--hold --wait")?;
    volume.slow_down(b)?;
    volume.carry_state(a, b)?;
    let writer = volume.write(b, AT_DESTINATION)?;
    writer.wait_for_first_write()?;
    // Each time at another moment: while it asks, marks, or has marked.
    for _ in 0..3 {
        kill_agent(b)?;
        kill_agent(a)?;
        writer.progress()?;
    }
    seeded(&volume, b, before)?;
    no_snapshot_is_left(a)?;
    volume.finish_move(a, b)?;
    writer.progress()?;
    writer.stop(b)?;
    volume.verify(b)?;
    let after = allocated(&volume, b)?;
    ensure!(after <= 24 * MIB, "{before} bytes were allocated, {after} are now");
    volume.delete(b)
}

pub fn what_is_made_of_a_sparse_snapshot_elsewhere_is_as_sparse(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let (volume, before) = some_data(a)?;
    let (snapshot, made) = (new_id()?, new_id()?);
    ctl(a, &format!("snapshot create {snapshot} --volume {}", volume.id))?;
    let held = sum(a, &volume.id)?;
    // From here on some of its blocks are the volume's as well, and some are not.
    let fresh = format!("dd if=/dev/urandom of={} bs=1M oflag=direct status=none", volume.device);
    a.shell(&format!("{fresh} count=1 && {fresh} count=2 seek=200"))?.ok()?;
    let grown = allocated(&volume, a)?;
    ensure!(grown >= before + 2 * MIB, "{before} bytes were allocated, {grown} are now");

    let source = "--from https://node-a:7450";
    ctl(b, &format!("volume create {made} --from-snapshot {snapshot} {source}"))?;
    let local = until("the volume to be local", LATER, || {
        let now = ctl(b, &format!("status {made}"))?;
        Ok(if now[0]["state"] == "local" { Ok(now[0].clone()) } else { Err(now.to_string()) })
    })?;
    let after = local["allocated_bytes"].as_u64().with_context(|| local.to_string())?;
    ensure!(after <= before, "{before} bytes were allocated in the snapshot, {after} arrived");
    no_snapshot_is_left(a)?;
    ctl(b, &format!("volume attach {made}"))?;
    ensure!(sum(b, &made)? == held, "it holds other data than the snapshot");
    drop_volume(b, &made)?;
    ctl(a, &format!("snapshot delete {snapshot}"))?;
    volume.delete(a)
}
