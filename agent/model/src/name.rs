//! Every name that dmlocal gives to something outside itself, in one place.
//!
//! ```text
//! dmlocal-<uuid>                   the handle
//! dmlocal-<uuid>-g<n>-clone        hydrating layer
//! dmlocal-<uuid>-g<n>-src          what is read from the source
//! dmlocal-<uuid>-g<n>-export       what a peer reads
//! dmlocal-refuser                  where what a peer writes fails, one for a node
//! <vg>/dmlocal-<uuid>-g<n>         data LV
//! <vg>/dmlocal-<uuid>-g<n>-r<k>    data LV after k reverts
//! <vg>/dmlocal-<uuid>-g0           a snapshot, with its own UUID
//! <vg>/dmlocal-<uuid>-g<n>-meta    clone metadata LV
//! ```
//!
//! Below the handle every name carries the generation, so that the remains of an
//! old copy and a new copy of the same volume on one node never meet. All
//! device-mapper UUIDs start with [`DM_UUID_PREFIX`]; whatever lacks it is not
//! ours and is never touched.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Start of the device-mapper UUID of every device that dmlocal made.
pub const DM_UUID_PREFIX: &str = "DMLOCAL-";

/// Start of the device-mapper UUID of every LVM device (lvm2,
/// `lib/activate/dev_manager.c`); the VG's and the LV's UUIDs follow without
/// hyphens.
pub const LVM_UUID_PREFIX: &str = "LVM-";

/// The device that fails every request, one for a node: what peers write goes there.
/// It stays until the node goes down.
pub fn refuser() -> DmName {
    DmName { name: "dmlocal-refuser".to_owned(), uuid: format!("{DM_UUID_PREFIX}refuser") }
}

/// The LVM tag on every logical volume that dmlocal made.
pub const LVM_TAG: &str = "dmlocal";

/// Start of the NQN of every export (NVMe base specification 2.0, 4.5: the
/// UUID-based form).
pub const NQN_PREFIX: &str = "nqn.2014-08.org.nvmexpress:uuid:";

/// What callers name: a lower-case, hyphenated UUID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VolumeId(Uuid);

impl VolumeId {
    /// Wraps a UUID.
    pub const fn new(uuid: Uuid) -> Self {
        Self(uuid)
    }

    /// The UUID itself.
    pub const fn uuid(self) -> Uuid {
        self.0
    }
}

impl FromStr for VolumeId {
    type Err = InvalidId;

    /// Only the canonical form: a second spelling of an id would be a second
    /// name for the same device.
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        canonical_uuid(text).map(Self)
    }
}

/// A UUID in its canonical lower-case, hyphenated form.
///
/// # Errors
/// Anything else, the nil UUID included.
pub fn canonical_uuid(text: &str) -> Result<Uuid, InvalidId> {
    match Uuid::try_parse(text) {
        Ok(uuid) if uuid.hyphenated().to_string() == text && !uuid.is_nil() => Ok(uuid),
        _ => Err(InvalidId(text.chars().take(64).collect())),
    }
}

/// Whether this is the NQN of an export of dmlocal's.
pub fn is_nqn(text: &str) -> bool {
    text.strip_prefix(NQN_PREFIX).is_some_and(|rest| canonical_uuid(rest).is_ok())
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl fmt::Debug for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is not a lower-case UUID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a lower-case UUID")]
pub struct InvalidId(String);

/// Counts hand-overs of the right to write, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation of a volume that was never handed over.
    pub const FIRST: Self = Self(1);

    /// The generation of the next holder.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a device-mapper device is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Role {
    /// The only device that a consumer ever opens.
    Handle,
    /// dm-clone while hydrating.
    Clone,
    /// The way to the source: queues while the source is away.
    Src,
    /// What a peer reads: read-only over the data LV.
    Export,
}

/// Name and UUID of a device-mapper device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DmName {
    /// The name under `/dev/mapper`; at most 127 bytes (`DM_NAME_LEN`).
    pub name: String,
    /// The device-mapper UUID; at most 128 bytes (`DM_UUID_LEN`).
    pub uuid: String,
}

impl DmName {
    /// The device of a volume that has this role in this generation.
    pub fn new(volume: VolumeId, generation: Generation, role: Role) -> Self {
        let suffix = match role {
            // The name is the consumers' and stays; the UUID is one copy's, so that
            // nothing that is meant for an old copy's handle hits a new one's.
            Role::Handle => {
                return Self {
                    name: handle_name(volume),
                    uuid: format!("{DM_UUID_PREFIX}{volume}-g{generation}"),
                };
            }
            Role::Clone => "clone",
            Role::Src => "src",
            Role::Export => "export",
        };
        Self {
            name: format!("dmlocal-{volume}-g{generation}-{suffix}"),
            uuid: format!("{DM_UUID_PREFIX}{volume}-g{generation}-{suffix}"),
        }
    }

    /// Where consumers find it.
    pub fn path(&self) -> String {
        format!("/dev/mapper/{}", self.name)
    }
}

impl fmt::Display for DmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

/// Name of a volume's handle under `/dev/mapper`, whichever copy it stands on.
pub fn handle_name(volume: VolumeId) -> String {
    format!("dmlocal-{volume}")
}

/// Name of the data LV; `revision` counts those that came before it in this copy.
pub fn data_lv(volume: VolumeId, generation: Generation, revision: u32) -> String {
    match revision {
        0 => format!("dmlocal-{volume}-g{generation}"),
        revision => format!("dmlocal-{volume}-g{generation}-r{revision}"),
    }
}

/// Name of the clone metadata LV.
pub fn meta_lv(volume: VolumeId, generation: Generation) -> String {
    format!("dmlocal-{volume}-g{generation}-meta")
}

#[cfg(test)]
mod test {
    use super::*;

    fn id() -> VolumeId {
        "0b3f9a52-6c1e-4d7a-9f00-1234567890ab".parse().unwrap()
    }

    #[test]
    fn only_the_canonical_spelling_of_an_id_is_accepted() {
        for bad in [
            "",
            "0B3F9A52-6C1E-4D7A-9F00-1234567890AB",
            "0b3f9a526c1e4d7a9f001234567890ab",
            "{0b3f9a52-6c1e-4d7a-9f00-1234567890ab}",
            "00000000-0000-0000-0000-000000000000",
            "../../etc/passwd",
        ] {
            assert!(bad.parse::<VolumeId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_below_the_handle_differ_by_generation() {
        let names = |generation| {
            [Role::Clone, Role::Src, Role::Export]
                .map(|role| DmName::new(id(), Generation(generation), role).name)
        };
        assert!(names(1).iter().all(|name| !names(2).contains(name)));
        assert_ne!(data_lv(id(), Generation(1), 0), data_lv(id(), Generation(2), 0));
        assert_ne!(data_lv(id(), Generation(1), 0), data_lv(id(), Generation(1), 1));
    }

    #[test]
    fn the_handle_keeps_its_name_over_generations() {
        let handle = DmName::new(id(), Generation(7), Role::Handle);
        assert_eq!(handle.path(), format!("/dev/mapper/dmlocal-{}", id()));
        let later = DmName::new(id(), Generation(8), Role::Handle);
        assert_eq!(handle.name, later.name);
        assert_ne!(handle.uuid, later.uuid, "a late step of one copy could hit another's");
    }

    #[test]
    fn names_fit_the_kernel_and_lvm_even_at_the_last_generation() {
        for role in [Role::Handle, Role::Clone, Role::Src, Role::Export] {
            let name = DmName::new(id(), Generation(u64::MAX), role);
            assert!(name.name.len() <= 127 && name.uuid.len() <= 128, "{name}");
            assert!(name.uuid.starts_with(DM_UUID_PREFIX));
        }
        assert!(meta_lv(id(), Generation(u64::MAX)).len() <= 127);
        assert!(data_lv(id(), Generation(u64::MAX), u32::MAX).len() <= 127);
    }
}
