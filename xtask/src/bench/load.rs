//! What a guest's reads and a copy below them do to each other.

use anyhow::{Context, Result, anyhow};
use dmlocal_testbed::Node;

use super::copies::Copied;
use super::{Bench, Row, WINDOWS, median, shell};

pub(super) const NAMES: [&str; 3] =
    ["read_p99_while_hydrating", "hydration_under_load_over_idle", "worst_tenth_over_mean"];

/// Parts that a window is cut into, seconds between the looks at their ends, each of which
/// takes about as long again, and seconds of copying without a guest afterwards.
const TENTHS: usize = 10;
const PAUSE_S: f64 = 0.15;
const IDLE_S: f64 = 0.5;

/// With less of the copy left than so many windows copied on average, it is begun anew.
const SPARE_WINDOWS: f64 = 2.5;

/// Where the guest reads: the copy gets there last.
const READ: &str = "--offset=960m --size=64m";

/// What happened to a copy, and to a guest, from the first look to the last.
struct Window {
    /// Regions a second between two looks.
    rates: Vec<f64>,
    /// Nanoseconds within which 99 of 100 reads ended.
    p99: f64,
}

impl Bench<'_> {
    /// A guest that reads at random, in turns from a held volume and from one of which a
    /// copy is made, with the settings that a copy has by itself.
    pub(super) fn under_load(&self, volumes: &Copied) -> Result<Vec<Row>> {
        let (from, to) = (self.b, self.a);
        let Copied { big, small, .. } = volumes;
        let fill = format!(
            "dmlocalctl volume attach {small} && \
             dmlocal-writer fill --device /dev/mapper/dmlocal-{small} --seed 1 && \
             dmlocalctl volume detach {small}"
        );
        shell(from, &fill)?;
        self.usable(small, from, to, "--hold")?;
        self.begin_copy(from, to, big)?;

        let (mut latency, mut progress, mut worst) = (vec![], vec![], vec![]);
        let mut begun_at = copied(to, big)?.0;
        let mut windows = 0.0;
        while latency.len() < WINDOWS {
            let held = watch(to, small, "", "", "true")?.p99;
            let resume = format!("dmlocalctl hydration resume {big}");
            let pause = format!("dmlocalctl hydration pause {big}");
            let seen = watch(to, big, READ, &resume, &pause)?;
            let (loaded, idle) = seen.rates.split_at(TENTHS);
            latency.push(seen.p99 / held);
            progress.push(mean(loaded) / mean(idle));
            worst.push(loaded.iter().copied().fold(f64::INFINITY, f64::min) / mean(loaded));
            self.say(&format!(
                "p99 {:.1} ms held, {:.1} ms hydrating; regions a second {idle:.0?} idle, \
                 {loaded:.0?} below reads",
                held / 1e6,
                seen.p99 / 1e6,
            ));
            windows += 1.0;
            let (here, all) = copied(to, big)?;
            if latency.len() < WINDOWS && all - here < (here - begun_at) / windows * SPARE_WINDOWS {
                shell(to, &resume)?;
                self.arrive(to, big)?;
                self.usable(big, to, from, "")?;
                self.arrive(from, big)?;
                self.begin_copy(from, to, big)?;
                (begun_at, windows) = (copied(to, big)?.0, 0.0);
            }
        }
        let bars = [(2.0, false), (0.2, true), (0.2, true)];
        let rows = NAMES.into_iter().zip([latency, progress, worst]).zip(bars);
        Ok(rows
            .map(|((name, values), (bar, at_least))| Row {
                name,
                value: median(&values),
                bar,
                at_least,
                detail: format!("{WINDOWS} windows: {values:.2?}"),
            })
            .collect())
    }

    /// A copy that has been at work, and rests.
    fn begin_copy(&self, from: &Node, to: &Node, id: &str) -> Result<()> {
        self.usable(id, from, to, "--hold")?;
        let first = "echo $(dmsetup status --noflush $clone | cut -d' ' -f7)";
        shell(
            to,
            &format!(
                "dmlocalctl volume switch {id}
                 clone=$(dmsetup ls | awk '/{id}-g[0-9]+-clone/ {{print $1}}')
                 from=$({first})
                 while [ \"$({first})\" = \"$from\" ]; do sleep 0.05; done
                 dmlocalctl hydration pause {id}"
            ),
        )
        .map(drop)
    }
}

/// Regions of a copy that are here, and all of them.
fn copied(node: &Node, id: &str) -> Result<(f64, f64)> {
    let look = format!(
        "dmsetup status --noflush $(dmsetup ls | awk '/{id}-g[0-9]+-clone/ {{print $1}}') \
         | cut -d' ' -f7"
    );
    let text = shell(node, &look)?;
    let (here, all) = text.trim().split_once('/').context("the copy has arrived")?;
    Ok((here.parse()?, all.parse()?))
}

/// Looks at a copy while a guest reads, and for a moment without it. `begin` is done once
/// the guest reads, `end` afterwards.
fn watch(node: &Node, id: &str, of: &str, begin: &str, end: &str) -> Result<Window> {
    let looks = TENTHS + 1;
    // The log says for each read, in milliseconds, when it ended and, in nanoseconds, how
    // long it took.
    let text = shell(
        node,
        &format!(
            "clone=$(dmsetup ls | awk '/{id}-g[0-9]+-clone/ {{print $1}}')
             at=/sys/block/$(basename $(readlink -f /dev/mapper/dmlocal-{id}))/stat
             reads() {{ read -r count rest <$at; echo $count; }}
             look() {{
                 set -- $(dmsetup status --noflush $clone)
                 echo look $(date +%s%N) ${{7%/*}} ${{7#*/}}
             }}
             cd $(mktemp -d)
             until=$(($(reads) + 20))
             fio --rw=randread --bs=4k --iodepth=4 --ioengine=libaio --direct=1 --time_based \
                 --runtime=300 --thread --name=guest --filename=/dev/mapper/dmlocal-{id} {of} \
                 --write_lat_log=guest --log_unix_epoch=1 >&2 &
             while [ $(reads) -lt $until ]; do sleep 0.05; done
             {begin} >&2
             for look in $(seq {looks}); do
                 look
                 [ $look = {looks} ] || sleep {PAUSE_S}
             done
             kill -INT $!
             wait $!
             look
             sleep {IDLE_S}
             look
             {end} >&2
             cut -d, -f1,2 guest_clat.1.log
             rm *.log"
        ),
    )?;
    let looked: Vec<[f64; 2]> = text
        .lines()
        .filter_map(|line| line.strip_prefix("look "))
        .map(|line| {
            let [at, here, all] = line.split(' ').collect::<Vec<_>>()[..] else {
                return Err(anyhow!("the copy has arrived: {line}"));
            };
            (here != all).then_some(()).context("the copy has arrived")?;
            Ok([at.parse()?, here.parse()?])
        })
        .collect::<Result<_>>()?;
    // While fio ends it neither reads nor leaves the processors alone.
    let rates = looked
        .iter()
        .zip(looked.iter().skip(1))
        .enumerate()
        .filter(|(pair, _)| *pair != TENTHS)
        .map(|(_, (one, next))| (next[1] - one[1]) / (next[0] - one[0]) * 1e9)
        .collect();
    let (first, last) = (looked[0][0] / 1e6, looked[TENTHS][0] / 1e6);
    let mut latencies = Vec::new();
    for line in text.lines() {
        let Some((at, latency)) = line.split_once(", ") else { continue };
        let (at, latency): (f64, f64) = (at.parse()?, latency.parse()?);
        if (first..=last).contains(&at) {
            latencies.push(latency);
        }
    }
    latencies.sort_by(f64::total_cmp);
    let p99 = latencies.get(latencies.len() * 99 / 100).copied().context("nothing was read")?;
    Ok(Window { rates, p99 })
}

fn mean(values: &[f64]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a few values")]
    let count = values.len() as f64;
    values.iter().sum::<f64>() / count
}
