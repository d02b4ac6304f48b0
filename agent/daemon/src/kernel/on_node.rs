//! The kernel modules against a real kernel: root, LVM, NVMe/TCP over loopback.
//!
//! ```text
//! handle ─▶ clone ─▶ thick LV (metadata), thin LV (destination)
//!                └─▶ src (multipath) ─▶ nvme ══ loopback ══ nvmet ─▶ export ─▶ thin LV (source)
//! ```
//!
//! One node is both sides. Every test takes down what it made, also after a panic.
//! They use the thin pool that `DMLOCAL_TEST_POOL` names, as in
//! `dmlocal/pool@/dev/vdb`, or make a volume group on a loop device, which stays:
//! they are for nodes that are thrown away, and ignored otherwise. What they print
//! is worth reading (`--nocapture`): it is what this kernel does.

mod hold;
mod pool;
mod source;
mod sparse;
mod story;
mod volume;

use std::{
    fs::{self, File, OpenOptions},
    io,
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

use dmlocal_model::{
    name::{DmName, Generation, NQN_PREFIX, Role, VolumeId, data_lv, meta_lv},
    table::{CloneStatus, Table, Target},
    units::{DevNo, Sectors},
};
use uuid::Uuid;

use super::{
    block,
    dm::{Dm, Remove, Udev},
    exec,
    lvm::{Lv, LvmError, Vg},
    nvme::{self, Import},
    nvmet::{self, Export, Nvmet},
};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;
const REGION: Sectors = Sectors(128);
const SHORT: Duration = Duration::from_millis(500);
const LONG: Duration = Duration::from_secs(30);

/// One at a time: they share the node's target and its names.
static NODE: Mutex<()> = Mutex::new(());

struct Bed {
    dm: Dm,
    vg: Vg,
    target: Nvmet,
    exports: Vec<Export>,
    _node: MutexGuard<'static, ()>,
}

fn sh(program: &str, args: &[&str]) -> String {
    exec::run(program, args, None, Duration::from_secs(120)).unwrap()
}

/// The volume group of all tests.
fn vg() -> Vg {
    static VG: OnceLock<Vg> = OnceLock::new();
    VG.get_or_init(|| match std::env::var("DMLOCAL_TEST_POOL") {
        Ok(text) => {
            let (names, device) = text.split_once('@').unwrap();
            let (name, pool) = names.split_once('/').unwrap();
            Vg {
                name: name.to_owned(),
                devices: vec![PathBuf::from(device)],
                thin_pool: pool.to_owned(),
            }
        }
        Err(_) => make_vg(),
    })
    .clone()
}

fn make_vg() -> Vg {
    let id = Uuid::new_v4().simple().to_string();
    let name = format!("test-{}", &id[..8]);
    let image = PathBuf::from(format!("/var/tmp/{name}"));
    File::create(&image).unwrap().set_len(768 * MIB).unwrap();
    let device = sh("losetup", &["--find", "--show", image.to_str().unwrap()]).trim().to_owned();
    let devices = ["--devices", &device];
    let lvm = |args: &[&str]| sh("lvm", &[&args[..1], &devices, &args[1..]].concat());
    lvm(&["vgcreate", "-qq", &name, &device]);
    lvm(&["lvcreate", "-qq", "-L", "512m", "-T", &format!("{name}/pool")]);
    Vg { name, devices: vec![PathBuf::from(device)], thin_pool: "pool".to_owned() }
}

impl Bed {
    fn new() -> Self {
        let node = NODE.lock().unwrap_or_else(PoisonError::into_inner);
        for module in [
            "dm-thin-pool",
            "dm-clone",
            "dm-multipath",
            "dm-round-robin",
            "dm-delay",
            "nvmet-tcp",
            "nvme-tcp",
        ] {
            sh("modprobe", &[module]);
        }
        Self {
            dm: Dm::with_refuser().unwrap(),
            vg: vg(),
            target: Nvmet::new(nvmet::ROOT),
            exports: Vec::new(),
            _node: node,
        }
    }

    fn number(&self, lv: &Lv) -> DevNo {
        let number = self.dm.by_uuid(&lv.dm_uuid()).unwrap().unwrap();
        assert_eq!(lv.number, Some(number));
        number
    }

    /// A thin volume of random content, exported and connected: its source side
    /// and the number of the namespace.
    fn source(&mut self, volume: Volume) -> (DevNo, Import, DevNo) {
        self.exported(volume, fill)
    }

    /// As [`Bed::source`], for content of one's own.
    fn exported(&mut self, volume: Volume, write: impl FnOnce(DevNo)) -> (DevNo, Import, DevNo) {
        let made = self.vg.create(Some((&volume.data(9), SIZE)), None, &["source"]).unwrap();
        let lv = self.number(&made[0]);
        write(lv);
        let export = volume.name(9, Role::Export);
        self.set(&export, Target::ReadOnly { device: lv, offset: Sectors(0) });
        let number = self.dm.device(&export).unwrap().unwrap().number;
        let export = Export {
            nqn: format!("{NQN_PREFIX}{}", Uuid::new_v4()),
            serial: "0123456789abcdef".to_owned(),
            uuid: Uuid::new_v4(),
            nguid: Uuid::new_v4(),
            device: block::node(number).unwrap(),
            host_nqn: format!("{NQN_PREFIX}{}", volume.0.uuid()),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            // Another than that of a test that was killed.
            port: 20000 + u16::from(volume.0.uuid().as_bytes()[0]) * 64,
        };
        let import = Import {
            nqn: export.nqn.clone(),
            uuid: export.uuid,
            address: export.address,
            port: export.port,
            host_nqn: export.host_nqn.clone(),
            host_id: volume.0.uuid(),
        };
        self.exports.push(export.clone());
        timed("publish", || self.target.publish(&export).unwrap());
        assert!(self.target.observe(&export).unwrap().serves());
        timed("publish again", || self.target.publish(&export).unwrap());
        (lv, import.clone(), self.connect(&import))
    }

    fn connect(&self, import: &Import) -> DevNo {
        timed("connect", || nvme::connect(import, LONG).unwrap());
        let seen = nvme::observe(import).unwrap();
        assert!(seen.live && seen.controllers.len() == 1, "{seen:?}");
        seen.namespace.unwrap()
    }

    fn set(&self, name: &DmName, target: Target) {
        self.set_within(name, target, LONG).unwrap();
    }

    fn set_within(&self, name: &DmName, target: Target, deadline: Duration) -> io::Result<()> {
        let handle = !name.name.contains("-g");
        let udev = if handle { Udev::Linked } else { Udev::Hidden };
        let table = Table::whole(Sectors::from_bytes(SIZE), target);
        let before = Instant::now();
        self.dm.set(name, &table, udev, deadline)?;
        println!("set {} {}: {:?}", name, table.target.kind(), before.elapsed());
        // What the kernel prints is what was loaded.
        let device = self.dm.device(name)?.unwrap();
        assert!(device.serves(&table), "loaded {table:?}, found {device:?}");
        assert!(!device.has_inactive);
        Ok(())
    }

    fn status(&self, name: &DmName) -> String {
        self.dm.status_text(name).unwrap()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // Errors are of no use here, and a panic in a panic would hide the first.
        let all = self.dm.ours().unwrap_or_default();
        for device in &all {
            // Whatever waits for a source must fail, or nothing can be removed.
            let name = DmName { name: device.name.clone(), uuid: device.uuid.clone() };
            if device.table.as_ref().is_some_and(|table| table.target.kind() == "multipath") {
                let _ = self.dm.message(&name, "fail_if_no_path");
            }
            if device.suspended {
                let _ = self.dm.resume(&name);
            }
        }
        for _ in 0..all.len() {
            for device in self.dm.ours().unwrap_or_default() {
                if device.open_count == 0 {
                    let name = DmName { name: device.name, uuid: device.uuid };
                    let _ = self.dm.remove(&name, Remove::Now);
                }
            }
            for export in &self.exports {
                let _ = nvme::disconnect(&export.nqn, LONG);
                let _ = self.target.unpublish(export);
            }
        }
        let left = self.vg.lvs().unwrap_or_default();
        let left: Vec<_> = left.iter().map(|lv| (lv.name.as_str(), lv.uuid.as_str())).collect();
        if let Err(error) = self.vg.remove(&left) {
            println!("{error}");
        }
    }
}

#[derive(Clone, Copy)]
struct Volume(VolumeId);

impl Volume {
    fn new() -> Self {
        Self(VolumeId::new(Uuid::new_v4()))
    }

    fn name(self, generation: u64, role: Role) -> DmName {
        DmName::new(self.0, Generation(generation), role)
    }

    fn handle(self) -> DmName {
        self.name(1, Role::Handle)
    }

    fn data(self, generation: u64) -> String {
        data_lv(self.0, Generation(generation), 0)
    }

    fn meta(self, generation: u64) -> String {
        meta_lv(self.0, Generation(generation))
    }
}

fn timed<T>(what: &str, action: impl FnOnce() -> T) -> T {
    let before = Instant::now();
    let result = action();
    println!("{what}: {:?}", before.elapsed());
    result
}

fn open(device: DevNo, write: bool) -> File {
    let path = block::node(device).unwrap();
    OpenOptions::new().read(true).write(write).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

/// Memory that O_DIRECT takes.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    fn new(length: u64) -> Self {
        let length = usize::try_from(length).unwrap();
        let bytes = vec![0; length + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self { bytes, start, length }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

const BLOCK: u64 = 4096;

/// A target that holds writes.
fn holds(device: DevNo, flush: DevNo) -> Target {
    Target::Hold { device, offset: Sectors(0), flush }
}

fn read_at(file: &File, at: u64) -> io::Result<Vec<u8>> {
    let mut block = Buffer::new(BLOCK);
    file.read_exact_at(block.bytes(), at)?;
    Ok(block.bytes().to_vec())
}

fn write_at(file: &File, at: u64, byte: u8) -> io::Result<()> {
    let mut block = Buffer::new(BLOCK);
    block.bytes().fill(byte);
    file.write_all_at(block.bytes(), at)
}

/// A byte that tells where it belongs, and zeros in between.
fn pattern(at: u64) -> u8 {
    if at.is_multiple_of(4 * BLOCK) { u8::try_from(1 + at / BLOCK % 251).unwrap() } else { 0 }
}

fn blocks(from: u64) -> impl Iterator<Item = u64> {
    (from..from + MIB).step_by(4096)
}

fn fill(device: DevNo) {
    let file = open(device, true);
    let mut buffer = Buffer::new(MIB);
    for from in (0..SIZE).step_by(1 << 20) {
        for (block, at) in buffer.bytes().chunks_mut(4096).zip(blocks(from)) {
            block.fill(pattern(at));
        }
        file.write_all_at(buffer.bytes(), from).unwrap();
    }
    file.sync_all().unwrap();
}

/// Compares everything with the pattern, or with what was `written` over it.
fn verify(device: DevNo, written: impl Fn(u64) -> Option<u8>) {
    let file = open(device, false);
    let mut buffer = Buffer::new(MIB);
    for from in (0..SIZE).step_by(1 << 20) {
        file.read_exact_at(buffer.bytes(), from).unwrap();
        for (block, at) in buffer.bytes().chunks(4096).zip(blocks(from)) {
            let want = written(at).unwrap_or_else(|| pattern(at));
            assert!(block.iter().all(|byte| *byte == want), "at {at}: {} for {want}", block[0]);
        }
    }
}

/// Runs something that may block; its end is the message.
fn behind<T: Send + 'static>(action: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (sender, receiver) = channel();
    thread::spawn(move || sender.send(action()));
    receiver
}

fn still_waits<T: std::fmt::Debug>(receiver: &Receiver<T>, time: Duration) {
    match receiver.recv_timeout(time) {
        Err(RecvTimeoutError::Timeout) => {}
        ended => panic!("it did not wait: {ended:?}"),
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn hydrated(status: &CloneStatus) -> bool {
    matches!(status, CloneStatus::Working { hydrated, total, read_only: false, .. }
        if hydrated == total)
}
