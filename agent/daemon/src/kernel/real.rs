//! The kernel and LVM themselves.

mod allocation;
mod fork;
mod pauses;
mod push;
mod seed;

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, TcpListener},
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use dmlocal_model::{
    name::{DmName, LVM_UUID_PREFIX, NQN_PREFIX, Role, VolumeId, handle_name},
    plan::{self, Device, Import, Lv, Presence, Seen, Step},
    seeding::{SourceMap, Unwritten},
    table::{CloneStatus, Table, Target},
    units::{DevNo, Sectors},
    volume::{Event, ExportName, Record, Template},
};
use uuid::Uuid;

use self::pauses::Pauses;
use super::{
    Kernel, PoolFacts, PoolUsage, StepError, Written, block,
    dm::{self, Dm, Remove, Udev},
    exec,
    lvm::{self, LvmError, Vg},
    nvme, nvmet, thin,
};
use crate::config::Config;

/// Longest wait for the I/O in flight when a table is swapped.
const SWAP: Duration = Duration::from_secs(30);

/// Longest wait for a page cache to be written back before a fence.
const WRITE_BACK: Duration = Duration::from_secs(30);

/// Longest wait for a connection; a later attempt follows.
const CONNECT: Duration = Duration::from_secs(10);

/// Longest wait for a controller to be gone.
const DISCONNECT: Duration = Duration::from_secs(30);

/// Modules behind the targets and transports that moves need. Those that a
/// kernel lacks are reported by what is missing afterwards.
const MODULES: [&str; 9] = [
    "dm-mod",
    "dm-thin-pool",
    "dm-clone",
    "dm-delay",
    "dm-multipath",
    "dm-round-robin",
    "nvmet",
    "nvmet-tcp",
    "nvme-tcp",
];

/// Features of the multipath target that turn waiting into failing.
const FAIL_IF_NO_PATH: &str = "fail_if_no_path";

/// The kernel of this machine.
pub struct RealKernel {
    dm: Dm,
    nvmet: nvmet::Nvmet,
    /// One LVM command at a time for each group.
    pools: BTreeMap<String, Mutex<Vg>>,
    /// The device-mapper UUID of each thin pool, once it was seen.
    tpools: Mutex<BTreeMap<String, String>>,
    boot: Uuid,
    release: String,
    host_nqn: String,
    host: Uuid,
    /// Where this daemon keeps what outlives it.
    state: PathBuf,
    pauses: Pauses,
}

impl RealKernel {
    /// Loads the modules and opens device-mapper.
    ///
    /// # Errors
    /// Device-mapper is missing, or the boot id cannot be read.
    pub fn new(config: &Config, host: Uuid) -> io::Result<Self> {
        for module in MODULES {
            // What is built in, or cannot be loaded, shows in what is there.
            let _ = exec::run("modprobe", &["-q", module], None, WRITE_BACK);
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let boot = boot.trim().parse().map_err(io::Error::other)?;
        let release = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
        let pools = config.pools.iter().map(|pool| {
            let vg = Vg {
                name: pool.volume_group.clone(),
                devices: pool.devices.clone(),
                thin_pool: pool.thin_pool.clone(),
            };
            (pool.name.clone(), Mutex::new(vg))
        });
        Ok(Self {
            dm: Dm::with_refuser()?,
            nvmet: nvmet::Nvmet::new(nvmet::ROOT),
            pools: pools.collect(),
            tpools: Mutex::default(),
            boot,
            release,
            host_nqn: format!("{NQN_PREFIX}{host}"),
            host,
            state: config.state.clone(),
            pauses: Pauses::default(),
        })
    }

    /// Lets no consumer wait from now on; returns whether those that do wait have gone
    /// on by then.
    pub fn let_go(&self, patience: Duration) -> bool {
        self.pauses.close(patience)
    }

    fn vg(&self, pool: &str) -> Result<MutexGuard<'_, Vg>, StepError> {
        let vg = self.pools.get(pool);
        let vg = vg.ok_or_else(|| StepError::Failed(format!("pool {pool} is not configured")))?;
        Ok(locked(vg))
    }

    fn lv(&self, dm_uuid: Option<&String>) -> Result<Option<Lv>, StepError> {
        let Some(dm_uuid) = dm_uuid else { return Ok(None) };
        let Some(device) = self.dm.by_uuid(dm_uuid)? else { return Ok(None) };
        Ok(Some(Lv { device, length: Sectors::from_bytes(block::size(device)?) }))
    }

    fn device(&self, record: &Record, role: Role) -> Result<Option<Device>, StepError> {
        Ok(self.dm.device(&plan::dm_name(record, role))?.map(seen))
    }

    fn import(&self, export: &ExportName) -> Result<nvme::Import, StepError> {
        Ok(nvme::Import {
            nqn: export.subsystem_nqn.clone(),
            uuid: export.namespace_uuid,
            address: address(export)?,
            port: export.port,
            host_nqn: self.host_nqn.clone(),
            host_id: self.host,
        })
    }

    fn export(
        &self,
        record: &Record,
        export: &ExportName,
        host_nqn: &str,
    ) -> Result<nvmet::Export, StepError> {
        let below = self.device(record, Role::Export)?;
        let device = match below {
            Some(below) => block::node(below.number)?,
            // Nothing stands below: only good for taking the export down.
            None => PathBuf::new(),
        };
        let mut serial = export.namespace_uuid.simple().to_string();
        serial.truncate(20);
        Ok(nvmet::Export {
            nqn: export.subsystem_nqn.clone(),
            serial,
            uuid: export.namespace_uuid,
            nguid: export.namespace_nguid,
            device,
            host_nqn: host_nqn.to_owned(),
            address: address(export)?,
            port: export.port,
        })
    }

    /// A data LV with the content of another.
    fn copy(&self, record: &Record, template: &Template) -> Result<Event, StepError> {
        let origin = lv_uuid(&template.data)?;
        let vg = self.vg(&record.pool)?;
        let made = vg.snapshot(&plan::made_lv(record), &template.name, &origin)?;
        Ok(Event::Allocated { data: made.dm_uuid(), meta: None })
    }

    fn allocate(&self, record: &Record, data: u64, meta: Option<u64>) -> Result<Event, StepError> {
        let (data_name, meta_name) = plan::lv_names(record);
        let thick = meta.map(|size| (meta_name.as_str(), size));
        let made = self.vg(&record.pool)?.create(Some((&data_name, data)), thick, &[])?;
        let uuid = |name: &str| made.iter().find(|lv| lv.name == name).map(lvm::Lv::dm_uuid);
        let data = uuid(&data_name)
            .ok_or_else(|| StepError::Failed(format!("{data_name} was not made")))?;
        // Blank volumes and the marking of what was never written rely on this. An old
        // one is there only if the journal of its days was lost.
        match thin::mapped(&self.dm.status_text_of(&data)?) {
            Some(Sectors(0)) => {}
            Some(_) => return Err(LvmError::Taken { name: data_name, field: "content" }.into()),
            None => {
                return Err(StepError::Failed(format!("{data_name} does not tell what it has")));
            }
        }
        Ok(Event::Allocated { data, meta: meta.and_then(|_| uuid(&meta_name)) })
    }

    /// Removes LVs: those that the journal names by their UUIDs, those that a
    /// crash kept from being journalled by name and tag.
    fn retire(&self, record: &Record, data_too: bool) -> Result<(), StepError> {
        if let Some(receiving) = record.receiving() {
            nvme::unwanted(&receiving.source.export.subsystem_nqn);
        }
        let journalled = record.receiving().and_then(|receiving| receiving.meta.as_ref());
        if let Some(meta) = self.lv(journalled)? {
            block::zero_block0(meta.device)?;
        }
        let vg = self.vg(&record.pool)?;
        let (data_name, meta_name) = plan::lv_names(record);
        // Only a copy that is received, or was to be, has clone metadata.
        let meta = record.receiving().map(|_| (meta_name, journalled));
        let mut wanted: Vec<_> = meta.into_iter().collect();
        if data_too {
            wanted.push((data_name, record.data.as_ref()));
        }
        if !data_too && journalled.is_none() {
            return Ok(());
        }
        let unknown = wanted.iter().any(|(_, uuid)| uuid.is_none());
        let present = if unknown { vg.lvs()? } else { Vec::new() };
        let mut doomed: Vec<(String, String)> = Vec::new();
        for (name, uuid) in wanted {
            match uuid {
                Some(uuid) => doomed.push((name, lv_uuid(uuid)?)),
                None => {
                    let found = present.iter().filter(|lv| lv.name == name);
                    doomed.extend(found.map(|lv| (lv.name.clone(), lv.uuid.clone())));
                }
            }
        }
        let doomed: Vec<(&str, &str)> =
            doomed.iter().map(|(name, uuid)| (name.as_str(), uuid.as_str())).collect();
        Ok(vg.remove(&doomed)?)
    }

    /// Removes a data LV that is not the volume's: by its UUID, or by name and tag
    /// where a crash kept it from being journalled.
    fn retire_data(
        &self,
        record: &Record,
        name: &str,
        dm_uuid: Option<&str>,
    ) -> Result<(), StepError> {
        if dm_uuid.is_some() && dm_uuid == record.data.as_deref() {
            return Err(StepError::Refused(format!("{name} is the volume's")));
        }
        let vg = self.vg(&record.pool)?;
        let uuid = match dm_uuid {
            Some(dm_uuid) => Some(lv_uuid(dm_uuid)?),
            None => vg.lvs()?.into_iter().find(|lv| lv.name == name).map(|lv| lv.uuid),
        };
        let doomed: Vec<_> = uuid.iter().map(|uuid| (name, uuid.as_str())).collect();
        Ok(vg.remove(&doomed)?)
    }

    /// Loads dm-clone, and checks that it found the metadata it should have.
    fn load_clone(
        &self,
        record: &Record,
        table: &Table,
        floor: Option<u64>,
    ) -> Result<(), StepError> {
        let name = plan::dm_name(record, Role::Clone);
        if let (Some(_), Target::Clone { meta, .. }) = (floor, &table.target)
            && !block::clone_magic(*meta)?
        {
            return Err(StepError::Refused(format!("{meta} holds no clone metadata")));
        }
        self.dm.set(&name, table, Udev::Hidden, SWAP)?;
        let Some(floor) = floor else { return Ok(()) };
        match self.dm.clone_status(&name)? {
            CloneStatus::Working { hydrated, .. } if hydrated >= floor => Ok(()),
            status => {
                self.dm.remove(&name, Remove::Now)?;
                Err(StepError::Refused(format!(
                    "the clone shows {status:?}, the journal knows of {floor} regions"
                )))
            }
        }
    }

    fn set(&self, record: &Record, role: Role, table: &Table) -> Result<(), StepError> {
        self.check_device(record, table)?;
        let udev = if role == Role::Handle { Udev::Linked } else { Udev::Hidden };
        Ok(self.dm.set(&plan::dm_name(record, role), table, udev, SWAP)?)
    }

    /// Device numbers are reused: what is to be overwritten must still be the
    /// logical volume that the journal names.
    fn same(&self, dm_uuid: Option<&String>, device: DevNo) -> Result<(), StepError> {
        match self.lv(dm_uuid)? {
            Some(lv) if lv.device == device => Ok(()),
            found => Err(StepError::Refused(format!("{device} is not {dm_uuid:?}: {found:?}"))),
        }
    }

    /// Right before a table goes live over the source's namespace, the number must
    /// still be the namespace's.
    fn check_device(&self, record: &Record, table: &Table) -> Result<(), StepError> {
        let (
            Target::Queue { path: Some(path) } | Target::WritableQueue { path: Some(path) },
            Some(receiving),
        ) = (&table.target, record.receiving())
        else {
            return Ok(());
        };
        let now = nvme::observe(&self.import(&receiving.source.export)?)?.namespace;
        if now == Some(*path) {
            return Ok(());
        }
        Err(StepError::Refused(format!("{path} is no longer the source's namespace")))
    }

    /// Writes the handle's page cache back, then lets it fail every request.
    fn fence(&self, record: &Record, table: &Table) -> Result<(), StepError> {
        let name = plan::dm_name(record, Role::Handle);
        if let Some(handle) = self.dm.device(&name)?
            && !handle.suspended
            && handle.table.as_ref().is_none_or(|table| table.target != Target::Error)
        {
            let number = handle.number;
            dm::interruptible(WRITE_BACK, move || block::sync_and_drop_cache(number), |_| {})?;
        }
        Ok(self.dm.set(&name, table, Udev::Linked, SWAP)?)
    }

    /// Lets consumers of a received volume write: what their page cache has kept
    /// from before the fence may be stale.
    fn open_handle(&self, record: &Record, table: &Table) -> Result<(), StepError> {
        let name = plan::dm_name(record, Role::Handle);
        for below in [Role::Clone, Role::Src] {
            if let Some(below) = self.device(record, below)? {
                block::drop_clean_cache(below.number)?;
            }
        }
        if let Some(receiving) = record.receiving()
            && let Some(namespace) =
                nvme::observe(&self.import(&receiving.source.export)?)?.namespace
        {
            block::drop_clean_cache(namespace)?;
        }
        // Before, so that nothing stale is read once writes go through; after, for
        // what was read in between. Writing back before would wait for the swap.
        if let Some(handle) = self.dm.device(&name)? {
            block::drop_clean_cache(handle.number)?;
        }
        self.set(record, Role::Handle, table)?;
        if let Some(handle) = self.dm.device(&name)? {
            block::drop_clean_cache(handle.number)?;
        }
        Ok(())
    }

    /// The clone fails first: what the handle then lets go of is refused.
    fn seal(&self, record: &Record, table: &Table) -> Result<(), StepError> {
        for role in [Role::Clone, Role::Handle] {
            let name = plan::dm_name(record, role);
            if self.dm.device(&name)?.is_some() {
                let udev = if role == Role::Handle { Udev::Linked } else { Udev::Hidden };
                self.dm.set(&name, table, udev, SWAP)?;
            }
        }
        Ok(())
    }

    fn cut_source(&self, record: &Record, export: &ExportName) -> Result<(), StepError> {
        nvme::unwanted(&export.subsystem_nqn);
        let src = plan::dm_name(record, Role::Src);
        if self.dm.device(&src)?.is_some_and(|device| device.has_live) {
            self.dm.message(&src, FAIL_IF_NO_PATH)?;
        }
        Ok(nvme::disconnect(&export.subsystem_nqn, DISCONNECT)?)
    }

    /// Twice committed, twice complete, and writable both times.
    fn commit(&self, record: &Record) -> Result<(), StepError> {
        let name = plan::dm_name(record, Role::Clone);
        for _ in 0..2 {
            let status = self.dm.commit_clone(&name)?;
            match status {
                CloneStatus::Working { hydrated, total, read_only: false, .. }
                    if hydrated == total => {}
                status => return Err(StepError::Refused(format!("not complete: {status:?}"))),
            }
        }
        Ok(())
    }

    fn message_clone(&self, record: &Record, text: &str) -> Result<(), StepError> {
        Ok(self.dm.message(&plan::dm_name(record, Role::Clone), text)?)
    }
}

impl Kernel for RealKernel {
    fn boot(&self) -> Uuid {
        self.boot
    }

    fn release(&self) -> String {
        self.release.clone()
    }

    fn targets(&self) -> Result<Vec<String>, StepError> {
        let version = |(kind, (a, b, c)): dm::TargetVersion| format!("{kind} {a}.{b}.{c}");
        Ok(self.dm.targets()?.into_iter().map(version).collect())
    }

    fn activate(&self, pool: Option<&str>) -> Result<(), StepError> {
        let mut outcome = Ok(());
        for (name, vg) in &self.pools {
            if pool.is_none_or(|pool| pool == name)
                && let Err(error) = locked(vg).activate()
            {
                outcome = Err(error.into());
            }
            if pool.is_none_or(|pool| pool == name)
                && let Err(error) = self.drop_left_snapshot(name, &locked(vg))
            {
                outcome = outcome.and(Err(error));
            }
        }
        outcome
    }

    fn pool(&self, name: &str) -> Result<Option<PoolFacts>, StepError> {
        let vg = self.vg(name)?;
        let Some(report) = vg.pool()? else { return Ok(None) };
        let tpool = report.tpool_dm_uuid();
        if self.dm.by_uuid(&tpool)?.is_none() {
            vg.activate()?;
        }
        // What an inactive pool is like cannot be known.
        let Some(device) = self.dm.by_uuid(&tpool)? else { return Ok(None) };
        let logical_block_size = block::logical_block_size(device)?;
        locked(&self.tpools).insert(name.to_owned(), tpool);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a share of a size is not larger than the size, nor negative"
        )]
        let used = (report.size as f64 * report.data_percent.unwrap_or(0.0) / 100.0) as u64;
        Ok(Some(PoolFacts {
            size: report.size,
            used,
            free_outside: report.vg_free,
            chunk: report.chunk_size,
            logical_block_size,
            zeroes: report.zero,
            errors_when_full: report.error_when_full,
        }))
    }

    fn port_is_free(&self, address: IpAddr, port: u16) -> bool {
        let bound = TcpListener::bind((address, port));
        !bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
    }

    fn pool_usage(&self, name: &str) -> Result<PoolUsage, StepError> {
        let mut tpool = locked(&self.tpools).get(name).cloned();
        if tpool.is_none() {
            self.pool(name)?;
            tpool = locked(&self.tpools).get(name).cloned();
        }
        let tpool = tpool.ok_or_else(|| StepError::Failed(format!("pool {name} was not seen")))?;
        let status = self.dm.status_text_of(&tpool)?;
        let (kind, params) = self.dm.table_text_of(&tpool)?;
        let zeroes = thin::Pool::parse(&kind, &params).is_some_and(|pool| pool.zeroes);
        usage(&status, zeroes)
            .ok_or_else(|| StepError::Failed(format!("thin pool status `{status}`")))
    }

    fn ours(&self) -> Result<Vec<String>, StepError> {
        let devices = self.dm.ours()?.into_iter().filter(|device| !device.leaving);
        let mut names: Vec<String> = devices.map(|device| device.name).collect();
        names.extend(self.nvmet.ours()?);
        Ok(names)
    }

    fn look(&self, record: &Record) -> Result<Seen, StepError> {
        let receiving = record.receiving();
        let clone = self.device(record, Role::Clone)?;
        let src = self.device(record, Role::Src)?;
        let handle = self.dm.linked_device(&plan::dm_name(record, Role::Handle))?.map(seen);
        let clone_status = match &clone {
            Some(Device { table: Some(Table { target: Target::Clone { .. }, .. }), .. }) => {
                Some(self.dm.clone_status(&plan::dm_name(record, Role::Clone))?)
            }
            Some(_) | None => None,
        };
        let discards_blocked = match &clone {
            Some(clone) if clone_status.is_some() => block::discard_max(clone.number)? == 0,
            Some(_) | None => false,
        };
        let path_failed = match src.as_ref().and_then(|src| src.table.as_ref()) {
            Some(Table {
                target:
                    Target::Queue { path: Some(path) } | Target::WritableQueue { path: Some(path) },
                ..
            }) => {
                let status = self.dm.status_text(&plan::dm_name(record, Role::Src))?;
                dm::path_failed(&status, *path)
            }
            Some(_) | None => false,
        };
        let import = match receiving {
            Some(receiving) => {
                let seen = nvme::observe(&self.import(&receiving.source.export)?)?;
                Import {
                    connected: !seen.controllers.is_empty(),
                    namespace: seen.namespace,
                    size: seen.size,
                    live: seen.live,
                }
            }
            None => Import::default(),
        };
        let published = match record.lent() {
            Some(lent) => {
                let export = self.export(record, &lent.export, &lent.host_nqn)?;
                let seen = self.nvmet.observe(&export)?;
                match (seen.serves(), seen == nvmet::Seen::default()) {
                    (true, _) => Presence::Complete,
                    (false, true) => Presence::Absent,
                    (false, false) => Presence::Partial,
                }
            }
            None => Presence::Absent,
        };
        Ok(Seen {
            boot: self.boot,
            data: self.lv(record.data.as_ref())?,
            meta: self.lv(receiving.and_then(|receiving| receiving.meta.as_ref()))?,
            held: held_in(&self.dm, record, handle.as_ref())?,
            handle,
            clone,
            src,
            export: self.device(record, Role::Export)?,
            clone_status,
            discards_blocked,
            published,
            import,
            path_failed,
            connecting: false,
            resting: false,
            push: None,
            read: false,
            asked: false,
            steady: false,
            tuned: None,
            cache_dropped: false,
            announced: false,
            map: SourceMap::Unasked,
            allocated: self.allocated(record),
        })
    }

    fn handle(&self, id: VolumeId) -> Result<Option<Device>, StepError> {
        Ok(self.dm.by_name(&handle_name(id))?.map(seen))
    }

    fn held(&self, record: &Record) -> Result<u64, StepError> {
        held_in(&self.dm, record, self.device(record, Role::Handle)?.as_ref())
    }

    fn written(&self, record: &Record) -> Result<Option<Written>, StepError> {
        let handle = self.device(record, Role::Handle)?.filter(|handle| handle.open_count > 0);
        Ok(handle.map(|handle| block::written(handle.number)).transpose()?)
    }

    fn apply(&self, record: &Record, step: &Step) -> Result<Option<Event>, StepError> {
        let name = |role| plan::dm_name(record, role);
        match step {
            Step::Allocate { of: Some(template), .. } => {
                return self.copy(record, template).map(Some);
            }
            Step::Fork { of, meta } => return self.fork(record, of, *meta).map(Some),
            Step::Allocate { data, meta, of: None } => {
                return self.allocate(record, *data, *meta).map(Some);
            }
            Step::Grow { to, meta: meta_size } => {
                let (data, meta) = plan::lv_names(record);
                self.vg(&record.pool)?.extend(&data, to.bytes())?;
                if let Some(size) = meta_size {
                    self.vg(&record.pool)?.extend(&meta, *size)?;
                }
            }
            Step::RetireMeta => self.retire(record, false)?,
            Step::RetireAll => self.retire(record, true)?,
            Step::RetireData { name, uuid } => {
                self.retire_data(record, name, uuid.as_deref())?;
            }
            Step::ZeroMeta(device) => {
                let receiving = record.receiving();
                self.same(receiving.and_then(|receiving| receiving.meta.as_ref()), *device)?;
                block::zero_block0(*device)?;
            }
            Step::Set(role, table) => self.set(record, *role, table)?,
            Step::LoadClone { table, floor } => self.load_clone(record, table, *floor)?,
            Step::Remove(role) => match self.dm.remove(&name(*role), Remove::Now) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    return Err(StepError::Busy(name(*role).path()));
                }
                outcome => outcome?,
            },
            Step::RemoveDeferred(role) => self.dm.remove(&name(*role), Remove::Deferred)?,
            Step::SuspendHandle => self.dm.suspend(&name(Role::Handle), SWAP)?,
            Step::Resume(role) => self.dm.resume(&name(*role))?,
            Step::OpenHandle(table) => self.open_handle(record, table)?,
            Step::GrowHeld(table) => {
                let held = self.held(record)?;
                if held > 0 {
                    return Err(StepError::Refused(format!("{held} writes wait in the handle")));
                }
                self.set(record, Role::Handle, table)?;
            }
            Step::DropCache(device) => block::drop_clean_cache(*device)?,
            Step::BlockDiscards(device) => block::block_discards(*device)?,
            Step::Hydrate(true) => self.message_clone(record, "enable_hydration")?,
            Step::Hydrate(false) => self.message_clone(record, "disable_hydration")?,
            Step::Seed(map) => self.seed(record, map)?,
            Step::Tune { threshold, batch } => {
                self.message_clone(record, &format!("hydration_threshold {threshold}"))?;
                self.message_clone(record, &format!("hydration_batch_size {batch}"))?;
            }
            Step::Push { threshold, how } => self.push(record, *threshold, *how)?,
            Step::Commit => self.commit(record)?,
            Step::ReinstatePath(device) => {
                self.dm.message(&name(Role::Src), &format!("reinstate_path {device}"))?;
            }
            Step::Publish { export, host_nqn } => {
                self.nvmet.publish(&self.export(record, export, host_nqn)?)?;
            }
            Step::Announce(export) => self.nvmet.revalidate(&export.subsystem_nqn)?,
            Step::Rescan { export, at_least } => {
                nvme::rescan(&self.import(export)?, *at_least, CONNECT)?;
            }
            Step::Unpublish { export, host_nqn } => {
                self.nvmet.unpublish(&self.export(record, export, host_nqn)?)?;
            }
            Step::Connect(export) => nvme::connect(&self.import(export)?, CONNECT)?,
            Step::Disconnect(export) => nvme::disconnect(&export.subsystem_nqn, DISCONNECT)?,
            Step::CutSource(export) => self.cut_source(record, export)?,
            Step::Seal(table) => self.seal(record, table)?,
            Step::FenceHandle(table) => self.fence(record, table)?,
            Step::Flush(device) => block::flush(*device)?,
        }
        Ok(None)
    }

    fn allocated(&self, record: &Record) -> Option<Sectors> {
        let uuid = record.data.as_ref()?;
        thin::mapped(&self.dm.status_text_of(uuid).ok()?)
    }

    fn allocation(&self, record: &Record, region: Sectors) -> Result<Unwritten, StepError> {
        self.allocation_of(record, region)
    }

    fn committed(&self, record: &Record) -> Result<u64, StepError> {
        let name = plan::dm_name(record, Role::Clone);
        // The first answer may count regions that its own commit did not cover;
        // the second commit covers them.
        let first = self.dm.commit_clone(&name)?;
        let second = self.dm.commit_clone(&name)?;
        match (first, second) {
            (
                CloneStatus::Working { hydrated, read_only: false, .. },
                CloneStatus::Working { read_only: false, .. },
            ) => Ok(hydrated),
            (_, second) => Err(StepError::Refused(format!("not committed: {second:?}"))),
        }
    }
}

/// Lets everything that waits for a source fail, and drops the connections of
/// every import.
///
/// # Errors
/// The first thing that could not be done; the rest is tried all the same.
pub fn cut_sources() -> Result<(), StepError> {
    let dm = Dm::open()?;
    let mut outcome = Ok(());
    for device in dm.ours()? {
        if device.table.as_ref().is_some_and(Table::is_queue) {
            let name = DmName { name: device.name, uuid: device.uuid };
            outcome = outcome.and(dm.message(&name, FAIL_IF_NO_PATH));
        }
    }
    for nqn in nvme::ours()? {
        outcome = outcome.and(nvme::disconnect(&nqn, DISCONNECT));
    }
    Ok(outcome?)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn seen(device: dm::Device) -> Device {
    Device {
        number: device.number,
        table: device.table,
        suspended: device.suspended,
        open_count: device.open_count,
        leaving: device.leaving,
    }
}

fn held_in(dm: &Dm, record: &Record, handle: Option<&Device>) -> Result<u64, StepError> {
    match handle.and_then(|handle| handle.table.as_ref()) {
        Some(Table { target: Target::Hold { .. }, .. }) => {
            let targets = dm.status_texts(&plan::dm_name(record, Role::Handle))?;
            let held: Option<Vec<u64>> = targets.iter().map(|status| held_writes(status)).collect();
            held.map(|held| held.iter().sum())
                .ok_or_else(|| StepError::Failed(format!("delay status {targets:?}")))
        }
        Some(_) | None => Ok(0),
    }
}

/// The delay target counts the requests that wait, by class: reads, writes,
/// flushes (drivers/md/dm-delay.c, `delay_status`). Only writes do.
fn held_writes(status: &str) -> Option<u64> {
    let mut counts = status.split_ascii_whitespace().map(str::parse::<u64>);
    let _reads = counts.next()?.ok()?;
    counts.next()?.ok()
}

/// Used blocks over all, of metadata and of data: the second and the third word of
/// a thin pool's status (drivers/md/dm-thin.c, `pool_status`).
fn usage(status: &str, zeroes: bool) -> Option<PoolUsage> {
    let mut words = status.split_ascii_whitespace().skip(1);
    let mut share = || {
        let (used, total) = words.next()?.split_once('/')?;
        let (used, total): (f64, f64) = (used.parse().ok()?, total.parse().ok()?);
        (total > 0.0).then(|| used / total)
    };
    Some(PoolUsage { metadata: share()?, data: share()?, zeroes })
}

fn address(export: &ExportName) -> Result<IpAddr, StepError> {
    export.address.parse().map_err(|_| StepError::Failed(format!("address {}", export.address)))
}

/// LVM's UUID of a logical volume, with hyphens, out of its device-mapper UUID:
/// the last 32 characters in groups of 6, 4, 4, 4, 4, 4, 6.
fn lv_uuid(dm_uuid: &str) -> Result<String, StepError> {
    let plain = dm_uuid
        .strip_prefix(LVM_UUID_PREFIX)
        .filter(|rest| rest.len() == 64 && rest.is_ascii())
        .ok_or_else(|| StepError::Failed(format!("`{dm_uuid}` is not an LVM device")))?;
    let mut rest = &plain[32..];
    let mut groups = Vec::new();
    for length in [6, 4, 4, 4, 4, 4, 6] {
        let (group, tail) = rest.split_at(length);
        groups.push(group);
        rest = tail;
    }
    Ok(groups.join("-"))
}

impl From<io::Error> for StepError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ResourceBusy => Self::Busy(error.to_string()),
            io::ErrorKind::TimedOut => Self::TimedOut(error.to_string()),
            io::ErrorKind::StorageFull => Self::NoRoom(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

impl From<LvmError> for StepError {
    fn from(error: LvmError) -> Self {
        match error {
            LvmError::NoSpace(_) => Self::NoRoom(error.to_string()),
            LvmError::InUse(_) => Self::Busy(error.to_string()),
            LvmError::Late(_) => Self::TimedOut(error.to_string()),
            LvmError::Taken { .. }
            | LvmError::Missing(_)
            | LvmError::Name(_)
            | LvmError::Report(_)
            | LvmError::Exec(_) => Self::Failed(error.to_string()),
        }
    }
}

#[cfg(test)]
mod test {
    use super::{PoolUsage, held_writes, lv_uuid, usage};

    #[test]
    fn an_lv_is_named_by_its_own_half_of_the_device_uuid() {
        let vg = "a".repeat(32);
        let uuid = lv_uuid(&format!("LVM-{vg}BCDEFGhijklmnopqrstuvwxyz0123456")).unwrap();
        assert_eq!(uuid, "BCDEFG-hijk-lmno-pqrs-tuvw-xyz0-123456");
        assert!(lv_uuid("LVM-short").is_err());
        assert!(lv_uuid(&format!("DMLO{vg}{vg}")).is_err());
    }

    #[test]
    fn held_writes_are_counted_and_nothing_else_is() {
        assert_eq!(held_writes("7 2 1"), Some(2));
        assert_eq!(held_writes("7"), None);
    }

    #[test]
    fn a_thin_pool_tells_how_much_of_it_is_in_use() {
        let status = "1 12/1024 512/16384 - rw no_discard_passdown error_if_no_space - 1024";
        let (metadata, data) = (12.0 / 1024.0, 512.0 / 16384.0);
        let seen = PoolUsage { metadata, data, zeroes: true };
        assert_eq!(usage(status, true), Some(seen));
        assert_eq!(seen.scarcest(), seen.data);
        assert_eq!(usage("Fail", true), None);
    }
}
