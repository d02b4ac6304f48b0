//! Volumes of which most was never written.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Bench, MIB, Row, WINDOWS, fio, median, shell, timed, wait_until_local};

/// Size of the volumes that are compared, and how much of one is written: in so many
/// pieces of 1 MiB, far apart.
const SIZE_MIB: u64 = 1024;
const PIECES: u64 = 64;

/// Seconds of writing during which what was never written is marked, and how long the
/// source takes to say what that is.
const GUEST_S: u32 = 12;
const DELAY_S: u32 = 5;

/// Where the source's map comes from.
const DUMP: &str = "$(command -v thin_dump)";

struct Moved {
    allocated: f64,
    copied: f64,
    hydrating_s: f64,
}

impl Bench<'_> {
    /// A cold move of a detached volume from the first node to the second, and its end.
    fn travel(&self, id: &str) -> Result<Moved> {
        let status = shell(self.a, &format!("dmlocalctl status {id} --output json"))?;
        let status: Value = serde_json::from_str(&status).context("reading status")?;
        let allocated = status[0]["allocated_bytes"].as_f64().context("nothing is allocated")?;
        let order = format!(
            "dmlocalctl volume move {id} --from https://node-a:7450 --to https://node-b:7450"
        );
        shell(self.b, &order)?;
        // The call returns when it is usable, and hydrating.
        let wait = format!(
            "while dmlocalctl status {id} --output json | grep -q '\"state\": *\"hydrating\"'; \
             do sleep 0.1; done"
        );
        let hydrating_s = timed(self.b, &wait)?;
        wait_until_local(self.b, id)?;
        // Nobody else has written to the new logical volume: word 7 of a device's
        // statistics counts sectors of 512 bytes.
        let device = "$(basename $(readlink -f /dev/dmlocal/dmlocal-";
        let written = format!("awk '{{print $7}}' /sys/block/{device}{id}-g2))/stat");
        let sectors: f64 = shell(self.b, &written)?.trim().parse().context("sectors written")?;
        let end = format!("dmlocalctl volume detach {id} && dmlocalctl volume delete {id}");
        shell(self.b, &end)?;
        Ok(Moved { allocated, copied: sectors * 512.0, hydrating_s })
    }

    pub(super) fn sparse(&self) -> Result<Vec<Row>> {
        let full = self.volume(self.a, SIZE_MIB)?;
        self.say("1 GiB of random data is written");
        let fill = format!("dmlocal-writer fill --device /dev/mapper/dmlocal-{full} --seed 1");
        shell(self.a, &fill)?;
        shell(self.a, &format!("dmlocalctl volume detach {full}"))?;
        let full = self.travel(&full)?;

        let sparse = self.volume(self.a, SIZE_MIB)?;
        let apart = SIZE_MIB / PIECES;
        let pieces = format!(
            "for piece in $(seq 0 {}); do dd if=/dev/urandom of=/dev/mapper/dmlocal-{sparse} \
             bs=1M count=1 seek=$((piece * {apart})) oflag=direct 2>/dev/null || exit 1; done",
            PIECES - 1
        );
        shell(self.a, &pieces)?;
        shell(self.a, &format!("dmlocalctl volume detach {sparse}"))?;
        let sparse = self.travel(&sparse)?;
        #[expect(clippy::cast_precision_loss, reason = "a power of two")]
        let mib = MIB as f64;
        Ok(vec![
            Row {
                name: "sparse_move_over_full",
                value: sparse.hydrating_s / full.hydrating_s,
                bar: 0.15,
                at_least: false,
                detail: format!(
                    "s in hydrating: {:.2} with {:.1} MiB allocated, {:.2} with {:.1}",
                    sparse.hydrating_s,
                    sparse.allocated / mib,
                    full.hydrating_s,
                    full.allocated / mib
                ),
            },
            Row {
                name: "sparse_bytes_over_allocated",
                value: sparse.copied / sparse.allocated,
                bar: 1.1,
                at_least: false,
                detail: format!(
                    "{:.1} MiB written at the destination, {:.1} allocated at the source",
                    sparse.copied / mib,
                    sparse.allocated / mib
                ),
            },
        ])
    }

    /// The longest write of a run in which what was never written is marked, with
    /// copying paused: nothing else happens.
    pub(super) fn seed_pause(&self) -> Result<Row> {
        // The source is slow to say what it has, so that the guest is there in time.
        let slow = format!(
            "dump={DUMP}; [ -e $dump.real ] || mv $dump $dump.real; \
             printf '#!/bin/sh\\nsleep {DELAY_S}\\nexec %s.real \"$@\"\\n' $dump >$dump; \
             chmod +x $dump"
        );
        shell(self.a, &slow)?;
        let ratios = self.seed_pauses();
        shell(self.a, &format!("dump={DUMP}; mv $dump.real $dump"))?;
        let (ratios, samples) = ratios?;
        self.say(&format!("seeding: {ratios:.2?}"));
        let detail = format!("runs of {GUEST_S} s: {ratios:.2?}, of {samples:?} writes");
        Ok(Row {
            name: "seed_pause_over_p999",
            value: median(&ratios),
            bar: 10.0,
            at_least: false,
            detail,
        })
    }

    fn seed_pauses(&self) -> Result<(Vec<f64>, Vec<u64>)> {
        let (mut ratios, mut samples) = (Vec::new(), Vec::new());
        for _ in 0..WINDOWS {
            let id = self.volume(self.a, 64)?;
            let some = format!(
                "for piece in $(seq 0 3); do dd if=/dev/urandom of=/dev/mapper/dmlocal-{id} \
                 bs=1M count=1 seek=$((piece * 16)) oflag=direct 2>/dev/null || exit 1; done"
            );
            shell(self.a, &some)?;
            let order = format!(
                "dmlocalctl volume move {id} --from https://node-a:7450 --to https://node-b:7450 \
                 --hold && dmlocalctl hydration pause {id} && dmlocalctl volume switch {id}"
            );
            shell(self.b, &order)?;
            let left = || -> Result<u64> {
                let seen = shell(self.b, &format!("dmlocalctl status {id} --output json"))?;
                let seen: Value = serde_json::from_str(&seen).context("reading status")?;
                seen[0]["bytes_left"].as_u64().context("nothing is left")
            };
            let before = left()?;
            let report = fio(
                self.b,
                &format!(
                    "--rw=randwrite --bs=4k --iodepth=1 --ioengine=libaio --direct=1 --time_based \
                     --runtime={GUEST_S} --percentile_list=50:99:99.9 --thread --name=guest \
                     --filename=/dev/mapper/dmlocal-{id}"
                ),
            )?;
            let after = left()?;
            ensure!(before > 60 * MIB, "it was marked before the guest wrote: {before} left");
            ensure!(after <= 4 * MIB, "it was not marked while the guest wrote: {after} left");
            let latency = &report["jobs"][0]["write"]["clat_ns"];
            let longest = latency["max"].as_f64().context("fio's longest")?;
            let usual = latency["percentile"]["99.900000"].as_f64().context("fio's p99.9")?;
            ratios.push(longest / usual);
            samples.push(report["jobs"][0]["write"]["total_ios"].as_u64().unwrap_or(0));
            shell(self.b, &format!("dmlocalctl hydration resume {id}"))?;
            wait_until_local(self.b, &id)?;
            let end = format!("dmlocalctl volume detach {id} && dmlocalctl volume delete {id}");
            shell(self.b, &end)?;
        }
        Ok((ratios, samples))
    }
}
