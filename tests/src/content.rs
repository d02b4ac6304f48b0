//! Content that tells where it belongs, who wrote it and when.
//!
//! ```text
//! block, 4 KiB:  magic | seed | block number | sequence number | words | checksum
//! ```
//!
//! All of a block follows from the three numbers, so that a wrong, a stale, a
//! torn and a foreign block are each called by name.

use anyhow::{Context, Result, ensure};

/// Bytes of a block.
pub const BLOCK: usize = 4096;

const BLOCK_MAGIC: u64 = u64::from_le_bytes(*b"DMLBLOCK");

/// The next number of a sequence that looks random (splitmix64).
pub fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The 64-bit words of a block.
pub fn words(block: &[u8]) -> impl Iterator<Item = u64> {
    block
        .chunks_exact(8)
        .map(|word| word.iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte)))
}

const NO_WORDS: u64 = 0xcbf2_9ce4_8422_2325;

/// The checksum of one word more.
fn checksum(sum: u64, word: u64) -> u64 {
    (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
}

/// Makes a block what it is at that sequence number.
pub fn encode(block: &mut [u8], seed: u64, number: u64, sequence: u64) {
    let mut state = seed ^ number.rotate_left(20) ^ sequence.rotate_left(40);
    let mut sum = NO_WORDS;
    for (index, word) in block.chunks_exact_mut(8).enumerate() {
        let value = match index {
            0 => BLOCK_MAGIC,
            1 => seed,
            2 => number,
            3 => sequence,
            _ if index == BLOCK / 8 - 1 => sum,
            _ => draw(&mut state),
        };
        sum = checksum(sum, value);
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// What a block turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing but zeros.
    Zeros,
    /// A whole block of some writer's.
    Block {
        /// Its writer.
        seed: u64,
        /// Where it belongs.
        number: u64,
        /// Which request wrote it.
        sequence: u64,
    },
    /// It begins like a block, but is not a whole one.
    Torn {
        /// Its writer, if its head is right.
        seed: u64,
        /// Where it belongs, if its head is right.
        number: u64,
        /// Which request wrote it, if its head is right.
        sequence: u64,
    },
    /// Nothing that a writer writes.
    Foreign {
        /// Its first word.
        first: u64,
    },
}

/// Recognises a block.
pub fn decode(block: &[u8]) -> Found {
    let mut head = words(block);
    let mut next = || head.next().unwrap_or(0);
    let (magic, seed, number, sequence) = (next(), next(), next(), next());
    if magic != BLOCK_MAGIC {
        let zeros = block.iter().all(|byte| *byte == 0);
        return if zeros { Found::Zeros } else { Found::Foreign { first: magic } };
    }
    let end = BLOCK / 8 - 1;
    let sum = words(block).take(end).fold(NO_WORDS, checksum);
    if words(block).nth(end) == Some(sum) {
        Found::Block { seed, number, sequence }
    } else {
        Found::Torn { seed, number, sequence }
    }
}

/// What a block may be: any sequence number in the range, 0 being the base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The first.
    pub settled: u64,
    /// The last.
    pub latest: u64,
}

/// What the device must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    /// Tells its writer from others.
    pub seed: u64,
    /// Whether blocks that were never written are zeros, not the base pattern.
    pub blank: bool,
    /// One for each block.
    pub entries: Vec<Entry>,
}

impl Map {
    /// Whether that is what the block with this number may be.
    pub fn check(&self, number: u64, block: &[u8]) -> Result<()> {
        let Entry { settled, latest } = self.entry(number)?;
        let found = decode(block);
        let right = match found {
            Found::Zeros => self.blank && settled == 0,
            Found::Block { seed, number: of, sequence } => {
                let base = sequence == 0 && self.blank;
                seed == self.seed && of == number && (settled..=latest).contains(&sequence) && !base
            }
            Found::Torn { .. } | Found::Foreign { .. } => false,
        };
        ensure!(
            right,
            "block {number}: expected sequence {settled} to {latest} of seed {}, found {found:?}",
            self.seed
        );
        Ok(())
    }

    fn entry(&self, number: u64) -> Result<Entry> {
        let entry = self.entries.get(usize::try_from(number)?);
        entry.copied().with_context(|| format!("block {number} is beyond what was known"))
    }

    /// The sequence number of the next request.
    pub fn next_sequence(&self) -> u64 {
        self.entries.iter().map(|entry| entry.latest).max().unwrap_or(0) + 1
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

    fn map(blank: bool, settled: u64, latest: u64) -> Map {
        Map { seed: 7, blank, entries: vec![Entry { settled, latest }; 4] }
    }

    #[test]
    fn a_block_tells_who_wrote_it_where_and_when() {
        let found = Found::Block { seed: 7, number: 3, sequence: 9 };
        assert_eq!(decode(&block(7, 3, 9)), found);
        assert_eq!(decode(&[0; BLOCK]), Found::Zeros);
        assert_eq!(decode(&[1; BLOCK]), Found::Foreign { first: 0x0101_0101_0101_0101 });
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let whole = block(7, 3, 9);
        for at in 0..BLOCK {
            let mut torn = whole.clone();
            torn[at] ^= 0x10;
            assert!(map(false, 9, 9).check(3, &torn).is_err(), "byte {at}");
        }
        let mut half = block(7, 3, 8);
        half[BLOCK / 2..].copy_from_slice(&whole[BLOCK / 2..]);
        assert_eq!(decode(&half), Found::Torn { seed: 7, number: 3, sequence: 8 });
    }

    #[test]
    fn only_what_was_acknowledged_or_is_in_flight_is_right() {
        for (sequence, is_right) in [(4, false), (5, true), (6, true), (7, false)] {
            let checked = map(false, 5, 6).check(2, &block(7, 2, sequence));
            assert_eq!(checked.is_ok(), is_right, "sequence {sequence}");
        }
    }

    #[test]
    fn a_wrong_block_is_called_by_name() {
        let told = |number, block: &[u8]| {
            format!("{:#}", map(false, 5, 5).check(number, block).unwrap_err())
        };
        assert!(told(2, &block(7, 3, 5)).contains("block 2: expected sequence 5 to 5 of seed 7"));
        assert!(told(2, &block(7, 3, 5)).contains("number: 3"));
        assert!(told(2, &block(8, 2, 5)).contains("seed: 8"));
        assert!(told(2, &[0; BLOCK]).contains("Zeros"));
        assert!(told(9, &block(7, 9, 5)).contains("beyond"));
    }

    #[test]
    fn a_block_never_written_is_of_the_base() {
        assert!(map(false, 0, 0).check(1, &block(7, 1, 0)).is_ok());
        assert!(map(false, 0, 0).check(1, &[0; BLOCK]).is_err());
        assert!(map(true, 0, 0).check(1, &[0; BLOCK]).is_ok());
        assert!(map(true, 0, 0).check(1, &block(7, 1, 0)).is_err());
        assert!(map(true, 0, 3).check(1, &[0; BLOCK]).is_ok());
        assert!(map(true, 3, 3).check(1, &[0; BLOCK]).is_err());
    }
}
