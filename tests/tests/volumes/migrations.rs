//! Live migrations of a guest whose disk is a volume, by QEMU itself.

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::Node;
use serde_json::json;

use crate::bed::{Bed, LATER, SOON, Volume, ctl, until};
use crate::guest::{GUEST_MIB, Guest, Pace};

/// As fast as it goes.
const FAST: Pace = Pace { bytes_per_s: 1 << 30, downtime_ms: 300 };

/// So slow that what is to happen meanwhile has time. QEMU sends a page in each of its
/// time slices of 100 ms, however slow it is told to be: minutes for what a guest carries.
const SLOW: Pace = Pace { bytes_per_s: 8 << 10, downtime_ms: 1 };

/// Writes of a guest before anything happens to it: to about a third of its blocks.
const WRITES: u64 = 64;

/// A guest that has written at a node for a while.
fn guest_at(on: &Node) -> Result<(Volume, Guest)> {
    let volume = Volume::create(on, GUEST_MIB)?;
    // Blank for the guest, but not for the pool: what was never written would be at the
    // destination at once.
    let zeros = format!("dd if=/dev/zero of={} bs=1M oflag=direct", volume.device);
    on.shell(&format!("{zeros} count={GUEST_MIB} status=none"))?.ok()?;
    let guest = Guest::start(on, &volume)?;
    until("the guest to write", LATER, || {
        guest.check()?;
        let writes = guest.writes();
        Ok(if writes >= WRITES { Ok(()) } else { Err(format!("{writes} writes")) })
    })?;
    Ok((volume, guest))
}

pub fn a_guest_migrates_while_it_writes(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let (volume, guest) = guest_at(a)?;
    volume.start_move(a, b, "--hold --wait")?;
    volume.slow_down(b)?;
    let there = Guest::expect(b, &volume)?;
    guest.progress()?;
    ensure!(volume.status(b)?.is_some_and(|seen| seen["state"] == "held"));

    guest.begin_move(b, FAST)?;
    let moved = guest.wait_for_migration("completed")?;
    // Nobody tells the agents: its first write does.
    there.progress()?;
    println!("the guest was away for {} ms", moved["downtime"]);
    let hydrating = volume.wait_for(b, "hydrating", SOON)?;
    ensure!(hydrating["percent"].as_f64().is_some_and(|percent| percent < 90.0), "{hydrating}");
    let fenced = volume.status(a)?.context("the source has no such volume")?;
    ensure!(fenced["state"] == "fenced", "{fenced}");
    guest.end()?;

    there.progress()?;
    volume.finish_move(a, b)?;
    let table = b.exec(&["dmsetup", "table", &volume.device])?.ok()?;
    ensure!(table.contains("linear") && table.lines().count() == 1, "{table}");
    there.sweep_twice()?;
    there.stop()?;
    volume.delete(b)
}

pub fn a_guest_whose_migration_is_cancelled_stays(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let (volume, guest) = guest_at(a)?;
    // Once it is called off at the source, once the destination gives up.
    for at_source in [true, false] {
        volume.start_move(a, b, "--hold --wait")?;
        let there = Guest::expect(b, &volume)?;
        guest.begin_move(b, SLOW)?;
        guest.wait_for_migration("active")?;
        guest.progress()?;
        if at_source {
            guest.ask("migrate_cancel", &json!({}))?;
            guest.wait_for_migration("cancelled")?;
        }
        there.end()?;
        let held = volume.status(b)?.context("the destination has no such volume")?;
        ensure!(held["state"] == "held" && held["held_writes"] == 0, "{held}");
        ctl(b, &format!("volume abort {}", volume.id))?;
        volume.wait_until_gone(b)?;
        let local = volume.wait_for(a, "local", SOON)?;
        ensure!(local["attached"] == true && local["generation"] == 1, "{local}");
        guest.progress()?;
    }
    guest.sweep_twice()?;
    guest.stop()?;
    volume.delete(a)
}

pub fn a_guest_stays_whose_destination_loses_power(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let (volume, guest) = guest_at(a)?;
    volume.start_move(a, b, "--hold --wait")?;
    let there = Guest::expect(b, &volume)?;
    guest.begin_move(b, SLOW)?;
    guest.wait_for_migration("active")?;
    b.kill()?;
    there.lost();
    guest.progress()?;
    guest.ask("migrate_cancel", &json!({}))?;
    ctl(a, &format!("volume abort {}", volume.id))?;
    let local = volume.wait_for(a, "local", SOON)?;
    ensure!(local["attached"] == true && local["generation"] == 1, "{local}");
    guest.progress()?;

    b.start()?;
    // What it finds there is of a grant that is no more.
    volume.wait_for(b, "held", LATER)?;
    ctl(b, &format!("volume abort {}", volume.id))?;
    volume.wait_until_gone(b)?;
    b.shell(&format!("rm -f /root/{}.boot", volume.id))?.ok()?;
    guest.sweep_twice()?;
    guest.stop()?;
    volume.delete(a)
}
