//! The longest write of a guest across what happens below it, against its own p99.9.

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::Node;
use serde_json::Value;

use super::{Bench, MIB, Row, WINDOWS, median, shell, wait_until_local};

/// Fewer writes than this have no p99.9; more than that make a run no better.
const LEAST_WRITES: u64 = 1000;
const ENOUGH_WRITES: u64 = 2000;

/// Seconds for which a guest goes on writing after what it is measured across.
const AFTER_S: u32 = 2;

/// Seconds that a source takes to say what was never written, so that a guest writes by
/// then, and seconds of writing in which that is marked.
const DELAY_S: u32 = 3;
const MARKED_S: u32 = 9;

/// Where it writes then: beside what has to be copied, or everything is here before long.
const MISSING: &str = "--offset=8m";

/// Looks, ten a second, within which a guest that a switch begins with has written enough,
/// or goes on until it is the least: copying is to go on when a run ends.
const LOOKS: u32 = 50;

/// Where a source's map comes from.
const DUMP: &str = "$(command -v thin_dump)";

#[derive(Clone, Copy, PartialEq)]
enum Event {
    Switch,
    Marking,
    Collapse,
}

/// One such figure.
pub(super) struct Longest {
    pub(super) name: &'static str,
    event: Event,
    bar: f64,
    /// Of the volumes, and how much of it is written beforehand.
    size_mib: u64,
    written_mib: u64,
}

pub(super) static ALL: [Longest; 3] = [
    // Large enough for copying to go on when a run ends.
    Longest {
        name: "switch_max_over_p999",
        event: Event::Switch,
        bar: 5.0,
        size_mib: 320,
        written_mib: 320,
    },
    Longest {
        name: "collapse_max_over_p999",
        event: Event::Collapse,
        bar: 5.0,
        size_mib: 16,
        written_mib: 16,
    },
    Longest {
        name: "seed_pause_over_p999",
        event: Event::Marking,
        bar: 10.0,
        size_mib: 64,
        written_mib: 4,
    },
];

impl Bench<'_> {
    /// A volume for each run, attached at the first node.
    pub(super) fn prepare_written(&self, longest: &Longest) -> Result<Vec<String>> {
        let one = || {
            let id = self.volume(self.a, longest.size_mib)?;
            let fill = format!(
                "dd if=/dev/urandom of=/dev/mapper/dmlocal-{id} bs=1M count={} oflag=direct 2>&1",
                longest.written_mib
            );
            shell(self.a, &fill)?;
            Ok(id)
        };
        (0..WINDOWS).map(|_| one()).collect()
    }

    pub(super) fn longest(&self, longest: &Longest, volumes: &[String]) -> Result<Row> {
        if longest.event == Event::Marking {
            // The program knows what it is by its name.
            let slow = format!(
                "dump={DUMP}; mkdir $dump.d; ln -s $(readlink -f $dump) $dump.d/thin_dump
                 mv $dump $dump.own
                 printf '#!/bin/sh\nsleep {DELAY_S}\nexec %s.d/thin_dump \"$@\"\n' $dump >$dump
                 chmod +x $dump"
            );
            shell(self.a, &slow)?;
        }
        let (mut ratios, mut longest_ms, mut counts) = (vec![], vec![], vec![]);
        for id in volumes {
            let latency = self.written_across(longest.event, id)?;
            let count = latency["N"].as_u64().context("fio's count")?;
            ensure!(count >= LEAST_WRITES, "only {count} writes");
            let max = latency["max"].as_f64().context("fio's longest")?;
            let usual = latency["percentile"]["99.900000"].as_f64().context("fio's p99.9")?;
            ratios.push(max / usual);
            longest_ms.push(max / 1e6);
            counts.push(count);
            // What is left of it need not be copied.
            let end = format!("dmlocalctl volume detach {id} && dmlocalctl volume delete {id}");
            shell(self.b, &end)?;
        }
        if longest.event == Event::Marking {
            shell(self.a, &format!("dump={DUMP}; mv $dump.own $dump; rm -r $dump.d"))?;
        }
        self.say(&format!("{}: {ratios:.2?}", longest.name));
        let detail = format!("{ratios:.2?} of {counts:?} writes, longest in ms: {longest_ms:.0?}");
        Ok(Row {
            name: longest.name,
            value: median(&ratios),
            bar: longest.bar,
            at_least: false,
            detail,
        })
    }

    /// How long the writes of a guest took that arrives with a volume at the second node.
    fn written_across(&self, event: Event, id: &str) -> Result<Value> {
        let hold = format!(
            "dmlocalctl volume move {id} --from https://node-a:7450 --to https://node-b:7450 --hold"
        );
        shell(self.b, &hold)?;
        match event {
            Event::Switch => {
                // The guest writes at the source until it is stopped there, and its first
                // write here is what fences the source.
                writes(self.a, id, "", "sleep 2")?;
                let enough = format!(
                    "at=/sys/block/$(basename $(readlink -f /dev/mapper/dmlocal-{id}))/stat
                     looks=0
                     while read -r _ _ _ _ count rest <$at
                         [ $count -lt {ENOUGH_WRITES} ] &&
                             {{ [ $looks -lt {LOOKS} ] || [ $count -lt {LEAST_WRITES} ]; }}
                     do looks=$((looks + 1)); sleep 0.1; done"
                );
                writes(self.b, id, "", &enough)
            }
            Event::Marking => {
                // Nothing else happens meanwhile.
                let order =
                    format!("dmlocalctl hydration pause {id} && dmlocalctl volume switch {id}");
                shell(self.b, &order)?;
                let before = self.status(id)?["bytes_left"].as_u64().context("nothing is left")?;
                let latency = writes(self.b, id, MISSING, &format!("sleep {MARKED_S}"))?;
                let after = self.status(id)?["bytes_left"].as_u64().context("nothing is left")?;
                ensure!(before > 60 * MIB, "it was marked before the guest wrote: {before} left");
                ensure!(after <= 4 * MIB, "it was not marked while the guest wrote: {after} left");
                Ok(latency)
            }
            Event::Collapse => {
                shell(self.b, &format!("dmlocalctl volume switch {id}"))?;
                let collapsed = format!(
                    "while grep -qs '^dmlocal-{id}-g.*-clone$' /sys/block/dm-*/dm/name; \
                     do sleep 0.2; done; sleep {AFTER_S}"
                );
                let latency = writes(self.b, id, "", &collapsed)?;
                wait_until_local(self.b, id)?;
                Ok(latency)
            }
        }
    }

    fn status(&self, id: &str) -> Result<Value> {
        let seen = shell(self.b, &format!("dmlocalctl status {id} --output json"))?;
        let seen: Value = serde_json::from_str(&seen).context("reading status")?;
        Ok(seen[0].clone())
    }
}

/// A guest writes one block after the other at random for as long as a line takes.
fn writes(node: &Node, id: &str, of: &str, meanwhile: &str) -> Result<Value> {
    // An interrupted fio reports all the same, and says so by its exit status.
    let line = format!(
        "report=$(mktemp)
         fio --output-format=json --output=$report --rw=randwrite --bs=4k --iodepth=1 \
             --ioengine=libaio --direct=1 --time_based --runtime=300 --thread --name=guest \
             --percentile_list=50:99:99.9 --filename=/dev/mapper/dmlocal-{id} {of} >&2 &
         {meanwhile}
         kill -INT $!; wait $!; cat $report; rm $report"
    );
    let text = shell(node, &line)?;
    let start = text.find('{').context("fio reported nothing")?;
    let report: Value = serde_json::from_str(&text[start..]).context("reading fio's report")?;
    Ok(report["jobs"][0]["write"]["clat_ns"].clone())
}
