//! What device-mapper's thin volumes and pools say of themselves, and what
//! `thin_dump` says of them. Only reading; anything that is not exactly as expected
//! is nothing.

use dmlocal_model::{
    seeding::{Unwritten, Written},
    units::{DevNo, Sectors},
};

/// A thin volume's place: its table, `thin POOL DEV_ID` (drivers/md/dm-thin.c,
/// `thin_status`). One with an external origin, which follows, reads as zeros nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Thin {
    /// The pool's device.
    pub(super) pool: DevNo,
    /// Its number in the pool.
    pub(super) id: u32,
}

impl Thin {
    pub(super) fn parse(kind: &str, params: &str) -> Option<Self> {
        let words: Vec<&str> = params.split_ascii_whitespace().collect();
        match (kind, words.as_slice()) {
            ("thin", [pool, id]) => Some(Self { pool: pool.parse().ok()?, id: id.parse().ok()? }),
            (_, _) => None,
        }
    }
}

/// A pool's table: `thin-pool METADATA DATA BLOCK LOW_WATER #FEATURES FEATURES`
/// (drivers/md/dm-thin.c, `pool_status`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pool {
    /// Where its metadata is.
    pub(super) metadata: DevNo,
    /// Size of a block.
    pub(super) block: Sectors,
    /// Whether a new block is zeroed before it is used.
    pub(super) zeroes: bool,
}

impl Pool {
    pub(super) fn parse(kind: &str, params: &str) -> Option<Self> {
        let mut words = params.split_ascii_whitespace();
        if kind != "thin-pool" {
            return None;
        }
        let metadata = words.next()?.parse().ok()?;
        let _data: DevNo = words.next()?.parse().ok()?;
        let block = words.next()?.parse().ok().filter(|block| *block > 0)?;
        let zeroes = !words.any(|word| word == "skip_block_zeroing");
        Some(Self { metadata, block: Sectors(block), zeroes })
    }
}

/// The block of the pool's metadata snapshot, where there is one: the fourth word of
/// the pool's status, `-` for none.
pub(super) fn held_root(status: &str) -> Option<Option<u64>> {
    match status.split_ascii_whitespace().nth(3)? {
        "-" => Some(None),
        root => root.parse().ok().map(Some),
    }
}

/// Sectors that a thin volume has blocks for: the first word of its status.
pub(super) fn mapped(status: &str) -> Option<Sectors> {
    status.split_ascii_whitespace().next()?.parse().ok().map(Sectors)
}

/// Reads `thin_dump`'s XML for one volume, line by line.
#[derive(Debug)]
pub(super) struct Dump {
    id: u32,
    block: Sectors,
    written: Written,
    /// Blocks that the volume has, as it says itself, once it was named.
    has: Option<u64>,
    /// Blocks that were listed.
    listed: u64,
    shared: bool,
    ended: bool,
    wrong: Option<String>,
}

impl Dump {
    /// Of a volume of this length and number; none if there are too many regions.
    pub(super) fn new(id: u32, block: Sectors, length: Sectors, region: Sectors) -> Option<Self> {
        let written = Written::new(length, region)?;
        let (has, listed, shared, ended, wrong) = (None, 0, false, false, None);
        Some(Self { id, block, written, has, listed, shared, ended, wrong })
    }

    /// Takes a line.
    pub(super) fn line(&mut self, line: &str) {
        if self.wrong.is_none() && self.read(line.trim()).is_none() {
            self.wrong = Some(line.chars().take(200).collect());
        }
    }

    fn read(&mut self, line: &str) -> Option<()> {
        let number = |name: &str| attribute(line, name)?.parse::<u64>().ok();
        let end = line.find([' ', '>', '/'].as_slice()).unwrap_or(line.len());
        match &line[..end] {
            // `</device>` and the like have their slash first.
            "<" => match line {
                "</superblock>" => self.ended = true,
                "</device>" | "</def>" => {}
                _ => return None,
            },
            "<device" => {
                if self.has.is_some() || number("dev_id")? != u64::from(self.id) {
                    return None;
                }
                self.has = Some(number("mapped_blocks")?);
            }
            "<range_mapping" => self.add(number("origin_begin")?, number("length")?)?,
            "<single_mapping" => self.add(number("origin_block")?, 1)?,
            // Blocks that several volumes share are listed once, whoever's they are:
            // all count.
            "<def" | "<ref" => self.shared = true,
            "" | "<superblock" => {}
            _ => return None,
        }
        Some(())
    }

    fn add(&mut self, first: u64, count: u64) -> Option<()> {
        let (from, length) = (first.checked_mul(self.block.0)?, count.checked_mul(self.block.0)?);
        self.listed = self.listed.checked_add(count)?;
        self.written.add(Sectors(from), Sectors(length));
        Some(())
    }

    /// What was never written; `mapped` is what the volume says of itself.
    ///
    /// # Errors
    /// The dump was not understood, or is not whole, or does not agree.
    pub(super) fn rest(self, mapped: Sectors) -> Result<Unwritten, String> {
        if let Some(line) = self.wrong {
            return Err(format!("thin_dump said `{line}`"));
        }
        let (Some(has), true) = (self.has, self.ended) else {
            return Err(format!("thin_dump did not tell all of volume {}", self.id));
        };
        let agrees = if self.shared { self.listed >= has } else { self.listed == has };
        if !agrees || has.checked_mul(self.block.0) != Some(mapped.0) {
            return Err(format!(
                "thin_dump listed {} of {has} blocks, the kernel knows of {mapped} sectors",
                self.listed
            ));
        }
        Ok(self.written.rest())
    }
}

/// The value of an attribute, which has no quotes inside.
fn attribute<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(&format!(" {name}=\""))?;
    Some(rest.split_once('"')?.0)
}

#[cfg(test)]
mod test {
    use dmlocal_model::seeding::Run;

    use super::*;

    const REGION: Sectors = Sectors(128);
    const LENGTH: Sectors = Sectors(16 * 128);

    const DUMP: &str = r#"
        <superblock uuid="" time="1" transaction="7" flags="0" version="2" data_block_size="128" nr_data_blocks="8192">
          <device dev_id="3" mapped_blocks="5" transaction="6" creation_time="0" snap_time="1">
            <single_mapping origin_block="1" data_block="40" time="0"/>
            <range_mapping origin_begin="4" data_begin="50" length="4" time="1"/>
          </device>
        </superblock>"#;

    fn read(text: &str, mapped: u64) -> Result<Unwritten, String> {
        let mut dump = Dump::new(3, Sectors(128), LENGTH, REGION).unwrap();
        text.lines().for_each(|line| dump.line(line));
        dump.rest(Sectors(mapped))
    }

    #[test]
    fn what_a_dump_does_not_list_was_never_written() {
        let runs = [(0, 1), (2, 2), (8, 8)].map(|(first, count)| Run { first, count });
        assert_eq!(read(DUMP, 5 * 128).unwrap().runs(), runs);
    }

    #[test]
    fn shared_blocks_count_whoever_they_belong_to() {
        let shared = DUMP
            .replace(
                "<device",
                "<def name=\"a\">\n<range_mapping origin_begin=\"9\" \
            data_begin=\"9\" length=\"2\" time=\"0\"/>\n</def>\n<device",
            )
            .replace("<single", "<ref name=\"a\"/>\n<single");
        let runs = [(0, 1), (2, 2), (8, 1), (11, 5)].map(|(first, count)| Run { first, count });
        assert_eq!(read(&shared, 5 * 128).unwrap().runs(), runs);
    }

    #[test]
    fn a_dump_that_is_not_whole_or_does_not_agree_is_none() {
        assert!(read(DUMP, 6 * 128).is_err(), "the kernel knows of another block");
        let cut = DUMP.rsplit_once("</device>").unwrap().0;
        for wrong in [
            cut.to_owned(),
            String::new(),
            DUMP.replace("dev_id=\"3\"", "dev_id=\"4\""),
            DUMP.replace("length=\"4\"", "length=\"3\""),
            DUMP.replace("<single_mapping", "<unheard_of"),
            DUMP.replace("origin_block=\"1\"", "origin_block=\"x\""),
            format!("{DUMP}{DUMP}"),
        ] {
            assert!(read(&wrong, 5 * 128).is_err(), "{wrong}");
        }
    }

    #[test]
    fn tables_and_status_are_read_as_the_kernel_prints_them() {
        let pool = DevNo { major: 253, minor: 3 };
        assert_eq!(Thin::parse("thin", "253:3 7"), Some(Thin { pool, id: 7 }));
        assert_eq!(Thin::parse("thin", "253:3 7 253:9"), None, "an external origin");
        assert_eq!(Thin::parse("linear", "253:3 7"), None);
        let text = "253:1 253:2 128 0 1 error_if_no_space ";
        let metadata = DevNo { major: 253, minor: 1 };
        let wanted = Pool { metadata, block: Sectors(128), zeroes: true };
        assert_eq!(Pool::parse("thin-pool", text), Some(wanted));
        let lax = text.replace("1 error", "2 skip_block_zeroing error");
        assert_eq!(Pool::parse("thin-pool", &lax), Some(Pool { zeroes: false, ..wanted }));
        let status = "1 12/1024 512/16384 - rw no_discard_passdown error_if_no_space - 1024";
        assert_eq!(held_root(status), Some(None));
        assert_eq!(held_root(&status.replace("384 -", "384 77")), Some(Some(77)));
        assert_eq!(held_root("Fail"), None);
        assert_eq!(mapped("2048 4095"), Some(Sectors(2048)));
        assert_eq!(mapped("Fail"), None);
    }
}
