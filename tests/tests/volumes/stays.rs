//! Volumes that do not move.

use anyhow::{Result, ensure};

use crate::bed::{Bed, SOON, Volume, ctl};

pub fn a_new_volume_on_used_space_reads_zeros(bed: &Bed) -> Result<()> {
    let a = bed.a();
    let first = Volume::create_full(a, 32)?;
    let again = format!("volume create {} --size 32MiB", first.id);
    first.delete(a)?;
    ctl(a, &format!("volume delete {}", first.id))?;
    ctl(a, &again)?;
    ctl(a, &again)?;
    ctl(a, &format!("volume attach {}", first.id))?;
    // Chunks that are written in part show what was in the rest of them.
    first.write(a, "--blank --count 200")?.stop(a)?;
    first.verify(a)?;
    first.delete(a)
}

pub fn an_open_descriptor_sees_an_extension(bed: &Bed) -> Result<()> {
    let a = bed.a();
    let volume = Volume::create_full(a, 32)?;
    let line = format!(
        "exec 3<{}; echo open
        until test -e /root/extended; do sleep 0.1; done
        dd bs=1M skip=40 count=1 status=none <&3 | wc --bytes",
        volume.device
    );
    let user = a.spawn(&["sh", "-c", &line])?;
    user.wait_for_text("open", SOON)?;
    let extended = ctl(a, &format!("volume extend {} --size 48MiB", volume.id))?;
    ensure!(extended["size_bytes"] == 48 << 20, "{extended}");
    a.exec(&["touch", "/root/extended"])?.ok()?;
    let read = user.wait(SOON)?.ok()?;
    a.exec(&["rm", "/root/extended"])?.ok()?;
    ensure!(read.ends_with("\n1048576"), "read behind the old end: {read}");
    let size = a.exec(&["blockdev", "--getsize64", &volume.device])?.ok()?;
    ensure!(size == (48 << 20).to_string(), "the handle has {size} bytes");
    volume.delete(a)
}
