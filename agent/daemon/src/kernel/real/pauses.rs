//! How many sections there are in which consumers wait for this process.
//!
//! Whoever leaves in the middle of one leaves them waiting until the next process has
//! come. So a process that is asked to stop begins no other, and stays until the last
//! has ended, or for a bounded time.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::StepError;

#[derive(Debug, Default)]
struct Count {
    open: usize,
    closed: bool,
}

/// Those that are open.
#[derive(Debug, Default)]
pub(super) struct Pauses {
    count: Mutex<Count>,
    ended: Condvar,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct Pause<'a>(&'a Pauses);

impl Pauses {
    fn count(&self) -> MutexGuard<'_, Count> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins one.
    ///
    /// # Errors
    /// This process is about to leave.
    pub(super) fn begin(&self) -> Result<Pause<'_>, StepError> {
        let mut count = self.count();
        if count.closed {
            return Err(StepError::Refused("the agent is being stopped".to_owned()));
        }
        count.open += 1;
        Ok(Pause(self))
    }

    /// Lets no other begin, and waits for those that are open; returns whether they
    /// have ended.
    pub(super) fn close(&self, patience: Duration) -> bool {
        let mut count = self.count();
        count.closed = true;
        let waited = self.ended.wait_timeout_while(count, patience, |count| count.open > 0);
        let (count, _) = waited.unwrap_or_else(PoisonError::into_inner);
        count.open == 0
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.0.count().open -= 1;
        self.0.ended.notify_all();
    }
}

#[cfg(test)]
mod test {
    use std::thread;

    use super::*;

    #[test]
    fn whoever_stops_waits_for_the_last_pause_and_lets_none_begin() {
        let pauses = Pauses::default();
        let pause = pauses.begin().unwrap();
        assert!(!pauses.close(Duration::from_millis(10)), "one is open");
        assert!(pauses.begin().is_err());
        thread::scope(|scope| {
            let waiting = scope.spawn(|| pauses.close(Duration::from_secs(60)));
            thread::sleep(Duration::from_millis(10));
            assert!(!waiting.is_finished());
            drop(pause);
            assert!(waiting.join().unwrap());
        });
    }
}
