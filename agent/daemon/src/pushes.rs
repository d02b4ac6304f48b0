//! When a copy gets a push that its consumers keep from going on.
//!
//! A copy that goes on has always something on its way. One at which several looks in a
//! row find nothing, although it may copy, is starved; from then on it is looked at more
//! often, and pushed whenever nothing is on its way. First it is to find a gap by itself,
//! which costs consumers nothing. Where there is none they wait, for a share of the time
//! that is never exceeded.

use std::time::{Duration, Instant};

use dmlocal_model::plan::Push;

/// Looks in a row that find nothing before a copy counts as starved, and that find
/// something before it does not any more.
const STARVED: u32 = 2;
const WELL: u32 = 8;

/// How often a starved copy is looked at.
pub const LOOK: Duration = Duration::from_millis(if cfg!(test) { 2 } else { 35 });

/// How long a gap is looked for.
pub const GAP: Duration = Duration::from_millis(10);

/// What is known of one copy.
#[derive(Debug, Default)]
pub struct Pushes {
    /// Looks in a row that found nothing.
    idle: u32,
    /// Looks in a row that found something, while it is starved.
    well: u32,
    starved: bool,
    /// No push before this.
    not_before: Option<Instant>,
    /// Consumers wait for none before this.
    no_wait_before: Option<Instant>,
}

impl Pushes {
    /// Takes a look into account: whether something was on its way, and whether
    /// something should be.
    pub fn observe(&mut self, may_copy: bool, copies: bool) {
        if !may_copy {
            *self = Self { no_wait_before: self.no_wait_before, ..Self::default() };
        } else if copies {
            self.idle = 0;
            self.well += 1;
            if self.well >= WELL {
                self.starved = false;
            }
        } else {
            self.well = 0;
            self.idle += 1;
            if self.idle >= STARVED {
                self.starved = true;
            }
        }
    }

    /// Whether consumers keep it from going on.
    pub const fn is_starved(&self) -> bool {
        self.starved
    }

    /// What push it is time for, if consumers may wait for that share of the time, in
    /// percent.
    pub fn due(&self, now: Instant, percent: u32) -> Option<Push> {
        let over = |then: Option<Instant>| then.is_none_or(|then| then <= now);
        let due = self.starved && self.idle > 0 && over(self.not_before);
        let may_wait = percent > 0 && over(self.no_wait_before);
        due.then_some(if may_wait { Push::Drain } else { Push::Gap })
    }

    /// A push has taken so long. Consumers have waited for what came after the look for a
    /// gap; of the time until they do so again it is at most that share, in percent.
    pub fn pushed(&mut self, how: Push, took: Duration, percent: u32, now: Instant) {
        self.idle = 0;
        self.not_before = Some(now + LOOK);
        if how == Push::Drain {
            let waited = took.saturating_sub(GAP);
            self.no_wait_before = Some(now + waited * 100 / percent.max(1));
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_copy_that_goes_on_gets_no_push() {
        let (mut pushes, now) = (Pushes::default(), Instant::now());
        for look in 0..100 {
            pushes.observe(true, look % 2 == 0);
            assert_eq!(pushes.due(now, 5), None, "one look that finds nothing is no hunger");
        }
        pushes.observe(false, false);
        pushes.observe(false, false);
        pushes.observe(true, false);
        assert_eq!(pushes.due(now, 5), None, "it was not to copy before");
    }

    #[test]
    fn a_starved_copy_is_pushed_for_its_share_of_the_time_and_no_more() {
        let (mut pushes, start) = (Pushes::default(), Instant::now());
        let (mut waited, mut count) = (Duration::ZERO, 0);
        let mut now = start;
        while now < start + 10_000 * MS {
            pushes.observe(true, false);
            if let Some(how) = pushes.due(now, 10) {
                let wait = if how == Push::Drain { 20 * MS } else { Duration::ZERO };
                (waited, count) = (waited + wait, count + 1);
                now += GAP + wait;
                pushes.pushed(how, GAP + wait, 10, now);
            }
            now += 5 * MS;
        }
        assert!(waited > 800 * MS && waited <= 1020 * MS, "{waited:?}");
        assert!(count >= 500, "{count} pushes");
        pushes.observe(true, false);
        pushes.observe(true, false);
        assert_eq!(pushes.due(now + 10_000 * MS, 0), Some(Push::Gap), "nobody is to wait");
    }

    #[test]
    fn one_that_goes_on_by_itself_is_left_alone_again() {
        let mut pushes = Pushes::default();
        pushes.observe(true, false);
        pushes.observe(true, false);
        assert!(pushes.is_starved());
        for _ in 0..WELL {
            assert!(pushes.is_starved());
            pushes.observe(true, true);
        }
        assert!(!pushes.is_starved());
    }
}
