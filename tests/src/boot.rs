//! A guest for inside a node: a boot disk with a program that says by itself whether
//! its other disk is right. `tests/guest/guest.s` tells what it does and prints.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::host;

/// Bytes of the second disk that a block of the guest's takes.
pub const GUEST_BLOCK: u64 = 32 << 10;

/// Where a BIOS puts a boot sector.
const LOADED_AT: &str = "0x7c00";

/// The BIOS reads nothing from a disk that is smaller than one of its cylinders.
const DISK: usize = 1 << 20;

const PROGRAM: &str = include_str!("../guest/guest.s");

/// The boot disk of a guest that uses so many blocks, a power of two.
pub fn guest_disk(blocks: u32) -> Result<Vec<u8>> {
    let directory = tempfile::tempdir().context("creating a directory")?;
    let at = |name: &str| directory.path().join(name);
    let (source, object, program) = (at("guest.s"), at("guest.o"), at("guest"));
    fs::write(&source, PROGRAM).context("writing the program")?;
    let blocks = format!("BLOCKS={blocks}");
    run(&["as", "--32", "--defsym", &blocks, "-o"], &[&object, &source])?;
    let link = ["ld", "-m", "elf_i386", "-Ttext", LOADED_AT, "--oformat", "binary", "-o"];
    run(&link, &[&program, &object])?;
    let mut disk = fs::read(&program).context("reading the program")?;
    disk.resize(DISK, 0);
    Ok(disk)
}

fn run(command: &[&str], files: &[&Path]) -> Result<()> {
    host::output(host::command(command).args(files)).map(drop)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_boot_disk_starts_with_a_sector_that_a_bios_boots() {
        let disk = guest_disk(512).unwrap();
        assert_eq!(disk.len(), DISK);
        assert_eq!(disk[510..512], [0x55, 0xaa]);
        assert!(disk[512..2048].iter().any(|byte| *byte != 0), "the rest of it is missing");
    }
}
