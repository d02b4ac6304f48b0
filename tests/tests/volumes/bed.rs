//! Two nodes or three, and words for what scenarios do on them.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dmlocal_testbed::{Cluster, Node, Options, Output, Running, repository};
use serde_json::Value;

/// How long anything may take that should take moments.
pub const SOON: Duration = Duration::from_secs(60);

/// How long a copy may take, with reboots in between.
pub const LATER: Duration = Duration::from_secs(180);

/// Prints whatever dmlocal has left on a node.
const LEFT: &str = "
    dmsetup info --columns --noheadings -o name,uuid | grep DMLOCAL- | grep -v DMLOCAL-refuser
    lvs --noheadings -o lv_name,lv_tags @dmlocal
    ls /sys/kernel/config/nvmet/subsystems
    ls /sys/kernel/config/nvmet/ports
    ls /sys/class/nvme
    ls /dev/mapper | grep dmlocal-........-....-
    true";

/// Nodes with dmlocal on them.
pub struct Bed {
    cluster: Cluster,
}

impl Bed {
    /// Starts so many.
    pub fn start(nodes: usize) -> Result<Bed> {
        Ok(Bed { cluster: Cluster::start(&Options { nodes, ..Options::default() })? })
    }

    /// How many there are.
    pub fn nodes(&self) -> usize {
        self.cluster.nodes().len()
    }

    /// The first node, mostly the source.
    pub fn a(&self) -> &Node {
        &self.cluster.nodes()[0]
    }

    /// The second node, mostly the destination.
    pub fn b(&self) -> &Node {
        &self.cluster.nodes()[1]
    }

    /// The third node, of scenarios that ask for one.
    pub fn c(&self) -> &Node {
        &self.cluster.nodes()[2]
    }

    /// A program on the host that can reach the nodes.
    pub fn host_command(&self, program: &str) -> Command {
        self.cluster.host_command(program)
    }

    /// What the emulator did to a node.
    pub fn emulator_failed(&self) -> Option<String> {
        self.cluster.emulator_failed()
    }

    /// Nothing of any volume is left on any node.
    pub fn is_clean(&self) -> Result<()> {
        self.cluster.each(|node| {
            until("nothing to be left", SOON, || {
                let volumes = ctl(node, "status")?;
                let none = volumes.as_array().is_some_and(Vec::is_empty);
                let volumes = if none { String::new() } else { volumes.to_string() };
                let left = node.shell(LEFT)?.ok()? + &volumes;
                Ok(if left.is_empty() { Ok(()) } else { Err(left) })
            })
        })
    }

    /// Keeps what tells why a scenario failed.
    pub fn keep_logs(&self, scenario: &str) {
        let directory = repository().join("target/vm-logs").join(scenario);
        let keep = || -> Result<()> {
            fs::create_dir_all(&directory)?;
            for node in self.cluster.nodes() {
                fs::copy(node.console(), directory.join(format!("{}.console", node.name())))?;
                let look = "journalctl --boot --no-pager; dmesg | tail -n 200; dmsetup table;
                    dmsetup status --noflush; dmsetup info -c; dmlocalctl status --output json;
                    ps axfww -o pid,ppid,stat,wchan:20,etimes,args; ls -l /dev/disk/by-id;
                    timeout 20 lvs -a -o +lv_active,transaction_id,lv_tags";
                let look = ["sh", "-c", look];
                let text = match node.exec_with(&look, b"", SOON) {
                    Ok(output) => output.stdout + &output.stderr,
                    Err(error) => format!("{error:#}"),
                };
                fs::write(directory.join(format!("{}.journal", node.name())), text)?;
            }
            Ok(())
        };
        match keep() {
            Ok(()) => println!("logs of the nodes: {}", directory.display()),
            Err(error) => println!("no logs of the nodes: {error:#}"),
        }
    }
}

/// Asks again and again until the answer is right; the last wrong one is told.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> Result<Result<T, String>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match ask()? {
            Ok(answer) => return Ok(answer),
            Err(wrong) if Instant::now() > deadline => {
                bail!("waited {limit:?} for {what}; last seen: {wrong}")
            }
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Runs dmlocalctl on a node and returns what it answers.
pub fn ctl(node: &Node, line: &str) -> Result<Value> {
    let argv: Vec<&str> =
        ["dmlocalctl", "--output", "json"].into_iter().chain(line.split_whitespace()).collect();
    let text = node.exec(&argv)?.ok().with_context(|| node.name())?;
    serde_json::from_str(&text).with_context(|| format!("`{line}` printed {text}"))
}

/// Runs dmlocalctl on a node, expects it to be refused, and returns the reason.
pub fn refusal(node: &Node, line: &str) -> Result<String> {
    let argv: Vec<&str> =
        ["dmlocalctl", "--output", "json"].into_iter().chain(line.split_whitespace()).collect();
    let output = node.exec(&argv)?;
    ensure!(!output.success(), "{}: `{line}` was granted: {}", node.name(), output.stdout);
    let last = output.stderr.lines().last().unwrap_or_default();
    let error: Value = serde_json::from_str(last)
        .with_context(|| format!("`{line}` complained: {}", output.stderr))?;
    let reason = error["reason"].as_str().context("a refusal without reason")?.to_owned();
    let code = if reason == "USAGE" { 2 } else { 1 };
    ensure!(output.status.code() == code, "`{line}` ended with {:?}", output.status);
    Ok(reason)
}

/// Expects a refusal with that reason.
pub fn refused(node: &Node, line: &str, reason: &str) -> Result<()> {
    let seen = refusal(node, line)?;
    ensure!(seen == reason, "{}: `{line}` was refused with {seen}, not {reason}", node.name());
    Ok(())
}

/// A volume and what its writer knows of it.
pub struct Volume {
    /// Its id.
    pub id: String,
    /// Where its handle is.
    pub device: String,
    seed: u64,
}

impl Volume {
    /// One that somebody else has created.
    pub fn known(id: &str) -> Result<Volume> {
        let seed = u64::from_str_radix(id.get(..8).context("no id of a volume")?, 16)?;
        Ok(Volume::filled(id, seed))
    }

    /// One that somebody else has created and filled.
    pub fn filled(id: &str, seed: u64) -> Volume {
        Volume { device: format!("/dev/mapper/dmlocal-{id}"), id: id.to_owned(), seed }
    }

    /// Creates and attaches one.
    pub fn create(on: &Node, mib: u32) -> Result<Volume> {
        let id = fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned();
        let volume = Volume::known(&id)?;
        ctl(on, &format!("volume create {} --size {mib}MiB", volume.id))?;
        let attached = ctl(on, &format!("volume attach {}", volume.id))?;
        ensure!(attached["device_path"] == volume.device.as_str(), "{attached}");
        Ok(volume)
    }

    /// Creates one with the writer's pattern everywhere.
    pub fn create_full(on: &Node, mib: u32) -> Result<Volume> {
        let volume = Volume::create(on, mib)?;
        let seed = volume.seed.to_string();
        on.exec(&["dmlocal-writer", "fill", "--device", &volume.device, "--seed", &seed])?.ok()?;
        Ok(volume)
    }

    /// What the node says of it; none when it has no such volume.
    pub fn status(&self, on: &Node) -> Result<Option<Value>> {
        let argv = ["dmlocalctl", "--output", "json", "status", &self.id];
        let output = on.exec(&argv)?;
        if output.stderr.contains("VOLUME_NOT_FOUND") {
            return Ok(None);
        }
        let volumes: Value = serde_json::from_str(&output.ok()?)?;
        Ok(Some(volumes[0].clone()))
    }

    /// Waits until its state there is that; returns what the node says of it.
    pub fn wait_for(&self, on: &Node, state: &str, limit: Duration) -> Result<Value> {
        let what = format!("{} to be {state} on {}", self.id, on.name());
        self.wait_until(on, &what, limit, |volume| volume["state"] == state)
    }

    /// Waits until what the node says of it is right.
    pub fn wait_until(
        &self,
        on: &Node,
        what: &str,
        limit: Duration,
        is_right: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        until(what, limit, || match self.status(on)? {
            Some(volume) if is_right(&volume) => Ok(Ok(volume)),
            Some(volume) if volume["state"] == "failed" => bail!("it failed: {volume}"),
            Some(volume) => Ok(Err(volume.to_string())),
            None => Ok(Err("no such volume".to_owned())),
        })
    }

    /// Waits until the node has no such volume.
    pub fn wait_until_gone(&self, on: &Node) -> Result<()> {
        let what = format!("{} to leave {}", self.id, on.name());
        until(&what, SOON, || Ok(self.status(on)?.map_or(Ok(()), |left| Err(left.to_string()))))
    }

    /// Waits until the node has no other copy of it but the newest.
    pub fn wait_until_alone(&self, on: &Node) -> Result<()> {
        until("the old copy to go", SOON, || {
            let copies = ctl(on, "status")?;
            let alone = copies.as_array().is_some_and(|copies| copies.len() == 1);
            Ok(if alone { Ok(()) } else { Err(copies.to_string()) })
        })
    }

    /// Starts a move, with what else belongs on its command line.
    pub fn start_move(&self, from: &Node, to: &Node, flags: &str) -> Result<Value> {
        ctl(to, &self.move_line(from, to, flags))
    }

    /// The command line of a move.
    pub fn move_line(&self, from: &Node, to: &Node, flags: &str) -> String {
        let (id, from, to) = (&self.id, from.name(), to.name());
        format!("volume move {id} --from https://{from}:7450 --to https://{to}:7450 {flags}")
    }

    /// Moves it with a hold and switches, with copying slowed down so far that it
    /// takes minutes: what is to happen meanwhile has time.
    pub fn move_slowly(&self, from: &Node, to: &Node) -> Result<()> {
        self.start_move(from, to, "--hold --wait")?;
        self.slow_down(to)?;
        ctl(to, &format!("volume switch {}", self.id))?;
        let volume = self.status(to)?.context("the volume is not there")?;
        let (state, percent) = (&volume["state"], volume["percent"].as_f64());
        ensure!(state == "hydrating" && percent.is_some_and(|p| p < 30.0), "{volume}");
        Ok(())
    }

    /// Slows copying down.
    pub fn slow_down(&self, on: &Node) -> Result<()> {
        let line = format!("hydration set {} --rate 256KiB --threshold 1 --batch 1", self.id);
        ctl(on, &line).map(drop)
    }

    /// Lets copying run as fast as it can.
    pub fn speed_up(&self, on: &Node) -> Result<()> {
        let line = format!("hydration set {} --rate 0 --threshold 128 --batch 16", self.id);
        ctl(on, &line).map(drop)
    }

    /// Lets it arrive, and the source let go.
    pub fn finish_move(&self, from: &Node, to: &Node) -> Result<()> {
        // The copy may be over by now.
        let _ = self.speed_up(to);
        let volume = self.wait_for(to, "local", LATER)?;
        ensure!(volume["source_node"].is_null(), "{volume}");
        self.wait_until_gone(from)
    }

    /// Checks every byte.
    pub fn verify(&self, on: &Node) -> Result<()> {
        let state = self.state();
        let argv = ["dmlocal-writer", "verify", "--device", &self.device, "--state", &state];
        on.exec(&argv)?.ok().with_context(|| on.name()).map(drop)
    }

    /// Checks every byte that can be read; returns how many regions cannot.
    pub fn lacking(&self, on: &Node) -> Result<u64> {
        let (device, state) = (&self.device, self.state());
        let line = format!("dmlocal-writer verify --device {device} --state {state} --lacking");
        let told = on.exec(&line.split_whitespace().collect::<Vec<_>>())?.ok()?;
        let mut lines = told.lines().filter_map(|line| line.strip_prefix("lacking: "));
        let count = lines.next().and_then(|line| line.strip_suffix(" regions"));
        count.and_then(|count| count.parse().ok()).context("no count of what is lacking")
    }

    /// Writes the whole of it, in whole regions, and forgets what was there.
    pub fn rewrite(&self, on: &Node) -> Result<()> {
        let seed = self.seed.to_string();
        on.exec(&["rm", &self.state()])?.ok()?;
        on.exec(&["dmlocal-writer", "fill", "--device", &self.device, "--seed", &seed])?.ok()?;
        self.write(on, "--count 10")?.stop(on).map(drop)
    }

    /// Detaches and deletes it.
    pub fn delete(&self, on: &Node) -> Result<()> {
        self.forget_writer(on)?;
        ctl(on, &format!("volume detach {}", self.id))?;
        ctl(on, &format!("volume delete {}", self.id)).map(drop)
    }

    /// Sends a remote volume home, and deletes it there.
    pub fn delete_at_home(&self, home: &Node, user: &Node) -> Result<()> {
        self.forget_writer(user)?;
        ctl(user, &format!("volume detach {}", self.id))?;
        self.wait_until_gone(user)?;
        self.wait_for(home, "local", LATER)?;
        ctl(home, &format!("volume delete {}", self.id)).map(drop)
    }

    /// Starts to write it, or goes on with that.
    pub fn write(&self, on: &Node, flags: &str) -> Result<Writer> {
        let (device, state, go, seed) = (&self.device, self.state(), self.go(), self.seed);
        on.shell(&format!("touch {go}"))?.ok()?;
        let line = format!(
            "dmlocal-writer run --device {device} --state {state} --seed {seed} \
             --until-file-gone {go} {flags}"
        );
        let argv: Vec<&str> = line.split_whitespace().collect();
        let running = on.spawn(&argv)?;
        running.wait_for_text("started", SOON)?;
        Ok(Writer { running, go })
    }

    /// Takes what the writer knows to another node.
    pub fn carry_state(&self, from: &Node, to: &Node) -> Result<()> {
        let state = self.state();
        let text = from.exec(&["base64", &state])?.ok()?;
        // The power of the node that goes on with it may be cut at once.
        let unpack = format!("base64 --decode >{state} && sync {state}");
        to.exec_with(&["sh", "-c", &unpack], text.as_bytes(), SOON)?.ok()?;
        from.exec(&["rm", &state])?.ok().map(drop)
    }

    /// Takes what the writer knows of it to another node, for a volume with the same content.
    pub fn copy_state(&self, from: &Node, other: &Volume, to: &Node) -> Result<()> {
        let text = from.exec(&["base64", &self.state()])?.ok()?;
        let unpack = format!("base64 --decode >{}", other.state());
        to.exec_with(&["sh", "-c", &unpack], text.as_bytes(), SOON)?.ok().map(drop)
    }

    /// Removes what its writer has left on a node.
    pub fn forget_writer(&self, on: &Node) -> Result<()> {
        on.shell(&format!("rm -f {} {}", self.state(), self.go()))?.ok().map(drop)
    }

    fn state(&self) -> String {
        format!("/root/{}.state", self.id)
    }

    fn go(&self) -> String {
        format!("/root/{}.go", self.id)
    }
}

/// A writer at work. Any wrong block and any failed request ends it.
pub struct Writer {
    running: Running,
    go: String,
}

impl Writer {
    /// How many requests it has told of.
    pub fn requests(&self) -> u64 {
        let text = self.running.stdout();
        let mut told = text.lines().rev().filter_map(|line| line.strip_suffix(" requests"));
        told.next().and_then(|number| number.parse().ok()).unwrap_or(0)
    }

    /// Whether it has ended, which it should not before it is stopped.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.running.has_ended(), "the writer ended: {}", self.running.stderr());
        Ok(())
    }

    /// Waits until it has done some more.
    pub fn progress(&self) -> Result<()> {
        let before = self.requests();
        until("the writer to go on", LATER, || {
            self.check()?;
            let now = self.requests();
            Ok(if now > before { Ok(()) } else { Err(format!("{now} requests")) })
        })
    }

    /// Waits until it has written once.
    pub fn wait_for_first_write(&self) -> Result<()> {
        self.running.wait_for_text("first write after", SOON)
    }

    /// Whether it has written once.
    pub fn has_written(&self) -> bool {
        self.running.stdout().contains("first write after")
    }

    /// Stops it; fails if anything was wrong so far.
    pub fn stop(self, on: &Node) -> Result<String> {
        on.exec(&["rm", "-f", &self.go])?.ok()?;
        self.running.wait(SOON)?.ok()
    }

    /// Waits until it has ended by itself; fails if anything was wrong.
    pub fn wait(self, limit: Duration) -> Result<String> {
        self.running.wait(limit)?.ok()
    }

    /// It was cut off together with its node.
    pub fn lost(self) {
        self.running.kill();
    }
}

/// Kills a node's agent as hard as it goes and waits until it is back.
pub fn kill_agent(node: &Node) -> Result<()> {
    agent_answers(node, &leave_without_agent(node)?)
}

/// Kills both nodes' agents while something is at work, and waits until they are back.
pub fn kill_agents_during(at_work: &Running, nodes: [&Node; 2]) -> Result<()> {
    let [first, second] = nodes;
    let before = [leave_without_agent(first)?, leave_without_agent(second)?];
    ensure!(!at_work.has_ended(), "it had ended before the agents were killed");
    agent_answers(first, &before[0])?;
    agent_answers(second, &before[1])
}

/// Kills a node's agent once it has suspended a device in the course of an order, and waits
/// until it is back. What the order has come to is the answer.
pub fn kill_agent_once_suspended(node: &Node, device: &str, order: &str) -> Result<Output> {
    let script = format!(
        "pid=$(systemctl show --property MainPID --value dmlocald)
         device=/sys/block/$(dmsetup info -c --noheadings -o blkdevname {device})
         exec 3<> <(:)
         echo waiting
         until read -r suspended <$device/dm/suspended && ((suspended)); do
             read -r -t 0.01 -u 3
         done
         kill -KILL $pid
         cat $device/dm/suspended
         echo $pid"
    );
    let killer = node.spawn(&["bash", "-c", &script])?;
    killer.wait_for_text("waiting", SOON)?;
    let order = node.spawn(&order.split_whitespace().collect::<Vec<_>>())?;
    let told = killer.wait(SOON)?.ok()?;
    let mut words = told.split_whitespace().skip(1);
    ensure!(words.next() == Some("1"), "it was resumed before its agent died: {told}");
    let answer = order.wait(LATER)?;
    agent_answers(node, words.next().context("whom it killed")?)?;
    Ok(answer)
}

/// Kills a node's agent; its process id is the answer.
fn leave_without_agent(node: &Node) -> Result<String> {
    let pid = node.shell("systemctl show --property MainPID --value dmlocald")?.ok()?;
    node.exec(&["kill", "-KILL", &pid])?.ok()?;
    Ok(pid)
}

fn agent_answers(node: &Node, before: &str) -> Result<()> {
    until(&format!("the agent of {}", node.name()), SOON, || {
        let pid = node.shell("systemctl show --property MainPID --value dmlocald")?.ok()?;
        let shown = node.exec(&["dmlocalctl", "node", "show"])?;
        Ok(if shown.success() && pid != before { Ok(()) } else { Err(shown.stderr) })
    })
}
