//! What bad input gets: one distinct reason, and nothing changed.

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::Node;

use crate::bed::{Bed, SOON, Volume, ctl, refused, until};

const UNKNOWN: &str = "00000000-0000-4000-8000-000000000000";

/// Requests and the reasons for which they are refused. `ID` is the volume's,
/// `MOVE` the beginning of a move from node-a to node-b.
fn all_refused(at: &Node, volume: &Volume, requests: &[(&str, &str)]) -> Result<()> {
    let order =
        format!("volume move {} --from https://node-a:7450 --to https://node-b:7450", volume.id);
    for (request, reason) in requests {
        let line = request.replace("MOVE", &order).replace("ID", &volume.id);
        refused(at, &line.replace("UNKNOWN", UNKNOWN), reason)?;
    }
    Ok(())
}

/// The volume as it is, without what changes by itself.
fn snapshot(volume: &Volume, on: &Node) -> Result<String> {
    let mut seen = volume.status(on)?.context("no such volume")?;
    for key in ["percent", "bytes_left", "rate_bytes_per_s", "eta_s", "detail", "allocated_bytes"] {
        seen[key] = serde_json::Value::Null;
    }
    Ok(seen.to_string())
}

pub fn requests_that_make_no_sense_change_nothing(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create(a, 32)?;
    let before = snapshot(&volume, a)?;
    all_refused(
        a,
        &volume,
        &[
            ("volume show UNKNOWN", "VOLUME_NOT_FOUND"),
            ("status UNKNOWN", "VOLUME_NOT_FOUND"),
            ("volume attach UNKNOWN", "VOLUME_NOT_FOUND"),
            ("volume detach UNKNOWN", "VOLUME_NOT_FOUND"),
            ("volume extend UNKNOWN --size 64MiB", "VOLUME_NOT_FOUND"),
            ("volume switch UNKNOWN", "VOLUME_NOT_FOUND"),
            ("volume abort UNKNOWN", "VOLUME_NOT_FOUND"),
            ("hydration pause UNKNOWN", "VOLUME_NOT_FOUND"),
            ("volume create NOT-A-UUID --size 64MiB", "ID_INVALID"),
            ("volume create ID --size 64MiB", "VOLUME_EXISTS"),
            ("volume create UNKNOWN --size 0", "SIZE_INVALID"),
            ("volume create UNKNOWN --size 1000", "SIZE_INVALID"),
            ("volume create UNKNOWN --size 1TiB", "NO_ROOM"),
            ("volume create UNKNOWN --size 64MiB --pool nowhere", "POOL_NOT_FOUND"),
            ("volume create UNKNOWN --size many", "USAGE"),
            ("volume extend ID --size 16MiB", "SIZE_SMALLER"),
            ("volume extend ID --size 67108865", "SIZE_INVALID"),
            ("volume extend ID --size 1TiB", "NO_ROOM"),
            ("volume delete ID", "VOLUME_ATTACHED"),
            ("volume attach ID --generation 7", "GENERATION_STALE"),
            ("volume switch ID", "VOLUME_NOT_HELD"),
            ("volume abort ID", "VOLUME_NOT_HELD"),
            ("hydration pause ID", "VOLUME_NOT_HYDRATING"),
            ("hydration set ID --rate 1MiB", "VOLUME_NOT_HYDRATING"),
            ("MOVE", "VOLUME_ATTACHED"),
            ("MOVE --hold --pool nowhere", "POOL_NOT_FOUND"),
            (
                "volume move ID --from https://node-a:7450 --to unix:///run/dmlocal/agent.sock",
                "MOVE_TO_SELF",
            ),
            (
                "volume move UNKNOWN --from https://node-a:7450 --to https://node-b:7450",
                "VOLUME_NOT_FOUND",
            ),
            (
                "--timeout 5 volume move ID --from https://node-a:7450 --to https://node-b:7",
                "ENDPOINT_UNREACHABLE",
            ),
        ],
    )?;
    let after = snapshot(&volume, a)?;
    ensure!(before == after, "changed from\n{before} to\n{after}");
    ensure!(volume.status(b)?.is_none(), "something came to the other node");
    let open =
        a.spawn(&["sh", "-c", &format!("exec 3<{}; echo open; exec sleep 600", volume.device)])?;
    open.wait_for_text("open", SOON)?;
    all_refused(a, &volume, &[("volume detach ID", "HANDLE_IN_USE")])?;
    open.kill();
    until("the volume to be closed", SOON, || {
        let detached = a.exec(&["dmlocalctl", "volume", "detach", &volume.id])?;
        Ok(if detached.success() { Ok(()) } else { Err(detached.stderr) })
    })?;
    volume.delete(a)
}

pub fn requests_during_a_move_change_nothing(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create_full(a, 32)?;
    volume.start_move(a, b, "--hold --wait")?;
    volume.slow_down(b)?;
    let before = (snapshot(&volume, a)?, snapshot(&volume, b)?);
    let back = "volume move ID --from https://node-b:7450 --to https://node-a:7450 --hold";
    let published = [
        ("volume delete ID", "VOLUME_PUBLISHED"),
        ("volume extend ID --size 16MiB", "SIZE_SMALLER"),
        ("volume create ID --size 64MiB", "VOLUME_EXISTS"),
        ("MOVE --hold", "VOLUME_MOVING"),
        ("volume switch ID", "VOLUME_NOT_HELD"),
        ("hydration pause ID", "VOLUME_NOT_HYDRATING"),
    ];
    all_refused(a, &volume, &published)?;
    let receiving = [
        ("volume delete ID", "VOLUME_MOVING"),
        ("volume extend ID --size 64MiB", "VOLUME_MOVING"),
        (back, "VOLUME_MOVING"),
        ("hydration set ID --threshold 5000", "SETTING_OUT_OF_RANGE"),
        ("hydration set ID --batch 0", "SETTING_OUT_OF_RANGE"),
    ];
    all_refused(b, &volume, &receiving)?;
    let after = (snapshot(&volume, a)?, snapshot(&volume, b)?);
    ensure!(before == after, "changed from\n{before:?} to\n{after:?}");

    ctl(b, &format!("volume switch {}", volume.id))?;
    let before = (snapshot(&volume, a)?, snapshot(&volume, b)?);
    let fenced = [
        ("volume attach ID", "VOLUME_FENCED"),
        ("volume delete ID", "VOLUME_FENCED"),
        ("volume abort ID", "GRANT_FENCED"),
        ("MOVE --hold", "VOLUME_FENCED"),
    ];
    all_refused(a, &volume, &fenced)?;
    let hydrating = [
        ("volume abort ID", "GRANT_FENCED"),
        ("volume delete ID", "VOLUME_ATTACHED"),
        (back, "HANDLE_IN_USE"),
    ];
    all_refused(b, &volume, &hydrating)?;
    // Repeating is not refused.
    ctl(b, &format!("volume switch {}", volume.id))?;
    ctl(b, &format!("volume attach {}", volume.id))?;
    let after = (snapshot(&volume, a)?, snapshot(&volume, b)?);
    ensure!(before == after, "changed from\n{before:?} to\n{after:?}");
    volume.finish_move(a, b)?;
    volume.delete(b)
}

pub fn certificates_of_other_roles_are_refused(bed: &Bed) -> Result<()> {
    let b = bed.b();
    let pki = "/etc/dmlocal/pki";
    let as_role = |role: &str, line: &str| {
        format!(
            "--endpoint https://node-a:7450 --cert {pki}/{role}.pem --key {pki}/{role}.key {line}"
        )
    };
    let create = format!("volume create {UNKNOWN} --size 32MiB");
    refused(b, &as_role("agent", &create), "ROLE_FORBIDDEN")?;
    refused(b, &as_role("agent", &format!("volume delete {UNKNOWN}")), "ROLE_FORBIDDEN")?;
    // Not of this authority at all.
    let stranger = "cd /root && rm -rf stranger && dmlocalctl pki init --out stranger &&
        dmlocalctl pki issue --ca-dir stranger --role operator --out stranger";
    b.shell(stranger)?.ok()?;
    let line = format!(
        "--endpoint https://node-a:7450 --cert /root/stranger/operator.pem \
         --key /root/stranger/operator.key {create}"
    );
    refused(b, &line, "TLS_REFUSED")?;
    b.shell("rm -r /root/stranger")?.ok()?;
    ctl(b, &as_role("driver", "pool list")).map(drop)
}

pub fn a_pool_that_is_away_is_named(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create(a, 32)?;
    b.exec(&["vgrename", "--quiet", "dmlocal", "elsewhere"])?.ok()?;
    let outcome = (|| {
        refused(b, &format!("volume create {UNKNOWN} --size 32MiB"), "POOL_MISSING")?;
        refused(b, &volume.move_line(a, b, "--hold"), "POOL_MISSING")?;
        let pools = ctl(b, "pool list")?;
        ensure!(pools[0]["present"] == false, "{pools}");
        Ok(())
    })();
    b.exec(&["vgrename", "--quiet", "elsewhere", "dmlocal"])?.ok()?;
    outcome?;
    volume.wait_for(a, "local", SOON)?;
    ensure!(ctl(b, "pool list")?[0]["present"] == true);
    volume.delete(a)
}

pub fn a_pool_of_other_blocks_takes_no_volume_from_elsewhere(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create(a, 32)?;
    b.shell(
        "set -e
        truncate --size 256M /root/coarse.img
        loop=$(losetup --show --find --sector-size 4096 /root/coarse.img)
        vgcreate --quiet --quiet coarse $loop
        lvcreate --quiet --quiet --type thin-pool --size 128M --name pool coarse
        cp /etc/dmlocal/dmlocald.toml /root/dmlocald.toml
        printf '\n[[pool]]\nname = \"coarse\"\nvolume_group = \"coarse\"\n' \
            >>/etc/dmlocal/dmlocald.toml
        printf 'thin_pool = \"pool\"\ndevices = [\"%s\"]\n' $loop >>/etc/dmlocal/dmlocald.toml
        systemctl restart dmlocald",
    )?
    .ok()?;
    let outcome = (|| {
        let pools = ctl(b, "pool list")?;
        ensure!(pools[1]["logical_block_size"] == 4096, "{pools}");
        refused(b, &volume.move_line(a, b, "--hold --pool coarse"), "LOGICAL_BLOCK_SIZE")?;
        // A multiple of 512 is not one of 4096.
        let odd = format!("volume create {UNKNOWN} --size 33554944 --pool coarse");
        refused(b, &odd, "SIZE_INVALID")
    })();
    b.shell(
        "set -e
        mv /root/dmlocald.toml /etc/dmlocal/dmlocald.toml
        systemctl restart dmlocald
        vgremove --quiet --quiet --yes coarse
        losetup --detach-all
        rm /root/coarse.img",
    )?
    .ok()?;
    outcome?;
    ensure!(volume.status(b)?.is_none(), "a refused move left something behind");
    volume.wait_for(a, "local", SOON)?;
    volume.delete(a)
}

pub fn a_kernel_without_dm_clone_is_named(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.a(), bed.b());
    let volume = Volume::create(a, 32)?;
    b.shell(
        "echo install dm-clone /bin/false >/etc/modprobe.d/no-clone.conf &&
        rmmod dm-clone && systemctl restart dmlocald",
    )?
    .ok()?;
    let outcome = (|| {
        let node = ctl(b, "node show")?;
        ensure!(node["warnings"].to_string().contains("clone"), "no warning: {node}");
        refused(b, &volume.move_line(a, b, "--hold"), "TARGET_MISSING")
    })();
    b.shell("rm /etc/modprobe.d/no-clone.conf; modprobe dm-clone && systemctl restart dmlocald")?
        .ok()?;
    outcome?;
    volume.wait_for(a, "local", SOON)?;
    volume.delete(a)
}
