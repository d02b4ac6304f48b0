//! Blocking calls with a deadline.
//!
//! The kernel gives up what it can when a signal arrives; nothing else makes it.

use std::{
    io,
    os::unix::thread::JoinHandleExt as _,
    sync::{
        Arc, Mutex, Once, PoisonError,
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::{
    pthread::pthread_kill,
    signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
};

/// How long an interrupted call may still take before it is left alone.
const PATIENCE: Duration = Duration::from_secs(10);

/// The first pause between two signals; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Runs a blocking call on a thread of its own and interrupts it by a signal at
/// the deadline, again and again until it returns.
///
/// A call that even then does not return for [`PATIENCE`] is left alone;
/// when it ends after all, `late` gets its result, to undo what nobody expects.
///
/// # Errors
/// The call's own, and [`io::ErrorKind::TimedOut`] if it was interrupted or left.
pub(crate) fn interruptible<T: Send + 'static>(
    deadline: Duration,
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
    late: impl FnOnce(io::Result<T>) + Send + 'static,
) -> io::Result<T> {
    catch_interrupts()?;
    let (sender, receiver) = channel();
    // Whether the caller has gone; decided under the lock, so that a result goes
    // either to the caller or to `late`.
    let left = Arc::new(Mutex::new(false));
    let abandoned = Arc::clone(&left);
    let thread = thread::Builder::new().name("interruptible".to_owned()).spawn(move || {
        // Only our signal may end the call early, and it must be able to.
        let mut others = SigSet::all();
        others.remove(INTERRUPT);
        let masked = others.thread_set_mask();
        let result = match masked {
            Ok(()) => call(),
            Err(errno) => Err(errno.into()),
        };
        let abandoned = abandoned.lock().unwrap_or_else(PoisonError::into_inner);
        if *abandoned {
            drop(abandoned);
            late(result);
        } else {
            // The caller has not left, so it still listens.
            let _ = sender.send(result);
        }
    })?;

    match receiver.recv_timeout(deadline) {
        Ok(result) => return result,
        Err(RecvTimeoutError::Disconnected) => return Err(io::Error::other("the call panicked")),
        Err(RecvTimeoutError::Timeout) => {}
    }
    let end = Instant::now() + PATIENCE;
    let mut pause = FIRST_PAUSE;
    while Instant::now() < end {
        // The thread is not joined, so its id is still its own.
        pthread_kill(thread.as_pthread_t(), INTERRUPT)?;
        match receiver.recv_timeout(pause) {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("interrupted after {deadline:?}"),
                ));
            }
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(io::Error::other("the call panicked"));
            }
            Err(RecvTimeoutError::Timeout) => pause = (pause * 2).min(LONGEST_PAUSE),
        }
    }
    let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
    if let Ok(result) = receiver.try_recv() {
        return result;
    }
    *left = true;
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        format!("neither ended within {deadline:?} nor could be interrupted; it goes on"),
    ))
}

/// The signal that interrupts a call; its handler does nothing.
const INTERRUPT: Signal = Signal::SIGUSR1;

extern "C" fn ignore(_: libc::c_int) {}

fn catch_interrupts() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        // No SA_RESTART: a system call that the signal interrupts must return.
        let action = SigAction::new(SigHandler::Handler(ignore), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, so it is async-signal-safe, and it
        // replaces the default action, which would end the process.
        result = unsafe { sigaction(INTERRUPT, &action) }.map(drop);
    });
    Ok(result?)
}

#[cfg(test)]
mod test {
    use std::os::unix::net::UnixStream;

    use nix::errno::Errno;

    use super::*;

    #[test]
    fn a_call_that_ends_in_time_returns_its_result() {
        let long = Duration::from_secs(20);
        assert_eq!(interruptible(long, || Ok(7), |_| {}).unwrap(), 7);
        let failed = interruptible(long, || Err::<(), _>(Errno::ENOSPC.into()), |_| {});
        assert_eq!(failed.unwrap_err().raw_os_error(), Some(Errno::ENOSPC as i32));
    }

    #[test]
    fn a_stuck_call_is_interrupted_at_the_deadline() {
        let (reader, _writer) = UnixStream::pair().unwrap();
        let before = Instant::now();
        let result = interruptible(
            Duration::from_millis(100),
            move || {
                // std's read retries; this is one system call.
                nix::unistd::read(&reader, &mut [0]).map_err(io::Error::from)
            },
            |_| {},
        );
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let took = before.elapsed();
        assert!(took >= Duration::from_millis(100) && took < Duration::from_secs(5), "{took:?}");
    }
}
