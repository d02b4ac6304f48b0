//! What nodes with real kernels do, told as sentences.
//!
//! `cargo xtask test` runs these. They are ignored otherwise, because they need
//! virtual machines, which take root and packages that only it installs.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::{Cluster, Options, cargo, repository};

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

/// The tests in the daemon that need a node's kernel: `kernel::on_node`.
#[test]
#[ignore = "needs virtual machines: cargo xtask test"]
fn the_kernel_does_what_the_design_relies_on() -> Result<()> {
    let program = fs::read(daemon_tests()?).context("reading the daemon's tests")?;
    let rules = fs::read(repository().join("agent/dist/udev/54-dmlocal.rules"))?;
    let one = Options { nodes: 1, dmlocal: false, ..Options::default() };
    Cluster::run(&one, |cluster| {
        let node = cluster.node("a")?;
        node.write("/root/tests", &program)?;
        node.write("/usr/lib/udev/rules.d/54-dmlocal.rules", &rules)?;
        node.shell("chmod +x /root/tests && udevadm control --reload")?.ok()?;
        let tests = [
            "env",
            "DMLOCAL_TEST_POOL=dmlocal/pool@/dev/disk/by-id/virtio-pool",
            "/root/tests",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
            // Measures, and asserts nothing.
            "--skip=costs_little",
            "kernel::on_node",
        ];
        let output = node.exec_with(&tests, b"", Duration::from_secs(900))?;
        println!("{}", output.stdout);
        ensure!(output.success(), "{}", output.stderr);
        Ok(())
    })
}

/// Builds the daemon's tests and returns the program.
fn daemon_tests() -> Result<String> {
    // The whole workspace, so that every dependency has the features it was built with.
    let arguments = ["test", "--release", "--no-run", "--message-format", "json", "--workspace"];
    let output = cargo().args(arguments).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let messages = String::from_utf8(output.stdout)?;
    let mut programs = messages.lines().filter_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_test = message["profile"]["test"] == true && message["target"]["name"] == "dmlocald";
        is_test.then(|| message["executable"].as_str().map(str::to_owned))?
    });
    programs.next_back().context("cargo names no program")
}
