//! What `cargo xtask bench` measures, each figure a ratio within one run.
//!
//! The machine is emulated and shared, so nothing here is an absolute figure of
//! merit: what is compared runs at the same time or strictly alternating, and a
//! figure is the median of its rounds. It ends with success once it has
//! measured, whatever holds.

mod load;
mod memory;
mod sparse;

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::{Cluster, Node, Options};
use serde_json::{Value, json};

use crate::run;

/// Longest single command.
const LIMIT: Duration = Duration::from_secs(600);

/// Rounds of copies and of fio.
const COPIES: usize = 3;
const WINDOWS: usize = 9;

/// Seconds of writing during which a volume is collapsed.
const COLLAPSE_S: u32 = 12;

/// Seconds of writing during which the source is fenced and copying begins.
const SWITCH_S: u32 = 8;

const MIB: u64 = 1 << 20;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Takes the programs as they were last built
    #[arg(long)]
    no_build: bool,
    /// A table for people or a list for programs
    #[arg(long, value_parser = ["table", "json"], default_value = "table")]
    output: String,
    /// Only the figures with this in their names
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Also the figures that do not fit into 20 minutes with the others
    #[arg(long)]
    full: bool,
}

struct Row {
    name: &'static str,
    value: f64,
    bar: f64,
    /// Whether the bar is a least value.
    at_least: bool,
    detail: String,
}

impl Row {
    fn holds(&self) -> bool {
        if self.at_least { self.value >= self.bar } else { self.value <= self.bar }
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "value": self.value,
            "bar": self.bar,
            "holds": self.holds(),
            "detail": self.detail,
        })
    }
}

/// Builds, boots two nodes, measures and prints.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    run::become_root()?;
    if !arguments.no_build {
        run::build_for_nodes()?;
    }
    let cluster = run::part("two nodes boot", || Cluster::start(&Options::default()))?;
    let bench =
        Bench { a: cluster.node("a")?, b: cluster.node("b")?, quiet: arguments.output == "json" };
    let wanted = |names: &[&str]| {
        let only = arguments.only.as_deref().unwrap_or("");
        names.iter().any(|name| name.contains(only))
    };
    let full = arguments.full || arguments.only.is_some();
    let mut rows = Vec::new();
    if wanted(&["rss_idle_mib"]) {
        rows.push(bench.rss_idle()?);
    }
    if wanted(&["usable_1gib_over_64mib", "usable_over_full_copy", "hydration_over_dd"]) {
        rows.extend(run::part("copies", || bench.copies())?);
    }
    // Not side by side: what goes on beside them moves the two devices apart.
    if wanted(&["handle_over_lv_randread", "handle_over_lv_randwrite"]) {
        let moved = bench.moved(256)?;
        rows.extend(run::part("handle and LV", || bench.handle_over_lv(&moved))?);
    }
    if wanted(&["rss_growth_200_rounds"]) {
        rows.push(run::part("memory", || bench.rss_growth())?);
    }
    if wanted(&["collapse_max_over_p999"]) {
        rows.push(run::part("collapses", || bench.collapse())?);
    }
    if full && wanted(&["switch_max_over_p999"]) {
        rows.push(bench.switch()?);
    }
    if full && wanted(&load::UNDER_LOAD) {
        rows.extend(bench.under_load()?);
    }
    if full && wanted(&["sparse_move_over_full", "sparse_bytes_over_allocated"]) {
        rows.extend(bench.sparse()?);
    }
    if full && wanted(&["seed_pause_over_p999"]) {
        rows.push(bench.seed_pause()?);
    }
    if arguments.output == "json" {
        println!("{}", Value::from(rows.iter().map(Row::json).collect::<Vec<_>>()));
        return Ok(());
    }
    println!("{:<26} {:>9} {:>10}  {:<5}  DETAIL", "NAME", "VALUE", "BAR", "HOLDS");
    for row in &rows {
        let bar = format!("{} {}", if row.at_least { ">=" } else { "<=" }, row.bar);
        let holds = if row.holds() { "yes" } else { "no" };
        println!("{:<26} {:>9.3} {bar:>10}  {holds:<5}  {}", row.name, row.value, row.detail);
    }
    Ok(())
}

struct Bench<'a> {
    a: &'a Node,
    b: &'a Node,
    quiet: bool,
}

impl Bench<'_> {
    fn say(&self, what: &str) {
        if !self.quiet {
            println!("     {what}");
        }
    }

    /// A new volume on a node, attached.
    fn volume(&self, on: &Node, mib: u64) -> Result<String> {
        let id = fs::read_to_string("/proc/sys/kernel/random/uuid").context("drawing an id")?;
        let id = id.trim().to_owned();
        shell(on, &format!("dmlocalctl volume create {id} --size {mib}MiB"))?;
        shell(on, &format!("dmlocalctl volume attach {id}"))?;
        Ok(id)
    }

    /// Seconds from the call until the first block was read at the destination.
    fn usable(&self, id: &str, from: &Node, to: &Node, hold: &str) -> Result<f64> {
        let order = format!(
            "dmlocalctl volume move {id} --from https://{}:7450 --to https://{}:7450 {hold}",
            from.name(),
            to.name()
        );
        let read =
            format!("dd if=/dev/mapper/dmlocal-{id} of=/dev/null bs=4k count=1 iflag=direct");
        timed(to, &format!("{order} >/dev/null && {read}"))
    }

    fn copies(&self) -> Result<Vec<Row>> {
        let big = self.volume(self.a, 1024)?;
        self.say("1 GiB of random data is written");
        let fill = format!("dmlocal-writer fill --device /dev/mapper/dmlocal-{big} --seed 1");
        shell(self.a, &fill)?;
        shell(self.a, &format!("dmlocalctl volume detach {big}"))?;
        let (mut small_s, mut big_s, mut dd_s, mut ratios) = (vec![], vec![], vec![], vec![]);
        let (mut from, mut to) = (self.a, self.b);
        for _ in 0..COPIES {
            let small = self.volume(from, 64)?;
            shell(from, &format!("dmlocalctl volume detach {small}"))?;
            small_s.push(self.usable(&small, from, to, "")?);
            wait_until_local(to, &small)?;
            shell(
                to,
                &format!("dmlocalctl volume detach {small} && dmlocalctl volume delete {small}"),
            )?;

            // A held destination has the connection, and copies nothing by itself.
            self.usable(&big, from, to, "--hold")?;
            dd_s.push(self.dd_from_namespace(to)?);
            shell(to, &format!("dmlocalctl volume abort {big}"))?;

            big_s.push(self.usable(&big, from, to, "")?);
            #[expect(clippy::cast_precision_loss, reason = "a power of two")]
            let dd_rate = (1024 * MIB) as f64 / last(&dd_s);
            ratios.push(self.hydration(to, &big)? / dd_rate);
            wait_until_local(to, &big)?;
            shell(to, &format!("dmlocalctl volume detach {big}"))?;
            std::mem::swap(&mut from, &mut to);
            self.say(&format!(
                "usable: {:.2} s for 64 MiB, {:.2} s for 1 GiB; dd {:.1} s, hydration {:.2} of it",
                last(&small_s),
                last(&big_s),
                last(&dd_s),
                last(&ratios)
            ));
        }
        shell(from, &format!("dmlocalctl volume delete {big}"))?;
        let detail = format!("s: 64 MiB {small_s:.2?}, 1 GiB {big_s:.2?}");
        let (small, big) = (median(&small_s), median(&big_s));
        let dd = median(&dd_s);
        Ok(vec![
            Row {
                name: "usable_1gib_over_64mib",
                value: big / small,
                bar: 1.5,
                at_least: false,
                detail,
            },
            Row {
                name: "usable_over_full_copy",
                value: big / dd,
                bar: 0.25,
                at_least: false,
                detail: format!("s: usable {big_s:.2?}, dd {dd_s:.2?}"),
            },
            Row {
                name: "hydration_over_dd",
                value: median(&ratios),
                bar: 0.8,
                at_least: true,
                detail: format!("bytes per second over those of the dd before: {ratios:.2?}"),
            },
        ])
    }

    /// Seconds that a copy of the source's namespace to a fresh thin LV takes.
    fn dd_from_namespace(&self, to: &Node) -> Result<f64> {
        shell(to, "lvcreate -y -qq -V 1G -T dmlocal/pool -n bench")?;
        let namespace = shell(to, "ls -d /dev/nvme*n1 | head -1")?;
        let copy = format!(
            "dd if={} of=/dev/dmlocal/bench bs=1M iflag=direct oflag=direct conv=fsync",
            namespace.trim()
        );
        let seconds = timed(to, &copy)?;
        shell(to, "lvremove -y -qq dmlocal/bench")?;
        Ok(seconds)
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

    /// A volume that has moved from A to B, and is attached there.
    fn moved(&self, mib: u64) -> Result<String> {
        let id = self.volume(self.a, mib)?;
        let order = format!(
            "dmlocalctl volume move {id} --from https://node-a:7450 --to https://node-b:7450 \
             --hold && dmlocalctl volume switch {id}"
        );
        shell(self.b, &order)?;
        wait_until_local(self.b, &id)?;
        Ok(id)
    }

    /// The handle and a bare thin LV, side by side in one fio run.
    fn handle_over_lv(&self, id: &str) -> Result<Vec<Row>> {
        shell(self.b, "lvcreate -y -qq -V 256M -T dmlocal/pool -n bench")?;
        let handle = format!("/dev/mapper/dmlocal-{id}");
        for device in [handle.as_str(), "/dev/dmlocal/bench"] {
            shell(self.b, &format!("dmlocal-writer fill --device {device} --seed 1"))?;
        }
        let mut rows = Vec::new();
        for (name, side, mode) in [
            ("handle_over_lv_randread", "read", "randread"),
            ("handle_over_lv_randwrite", "write", "randwrite"),
        ] {
            let mut ratios = Vec::new();
            for window in 0..WINDOWS {
                // The order of the jobs alternates: the first starts a little earlier.
                let mut jobs = [("handle", handle.as_str()), ("lv", "/dev/dmlocal/bench")];
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
                         --time_based --runtime=4 --thread{jobs}"
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
            let detail = format!("{WINDOWS} windows of 4 s side by side: {ratios:.3?}");
            rows.push(Row { name, value: median(&ratios), bar: 0.95, at_least: true, detail });
        }
        shell(self.b, "lvremove -y -qq dmlocal/bench")?;
        shell(self.b, &format!("dmlocalctl volume detach {id} && dmlocalctl volume delete {id}"))?;
        Ok(rows)
    }

    /// The longest write of a run in which the handle is switched.
    fn collapse(&self) -> Result<Row> {
        let mut ratios = Vec::new();
        let mut samples = Vec::new();
        for _ in 0..WINDOWS {
            let id = self.volume(self.a, 16)?;
            // What was never written would be here before the guest is.
            let fill = format!("dmlocal-writer fill --device /dev/mapper/dmlocal-{id} --seed 1");
            shell(self.a, &fill)?;
            let order = format!(
                "dmlocalctl volume move {id} --from https://node-a:7450 --to https://node-b:7450 \
                 --hold && dmlocalctl volume switch {id}"
            );
            shell(self.b, &order)?;
            let report = fio(
                self.b,
                &format!(
                    "--rw=randwrite --bs=4k --iodepth=1 --ioengine=libaio --direct=1 --time_based \
                     --runtime={COLLAPSE_S} --percentile_list=50:99:99.9 --thread --name=guest \
                     --filename=/dev/mapper/dmlocal-{id}"
                ),
            )?;
            let state = shell(self.b, &format!("dmlocalctl status {id} --output json"))?;
            let state: Value = serde_json::from_str(&state).context("reading status")?;
            ensure!(state[0]["state"] == "local", "fio did not outlast the collapse: {state}");
            let latency = &report["jobs"][0]["write"]["clat_ns"];
            let longest = latency["max"].as_f64().context("fio's longest")?;
            let usual = latency["percentile"]["99.900000"].as_f64().context("fio's p99.9")?;
            ratios.push(longest / usual);
            samples.push(report["jobs"][0]["write"]["total_ios"].as_u64().unwrap_or(0));
            let end = format!("dmlocalctl volume detach {id} && dmlocalctl volume delete {id}");
            shell(self.b, &end)?;
        }
        self.say(&format!("collapse: {ratios:.2?}"));
        let detail = format!("runs of {COLLAPSE_S} s: {ratios:.2?}, of {samples:?} writes");
        Ok(Row {
            name: "collapse_max_over_p999",
            value: median(&ratios),
            bar: 5.0,
            at_least: false,
            detail,
        })
    }

    /// The longest write of a run whose first write fences the source.
    fn switch(&self) -> Result<Row> {
        let mut ratios = Vec::new();
        let mut longest_ms = Vec::new();
        for _ in 0..WINDOWS {
            let id = self.volume(self.a, 64)?;
            let handle = format!("/dev/mapper/dmlocal-{id}");
            // There is nothing to be marked: that is another figure.
            shell(self.a, &format!("dmlocal-writer fill --device {handle} --seed 1"))?;
            // Copying goes on when the run ends: a collapse is another figure.
            let order = format!(
                "dmlocalctl volume move {id} --from https://node-a:7450 --to https://node-b:7450 \
                 --hold && dmlocalctl hydration set {id} --rate 1MiB"
            );
            shell(self.b, &order)?;
            // The guest writes at the source until it is stopped there.
            let writes = "--rw=randwrite --bs=4k --iodepth=1 --ioengine=libaio --direct=1 \
                          --time_based --percentile_list=50:99:99.9 --thread --name=guest";
            fio(self.a, &format!("{writes} --runtime=1 --filename={handle}"))?;
            let report =
                fio(self.b, &format!("{writes} --runtime={SWITCH_S} --filename={handle}"))?;
            let state = shell(self.b, &format!("dmlocalctl status {id} --output json"))?;
            let state: Value = serde_json::from_str(&state).context("reading status")?;
            ensure!(state[0]["state"] == "hydrating", "it arrived during the run: {state}");
            let latency = &report["jobs"][0]["write"]["clat_ns"];
            let longest = latency["max"].as_f64().context("fio's longest")?;
            let usual = latency["percentile"]["99.900000"].as_f64().context("fio's p99.9")?;
            ratios.push(longest / usual);
            longest_ms.push(longest / 1e6);
            shell(self.b, &format!("dmlocalctl hydration set {id} --rate 0"))?;
            wait_until_local(self.b, &id)?;
            let end = format!("dmlocalctl volume detach {id} && dmlocalctl volume delete {id}");
            shell(self.b, &end)?;
        }
        self.say(&format!("switch: {ratios:.2?}"));
        let detail = format!("runs of {SWITCH_S} s: {ratios:.2?}, longest in ms: {longest_ms:.0?}");
        Ok(Row {
            name: "switch_max_over_p999",
            value: median(&ratios),
            bar: 5.0,
            at_least: false,
            detail,
        })
    }
}

fn shell(node: &Node, line: &str) -> Result<String> {
    node.exec_with(&["sh", "-c", line], b"", LIMIT)?.ok().with_context(|| line.to_owned())
}

/// Seconds that a line takes inside the node.
fn timed(node: &Node, line: &str) -> Result<f64> {
    let text = shell(
        node,
        &format!(
            "from=$(date +%s%N); {{ {line}; }} >&2 || exit 1; to=$(date +%s%N); echo $((to - from))"
        ),
    )?;
    let nanoseconds: f64 = text.trim().parse().with_context(|| format!("reading `{text}`"))?;
    Ok(nanoseconds / 1e9)
}

fn fio(node: &Node, options: &str) -> Result<Value> {
    let text = shell(node, &format!("fio --output-format=json {options}"))?;
    let start = text.find('{').context("fio reported nothing")?;
    serde_json::from_str(&text[start..]).context("reading fio's report")
}

fn wait_until_local(node: &Node, id: &str) -> Result<()> {
    let line = format!(
        "until dmlocalctl status {id} --output json | grep -q '\"state\": *\"local\"'; do sleep 0.2; done"
    );
    shell(node, &line).map(drop)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn last(values: &[f64]) -> f64 {
    values.last().copied().unwrap_or(f64::NAN)
}
