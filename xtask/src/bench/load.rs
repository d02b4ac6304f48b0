//! What a guest's reads and a copy below them do to each other.

use std::thread;

use anyhow::{Context, Result, anyhow};

use super::{Bench, Row, WINDOWS, fio, median, shell};

/// What is measured of a copy and of a guest that reads meanwhile.
pub(super) const UNDER_LOAD: [&str; 3] =
    ["read_p99_while_hydrating", "hydration_under_load_over_idle", "worst_tenth_over_mean"];

/// Seconds of reading in each of their windows, and parts that a window is cut into.
const LOAD_S: u32 = 3;
const TENTHS: u32 = 10;

impl Bench<'_> {
    /// A guest that reads at random, and a copy below it with the settings that a copy
    /// has by itself: what each does to the other.
    pub(super) fn under_load(&self) -> Result<Vec<Row>> {
        let (mut latency, mut progress, mut worst) = (vec![], vec![], vec![]);
        for _ in 0..WINDOWS {
            let id = self.volume(self.a, 384)?;
            let handle = format!("/dev/mapper/dmlocal-{id}");
            shell(self.a, &format!("dmlocal-writer fill --device {handle} --seed 1"))?;
            let order = format!(
                "dmlocalctl volume move {id} --from https://node-a:7450 --to https://node-b:7450 \
                 --hold"
            );
            shell(self.b, &order)?;
            let read = || -> Result<f64> {
                let report = fio(
                    self.b,
                    &format!(
                        "--rw=randread --bs=4k --iodepth=4 --ioengine=libaio --direct=1 \
                         --time_based --runtime={LOAD_S} --thread --name=guest --filename={handle}"
                    ),
                )?;
                let p99 = &report["jobs"][0]["read"]["clat_ns"]["percentile"]["99.000000"];
                p99.as_f64().context("fio's p99")
            };
            let held = read()?;
            shell(self.b, &format!("dmlocalctl volume switch {id}"))?;
            let (hydrating, loaded) = thread::scope(|scope| -> Result<_> {
                let watch = scope.spawn(|| self.tenths(&id));
                let hydrating = read()?;
                let loaded = watch.join().map_err(|_| anyhow!("a thread panicked"))??;
                Ok((hydrating, loaded))
            })?;
            let idle = mean(&self.tenths(&id)?);
            latency.push(hydrating / held);
            progress.push(mean(&loaded) / idle);
            worst.push(loaded.iter().copied().fold(f64::INFINITY, f64::min) / mean(&loaded));
            // What is left of it need not be copied.
            let end = format!("dmlocalctl volume detach {id} && dmlocalctl volume delete {id}");
            shell(self.b, &end)?;
        }
        self.say(&format!("under load: {latency:.2?} {progress:.2?} {worst:.2?}"));
        let bars = [(2.0, false), (0.2, true), (0.2, true)];
        let values = [latency, progress, worst];
        let rows = UNDER_LOAD.into_iter().zip(values).zip(bars);
        Ok(rows
            .map(|((name, values), (bar, at_least))| Row {
                name,
                value: median(&values),
                bar,
                at_least,
                detail: format!("{WINDOWS} windows of {LOAD_S} s: {values:.2?}"),
            })
            .collect())
    }

    /// Regions a second that were copied in each part of a window from now on.
    fn tenths(&self, id: &str) -> Result<Vec<f64>> {
        let pause = f64::from(LOAD_S) / f64::from(TENTHS);
        let look = format!(
            "name=$(dmsetup ls | awk '/{id}-g[0-9]+-clone/ {{print $1}}')
             for look in $(seq 0 {TENTHS}); do
                 set -- $(dmsetup status --noflush $name)
                 echo $(date +%s%N) ${{7%/*}}
                 sleep {pause}
             done"
        );
        let text = shell(self.b, &look)?;
        let looks: Vec<(f64, f64)> = text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(at, regions)| Ok((at.parse()?, regions.parse()?)))
            .collect::<Result<_>>()?;
        let pairs = looks.iter().zip(looks.iter().skip(1));
        Ok(pairs
            .map(|((from, before), (to, after))| (after - before) / (to - from) * 1e9)
            .collect())
    }
}

fn mean(values: &[f64]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a few values")]
    let count = values.len() as f64;
    values.iter().sum::<f64>() / count
}
