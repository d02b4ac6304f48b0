//! A guest inside a node, whose disk is a volume: QEMU without devices that it does not
//! need, and a boot program that checks what it reads.

use std::cell::Cell;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dmlocal_testbed::boot::{GUEST_BLOCK, guest_disk};
use dmlocal_testbed::{Node, Running};
use serde_json::{Value, json};

use crate::bed::{LATER, SOON, Volume, until};

/// Blocks that a guest uses.
const BLOCKS: u32 = 128;

/// Size of a guest's volume.
pub const GUEST_MIB: u32 = ((BLOCKS as u64 * GUEST_BLOCK) >> 20) as u32;

/// Memory that its migration has to carry, in bytes: random, so that no page is zero.
const BALLAST: u64 = 8 << 20;

/// Where a guest that comes from elsewhere is waited for.
const PORT: u16 = 4444;

/// How a guest is to move.
#[derive(Clone, Copy)]
pub struct Pace {
    /// At most so many bytes a second.
    pub bytes_per_s: u64,
    /// How long it may be stopped for what is left.
    pub downtime_ms: u64,
}

/// A guest, or the place that one is to move to.
pub struct Guest {
    node: Node,
    /// Path of the monitor's two pipes, without `.in` and `.out`.
    pipes: String,
    qemu: Running,
    monitor: Running,
    asked: Cell<u64>,
}

impl Guest {
    /// Starts one on a volume that is attached there.
    pub fn start(on: &Node, volume: &Volume) -> Result<Guest> {
        let guest = Guest::run(on, volume, "")?;
        guest.qemu.wait_for_text("ready", LATER)?;
        Ok(guest)
    }

    /// Makes ready for one that comes from elsewhere.
    pub fn expect(on: &Node, volume: &Volume) -> Result<Guest> {
        let guest = Guest::run(on, volume, "-incoming defer")?;
        guest.ask("migrate-incoming", &json!({ "uri": format!("tcp:0.0.0.0:{PORT}") }))?;
        Ok(guest)
    }

    fn run(on: &Node, volume: &Volume, flags: &str) -> Result<Guest> {
        // It never rests; whoever else is on the node comes first.
        let disk = format!("/root/{}.boot", volume.id);
        on.write(&disk, &guest_disk(BLOCKS)?)?;
        let pipes = format!("/run/{}", volume.id);
        let line = format!(
            "rm -f {pipes}.in {pipes}.out
            head --bytes {BALLAST} /dev/urandom >{pipes}.ram
            mkfifo {pipes}.in {pipes}.out
            exec nice --adjustment 19 qemu-system-x86_64 -M pc -accel tcg,tb-size=16 -m 32 \
                -nodefaults -no-user-config -display none \
                -drive if=none,id=boot,format=raw,readonly=on,file={disk} \
                -device virtio-blk-pci,drive=boot,bootindex=0 \
                -drive if=none,id=data,format=raw,cache=none,aio=native,file={} \
                -device virtio-blk-pci,drive=data \
                -device loader,file={pipes}.ram,addr=0x1000000,force-raw=on \
                -chardev file,id=serial,path=/dev/stdout -serial chardev:serial \
                -chardev pipe,id=monitor,path={pipes} -mon chardev=monitor,mode=control \
                {flags}",
            volume.device
        );
        let qemu = on.spawn(&["sh", "-c", &line])?;
        let reads = format!("until test -p {pipes}.out; do sleep 0.1; done; exec cat {pipes}.out");
        let monitor = on.spawn(&["sh", "-c", &reads])?;
        let guest = Guest { node: on.clone(), pipes, qemu, monitor, asked: Cell::new(0) };
        guest.monitor.wait_for_text("QMP", SOON).with_context(|| guest.qemu.stderr())?;
        guest.ask("qmp_capabilities", &json!({}))?;
        Ok(guest)
    }

    /// Asks something of QEMU's monitor.
    pub fn ask(&self, order: &str, arguments: &Value) -> Result<Value> {
        let id = self.asked.get() + 1;
        self.asked.set(id);
        let question = json!({ "execute": order, "arguments": arguments, "id": id });
        let pipe = format!("{}.in", self.pipes);
        // Opened both ways, which waits for nobody.
        let write = ["sh", "-c", &format!("cat 1<>{pipe}")];
        self.node.exec_with(&write, format!("{question}\n").as_bytes(), SOON)?.ok()?;
        let answer = until(&format!("QEMU's answer to {order}"), SOON, || {
            let lines = self.monitor.stdout();
            let mut lines = lines.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
            let ended = self.qemu.has_ended().then(|| self.qemu.stderr());
            Ok(lines.find(|line| line["id"] == id).ok_or_else(|| ended.unwrap_or_default()))
        })?;
        ensure!(answer["error"].is_null(), "{order}: {answer}");
        Ok(answer["return"].clone())
    }

    /// Begins to move it to where it is expected.
    pub fn begin_move(&self, to: &Node, pace: Pace) -> Result<()> {
        let Pace { bytes_per_s, downtime_ms } = pace;
        let pace = json!({ "max-bandwidth": bytes_per_s, "downtime-limit": downtime_ms });
        self.ask("migrate-set-parameters", &pace)?;
        let uri = format!("tcp:{}:{PORT}", to.address());
        self.ask("migrate", &json!({ "uri": uri })).map(drop)
    }

    /// What QEMU says of the move.
    pub fn migration(&self) -> Result<Value> {
        self.ask("query-migrate", &json!({}))
    }

    /// Waits until QEMU says that of the move.
    pub fn wait_for_migration(&self, status: &str) -> Result<Value> {
        until(&format!("the migration to be {status}"), SOON, || {
            let seen = self.migration()?;
            match seen["status"].as_str() {
                Some(now) if now == status => Ok(Ok(seen)),
                Some("failed") => bail!("the migration failed: {seen}"),
                _ => Ok(Err(seen.to_string())),
            }
        })
    }

    /// The last number that it has told after that word.
    fn told(&self, word: &str) -> u64 {
        let text = self.qemu.stdout();
        // The last line may be half there.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut told = whole.lines().rev().filter_map(|line| line.strip_prefix(word));
        told.next().and_then(|number| u64::from_str_radix(number.trim(), 16).ok()).unwrap_or(0)
    }

    /// How many writes it has told of.
    pub fn writes(&self) -> u64 {
        self.told("at ")
    }

    /// It runs, and has met neither an error nor a wrong byte.
    pub fn check(&self) -> Result<()> {
        let text = self.qemu.stdout();
        let failed = text.lines().find(|line| line.starts_with("failed"));
        ensure!(failed.is_none(), "the guest: {}", failed.unwrap_or_default());
        ensure!(!self.qemu.has_ended(), "QEMU ended: {}", self.qemu.stderr());
        Ok(())
    }

    /// Waits until it has written some more.
    pub fn progress(&self) -> Result<()> {
        let before = self.writes();
        self.wait("write", || self.writes() > before)
    }

    /// Waits until it has read every block twice more: one that was read once may have
    /// been read before what should have harmed it.
    pub fn sweep_twice(&self) -> Result<()> {
        let before = self.told("swept ").max(self.told("at ") * 2 / u64::from(BLOCKS));
        self.wait("read all blocks", || self.told("swept ") >= before + 2)
    }

    fn wait(&self, what: &str, done: impl Fn() -> bool) -> Result<()> {
        until(&format!("the guest to {what}"), LATER, || {
            self.check()?;
            Ok(if done() { Ok(()) } else { Err(self.last_words()) })
        })
    }

    fn last_words(&self) -> String {
        let text = self.qemu.stdout();
        let last: Vec<&str> = text.lines().rev().take(3).collect();
        format!("{last:?} {}", self.qemu.stderr())
    }

    /// Ends QEMU; fails if the guest has met anything wrong so far.
    pub fn stop(self) -> Result<()> {
        self.check()?;
        self.end()
    }

    /// Ends a QEMU whose guest has left it or never came, in good order.
    pub fn end(self) -> Result<()> {
        let text = self.qemu.stdout();
        let failed = text.lines().find(|line| line.starts_with("failed"));
        ensure!(failed.is_none(), "the guest: {}", failed.unwrap_or_default());
        if !self.qemu.has_ended() {
            // It may be gone before it has answered.
            let order = format!("echo '{{\"execute\":\"quit\"}}' 1<>{}.in", self.pipes);
            self.node.shell(&order)?.ok()?;
        }
        let ended = || Ok(if self.qemu.has_ended() { Ok(()) } else { Err(String::new()) });
        until("QEMU to end", Duration::from_secs(30), ended)?;
        let left = format!("rm -f {0}.in {0}.out {0}.ram /root/{1}.boot", self.pipes, self.id());
        self.node.shell(&left)?.ok().map(drop)
    }

    fn id(&self) -> &str {
        self.pipes.rsplit('/').next().unwrap_or_default()
    }

    /// It was cut off together with its node.
    pub fn lost(self) {
        self.qemu.kill();
    }
}
