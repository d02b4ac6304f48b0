//! Runs commands inside a node of the test bed for the host.
//!
//! It listens on the bed's own network card, which no scenario ever cuts. Each
//! connection is one command; see [`dmlocal_testbed::wire`].

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dmlocal_testbed::wire::{self, Kind, Request, Status};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long output may trail behind the end of a command. What still holds the
/// pipes after that was left in the background on purpose.
const TRAILING: Duration = Duration::from_millis(500);

fn main() -> Result<()> {
    let listener = TcpListener::bind(("::", wire::PORT)).context("listening")?;
    for connection in listener.incoming() {
        let connection = connection.context("accepting")?;
        thread::spawn(move || {
            if let Err(error) = serve(connection) {
                eprintln!("{error:#}");
            }
        });
    }
    Ok(())
}

/// The way back to the host, shared by what the command prints on either pipe.
struct Reply {
    stream: TcpStream,
    ended: bool,
}

impl Reply {
    /// Nothing may follow how the command ended, or the host would lose step.
    fn send(&mut self, kind: Kind, body: &[u8]) {
        if !self.ended {
            // A host that has hung up is noticed where its input is read.
            let _ = wire::send(&mut self.stream, kind, body);
        }
        self.ended |= kind == Kind::Exited;
    }
}

fn serve(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true).context("setting TCP_NODELAY")?;
    let (kind, body) = wire::receive(&mut stream).context("receiving a request")?;
    if kind != Kind::Request {
        bail!("expected a request, not {kind:?}");
    }
    let request: Request = serde_json::from_slice(&body).context("reading the request")?;
    let (program, arguments) = request.argv.split_first().context("a request names no program")?;
    let reply = Arc::new(Mutex::new(Reply { stream: stream.try_clone()?, ended: false }));
    let started = Command::new(program)
        .args(arguments)
        .current_dir("/root")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(error) => {
            let mut reply = reply.lock().unwrap_or_else(PoisonError::into_inner);
            reply.send(Kind::Stderr, format!("{program}: {error}\n").as_bytes());
            reply.send(Kind::Exited, &serde_json::to_vec(&Status::Code(127))?);
            drop(reply);
            let _ = stream.shutdown(Shutdown::Write);
            feed(stream, None::<ChildStdin>);
            return Ok(());
        }
    };
    let group = Pid::from_raw(i32::try_from(child.id())?);
    let (done, both_closed) = channel();
    if let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) {
        let (to, done_too) = (Arc::clone(&reply), done.clone());
        thread::spawn(move || forward(stdout, Kind::Stdout, &to, &done_too));
        let to = Arc::clone(&reply);
        thread::spawn(move || forward(stderr, Kind::Stderr, &to, &done));
    }
    let stdin = child.stdin.take();
    let (input, to) = (stream.try_clone()?, Arc::clone(&reply));
    thread::spawn(move || {
        feed(input, stdin);
        // Here the host has hung up, or the command is over and so is the connection.
        if !to.lock().unwrap_or_else(PoisonError::into_inner).ended {
            let _ = killpg(group, Signal::SIGKILL);
        }
    });
    let status = child.wait().context("waiting for the command")?;
    wait_for_trailing_output(&both_closed);
    let body = serde_json::to_vec(&status_of(status))?;
    reply.lock().unwrap_or_else(PoisonError::into_inner).send(Kind::Exited, &body);
    // What the host still sends is read on: closing with input unread would reset
    // the connection, and the host might lose the answer.
    let _ = stream.shutdown(Shutdown::Write);
    Ok(())
}

fn forward(mut pipe: impl Read, kind: Kind, reply: &Mutex<Reply>, done: &Sender<()>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = pipe.read(&mut buffer) {
        reply.lock().unwrap_or_else(PoisonError::into_inner).send(kind, &buffer[..length]);
    }
    let _ = done.send(());
}

/// Passes on standard input until the host hangs up.
fn feed(mut input: TcpStream, mut stdin: Option<impl Write>) {
    while let Ok((Kind::Stdin, bytes)) = wire::receive(&mut input) {
        let closed = match &mut stdin {
            Some(pipe) => bytes.is_empty() || pipe.write_all(&bytes).is_err(),
            None => false,
        };
        if closed {
            stdin = None;
        }
    }
}

fn wait_for_trailing_output(both_closed: &Receiver<()>) {
    let deadline = Instant::now() + TRAILING;
    for _ in 0..2 {
        let left = deadline.saturating_duration_since(Instant::now());
        if both_closed.recv_timeout(left).is_err() {
            return;
        }
    }
}

fn status_of(status: ExitStatus) -> Status {
    match (status.code(), status.signal()) {
        (Some(code), _) => Status::Code(code),
        (None, signal) => Status::Signal(signal.unwrap_or(0)),
    }
}
