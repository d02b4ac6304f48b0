//! One virtual machine: its command line, its process and its monitor.
//!
//! A machine is a directory. Its process is found again through the file `pid`
//! in it, so that several programs can work with one machine, one after another
//! or at once. Files in it: `root.qcow2`, `pool.qcow2`, `console.log`,
//! `qemu.log`, `qmp.sock`, `pid`, `boot.json`, `disks.json`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::host;
use crate::network::{self, Network};

/// Memory of a machine, in MiB. It is written out with every snapshot.
const MEMORY_MIB: &str = "768";

/// How the guest's instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Acceleration {
    /// By the processor.
    Kvm,
    /// By translation: slow, but everywhere the same.
    Tcg,
}

impl Acceleration {
    fn arguments(self) -> [&'static str; 4] {
        match self {
            Acceleration::Kvm => ["-accel", "kvm", "-cpu", "host"],
            // QEMU 7.2 translates cmpxchg16b wrongly: kernels die in their allocator.
            Acceleration::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max,-cx16"],
        }
    }
}

/// What a machine boots.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Boot {
    /// Directory with `vmlinuz` and `initrd.img`.
    pub kernel: PathBuf,
    /// How its instructions are run.
    pub acceleration: Acceleration,
}

/// A disk added while the machine ran; a cold start attaches it again.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Disk {
    serial: String,
    file: PathBuf,
    read_only: bool,
}

/// A virtual machine, running or not.
#[derive(Clone, Debug)]
pub struct Machine {
    directory: PathBuf,
    letter: char,
    network: Network,
}

impl Machine {
    /// The machine in that directory, which has its disks.
    pub fn new(directory: &Path, letter: char, network: &Network) -> Machine {
        Machine { directory: directory.to_owned(), letter, network: network.clone() }
    }

    /// Where its files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The address of its card on the shared segment.
    pub fn mac(&self) -> String {
        format!("52:54:00:77:00:{:02x}", self.letter as u32)
    }

    /// Notes what it boots from now on, and whether it goes on when the programs
    /// of the terminal that it was started from are interrupted.
    pub fn set_up(&self, boot: &Boot, survives: bool) -> Result<()> {
        fs::write(self.directory.join("boot.json"), serde_json::to_vec(&(boot, survives))?)
            .context("noting what a machine boots")
    }

    /// Switches it on: from its disks, or from a snapshot of its memory.
    pub fn start(&self, memory: Option<&Path>) -> Result<()> {
        if self.is_running() {
            bail!("{} is running already", self.directory.display());
        }
        let boot = fs::read(self.directory.join("boot.json")).context("reading boot.json")?;
        let (boot, survives): (Boot, bool) =
            serde_json::from_slice(&boot).context("reading boot.json")?;
        let mut command = self.network.command("qemu-system-x86_64");
        command.args(self.arguments(&boot)?).current_dir(&self.directory);
        if let Some(memory) = memory {
            command.arg("-incoming").arg(format!("exec:cat '{}'", memory.display()));
        }
        let log = File::create(self.directory.join("qemu.log")).context("creating qemu.log")?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        if survives {
            command.process_group(0);
        }
        let mut child = command.spawn().context("starting QEMU")?;
        let process = i32::try_from(child.id())?;
        let born = birth(process).context("QEMU ended at once")?;
        fs::write(self.directory.join("pid"), format!("{process} {born}")).context("noting it")?;
        // Somebody has to take note of its end, or it would stay a zombie.
        thread::spawn(move || child.wait());
        host::wait_for("QEMU's monitor", Duration::from_secs(30), || {
            if !self.is_running() {
                bail!("QEMU ended: {}", host::tail(&self.directory.join("qemu.log")));
            }
            Ok(self.monitor().ok())
        })?;
        if memory.is_some() {
            let arrived = || Ok(self.runs_or_is_ready()?.then_some(()));
            host::wait_for("the snapshot to load", Duration::from_secs(120), arrived)?;
            self.qmp("cont", &json!({}))?;
        }
        Ok(())
    }

    /// Whether an incoming snapshot has arrived.
    fn runs_or_is_ready(&self) -> Result<bool> {
        if !self.is_running() {
            bail!("QEMU ended: {}", host::tail(&self.directory.join("qemu.log")));
        }
        let status = self.qmp("query-status", &json!({}))?;
        Ok(!matches!(status["status"].as_str(), Some("inmigrate") | None))
    }

    /// Cuts its power. What its guest had not flushed from its own caches is lost.
    pub fn kill(&self) -> Result<()> {
        if let Some(process) = self.process() {
            kill(process, Signal::SIGKILL).context("killing QEMU")?;
            // Gone, not only dead: as a zombie it may have threads that still hold its
            // disks, and another QEMU would not get them.
            let entry = PathBuf::from(format!("/proc/{process}"));
            let gone = || Ok((!entry.exists()).then_some(()));
            host::wait_for("QEMU to die", Duration::from_secs(20), gone)?;
        }
        Ok(())
    }

    /// Whether its power is on.
    pub fn is_running(&self) -> bool {
        self.process().is_some()
    }

    /// Its process. The time of birth guards against another that has its number.
    fn process(&self) -> Option<Pid> {
        let noted = fs::read_to_string(self.directory.join("pid")).ok()?;
        let (process, born) = noted.split_once(' ')?;
        let process = process.parse().ok()?;
        (birth(process)? == born).then(|| Pid::from_raw(process))
    }

    /// Plugs or unplugs its card on the shared segment.
    pub fn set_link(&self, up: bool) -> Result<()> {
        self.qmp("set_link", &json!({ "name": "net0", "up": up })).map(drop)
    }

    /// Adds an empty disk; the guest finds it as `/dev/disk/by-id/virtio-SERIAL`.
    pub fn add_disk(&self, serial: &str, bytes: u64) -> Result<()> {
        let file = self.directory.join(format!("disk-{serial}.raw"));
        let created = File::create_new(&file).context("creating the disk")?;
        created.set_len(bytes).context("sizing the disk")?;
        self.plug(Disk { serial: serial.to_owned(), file, read_only: false })
    }

    /// Adds a disk that others have as well, and nobody writes.
    pub fn lend_disk(&self, serial: &str, file: &Path) -> Result<()> {
        self.plug(Disk { serial: serial.to_owned(), file: file.to_owned(), read_only: true })
    }

    fn plug(&self, disk: Disk) -> Result<()> {
        let mut disks = self.disks()?;
        let Disk { serial, file, read_only } = &disk;
        self.qmp(
            "blockdev-add",
            &json!({ "node-name": serial, "driver": "raw", "discard": "unmap",
                "read-only": read_only,
                "file": { "driver": "file", "filename": file, "aio": "threads" } }),
        )?;
        self.qmp(
            "device_add",
            &json!({ "driver": "virtio-blk-pci", "drive": serial, "serial": serial,
                "id": format!("device-{serial}") }),
        )?;
        disks.push(disk);
        fs::write(self.directory.join("disks.json"), serde_json::to_vec(&disks)?)
            .context("noting the disk")
    }

    fn disks(&self) -> Result<Vec<Disk>> {
        match fs::read(self.directory.join("disks.json")) {
            Ok(text) => serde_json::from_slice(&text).context("reading disks.json"),
            Err(_) => Ok(Vec::new()),
        }
    }

    /// Writes its memory to a file and switches it off. Its disks stay as they
    /// were at that moment.
    pub(crate) fn save(&self, memory: &Path) -> Result<()> {
        self.qmp("stop", &json!({}))?;
        self.qmp("migrate-set-parameters", &json!({ "max-bandwidth": 10_000_000_000_u64 }))?;
        let to = format!("exec:cat >'{}'", memory.display());
        self.qmp("migrate", &json!({ "uri": to }))?;
        host::wait_for("the snapshot", Duration::from_secs(120), || {
            let state = self.qmp("query-migrate", &json!({}))?;
            match state["status"].as_str() {
                Some("completed") => Ok(Some(())),
                Some("failed") => bail!("the snapshot failed: {state}"),
                _ => Ok(None),
            }
        })?;
        self.qmp("quit", &json!({}))?;
        let gone = || Ok((!self.is_running()).then_some(()));
        host::wait_for("QEMU to end", Duration::from_secs(20), gone)
    }

    /// Asks something of QEMU's monitor.
    pub fn qmp(&self, order: &str, arguments: &Value) -> Result<Value> {
        let mut monitor = self.monitor()?;
        ask(&mut monitor, order, arguments)
    }

    fn monitor(&self) -> Result<BufReader<UnixStream>> {
        // Paths of sockets are short, those of directories may be long.
        let directory = File::open(&self.directory).context("opening the machine's directory")?;
        let path = format!("/proc/self/fd/{}/qmp.sock", directory.as_raw_fd());
        let stream = UnixStream::connect(path).context("connecting to QEMU")?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut monitor = BufReader::new(stream);
        monitor.read_line(&mut String::new()).context("QEMU's greeting")?;
        ask(&mut monitor, "qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn arguments(&self, boot: &Boot) -> Result<Vec<String>> {
        let mut arguments: Vec<String> = boot.acceleration.arguments().map(str::to_owned).into();
        let mut add = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        add("-M", "pc".into());
        add("-smp", "2".into());
        add("-m", MEMORY_MIB.into());
        add("-rtc", "base=utc".into());
        add("-display", "none".into());
        add("-chardev", "file,id=console,path=console.log,append=on".into());
        add("-serial", "chardev:console".into());
        add("-qmp", "unix:qmp.sock,server=on,wait=off".into());
        add("-kernel", boot.kernel.join("vmlinuz").display().to_string());
        add("-initrd", boot.kernel.join("initrd.img").display().to_string());
        add("-append", "console=ttyS0 panic=-1 quiet".into());
        add("-device", "virtio-rng-pci,addr=02".into());
        // Nodes from one snapshot must not draw the same random numbers: the
        // kernel starts anew when this changes.
        add("-device", "vmgenid,guid=auto".into());
        let cards = [
            ("net0", "03", network::segment_tap(self.letter), self.mac()),
            ("bed0", "04", network::bed_tap(self.letter), "52:54:00:be:d0:01".into()),
        ];
        for (name, slot, tap, mac) in cards {
            add("-netdev", format!("tap,id={name},ifname={tap},script=no,downscript=no"));
            add("-device", format!("virtio-net-pci,netdev={name},mac={mac},addr={slot},romfile="));
        }
        // The host's page cache outlives QEMU, so what a guest flushed is never
        // lost to a power cut, whatever is said here.
        let disks = [("root", "05", "cache=unsafe"), ("pool", "06", "cache=writeback")];
        for (serial, slot, cache) in disks {
            let file = format!("file={serial}.qcow2,format=qcow2");
            add("-drive", format!("if=none,id={serial},discard=unmap,{cache},{file}"));
            add("-device", format!("virtio-blk-pci,drive={serial},serial={serial},addr={slot}"));
        }
        for Disk { serial, file, read_only } in self.disks()? {
            let write = if read_only { "readonly=on" } else { "readonly=off" };
            let file = format!("{write},file={},format=raw", file.display());
            add("-drive", format!("if=none,id={serial},discard=unmap,cache=writeback,{file}"));
            add(
                "-device",
                format!("virtio-blk-pci,drive={serial},serial={serial},id=device-{serial}"),
            );
        }
        arguments.extend(["-nodefaults", "-no-user-config"].map(str::to_owned));
        Ok(arguments)
    }
}

/// QEMU's version: snapshots are only good for the one that made them.
pub(crate) fn version() -> Result<String> {
    host::output(&mut host::command(&["qemu-system-x86_64", "--version"]))
}

/// Uses the processor only where a guest really boots with it: a device file
/// that opens proves nothing. The answer holds until the host boots again.
pub(crate) fn acceleration(kernel: &Path) -> Result<Acceleration> {
    if env::var_os("DMLOCAL_TCG").is_some() || File::options().write(true).open("/dev/kvm").is_err()
    {
        return Ok(Acceleration::Tcg);
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("which boot")?;
    let answer = host::cache()?.join(format!("kvm-boots-{}", boot.trim()));
    if !answer.exists() {
        let boots = probe(kernel)?;
        eprintln!("KVM {}", if boots { "works" } else { "does not work here: emulating" });
        fs::write(&answer, if boots { "yes" } else { "no" }).context("noting the answer")?;
    }
    Ok(match fs::read_to_string(&answer).context("reading the answer")?.as_str() {
        "yes" => Acceleration::Kvm,
        _ => Acceleration::Tcg,
    })
}

fn probe(kernel: &Path) -> Result<bool> {
    let directory = tempfile::tempdir().context("creating a directory")?;
    let console = directory.path().join("console.log");
    let mut child = host::command(&["qemu-system-x86_64", "-nodefaults", "-display", "none"])
        .args(Acceleration::Kvm.arguments())
        .args(["-M", "pc", "-m", "512", "-no-reboot"])
        .args(["-append", "console=ttyS0 panic=-1"])
        .arg("-kernel")
        .arg(kernel.join("vmlinuz"))
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("starting the probe")?;
    // Without a root the kernel panics, but only after everything that matters.
    let text = "Unable to mount root";
    let booted = host::wait_for("the probe", Duration::from_secs(10), || {
        let log = fs::read(&console).unwrap_or_default();
        Ok(String::from_utf8_lossy(&log).contains(text).then_some(()))
    });
    let _ = child.kill();
    let _ = child.wait();
    Ok(booted.is_ok())
}

fn ask(monitor: &mut BufReader<UnixStream>, order: &str, arguments: &Value) -> Result<Value> {
    let question = json!({ "execute": order, "arguments": arguments });
    monitor.get_mut().write_all(format!("{question}\n").as_bytes()).context("asking QEMU")?;
    loop {
        let mut line = String::new();
        if monitor.read_line(&mut line).context("QEMU's answer")? == 0 {
            // It hangs up on those who tell it to quit, sometimes without a word.
            return if order == "quit" { Ok(Value::Null) } else { Err(anyhow!("QEMU hung up")) };
        }
        let mut answer: Value = serde_json::from_str(&line).context("QEMU's answer")?;
        if let Some(error) = answer.get("error") {
            bail!("QEMU refuses {order}: {error}");
        }
        if let Some(value) = answer.get_mut("return") {
            return Ok(value.take());
        }
    }
}

/// When a process was started; `None` for one that is gone or a zombie.
pub(crate) fn birth(process: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The program's name may contain anything, but nothing after it does.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    (state != "Z" && state != "X").then(|| fields.nth(18).map(str::to_owned))?
}
