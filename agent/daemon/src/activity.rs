//! Whether a guest still writes at a source whose fence is asked for.
//!
//! A destination asks for the fence when a write waits in its held handle. Mostly that
//! is the guest's first one after its migration; but whatever opens the device there
//! can write or flush, while the guest is still at the source and would be cut off. A
//! guest that has been migrated was stopped at the source before it ran at the
//! destination, and writes nothing at the source any more; one that runs mostly does.
//!
//! So a source notes, while it is offered to a destination that holds, when its handle
//! was last seen to be written. A fence needs a short time without any write: mostly
//! it has passed before the fence is asked for, and costs nothing. A source that has
//! refused once knows that a guest is there, and needs a long one: an idle system still
//! writes every few seconds. Nobody waits for that time, because a guest that leaves
//! closes the handle. What this cannot see is a guest that writes less often than that; nothing is lost by it, because nothing that such a guest
//! writes is acknowledged after the fence.

use std::time::{Duration, Instant};

use crate::kernel::Written;

/// How often a source that is offered with a hold is looked at.
pub const LOOK: Duration = Duration::from_millis(25);

/// How often, while a fence waits for the answer.
pub const CLOSE_LOOK: Duration = Duration::from_millis(5);

/// How long nothing must have been written before a fence.
const QUIET: Duration = Duration::from_millis(100);

/// How long after a refusal: Linux writes back every 5 s (`dirty_writeback_centisecs`),
/// ext4 commits every 5 s.
const QUIET_AGAIN: Duration = Duration::from_secs(10);

/// When a handle was last seen to be written.
#[derive(Debug, Default)]
pub struct Activity {
    last: Option<(Written, Instant)>,
    refused: bool,
}

/// What the looks so far say of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing was written for long enough.
    Quiet,
    /// Nothing was written since the question; not for long enough yet.
    Wait,
    /// It writes.
    Writing,
}

impl Activity {
    /// Takes a look into account.
    pub fn saw(&mut self, written: Written, now: Instant) {
        let same = self.last.as_ref().is_some_and(|(last, _)| *last == written);
        if !same || written.under_way > 0 {
            self.last = Some((written, now));
        }
    }

    /// Whether the fence that was asked for at that time may be.
    pub fn verdict(&mut self, asked: Instant, now: Instant) -> Verdict {
        let Some((_, since)) = self.last else { return Verdict::Wait };
        let needed = if self.refused { QUIET_AGAIN } else { QUIET };
        if now.saturating_duration_since(since) >= needed {
            return Verdict::Quiet;
        }
        if self.refused || since > asked {
            self.refused = true;
            return Verdict::Writing;
        }
        Verdict::Wait
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const IDLE: Written = Written { done: 7, under_way: 0 };

    fn after(begin: Instant, ms: u64) -> Instant {
        begin + Duration::from_millis(ms)
    }

    #[test]
    fn a_guest_that_has_been_away_for_a_while_costs_the_fence_nothing() {
        let (mut activity, begin) = (Activity::default(), Instant::now());
        activity.saw(IDLE, begin);
        activity.saw(IDLE, after(begin, 110));
        assert_eq!(activity.verdict(after(begin, 110), after(begin, 110)), Verdict::Quiet);
    }

    #[test]
    fn a_guest_that_has_just_written_may_have_left_since() {
        let (mut activity, begin) = (Activity::default(), Instant::now());
        activity.saw(IDLE, begin);
        let asked = after(begin, 100);
        activity.saw(Written { done: 8, ..IDLE }, asked);
        assert_eq!(activity.verdict(asked, asked), Verdict::Wait);
        activity.saw(Written { done: 8, ..IDLE }, after(begin, 199));
        assert_eq!(activity.verdict(asked, after(begin, 199)), Verdict::Wait);
        assert_eq!(activity.verdict(asked, after(begin, 200)), Verdict::Quiet);
    }

    #[test]
    fn a_guest_that_writes_after_the_question_has_not_left() {
        let (mut activity, begin) = (Activity::default(), Instant::now());
        activity.saw(IDLE, begin);
        activity.saw(Written { done: 8, ..IDLE }, after(begin, 5));
        assert_eq!(activity.verdict(begin, after(begin, 5)), Verdict::Writing);
        // The next question needs a longer rest, and is answered at once.
        let asked = after(begin, 9_900);
        assert_eq!(activity.verdict(asked, asked), Verdict::Writing);
        let asked = after(begin, 10_010);
        assert_eq!(activity.verdict(asked, asked), Verdict::Quiet);
    }

    #[test]
    fn a_write_that_is_under_way_counts_as_long_as_it_takes() {
        let (mut activity, begin) = (Activity::default(), Instant::now());
        let stuck = Written { done: 7, under_way: 1 };
        activity.saw(stuck, begin);
        activity.saw(stuck, after(begin, 60));
        assert_eq!(activity.verdict(begin, after(begin, 60)), Verdict::Writing);
    }

    #[test]
    fn a_source_that_was_never_looked_at_proves_nothing() {
        let begin = Instant::now();
        assert_eq!(Activity::default().verdict(begin, after(begin, 60)), Verdict::Wait);
    }
}
