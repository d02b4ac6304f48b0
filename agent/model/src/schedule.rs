//! Which copies may run now, when not all may: at most so many on a node, and at most
//! so many from one source. Pure, and asked anew at each look.
//!
//! Higher priorities come first; among equals those that have passed on their turn less
//! often, because nothing was copied in it; then the one whose source was fenced first.
//! Nobody is overtaken by an equal that gets on, so everybody's turn comes. A copy whose source is
//! busy keeps no copy from another source waiting.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

/// Lowest and highest priority of a copy; 0 is that of everybody who is not given one.
pub const PRIORITIES: std::ops::RangeInclusive<i32> = -100..=100;

/// How many copies may run at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// On this node.
    pub at_once: usize,
    /// From one source.
    pub per_source: usize,
}

/// A copy that could run. One that is paused, stalled or resting is none, and takes no
/// place from anybody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The node that it copies from.
    pub source: String,
    /// Higher ones come first; in [`PRIORITIES`].
    pub priority: i32,
    /// How often it had its turn and nothing was copied; lower ones come first.
    pub passes: u32,
    /// Lower ones come first among equals.
    pub turn: u64,
}

/// What a copy is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Copy.
    Runs,
    /// Wait for its turn.
    Waits {
        /// So many others are before it.
        before: usize,
    },
}

/// The place of each candidate.
pub fn places<K: Ord + Clone>(
    candidates: &BTreeMap<K, Candidate>,
    limits: Limits,
) -> BTreeMap<K, Place> {
    let mut order: Vec<(&K, &Candidate)> = candidates.iter().collect();
    order.sort_by_key(|(key, one)| (Reverse(one.priority), one.passes, one.turn, *key));
    let mut running: Vec<&str> = Vec::new();
    let mut places = BTreeMap::new();
    for (before, (key, candidate)) in order.iter().enumerate() {
        let source = candidate.source.as_str();
        let from_there = running.iter().filter(|running| **running == source).count();
        let place = if running.len() >= limits.at_once {
            Place::Waits { before }
        } else if from_there >= limits.per_source {
            let rivals = order[..before].iter().filter(|(_, other)| other.source == source);
            Place::Waits { before: rivals.count() }
        } else {
            running.push(source);
            Place::Runs
        };
        places.insert((*key).clone(), place);
    }
    places
}

/// The turn of a copy whose source has just been fenced: after all others.
pub fn next_turn(turns: impl IntoIterator<Item = u64>) -> u64 {
    let last: BTreeSet<u64> = turns.into_iter().collect();
    last.last().map_or(1, |last| last.saturating_add(1))
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    fn any_candidates() -> impl Strategy<Value = BTreeMap<u32, Candidate>> {
        let one =
            (0u8..3, -2i32..3, 0u32..2, 0u64..6).prop_map(|(source, priority, passes, turn)| {
                Candidate { source: format!("n{source}"), priority, passes, turn }
            });
        proptest::collection::btree_map(0u32..100, one, 0..12)
    }

    fn any_limits() -> impl Strategy<Value = Limits> {
        (1usize..5, 1usize..4).prop_map(|(at_once, per_source)| Limits { at_once, per_source })
    }

    /// Whether the first comes before the second, whoever is who.
    fn precedes(first: &Candidate, second: &Candidate) -> bool {
        let key = |one: &Candidate| (Reverse(one.priority), one.passes, one.turn);
        key(first) < key(second)
    }

    proptest! {
        #[test]
        fn no_limit_is_exceeded_and_no_place_is_left_empty(
            candidates in any_candidates(), limits in any_limits()
        ) {
            let places = places(&candidates, limits);
            prop_assert_eq!(places.len(), candidates.len());
            let runs = |key: &u32| places[key] == Place::Runs;
            let from = |source: &str| {
                candidates.iter().filter(|(k, c)| runs(k) && c.source == source).count()
            };
            let all = candidates.keys().filter(|key| runs(key)).count();
            prop_assert!(all <= limits.at_once);
            for (key, candidate) in &candidates {
                prop_assert!(from(&candidate.source) <= limits.per_source);
                if !runs(key) {
                    let full = all == limits.at_once;
                    prop_assert!(full || from(&candidate.source) == limits.per_source);
                }
            }
        }

        #[test]
        fn nobody_runs_before_a_better_one_from_the_same_source(
            candidates in any_candidates(), limits in any_limits()
        ) {
            let places = places(&candidates, limits);
            for (waiting, one) in candidates.iter().filter(|(k, _)| places[k] != Place::Runs) {
                for (running, other) in candidates.iter().filter(|(k, _)| places[k] == Place::Runs) {
                    let overtaken = one.source == other.source && precedes(one, other);
                    prop_assert!(!overtaken, "{waiting} waits for {running}");
                }
            }
        }

        #[test]
        fn everybody_among_equals_runs_once_those_before_it_are_done(
            mut candidates in any_candidates(), limits in any_limits()
        ) {
            candidates.values_mut().for_each(|one| (one.priority, one.passes) = (0, 0));
            let mut done = BTreeSet::new();
            // Whoever runs ends at some time, and somebody new always comes behind.
            let all: BTreeSet<u32> = candidates.keys().copied().collect();
            for round in 0..all.len() {
                let places = places(&candidates, limits);
                let ended = candidates.keys().find(|key| places[key] == Place::Runs).copied();
                let Some(ended) = ended else { break };
                done.insert(ended);
                candidates.remove(&ended);
                let source = format!("n{}", round % 3);
                let turn = next_turn(candidates.values().map(|candidate| candidate.turn));
                let fresh = 1000 + u32::try_from(round).unwrap();
                candidates.insert(fresh, Candidate { source, priority: 0, passes: 0, turn: turn.max(6) });
                let first = all.difference(&done).min_by_key(|key| (candidates[key].turn, **key));
                if let Some(first) = first {
                    let places = super::places(&candidates, limits);
                    prop_assert_eq!(places[first], Place::Runs, "the oldest waits");
                }
            }
        }
    }

    #[test]
    fn who_waits_is_told_for_how_many() {
        let candidate = |source: &str, priority, turn| Candidate {
            source: source.to_owned(),
            priority,
            passes: 0,
            turn,
        };
        let candidates = BTreeMap::from([
            ("old", candidate("a", 0, 1)),
            ("older", candidate("a", 0, 0)),
            ("urgent", candidate("b", 5, 9)),
            ("late", candidate("b", -1, 2)),
        ]);
        let places = places(&candidates, Limits { at_once: 3, per_source: 1 });
        assert_eq!(places["urgent"], Place::Runs);
        assert_eq!(places["older"], Place::Runs);
        assert_eq!(places["old"], Place::Waits { before: 1 }, "its source is busy");
        assert_eq!(places["late"], Place::Waits { before: 1 }, "so is this one's");
        let places = super::places(&candidates, Limits { at_once: 1, per_source: 1 });
        assert_eq!(places["late"], Place::Waits { before: 3 });
        // One that did not get on in its turn lets the others go first, for a round.
        let mut candidates = candidates;
        candidates.get_mut("older").unwrap().passes = 1;
        let places = super::places(&candidates, Limits { at_once: 3, per_source: 1 });
        assert_eq!((places["old"], places["urgent"]), (Place::Runs, Place::Runs));
        candidates.get_mut("old").unwrap().passes = 1;
        let places = super::places(&candidates, Limits { at_once: 3, per_source: 1 });
        assert_eq!(places["older"], Place::Runs);
    }
}
