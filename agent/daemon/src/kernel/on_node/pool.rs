//! Logical volumes, and what udev makes of a guest's content.

use super::*;

#[test]
#[ignore = "needs root and a node's kernel"]
fn logical_volumes_are_made_adopted_grown_and_removed() {
    let bed = Bed::new();
    let volume = Volume::new();
    let (data, meta) = (volume.data(1), volume.meta(1));
    let wanted = (Some((data.as_str(), SIZE + 512)), Some((meta.as_str(), 4 * MIB)));
    timed("activate", || bed.vg.activate().unwrap());
    let pool = timed("pool", || bed.vg.pool().unwrap().unwrap());
    assert!(pool.active && pool.data_percent.is_some());
    println!("{pool:?}");
    let tpool = timed("tpool", || bed.dm.status_text_of(&pool.tpool_dm_uuid()).unwrap());
    println!("{tpool}");
    let made = timed("create", || bed.vg.create(wanted.0, wanted.1, &["g1"]).unwrap());
    println!("{made:#?}");
    assert_eq!(made[0].size, SIZE + 4 * MIB);
    let again = timed("create again", || bed.vg.create(wanted.0, wanted.1, &["g1"]).unwrap());
    assert_eq!(made, again);
    assert_eq!(timed("lvs", || bed.vg.lvs().unwrap()).len(), 2);

    // Half of it exists.
    bed.vg.remove(&[(&meta, &made[1].uuid)]).unwrap();
    let half = timed("create the other half", || bed.vg.create(wanted.0, wanted.1, &["g1"]));
    assert_eq!(half.unwrap()[0], made[0]);
    let larger = bed.vg.create(Some((&data, 2 * SIZE)), None, &["g1"]);
    assert!(matches!(larger, Err(LvmError::Taken { field: "size", .. })), "{larger:?}");
    let tagged = bed.vg.create(wanted.0, None, &["g2"]);
    assert!(matches!(tagged, Err(LvmError::Taken { field: "tag", .. })), "{tagged:?}");
    let thick = bed.vg.create(None, Some((&data, SIZE + 512)), &["g1"]);
    assert!(matches!(thick, Err(LvmError::Taken { field: "kind", .. })), "{thick:?}");
    let full = bed.vg.create(None, Some(("too-large", 1 << 40)), &[]);
    println!("{}", full.as_ref().unwrap_err());
    assert!(matches!(full, Err(LvmError::NoSpace(_))), "{full:?}");
    assert_eq!(bed.vg.lvs().unwrap().len(), 2);

    let grown = timed("extend", || bed.vg.extend(&data, 2 * SIZE).unwrap());
    assert_eq!(grown.size, 2 * SIZE);
    assert_eq!(bed.vg.extend(&data, 2 * SIZE).unwrap(), grown);
    assert_eq!(bed.vg.extend(&data, SIZE).unwrap(), grown);
    assert!(matches!(bed.vg.extend("absent", SIZE), Err(LvmError::Missing(_))));

    // Inactive, as after a reboot.
    let device = bed.vg.devices[0].to_str().unwrap();
    sh("lvm", &["vgchange", "--devices", device, "-an", &bed.vg.name]);
    assert!(bed.vg.lvs().unwrap().iter().all(|lv| !lv.active && lv.number.is_none()));
    assert_eq!(bed.vg.pool().unwrap().unwrap().data_percent, None);
    // An inactive pool only costs the attempt.
    let other = timed("create in an inactive pool", || {
        bed.vg.create(Some((&volume.data(2), SIZE)), None, &["g1"]).unwrap()
    });
    bed.vg.remove(&[(&other[0].name, &other[0].uuid)]).unwrap();
    timed("activate", || bed.vg.activate().unwrap());
    timed("activate again", || bed.vg.activate().unwrap());
    let lvs = bed.vg.lvs().unwrap();
    assert!(lvs.iter().all(|lv| lv.active), "{lvs:?}");

    // One is open.
    let file = open(bed.number(&lvs[0]), false);
    let pairs: Vec<_> = lvs.iter().map(|lv| (lv.name.as_str(), lv.uuid.as_str())).collect();
    let refused = bed.vg.remove(&pairs);
    println!("{}", refused.as_ref().unwrap_err());
    assert!(matches!(refused, Err(LvmError::InUse(_))), "{refused:?}");
    drop(file);
    timed("remove two", || bed.vg.remove(&pairs).unwrap());
    timed("remove none", || bed.vg.remove(&pairs).unwrap());
    assert!(bed.vg.lvs().unwrap().is_empty());
    assert!(lvs.iter().all(|lv| bed.dm.by_uuid(&lv.dm_uuid()).unwrap().is_none()));

    // The pool does not go with its last volume.
    assert!(bed.vg.pool().unwrap().unwrap().active);
    bed.dm.status_text_of(&pool.tpool_dm_uuid()).unwrap();

    // Another with the old name keeps its life.
    let new = bed.vg.create(Some((&data, SIZE)), None, &["g1"]).unwrap();
    bed.vg.remove(&pairs).unwrap();
    assert_eq!(bed.vg.lvs().unwrap(), new);
    let gone = Vg { name: "no-such-group".to_owned(), ..bed.vg.clone() };
    assert_eq!(gone.pool().unwrap(), None);
    assert!(gone.lvs().is_err());
    let gone = Vg { thin_pool: "no-such-pool".to_owned(), ..bed.vg.clone() };
    assert_eq!(gone.pool().unwrap(), None);
    let gone = Vg { devices: vec![PathBuf::from("/dev/no-such-device")], ..bed.vg.clone() };
    assert_eq!(gone.pool().unwrap(), None);
}

#[test]
#[ignore = "needs root and a node's kernel"]
fn udev_looks_into_nothing_of_a_guests() {
    let mut bed = Bed::new();
    let volume = Volume::new();
    // A guest's disk: a partition with a file system whose label is the node's
    // own root's, and whose UUID would be a link.
    let label = "root";
    let (lv, import, namespace) = bed.exported(volume, |device| {
        let path = block::node(device).unwrap().display().to_string();
        let options = ["-q", "-F", "-L", label, "-E", "offset=1048576", &path, "16m"];
        sh("mkfs.ext4", &options);
        let mut buffer = Buffer::new(BLOCK);
        let block = buffer.bytes();
        block[446..462].copy_from_slice(&[
            0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x80, 0, 0, // 2048, 32768 sectors
        ]);
        block[510..512].copy_from_slice(&[0x55, 0xaa]);
        open(device, true).write_all_at(block, 0).unwrap();
    });
    let name = nvme::observe(&import).unwrap().namespace_name.unwrap();
    sh("udevadm", &["settle"]);
    let partition = Path::new("/sys/class/block").join(format!("{name}p1/dev"));
    let partition = fs::read_to_string(partition).expect("the kernel found no partition");
    let src = volume.name(1, Role::Src);
    bed.set(&src, Target::Queue { path: Some(namespace) });
    let number = bed.dm.device(&src).unwrap().unwrap().number;
    bed.set(&volume.handle(), Target::Linear { device: number, offset: Sectors(0) });
    let handle = bed.dm.device(&volume.handle()).unwrap().unwrap().number;
    // The end of a writable descriptor is what udev's watch waits for.
    drop(open(lv, true));
    sh("udevadm", &["settle"]);
    let all = [
        lv.to_string(),
        namespace.to_string(),
        partition.trim().to_owned(),
        number.to_string(),
        handle.to_string(),
    ];
    for device in all {
        let record = fs::read_to_string(format!("/run/udev/data/b{device}")).unwrap_or_default();
        println!("{device}: {}", record.replace('\n', " "));
        assert!(!record.contains("ID_FS_") && !record.contains("ID_PART_"), "{device}: {record}");
        assert!(!record.contains("S:disk/"), "{device}: {record}");
        assert!(!Path::new("/run/udev/watch").join(format!("b{device}")).exists(), "{device}");
    }
}

/// The metadata of the thin pool, as it lies on its disk: dm-thin-metadata.c's superblock
/// and dm-space-map-common.h's bitmaps, in blocks of 4 KiB.
struct Metadata {
    disk: File,
    start: u64,
}

impl Metadata {
    /// Of a pool that is active now. It may be written only while it is not.
    fn new(bed: &Bed) -> Self {
        let name = format!("{}-{}_tmeta", bed.vg.name.replace('-', "--"), bed.vg.thin_pool);
        let table = sh("dmsetup", &["table", &name]);
        let words: Vec<&str> = table.split_whitespace().collect();
        let &["0", _, "linear", disk, sector] = &words[..] else { panic!("{table}") };
        let sector: u64 = sector.parse().unwrap();
        Self { disk: open(disk.parse().unwrap(), true), start: sector * 512 }
    }

    fn read(&self, block: u64) -> Vec<u8> {
        read_at(&self.disk, self.start + block * 4096).unwrap()
    }

    /// The block with the first of the data blocks' counts, two bits for each.
    fn counts(&self) -> u64 {
        let number =
            |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        // `data_space_map_root`, and in it `bitmap_root`: a B-tree, here of one node.
        let root = self.read(number(&self.read(0), 64 + 16));
        let (is_leaf, most) =
            (root[4] & 2 != 0, u32::from_le_bytes(root[20..24].try_into().unwrap()));
        assert!(is_leaf, "a larger pool than this test reads");
        number(&root, 32 + 8 * usize::try_from(most).unwrap())
    }

    /// Which data block is given out last.
    const LAST: usize = 16319;

    fn is_last_taken(&self) -> bool {
        self.read(self.counts())[16 + Self::LAST / 4] & 0x80 != 0
    }

    fn take_last(&self) {
        let block = self.counts();
        let mut buffer = Buffer::new(4096);
        let bytes = buffer.bytes();
        bytes.copy_from_slice(&self.read(block));
        bytes[16 + Self::LAST / 4] |= 0x80;
        // `BITMAP_CSUM_XOR`, over all but the sum itself.
        let sum = crc32c(&bytes[4..]) ^ 240_779;
        bytes[..4].copy_from_slice(&sum.to_le_bytes());
        self.disk.write_all_at(bytes, self.start + block * 4096).unwrap();
    }
}

/// CRC-32C as the kernel's `crc32c(~0, …)`: nothing is inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ (0x82f6_3b78 & (sum & 1).wrapping_neg())
        })
    })
}

#[test]
#[ignore = "needs root and a node's kernel"]
fn a_pool_from_which_a_power_cut_took_a_block_is_activated() {
    let bed = Bed::new();
    bed.vg.activate().unwrap();
    let metadata = Metadata::new(&bed);
    let device = bed.vg.devices[0].to_str().unwrap();
    let off = || sh("lvm", &["vgchange", "--devices", device, "-an", &bed.vg.name]);
    // Taken and mapped nowhere, which takes a cut between two commits to happen by itself.
    let lose = || {
        off();
        assert!(!metadata.is_last_taken());
        metadata.take_last();
        assert!(metadata.is_last_taken());
    };
    lose();
    let path = format!("{}/{}", bed.vg.name, bed.vg.thin_pool);
    let args = ["lvchange", "--devices", device, "-qq", "-ay", &path];
    println!("lvm2 by itself: {:?}", exec::run("lvm", &args, None, LONG));
    off();
    if !metadata.is_last_taken() {
        metadata.take_last();
    }
    bed.vg.activate().unwrap();
    assert!(bed.vg.pool().unwrap().unwrap().active);
    off();
    assert!(!metadata.is_last_taken(), "the block is not given back");

    // By a creation, which activates the pool that it needs.
    lose();
    let data = Volume::new().data(1);
    let made = bed.vg.create(Some((&data, SIZE)), None, &[]).unwrap().remove(0);
    bed.vg.remove(&[(&data, &made.uuid)]).unwrap();
    off();
    assert!(!metadata.is_last_taken(), "the block is not given back");
    bed.vg.activate().unwrap();
}

#[test]
#[ignore = "needs root and a node's kernel"]
fn a_snapshot_for_which_consumers_wait_waits_for_no_lock_and_is_never_an_old_one() {
    let bed = Bed::new();
    let volume = Volume::new();
    let (origin, name) = (volume.data(1), volume.data(2));
    let made = bed.vg.create(Some((&origin, SIZE)), None, &[]).unwrap().remove(0);
    let take = || bed.vg.begin_snapshot(&name, &origin).unwrap();
    // As another lvm2 command holds it (lib/locking/file_locking.c, `_file_lock_resource`).
    let lock = format!("/run/lock/lvm/V_{}", bed.vg.name);
    let held = OpenOptions::new().read(true).append(true).create(true).open(lock).unwrap();
    held.lock().unwrap();
    let refused = timed("snapshot while the group is locked", || take().ended_within(LONG));
    println!("{}", refused.as_ref().unwrap_err());
    assert!(matches!(refused, Err(LvmError::InUse(_))), "{refused:?}");
    drop(held);

    let taking = take();
    timed("snapshot", || taking.ended_within(LONG).unwrap());
    taking.ended();
    let taken = bed.vg.begun(&name, &made.uuid).unwrap();
    let again = take().ended_within(LONG);
    println!("{}", again.as_ref().unwrap_err());
    assert!(matches!(again, Err(LvmError::Exec(_))), "{again:?}");
    bed.vg.remove(&[(&name, &taken.uuid), (&origin, &made.uuid)]).unwrap();
    assert!(bed.vg.lvs().unwrap().is_empty());
}
