//! What the daemon keeps in memory.

use anyhow::{Context, Result};
use dmlocal_testbed::Node;

use super::{Bench, MIB, Row, shell};

pub(super) const NAMES: [&str; 2] = ["rss_idle_mib", "rss_growth_200_rounds"];

/// Rounds of create, attach, detach, delete, and when memory is first read.
const ROUNDS: u32 = 200;
const EARLY_ROUNDS: u32 = 20;

/// Volumes at a time in these rounds; divides both.
const WORKERS: u32 = 4;

impl Bench<'_> {
    pub(super) fn rss_idle(&self) -> Result<Row> {
        let value = rss_mib(self.a)?;
        let detail = "VmRSS of dmlocald after its start".to_owned();
        Ok(Row { name: NAMES[0], value, bar: 20.0, at_least: false, detail })
    }

    pub(super) fn rss_growth(&self) -> Result<Row> {
        // Side by side, because starting a program takes longer here than its work.
        let rounds = |count: u32| {
            let one = "id=$(cat /proc/sys/kernel/random/uuid); \
                       dmlocalctl volume create $id --size 8MiB >/dev/null && \
                       dmlocalctl volume attach $id >/dev/null && \
                       dmlocalctl volume detach $id >/dev/null && \
                       dmlocalctl volume delete $id >/dev/null || exit 1";
            let line = format!("for round in $(seq {}); do {one}; done", count / WORKERS);
            let all = format!(
                "pids=; for worker in $(seq {WORKERS}); do ({line}) & pids=\"$pids $!\"; done; \
                 for pid in $pids; do wait $pid || exit 1; done"
            );
            shell(self.b, &all)
        };
        rounds(EARLY_ROUNDS)?;
        let early = rss_mib(self.b)?;
        rounds(ROUNDS - EARLY_ROUNDS)?;
        let late = rss_mib(self.b)?;
        Ok(Row {
            name: NAMES[1],
            value: late / early,
            bar: 1.1,
            at_least: false,
            detail: format!("{early:.2} MiB after {EARLY_ROUNDS} rounds, {late:.2} after {ROUNDS}"),
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "a few thousand KiB")]
fn rss_mib(node: &Node) -> Result<f64> {
    let text = shell(node, "awk '/VmRSS/ {print $2}' /proc/$(pidof dmlocald)/status")?;
    let kib: u64 = text.trim().parse().with_context(|| format!("reading `{text}`"))?;
    Ok((kib * 1024) as f64 / MIB as f64)
}
