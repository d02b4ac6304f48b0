//! A simulated world for tests: nodes with logical volumes, device-mapper,
//! exports and imports that behave as the kernel's do where it matters.
//!
//! What is modelled, because data is lost where it is forgotten: writes stay in
//! a volatile cache until a flush, and some of them survive without; dm-clone keeps
//! its bits in memory until it commits, formats zeroed metadata silently, reads its
//! metadata only when a table is loaded, and lands a copy some time after it began,
//! whatever became of the region meanwhile; a thin volume knows what was written to
//! it, and a snapshot of it knows the same; a held write goes where the old table
//! pointed when the table is swapped; device numbers are reused at once; loading and
//! resuming are two actions. Every action can be the last one before a crash.

mod fork;
mod push;

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use crate::{
    name::{DM_UUID_PREFIX, Role, VolumeId},
    plan::{self, Device, Import, Presence, Seen, Step},
    seeding::{AllocationMap, Run, SourceMap, Unwritten, Written},
    table::{CloneStatus, Table, Target},
    units::{DevNo, Sectors},
    volume::{Event, Record, Template},
};

/// Regions of a simulated volume; each holds one value, 0 when blank.
pub const REGIONS: usize = 4;

/// Region size: 64 KiB.
pub const REGION: Sectors = Sectors(128);

/// Size of a simulated volume in bytes.
pub const VOLUME_BYTES: u64 = REGIONS as u64 * REGION_BYTES;

/// Size of a simulated region in bytes.
pub const REGION_BYTES: u64 = 64 * 1024;

/// What a region held before it was ever written by its present owner: another
/// volume's past.
pub const FOREIGN: u64 = u64::MAX;

/// Regions of a logical volume that nothing was written to.
const NONE: [bool; REGIONS] = [false; REGIONS];

/// Why an action was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The process died before this action.
    Crash,
    /// Somebody uses the device.
    Busy,
    /// The kernel refused.
    Refused(String),
    /// A check in front of the kernel found something else than it should.
    Mismatch(String),
}

/// What became of a request to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Io<T> {
    /// It was done and acknowledged.
    Done(T),
    /// It waits.
    Waits,
    /// It failed.
    Failed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Metadata {
    Garbage,
    Zero,
    Clone([bool; REGIONS]),
}

#[derive(Debug, Clone)]
struct Volume {
    number: DevNo,
    length: Sectors,
    active: bool,
    now: [u64; REGIONS],
    stable: [u64; REGIONS],
    /// Regions that the thin pool has given blocks for; as for content, now and on
    /// stable storage.
    mapped: [bool; REGIONS],
    mapped_stable: [bool; REGIONS],
    metadata: Metadata,
}

#[derive(Debug, Clone)]
struct Mapped {
    number: DevNo,
    live: Option<Table>,
    inactive: Option<Table>,
    suspended: bool,
    users: u32,
    leaving: bool,
    discards_blocked: bool,
    hydrating: bool,
    bits: [bool; REGIONS],
    /// A region whose copy has been read and not yet written.
    copying: Option<(usize, u64)>,
    held: Vec<(usize, u64)>,
    /// A swap has let go of what it held, and failed: it holds nothing any more.
    leaks: bool,
    /// Writes that were done through it.
    written: u64,
    /// It got a push since the world last had time to copy.
    pushed: bool,
}

impl Mapped {
    fn seen(&self) -> Device {
        Device {
            number: self.number,
            table: self.live.clone(),
            suspended: self.suspended,
            open_count: self.users,
            leaving: self.leaving,
        }
    }
}

/// What serves a region; windows begin where they stand on what is below.
fn at_region(table: &Table, region: usize) -> Option<&Target> {
    let at = region as u64 * REGION.0;
    if at >= table.length.0 {
        return None;
    }
    match &table.tail {
        Some((from, then)) if at >= from.0 => Some(then),
        Some(_) | None => Some(&table.target),
    }
}

/// Regions of a table.
fn regions(table: &Table) -> usize {
    usize::try_from(table.length.0.div_ceil(REGION.0)).unwrap_or(REGIONS).min(REGIONS)
}

/// The volume whose handle has this UUID.
fn handle_of(uuid: &str) -> Option<&str> {
    let (volume, generation) = uuid.rsplit_once("-g")?;
    generation.bytes().all(|byte| byte.is_ascii_digit()).then_some(volume)
}

fn is_handle(uuid: &str, id: VolumeId) -> bool {
    handle_of(uuid) == Some(&format!("{DM_UUID_PREFIX}{id}"))
}

/// How often time passes before a late write lands by itself.
const LATE: u8 = 3;

#[derive(Debug, Clone)]
struct Late {
    node: usize,
    nqn: String,
    region: usize,
    value: u64,
    left: u8,
}

#[derive(Debug, Clone, Copy)]
struct Imported {
    number: DevNo,
    /// As the initiator knows it; the source's device may have grown since.
    length: Sectors,
}

/// One node's kernel and disks.
#[derive(Debug, Clone)]
pub struct Node {
    /// Which boot this is.
    pub boot: Uuid,
    /// Whether it has power.
    pub up: bool,
    lvs: BTreeMap<String, Volume>,
    mapped: BTreeMap<String, Mapped>,
    /// Export NQN to the number of what is exported.
    exports: BTreeMap<String, DevNo>,
    /// Import NQN to the namespace.
    imports: BTreeMap<String, Imported>,
}

/// All nodes and what connects them.
#[derive(Debug, Clone)]
pub struct World {
    /// The nodes.
    pub nodes: Vec<Node>,
    /// Whether the network carries anything.
    pub network: bool,
    /// Actions until the crash; none for no crash.
    pub fuse: Option<usize>,
    /// Actions until one that fails, once.
    pub fault: Option<usize>,
    /// Held writes that a swap has let through and acknowledged: node, region,
    /// value.
    pub released: Vec<(usize, usize, u64)>,
    /// Reads of a handle that wait for a source: node, region. No table on their
    /// way can be swapped before they have ended.
    waiting: BTreeSet<(usize, String, usize)>,
    /// Copying begins while what was never written is being marked.
    pub careless: bool,
    /// Copying goes on while a snapshot is taken of what it has not brought yet.
    pub torn: bool,
    /// What is known to be here is lost once such a snapshot is taken.
    pub spoiled: bool,
    /// LVM was asked for something while consumers of a clone that works waited for a
    /// process that had died.
    pub kept_waiting: bool,
    /// Such a snapshot is taken of what is known to be here on the disk.
    pub uncommitted: bool,
    /// Consumers always have requests on their way: clones begin no copy by themselves.
    pub busy: bool,
    /// Writes of handles that wait for a source: node, the way to the source, region,
    /// value.
    sent: Vec<(usize, DevNo, usize, u64)>,
    /// Writes that have left a node which has lost power since, and are done some time
    /// later.
    late: Vec<Late>,
    serial: u128,
}

impl World {
    /// A world of so many nodes, with nothing on them.
    pub fn new(nodes: usize) -> Self {
        let mut world = Self {
            nodes: Vec::new(),
            network: true,
            fuse: None,
            fault: None,
            released: vec![],
            waiting: BTreeSet::new(),
            careless: false,
            torn: false,
            uncommitted: false,
            spoiled: false,
            kept_waiting: false,
            busy: false,
            sent: Vec::new(),
            late: Vec::new(),
            serial: 1,
        };
        for _ in 0..nodes {
            let boot = world.unique();
            world.nodes.push(Node {
                boot,
                up: true,
                lvs: BTreeMap::new(),
                mapped: BTreeMap::new(),
                exports: BTreeMap::new(),
                imports: BTreeMap::new(),
            });
        }
        world
    }

    /// A UUID that was not given before.
    pub fn unique(&mut self) -> Uuid {
        self.serial += 1;
        Uuid::from_u128(self.serial << 64 | 1)
    }

    /// Takes a node's power away and gives it back: only stable storage stays.
    pub fn power_cut(&mut self, node: usize) {
        let (boot, serial) = (self.unique(), self.serial);
        self.waiting.retain(|(at, ..)| *at != node);
        let sent = std::mem::take(&mut self.sent);
        for (at, src, region, value) in sent {
            match self.export_behind(at, src) {
                Some(nqn) if at == node => {
                    self.late.push(Late { node, nqn, region, value, left: LATE });
                }
                _ if at != node => self.sent.push((at, src, region, value)),
                _ => {}
            }
        }
        // What waits in the memory of the node that had the export goes with it.
        let lost: Vec<String> = self.nodes[node].exports.keys().cloned().collect();
        self.late.retain(|late| !lost.contains(&late.nqn));
        let node = &mut self.nodes[node];
        node.boot = boot;
        node.mapped.clear();
        node.exports.clear();
        node.imports.clear();
        for lv in node.lvs.values_mut() {
            lv.active = false;
            // What was not flushed may survive all the same, here one in three.
            for region in 0..REGIONS {
                if (serial + region as u128).is_multiple_of(3) {
                    lv.stable[region] = lv.now[region];
                    lv.mapped_stable[region] = lv.mapped[region];
                }
            }
            lv.now = lv.stable;
            lv.mapped = lv.mapped_stable;
        }
    }

    /// Loses what every logical volume of a node holds as metadata.
    pub fn lose_metadata(&mut self, node: usize) {
        self.nodes[node].lvs.values_mut().for_each(|lv| lv.metadata = Metadata::Garbage);
    }

    /// Makes the logical volumes active, as start-up does: it may take long.
    pub fn activate(&mut self, node: usize) {
        self.kept_waiting |= self.waits_for_nobody(node);
        self.nodes[node].lvs.values_mut().for_each(|lv| lv.active = true);
    }

    /// Whether anything of ours is left on a node.
    pub fn is_clean(&self, node: usize) -> bool {
        let node = &self.nodes[node];
        node.lvs.is_empty()
            && node.mapped.is_empty()
            && node.exports.is_empty()
            && node.imports.is_empty()
    }

    /// One action, or the crash before it.
    ///
    /// # Errors
    /// The crash, or the fault that was asked for.
    pub fn act(&mut self) -> Result<(), Fault> {
        match &mut self.fault {
            Some(0) => {
                self.fault = None;
                return Err(Fault::Refused("a fault was asked for".into()));
            }
            Some(left) => *left -= 1,
            None => {}
        }
        match &mut self.fuse {
            Some(0) => Err(Fault::Crash),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn free_number(&self, node: usize) -> DevNo {
        let node = &self.nodes[node];
        let taken: BTreeSet<u32> = (node.lvs.values().map(|lv| lv.number))
            .chain(node.mapped.values().map(|mapped| mapped.number))
            .chain(node.imports.values().map(|import| import.number))
            .map(|number| number.minor)
            .collect();
        let minor = (0..).find(|minor| !taken.contains(minor)).unwrap_or(u32::MAX);
        DevNo { major: 253, minor }
    }

    fn stands_on(&self, node: usize, number: DevNo) -> bool {
        self.nodes[node].mapped.values().any(|mapped| {
            mapped.live.iter().chain(&mapped.inactive).any(|t| t.devices().contains(&number))
        })
    }

    // ---- requests of consumers ----

    /// Reads a region of a device by its name under `/dev/mapper`.
    pub fn read_handle(&mut self, node: usize, record: &Record, region: usize) -> Io<u64> {
        let name = plan::dm_name(record, Role::Handle).uuid;
        let Some(mapped) = self.nodes[node].mapped.get(&name) else { return Io::Failed };
        let outcome = self.read(node, mapped.number, region);
        if outcome == Io::Waits {
            self.waiting.insert((node, name, region));
        }
        outcome
    }

    /// The export that the way to a source leads to.
    fn export_behind(&self, node: usize, src: DevNo) -> Option<String> {
        let live = self.mapped_by(node, src)?.1.live.as_ref()?;
        let Target::WritableQueue { path: Some(path) } = live.target else { return None };
        let imports = &self.nodes[node].imports;
        imports.iter().find(|(_, import)| import.number == path).map(|(nqn, _)| nqn.clone())
    }

    /// Time passes: what waited for a source is done, if it can be.
    pub fn pass(&mut self) {
        for (node, src, region, value) in std::mem::take(&mut self.sent) {
            match self.write(node, src, region, value) {
                Io::Done(()) => self.released.push((node, region, value)),
                Io::Waits => self.sent.push((node, src, region, value)),
                Io::Failed => {}
            }
        }
        self.late.iter_mut().for_each(|late| late.left = late.left.saturating_sub(1));
        self.arrive(|late| late.left == 0);
    }

    /// Writes of nodes that have lost power are done, where the export is still there
    /// and takes them.
    fn arrive(&mut self, is_meant: impl Fn(&Late) -> bool) {
        for late in std::mem::take(&mut self.late) {
            let mut there = self.nodes.iter().enumerate();
            let there = there.find_map(|(at, there)| Some((at, *there.exports.get(&late.nqn)?)));
            if there.is_some() && !is_meant(&late) {
                self.late.push(late);
                continue;
            }
            let Some((at, exported)) = there else { continue };
            if self.write(at, exported, late.region, late.value) == Io::Done(()) {
                self.released.push((late.node, late.region, late.value));
            }
        }
    }

    /// Whether a request that entered through the handle hangs below a device.
    fn hangs_below(&mut self, node: usize, number: DevNo) -> bool {
        let above = self.sent.iter().any(|(at, src, ..)| {
            *at == node && (*src == number || self.leads_to(node, number, *src))
        });
        if above {
            return true;
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|(at, handle, region)| {
            let top = self.nodes[*at].mapped.get(handle);
            top.is_some_and(|top| self.read(*at, top.number, *region) == Io::Waits)
        });
        self.waiting = waiting;
        let mut here = self.waiting.iter().filter(|(at, ..)| *at == node);
        here.any(|(_, handle, region)| {
            let top = &self.nodes[node].mapped[handle];
            let mut way = vec![top.number];
            while let Some(at) = way.pop() {
                let Some((_, mapped)) = self.mapped_by(node, at) else { continue };
                if at == number && !mapped.suspended {
                    return self.read(node, at, *region) == Io::Waits;
                }
                way.extend(mapped.live.iter().flat_map(Table::devices));
            }
            false
        })
    }

    /// Whoever waits for a write has the device open.
    fn used(&self, node: usize, mut device: Device) -> Device {
        let waits = self
            .sent
            .iter()
            .any(|(at, src, ..)| *at == node && self.leads_to(node, device.number, *src));
        device.open_count = device.open_count.max(u32::from(waits));
        device
    }

    fn leads_to(&self, node: usize, from: DevNo, to: DevNo) -> bool {
        let Some((_, mapped)) = self.mapped_by(node, from) else { return false };
        // What a hold lets go of has not entered what is below it yet.
        let below: Vec<DevNo> = mapped.live.iter().flat_map(Table::devices).collect();
        below.iter().any(|below| *below == to || self.leads_to(node, *below, to))
    }

    /// Writes a region of the handle.
    pub fn write_handle(
        &mut self,
        node: usize,
        record: &Record,
        region: usize,
        value: u64,
    ) -> Io<()> {
        let name = plan::dm_name(record, Role::Handle).uuid;
        let outcome = match self.nodes[node].mapped.get(&name) {
            Some(mapped) => self.write(node, mapped.number, region, value),
            None => Io::Failed,
        };
        if outcome == Io::Done(())
            && let Some(mapped) = self.nodes[node].mapped.get_mut(&name)
        {
            mapped.written += 1;
        }
        outcome
    }

    /// How many writes were done through a handle that somebody has open.
    pub fn written(&self, node: usize, record: &Record) -> Option<u64> {
        let handle = self.nodes[node].mapped.get(&plan::dm_name(record, Role::Handle).uuid)?;
        (handle.users > 0).then_some(handle.written)
    }

    /// Whether the handle is one that holds writes back, or has failed to.
    pub fn holds(&self, node: usize, record: &Record) -> bool {
        let handle = self.nodes[node].mapped.get(&plan::dm_name(record, Role::Handle).uuid);
        let table = handle.and_then(|handle| handle.live.as_ref());
        table.is_some_and(|table| matches!(table.target, Target::Hold { .. }))
    }

    /// Flushes what is read from the source, and nothing else.
    pub fn flush_source(&mut self, node: usize, record: &Record) -> Io<()> {
        let source = self.nodes[node].mapped.get(&plan::dm_name(record, Role::Src).uuid);
        match source.map(|source| source.number) {
            Some(number) => self.flush(node, number),
            None => Io::Failed,
        }
    }

    /// Flushes the handle: everything acknowledged before is on stable storage.
    pub fn flush_handle(&mut self, node: usize, record: &Record) -> Io<()> {
        let name = plan::dm_name(record, Role::Handle).uuid;
        match self.nodes[node].mapped.get(&name) {
            Some(mapped) => self.flush(node, mapped.number),
            None => Io::Failed,
        }
    }

    /// Opens or closes the handle for a consumer.
    pub fn set_users(&mut self, node: usize, record: &Record, users: u32) {
        let name = plan::dm_name(record, Role::Handle).uuid;
        if let Some(mapped) = self.nodes[node].mapped.get_mut(&name) {
            mapped.users = users;
            if users == 0 && mapped.leaving {
                self.nodes[node].mapped.remove(&name);
            }
        }
    }

    /// Every consumer of a node closes what it has open.
    pub fn close_all(&mut self, node: usize) {
        let mapped = &mut self.nodes[node].mapped;
        mapped.values_mut().for_each(|mapped| mapped.users = 0);
        mapped.retain(|_, mapped| !mapped.leaving);
    }

    /// The handle of a volume, whatever its record says.
    pub fn handle(&self, node: usize, id: VolumeId) -> Option<Device> {
        let here = &self.nodes[node].mapped;
        let found = here.iter().find(|(uuid, _)| is_handle(uuid, id));
        found.map(|(_, mapped)| self.used(node, mapped.seen()))
    }

    /// Names of all devices of a node but those that go with their last user.
    pub fn devices(&self, node: usize) -> Vec<String> {
        let mapped = self.nodes[node].mapped.iter().filter(|(_, mapped)| !mapped.leaving);
        mapped.map(|(name, _)| name.clone()).collect()
    }

    /// Commits the clone's metadata.
    pub fn commit(&mut self, node: usize, record: &Record) {
        let clone = self.nodes[node].mapped.get(&plan::dm_name(record, Role::Clone).uuid);
        let target = clone.and_then(|clone| match clone.live.as_ref()?.target {
            Target::Clone { meta, dest, .. } => Some((clone.number, meta, dest)),
            _ => None,
        });
        if let Some((clone, meta, dest)) = target {
            self.commit_clone(node, clone, meta, dest);
        }
    }

    /// Regions that the clone lacks; none where there is no clone.
    pub fn missing(&self, node: usize, record: &Record) -> Option<Vec<usize>> {
        let clone = self.nodes[node].mapped.get(&plan::dm_name(record, Role::Clone).uuid);
        let (clone, table) = clone.and_then(|clone| Some((clone, clone.live.as_ref()?)))?;
        Some((0..regions(table)).filter(|region| !clone.bits[*region]).collect())
    }

    /// The region whose copy has been read and not yet written.
    pub fn on_its_way(&self, node: usize, record: &Record) -> Option<usize> {
        let clone = self.nodes[node].mapped.get(&plan::dm_name(record, Role::Clone).uuid)?;
        clone.copying.map(|(region, _)| region)
    }

    /// Whether the handle exists.
    pub fn has_handle(&self, node: usize, record: &Record) -> bool {
        self.nodes[node].mapped.contains_key(&plan::dm_name(record, Role::Handle).uuid)
    }

    fn mapped_by(&self, node: usize, number: DevNo) -> Option<(&String, &Mapped)> {
        self.nodes[node].mapped.iter().find(|(_, mapped)| mapped.number == number)
    }

    fn lv_by(&self, node: usize, number: DevNo) -> Option<(&String, &Volume)> {
        self.nodes[node].lvs.iter().find(|(_, lv)| lv.active && lv.number == number)
    }

    fn reached(&self, nqn: &str) -> Option<(usize, DevNo)> {
        if !self.network {
            return None;
        }
        (self.nodes.iter().enumerate())
            .filter(|(_, node)| node.up)
            .find_map(|(index, node)| Some((index, *node.exports.get(nqn)?)))
    }

    /// What a host that asks now is told of an export's size.
    fn exported_length(&self, nqn: &str) -> Option<Sectors> {
        let (node, number) = self.reached(nqn)?;
        self.mapped_by(node, number)?.1.live.as_ref().map(|table| table.length)
    }

    fn read(&self, node: usize, number: DevNo, region: usize) -> Io<u64> {
        if let Some((_, lv)) = self.lv_by(node, number) {
            return Io::Done(lv.now[region]);
        }
        let mut imports = self.nodes[node].imports.iter();
        if let Some((nqn, import)) = imports.find(|(_, import)| import.number == number) {
            if region as u64 * REGION.0 >= import.length.0 {
                return Io::Failed;
            }
            return match self.reached(nqn) {
                Some((there, exported)) => self.read(there, exported, region),
                None => Io::Waits,
            };
        }
        let Some((_, mapped)) = self.mapped_by(node, number) else { return Io::Failed };
        if mapped.suspended {
            return Io::Waits;
        }
        match mapped.live.as_ref().and_then(|table| at_region(table, region)) {
            Some(
                Target::Linear { device, .. }
                | Target::Hold { device, .. }
                | Target::ReadOnly { device, .. }
                | Target::Queue { path: Some(device) }
                | Target::WritableQueue { path: Some(device) },
            ) => match self.read(node, *device, region) {
                // What fails below a queue waits in it.
                Io::Failed if mapped.live.as_ref().is_some_and(Table::is_queue) => Io::Waits,
                io => io,
            },
            Some(Target::Queue { path: None } | Target::WritableQueue { path: None }) => Io::Waits,
            Some(Target::Clone { dest, src, .. }) => {
                self.read(node, if mapped.bits[region] { *dest } else { *src }, region)
            }
            Some(Target::Error | Target::Lost | Target::Foreign { .. }) | None => Io::Failed,
        }
    }

    fn write(&mut self, node: usize, number: DevNo, region: usize, value: u64) -> Io<()> {
        if let Some((name, _)) = self.lv_by(node, number) {
            let name = name.clone();
            if let Some(lv) = self.nodes[node].lvs.get_mut(&name) {
                lv.now[region] = value;
                lv.mapped[region] = true;
            }
            return Io::Done(());
        }
        let mut imports = self.nodes[node].imports.iter();
        if let Some((nqn, import)) = imports.find(|(_, import)| import.number == number) {
            if region as u64 * REGION.0 >= import.length.0 {
                return Io::Failed;
            }
            return match self.reached(nqn) {
                Some((there, exported)) => self.write(there, exported, region, value),
                None => Io::Waits,
            };
        }
        let Some((name, mapped)) = self.mapped_by(node, number) else { return Io::Failed };
        if mapped.suspended {
            return Io::Waits;
        }
        let name = name.clone();
        match mapped.live.as_ref().and_then(|table| at_region(table, region)).cloned() {
            Some(Target::Linear { device, .. }) => self.write(node, device, region, value),
            Some(Target::Hold { device, .. }) if mapped.leaks => {
                self.write(node, device, region, value)
            }
            Some(Target::Hold { .. }) => {
                if let Some(mapped) = self.nodes[node].mapped.get_mut(&name) {
                    mapped.held.push((region, value));
                }
                Io::Waits
            }
            Some(Target::Clone { dest, .. }) => {
                // A write waits for a copy of its region, unless the region counts as
                // being here.
                if mapped.copying.is_some_and(|(at, _)| at == region) && !mapped.bits[region] {
                    self.land(node, &name);
                }
                let done = self.write(node, dest, region, value);
                if done == Io::Done(())
                    && let Some(mapped) = self.nodes[node].mapped.get_mut(&name)
                {
                    mapped.bits[region] = true;
                }
                done
            }
            Some(Target::WritableQueue { path }) => {
                // What fails below a queue waits in it.
                let done = path.map_or(Io::Waits, |path| self.write(node, path, region, value));
                match done {
                    Io::Done(()) => Io::Done(()),
                    Io::Waits | Io::Failed => {
                        if !self.sent.contains(&(node, number, region, value)) {
                            self.sent.push((node, number, region, value));
                        }
                        Io::Waits
                    }
                }
            }
            Some(
                Target::Error
                | Target::ReadOnly { .. }
                | Target::Queue { .. }
                | Target::Lost
                | Target::Foreign { .. },
            )
            | None => Io::Failed,
        }
    }

    fn flush(&mut self, node: usize, number: DevNo) -> Io<()> {
        if let Some((name, _)) = self.lv_by(node, number) {
            let name = name.clone();
            if let Some(lv) = self.nodes[node].lvs.get_mut(&name) {
                lv.stable = lv.now;
                lv.mapped_stable = lv.mapped;
            }
            return Io::Done(());
        }
        let mut imports = self.nodes[node].imports.iter();
        if let Some((nqn, _)) = imports.find(|(_, import)| import.number == number) {
            return match self.reached(nqn) {
                Some((there, exported)) => self.flush(there, exported),
                None => Io::Waits,
            };
        }
        let Some((_, mapped)) = self.mapped_by(node, number) else { return Io::Failed };
        if mapped.suspended {
            return Io::Waits;
        }
        let Some(table) = mapped.live.clone() else { return Io::Failed };
        // Every target is flushed, and all of them must have been.
        let mut outcome = Io::Done(());
        for (.., target) in table.lines() {
            match self.flush_target(node, number, target) {
                Io::Done(()) => {}
                Io::Failed => return Io::Failed,
                Io::Waits => outcome = Io::Waits,
            }
        }
        outcome
    }

    fn flush_target(&mut self, node: usize, number: DevNo, target: &Target) -> Io<()> {
        match target {
            Target::Linear { device, .. }
            | Target::ReadOnly { device, .. }
            | Target::Hold { flush: device, .. } => self.flush(node, *device),
            Target::Queue { path: Some(device) } | Target::WritableQueue { path: Some(device) } => {
                match self.flush(node, *device) {
                    // What fails below a queue waits in it.
                    Io::Failed => Io::Waits,
                    io => io,
                }
            }
            Target::Queue { path: None } | Target::WritableQueue { path: None } => Io::Waits,
            Target::Clone { meta, dest, .. } => {
                self.commit_clone(node, number, *meta, *dest);
                Io::Done(())
            }
            Target::Error | Target::Lost | Target::Foreign { .. } => Io::Failed,
        }
    }

    /// The destination first, then the bits.
    fn commit_clone(&mut self, node: usize, clone: DevNo, meta: DevNo, dest: DevNo) {
        self.flush(node, dest);
        let bits = self.mapped_by(node, clone).map(|(_, mapped)| mapped.bits);
        let name = self.lv_by(node, meta).map(|(name, _)| name.clone());
        if let (Some(bits), Some(name)) = (bits, name)
            && let Some(lv) = self.nodes[node].lvs.get_mut(&name)
        {
            lv.metadata = Metadata::Clone(bits);
        }
    }

    /// Ends the copy that a clone has begun.
    fn land(&mut self, node: usize, name: &str) {
        let Some(mapped) = self.nodes[node].mapped.get_mut(name) else { return };
        if let (Some((region, value)), Some(Table { target: Target::Clone { dest, .. }, .. })) =
            (mapped.copying.take(), &mapped.live)
        {
            let dest = *dest;
            mapped.bits[region] = true;
            self.write(node, dest, region, value);
        }
    }

    /// Lets every clone end the copy that it has begun, and begin another if it may.
    pub fn hydrate(&mut self) {
        self.pass();
        for node in 0..self.nodes.len() {
            let all: Vec<String> = self.nodes[node].mapped.keys().cloned().collect();
            all.iter().for_each(|name| self.land(node, name));
            let clones: Vec<(String, DevNo)> = self.nodes[node]
                .mapped
                .iter()
                .filter(|(_, mapped)| mapped.hydrating && !mapped.suspended)
                .filter_map(|(name, mapped)| match mapped.live.as_ref()?.target {
                    Target::Clone { src, .. } => Some((name.clone(), src)),
                    _ => None,
                })
                .collect();
            self.nodes[node].mapped.values_mut().for_each(|mapped| mapped.pushed = false);
            if self.busy {
                continue;
            }
            for (name, src) in clones {
                self.begin(node, &name, src);
            }
        }
    }

    /// Lets a clone begin its next copy, if it can be read.
    fn begin(&mut self, node: usize, name: &str, src: DevNo) {
        let mapped = &self.nodes[node].mapped[name];
        let count = mapped.live.as_ref().map_or(0, regions);
        let missing = mapped.bits[..count].iter().position(|bit| !bit);
        let Some(region) = missing else { return };
        if let Io::Done(value) = self.read(node, src, region)
            && let Some(mapped) = self.nodes[node].mapped.get_mut(name)
        {
            mapped.copying = Some((region, value));
        }
    }

    /// What a thin volume says was never written, as the agent asks it.
    ///
    /// # Errors
    /// The volume is not active.
    pub fn allocation(&self, node: usize, record: &Record) -> Result<Unwritten, Fault> {
        let (data, _) = plan::lv_names(record);
        let lv = self.nodes[node].lvs.get(&data).filter(|lv| lv.active);
        let lv = lv.ok_or_else(|| Fault::Refused(format!("{data} is not active")))?;
        let mut written =
            Written::new(record.size, REGION).ok_or_else(|| Fault::Refused("no regions".into()))?;
        for region in (0..REGIONS).filter(|region| lv.mapped[*region]) {
            written.add(Sectors(region as u64 * REGION.0), Sectors(1));
        }
        Ok(written.rest())
    }

    /// Suspends the handle, commits and loads the clone anew so that it takes discards,
    /// sends them, blocks them again, and resumes: each may be the last thing that a
    /// process does, and whatever else fails on the way, the way back is gone.
    fn seed(&mut self, node: usize, record: &Record, map: &AllocationMap) -> Result<(), Fault> {
        let (clone, handle) =
            (plan::dm_name(record, Role::Clone), plan::dm_name(record, Role::Handle));
        self.act()?;
        let below = self.nodes[node].mapped.get(&clone.uuid);
        let below = below.ok_or_else(|| Fault::Refused("no clone".into()))?;
        if below.hydrating || below.copying.is_some() {
            return Err(Fault::Mismatch("something is being copied".into()));
        }
        let Some(Target::Clone { meta, dest, .. }) = below.live.as_ref().map(|t| t.target.clone())
        else {
            return Err(Fault::Refused("no clone".into()));
        };
        let number = below.number;
        let top = self.nodes[node].mapped.get(&handle.uuid).map(|top| top.number);
        if let Some(top) = top {
            if self.hangs_below(node, top) {
                return Err(Fault::Refused(format!("{}: no end in sight", handle.name)));
            }
            self.change(node, &handle.uuid, |mapped| mapped.suspended = true)?;
        }
        let live = self.nodes[node].mapped[&clone.uuid].live.clone();
        let seeded = self
            .act()
            .map(|()| self.commit_clone(node, number, meta, dest))
            .and_then(|()| self.change(node, &clone.uuid, |mapped| mapped.suspended = true))
            .and_then(|()| self.change(node, &clone.uuid, |mapped| mapped.inactive = live))
            .and_then(|()| self.read_metadata(node, &clone.uuid, meta))
            .and_then(|()| self.resume(node, &clone.uuid))
            .map(|()| self.begin_carelessly(node, &clone.uuid))
            .and_then(|()| self.discard(node, &clone.uuid, map.unwritten.runs()));
        if !matches!(seeded, Ok(()) | Err(Fault::Crash))
            && let Some(mapped) = self.nodes[node].mapped.get_mut(&clone.uuid)
        {
            // The way back of what has failed.
            (mapped.inactive, mapped.suspended) = (None, false);
        }
        if seeded != Err(Fault::Crash) {
            // What has failed is over; a crash may still come.
            let blocked = self.change(node, &clone.uuid, |mapped| mapped.discards_blocked = true);
            let mut resumed = Ok(());
            if top.is_some() && blocked != Err(Fault::Crash) {
                resumed = self.resume(node, &handle.uuid);
                if let Err(Fault::Refused(_)) = resumed {
                    resumed = self.resume(node, &handle.uuid);
                }
            }
            blocked?;
            resumed?;
            seeded?;
            self.act()?;
            self.commit_clone(node, number, meta, dest);
            return Ok(());
        }
        seeded
    }

    /// Somebody turns copying on in between.
    fn begin_carelessly(&mut self, node: usize, clone: &str) {
        for hydrating in [true, false] {
            if self.careless
                && let Some(mapped) = self.nodes[node].mapped.get_mut(clone)
            {
                mapped.hydrating = hydrating;
                if hydrating {
                    self.hydrate();
                }
            }
        }
    }

    fn discard(&mut self, node: usize, clone: &str, runs: &[Run]) -> Result<(), Fault> {
        for run in runs {
            self.change(node, clone, |mapped| {
                let regions = run.first..run.first + run.count;
                for region in regions.filter_map(|region| usize::try_from(region).ok()) {
                    // Whatever is being copied there, and nothing is passed down.
                    mapped.bits[region] = true;
                }
            })?;
        }
        Ok(())
    }

    // ---- what dmlocal asks of a node ----

    /// What is there for a volume.
    pub fn look(&self, node: usize, record: &Record) -> Seen {
        let here = &self.nodes[node];
        let (data, meta) = plan::lv_names(record);
        let lv = |name: &str, known: Option<&String>| {
            known?;
            let lv = here.lvs.get(name).filter(|lv| lv.active)?;
            Some(plan::Lv { device: lv.number, length: lv.length })
        };
        let device = |role| here.mapped.get(&plan::dm_name(record, role).uuid).map(Mapped::seen);
        let clone = here.mapped.get(&plan::dm_name(record, Role::Clone).uuid);
        let top = device(Role::Handle).map(|handle| self.used(node, handle));
        let is_clone = |mapped: &&Mapped| {
            matches!(mapped.live, Some(Table { target: Target::Clone { .. }, .. }))
        };
        let clone = clone.filter(is_clone);
        let handle = here.mapped.get(&plan::dm_name(record, Role::Handle).uuid);
        let receiving = record.receiving();
        let import = receiving.map_or_else(Import::default, |receiving| {
            let nqn = &receiving.source.export.subsystem_nqn;
            let namespace = here.imports.get(nqn).copied();
            Import {
                connected: namespace.is_some(),
                namespace: namespace.map(|import| import.number),
                size: namespace.map(|import| import.length),
                live: namespace.is_some() && self.reached(nqn).is_some(),
            }
        });
        let published = match record.lent() {
            Some(lent) if here.exports.contains_key(&lent.export.subsystem_nqn) => {
                Presence::Complete
            }
            _ => Presence::Absent,
        };
        Seen {
            boot: here.boot,
            data: lv(&data, record.data.as_ref()),
            meta: lv(&meta, receiving.and_then(|receiving| receiving.meta.as_ref())),
            handle: top,
            clone: device(Role::Clone),
            src: device(Role::Src),
            export: device(Role::Export),
            clone_status: clone.map(|clone| CloneStatus::Working {
                hydrated: clone.bits.iter().filter(|bit| **bit).count() as u64,
                total: clone.live.as_ref().map_or(0, regions) as u64,
                hydrating: u64::from(clone.copying.is_some()),
                enabled: clone.hydrating,
                read_only: false,
            }),
            discards_blocked: clone.is_some_and(|clone| clone.discards_blocked),
            held: handle.map_or(0, |handle| handle.held.len() as u64),
            published,
            import,
            path_failed: false,
            connecting: false,
            resting: false,
            push: clone
                .is_some_and(|clone| {
                    self.busy && clone.hydrating && clone.copying.is_none() && !clone.pushed
                })
                .then_some(plan::Push::Drain),
            read: false,
            asked: false,
            steady: false,
            tuned: Some((record.tuning.threshold, record.tuning.batch)),
            cache_dropped: true,
            announced: true,
            map: SourceMap::Unasked,
            allocated: here.lvs.get(&data).filter(|lv| lv.active).map(|lv| {
                Sectors(lv.mapped.iter().filter(|mapped| **mapped).count() as u64 * REGION.0)
            }),
        }
    }

    /// Does one step, or as much of it as the fuse allows.
    ///
    /// # Errors
    /// The crash, or what the kernel would refuse.
    pub fn apply(
        &mut self,
        node: usize,
        record: &Record,
        step: &Step,
    ) -> Result<Option<Event>, Fault> {
        let (data, meta) = plan::lv_names(record);
        match step {
            Step::Allocate { data: size, meta: meta_size, of } => {
                let name = plan::made_lv(record);
                let data = match of {
                    Some(template) => self.snapshot_lv(node, &name, template)?,
                    None => self.make_lv(node, &name, *size, [0; REGIONS], NONE)?,
                };
                let meta = match meta_size {
                    Some(size) => {
                        Some(self.make_lv(node, &meta, *size, [FOREIGN; REGIONS], NONE)?)
                    }
                    None => None,
                };
                return Ok(Some(Event::Allocated { data, meta }));
            }
            Step::Fork { of, meta } => return self.fork(node, record, of, *meta).map(Some),
            Step::Grow { to, meta: meta_size } => {
                self.act()?;
                if let Some(lv) = self.nodes[node].lvs.get_mut(&data) {
                    lv.length = Sectors(lv.length.0.max(to.0));
                }
                if let Some(size) = meta_size {
                    self.act()?;
                    if let Some(lv) = self.nodes[node].lvs.get_mut(&meta) {
                        lv.length = Sectors::from_bytes(*size);
                    }
                }
            }
            Step::RetireMeta => self.remove_lv(node, &meta)?,
            Step::RetireAll => {
                self.remove_lv(node, &meta)?;
                self.remove_lv(node, &data)?;
            }
            Step::RetireData { name, .. } => self.remove_lv(node, name)?,
            Step::ZeroMeta(number) => {
                self.act()?;
                if self.stands_on(node, *number) {
                    return Err(Fault::Busy);
                }
                let name = self.lv_by(node, *number).map(|(name, _)| name.clone());
                if let Some(lv) = name.and_then(|name| self.nodes[node].lvs.get_mut(&name)) {
                    lv.metadata = Metadata::Zero;
                }
            }
            _ => self.apply_device(node, record, step)?,
        }
        Ok(None)
    }

    fn apply_device(&mut self, node: usize, record: &Record, step: &Step) -> Result<(), Fault> {
        let name = |role| plan::dm_name(record, role).uuid;
        match step {
            Step::Set(role, table) => self.set(node, &name(*role), table)?,
            Step::OpenHandle(table) | Step::FenceHandle(table) => {
                self.set(node, &name(Role::Handle), table)?;
            }
            Step::LoadClone { table, floor } => {
                let Target::Clone { meta, .. } = table.target else {
                    return Err(Fault::Refused("not a clone".into()));
                };
                let found = self.lv_by(node, meta).map(|(_, lv)| lv.metadata.clone());
                let here = match (&found, floor) {
                    (Some(Metadata::Clone(bits)), _) => bits.iter().filter(|bit| **bit).count(),
                    (Some(Metadata::Zero), None) => 0,
                    _ => return Err(Fault::Mismatch("no clone metadata".into())),
                };
                if floor.is_some_and(|floor| floor > here as u64) {
                    return Err(Fault::Mismatch("fewer regions than journalled".into()));
                }
                self.set(node, &name(Role::Clone), table)?;
            }
            Step::GrowHeld(table) => {
                let handle = self.nodes[node].mapped.get(&name(Role::Handle));
                if handle.is_some_and(|handle| !handle.held.is_empty()) {
                    return Err(Fault::Mismatch("a write waits in the handle".into()));
                }
                self.set(node, &name(Role::Handle), table)?;
            }
            Step::Remove(role) => self.remove(node, &name(*role), false)?,
            Step::RemoveDeferred(role) => self.remove(node, &name(*role), true)?,
            Step::SuspendHandle => {
                self.change(node, &name(Role::Handle), |m| m.suspended = true)?
            }
            Step::Resume(role) => self.resume(node, &name(*role))?,
            Step::BlockDiscards(_) => {
                self.change(node, &name(Role::Clone), |m| m.discards_blocked = true)?;
            }
            Step::Hydrate(on) => {
                self.change(node, &name(Role::Clone), |m| m.hydrating = *on)?;
            }
            Step::Seed(map) => self.seed(node, record, map)?,
            Step::Push { how: plan::Push::Drain, .. } => self.push(node, record)?,
            Step::Push { how: plan::Push::Gap, .. } => {}
            Step::Tune { .. } | Step::ReinstatePath(_) | Step::DropCache(_) => self.act()?,
            Step::Commit => {
                self.act()?;
                let clone = self.nodes[node].mapped.get(&name(Role::Clone));
                let target = clone.and_then(|clone| {
                    let count = clone.live.as_ref().map_or(0, regions);
                    let complete = clone.bits[..count].iter().all(|bit| *bit);
                    match clone.live.as_ref()?.target {
                        Target::Clone { meta, dest, .. } if complete => {
                            Some((clone.number, meta, dest))
                        }
                        _ => None,
                    }
                });
                let Some((clone, meta, dest)) = target else {
                    return Err(Fault::Refused("not complete".into()));
                };
                self.commit_clone(node, clone, meta, dest);
            }
            Step::Publish { export, .. } => {
                self.act()?;
                let below = self.nodes[node].mapped.get(&name(Role::Export)).map(|m| m.number);
                let below = below.ok_or_else(|| Fault::Refused("nothing to export".into()))?;
                self.nodes[node].exports.insert(export.subsystem_nqn.clone(), below);
            }
            Step::Announce(export) => {
                self.act()?;
                let nqn = &export.subsystem_nqn;
                for borrower in 0..self.nodes.len() {
                    let length = self.exported_length(nqn);
                    let import = self.nodes[borrower].imports.get_mut(nqn);
                    if let (Some(import), Some(length)) = (import, length) {
                        import.length = length;
                    }
                }
            }
            Step::Rescan { export, at_least } => {
                self.act()?;
                let nqn = &export.subsystem_nqn;
                let length = self.exported_length(nqn);
                let import = self.nodes[node].imports.get_mut(nqn);
                match (import, length) {
                    (Some(import), Some(length)) if length >= *at_least => import.length = length,
                    _ => return Err(Fault::Refused("the source is not as large".into())),
                }
            }
            Step::Unpublish { export, .. } => {
                self.act()?;
                // It waits for what is on its way.
                self.arrive(|late| late.nqn == export.subsystem_nqn);
                self.nodes[node].exports.remove(&export.subsystem_nqn);
            }
            Step::Connect(export) => {
                self.act()?;
                let nqn = &export.subsystem_nqn;
                if self.nodes[node].imports.contains_key(nqn) {
                    return Ok(());
                }
                if self.reached(nqn).is_none() {
                    return Err(Fault::Refused("no answer".into()));
                }
                let number = self.free_number(node);
                let length = self.exported_length(nqn).unwrap_or(Sectors(0));
                self.nodes[node].imports.insert(nqn.clone(), Imported { number, length });
            }
            Step::Disconnect(export) => {
                self.act()?;
                self.nodes[node].imports.remove(&export.subsystem_nqn);
            }
            Step::CutSource(export) => {
                self.act()?;
                // It has another feature list from now on, and fails what it queued.
                if let Some(src) = self.nodes[node].mapped.get_mut(&name(Role::Src))
                    && let Some(table) = &mut src.live
                {
                    table.target = Target::Foreign { kind: "multipath".to_owned() };
                    let number = src.number;
                    self.sent.retain(|(at, src, ..)| (*at, *src) != (node, number));
                }
                self.act()?;
                self.nodes[node].imports.remove(&export.subsystem_nqn);
            }
            Step::Seal(table) => {
                for role in [Role::Clone, Role::Handle] {
                    if self.nodes[node].mapped.contains_key(&name(role)) {
                        self.set(node, &name(role), table)?;
                    }
                }
            }
            Step::Flush(number) => {
                self.act()?;
                self.flush(node, *number);
            }
            Step::Allocate { .. }
            | Step::Fork { .. }
            | Step::Grow { .. }
            | Step::RetireMeta
            | Step::RetireAll
            | Step::RetireData { .. }
            | Step::ZeroMeta(_) => {}
        }
        Ok(())
    }

    fn change(
        &mut self,
        node: usize,
        name: &str,
        change: impl FnOnce(&mut Mapped),
    ) -> Result<(), Fault> {
        self.act()?;
        let mapped = self.nodes[node].mapped.get_mut(name);
        change(mapped.ok_or_else(|| Fault::Refused(format!("{name} is absent")))?);
        Ok(())
    }

    /// Create, load, resume: three actions, and a crash may come between them.
    fn set(&mut self, node: usize, name: &str, table: &Table) -> Result<(), Fault> {
        for device in table.devices() {
            let exists = self.lv_by(node, device).is_some()
                || self.mapped_by(node, device).is_some()
                || self.nodes[node].imports.values().any(|import| import.number == device);
            if !exists {
                return Err(Fault::Refused(format!("{device} is absent")));
            }
        }
        if !self.nodes[node].mapped.contains_key(name) {
            let taken =
                |other: &&String| handle_of(other).is_some_and(|of| handle_of(name) == Some(of));
            if self.nodes[node].mapped.keys().any(|other| taken(&other)) {
                return Err(Fault::Refused(format!("the name of {name} is taken")));
            }
            self.act()?;
            let number = self.free_number(node);
            let fresh = Mapped {
                number,
                live: None,
                inactive: None,
                suspended: false,
                users: 0,
                leaving: false,
                discards_blocked: false,
                hydrating: false,
                bits: [false; REGIONS],
                copying: None,
                held: Vec::new(),
                leaks: false,
                written: 0,
                pushed: false,
            };
            self.nodes[node].mapped.insert(name.to_owned(), fresh);
        }
        self.change(node, name, |mapped| mapped.inactive = Some(table.clone()))?;
        if let Target::Clone { meta, .. } = table.target {
            self.read_metadata(node, name, meta)?;
        }
        self.resume(node, name)
    }

    /// dm-clone's constructor: reads its metadata when the table is loaded.
    fn read_metadata(&mut self, node: usize, name: &str, meta: DevNo) -> Result<(), Fault> {
        let second = self.nodes[node].mapped.iter().any(|(other, mapped)| {
            other != name
                && matches!(&mapped.live, Some(Table { target: Target::Clone { meta: m, .. }, .. }) if *m == meta)
        });
        assert!(!second, "two live instances of one metadata");
        let lv_name = self.lv_by(node, meta).map(|(name, _)| name.clone());
        let lv = lv_name.and_then(|name| self.nodes[node].lvs.get_mut(&name));
        let lv = lv.ok_or_else(|| Fault::Refused("no metadata device".into()))?;
        let bits = match lv.metadata {
            Metadata::Clone(bits) => bits,
            Metadata::Zero => {
                lv.metadata = Metadata::Clone([false; REGIONS]);
                [false; REGIONS]
            }
            Metadata::Garbage => return Err(Fault::Refused("no clone metadata".into())),
        };
        if let Some(mapped) = self.nodes[node].mapped.get_mut(name) {
            mapped.bits = bits;
            mapped.hydrating = false;
            mapped.discards_blocked = false;
        }
        Ok(())
    }

    /// What a suspension does to a device that holds writes back.
    fn let_go(&mut self, node: usize, name: &str) {
        let Some(mapped) = self.nodes[node].mapped.get_mut(name) else { return };
        let held = std::mem::take(&mut mapped.held);
        if let Some(Table { target: Target::Hold { device, .. }, .. }) = mapped.live {
            for (region, value) in held {
                if self.write(node, device, region, value) == Io::Done(()) {
                    self.released.push((node, region, value));
                }
            }
        }
    }

    /// Swaps in a loaded table: what was held goes where the old table pointed.
    fn resume(&mut self, node: usize, name: &str) -> Result<(), Fault> {
        self.act()?;
        let Some(mapped) = self.nodes[node].mapped.get(name) else {
            return Err(Fault::Refused(format!("{name} is absent")));
        };
        // A reload of the way to the source lets go of what it queued.
        let (number, queues) = (mapped.number, mapped.live.as_ref().is_some_and(Table::is_queue));
        let swaps = mapped.inactive.is_some();
        if swaps && !queues && self.hangs_below(node, number) {
            self.let_go(node, name);
            if let Some(mapped) = self.nodes[node].mapped.get_mut(name) {
                mapped.inactive = None;
                mapped.leaks = true;
            }
            return Err(Fault::Refused(format!("{name}: no end in sight")));
        }
        // A suspended device has nothing on its way.
        let exported: Vec<String> = (self.nodes[node].exports.iter())
            .filter(|(_, exported)| **exported == number)
            .map(|(nqn, _)| nqn.clone())
            .collect();
        self.arrive(|late| exported.contains(&late.nqn));
        if swaps {
            // A suspension waits for the copy that has begun.
            self.land(node, name);
            self.let_go(node, name);
        }
        if let Some(mapped) = self.nodes[node].mapped.get_mut(name) {
            mapped.suspended = false;
            if let Some(table) = mapped.inactive.take() {
                mapped.leaks = false;
                mapped.live = Some(table);
            }
        }
        Ok(())
    }

    fn remove(&mut self, node: usize, name: &str, deferred: bool) -> Result<(), Fault> {
        self.act()?;
        let Some(mapped) = self.nodes[node].mapped.get(name) else { return Ok(()) };
        let exported = self.nodes[node].exports.values().any(|number| *number == mapped.number);
        let number = mapped.number;
        let waits = self.sent.iter().any(|(at, src, ..)| {
            *at == node && (*src == number || self.leads_to(node, number, *src))
        });
        let busy = mapped.users > 0 || exported || waits || self.stands_on(node, number);
        if !busy {
            self.land(node, name);
            self.nodes[node].mapped.remove(name);
            return Ok(());
        }
        if !deferred {
            return Err(Fault::Busy);
        }
        if let Some(mapped) = self.nodes[node].mapped.get_mut(name) {
            mapped.leaving = true;
        }
        Ok(())
    }

    fn make_lv(
        &mut self,
        node: usize,
        name: &str,
        bytes: u64,
        content: [u64; REGIONS],
        written: [bool; REGIONS],
    ) -> Result<String, Fault> {
        self.act()?;
        let number = self.free_number(node);
        let length = Sectors::from_bytes(bytes);
        let metadata = Metadata::Garbage;
        let (now, stable) = (content, content);
        let (mapped, mapped_stable) = (written, written);
        let active = true;
        let lv = Volume { number, length, active, now, stable, mapped, mapped_stable, metadata };
        let lv = self.nodes[node].lvs.entry(name.to_owned()).or_insert(lv);
        lv.active = true;
        Ok(format!("uuid of {name}"))
    }

    /// A thin snapshot: the pool commits it with everything that was acknowledged
    /// (drivers/md/dm-thin.c, `pool_message`, and `metadata_pre_commit_callback`).
    fn snapshot_lv(
        &mut self,
        node: usize,
        name: &str,
        template: &Template,
    ) -> Result<String, Fault> {
        if self.nodes[node].lvs.contains_key(name) {
            return self.make_lv(node, name, 0, [FOREIGN; REGIONS], NONE);
        }
        let origin = self.nodes[node].lvs.get(&template.name);
        let Some((content, written, length)) = origin.map(|lv| (lv.now, lv.mapped, lv.length))
        else {
            return Err(Fault::Refused(format!("no logical volume {}", template.name)));
        };
        self.make_lv(node, name, length.bytes(), content, written)
    }

    /// What a logical volume holds, if there is one of that name.
    pub fn content(&self, node: usize, name: &str) -> Option<[u64; REGIONS]> {
        self.nodes[node].lvs.get(name).map(|lv| lv.now)
    }

    fn remove_lv(&mut self, node: usize, name: &str) -> Result<(), Fault> {
        self.act()?;
        let Some(lv) = self.nodes[node].lvs.get(name) else { return Ok(()) };
        if self.stands_on(node, lv.number) {
            return Err(Fault::Busy);
        }
        self.nodes[node].lvs.remove(name);
        Ok(())
    }
}
