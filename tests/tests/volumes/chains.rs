//! Volumes that pass through a node before they are whole there.

use anyhow::{Context, Result, ensure};

use crate::bed::{Bed, LATER, SOON, Volume, until};

pub fn a_volume_passes_through_a_node_before_it_is_whole_there(bed: &Bed) -> Result<()> {
    let (a, b, c) = (bed.a(), bed.b(), bed.c());
    let volume = Volume::create_full(a, 32)?;
    volume.write(a, "--count 50")?.stop(a)?;
    volume.carry_state(a, b)?;
    volume.move_slowly(a, b)?;
    let writer = volume.write(b, "--rate 8")?;
    writer.progress()?;

    volume.start_move(b, c, "--hold --wait")?;
    writer.progress()?;
    writer.stop(b)?;
    volume.carry_state(b, c)?;
    // What node-b lacks comes from node-a, by way of node-b.
    volume.verify(c)?;
    volume.slow_down(c)?;
    let writer = volume.write(c, "--rate 8")?;
    writer.wait_for_first_write()?;
    let middle = volume.status(b)?.context("the middle of the chain is gone")?;
    ensure!(middle["state"] == "fenced" && middle["peer_node"] == "node-c", "{middle}");

    // Nothing is copied twice: the middle copies no more.
    let copied = |volume: &Volume| -> Result<f64> {
        let seen = volume.status(b)?.context("the middle of the chain is gone")?;
        seen["percent"].as_f64().with_context(|| format!("no percent in {seen}"))
    };
    volume.speed_up(b)?;
    let before = copied(&volume)?;
    ensure!(before < 90.0, "{before} % are there already");
    for _ in 0..3 {
        writer.progress()?;
    }
    let after = copied(&volume)?;
    ensure!((after - before).abs() < 0.01, "it copies on: from {before} to {after} %");

    // Without the middle nothing of what is missing can be read, and nothing fails.
    b.reboot()?;
    volume.wait_for(b, "fenced", LATER)?;
    volume.wait_for(c, "hydrating", LATER)?;
    writer.progress()?;

    volume.speed_up(c)?;
    until("the chain to end in order", LATER, || {
        writer.check()?;
        // Each is asked after the one that must not outlive it.
        let first = volume.status(a)?;
        let middle = volume.status(b)?;
        let last = volume.status(c)?.context("the volume is gone")?;
        if first.is_none() || middle.as_ref().is_none_or(|seen| seen["state"] == "releasing") {
            ensure!(
                ["collapsing", "local"].contains(&last["state"].as_str().unwrap_or("")),
                "{last}"
            );
        }
        if let (None, Some(middle)) = (&first, &middle) {
            ensure!(middle["state"] == "releasing", "node-a let go before node-b: {middle}");
        }
        let gone = first.is_none() && middle.is_none() && last["state"] == "local";
        Ok(if gone { Ok(()) } else { Err(format!("{first:?} {middle:?} {last}")) })
    })?;
    writer.progress()?;
    writer.stop(c)?;
    volume.verify(c)?;
    let end = volume.wait_for(c, "local", SOON)?;
    ensure!(end["generation"] == 3, "{end}");
    volume.delete(c)
}
