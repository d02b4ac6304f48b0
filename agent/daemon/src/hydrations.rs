//! What the copies of a node share: how many run at once, and how many bytes a second
//! they may copy together. None of it is journalled; each look makes it anew.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use dmlocal_model::schedule::{self, Candidate, Limits, Place};

use crate::{config, reconcile::Copy};

/// What unused time earns at most: a pause is no reason for a rush.
const BURST: Duration = Duration::from_secs(1);

/// The copies of a node.
#[derive(Debug)]
pub struct Hydrations {
    limits: Limits,
    /// Bytes per second of all together; 0 is no limit.
    rate: u64,
    /// The share of the time that consumers may wait for pushes, in percent; 0 is none.
    push_percent: u32,
    shared: Mutex<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    candidates: BTreeMap<Copy, Candidate>,
    purse: Option<Purse>,
}

/// Bytes that may still be copied; below zero after more was.
#[derive(Debug, Clone, Copy)]
struct Purse {
    bytes: i64,
    at: Instant,
}

impl Hydrations {
    /// Nothing is copied yet.
    pub fn new(config: &config::Hydration) -> Self {
        let limits = Limits { at_once: config.at_once, per_source: config.per_source };
        let (rate, push_percent) = (config.rate_bytes_per_s, config.push_percent);
        Self { limits, rate, push_percent, shared: Mutex::default() }
    }

    /// The share of the time that consumers may wait for pushes, in percent; 0 is none.
    pub const fn push_percent(&self) -> u32 {
        self.push_percent
    }

    /// Notes that a copy could run, or could not, and what it has copied since the
    /// last time; tells it its place.
    pub fn place(
        &self,
        copy: Copy,
        candidate: Option<Candidate>,
        copied: u64,
        now: Instant,
    ) -> Option<Place> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.spend(self.rate, copied, now);
        match candidate {
            Some(candidate) => shared.candidates.insert(copy, candidate),
            None => shared.candidates.remove(&copy),
        };
        schedule::places(&shared.candidates, self.limits).remove(&copy)
    }

    /// Whether the node's byte rate is used up.
    pub fn is_spent(&self) -> bool {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        self.rate > 0 && shared.purse.is_some_and(|purse| purse.bytes < 0)
    }
}

impl Shared {
    fn spend(&mut self, rate: u64, copied: u64, now: Instant) {
        let signed = |bytes: u128| i64::try_from(bytes).unwrap_or(i64::MAX);
        let full = signed(u128::from(rate) * BURST.as_millis() / 1000);
        let purse = self.purse.get_or_insert(Purse { bytes: full, at: now });
        let elapsed = now.saturating_duration_since(purse.at).as_millis();
        let earned = signed(u128::from(rate) * elapsed / 1000);
        // What is too short to earn a byte is not lost.
        if earned > 0 || rate == 0 {
            purse.at = purse.at.max(now);
        }
        purse.bytes = purse.bytes.saturating_add(earned).min(full);
        // What guests rewrote counts as well, and must not stop everybody for long.
        purse.bytes = purse.bytes.saturating_sub(signed(u128::from(copied))).max(-full);
    }
}

#[cfg(test)]
mod test {
    use dmlocal_model::name::{Generation, VolumeId};
    use uuid::Uuid;

    use super::*;

    fn copy(number: u128) -> Copy {
        (VolumeId::new(Uuid::from_u128(number)), Generation(2))
    }

    fn candidate(turn: u64) -> Option<Candidate> {
        Some(Candidate { source: "a".to_owned(), priority: 0, passes: 0, turn })
    }

    #[test]
    fn who_can_not_run_gives_its_place_to_the_next() {
        let config = config::Hydration { at_once: 1, ..config::Hydration::default() };
        let (all, now) = (Hydrations::new(&config), Instant::now());
        assert_eq!(all.place(copy(1), candidate(1), 0, now), Some(Place::Runs));
        assert_eq!(all.place(copy(2), candidate(2), 0, now), Some(Place::Waits { before: 1 }));
        assert_eq!(all.place(copy(1), None, 0, now), None);
        assert_eq!(all.place(copy(2), candidate(2), 0, now), Some(Place::Runs));
        // It comes back to where it was.
        assert_eq!(all.place(copy(1), candidate(1), 0, now), Some(Place::Runs));
        assert_eq!(all.place(copy(2), candidate(2), 0, now), Some(Place::Waits { before: 1 }));
    }

    #[test]
    fn all_together_copy_no_faster_than_the_node_may() {
        let config = config::Hydration { rate_bytes_per_s: 1000, ..config::Hydration::default() };
        let (all, start) = (Hydrations::new(&config), Instant::now());
        let mut copied = 0;
        for look in 1..=1000u64 {
            let now = start + Duration::from_millis(10 * look);
            let one = copy(u128::from(look % 3));
            let amount = if all.is_spent() { 0 } else { 70 };
            copied += amount;
            all.place(one, candidate(look % 3), amount, now);
        }
        // Ten seconds, and what was there in the beginning.
        assert!((10_000..11_200).contains(&copied), "{copied}");
    }

    #[test]
    fn a_long_pause_earns_a_second_and_no_more() {
        let config = config::Hydration { rate_bytes_per_s: 1000, ..config::Hydration::default() };
        let (all, start) = (Hydrations::new(&config), Instant::now());
        all.place(copy(1), candidate(1), 0, start);
        let later = start + Duration::from_secs(3600);
        all.place(copy(1), candidate(1), 1000, later);
        assert!(!all.is_spent());
        all.place(copy(1), candidate(1), 1, later);
        assert!(all.is_spent());
    }
}
