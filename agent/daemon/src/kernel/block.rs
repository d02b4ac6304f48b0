//! Reading, zeroing and flushing block devices by number.
//!
//! A device number is looked up in sysfs, and what was opened is checked against
//! it: numbers are reused, and a node under `/dev` may lag behind. Devices are
//! opened for reading unless something is written, because udev takes the end of
//! every writable descriptor for a change and would look at the content.
//!
//! Two `unsafe` blocks: `BLKFLSBUF` and `BLKDISCARD`, for which no safe wrapper exists.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use dmlocal_model::units::{DevNo, SECTOR_BYTES};

use super::{Written, dm::describe};

/// What dm-clone looks at before it formats (drivers/md/dm-clone-metadata.c,
/// `__superblock_all_zeroes`): one 4 KiB block.
const BLOCK: usize = 4096;

/// Where dm-clone's superblock has its magic number (`struct superblock_disk`).
const MAGIC_AT: usize = 32;

/// `SUPERBLOCK_MAGIC`, little-endian on disk.
const MAGIC: u64 = 0x8af2_7f64;

/// Aligned for O_DIRECT on every logical block size that dm-clone takes.
#[repr(C, align(4096))]
struct Block([u8; BLOCK]);

/// The path of the node of a device.
///
/// # Errors
/// [`io::ErrorKind::NotFound`] if no device has that number.
pub fn node(device: DevNo) -> io::Result<PathBuf> {
    node_in(Path::new("/sys"), device)
}

fn node_in(sys: &Path, device: DevNo) -> io::Result<PathBuf> {
    let path = sys.join(format!("dev/block/{device}/uevent"));
    let text = fs::read_to_string(path).map_err(|error| about("find", device, error))?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    match name {
        Some(name) if !name.is_empty() => Ok(Path::new("/dev").join(name)),
        _ => Err(about("find", device, io::Error::from(io::ErrorKind::NotFound))),
    }
}

/// Opens a device for reading.
pub fn open(device: DevNo) -> io::Result<File> {
    open_with(device, OpenOptions::new().read(true))
}

fn open_with(device: DevNo, options: &OpenOptions) -> io::Result<File> {
    let path = node(device)?;
    let file = options.open(&path).map_err(|error| about("open", device, error))?;
    let metadata = file.metadata().map_err(|error| about("look at", device, error))?;
    let number = metadata.rdev();
    let found = DevNo { major: libc::major(number), minor: libc::minor(number) };
    if !metadata.file_type().is_block_device() || found != device {
        let text = format!("{} is {found}, not {device}", path.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, text));
    }
    Ok(file)
}

/// Overwrites the first 4 KiB with zeros, past the page cache and through the
/// device's own. dm-clone then formats the device, and whatever it held for a
/// clone is gone.
///
/// # Errors
/// [`io::ErrorKind::ResourceBusy`] if the device is mounted or stands in a
/// device-mapper table: those claim it exclusively, and so does this.
pub fn zero_block0(device: DevNo) -> io::Result<()> {
    let flags = libc::O_DIRECT | libc::O_EXCL | libc::O_SYNC;
    let file = open_with(device, OpenOptions::new().write(true).custom_flags(flags))?;
    let zeros = Block([0; BLOCK]);
    file.write_all_at(&zeros.0, 0).map_err(|error| about("zero", device, error))?;
    file.sync_all().map_err(|error| about("flush", device, error))
}

/// Whether the device holds dm-clone's metadata.
pub fn clone_magic(device: DevNo) -> io::Result<bool> {
    let file = open_with(device, OpenOptions::new().read(true).custom_flags(libc::O_DIRECT))?;
    let mut block = Block([0; BLOCK]);
    file.read_exact_at(&mut block.0, 0).map_err(|error| about("read", device, error))?;
    Ok(has_magic(&block.0))
}

fn has_magic(block: &[u8; BLOCK]) -> bool {
    block[MAGIC_AT..].starts_with(&MAGIC.to_le_bytes())
}

/// So much of a device is copied at once.
const CHUNK: usize = 128 * 1024;

#[repr(C, align(4096))]
struct Chunk([u8; CHUNK]);

/// Copies so many bytes from the start of one device to that of another, past the page
/// cache of both, and flushes what was written. Both must be multiples of 4 KiB.
///
/// # Errors
/// [`io::ErrorKind::ResourceBusy`] if somebody uses the device that is written.
pub fn copy(from: DevNo, to: DevNo, bytes: u64) -> io::Result<()> {
    let source = open_with(from, OpenOptions::new().read(true).custom_flags(libc::O_DIRECT))?;
    let flags = libc::O_DIRECT | libc::O_EXCL;
    let target = open_with(to, OpenOptions::new().write(true).custom_flags(flags))?;
    let mut chunk = Box::new(Chunk([0; CHUNK]));
    let mut at = 0;
    while at < bytes {
        let part = usize::try_from(bytes - at).map_or(CHUNK, |rest| rest.min(CHUNK));
        let part = &mut chunk.0[..part];
        source.read_exact_at(part, at).map_err(|error| about("read", from, error))?;
        target.write_all_at(part, at).map_err(|error| about("write", to, error))?;
        at += part.len() as u64;
    }
    target.sync_all().map_err(|error| about("flush", to, error))
}

/// Sends a FLUSH through the device and waits for it.
pub fn flush(device: DevNo) -> io::Result<()> {
    // A block device's fsync flushes whatever the descriptor may do
    // (block/fops.c, `blkdev_fsync`).
    let file = open(device)?;
    file.sync_all().map_err(|error| about("flush", device, error))
}

/// Writes back the device's page cache, flushes the device, and drops the cache.
pub fn sync_and_drop_cache(device: DevNo) -> io::Result<()> {
    let file = open(device)?;
    file.sync_all().map_err(|error| about("flush", device, error))?;
    // SAFETY: the descriptor is open, and BLKFLSBUF takes no argument.
    unsafe { ioctl::flush_buffers(file.as_raw_fd()) }
        .map_err(|errno| about("drop the cache of", device, errno.into()))?;
    Ok(())
}

/// Drops what the device's page cache holds and has not changed; writes nothing
/// back.
pub fn drop_clean_cache(device: DevNo) -> io::Result<()> {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    let file = open(device)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
        .map_err(|errno| about("drop the cache of", device, errno.into()))
}

mod ioctl {
    // `BLKFLSBUF` of include/uapi/linux/fs.h: _IO(0x12, 97).
    nix::ioctl_none!(flush_buffers, 0x12, 97);
    // `BLKDISCARD`: _IO(0x12, 119); takes the start and the length in bytes.
    nix::ioctl_write_ptr_bad!(discard, nix::request_code_none!(0x12, 119), [u64; 2]);
}

/// A device that is sent discards.
#[derive(Debug)]
pub struct Discards {
    device: DevNo,
    file: File,
}

impl Discards {
    /// Opens the device, whether it takes discards now or not. It may be in use by others:
    /// a discard then drops their clean page cache, and nothing else of theirs
    /// (block/fops.c, `truncate_bdev_range`).
    pub fn open(device: DevNo) -> io::Result<Self> {
        let file = open_with(device, OpenOptions::new().read(true).write(true))?;
        Ok(Self { device, file })
    }

    /// Which device it is.
    pub const fn device(&self) -> DevNo {
        self.device
    }

    /// Sends a discard and waits for its end.
    pub fn send(&self, from: u64, length: u64) -> io::Result<()> {
        let range = [from, length];
        // SAFETY: the descriptor is open, and the kernel reads two numbers from where
        // the pointer leads.
        unsafe { ioctl::discard(self.file.as_raw_fd(), &raw const range) }
            .map_err(|errno| about("discard on", self.device, errno.into()))?;
        Ok(())
    }
}

/// The logical block size in bytes.
pub fn logical_block_size(device: DevNo) -> io::Result<u32> {
    let bytes = attribute(Path::new("/sys"), device, "queue/logical_block_size")?;
    u32::try_from(bytes).map_err(|error| about("measure", device, io::Error::other(error)))
}

/// The size in bytes.
pub fn size(device: DevNo) -> io::Result<u64> {
    // sysfs counts in 512-byte sectors whatever the logical block size.
    attribute(Path::new("/sys"), device, "size").map(|sectors| sectors * SECTOR_BYTES)
}

/// The longest discard that the device takes, in bytes; 0 if it takes none.
pub fn discard_max(device: DevNo) -> io::Result<u64> {
    attribute(Path::new("/sys"), device, "queue/discard_max_bytes")
}

/// Makes the device refuse discards, until its table is loaded anew. What is
/// stacked on it afterwards refuses them too; what already is does not.
pub fn block_discards(device: DevNo) -> io::Result<()> {
    block_discards_in(Path::new("/sys"), device)
}

fn block_discards_in(sys: &Path, device: DevNo) -> io::Result<()> {
    let path = attribute_path(sys, device, "queue/discard_max_bytes");
    OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|file| file.write_all_at(b"0", 0))
        .map_err(|error| about("block discards of", device, error))?;
    match attribute(sys, device, "queue/discard_max_bytes")? {
        0 => Ok(()),
        left => {
            let text = format!("it still takes {left} bytes");
            Err(about("block discards of", device, io::Error::other(text)))
        }
    }
}

/// What was written through a device, by the kernel's own counters.
///
/// # Errors
/// The kernel has none for it, or was told not to count (`queue/iostats`).
pub fn written(device: DevNo) -> io::Result<Written> {
    written_in(Path::new("/sys"), device)
}

fn written_in(sys: &Path, device: DevNo) -> io::Result<Written> {
    if attribute(sys, device, "queue/iostats")? == 0 {
        let text = "queue/iostats is 0, so the kernel counts nothing";
        return Err(about("count the writes of", device, io::Error::other(text)));
    }
    let text = |name| {
        let path = attribute_path(sys, device, name);
        fs::read_to_string(path).map_err(|error| about(&format!("read {name} of"), device, error))
    };
    counted(&text("stat")?, &text("inflight")?).ok_or_else(|| {
        about("count the writes of", device, io::Error::other("not the kernel's words"))
    })
}

/// Of `stat` the 5th, 12th and 16th number are writes, discards and flushes that have
/// ended; of `inflight` the 2nd is writes that have not (block/genhd.c,
/// `part_stat_show` and `part_inflight_show`). Older kernels count no flushes.
fn counted(stat: &str, inflight: &str) -> Option<Written> {
    let number =
        |text: &str, nth: usize| text.split_ascii_whitespace().nth(nth)?.parse::<u64>().ok();
    let done = number(stat, 4)?
        .saturating_add(number(stat, 11).unwrap_or(0))
        .saturating_add(number(stat, 15).unwrap_or(0));
    Some(Written { done, under_way: number(inflight, 1)? })
}

fn attribute_path(sys: &Path, device: DevNo, name: &str) -> PathBuf {
    sys.join(format!("dev/block/{device}")).join(name)
}

fn attribute(sys: &Path, device: DevNo, name: &str) -> io::Result<u64> {
    let text = fs::read_to_string(attribute_path(sys, device, name))
        .map_err(|error| about(&format!("read {name} of"), device, error))?;
    text.trim().parse().map_err(|_| {
        let text = format!("`{}` is not a number", text.trim());
        about(&format!("read {name} of"), device, io::Error::other(text))
    })
}

fn about(verb: &str, device: DevNo, error: io::Error) -> io::Error {
    describe(verb, &format!("block device {device}"), error)
}

#[cfg(test)]
mod test {
    use super::*;

    const DEVICE: DevNo = DevNo { major: 253, minor: 7 };

    fn sys(files: &[(&str, &str)]) -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = attribute_path(sys.path(), DEVICE, name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        sys
    }

    #[test]
    fn a_node_is_found_by_number() {
        let sys = sys(&[("uevent", "MAJOR=253\nMINOR=7\nDEVNAME=dm-7\nDEVTYPE=disk\n")]);
        assert_eq!(node_in(sys.path(), DEVICE).unwrap(), Path::new("/dev/dm-7"));
        let other = DevNo { major: 1, minor: 1 };
        assert_eq!(node_in(sys.path(), other).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_device_without_a_node_is_not_found() {
        let sys = sys(&[("uevent", "MAJOR=253\nMINOR=7\n")]);
        assert_eq!(node_in(sys.path(), DEVICE).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn discards_are_blocked_only_when_the_kernel_says_so() {
        let sys = sys(&[("queue/discard_max_bytes", "0\n")]);
        block_discards_in(sys.path(), DEVICE).unwrap();
        // A kernel that does not take it: the file keeps what follows the zero.
        fs::write(attribute_path(sys.path(), DEVICE, "queue/discard_max_bytes"), "65536").unwrap();
        assert!(block_discards_in(sys.path(), DEVICE).is_err());
    }

    #[test]
    fn writes_are_counted_and_reads_are_not() {
        let stat = "9 0 8 7 20 0 6 5 0 4 3 300 0 2 1 4000 0\n";
        let sys = sys(&[("stat", stat), ("inflight", " 5 2\n"), ("queue/iostats", "1\n")]);
        let seen = written_in(sys.path(), DEVICE).unwrap();
        assert_eq!(seen, Written { done: 4320, under_way: 2 });
        // Counters that stand still because nobody counts are no evidence.
        fs::write(attribute_path(sys.path(), DEVICE, "queue/iostats"), "0\n").unwrap();
        assert!(written_in(sys.path(), DEVICE).is_err());
        assert_eq!(counted("9 0 8 7 20 0 6 5 0 4 3", "0 0").map(|seen| seen.done), Some(20));
        assert_eq!(counted("", "0 0"), None);
    }

    #[test]
    fn what_is_no_number_is_an_error() {
        let sys = sys(&[("size", "many\n")]);
        assert!(attribute(sys.path(), DEVICE, "size").is_err());
        assert!(attribute(sys.path(), DEVICE, "missing").is_err());
    }

    #[test]
    fn the_magic_number_is_where_the_kernel_writes_it() {
        let mut block = [0; BLOCK];
        assert!(!has_magic(&block));
        block[32..36].copy_from_slice(&[0x64, 0x7f, 0xf2, 0x8a]);
        assert!(has_magic(&block));
        block[31] = 1;
        assert!(has_magic(&block));
        block[36] = 1;
        assert!(!has_magic(&block));
    }
}
