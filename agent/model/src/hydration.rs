//! How much dm-clone needs and how it is driven.

use serde::{Deserialize, Serialize};

use crate::units::Sectors;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

/// Block size of dm-clone's metadata (`DM_CLONE_METADATA_BLOCK_SIZE`,
/// drivers/md/dm-clone-metadata.h).
const METADATA_BLOCK: u64 = 4 * KIB;

/// Smallest metadata LV: one extent of LVM's default size.
const MIN_METADATA: u64 = 4 * MIB;

/// Most regions that dm-clone may copy at once here; its own limit is far
/// higher, its memory pools are not.
pub const MAX_THRESHOLD: u32 = 4096;

/// Most contiguous regions in one copy: the number of preallocated copies
/// (`MIN_HYDRATIONS`, drivers/md/dm-clone-target.c:43).
pub const MAX_BATCH: u32 = 256;

/// The region size for a volume: 64 KiB up to 1 TiB, 256 KiB up to 16 TiB, then
/// 1 MiB, and never below the thin pool's chunk, so that no chunk is zeroed or
/// copied in parts.
///
/// A chunk that is not a power of two leaves the size by volume.
pub fn region_size(volume_bytes: u64, chunk_bytes: u64) -> Sectors {
    let by_size = if volume_bytes <= TIB {
        64 * KIB
    } else if volume_bytes <= 16 * TIB {
        256 * KIB
    } else {
        MIB
    };
    let chunk = if chunk_bytes.is_power_of_two() { chunk_bytes } else { 0 };
    // dm-clone's own maximum is 2^21 sectors, 1 GiB.
    Sectors::from_bytes(by_size.max(chunk).min(1 << 30))
}

/// How many regions a volume has; the last may be short.
pub fn regions(volume: Sectors, region: Sectors) -> u64 {
    volume.0.div_ceil(region.0.max(1))
}

/// Bytes that the metadata LV must have: twice what dm-clone can need in one
/// transaction (a bitmap of `regions` bits in array blocks of 509 words, every
/// leaf copied on write, two generations), at least one LVM extent.
pub fn metadata_bytes(volume: Sectors, region: Sectors) -> u64 {
    let words = regions(volume, region).div_ceil(64);
    let leaves = words.div_ceil(509);
    let needed = METADATA_BLOCK * (2 * (leaves + leaves / 126) + 10);
    (2 * needed).next_multiple_of(METADATA_BLOCK).max(MIN_METADATA)
}

/// Settings of a copy that an operator may change while it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    /// Stopped by an operator.
    pub paused: bool,
    /// Bytes per second; 0 is no limit.
    pub rate: u64,
    /// Regions copied at the same time, 1 to [`MAX_THRESHOLD`].
    pub threshold: u32,
    /// Contiguous regions copied as one, 1 to [`MAX_BATCH`].
    pub batch: u32,
    /// Higher ones copy first, in [`crate::schedule::PRIORITIES`].
    pub priority: i32,
}

impl Default for Tuning {
    /// Copies of 1 MiB, up to 1.1 MiB on the way, with 64 KiB regions: the guest first.
    /// More on the way is faster where nobody reads, and keeps those who do waiting.
    fn default() -> Self {
        Self { paused: false, rate: 0, threshold: 18, batch: 16, priority: 0 }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn metadata_is_at_least_twice_the_computed_need() {
        // The table of the kernel notes: volume, region, need.
        for (volume, region, need) in [
            (100 << 30, 64 * KIB, 444 * KIB),
            (TIB, 64 * KIB, 4198 * KIB),
            (4 * TIB, 256 * KIB, 4198 * KIB),
            (64 * TIB, MIB, 16 * MIB),
        ] {
            let got = metadata_bytes(Sectors::from_bytes(volume), Sectors::from_bytes(region));
            assert!(got >= 2 * need && got <= 3 * need.max(2 * MIB), "{volume} {region}: {got}");
        }
    }

    #[test]
    fn regions_grow_with_the_volume_and_never_split_a_chunk() {
        assert_eq!(region_size(1 << 30, 64 * KIB).bytes(), 64 * KIB);
        assert_eq!(region_size(2 * TIB, 64 * KIB).bytes(), 256 * KIB);
        assert_eq!(region_size(32 * TIB, 64 * KIB).bytes(), MIB);
        assert_eq!(region_size(1 << 30, MIB).bytes(), MIB);
        assert_eq!(region_size(1 << 30, 192 * KIB).bytes(), 64 * KIB);
    }

    #[test]
    fn a_short_last_region_counts() {
        assert_eq!(regions(Sectors(129), Sectors(128)), 2);
        assert_eq!(regions(Sectors(128), Sectors(128)), 1);
    }
}
