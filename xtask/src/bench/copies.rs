//! How soon a volume can be used elsewhere, and how fast the rest of it arrives.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::Node;
use serde_json::Value;

use super::{Bench, MIB, Row, last, median, shell, timed, wait_until_local};

pub(super) const NAMES: [&str; 5] = [
    "usable_1gib_over_64mib",
    "usable_over_full_copy",
    "hydration_over_dd",
    "sparse_move_over_full",
    "sparse_bytes_over_allocated",
];

/// Times that each volume moves. An odd number, so that they end on the second node.
const ROUNDS: usize = 3;

/// Size of the volumes that are copied, and of the small one.
const SIZE_MIB: u64 = 1024;
const SMALL_MIB: u64 = 64;

/// Of the sparse one, so many pieces of 1 MiB are written, far apart.
const PIECES: u64 = 64;

/// Where a `dd` writes to, and what handles are compared with afterwards.
pub(super) const BARE: &str = "/dev/dmlocal/bench";

/// Volumes that move to and fro.
pub(super) struct Copied {
    /// Written all over.
    pub(super) big: String,
    /// As large, with little in it.
    sparse: String,
    /// With nothing in it.
    pub(super) small: String,
}

impl Bench<'_> {
    /// Three detached volumes on the first node.
    pub(super) fn prepare_copied(&self) -> Result<Copied> {
        let big = self.volume(self.a, SIZE_MIB)?;
        self.say("1 GiB of random data is written");
        let fill = format!("dmlocal-writer fill --device /dev/mapper/dmlocal-{big} --seed 1");
        shell(self.a, &fill)?;
        let sparse = self.volume(self.a, SIZE_MIB)?;
        let apart = SIZE_MIB / PIECES;
        let pieces = format!(
            "for piece in $(seq 0 {}); do dd if=/dev/urandom of=/dev/mapper/dmlocal-{sparse} \
             bs=1M count=1 seek=$((piece * {apart})) oflag=direct 2>/dev/null || exit 1; done",
            PIECES - 1
        );
        shell(self.a, &pieces)?;
        let small = self.volume(self.a, SMALL_MIB)?;
        for id in [&big, &sparse, &small] {
            shell(self.a, &format!("dmlocalctl volume detach {id}"))?;
        }
        Ok(Copied { big, sparse, small })
    }

    /// What a single move does for those who only need the volumes elsewhere.
    pub(super) fn carry(&self, volumes: &Copied) -> Result<()> {
        for id in [&volumes.big, &volumes.small] {
            self.usable(id, self.a, self.b, "")?;
            self.arrive(self.b, id)?;
        }
        shell(self.b, "lvcreate -y -qq -V 1G -T dmlocal/pool -n bench")?;
        shell(self.b, &format!("dmlocal-writer fill --device {BARE} --seed 1")).map(drop)
    }

    pub(super) fn copies(&self, volumes: &Copied) -> Result<Vec<Row>> {
        let Copied { big, sparse, small } = volumes;
        let (mut small_s, mut big_s, mut dd_s, mut rates) = (vec![], vec![], vec![], vec![]);
        let (mut shares, mut hydrating_s, mut bytes) = (vec![], vec![], vec![]);
        let (mut from, mut to) = (self.a, self.b);
        for round in 1..=ROUNDS {
            small_s.push(self.usable(small, from, to, "")?);
            self.arrive(to, small)?;

            // A held destination has the connection, and copies nothing by itself.
            self.usable(big, from, to, "--hold")?;
            dd_s.push(self.dd_from_namespace(to)?);
            shell(to, &format!("dmlocalctl volume abort {big}"))?;
            // Of the last one, another figure is made.
            if round < ROUNDS {
                shell(to, "lvremove -y -qq dmlocal/bench")?;
            }

            big_s.push(self.usable(big, from, to, "")?);
            let started = Instant::now();
            #[expect(clippy::cast_precision_loss, reason = "a power of two")]
            let dd_rate = (SIZE_MIB * MIB) as f64 / last(&dd_s);
            rates.push(self.hydration(to, big)? / dd_rate);
            wait_until_hydrated(to, big)?;
            let full_s = started.elapsed().as_secs_f64();
            self.arrive(to, big)?;

            let allocated = allocated(from, sparse)?;
            self.usable(sparse, from, to, "")?;
            let started = Instant::now();
            wait_until_hydrated(to, sparse)?;
            let sparse_s = started.elapsed().as_secs_f64();
            shares.push(sparse_s / full_s);
            hydrating_s.push((sparse_s, full_s));
            wait_until_local(to, sparse)?;
            bytes.push(written(to, sparse)? / allocated);
            self.arrive(to, sparse)?;
            std::mem::swap(&mut from, &mut to);
            self.say(&format!(
                "usable: {:.2} s for 64 MiB, {:.2} s for 1 GiB; dd {:.1} s, hydration {:.2} of it; \
                 sparse {:.2} of a full one, {:.2} of what is allocated",
                last(&small_s),
                last(&big_s),
                last(&dd_s),
                last(&rates),
                last(&shares),
                last(&bytes)
            ));
        }
        let (usable, dd) = (median(&big_s), median(&dd_s));
        let values = [
            (usable / median(&small_s), 1.5, format!("s: 64 MiB {small_s:.2?}, 1 GiB {big_s:.2?}")),
            (usable / dd, 0.25, format!("s: usable {big_s:.2?}, dd {dd_s:.2?}")),
            (
                median(&rates),
                0.8,
                format!("bytes per second over those of the dd before: {rates:.2?}"),
            ),
            (
                median(&shares),
                0.15,
                format!("s in hydrating, {PIECES} MiB written and all: {hydrating_s:.1?}"),
            ),
            (
                median(&bytes),
                1.1,
                format!("written at the destination over allocated at the source: {bytes:.3?}"),
            ),
        ];
        let rows = NAMES.into_iter().zip(values);
        Ok(rows
            .map(|(name, (value, bar, detail))| Row {
                name,
                value,
                bar,
                at_least: name == "hydration_over_dd",
                detail,
            })
            .collect())
    }

    /// Waits for the end of a move, and detaches.
    pub(super) fn arrive(&self, to: &Node, id: &str) -> Result<()> {
        wait_until_local(to, id)?;
        shell(to, &format!("dmlocalctl volume detach {id}")).map(drop)
    }

    /// Seconds that a copy of the source's namespace to a fresh thin LV takes.
    fn dd_from_namespace(&self, to: &Node) -> Result<f64> {
        shell(to, "lvcreate -y -qq -V 1G -T dmlocal/pool -n bench")?;
        let namespace = shell(to, "ls -d /dev/nvme*n1 | head -1")?;
        let copy = format!(
            "dd if={} of={BARE} bs=1M iflag=direct oflag=direct conv=fsync",
            namespace.trim()
        );
        timed(to, &copy)
    }

    /// Bytes per second copied between now and the end, as the clone itself tells.
    fn hydration(&self, to: &Node, id: &str) -> Result<f64> {
        // Ten looks a second cost next to nothing; the clone goes once everything is
        // here, and its last line says how much that was.
        let watch = format!(
            "name=$(dmsetup ls | awk '/{id}-g[0-9]+-clone/ {{print $1}}')
             first=; from=$(date +%s%N)
             while line=$(dmsetup status --noflush $name 2>/dev/null); do
                 set -- $line
                 [ \"${{3:-}}\" = clone ] || break
                 [ -n \"$first\" ] || first=${{7%/*}}
                 last=${{7%/*}}; all=${{7#*/}}; region=$6; to=$(date +%s%N)
                 [ $last -lt $all ] || break
                 sleep 0.1
             done
             echo $(( (last - first) * region * 512 )) $((to - from))"
        );
        let text = shell(to, &watch)?;
        let (bytes, nanoseconds) = text.trim().split_once(' ').context("no rate")?;
        let (bytes, nanoseconds): (f64, f64) = (bytes.parse()?, nanoseconds.parse()?);
        ensure!(bytes > 0.0, "everything was copied before the first look");
        Ok(bytes / nanoseconds * 1e9)
    }
}

fn wait_until_hydrated(node: &Node, id: &str) -> Result<()> {
    let wait = format!(
        "while dmlocalctl status {id} --output json | grep -q '\"state\": *\"hydrating\"'; \
         do sleep 0.1; done"
    );
    shell(node, &wait).map(drop)
}

/// Bytes that a volume takes of its node's pool.
fn allocated(node: &Node, id: &str) -> Result<f64> {
    let status = shell(node, &format!("dmlocalctl status {id} --output json"))?;
    let status: Value = serde_json::from_str(&status).context("reading status")?;
    status[0]["allocated_bytes"].as_f64().context("nothing is allocated")
}

/// Bytes that were written to a volume that has just arrived and that nobody uses.
fn written(node: &Node, id: &str) -> Result<f64> {
    // Word 7 of a device's statistics counts sectors of 512 bytes.
    let line = format!(
        "set -- /dev/dmlocal/dmlocal-{id}-g*; [ $# = 1 ] || exit 1; \
         awk '{{print $7}}' /sys/block/$(basename $(readlink -f $1))/stat"
    );
    let sectors: f64 = shell(node, &line)?.trim().parse().context("sectors written")?;
    Ok(sectors * 512.0)
}
