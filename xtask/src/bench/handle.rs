//! What a volume's handle costs once everything is here.

use anyhow::{Context, Result};

use super::copies::{BARE, Copied};
use super::{Bench, Row, WINDOWS, fio, median, shell};

pub(super) const NAMES: [&str; 2] = ["handle_over_lv_randread", "handle_over_lv_randwrite"];

/// Seconds of each window.
const WINDOW_S: u32 = 4;

impl Bench<'_> {
    /// The handle and a bare thin LV with as much in it, side by side in one fio run:
    /// what goes on beside them would move the two apart.
    pub(super) fn handle_over_lv(&self, volumes: &Copied) -> Result<Vec<Row>> {
        let id = &volumes.big;
        shell(self.b, &format!("dmlocalctl volume attach {id}"))?;
        let handle = format!("/dev/mapper/dmlocal-{id}");
        let mut rows = Vec::new();
        for name in NAMES {
            let mode = name.rsplit('_').next().context("a mode")?;
            let side = mode.trim_start_matches("rand");
            let mut ratios = Vec::new();
            for window in 0..WINDOWS {
                // The order of the jobs alternates: the first starts a little earlier.
                let mut jobs = [("handle", handle.as_str()), ("lv", BARE)];
                if window % 2 == 1 {
                    jobs.reverse();
                }
                let jobs: String = jobs
                    .iter()
                    .map(|(job, device)| format!(" --name={job} --filename={device}"))
                    .collect();
                let report = fio(
                    self.b,
                    &format!(
                        "--rw={mode} --bs=4k --iodepth=4 --ioengine=libaio --direct=1 \
                         --time_based --runtime={WINDOW_S} --thread{jobs}"
                    ),
                )?;
                let iops = |job: &str| {
                    let jobs = report["jobs"].as_array().context("fio's jobs")?;
                    let found = jobs.iter().find(|one| one["jobname"] == job);
                    found.and_then(|one| one[side]["iops"].as_f64()).context("fio's iops")
                };
                ratios.push(iops("handle")? / iops("lv")?);
            }
            self.say(&format!("{name}: {ratios:.3?}"));
            let detail = format!("{WINDOWS} windows of {WINDOW_S} s side by side: {ratios:.3?}");
            rows.push(Row { name, value: median(&ratios), bar: 0.95, at_least: true, detail });
        }
        shell(self.b, &format!("dmlocalctl volume detach {id}"))?;
        Ok(rows)
    }
}
