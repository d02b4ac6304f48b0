//! Commands inside a node, from the host's side.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::socket::{setsockopt, sockopt};

use crate::wire::{self, Kind, Request, Status};

/// How often a silent node is looked after.
const TICK: Duration = Duration::from_millis(250);

/// What a command that has ended left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The command, for error messages.
    pub command: String,
    /// How it ended.
    pub status: Status,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

impl Output {
    /// Whether it ended well.
    pub fn success(&self) -> bool {
        self.status == Status::Code(0)
    }

    /// What it printed, without the space around it, if it ended well.
    pub fn ok(self) -> Result<String> {
        if !self.success() {
            bail!("`{}`: {:?}\n{}{}", self.command, self.status, self.stdout, self.stderr);
        }
        Ok(self.stdout.trim().to_owned())
    }
}

/// A command that was started inside a node. Dropping it kills the command.
pub struct Running {
    command: String,
    stream: TcpStream,
    progress: Arc<Progress>,
}

/// What is known of a command so far.
#[derive(Default)]
struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: Option<Result<Status, String>>,
}

impl Progress {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    /// Sends the request over a fresh connection. `is_alive` tells whether the
    /// node still has power: a node that lost it says nothing any more.
    pub(crate) fn start(
        mut stream: TcpStream,
        argv: &[&str],
        stdin: &[u8],
        is_alive: impl Fn() -> bool + Send + 'static,
    ) -> Result<Running> {
        let command = argv.join(" ");
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TICK))?;
        // A node that has crashed and come back answers these with a reset.
        setsockopt(&stream, sockopt::KeepAlive, &true)?;
        setsockopt(&stream, sockopt::TcpKeepIdle, &5)?;
        setsockopt(&stream, sockopt::TcpKeepInterval, &5)?;
        setsockopt(&stream, sockopt::TcpKeepCount, &12)?;
        let request = Request { argv: argv.iter().map(ToString::to_string).collect() };
        wire::send(&mut stream, Kind::Request, &serde_json::to_vec(&request)?)
            .with_context(|| format!("sending `{command}`"))?;
        let progress = Arc::new(Progress::default());
        let (receiver, known) = (stream.try_clone()?, Arc::clone(&progress));
        thread::spawn(move || {
            let end = follow(receiver, &known, &is_alive).map_err(|error| format!("{error:#}"));
            known.lock().end = Some(end);
            known.changed.notify_all();
        });
        let running = Running { command, stream, progress };
        running.feed(stdin);
        Ok(running)
    }

    /// A command may end before it has read everything: how it ended tells more
    /// than the broken connection.
    fn feed(&self, stdin: &[u8]) {
        let mut stream = &self.stream;
        let mut chunks = stdin.chunks(64 << 10).chain([&[][..]]);
        while chunks.next().is_some_and(|c| wire::send(&mut stream, Kind::Stdin, c).is_ok()) {}
    }

    /// Waits until the command ends, at most so long; then it is killed.
    pub fn wait(self, limit: Duration) -> Result<Output> {
        let command = self.command.clone();
        self.follow(limit, |state| state.end.is_some())
            .with_context(|| format!("waiting for `{command}`"))?;
        let mut state = self.progress.lock();
        let text = |bytes: &mut Vec<u8>| String::from_utf8_lossy(&std::mem::take(bytes)).into();
        match state.end.take() {
            Some(Ok(status)) => Ok(Output {
                command,
                status,
                stdout: text(&mut state.stdout),
                stderr: text(&mut state.stderr),
            }),
            Some(Err(error)) => Err(anyhow!("`{command}`: {error}")),
            None => Err(anyhow!("`{command}` has no end")),
        }
    }

    /// Waits until the command has printed that text, at most so long.
    pub fn wait_for_text(&self, text: &str, limit: Duration) -> Result<()> {
        let printed = |state: &State| {
            String::from_utf8_lossy(&state.stdout).contains(text) || state.end.is_some()
        };
        self.follow(limit, printed)
            .with_context(|| format!("waiting for `{}` to print {text:?}", self.command))?;
        if !self.stdout().contains(text) {
            bail!("`{}` ended without printing {text:?}: {}", self.command, self.stderr());
        }
        Ok(())
    }

    /// What it has printed so far.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.progress.lock().stdout).into()
    }

    /// What it has complained of so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.progress.lock().stderr).into()
    }

    /// Whether it has ended, or is cut off for good.
    pub fn has_ended(&self) -> bool {
        self.progress.lock().end.is_some()
    }

    /// Kills it, and what it started in its process group.
    pub fn kill(self) {}

    /// Passes what the command prints on as it comes, until it ends.
    pub fn stream_to(&self, stdout: &mut impl Write, stderr: &mut impl Write) -> Result<Status> {
        let mut state = self.progress.lock();
        loop {
            let (out, err) = (std::mem::take(&mut state.stdout), std::mem::take(&mut state.stderr));
            let end = state.end.take();
            drop(state);
            stdout.write_all(&out)?;
            stdout.flush()?;
            stderr.write_all(&err)?;
            match end {
                Some(Ok(status)) => return Ok(status),
                Some(Err(error)) => bail!("`{}`: {error}", self.command),
                None => state = self.progress.lock(),
            }
            while state.stdout.is_empty() && state.stderr.is_empty() && state.end.is_none() {
                state = self.progress.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn follow(&self, limit: Duration, done: impl Fn(&State) -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut state = self.progress.lock();
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "not within {limit:?}; so far it printed\n{}{}",
                    String::from_utf8_lossy(&state.stdout),
                    String::from_utf8_lossy(&state.stderr)
                );
            }
            let woken = self.progress.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The guest kills what it runs for a host that has hung up.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// Notes what a command prints until it says how it ended.
fn follow(stream: TcpStream, progress: &Progress, is_alive: &dyn Fn() -> bool) -> Result<Status> {
    let mut stream = Patient { stream, is_alive };
    loop {
        let (kind, body) = wire::receive(&mut stream).context("the node was cut off")?;
        match kind {
            Kind::Stdout => progress.lock().stdout.extend(body),
            Kind::Stderr => progress.lock().stderr.extend(body),
            Kind::Exited => return serde_json::from_slice(&body).context("reading its status"),
            Kind::Request | Kind::Stdin => bail!("the node sent {kind:?}"),
        }
        progress.changed.notify_all();
    }
}

/// Reads for as long as the node has power, however long it is silent.
struct Patient<'a> {
    stream: TcpStream,
    is_alive: &'a dyn Fn() -> bool,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match self.stream.read(buffer) {
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
                        && (self.is_alive)() => {}
                result => return result,
            }
        }
    }
}
