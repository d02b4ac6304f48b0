//! Sources that are lost for ever, and what is left of them.

use anyhow::{Context, Result, ensure};

use crate::bed::{Bed, LATER, SOON, Volume, ctl, refused, until};

pub fn a_source_that_is_lost_for_ever_is_given_up(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 16)?;
    let forget = format!("volume forget-source {} --i-accept-data-loss", volume.id);
    refused(a, &forget, "VOLUME_NOT_HYDRATING")?;
    refused(b, &forget, "VOLUME_NOT_FOUND")?;
    refused(b, &format!("volume forget-source {}", volume.id), "USAGE")?;
    volume.move_slowly(a, b)?;
    volume.write(b, "--count 20")?.stop(b)?;
    refused(b, &forget, "SOURCE_ALIVE")?;

    a.kill()?;
    volume.wait_for(b, "stalled", LATER)?;
    let forgotten = ctl(b, &forget)?;
    let number = |name: &str| forgotten[name].as_u64().with_context(|| forgotten.to_string());
    let (regions, bytes) = (number("regions_lost")?, number("bytes_lost")?);
    ensure!(regions > 0 && bytes == regions * 65536, "{forgotten}");
    let is_damaged = |on| -> Result<()> {
        let seen = volume.wait_until(on, "what is lost", LATER, |seen| {
            seen["state"] == "damaged" && seen["device_path"] == volume.device.as_str()
        })?;
        ensure!(seen["bytes_lost"] == bytes && seen["bytes_left"].is_null(), "{seen}");
        // What is here reads right; the rest fails, and waits for nobody.
        let lacking = volume.lacking(on)?;
        ensure!(lacking == regions, "{lacking} regions fail, {regions} are lost");
        Ok(())
    };
    is_damaged(b)?;
    refused(b, &volume.move_line(b, a, ""), "ENDPOINT_UNREACHABLE")?;
    b.reboot()?;
    is_damaged(b)?;

    // It comes back after all, and stays closed.
    a.start()?;
    let back = volume.wait_for(a, "fenced", LATER)?;
    ensure!(back["device_path"].is_null(), "{back}");
    refused(a, &format!("volume attach {}", volume.id), "VOLUME_FENCED")?;
    refused(b, &volume.move_line(b, a, "--hold"), "REGIONS_LOST")?;
    is_damaged(b)?;
    volume.rewrite(b)?;
    volume.wait_for(b, "local", SOON)?;
    volume.verify(b)?;
    let still = volume.status(a)?.context("its copy is gone unasked")?;
    ensure!(still["state"] == "fenced", "{still}");
    ctl(a, &format!("volume delete {}", volume.id))?;
    volume.wait_until_gone(a)?;
    volume.delete(b)
}

pub fn a_switch_whose_source_has_died_is_given_up(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 16)?;
    volume.write(a, "--count 20")?.stop(a)?;
    // What a guest has not flushed goes with the power.
    a.exec(&["sync", &volume.device])?.ok()?;
    volume.carry_state(a, b)?;
    volume.start_move(a, b, "--hold --wait")?;
    a.kill()?;
    let writer = volume.write(b, "")?;
    volume.wait_until(b, "the source to be asked in vain", LATER, |seen| {
        let asked = seen["detail"].as_str().is_some_and(|why| why.contains("does not answer"));
        asked && seen["held_writes"].as_u64().is_some_and(|count| count > 0)
    })?;
    refused(b, &format!("--timeout 120 volume abort {}", volume.id), "WRITTEN_AT_DESTINATION")?;
    // It counts as alive until its connection has been silent for a while.
    let forget = format!("volume forget-source {} --i-accept-data-loss", volume.id);
    let forgotten = until("the source to be dead", LATER, || {
        let output = b.shell(&format!("dmlocalctl --output json --timeout 120 {forget}"))?;
        Ok(if output.success() { Ok(output.stdout) } else { Err(output.stderr) })
    })?;
    ensure!(forgotten.contains("\"regions_lost\": 256"), "{forgotten}");
    ensure!(!writer.has_written(), "a write was acknowledged");
    ensure!(writer.wait(SOON).is_err(), "what waited did not fail");
    // It comes back after all, hears of it, and is the volume.
    a.start()?;
    volume.wait_until_gone(b)?;
    volume.wait_until(a, "the volume", LATER, |seen| {
        seen["state"] == "local" && seen["device_path"] == volume.device.as_str()
    })?;
    volume.carry_state(b, a)?;
    volume.verify(a)?;
    volume.write(a, "--count 20")?.stop(a)?;
    volume.verify(a)?;
    volume.delete(a)
}
