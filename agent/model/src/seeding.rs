//! What was never written need not be copied: a map of it, and the place that it
//! has in the journal.
//!
//! A thin pool knows which of a volume's blocks were ever written; all others read
//! zeros. Once the source is fenced, that is final. The destination's LV is new and
//! thin as well, so a region that was never written at the source reads the same
//! there, and is told to dm-clone as being here already.
//!
//! The map errs to one side only: what it does not name is copied. So it may leave
//! out what it likes, and does, to stay small.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{name::Generation, units::Sectors, volume::Record};

/// Most runs that a map names: 1 MiB in memory, less on the wire.
pub const MAX_RUNS: usize = 65_536;

/// Most regions of a map that is made: 16 MiB of bits. dm-clone allows 2^31.
const MAX_REGIONS: u64 = 1 << 27;

/// Whether a copy knows what need not be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seeding {
    /// The source has yet to be asked, or what it said to be done.
    #[default]
    Wanted,
    /// What was never written counts as being here.
    Done,
    /// There is no map, or it could not be used: everything is copied.
    Skipped,
}

/// What is known of the source's map at this moment; never journalled, because the
/// source can be asked again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SourceMap {
    /// It was not asked for.
    #[default]
    Unasked,
    /// It was.
    Asked,
    /// This is it.
    Known(Arc<AllocationMap>),
    /// There is none, or the source does not say.
    Missing,
}

/// Regions one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub first: u64,
    /// How many; at least one.
    pub count: u64,
}

/// Regions that were certainly never written: runs in order, which neither overlap
/// nor touch.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Unwritten(Vec<Run>);

impl fmt::Debug for Unwritten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} regions in {} runs", self.regions(), self.0.len())
    }
}

impl Unwritten {
    /// The runs, in order.
    pub fn runs(&self) -> &[Run] {
        &self.0
    }

    /// How many regions they have.
    pub fn regions(&self) -> u64 {
        self.0.iter().map(|run| run.count).sum()
    }

    /// As it travels: for each run the regions since the end of the last one, and its
    /// own.
    pub fn words(&self) -> Vec<u64> {
        let mut end = 0;
        let mut words = Vec::with_capacity(2 * self.0.len());
        for run in &self.0 {
            words.extend([run.first - end, run.count]);
            end = run.first + run.count;
        }
        words
    }

    /// Reads what travelled; none if it is malformed, too long, or names a region
    /// that is not whole.
    pub fn of_words(words: &[u64], length: Sectors, region: Sectors) -> Option<Self> {
        let (pairs, rest) = words.as_chunks::<2>();
        if !rest.is_empty() || pairs.len() > MAX_RUNS {
            return None;
        }
        let whole = length.0.checked_div(region.0)?;
        let mut end = 0_u64;
        let mut runs = Vec::with_capacity(pairs.len());
        for [gap, count] in pairs {
            if *count == 0 || (*gap == 0 && end > 0) {
                return None;
            }
            let first = end.checked_add(*gap)?;
            end = first.checked_add(*count)?;
            if end > whole {
                return None;
            }
            runs.push(Run { first, count: *count });
        }
        Some(Self(runs))
    }
}

/// Regions that were, or may have been, written.
#[derive(Debug)]
pub struct Written {
    bits: Vec<u64>,
    /// Regions that are whole; a short last one is never named.
    whole: u64,
    region: Sectors,
}

impl Written {
    /// Of a volume, nothing yet; none if it has more regions than are mapped.
    pub fn new(length: Sectors, region: Sectors) -> Option<Self> {
        let whole = length.0.checked_div(region.0).filter(|whole| *whole <= MAX_REGIONS)?;
        let words = usize::try_from(whole.div_ceil(64)).ok()?;
        Some(Self { bits: vec![0; words], whole, region })
    }

    /// Every region that is touched was written.
    pub fn add(&mut self, from: Sectors, length: Sectors) {
        if length.0 == 0 {
            return;
        }
        let last = from.0.saturating_add(length.0 - 1) / self.region.0;
        for region in from.0 / self.region.0..self.whole.min(last.saturating_add(1)) {
            if let Some(word) = usize::try_from(region / 64).ok().and_then(|i| self.bits.get_mut(i))
            {
                *word |= 1 << (region % 64);
            }
        }
    }

    fn runs(&self) -> impl Iterator<Item = Run> {
        let is_written = |region: &u64| {
            let word = usize::try_from(region / 64).ok().and_then(|index| self.bits.get(index));
            word.is_none_or(|word| word & (1 << (region % 64)) != 0)
        };
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = (at..self.whole).find(|region| !is_written(region))?;
            let end = (first..self.whole).find(is_written).unwrap_or(self.whole);
            at = end;
            Some(Run { first, count: end - first })
        })
    }

    /// Everything else; of very many runs only those of a certain length.
    pub fn rest(&self) -> Unwritten {
        // How many runs are at least that power of two long.
        let mut counts = [0_usize; 64];
        for run in self.runs() {
            let power = 63 - run.count.leading_zeros() as usize;
            counts[..=power].iter_mut().for_each(|count| *count += 1);
        }
        let shortest = counts.iter().position(|count| *count <= MAX_RUNS).unwrap_or(63);
        Unwritten(self.runs().filter(|run| run.count >> shortest > 0).collect())
    }
}

/// What a fenced source says of its copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllocationMap {
    /// The grant under which it was fenced; there is one fence for each.
    pub grant: Uuid,
    /// Which volume of its id.
    pub incarnation: Uuid,
    /// Generation of the source's copy.
    pub generation: Generation,
    /// Its size.
    pub length: Sectors,
    /// The size of a region.
    pub region: Sectors,
    /// What was never written.
    pub unwritten: Unwritten,
}

impl AllocationMap {
    /// Whether it is the map of what this copy is made from.
    pub fn is_of(&self, record: &Record) -> bool {
        record.receiving().is_some_and(|receiving| {
            self.grant == receiving.source.grant
                && self.generation == receiving.source.generation
                && self.incarnation == record.incarnation
                && self.length == receiving.length
                && self.region == receiving.region
        })
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    const REGION: Sectors = Sectors(128);

    #[test]
    fn what_touches_a_region_writes_all_of_it_and_a_short_one_is_never_named() {
        let mut written = Written::new(Sectors(8 * 128 + 8), REGION).unwrap();
        written.add(Sectors(2 * 128 + 127), Sectors(2));
        written.add(Sectors(5 * 128), Sectors(0));
        written.add(Sectors(6 * 128), Sectors(u64::MAX));
        let runs = [Run { first: 0, count: 2 }, Run { first: 4, count: 2 }];
        assert_eq!(written.rest().runs(), runs);
        assert!(Written::new(Sectors(1 << 50), REGION).is_none());
        assert!(Written::new(Sectors(1), Sectors(0)).is_none());
    }

    #[test]
    fn of_too_many_runs_the_short_ones_are_copied() {
        let regions = 3 * MAX_RUNS as u64;
        let mut written = Written::new(Sectors(regions * 128), REGION).unwrap();
        for region in (0..regions).filter(|region| region % 2 == 0 && *region > 99) {
            written.add(Sectors(region * 128), Sectors(1));
        }
        assert_eq!(written.rest().runs(), [Run { first: 0, count: 100 }]);
    }

    #[test]
    fn what_was_never_sent_this_way_is_no_map() {
        let read = |words: &[u64]| Unwritten::of_words(words, Sectors(4 * 128 + 8), REGION);
        assert_eq!(read(&[0, 1, 2, 1]).unwrap().regions(), 2);
        assert_eq!(read(&[]).unwrap(), Unwritten::default());
        for wrong in [&[1][..], &[0, 0], &[0, 1, 0, 1], &[4, 1], &[0, 5], &[1, u64::MAX]] {
            assert_eq!(read(wrong), None, "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn a_map_survives_its_words(
            touched in proptest::collection::vec((0_u64..3000, 1_u64..400), 0..20),
            length in 1_u64..20_000
        ) {
            let mut written = Written::new(Sectors(length), REGION).unwrap();
            for (from, count) in &touched {
                written.add(Sectors(*from), Sectors(*count));
            }
            let rest = written.rest();
            let again = Unwritten::of_words(&rest.words(), Sectors(length), REGION);
            prop_assert_eq!(again.as_ref(), Some(&rest));
            // Sector by sector: named, or touched by something, or in a short region.
            for sector in 0..length {
                let region = sector / 128;
                let named = rest.runs().iter().any(|r| (r.first..r.first + r.count).contains(&region));
                let hit = touched.iter().any(|(from, count)| {
                    from / 128 <= region && region <= (from + count - 1) / 128
                });
                prop_assert_eq!(named, !hit && (region + 1) * 128 <= length);
            }
        }
    }
}
