//! What nodes with real kernels do, told as sentences.
//!
//! `cargo xtask test` runs these. They are ignored otherwise, because they need
//! virtual machines, which take root and packages that only it installs.

use std::time::Duration;

use anyhow::{Result, ensure};
use dmlocal_testbed::{Cluster, Options};

#[test]
#[ignore = "needs virtual machines: cargo xtask test"]
fn nodes_are_real_and_can_lose_their_power_and_their_network() -> Result<()> {
    let bare = Options { dmlocal: false, ..Options::default() };
    Cluster::run(&bare, |cluster| {
        let (a, b) = (cluster.node("node-a")?, cluster.node("b")?);

        for node in cluster.nodes() {
            let targets = node.exec(&["dmsetup", "targets"])?.ok()?;
            ensure!(targets.lines().any(|line| line.starts_with("clone ")), "{targets}");
            let volumes = node.exec(&["lvs", "--noheadings", "-o", "lv_name,vg_name"])?.ok()?;
            ensure!(volumes.split_whitespace().eq(["pool", "dmlocal"]), "{volumes}");
            ensure!(node.exec(&["hostname"])?.ok()? == node.name());
        }
        let draw = ["cat", "/proc/sys/kernel/random/uuid"];
        ensure!(a.exec(&draw)?.ok()? != b.exec(&draw)?.ok()?, "two nodes draw the same numbers");

        let ping = ["ping", "-c", "1", "-W", "2", "node-a"];
        b.exec(&ping)?.ok()?;
        a.set_link(false)?;
        ensure!(!b.exec(&ping)?.success(), "a pulled cable still carries pings");
        a.set_link(true)?;
        b.exec(&["ping", "-c", "1", "-w", "20", "node-a"])?.ok()?;

        a.shell("echo kept > /root/kept && sync /root/kept")?.ok()?;
        let writer = a.spawn(&["sleep", "infinity"])?;
        a.kill()?;
        ensure!(writer.wait(Duration::from_secs(10)).is_err(), "outlived a power cut");
        a.start()?;
        ensure!(a.exec(&["cat", "/root/kept"])?.ok()? == "kept");
        ensure!(a.exec(&["hostname"])?.ok()? == "node-a");
        a.exec(&["lvs", "dmlocal/pool"])?.ok()?;
        b.exec(&ping)?.ok()?;
        Ok(())
    })
}

#[test]
#[ignore = "needs virtual machines: cargo xtask test"]
fn commands_on_a_node_run_side_by_side_and_end_as_they_say() -> Result<()> {
    let one = Options { nodes: 1, dmlocal: false, ..Options::default() };
    Cluster::run(&one, |cluster| {
        let node = cluster.node("a")?;

        let talker = node.spawn(&["sh", "-c", "echo one; read _; sleep infinity"])?;
        talker.wait_for_text("one", Duration::from_secs(30))?;
        let output = node.shell("cat >&2; echo out; exit 3")?;
        ensure!(output.status.code() == 3 && output.stdout == "out\n", "{output:?}");
        ensure!(node.exec(&["no-such-program"])?.status.code() == 127);
        talker.kill();
        node.shell("timeout 20 sh -c 'while pgrep -x sleep; do sleep 0.2; done'")?.ok()?;

        let many = vec![b'x'; 3 << 20];
        node.write("/root/many", &many)?;
        ensure!(node.exec(&["cat", "/root/many"])?.stdout.len() == many.len());

        let disk = node.add_disk("extra", 64 << 20)?;
        ensure!(node.exec(&["blockdev", "--getsize64", &disk])?.ok()? == (64 << 20).to_string());
        Ok(())
    })
}
