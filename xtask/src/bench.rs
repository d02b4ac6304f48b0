//! What `cargo xtask bench` measures, each figure a ratio within one run.
//!
//! The machine is emulated and shared, so nothing here is an absolute figure of
//! merit: what is compared runs at the same time or strictly alternating, and a
//! figure is the median of its rounds. It ends with success once it has
//! measured, whatever holds.

mod cinder;
mod copies;
mod driver;
mod handle;
mod load;
mod longest;
mod memory;

use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, Result, anyhow};
use dmlocal_testbed::{Cluster, Node, Options};
use serde_json::{Value, json};

use crate::run;
use copies::Copied;
use longest::Longest;

/// Longest single command.
const LIMIT: Duration = Duration::from_secs(600);

/// Runs of fio for each figure that is made of them.
const WINDOWS: usize = 9;

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

/// Measures and prints.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let only = arguments.only.as_deref().unwrap_or("");
    let wanted = |names: &[&str]| names.iter().any(|name| name.contains(only));
    let longest: Vec<_> = longest::ALL.iter().map(|longest| longest.name).collect();
    let on_nodes = [
        &memory::NAMES[..],
        &cinder::NAMES,
        &copies::NAMES,
        &handle::NAMES,
        &load::NAMES,
        &longest,
    ]
    .concat();
    let takes_nodes = wanted(&on_nodes);
    if takes_nodes {
        run::become_root()?;
    }
    let mut rows = Vec::new();
    if wanted(&driver::NAMES) {
        rows.extend(run::part("driver", driver::rows)?);
    }
    let measured = if takes_nodes { on_two_nodes(arguments, &wanted, &mut rows) } else { Ok(()) };
    // What was measured is worth knowing, whatever became of the rest.
    print(&rows, &arguments.output);
    measured
}

/// Builds, boots two nodes and measures on them.
fn on_two_nodes(
    arguments: &Arguments,
    wanted: &impl Fn(&[&str]) -> bool,
    rows: &mut Vec<Row>,
) -> Result<()> {
    if !arguments.no_build {
        run::build_for_nodes()?;
    }
    let cluster = run::part("two nodes boot", || Cluster::start(&Options::default()))?;
    let bench =
        Bench { a: cluster.node("a")?, b: cluster.node("b")?, quiet: arguments.output == "json" };
    bench.measure(wanted, rows)
}

fn print(rows: &[Row], output: &str) {
    if output == "json" {
        println!("{}", Value::from(rows.iter().map(Row::json).collect::<Vec<_>>()));
        return;
    }
    println!("{:<26} {:>9} {:>10}  {:<5}  DETAIL", "NAME", "VALUE", "BAR", "HOLDS");
    for row in rows {
        let bar = format!("{} {}", if row.at_least { ">=" } else { "<=" }, row.bar);
        let holds = if row.holds() { "yes" } else { "no" };
        println!("{:<26} {:>9.3} {bar:>10}  {holds:<5}  {}", row.name, row.value, row.detail);
    }
}

/// What is made beforehand, on the first node.
struct Prepared {
    copied: Option<Copied>,
    written: Vec<(&'static Longest, Vec<String>)>,
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

    fn measure(&self, wanted: &impl Fn(&[&str]) -> bool, rows: &mut Vec<Row>) -> Result<()> {
        if wanted(&memory::NAMES[..1]) {
            rows.push(self.rss_idle()?);
        }
        // Rounds on one node leave the other's memory alone, and take long.
        let (grown, prepared) = thread::scope(|scope| {
            let grown = wanted(&memory::NAMES[1..])
                .then(|| scope.spawn(|| run::part("memory", || self.rss_growth())));
            let prepared = run::part("volumes", || self.prepare(wanted));
            (grown.map(thread::ScopedJoinHandle::join), prepared)
        });
        let prepared = prepared?;
        if let Some(grown) = grown {
            rows.push(grown.map_err(|_| anyhow!("a thread panicked"))??);
        }
        if let Some(volumes) = &prepared.copied {
            if wanted(&copies::NAMES) {
                rows.extend(run::part("copies", || self.copies(volumes))?);
            } else {
                self.carry(volumes)?;
            }
            if wanted(&handle::NAMES) {
                rows.extend(run::part("handle and LV", || self.handle_over_lv(volumes))?);
            }
            if wanted(&load::NAMES) {
                rows.extend(run::part("reads below a copy", || self.under_load(volumes))?);
            }
        }
        if wanted(&cinder::NAMES) {
            rows.extend(run::part("beside LVM", || self.beside_lvm())?);
        }
        for (longest, volumes) in &prepared.written {
            rows.push(run::part(longest.name, || self.longest(longest, volumes))?);
        }
        Ok(())
    }

    fn prepare(&self, wanted: &impl Fn(&[&str]) -> bool) -> Result<Prepared> {
        let names = [&copies::NAMES[..], &handle::NAMES, &load::NAMES].concat();
        let copied = wanted(&names).then(|| self.prepare_copied()).transpose()?;
        let mut written = Vec::new();
        for longest in &longest::ALL {
            if wanted(&[longest.name]) {
                written.push((longest, self.prepare_written(longest)?));
            }
        }
        Ok(Prepared { copied, written })
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
