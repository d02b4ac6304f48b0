//! The journal: the node's durable record of intent.
//!
//! One redb file. Every value is JSON, so that it can be read with a text
//! editor's help if dmlocal is gone; docs/journal.md describes each field. A
//! change is on stable storage before the call that makes it returns. After a
//! failed write nothing is written any more until the daemon is started again:
//! what the file holds is then unknown.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use dmlocal_model::{
    name::{Generation, VolumeId},
    volume::{Record, Tombstone},
};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

/// Version of the format that this code writes. It reads the one before, too,
/// once there is one.
pub const JOURNAL_VERSION: u32 = 1;

const FILE: &str = "journal.redb";
/// Facts of the journal itself: `version`, `node`, `host`.
const FACTS: TableDefinition<'_, &str, &str> = TableDefinition::new("facts");
/// Volume id and the generation in which the copy came to be, with a space in between,
/// to record.
const VOLUMES: TableDefinition<'_, &str, &str> = TableDefinition::new("volumes");
/// Grant id to tombstone.
const TOMBSTONES: TableDefinition<'_, &str, &str> = TableDefinition::new("tombstones");

/// Pages kept in memory. Records are read once, at start-up.
const CACHE_BYTES: usize = 1 << 20;

/// What the journal cannot do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It was written by a newer dmlocald.
    #[error("the journal has version {found}; this dmlocald knows up to {JOURNAL_VERSION}")]
    Newer {
        /// The version found.
        found: String,
    },
    /// It belongs to another node.
    #[error("the journal belongs to node `{found}`, not `{wanted}`")]
    OtherNode {
        /// The node it belongs to.
        found: String,
        /// This node.
        wanted: String,
    },
    /// A record cannot be read.
    #[error("journal entry {key}: {source}")]
    Entry {
        /// Its key.
        key: String,
        /// Why.
        source: serde_json::Error,
    },
    /// An earlier write failed.
    #[error("an earlier journal write failed; restart dmlocald")]
    Poisoned,
    /// Reading or writing failed.
    #[error("journal: {0}")]
    Database(Box<redb::Error>),
    /// The directory cannot be made.
    #[error("journal directory: {0}")]
    Directory(#[from] std::io::Error),
}

macro_rules! from_database {
    ($($error:ident),*) => {$(
        impl From<redb::$error> for StoreError {
            fn from(error: redb::$error) -> Self {
                Self::Database(Box::new(error.into()))
            }
        }
    )*};
}
from_database!(Error, TransactionError, TableError, StorageError, CommitError);

/// The open journal.
#[derive(Debug)]
pub struct Store {
    database: Database,
    poisoned: AtomicBool,
    host: Uuid,
}

impl Store {
    /// Opens the journal in a directory, making both where they are absent.
    ///
    /// # Errors
    /// It is of a newer version or of another node, or cannot be read or made.
    pub fn open(directory: &Path, node: &str) -> Result<Self, StoreError> {
        use std::os::unix::fs::DirBuilderExt as _;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(directory.join(FILE))
            .map_err(redb::Error::from)?;
        let write = database.begin_write()?;
        let host = {
            let mut facts = write.open_table(FACTS)?;
            let mut fact = |key: &str, new: String| -> Result<String, StoreError> {
                if let Some(found) = facts.get(key)? {
                    return Ok(found.value().to_owned());
                }
                facts.insert(key, new.as_str())?;
                Ok(new)
            };
            let version = fact("version", JOURNAL_VERSION.to_string())?;
            match version.parse::<u32>() {
                Ok(1..=JOURNAL_VERSION) => {}
                Ok(_) | Err(_) => return Err(StoreError::Newer { found: version }),
            }
            let found = fact("node", node.to_owned())?;
            if found != node {
                return Err(StoreError::OtherNode { found, wanted: node.to_owned() });
            }
            let host = fact("host", Uuid::new_v4().to_string())?;
            write.open_table(VOLUMES)?;
            write.open_table(TOMBSTONES)?;
            host.parse().map_err(|_| StoreError::Newer { found: host })?
        };
        write.commit()?;
        Ok(Self { database, poisoned: AtomicBool::new(false), host })
    }

    /// Identity of this node towards NVMe targets, chosen once.
    pub const fn host(&self) -> Uuid {
        self.host
    }

    /// Every record.
    ///
    /// # Errors
    /// The file or an entry cannot be read.
    pub fn records(&self) -> Result<Vec<Record>, StoreError> {
        self.all(VOLUMES)
    }

    /// The tombstone of a grant.
    ///
    /// # Errors
    /// The file or the entry cannot be read.
    pub fn tombstone(&self, grant: Uuid) -> Result<Option<Tombstone>, StoreError> {
        let key = grant.to_string();
        let table = self.database.begin_read()?.open_table(TOMBSTONES)?;
        table.get(key.as_str())?.map(|value| decode(&key, value.value())).transpose()
    }

    /// Writes a record, and tombstones with it.
    ///
    /// # Errors
    /// The write failed, now or earlier.
    pub fn put(&self, record: &Record, stones: &[Tombstone]) -> Result<(), StoreError> {
        self.write(|write| {
            let key = key_of(record.id, record.made_in);
            write.open_table(VOLUMES)?.insert(key.as_str(), encode(&key, record)?.as_str())?;
            bury(write, stones)
        })
    }

    /// Removes a record and writes its tombstones, as one change.
    ///
    /// # Errors
    /// The write failed, now or earlier.
    pub fn forget(
        &self,
        id: VolumeId,
        made_in: Generation,
        stones: &[Tombstone],
    ) -> Result<(), StoreError> {
        self.write(|write| {
            write.open_table(VOLUMES)?.remove(key_of(id, made_in).as_str())?;
            bury(write, stones)
        })
    }

    /// Writes a tombstone of a grant that no record belongs to; one that is there says
    /// more.
    ///
    /// # Errors
    /// The write failed, now or earlier.
    pub fn bury(&self, stone: &Tombstone) -> Result<(), StoreError> {
        self.write(|write| {
            let key = stone.grant.to_string();
            let known = write.open_table(TOMBSTONES)?.get(key.as_str())?.is_some();
            if known { Ok(()) } else { bury(write, std::slice::from_ref(stone)) }
        })
    }

    fn write(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        if self.poisoned.load(Ordering::SeqCst) {
            return Err(StoreError::Poisoned);
        }
        let outcome = (|| {
            let write = self.database.begin_write()?;
            change(&write)?;
            write.commit()?;
            Ok(())
        })();
        if outcome.is_err() {
            self.poisoned.store(true, Ordering::SeqCst);
        }
        outcome
    }

    fn all<T: DeserializeOwned>(
        &self,
        table: TableDefinition<'_, &str, &str>,
    ) -> Result<Vec<T>, StoreError> {
        let table = match self.database.begin_read()?.open_table(table) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let mut all = Vec::new();
        for entry in table.iter()? {
            let (key, value) = entry?;
            all.push(decode(key.value(), value.value())?);
        }
        Ok(all)
    }
}

fn key_of(id: VolumeId, made_in: Generation) -> String {
    format!("{id} {made_in}")
}

fn bury(write: &redb::WriteTransaction, stones: &[Tombstone]) -> Result<(), StoreError> {
    let mut table = write.open_table(TOMBSTONES)?;
    for stone in stones {
        let key = stone.grant.to_string();
        table.insert(key.as_str(), encode(&key, stone)?.as_str())?;
    }
    Ok(())
}

fn encode<T: Serialize>(key: &str, value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|source| StoreError::Entry { key: key.to_owned(), source })
}

fn decode<T: DeserializeOwned>(key: &str, text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|source| StoreError::Entry { key: key.to_owned(), source })
}

#[cfg(test)]
mod test {
    use dmlocal_model::volume::{Fate, Tombstone};

    use super::*;

    fn set_fact(directory: &Path, key: &str, value: &str) {
        let database = Database::create(directory.join(FILE)).unwrap();
        let write = database.begin_write().unwrap();
        write.open_table(FACTS).unwrap().insert(key, value).unwrap();
        write.commit().unwrap();
    }

    #[test]
    fn a_newer_journal_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        drop(Store::open(directory.path(), "a").unwrap());
        set_fact(directory.path(), "version", "2");
        for _ in 0..2 {
            let error = Store::open(directory.path(), "a").unwrap_err();
            assert!(matches!(error, StoreError::Newer { found } if found == "2"));
        }
    }

    #[test]
    fn another_nodes_journal_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        drop(Store::open(directory.path(), "a").unwrap());
        assert!(matches!(Store::open(directory.path(), "b"), Err(StoreError::OtherNode { .. })));
    }

    #[test]
    fn only_root_may_enter_and_the_host_stays_the_same() {
        use std::os::unix::fs::PermissionsExt as _;
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("state");
        let host = Store::open(&directory, "a").unwrap().host();
        assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(Store::open(&directory, "a").unwrap().host(), host);
    }

    #[test]
    fn tombstones_outlive_the_process() {
        let directory = tempfile::tempdir().unwrap();
        let grant = Uuid::from_u128(1);
        let id = VolumeId::new(Uuid::from_u128(2));
        let stone = Tombstone { volume: id, incarnation: grant, grant, fate: Fate::Taken };
        Store::open(directory.path(), "a")
            .unwrap()
            .forget(id, Generation::FIRST, std::slice::from_ref(&stone))
            .unwrap();
        let store = Store::open(directory.path(), "a").unwrap();
        assert_eq!(store.tombstone(grant).unwrap(), Some(stone));
        assert_eq!(store.tombstone(Uuid::from_u128(9)).unwrap(), None);
    }
}
