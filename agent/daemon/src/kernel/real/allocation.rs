//! What a thin pool knows of a volume that nobody writes any more.
//!
//! The pool's metadata can be read beside its use only through a metadata snapshot,
//! of which it has one. It pins blocks, so it is dropped in any case: also by the
//! next start, for which a note in the state directory says that it is ours. Somebody
//! else's is neither used nor dropped.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::PathBuf,
    time::Duration,
};

use dmlocal_model::{name::DmName, seeding::Unwritten, units::Sectors, volume::Record};

use super::{RealKernel, StepError};
use crate::kernel::{
    block, exec,
    lvm::Vg,
    thin::{self, Dump, Pool, Thin},
};

/// Longest time for a dump; the asking agent waits longer.
const DUMP: Duration = Duration::from_secs(45);

/// How often dropping a snapshot is tried.
const DROPS: u32 = 3;

fn refused(why: impl Into<String>) -> StepError {
    StepError::Refused(why.into())
}

impl RealKernel {
    /// What of a fenced volume was never written. One at a time for each pool, and
    /// no LVM command meanwhile, so that the volume's number stays its own.
    pub(super) fn allocation_of(
        &self,
        record: &Record,
        region: Sectors,
    ) -> Result<Unwritten, StepError> {
        let vg = self.vg(&record.pool)?;
        let data = record.data.as_ref().ok_or_else(|| refused("it has no data yet"))?;
        self.find_tpool(&record.pool, &vg)?;
        let (volume, pool, tpool) = self.thin(record)?;
        self.drop_left_snapshot(&record.pool, &vg)?;
        let held = thin::held_root(&self.dm.status_text_of(&tpool.uuid)?);
        if held != Some(None) {
            return Err(refused("the pool has a metadata snapshot of somebody else's"));
        }
        let mut dump = Dump::new(volume.id, pool.block, record.size, region)
            .ok_or_else(|| refused("it has too many regions"))?;
        let metadata = block::node(pool.metadata)?.display().to_string();
        self.note(&record.pool, "")?;
        if let Err(error) = self.dm.message(&tpool, "reserve_metadata_snap") {
            // Then there is none, or one of somebody who was faster.
            fs::remove_file(self.note_path(&record.pool))?;
            return Err(error.into());
        }
        let held = || Ok::<_, StepError>(thin::held_root(&self.dm.status_text_of(&tpool.uuid)?));
        let outcome = held().and_then(|root| {
            let root = root.flatten().ok_or_else(|| refused("the snapshot is gone"))?;
            self.note(&record.pool, &root.to_string())?;
            let id = volume.id.to_string();
            let args = ["--metadata-snap", "--dev-id", &id, &metadata];
            exec::run_lines("thin_dump", &args, DUMP, |line| dump.line(line))
                .map_err(|error| StepError::Failed(error.to_string()))?;
            if held()? != Some(Some(root)) {
                return Err(refused("somebody else has dropped the snapshot"));
            }
            Ok(())
        });
        // Whatever came of it, and whoever takes the snapshot in this moment: only
        // the one that was noted is dropped.
        let dropped = self.drop_left_snapshot(&record.pool, &vg);
        outcome.and(dropped)?;
        if self.thin(record)?.0 != volume {
            return Err(refused("it has another number now"));
        }
        let mapped = thin::mapped(&self.dm.status_text_of(data)?)
            .ok_or_else(|| refused("the volume does not tell what it has"))?;
        dump.rest(mapped).map_err(refused)
    }

    /// A record's volume in its pool, and the pool's device.
    pub(super) fn thin(&self, record: &Record) -> Result<(Thin, Pool, DmName), StepError> {
        let data = record.data.as_ref().ok_or_else(|| refused("it has no data yet"))?;
        let (kind, params) = self.dm.table_text_of(data)?;
        let volume = Thin::parse(&kind, &params)
            .ok_or_else(|| refused(format!("`{kind} {params}` is no plain thin volume")))?;
        let tpool = self
            .tpool(&record.pool)
            .ok_or_else(|| refused(format!("pool {} was not seen", record.pool)))?;
        if self.dm.by_uuid(&tpool.uuid)? != Some(volume.pool) {
            return Err(refused("it is in another pool than its record says"));
        }
        let (kind, params) = self.dm.table_text_of(&tpool.uuid)?;
        let pool = Pool::parse(&kind, &params)
            .ok_or_else(|| refused(format!("`{kind} {params}` is no thin pool")))?;
        Ok((volume, pool, tpool))
    }

    /// Drops the metadata snapshot that a note says is ours, then the note.
    pub(super) fn drop_left_snapshot(&self, pool: &str, vg: &Vg) -> Result<(), StepError> {
        let path = self.note_path(pool);
        let noted = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let tpool = self.find_tpool(pool, vg)?;
        for _ in 0..DROPS {
            let held = thin::held_root(&self.dm.status_text_of(&tpool.uuid)?)
                .ok_or_else(|| refused(format!("{pool} does not tell of its snapshot")))?;
            // A note without a number was made just before the snapshot.
            let is_ours = held.is_some_and(|root| noted.is_empty() || noted == root.to_string());
            if !is_ours {
                fs::remove_file(&path)?;
                return Ok(());
            }
            self.dm.message(&tpool, "release_metadata_snap")?;
        }
        Err(StepError::Failed(format!("{pool} keeps its metadata snapshot")))
    }

    /// The pool's device, known already or not.
    fn find_tpool(&self, pool: &str, vg: &Vg) -> Result<DmName, StepError> {
        if let Some(known) = self.tpool(pool) {
            return Ok(known);
        }
        let report = vg.pool()?.ok_or_else(|| refused(format!("pool {pool} is not there")))?;
        super::locked(&self.tpools).insert(pool.to_owned(), report.tpool_dm_uuid());
        self.tpool(pool).ok_or_else(|| refused("the pool is forgotten"))
    }

    fn tpool(&self, pool: &str) -> Option<DmName> {
        let uuid = super::locked(&self.tpools).get(pool).cloned()?;
        Some(DmName { name: format!("{pool} (thin pool)"), uuid })
    }

    fn note_path(&self, pool: &str) -> PathBuf {
        self.state.join(format!("metadata-snapshot-{pool}"))
    }

    /// Notes, on stable storage, that the pool's metadata snapshot is ours.
    fn note(&self, pool: &str, root: &str) -> Result<(), StepError> {
        let (path, fresh) = (self.note_path(pool), self.note_path(&format!("{pool}.new")));
        let mut file = File::create(&fresh)?;
        file.write_all(root.as_bytes())?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        Ok(File::open(&self.state)?.sync_all()?)
    }
}
