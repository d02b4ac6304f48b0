//! Starting processes: the only place of the daemon that does.
//!
//! A process gets `PATH`, `LC_ALL=C`, a process group of its own and a deadline.
//! No shell is ever involved, so an argument is an argument whatever it holds.
//! Everything here blocks: async callers use `spawn_blocking`.

use std::{
    ffi::OsString,
    fmt,
    io::{self, Read, Write},
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel, sync_channel},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

/// How long a process that was asked to end (SIGTERM) may take before it is
/// killed. lvm2 ends at a point where its metadata is whole.
const GRACE: Duration = Duration::from_secs(2);

/// How often the child is looked at while a descendant of it holds its pipes.
const POLL: Duration = Duration::from_millis(20);

/// Chunks of output that wait to be taken, each of up to 8 KiB.
const CHUNKS: usize = 64;

/// Where a line without an end is cut.
const LONGEST_LINE: usize = 64 << 10;

/// How much of stderr an error carries.
const TAIL: usize = 2048;

/// A process that did not do what it was started for.
#[derive(Debug, thiserror::Error)]
#[error("`{command}` {failure}{}", Stderr(.stderr))]
pub struct ExecError {
    /// Program and arguments, for people.
    pub command: String,
    /// What went wrong.
    pub failure: Failure,
    /// The end of what it said.
    pub stderr: String,
}

/// How a process failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It could not be started or talked to.
    #[error("could not be run: {0}")]
    Start(io::Error),
    /// It ended with another status than 0.
    #[error("failed ({0})")]
    Status(ExitStatus),
    /// It was killed because its time was over.
    #[error("did not end within {0:?} and was killed")]
    Deadline(Duration),
    /// Its output is not UTF-8.
    #[error("wrote something that is not UTF-8")]
    NotText,
}

impl ExecError {
    /// The exit status, if the process ended by itself.
    #[cfg(test)]
    pub fn code(&self) -> Option<i32> {
        match &self.failure {
            Failure::Status(status) => status.code(),
            Failure::Start(_) | Failure::Deadline(_) | Failure::NotText => None,
        }
    }
}

struct Stderr<'a>(&'a str);

impl fmt::Display for Stderr<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.trim() {
            "" => Ok(()),
            text => write!(f, ": {}", text.replace('\n', "; ")),
        }
    }
}

/// Runs a program to its end and returns what it wrote to stdout.
///
/// # Errors
/// Any exit status but 0, and a process that is still running at the deadline:
/// its whole process group is then asked to end and, two seconds later, killed.
pub fn run(
    program: &str,
    args: &[&str],
    stdin: Option<&str>,
    deadline: Duration,
) -> Result<String, ExecError> {
    run_both(program, args, stdin, deadline).map(|(stdout, _)| stdout)
}

/// Like [`run`]; returns stdout and stderr, for programs that go on after an
/// error.
pub fn run_both(
    program: &str,
    args: &[&str],
    stdin: Option<&str>,
    deadline: Duration,
) -> Result<(String, String), ExecError> {
    let fail = |failure, stderr: &[u8]| ExecError {
        command: shown(program, args),
        failure,
        stderr: tail(stderr),
    };
    let mut child = Command::new(program)
        .args(args)
        .env_clear()
        .env("LC_ALL", "C")
        .env("PATH", path())
        .current_dir("/")
        .process_group(0)
        .stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| fail(Failure::Start(error), b""))?;

    if let (Some(mut pipe), Some(text)) = (child.stdin.take(), stdin) {
        let text = text.to_owned();
        // A child that ends without reading makes this fail with EPIPE, and then
        // its status tells more than the error would.
        thread::spawn(move || pipe.write_all(text.as_bytes()));
    }
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());

    let ended = wait(&mut child, deadline);
    let (stdout, stderr) = (collected(&stdout), collected(&stderr));
    match ended {
        Err(error) => Err(fail(Failure::Start(error), &stderr)),
        Ok(None) => Err(fail(Failure::Deadline(deadline), &stderr)),
        Ok(Some(status)) if !status.success() => Err(fail(Failure::Status(status), &stderr)),
        Ok(Some(_)) => {
            let text = String::from_utf8_lossy(&stderr).into_owned();
            match String::from_utf8(stdout) {
                Ok(stdout) => Ok((stdout, text)),
                Err(_) => Err(fail(Failure::NotText, &stderr)),
            }
        }
    }
}

/// Runs a program to its end and hands every line of its stdout to `take`, for more
/// than fits into memory.
///
/// # Errors
/// As [`run`]; what was handed over until then counts for nothing.
pub fn run_lines(
    program: &str,
    args: &[&str],
    deadline: Duration,
    mut take: impl FnMut(&str),
) -> Result<(), ExecError> {
    let fail = |failure, stderr: &[u8]| ExecError {
        command: shown(program, args),
        failure,
        stderr: tail(stderr),
    };
    let mut child = Command::new(program)
        .args(args)
        .env_clear()
        .env("LC_ALL", "C")
        .env("PATH", path())
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| fail(Failure::Start(error), b""))?;
    let end = Instant::now() + deadline;
    let stdout = drain_within(child.stdout.take(), CHUNKS);
    let stderr = drain(child.stderr.take());
    let mut line = Vec::new();
    let mut is_text = true;
    let mut whole = |line: &mut Vec<u8>| {
        match std::str::from_utf8(line) {
            Ok(text) => take(text),
            Err(_) => is_text = false,
        }
        line.clear();
    };
    // Until the pipe is closed or the time is over, also for who is never out of words:
    // what is there already is received however little time is left.
    let mut is_late = false;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let chunk = match stdout.recv_timeout(left) {
            Ok(chunk) if !left.is_zero() => chunk,
            Err(RecvTimeoutError::Disconnected) => break,
            Ok(_) | Err(RecvTimeoutError::Timeout) => {
                is_late = true;
                break;
            }
        };
        for piece in chunk.split_inclusive(|byte| *byte == b'\n') {
            line.extend_from_slice(piece);
            if line.last() == Some(&b'\n') || line.len() > LONGEST_LINE {
                whole(&mut line);
            }
        }
    }
    if !line.is_empty() {
        whole(&mut line);
    }
    // Who still writes must not wait for a reader that has left.
    drop(stdout);
    let ended = wait(&mut child, end.saturating_duration_since(Instant::now()));
    let stderr = collected(&stderr);
    match ended {
        Err(error) => Err(fail(Failure::Start(error), &stderr)),
        Ok(None) => Err(fail(Failure::Deadline(deadline), &stderr)),
        // It ended well, and not all of it was heard.
        Ok(Some(_)) if is_late => Err(fail(Failure::Deadline(deadline), &stderr)),
        Ok(Some(status)) if !status.success() => Err(fail(Failure::Status(status), &stderr)),
        Ok(Some(_)) if !is_text => Err(fail(Failure::NotText, &stderr)),
        Ok(Some(_)) => Ok(()),
    }
}

fn path() -> OsString {
    std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into())
}

fn shown(program: &str, args: &[&str]) -> String {
    let mut text = program.to_owned();
    for arg in args {
        text.push(' ');
        text.push_str(arg);
    }
    text
}

fn tail(bytes: &[u8]) -> String {
    let start = bytes.len().saturating_sub(TAIL);
    String::from_utf8_lossy(&bytes[start..]).trim().to_owned()
}

/// Reads a pipe to its end on a thread of its own; chunks arrive as they come, so
/// that what was said before a kill is not lost.
fn drain(pipe: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    pump(pipe, move |chunk| sender.send(chunk).is_ok());
    receiver
}

/// The same, with at most so many chunks on the way.
fn drain_within(pipe: Option<impl Read + Send + 'static>, chunks: usize) -> Receiver<Vec<u8>> {
    let (sender, receiver) = sync_channel(chunks);
    pump(pipe, move |chunk| sender.send(chunk).is_ok());
    receiver
}

fn pump(
    pipe: Option<impl Read + Send + 'static>,
    mut send: impl FnMut(Vec<u8>) -> bool + Send + 'static,
) {
    if let Some(mut pipe) = pipe {
        thread::spawn(move || {
            let mut buffer = [0; 8192];
            while let Ok(read @ 1..) = pipe.read(&mut buffer) {
                if !send(buffer[..read].to_vec()) {
                    return;
                }
            }
        });
    }
}

/// What a pipe said. The child is gone: what it wrote is in the pipe, and only a
/// descendant that outlived it can keep the pipe open, for which nobody waits.
fn collected(receiver: &Receiver<Vec<u8>>) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        match receiver.recv_timeout(Duration::from_millis(200)) {
            Ok(chunk) => all.extend(chunk),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return all,
        }
    }
}

/// The exit status; none if the child had to be killed.
fn wait(child: &mut Child, deadline: Duration) -> io::Result<Option<ExitStatus>> {
    if let Some(status) = wait_until(child, Instant::now() + deadline)? {
        return Ok(Some(status));
    }
    // The child leads its process group: its descendants go with it.
    let group = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    let _ = killpg(group, Signal::SIGTERM);
    if wait_until(child, Instant::now() + GRACE)?.is_none() {
        let _ = killpg(group, Signal::SIGKILL);
        // A process in uninterruptible sleep outlives even SIGKILL; it is not
        // waited for longer than this, and its zombie is the lesser evil.
        wait_until(child, Instant::now() + GRACE)?;
    }
    Ok(None)
}

fn wait_until(child: &mut Child, end: Instant) -> io::Result<Option<ExitStatus>> {
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let now = Instant::now();
        if now >= end {
            return Ok(None);
        }
        thread::sleep(pause.min(end - now));
        pause = (pause * 2).min(POLL);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn stdin_goes_in_and_stdout_comes_out() {
        assert_eq!(run("cat", &[], Some("a\nb"), LONG).unwrap(), "a\nb");
        assert_eq!(run("cat", &[], None, LONG).unwrap(), "");
    }

    #[test]
    fn output_larger_than_a_pipe_does_not_block() {
        let text = "x".repeat(1 << 20);
        assert_eq!(run("cat", &[], Some(&text), LONG).unwrap().len(), text.len());
        let error = run("sh", &["-c", "yes | head -c 300000 >&2; exit 3"], None, LONG);
        assert_eq!(error.unwrap_err().code(), Some(3));
    }

    #[test]
    fn more_than_fits_into_memory_is_taken_line_by_line() {
        let (mut lines, mut bytes) = (0_u64, 0);
        run_lines("sh", &["-c", "yes abc | head -c 400003"], LONG, |line| {
            lines += 1;
            bytes += line.len();
        })
        .unwrap();
        assert_eq!((lines, bytes), (100_001, 400_003));
        let failed = run_lines("sh", &["-c", "echo a; exit 3"], LONG, |_| {});
        assert_eq!(failed.unwrap_err().code(), Some(3));
        assert!(run_lines("printf", &["\\377\n"], LONG, |_| {}).is_err());
    }

    #[test]
    fn nobody_is_listened_to_beyond_the_deadline() {
        let short = Duration::from_millis(100);
        let (before, mut lines) = (Instant::now(), 0_u64);
        let endless = run_lines("yes", &[], short, |_| {
            lines += 1;
            // Something to take is always there.
            if lines.is_multiple_of(4096) {
                thread::sleep(Duration::from_millis(1));
            }
        });
        assert!(endless.is_err() && before.elapsed() < Duration::from_secs(10));
        let late = run_lines("sh", &["-c", "echo a; sleep 0.02; echo b"], short, |_| {
            thread::sleep(3 * short);
        });
        assert!(matches!(late, Err(ExecError { failure: Failure::Deadline(_), .. })), "{late:?}");
    }

    #[test]
    fn arguments_are_not_interpreted() {
        let hostile = "$(touch x); `id` 'q' \"r\" \\ *";
        assert_eq!(run("printf", &["%s", hostile], None, LONG).unwrap(), hostile);
    }

    #[test]
    fn the_environment_is_empty_but_for_path_and_locale() {
        let env = run("env", &[], None, LONG).unwrap();
        let mut names: Vec<_> = env.lines().filter_map(|line| line.split('=').next()).collect();
        names.sort_unstable();
        assert_eq!(names, ["LC_ALL", "PATH"]);
    }

    #[test]
    fn an_error_carries_command_status_and_the_end_of_stderr() {
        let error = run("sh", &["-c", "echo first >&2; echo last >&2; exit 5"], None, LONG);
        let error = error.unwrap_err();
        assert_eq!(error.code(), Some(5));
        let text = error.to_string();
        assert!(text.starts_with("`sh -c ") && text.ends_with(": first; last"), "{text}");
    }

    #[test]
    fn what_cannot_be_started_is_an_error() {
        let error = run("/does/not/exist", &[], None, LONG).unwrap_err();
        assert!(matches!(error.failure, Failure::Start(_)), "{error}");
    }

    #[test]
    fn the_whole_group_is_ended_at_the_deadline() {
        let before = Instant::now();
        let script = "echo $$ >&2; sleep 600 & sleep 600; echo never";
        let error = run("sh", &["-c", script], None, Duration::from_millis(200)).unwrap_err();
        assert!(matches!(error.failure, Failure::Deadline(_)), "{error}");
        assert!(before.elapsed() < Duration::from_secs(10));
        let group = Pid::from_raw(error.stderr.trim().parse().unwrap());
        // The orphan is reaped by init some time after the signal.
        let gone = (0..200).any(|_| {
            thread::sleep(Duration::from_millis(20));
            killpg(group, None).is_err()
        });
        assert!(gone, "a descendant outlived the deadline");
    }

    #[test]
    fn a_process_that_ignores_the_request_is_killed() {
        let script = "trap '' TERM; while :; do sleep 1; done";
        let before = Instant::now();
        let error = run("sh", &["-c", script], None, Duration::from_millis(100)).unwrap_err();
        assert!(matches!(error.failure, Failure::Deadline(_)), "{error}");
        assert!(before.elapsed() < GRACE * 3);
    }

    #[test]
    fn a_descendant_that_keeps_the_pipes_does_not_hold_the_caller() {
        let before = Instant::now();
        let (stdout, _) = run_both("sh", &["-c", "sleep 5 & echo done"], None, LONG).unwrap();
        assert_eq!(stdout, "done\n");
        assert!(before.elapsed() < Duration::from_secs(4));
    }
}
