//! What the Cinder driver adds to what its agents do. It needs no node.

use anyhow::{Context, Result, bail};
use dmlocal_testbed::{packages, python};
use serde_json::Value;

use super::Row;

pub(super) const NAMES: [&str; 2] = ["driver_overhead_ms", "local_attach_calls"];

/// Measures with pretended agents, whose own time is left out.
pub(super) fn rows() -> Result<Vec<Row>> {
    packages::ensure(packages::DRIVER)?;
    let mut command = python::in_driver()?;
    let output = command.args(["-W", "ignore", "-m", "cinder_dmlocal.tests.overhead"]).output()?;
    if !output.status.success() {
        bail!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    let report: Value = serde_json::from_slice(&output.stdout).context("reading the report")?;
    let each = report["overhead_ms"].as_object().context("the report lacks overhead_ms")?;
    let times: Vec<f64> = each.values().filter_map(Value::as_f64).collect();
    let slowest = times.iter().copied().max_by(f64::total_cmp).context("nothing was measured")?;
    let calls = report["local_attach_calls"].as_f64();
    let calls = calls.context("the report lacks local_attach_calls")?;
    let each: Vec<_> = each.iter().map(|(call, ms)| format!("{call} {ms}")).collect();
    Ok(vec![
        Row {
            name: NAMES[0],
            value: slowest,
            bar: 20.0,
            at_least: false,
            detail: format!("the slowest call's median; ms: {}", each.join(", ")),
        },
        Row {
            name: NAMES[1],
            value: calls,
            bar: 2.0,
            at_least: false,
            detail: "calls to agents for attaching a volume where it is".to_owned(),
        },
    ])
}
