//! Sizes that cannot be mixed up.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a device-mapper sector, whatever the device's logical block size
/// (`SECTOR_SIZE` in the kernel's include/linux/blk_types.h).
pub const SECTOR_BYTES: u64 = 512;

/// A number of 512-byte sectors.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Sectors(pub u64);

impl Sectors {
    /// The whole sectors in `bytes`, rounded down.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes / SECTOR_BYTES)
    }

    /// The same length in bytes; saturates, which no real device reaches.
    pub const fn bytes(self) -> u64 {
        self.0.saturating_mul(SECTOR_BYTES)
    }
}

impl fmt::Display for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Major and minor number of a block device.
///
/// Numbers are reused as soon as a device is gone, so one is never journalled;
/// it is looked up by identity right before use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DevNo {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl fmt::Display for DevNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl std::str::FromStr for DevNo {
    type Err = InvalidDevNo;

    fn from_str(text: &str) -> Result<Self, InvalidDevNo> {
        let invalid = || InvalidDevNo(text.to_owned());
        let (major, minor) = text.split_once(':').ok_or_else(invalid)?;
        Ok(Self {
            major: major.parse().map_err(|_| invalid())?,
            minor: minor.parse().map_err(|_| invalid())?,
        })
    }
}

/// Text that is not `MAJOR:MINOR`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a device number")]
pub struct InvalidDevNo(String);
