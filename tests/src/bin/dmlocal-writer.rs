//! Writes a volume, remembers exactly what it wrote, and finds every byte that
//! is wrong afterwards, on this node or another.
//!
//! ```text
//! state file:    magic | seed | blocks | base        one page
//!                settled | latest                    16 bytes a block
//!                 │        └ last sequence number whose writing was begun
//!                 └ last one that the device must still have
//! ```
//!
//! The state file is written in place around every request, so that it is right
//! even when the writer is killed. With `--durable` it is right after a power cut
//! as well: it is on disk before the data is, and settled means flushed.

use std::fs::{File, OpenOptions};
use std::io::{Write as _, stdout};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use dmlocal_testbed::content::{BLOCK, Entry, Map, draw, encode, words};
use nix::libc;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Blocks in a region of dm-clone.
const REGION: u64 = 16;

/// Blocks that `fill` and `verify` handle at a time.
const BATCH: u64 = 256;

const STATE_MAGIC: u64 = u64::from_le_bytes(*b"DMLSTATE");

#[derive(Parser)]
#[command(about = "Writes a volume and proves later that every byte is right")]
struct Arguments {
    #[command(subcommand)]
    order: Order,
}

#[derive(Subcommand)]
enum Order {
    /// Writes the base pattern over the whole device
    Fill {
        /// The device
        #[arg(long)]
        device: PathBuf,
        /// What tells this pattern from others
        #[arg(long)]
        seed: u64,
    },
    /// Reads and writes until told to stop
    Run(Run),
    /// Reads the whole device and checks every block
    Verify {
        /// The device
        #[arg(long)]
        device: PathBuf,
        /// What `run` left
        #[arg(long)]
        state: PathBuf,
        /// Counts regions that cannot be read instead of failing, and checks the rest
        #[arg(long)]
        lacking: bool,
        /// A later state: whatever was begun until then may be there
        #[arg(long)]
        until: Option<PathBuf>,
    },
}

#[derive(Args)]
struct Run {
    /// The device
    #[arg(long)]
    device: PathBuf,
    /// What was written so far; made if it is absent
    #[arg(long)]
    state: PathBuf,
    /// What tells this writer's blocks from others
    #[arg(long)]
    seed: u64,
    /// The device was not filled: what was never written reads zeros
    #[arg(long)]
    blank: bool,
    /// Only the first so many blocks of the device
    #[arg(long)]
    first: Option<u64>,
    /// At most so many requests a second
    #[arg(long)]
    rate: Option<u32>,
    /// Stops after so many requests
    #[arg(long)]
    count: Option<u64>,
    /// Stops when this file is gone
    #[arg(long)]
    until_file_gone: Option<PathBuf>,
    /// Keeps the state right across a power cut
    #[arg(long)]
    durable: bool,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().order {
        Order::Fill { device, seed } => fill(&device, seed),
        Order::Run(run) => run.run(),
        Order::Verify { device, state, lacking, until } => {
            verify(&device, &state, until.as_deref(), lacking)
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A map and the file that it is kept in.
struct State {
    /// In memory settled means acknowledged: that much every read must show.
    map: Map,
    file: File,
    /// What settled means in the file.
    settled: Vec<u64>,
    /// Acknowledged, but to be settled by a flush.
    unflushed: Vec<(u64, u64)>,
    durable: bool,
}

impl State {
    fn open(run: &Run, blocks: u64) -> Result<State> {
        let flags = if run.durable { libc::O_DSYNC } else { 0 };
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(flags);
        let context = || format!("opening {}", run.state.display());
        let new = !run.state.exists();
        let file = options.create(new).truncate(false).open(&run.state).with_context(context)?;
        if new {
            let mut bytes = vec![0; BLOCK + 16 * usize::try_from(blocks)?];
            let head = [STATE_MAGIC, run.seed, blocks, u64::from(run.blank)];
            for (place, word) in bytes.chunks_exact_mut(8).zip(head) {
                place.copy_from_slice(&word.to_le_bytes());
            }
            file.write_all_at(&bytes, 0).context("making the state")?;
            file.sync_all().context("making the state")?;
        }
        let map = read_map(&run.state)?;
        ensure!(map.seed == run.seed, "the state is of seed {}, not {}", map.seed, run.seed);
        ensure!(map.entries.len() as u64 == blocks, "the state is of a device of another size");
        let settled = map.entries.iter().map(|entry| entry.settled).collect();
        Ok(State { map, file, settled, unflushed: Vec::new(), durable: run.durable })
    }

    fn begin(&mut self, first: u64, count: u64, sequence: u64) -> Result<()> {
        for entry in &mut self.map.entries[range(first, count)?] {
            entry.latest = sequence;
        }
        self.save(first, count)
    }

    fn acknowledged(&mut self, first: u64, count: u64) -> Result<()> {
        for entry in &mut self.map.entries[range(first, count)?] {
            entry.settled = entry.latest;
        }
        if self.durable {
            self.unflushed.push((first, count));
            return Ok(());
        }
        self.settle(first, count)
    }

    fn flushed(&mut self) -> Result<()> {
        for (first, count) in std::mem::take(&mut self.unflushed) {
            self.settle(first, count)?;
        }
        Ok(())
    }

    fn settle(&mut self, first: u64, count: u64) -> Result<()> {
        for number in range(first, count)? {
            self.settled[number] = self.map.entries[number].settled;
        }
        self.save(first, count)
    }

    fn save(&self, first: u64, count: u64) -> Result<()> {
        let range = range(first, count)?;
        let settled = &self.settled[range.clone()];
        let bytes: Vec<u8> = settled
            .iter()
            .zip(&self.map.entries[range])
            .flat_map(|(settled, entry)| [settled.to_le_bytes(), entry.latest.to_le_bytes()])
            .flatten()
            .collect();
        let at = BLOCK as u64 + 16 * first;
        self.file.write_all_at(&bytes, at).context("writing the state")
    }
}

fn range(first: u64, count: u64) -> Result<std::ops::Range<usize>> {
    Ok(usize::try_from(first)?..usize::try_from(first + count)?)
}

fn read_map(path: &Path) -> Result<Map> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    ensure!(bytes.len() >= BLOCK, "{} is no state", path.display());
    let (head, body) = bytes.split_at(BLOCK);
    let head: Vec<u64> = words(head).take(4).collect();
    ensure!(head[0] == STATE_MAGIC, "{} is no state", path.display());
    let entries: Vec<Entry> = body
        .chunks_exact(16)
        .map(|entry| {
            let mut pair = words(entry);
            Entry { settled: pair.next().unwrap_or(0), latest: pair.next().unwrap_or(0) }
        })
        .collect();
    ensure!(entries.len() as u64 == head[2], "{} is cut short", path.display());
    Ok(Map { seed: head[1], blank: head[3] != 0, entries })
}

/// A block device, past the page cache.
struct Device {
    file: File,
    blocks: u64,
    buffer: Vec<u8>,
    longest: (Duration, String),
}

impl Device {
    fn open(path: &Path) -> Result<Device> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        let file = options.open(path).with_context(|| format!("opening {}", path.display()))?;
        let mut end = &file;
        let bytes = std::io::Seek::seek(&mut end, std::io::SeekFrom::End(0)).context("its size")?;
        let buffer = vec![0; BLOCK * (usize::try_from(BATCH)? + 1)];
        Ok(Device { file, blocks: bytes / BLOCK as u64, buffer, longest: Default::default() })
    }

    /// So many blocks of memory, aligned as direct requests must be.
    fn memory(&mut self, blocks: u64) -> &mut [u8] {
        let start = self.buffer.as_ptr().align_offset(BLOCK);
        &mut self.buffer[start..start + BLOCK * usize::try_from(blocks).unwrap_or(0)]
    }

    fn read(&mut self, first: u64, blocks: u64) -> Result<&mut [u8]> {
        self.timed("read", first, |device| {
            let start = device.buffer.as_ptr().align_offset(BLOCK);
            let end = start + BLOCK * usize::try_from(blocks).map_err(std::io::Error::other)?;
            device.file.read_exact_at(&mut device.buffer[start..end], first * BLOCK as u64)
        })?;
        Ok(self.memory(blocks))
    }

    fn write(&mut self, first: u64, blocks: u64, seed: u64, sequence: u64) -> Result<()> {
        let memory = self.memory(blocks);
        for (block, number) in memory.chunks_exact_mut(BLOCK).zip(first..) {
            encode(block, seed, number, sequence);
        }
        self.timed("write", first, |device| {
            let start = device.buffer.as_ptr().align_offset(BLOCK);
            let end = start + BLOCK * usize::try_from(blocks).map_err(std::io::Error::other)?;
            device.file.write_all_at(&device.buffer[start..end], first * BLOCK as u64)
        })
    }

    fn flush(&mut self) -> Result<()> {
        self.timed("flush", 0, |device| device.file.sync_data())
    }

    fn timed(
        &mut self,
        what: &str,
        first: u64,
        act: impl FnOnce(&mut Device) -> std::io::Result<()>,
    ) -> Result<()> {
        let started = Instant::now();
        act(self).with_context(|| format!("{what} at block {first}"))?;
        let took = started.elapsed();
        if took > self.longest.0 {
            self.longest = (took, format!("{what} at block {first}"));
        }
        Ok(())
    }
}

fn fill(device: &Path, seed: u64) -> Result<()> {
    let mut device = Device::open(device)?;
    for first in (0..device.blocks).step_by(usize::try_from(BATCH)?) {
        device.write(first, BATCH.min(device.blocks - first), seed, 0)?;
    }
    device.flush()
}

fn verify(device: &Path, state: &Path, until: Option<&Path>, lacking: bool) -> Result<()> {
    let mut map = read_map(state)?;
    if let Some(until) = until {
        for (entry, later) in map.entries.iter_mut().zip(read_map(until)?.entries) {
            entry.latest = later.latest;
        }
    }
    let mut device = Device::open(device)?;
    let known = map.entries.len() as u64;
    ensure!(known <= device.blocks, "the device has {} blocks, not {known}", device.blocks);
    let mut wrong = Vec::new();
    let (mut lacks, step) = (0, if lacking { REGION } else { BATCH });
    for first in (0..known).step_by(usize::try_from(step)?) {
        let memory = match device.read(first, step.min(known - first)) {
            Err(error) if lacking && is_io_error(&error) => {
                lacks += 1;
                continue;
            }
            read => read?,
        };
        for (block, number) in memory.chunks_exact(BLOCK).zip(first..) {
            wrong.extend(map.check(number, block).err());
        }
    }
    if let Some(first) = wrong.first() {
        bail!("{} blocks are wrong; {first:#}", wrong.len());
    }
    if lacking {
        println!("lacking: {lacks} regions");
    }
    println!("right: {known} blocks");
    Ok(())
}

/// Whether the device itself failed a request.
fn is_io_error(error: &anyhow::Error) -> bool {
    let cause = error.root_cause().downcast_ref::<std::io::Error>();
    cause.is_some_and(|error| error.raw_os_error() == Some(libc::EIO))
}

/// One request of the mix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    write: bool,
    first: u64,
    count: u64,
}

/// Parts of regions, whole ones, across the borders of two, and reads of what
/// may be old. The first request is a write: at a held volume it is the signal.
fn pick(random: &mut u64, blocks: u64, nth: u64) -> Request {
    let regions = (blocks / REGION).max(1);
    let region = (draw(random) % regions) * REGION;
    let (write, first, count) = match draw(random) % 10 {
        0..=3 => (true, draw(random) % blocks, 1),
        4 | 5 => (true, region, REGION),
        6 | 7 => (true, (region + REGION).saturating_sub(1 + draw(random) % 4), 8),
        _ => (nth == 0, draw(random) % blocks, 1 + draw(random) % REGION),
    };
    let first = first.min(blocks - 1);
    Request { write, first, count: count.min(blocks - first) }
}

impl Run {
    fn run(&self) -> Result<()> {
        let mut stop = SigSet::empty();
        stop.add(Signal::SIGTERM);
        stop.add(Signal::SIGINT);
        stop.thread_block().context("blocking signals")?;
        let signals = SignalFd::with_flags(&stop, SfdFlags::SFD_NONBLOCK).context("signals")?;
        let mut device = Device::open(&self.device)?;
        let mut state = State::open(self, device.blocks)?;
        let mut sequence = state.map.next_sequence();
        let mut random = self.seed ^ sequence;
        let (started, mut told) = (Instant::now(), Instant::now());
        let (mut nth, mut writes) = (0, 0);
        println!("started at sequence {sequence}");
        loop {
            let gone = self.until_file_gone.as_ref().is_some_and(|file| !file.exists());
            if gone || self.count == Some(nth) || matches!(signals.read_signal(), Ok(Some(_))) {
                break;
            }
            let blocks = self.first.unwrap_or(u64::MAX).clamp(1, device.blocks);
            let request = pick(&mut random, blocks, nth);
            let Request { first, count, .. } = request;
            if request.write {
                state.begin(first, count, sequence)?;
                device.write(first, count, self.seed, sequence)?;
                state.acknowledged(first, count)?;
                sequence += 1;
                writes += 1;
                if writes == 1 {
                    println!("first write after {} ms", started.elapsed().as_millis());
                }
            } else {
                let memory = device.read(first, count)?;
                for (block, number) in memory.chunks_exact(BLOCK).zip(first..) {
                    state.map.check(number, block)?;
                }
            }
            nth += 1;
            if nth % 32 == 0 {
                device.flush()?;
                state.flushed()?;
            }
            if told.elapsed() >= Duration::from_secs(1) {
                println!("{nth} requests");
                told = Instant::now();
            }
            stdout().flush()?;
            if let Some(rate) = self.rate {
                let due = Duration::from_secs(nth) / rate.max(1);
                std::thread::sleep(due.saturating_sub(started.elapsed()));
            }
        }
        device.flush()?;
        state.flushed()?;
        state.file.sync_all().context("flushing the state")?;
        let (longest, what) = &device.longest;
        println!("{nth} requests, {writes} writes; longest {} ms: {what}", longest.as_millis());
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn block(seed: u64, number: u64, sequence: u64) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        encode(&mut block, seed, number, sequence);
        block
    }

    #[test]
    fn the_mix_has_everything_and_stays_on_the_device() {
        let mut random = 1;
        let all: Vec<_> = (0..2000).map(|nth| pick(&mut random, 200, nth)).collect();
        assert!(all[0].write);
        assert!(all.iter().all(|r| r.count > 0 && r.first + r.count <= 200));
        let has = |what: &dyn Fn(&Request) -> bool| all.iter().any(what);
        assert!(has(&|r| r.write && r.count == 1));
        assert!(has(&|r| r.write && r.first % REGION == 0 && r.count == REGION));
        assert!(has(&|r| r.write && r.first / REGION != (r.first + r.count - 1) / REGION));
        assert!(has(&|r| !r.write));
    }

    fn run(directory: &Path, count: u64, durable: bool) -> Run {
        Run {
            device: directory.join("device"),
            state: directory.join("state"),
            seed: 7,
            blank: false,
            first: None,
            rate: None,
            count: Some(count),
            until_file_gone: None,
            durable,
        }
    }

    #[test]
    fn a_writer_goes_on_where_another_stopped() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let device = directory.path().join("device");
        File::create(&device).unwrap().set_len(1 << 20).unwrap();
        fill(&device, 7).unwrap();
        for durable in [false, true, false] {
            run(directory.path(), 70, durable).run().unwrap();
            verify(&device, &directory.path().join("state"), None, false).unwrap();
        }
        let map = read_map(&directory.path().join("state")).unwrap();
        assert!(map.entries.iter().all(|entry| entry.settled == entry.latest));
        assert!(map.next_sequence() > 120);

        let file = OpenOptions::new().write(true).open(&device).unwrap();
        file.write_all_at(&block(7, 100, map.entries[100].latest + 1), 100 * 4096).unwrap();
        let error = verify(&device, &directory.path().join("state"), None, false).unwrap_err();
        assert!(format!("{error:#}").contains("1 blocks are wrong; block 100"), "{error:#}");
    }
}
